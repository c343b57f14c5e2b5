"""Links of the site: code that is a name, and nothing else, leads to a page that documents it."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the documentation's folder."""
    for folder in (DOCS, DOCS / "_extensions"):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module


@pytest.fixture
def names(load):
    return load("names")


@pytest.fixture
def inventories(load):
    return load("inventories")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("regjax.dropout", "regjax.dropout"),
        ("regjax.dropout(x, 0.5, key=key)", "regjax.dropout"),
        ("regjax.optim.adam(…)", "regjax.optim.adam"),
        ("torch.nn.Dropout(0.5)(t)", "torch.nn.Dropout"),
        ("depth_rates(rate, depth + 1)[1:]", "depth_rates"),
        ("jnp.abs", "jax.numpy.abs"),
        ("nnx.view(model, rate=rate)", "flax.nnx.view"),
        ("dropout", "dropout"),
        ("key(0)", "key"),
        ("key", None),  # an argument
        ("bits", None),
        ("sites", None),
        ("key=key", None),
        ("(bits >> 9) < T", None),
        ("1 - rate", None),
        ("regjax.l2_penalty(p, c) + loss", None),
        ("jax.random.key(0) if True", None),
        ("import regjax", None),
        ("deterministic=True", None),
        ("mask * x", None),
        ("None", None),
    ],
)
def test_code_is_a_link_if_it_is_a_name_and_no_argument(names, code, expected):
    assert names.target(code, names.argument_names()) == expected


def test_the_ambiguous_words_are_known(names):
    """A function that has the name of an argument needs a look at the docstrings."""
    public = [
        name for module in names.modules() for name in importlib.import_module(module).__all__
    ]
    assert set(public) & names.argument_names() == {"bits", "generator", "key", "sites"}


def documents(names) -> Iterator[tuple[str, str]]:
    """Yield the pages, without their code blocks, and the public docstrings."""
    block = re.compile(r"^ *(```+|~~~+).*?^ *\1", re.MULTILINE | re.DOTALL)
    for page in DOCS.rglob("*.md"):
        if "_build" not in page.parts:
            yield str(page), block.sub("", page.read_text())
    for module in names.modules():
        yield module, importlib.import_module(module).__doc__ or ""
        for value in names.members(module):
            if (inspect.isroutine(value) or inspect.isclass(value)) and value.__doc__:
                yield module, value.__doc__


def mentioned(names) -> dict[str, str]:
    """Return the names of other projects that the documents mention, with one that does."""
    found = {}
    for document, text in documents(names):
        for code in re.findall(r"`([^`\n]+)`", text):
            name = names.target(code)
            if name and name.startswith(tuple(f"{package}." for package in names.FOREIGN)):
                found.setdefault(name, document)
    return found


def test_every_mentioned_name_is_in_an_inventory(names, inventories):
    listed = set(inventories.UNDOCUMENTED.split())
    for project in inventories.PROJECTS.values():
        listed |= inventories.entries(project).keys()
    missing = {name: place for name, place in mentioned(names).items() if name not in listed}
    assert not missing, "Add each name to docs/inventories.py, run it, and commit what it writes."
    assert "torch.nn.Dropout" in mentioned(names)


@pytest.mark.parametrize("project", ["equinox", "jax", "optax", "python", "torch"])
def test_kept_inventories_are_those_of_the_table(inventories, project):
    assert {path.stem for path in inventories.FOLDER.glob("*.inv")} == set(inventories.PROJECTS)
    header, _, content = (inventories.FOLDER / f"{project}.inv").read_bytes().partition(b"zlib.\n")
    assert header.startswith(f"# Sphinx inventory version 2\n# Project: {project}\n".encode())
    lines = zlib.decompress(content).decode().splitlines()
    entries = inventories.entries(inventories.PROJECTS[project])
    # The kind of an object may differ in another version of its package.
    kept = {line.split()[0]: line.split()[3] for line in lines}
    assert kept == {name: page for name, (_, page) in entries.items()}
    assert all(re.fullmatch(r"\S+ py:\w+ 1 \S+ -", line) for line in lines)


def test_undocumented_names_exist(inventories):
    for name in inventories.UNDOCUMENTED.split():
        inventories.find(name)


@pytest.mark.parametrize("name", ["torch.nn.Droput", "optax.no_such", "no_such_package.name"])
def test_a_misspelled_name_is_detected(inventories, name):
    project = inventories.Project("https://example.org/", "", {"{name}.html": name})
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        inventories.entries(project)


def test_every_formula_has_mathml(names, load):
    pytest.importorskip("docutils")
    pytest.importorskip("sphinx")
    to_mathml = load("mathml").to_mathml
    formulas = [
        formula
        for _, text in documents(names)
        for pair in re.findall(r"\$\$(.+?)\$\$|\$([^$`]+?)\$", text, re.DOTALL)
        for formula in pair
        if formula
    ]
    assert len(formulas) > 100
    for formula in formulas:
        assert to_mathml(formula, block=True).startswith("<math")
    with pytest.raises(Exception, match="formula must be in docutils' LaTeX"):
        to_mathml(r"\Big(x\Big)", block=True)


@pytest.mark.slow
def test_the_built_reference_has_the_links(tmp_path):
    pytest.importorskip("myst_nb")
    options = ["-W", "--keep-going", "-q", "-D", "nb_execution_mode=off", "-d", tmp_path / "trees"]
    command = [sys.executable, "-m", "sphinx", *options, DOCS, tmp_path / "html"]
    built = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent, check=False)
    assert built.returncode == 0, built.stderr
    pages = {path.stem: path.read_text() for path in (tmp_path / "html" / "api").glob("reg*.html")}
    code = r'<code class="docutils literal notranslate"><span class="pre">'
    for page, href, text in (
        ("regjax.optim", "docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html", "torch"),
        ("regjax.optim", "optax.readthedocs.io/en/latest/api/generated/optax.adamw.html", "optax"),
        ("regjax", "docs.jax.dev/en/latest/_autosummary/jax.random.normal.html", "jax"),
        ("regtorch", "#regtorch.fold_in", "fold_in"),
    ):
        assert re.search(rf'href="(https://)?{re.escape(href)}"[^>]*>{code}{text}', pages[page])
    for argument in ("key", "bits"):
        assert f"{code}{argument}</span></code>" in pages["regtorch"]
        assert not re.search(
            rf'href="#regtorch.{argument}"[^>]*>{code}{argument}</span>', pages["regtorch"]
        )
    assert pages["regjax.optim"].count("<math ") > 50
    for path in (tmp_path / "html").rglob("*.html"):
        scripts = re.findall(
            r'<(?:script|link)[^>]+(?:src|href)="(https?://[^"]+)"', path.read_text()
        )
        assert [url for url in scripts if "regjax.github.io" not in url] == []
