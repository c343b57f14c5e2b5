"""Mutation testing of the random core, dropout, decay and the optimizers: `make mutants`.

cosmic-ray creates the mutants, each with one small change. Each mutant runs the tests of its file
in a process that is forked after the import of JAX and PyTorch, which takes one or two seconds
instead of ten. The run fails if less than 95 % are killed, or if a survivor is not explained in
`tests/mutants.toml`.

    python -m tests.mutants                                      # all files; hours
    python -m tests.mutants regjax/_dropout/core.py --every 10   # a tenth of one file; a minute

An explanation without a survivor in a complete run is an error, too, since it could hide another.
"""

from __future__ import annotations

import ast
import itertools
import math
import os
import runpy
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from parity_tests import output

ROOT = Path(__file__).parents[1]
EXPLAINED = Path(__file__).with_suffix(".toml")
REQUIRED = 0.95  # of all mutants; a file of thirty with two equivalent ones has less
REQUIRED_OF_FILE = 0.9
# Lines that affect the speed of a computation, but not its result.
TUNING = ("_LONGEST =", "_PIECE =", "_PIECE_ON_DEVICE =")
# Decorators with an effect on speed, docstrings, or checks of annotations, but not on results.
IGNORED = ("jax.jit", "functools.wraps", "runtime_checkable")
PATIENCE = 3.0  # kill a mutant after this multiple of the time of the unchanged file
PROGRESS = 30.0  # seconds between two lines of progress

# One replacement for each binary operator (its inverse if it has one), and both neighbors and the
# negation of each comparison. Other replacements hardly find more.
BINARY = """Add_Sub Sub_Add Mul_Add Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul RShift_LShift
LShift_RShift BitOr_BitAnd BitAnd_BitOr BitXor_BitOr"""
COMPARISON = """Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt
Is_IsNot IsNot_Is"""
OTHERS = """NumberReplacer AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr
ReplaceOrWithAnd ReplaceUnaryOperator_USub_UAdd ReplaceUnaryOperator_Delete_Not RemoveDecorator
ZeroIterationForLoop ExceptionReplacer ReplaceContinueWithBreak"""
OPERATORS = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in BINARY.split()),
    *(f"ReplaceComparisonOperator_{pair}" for pair in COMPARISON.split()),
    *OTHERS.split(),
)

