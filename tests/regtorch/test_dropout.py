"""Tests that only PyTorch needs: generators, modules, the graph, devices of keys."""

from __future__ import annotations

import copy

import pytest
import torch

import regtorch

X = torch.linspace(-2.0, 3.0, 48).reshape(6, 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_generator_moves_on_and_repeats_from_its_seed():
    source = generator()
    first, second = (regtorch.dropout(X, 0.5, key=source) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, regtorch.dropout(X, 0.5, key=generator()))


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"rate": 0.5, "deterministic": True}])
def test_a_generator_stays_where_nothing_is_drawn(options):
    source = generator()
    state = source.get_state()
    assert regtorch.dropout(X, key=source, **options) is X
    assert torch.equal(source.get_state(), state)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    regtorch.dropout(X, 0.5, key=regtorch.key(0))
    regtorch.dropout(X, 0.5, key=generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_gradient_is_the_mask_times_the_scale():
    x = X.clone().requires_grad_()
    regtorch.dropout(x, 0.3, key=regtorch.key(0)).sum().backward()
    assert torch.equal(x.grad, regtorch.dropout(torch.ones_like(X), 0.3, key=regtorch.key(0)))


def test_the_second_derivative():
    x = X[0].clone()
    f = lambda x: (regtorch.dropout(x, 0.3, key=regtorch.key(0)) ** 2).sum()
    scale = regtorch.dropout(torch.ones(8), 0.3, key=regtorch.key(0))
    torch.testing.assert_close(torch.func.hessian(f)(x), torch.diag(2 * scale**2))


def test_the_input_is_not_written_to():
    x = X.clone()
    regtorch.dropout(x, 0.5, key=regtorch.key(0))
    assert torch.equal(x, X)


def test_x_must_be_a_tensor():
    with pytest.raises(TypeError, match=r"x must be a tensor; got \[1\.0\].*torch\.as_tensor"):
        regtorch.dropout([1.0], 0.5, key=regtorch.key(0))


class TestModule:
    def test_train_and_eval(self):
        layer = regtorch.nn.Dropout(0.5)
        expected = regtorch.dropout(X, 0.5, key=regtorch.key(1))
        assert torch.equal(layer(X, key=regtorch.key(1)), expected)
        assert layer.eval()(X) is X
        assert torch.equal(layer.train()(X, key=regtorch.key(1)), expected)

    def test_a_call_without_key_or_generator_is_refused(self):
        with pytest.raises(ValueError, match="key must be a random key in training"):
            regtorch.nn.Dropout(0.5)(X)

    def test_the_generator_serves_calls_without_a_key(self):
        layer = regtorch.nn.Dropout(0.5, generator=generator(3))
        assert torch.equal(layer(X), regtorch.dropout(X, 0.5, key=generator(3)))
        expected = regtorch.dropout(X, 0.5, key=regtorch.key(1))
        assert torch.equal(layer(X, key=regtorch.key(1)), expected)

    def test_broadcast_dims(self):
        layer = regtorch.nn.Dropout(0.5, broadcast_dims=(0,))
        y = layer(torch.ones(5, 32), key=regtorch.key(0))
        assert torch.equal(y, y[:1].expand(5, 32))

    def test_settings_are_checked_when_it_is_made(self):
        with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\]; got 1\.5"):
            regtorch.nn.Dropout(1.5)
        assert repr(regtorch.nn.Dropout(0.1)) == "Dropout(rate=0.1)"
        assert regtorch.nn.Dropout().rate == torch.nn.Dropout().p

    def test_it_has_no_state_and_copies(self):
        layer = regtorch.nn.Dropout(0.25, broadcast_dims=(1,))
        assert not layer.state_dict()
        assert torch.equal(
            copy.deepcopy(layer)(X, key=regtorch.key(0)), layer(X, key=regtorch.key(0))
        )
