"""Regularisation for JAX: dropout and L2, the same in PyTorch, bit for bit where bits are drawn.

`regtorch` is the PyTorch twin of this package, file by file; `parity_tests` proves that they agree.
"""

from regjax import interop as interop
from regjax import optim as optim
from regjax._decay.param_trees import DecayTable as DecayTable
from regjax._decay.param_trees import decay_mask as decay_mask
from regjax._decay.param_trees import decay_rates as decay_rates
from regjax._decay.param_trees import decay_table as decay_table
from regjax._decay.penalty import elastic_net_penalty as elastic_net_penalty
from regjax._decay.penalty import l1_penalty as l1_penalty
from regjax._decay.penalty import l2_penalty as l2_penalty
from regjax._decay.penalty import l2_sp_penalty as l2_sp_penalty
from regjax._dropout.alpha import alpha_dropout as alpha_dropout
from regjax._dropout.alpha import feature_alpha_dropout as feature_alpha_dropout
from regjax._dropout.attention import dot_product_attention as dot_product_attention
from regjax._dropout.core import dropout as dropout
from regjax._dropout.drop_block import drop_block as drop_block
from regjax._dropout.drop_connect import drop_connect as drop_connect
from regjax._dropout.drop_path import drop_path as drop_path
from regjax._dropout.embedding import embedding_dropout as embedding_dropout
from regjax._dropout.features import feature_dropout as feature_dropout
from regjax._dropout.gaussian import gaussian_dropout as gaussian_dropout
from regjax._dropout.gaussian import gaussian_noise as gaussian_noise
from regjax._dropout.schedules import constant_rate as constant_rate
from regjax._dropout.schedules import cosine_rate as cosine_rate
from regjax._dropout.schedules import depth_rates as depth_rates
from regjax._dropout.schedules import linear_rate as linear_rate
from regjax._dropout.variational import variational_dropout as variational_dropout
from regjax._guards import DropoutGuard as DropoutGuard
from regjax._guards import check_dropout as check_dropout
from regjax._mc_dropout import Prediction as Prediction
from regjax._mc_dropout import mc_dropout as mc_dropout
from regjax._random.bernoulli import bernoulli as bernoulli
from regjax._random.events import observing as observing
from regjax._random.keys import site_key as site_key
from regjax._random.normal import normal as normal
from regjax._random.packed import packed_bernoulli as packed_bernoulli
from regshared.report import DropoutProblem as DropoutProblem
from regshared.report import DropoutReport as DropoutReport