# The test files or tests of each file, starting with those that kill the most mutants per time.
_GOLDEN = "parity_tests/test_golden.py"
_PARTS = "tests/test_parts_core.py"
_BITS = [_GOLDEN, "tests/test_random_core.py", _PARTS]
_KEYS = [
    _GOLDEN,
    "tests/test_keys_core.py",
    "parity_tests/test_masks.py::test_wrong_steps_and_sites_are_refused",
]
_MASKS = [
    _GOLDEN,
    "tests/test_masks_core.py",
    "parity_tests/test_masks.py::test_a_mask_can_be_read_at_any_index",
    _PARTS,
]
_PACKED = [
    _GOLDEN,
    "tests/test_packed_core.py",
    "parity_tests/test_packed.py::test_wrong_bits_are_refused_by_value",
    "tests/test_masks_core.py::test_a_sampler_may_say_what_it_keeps",
    _PARTS,
]
_DROPOUT = ["tests/test_dropout_core.py", "parity_tests/test_corners.py"]
_JAX_DROPOUT = "tests/regjax/test_dropout.py"
_LAYOUTS = "tests/regjax/test_layouts.py::"
_MASK = "tests/regjax/test_optim_gradients.py::test_a_mask_that_is_false_for_all_is_refused"
_OPTIM = ["tests/regjax/test_optim.py::test_signature", "tests/regjax/test_optim_arguments.py"]
_TORCH_OPTIM = ["tests/regtorch/test_optim.py", "tests/regtorch/test_optim_refusals.py"]
TESTS = {
    "regjax/_random/threefry.py": [
        *_BITS,
        f"{_LAYOUTS}test_a_packed_mask_computes_no_index_apart_from_its_words",
    ],
    "regjax/_random/keys.py": [
        *_KEYS,
        f"{_JAX_DROPOUT}::test_key_reuse_is_still_seen",
        f"{_JAX_DROPOUT}::test_a_site_key_of_a_raw_root_is_raw",
    ],
    "regjax/_random/bernoulli.py": [
        *_MASKS,
        "tests/test_random_core.py::test_a_layout_is_a_sharding_or_a_spec",
        f"{_JAX_DROPOUT}::test_key_reuse_is_still_seen",
    ],
    "regjax/_random/packed.py": [
        *_PACKED,
        f"{_LAYOUTS}test_packed_masks_ask_for_indices_in_place",
    ],
    "regjax/_random/by_example.py": ["parity_tests/test_by_example.py"],
    "regjax/_random/xla.py": [
        "tests/regjax/test_xla.py",
        "tests/regjax/test_noise.py::test_no_product_is_joined_with_a_sum",
        "tests/regjax/test_optim_descent.py",
        "tests/regjax/test_spread.py",
        "tests/test_packed_core.py",
        f"{_JAX_DROPOUT}::test_a_shared_mask_is_drawn_once",
        f"{_LAYOUTS}test_a_packed_mask_computes_no_index_apart_from_its_words",
    ],
    "regjax/_dropout/core.py": [*_DROPOUT, _JAX_DROPOUT],
    "regshared/globs.py": ["tests/test_globs.py"],
    "regshared/layerwise.py": [
        *_TORCH_OPTIM,
        "tests/regjax/test_optim_decays.py",
    ],
    "regshared/decay_rules.py": ["tests/test_decay_rules.py"],
    "regjax/_decay/paths.py": ["tests/regjax/test_decay.py"],
    "regjax/_decay/validation.py": ["tests/regjax/test_decay.py"],
    "regjax/_decay/param_trees.py": ["tests/regjax/test_rules.py"],
    "regjax/_decay/penalty.py": ["tests/regjax/test_penalty.py"],
    "regjax/optim/_links.py": ["tests/regjax/test_optim_links.py"],
    "regjax/optim/_decays.py": ["tests/regjax/test_optim_decays.py", _MASK],
    "regjax/optim/_gradients.py": ["tests/regjax/test_optim_gradients.py"],
    "regjax/optim/_descent.py": ["tests/regjax/test_optim_descent.py", *_OPTIM],
    "regjax/optim/_adam.py": ["tests/regjax/test_optim_adam.py", *_OPTIM],
    "regjax/optim/_adam_variants.py": ["tests/regjax/test_optim_adam.py", *_OPTIM],
    "regjax/optim/_rms.py": ["tests/regjax/test_optim_rms.py", *_OPTIM],
    "regjax/optim/_adafactor.py": ["tests/regjax/test_optim_adafactor.py", *_OPTIM, _MASK],
    "regjax/optim/_muon.py": ["tests/regjax/test_optim_muon.py", *_OPTIM],
    "regtorch/_random/threefry.py": _BITS,
    "regtorch/_random/keys.py": [
        *_KEYS,
        "tests/regtorch/test_keyed.py::test_keys_from_integers_are_keys_from_tensors",
    ],
    "regtorch/_random/bernoulli.py": _MASKS,
    "regtorch/_random/packed.py": _PACKED,
    "regtorch/_random/by_example.py": ["parity_tests/test_by_example.py"],
    "regtorch/_dropout/core.py": [*_DROPOUT, "tests/regtorch/test_transforms.py"],
    "regtorch/_decay/paths.py": ["tests/regtorch/test_penalty.py"],
    "regtorch/_decay/validation.py": [
        "tests/regtorch/test_penalty.py",
        *_TORCH_OPTIM,
    ],
    "regtorch/_decay/param_trees.py": ["tests/regtorch/test_rules.py"],
    "regtorch/_decay/penalty.py": ["tests/regtorch/test_penalty.py"],
    "regtorch/optim/_decays.py": _TORCH_OPTIM,
    "regtorch/optim/_groups.py": _TORCH_OPTIM,
    "regtorch/optim/_hooks.py": _TORCH_OPTIM,
}


Explained: TypeAlias = set[tuple[str, str, str]]


@dataclass(frozen=True)
class Mutant:
    """One changed file.

    Attributes:
        line: The number of the first line that changed.
        before: That line without its indentation.
        after: The same of the mutant.
        source: The whole mutant.
    """

    line: int
    before: str
    after: str
    source: str


def _is_ignored(decorator: ast.expr) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(function) in IGNORED


