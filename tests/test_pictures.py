"""Pictures: one style, no text on other text, labeled axes, and honest zeros, medians and dates."""

from __future__ import annotations

import ast
import doctest
import importlib
import itertools
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import Bbox

from benchmarks import bars, modelled, race, scale
from examples.overfit import plots as overfit
from examples.overfit.curves import Curve
from examples.overfit.recipes import recipes
from examples.overfit.settings import Settings
from examples.sharded_lm import report as sharded_lm
from examples.sharded_lm.history import History
from examples.uncertainty import plots as uncertainty
from examples.uncertainty import settings as uncertainty_settings
from examples.uncertainty.corruptions import CORRUPTIONS
from examples.uncertainty.study import Scene, Study, View
from parity_tests import compare, pictures, report
from parity_tests.comparison import QUANTITIES, Comparison
from tests import scale_record

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "examples", "parity_tests")
LIBRARIES = ("Flax Linen", "Flax NNX", "Equinox", "Haiku", "Keras", "PyTorch, compiled")
# The candidates of each race, the reference first.
RACES = {
    "dropout_speed": ("copy", "regjax", "regjax, packed", *LIBRARIES),
    "overhead": ("regjax", "regjax, packed", *LIBRARIES),
    "shared_masks": ("copy", "regjax", "regjax, packed", *LIBRARIES),
    "torch_random_speed": ("torch", "torch_random", "mask drawn again"),
    "torch_speed": ("torch F.dropout", "regtorch", "regtorch, packed"),
    "transformer_step": ("no dropout", "regjax", "regjax, packed", *LIBRARIES),
}
MODELS = {"gpu_model": ("H100:4", "time"), "tpu_model": ("v5e:16x16", "cycles")}
ENVIRONMENT = {
    **race.environment(),
    "cpu": "Example CPU 9000 with 128 cores and a long name",
    "machine": "x86_64",
    "cores": 128,
}


def result(title: str, names: tuple[str, ...], rounds: int = 5) -> race.Result:
    """A race that the reference finishes in 1 second; the others need up to 12."""
    times = {
        name: [1 + place * (1 + turn / 8) for turn in range(rounds)]
        for place, name in enumerate(names)
    }
    return race.Result(title, 1, times, "2026-01-02")


def record(name: str) -> race.Record:
    """A run of a benchmark with three results, so that one panel has no neighbor."""
    if name == "attention":
        names = ("no dropout", "regjax", "regjax, blocks of 128", "Flax Linen", "PyTorch")
        results = [result(f"4096 positions, {work}", names) for work in race.WORK.values()]
        sizes = {each: 100 * (place + 1) for place, each in enumerate(names[:-1])}
        return race.Record(
            ENVIRONMENT, results, {"temporary": dict.fromkeys((r.title for r in results), sizes)}
        )
    if name == "optimizers":
        names = ("adafactor", "asgd", "loss term")
        sides = {"asgd": ("regjax",)}
        results = [
            result(f"{each}, {what}", sides.get(each, ("optax", "regjax")))
            for each in names
            for what in ("update", "build")
        ]
        return race.Record(ENVIRONMENT, results, {"temporary": {each: {} for each in names}})
    titles = [f"bfloat16, rate 0.{digit}, forward + backward" for digit in (1, 5, 9)]
    return race.Record(ENVIRONMENT, [result(title, RACES[name]) for title in titles], {})


def model_record(kind: str) -> modelled.Record:
    places = itertools.product([((8192, 8192), None), ((8, 512, 4096), 2)], (0.5, 0.1))
    rows = [
        modelled.Row(kind, shape, axis, rate, name, 1 + 3 * place, 0, 0)
        for (shape, axis), rate in places
        for place, name in enumerate(modelled.candidates(rate))
    ]
    return modelled.Record(rows, [], ENVIRONMENT, "2026-01-02")


