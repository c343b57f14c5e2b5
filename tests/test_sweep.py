"""Every wrong value of an argument raises an error that begins with the argument."""

from __future__ import annotations

import re

import pytest

import regjax.interop
import regjax.optim
import regtorch.optim
from tests.sweep.calls import FORM, calls, sweep


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "least"), [("regjax", 6200), ("regtorch", 2800)])
def test_every_wrong_value_is_rejected_by_name(package, least):
    findings = list(sweep(package))
    assert len(findings) > least
    assert not [finding for finding in findings if finding.verdict != "fine"]


@pytest.mark.parametrize(
    ("message", "is_named"),
    [
        ("rate must lie in [0, 1]; got 2.", True),
        ("betas[0] must be in [0, 1)", True),
        ("mask at the root must be a bool", True),
        ("scale at 'dense/kernel' must be a real number", True),
        ("inputs: x must be an array", True),
        ("names and params must match; got", True),
        ("the rate must lie in [0, 1]", False),
        ("rates must lie in [0, 1]", False),
        ("stddev must be the rate", False),
        ("'NoneType' object has no attribute 'rate'", False),
    ],
)
def test_an_error_begins_with_its_argument(message, is_named):
    subject = r"rate|betas|mask|scale|inputs|params"
    assert bool(re.match(FORM.format(argument=f"({subject})"), message)) == is_named


@pytest.mark.parametrize(
    "library",
    [regjax, regtorch, regjax.optim, regjax.interop, regtorch.optim],
    ids=lambda library: library.__name__,
)
def test_every_public_function_is_swept(library):
    """A new public name must be added to the sweep."""
    package = library.__name__.partition(".")[0]
    public = {name for name in library.__all__ if callable(getattr(library, name))}
    swept = {part for call in calls(package) for part in re.split("[ .]", call.name)}
    states = {"ScaleByNadamState", "ScheduledMomentumState"}
    results = {"DecayHandle", "DecayTable", "DropoutProblem", "DropoutReport", "MaskRelation"}
    results |= {"MaskCertificate", "Prediction"}
    elsewhere = {"certify_masks"}  # starts processes; see test_certificate.py
    assert public - swept <= states | results | elsewhere
    assert public - states - results
