"""Fixtures that tests of the layers of several frameworks use."""

import jax
import pytest


@pytest.fixture
def leaning():
    """Allow promotion, which the layers of the frameworks require."""
    with jax.numpy_dtype_promotion("standard"):
        yield
