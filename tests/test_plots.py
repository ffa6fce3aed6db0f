"""The course's figure style: readable on a light and on a dark page, and without full colour vision."""

from __future__ import annotations

import io
import json
import re
from itertools import combinations

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.core.pylabtools import print_figure
from matplotlib.colors import to_rgb

from moe_course import plots
from moe_course.specs import zoo

PALETTE = {
    name: getattr(plots, name)
    for name in ("BLUE", "ORANGE", "GREEN", "VERMILION", "PURPLE", "SKY", "INK")
}
# Complete dichromacy on linear RGB: Machado, Oliveira and Fernandes, IEEE TVCG 15 (2009), severity 1.0.
VISION = {
    "full": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


def _linear(color):
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lab(linear):
    xyz = (
        np.array(
            [
                [0.4124, 0.3576, 0.1805],
                [0.2126, 0.7152, 0.0722],
                [0.0193, 0.1192, 0.9505],
            ]
        )
        @ linear
    )
    x, y, z = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _distance(first, second, vision):
    a, b = (_lab(np.clip(vision @ _linear(c), 1e-4, 1)) for c in (first, second))
    return np.linalg.norm(a - b)


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart(vision):
    distances = {
        (a, b): _distance(PALETTE[a], PALETTE[b], VISION[vision])
        for a, b in combinations(PALETTE, 2)
    }
    closest = min(distances, key=distances.get)
    assert distances[closest] > 15, (closest, distances[closest])
    assert _distance(plots.DENSE, plots.SPARSE, VISION[vision]) > 60


@pytest.mark.parametrize("side", ["DENSE", "SPARSE", "INK"])
def test_lines_stand_out_from_the_ground(side):
    luminance = [0.2126, 0.7152, 0.0722] @ _linear(getattr(plots, side))
    assert 1.05 / (luminance + 0.05) >= 3


def test_figures_are_opaque_and_white_whatever_the_page_is():
    with plt.style.context("dark_background"), plots.figure() as (fig, ax):
        ax.plot([0, 1], [1, 0])
    # As a notebook does it: when the cell is over, and the style's context with it.
    pixels = plt.imread(io.BytesIO(print_figure(fig)))
    assert pixels.shape[2] == 3 or (pixels[..., 3] == 1).all()
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1], :3]
    assert (corners == 1).all()
    assert (pixels[..., :3] == 1).all(axis=-1).mean() > 0.5
    plt.close(fig)


def test_the_style_ends_with_the_figure():
    before = dict(mpl.rcParams)
    with plots.figure(width=5, height=3) as (fig, _):
        assert mpl.rcParams["axes.titlelocation"] == "left"
        assert tuple(fig.get_size_inches()) == (5, 3)
    plt.close(fig)
    assert dict(mpl.rcParams) == before
    with pytest.raises(RuntimeError), plots.figure():
        raise RuntimeError
    plt.close("all")
    assert dict(mpl.rcParams) == before


def test_stored_and_used_puts_each_count_at_its_place():
    specs = [zoo["mixtral-8x7b"], zoo["deepseek-v3"], zoo["llama-3.1-8b"]]
    with plots.figure() as (fig, ax):
        plots.stored_and_used(ax, specs)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["llama-3.1-8b", "mixtral-8x7b", "deepseek-v3"]
    points = sorted(
        tuple(offset) for dots in ax.collections for offset in dots.get_offsets()
    )
    expected = [
        (count / 1e9, row)
        for row, n in enumerate(names)
        for count in (zoo[n].total_params(), zoo[n].active_params())
    ]
    np.testing.assert_allclose(points, sorted(expected))
    assert {text.get_text() for text in ax.texts} == {"dense", "3.6x", "17.9x"}
    plt.close(fig)


def test_layer_map_colours_the_sparse_layers():
    spec = zoo["deepseek-v3"]
    with plots.figure() as (fig, ax):
        plots.layer_map(ax, [spec])
    colours = {
        round(bar.get_x() - 0.07): bar.get_facecolor()
        for bar in ax.patches
        if bar.get_width() > 0
    }
    assert {
        layer for layer, c in colours.items() if c[:3] == to_rgb(plots.SPARSE)
    } == set(spec.moe_layers)
    assert {layer for layer, c in colours.items() if c[:3] == to_rgb(plots.DENSE)} == {
        0,
        1,
        2,
    }
    plt.close(fig)


def test_names_beside_the_points_do_not_meet():
    with plots.figure() as (fig, ax):
        plots.total_against_active(ax, list(zoo.values()))
        fig.draw_without_rendering()
        boxes = {
            text.get_text(): text.get_window_extent()
            for text in ax.texts
            if text.get_text() in zoo
        }
        frame = fig.bbox
    assert len(boxes) > 5
    for (a, box_a), (b, box_b) in combinations(boxes.items(), 2):
        assert not box_a.overlaps(box_b), (a, b)
    for name, box in boxes.items():
        assert frame.contains(box.x0, box.y0), name
        assert frame.contains(box.x1, box.y1), name
    plt.close(fig)


def test_load_over_time_is_white_at_an_even_share():
    with plots.figure() as (_, ax):
        image = plots.load_over_time(ax, [[0.5, 0.5], [0.25, 0.75], [0.0, 1.0]], 20)
        assert image.get_array().tolist() == [[1.0, 0.5, 0.0], [1.0, 1.5, 2.0]]
        assert image.norm(1.0) == 0.5
        assert ax.get_xlim() == (0, 60)


def test_owners_numbers_each_tile_once_and_hatches_what_is_no_element():
    programs = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, -1, 3], [2, 2, 0, 3]]
    outside = np.zeros((4, 4), dtype=bool)
    outside[2, 2] = True
    with plots.figure() as (fig, ax):
        plots.owners(ax, programs, outside)
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers == {
        (0.5, 0.5): "0",
        (2.5, 0.5): "1",
        (0.5, 2.5): "2",
        (3, 2.5): "3",
        (2, 3): "0",
    }
    picture = ax.images[0].get_array()
    assert (picture[2, 2] == 1).all()  # nobody's
    assert (picture[0, 0] == picture[3, 2]).all()
    assert len({tuple(picture[r, c]) for r, c in ((0, 0), (0, 2), (2, 0), (2, 3))}) == 4
    assert [patch.get_xy() for patch in ax.patches] == [(1.5, 1.5)]
    plt.close(fig)


def test_owners_takes_a_vector():
    with plots.figure() as (fig, ax):
        plots.owners(ax, [0, 0, 1])
    assert [text.get_text() for text in ax.texts] == ["0", "1"]
    plt.close(fig)


def test_a_scrubber_shows_the_last_state_and_holds_all():
    shares = [
        [[0.5, 0.5], [0.9, 0.1]],
        [[0.2, 0.8], [0.0, 1.0]],
        [[0.25, 0.75], [1.0, 0.0]],
    ]
    html = plots.load_scrubber(shares, 10, "Loads", "one")
    heights = json.loads(re.search(r"heights = (\[\[.*?\]\]);", html)[1])
    assert heights == [[60, 60, 108, 12], [24, 96, 0, 120], [30, 90, 120, 0]]
    bars = [float(h) for h in re.findall(r'class="bar".*? height="([\d.]+)"', html)]
    assert bars == heights[-1]
    assert "<output>30</output>" in html
    assert "disabled" in html  # until the script runs
