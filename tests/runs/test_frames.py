"""Metrics of several runs as pandas frames."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiddlehead import runs
from fiddlehead.errors import ConfigError
from fiddlehead.runs.frames import records, summary_row
from tests.runs.samples import made


def test_a_pattern_finds_runs_and_passes_over_other_folders(working_directory: Path):
    made(working_directory, "a"), made(working_directory, "b")
    (working_directory / "runs" / "other").mkdir()
    assert [record.name for record in records("runs/*")] == ["a", "b"]
    assert [record.name for record in records(["b", "runs/a"])] == ["b", "a"]
    with pytest.raises(ConfigError, match="no run directory has such a path"):
        records("elsewhere/*")


def test_a_row_of_the_summary_has_results_and_hyper_parameters(working_directory: Path):
    made(working_directory, "a", lr=0.002)
    (record,) = records("a")
    row = summary_row(record)
    assert (row["run"], row["step"], row["optim.lr"], row["lr"]) == ("a", 40, 0.002, 0.002)
    assert row["best.loss"] == row["loss"] == record.history.last("loss")


def test_frames_have_the_rows_of_all_runs(working_directory: Path):
    pandas = pytest.importorskip("pandas", reason="pandas is an optional extra")
    made(working_directory, "a", lr=0.002), made(working_directory, "b", steps=0)
    made(working_directory, "c").metrics.write_text("step,mine\n5,1.5\n")
    frame = runs.frame("runs/*")
    assert list(frame["run"]) == ["a"] * 42 + ["c"] and frame["step"].dtype == "int64"
    assert frame.loc[frame["run"] == "c", "mine"].item() == 1.5
    summary = runs.summary("runs/*").set_index("run")
    assert summary.loc["a", "optim.lr"] == 0.002 and pandas.isna(summary.loc["b", "loss"])
    assert runs.frame([]).empty
