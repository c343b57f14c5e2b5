"""The recursions of torch's optimizers in NumPy, and the cases of the comparisons.

Each recursion follows torch's documentation, one parameter and one step at a time. None of these
files imports JAX or PyTorch.
"""

from parity_tests.optimizers import _adafactor, _adam, _descent, _rms
from parity_tests.optimizers._adafactor import adafactor as adafactor
from parity_tests.optimizers._adam import adam as adam
from parity_tests.optimizers._adam import adamax as adamax
from parity_tests.optimizers._adam import adamw as adamw
from parity_tests.optimizers._adam import nadam as nadam
from parity_tests.optimizers._adam import radam as radam
from parity_tests.optimizers._descent import asgd as asgd
from parity_tests.optimizers._descent import rprop as rprop
from parity_tests.optimizers._descent import sgd as sgd
from parity_tests.optimizers._muon import CASES_2D as CASES_2D
from parity_tests.optimizers._muon import MATRICES as MATRICES
from parity_tests.optimizers._muon import muon as muon
from parity_tests.optimizers._rms import adadelta as adadelta
from parity_tests.optimizers._rms import adagrad as adagrad
from parity_tests.optimizers._rms import rmsprop as rmsprop

CASES = (*_descent.CASES, *_adam.CASES, *_rms.CASES, *_adafactor.CASES)
