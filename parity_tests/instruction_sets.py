"""Check every promise of equal bits under every instruction set.

PyTorch, XLA and oneDNN each choose their kernels by the features of the CPU, and each can be
limited to fewer. This program checks the table of `parity_tests.promises` in one process for each
combination, and writes a page about it. A setting that the CPU does not support is skipped.

    python -m parity_tests.instruction_sets --jobs 2            # nine combinations; half an hour
    python -m parity_tests.instruction_sets --core              # only the cheap promises; minutes
    python -m parity_tests.instruction_sets --out sets.md       # write the page, too

Exit code: 0 if every promise holds, otherwise 1.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import torch
from rich.console import Console
from rich.progress import Progress

from parity_tests.output import Parser, integer, run, write_atomically
from parity_tests.promises import PROMISES

LEVELS = ("default", "avx2", "avx512")  # as PyTorch calls them
XLA = {"default": "SSE4_2", "avx2": "AVX2", "avx512": "AVX512"}
ONEDNN = {"default": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "XLA_FLAGS")


@dataclasses.dataclass(frozen=True)
class Setting:
    """The CPU features available to each framework, one of `LEVELS`, and a number of threads."""

    torch: str
    xla: str
    onednn: str
    threads: int

    def __str__(self) -> str:
        names = self.torch, XLA[self.xla], ONEDNN[self.onednn]
        return f"{' / '.join(names)} / {self.threads}"

    @property
    def has_equal_fma(self) -> bool:
        """Return whether both frameworks have fused multiply-adds, or neither."""
        return (self.torch == "default") == (self.xla == "default")

    def environment(self) -> dict[str, str]:
        """Return the environment of a process under this setting."""
        return os.environ | {
            "ATEN_CPU_CAPABILITY": self.torch,
            "ONEDNN_MAX_CPU_ISA": ONEDNN[self.onednn],
            "XLA_FLAGS": f"--xla_cpu_max_isa={XLA[self.xla]}",
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(self.threads),
        }

    def missing(self, host: str) -> str:
        """Return why the CPU cannot run this setting, or an empty string if it can."""
        needed = max((self.torch, self.xla, self.onednn), key=LEVELS.index)
        return f"needs {needed}" if LEVELS.index(needed) > LEVELS.index(host) else ""


def _covering() -> Iterator[Setting]:
    """Yield every pair of levels of two frameworks at least once, with 1 and 2 threads."""
    for number, (torch_level, xla_level) in enumerate(itertools.product(LEVELS, LEVELS)):
        onednn_level = LEVELS[(LEVELS.index(torch_level) + LEVELS.index(xla_level)) % 3]
        yield Setting(torch_level, xla_level, onednn_level, 1 + number % 2)


COVERING = tuple(_covering())
EVERY = tuple(
    Setting(torch_level, xla_level, onednn_level, threads)
    for torch_level, xla_level, onednn_level, threads in itertools.product(
        LEVELS, LEVELS, LEVELS, (1, 2)
    )
)
CORE = (Setting("default", "default", "default", 1), Setting("avx2", "avx2", "avx2", 2))


def host_level() -> str:
    """Return the highest of `LEVELS` that this CPU has, whatever the environment limits it to."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    run = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    )
    found = run.stdout.strip().lower()
    return found if found in LEVELS else "default"


