"""Arguments that the decays of `regtorch.optim` reject."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from regtorch import optim
from tests.regtorch.test_optim import (
    FORMS,
    _module,
    _ones,
    _optimizer,
    _step,
    each_attach,
    each_coupled,
)
from tests.shared import WRONG_LAYERS


@pytest.mark.parametrize(("layer", "depth", "error", "message"), WRONG_LAYERS)
def test_layer_that_is_none_is_refused(layer, depth, error, message):
    with pytest.raises(error, match=message):
        optim.layerwise_groups(_module(), lambda name: layer, lr=0.1, depth=depth)


@pytest.mark.parametrize("name", ["lr", "lr_factor", "weight_decay", "decay_factor"])
def test_rates_of_layers_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be finite and not negative; got -1"):
        optim.layerwise_groups(_module(), lambda _: 0, **{"lr": 0.1, name: -1.0})


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@each_attach
def test_coefficient_out_of_range_is_refused(attach, value):
    module = _module()
    optimizer = _optimizer(module)
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative"):
        attach(optimizer, value)
    attach(optimizer, lambda step: value)
    with pytest.raises(ValueError, match="weight_decay at step 0 must be finite and not negative"):
        _step(optimizer, module)


@pytest.mark.parametrize("value", [True, None, "0.1", torch.ones(2)])
@each_attach
def test_coefficient_that_is_no_number_is_refused(attach, value):
    with pytest.raises(TypeError, match="weight_decay must be a real number"):
        attach(_optimizer(_module()), value)


@each_attach
def test_mask_that_does_not_fit_is_refused_at_once(attach):
    with pytest.raises(ValueError, match=r"mask must have .* got none for 'bias'"):
        attach(_optimizer(_module()), 0.1, {"kernel": True})
    with pytest.raises(TypeError, match="mask at 'kernel' must be a bool; got 1"):
        attach(_optimizer(_module()), 0.1, lambda name, p: 1)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ({"kernel": torch.ones(2)}, ValueError, "reference must have .* got none for 'bias'"),
        ({**_ones(), "bias": torch.ones(3)}, ValueError, r"'bias' must have .* got \(3,\)"),
        ({**_ones(), "bias": 0.0}, TypeError, "reference at 'bias' must be a float"),
        (0.5, TypeError, "reference must be a module, a tensor"),
        (iter(()), ValueError, "reference must yield .* generator that yields nothing"),
    ],
)
def test_reference_that_does_not_fit_is_refused_at_once(reference, error, message):
    with pytest.raises(error, match=message):
        optim.add_l2_sp_decay(_optimizer(_module()), reference, 0.1)


@pytest.mark.parametrize(
    "mask",
    [
        {"kernel": False, "bias": False},
        {"kernel": np.False_, "bias": np.False_},
        {"kernel": False, "bias": torch.tensor(False)},
        [False, np.False_],
    ],
)
@each_attach
def test_a_mask_that_is_false_for_all_is_refused(attach, mask):
    module = _module()
    named = isinstance(mask, dict)
    optimizer = torch.optim.SGD(module.named_parameters() if named else module.parameters(), lr=0.5)
    if not named and attach in (FORMS["l2_sp"][0], FORMS["l2_sp decoupled"][0]):
        pytest.skip("an L2-SP reference is found by names, which these parameters do not have")
    message = "mask must be True for some parameter, since weight_decay is not 0; got False for all"
    for rate in (0.25, lambda step: 0.25):
        with pytest.raises(ValueError, match=message):
            attach(optimizer, rate, mask)
    attach(optimizer, 0.0, mask).remove()


@pytest.mark.parametrize("value", ["False", "no", 1, None])
def test_decoupled_must_be_a_bool(value):
    optimizer = _optimizer(_module())
    message = f"^decoupled must be True or False; got {value!r}.$"
    with pytest.raises(TypeError, match=message):
        optim.add_l1_decay(optimizer, 0.25, decoupled=value)
    with pytest.raises(TypeError, match=message):
        optim.add_l2_sp_decay(optimizer, _ones(), 0.25, decoupled=value)


@each_coupled
def test_coupled_decay_refuses_a_closure(form):
    module = _module()
    optimizer = _optimizer(module)
    FORMS[form][0](optimizer, 0.25)
    for args, options in (((list,), {}), ((), {"closure": list})):
        with pytest.raises(ValueError, match=r"closure must be None with a coupled decay"):
            optimizer.step(*args, **options)
    optimizer.step(None)
    optimizer.step(closure=None)


def test_scaled_gradients_are_refused():
    module = _module()
    optimizer = _optimizer(module, torch.optim.AdamW, fused=True)
    optim.add_l1_decay(optimizer, 0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(module.kernel.sum() + module.bias.sum()).backward()
    with pytest.raises(ValueError, match=r"must be unscaled .* scaler\.unscale_\(optimizer\)"):
        scaler.step(optimizer)


def test_schedule_of_a_decay_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"must have a weight_decay .* in group 0 of Rprop"):
        optim.schedule_weight_decay(_optimizer(_module(), torch.optim.Rprop), lambda step: 1.0)
    with pytest.raises(TypeError, match=r"multiplier must be a function .*; got 0\.5"):
        optim.schedule_weight_decay(_optimizer(_module()), 0.5)
