"""Observation of PyTorch scripts, and comparison with their ports."""

from __future__ import annotations

import itertools
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.optim import optimizer  # pyright: ignore[reportAttributeAccessIssue]  a module
from torch.utils.data import dataloader

from parity_tests.certify.errors import InputError
from parity_tests.certify.script import run_script

SCRIPT = """
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(3)
model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.arange(40.0).reshape(10, 4) / 40, torch.arange(10) % 2)
for epoch in range(2):
    for x, y in DataLoader(data, 4, shuffle=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
"""


@pytest.fixture(autouse=True)
def _forked():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def observe(tmp_path):
    """Run a script, after replacements, each of which must be possible once."""

    def observed(*changes, steps=20, args=(), seed=None, script=SCRIPT):
        for old, new in changes:
            assert script.count(old) == 1, old
            script = script.replace(old, new)
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(script))
        return run_script(path, args, steps=steps, seed=seed)

    return observed


def test_a_script_is_observed(observe):
    run = observe()
    assert np.array_equal(run.steps[-1].state, torch.get_rng_state().numpy())
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 2))
    assert (run.seed, run.ended, run.has_loader, run.notes) == (3, True, True, [])
    assert list(run.initial) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name, tensor in model.named_parameters():
        assert np.array_equal(run.initial[name], tensor.detach().numpy())
    assert len(run.steps) == 6
    epoch = np.concatenate([step.batches[0] for step in run.steps[:3]])
    assert sorted(epoch) == list(range(10))
    assert [len(step.batches[0]) for step in run.steps] == [4, 4, 2] * 2
    assert all(step.losses.shape == (1,) for step in run.steps)
    masks = [(mask.site, mask.mask.shape) for step in run.steps for mask in step.masks]
    assert masks == [("1", (4, 3)), ("1", (4, 3)), ("1", (2, 3))] * 2
    functions = [draw.function for draw in run.steps[0].draws]
    assert functions == [*["uniform_"] * 4, "random_", "random_", "bernoulli_"]
    moved = [step.params["0.weight"] for step in run.steps]
    assert all((one != other).any() for one, other in itertools.pairwise(moved))


def test_nothing_stays_observed(observe):
    def patched():
        hooks = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks
        loaders = vars(dataloader._BaseDataLoaderIter).values()
        return torch.autograd.backward, *map(len, hooks), *loaders, *sys.path, *sys.argv

    before = patched()
    observe()
    observe(steps=1)
    with pytest.raises(InputError):
        observe((STEP, "        1 / 0\n"))
    assert patched() == before


STEP = "        optimizer.step()\n"
LOSS = "        loss = nn.functional.cross_entropy(model(x), y)\n        loss.backward()\n"
LOOP = "    for x, y in DataLoader(data, 4, shuffle=True):\n"


def test_a_script_is_ended_after_the_last_step(observe, capsys):
    run = observe((STEP, f"{STEP}        print('step')\n"), steps=2)
    assert (len(run.steps), run.ended) == (2, False)
    assert capsys.readouterr().out == "step\n" * 2


def test_a_script_that_catches_everything_is_ended(observe):
    caught = f"        try:\n    {STEP}        except BaseException: pass\n"
    assert len(observe((STEP, caught), steps=2).steps) == 2


def test_parameters_are_read_after_what_follows_the_step(observe):
    clipped = f"{STEP}        with torch.no_grad(): model[0].weight.clamp_(-0.01, 0.01)\n"
    run = observe((STEP, clipped))
    assert all(np.abs(step.params["0.weight"]).max() <= 0.01 for step in run.steps)


TEST_SET = "DataLoader(TensorDataset(torch.zeros(3, 4)), 2)"


@pytest.mark.parametrize(
    "evaluation",
    [
        f"    model.eval()\n    with torch.no_grad():\n        for x, in {TEST_SET}: model(x)\n",
        f"    for x, in {TEST_SET}: model(x)\n",
        f"    with torch.no_grad():\n        for x, in {TEST_SET}: break\n",
    ],
    ids=["no_grad", "with gradients", "a part of it"],
)
def test_batches_of_a_test_set_are_not_those_of_a_step(observe, evaluation):
    run = observe((STEP, STEP + evaluation))
    assert [len(step.batches) for step in run.steps] == [1] * 6
    seeds = [draw.function for draw in run.steps[3].draws].count("random_")
    assert seeds == 3  # of the test set's loader, and two of the training set's