def normalized(source: str) -> str:
    """Return the syntax tree of a file without annotations, which have no effect at run time."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.decorator_list = [d for d in node.decorator_list if not _is_ignored(d)]
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.test, node.body = ast.Constant(False), [ast.Pass()]
    return ast.dump(tree)


def mutants(file: str) -> list[Mutant]:
    """Return every mutant of a file that differs from it, and from the others, at run time."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    original = (ROOT / file).read_text()
    known, found = {normalized(original)}, []
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        for occurrence in itertools.count():
            source = mutate_code(original, operator, occurrence)
            if source is None:
                break
            try:
                tree = normalized(source)
            except SyntaxError:  # cosmic-ray also treats the star of `f(*, a)` as a product
                continue
            if tree in known:
                continue
            known.add(tree)
            pairs = enumerate(itertools.zip_longest(original.split("\n"), source.split("\n")), 1)
            line, before, after = next((i, a, b) for i, (a, b) in pairs if a != b)
            if not before.startswith(TUNING):
                found.append(Mutant(line, before.strip(), after.strip(), source))
    return sorted(found, key=lambda mutant: mutant.line)


def import_frameworks() -> None:
    """Import the packages that are not mutated, with the settings of the tests and no threads."""
    runpy.run_path(str(ROOT / "conftest.py"))
    for name in ("chex", "hypothesis", "jax", "ml_dtypes", "optax", "pytest", "torch._dynamo"):
        __import__(name)
    import jax

    cache = ROOT / "outputs" / "mutants"
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(cache / "python")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert not loaded & {"regjax", "regtorch", "parity_tests"}


