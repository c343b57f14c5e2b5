"""The checks that `python -m parity_tests` reports, each as a function that measures.

A check counts what it compared and measures the difference of the two sides; its outcome holds the
bound beside the figure. Frameworks other than JAX are imported inside the functions, so that the
report can name a missing one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import regjax
from parity_tests import optimizers
from parity_tests.optimizers.case import Case

_RATES = (0.1, 0.123, 0.15, 0.3, 0.45, 0.5, 0.9)


def _rates(quick: bool) -> tuple[float, ...]:
    return (0.123, 0.9) if quick else _RATES


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a check.

    Attributes:
        compared: The number of compared units.
        unit: The unit: bits, values, steps.
        bound: The requirement, in words.
        passed: Whether it holds.
        ulp: The largest difference in units in the last place; None where that is meaningless.
        difference: The largest absolute difference; None where bits are compared.
        p_value: The smallest p-value; None where nothing is random.
        series: Differences at each step by name, for the plot.
        detail: The divergence of the two sides, if any.
    """

    compared: int
    unit: str
    bound: str
    passed: bool
    ulp: int | None = None
    difference: float | None = None
    p_value: float | None = None
    series: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Check:
    """A behavior that both sides promise.

    Attributes:
        name: A short name, for `--list` and `--only`.
        promise: One sentence.
        run: Measures: `run(quick)`, with `quick` for fewer draws and steps.
        needs: The required packages besides JAX.
    """

    name: str
    promise: str
    run: Callable[[bool], Outcome]
    needs: tuple[str, ...] = ("torch", "regtorch")


def ulps(one: np.ndarray, other: np.ndarray) -> int:
    """Return the largest distance of two arrays in units in the last place; 0 for equal bits.

    Example:
        >>> import numpy as np
        >>> ulps(np.float32([1.0, 2.0]), np.float32([1.0, 2.0000002]))
        1
    """
    if one.size == 0:
        return 0
    if np.iscomplexobj(one):
        one, other = (array.view(np.real(array).dtype) for array in (one, other))
    word = np.dtype(f"int{8 * one.dtype.itemsize}")
    lowest = int(np.iinfo(word).min)

    def ordered(array: np.ndarray) -> np.ndarray:
        # Floats sort like their bits as integers, except that negative ones count downwards.
        bits = np.ascontiguousarray(array).view(word).astype(object)
        return np.where(bits < 0, lowest - bits, bits)

    differ = np.flatnonzero(one.ravel().view(word) != other.ravel().view(word))
    if not differ.size:
        return 0
    return int(np.abs(ordered(one.ravel()[differ]) - ordered(other.ravel()[differ])).max())


def _equal_words(pairs: Iterator[tuple[Any, Any]], unit: str = "bits") -> Outcome:
    compared = different = 0
    for one, other in pairs:
        one, other = np.asarray(one), np.asarray(other)
        different += int(np.count_nonzero(one != other))
        compared += one.size * (32 if one.dtype == np.uint32 else 1)
    detail = f"{different} differ" if different else ""
    return Outcome(compared, unit, "equal", not different, detail=detail)


def _keys(quick: bool) -> Outcome:
    from parity_tests.frameworks import TORCH, from_torch

    def pairs() -> Iterator[tuple[Any, Any]]:
        library = TORCH.library
        for seed in range(3 if quick else 50):
            torch_key, jax_key = library.key(seed), jax.random.key(seed)
            yield from_torch(torch_key), jax.random.key_data(jax_key)
            yield (
                from_torch(library.split(torch_key, 7)),
                jax.random.key_data(jax.random.split(jax_key, 7)),
            )
            folded = jax.random.fold_in(jax_key, seed)
            yield from_torch(library.fold_in(torch_key, seed)), jax.random.key_data(folded)
            at = (
                library.site_key(torch_key, seed, "encoder/0"),
                regjax.site_key(jax_key, seed, "encoder/0"),
            )
            yield from_torch(at[0]), jax.random.key_data(at[1])
            yield from_torch(library.bits(torch_key, (257,))), jax.random.bits(jax_key, (257,))

    return _equal_words(pairs())


def _masks_of_jax(quick: bool) -> Outcome:
    def pairs() -> Iterator[tuple[Any, Any]]:
        for seed in range(1 if quick else 6):
            for rate in (0.9, 0.123)[: 1 if quick else 2]:
                key, shape = jax.random.key(seed), (256, 4096) if quick else (2048, 4096)
                yield regjax.bernoulli(key, rate, shape), jax.random.bernoulli(key, rate, shape)

    return _equal_words(pairs(), "mask bits")


