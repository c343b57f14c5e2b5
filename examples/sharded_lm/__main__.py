"""Entry point of `python -m examples.sharded_lm`."""

from examples.sharded_lm.cli import main
from examples.sharded_lm.launch import exit_at_once
from parity_tests.output import run

if __name__ == "__main__":
    try:
        run(main)
    except SystemExit as end:
        # The threads of an interrupted checkpoint would wait for ever, or print a traceback.
        if isinstance(end.code, int) and end.code:
            exit_at_once(end.code)
        raise
