"""The one place that sets how figures look: a colour-blind-safe palette on an opaque, light ground.

Figures keep their own ground, so that they read the same on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

if TYPE_CHECKING:
    from moe_course.specs import ModelSpec

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
_OWNERS = (SKY, ORANGE, GREEN, PURPLE, BLUE, VERMILION)
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


@contextmanager
def figure(
    width: float = 7.2, height: float = 4.0, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """`with figure() as (fig, ax):` axes in the course's style; sizes in inches, options as of plt.subplots."""
    with mpl.rc_context(_STYLE):
        yield plt.subplots(figsize=(width, height), **options)
        interactive = mpl.is_interactive()
    # The first figure of a notebook loads its backend, which turns interactive mode on; rc_context would turn it off
    # again, and no later figure would show.
    mpl.interactive(interactive)


def stored_and_used(ax: Axes, specs: Sequence[ModelSpec]) -> None:
    """One row a model: what it stores (total) and what one token uses (active), on a logarithmic axis."""
    specs = sorted(specs, key=lambda spec: spec.total_params())
    ring: Any = {"facecolors": "white", "linewidths": 2}
    for row, spec in enumerate(specs):
        total, active = spec.total_params() / 1e9, spec.active_params() / 1e9
        color = SPARSE if spec.moe else DENSE
        ax.plot([active, total], [row, row], color="#B8B8B8", linewidth=2.5, zorder=1)
        ax.scatter([total], [row], s=62, zorder=2, edgecolors=color, **ring)
        ax.scatter([active], [row], color=color, s=34, marker="D", zorder=3)
        label = f"{total / active:.1f}x" if spec.moe else "dense"
        ax.text(total * 1.18, row, label, va="center", fontsize=9)
    ax.scatter([], [], s=62, edgecolors=INK, label="stored (total)", **ring)
    ax.scatter([], [], color=INK, s=34, marker="D", label="used by one token (active)")
    ax.set_yticks(range(len(specs)), [spec.name for spec in specs])
    ax.set_xscale("log")
    ax.set_xlim(right=2500)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("parameters (billions)")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower right")


def owners(ax: Axes, programs: Any, outside: Any = None) -> None:
    """One cell an element of a matrix or vector, in the colour and with the number of the program that stored it.

    programs: whole numbers; -1, left white, where nobody stored anything. outside: True for cells that stand for no
    element, which are hatched: lanes that a mask switches off.
    """
    programs = np.atleast_2d(np.asarray(programs))
    rows, columns = programs.shape
    picture = np.ones((rows, columns, 3))
    for program in np.unique(programs[programs >= 0]):
        color = mpl.colors.to_rgb(_OWNERS[int(program) % len(_OWNERS)])
        # Half way to white, so that black numbers read on each of them.
        picture[programs == program] = (1 + np.array(color)) / 2
    ax.imshow(picture, aspect="auto", interpolation="nearest")
    edges = [
        ((c + 0.5, r - 0.5), (c + 0.5, r + 0.5))
        for r, c in np.argwhere(programs[:, 1:] != programs[:, :-1])
    ] + [
        ((c - 0.5, r + 0.5), (c + 0.5, r + 0.5))
        for r, c in np.argwhere(programs[1:] != programs[:-1])
    ]
    ax.add_collection(LineCollection(edges, colors=INK, linewidths=0.8))
    for row in range(rows):
        starts = np.flatnonzero(np.diff(programs[row], prepend=-2))
        for start, end in zip(starts, [*starts[1:], columns], strict=True):
            program = programs[row, start]
            same = (programs[:, start:end] == program).all(axis=1)
            if program < 0 or (row and same[row - 1]):
                continue  # nobody's, or the rest of a tile that has its number
            height = np.argmin([*same[row:], False])
            where = ((start + end - 1) / 2, row + (height - 1) / 2)
            ax.text(*where, str(program), ha="center", va="center", fontsize=9)
    for r, c in np.argwhere([] if outside is None else np.atleast_2d(outside)):
        ax.add_patch(
            Rectangle((c - 0.5, r - 0.5), 1, 1, fc="white", ec="#8A8A8A", hatch="////")
        )
    ax.grid(visible=False)


# Where a model's name stands beside its point, in typographic points: set by hand so that no two names meet.
_NAME_OFFSETS = {
    "mistral-7b": (8, -7),
    "qwen3-8b": (8, 5),
    "llama-3.1-70b": (8, -8),
    "olmoe-1b-7b": (8, 0),
    "qwen1.5-moe-a2.7b": (8, -9),
    "deepseekmoe-16b": (-8, 8),
    "gpt-oss-20b": (8, -3),
    "qwen3-30b-a3b": (8, 5),
    "mixtral-8x7b": (8, -5),
    "llama-4-scout": (-8, 5),
    "gpt-oss-120b": (-8, 4),
    "dbrx": (-8, 5),
    "mixtral-8x22b": (8, -6),
    "qwen3-235b-a22b": (-8, 6),
    "grok-1": (8, -6),
    "llama-4-maverick": (-8, 4),
    "deepseek-v3": (8, -4),
    "kimi-k2": (-8, 6),
    "glam-64b-64e": (-8, 10),
}


