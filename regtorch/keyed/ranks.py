"""Detect ranks of a distributed run whose roots do not fit together.

The ranks leave their roots in the store of the process group, which needs no communication that all
ranks take part in. Of two ranks, at least one sees the root of the other at its second call, since
a train step synchronizes them.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

from torch import distributed

from regtorch.keyed.state import State

_NUMBERS = itertools.count()  # the ranks run the same program, and number their models alike


def warn_of_shared_root(root: tuple[int, int], state: State) -> None:
    """Warn if the next rank has the same root."""
    if not (store := _store(state)):
        return
    rank, other = _ranks()
    place = "regtorch.keyed/{}/{}/{}".format
    store.set(place(*root, rank), "")
    if other != rank and store.check([place(*root, other)]):
        state.compared = 2
        warnings.warn(
            f"root must be another one on each rank; got the same on ranks {rank} and {other}, "
            "which then draw the same masks for different rows of a batch. Call "
            "regtorch.keyed.set_key(model, root, step, examples=numbers) with the number of each "
            "row, or set_key(model, regtorch.fold_in(root, rank), step).",
            stacklevel=3,
        )


def warn_of_other_root(root: tuple[int, int], state: State) -> None:
    """Warn if the next rank has another root, where draws are by example."""
    if not (store := _store(state)):
        return
    if state.number is None:
        state.number = next(_NUMBERS)
    rank, other = _ranks()
    place = f"regtorch.keyed/model {state.number}/{{}}".format
    own = "/".join(map(str, root))
    store.set(place(rank), own)
    if store.check([place(other)]) and store.get(place(other)).decode() != own:
        state.compared = 2
        warnings.warn(
            f"root must be the same on each rank, with examples; got others on ranks {rank} and "
            f"{other}, whose masks are then not those of one batch. Do not fold the rank into it.",
            stacklevel=3,
        )


def _store(state: State) -> Any:
    """Return the store, or None where there is nothing to compare, and count the call."""
    if state.compared == 2 or not (distributed.is_available() and distributed.is_initialized()):
        return None
    from torch.distributed.distributed_c10d import _get_default_store  # not in every build

    state.compared += 1
    return _get_default_store()


def _ranks() -> tuple[int, int]:
    """Return the ranks of this process and of the next."""
    rank = distributed.get_rank()
    return rank, (rank + 1) % distributed.get_world_size()
