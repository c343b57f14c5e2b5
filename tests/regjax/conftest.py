"""What the tests of several frameworks' layers ask for."""

import jax
import pytest


@pytest.fixture
def leaning():
    """Theirs leans on promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield
