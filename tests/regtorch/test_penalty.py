from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from regtorch._decay.penalty import elastic_net_penalty, l1_penalty, l2_penalty, l2_sp_penalty

KERNEL, BIAS = torch.tensor([[1.0, 2.0], [-3.0, 0.5]]), torch.tensor([2.0])
SUM = 1 + 4 + 9 + 0.25 + 4
NO_BIAS = SUM - 4


def _module() -> nn.Module:
    module = nn.Module()
    module.kernel, module.bias = nn.Parameter(KERNEL.clone()), nn.Parameter(BIAS.clone())
    module.register_buffer("count", torch.tensor(3))
    return module


@pytest.mark.parametrize(
    "params",
    [
        _module(),
        _module().parameters(),
        _module().named_parameters(),
        dict(_module().named_parameters()),
        [KERNEL, BIAS],
        (KERNEL, BIAS),
        [("kernel", KERNEL), ("bias", BIAS)],
        nn.ParameterList([KERNEL, BIAS]),
        torch.cat([KERNEL.flatten(), BIAS]),
    ],
    ids=lambda params: type(params).__name__,
)
def test_value_has_no_one_half(params):
    penalty = l2_penalty(params, 0.5)
    assert penalty.item() == 0.5 * SUM
    assert penalty.shape == ()
    assert penalty.dtype == torch.float32


def test_gradient_is_twice_the_coefficient_times_the_parameters():
    module = _module()
    l2_penalty(module, 0.5).backward()
    assert all(torch.equal(p.grad, p) for p in module.parameters())


@pytest.mark.parametrize(
    ("params", "mask"),
    [
        (_module(), {"kernel": True, "bias": False}),
        (_module(), lambda name, tensor: name != "bias"),
        (_module(), lambda name, tensor: tensor.ndim > 1),
        ({"kernel": KERNEL, "bias": BIAS}, {"bias": False, "kernel": True}),
        ([KERNEL, BIAS], [True, False]),
        (iter([KERNEL, BIAS]), (True, False)),
        ([KERNEL, BIAS], lambda name, tensor: name == "0"),
        ([KERNEL, BIAS], {"0": True, "1": False}),
    ],
)
def test_mask(params, mask):
    assert l2_penalty(params, 1.0, mask=mask).item() == NO_BIAS


def test_masked_out_parameters_get_no_gradient():
    module = _module()
    l2_penalty(module, 0.5, mask={"kernel": True, "bias": False}).backward()
    assert torch.equal(module.kernel.grad, module.kernel)
    assert module.bias.grad is None


def test_frozen_parameters_count_but_get_no_gradient():
    module = _module()
    module.bias.requires_grad_(False)
    penalty = l2_penalty(module, 1.0)
    penalty.backward()
    assert penalty.item() == SUM
    assert module.bias.grad is None
    trainable = l2_penalty(module, 1.0, mask=lambda name, tensor: tensor.requires_grad)
    assert trainable.item() == NO_BIAS


def test_frozen_parameters_stay_where_weight_decay_would_leave_them():
    runs = []
    for penalty, weight_decay in ((0.05, 0.0), (0.0, 0.1)):
        module = _module()
        module.bias.requires_grad_(False)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=weight_decay)
        for _ in range(5):
            optimizer.zero_grad()
            (module.kernel.sum() + l2_penalty(module, penalty)).backward()
            optimizer.step()
        runs.append([p.detach() for p in module.parameters()])
    torch.testing.assert_close(*runs, rtol=0, atol=1e-6)
    assert torch.equal(runs[0][1], BIAS)


def test_tied_parameters_of_a_module_count_once():
    module = _module()
    module.tied = module.kernel
    assert l2_penalty(module, 1.0).item() == SUM


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
)
@pytest.mark.parametrize("weight_decay", [1, 1.0, torch.tensor(1.0), torch.tensor(1.0).double()])
def test_dtype_of_the_result(dtype, expected, weight_decay):
    penalty = l2_penalty([torch.ones(2).to(dtype)], weight_decay)
    assert penalty.item() == 2
    assert penalty.dtype == expected


def test_the_result_is_where_the_first_parameter_is():
    elsewhere = torch.ones(2, device="meta")
    assert l1_penalty([elsewhere, torch.ones(2)], 1.0).device == elsewhere.device


def test_mixed_dtypes_keep_their_gradients():
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64)
    params = [torch.full((2,), 3, dtype=d, requires_grad=True) for d in dtypes]
    penalty = l2_penalty(params, 0.5)
    penalty.backward()
    assert penalty.item() == 45
    assert penalty.dtype == torch.float64
    assert all(p.grad.dtype == p.dtype and torch.equal(p.grad, p) for p in params)