def check(setting: Setting, *, is_core: bool = False) -> dict[str, list[str] | None]:
    """Check the promises in a process of its own.

    Args:
        setting: The CPU features available to the process.
        is_core: Whether to check only the cheap promises.

    Returns:
        For each promise the differences, one line for each pair of arrays: none if it is kept, and
        None if its package is not installed, or if it needs float16, which XLA does not compile
        here.

    Raises:
        RuntimeError: The process failed, or PyTorch or XLA used another instruction set.
    """
    # XLA uses as many threads as the process may use CPUs.
    code = (
        "import os; cpus = sorted(getattr(os, 'sched_getaffinity', lambda _: ())(0));"
        f"cpus and os.sched_setaffinity(0, cpus[: {setting.threads}]);"
        "from parity_tests import instructions, promises;"
        f"instructions.require({{'torch': {setting.torch!r}, 'xla': {setting.xla!r}}});"
        "promises.main()"
    )
    command = [sys.executable, "-c", code, *(["--core"] if is_core else [])]
    run = subprocess.run(command, env=setting.environment(), capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{setting}: the process failed with {run.returncode}.\n{run.stderr}")
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {row["name"]: row["broken"] for row in rows}


def broken(setting: Setting, found: Mapping[str, list[str] | None]) -> list[str]:
    """Return the promises that are broken in a setting in which they are made."""
    made = {
        p.name
        for p in PROMISES
        if (setting.has_equal_fma or not p.needs_fma)
        and (setting.torch != "default" or not p.needs_avx2)
    }
    return [
        f"{setting}: {name}: {line}"
        for name, lines in found.items()
        if name in made
        for line in lines or ()
    ]


def page(results: Mapping[Setting, dict[str, list[str] | None] | str]) -> str:
    """Return the Markdown page of a matrix: results, or why a setting was skipped."""
    versions = (
        f"jax {jax.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    settings = list(results)
    lines = [
        "# Equal bits under every instruction set",
        "",
        "Written by `python -m parity_tests.instruction_sets --out PAGE`. Each column is a process",
        "under one setting:",
        "`ATEN_CPU_CAPABILITY` / `--xla_cpu_max_isa` / `ONEDNN_MAX_CPU_ISA` / threads.",
        "",
        f"{processor()}; {versions}; {datetime.date.today().isoformat()}.",
        "",
        *(f"- **{number}**: {setting}" for number, setting in enumerate(settings, 1)),
        "",
        "`=`: all bits are equal. `(n)`: n arrays differ, which no promise covers. `n !`: n arrays",
        "differ, which breaks a promise. `-`: skipped, since the CPU, a package or float16 is",
        "missing.",
        "",
        "| promise | documented in | "
        + " | ".join(str(n) for n, _ in enumerate(settings, 1))
        + " |",
        "| --- | --- |" + " :---: |" * len(settings),
    ]
    for promise in PROMISES:
        cells = [_cell(promise.name, setting, results[setting]) for setting in settings]
        lines.append(f"| {promise.name} | {promise.place} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_NOTES, ""])


_NOTES = (
    "SGD and Rprop are bitwise identical to `torch.optim` where both frameworks fuse products with",
    "sums or neither does. If only one of PyTorch and XLA is limited to `default`, they agree to",
    "rounding. XLA does not compile float16 under SSE4_2; its promises are skipped there. Normal",
    "numbers of PyTorch's stream, and uniform ones with bounds other than 0 and 1, are bitwise",
    "identical where PyTorch uses AVX2 or AVX-512.",
)


def _cell(name: str, setting: Setting, found: dict[str, list[str] | None] | str) -> str:
    if isinstance(found, str) or (lines := found.get(name)) is None:
        return "-"
    if not lines:
        return "="
    return f"{len(lines)} !" if broken(setting, {name: lines}) else f"({len(lines)})"


def processor() -> str:
    """Return the model of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    """Check the matrix, print each setting as it ends, and write the page."""
    parser = Parser("python -m parity_tests.instruction_sets", __doc__)
    text = f"all {len(EVERY)} combinations, instead of {len(COVERING)} with every pair of levels"
    parser.add_argument("--every", action="store_true", help=text)
    parser.add_argument("--core", action="store_true", help="only the cheap promises")
    parser.add_argument(
        "--jobs",
        type=integer(1),
        default=1,
        metavar="N",
        help="number of concurrent processes (default: %(default)s)",
    )
    parser.add_out_file("Markdown page")
    options = parser.parse_args(argv)
    settings, host = EVERY if options.every else COVERING, host_level()
    results: dict[Setting, dict[str, list[str] | None] | str] = {}
    failures = []
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(settings)} settings; this CPU has {host}")
    with (
        Progress(console=console, transient=True) as progress,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        task = progress.add_task("checking", total=len(settings))
        futures = {
            setting: setting.missing(host) or pool.submit(check, setting, is_core=options.core)
            for setting in settings
        }
        for setting, future in futures.items():
            results[setting] = found = future if isinstance(future, str) else future.result()
            lines = [f"skipped: {found}"] if isinstance(found, str) else broken(setting, found)
            failures += [] if isinstance(found, str) else lines
            line = f"{len(results):3d}  {setting}: {'; '.join(lines) or 'all hold'}"
            console.print(line, markup=False)
            progress.advance(task)
            if options.out:
                write_atomically(options.out, page(results))
    return bool(failures)


if __name__ == "__main__":
    run(main)
