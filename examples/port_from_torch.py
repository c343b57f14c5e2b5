"""Port a PyTorch model with dropout and parameter groups to JAX, and prove that it is the same.

    python -m examples.port_from_torch               # 200 steps in both frameworks; seconds
    python -m examples.port_from_torch --mistake key # a defect built in, and where it is found

The PyTorch model stays as it is: `regtorch.keyed.convert` gives each of its dropouts a key of its
own, named after the module's path. The JAX model draws from the same keys, by the same names.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits

import regjax
import regtorch
from parity_tests.harness import JaxSide, Leaf, TorchSide, compare_training, tensors

ROOT = 0
RATES = {"1": 0.1, "4": 0.5}  # by the path of the torch.nn.Dropout in the model
NAMES = {
    "hidden/kernel": Leaf("0.weight", (1, 0)),
    "hidden/bias": Leaf("0.bias"),
    "middle/kernel": Leaf("2.weight", (1, 0)),
    "middle/bias": Leaf("2.bias"),
    "out/kernel": Leaf("5.weight", (1, 0)),
    "out/bias": Leaf("5.bias"),
}
MISTAKES = ("none", "key", "rate", "bias")


def torch_model() -> torch.nn.Module:
    """The original, as somebody wrote it: nothing in it knows of keys."""
    return torch.nn.Sequential(
        torch.nn.Linear(64, 64),
        torch.nn.Dropout(RATES["1"]),
        torch.nn.Linear(64, 32),
        torch.nn.SiLU(),
        torch.nn.Dropout(RATES["4"]),
        torch.nn.Linear(32, 10),
    )


def torch_side() -> TorchSide:
    """The original with its recipe: biases do not decay."""
    torch.manual_seed(0)
    model = regtorch.keyed.convert(torch_model())
    kernels = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": kernels}, {"params": biases, "weight_decay": 0.0}]
    root = regtorch.key(ROOT)

    def loss(model: torch.nn.Module, batch: Any, step: int) -> torch.Tensor:
        images, labels = tensors(batch)
        regtorch.keyed.set_key(model, root, step)
        return torch.nn.functional.cross_entropy(model(images), labels)

    return TorchSide(model, loss, torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.05))


def jax_side(mistake: str = "none") -> JaxSide:
    """The port, with a mistake if one is asked for."""
    sizes = {"hidden": (64, 64), "middle": (64, 32), "out": (32, 10)}
    params = {n: {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[1])} for n, s in sizes.items()}
    decays = {n: {"kernel": True, "bias": mistake == "bias"} for n in sizes}
    root = jax.random.key(ROOT)

    def dense(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["kernel"] + params["bias"][None]

    def drop(x: jax.Array, site: str, step: Any) -> jax.Array:
        late = int(mistake == "key" and site == "4")
        rate = RATES[site] + (0.01 if mistake == "rate" and site == "4" else 0.0)
        return regjax.dropout(x, rate, key=regjax.site_key(root, step + late, site))

    def loss(params: Any, batch: Any, step: Any) -> jax.Array:
        images, labels = batch
        x = drop(dense(params["hidden"], images), "1", step)
        x = drop(jax.nn.silu(dense(params["middle"], x)), "4", step)
        chances = jax.nn.log_softmax(dense(params["out"], x))
        return -jnp.take_along_axis(chances, labels[:, None], axis=1).mean()

    return JaxSide(params, loss, regjax.optim.adamw(2e-3, weight_decay=0.05, mask=decays))


def batches(steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of 64 handwritten digits, in the same order for both."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(labels), 64) for _ in range(steps)]
    return [((images[i] / 16).astype(np.float32), labels[i]) for i in picks]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains both, compares every step, and says whether they are the same."""
    options = _parser().parse_args(argv)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training both", total=options.steps)
        found = compare_training(
            jax_side(options.mistake),
            torch_side(),
            batches(options.steps),
            NAMES,
            progress=lambda step: progress.update(task, completed=step),
        )
    console.print(str(found), markup=False, soft_wrap=True)
    ours, theirs = found.losses[-1]
    console.print(f"loss after {len(found.losses)} steps: JAX {ours:.6f}, PyTorch {theirs:.6f}")
    picture = options.out / "port_from_torch.png"
    found.plot(picture)
    console.print(f"picture: {picture}", soft_wrap=True)
    return 0 if found.agrees else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.port_from_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps", type=int, choices=range(1, 10_001), metavar="N", default=200, help="default: 200"
    )
    parser.add_argument("--mistake", choices=MISTAKES, default="none", help="default: none")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
