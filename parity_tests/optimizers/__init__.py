"""What the optimizers of torch must do: a recursion of each in NumPy, and the cases to compare in.

A recursion is written as torch documents it, one parameter and one step at a time; none of these
files imports JAX or PyTorch.
"""

from parity_tests.optimizers import adam as _adam
from parity_tests.optimizers import descent as _descent
from parity_tests.optimizers.adam import adam as adam
from parity_tests.optimizers.adam import adamw as adamw
from parity_tests.optimizers.descent import sgd as sgd

CASES = (*_descent.CASES, *_adam.CASES)
