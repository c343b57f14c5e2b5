"""Mutation testing of the random core, dropout, decay and the optimizers: `make mutants`.

cosmic-ray makes the mutants, one small change each. Each runs against the tests that are
responsible for its file, in a process forked after JAX and PyTorch were imported, so that a mutant
costs a second or two rather than the ten of a fresh interpreter. The run fails when less than 95 %
are killed, or when a survivor is not explained in `tests/mutants.toml`.

    python -m tests.mutants [FILE ...] [--jobs N] [--every N]
"""

from __future__ import annotations

import argparse
import ast
import itertools
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

ROOT = Path(__file__).parents[1]
EXPLAINED = Path(__file__).with_suffix(".toml")
REQUIRED = 0.95
# Lines that choose how fast a result is computed, and change no bit of it.
TUNING = ("_LONGEST =", "_PIECE =", "_PIECE_ON_DEVICE =")
SECONDS = 120  # a mutant that runs longer hangs, and counts as killed

# One replacement for each binary operator (its inverse where there is one), both neighbors and the
# negation of each comparison: the selective set, which other replacements hardly add to.
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

# The tests responsible for each file, the cheapest first.
_BITS = [
    "parity_tests/test_golden.py",
    "tests/test_random_core.py",
    "parity_tests/test_masks.py",
]
_PACKED = [
    "parity_tests/test_golden.py",
    "tests/test_random_core.py",
    "parity_tests/test_packed.py",
]
_DROPOUT = [
    "parity_tests/test_golden.py",
    "tests/test_random_core.py",
    "parity_tests/test_corners.py",
    "tests/{package}/test_dropout.py",
]
_DECAY = ["tests/{package}/test_rules.py", "parity_tests/test_rules.py"]
_OPTIM = ["tests/regjax/test_optim.py", "tests/regjax/test_optim_decays.py"]
JUDGES = {
    "regjax/_random/threefry.py": [*_BITS, "parity_tests/test_attention.py"],
    "regjax/_random/keys.py": [*_BITS, "parity_tests/test_corners.py"],
    "regjax/_random/bernoulli.py": [*_BITS, "parity_tests/test_corners.py"],
    "regjax/_random/packed.py": _PACKED,
    "regjax/_dropout/core.py": _DROPOUT,
    "regjax/_decay/paths.py": _DECAY,
    "regjax/_decay/validation.py": [
        "tests/regjax/test_decay.py",
        *_DECAY,
        "tests/regjax/test_optim.py",
    ],
    "regjax/_decay/param_trees.py": _DECAY,
    "regjax/_decay/penalty.py": ["tests/regjax/test_penalty.py", "parity_tests/test_penalty.py"],
    "regjax/optim/_links.py": _OPTIM,
    "regjax/optim/_decays.py": _OPTIM,
    "regjax/optim/_descent.py": ["tests/regjax/test_optim_descent.py", *_OPTIM],
    "regjax/optim/_adam.py": ["tests/regjax/test_optim_adam.py", *_OPTIM],
    "regjax/optim/_rms.py": ["tests/regjax/test_optim_rms.py", *_OPTIM],
    "regjax/optim/_adafactor.py": ["tests/regjax/test_optim_adafactor.py", *_OPTIM],
    "regjax/optim/_muon.py": ["tests/regjax/test_optim_muon.py", *_OPTIM],
    "regtorch/_random/threefry.py": _BITS,
    "regtorch/_random/keys.py": [*_BITS, "parity_tests/test_corners.py"],
    "regtorch/_random/bernoulli.py": [*_BITS, "parity_tests/test_corners.py"],
    "regtorch/_random/packed.py": _PACKED,
    "regtorch/_dropout/core.py": _DROPOUT,
    "regtorch/_decay/paths.py": _DECAY,
    "regtorch/_decay/validation.py": _DECAY,
    "regtorch/_decay/param_trees.py": _DECAY,
    "regtorch/_decay/penalty.py": [
        "tests/regtorch/test_penalty.py",
        "parity_tests/test_penalty.py",
    ],
}


