"""Certificates of a recorded run and of copies of it with planted differences.

The port takes the steps of the script, as if JAX had no rounding errors.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from parity_tests import seeded
from parity_tests.certify import writing
from parity_tests.certify.certificate import Certificate, First, Row
from parity_tests.certify.comparison import certify
from parity_tests.certify.port import Names, PortStep
from parity_tests.certify.script import run_script
from regjax.interop import Leaf

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(3)
model = nn.Sequential(
    *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)),
    *(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.arange(40.0).reshape(10, 4) / 40, torch.arange(10) % 2)
for epoch in range(2):
    for x, y in DataLoader(data, 4, shuffle=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
"""
PATHS = Path("script.py"), Path("port.py")
ROWS = (
    *("steps", "seed", "initial weights", "batch order", "masks", "generator"),
    *("losses", "buffers", "updates", "parameters"),
)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    with torch.random.fork_rng(devices=[]):
        return run_script(path, steps=20)


@pytest.fixture
def port(script):
    """The steps of a perfect port, with a beginning, as a list that tests change."""
    names = [name for name in script.steps[0].buffers if not name.endswith("tracked")]
    first = {**script.initial, **{name: script.steps[0].buffers[name] for name in names}}
    state = seeded.state_of_seed(script.seed)
    steps = [PortStep(first, state, None, None, [])]
    for step in script.steps:
        params = {**step.params, **{name: step.buffers[name] for name in names}}
        batch = np.concatenate(step.batches)
        steps.append(PortStep(params, step.state, step.losses, batch, step.masks))
    return steps


def names_of(script) -> Names:
    params, buffers = list(script.initial), [n for n in script.steps[0].buffers if "run" in n]
    return Names({name: Leaf(name) for name in [*params, *buffers]}, params, buffers)


def certified(script, port, **options) -> Certificate:
    names = names_of(script)
    return certify(PATHS, script, [(names, step) for step in port], **options)


def change(port, place, **values):
    """Replace fields of one step of a port, or of all, if the place is a slice."""
    for number in range(len(port))[place] if isinstance(place, slice) else [place]:
        new = {k: value(getattr(port[number], k)) for k, value in values.items()}
        port[number] = dataclasses.replace(port[number], **new)


def results(certificate) -> dict[str, str]:
    return {row.name: row.result for row in certificate.rows if row.result != "agrees"}


def row_of(certificate, name) -> Row:
    return next(row for row in certificate.rows if row.name == name)


def test_equal_runs_agree_in_every_row(script, port):
    found = certified(script, port)
    assert found.result == "agrees"
    assert tuple(row.name for row in found.rows) == ROWS
    assert all(row.compared and not row.differing and not row.unequal for row in found.rows)
    counts = {row.name: row.compared for row in found.rows}
    parameters = sum(array.size for array in script.initial.values())
    assert counts == {
        "steps": 6,
        "seed": 7,
        "initial weights": parameters,
        "batch order": 20,
        "masks": 20 * 12,
        "generator": 6,
        "losses": 6,
        "buffers": 6 * 12,
        "updates": 6 * 8,
        "parameters": 6 * parameters,
    }
    assert found.conclusion == (
        "Certified: JAX trains as the PyTorch script does in 6 steps from the seed 3."
    )
    assert found.first is None


def scaled(name, factor):
    return lambda arrays: {**arrays, name: (arrays[name] * factor).astype("float32")}


def with_mask(number, **values):
    def changed(masks):
        new = [*masks]
        new[number] = dataclasses.replace(
            new[number], **{k: value(getattr(new[number], k)) for k, value in values.items()}
        )
        return new

    return changed


def moved(name, by):
    return lambda arrays: {**arrays, name: arrays[name] + np.float32(by)}


