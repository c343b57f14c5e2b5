"""The recorder reports the difference of two models that draw different masks."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx

import regjax
import regjax.linen
import regjax.nnx
import regtorch
from parity_tests.compare import FLOAT32, FLOAT64
from parity_tests.harness import JaxSide, TorchSide, compare_step, compare_training
from parity_tests.recording import (
    Drawn,
    Recorder,
    count_mask_elements,
    mask_differences,
    value_deviations,
)

ROOT = 7
X = np.linspace(-1.0, 1.0, 4 * 8, dtype=np.float32).reshape(4, 8)


class Original(torch.nn.Module):
    """Two dropouts around an activation, as a user writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))
        self.first, self.second = torch.nn.Dropout(0.25), torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x * self.scale)))


def original() -> TorchSide:
    model = regtorch.keyed.convert(Original())

    def loss(model, batch, step):
        regtorch.keyed.set_key(model, regtorch.key(ROOT), step)
        return (model(torch.from_numpy(batch)) ** 2).mean()

    return TorchSide(model, loss, torch.optim.SGD(model.parameters(), 0.1))


def site(name, step=0, root=ROOT):
    return lambda now: regjax.site_key(jax.random.key(root), now + step, name)


FIRST, SECOND = site("first"), site("second")


def port(first=FIRST, second=SECOND, rate=0.5, act=jnp.tanh, **options):
    """Return the same model in JAX; arguments replace parts of it."""

    def loss(params, batch, step):
        x = regjax.dropout(batch * params["scale"][None], 0.25, key=first(step))
        x = regjax.dropout(act(x), rate, key=second(step), **options)
        return (x**2).mean()

    return JaxSide({"scale": jnp.ones(8)}, loss, optax.sgd(0.1))


def inverted(key, keep_prob, shape, *, out_sharding=None):
    return ~regjax.bernoulli(key, 1 - keep_prob, shape, out_sharding=out_sharding)


def plain(number):
    return lambda step: jax.random.fold_in(jax.random.key(number), step)


WRONG = {
    "nothing": ({}, None, ""),
    "step": ({"second": site("second", 1)}, "second", "its key is that of step 1 in JAX and of 0"),
    "name": (
        {"second": site("secnd")},
        "second",
        "PyTorch draws a mask here, JAX does not, but at",
    ),
    # The names of the sites are correct, but their rates are swapped.
    "swapped": (
        {"first": site("second"), "second": site("first")},
        "first",
        "rate 0.5 in JAX and 0.25 in PyTorch",
    ),
    "root": ({"first": site("first", root=8)}, "first", "root key: (0, 8) in JAX and (0, 7)"),
    "rate": ({"rate": 0.6}, "second", "rate 0.6 in JAX and 0.5 in PyTorch"),
    "shared": ({"broadcast_dims": (0,)}, "second", "of shape [1, 8] in JAX and [4, 8]"),
    "one key for two": ({"second": site("first")}, "second", "PyTorch draws a mask here, JAX does"),
    "plain keys": (
        {"first": plain(0), "second": plain(1)},
        "first",
        "another key: a key that site_key did not derive in JAX and first in PyTorch",
    ),
    "sampler": ({"sampler": inverted}, "second", "elements of the mask differ"),
}


@pytest.mark.parametrize(("change", "where", "detail"), WRONG.values(), ids=WRONG)
@pytest.mark.sample(2)
def test_a_wrong_mask_is_reported_with_its_cause(change, where, detail):
    found = compare_training(port(**change), original(), [X] * 2, {"scale": "scale"})
    if where is None:
        assert found.agrees
        assert found.sites == {"first": 2, "second": 2}
        return
    assert found.first is not None
    assert (found.first.step, found.first.quantity, found.first.name) == (1, "mask", where)
    assert detail in found.first.detail


def test_a_wrong_activation_is_reported_with_the_site_that_it_enters():
    found = compare_step(port(act=jnp.sin), original(), X, {"scale": "scale"})
    assert found.first is not None
    assert (found.first.quantity, found.first.name) == ("activation", "second")
    assert "masks agree" in found.first.detail