def test_half_types_are_squared_and_summed_in_float32():
    assert l2_penalty(torch.full((2,), 300.0).half(), 1.0).item() == 180_000
    assert l2_penalty(torch.ones(4097).bfloat16(), 1.0).item() == 4097


def test_complex_parameters():
    params = torch.tensor([3 + 4j, 0j], requires_grad=True)
    penalty = l2_penalty(params, 1.0)
    penalty.backward()
    assert penalty.item() == 25
    assert torch.equal(params.grad, 2 * params)


def test_weight_decay_may_be_a_tensor_with_a_gradient():
    weight_decay = torch.tensor(0.5, requires_grad=True)
    l2_penalty(_module(), weight_decay).backward()
    assert weight_decay.grad.item() == SUM


def test_functional_transforms():
    params = {"kernel": KERNEL, "bias": BIAS}
    gradient = torch.func.grad(l2_penalty)(params, 0.5)
    assert torch.equal(gradient["kernel"], KERNEL)
    rates = torch.tensor([0.5, 1.0])
    penalties = torch.func.vmap(lambda rate: l2_penalty(params, rate))(rates)
    assert torch.equal(penalties, rates * SUM)


@pytest.mark.parametrize("empty", [nn.ReLU(), [], (), {}, torch.ones(0, 3)])
def test_nothing_to_sum_is_zero(empty):
    penalty = l2_penalty(empty, 0.5)
    assert penalty.item() == 0.0
    assert penalty.shape == ()
    assert penalty.dtype == torch.float32


def test_everything_masked_out_is_zero():
    assert l2_penalty(_module(), 0.5, mask=lambda name, tensor: False).item() == 0.0


def test_a_generator_that_was_walked_before_is_refused():
    parameters = _module().parameters()
    l2_penalty(parameters, 0.5)
    message = r"yields nothing\. Call module.parameters\(\) again"
    with pytest.raises(ValueError, match=message):
        l2_penalty(parameters, 0.5)


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (torch.arange(3), "a tensor of torch.int64"),
        (torch.tensor(True), "a tensor of torch.bool"),
        (0.5, "0.5"),
        (None, "None"),
    ],
)
def test_what_is_no_parameter_is_refused_unless_masked_out(leaf, found):
    params = {"weight": torch.ones(2), "other": leaf}
    with pytest.raises(
        TypeError, match=f"params at 'other' must be .* got {found}. Set it to False in `mask`"
    ):
        l2_penalty(params, 0.5)
    assert l2_penalty(params, 0.5, mask={"weight": True, "other": False}).item() == 1.0
    with pytest.raises(TypeError, match=f"params at '1' must be .* got {found}"):
        l2_penalty([torch.ones(2), leaf], 0.5)


@pytest.mark.parametrize("params", [0.5, None, "kernel"])
def test_params_of_another_kind_are_refused(params):
    with pytest.raises(TypeError, match=r"params must be a module, a tensor, .* got"):
        l2_penalty(params, 0.5)


@pytest.mark.parametrize("weight_decay", [-0.1, math.nan, math.inf])
def test_coefficient_out_of_range_is_refused(weight_decay):
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative; got"):
        l2_penalty(_module(), weight_decay)


@pytest.mark.parametrize(
    "weight_decay", [True, None, "0.1", 1j, torch.ones(2), torch.tensor(1j), torch.tensor(True)]
)
def test_coefficient_that_is_no_number_is_refused(weight_decay):
    with pytest.raises(TypeError, match="weight_decay must be a real number; got"):
        l2_penalty(_module(), weight_decay)


@pytest.mark.parametrize(
    ("params", "mask", "error", "message"),
    [
        (_module(), {"kernel": True}, ValueError, "mask must have .* got none for 'bias'"),
        (
            _module(),
            {"kernel": True, "bias": True, "x": True},
            ValueError,
            "got 'x', which is none of them",
        ),
        (_module(), {"kernel": True, "bias": 0.5}, TypeError, "mask at 'bias' must be a bool"),
        (_module(), lambda name, tensor: 1, TypeError, "mask at 'kernel' must be a bool"),
        (_module(), [True, False], ValueError, r"names; got a sequence\. Pass {'kernel': True}"),
        ([KERNEL, BIAS], [True], ValueError, "one bool for each of the 2 parameters; got 1"),
        ([KERNEL, BIAS], [True, 0.5], TypeError, "mask at '1' must be a bool; got 0.5"),
        ([KERNEL, BIAS], "yes", TypeError, "mask must be None, a dict"),
        ([KERNEL, BIAS], True, TypeError, "mask must be None, a dict"),
    ],
)
def test_mask_that_does_not_fit_is_refused(params, mask, error, message):
    with pytest.raises(error, match=message):
        l2_penalty(params, 0.5, mask=mask)


