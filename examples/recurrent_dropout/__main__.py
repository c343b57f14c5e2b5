"""Print the dropout masks of the state of an LSTM: one for all timesteps, in Flax and in PyTorch.

    python -m examples.recurrent_dropout

`examples/recurrent_dropout/cells.py` has the recipe for each framework.
"""

from __future__ import annotations

from collections.abc import Sequence

from parity_tests import output


def main(argv: Sequence[str] | None = None) -> None:
    """Print the masks of a sequence, with a line for each timestep."""
    output.Parser("python -m examples.recurrent_dropout", __doc__).parse_args(argv)
    from rich.console import Console

    from examples.recurrent_dropout import cells

    console = Console()
    for name, mask in cells.masks().items():
        console.print(name)
        for step, row in enumerate(mask[:, 0]):
            console.print(f"  t={step}  {''.join('█' if kept else '·' for kept in row)}")


if __name__ == "__main__":
    output.run(main)
