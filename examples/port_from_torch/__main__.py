"""Convert a PyTorch training run to JAX after half its steps, and compare every further step.

    python -m examples.port_from_torch                 # 300 steps in PyTorch, 300 more in both
    python -m examples.port_from_torch --mistake state # with a planted defect

After the first half, `regjax.interop` converts the parameters, the optimizer with its groups and
schedule, and the moments. Then both sides continue, and every step is compared. The code is in
`examples/port_from_torch/port.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from parity_tests import output

MISTAKES = {
    "none": "the correct port",
    "key": "one dropout uses the key of the next step",
    "rate": "one dropout has rate 0.51 instead of 0.5",
    "bias": "the biases decay, too",
    "state": "the optimizer starts without moments, at the start of the schedule",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, convert, continue on both sides, and return 0 if they agree."""
    options = _parser().parse_args(argv)
    from rich.console import Console
    from rich.progress import Progress

    from examples.port_from_torch.port import batches, jax_side, torch_side, train_in_torch
    from parity_tests.harness import compare_training

    console = Console()
    half, data = options.steps, batches(2 * options.steps)
    original = torch_side(2 * half)
    with Progress(console=console, transient=True) as progress:
        first = progress.add_task("PyTorch alone", total=half)
        train_in_torch(original, data[:half], lambda: progress.advance(first))
        port, names = jax_side(original, options.mistake)
        second = progress.add_task("JAX beside PyTorch", total=half)
        found = compare_training(
            port,
            original,
            data[half:],
            names,
            start=half,
            progress=lambda step: progress.update(second, completed=step),
        )
    console.print(str(found), markup=False, soft_wrap=True)
    in_jax, in_torch = found.losses[-1]
    steps = half + len(found.losses)
    console.print(f"loss after {steps} steps: JAX {in_jax:.6f}, PyTorch {in_torch:.6f}")
    picture = options.out / "port_from_torch.png"
    found.plot(picture)
    console.print(f"picture: {picture}", soft_wrap=True)
    return 0 if found.agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = output.Parser("python -m examples.port_from_torch", __doc__)
    parser.add_argument(
        "--steps",
        type=output.integer(1, 10_000),
        metavar="N",
        default=300,
        help="number of steps of each half (default: %(default)s)",
    )
    text = "; ".join(f"{name}: {about}" for name, about in MISTAKES.items())
    text = f"planted defect: {text} (default: %(default)s)"
    parser.add_argument("--mistake", default="none", help=text, **output.one_of(MISTAKES))
    parser.add_out("outputs", "the picture")
    return parser


if __name__ == "__main__":
    output.run(main)