REFERENCE = {"kernel": KERNEL - 1, "bias": BIAS - 1}
# Each penalty of the module with coefficients of 0.5, as a function of parameters and mask alone.
PENALTIES = {
    "l1": (lambda p, mask=None: l1_penalty(p, 0.5, mask=mask), 0.5 * 8.5),
    "elastic": (
        lambda p, mask=None: elastic_net_penalty(p, 0.5, 0.5, mask=mask),
        0.5 * (SUM + 8.5),
    ),
    "l2_sp": (lambda p, mask=None: l2_sp_penalty(p, REFERENCE, 0.5, mask=mask), 0.5 * 5),
}
each_penalty = pytest.mark.parametrize(("penalty", "value"), PENALTIES.values(), ids=PENALTIES)


@each_penalty
def test_value_by_hand(penalty, value):
    result = penalty(_module())
    assert (result.item(), result.shape, result.dtype) == (value, (), torch.float32)


@each_penalty
def test_each_penalty_heeds_its_mask(penalty, value):
    module = _module()
    result = penalty(module, {"kernel": False, "bias": True})
    result.backward()
    assert 0 < result.item() < value
    assert module.kernel.grad is None
    assert module.bias.grad.abs().item() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_l1_has_slope_0_at_0(zero, dtype):
    params = torch.tensor([zero, 2, -2], dtype=dtype, requires_grad=True)
    l1_penalty(params, 0.5).backward()
    assert params.grad.tolist() == [0, 0.5, -0.5]


def test_half_types_of_the_other_penalties_are_summed_in_float32():
    ones, zeros = torch.ones(4097).bfloat16(), torch.zeros(4097).bfloat16()
    assert l1_penalty(ones, 1.0).item() == 4097
    assert l2_sp_penalty(ones, zeros, 1.0).item() == 4097
    assert l2_sp_penalty(ones[:1], torch.tensor([1 + 2**-9]), 1.0).item() == 2**-18


def test_no_gradient_reaches_the_reference():
    reference = {name: leaf.clone().requires_grad_() for name, leaf in REFERENCE.items()}
    l2_sp_penalty(_module(), reference, 0.5).backward()
    assert all(leaf.grad is None for leaf in reference.values())


def test_a_reference_goes_by_names():
    module = _module()
    assert l2_sp_penalty(module, copy.deepcopy(module), 0.5).item() == 0
    turned = dict(reversed(REFERENCE.items()))
    assert l2_sp_penalty(module, turned, 0.5).item() == 2.5
    assert l2_sp_penalty(module.parameters(), [KERNEL - 1, BIAS - 1], 0.5).item() == 2.5


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        (None, TypeError, "reference must be a module, a tensor"),
        ({"kernel": KERNEL}, ValueError, "reference must have .* got none for 'bias'"),
        ({**REFERENCE, "x": BIAS}, ValueError, "reference must have .* got 'x', which is none"),
        ([KERNEL, BIAS], ValueError, "reference must have .* got none for 'kernel'"),
        (
            {**REFERENCE, "kernel": BIAS},
            ValueError,
            r"reference at 'kernel' must have .* got \(1,\)",
        ),
        ({**REFERENCE, "kernel": None}, TypeError, "'kernel' must be a float .*; got None"),
        (
            {**REFERENCE, "kernel": KERNEL.int()},
            TypeError,
            "'kernel' must be a float .*; got a tensor of torch.int32",
        ),
        ({**REFERENCE, "kernel": KERNEL * 1j}, TypeError, "reference at 'kernel' must be real"),
    ],
)
def test_reference_that_does_not_fit_is_refused(reference, error, message):
    with pytest.raises(error, match=message):
        l2_sp_penalty(_module(), reference, 0.5)


def test_a_reference_masked_out_may_be_anything():
    reference = {**REFERENCE, "kernel": "not yet"}
    mask = {"kernel": False, "bias": True}
    assert l2_sp_penalty(_module(), reference, 0.5, mask=mask).item() == 0.5


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_coefficients_of_the_other_penalties_are_checked(value):
    with pytest.raises(ValueError, match="weight_decay must be finite"):
        l1_penalty(_module(), value)
    with pytest.raises(ValueError, match="weight_decay must be finite"):
        l2_sp_penalty(_module(), REFERENCE, value)
    with pytest.raises(ValueError, match="l1 must be finite"):
        elastic_net_penalty(_module(), value, 0.1)
    with pytest.raises(ValueError, match="l2 must be finite"):
        elastic_net_penalty(_module(), 0.1, value)
