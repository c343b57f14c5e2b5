"""The arguments and the parameters that each optimizer rejects."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim
from regjax.optim._records import RECORDS
from tests.regjax.optimizers import MAKE, assert_close, first_update

NAMES = [name.lower() for name in RECORDS]
DECAYING = [name for name in NAMES if name != "rprop"]
# Numbers from 0 on, and the fix that the message gives.
NUMBERS = [
    *((name, "learning_rate", r"Pass maximize=True to ascend\.") for name in DECAYING),
    *((name, "weight_decay", r"Pass 0\.0 for none\.") for name in DECAYING),
    ("sgd", "momentum", r"Pass 0\.0 for none\."),
    ("asgd", "lambd", r"Pass 0\.0 for none\."),
    ("asgd", "alpha", r"Pass 0\.0 for steps of one size\."),
    ("asgd", "t0", r"Pass 0 to average from the first step on\."),
    ("rprop", "learning_rate", r"Pass 0\.01, the first step size\."),
    *((name, "eps", r"Pass 1e-8\.") for name in ("adam", "adamw", "nadam", "radam", "adamax")),
    ("nadam", "momentum_decay", r"Pass 4e-3\."),
    ("adagrad", "lr_decay", r"Pass 0\.0 for none\."),
    ("adagrad", "initial_accumulator_value", r"Pass 0\.0\."),
    ("adagrad", "eps", r"Pass 1e-10\."),
    ("adadelta", "rho", r"Pass 0\.9\."),
    ("adadelta", "eps", r"Pass 1e-6\."),
    ("rmsprop", "alpha", r"Pass 0\.99\."),
    ("rmsprop", "eps", r"Pass 1e-8\."),
    ("rmsprop", "momentum", r"Pass 0\.0 for none\."),
    ("muon", "momentum", r"Pass 0\.95\."),
    ("muon", "eps", r"Pass 1e-7\."),
]


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, np.float32(-1), jnp.float32(-1), -1])
@pytest.mark.parametrize(("name", "argument", "fix"), NUMBERS)
def test_a_number_out_of_range_is_refused(name, argument, fix, value):
    with pytest.raises(ValueError, match=rf"^{argument} must .*; got {value}\. {fix}$"):
        getattr(optim, name)(**{argument: value})


@pytest.mark.parametrize("value", [True, None, "0.1", jnp.ones(2), 1j])
@pytest.mark.parametrize(
    ("name", "argument"),
    [*(case[:2] for case in NUMBERS), ("adafactor", "beta2_decay"), ("adafactor", "d")],
)
def test_what_is_no_number_is_refused(name, argument, value):
    with pytest.raises(TypeError, match=f"^{argument} must be a real number"):
        getattr(optim, name)(**{argument: value})


BETAS = [
    ({"betas": (1.0, 0.999)}, r"betas\[0\] must lie in \[0, 1\); got 1\.0"),
    ({"betas": (math.nan, 0.999)}, r"betas\[0\] must lie in \[0, 1\); got nan"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\] must lie in \[0, 1\); got -0\.1"),
    ({"betas": (0.9, 1.0)}, r"betas\[1\] must lie in \[0, 1\); got 1\.0"),
]
MEAN = [1.0, 1.5, jnp.float32(1)]
REFUSED = {
    **dict.fromkeys(("adam", "adamw", "nadam", "radam", "adamax"), BETAS),
    "sgd": [
        ({"nesterov": True}, r"^nesterov must .* momentum=0\.0 and dampening=0\.0\."),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            r"^nesterov must .* momentum=0\.9 and dampening=0\.1\.",
        ),
    ],
    "rprop": [
        ({"etas": (0.0, 1.2)}, r"0 < etas\[0\] < 1 < etas\[1\]; got \(0\.0"),
        ({"etas": (0.5, 1.0)}, r"0 < etas\[0\] < 1 < etas\[1\]; got \(0\.5"),
        ({"etas": (1.0, 1.2)}, r"etas\[0\] must lie in \[0, 1\); got 1\.0"),
        ({"etas": (0.5, math.inf)}, r"etas\[1\] must be .*; got inf\. Pass \(0\.5"),
        ({"step_sizes": (0.1, math.inf)}, r"step_sizes\[1\] must be .*; got inf"),
        ({"step_sizes": (-1.0, 1.0)}, r"step_sizes\[0\] must be .*; got -1\.0"),
        ({"step_sizes": (2.0, 1.0)}, r"step_sizes must be .*; got \(2\.0, 1\.0\)"),
    ],
    "adadelta": [({"rho": x}, rf"rho must lie in \[0, 1\); got {x}\. ") for x in MEAN],
    "rmsprop": [({"alpha": x}, rf"alpha must lie in \[0, 1\); got {x}\. ") for x in MEAN],
    "adafactor": [
        ({"beta2_decay": 0.8}, r"^beta2_decay must lie in \[-inf, 0\]; got 0\.8\. Pass -0\.8"),
        ({"beta2_decay": math.nan}, "^beta2_decay must lie in .*; got nan"),
        ({"eps": (-1e-8, 1e-3)}, r"eps\[0\] must be .*; got -1e-08\. Pass None"),
        ({"eps": (math.nan, 1e-3)}, r"eps\[0\] must be .*; got nan"),
        ({"eps": (None, -1e-3)}, r"eps\[1\] must be .*; got -0\.001\. Pass 1e-3"),
        ({"eps": (None, math.nan)}, r"eps\[1\] must be .*; got nan"),
        ({"d": 0.5}, r"^d must lie in \[1, inf\]; got 0\.5\. Pass 1\.0"),
        ({"d": jnp.float32(-1)}, r"^d must lie in .*; got -1\.0"),
        ({"d": math.nan}, "^d must lie in .*; got nan"),
    ],
    "muon": [
        ({"ns_steps": -1}, "^ns_steps must be at least 0; got -1"),
        ({"ns_steps": 100}, "^ns_steps must be at most 99; got 100"),
        ({"ns_coefficients": (1.0, 2.0)}, r"must be three numbers; got \(1\.0, 2\.0\)"),
        ({"ns_coefficients": (1.0, 2.0, math.nan)}, r"must be finite; got .*nan"),
        ({"adjust_lr_fn": "adamw"}, r"adjust_lr_fn must be None, .*; got 'adamw'"),
        ({"adjust_lr_fn": ["original"]}, r"adjust_lr_fn must be None, .*; got \['original'\]"),
        ({"ns_dtype": "no dtype"}, "ns_dtype must be a float dtype; got 'no dtype'"),
        ({"ns_dtype": None}, "ns_dtype must be a float dtype; got None"),
        ({"ns_dtype": "int32"}, "ns_dtype must be a float dtype; got 'int32'"),
    ],
}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
def test_an_argument_out_of_range_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(optim, name)(**arguments)


FLAGS = {
    "maximize": [m for m in MAKE if m not in ("muon", "rprop")],
    "nesterov": ["momentum"],
    "amsgrad": ["adamw"],
    "decoupled_weight_decay": ["nadam", "radam"],
    "centered": [],
    "transposed": ["muon"],
}


@pytest.mark.parametrize("value", ["False", "no", 1, None])
@pytest.mark.parametrize(("flag", "names"), FLAGS.items(), ids=FLAGS)
def test_a_flag_must_be_a_bool(flag, names, value):
    makes = [MAKE[name] for name in names]
    if flag == "centered":
        makes = [optim.rmsprop]
    if flag == "maximize":
        makes.append(optim.rprop)
    for make in makes:
        with pytest.raises(TypeError, match=f"^{flag} must be True or False; got {value!r}.$"):
            make(**{flag: value})


PAIRS = {
    "betas": (optim.adam, optim.adamw, optim.nadam, optim.radam, optim.adamax),
    "etas": (optim.rprop,),
    "step_sizes": (optim.rprop,),
    "eps": (optim.adafactor,),
    "ns_coefficients": (optim.muon,),
}


@pytest.mark.parametrize("value", [0.9, None, (0.9,), "ab", jnp.ones(5)])
@pytest.mark.parametrize(("name", "makes"), PAIRS.items(), ids=PAIRS)
def test_a_pair_must_be_one(name, makes, value):
    for make in makes:
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be t.* numbers; got "):
            make(**{name: value})


def test_complex_parameters():
    params = {"spectrum": jnp.array([[1 + 2j, -1j, 3.0]])}
    gradient = {"spectrum": jnp.array([[0.5 - 1j, 2 + 1j, 0.5j]])}
    for name in [name for name in NAMES if name not in ("sgd", "asgd")]:
        optimizer = getattr(optim, name)(0.5)
        fix = "partition" if name in ("adafactor", "muon") else "split_real_and_imaginary"
        owner = f"(?i:{name}|adam and its variants)"
        message = rf"^params must be real for {owner}; got complex64 at 'spectrum'\. .*{fix}"
        with pytest.raises(TypeError, match=message):
            optimizer.init(params)
        if fix == "partition":
            continue
        with jax.numpy_dtype_promotion("standard"):
            split = optax.contrib.split_real_and_imaginary(optimizer)
            update = first_update(split, params, gradient)["spectrum"]
        for part in (jnp.real, jnp.imag):
            trees = (jax.tree.map(part, tree) for tree in (params, gradient))
            assert_close(part(update), first_update(optimizer, *trees)["spectrum"], atol=1e-7)
