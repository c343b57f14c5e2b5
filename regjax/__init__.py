"""Regularization for JAX: dropout and L2, with the same random bits as the PyTorch twin.

`regtorch` is the PyTorch twin of this package, file by file; `parity_tests` checks that they agree.
"""

from regjax import interop, keyed, optim, torch_random
from regjax._certificate import MaskCertificate, certify_masks
from regjax._decay.param_trees import DecayTable, decay_mask, decay_rates, decay_table
from regjax._decay.penalty import elastic_net_penalty, l1_penalty, l2_penalty, l2_sp_penalty
from regjax._dropout.alpha import alpha_dropout, feature_alpha_dropout
from regjax._dropout.attention import dot_product_attention
from regjax._dropout.core import dropout
from regjax._dropout.drop_block import drop_block
from regjax._dropout.drop_connect import drop_connect
from regjax._dropout.drop_path import drop_path
from regjax._dropout.embedding import embedding_dropout
from regjax._dropout.features import feature_dropout
from regjax._dropout.gaussian import gaussian_dropout, gaussian_noise
from regjax._dropout.schedules import constant_rate, cosine_rate, depth_rates, linear_rate
from regjax._dropout.variational import variational_dropout
from regjax._guards import DropoutGuard, audit_masks, check_dropout
from regjax._mc_dropout import Prediction, mc_dropout
from regjax._random.bernoulli import bernoulli
from regjax._random.by_example import by_example
from regjax._random.events import observing
from regjax._random.keys import site_key
from regjax._random.normal import normal
from regjax._random.packed import packed_bernoulli
from regshared import __version__
from regshared.mask_audit import MaskRelation
from regshared.report import DropoutProblem, DropoutReport

__all__ = [
    "DecayTable",
    "DropoutGuard",
    "DropoutProblem",
    "DropoutReport",
    "MaskCertificate",
    "MaskRelation",
    "Prediction",
    "__version__",
    "alpha_dropout",
    "audit_masks",
    "bernoulli",
    "by_example",
    "certify_masks",
    "check_dropout",
    "constant_rate",
    "cosine_rate",
    "decay_mask",
    "decay_rates",
    "decay_table",
    "depth_rates",
    "dot_product_attention",
    "drop_block",
    "drop_connect",
    "drop_path",
    "dropout",
    "elastic_net_penalty",
    "embedding_dropout",
    "feature_alpha_dropout",
    "feature_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "interop",
    "keyed",
    "l1_penalty",
    "l2_penalty",
    "l2_sp_penalty",
    "linear_rate",
    "mc_dropout",
    "normal",
    "observing",
    "optim",
    "packed_bernoulli",
    "site_key",
    "torch_random",
    "variational_dropout",
]


def __dir__() -> list[str]:
    """List the public names, for `dir` and completion."""
    return __all__
