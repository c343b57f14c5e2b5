"""The report on the dropout of observed training steps: problems, places and confidence.

Both packages share it. The problems and the functions that find them stay in one file, since a new
problem adds to both.
"""

from __future__ import annotations

import enum
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import NamedTuple

from regshared.checks import check_strings
from regshared.events import SiteKey
from regshared.globs import matches
from regshared.mask_audit import SampledMask, Segment, find_relations

# These draw blocks, and one decision for all occurrences of a word, not independent elements.
_NOT_INDEPENDENT = {"drop_block", "embedding_dropout"}
# A correct program triggers a finding with at most this probability, per kind of problem.
_CHANCE = 1e-9

Step = Sequence["MaskSummary"]
Expected = Collection[str] | Mapping[str, float]


class DropoutProblem(enum.Enum):
    """The problems that the dropout of a training step may have.

    Attributes:
        SAME_MASK: A site drew from the same key in two steps.
        REPEATED_MASK: A site drew from the same key several times in one step: for every timestep,
            layer, row, device or call.
        SHARED_KEY: Several sites drew from the same key, in one step or in two.
        COPIED_MASK: A mask is a shifted, strided, transposed or inverted copy of another, or of a
            part of it, or nested in it, though their keys differ; or it repeats itself.
        REMADE_MASK: A site drew another mask from the same key for the same values, as when the
            backward pass of a checkpoint repeats the forward pass.
        IGNORED_KEY: A site drew the same mask from different keys: its sampler ignores them.
        NEVER_ACTIVE: No site drew in training, or an expected one did not.
        ACTIVE_IN_EVALUATION: A site drew in evaluation.
        OTHER_RATE: A site drew at a rate that was not expected.
        INVALID_RATE: A traced rate was NaN or not in [0, 1], so that the output is NaN.
        ALL_OR_NOTHING: A mask kept all elements or none at a rate strictly between 0 and 1.
    """

    SAME_MASK = "same mask in two steps"
    REPEATED_MASK = "same mask again within a step"
    SHARED_KEY = "one key at several sites"
    COPIED_MASK = "mask that depends on another"
    REMADE_MASK = "other mask in the backward pass"
    IGNORED_KEY = "same mask from different keys"
    NEVER_ACTIVE = "never active in training"
    ACTIVE_IN_EVALUATION = "active in evaluation"
    OTHER_RATE = "other rate than expected"
    INVALID_RATE = "rate outside [0, 1]"
    ALL_OR_NOTHING = "mask that keeps all or nothing"


class Site(NamedTuple):
    """A dropout in the code; places that no name distinguishes are one site.

    Attributes:
        name: The name its key was derived for, or the path of its module; empty if unknown.
        where: The line of code, `"path/model.py:42"`.
    """

    name: str
    where: str

    def __str__(self) -> str:
        line = self.line
        return f"{self.name} ({line})" if self.name else line

    @property
    def line(self) -> str:
        """The line of code without the folders, `"model.py:42"`."""
        return PurePath(self.where).name

    def fits(self, pattern: str) -> bool:
        """Return whether a glob matches this site's name or its line of code."""
        return any(name and matches(pattern, name) for name in (self.name, self.line))


@dataclass(frozen=True)
class MaskSummary:
    """One mask, reduced to the properties that the findings use.

    Attributes:
        order: Its position in the program.
        site: The dropout that drew it.
        key: The two words of its key.
        origin: The known origin of the key, in words; empty if unknown.
        function: The function of the library that drew it.
        rate: The dropout rate.
        shape: The shape of the masked values.
        size: The number of elements of the mask.
        kept: The number of elements that are kept.
        sample: Some of the mask's elements, at fixed places: 1 where it keeps.
        values: Some of the masked values, without NaN and infinities.
        digits: The relative rounding of these values.
        segments: Other elements of the mask, for a search for copies.
        remade: Whether a checkpoint drew it, in the backward pass.
        is_stable: Whether the mask was the same when it was drawn again for the same values.
        examples: The numbers that `by_example` drew it for; None for any other mask.
    """

    order: int
    site: Site
    key: tuple[int, int]
    origin: str
    function: str
    rate: float
    shape: tuple[int, ...]
    size: int
    kept: int
    sample: bytes
    values: Sequence[float]
    digits: float
    segments: Sequence[tuple[Segment, bytes]] = ()
    remade: bool = False
    is_stable: bool = True
    examples: tuple[int, ...] | None = None


