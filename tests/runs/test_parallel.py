"""The picture of a sweep."""

from __future__ import annotations

import math

import pytest

from fiddlehead.runs.parallel import coordinate, figure, svg
from tests.runs.samples import HOSTILE


@pytest.mark.parametrize(
    ("values", "places"),
    [
        (["1", "2", "5"], [0, 0.25, 1]),
        (["1e-4", "1e-3", "1e-2"], [0, 0.5, 1]),  # a factor of ten and more: logarithmic
        (["0", "50", "100"], [0, 0.5, 1]),  # which zero cannot be
        (["b", "a", "b"], [0.25, 0.75, 0.25]),
        (["1", "none", "1"], [0.25, 0.75, 0.25]),
        ([3.0, 3.0], [0.5, 0.5]),
        ([1.0, None, math.nan, math.inf, 2.0], [0, None, None, None, 1]),
        ([None, None], [None, None]),
        ([math.nan], [0.5]),
        (["1_0", "20"], [0, 1]),
    ],
)
def test_values_are_placed_by_their_size_or_their_order(values: list, places: list):
    found = coordinate("x", values).places
    assert found == pytest.approx(places)


def test_the_best_runs_are_named_and_all_are_drawn():
    axes = [coordinate(HOSTILE, ["1", "2", HOSTILE]), coordinate("loss", [1.0, 2.0, None])]
    names = [HOSTILE, "second", "third"]
    text = svg(axes, names, 2)
    assert text.count("<polyline") == 3 and text.count("<li>") == 2 and "<script" not in text
    (drawn,) = figure(axes, names, 2).axes
    assert [len(line.get_xdata()) for line in drawn.lines[:3]] == [1, 2, 2]  # the best is drawn last
