"""Modules over the functions: the settings live in the module, the work in the function."""

from regtorch.nn._alpha import AlphaDropout, FeatureAlphaDropout
from regtorch.nn._blocks import DropBlock1d, DropBlock2d, DropBlock3d
from regtorch.nn._depth import DropPath
from regtorch.nn._dropout import Dropout
from regtorch.nn._embedding import EmbeddingDropout
from regtorch.nn._features import Dropout1d, Dropout2d, Dropout3d
from regtorch.nn._noise import GaussianDropout, GaussianNoise
from regtorch.nn._recurrent import VariationalDropout
from regtorch.nn._weights import DropConnect

__all__ = [
    "AlphaDropout",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnect",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "VariationalDropout",
]


def __dir__() -> list[str]:
    """List what is public, for `dir` and completion."""
    return __all__