def _masks_of_torch(quick: bool) -> Outcome:
    from parity_tests.frameworks import JAX, TORCH

    def pairs() -> Iterator[tuple[Any, Any]]:
        shape = (256, 4096) if quick else (4096, 4096)
        for seed, rate in enumerate((0.9, 0.5, 0.123)[: 1 if quick else 3]):
            for name in ("bernoulli", "packed_bernoulli"):
                in_jax, in_torch = (
                    framework.numpy(
                        getattr(framework.library, name)(framework.key(seed), rate, shape)
                    )
                    for framework in (JAX, TORCH)
                )
                yield in_jax, in_torch

    return _equal_words(pairs(), "mask bits")


def _values(dtype: str, name: str = "dropout", **options: Any) -> Callable[[bool], Outcome]:
    def run(quick: bool) -> Outcome:
        from parity_tests.frameworks import JAX, TORCH

        shape = (64, 129) if quick else (1024, 1025)
        rng = np.random.default_rng(0)
        compared, worst, difference = 0, 0, 0.0
        with jax.enable_x64(dtype == "float64"):
            x, cotangent = (
                # Rows, then channels or timesteps, then features.
                rng.normal(size=shape).astype(jnp.dtype(dtype)).reshape(-1, 8, shape[1])
                for _ in range(2)
            )
            for rate in _rates(quick):
                sides = []
                for framework in (JAX, TORCH):
                    function = functools.partial(
                        getattr(framework.library, name), rate=rate, key=framework.key(1), **options
                    )
                    results = framework.vjp(
                        function, framework.array(x), framework.array(cotangent)
                    )
                    sides.append([framework.numpy(result) for result in results])
                for in_jax, in_torch in zip(*sides, strict=True):
                    compared += in_jax.size
                    worst = max(worst, ulps(in_jax, in_torch))
                    wide = (array.astype(np.float64) for array in (in_jax, in_torch))
                    difference = max(difference, float(np.abs(np.subtract(*wide)).max()))
        return Outcome(compared, "values", "equal bits", worst == 0, worst, difference)

    return run


def _peer(apply: Callable[[Any, float, Any], Any]) -> Callable[[bool], Outcome]:
    def run(quick: bool) -> Outcome:
        x = jnp.linspace(-3.0, 3.0, 2**14 if quick else 2**20).reshape(-1, 128)
        compared = worst = 0
        for seed, rate in enumerate(_rates(quick)):
            key = jax.random.key(seed)
            with jax.numpy_dtype_promotion("standard"):  # the peers rely on promotion
                reference = np.asarray(apply(x, rate, key))
            y = np.asarray(regjax.dropout(x, rate, key=key))
            compared += y.size
            worst = max(worst, ulps(y, reference))
        return Outcome(compared, "values", "equal bits", worst == 0, worst)

    return run


def _nnx(x: Any, rate: float, key: Any) -> Any:
    from flax import nnx

    return nnx.Dropout(rate, deterministic=False)(x, rngs=key)


def _equinox(x: Any, rate: float, key: Any) -> Any:
    import equinox

    return equinox.nn.Dropout(rate)(x, key=key)


def _haiku(x: Any, rate: float, key: Any) -> Any:
    import haiku

    return haiku.dropout(key, rate, x)


def _fairness(quick: bool) -> Outcome:
    from parity_tests.frameworks import FRAMEWORKS
    from parity_tests.statistics import FIVE_SIGMA, dropout_z

    x = 0.1 + np.abs(np.random.default_rng(1).normal(size=(256, 1024))).astype(np.float32)
    figures = {
        f"{framework}, rate {rate}, {name}": z
        for framework in FRAMEWORKS
        for rate in _rates(quick)
        for name, z in dropout_z(
            lambda x, r, framework=framework: framework.dropout(x, r, seed=20), x, rate
        ).items()
    }
    name, worst = max(figures.items(), key=lambda item: abs(item[1]))
    return Outcome(
        x.size * len(figures),
        "draws",
        f"every figure within {FIVE_SIGMA:g} sigma",
        abs(worst) < FIVE_SIGMA,
        p_value=math.erfc(abs(worst) / math.sqrt(2)),
        detail=f"largest: {name}, {worst:+.2f} sigma",
    )


