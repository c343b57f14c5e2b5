"""Planted bugs in training loops of modules, each with the expected report; correct loops."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import regtorch
from regtorch import DropoutProblem as Problem
from tests import shared
from tests.shared import found

ROOT = regtorch.key(3)
X = torch.linspace(-1.0, 1.0, 8 * 16).reshape(8, 16)


line = functools.partial(shared.line, __file__)


def converted():
    torch.manual_seed(0)
    layers = nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 16), nn.Dropout(0.25)
    return regtorch.keyed.convert(nn.Sequential(*layers))


def trainer(model, step_of=lambda step: step):
    """Return a step of gradient descent on a converted model."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train_step(step):
        regtorch.keyed.set_key(model, ROOT, step_of(step))
        loss = (model(X) ** 2).mean()  # model
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return train_step


def in_evaluation():
    model = converted()
    return regtorch.check_dropout(trainer(model.eval()))


def one_layer_in_evaluation():
    model = converted()
    model[2].eval()
    return regtorch.check_dropout(trainer(model), expect=regtorch.keyed.sites(model))


def never_evaluated():
    model = converted()
    return regtorch.check_dropout(trainer(model), evaluate=lambda: model(X))  # evaluated


def reseeded():
    layer = regtorch.nn.Dropout(0.5)
    return regtorch.check_dropout(
        lambda step: layer(X, key=torch.Generator().manual_seed(7))  # reseeded
    )


NAMES = [f"{name} ({line('model')})" for name in ("2", "4")]
PLANTED = {
    "a step that stays": (
        lambda: regtorch.check_dropout(trainer(converted(), step_of=lambda step: 0)),
        [(Problem.SAME_MASK, (name,)) for name in NAMES],
    ),
    "a model left in evaluation": (in_evaluation, [(Problem.NEVER_ACTIVE, ())]),
    "a layer left in evaluation": (one_layer_in_evaluation, [(Problem.NEVER_ACTIVE, ("2",))]),
    "a model left in training": (
        never_evaluated,
        [
            (Problem.ACTIVE_IN_EVALUATION, (f"{name} ({line('evaluated')})",))
            for name in ("2#1", "4#1")
        ],
    ),
    "a generator seeded in the step": (reseeded, [(Problem.SAME_MASK, (line("reseeded"),))]),
    "another rate": (
        lambda: regtorch.check_dropout(trainer(converted()), expect={"2": 0.1, "4": 0.25}),
        [(Problem.OTHER_RATE, NAMES[:1])],
    ),
}


@pytest.mark.parametrize(("run", "expected"), PLANTED.values(), ids=PLANTED)
def test_a_planted_bug_is_named_with_its_site(run, expected):
    report = run()
    assert found(report) == [(problem, tuple(sites)) for problem, sites in expected]
    with pytest.raises(RuntimeError, match=expected[0][0].value):
        report.raise_if_wrong()


def dropped(x, key, **options):
    return regtorch.dropout(x, 0.5, key=key, **options)  # dropped


def rows(key, *, same):
    if same:
        return torch.func.vmap(lambda x: dropped(x, key))(X)
    return torch.func.vmap(dropped)(X, regtorch.split(key, len(X)))


def layers(key, *, same):
    h = X
    for layer in range(3):
        h = dropped(torch.tanh(h), key if same else regtorch.fold_in(key, layer))
    return h


REPEATED = {"vmap over rows": rows, "layers": layers}


@pytest.mark.parametrize("same", [True, False], ids=["planted", "sound"])
@pytest.mark.parametrize("run", REPEATED.values(), ids=REPEATED)
def test_one_key_for_everything_in_a_step(run, same):
    report = regtorch.check_dropout(lambda step: run(regtorch.fold_in(ROOT, step), same=same))
    assert found(report) == ([(Problem.REPEATED_MASK, (line("dropped"),))] if same else [])


def checkpointed():
    model = converted()
    part = functools.partial(checkpoint, model[:3], use_reentrant=False)
    whole = lambda x: model[3:](part(x))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train_step(step):
        regtorch.keyed.set_key(model, ROOT, step)
        optimizer.zero_grad()
        (whole(X) ** 2).mean().backward()
        optimizer.step()

    return regtorch.check_dropout(train_step)