# By name: the changes, and the first difference: its step, row, place and words.
PLANTED = {
    "another seed": (
        lambda port: change(port, slice(None), state=lambda _: seeded.state_of_seed(4)),
        (0, "seed", "", "JAX's generator has the seed 4 and PyTorch's 3"),
    ),
    "a factor of the initial weights": (
        lambda port: change(port, 0, params=scaled("3.weight", 1.5)),
        (0, "initial weights", "3.weight", "1 of 8 arrays differ; JAX has 1.5 times the value"),
    ),
    "several units of rounding of initial weights": (
        lambda port: change(port, 0, params=moved("3.weight", 3e-7)),
        (0, "initial weights", "3.weight", "1 of 8 arrays differ"),
    ),
    "transposed initial weights": (
        lambda port: change(port, 0, params=lambda a: {**a, "3.weight": a["3.weight"].T.copy()}),
        (0, "initial weights", "3.weight", "the same numbers in another order"),
    ),
    "initial weights of another layer": (
        lambda port: change(port, 0, params=lambda a: {**a, "0.bias": a["3.bias"]}),
        (0, "initial weights", "0.bias", "JAX has the numbers of PyTorch's '3.bias'"),
    ),
    "initial weights of another distribution": (
        lambda port: change(port, 0, params=lambda a: {**a, "0.bias": np.cos(a["0.bias"])}),
        (0, "initial weights", "0.bias", "PyTorch draws uniform_ of shape [6, 4], uniform_"),
    ),
    "initial weights of another dtype": (
        lambda port: change(port, 0, params=lambda a: {**a, "0.bias": a["0.bias"].astype(float)}),
        (0, "initial weights", "0.bias", "float64 in JAX and float32 in PyTorch"),
    ),
    "the order of the dataset": (
        lambda port: change(port, 1, batch=lambda _: np.arange(4)),
        (1, "batch order", "", "JAX takes the examples in the order of the dataset, and PyTorch"),
    ),
    "the batch of another step": (
        lambda port: change(port, 2, batch=lambda _: port[1].batch),
        (2, "batch order", "", "JAX takes the batch of step 1 of the script"),
    ),
    "the batch in reverse": (
        lambda port: change(port, 2, batch=lambda batch: batch[::-1]),
        (2, "batch order", "", "the same examples in another order"),
    ),
    "a shorter batch": (
        lambda port: change(port, 3, batch=lambda batch: batch[1:]),
        (3, "batch order", "", "JAX takes 1 examples, and PyTorch 2"),
    ),
    "another rate": (
        lambda port: change(port, 2, masks=with_mask(0, rate=lambda _: 0.4)),
        (2, "masks", "2", "rate 0.4 in JAX and 0.5 in PyTorch; the generators agree at the end"),
    ),
    "a mask that is not drawn": (
        lambda port: change(port, 2, masks=lambda masks: masks[:1]),
        (2, "masks", "4", "PyTorch draws a mask of shape [4, 6] at rate 0.5 here, and JAX does"),
    ),
    "an element of a mask": (
        lambda port: change(port, 2, masks=with_mask(1, mask=lambda m: np.roll(m, 1))),
        (2, "masks", "4", "elements of the mask differ"),
    ),
    "the generator of the step before": (
        lambda port: change(port, 2, state=lambda _: port[1].state),
        (2, "generator", "", "JAX is 96 words of 32 bits behind in the stream, as many as PyTorch"),
    ),
    "a factor of the loss": (
        lambda port: change(port, 3, losses=lambda losses: losses * 1.1),
        (3, "losses", "", "bound 1e-05; JAX has 1.1 times the value of PyTorch; masks agree, and"),
    ),
    "another value before a dropout": (
        lambda port: change(
            port,
            3,
            losses=lambda losses: losses * 1.1,
            masks=with_mask(1, entering=lambda values: values + 1),
        ),
        (3, "losses", "", "'4' is the first dropout that other values enter"),
    ),
    "two losses": (
        lambda port: change(port, 3, losses=lambda losses: np.repeat(losses, 2)),
        (3, "losses", "", "JAX yields 2 losses; the script calls backward on 1"),
    ),
    "a biased variance": (
        lambda port: change(port, 3, params=scaled("1.running_var", 0.75)),
        (3, "buffers", "1.running_var", "correct JAX's by n / (n - 1)"),
    ),
    "a small part of an update": (
        lambda port: change(port, slice(4, None), params=moved("5.bias", 3e-6)),
        (4, "updates", "5.bias", "bound 1e-04; 1 of 8 arrays differ"),
    ),
    "not a number": (
        lambda port: change(port, 4, params=scaled("5.bias", np.nan)),
        (4, "updates", "5.bias", ""),
    ),
    "a step too few": (
        lambda port: port.pop(),
        (6, "steps", "", "JAX ends after 5 steps; the script made 6"),
    ),
    "a step too many": (
        lambda port: port.append(port[-1]),
        (7, "steps", "", "the script ends after 6 steps; JAX does not"),
    ),
    "no step": (lambda port: port.clear(), (1, "steps", "", "JAX ends after 0 steps")),
}


