"""Measure the cost of dropout in the training step of a transformer, for each library.

The network, the optimizer and the sites of dropout (embedding, attention weights, both residual
branches of every layer) stay the same; only the function changes. The cost of dropout is the time
of a step minus that of the same step without dropout, in the same round.

    python -m benchmarks.transformer_step          # 4 layers, width 256, sequence 128, batch 16
    python -m benchmarks.transformer_step --quick  # one layer, to test
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import Progress

from benchmarks import bars, cli
from benchmarks import candidates as field
from benchmarks.race import Record, Result, environment, load, race
from benchmarks.report import publish
from parity_tests import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "transformer_step"
NONE = "no dropout"
FLAX = "Flax Linen"
VOCABULARY = 1024
HEADS = 4
WIDTH = 256
SEQUENCE = 128
BATCH = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Measure training steps, and write the table as Markdown, JSON and a picture."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.redraw:
        return cli.redraw(parser, options.out / NAME, load, draw)
    console = Console()
    layers, rounds = (1, 3) if options.quick else (options.layers, options.rounds)
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=len(options.rates) * rounds)
        for rate in options.rates:
            applies = {
                NONE: lambda x, key: x,
                **field.own(rate),
                **field.peers(rate, progress.console.print),
            }
            runs = {name: training_step(apply, layers=layers) for name, apply in applies.items()}
            title = f"rate {rate}, {layers} layer{'s' * (layers != 1)}"
            results.append(
                race(
                    title,
                    runs,
                    elements=1,
                    rounds=rounds,
                    on_round=lambda: progress.advance(task),
                )
            )
    publish(options.out / NAME, results, markdown(results), draw, console=console)
    return 0


def _parser() -> cli.Parser:
    parser = cli.parser(NAME, __doc__, rounds=9)
    cli.add_rates(parser)
    text = "number of layers (default: %(default)s)"
    parser.add_argument("--layers", type=cli.whole, metavar="N", default=4, help=text)
    return parser


def training_step(drop: field.Apply, *, layers: int) -> Callable[[], object]:
    """Return a jitted step of Adam on a next-token loss, without arguments.

    Args:
        drop: `drop(x, key)`, the dropout of a library.
        layers: The number of transformer blocks.

    Returns:
        A function that runs a step and waits for its result.
    """
    optimizer = optax.adam(1e-3)
    params = _init(jax.random.key(0), layers)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, SEQUENCE), 0, VOCABULARY)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        logits = _forward(params, tokens, functools.partial(_site, drop, key))
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return optax.apply_updates(params, updates), state

    state, key = optimizer.init(params), jax.random.key(2)
    return lambda: jax.block_until_ready(step(params, state, key))


def _site(drop: field.Apply, key: jax.Array, x: jax.Array, site: int) -> jax.Array:
    return drop(x, jax.random.fold_in(key, site))


def _init(key: jax.Array, layers: int) -> Any:
    def matrix(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape) * shape[0] ** -0.5

    def block(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        return {
            "qkv": matrix(keys[0], WIDTH, 3 * WIDTH),
            "out": matrix(keys[1], WIDTH, WIDTH),
            "up": matrix(keys[2], WIDTH, 4 * WIDTH),
            "down": matrix(keys[3], 4 * WIDTH, WIDTH),
        }

    first, *rest = jax.random.split(key, layers + 1)
    return {"embed": matrix(first, VOCABULARY, WIDTH), "blocks": [block(k) for k in rest]}


def _forward(
    params: Any, tokens: jax.Array, drop: Callable[[jax.Array, int], jax.Array]
) -> jax.Array:
    x = drop(params["embed"][tokens], 0)
    for index, block in enumerate(params["blocks"]):
        site = 1 + 3 * index
        x += drop(_attention(block, _norm(x), site, drop), site + 1)
        x += drop(jax.nn.gelu(_norm(x) @ block["up"]) @ block["down"], site + 2)
    return _norm(x) @ params["embed"].T


def _attention(
    block: dict[str, jax.Array],
    x: jax.Array,
    site: int,
    drop: Callable[[jax.Array, int], jax.Array],
) -> jax.Array:
    q, k, v = jnp.split(x @ block["qkv"], 3, axis=-1)
    q, k, v = (t.reshape(BATCH, SEQUENCE, HEADS, -1) for t in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones((SEQUENCE, SEQUENCE), bool))
    weights = drop(jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)), site)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ block["out"]


def _norm(x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5)


def markdown(results: Sequence[Result]) -> str:
    """Return a table of the cost of dropout in milliseconds, and relative to that of Flax."""
    lines = [
        f"| training step on {environment()['cores']} cores | library | step, ms "
        "| cost of dropout, ms | share of Flax's |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for result in results:
        flax = result.added(FLAX, NONE) if FLAX in result.seconds else None
        for name in result.seconds:
            added = result.added(name, NONE)
            share = f"{added / flax:.2f}" if flax and name != NONE else ""
            lines.append(
                f"| {result.title} | {name} | {result.nanoseconds(name) / 1e6:.1f} "
                f"| {added * 1e3:.1f} | {share} |"
            )
    return "\n".join(lines) + "\n"


def draw(record: Record) -> Figure:
    """Draw a panel for each rate: the time of a step over that of the step without dropout."""
    return bars.draw_race(
        record,
        base=NONE,
        own=field.OWN,
        unit="time of a step / time without dropout",
        reference=NONE,
    )


if __name__ == "__main__":
    output.run(main)