def draw_benchmark(name: str) -> Figure:
    given = model_record(MODELS[name][0]) if name in MODELS else record(name)
    return importlib.import_module(f"benchmarks.{name}").draw(given)


def curves(names: int = 5) -> list[Curve]:
    """Curves whose validation loss falls and rises, as in the example."""
    found = []
    for recipe, framework in itertools.product(recipes(0.003, 0.3)[:names], ("jax", "torch")):
        curve = Curve(recipe, framework)
        for step in range(0, 1001, 10):
            loss = 2.3 * np.exp(-step / 20)
            curve.record(step, train=(loss, 1), validation=(loss + 0.3 + step / 2500, 0.883))
        found.append(curve)
    return found


def study() -> Study:
    """A study of two images, of which one is classified incorrectly at high strengths."""
    made = Study(uncertainty_settings.Settings(), params=None)
    for corruption in CORRUPTIONS:
        for place, strength in enumerate(corruption.strengths):
            probs = np.full((2, 10), 0.01 * place)
            probs[:, 4 * (place > 3)] = 1 - 0.09 * place
            view = View(probs, np.zeros(2, int))
            pixels = np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 64)
            made.scenes.append(Scene(corruption, strength, pixels, view, view, view.entropy / 3))
    return made


def comparison(steps: int = 21) -> Comparison:
    deviations = {
        "mask": [0.0] * (steps - 1) + [np.inf],
        "gradient": [0.0, 1e-16] * (steps // 2) + [3e-16],
        "parameter": [1e-15] * steps,
    }
    losses = [(1 / (step + 1),) * 2 for step in range(steps)]
    return Comparison(compare.FLOAT64, deviations, losses, None)


SERIES = {
    "optimizer/sgd": [0.0] * 20,
    "optimizer/radam": [0.0, 3e-16, 0.0] + [5e-16] * 17,
    "training/convolutional": [1e-16 * 2**step for step in range(20)],
    "training/encoder: first layer": [1e-13] * 20,
    "training/perceptron": [4e-16] * 20,
}
BENCHMARKS = (*RACES, *MODELS, "attention", "optimizers")
FIGURES: dict[str, Callable[[], Figure]] = {
    **{name: lambda name=name: draw_benchmark(name) for name in BENCHMARKS},
    "overfitting": lambda: overfit.draw_overfitting(curves(1), Settings()),
    "cures": lambda: overfit.draw_cures(curves()),
    "cures, interrupted": lambda: overfit.draw_cures(curves(2)),
    "parabolas": overfit.draw_parabolas,
    "uncertainty": lambda: uncertainty.draw(study()),
    "sharded_lm": lambda: sharded_lm.draw(
        History([5 / (1 + step / 9) for step in range(90)], [(40, 3.0), (90, 2.0)])
    ),
    "parity report": lambda: report.draw(SERIES),
    "comparison": lambda: comparison().figure(),
    "scale": lambda: scale.draw(scale_record.content()),
}


def drawn_texts(figure: Figure) -> list[tuple[Text, Bbox]]:
    """Draw a figure, and return the texts that it shows, with their boxes in pixels."""
    found = {}
    draw = Text.draw

    def record(self: Text, renderer: Any, *args: Any, **kwargs: Any) -> None:
        draw(self, renderer, *args, **kwargs)
        if self.get_visible() and self.get_text().strip():
            found[self] = Text.get_window_extent(self, renderer)  # without the arrow of annotations

    with pytest.MonkeyPatch.context() as patch, pictures.style():
        patch.setattr(Text, "draw", record)
        FigureCanvasAgg(figure).draw()
    return list(found.items())


def flaws(figure: Figure) -> list[str]:
    """Return a description of each unreadable text and each axis without a label."""
    texts = drawn_texts(figure)
    found = [
        f"{one.get_text()!r} collides with {other.get_text()!r}"
        for (one, here), (other, there) in itertools.combinations(texts, 2)
        if here.overlaps(there)
    ]
    for text, box in texts:
        if not (box.min >= 0).all() or not (box.max <= figure.bbox.max).all():
            found.append(f"{text.get_text()!r} leaves the picture")
        # README and the site show a picture 800 pixels wide; text of 10 is readable.
        if text.get_fontsize() / 72 * 800 / figure.get_figwidth() < 10:
            found.append(f"{text.get_text()!r} is too small")
    titles = {axes: title for axes in figure.axes for title in _titles(axes)}
    for (axes, title), (text, box), other in itertools.product(titles.items(), texts, figure.axes):
        gap = 2 if other is axes else 0
        if text is title and box.expanded(1, 1).padded(gap).overlaps(other.bbox):
            found.append(f"the title {title.get_text()!r} touches an axis")
    return found + list(_unlabeled(figure))


def _titles(axes: Axes) -> Iterator[Text]:
    shown = (axes.title, axes._left_title, axes._right_title)
    yield from (title for title in shown if title.get_text())


def _unlabeled(figure: Figure) -> Iterator[str]:
    for axes, name in itertools.product(figure.axes, "xy"):
        common = getattr(figure, f"get_sup{name}label")()
        ticks = getattr(axes, f"{name}axis").get_major_locator()
        if isinstance(ticks, FixedLocator) or (common and not common.endswith(".")):
            continue  # names, an image, or a label of all panels, which is no sentence
        place = getattr(axes.bbox, f"{name}0")
        beside = [each for each in figure.axes if abs(getattr(each.bbox, f"{name}0") - place) < 2]
        if not any(getattr(each, f"get_{name}label")() for each in beside):
            yield f"the {name} axis of {axes.get_title(loc='left')!r} has no label"


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.sample(2)
def test_every_text_is_readable_and_every_axis_labeled(name):
    assert not flaws(FIGURES[name]())


def flawed(change: Callable[[Axes], object]) -> Figure:
    with pictures.style():
        figure = Figure(figsize=(8, 3))
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1])
        axes.set(xlabel="step", ylabel="nats")
        axes.set_title("a title")
        change(axes)
    return figure