@pytest.mark.parametrize("defect", PLANTED)
def test_a_planted_difference_is_found_at_its_place(script, port, defect):
    plant, (*place, words) = PLANTED[defect]
    plant(port)
    found = certified(script, port)
    assert found.result == "differs"
    assert found.first is not None
    assert [found.first.step, found.first.quantity, found.first.where] == place
    assert words in found.first.detail
    assert results(found)[found.first.quantity] == "differs"
    assert found.conclusion == f"{found.first}."


def test_a_bound_separates_rounding_from_a_difference(script, port):
    change(port, 3, params=moved("5.bias", 1e-8), losses=lambda losses: losses + 1e-7)
    found = certified(script, port)
    assert found.result == "agrees"
    row = row_of(found, "losses")
    assert (row.differing, row.unequal, row.step) == (0, 1, 3)
    assert row.largest == pytest.approx(1e-7, rel=0.2)
    assert row.by_step[:2] == [0, 0]
    assert row_of(certified(script, port, tolerance=1e-9), "losses").result == "differs"


def test_the_largest_difference_has_its_place(script, port):
    change(port, 2, params=moved("0.bias", 0.25))
    change(port, 5, params=moved("3.weight", -0.5))
    row = row_of(certified(script, port), "parameters")
    assert (row.result, row.step, row.where, row.differing) == ("differs", 5, "3.weight", 42)
    assert row.largest == pytest.approx(0.5, abs=1e-6)
    assert row.detail.startswith("bound 1e-05; 1 of 8 arrays differ")


MISSING = {
    "state": ("generator", {"seed": "not compared", "generator": "not compared"}),
    "losses": ("loss", {"losses": "not compared"}),
    "batch": ("batch", {"batch order": "not compared"}),
}


@pytest.mark.parametrize("field", MISSING)
def test_what_a_port_does_not_yield_is_not_compared(script, port, field):
    key, expected = MISSING[field]
    change(port, slice(None), **{field: lambda _: None})
    found = certified(script, port)
    assert found.result == "incomplete"
    assert results(found) == expected
    assert all(row.detail == f"train yields no '{key}'" for row in found.rows if row.detail)
    names = ", ".join(expected)
    assert found.conclusion.startswith(f"Not certified: {names} could not be compared in 6 steps")


def test_buffers_that_a_port_does_not_yield_are_not_compared(script, port):
    names = names_of(script)
    kept = dataclasses.replace(names, buffers=["1.running_mean"])
    found = certify(PATHS, script, [(kept, step) for step in port])
    assert results(found) == {"buffers": "not compared"}
    assert row_of(found, "buffers").detail == "train yields no 1.running_var"


def test_a_difference_is_no_gap(script, port):
    change(port, slice(None), batch=lambda _: None)
    change(port, 3, losses=lambda losses: losses * 2)
    assert certified(script, port).result == "differs"


ABSENT = {
    "no DataLoader": ({"has_loader": False}, "the script takes no batch from a DataLoader"),
    "no indices": (
        {"batches": [[None, None]]},
        "the dataset of the script has no indices that are integers",
    ),
}


@pytest.mark.parametrize("case", ABSENT)
def test_an_order_that_a_script_does_not_show_is_not_required(script, port, case):
    changes, reason = ABSENT[case]
    if "batches" in changes:
        changes = {"steps": [dataclasses.replace(step, **changes) for step in script.steps]}
    found = certified(dataclasses.replace(script, **changes), port)
    assert results(found) == {"batch order": "none"}
    assert row_of(found, "batch order").detail == reason
    assert found.result == "agrees"