class OnePackage:
    """A pytest plugin that excludes the tests of the package that is not mutated."""

    def __init__(self, package: str):
        self.framework = package.removeprefix("reg")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep the tests of this package, and of neither."""
        params = [getattr(item, "callspec", None) for item in items]
        frameworks = [
            str(spec.params.get("framework", self.framework)) if spec else self.framework
            for spec in params
        ]
        items[:] = [
            item
            for item, framework in zip(items, frameworks, strict=True)
            if framework == self.framework
        ]


def start(file: str, source: str | None) -> int:
    """Fork a process that runs the tests of a file with a mutant, or with the unchanged file.

    Its exit status is 0 if all pass, and otherwise the number (from 1) of the failing entry.
    """
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    if source is not None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        path, get_code = str(ROOT / file), SourceFileLoader.get_code

        def mutated(self: SourceFileLoader, fullname: str):
            if self.path != path:
                return get_code(self, fullname)
            return compile(source, path, "exec", dont_inherit=True)

        SourceFileLoader.get_code = mutated
    import pytest

    left_out = ("cacheprovider", "hypothesispytest", "unraisableexception", "xdist")
    plain = ["-x", "-q", "--assert=plain", "--tb=line", *(f"-pno:{name}" for name in left_out)]
    status = 0
    for number, entry in enumerate(TESTS[file], 1):
        try:
            plugins = [OnePackage(file.partition("/")[0])]
            code = pytest.main([*plain, "-m", "not slow", entry], plugins=plugins)
        except BaseException:
            code = 1
        if code:
            status = number
            break
    os._exit(status)


def run_mutants(
    file: str, sources: Sequence[str | None], jobs: int, limit: float
) -> Iterator[tuple[int, int, float]]:
    """Run mutants, `jobs` at a time; yield the index, the status (see `start`) and the seconds.

    The status is negative if a mutant ran longer than `limit` seconds or crashed.
    """
    waiting, running = list(reversed(range(len(sources)))), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            place = waiting.pop()
            running[start(file, sources[place])] = (place, time.monotonic())
        for pid, (place, since) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            spent = time.monotonic() - since
            if done:
                del running[pid]
                yield place, os.waitstatus_to_exitcode(status), spent
            elif spent > limit:
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)


def check_files(explained: Explained) -> None:
    """Check that the files of both tables exist.

    Raises:
        FileNotFoundError: A mutated file or one of its tests does not exist.
        ValueError: A file with an explained survivor is not mutated.
    """
    named = {*TESTS, *itertools.chain(*TESTS.values())}
    paths = {name.partition("::")[0] for name in named}
    if missing := sorted(path for path in paths if not (ROOT / path).is_file()):
        raise FileNotFoundError(f"TESTS must have existing files; got {missing}. Remove them.")
    if unknown := sorted({file for file, _, _ in explained} - set(TESTS)):
        raise ValueError(f"{EXPLAINED.name} must have files of TESTS; got {unknown}. Remove them.")


def explanations() -> Explained:
    """Return the explained survivors, by file, line and replacement."""
    entries = tomllib.loads(EXPLAINED.read_text())["survivor"]
    return {(entry["file"], entry["before"], entry["after"]) for entry in entries}


class Score(NamedTuple):
    """The mutants of a file: those that were killed and run, and whether the file passes."""

    killed: int
    run: int
    passes: bool


def run(file: str, jobs: int, every: int, explained: Explained) -> Score:
    """Run the mutants of a file; it passes if enough are killed and the rest is explained."""
    ((_, failed, alone),) = run_mutants(file, [None], 1, math.inf)
    if failed:
        print(f"{file}: {TESTS[file][failed - 1]} fails with the unchanged file")
        return Score(0, 0, passes=False)
    found = mutants(file)
    work = found[::every]
    print(f"{file}: {len(work)} of {len(found)} mutants; unchanged {alone:.0f} s", flush=True)
    begin = reported = time.monotonic()
    outcomes, survivors, failures = [], set(), 0
    limit = 10 + PATIENCE * alone
    for place, status, spent in run_mutants(file, [mutant.source for mutant in work], jobs, limit):
        outcomes.append((status, spent))
        if status == 0:
            mutant = work[place]
            survivor = (file, mutant.before, mutant.after)
            survivors.add(survivor)
            failures += survivor not in explained
            print(f"  {'explained' if survivor in explained else 'SURVIVED'} {file}:{mutant.line}")
            print(f"    - {mutant.before}\n    + {mutant.after}", flush=True)
        if time.monotonic() - reported > PROGRESS:
            reported = time.monotonic()
            print(f"  {len(outcomes)} of {len(work)}, {reported - begin:.0f} s", flush=True)
    for number, entry in enumerate(["hung or crashed", "survived", *TESTS[file]], -1):
        times = [spent for status, spent in outcomes if max(status, -1) == number]
        if times:
            print(f"  {len(times):4d} {entry}, {sum(times) / len(times):.1f} s each")
    if every == 1:
        for _, before, after in sorted(
            {entry for entry in explained if entry[0] == file} - survivors
        ):
            failures += 1
            print(f"  UNUSED explanation: no such mutant survives\n    - {before}\n    + {after}")
    killed = sum(status != 0 for status, _ in outcomes)
    score = killed / max(1, len(work))
    spent = time.monotonic() - begin
    print(f"{file}: {score:.1%} of {len(work)} killed, {spent:.0f} s", flush=True)
    return Score(killed, len(work), score >= REQUIRED_OF_FILE and not failures)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the mutants of the files and report."""
    parser = output.Parser("python -m tests.mutants", __doc__)
    file = output.one_of(TESTS)["type"]
    text = f"mutated files (default: all {len(TESTS)} of the table in tests/mutants.py)"
    parser.add_argument(
        "files", nargs="*", default=list(TESTS), type=file, metavar="FILE", help=text
    )
    text = "number of concurrent processes (default: %(default)s, the number of CPUs)"
    jobs = {"type": output.integer(1), "metavar": "N"}
    parser.add_argument("--jobs", default=os.cpu_count() or 1, help=text, **jobs)
    text = "run only every Nth mutant (default: %(default)s)"
    parser.add_argument("--every", default=1, help=text, **jobs)
    options = parser.parse_args(argv)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    explained = explanations()
    check_files(explained)
    import_frameworks()
    scores = [run(file, options.jobs, options.every, explained) for file in options.files]
    killed, tried = sum(score.killed for score in scores), sum(score.run for score in scores)
    total = killed / max(1, tried)
    failed = [file for file, score in zip(options.files, scores, strict=True) if not score.passes]
    print(f"{total:.1%} of {tried} killed; {REQUIRED:.0%} are required")
    if failed:
        print(f"These files fail: {', '.join(failed)}.")
    return int(total < REQUIRED or bool(failed))


if __name__ == "__main__":
    output.run(main)
