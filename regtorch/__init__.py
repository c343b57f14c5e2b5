"""Regularisation for PyTorch: dropout and L2, the same in JAX, bit for bit where bits are drawn.

`regjax` is the JAX twin of this package, file by file; `parity_tests` proves that they agree.
"""

from regtorch import keyed as keyed
from regtorch import nn as nn
from regtorch import optim as optim
from regtorch._alpha import alpha_dropout as alpha_dropout
from regtorch._alpha import feature_alpha_dropout as feature_alpha_dropout
from regtorch._attention import dot_product_attention as dot_product_attention
from regtorch._blocks import drop_block as drop_block
from regtorch._depth import drop_path as drop_path
from regtorch._dropout import dropout as dropout
from regtorch._embedding import embedding_dropout as embedding_dropout
from regtorch._features import feature_dropout as feature_dropout
from regtorch._findings import DropoutProblem as DropoutProblem
from regtorch._findings import DropoutReport as DropoutReport
from regtorch._guards import DropoutGuard as DropoutGuard
from regtorch._guards import check_dropout as check_dropout
from regtorch._keys import bits as bits
from regtorch._keys import fold_in as fold_in
from regtorch._keys import key as key
from regtorch._keys import site_key as site_key
from regtorch._keys import split as split
from regtorch._masks import bernoulli as bernoulli
from regtorch._noise import gaussian_dropout as gaussian_dropout
from regtorch._noise import gaussian_noise as gaussian_noise
from regtorch._normal import normal as normal
from regtorch._observe import observing as observing
from regtorch._packed import packed_bernoulli as packed_bernoulli
from regtorch._penalty import elastic_net_penalty as elastic_net_penalty
from regtorch._penalty import l1_penalty as l1_penalty
from regtorch._penalty import l2_penalty as l2_penalty
from regtorch._penalty import l2_sp_penalty as l2_sp_penalty
from regtorch._recurrent import variational_dropout as variational_dropout
from regtorch._rules import DecayTable as DecayTable
from regtorch._rules import decay_groups as decay_groups
from regtorch._rules import decay_mask as decay_mask
from regtorch._rules import decay_rates as decay_rates
from regtorch._rules import decay_table as decay_table
from regtorch._schedules import constant_rate as constant_rate
from regtorch._schedules import cosine_rate as cosine_rate
from regtorch._schedules import depth_rates as depth_rates
from regtorch._schedules import linear_rate as linear_rate
from regtorch._uncertainty import Prediction as Prediction
from regtorch._uncertainty import dropout_only as dropout_only
from regtorch._uncertainty import mc_dropout as mc_dropout
from regtorch._weights import drop_connect as drop_connect
