r"""PyTorch's optimizers as optax chains, with PyTorch's names, order of arguments and defaults.

Each is one chain of four links. The decay comes before the moments where it is coupled (SGD, Adam
and most others) and after them where it is decoupled (AdamW, Adafactor, Muon):

    maximize?  ->  add_decayed_weights  ->  momentum or moments  ->  scale_by_learning_rate
    maximize?  ->  moments  ->  scale_by_learning_rate  ->  learning_rate * weight_decay

The last of these is a link of our own, which rounds as PyTorch does: it multiplies a parameter by
the rounded number `1 - learning_rate * weight_decay`, and rounds the product before it adds the
step. `optax.adamw` adds decay and step to each other first, and is 2e-5 away from PyTorch after a
thousand steps of float32.

A link that has nothing to do is `optax.identity()`, so a state always has four parts. Updates and
state have the dtypes of gradients and parameters, whatever the dtype of a schedule. On half
precision a step is computed in float32 and rounded once at its end, where PyTorch rounds after each
kernel: there the two agree to rounding, but rounding shows. `optax.inject_hyperparams` would round
the hyperparameters too, 0.99 to 0.988: give it `hyperparam_dtype=jnp.float32`.

Every `update` compares its gradients with the parameters, or with the state where no parameters are
passed. Another structure, another shape, a complex gradient of a real parameter, and a gradient of
an integer are errors that name the leaf; the comparison is static, so it costs nothing under `jit`.
A leaf whose gradient is None keeps its state, and its update is None: apply the updates with
`equinox.apply_updates`, since `optax.apply_updates` raises on None. A `float0` gradient gives an
update of zero. The step count is shared by all leaves, where PyTorch keeps one for each parameter.
This covers the integers, functions and strings in an Equinox model: pass `eqx.filter(model,
eqx.is_array)` to `init`, and the gradients of `eqx.filter_grad` to `update`. Arguments other than
the usual three, such as `value`, are accepted and ignored.

`optax.inject_hyperparams` injects each hyperparameter that is passed, and the defaults other than
the zeros that switch something off: `sgd(0.1)` keeps no momentum buffer there, `sgd(0.1,
momentum=0.0)` keeps one, since an injected number may change. Pass `betas` as an array of two
numbers, or a schedule of such arrays, to inject them. A mask that is a function must be named,
`static_args=("mask",)`, or optax calls it with the step count; such a mask is refused.

`weight_decay` adds `weight_decay * w` to the gradient, while the penalty
`regjax.l2_penalty(params, c)` has the gradient `2 * c * w`. Decays that PyTorch does not have are
links of their own: `add_l1_decay` and those beside it.

`python -m parity_tests.exactness` measures how far each is from PyTorch's own, step by step. SGD
and Rprop are bitwise identical to it in float32 on a CPU where update and `optax.apply_updates` are
compiled together, and both frameworks have fused multiply-adds or neither has.
"""

from regjax.optim._adafactor import adafactor
from regjax.optim._adam import ScaleByNadamState, adam, adamax, adamw, nadam, radam
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
    """List what is public, for `dir` and completion."""
    return __all__
