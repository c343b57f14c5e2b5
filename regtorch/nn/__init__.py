"""Modules over the functions: the settings live in the module, the work in the function."""

from regtorch.nn._alpha import AlphaDropout as AlphaDropout
from regtorch.nn._alpha import FeatureAlphaDropout as FeatureAlphaDropout
from regtorch.nn._blocks import DropBlock1d as DropBlock1d
from regtorch.nn._blocks import DropBlock2d as DropBlock2d
from regtorch.nn._blocks import DropBlock3d as DropBlock3d
from regtorch.nn._depth import DropPath as DropPath
from regtorch.nn._dropout import Dropout as Dropout
from regtorch.nn._embedding import EmbeddingDropout as EmbeddingDropout
from regtorch.nn._features import Dropout1d as Dropout1d
from regtorch.nn._features import Dropout2d as Dropout2d
from regtorch.nn._features import Dropout3d as Dropout3d
from regtorch.nn._noise import GaussianDropout as GaussianDropout
from regtorch.nn._noise import GaussianNoise as GaussianNoise
from regtorch.nn._recurrent import VariationalDropout as VariationalDropout
from regtorch.nn._weights import DropConnect as DropConnect
