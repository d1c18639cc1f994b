"""The style of pictures: names beside lines, and where a figure was measured."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.text import Text

from fiddlehead.runs.curves import PALETTE, Chart, Curve
from fiddlehead.runs.picture import apart, figure, measured_on
from tests.runs.samples import HOSTILE


@pytest.mark.parametrize(
    "places", [[], [0.5], [0.5, 0.5, 0.5], [0.9, 0.1, 0.11], [0.1, 0.2, 0.3], [0.3, 0.29, 0.0, 0.31]]
)
def test_names_keep_their_order_do_not_touch_and_move_as_little_as_possible(places: list[float]):
    gap = 0.1
    found = apart(places, gap)
    for (before, now), (other, then) in itertools.combinations(zip(places, found, strict=True), 2):
        assert abs(now - then) >= gap - 1e-9 and (before - other) * (now - then) >= 0
    assert sum(found) == pytest.approx(sum(places))  # as least squares do
    if all(abs(a - b) >= gap - 1e-9 for a, b in itertools.combinations(places, 2)):
        assert found == pytest.approx(places)


def test_a_picture_names_its_curves_its_unit_and_its_machine():
    curves = [
        Curve("a", [1, 2, 3], [3.0, 2.0, 1.0]),
        Curve("b", [1, 2, 3], [3.0, 2.5, float("nan")]),
        Curve("c", [], []),
    ]
    made = figure([Chart("loss", "step", curves)], "somewhere")
    (axes,) = made.axes
    assert sorted(text.get_text().strip("\u200b") for text in axes.texts) == ["a", "b"]
    assert axes.get_title(loc="left") == "loss (nats)" and made.get_supxlabel() == "somewhere"
    assert axes.get_legend() is None and axes.lines[0].get_color() == PALETTE[0]
    # Where curves run together, those below are seen on both sides of those above.
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths[0] > widths[1] > widths[2] and widths[0] - widths[1] > 0.5


def test_names_of_curves_that_end_in_one_place_do_not_touch_and_long_ones_are_short(recwarn):
    names = ["a", "b", "name-" * 40, "c"]
    curves = [Curve(name, [1, 2, 4], [3.0, 2.0, 1.0]) for name in names] + [Curve("d", [1, 9], [3.0, 0.5])]
    made = figure([Chart("loss", "step", curves)])
    made.draw_without_rendering()
    texts = made.axes[0].texts
    boxes = [Text.get_window_extent(text) for text in texts]  # without the lines to them
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert max(len(text.get_text().strip("\u200b")) for text in texts) <= 32 and not recwarn.list


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({}, ""),
        ({"cpus": 8, "packages": {"torch": "2.13.0"}}, "CPU, 8 cores · torch 2.13.0"),
        ({"cpu": "EPYC", "cores": 2, "gpus": [], "date": "2026-01-02T03"}, "EPYC, 2 cores · 2026-01-02"),
        ({"versions": {"torch": "2.13"}, "packages": {"torch": "2.13+cu130"}}, "torch 2.13"),
        ({"gpus": ["H100, 81559 MiB, 550", "H100, 81559 MiB, 550"], "cpus": 8}, "2 x H100"),
        ({"gpus": [{"name": "L4"}]}, "L4"),
        ({"gpu": "A", "packages": {"flash4": {"version": "4.0"}, "flash3": {"version": "?"}}}, "A · flash-attn-4 4.0"),
        ({"gpus": 3, "packages": [HOSTILE], "versions": {"torch": {}}, "date": None, "cores": []}, ""),
    ],
)  # fmt: skip
def test_where_a_figure_was_measured_is_said_in_one_line(where: dict, said: str):
    assert measured_on(where) == said


def test_neighbouring_colours_are_told_apart_without_red_and_green():
    """As people see them who lack the cones for green (Viénot et al. 1999)."""
    seen = []
    for colour in PALETTE:
        linear = [(int(colour[at : at + 2], 16) / 255) ** 2.2 for at in (1, 3, 5)]
        mixed = 0.29275 * linear[0] + 0.70725 * linear[1]
        seen.append([mixed, mixed, -0.02234 * linear[0] + 0.02234 * linear[1] + linear[2]])
    for left, right in itertools.combinations(seen, 2):
        assert max(abs(a - b) for a, b in zip(left, right, strict=True)) > 0.1
