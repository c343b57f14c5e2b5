"""The command `certify`: its exit code and its errors, and real programs with planted defects."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests import __main__ as program
from parity_tests.certify import writing
from parity_tests.certify.comparison import certify
from parity_tests.certify.errors import InputError
from parity_tests.certify.port import run_port
from parity_tests.certify.script import run_script
from parity_tests.torch_script_ports import PORTS
from tests import reading

EXAMPLES = Path(__file__).parent.parent / "examples" / "certify"
SCRIPT = """
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(5)
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.arange(24.0).reshape(6, 4) / 24)
for x, in DataLoader(data, 3, shuffle=True):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
print("the end")
"""
# A port that repeats what was recorded of the script, so that nothing is compiled.
PORT = """
import pathlib

import numpy as np

from regjax import torch_random

with np.load(pathlib.Path(__file__).with_name("kept.npz")) as file:
    kept = dict(file)


def train(seed):
    assert seed == 5
    for step in range(3):
        values = {key: kept[f"{step}.{key}"] for key in ("weight", "bias", "loss", "batch")}
        params = {"weight": values["weight"], "bias": values["bias"]}
        g = torch_random.from_torch(kept[f"{step}.state"])
        if step == 0:
            yield {"params": params}
        else:
            yield {
                "params": params,
                "generator": g,
                "loss": values["loss"],
                "batch": values["batch"],
            }
"""


@pytest.fixture(autouse=True)
def _as_a_reader(monkeypatch):
    monkeypatch.setattr(writing, "_plot", lambda certificate: "")  # it takes a second
    with reading.as_a_reader():
        yield


def record(folder, text):
    """Write and run a script, keep what its port repeats, and return the run."""
    (folder / "script.py").write_text(text)
    with torch.random.fork_rng(devices=[]):
        run = run_script(folder / "script.py", steps=20)
    kept: dict[str, Any] = {f"0.{name}": array for name, array in run.initial.items()}
    kept |= {"0.loss": 0, "0.batch": 0, "0.state": run.steps[0].state}
    for number, step in enumerate(run.steps, start=1):
        kept |= {f"{number}.{name}": array for name, array in step.params.items()}
        batch = np.concatenate(step.batches)
        kept |= {f"{number}.loss": step.losses[0], f"{number}.batch": batch}
        kept |= {f"{number}.state": step.state}
    np.savez(folder / "kept.npz", **kept)
    return run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of the script, and the folder of its file."""
    folder = tmp_path_factory.mktemp("recorded")
    return record(folder, SCRIPT), folder


@pytest.fixture
def write_port(recorded):
    """Write a port, after replacements, each of which must be possible once."""

    def written(*changes):
        text = PORT
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = recorded[1] / "port.py"
        path.write_text(text)
        return path

    return written


def exit_code(folder, *options) -> Any:
    """Return the exit code of the command, which ends by an exception if an argument is wrong."""
    words = ["certify", str(folder / "script.py"), str(folder / "port.py"), *map(str, options)]
    try:
        return program.main(words)
    except SystemExit as end:
        return end.code


CODES = {
    "everything agrees": ((), 0, "Certified: JAX trains as the PyTorch script does in 2 steps"),
    "a row is missing": (
        (('"batch": values["batch"],\n', "\n"),),
        1,
        "Not certified: batch order could not be compared in 2 steps from the seed 5.",
    ),
    "a difference": (
        (('"loss": values["loss"]', '"loss": 1.1 * values["loss"]'),),
        1,
        "JAX and PyTorch diverge at step 1, in the losses: bound 1e-05; JAX has 1.1 times the",
    ),
}


@pytest.mark.parametrize("case", CODES)
def test_the_exit_code(recorded, write_port, tmp_path, capsys, case):
    changes, code, line = CODES[case]
    write_port(*changes)
    assert exit_code(recorded[1], "--out", tmp_path) == code
    printed = capsys.readouterr().out
    assert line in printed
    assert printed.startswith("the end\n")  # the output of the script stays visible
    record = json.loads((tmp_path / "certificate.json").read_text())
    assert record["conclusion"].startswith(line)
    assert record["result"] == ("agrees", "incomplete", "differs")[[*CODES].index(case)]
    assert record["command"][:4] == ["python", "-m", "parity_tests", "certify"]
    assert (tmp_path / "certificate.html").exists()


