"""A certificate that neither the number of devices nor a restart changes the masks of training.

A key that depends on a counter, on Python's `hash` or on the number of devices gives other masks
after a restart or on another machine, with no error. This module runs the same steps in new
processes, on several numbers of devices, and compares hashes of the masks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import PurePath
from typing import Any, NamedTuple

import jax
import numpy as np

from regjax._random.events import Draw, observing
from regshared.checks import check_callable, check_integer, check_integers, check_string, describe
from regshared.events import SiteKey

_SIGNATURE = "(devices, start, stop)"


class MaskHash(NamedTuple):
    """The hash of what one dropout drew in one step of one run.

    Attributes:
        elements: The number of elements, each part of a mask counted once.
        shapes: The shapes of the masks: one, or those of the parts on each device.
        whole: The hash of the masks, whatever the order of several.
        rows: The hash of their rows along the leading axis, whatever their order.
    """

    elements: int
    shapes: tuple[tuple[int, ...], ...]
    whole: str
    rows: str


@dataclasses.dataclass(frozen=True)
class CertificateRow:
    """The masks of one dropout in one step.

    Attributes:
        step: The step.
        site: The name that its key was derived for, or its function and line of code.
        hashes: The hash of each run, by its name; None if it drew no mask there.
    """

    step: int
    site: str
    hashes: Mapping[str, MaskHash | None]

    def differs(self, run: str) -> bool:
        """Return whether the masks of a run differ from those of the first run."""
        first, other = next(iter(self.hashes.values())), self.hashes[run]
        if first is None or other is None:
            return first is not other
        if first.shapes == other.shapes:
            return first.whole != other.whole
        return first.rows != other.rows

    def cell(self, run: str) -> str:
        """Return the hash of a run for the table."""
        found, first = self.hashes[run], next(iter(self.hashes.values()))
        if found is None:
            return "no mask"
        if self.differs(run) or found is first:
            return found.whole
        return "same" if first and found.shapes == first.shapes else "same rows"


@dataclasses.dataclass(frozen=True)
class MaskCertificate:
    """The hashes of all masks in all runs; `print` shows a table.

    Attributes:
        runs: The names of the runs, such as `"2 devices"`; the others are compared with the first.
        rows: The masks by step and site.
        restart: The first step of the run after a restart.
    """

    runs: tuple[str, ...]
    rows: tuple[CertificateRow, ...]
    restart: int

    @property
    def differences(self) -> list[tuple[CertificateRow, str]]:
        """The rows that differ, each with the name of the run."""
        return [(row, run) for row in self.rows for run in row.hashes if row.differs(run)]

    def raise_if_different(self) -> None:
        """Raise an error if the masks of a run differ from those of the first run.

        Raises:
            AssertionError: They differ; the message has the table.
        """
        if self.differences:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        table = [("step", "site", "elements", *self.runs)]
        for row in self.rows:
            drawn = next(found for found in row.hashes.values() if found)
            cells = [row.cell(run) if run in row.hashes else "" for run in self.runs]
            table.append((str(row.step), row.site, f"{drawn.elements:,}", *cells))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        if not self.differences:
            return f"{len(self.rows)} masks agree in {len(self.runs)} runs."
        row, run = self.differences[0]
        count = len({(row.step, row.site) for row, _ in self.differences})
        return (
            f"{count} of {len(self.rows)} masks differ; the first is that of '{row.site}' in step "
            f"{row.step}, {run}. Derive each key from the root key, the step and a fixed name, "
            "regjax.site_key(root, step, name), and in shard_map pass "
            "sampler=regjax.by_example(indices)."
        )


def certify_masks(
    train: Callable[[list[Any], int, int], Iterable[Any]],
    *,
    devices: Sequence[int] = (1, 2, 8),
    steps: int = 2,
    platform: str = "cpu",
    progress: Callable[[str], None] = lambda run: None,
) -> MaskCertificate:
    """Run the same training steps on several numbers of devices and after a restart.

    Each run is a process of its own, so that a restart is a real one: with new counters, and
    another `hash` of each string. The masks that `regjax` draws are hashed step by step.

    Inside `shard_map` each device draws a part of a mask. Such parts are compared with a whole mask
    as a set of rows along the leading axis, without their order: "same rows" in the table.

    Args:
        train: A generator function, called as `train(devices, start, stop)`: it trains the steps
            from `start` to `stop` on the listed devices, and yields after each step. From a `start`
            above 0 it continues as after a restart, with a checkpoint if the run needs one. It must
            be defined at the top level of a module, from which a new process can import it; a
            script must call `certify_masks` below `if __name__ == "__main__":`.
        devices: The numbers of devices. The first run is the one that others are compared with.
        steps: The number of steps, at least 2. The restart is in the middle, on as many devices as
            the first run has.
        platform: The platform of the devices. On a CPU any number can be had; other platforms need
            so many, and no other process may occupy them, this one included. Masks do not depend on
            the platform.
        progress: Called with the name of each completed run.

    Returns:
        The certificate; `raise_if_different()` raises an error if a mask differs.

    Raises:
        TypeError: An argument is of the wrong type, or `train` returns no iterator.
        ValueError: An argument is out of range, `train` cannot be imported by another process,
            yields another number of times, or draws no mask; or there are too few devices.
        RuntimeError: A process ended without a result. An error of `train` is raised unchanged.

    Example:
        >>> import jax, jax.numpy as jnp, regjax
        >>> def train(devices, start, stop):
        ...     mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)
        ...     rows = jax.NamedSharding(mesh, jax.P("data"))
        ...     x = jax.device_put(jnp.ones((16, 4)), rows)
        ...     for step in range(start, stop):
        ...         key = regjax.site_key(jax.random.key(0), step, "hidden")
        ...         regjax.dropout(x, 0.5, key=key)
        ...         yield
        >>> if __name__ == "__main__":  # doctest: +SKIP
        ...     print(regjax.certify_masks(train, devices=(1, 8)))
        step  site    elements  1 device      8 devices  restart
        0     hidden  64        a848d9ee8dff  same
        1     hidden  64        6fd561996604  same       same
        2 masks agree in 3 runs.
    """
    check_callable("train", train, _SIGNATURE)
    counts = check_integers("devices", devices)
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise ValueError(
            f"devices must be distinct numbers of at least 1; got {tuple(devices)!r}. Pass "
            "(1, 2, 8)."
        )
    steps = check_integer("steps", steps, minimum=2)
    check_string("platform", platform)
    check_callable("progress", progress, "(run)")
    _check_importable(train)
    middle = steps // 2
    plan = {f"{n} device{'s' * (n > 1)}": (n, 0, steps) for n in counts}
    plan["restart"] = counts[0], middle, steps
    found: dict[str, list[dict[str, MaskHash]]] = {}
    for run, (count, start, stop) in plan.items():
        found[run] = _in_new_process(platform, train, count, start, stop)
        progress(run)
    rows = []
    for step in range(steps):
        drawn = {run: found[run][step - plan[run][1]] for run in plan if step >= plan[run][1]}
        for site in dict.fromkeys(site for masks in drawn.values() for site in masks):
            hashes = {run: masks.get(site) for run, masks in drawn.items()}
            rows.append(CertificateRow(step, site, hashes))
    if not rows:
        raise ValueError(
            "train must draw masks by regjax; got none. Pass deterministic=False, and look at the "
            "rate."
        )
    return MaskCertificate(tuple(plan), tuple(rows), middle)


def _check_importable(train: Any) -> None:
    try:
        pickle.dumps(train)
    except Exception as error:
        raise ValueError(
            "train must be a function at the top level of a module, which another process can "
            f"import; got {train!r} ({error}). Move it there."
        ) from None


def _in_new_process(platform: str, train: Any, *arguments: int) -> list[dict[str, MaskHash]]:
    """Return the masks of each step, drawn in a process of its own."""
    flags = os.environ.get("XLA_FLAGS", "")
    variables = {
        "JAX_PLATFORMS": platform,
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={arguments[0]}".strip(),
        # An observer gathers each mask on one device, of which XLA warns.
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    context = multiprocessing.get_context("spawn")
    with _environment(variables), ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_hashes, train, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError(
                f"the process on {arguments[0]} devices must return its masks; it ended without a "
                "result. A script must call certify_masks below `if __name__ == '__main__':`; "
                "otherwise the process was killed, as for lack of memory."
            ) from None


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _hashes(train: Any, count: int, start: int, stop: int) -> list[dict[str, MaskHash]]:
    """Return the hashes of the masks by site, step by step."""
    try:
        available = jax.devices()
    except RuntimeError as error:
        platform = os.environ.get("JAX_PLATFORMS")
        raise ValueError(
            f"platform must be one for which JAX finds devices; got {platform!r} "
            f"({str(error).splitlines()[0]}). Omit it to simulate devices on the CPU."
        ) from None
    if len(available) < count:
        raise ValueError(
            f"devices must be at most the number of devices, {len(available)}; got {count}. Omit "
            "it, or pass platform='cpu'."
        )
    events, found = [], []
    with observing(events.append):
        steps = train(available[:count], start, stop)
        if not isinstance(steps, Iterator):
            raise TypeError(
                f"train must be a generator, which yields after each step; got {describe(steps)}. "
                "Add `yield` at the end of the loop."
            )
        for _ in itertools.islice(steps, stop - start + 1):
            jax.effects_barrier()
            found.append(_step_hashes(events))
            events.clear()
    if len(found) != stop - start:
        times = "more" if len(found) > stop - start else f"only {len(found)}"
        raise ValueError(
            f"train must yield once for each of the steps from {start} to {stop}; got {times}. Add "
            "`yield` at the end of the loop."
        )
    return found


def _step_hashes(events: Iterable[SiteKey | Draw]) -> dict[str, MaskHash]:
    """Return the hashes of the masks of one step by site, in the order of the program."""
    events = list(events)
    sites = {event.key: event.site for event in events if isinstance(event, SiteKey)}
    masks = defaultdict[tuple[int, str], list[np.ndarray]](list)
    for draw in sorted((e for e in events if isinstance(e, Draw)), key=lambda draw: draw.order):
        site = sites.get(draw.key) or f"{draw.function} ({PurePath(draw.where).name})"
        masks[draw.order, site].append(draw.mask)
    found, counts = {}, Counter[str]()
    for (_, site), drawn in masks.items():
        counts[site] += 1
        name = f"{site}, mask {counts[site]}" if counts[site] > 1 else site
        found[name] = _hash(drawn)
    return found


def _hash(masks: Iterable[np.ndarray]) -> MaskHash:
    """Return the hash of masks in any order, each counted once: a checkpoint draws it again."""
    distinct = {(mask.shape, mask.tobytes()): mask for mask in masks}
    ordered = [distinct[place] for place in sorted(distinct)]
    rows = {row.tobytes() for mask in ordered for row in np.atleast_1d(mask)}
    return MaskHash(
        sum(mask.size for mask in ordered),
        tuple(mask.shape for mask in ordered),
        _digest(f"{mask.shape}".encode() + mask.tobytes() for mask in ordered),
        _digest(sorted(rows)),
    )


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:12]