def test_a_difference_after_the_last_site_is_a_difference_of_the_loss():
    right = port()
    wrong = dataclasses.replace(right, loss=lambda *args: right.loss(*args) * 1.01)
    found = compare_step(wrong, original(), X, {"scale": "scale"})
    assert found.first is not None
    assert (found.first.quantity, found.first.name) == ("loss", "loss")
    assert "so do the values that enter them up to the last, 'second'" in found.first.detail


def test_a_note_reports_that_masks_of_another_library_were_not_compared():
    def loss(params, batch, step):
        return ((batch * params["scale"][None]) ** 2).mean()

    found = compare_step(
        JaxSide({"scale": jnp.ones(8)}, loss, optax.sgd(0.1)), original(), X, {"scale": "scale"}
    )
    assert found.notes == (
        "Masks were not compared: 2 in PyTorch, and no dropout of regjax in JAX.",
    )
    assert found.notes[0] in str(found)
    assert found.first is not None
    assert found.first.quantity == "loss"


def test_without_recording_only_values_are_compared():
    found = compare_step(port(), original(), X, {"scale": "scale"}, record=False)
    assert found.agrees
    assert not found.sites
    assert not found.deviations["mask"]


def test_tolerances_by_quantity():
    right = port()
    wrong = dataclasses.replace(right, loss=lambda *args: right.loss(*args) + 1e-3)
    pair = lambda: (wrong, original(), X, {"scale": "scale"})
    assert not compare_step(*pair()).agrees
    assert compare_step(*pair(), tolerances={"loss": 2e-3}).agrees
    with pytest.raises(ValueError, match=r"must have keys among buffer, loss, .*; got 'mask'"):
        compare_step(*pair(), tolerances={"mask": 1.0})
    with pytest.raises(ValueError, match=r"tolerances\['loss'\] must be at least 0; got nan"):
        compare_step(*pair(), tolerances={"loss": float("nan")})


def drawn(name="a", key=(0, 1), mask=(True, False), entering=(1.0, 2.0), rate=0.5) -> Drawn:
    return Drawn(name, key, None, rate, np.array(mask), np.array(entering))


def test_the_order_of_sites_may_differ():
    in_jax = [drawn("b", mask=(True, True)), drawn("a")]
    assert not mask_differences(in_jax, in_jax[::-1])


def test_layouts_may_differ():
    """Channels may be last or first: masks of whole channels match, and values are sorted."""
    channels = np.array([True, False, True])
    x = np.random.default_rng(0).normal(size=(1, 2, 2, 3))
    last = Drawn("a", (0, 1), None, 0.5, channels.reshape(1, 1, 1, 3), x)
    first = Drawn("a", (0, 1), None, 0.5, channels.reshape(1, 3, 1, 1), x.transpose(0, 3, 1, 2))
    assert not mask_differences([last], [first])
    assert value_deviations([last], [first], FLOAT64) == {"a": 0.0}
    other = dataclasses.replace(first, entering=x.transpose(0, 3, 1, 2) + 1e-3)
    assert value_deviations([last], [other], FLOAT64)["a"] > 1e-4


def test_elements_of_masks_are_counted():
    masks = [drawn("a"), drawn("b"), drawn("c", mask=(True,) * 5)]
    other = [drawn("a", mask=(True, True)), drawn("b", mask=(True,)), drawn("d", key=(0, 2))]
    assert count_mask_elements(masks, masks) == (9, 0)
    assert count_mask_elements(masks, other) == (2 + 2 + 5, 1 + 2 + 5)
    assert count_mask_elements(masks, masks[:1]) == (9, 7)


def test_a_mask_that_the_model_applies_itself_has_no_values():
    """As in stochastic depth of timm, whose values are those of another function."""

    class DropPath(torch.nn.Module):
        def forward(self, x):
            return x * x.new_empty(len(x), 1).bernoulli_(0.5)

    model, recorder = regtorch.keyed.convert(DropPath()), Recorder()
    with recorder.watching():
        regtorch.keyed.set_key(model, regtorch.key(0), 0)
        model(torch.ones(8, 2))
        key = regjax.site_key(jax.random.key(0), 0, "")
        regjax.drop_path(jnp.ones((8, 2)), 0.5, key=key)
        in_jax, in_torch = recorder.taken()
    assert not mask_differences(in_jax, in_torch)
    assert count_mask_elements(in_jax, in_torch) == (8, 0)
    assert in_torch[0].entering is None
    assert value_deviations(in_jax, in_torch, FLOAT32) == {}


