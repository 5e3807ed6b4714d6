"""What the figures have in common: sheet, colours, how networks are told apart."""

from __future__ import annotations

from ..curves import BLACK, BLUE

# Told apart by brightness and line style, too.
STYLES = {"student": {"color": BLUE, "linestyle": "-"}, "teacher": {"color": BLACK, "linestyle": "--"}}


def new_sheet(width: float, height: float):
    """An empty matplotlib Figure, inches at 200 dpi; it needs no display."""
    # Not pyplot, which looks for a display and keeps every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes) -> None:
    """A light grid and no frame above and to the right."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
