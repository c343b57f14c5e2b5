"""README: its examples run, its names and links exist, and its tables are current."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

import regjax
import regtorch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
URLS = PROJECT["project"]["urls"]
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)]+)\)")  # an exclamation mark makes it an image
LAYERS = ("linen", "nnx", "equinox", "haiku")


def long_description(readme: str) -> str:
    """Return README.md as the metadata of a wheel contain it."""
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in hook["substitutions"]:
        readme = re.sub(rule["pattern"], rule["replacement"], readme)
    return readme.replace("$HFPR_VERSION", regjax.__version__)


def test_examples_run():
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


def test_a_package_index_resolves_every_link():
    """Links into the repository name an existing file, at the tag of the release."""
    files = f"{URLS['Homepage']}/blob/v{regjax.__version__}/"
    images = files.replace("//github.com", "//raw.githubusercontent.com").replace("/blob/", "/")
    links = LINK.findall(long_description(README))
    assert len(links) == len(LINK.findall(README)) > 10
    for image, link in links:
        base = images if image else files
        assert link.startswith(base)
        assert (ROOT / link.removeprefix(base)).is_file()


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](docs/b.md#c)", "[a](https://github.com/regjax/regjax/blob/v{}/docs/b.md#c)"),
        ("![a](b.png)", "![a](https://raw.githubusercontent.com/regjax/regjax/v{}/b.png)"),
        ("[a](https://b.c)", "[a](https://b.c)"),
        ("![a](https://b.c/d.png)", "![a](https://b.c/d.png)"),
        ("[a](#b)", "[a](#b)"),
    ],
)
def test_only_relative_links_change(link, expected):
    assert long_description(link) == expected.format(regjax.__version__)


@pytest.mark.parametrize("name", ["regshared", "regtorch"])
def test_all_distributions_have_the_same_urls(name):
    alone = tomllib.loads((ROOT / f"distributions/{name}/pyproject.toml").read_text())
    assert alone["project"]["urls"] == URLS
    assert all(url.startswith(URLS["Homepage"]) for url in URLS.values())


def test_continuous_integration_runs_the_test_command_of_readme():
    assert "    make test " in README
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("file", ["overfit/table.md", "benchmarks/dropout_speed.md"])
def test_tables_are_those_that_the_programs_wrote(file):
    rows = [
        line for line in (ROOT / "docs" / file).read_text().splitlines() if line.startswith("|")
    ]
    assert "\n".join(rows) in README
