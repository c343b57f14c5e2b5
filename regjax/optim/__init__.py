r"""PyTorch's optimizers as optax chains, with PyTorch's names, order of arguments and defaults.

Each is one chain of four links. The decay comes before the moments where it is coupled (SGD, Adam)
and after them where it is decoupled (AdamW):

    maximize?  ->  add_decayed_weights  ->  momentum or moments  ->  scale_by_learning_rate
    maximize?  ->  moments  ->  add_decayed_weights  ->  scale_by_learning_rate

A link that has nothing to do is `optax.identity()`, so a state always has four parts. Updates and
state have the dtypes of gradients and parameters, whatever the dtype of a schedule. On half
precision a step is computed in float32 and rounded once at its end, where PyTorch rounds after each
kernel: there the two agree to rounding, but rounding shows.

`weight_decay` adds `weight_decay * w` to the gradient, while the penalty
`regjax.l2_penalty(params, c)` has the gradient `2 * c * w`.
"""

from regjax.optim._adam import adam as adam
from regjax.optim._adam import adamw as adamw
from regjax.optim._descent import sgd as sgd