@pytest.mark.parametrize(
    ("change", "flaw"),
    [
        (lambda axes: None, ""),
        (lambda axes: [axes.text(0.5, 0.5, text) for text in ("one", "two")], "collides"),
        (lambda axes: axes.text(0.5, 0.5, "small", fontsize=6), "too small"),
        (lambda axes: axes.text(0.9, 0.5, "long" * 9).set_in_layout(False), "leaves"),
        (lambda axes: axes.set_title("a title", pad=0), "touches"),
        (lambda axes: axes.set_ylabel(""), "the y axis of 'a title' has no label"),
        (lambda axes: axes.set_xlabel(""), "the x axis of 'a title' has no label"),
    ],
)
def test_flaws_are_found(change, flaw):
    """Test of the test."""
    found = flaws(flawed(change))
    assert any(flaw in one for one in found) if flaw else not found


def test_the_run_without_regularization_has_that_name():
    texts = [text.get_text() for text, _ in drawn_texts(FIGURES["cures"]())]
    assert sum("no regularization" in text for text in texts) == 3  # title, legend, summary
    assert not any("none" in text for text in texts)


def look(patch: Patch) -> tuple[str, bool]:
    """Return the color of a frame, and whether it is dashed."""
    return to_hex(patch.get_edgecolor()), patch._dash_pattern[1] is not None


