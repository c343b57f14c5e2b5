"""`regtorch.keyed`: models in wrappers have the names of the models, and draw the same."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, multiprocessing, nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
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


def sharded(module: nn.Module) -> nn.Module:
    for part in module.children():
        fully_shard(part)
    return fully_shard(module)


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "FSDP": lambda module: FullyShardedDataParallel(module, device_id=torch.device("cpu")),
    "fully_shard": sharded,
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
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_a_wrapped_model_has_the_names_of_the_model(name, converted_first):
    wrap, plain = WRAPPERS[name], model()
    wrapped = wrap(keyed.convert(model())) if converted_first else keyed.convert(wrap(model()))
    state = torch.get_rng_state()
    for step in range(3):  # a compiler would give up after a few, if the keys were constants
        keyed.set_key(wrapped, ROOT, step)
        assert torch.equal(wrapped(X), expected(plain, step))
    assert torch.equal(torch.get_rng_state(), state)
    assert keyed.sites(wrapped) == NAMES
    assert (site_of(wrapped) is None) == (name not in ("deep copy", "pickle", "fully_shard"))
    assert torch.equal(wrapped.eval()(X), plain.eval()(X))


@pytest.mark.parametrize("converted_first", [True, False])
def test_steps_and_micro_batches_compile_nothing_again(converted_first):
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    make = lambda: nn.Sequential(model(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    compiled = torch.compile(keyed.convert(make()) if converted_first else make(), backend=backend)
    plain, counts = keyed.convert(make()), []
    keyed.convert(compiled)
    for step in range(12):  # more than the compiler's limit of recompilations
        results = []
        for each in (compiled, plain):
            keyed.set_key(each, ROOT, step)
            each.zero_grad()
            results.append([each(x) for x in (X, 2 * X)])
            sum(y.sum() for y in results[-1]).backward()
            results[-1] += [p.grad for p in each.parameters()]
        assert all(map(torch.equal, *results))
        counts.append(len(graphs))
    assert counts[1:] == counts[:1] * 11
    # Reverted, the model is compiled as a whole.
    graphs.clear()
    keyed.revert(compiled).eval()(X)
    linear = [
        node for graph in graphs for node in graph.graph.nodes if "linear" in str(node.target)
    ]
    assert (len(graphs), len(linear)) == (1, 3)


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


@pytest.mark.parametrize(("roots", "warns"), [((7, 7), True), ((7, 8), False)])
@pytest.mark.usefixtures("group")
def test_a_root_that_the_next_rank_has_too_is_a_warning(roots, warns, monkeypatch):
    """Play two ranks, one after the other, which do not wait for each other."""
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    found = []
    models = [keyed.convert(model()) for _ in roots]
    for step in range(3):
        for rank, seed in enumerate(roots):
            monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                keyed.set_key(models[rank], regtorch.key(seed), step)
            found += [(step, rank, str(each.message)) for each in caught]
    assert [each[:2] for each in found] == ([(0, 1), (1, 0)] if warns else [])
    assert all("ranks 1 and 0" in each[2] or "ranks 0 and 1" in each[2] for each in found)
    assert all("fold_in(root, rank)" in each[2] for each in found)
    for rank, seed in enumerate(roots):
        _get_default_store().delete_key(f"regtorch.keyed/0/{seed}/{rank}")


@pytest.mark.parametrize(("roots", "warns"), [((7, 7), False), ((7, 8), True)])
@pytest.mark.usefixtures("group")
def test_another_root_on_the_next_rank_is_a_warning_where_draws_are_by_example(
    roots, warns, monkeypatch
):
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    models, found = [keyed.convert(model()) for _ in roots], []
    for each in models:
        states_of(each)[0].number = roots[1]  # as in processes of their own
    for step in range(3):
        for rank, seed in enumerate(roots):
            monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                keyed.set_key(models[rank], regtorch.key(seed), step, examples=[rank])
            found += [(step, rank, str(each.message)) for each in caught]
    assert [each[:2] for each in found] == ([(0, 1), (1, 0)] if warns else [])
    assert all("must be the same on each rank" in each[2] for each in found)


def train_on_a_rank(rank, path):
    """Train a wrapped model on two rows of four; compare with one process that has all rows."""
    options = {"init_method": f"file://{path}", "rank": rank, "world_size": 2}
    distributed.init_process_group("gloo", **options)
    rows = [X[:2], X[1:]]
    root = [regtorch.fold_in(ROOT, each) for each in range(2)]
    plain = keyed.convert(model())
    losses = []
    for each, x in enumerate(rows):
        keyed.set_key(plain, root[each], 3)
        losses.append(plain(x).square().sum() / 2)
    sum(losses).backward()
    gradient = plain[0].linear.weight.grad
    for name in ("distributed", "FSDP", "fully_shard"):
        wrapped = keyed.convert(WRAPPERS[name](model()))
        with contextlib.nullcontext() if name != "distributed" else pytest.warns(match="same on"):
            for _ in range(2):
                keyed.set_key(wrapped, ROOT, 3)
                distributed.barrier()
        keyed.set_key(wrapped, root[rank], 3)
        loss = wrapped(rows[rank]).square().sum()
        assert torch.equal(loss / 2, losses[rank])
        loss.backward()
        if name == "distributed":
            torch.testing.assert_close(wrapped.module[0].linear.weight.grad, gradient)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    multiprocessing.spawn(train_on_a_rank, (tmp_path / "ranks",), nprocs=2)
