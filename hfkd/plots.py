"""What the figures have in common: sheet, colours, how networks are told apart."""

from __future__ import annotations

# Of Okabe and Ito: told apart by colour-blind readers, and by their brightness on paper.
BLUE, VERMILION, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
TERM_COLOURS = (BLACK, BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
TERM_STYLES = ("-", "--", "-.", ":")
# Told apart by brightness and line style, too.
ROLE_STYLES = {"student": {"color": BLUE, "linestyle": "-"}, "teacher": {"color": BLACK, "linestyle": "--"}}


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
