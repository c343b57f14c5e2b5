"""One rank and two train alike: the masks of every example, losses and parameters.

The two ranks are processes that communicate by gloo; they are started once for all checks. The one
rank is this process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import regtorch
from regtorch import keyed
from regtorch._random.events import Draw

# The compiler reads this attribute of the tensors between its graphs.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
ROOT = regtorch.key(7)
N, STEPS = 10, 3  # ten examples: two ranks have micro-batches of 3 and 2, one rank of 3, 3, 3 and 1
X = torch.linspace(-2.0, 3.0, N * 6 * 8, dtype=torch.float64).reshape(N, 6, 8)


class Block(nn.Module):
    """Attention, a recurrent layer, dropped paths and dropout as a function; the batch first."""

    def __init__(self, recurs: bool = True) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True) if recurs else None
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        x = self.recurrent(x)[0] if self.recurrent else x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(0.5)
        return x + kept * F.dropout(self.linear(x), 0.3)


class Checkpointed(nn.Module):
    """A block whose forward pass runs again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = Block(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x.requires_grad_(), use_reentrant=self.reentrant)


def sharded(model: nn.Module) -> nn.Module:
    for part in list(model.modules()):
        if isinstance(part, nn.TransformerEncoderLayer):
            fully_shard(part)
    return fully_shard(model)


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def halves(model: nn.Module) -> nn.Module:
    """Run in bfloat16 by autocast, which LSTM does not support."""
    forward, context = model.float().forward, torch.autocast("cpu", torch.bfloat16)
    model.forward = lambda x: context(forward)(x.float())
    return ddp(model)


# Each with the bound on losses and parameters.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], float]] = {
    "DDP": (Block, ddp, 1e-12),
    "fully_shard": (Block, sharded, 1e-12),
    "checkpoint": (lambda: Checkpointed(False), ddp, 1e-12),
    "reentrant checkpoint": (lambda: Checkpointed(True), ddp, 1e-12),
    "checkpoint, sharded": (lambda: Checkpointed(False), sharded, 1e-12),
    "autocast": (lambda: Block(recurs=False), halves, 2e-2),
    "compiled": (Block, lambda model: torch.compile(ddp(model), backend="eager"), 1e-12),
}


def digests(events: list[Any], rows: Tensor) -> dict[tuple[Any, ...], str]:
    """Return a hash of every mask of every example, by key and the number of the example."""
    found = {}
    for event in events:
        if isinstance(event, Draw):
            parts = event.mask.unflatten(0, (len(rows), -1))
            for number, part in zip(rows.tolist(), parts, strict=True):
                digest = hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest()
                assert found.setdefault((event.key, number), digest) == digest
    return found


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(case: str, rank: int, count: int) -> dict[str, Any]:
    """Train on this rank's rows, by micro-batches; return masks, losses and parameters."""
    torch.manual_seed(0)
    make, wrap, _ = CASES[case]
    model = keyed.convert(wrap(make().double()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks, losses = {}, []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        optimizer.zero_grad()
        for rows in torch.arange(N).tensor_split(count)[rank].split(3):
            events: list[Any] = []
            keyed.set_key(model, ROOT, step, examples=rows)
            with regtorch.observing(events.append):
                loss = model(X[rows].clone()).double().square().sum() / X.numel()
                (loss * count).backward()  # the ranks' gradients are averaged
            masks |= digests(events, rows)
            total += loss.detach()
        optimizer.step()
        distributed.all_reduce(total)
        losses.append(total)
    parameters = [full(p.detach()).double() for p in model.parameters()]
    return {"masks": masks, "losses": torch.stack(losses), "parameters": parameters}


def split_tensors(rank: int, count: int) -> dict[str, Any]:
    """Train an MLP with its features on all ranks, and the same rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 8)).double()
    mesh = init_device_mesh("cpu", (count,))
    plan = {"0": ColwiseParallel(use_local_output=False), "3": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    keyed.convert(model)
    masks, losses = {}, []
    first = rank * (16 // count)
    for step in range(STEPS):
        events: list[Any] = []
        keyed.set_key(model, ROOT, step, examples=range(N))
        with regtorch.observing(events.append):
            loss = model(X).square().mean()
            loss.backward()
        for event in events:
            if isinstance(event, Draw):
                for column, part in enumerate(event.mask.unbind(-1)):
                    part = hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest()
                    masks[event.key, first + column] = part
        losses.append(loss.detach())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    parameters = [full(p.detach()) for p in model.parameters()]
    return {"masks": masks, "losses": torch.stack(losses), "parameters": parameters}


def compiled_dtensor(count: int) -> list[Tensor]:
    """Return the whole results and gradients of a compiled dropout of shards."""
    mesh, found = init_device_mesh("cpu", (count,)), []
    drop = torch.compile(regtorch.dropout, backend="eager", fullgraph=True)
    for dim in range(3):
        x = distribute_tensor(X, mesh, [Shard(dim)]).requires_grad_()
        y = drop(x, 0.4, key=ROOT)
        y.backward(x.detach())
        found += [y.detach().full_tensor(), x.grad.full_tensor()]
    return found


def check(case: str, rank: int, count: int) -> Any:
    if case == "tensor parallel":
        return split_tensors(rank, count)
    return compiled_dtensor(count) if case == "compiled DTensor" else train(case, rank, count)


def run_rank(rank: int, cases: tuple[str, ...], folder: Path) -> None:
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save({case: check(case, rank, 2) for case in cases}, folder / f"{rank}")
    distributed.destroy_process_group()


def on_one_and_two(cases: tuple[str, ...], folder: Path) -> tuple[Any, list[Any]]:
    """Return the results of one rank, and of each of two."""
    # The server imports this module once, and then forks for each rank.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    ranks = multiprocessing.start_processes(
        run_rank, (cases, folder), nprocs=2, join=False, start_method="forkserver"
    )
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        one = {case: check(case, 0, 1) for case in cases}
    finally:
        distributed.destroy_process_group()
    while not ranks.join():
        pass
    return one, [torch.load(folder / f"{rank}") for rank in range(2)]


QUICK = ("DDP", "fully_shard", "tensor parallel")
SLOW = (*CASES.keys() - QUICK, "compiled DTensor")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return on_one_and_two(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return on_one_and_two(SLOW, tmp_path_factory.mktemp("slow"))


def assert_alike(case: str, results: tuple[Any, list[Any]]) -> None:
    one, ranks = results[0][case], [rank[case] for rank in results[1]]
    assert len(one["masks"]) > 0
    assert not ranks[0]["masks"].keys() & ranks[1]["masks"].keys()
    assert ranks[0]["masks"] | ranks[1]["masks"] == one["masks"]
    bound = CASES[case][2] if case in CASES else 1e-12
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], one["losses"], rtol=bound, atol=bound)
        for mine, p in zip(rank["parameters"], one["parameters"], strict=True):
            torch.testing.assert_close(mine, p, rtol=bound, atol=bound)


@pytest.mark.parametrize("case", QUICK)
@pytest.mark.sample(1)
def test_two_ranks_train_as_one(quick, case):
    assert_alike(case, quick)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES.keys() - QUICK))
def test_two_ranks_train_as_one_in_every_way(slow, case):
    assert_alike(case, slow)


@pytest.mark.slow
def test_a_compiled_dropout_of_shards_is_that_of_the_whole(slow):
    for results in (slow[0], *slow[1]):
        x = X.clone().requires_grad_()
        y = regtorch.dropout(x, 0.4, key=ROOT)
        y.backward(x.detach())
        pairs = results["compiled DTensor"]
        assert all(map(torch.equal, pairs, [y.detach(), x.grad] * 3))
