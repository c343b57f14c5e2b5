"""Dropout and weight decay for PyTorch, with masks bitwise identical to those of JAX.

`regjax` is the JAX twin of this package, file by file; `parity_tests` checks that they agree.
"""

from regshared import __version__
from regshared.extras import needs

with needs("regtorch", extra="torch", package="torch"):
    import torch as _torch  # noqa: F401  # so that the error names the extra

from regshared.mask_audit import MaskRelation
from regshared.report import DropoutProblem, DropoutReport
from regtorch import keyed, nn, optim
from regtorch._decay.param_trees import (
    DecayTable,
    decay_groups,
    decay_mask,
    decay_rates,
    decay_table,
)
from regtorch._decay.penalty import elastic_net_penalty, l1_penalty, l2_penalty, l2_sp_penalty
from regtorch._dropout.alpha import alpha_dropout, feature_alpha_dropout
from regtorch._dropout.attention import dot_product_attention
from regtorch._dropout.core import dropout
from regtorch._dropout.drop_block import drop_block
from regtorch._dropout.drop_connect import drop_connect
from regtorch._dropout.drop_path import drop_path
from regtorch._dropout.embedding import embedding_dropout
from regtorch._dropout.features import feature_dropout
from regtorch._dropout.gaussian import gaussian_dropout, gaussian_noise
from regtorch._dropout.schedules import constant_rate, cosine_rate, depth_rates, linear_rate
from regtorch._dropout.variational import variational_dropout
from regtorch._guards import DropoutGuard, audit_masks, check_dropout
from regtorch._mc_dropout import Prediction, dropout_only, mc_dropout
from regtorch._random.bernoulli import bernoulli
from regtorch._random.by_example import by_example
from regtorch._random.events import observing
from regtorch._random.keys import bits, fold_in, key, site_key, split
from regtorch._random.normal import normal
from regtorch._random.packed import packed_bernoulli

__all__ = [
    "DecayTable",
    "DropoutGuard",
    "DropoutProblem",
    "DropoutReport",
    "MaskRelation",
    "Prediction",
    "__version__",
    "alpha_dropout",
    "audit_masks",
    "bernoulli",
    "bits",
    "by_example",
    "check_dropout",
    "constant_rate",
    "cosine_rate",
    "decay_groups",
    "decay_mask",
    "decay_rates",
    "decay_table",
    "depth_rates",
    "dot_product_attention",
    "drop_block",
    "drop_connect",
    "drop_path",
    "dropout",
    "dropout_only",
    "elastic_net_penalty",
    "embedding_dropout",
    "feature_alpha_dropout",
    "feature_dropout",
    "fold_in",
    "gaussian_dropout",
    "gaussian_noise",
    "key",
    "keyed",
    "l1_penalty",
    "l2_penalty",
    "l2_sp_penalty",
    "linear_rate",
    "mc_dropout",
    "nn",
    "normal",
    "observing",
    "optim",
    "packed_bernoulli",
    "site_key",
    "split",
    "variational_dropout",
]


def __dir__() -> list[str]:
    """List the public names, for `dir` and completion."""
    return __all__
