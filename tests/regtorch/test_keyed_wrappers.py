"""`regtorch.keyed`: models in wrappers have the names of the models, and draw the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import regtorch
from regtorch import keyed
from regtorch.keyed.calls import site_of, states_of
from tests.regtorch.test_keyed_draws import ROOT, X, at, keyed_model


class Block(nn.Module):
    """Draws in a layer and by a function; its child is named as that of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.linear = nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x):
        return F.dropout(self.linear(self.module(x)), 0.5, self.training)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Dropout(0.5))


# The compiler reads this attribute of the tensors between its graphs.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
NAMES = ["0.module", "0", "1"]


def expected(plain: nn.Module, step: int) -> torch.Tensor:
    x = regtorch.dropout(X, 0.5, key=at("0.module", step))
    x = regtorch.dropout(plain[0].linear(x), 0.5, key=at("0", step))
    return regtorch.dropout(x, 0.5, key=at("1", step))


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "moving average": AveragedModel,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "compiled and averaged": lambda module: AveragedModel(torch.compile(module, backend="eager")),
    "deep copy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.fixture(scope="module")
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("converted_first", [True, False])
@pytest.mark.usefixtures("group")
def test_a_wrapped_model_has_the_names_of_the_model(name, converted_first):
    wrap, plain = WRAPPERS[name], model()
    wrapped = wrap(keyed.convert(model())) if converted_first else keyed.convert(wrap(model()))
    state = torch.get_rng_state()
    for step in range(3):  # a compiler would give up after a few, if the keys were constants
        keyed.set_key(wrapped, ROOT, step)
        assert torch.equal(wrapped(X), expected(plain, step))
    assert torch.equal(torch.get_rng_state(), state)
    assert keyed.sites(wrapped) == NAMES
    assert (site_of(wrapped) is None) == (name not in ("deep copy", "pickle"))
    assert torch.equal(wrapped.eval()(X), plain.eval()(X))


@pytest.mark.parametrize("make", [model, lambda: nn.TransformerEncoderLayer(8, 2, 16)])
def test_a_compiled_function_of_a_model_draws_the_same(make):
    plain = keyed_model(make())
    compiled = torch.compile(lambda x: plain(x) * 2, backend="eager")
    y = compiled(X)
    keyed.set_key(plain, ROOT, 0)
    assert torch.equal(y, plain(X) * 2)


def test_an_average_of_a_model_follows_it_and_draws_on_its_own():
    source = keyed_model(model())
    average = AveragedModel(source, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    source(X)
    average.update_parameters(source)
    assert states_of(average)[0] is not states_of(source)[0]
    keyed.set_key(average, ROOT, 4)
    assert torch.equal(average(X), expected(model(), 4))


def test_a_part_can_be_called_on_its_own():
    whole = keyed_model(model(), step=2)
    x = regtorch.dropout(X, 0.5, key=at("0.module", 2))
    assert torch.equal(whole[0].module(X), x)
    assert keyed.sites(whole[1]) == ["1"]
