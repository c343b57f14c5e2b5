"""Measure time and memory of attention with dropout, for several sequence lengths.

    python -m benchmarks.attention          # up to 4,096 positions; a few minutes
    python -m benchmarks.attention --quick  # short sequences, to test

All figures are relative to jax.nn.dot_product_attention, which has no dropout. Memory is the
temporary memory that XLA allocates beyond arguments and results; PyTorch reports no such figure. A
third table has properties of the masks, beside attention with a key for each block. For kernels on
TPUs, see `python -m benchmarks.attention_kernel`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

import regjax
from benchmarks import bars, cli
from benchmarks.race import WORK, Record, Result, environment, load, quartiles, race
from benchmarks.report import publish
from parity_tests import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "attention"
BASE = "no dropout"
WHOLE = "regjax"
PEER = "Flax Linen"
TORCH = "PyTorch"

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of an attention.

    Attributes:
        batch: The number of sequences.
        length: The number of positions of queries and keys.
        heads: The number of heads.
        depth: The size of a head.
    """

    batch: int
    length: int
    heads: int
    depth: int

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return self.batch * self.heads * self.length**2


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurements at one length.

    Attributes:
        length: The number of positions.
        backward: Whether they include the gradients.
        times: The times of all candidates.
        temporary: The bytes that each JAX candidate allocates beyond arguments and results.
    """

    length: int
    backward: bool
    times: Result
    temporary: dict[str, int]

    def time_ratios(self) -> dict[str, float]:
        """Return the time of each candidate over that without dropout."""
        return {name: self.times.ratio(name, BASE) for name in self.times.seconds}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the tables as Markdown, JSON and a picture."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.redraw:
        return cli.redraw(parser, options.out / NAME, load, draw)
    lengths, rounds = ([64, 256], 2) if options.quick else (options.lengths, options.rounds)
    console = Console()
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(lengths) * len(WORK) * rounds)
        for length in lengths:
            for backward in WORK:
                progress.update(task, description=f"{length:,} positions, {WORK[backward]}")
                shape = Shape(options.batch, length, options.heads, options.depth)
                runs, temporary = in_jax(
                    candidates(options.rate, options.blocks, progress.console.print),
                    shape,
                    backward=backward,
                )
                runs |= in_torch(options.rate, shape, progress.console.print, backward=backward)
                times = race(
                    f"{length} positions, {WORK[backward]}",
                    runs,
                    elements=shape.weights,
                    rounds=rounds,
                    on_round=functools.partial(progress.advance, task),
                )
                rows.append(Row(length, backward, times, temporary))
    settings = {name: getattr(options, name) for name in ("batch", "heads", "depth", "rate")}
    publish(
        options.out / NAME,
        [row.times for row in rows],
        markdown(rows, **settings) + "\n" + properties(),
        draw,
        console=console,
        temporary={row.times.title: row.temporary for row in rows},
        **settings,
    )
    return 0


def _parser() -> cli.Parser:
    parser = cli.parser(NAME, __doc__, rounds=5)
    numbers = {"type": cli.whole, "metavar": "N"}
    parser.add_argument(
        "--lengths",
        nargs="+",
        default=[256, 1024, 2048, 4096],
        help="numbers of positions (default: 256 to 4096)",
        **numbers,
    )
    parser.add_argument(
        "--blocks",
        nargs="+",
        default=[64, 128, 256],
        help="block sizes (default: 64, 128 and 256)",
        **numbers,
    )
    for name, default, text in (
        ("batch", 1, "number of sequences"),
        ("heads", 4, "number of heads"),
        ("depth", 64, "size of a head"),
    ):
        text = f"{text} (default: %(default)s)"
        parser.add_argument(f"--{name}", default=default, help=text, **numbers)
    text = "dropout rate (default: %(default)s)"
    parser.add_argument("--rate", type=cli.rate, default=0.1, help=text)
    return parser


def candidates(rate: float, blocks: Sequence[int], log: Callable[[str], None]) -> dict[str, Attend]:
    """Return JAX's attention without dropout, and those with dropout, by name."""

    def attend(q: Any, k: Any, v: Any, key: jax.Array, **options: Any) -> jax.Array:
        return regjax.dot_product_attention(q, k, v, dropout_rng=key, dropout_rate=rate, **options)

    found: dict[str, Attend] = {
        BASE: lambda q, k, v, key: jax.nn.dot_product_attention(q, k, v),
        WHOLE: attend,
    }
    found |= {f"{WHOLE}, blocks of {n}": functools.partial(attend, block_size=n) for n in blocks}
    packed, middle = {"sampler": regjax.packed_bernoulli}, sorted(blocks)[len(blocks) // 2]
    found[f"{WHOLE}, packed"] = functools.partial(attend, **packed)
    in_blocks = functools.partial(attend, block_size=middle, **packed)
    found[f"{WHOLE}, packed, blocks of {middle}"] = in_blocks
    try:
        from flax import linen
    except ImportError as error:
        log(f"skipped: {PEER} ({error})")
        return found
    found[PEER] = lambda q, k, v, key: linen.dot_product_attention(
        q, k, v, dropout_rng=key, dropout_rate=rate, broadcast_dropout=False
    )
    return found


def in_jax(
    attends: Mapping[str, Attend], shape: Shape, *, backward: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Return compiled functions without arguments, and the temporary memory of each."""
    arrays = [jax.numpy.asarray(array) for array in _inputs(shape)]
    key = jax.random.key(0)
    runs, temporary = {}, {}
    for name, attend in attends.items():
        apply = functools.partial(_with_backward, attend) if backward else attend
        compiled: Any = jax.jit(apply).lower(*arrays, key).compile()
        runs[name] = functools.partial(
            lambda run: jax.block_until_ready(run(*arrays, key)), compiled
        )
        temporary[name] = int(compiled.memory_analysis().temp_size_in_bytes)
    return runs, temporary


def _with_backward(attend: Attend, q: Any, k: Any, v: Any, key: jax.Array) -> Any:
    y, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, key), q, k, v)
    return y, pull_back(q)  # the values of the cotangent do not matter


def in_torch(
    rate: float, shape: Shape, log: Callable[[str], None], *, backward: bool
) -> dict[str, Callable[[], object]]:
    """Return PyTorch's own function, eager and without arguments."""
    try:
        import torch
    except ImportError as error:
        log(f"skipped: {TORCH} ({error})")
        return {}
    q, k, v = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in _inputs(shape))
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]

    def run() -> object:
        y = torch.nn.functional.scaled_dot_product_attention(*leaves, dropout_p=rate)
        return torch.autograd.grad(y, leaves, q.detach()) if backward else y

    return {TORCH: run}