def test_frames_and_bars_of_images_are_in_the_legend():
    digits, _ = uncertainty.draw(study()).subfigs
    (legend,) = digits.legends
    texts = [text.get_text().split(" (")[0] for text in legend.get_texts()]
    assert texts == ["correct", "incorrect", "entropy", "mutual information"]
    looks = [look(patch) for patch in legend.get_patches()[:2]]
    assert {look(axes.patches[0]) for axes in digits.axes} == set(looks)
    assert len({line for _, line in looks}) == 2  # the color is not all


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_bar_chart_has_a_line_at_one_and_names_its_origin(name):
    figure = draw_benchmark(name)
    for axes in figure.axes:
        assert [1, 1] in [list(line.get_xdata()) for line in axes.lines]
        assert axes.get_xlim()[0] == 0
    (legend,) = figure.legends
    assert sum(text.get_text().startswith("1.0: ") for text in legend.get_texts()) == 1
    caption = figure.get_supxlabel().replace("\n", " ")
    versions = ENVIRONMENT["versions"]
    expected = [f"Python {ENVIRONMENT['python']}", f"jax {versions['jax']}", "2026-01-02."]
    if name in MODELS:
        expected += ["Estimates by the cost model", "Nothing was timed."]
        assert all(axes.get_xlabel().startswith("estimated ") for axes in figure.axes)
    else:
        expected += [ENVIRONMENT["cpu"], "128 cores", "medians over 5 rounds; whiskers: quartiles"]
    assert [text for text in expected if text not in caption] == []


def test_whiskers_are_quartiles_and_absent_without_a_spread():
    spreads = {"regjax": race.Spread(2, 3, 5), "Flax": race.Spread(4, 4, 4)}
    figure = bars.draw(
        [bars.race_panel("title", {name: spread}, ["regjax"]) for name, spread in spreads.items()],
        unit="time",
        reference="copy",
        caption=[],
    )
    ends = [
        [path.vertices[:, 0].tolist() for lines in axes.collections for path in lines.get_paths()]
        for axes in figure.axes
    ]
    assert ends == [[[2, 5]], []]


@pytest.mark.parametrize("module", [bars, race], ids=lambda module: module.__name__)
def test_examples_of_the_benchmarks(module):
    assert doctest.testmod(module).failed == 0


def test_environment_and_date_are_recorded(tmp_path):
    file = tmp_path / "race.json"
    found = race.race("title", {"one": lambda: None}, elements=1, rounds=2)
    race.save(file, [found], other=1)
    again = race.load(file)
    assert again == race.Record(race.environment(), [found], {"other": 1})
    assert again.environment.keys() >= {"cpu", "cores", "machine", "python", "versions"}
    assert found.date == race.today()


def test_what_was_not_recorded_is_not_invented():
    old = {"python": "3.11.7", "machine": "x86_64", "cores": 2, "versions": {"jax": "0.10.2"}}
    dated = race.Result("title", 1, {"copy": [1.0]}, "2026-01-02")
    undated = race.Result("title", 1, {"copy": [1.0]})
    assert bars.origin(race.Record(old, [dated, undated], {}))[-1] == "The date was not recorded."
    assert bars.versions({}) == "The versions were not recorded."