class RandomPath(torch.nn.Module):
    """Stochastic depth as in transformers, which makes its mask from uniform numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep_prob = 0.75
        return x * (keep_prob + torch.rand(len(x), 1)).floor() / keep_prob


@pytest.mark.parametrize(("name", "detail"), [("first", ""), ("other", "JAX draws a mask here")])
def test_a_mask_that_the_model_makes_of_numbers_is_not_compared(name, detail):
    side = original()
    regtorch.keyed.revert(side.model)
    side.model.first = RandomPath()
    regtorch.keyed.convert(side.model)

    def loss(params, batch, step):
        x = regjax.drop_path(batch * params["scale"][None], 0.25, key=site(name)(step))
        return (regjax.dropout(jnp.tanh(x), 0.5, key=SECOND(step)) ** 2).mean()

    port = JaxSide({"scale": jnp.ones(8)}, loss, optax.sgd(0.1))
    found = compare_training(port, side, [X] * 2, {"scale": "scale"})
    assert found.agrees == (not detail)
    if found.first:
        assert (found.first.step, found.first.quantity, found.first.name) == (1, "mask", name)
        assert detail in found.first.detail
    else:
        assert "Masks were not compared at first: PyTorch draws numbers" in "".join(found.notes)


def test_values_of_another_size_deviate_infinitely():
    assert value_deviations([drawn()], [drawn(entering=(1.0,))], FLOAT32) == {"a": float("inf")}


def test_a_recomputed_forward_pass_counts_once():
    recorder = Recorder()
    key = jax.random.key(0)
    with recorder.watching():
        body = jax.checkpoint(lambda x: regjax.dropout(jnp.sin(x), 0.5, key=key))
        jax.jit(jax.grad(lambda x: body(x).sum()))(jnp.ones(8))
        in_jax, in_torch = recorder.taken()
        assert [each.site for each in in_jax] == ["dropout 1"]
        assert in_torch == []
        assert recorder.taken() == ([], [])


def linen_dropout(x, **options):
    layer = regjax.linen.Dropout(0.5, deterministic=False)
    return layer.apply({}, x, **options)


class TwoInLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return [regjax.linen.Dropout(0.5, deterministic=False)(x) for _ in range(2)]


# For each layer, the keys that the framework derives, and the key itself.
WAYS = {
    "linen": (
        lambda x, key: linen_dropout(x, rngs={"dropout": key}),
        lambda x, key: linen_dropout(x, rng=key),
    ),
    "two": (
        lambda x, key: TwoInLinen().apply({}, x, rngs={"dropout": key}),
        lambda x, key: linen_dropout(x, rng=key),
    ),
    "nnx": (
        lambda x, key: regjax.nnx.Dropout(0.5)(x, rngs=nnx.Rngs(dropout=key)),
        lambda x, key: regjax.nnx.Dropout(0.5)(x, rngs=key),
    ),
}


@pytest.mark.parametrize(("derived", "direct"), WAYS.values(), ids=WAYS)
def test_a_key_that_a_framework_replaces_is_named_with_the_fix(derived, direct):
    recorder = Recorder()
    with recorder.watching():
        for layer, is_equal in ((direct, True), (derived, False)):
            layer(jnp.asarray(X), FIRST(0))
            key = regtorch.site_key(regtorch.key(ROOT), 0, "first")
            regtorch.dropout(torch.from_numpy(X), 0.5, key=key)
            differences = mask_differences(*recorder.taken())
            details = [each.detail for each in differences if each.site == "first"]
            assert len(details) == (not is_equal)
        (detail,) = details
        assert "although JAX derived the key of 'first'" in detail
        assert "rng=key in regjax.linen and rngs=key in regjax.nnx" in detail


def test_callbacks_have_the_x64_setting_of_the_thread():
    def elsewhere() -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(jax.config.read, "jax_enable_x64").result()

    before = elsewhere()
    for is_enabled in (True, False):
        with jax.enable_x64(is_enabled):
            with Recorder().watching():
                assert elsewhere() is is_enabled
            assert elsewhere() is before