@dataclass(frozen=True)
class Mutant:
    """One changed file.

    Attributes:
        file: The path from the root of the repository.
        line: The number of the first line that changed.
        before: That line without its indentation.
        after: The same of the mutant.
        source: The whole mutant.
    """

    file: str
    line: int
    before: str
    after: str
    source: str


def normalized(source: str) -> str:
    """The syntax tree of a file without annotations, which do nothing at run time."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
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
    """Every mutant of a file that differs from it, and from the others, at run time."""
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
            except SyntaxError:  # cosmic-ray also takes the star of `f(*, a)` for a product
                continue
            if tree in known:
                continue
            known.add(tree)
            pairs = enumerate(itertools.zip_longest(original.split("\n"), source.split("\n")), 1)
            line, before, after = next((i, a, b) for i, (a, b) in pairs if a != b)
            if not before.startswith(TUNING):
                found.append(Mutant(file, line, before.strip(), after.strip(), source))
    return sorted(found, key=lambda mutant: mutant.line)


def import_frameworks() -> None:
    """Import what is not mutated, under the settings of the tests, and start no thread."""
    runpy.run_path(str(ROOT / "conftest.py"))
    for name in ("chex", "jax", "optax", "torch", "torch._dynamo", "ml_dtypes", "pytest"):
        __import__(name)
    import jax

    jax.config.update("jax_compilation_cache_dir", str(ROOT / "outputs" / "mutants"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert not loaded & {"regjax", "regtorch", "parity_tests"}


def start(mutant: Mutant | None, judges: Sequence[str]) -> int:
    """Fork a process that runs the tests against a mutant, or against the file as it is."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    if mutant is not None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        path, get_code = str(ROOT / mutant.file), SourceFileLoader.get_code

        def mutated(self: SourceFileLoader, fullname: str):
            if self.path != path:
                return get_code(self, fullname)
            return compile(mutant.source, path, "exec", dont_inherit=True)

        SourceFileLoader.get_code = mutated
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
    try:
        code = pytest.main([*options, "-m", "not slow", *judges])
    except BaseException:
        code = 1
    os._exit(int(code))


def judged(work: Sequence[Mutant], jobs: int) -> Iterator[tuple[Mutant, str]]:
    """Run the mutants, `jobs` at a time, and yield each with what became of it."""
    waiting, running = list(reversed(work)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[start(mutant, judges_of(mutant.file))] = (mutant, time.monotonic())
        for pid, (mutant, since) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[pid]
                survived = os.waitstatus_to_exitcode(status) == 0
                yield mutant, "survived" if survived else "killed"
            elif time.monotonic() - since > SECONDS:
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)


def judges_of(file: str) -> list[str]:
    """The tests of a file that exist."""
    paths = (path.format(package=file.partition("/")[0]) for path in JUDGES[file])
    return [path for path in paths if (ROOT / path).exists()]


def main() -> int:
    """Run the mutants and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", default=list(JUDGES), metavar="FILE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--every", type=int, default=1, help="run only each Nth mutant")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import_frameworks()
    entries = tomllib.loads(EXPLAINED.read_text()).get("survivor", []) if EXPLAINED.exists() else []
    explained = {(entry["file"], entry["before"], entry["after"]) for entry in entries}
    failures = 0
    for file in options.files:
        _, status = os.waitpid(start(None, judges_of(file)), 0)
        if status:
            print(f"{file}: its tests fail without any mutant")
            return 2
        work = mutants(file)[:: options.every]
        begin, survivors = time.monotonic(), []
        for mutant, outcome in judged(work, options.jobs):
            if outcome == "survived":
                survivors.append(mutant)
                is_known = (file, mutant.before, mutant.after) in explained
                print(f"  {'explained' if is_known else 'SURVIVED'} {file}:{mutant.line}")
                print(f"    - {mutant.before}\n    + {mutant.after}", flush=True)
                failures += not is_known
        score = 1 - len(survivors) / max(1, len(work))
        failures += score < REQUIRED
        spent = time.monotonic() - begin
        print(f"{file}: {score:.1%} of {len(work)} killed, {spent:.0f} s", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
