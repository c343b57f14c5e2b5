"""Entry point of `python -m examples.sharded_lm`."""

from examples.sharded_lm.cli import main
from parity_tests.output import run

if __name__ == "__main__":
    run(main)
