"""Train BERT of Hugging Face in PyTorch and in Flax with the same dropout, and compare every step.

    python -m examples.port_from_huggingface                    # 100 steps
    python -m examples.port_from_huggingface --dtype float64    # with a bound of 1e-12
    python -m examples.port_from_huggingface --mistake warmup   # with a planted defect

Both models are unmodified, small and random. It requires transformers 4, the last one with Flax.
The models and their training are in `examples/huggingface_bert.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from parity_tests import output

MISTAKES = {
    "none": "the correct port",
    "decay": "one bias decays",
    "warmup": "the schedule is one step ahead",
    "rate": "the dropout rate of attention is 0.11 instead of 0.1",
    "site": "one dropout has the name of another site",
    "clip": "gradients are not clipped",
}
QUICK_STEPS = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Train both sides, print and plot the comparison, and return 0 if they agree."""
    options = _parser().parse_args(argv)
    import jax
    from rich.console import Console
    from rich.progress import Progress

    from examples.huggingface_bert import (
        Settings,
        batches,
        decay_mask,
        decayed_by_trainer,
        jax_side,
        torch_side,
    )
    from parity_tests.compare import FLOAT32, FLOAT64
    from parity_tests.harness import compare_training

    console = Console()
    steps = QUICK_STEPS if options.quick else options.steps
    settings = Settings(steps, options.attention, options.dtype, options.mistake)
    with (
        jax.enable_x64(settings.dtype == "float64"),
        Progress(console=console, transient=True) as progress,
    ):
        original, scheduler = torch_side(settings)
        port, names = jax_side(settings, original.model, scheduler)
        theirs = decayed_by_trainer(original.model)
        decays = jax.tree.leaves(decay_mask(port.state["params"], settings.mistake))
        ours = {leaf.name for leaf, decays in zip(names.values(), decays, strict=True) if decays}
        task = progress.add_task("both frameworks", total=steps)
        found = compare_training(
            port,
            original,
            batches(steps),
            names,
            tier=FLOAT64 if settings.dtype == "float64" else FLOAT32,
            progress=lambda step: progress.update(task, completed=step),
        )
    console.print(str(found), markup=False, soft_wrap=True)
    console.print(_losses(found), markup=False, soft_wrap=True)
    console.print(
        f"masks: {found.mask_elements:,} elements compared, {found.different_mask_elements:,} "
        "differ"
    )
    same = "the same in the port" if ours == theirs else f"not those of the port: {ours ^ theirs}"
    console.print(
        f"weight decay: {len(theirs)} of {len(names)} parameters in Trainer, {same}",
        markup=False,
        soft_wrap=True,
    )
    picture = options.out / "port_from_huggingface.png"
    found.plot(picture)
    console.print(f"picture: {picture}", soft_wrap=True)
    return 0 if found.agrees and ours == theirs else 1


def _losses(found: Any) -> str:
    """Return a table of about five steps."""
    count = len(found.losses)
    shown = sorted({0, *(count * part // 4 - 1 for part in range(1, 5) if count * part >= 4)})
    lines = [
        "| step | loss in JAX | loss in PyTorch | largest deviation of a parameter |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for index in shown:
        in_jax, in_torch = found.losses[index]
        apart = found.deviations["parameter"][index]
        lines.append(f"| {index + 1} | {in_jax:.9f} | {in_torch:.9f} | {apart:.2e} |")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = output.Parser("python -m examples.port_from_huggingface", __doc__)
    parser.add_argument(
        "--steps",
        type=output.integer(1, 10_000),
        metavar="N",
        default=100,
        help="number of training steps, of which a tenth is warm-up (default: %(default)s)",
    )
    parser.add_argument(
        "--attention",
        default="sdpa",
        help="implementation of attention in PyTorch (default: %(default)s)",
        **output.one_of(("sdpa", "eager")),
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
