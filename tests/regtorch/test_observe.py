from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import regtorch
from regshared.events import SiteKey
from regtorch._random.events import Draw

KEY = regtorch.key(0)
X = torch.arange(1.0, 9.0)


def watch(run):
    events = []
    with regtorch.observing(events.append):
        run()
    return [event for event in events if isinstance(event, Draw)], events


def drop(x, rate=0.5, **options):
    return regtorch.dropout(x, rate, key=KEY, **options)


def with_gradient(x):
    return torch.autograd.grad(drop(x.requires_grad_()).sum(), x)[0]


RUNS = {
    "plain": (drop, 1),
    "gradient": (lambda x: with_gradient(x.clone()), 1),
    "tensor rate": (functools.partial(drop, rate=torch.tensor(0.5)), 1),
    "packed": (functools.partial(drop, sampler=regtorch.packed_bernoulli), 1),
    "module": (lambda x: regtorch.nn.Dropout(0.5)(x, key=KEY), 1),
    "feature": (lambda x: regtorch.feature_dropout(x.reshape(2, 2, 2), 0.5, key=KEY), 1),
    "alpha": (lambda x: regtorch.alpha_dropout(x, 0.5, key=KEY), 1),
    "evaluation": (functools.partial(drop, deterministic=True), 0),
    "rate 0": (functools.partial(drop, rate=0.0), 0),
}


@pytest.mark.parametrize(("run", "draws"), RUNS.values(), ids=RUNS)
def test_every_draw_is_told(run, draws):
    before = run(X)
    drawn, _ = watch(lambda: torch.testing.assert_close(run(X), before, rtol=0, atol=0))
    assert len(drawn) == draws


def test_what_is_told_is_what_was_drawn():
    ((event,), _) = watch(lambda: drop(X, rate=0.5))
    assert (event.order, event.key, event.rate) == (0, (0, 0), 0.5)
    assert torch.equal(torch.where(event.mask, X / 0.5, 0), drop(X))


def test_what_entered_is_a_copy():
    x = X.clone()
    (event,), _ = watch(lambda: x.copy_(drop(x)))
    assert torch.equal(event.entering, X)


def test_a_converted_model_tells_the_names_of_its_sites():
    model = regtorch.keyed.convert(torch.nn.Sequential(torch.nn.Dropout(0.5)))
    root = regtorch.key(7)
    regtorch.keyed.set_key(model, root, 5)
    drawn, events = watch(lambda: model(X))
    words = tuple(regtorch.site_key(root, 5, "0").tolist())
    assert events[0] == SiteKey("0", (0, 7), 5, words)
    assert drawn[0].key == words


def test_a_checkpoint_draws_twice():
    """A checkpoint draws again in the backward pass, and observers receive both."""
    x = X.clone().requires_grad_()
    run = lambda: checkpoint(drop, x, use_reentrant=False).sum().backward()
    drawn, _ = watch(run)
    assert [event.key for event in drawn] == [(0, 0)] * 2


def test_nested_observers_both_receive_events_and_after_an_error_nobody():
    outer, inner = [], []

    def nested():
        with regtorch.observing(outer.append):
            with regtorch.observing(inner.append):
                drop(X)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nested()
    drop(X)
    assert (len(outer), len(inner)) == (1, 1)


@pytest.mark.parametrize("flags", [[False], [True], [True, False]], ids=str)
def test_what_a_tensor_as_a_flag_turns_off_is_not_told(flags):
    """Including each row under vmap."""

    def at(flag):
        return regtorch.dropout(X, 0.5, key=KEY, deterministic=flag)

    flags = torch.tensor(flags)
    drawn, _ = watch(lambda: torch.func.vmap(at)(flags) if len(flags) > 1 else at(flags[0]))
    assert len(drawn) == int((~flags).sum())


def test_noise_in_place_of_blocks_draws_nothing_in_evaluation():
    x = torch.ones(2, 8, 8, 3)
    options = {"key": regtorch.key(0), "with_noise": True, "block_size": 3}
    draws, _ = watch(
        lambda: regtorch.drop_block(x, 0.3, deterministic=torch.tensor(True), **options)
    )
    assert not draws
