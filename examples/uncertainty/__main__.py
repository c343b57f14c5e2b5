"""Entry point of `python -m examples.uncertainty`."""

import sys

from examples.uncertainty.cli import main

if __name__ == "__main__":
    sys.exit(main())
