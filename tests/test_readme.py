"""What README shows runs, and what it names exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import regjax
import regtorch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LAYERS = ("linen", "nnx", "equinox", "haiku")


def test_the_examples_run_as_they_stand():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def names(module: str) -> list[str]:
    return sorted(set(re.findall(rf"\b{module}\.([a-z][\w.]*\w)", README)))


@pytest.mark.parametrize(
    ("library", "name"), [(lib, name) for lib in (regjax, regtorch) for name in names(lib.__name__)]
)
def test_every_public_name_exists(library, name):
    layers, _, rest = name.partition(".")
    if layers in LAYERS:  # which `import regjax` does not load
        target, name = importlib.import_module(f"{library.__name__}.{layers}"), rest
    else:
        target = library
    for part in filter(None, name.split(".")):
        target = getattr(target, part)


@pytest.mark.parametrize("link", re.findall(r"\]\(([\w./-]+)\)", README))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()


def test_continuous_integration_runs_the_test_command_of_readme():
    assert "    make test " in README
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("file", ["overfit/table.md", "benchmarks/dropout_speed.md"])
def test_the_tables_are_those_that_the_programs_wrote(file):
    rows = [
        line for line in (ROOT / "docs" / file).read_text().splitlines() if line.startswith("|")
    ]
    assert "\n".join(rows) in README
