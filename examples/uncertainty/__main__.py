"""Entry point of `python -m examples.uncertainty`."""

from examples.uncertainty.cli import main
from parity_tests.output import run

if __name__ == "__main__":
    run(main)
