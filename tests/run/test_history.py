"""A run's metrics as columns and curves, against sums worked out by hand or with numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.history import History, read, smoothed, thinned
from fiddlehead.training.loggers import MetricsCSV


def written(folder: Path, text: str) -> History:
    (folder / "metrics.csv").write_text(text)
    return RunDirectory(folder).history()


def test_what_the_logger_wrote_is_read_back_exactly(tmp_path: Path):
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 0.1 + 0.2, "tokens": 100}, 1)
    logger.log_metrics({"val_loss": 2.5}, 1)
    logger.log_metrics({"loss": math.inf, "mine": 1e-300}, 3)
    history = read(tmp_path / "metrics.csv")
    assert history.steps == [1, 1, 3]
    assert history.points("loss") == ([1, 3], [0.1 + 0.2, math.inf])
    assert history.points("val_loss") == ([1], [2.5])
    assert history.last("mine") == 1e-300 and history.last("grad_norm") is None and not history.spoiled


@pytest.mark.parametrize(
    ("text", "points", "spoiled"),
    [
        ("", [], ""),
        ("step,loss\n", [], ""),
        ("step,loss\n1,2\n2,3", [(1, 2.0)], ""),  # cut short by a crash: the 3 may have been 3.5
        ("step,loss\n1,2\nx,3\n3,4\n", [(1, 2.0), (3, 4.0)], "step='x'"),
        ("step,loss\n1,what\n2,4\n", [(2, 4.0)], "loss='what'"),
        ("step,loss\n1\n2,4,5\n", [(2, 4.0)], ""),
        ('step,loss\n1,"2\n2,4\n', [(1, 2.0), (2, 4.0)], ""),
        ("step,loss\n1.5,3\n2,4\n\0,5\n", [(2, 4.0)], "step='1.5'"),
        ("loss\n3\n", [], "step=''"),
    ],
)
def test_what_is_damaged_is_left_out_and_said(tmp_path: Path, text: str, points: list, spoiled: str):
    history = written(tmp_path, text)
    assert list(zip(*history.points("loss"), strict=True)) == points
    assert spoiled in "".join(history.spoiled) and bool(history.spoiled) == bool(spoiled)


def test_tokens_and_hours_of_a_validation_lie_between_those_of_its_neighbours(tmp_path: Path):
    text = "step,loss,val_loss,tokens,seconds_per_step\n10,5,,1000,36\n20,4,,2000,72\n30,,3.5,,\n40,3,,4000,18\n"
    history = written(tmp_path, text)
    assert history.curve("val_loss", "tokens") == ([3000.0], [3.5])
    hours = np.cumsum([10 * 36, 10 * 72, 20 * 18]) / 3600
    assert np.allclose(history.curve("loss", "hours")[0], hours, rtol=1e-12)
    assert np.allclose(history.curve("val_loss", "hours")[0], (hours[1] + hours[2]) / 2, rtol=1e-12)


def test_an_axis_that_was_not_logged_is_refused(tmp_path: Path):
    history = written(tmp_path, "step,loss\n1,2\n")
    with pytest.raises(
        ConfigError, match=r"--x='hours': the run has logged no seconds_per_step.*allowed: step, tokens"
    ):
        history.curve("loss", "hours")


@pytest.mark.parametrize("weight", [0.0, 0.6, 0.99])
def test_smoothing_is_the_weighted_mean_of_the_values_so_far(weight: float):
    values = np.random.default_rng(1).normal(size=40)
    expected = []
    for end in range(1, 41):
        weights = weight ** np.arange(end, dtype=np.float64)[::-1]
        expected.append(np.sum(weights * values[:end]) / np.sum(weights))
    assert np.allclose(smoothed(values.tolist(), weight), expected, rtol=1e-12)


def test_a_value_that_is_not_finite_stays_and_spoils_no_other():
    assert smoothed([1.0, math.inf, 1.0], 0.9) == [1.0, math.inf, 1.0]


def test_a_thinned_curve_keeps_its_peaks_its_gaps_and_its_ends():
    ys = [0.0] * 50_000
    ys[12_345], ys[30_000], ys[40_000] = 9.0, -9.0, math.nan
    xs, kept = thinned([float(x) for x in range(50_000)], ys, 1000)
    assert len(xs) < 1200 and (xs[0], xs[-1]) == (0.0, 49_999.0) and xs == sorted(xs)
    points = dict(zip(xs, kept, strict=True))
    assert points[12_345.0] == 9 and points[30_000.0] == -9 and math.isnan(points[40_000.0])


def test_the_best_value_is_said_only_where_one_is_better(tmp_path: Path):
    history = written(tmp_path, "step,loss,tokens_per_s,lr\n1,nan,10,1\n2,3,30,2\n3,4,20,3\n")
    assert history.best("loss") == (2, 3.0) and history.best("tokens_per_s") == (2, 30.0)
    assert history.best("lr") is None and history.best("nothing") is None


def test_a_frame_needs_pandas_and_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    history = written(tmp_path, "step,loss,val_loss\n1,2,\n1,,3\n")
    assert history.steps == [1, 1]
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"needs pandas: pip install 'fiddlehead\[pandas\]'"):
        RunDirectory(tmp_path).frame()


def test_a_frame_has_a_row_for_each_logged_step(tmp_path: Path):
    pandas = pytest.importorskip("pandas", reason="pandas is an optional extra")
    history = written(tmp_path, "step,loss,val_loss\n1,2,\n1,,3\n")
    assert history.last("val_loss") == 3
    made = RunDirectory(tmp_path).frame()
    expected = pandas.DataFrame({"step": [1, 1], "loss": [2.0, np.nan], "val_loss": [np.nan, 3.0]})
    pandas.testing.assert_frame_equal(made, expected)
