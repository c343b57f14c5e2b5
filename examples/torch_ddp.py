"""Train with DistributedDataParallel, with the masks and losses of a single rank.

    python -m examples.torch_ddp             # two ranks, beside one
    python -m examples.torch_ddp --ranks 3   # shares of 6, 5 and 5 rows

Each rank passes the numbers of its rows to `regtorch.keyed.set_key`, and the same root. It then
draws its rows of the masks of the whole batch, without communication.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parity_tests import output

ROWS, STEPS = 16, 20


def train(rank: int, ranks: int, folder: str) -> None:
    """Train on the rows of one rank; rank 0 saves the losses and the masks of all."""
    import torch
    from torch import distributed, nn

    import regtorch

    options: Any = {"rank": rank, "world_size": ranks}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{ranks}", **options)
    torch.manual_seed(0)
    x, root = torch.randn(ROWS, 8), regtorch.key(0)
    y = x.square().sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))
    model = regtorch.keyed.convert(nn.parallel.DistributedDataParallel(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rows = torch.arange(ROWS).tensor_split(ranks)[rank]
    losses, draws = [], []
    for step in range(STEPS):
        regtorch.keyed.set_key(model, root, step, examples=rows)
        with regtorch.observing(draws.append):
            loss = (model(x[rows]) - y[rows]).square().sum() / ROWS
        optimizer.zero_grad()
        (loss * ranks).backward()  # the wrapper averages the gradients of the ranks
        optimizer.step()
        distributed.all_reduce(loss := loss.detach())
        losses.append(loss)
    masks = [draw.mask for draw in draws if hasattr(draw, "mask")]
    parts: list[Any] = [None] * ranks
    distributed.all_gather_object(parts, torch.stack(masks, dim=1))
    if rank == 0:
        torch.save((torch.stack(losses), torch.cat(parts)), Path(folder, f"results of {ranks}"))
    distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Train on one rank and on several, and return 0 if they agree."""
    parser = output.Parser("python -m examples.torch_ddp", __doc__)
    text = "number of processes beside a single one (default: %(default)s)"
    parser.add_argument("--ranks", type=output.integer(2, ROWS), default=2, metavar="N", help=text)
    ranks = parser.parse_args(argv).ranks
    import torch
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory() as folder:
        for count in (1, ranks):
            print(f"training on {count} rank{'s' * (count > 1)} …", flush=True)
            spawn(train, (count, folder), nprocs=count)
        (losses, masks), (others, same) = (
            torch.load(Path(folder, f"results of {count}")) for count in (1, ranks)
        )
    same_masks = torch.equal(masks, same)
    print(f"masks: {'identical' if same_masks else 'different'}, {masks.numel()} bits")
    print(f"loss after {STEPS} steps: {losses[-1]:.6f} on 1 rank, {others[-1]:.6f} on {ranks}")
    return 0 if same_masks and torch.allclose(losses, others, atol=1e-5) else 1


if __name__ == "__main__":
    output.run(main)
