"""Entry point of `python -m examples.overfit`."""

import sys

from examples.overfit.cli import main

if __name__ == "__main__":
    sys.exit(main())
