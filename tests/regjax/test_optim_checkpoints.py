"""The state of every optimizer through Orbax, flax.serialization and pickle, bit for bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from regjax import optim
from tests.regjax.optimizers import PARAMS, VARIANTS, matrices


def through_orbax(state: Any, folder: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.eval_shape(lambda: state))


def through_flax(state: Any, folder: Path) -> Any:
    (folder / "state").write_bytes(serialization.to_bytes(state))
    target = jax.tree.map(jnp.zeros_like, state)
    return serialization.from_bytes(target, (folder / "state").read_bytes())


def through_pickle(state: Any, folder: Path) -> Any:
    (folder / "state").write_bytes(pickle.dumps(jax.device_get(state)))
    return pickle.loads((folder / "state").read_bytes())


SCHEDULE = optax.constant_schedule(0.1)
# Each with the parameters that it accepts.
OPTIMIZERS = {
    **{name: (variant.make(0.1), variant.problem[0]) for name, variant in VARIANTS.items()},
    "scheduled": (optim.adamw(SCHEDULE, weight_decay=SCHEDULE), PARAMS),
    "bfloat16 moments": (optim.adam(mu_dtype="bfloat16"), PARAMS),
    "injected": (optax.inject_hyperparams(optim.adamw)(0.1), PARAMS),
    "independent decay": (
        optax.chain(optim.adam(), optim.add_independent_weight_decay(SCHEDULE)),
        PARAMS,
    ),
    "cautious decay": (
        optax.chain(optim.adam(), optim.add_cautious_weight_decay(0.1, mask=matrices)),
        PARAMS,
    ),
    "decay to a reference": (optax.chain(optim.sgd(), optim.add_l2_sp_decay(PARAMS, 0.1)), PARAMS),
}


def test_every_optimizer_is_in_the_table():
    makers = {name for name in optim.__all__ if not name.startswith(("add_", "Scale"))}
    assert makers - {"layerwise_scale", "scale_by_leaf"} <= OPTIMIZERS.keys()


@pytest.mark.parametrize("through", [through_orbax, through_flax, through_pickle])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.sample(31)
def test_a_state_is_restored_bit_for_bit(tmp_path, name, through):
    optimizer, params = OPTIMIZERS[name]
    # Different values everywhere, so that exchanged leaves are found.
    leaves, structure = jax.tree.flatten(optimizer.init(params))
    state = structure.unflatten(
        [leaf + jnp.asarray(number + 1).astype(leaf.dtype) for number, leaf in enumerate(leaves)]
    )
    restored = through(state, tmp_path)
    assert jax.tree.structure(restored) == structure
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert before.dtype == after.dtype
        assert before.shape == after.shape
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