def _optimizer(case: Case) -> Callable[[bool], Outcome]:
    def run(quick: bool) -> Outcome:
        from parity_tests.compare import deviation
        from parity_tests.trajectories import SMALL, synthetic, walk_jax, walk_torch

        shapes = optimizers.MATRICES if case in optimizers.CASES_2D else SMALL
        problem = synthetic("float64", shapes, 20 if quick else 100)
        in_jax, in_torch = walk_jax(case, problem), walk_torch(case, problem)
        apart = [deviation([a], [b]) for a, b in zip(in_jax, in_torch, strict=True)]
        return Outcome(
            len(apart),
            "steps",
            f"float64 within {case.float64:g} in norm",
            max(apart) <= case.float64,
            difference=max(apart),
            series={case.optimizer: apart},
        )

    return run


def _with_decay() -> dict[str, Case]:
    """Return a case with decay for each torch optimizer, except Rprop, which has no decay."""
    found: dict[str, Case] = {}
    for case in (*optimizers.CASES, *optimizers.CASES_2D):
        if case.optimizer not in found or (
            "weight_decay" in case.options and "weight_decay" not in found[case.optimizer].options
        ):
            found[case.optimizer] = case
    return found


def _training(name: str) -> Callable[[bool], Outcome]:
    def run(quick: bool) -> Outcome:
        import torch

        from parity_tests.compare import FLOAT64
        from parity_tests.harness import compare_training
        from parity_tests.models import PAIRS, batches, sides

        steps = 20 if quick else 300
        tier = dataclasses.replace(FLOAT64, tolerance=1e-10)  # rounding accumulates over the steps
        with jax.enable_x64(True):
            both = sides(
                PAIRS[name],
                regjax.optim.adamw(1e-3),
                lambda model: torch.optim.AdamW(model.parameters(), 1e-3),
                dtype="float64",
            )
            found = compare_training(*both, batches(steps, "float64"), PAIRS[name].names, tier=tier)
        apart = list(found.deviations["parameter"])
        return Outcome(
            len(apart),
            "steps",
            f"float64 within {tier.tolerance:g} in norm, masks equal",
            found.agrees,
            difference=max(apart),
            series={name: apart},
            detail=str(found.first or ""),
        )

    return run


def all_checks() -> list[Check]:
    """Return every check of the report, in its order."""
    values = [
        Check(
            f"dropout/{dtype}",
            f"Dropout and its gradient have the same bits in both frameworks ({dtype}).",
            _values(dtype),
        )
        for dtype in ("float32", "float64", "bfloat16", "float16")
    ]
    family = [
        Check(
            f"{name}/float32",
            f"The same for {about} (float32).",
            _values("float32", name, **options),
        )
        for name, about, options in (
            ("feature_dropout", "dropout of whole channels", {"channel_axis": 1}),
            ("alpha_dropout", "alpha dropout", {}),
            ("feature_alpha_dropout", "alpha dropout of whole channels", {"channel_axis": 1}),
            ("drop_path", "dropout of whole samples", {}),
            ("variational_dropout", "dropout with one mask for all timesteps", {}),
            ("drop_block", "dropout of blocks", {"channel_axis": 1, "block_size": 5}),
            ("drop_connect", "dropout of weights", {"rule": "**"}),
            ("gaussian_dropout", "multiplication by Gaussian noise", {}),
        )
    ]
    peers = [
        Check(
            f"peer/{name}",
            f"The same key gives the mask and the float32 values of {title}.",
            _peer(apply),
            needs=(package,),
        )
        for name, title, package, apply in (
            ("nnx", "Flax NNX's Dropout", "flax", _nnx),
            ("equinox", "Equinox's Dropout", "equinox", _equinox),
            ("haiku", "Haiku's dropout", "haiku", _haiku),
        )
    ]
    decays = [
        Check(
            f"optimizer/{name.lower()}",
            f"regjax.optim.{name.lower()} takes the steps of torch.optim.{name}, decay included.",
            _optimizer(case),
        )
        for name, case in _with_decay().items()
    ]
    trainings = [
        Check(
            f"training/{name}",
            f"A whole training run with dropout on is the same in both frameworks: {about}.",
            _training(name),
            needs=("torch", "regtorch", "sklearn"),
        )
        for name, about in (
            ("perceptron", "a perceptron on digits"),
            ("convolutional", "a convolutional network that drops channels"),
            ("encoder", "a transformer's encoder layer"),
        )
    ]
    return [
        Check("keys", "regtorch derives the same keys as JAX and regjax.", _keys),
        Check("masks/jax", "regjax.bernoulli is jax.random.bernoulli.", _masks_of_jax, needs=()),
        Check("masks/torch", "Both samplers draw the same masks in PyTorch.", _masks_of_torch),
        *values,
        *family,
        *peers,
        Check("fairness", "Masks are unbiased and independent.", _fairness),
        *decays,
        *trainings,
    ]
