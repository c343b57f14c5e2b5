"""The style of all pictures, and the drawing functions that several of them share.

The settings are in `pictures.mplstyle`. Matplotlib is imported inside functions only, since the
programs run without it and skip their pictures.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

import numpy as np

from parity_tests.output import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

STYLE = Path(__file__).with_name("pictures.mplstyle")
# Inches. README and the site show a picture about 800 pixels wide, so 8 points are 11 pixels high.
WIDTH = 8.0
_CAPTION_CHARACTERS = 128

P = ParamSpec("P")
T = TypeVar("T")


class Palette(NamedTuple):
    """The colors of the style: those of lines in their order, of text, frames and background."""

    blue: str
    vermilion: str
    green: str
    orange: str
    purple: str
    sky: str
    ink: str
    gray: str
    paper: str


@functools.cache
def palette() -> Palette:
    """Return the colors of the style."""
    import matplotlib as mpl

    settings = mpl.rc_params_from_file(STYLE, use_default_template=False)
    lines = settings["axes.prop_cycle"].by_key()["color"]
    others = ("text.color", "axes.edgecolor", "axes.facecolor")
    return Palette._make([*lines, *map(settings.__getitem__, others)])


def lighter(color: str) -> tuple[float, float, float]:
    """Return the mean of a color and white."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(color)
    return (1 + red) / 2, (1 + green) / 2, (1 + blue) / 2


@contextmanager
def style() -> Iterator[None]:
    """Apply the style, and no setting of the user's, inside a `with` statement."""
    from matplotlib.style import context

    with context([STYLE], after_reset=True):
        yield


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that draws a figure, so that it draws in the style."""

    @functools.wraps(draw)
    def draw_styled(*args: P.args, **kwargs: P.kwargs) -> T:
        with style():
            return draw(*args, **kwargs)

    return draw_styled


def save(figure: Figure, path: Path) -> None:
    """Save a figure atomically, in the format of the suffix, or as PNG.

    Raises:
        OSError: The file cannot be written.
    """
    with style(), replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png")


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    with style():
        figure.savefig(file, format="png")
    return file.getvalue()


def caption(figure: Figure, *sentences: str) -> None:
    """Write sentences below all panels, in small type."""
    text = textwrap.fill(" ".join(sentences), _CAPTION_CHARACTERS)
    figure.supxlabel(text, x=0.01, ha="left", fontsize="x-small", linespacing=1.4)


def legend_on_top(figure: Figure, handles: Sequence[Line2D], columns: int | None = None) -> None:
    """Draw a legend above all panels; a handle has its own label."""
    figure.legend(
        handles=list(handles),
        loc="outside upper center",
        ncols=columns or len(handles),
        columnspacing=1.4,
    )


def without_zeros(values: Sequence[float]) -> np.ndarray:
    """Return the values with NaN for each 0, which a logarithmic axis cannot show.

    Example:
        >>> without_zeros([0.0, 0.5, 0.0]).tolist()
        [nan, 0.5, nan]
    """
    heights = np.asarray(values, float)
    return np.where(heights == 0, np.nan, heights)


def gaps(values: Sequence[float]) -> str:
    """Return a note about the values that a logarithmic axis cannot show, or an empty string.

    Example:
        >>> gaps([0.0, 1e-16, 0.0]), gaps([0.0, 0.0]), gaps([1e-16, float("inf")])
        ('0 at 2 of 3 steps', '0 at every step', 'infinite at 1 of 2 steps')
    """
    counts = {"0": np.equal(values, 0).sum(), "infinite": np.isinf(values).sum()}
    return ", ".join(
        f"{word} at every step"
        if count == len(values)
        else f"{word} at {count} of {len(values)} steps"
        for word, count in counts.items()
        if count
    )


def plot_differences(
    axes: Axes, steps: Sequence[int], values: Sequence[float], **look: object
) -> None:
    """Plot differences on a logarithmic axis, with a gap at each step where they are 0."""
    # A point between two gaps needs a marker: no line ends there. The types of `look` are unknown.
    axes.plot(steps, without_zeros(values), marker="o", markersize=3, **look)  # pyright: ignore[reportArgumentType]
    axes.set_yscale("log")