class DropoutFinding(NamedTuple):
    """A problem that was found.

    Attributes:
        problem: The kind of problem.
        sites: The names of the sites, with the lines of code that call them.
        detail: The evidence.
        chance: An upper bound of the probability that a correct program shows the same by accident.
    """

    problem: DropoutProblem
    sites: tuple[str, ...]
    detail: str
    chance: float = 0.0


class DropoutRow(NamedTuple):
    """One site of a `DropoutReport`.

    Attributes:
        site: Its name; empty if it has none.
        where: The line of code.
        functions: The functions called there, such as `dropout`.
        shapes: The shapes of the masked values.
        rates: The rates it drew with.
        draws: The number of masks in each training step.
        evaluation: The number of masks in evaluation.
    """

    site: str
    where: str
    functions: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    rates: tuple[float, ...]
    draws: tuple[int, ...]
    evaluation: int


@dataclass(frozen=True)
class DropoutReport:
    """Every dropout in the observed steps, and its problems.

    Attributes:
        rows: One for each site, in the order of the program.
        findings: The problems; empty if there are none.
        advice: The fix for each kind of problem.

    Example:
        >>> row = DropoutRow("hidden", "model.py:42", ("dropout",), ((16, 32),), (0.5,), (1, 1), 0)
        >>> print(DropoutReport((row,), (), {}))
        site    where        function  shape     rate  draws  evaluation
        hidden  model.py:42  dropout   (16, 32)  0.5   1 + 1  -
        <BLANKLINE>
        nothing is wrong
    """

    rows: tuple[DropoutRow, ...]
    findings: tuple[DropoutFinding, ...]
    advice: Mapping[DropoutProblem, str] = field(repr=False, compare=False)

    def raise_if_wrong(self) -> None:
        """Raise an error if the dropout has problems.

        Raises:
            RuntimeError: There are findings; the message is the whole report.
        """
        if self.findings:
            raise RuntimeError(f"dropout is wrong\n{self}")

    def __str__(self) -> str:
        lines = _table(self.rows)
        for problem in dict.fromkeys(finding.problem for finding in self.findings):
            lines += ["", problem.value]
            for finding in self.findings:
                if finding.problem is problem:
                    lines.append(f"  {_finding_line(finding)}")
            lines += textwrap.wrap(f"  -> {self.advice[problem]}", 96, subsequent_indent=" " * 5)
        return "\n".join(lines if self.findings else [*lines, "", "nothing is wrong"])


def draws_of(events: Iterable[SiteKey | MaskSummary]) -> Step:
    """Return the draws of one step, in the order of the program, with the names of their keys.

    A site that draws again from one key for the same values counts once: a checkpoint runs its
    forward pass again in the backward pass, and a loss may be computed twice, with and without its
    gradient.
    """
    events = list(events)
    keys = {event.key: event for event in events if isinstance(event, SiteKey)}
    draws = sorted((e for e in events if isinstance(e, MaskSummary)), key=lambda drawn: drawn.order)
    seen = defaultdict[tuple[Site, tuple[int, int]], list[MaskSummary]](list)
    for drawn in (_named(drawn, keys) for drawn in draws):
        if drawn.remade:  # its line of code is another one
            groups = [group for (_, key), group in seen.items() if key == drawn.key]
        else:
            groups = [seen[drawn.site, drawn.key]]
        alike = [
            (group, i)
            for group in groups
            for i, other in enumerate(group)
            if _same_values(drawn, other)
        ]
        if not alike and not drawn.remade:
            groups[0].append(drawn)
        alike = [(group, i) for group, i in alike if _same_call(drawn, group[i])]
        if alike and not any(_same_mask(drawn, group[i]) for group, i in alike):
            group, i = alike[0]
            group[i] = replace(group[i], is_stable=False)
    once = [drawn for group in seen.values() for drawn in group]
    return sorted(once, key=lambda drawn: drawn.order)


def _named(drawn: MaskSummary, keys: Mapping[tuple[int, int], SiteKey]) -> MaskSummary:
    # A site's key may be the root of another's, as for the leaves that drop_connect drops.
    sites, key = [], drawn.key
    while key in keys:
        sites.insert(0, keys[key])
        key = keys[key].root
    if not sites:
        return drawn
    name = "/".join(event.site for event in sites)
    origin = f"the key of {name!r} at step {sites[0].step}"
    return replace(drawn, site=drawn.site._replace(name=name), origin=origin)


