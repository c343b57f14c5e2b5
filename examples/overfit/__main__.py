"""Entry point of `python -m examples.overfit`."""

from examples.overfit.cli import main
from parity_tests.output import run

if __name__ == "__main__":
    run(main)
