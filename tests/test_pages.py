"""Pages of the site: their code runs, and what they state of tables and sources is true."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import regjax
import regtorch
from regshared import __version__
from tests import reading

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted((DOCS / "design").glob("*.md")), DOCS / "parity.md", DOCS / "faq.md"]


def blocks(text: str) -> Iterator[str]:
    """Yield the Python of a page, each block preceded by the empty lines of the page above it."""
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text.count("\n", 0, match.start(1)) + match[1]


@pytest.fixture
def as_a_reader(monkeypatch):
    """The settings of a fresh interpreter."""
    monkeypatch.chdir(DOCS)
    with reading.as_a_reader():
        yield


@pytest.mark.usefixtures("as_a_reader")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page):
    namespace = {"__name__": page.stem}
    for block in blocks(page.read_text()):
        exec(compile(block, page, "exec"), namespace)


def test_the_blocks_of_a_page_are_found():
    text = "# A\n\n```python\nx = 1\n```\n\n```text\nno\n```\n\n```python\nassert x\n```\n"
    assert list(blocks(text)) == ["\n\n\nx = 1\n", "\n" * 11 + "assert x\n"]
    assert sum(len(list(blocks(page.read_text()))) for page in PAGES) >= 12


# The bibliography.

BIBLIOGRAPHY = (DOCS / "bibliography.md").read_text()
ENTRIES = [
    " ".join(entry.split())
    for entry in re.findall(r"^- (.+(?:\n  .+)*)", BIBLIOGRAPHY, re.MULTILINE)
]


def letters(text: str) -> str:
    """Return the letters and digits of a text, so that breaks and quotes do not matter."""
    return re.sub(r"[\W_]+", "", text).lower()


def citations() -> Iterator[tuple[Path, str]]:
    """Yield the sections on sources of the docstrings and of the English lesson."""
    for package in ("regjax", "regtorch", "regshared", "parity_tests", "examples"):
        for path in (ROOT / package).rglob("*.py"):
            pattern = r"^( *)References:\n((?:\1 +.*\n|\n)+)"
            for match in re.finditer(pattern, path.read_text(), re.MULTILINE):
                yield path, match[2]
    for page in (DOCS / "lesson").glob("*.md"):
        yield page, page.read_text().partition("## Sources")[2]


def works(text: str) -> set[str]:
    """Return what identifies the cited works: addresses, numbers of preprints, and titles."""
    addresses = re.findall(r"\]\((https?://[^)\s]+)\)", text)
    preprints = [f"https://arxiv.org/abs/{n}" for n in re.findall(r"arXiv:\s*(\d{4}\.\d{5})", text)]
    titles = re.findall(r'"([^"]+)"', text)
    return {*addresses, *preprints, *map(letters, titles)}


def missing(text: str) -> set[str]:
    """Return the works that the bibliography does not have."""
    return {
        work
        for work in works(text)
        if work not in BIBLIOGRAPHY and work not in letters(BIBLIOGRAPHY)
    }


def test_the_bibliography_has_every_cited_work():
    found = [(path.name, work) for path, text in citations() for work in missing(text)]
    assert not found
    assert len(set().union(*(works(text) for _, text in citations()))) > 60


@pytest.mark.parametrize(
    "text",
    [
        'Nobody, "A title that\n        does not exist", 2020.',
        "[ICLR 2099](https://arxiv.org/abs/2999.99999)",
        "arXiv:2999.99999",
    ],
)
def test_a_missing_work_is_detected(text):
    assert missing(text)


def test_every_work_of_the_bibliography_is_cited():
    cited = "\n".join(path.read_text() for path, _ in citations())
    assert len(ENTRIES) >= 50
    for entry in ENTRIES:
        author = entry.partition(",")[0]
        year = re.search(r"\((\d{4})\)", entry)
        assert year
        assert re.search(rf"{author}[^#]{{,400}}{year[1]}", cited, re.DOTALL), entry


def test_the_bibliography_is_in_order():
    for section in BIBLIOGRAPHY.split("\n## ")[1:]:
        names = re.findall(r"^- ([^(]+\(\d{4}\))", section, re.MULTILINE)
        assert names == sorted(names, key=letters), section.partition("\n")[0]


# What the pages state of other files.


def test_the_exactness_page_counts_the_rows():
    page = (DOCS / "exactness.md").read_text()
    table = (DOCS / "exactness" / "exactness.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table
        if line.startswith("| ") and not line.startswith("| case")
    ]
    early = [[bool(re.search(r" to [\d,]+$", cell)) for cell in row] for row in rows]
    synthetic, recorded, trained, single = (sum(row[i] for row in early) for i in (2, 3, 4, 7))
    assert synthetic == 0
    assert f"{recorded} rows stop early in float64 and {single} in float32" in page
    assert f"{trained} rows stop early, of {sum(bool(row[4]) for row in rows)}" in page
    names = {row[0].split("-")[0] for row, is_early in zip(rows, early, strict=True) if is_early[3]}
    assert names <= {"rmsprop", "adagrad", "muon"}
    optimizers = (DOCS / "design" / "optimizers.md").read_text()
    assert f"{sum(map(any, early))} of {len(rows)} rows stop early" in optimizers


def test_the_page_of_existing_models_counts_them():
    page = (DOCS / "measurements" / "zoo.md").read_text()
    rows = json.loads((DOCS / "zoo" / "zoo.json").read_text())["models"]
    models = {name.partition(" (")[0] for name in rows}
    assert f"{len(rows)} configurations of {len(models)} models" in page
    ports = [row["flax"] for row in rows.values() if row["flax"]]
    assert f"transformers 4 has {len(ports)} of these models" in page
    assert all(port["filled"] == port["leaves"] for port in ports)
    counted = {
        "of them need names": sum(bool(port["names"]) for port in ports),
        "models for Flax have no leaf": sum(bool(port["left_out"]) for port in ports),
        "configurations are refused": sum(bool(row["draws"]["refused"]) for row in rows.values()),
        "configurations have names": sum(bool(row["decays"]["unknown"]) for row in rows.values()),
    }
    numbers = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    for text, count in counted.items():
        assert f"{numbers[count]} {text}" in page


def test_the_parity_report_agrees():
    report = (DOCS / "parity" / "parity.md").read_text()
    assert re.match(r"\d+ agree\. python 3", report)
    assert "differs" not in report


def test_the_citation_has_the_version_and_the_addresses():
    citation = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([\w-]+): (.+)$", citation, re.MULTILINE))
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert fields["version"] == __version__
    assert fields["repository-code"] == urls["Source"]
    assert fields["url"] == urls["Documentation"]


def test_the_site_is_built_and_published():
    workflow = (ROOT / ".github" / "workflows" / "docs.yml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    folder = re.search(r"sphinx -W .* (\S+) \$\(ARGS\)", makefile)
    assert folder
    assert "run: make docs" in workflow
    assert f"path: {folder[1]}\n" in workflow


def test_terms_of_the_glossary_are_in_order():
    terms = re.findall(r"^(\S.*)\n  \S", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert len(terms) > 30
    assert terms == sorted(terms, key=str.lower)


@pytest.mark.parametrize("page", sorted((DOCS / "design").glob("*.md")), ids=lambda page: page.stem)
def test_figures_of_the_design_notes_are_in_the_linked_tables(page):
    text = re.sub(r"```.*?```|`[^`]+`", "", page.read_text(), flags=re.DOTALL)
    tables = ""
    for linked in set(re.findall(r"\.\./measurements/(\w+)\.md", text)):
        measured = DOCS / "measurements" / f"{linked}.md"
        for included in re.findall(r"```\{include\} (\S+)", measured.read_text()):
            tables += (measured.parent / included).read_text()
    figure = re.compile(r"(?<![\d.])\d+\.\d\d(?!\d|\.\d)")
    assert set(figure.findall(text)) <= set(figure.findall(tables))


# The arguments that only one package has, as docs/api/index.md states.
ONE_FRAMEWORK = {
    "bernoulli": {"out_sharding"},
    "packed_bernoulli": {"out_sharding"},
    "normal": {"out_sharding"},
    "decay_mask": {"params", "frozen", "module"},
    "decay_rates": {"params", "frozen", "module"},
    "decay_table": {"params", "frozen", "module"},
    "dropout": {"implementation"},
    "mc_dropout": {"memory_budget", "chunk_size"},
    "dot_product_attention": {
        *("dtype", "precision", "module", "qk_attn_weights_einsum", "attn_weights_value_einsum"),
        *("implementation", "promote_dtype", "force_fp32_for_softmax", "einsum_dot_general"),
    },
}


def test_functions_of_the_same_name_have_the_same_arguments():
    functions = [name for name in regjax.__all__ if inspect.isfunction(getattr(regjax, name))]
    different = {}
    for name in set(functions) & set(regtorch.__all__):
        jax_names, torch_names = (
            inspect.signature(getattr(package, name)).parameters.keys()
            for package in (regjax, regtorch)
        )
        if jax_names != torch_names:
            different[name] = jax_names ^ torch_names
    assert different == ONE_FRAMEWORK