def _same_values(drawn: MaskSummary, other: MaskSummary) -> bool:
    if drawn.shape != other.shape or len(drawn.values) != len(other.values):
        return False
    if drawn.examples != other.examples:
        return False
    # Half the digits, which is more than a compiler's fusion changes by rounding.
    bound = drawn.digits**0.5 * math.hypot(*drawn.values)
    return math.dist(drawn.values, other.values) <= bound


def _same_call(drawn: MaskSummary, other: MaskSummary) -> bool:
    settings = (drawn.function, drawn.rate, drawn.size)
    return settings == (other.function, other.rate, other.size)


def _same_mask(drawn: MaskSummary, other: MaskSummary) -> bool:
    return (drawn.kept, drawn.sample, drawn.segments) == (other.kept, other.sample, other.segments)


def make_report(
    steps: Sequence[Step],
    evaluations: Sequence[Step],
    derived: Collection[str],
    advice: Mapping[DropoutProblem, str],
    expect: Expected,
    allow: Collection[str],
    idle: Collection[str] = (),
) -> DropoutReport:
    """Return a report of the observed draws.

    `derived` are the names of sites that keys were derived for in training, `advice` the fix for
    each kind of problem, and `idle` the names of layers that were called in training at rate 0. See
    `check_dropout` for `expect` and `allow`.
    """
    sites = _sites([*steps, *evaluations])
    for name, patterns in (("expect", expect), ("allow", allow)):
        check_strings(name, patterns)
    for pattern in allow:
        if not any(site.fits(pattern) for site in sites):
            known = ", ".join(map(str, sites)) or "no site at all"
            raise ValueError(
                f"allow must match a site with each glob; got {pattern!r}, which matches none of "
                f"{known}."
            )
    allowed = {str(site) for site in sites if any(site.fits(pattern) for pattern in allow)}
    found = [
        *_reused_keys(steps),
        *_copied_masks(steps),
        *_remade_masks(steps),
        *_odd_masks(steps),
        *_inactive(steps, derived, expect, idle),
        *_unexpected(steps, expect, idle),
        *_active(evaluations),
    ]
    found = [each for each in found if not each.sites or not allowed.issuperset(each.sites)]
    rows = tuple(_row(site, steps, evaluations) for site in sites)
    problems = list(DropoutProblem)
    return DropoutReport(
        rows, tuple(sorted(found, key=lambda each: problems.index(each.problem))), advice
    )


def _reused_keys(steps: Sequence[Step]) -> Iterator[DropoutFinding]:
    """Find keys that drew more than one mask; two 64-bit keys do not collide by accident."""
    order = _sites(steps)
    uses = defaultdict[tuple[int, int], list[tuple[int, MaskSummary]]](list)
    for number, step in enumerate(steps):
        for drawn in step:
            uses[drawn.key].append((number, drawn))
    found = defaultdict[tuple[DropoutProblem, tuple[Site, ...]], list[str]](list)
    for at_key in uses.values():
        key = at_key[0][1].origin or "key ({}, {})".format(*at_key[0][1].key)
        sites = tuple(sorted({drawn.site for _, drawn in at_key}, key=order.index))
        for site in sites:
            times = Counter(number for number, drawn in at_key if drawn.site == site)
            if len(times) > 1:
                seen = f"{key} drew in {_step_numbers(times)}"
                found[DropoutProblem.SAME_MASK, (site,)].append(seen)
            # Parts of one batch, drawn by example, share a key.
            turns = Counter((n, drawn.examples) for n, drawn in at_key if drawn.site == site)
            if (most := max(turns.values())) > 1:
                seen = f"{key} drew {most} times in a step"
                found[DropoutProblem.REPEATED_MASK, (site,)].append(seen)
        if len(sites) > 1:
            seen = f"{key} drew in {_step_numbers(dict.fromkeys(number for number, _ in at_key))}"
            found[DropoutProblem.SHARED_KEY, sites].append(seen)
    chance = math.comb(len(uses), 2) * 2.0**-64
    for (problem, sites), seen in found.items():
        more = f"; so did {len(seen) - 1} more" if len(seen) > 1 else ""
        yield DropoutFinding(problem, tuple(map(str, sites)), seen[0] + more, chance)


class _Drawn(NamedTuple):
    """A draw among those of its site in its step."""

    site: Site
    step: int
    turn: int
    turns: int

    def __str__(self) -> str:
        turn = f"draw {self.turn + 1} of {self.turns} " * (self.turns > 1)
        return f"{turn}in step {self.step}"


