"""README and the pages that it refers to: examples run, names and links exist, figures are true.

The numbers come from the files that the measuring programs wrote.
"""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from pathlib import Path

import jax
import pytest

import regjax
import regtorch
from benchmarks.summary import TABLES, rows, span

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# The pages that have the contents of README in full.
NAMES = ("features", "promises", "traps", "comparison", "speed")
PAGES = {"README": README, **{n: (ROOT / "docs" / f"{n}.md").read_text() for n in NAMES}}
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


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


def test_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert [any(name in block for block in blocks("README")) for name in LAYERS[:3]] == [True] * 3
    assert any("regtorch.nn.Dropout" in block for block in blocks("README"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_examples_run(page):
    namespace = {}
    with jax.numpy_rank_promotion("allow"):  # as for a reader; Linen adds a bias of one dimension
        for block in blocks(page):
            exec(compile(block, page, "exec"), namespace)


def names(module: str) -> list[str]:
    found = re.findall(rf"\b{module}\.([a-z][\w.]*\w)", "\n".join(PAGES.values()))
    return sorted(set(found) - {"html"})


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
    owner, name = URLS["Homepage"].removeprefix("https://github.com/").split("/")
    pages = {"Documentation": f"https://{owner}.github.io/{name}/"}
    assert pages.items() <= URLS.items()
    assert all(URLS[title].startswith(URLS["Homepage"]) for title in URLS.keys() - pages)


def test_continuous_integration_runs_the_test_command_of_readme():
    assert "    make test " in README
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", NAMES)
def test_links_of_pages_exist(page):
    for _, link in LINK.findall(PAGES[page]):
        target, _, anchor = link.partition("#")
        text = (ROOT / "docs" / target).read_bytes()
        headings = re.findall(r"^#+ (.*)", text.decode(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs or not anchor


@pytest.mark.parametrize(
    ("page", "file"),
    [("README", "summary"), ("README", "comparison")],
)
def test_tables_are_those_that_the_programs_wrote(page, file):
    text = (ROOT / "docs" / "benchmarks" / f"{file}.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "\n".join(lines) in PAGES[page]


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_several_benchmarks_are_current(name):
    assert (ROOT / "docs" / "benchmarks" / f"{name}.md").read_text() == TABLES[name]()


FORWARD, BACKWARD = ".*, forward", r".*, forward \+ backward"
LONG = "(1,024|2,048|4,096) positions, forward"
STEP = r"rate 0.., 4 layers"


def milliseconds(library: str) -> str:
    """Return the range of what dropout adds to a training step."""
    costs = sorted(float(row[2]) for row in rows("transformer_step", STEP) if row[0] == library)
    return f"{costs[0]:.1f} to {costs[-1]:.1f}"


def temporary(column: int) -> str:
    """Return the megabytes of attention with 4,096 positions and gradients."""
    return rows("attention", r"4,096 positions, forward \+ backward")[1][column]


def over_no_dropout(pattern: str, column: int) -> str:
    """Return the range of the times of attention, the first rows of each title."""
    found = sorted(float(row[column]) for row in rows("attention", pattern) if "ms" in row[0])
    return f"{found[0]:.2f} to {found[-1]:.2f}"


def overall(name: str, columns: tuple[int, ...], pattern: str) -> str:
    """Return the range of several columns."""
    found = [float(row[column]) for row in rows(name, pattern) for column in columns]
    return f"{min(found):.2f} to {max(found):.2f}"


def holds(page_words: str) -> str:
    """Return the figures of a sentence about the optimizers from the table of exactness."""
    text = (ROOT / "docs" / "exactness" / "exactness.md").read_text()
    cases = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    wide = [case for case in cases if case[2].strip()]
    early = [case for case in wide if any(" to " in cell for cell in case[3:6])]
    steps = [
        int(number.replace(",", ""))
        for case in early
        for number in re.findall(r" to ([\d,]+)", "|".join(case[3:6]))
    ]
    narrow = [case for case in cases if any(" to " in cell for cell in case[7:])]
    tight = [case for case in wide if case[2].strip() == "1e-12"]
    return page_words.format(
        cases=len(wide),
        fused=len(cases) - len(wide),
        rows=len(cases),
        early=len(early),
        low=min(steps),
        high=max(steps),
        tight=len(tight),
        narrow=len(narrow),
    )


BOTH = r"forward \+ backward"


def on_tpu(chip: str, passes: str, column: int) -> str:
    """Return the estimate for an array of (8192, 8192) at rate 0.5."""
    return span("tpu_model", rf"{chip}:2x2\S*, \(8192, 8192\) on each chip, {passes} . 0.5", column)


def bundles(masks: str) -> str:
    """Return the range of the instructions of the kernels on v5e over those without dropout."""
    (row,) = rows("attention_kernel", rf"v5e:2x2 . {masks}")
    ratios = sorted(re.findall(r"\((.*?)\)", " ".join(row)))
    return f"{ratios[0]} to {ratios[-1]} times"


# The sentences of pages with figures, as functions of the files. Line ends count as spaces.
FIGURES = {
    "features": [
        lambda: holds("in {cases} cases, of which {fused} are compared with PyTorch's fused"),
        lambda: holds("of {rows} rows"),
        lambda: holds("at most 1e-12 in {tight} cases"),
        lambda: holds(
            "In {early} of the {rows} rows it holds for fewer steps, between {low} and {high}"
        ),
        lambda: holds("in {narrow} rows that holds for fewer"),
        lambda: f"{float(temporary(1).replace(',', '')):,.0f} MB against",
        lambda: f"against {float(temporary(0).replace(',', '')):,.0f} MB",
        lambda: f"{float(temporary(3)):.0f} MB.",
        lambda: f"the compiler schedules {bundles('packed, rate 0.5')} the instructions",
        lambda: f"and {bundles('packed, rate 0.1, 16 bits')} at rate 0.1 with 16 bits",
    ],
    "speed": [
        lambda: f"share costs {span('shared_masks', 'all .*', 0)} copies",
        lambda: f"Flax's cost {overall('shared_masks', (2, 3), 'all .*')}.",
        lambda: f"takes {milliseconds('regjax')} ms",
        lambda: f"dropout takes {milliseconds('Flax Linen')} ms",
        lambda: (
            f"in {1 / float(rows('overhead', 'trace.*')[0][1]) - 0.005:.2f} of the time of Flax"
        ),
        lambda: f"Equinox takes {rows('overhead', 'trace.*')[0][3]} of the time",
        lambda: f"takes {span('torch_speed', FORWARD, 0)} times the time",
        lambda: f"and {span('torch_speed', BACKWARD, 0)} times with gradients",
        lambda: f"take {span('torch_speed', FORWARD, 1)} times forward",
        lambda: f"and {span('torch_speed', BACKWARD, 1)} times with gradients.",
        lambda: f"blocks of 128 with dropout take {over_no_dropout(LONG + '.*', 3)} of the time",
        lambda: f"with packed masks, {over_no_dropout(LONG + '.*', 6)}.",
        lambda: f"takes {over_no_dropout(LONG, 1)} forward",
        lambda: f"and {over_no_dropout(LONG + r' . backward', 1)} with gradients",
        lambda: f"with dropout takes {over_no_dropout(LONG + '.*', 7)}",
        lambda: f"PyTorch's {over_no_dropout(LONG + '.*', 8)}",
        lambda: f"blocks of 128 use {temporary(3)} MB",
        lambda: f"without dropout {temporary(0)} MB, the whole matrix {temporary(1)} MB",
        lambda: f"Flax's attention {temporary(7)} MB",
        lambda: f"needs {span('gpu_model', 'H100.*, forward . 0.5', 1)} copies on an H100",
        lambda: f"where Flax needs {span('gpu_model', 'H100.*, forward . 0.5', 3)}",
        lambda: f"estimated at {on_tpu('v5e', 'forward', 2)} copies on a v5e",
        lambda: f"copies on a v5e and {on_tpu('v6e', 'forward', 2)} on a v6e",
        lambda: f"exact ones need {on_tpu('v5e', 'forward', 1)} and {on_tpu('v6e', 'forward', 1)}.",
        lambda: f"needs {on_tpu('v5e', BOTH, 3)} copies of a v5e",
        lambda: f"{on_tpu('v6e', BOTH, 3)} of a v6e and {on_tpu('tpu7x', BOTH, 3)} of a tpu7x",
        lambda: f"the exact sampler {', '.join(on_tpu(c, BOTH, 1) for c in ('v5e', 'v6e'))} and",
    ],
}


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        pytest.param(page, sentence, id=f"{page}-{number}")
        for page, sentences in FIGURES.items()
        for number, sentence in enumerate(sentences)
    ],
)
def test_figures_are_those_of_the_files(page, sentence):
    assert sentence() in " ".join(PAGES[page].split())


def test_versions_are_those_of_the_runs():
    benchmarks = ROOT / "docs" / "benchmarks"
    speed = json.loads((benchmarks / "dropout_speed.json").read_text())["environment"]["versions"]
    columns = json.loads((benchmarks / "comparison.json").read_text())["columns"]
    measurements = (ROOT / "docs" / "measurements.md").read_text()
    for name, package in {"JAX": "jax", "PyTorch": "torch"}.items():
        words = f"{name} {speed[package].partition('+')[0]}"
        for text in (README, PAGES["speed"], measurements):
            assert words in " ".join(text.split())
    for library, column in columns.items():
        if library != "regjax":
            words = f"{library} {column['version']}"
            assert words in " ".join(PAGES["comparison"].split())
            assert column["date"] in PAGES["comparison"]
            assert f"JAX {column['jax']}" in PAGES["comparison"]


def test_regjax_is_at_least_as_fast_on_small_arrays():
    ratios = [float(cell) for row in rows("overhead", "(eager|jitted).*") for cell in row[1:]]
    assert min(ratios) >= 1.0
