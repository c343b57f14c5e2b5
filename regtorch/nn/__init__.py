"""Modules that hold the settings of the functions, and draw keys from a generator.

In training a module calls its function with the key of the call, `layer(x, key=key)`, or with a key
drawn from its `generator`; after `eval()` it drops nothing. A module cannot hold a key, which would
draw the same mask at every step. A number or a 0-d tensor may be assigned to its `rate` at any
step, such as the result of `linear_rate`. In JAX, call the functions of `regjax` with
`deterministic=not training`.
"""

from regshared.spellings import explain_names_of
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
    """List the public names, for `dir` and completion."""
    return __all__


for _name in __all__:
    explain_names_of(globals()[_name])
