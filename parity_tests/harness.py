"""Is my JAX port the same model as my PyTorch model, with dropout on? A yes, or where they part.

Both sides start from the same parameters and see the same batches; their keys are derived from the
same root, so that they draw the same masks. After each step the masks, the loss, the gradients, the
parameters and the optimizer's state are compared, in that order: what differs first is the cause,
and what follows from it comes later.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
import torch

from parity_tests import compare
from parity_tests.compare import FLOAT32, Tier
from parity_tests.wings import from_torch, to_torch
from regjax._paths import named_leaves

if TYPE_CHECKING:
    from jaxtyping import PyTree

# What optimizers keep, in optax's words and in PyTorch's.
STATE = {
    "trace": "momentum_buffer",
    "mu": "exp_avg",
    "nu": "exp_avg_sq",
    "nu_max": "max_exp_avg_sq",
}
# The order in which one thing causes the next within a step.
QUANTITIES = ("mask", "loss", "gradient", "parameter", "state")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where a JAX parameter is found in PyTorch.

    Attributes:
        name: the PyTorch parameter's name.
        transpose: the order of its axes in JAX, as for `numpy.transpose`; None where it is the
            same. A Flax kernel of a Linear weight is `(1, 0)`, of a Conv2d weight `(2, 3, 1, 0)`.
    """

    name: str
    transpose: tuple[int, ...] | None = None

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        """The PyTorch array as JAX holds it."""
        return array if self.transpose is None else np.transpose(array, self.transpose)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The JAX array as PyTorch holds it."""
        if self.transpose is None:
            return array
        return np.transpose(array, np.argsort(self.transpose))


class Masks:
    """What each site of dropout drew in a step, by site: the rate asked and a digest of the mask.

    Pass `masks.jax(site)` as `sampler=` to `regjax.dropout`, `masks.torch(site)` to
    `regtorch.dropout`, and the harness compares masks apart from the values that they mask.

    Example:
        >>> import jax, regjax
        >>> masks = Masks()
        >>> x = jax.numpy.ones(64)
        >>> y = regjax.dropout(x, 0.5, key=jax.random.key(0), sampler=masks.jax("hidden"))
        >>> [site for site, _ in masks.taken()]
        ['hidden']
    """

    def __init__(self) -> None:
        self._drawn: list[tuple[str, str]] = []

    def jax(self, site: str) -> Callable[..., jax.Array]:
        """A sampler that draws like `regjax.bernoulli` and takes down what it drew."""
        return Recorder(self, site, "jax")

    def torch(self, site: str) -> Callable[..., torch.Tensor]:
        """A sampler that draws like `regtorch.bernoulli` and takes down what it drew."""
        return Recorder(self, site, "torch")

    def add(self, site: str, keep_prob: float, mask: np.ndarray) -> None:
        """Takes down a mask. A mask drawn again, for the backward pass, is one already known."""
        mask = np.asarray(mask)
        digest = hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:12]
        entry = (site, f"rate {1 - keep_prob:.6g}, {mask.size} elements, mask {digest}")
        if entry not in self._drawn:
            self._drawn.append(entry)

    def taken(self) -> list[tuple[str, str]]:
        """What was taken down since the last call, by site in alphabetical order."""
        jax.effects_barrier()
        drawn, self._drawn = sorted(self._drawn), []
        return drawn


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A sampler that takes down what it draws: hashable, so that JAX compiles it once."""

    masks: Masks
    site: str
    side: str

    def __call__(self, key: Any, keep_prob: Any, shape: Any, **layout: Any) -> Any:
        """Draws a mask."""
        if self.side == "jax":
            import regjax

            mask = regjax.bernoulli(key, keep_prob, shape, **layout)
            jax.debug.callback(self._add, keep_prob, mask)
            return mask
        import regtorch

        mask = regtorch.bernoulli(key, keep_prob, shape)
        self._add(float(keep_prob), from_torch(mask))
        return mask

    def _add(self, keep_prob: Any, mask: Any) -> None:
        self.masks.add(self.site, float(keep_prob), np.asarray(mask))