def _copied_masks(steps: Sequence[Step]) -> Iterator[DropoutFinding]:
    """Find masks that depend on one another though their keys differ."""
    masks, keys = list[SampledMask](), dict[_Drawn, tuple[int, int]]()
    seen = set[object]()
    for number, step in enumerate(steps):
        turns = Counter[Site]()
        totals = Counter(drawn.site for drawn in step)
        for drawn in step:
            label = _Drawn(drawn.site, number, turns[drawn.site], totals[drawn.site])
            turns[drawn.site] += 1
            # Other findings cover equal keys, equal masks of one site, and constant masks.
            same = {(drawn.key, drawn.function, drawn.size), (drawn.site, drawn.size, drawn.sample)}
            constant = drawn.kept in (0, drawn.size)
            if not constant and drawn.function not in _NOT_INDEPENDENT and not same & seen:
                masks.append(SampledMask(label, drawn.rate, drawn.segments))
                keys[label] = drawn.key
            seen |= same
    found = defaultdict[tuple[Site, ...], list[tuple[str, float]]](list)
    for relation in find_relations(masks):
        first, second = relation.first, relation.second
        assert isinstance(first, _Drawn)
        assert isinstance(second, _Drawn)
        if first != second and keys[first] == keys[second]:
            continue
        other = f"that {first}" if first.site == second.site else f"that of {first.site} {first}"
        detail = f"the mask {second} {relation.in_words(other)}"
        found[tuple(dict.fromkeys((second.site, first.site)))].append((detail, relation.chance))
    for sites, seen_there in found.items():
        more = f"; so do {len(seen_there) - 1} more" if len(seen_there) > 1 else ""
        detail, chance = seen_there[0]
        names = tuple(map(str, sites))
        yield DropoutFinding(DropoutProblem.COPIED_MASK, names, detail + more, chance)


def _remade_masks(steps: Sequence[Step]) -> Iterator[DropoutFinding]:
    """Find masks that changed when they were drawn again from one key for the same values."""
    changed = [drawn for step in steps for drawn in step if not drawn.is_stable]
    for site in dict.fromkeys(drawn.site for drawn in changed):
        first = next(drawn for drawn in changed if drawn.site == site)
        key = first.origin or "key ({}, {})".format(*first.key)
        detail = f"{key} gave two masks for the same values"
        yield DropoutFinding(DropoutProblem.REMADE_MASK, (str(site),), detail)


def _odd_masks(steps: Sequence[Step]) -> Iterator[DropoutFinding]:
    """Find masks that no sampler draws, up to a computed chance."""
    draws = defaultdict[Site, list[MaskSummary]](list)
    for drawn in (drawn for step in steps for drawn in step):
        draws[drawn.site].append(drawn)
    for site, at_site in draws.items():
        for problem, detail, chance in filter(None, map(_oddity, _alike(at_site))):
            chance *= math.comb(len(at_site), 2) if len(at_site) > 1 else 1
            if chance < _CHANCE:
                yield DropoutFinding(problem, (str(site),), detail, chance)
                break


def _alike(draws: Iterable[MaskSummary]) -> Collection[list[MaskSummary]]:
    """Group the draws of one site by their masks."""
    groups = defaultdict[tuple[object, ...], list[MaskSummary]](list)
    for drawn in draws:
        groups[drawn.shape, drawn.size, drawn.rate, drawn.kept, drawn.sample].append(drawn)
    return groups.values()


def _oddity(same: Sequence[MaskSummary]) -> tuple[DropoutProblem, str, float] | None:
    """Return the problem of masks that are all the same, and its chance for one of them."""
    drawn, p = same[0], same[0].rate
    if not 0 <= p <= 1:
        return DropoutProblem.INVALID_RATE, f"rate {p:g} gives NaN", 0.0
    if drawn.function in _NOT_INDEPENDENT or not 0 < p < 1:
        return None
    if drawn.kept in (0, drawn.size):
        detail = f"{drawn.kept} of {drawn.size} elements are kept at rate {p:g}"
        chance = (1 - p if drawn.kept else p) ** drawn.size
        return DropoutProblem.ALL_OR_NOTHING, detail, chance
    keys = len({drawn.key for drawn in same})
    if keys == 1:
        return None
    detail = f"{keys} keys gave the same mask of {drawn.size} elements"
    chance = (p * p + (1 - p) ** 2) ** len(drawn.sample)
    return DropoutProblem.IGNORED_KEY, detail, chance


