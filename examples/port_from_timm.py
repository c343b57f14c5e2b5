"""Train a vision transformer of timm and its port to Flax NNX, and compare every step.

    python -m examples.port_from_timm                   # 100 steps
    python -m examples.port_from_timm --dtype float64   # with a bound of 1e-12
    python -m examples.port_from_timm --mistake decay   # with a planted defect

Both models are unmodified, small and random, with every dropout on, also in attention and of whole
paths. It requires timm. The original, the port and their training are in `examples/timm_vit.py`,
the model of Flax in `examples/nnx_vit.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from parity_tests import output

MISTAKES = {
    "none": "the correct port",
    "decay": "one bias decays",
    "rate": "the learning rate is 2 percent too large",
    "path": "one block drops a path at the rate 0.21 instead of 0.2",
    "swap": "one attention has its keys and values exchanged",
    "site": "one dropout has a wrong name",
    "shared": "attention shares a mask among batch and heads, the default of Flax",
}
QUICK_STEPS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Train both sides, print and plot the comparison, and return 0 if they agree."""
    options = _parser().parse_args(argv)
    import jax
    from rich.console import Console
    from rich.progress import Progress

    from examples.timm_vit import Settings, batches, jax_side, torch_side
    from parity_tests.compare import FLOAT32, FLOAT64
    from parity_tests.harness import compare_training

    console = Console()
    steps = QUICK_STEPS if options.quick else options.steps
    settings = Settings(steps, options.dtype, options.mistake)
    with (
        jax.enable_x64(settings.dtype == "float64"),
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task("both frameworks", total=steps)
        original, scheduler = torch_side(settings)
        port, names = jax_side(settings, original, scheduler)
        found = compare_training(
            port,
            original,
            batches(settings),
            names,
            tier=FLOAT64 if settings.dtype == "float64" else FLOAT32,
            progress=lambda step: progress.update(task, completed=step),
        )
    console.print(str(found), markup=False, soft_wrap=True)
    console.print(
        f"masks: {found.mask_elements:,} elements compared, {found.different_mask_elements:,} "
        "differ"
    )
    in_jax, in_torch = found.losses[-1]
    console.print(f"loss at step {len(found.losses)}: JAX {in_jax:.6f}, PyTorch {in_torch:.6f}")
    picture = options.out / "port_from_timm.png"
    found.plot(picture)
    console.print(f"picture: {picture}", soft_wrap=True)
    return 0 if found.agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = output.Parser("python -m examples.port_from_timm", __doc__)
    parser.add_argument(
        "--steps",
        type=output.integer(5, 10_000),
        metavar="N",
        default=100,
        help="number of training steps, of which a fifth is warm-up (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="dtype of parameters and computation (default: %(default)s)",
        **output.one_of(("float32", "float64")),
    )
    text = "; ".join(f"{name}: {about}" for name, about in MISTAKES.items())
    text = f"planted defect: {text} (default: %(default)s)"
    parser.add_argument("--mistake", default="none", help=text, **output.one_of(MISTAKES))
    parser.add_quick(f"train {QUICK_STEPS} steps")
    parser.add_out("outputs", "the picture")
    return parser


if __name__ == "__main__":
    output.run(main)
