"""PyTorch's optimizers as optax chains, with their arguments, order and defaults.

There are two exceptions. `lr` is `learning_rate`, as in optax. `foreach`, `fused`, `capturable` and
`differentiable`, which concern PyTorch's implementation, do not exist. All raise a TypeError.

Each optimizer is a chain of four named links. The decay precedes the moments where it is coupled
(SGD, Adam and most others) and follows them where it is decoupled (AdamW, Adafactor, Muon):

    maximize  ->  weight_decay  ->  moments  ->  learning_rate
    maximize  ->  moments  ->  learning_rate  ->  weight_decay

These are `optax.scale(-1.0)`, `optax.add_decayed_weights`, the moments or the momentum, and
`optax.scale_by_learning_rate`; in ASGD, `moments` is the average of the parameters and comes last.
The decoupled `weight_decay` is our own and rounds as PyTorch does: it multiplies a parameter by the
rounded number `1 - learning_rate * weight_decay`, and rounds the product before it adds the step.
`optax.adamw` first adds decay and step to each other, and is 2e-5 away from PyTorch after a
thousand steps in float32.

A state is a dict of the states of the links: `state["moments"].mu` is Adam's first moment, whether
its decay is coupled or not. A link with nothing to do is `optax.identity()`, so every state has the
four keys. Updates and state have the dtypes of gradients and parameters, whatever the dtype of a
schedule. In half precision, a step is computed in float32 and rounded once at its end, while
PyTorch rounds after each kernel, so the two agree up to rounding only. `optax.inject_hyperparams`
would also round the hyperparameters, 0.99 to 0.988: pass it `hyperparam_dtype=jnp.float32`.

Every `update` compares the gradients with the parameters, or with the state if no parameters are
passed. Another structure or shape, a complex gradient of a real parameter, and a gradient of an
integer raise an error that names the leaf; the check is static and costs nothing under `jit`. A
leaf whose gradient is None keeps its state, and its update is None: use `equinox.apply_updates`,
because `optax.apply_updates` raises on None. A `float0` gradient gives an update of zero. All
leaves share one step count, while PyTorch keeps one per parameter. This covers the integers,
functions and strings of an Equinox model: pass `eqx.filter(model, eqx.is_array)` to `init`, and the
gradients of `eqx.filter_grad` to `update`. Extra arguments, such as `value`, are accepted and
ignored.

`optax.inject_hyperparams` injects every hyperparameter that is passed, and the defaults except
zeros that turn something off: `sgd(0.1)` keeps no momentum buffer there, `sgd(0.1, momentum=0.0)`
keeps one, because an injected number may change. Pass `betas` as an array of two numbers, or a
schedule of such arrays, to inject them. Name a mask that is a function in `static_args=("mask",)`,
or optax calls it with the step count; the resulting mask raises an error.

`weight_decay` adds `weight_decay * w` to the gradient, while the penalty
`regjax.l2_penalty(params, c)`, which has no factor of one half, has the gradient `2 * c * w`. Under
coupled decay, `weight_decay=2 * c` therefore equals the penalty at every step. Decays that PyTorch
does not have are separate links, such as `add_l1_decay`.

`python -m parity_tests.exactness` measures the distance to PyTorch, step by step. SGD and Rprop are
bitwise identical to it in float32 on a CPU where update and `optax.apply_updates` are compiled
together, and both frameworks have fused multiply-adds or neither has.
"""

from regjax.optim._adafactor import adafactor
from regjax.optim._adam import ScaleByNadamState, adam, adamw
from regjax.optim._adam_variants import adamax, nadam, radam
from regjax.optim._decays import (
    add_cautious_weight_decay,
    add_decay_by_leaf,
    add_independent_weight_decay,
    add_l1_decay,
    add_l2_sp_decay,
    layerwise_scale,
    scale_by_leaf,
)
from regjax.optim._descent import asgd, rprop, sgd
from regjax.optim._muon import muon
from regjax.optim._rms import adadelta, adagrad, rmsprop

__all__ = [
    "ScaleByNadamState",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "add_cautious_weight_decay",
    "add_decay_by_leaf",
    "add_independent_weight_decay",
    "add_l1_decay",
    "add_l2_sp_decay",
    "asgd",
    "layerwise_scale",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "scale_by_leaf",
    "sgd",
]


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
