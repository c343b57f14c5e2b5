"""Regularisation for JAX: dropout and L2, the same in PyTorch, bit for bit where bits are drawn.

`regtorch` is the PyTorch twin of this package, file by file; `parity_tests` proves that they agree.
"""

from regjax import interop as interop
from regjax import optim as optim
from regjax._alpha import alpha_dropout as alpha_dropout
from regjax._alpha import feature_alpha_dropout as feature_alpha_dropout
from regjax._attention import dot_product_attention as dot_product_attention
from regjax._blocks import drop_block as drop_block
from regjax._depth import drop_path as drop_path
from regjax._dropout import dropout as dropout
from regjax._embedding import embedding_dropout as embedding_dropout
from regjax._features import feature_dropout as feature_dropout
from regjax._findings import DropoutProblem as DropoutProblem
from regjax._findings import DropoutReport as DropoutReport
from regjax._guards import DropoutGuard as DropoutGuard
from regjax._guards import check_dropout as check_dropout
from regjax._keys import site_key as site_key
from regjax._masks import bernoulli as bernoulli
from regjax._noise import gaussian_dropout as gaussian_dropout
from regjax._noise import gaussian_noise as gaussian_noise
from regjax._normal import normal as normal
from regjax._observe import observing as observing
from regjax._packed import packed_bernoulli as packed_bernoulli
from regjax._penalty import elastic_net_penalty as elastic_net_penalty
from regjax._penalty import l1_penalty as l1_penalty
from regjax._penalty import l2_penalty as l2_penalty
from regjax._penalty import l2_sp_penalty as l2_sp_penalty
from regjax._recurrent import variational_dropout as variational_dropout
from regjax._rules import DecayTable as DecayTable
from regjax._rules import decay_mask as decay_mask
from regjax._rules import decay_rates as decay_rates
from regjax._rules import decay_table as decay_table
from regjax._schedules import constant_rate as constant_rate
from regjax._schedules import cosine_rate as cosine_rate
from regjax._schedules import depth_rates as depth_rates
from regjax._schedules import linear_rate as linear_rate
from regjax._uncertainty import Prediction as Prediction
from regjax._uncertainty import mc_dropout as mc_dropout
from regjax._weights import drop_connect as drop_connect