def accumulated():
    model = converted()

    def train_step(step):
        regtorch.keyed.set_key(model, ROOT, step)
        for batch in X.split(2):
            (model(batch) ** 2).mean().backward()

    return regtorch.check_dropout(train_step)


def functional():
    """Carried weights, and a loss that is computed again in addition to its gradient."""

    def train_step(w, step):
        key = regtorch.site_key(ROOT, step, "it")
        loss = lambda w: (dropped(torch.tanh(X @ w), key) ** 2).mean()
        loss(w)
        return w - 0.1 * torch.func.grad(loss)(w)

    return regtorch.check_dropout(train_step, torch.eye(16), evaluate=lambda w: w.sum())


def generated():
    generator = torch.Generator().manual_seed(7)
    return regtorch.check_dropout(lambda step: dropped(X, generator))


def evaluated():
    model = converted()
    return regtorch.check_dropout(trainer(model), evaluate=lambda: model.eval()(X))


SOUND = {
    "a converted model": lambda: regtorch.check_dropout(trainer(converted())),
    "evaluation": evaluated,
    "a checkpoint": checkpointed,
    "micro-batches": accumulated,
    "a functional step": functional,
    "a generator": generated,
    "complex and half types": lambda: regtorch.check_dropout(
        lambda step: [
            dropped(X.to(dtype), regtorch.site_key(ROOT, step, str(dtype)))
            for dtype in (torch.bfloat16, torch.complex64)
        ]
    ),
}


@pytest.mark.parametrize("run", SOUND.values(), ids=SOUND)
def test_a_sound_step_gives_an_empty_report(run):
    """64-bit keys do not collide; equal masks are reported if their probability is below 1e-9."""
    report = run()
    assert report.rows
    assert found(report) == []
    report.raise_if_wrong()


def test_a_key_that_was_never_set_is_an_error_of_its_own():
    model = converted()
    with pytest.raises(ValueError, match="must have a key in training"):
        regtorch.check_dropout(lambda step: model(X))


def partly_off():
    torch.manual_seed(0)
    return regtorch.keyed.convert(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.0), nn.Dropout()))


def test_a_layer_at_rate_0_need_not_draw():
    """A site of `keyed.sites` at rate 0 is not a finding, unless a rate is expected."""
    model = partly_off()
    names = regtorch.keyed.sites(model)
    assert names == ["1", "2"]
    check = functools.partial(regtorch.check_dropout, trainer(model))
    assert found(check(expect=names)) == []
    assert found(check(expect={"1": 0.0, "2": 0.5})) == []
    (finding,) = check(expect={"1": 0.1, "2": 0.5}).findings
    assert (finding.problem, finding.sites) == (Problem.NEVER_ACTIVE, ("1",))
    assert finding.detail.endswith("the rate of the layer is 0, and 0.1 was expected")
    setattr(model[2], "p", 0.0)  # noqa: B010 - a module of a Sequential has no known type
    assert found(check(expect=names)) == []
    assert found(check()) == [(Problem.NEVER_ACTIVE, ())]
    model[1].eval()  # its rate no longer explains why it is off
    assert found(regtorch.check_dropout(trainer(model), expect=names)) != []


def test_a_check_inside_a_compiled_function_is_refused(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"outside of torch\.compile"):
        regtorch.check_dropout(lambda step: dropped(X, ROOT))


def test_of_attention_in_blocks_a_guard_keeps_the_sample_of_the_whole():
    q, k, v = torch.randn(3, 1, 64, 2, 4, generator=torch.Generator().manual_seed(0))
    options = {"dropout_rate": 0.5, "dropout_rng": ROOT}
    seen = []
    for block_size in (None, 7, 64):
        guard = regtorch.DropoutGuard()
        with guard.training():
            regtorch.dot_product_attention(q, k, v, block_size=block_size, **options)
        (drawn,) = guard._steps[0]
        seen.append(drawn)
    for drawn in seen[1:]:
        assert (drawn.shape, drawn.kept, drawn.sample) == (
            seen[0].shape,
            seen[0].kept,
            seen[0].sample,
        )
        assert len(drawn.values) == 2**11
        assert drawn.values.tolist() == pytest.approx(seen[0].values.tolist(), abs=1e-6)
