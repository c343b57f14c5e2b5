"""No argument of any public function or layer takes a wrong value, or an error without its name."""

from __future__ import annotations

import pytest

from tests.sweep import calls, sweep


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "least"), [("regjax", 4500), ("regtorch", 2000)])
def test_every_wrong_value_is_refused_by_name(package, least):
    findings = list(sweep(package))
    assert len(findings) > least
    assert not [finding for finding in findings if finding.verdict != "fine"]


@pytest.mark.parametrize("package", ["regjax", "regtorch"])
def test_every_public_function_is_swept(package):
    """What is added to a package must be added to the sweep."""
    library = __import__(package)
    public = {name for name, value in vars(library).items() if callable(value) and name[0] != "_"}
    swept = {part for call in calls(package) for part in call.name.replace(".", " ").split()}
    classes = {"DecayTable", "DropoutProblem", "DropoutReport", "Prediction"}  # results
    assert public - swept == classes