def _inputs(shape: Shape) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    size = (shape.batch, shape.length, shape.heads, shape.depth)
    return [rng.standard_normal(size, np.float32) for _ in range(3)]


def markdown(rows: Sequence[Row], *, batch: int, heads: int, depth: int, rate: float) -> str:
    """Return a table of times and one of memory, with a column for each candidate."""
    names = list(rows[0].times.seconds)
    in_jax = list(rows[0].temporary)
    setting = (
        f"{batch} x {heads} heads of depth {depth}, rate {rate}, {environment()['cores']} cores"
    )
    times = [
        [f"{row.times.nanoseconds(BASE) * row.times.elements / 1e6:,.1f} ms"]
        + [f"{row.time_ratios()[name]:.2f}" for name in names if name != BASE]
        for row in rows
    ]
    memory = [[f"{row.temporary[name] / 1e6:,.1f}" for name in in_jax] for row in rows]
    over = [f"{name} / {BASE}" for name in names if name != BASE]
    lines = _table([f"Time; {setting}", BASE, *over], rows, times)
    lines += ["", *_table(["Temporary memory, MB", *in_jax], rows, memory)]
    return "\n".join(lines) + "\n"


def properties() -> str:
    """Return a table of properties of masks, from a process with two simulated devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    program = "from benchmarks.probes.attention_masks import table; print(table())"
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return found.stdout


def _table(head: list[str], rows: Sequence[Row], cells: Sequence[list[str]]) -> list[str]:
    titles = [f"{row.length:,} positions, {WORK[row.backward]}" for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[title, *line] for title, line in zip(titles, cells, strict=True)]
    return [f"| {' | '.join(line)} |" for line in lines]


def draw(record: Record) -> Figure:
    """Draw two panels for each length: time and memory, forward and backward."""
    panels = []
    for result in record.results:
        length, _, work = result.title.partition(", ")
        if work == WORK[True]:
            sizes = record.extra["temporary"][result.title]
            memory = {name: quartiles([size / sizes[BASE]]) for name, size in sizes.items()}
            times = {name: result.ratios(name, BASE) for name in result.seconds}
            for what, figures in (("time", times), ("temporary memory", memory)):
                del figures[BASE]
                own = [name for name in result.seconds if name.startswith(WHOLE)]
                panels.append(bars.race_panel(f"{length}: {what}", figures, own))
    return bars.draw(
        panels,
        unit="relative to attention without dropout",
        reference="attention without dropout",
        caption=["Forward and backward pass.", *bars.origin(record)],
    )


if __name__ == "__main__":
    output.run(main)