def test_options_reach_the_comparison(recorded, write_port, tmp_path):
    write_port(('"loss": values["loss"]', '"loss": 1.1 * values["loss"]'))
    assert exit_code(recorded[1], "--out", tmp_path, "--tolerance", "0.5") == 0
    assert exit_code(recorded[1], "--out", tmp_path, "--steps", "1", "--", "--lr", "2") == 1
    record = json.loads((tmp_path / "certificate.json").read_text())
    assert (record["steps"], record["tolerance"]) == (1, 1e-5)
    assert record["command"][-3:] == ["--", "--lr", "2"]


def test_the_help(capsys):
    with pytest.raises(SystemExit):
        program.main(["certify", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m parity_tests certify [-h]")
    assert "\n    python -m parity_tests certify torch_script.py jax_step.py\n" in text
    assert max(map(len, text.splitlines())) <= 100
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert "python -m parity_tests certify --help" in capsys.readouterr().out


OPTIONS = {
    "no files": ([], "the following arguments are required: SCRIPT, PORT"),
    "no such file": (["none.py", __file__], "argument SCRIPT: must be a file; got 'none.py'"),
    "an unknown option": (
        [__file__, __file__, "--stepz", "3"],
        "argument --stepz: must be an option of this program; got '--stepz'. Did you mean --steps?",
    ),
    "no steps": (
        [__file__, __file__, "--steps", "0"],
        "argument --steps: must be an integer of at least 1; got '0'",
    ),
    "no tolerance": (
        [__file__, __file__, "--tolerance", "nan"],
        "argument --tolerance: must be a number of at least 0; got 'nan'",
    ),
    "no seed": (
        [__file__, __file__, "--seed", "-1"],
        "argument --seed: must be an integer from 0 to 9223372036854775807; got '-1'",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_one_line(capsys, case):
    options, message = OPTIONS[case]
    with pytest.raises(SystemExit) as exited:
        program.main(["certify", *options])
    assert exited.value.code == 2
    assert capsys.readouterr().err == f"python -m parity_tests certify: error: {message}\n"


def test_an_error_of_a_program_has_its_traceback_and_one_line(
    recorded, write_port, tmp_path, capsys
):
    write_port(("    assert seed == 5\n", "    raise KeyError('seed')\n"))
    assert exit_code(recorded[1], "--out", tmp_path) == 2
    first, *_, code, error, line = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert (code.strip(), error) == ("raise KeyError('seed')", "KeyError: 'seed'")
    path = recorded[1] / "port.py"
    assert line == (
        f"python -m parity_tests certify: error: {path} must run without an error; got KeyError: "
        "'seed'"
    )
    assert not (tmp_path / "certificate.json").exists()


REFUSED = {
    "no train": (("def train(", "def training("), "must define train(seed), which yields"),
    "no generator": (
        ("def train(", "def train(seed):\n    return None\n\n\ndef other("),
        "must define train(seed) as a generator; got None. Yield a dictionary",
    ),
    "tuples": (
        ('            yield {"params": params}\n', "            yield (params, g)\n"),
        "must yield dictionaries with 'params'; got a value of type tuple for step 0",
    ),
    "no params": (
        ('                "params": params,\n', ""),
        "with 'params'; got the keys ['generator', 'loss', 'batch'] for step 1",
    ),
    "an unknown key": (
        ('"loss": values', '"losses": values'),
        "must yield the keys params, generator, loss, batch; got 'losses' for step 1. Remove it.",
    ),
    "a state in place of a generator": (
        ('"generator": g', '"generator": 3'),
        "must yield a TorchGenerator as 'generator'; got 3 for step 1",
    ),
    "no arrays": (
        ('            yield {"params": params}\n', '            yield {"params": {}}\n'),
        "must yield parameters; got an empty tree.",
    ),
    "a parameter too few": (
        ('"bias": values["bias"]}', "}"),
        "must yield every parameter of the script; got none for bias.",
    ),
    "an unknown name": (
        ('"bias": values["bias"]}', '"shift": values["bias"]}'),
        "must yield the parameters of the script: state_dict and params must match; got these",
    ),
    "another shape": (
        ('{"weight": values["weight"]', '{"weight": values["weight"].T'),
        "must yield 'weight' of shape [2, 4], as 'weight' of the script; got [4, 2].",
    ),
    "a change of names": (
        ('                "params": params,\n', '                "params": {"weight": 0},\n'),
        "must yield the same parameters at every step; got a change of bias",
    ),
    "no syntax": (("def train(seed):", "def train(seed)"), "without an error; got SyntaxError"),
    "wrong names": (
        ("def train(", "names = 3\ndef train("),
        "must yield the parameters of the script: names must be a mapping",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_port_is_refused_in_one_line(recorded, write_port, case):
    change, message = REFUSED[case]
    run, _ = recorded
    with pytest.raises(InputError) as raised:
        list(run_port(write_port(change), run))
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(recorded[1] / "port.py"))
    assert "\n" not in str(raised.value)


def test_a_port_may_have_names_and_layouts_of_its_own(recorded, write_port):
    nested = '{"Dense_0": {"kernel": values["weight"].T, "bias": values["bias"]}}'
    given = '{"weight": values["weight"], "bias": values["bias"]}'
    run, folder = recorded
    path = write_port((given, nested), ("def train(", 'names = {"Dense_0": ""}\ndef train('))
    found = certify((folder / "script.py", path), run, run_port(path, run))
    assert found.result == "agrees"
    assert {row.where for row in found.rows} <= {"", "weight", "bias"}
    path.write_text(path.read_text().replace(".T", ".T * 2"))
    found = certify((folder / "script.py", path), run, run_port(path, run))
    assert found.first is not None
    assert (found.first.quantity, found.first.where) == ("initial weights", "weight")


def test_masks_and_generators_of_a_port_are_observed(tmp_path):
    """The port draws the masks of a script, from the state after the loader's draws."""
    run = record(tmp_path, SCRIPT.replace("model(x)", "torch.dropout(model(x), 0.5, True)"))
    torch.manual_seed(5)
    torch.nn.Linear(4, 2)
    for _ in range(2):  # the seed of the order and that of the workers
        torch.empty((), dtype=torch.int64).random_()
    np.save(tmp_path / "state.npy", torch.get_rng_state().numpy())
    text = PORT.replace(
        "def train",
        "g = torch_random.from_torch(np.load(pathlib.Path(__file__).with_name('state.npy')))\n"
        "def train",
    ).replace("    assert seed == 5\n", "    global g\n")
    text = text.replace(
        '        g = torch_random.from_torch(kept[f"{step}.state"])\n',
        "        if step:\n"
        "            _, g = torch_random.dropout(np.ones((3, 2), 'float32'), 0.5, g)\n",
    )
    path = tmp_path / "port.py"
    for rate, result, quantity in ((0.5, "agrees", ""), (0.25, "differs", "masks")):
        path.write_text(text.replace("0.5", str(rate)))
        with contextlib.closing(run_port(path, run)) as steps:
            found = certify((tmp_path / "script.py", path), run, steps)
        assert found.result == result, found.conclusion
        assert (found.first.quantity if found.first else "") == quantity
        rows = {row.name: row for row in found.rows}
        assert (rows["masks"].compared, rows["generator"].compared) == (12, 2)


# By name: a replacement in the example of a port, and the step, row, place and words found.
PLANTED = {
    "another seed": (
        ("generator(seed)", "generator(seed + 1)"),
        (0, "seed", "", "JAX's generator has the seed 1 and PyTorch's 0"),
    ),
    "another rate": (
        ("dropout(x, 0.5, g)", "dropout(x, 0.4, g)"),
        (1, "masks", "2", "rate 0.4 in JAX and 0.5 in PyTorch; the generators agree"),
    ),
    "a draw of the loader skipped": (
        ("batches, g = torch", "batches, _ = torch"),
        (1, "masks", "2", "JAX is 4 words of 32 bits behind in the stream, as many as PyTorch dr"),
    ),
    "a draw of a mask skipped": (
        ("x, g = torch_random.dropout", "x, _ = torch_random.dropout"),
        (1, "generator", "", "as many as PyTorch draws by bernoulli_ of shape [32, 64] in '2'"),
    ),
    "no shuffling": (
        (
            "batches, g = torch_random.shuffled_batches(g, 100, 32)",
            "batches = np.split(np.arange(100), [32, 64, 96])",
        ),
        (1, "batch order", "", "JAX takes the examples in the order of the dataset"),
    ),
    "another initializer": (
        (
            '    yield {"params": params, "gen',
            '    params["3.weight"] = torch_random.xavier_uniform(generator, (3, 64))[0]\n'
            '    yield {"params": params, "gen',
        ),
        (0, "initial weights", "3.weight", "1 of 4 arrays differ"),
    ),
    "layers in reverse": (
        ("init_like(layers, ", "init_like(dict(reversed(layers.items())), "),
        (0, "initial weights", "0.bias", "PyTorch draws uniform_ of shape [64, 20], uniform_"),
    ),
    "the rate of learning off by 2 %": (
        ("adamw(1e-2,", "adamw(1.02e-2,"),
        (1, "updates", "3.bias", "4 of 4 arrays differ; JAX has 1.02 times the value of PyTorch"),
    ),
    "no decay of biases": (
        ("weight_decay=1e-2)", "weight_decay=1e-2, mask=regjax.decay_mask)"),
        (1, "updates", "0.bias", "2 of 4 arrays differ; look at the decay"),
    ),
    "another memory order": (
        ("dropout(x, 0.5, g)", "dropout(x, 0.5, g, memory_order=(1, 0))"),
        (1, "masks", "2", "the order of the strides explains it"),
    ),
    "another activation": (
        ("jnp.tanh", "jax.nn.relu"),
        (1, "losses", "", "masks agree, and '2' is the first dropout that other values enter"),
    ),
}


@pytest.fixture(scope="module")
def example():
    with torch.random.fork_rng(devices=[]):
        return run_script(EXAMPLES / "torch_script.py", steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("defect", [None, *PLANTED])
def test_a_defect_of_a_program_is_found(example, tmp_path, defect):
    text = (EXAMPLES / "jax_step.py").read_text()
    (old, new), (*place, words) = PLANTED.get(defect, (("", ""), ((), "")))
    if defect:
        assert text.count(old) == 1
        text = text.replace(old, new.replace("(generator,", "(torch_random.generator(seed),"))
    path = tmp_path / "jax_step.py"
    path.write_text(text)
    with contextlib.closing(run_port(path, example)) as steps:
        found = certify((EXAMPLES / "torch_script.py", path), example, steps)
    if defect is None:
        assert found.result == "agrees"
        return
    assert found.result == "differs"
    assert found.first is not None
    assert [found.first.step, found.first.quantity, found.first.where] == place
    assert words in found.first.detail


TEN_SCRIPTS = """
import sys

from parity_tests.torch_scripts import SCRIPTS

SCRIPTS[sys.argv[1]](int(sys.argv[2]))
"""
TEN_PORTS = """
from parity_tests.test_torch_scripts import INPUTS, LABELS
from parity_tests.torch_script_ports import BATCH, EPOCHS, PORTS
from regjax import torch_random

port, inputs = PORTS["{name}"], INPUTS["{name}"]


def train(seed):
    params, g = torch_random.init_like(port.structure, torch_random.generator(seed))
    params = {{name: value.astype(port.dtype) for name, value in params.items()}}
    yield {{"params": params, "generator": g}}
    state = port.optimizer.init(params)
    for _ in range(EPOCHS):
        batches, g = torch_random.shuffled_batches(g, len(LABELS), BATCH)
        for batch in batches:
            params, state, g, loss = port.step(params, state, g, inputs[batch], LABELS[batch])
            yield {{"loss": loss, "params": params, "batch": batch, "generator": g}}
        for _ in range(port.evaluations):
            _, g = torch_random.loader_seed(g)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PORTS)
def test_ten_scripts_are_certified(tmp_path, name):
    (tmp_path / "script.py").write_text(TEN_SCRIPTS)
    (tmp_path / "port.py").write_text(TEN_PORTS.format(name=name))
    assert exit_code(tmp_path, "--out", tmp_path, "--", name, "1") == 0
    record = json.loads((tmp_path / "certificate.json").read_text())
    assert (record["seed"], record["steps"]) == (1, 6)
    rows = {row["name"]: row for row in record["rows"]}
    # Buffers only, of which these models have none, are not compared.
    assert [name for name, row in rows.items() if row["result"] != "agrees"] == ["buffers"]
    assert rows["masks"]["compared"] > 700
    assert rows["initial weights"]["differing"] == 0
