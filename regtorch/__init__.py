"""Regularisation for PyTorch: dropout and L2, the same in JAX, bit for bit where bits are drawn.

`regjax` is the JAX twin of this package, file by file; `parity_tests` proves that they agree.
"""

from regshared.report import DropoutProblem as DropoutProblem
from regshared.report import DropoutReport as DropoutReport
from regtorch import keyed as keyed
from regtorch import nn as nn
from regtorch import optim as optim
from regtorch._decay.param_trees import DecayTable as DecayTable
from regtorch._decay.param_trees import decay_groups as decay_groups
from regtorch._decay.param_trees import decay_mask as decay_mask
from regtorch._decay.param_trees import decay_rates as decay_rates
from regtorch._decay.param_trees import decay_table as decay_table
from regtorch._decay.penalty import elastic_net_penalty as elastic_net_penalty
from regtorch._decay.penalty import l1_penalty as l1_penalty
from regtorch._decay.penalty import l2_penalty as l2_penalty
from regtorch._decay.penalty import l2_sp_penalty as l2_sp_penalty
from regtorch._dropout.alpha import alpha_dropout as alpha_dropout
from regtorch._dropout.alpha import feature_alpha_dropout as feature_alpha_dropout
from regtorch._dropout.attention import dot_product_attention as dot_product_attention
from regtorch._dropout.core import dropout as dropout
from regtorch._dropout.drop_block import drop_block as drop_block
from regtorch._dropout.drop_connect import drop_connect as drop_connect
from regtorch._dropout.drop_path import drop_path as drop_path
from regtorch._dropout.embedding import embedding_dropout as embedding_dropout
from regtorch._dropout.features import feature_dropout as feature_dropout
from regtorch._dropout.gaussian import gaussian_dropout as gaussian_dropout
from regtorch._dropout.gaussian import gaussian_noise as gaussian_noise
from regtorch._dropout.schedules import constant_rate as constant_rate
from regtorch._dropout.schedules import cosine_rate as cosine_rate
from regtorch._dropout.schedules import depth_rates as depth_rates
from regtorch._dropout.schedules import linear_rate as linear_rate
from regtorch._dropout.variational import variational_dropout as variational_dropout
from regtorch._guards import DropoutGuard as DropoutGuard
from regtorch._guards import check_dropout as check_dropout
from regtorch._mc_dropout import Prediction as Prediction
from regtorch._mc_dropout import dropout_only as dropout_only
from regtorch._mc_dropout import mc_dropout as mc_dropout
from regtorch._random.bernoulli import bernoulli as bernoulli
from regtorch._random.events import observing as observing
from regtorch._random.keys import bits as bits
from regtorch._random.keys import fold_in as fold_in
from regtorch._random.keys import key as key
from regtorch._random.keys import site_key as site_key
from regtorch._random.keys import split as split
from regtorch._random.normal import normal as normal
from regtorch._random.packed import packed_bernoulli as packed_bernoulli
