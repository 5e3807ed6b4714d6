"""Shared look of all figures: sheet, colours, markers, ticks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Colours of Okabe and Ito: colour-blind readers tell them apart, and on paper their brightness does.
BLUE, VERMILION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
PURPLE, ORANGE, SKY_BLUE = "#CC79A7", "#E69F00", "#56B4E9"
TERM_COLOURS = (BLACK, BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE)
CLASS_COLOURS = (BLUE, VERMILION, GREEN, BLACK, PURPLE, ORANGE, SKY_BLUE)
TERM_STYLES = ("-", "--", "-.", ":")
# Brightness and line style tell the roles apart, too.
ROLE_STYLES = {"student": {"color": BLUE, "linestyle": "-"}, "teacher": {"color": BLACK, "linestyle": "--"}}
MARKED_POINTS = 30  # the points of a curve are marked up to this number


def new_sheet(width: float, height: float) -> Figure:
    """Return an empty matplotlib figure of a size in inches, at 200 dpi; it needs no display."""
    # Not pyplot, which looks for a display and keeps every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    """Draw a light grid behind the data, and no frame above and to the right."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def marker(points: int) -> str:
    """Return the marker of a curve: a dot, or none on a curve of many points."""
    return "o" if points <= MARKED_POINTS else ""


def mark_epochs(axis: Axis, whole: bool) -> None:
    """Place the ticks of an axis of epochs, only at whole ones if `whole`."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=whole))


def mark_decades(axis: Axis) -> None:
    """Place the ticks of a logarithmic axis at 1, 2 and 5 of each decade, written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