def test_gradients_are_accumulated(observe):
    accumulated = "        if len(x) == 2 or loss.item() < 0: optimizer.step()\n"
    run = observe((STEP, accumulated), ("        optimizer.zero_grad()\n", ""))
    assert [step.losses.size for step in run.steps] == [3, 3]
    assert [[len(batch) for batch in step.batches] for step in run.steps] == [[4, 4, 2]] * 2
    assert [len(step.masks) for step in run.steps] == [3, 3]


def test_a_reentrant_checkpoint_adds_no_loss_and_no_mask(observe):
    checkpointed = LOSS.replace("model(x)", "checkpoint(model, x.requires_grad_())")
    run = observe(
        (LOSS, checkpointed.replace("_())", "_(), use_reentrant=True)")),
        ("import sys\n", "from torch.utils.checkpoint import checkpoint\n"),
    )
    assert [(step.losses.size, len(step.masks)) for step in run.steps] == [(1, 1)] * 6


@pytest.mark.slow
# JAX warns of any fork; the worker does not use it.
@pytest.mark.filterwarnings("ignore:os.fork", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_read_ahead_in_the_order_of_the_steps(observe):
    alone = observe()
    parallel = observe(("shuffle=True", "shuffle=True, num_workers=1"))
    assert [step.batches for step in parallel.steps] == [step.batches for step in alone.steps]


def test_the_command_line_is_the_scripts_own(observe, tmp_path):
    (tmp_path / "beside.py").write_text("RATE = 0.25")
    run = observe(
        ("torch.manual_seed(3)", "from beside import RATE; torch.manual_seed(int(sys.argv[1]))"),
        ("nn.Dropout(0.5)", "nn.Dropout(RATE)"),
        args=["7"],
    )
    assert run.seed == 7
    assert run.steps[0].masks[0].rate == 0.25


def test_a_seed_is_set_for_a_script_without_one(observe):
    alone, seeded = observe(), observe(("torch.manual_seed(3)\n", ""), seed=3)
    assert all(np.array_equal(alone.initial[name], seeded.initial[name]) for name in alone.initial)


def test_draws_before_the_seed_are_noted(observe):
    run = observe(("torch.manual_seed(3)\n", "x = torch.rand(5)\ntorch.manual_seed(3)\n"))
    assert run.notes == [
        "The script draws before it sets a seed: rand of shape [5] in '(outside the model)'."
    ]


def test_other_generators_are_noted(observe):
    run = observe(("import sys\n", "import random, numpy\nrandom.random(); numpy.random.rand()\n"))
    assert [note.partition(",")[0] for note in run.notes] == [
        "The script uses the module random",
        "The script uses NumPy's global generator",
    ]


REFUSED = {
    "no step": ((STEP, ""), "must call the step of an optimizer of torch.optim when it runs as"),
    "no seed": (("torch.manual_seed(3)\n", ""), "must call torch.manual_seed; got no call."),
    "closure": ((STEP, "        optimizer.step(lambda: loss)\n"), "step() without a closure; got"),
    "two optimizers": (
        (STEP, f"{STEP}        torch.optim.Adam(model.parameters()).step()\n"),
        "must train with one optimizer; got two: SGD, Adam.",
    ),
    "a compiled model": (
        ("optimizer = ", "compiled = torch.compile(model)\noptimizer = "),
        "must not call torch.compile, whose programs draw other masks, and are not compiled",
    ),
    "a model that is compiled in place": (
        ("optimizer = ", "model.compile()\noptimizer = "),
        "must not call torch.compile",
    ),
    "no module": (
        ("model.parameters(), lr", "[*model.parameters(), torch.ones(2, requires_grad=True)], lr"),
        "must train parameters of one module",
    ),
    "an error": ((STEP, "        1 / 0\n"), "without an error; got ZeroDivisionError: division by"),
    "an exit code": ((STEP, "        sys.exit(3)\n"), "without an error; got SystemExit: 3"),
    "a wrong command line": (
        (STEP, "        sys.exit(2)\n"),
        "SystemExit: 2. Pass the options of the script after --.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.sample(4)
def test_a_script_is_refused_in_one_line(observe, case):
    change, message = REFUSED[case]
    with pytest.raises(InputError) as raised:
        observe(change)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("/")


def test_a_seed_for_a_script_with_another_one_is_refused(observe):
    with pytest.raises(InputError, match=r"--seed 5; got torch.manual_seed\(3\). Leave --seed out"):
        observe(seed=5)


def test_a_model_off_the_cpu_is_refused(observe):
    # No CUDA is needed: the optimizer of a model on the device meta makes a step, too.
    with pytest.raises(InputError, match="must train on the CPU; got parameters on meta"):
        observe((LOSS, ""), ("model.parameters(), lr", "model.to('meta').parameters(), lr"))