def test_a_port_may_be_longer_than_a_script_that_was_stopped(script, port):
    stopped = dataclasses.replace(script, steps=script.steps[:2], ended=False)
    assert certified(stopped, port).result == "agrees"
    assert certified(stopped, port[:2]).result == "differs"


def test_the_tolerance_follows_the_coarsest_dtype(script, port):
    assert certified(script, port).tolerance == 1e-5
    for dtype, tolerance in (("float64", 1e-10), ("float16", 1e-2)):
        cast = lambda arrays, dtype=dtype: {n: a.astype(dtype) for n, a in arrays.items()}
        steps = [dataclasses.replace(s, params=cast(s.params)) for s in script.steps]
        run = dataclasses.replace(script, initial=cast(script.initial), steps=steps)
        change(port, slice(None), params=cast)
        assert certified(run, port).tolerance == tolerance
    assert certified(run, port, tolerance=0.5).tolerance == 0.5


def written(script, port, folder, **options) -> tuple[dict, str]:
    found = certified(script, port, **options)
    paths = writing.write(folder, found, dict.fromkeys(PATHS, "ab12"), ["python", "a b"])
    assert [path.name for path in paths] == ["certificate.json", "certificate.html"]
    return json.loads(paths[0].read_text()), paths[1].read_text()


KEYS = (
    *("format", "result", "conclusion", "seed", "steps", "optimizer", "tolerance", "dtype", "rows"),
    *("first_difference", "losses", "notes", "files", "command", "date", "versions", "platform"),
    "instruction_sets",
)


def test_the_json_has_the_documented_entries(script, port, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_plot", lambda certificate: "")
    record, _ = written(script, port, tmp_path)
    assert tuple(record) == KEYS
    listed = str(writing.__doc__).partition("| entry")[2]
    assert all(f"`{key}`" in listed for key in KEYS)
    assert list(record["rows"][0]) == [field.name for field in dataclasses.fields(Row)]
    assert (record["format"], record["result"], record["seed"]) == (1, "agrees", 3)
    assert record["files"]["script"] == {"path": "script.py", "sha256": "ab12"}
    assert record["optimizer"] == "SGD"
    assert len(record["losses"]) == 6
    assert record["first_difference"] is None
    assert {"python", "jax", "torch"} <= record["versions"].keys()


def test_numbers_that_json_lacks_are_null(script, port, tmp_path):
    change(port, 4, params=scaled("5.bias", np.nan))
    record, page = written(script, port, tmp_path)
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["parameters"]["largest"] is None
    assert list(record["first_difference"]) == [f.name for f in dataclasses.fields(First)]
    assert "<td>nan</td>" in page


def test_the_page_has_everything_and_escapes_it(script, port, tmp_path):
    notes = ["A <note>."]
    record, page = written(dataclasses.replace(script, notes=notes), port, tmp_path)
    assert "<title>Certificate: script.py and port.py</title>" in page
    assert "A &lt;note&gt;." in page
    assert '<html lang="en">' in page
    assert 'alt="Losses of JAX and PyTorch, and the largest deviations, at 6 steps"' in page
    assert page.count('<th scope="row">') == len(ROWS)
    assert page.count('<tr class="agrees">') == len(ROWS)
    for fact in (record["conclusion"], record["date"], "SHA-256 ab12", "python &#x27;a b&#x27;"):
        assert fact in page


def test_a_result_is_written_and_not_only_colored(script, port, tmp_path):
    change(port, slice(None), losses=lambda _: None)
    change(port, 2, masks=lambda masks: masks[:1])
    _, page = written(script, port, tmp_path)
    assert '<tr class="differs"><th scope="row">masks</th><td>differs</td>' in page
    assert '<tr class="incomplete"><th scope="row">losses</th><td>not compared</td>' in page
    assert "<dt>losses</dt><dd>train yields no &#x27;loss&#x27;</dd>" in page
    assert "<img" not in page  # there are no losses to plot