def _inactive(
    steps: Sequence[Step], derived: Collection[str], expect: Expected, idle: Collection[str]
) -> Iterator[DropoutFinding]:
    none_expected = expect and all(_expects_nothing(expect, each, idle) for each in expect)
    if not any(steps) and not none_expected:
        detail = f"no mask was drawn in {len(steps)} steps"
        if derived:
            detail += f"; keys were derived for {', '.join(sorted(derived))}, and not used"
        yield DropoutFinding(DropoutProblem.NEVER_ACTIVE, (), detail)


def _expects_nothing(expect: Expected, pattern: str, idle: Collection[str]) -> bool:
    """Return whether a pattern names sites with rate 0, expected so or set so in a layer."""
    rate = expect[pattern] if isinstance(expect, Mapping) else None
    return rate == 0 or (rate is None and any(matches(pattern, name) for name in idle))


def _unexpected(
    steps: Sequence[Step], expect: Expected, idle: Collection[str]
) -> Iterator[DropoutFinding]:
    rates = defaultdict[Site, set[float]](set)
    for drawn in (drawn for step in steps for drawn in step):
        rates[drawn.site].add(drawn.rate)
    for pattern in expect:
        rate = expect[pattern] if isinstance(expect, Mapping) else None
        sites = [site for site in rates if site.fits(pattern)]
        if not sites and not _expects_nothing(expect, pattern, idle):
            detail = "no mask was drawn there"
            if rate is not None and any(matches(pattern, name) for name in idle):
                detail += f", as the rate of the layer is 0, and {rate:g} was expected"
            yield DropoutFinding(DropoutProblem.NEVER_ACTIVE, (pattern,), detail)
        if rate is not None:
            yield from _other_rates({site: rates[site] for site in sites}, rate)


def _other_rates(rates: Mapping[Site, set[float]], expected: float) -> Iterator[DropoutFinding]:
    for site, drawn in rates.items():
        # A traced rate was rounded to float32.
        others = [rate for rate in drawn if not math.isclose(rate, expected, rel_tol=1e-6)]
        if others:
            detail = f"its rate is {others[0]:g}, and {expected:g} was expected"
            yield DropoutFinding(DropoutProblem.OTHER_RATE, (str(site),), detail)


def _active(evaluations: Sequence[Step]) -> Iterator[DropoutFinding]:
    # A traced rate of 0 turns dropout off as well as deterministic=True does.
    active = [drawn for draws in evaluations for drawn in draws if drawn.rate != 0]
    for site, times in Counter(drawn.site for drawn in active).items():
        detail = f"drew {times} mask{'s' * (times > 1)}"
        yield DropoutFinding(DropoutProblem.ACTIVE_IN_EVALUATION, (str(site),), detail)


def _sites(steps: Iterable[Step]) -> list[Site]:
    """Return every site once, in the order of the program."""
    return list(dict.fromkeys(drawn.site for step in steps for drawn in step))


def _row(site: Site, steps: Sequence[Step], evaluations: Sequence[Step]) -> DropoutRow:
    at_site = [[drawn for drawn in draws if drawn.site == site] for draws in (*steps, *evaluations)]
    everything = [drawn for draws in at_site for drawn in draws]
    counts = tuple(map(len, at_site))
    return DropoutRow(
        site.name,
        site.where,
        tuple(dict.fromkeys(drawn.function for drawn in everything)),
        tuple(dict.fromkeys(drawn.shape for drawn in everything)),
        tuple(dict.fromkeys(drawn.rate for drawn in everything)),
        counts[: len(steps)],
        sum(counts[len(steps) :]),
    )


def _table(rows: Iterable[DropoutRow]) -> list[str]:
    cells: list[tuple[str, ...]] = [
        ("site", "where", "function", "shape", "rate", "draws", "evaluation")
    ]
    for row in rows:
        several = row.functions, map(str, row.shapes), (f"{rate:g}" for rate in row.rates)
        draws = " + ".join(map(str, row.draws))
        place = row.site or "-", Site(row.site, row.where).line
        cells.append((*place, *map(_shortened, several), draws, str(row.evaluation or "-")))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _finding_line(finding: DropoutFinding) -> str:
    return ": ".join(filter(None, [", ".join(finding.sites), finding.detail]))


def _shortened(words: Iterable[str]) -> str:
    first, *rest = words
    return f"{first} … {rest[-1]}" if rest else first


def _step_numbers(numbers: Collection[int]) -> str:
    return f"step{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}"
