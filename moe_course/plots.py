"""The one place that sets how figures look: a colour-blind-safe palette on an opaque, light ground.

Figures keep their own ground, so that they read the same on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette (Color Universal Design, 2008), without its yellow, which fades on a light ground.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, INK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#2B2B2B",
)
DENSE, SPARSE = BLUE, VERMILION  # the two sides of the course, in every figure

_STYLE: Any = {
    "figure.facecolor": "#FFFFFF",
    "axes.facecolor": "#FFFFFF",
    "savefig.facecolor": "#FFFFFF",
    "savefig.bbox": "tight",
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same on every machine
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8A8A8A",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "axes.prop_cycle": cycler(color=[BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, INK]),
}


def use_style() -> None:
    """Set the course's style for every later figure of this process."""
    mpl.rcParams.update(_STYLE)


@contextmanager
def figure(width: float = 7.2, height: float = 4.0, **options: Any) -> Iterator[tuple[Figure, Axes]]:
    """`with figure() as (fig, ax):` one set of axes in the course's style; sizes in inches."""
    with mpl.rc_context(_STYLE):
        fig, ax = plt.subplots(figsize=(width, height), **options)
        yield fig, ax