@dataclasses.dataclass(frozen=True)
class JaxSide:
    """The port.

    Attributes:
        params: a tree of parameters; replaced by those of the PyTorch model before the first step.
        loss: `loss(params, batch, step)`, a scalar. It is jitted here, with `step` traced.
        optimizer: an optax transformation.
        masks: where its samplers take down what they draw, if they do.
    """

    params: PyTree
    loss: Callable[[Any, Any, Any], jax.Array]
    optimizer: optax.GradientTransformation
    masks: Masks | None = None


@dataclasses.dataclass(frozen=True)
class TorchSide:
    """The original.

    Attributes:
        model: a module; it is trained in place.
        loss: `loss(model, batch, step)`, a scalar tensor.
        optimizer: a `torch.optim` optimizer over the model's parameters.
        masks: where its samplers take down what they draw, if they do.
    """

    model: torch.nn.Module
    loss: Callable[[torch.nn.Module, Any, int], torch.Tensor]
    optimizer: torch.optim.Optimizer
    masks: Masks | None = None


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Where two runs part.

    Attributes:
        step: counted from 1.
        quantity: `mask`, `loss`, `gradient`, `parameter` or `state`.
        name: the site or the tensor that is furthest off.
        deviation: by how much, in the tier's unit; infinite for a mask.
        detail: both masks, in words, where masks differ.
    """

    step: int
    quantity: str
    name: str
    deviation: float
    detail: str = ""

    def __str__(self) -> str:
        """One sentence."""
        by = self.detail or f"deviation {self.deviation:.3e}"
        return (
            f"JAX and PyTorch part at step {self.step}, in the {self.quantity} '{self.name}': {by}"
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was compared, and what came of it.

    Attributes:
        tier: how closely the sides had to agree.
        deviations: for each quantity, the largest deviation of each step.
        losses: of both sides at each step.
        first: where they part, or None.
    """

    tier: Tier
    deviations: Mapping[str, Sequence[float]]
    losses: Sequence[tuple[float, float]]
    first: Divergence | None

    @property
    def agrees(self) -> bool:
        """Whether the sides agreed in everything at every step."""
        return self.first is None

    def raise_if_different(self) -> None:
        """Raises AssertionError that says where the sides part."""
        if self.first is not None:
            raise AssertionError(f"{self.first} (tier: {self.tier})")

    def table(self) -> str:
        """Markdown: the largest deviation of each quantity, and at which step."""
        lines = [
            "| quantity | steps | largest deviation | at step |",
            "| --- | ---: | ---: | ---: |",
        ]
        for quantity, values in self.deviations.items():
            if values:
                worst = int(np.argmax(values))
                lines.append(f"| {quantity} | {len(values)} | {values[worst]:.2e} | {worst + 1} |")
        return "\n".join(lines) + "\n"

    def plot(self, path: str | Path) -> None:
        """Draws losses of both sides, and the deviations over the steps with the tier's bound."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        steps = range(1, len(self.losses) + 1)
        left.plot(steps, [ours for ours, _ in self.losses], label="JAX")
        left.plot(steps, [theirs for _, theirs in self.losses], "--", label="PyTorch")
        left.set_ylabel("loss")
        for quantity, values in self.deviations.items():
            # Equal bits have no place on a logarithmic axis: they lie below everything.
            right.plot(range(1, len(values) + 1), [max(v, 1e-18) for v in values], label=quantity)
        if self.tier.tolerance:
            right.axhline(self.tier.tolerance, color="#333333", linestyle=":", label="bound")
        right.set_yscale("log")
        right.set_ylabel("largest deviation of JAX and PyTorch")
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)

    def __str__(self) -> str:
        """The verdict and the table."""
        verdict = "JAX and PyTorch agree." if self.first is None else f"{self.first}."
        return f"{verdict}\n\n{self.table()}"


def compare_forward(ours: Any, theirs: torch.Tensor, tier: Tier = FLOAT32) -> float:
    """Compares one output; returns its deviation.

    Args:
        ours: JAX array.
        theirs: tensor of the same shape.
        tier: how closely they must agree.

    Raises:
        AssertionError: they differ in shape or dtype, or by more than the tier allows.
    """
    left, right = np.asarray(ours), from_torch(theirs)
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        raise AssertionError(
            f"outputs differ in form: JAX {left.dtype}{list(left.shape)}, "
            f"PyTorch {right.dtype}{list(right.shape)}"
        )
    apart = compare.deviations({"": left}, {"": right}, tier)[""]
    if not apart <= (tier.tolerance or 0.0):
        raise AssertionError(f"outputs differ: deviation {apart:.3e} exceeds {tier.tolerance}")
    return apart


def compare_step(
    jax_side: JaxSide,
    torch_side: TorchSide,
    batch: Any,
    names: Mapping[str, str | Leaf],
    **options: Any,
) -> Comparison:
    """`compare_training` over a single batch."""
    return compare_training(jax_side, torch_side, [batch], names, **options)


def compare_training(
    jax_side: JaxSide,
    torch_side: TorchSide,
    batches: Iterable[Any],
    names: Mapping[str, str | Leaf],
    *,
    tier: Tier = FLOAT32,
    stop_at_first: bool = True,
    progress: Callable[[int], None] = lambda step: None,
) -> Comparison:
    """Trains both sides from the same parameters on the same batches, and compares every step.

    Args:
        jax_side: the port.
        torch_side: the original, from whose parameters both start.
        batches: NumPy arrays, or trees of them, a batch a step; given to both losses as they are.
        names: for each JAX parameter's path, such as `"dense/kernel"`, its name in PyTorch, or a
            `Leaf` where its axes are ordered otherwise.
        tier: how closely the sides must agree; its dtype is that of the parameters.
        stop_at_first: whether to stop where the sides part, or to go on and see what becomes of it.
        progress: told of each step done.

    Returns:
        What was found; `raise_if_different()` makes an error of it.

    Raises:
        ValueError: a parameter of either side has no counterpart, another shape or another dtype;
            or there are no batches.
    """
    leaves = {path: leaf if isinstance(leaf, Leaf) else Leaf(leaf) for path, leaf in names.items()}
    params = _moved(jax_side.params, torch_side.model, leaves)
    state = jax_side.optimizer.init(params)
    gradient = jax.jit(jax.value_and_grad(jax_side.loss))
    apply = jax.jit(jax_side.optimizer.update)
    deviations: dict[str, list[float]] = {quantity: [] for quantity in QUANTITIES}
    losses, first = [], None
    for step, batch in enumerate(batches):
        ours_loss, ours_gradient = gradient(params, batch, step)
        updates, state = apply(ours_gradient, state, params)
        params = optax.apply_updates(params, updates)
        torch_side.optimizer.zero_grad()
        theirs_loss = torch_side.loss(torch_side.model, batch, step)
        theirs_loss.backward()
        theirs_gradient = _torch_arrays(torch_side.model, leaves, lambda p: p.grad)
        torch_side.optimizer.step()
        losses.append((float(ours_loss), float(theirs_loss.detach())))
        pairs = {
            "loss": ({"loss": np.asarray(ours_loss)}, {"loss": from_torch(theirs_loss)}),
            "gradient": (_jax_arrays(ours_gradient), theirs_gradient),
            "parameter": (_jax_arrays(params), _torch_arrays(torch_side.model, leaves)),
            "state": _states(state, torch_side, leaves),
        }
        found = [*_mask_divergences(step + 1, jax_side.masks, torch_side.masks, deviations)]
        for quantity, (ours, theirs) in pairs.items():
            apart = compare.deviations(ours, theirs, tier)
            deviations[quantity].append(max(apart.values(), default=0.0))
            if apart:
                # argmax stops at the first NaN, max would step over it.
                name = list(apart)[int(np.argmax(list(apart.values())))]
                if not apart[name] <= (tier.tolerance or 0.0):
                    found.append(Divergence(step + 1, quantity, name, apart[name]))
        first = first or next(iter(found), None)
        progress(step + 1)
        if first and stop_at_first:
            break
    if not losses:
        raise ValueError("batches is empty: there is nothing to compare")
    return Comparison(tier, deviations, losses, first)


def _mask_divergences(
    step: int, ours: Masks | None, theirs: Masks | None, deviations: dict[str, list[float]]
) -> Iterable[Divergence]:
    if ours is None or theirs is None:
        return
    left, right = ours.taken(), theirs.taken()
    deviations["mask"].append(float(left != right))
    by_site = [_by_site(drawn) for drawn in (left, right)]
    for site in dict.fromkeys([*by_site[0], *by_site[1]]):
        in_jax, in_torch = (drawn.get(site, ["nothing drawn"]) for drawn in by_site)
        if in_jax != in_torch:
            detail = f"JAX {'; '.join(in_jax)}; PyTorch {'; '.join(in_torch)}"
            yield Divergence(step, "mask", site, float("inf"), detail)


def _by_site(drawn: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site, what in drawn:
        found.setdefault(site, []).append(what)
    return found


def _moved(params: PyTree, model: torch.nn.Module, leaves: Mapping[str, Leaf]) -> PyTree:
    """The tree of `params` with the values of the model."""
    tensors, ours = dict(model.named_parameters()), dict(named_leaves(params))
    _check_names(ours, tensors, leaves)
    moved = []
    for path, leaf in ours.items():
        array = leaves[path].to_jax(from_torch(tensors[leaves[path].name]))
        wanted = (np.dtype(leaf.dtype), leaf.shape)
        if (array.dtype, array.shape) != wanted:
            raise ValueError(
                f"parameter '{path}' is {wanted[0]}{list(wanted[1])} in JAX, but "
                f"'{leaves[path].name}' of PyTorch arrives as {array.dtype}{list(array.shape)}: "
                "see Leaf(name, transpose)"
            )
        moved.append(jax.numpy.array(array))
    return jax.tree.unflatten(jax.tree.structure(params), moved)


def _check_names(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], leaves: Mapping[str, Leaf]
) -> None:
    mapped = {leaf.name for leaf in leaves.values()}
    problems = {
        "JAX parameters without a name in PyTorch": set(ours) - set(leaves),
        "names of JAX parameters that do not exist": set(leaves) - set(ours),
        "PyTorch parameters that no JAX parameter is": set(theirs) - mapped,
        "names of PyTorch parameters that do not exist": mapped - set(theirs),
    }
    found = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    if found:
        raise ValueError("names does not fit the parameters; " + "; ".join(found))


def _jax_arrays(tree: PyTree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree)}


def _torch_arrays(
    model: torch.nn.Module,
    leaves: Mapping[str, Leaf],
    get: Callable[[Any], torch.Tensor | None] = lambda p: p,
) -> dict[str, np.ndarray]:
    tensors = dict(model.named_parameters())
    found = {}
    for path, leaf in leaves.items():
        tensor = get(tensors[leaf.name])
        # A parameter that takes no part has no gradient in PyTorch, and one of zeros in JAX.
        tensor = torch.zeros_like(tensors[leaf.name]) if tensor is None else tensor
        found[path] = leaf.to_jax(from_torch(tensor).copy())
    return found


def _states(
    state: PyTree, side: TorchSide, leaves: Mapping[str, Leaf]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Moments and momenta that both sides keep, by parameter."""
    tensors = dict(side.model.named_parameters())
    kinds = "|".join(STATE)
    ours, theirs = {}, {}
    for place, array in named_leaves(state):
        for path, leaf in leaves.items():
            match = re.search(rf"(?:^|/)({kinds})/{re.escape(path)}$", place)
            if not match:
                continue
            kept = side.optimizer.state.get(tensors[leaf.name], {}).get(STATE[match[1]])
            if kept is not None:
                name = f"{STATE[match[1]]} of {path}"
                ours[name], theirs[name] = np.asarray(array), leaf.to_jax(from_torch(kept).copy())
    return ours, theirs


def tensors(batch: Any) -> Any:
    """The arrays of a batch as tensors, for the loss of the PyTorch side."""
    return jax.tree.map(to_torch, batch)
