"""Detect that the ranks of a distributed run have the same root, and thus the same masks."""

from __future__ import annotations

import warnings

from torch import distributed

from regtorch.keyed.state import State


def warn_of_shared_root(root: tuple[int, int], state: State) -> None:
    """Warn if the next rank has the same root.

    The ranks leave their roots in the store of the process group, which needs no communication that
    all ranks take part in. Of two ranks, at least one sees the root of the other at its second
    call, since a train step synchronizes them.
    """
    if state.compared == 2 or not (distributed.is_available() and distributed.is_initialized()):
        return
    from torch.distributed.distributed_c10d import _get_default_store  # not in every build

    state.compared += 1
    rank = distributed.get_rank()
    other = (rank + 1) % distributed.get_world_size()
    place, store = "regtorch.keyed/{}/{}/{}".format, _get_default_store()
    store.set(place(*root, rank), "")
    if other != rank and store.check([place(*root, other)]):
        state.compared = 2
        warnings.warn(
            f"root must be another one on each rank; got the same on ranks {rank} and {other}, "
            "which then draw the same masks for different rows of a batch. Call "
            "regtorch.keyed.set_key(model, regtorch.fold_in(root, rank), step).",
            stacklevel=3,
        )