def total_against_active(ax: Axes, specs: Sequence[ModelSpec]) -> None:
    """Total against active parameters, both logarithmic, with lines of equal ratio."""
    for spec in specs:
        total, active = spec.total_params() / 1e9, spec.active_params() / 1e9
        color, marker = (SPARSE, "D") if spec.moe else (DENSE, "o")
        ax.scatter([active], [total], color=color, marker=marker, s=44, zorder=3)
        if spec.name in _NAME_OFFSETS:
            dx, dy = _NAME_OFFSETS[spec.name]
            ax.annotate(
                spec.name,
                (active, total),
                (dx, dy),
                textcoords="offset points",
                fontsize=8.5,
                ha="left" if dx >= 0 else "right",
                va="center",
            )
    low, high = 0.9, 150.0
    for ratio in (1, 3, 10, 30):
        ax.plot(
            [low, high],
            [ratio * low, ratio * high],
            color="#9A9A9A",
            linewidth=0.9,
            linestyle=":",
            zorder=1,
        )
        ax.text(
            high * 1.05,
            ratio * high,
            "dense" if ratio == 1 else f"{ratio} : 1",
            fontsize=9,
            va="center",
        )
    ax.scatter([], [], color=SPARSE, marker="D", label="sparse (MoE)")
    ax.scatter([], [], color=DENSE, marker="o", label="dense")
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(4, 4000))
    ax.set(
        xlabel="active parameters per token (billions)",
        ylabel="total parameters (billions)",
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.legend(loc="lower right")


def layer_map(ax: Axes, specs: Sequence[ModelSpec]) -> None:
    """One row a model, one cell a layer: dense or sparse."""
    for row, spec in enumerate(reversed(specs)):
        sparse = set(spec.moe_layers)
        for layer in range(spec.layers):
            color = SPARSE if layer in sparse else DENSE
            ax.barh(
                row,
                0.86,
                left=layer + 0.07,
                height=0.62,
                color=color,
                hatch=None if layer in sparse else "///",
                edgecolor="white",
                linewidth=0,
            )
    ax.set_yticks(range(len(specs)), [spec.name for spec in reversed(specs)])
    ax.set_xlabel("layer, counted from 0")
    ax.grid(visible=False)
    ax.barh([0], [0], color=SPARSE, label="sparse (experts)")
    ax.barh([0], [0], color=DENSE, hatch="///", edgecolor="white", label="dense FFN")
    ax.legend(loc="lower right")


def load_over_time(ax: Axes, shares: Sequence[Sequence[float]], every: int) -> Any:
    """One row an expert, one column a while: its share of the tokens in multiples of an even one, white at 1.

    shares: by while and expert, summing to 1 over the experts. every: steps in a while.
    Returns the image, for a colour bar.
    """
    experts = len(shares[0])
    image = ax.imshow(
        [[share[e] * experts for share in shares] for e in range(experts)],
        aspect="auto",
        cmap="PuOr_r",
        norm=mpl.colors.TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=experts),
        extent=(0, every * len(shares), experts - 0.5, -0.5),
        interpolation="nearest",
    )
    ax.set(xlabel="training step", ylabel="expert")
    ax.set_yticks(range(experts))
    ax.grid(visible=False)
    return image


def load_scrubber(
    shares: Sequence[Sequence[Sequence[float]]], every: int, title: str, name: str
) -> str:
    """HTML: bars of the load of each layer's experts, and a slider over training. Without JavaScript, the last state.

    shares: by while, layer and expert. name: an id that no other element of the page has.
    """
    layers, experts = len(shares[0]), len(shares[0][0])
    wide, high, gap = 22, 120, 40  # a bar's place, the height of the tallest, in pixels
    panel = experts * wide + gap
    most = max(share for row in shares for layer in row for share in layer)
    last = shares[-1]
    parts = []
    for layer in range(layers):
        left = layer * panel
        even = 18 + high * (1 - 1 / experts / most)
        parts.append(
            f'<text x="{left}" y="12" font-size="12">layer {layer}</text>'
            f'<line x1="{left}" x2="{left + experts * wide}" y1="{even:.1f}" y2="{even:.1f}" '
            f'stroke="{INK}" stroke-dasharray="3 3"/>'
        )
        for e in range(experts):
            tall = high * last[layer][e] / most
            parts.append(
                f'<rect class="bar" x="{left + e * wide + 2}" width="{wide - 4}" '
                f'y="{18 + high - tall:.1f}" height="{tall:.1f}" fill="{SPARSE}"/>'
                f'<text x="{left + e * wide + wide / 2}" y="{high + 32}" font-size="10" '
                f'text-anchor="middle">{e}</text>'
            )
    heights = [
        [round(high * share / most, 1) for layer in row for share in layer]
        for row in shares
    ]
    total = len(shares)
    width = layers * panel - gap
    return f"""<div class="load-scrubber" id="{name}"
 style="background:#fff;color:{INK};padding:.8rem;border:1px solid #8884;border-radius:6px;overflow-x:auto">
<p style="margin:0 0 .4rem;color:{INK}"><strong>{title}</strong></p>
<svg width="{width}" height="{high + 40}" viewBox="0 0 {width} {high + 40}" role="img"
 aria-label="Bars: the share of tokens of each expert in each layer; dashed: an even share." fill="{INK}">
{"".join(parts)}</svg>
<label style="display:block;color:{INK}">After <output>{every * total}</output> steps<br>
<input type="range" min="1" max="{total}" value="{total}" style="width:min(100%,{width}px)" disabled></label>
<script>(() => {{
const box = document.getElementById("{name}"), heights = {heights};
const bars = box.querySelectorAll(".bar"), slider = box.querySelector("input");
const show = () => {{
  const now = heights[slider.value - 1];
  bars.forEach((bar, i) => {{
    bar.setAttribute("height", now[i]);
    bar.setAttribute("y", {18 + high} - now[i]);
  }});
  box.querySelector("output").textContent = slider.value * {every};
}};
slider.disabled = false;
slider.addEventListener("input", show);
}})();</script></div>"""