@pytest.mark.parametrize("name", BENCHMARKS)
def test_redraw_needs_the_json_of_a_run(capsys, tmp_path, name):
    program = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit):
        program.main(["--redraw", "--out", str(tmp_path)])
    message = f"argument --redraw: --out must contain {name}.json; got '{tmp_path}'."
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torch_speed", "gpu_model"])
def test_redraw_writes_the_picture_alone(tmp_path, name):
    program = importlib.import_module(f"benchmarks.{name}")
    if name in MODELS:
        content = {"programs": [vars(row) for row in model_record("H100:4").programs], "steps": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    else:
        race.save(tmp_path / f"{name}.json", record(name).results)
    assert program.main(["--redraw", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json", f"{name}.png"}


def lines_below(figure: Figure) -> list[np.ndarray]:
    """Return the heights of the plotted lines of all axes that are logarithmic."""
    axes = [a for a in figure.axes if a.get_yscale() == "log"]
    return [np.asarray(line.get_ydata(), float) for a in axes for line in a.lines]


@pytest.mark.parametrize(
    ("draw", "values", "notes"),
    [
        (
            lambda: report.draw(SERIES),
            list(SERIES.values()),
            ["0 at every step", "0 at 2 of 20 steps"],
        ),
        (
            lambda: comparison().figure(),
            [*comparison().deviations.values(), [1e-12] * 2],
            ["0 at 20 of 21 steps", "infinite at 1 of 21 steps", "0 at 10 of 21 steps"],
        ),
    ],
    ids=["parity report", "comparison"],
)
def test_zeros_are_gaps_with_a_note(draw, values, notes):
    figure = draw()
    for line, expected in zip(lines_below(figure), values, strict=True):
        zeros = np.equal(expected, 0)
        assert np.isnan(line[zeros]).all()
        np.testing.assert_array_equal(line[~zeros], np.asarray(expected)[~zeros])
    shown = " ".join(text.get_text() for text, _ in drawn_texts(figure))
    assert [note for note in notes if note not in shown] == []


def test_no_two_lines_of_a_comparison_look_alike():
    deviations = {quantity: [1e-9] for quantity in QUANTITIES} | {"mask": [0.0]}
    bounds = {"loss": 1e-5, "update": 1e-3}
    found = Comparison(compare.FLOAT64, deviations, [(1.0, 1.0)], None, bounds=bounds)
    lines = found.figure().axes[1].lines
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(looks) == len(set(looks)) == len(QUANTITIES) + 2


def test_the_lesson_has_the_same_style():
    assert (ROOT / "docs/lesson/lesson.mplstyle").read_text() == pictures.STYLE.read_text()


def test_the_wheel_contains_the_style():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    file = pictures.STYLE.relative_to(ROOT)
    assert file.parts[0] in wheel["packages"]
    assert not any(file.match(pattern) for pattern in wheel["exclude"])


FOREIGN = {"pyplot", "rcParams", "rc_context", "savefig", "style_use"}


def own_styling(source: str) -> list[str]:
    """Return the colors, settings and unstyled figures of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            color = node.value.removeprefix("#")
            if node.value in ("white", "black") or (
                node.value.startswith("#")
                and len(color) in (3, 6)
                and set(color) <= set("0123456789abcdefABCDEF")
            ):
                found.append(node.value)
        elif isinstance(node, ast.Attribute) and node.attr in FOREIGN:
            found.append(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and "pyplot" in ast.unparse(node):
            found.append("pyplot")
        elif isinstance(node, ast.FunctionDef):
            calls = [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
            if "Figure" in calls and "pictures.styled" not in map(ast.unparse, node.decorator_list):
                found.append(node.name)
    return found


def test_every_picture_has_the_style():
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]
    files.remove(ROOT / "parity_tests" / "pictures.py")
    drawing = [file for file in files if "Figure(" in file.read_text()]
    assert len(drawing) >= 5
    assert {str(f): own_styling(f.read_text()) for f in files if own_styling(f.read_text())} == {}


@pytest.mark.parametrize(
    "source",
    [
        "color = '#999999'",
        "ax.plot(mfc='white')",
        "mpl.rcParams['font.size'] = 9",
        "from matplotlib import pyplot",
        "import matplotlib.pyplot as plt",
        "figure.savefig(path)",
        "def draw():\n    return Figure()",
    ],
)
def test_styling_elsewhere_is_found(source):
    """Test of the test."""
    assert own_styling(source)


def test_the_style_ignores_the_settings_of_the_user():
    import matplotlib as mpl

    with mpl.rc_context({"axes.titlesize": 40, "axes.facecolor": "black"}), pictures.style():
        assert mpl.rcParams["axes.titlesize"] == 11.5
        assert mpl.rcParams["axes.facecolor"] == pictures.palette().paper


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_published_figures_are_readable(name):
    program = importlib.import_module(f"benchmarks.{name}")
    load = modelled.load if name in MODELS else race.load
    assert not flaws(program.draw(load(ROOT / "docs" / "benchmarks" / f"{name}.json")))
