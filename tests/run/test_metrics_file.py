"""The newest values of a run's metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from fiddlehead.run import metrics_file
from fiddlehead.run.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_the_newest_value_of_each_metric_is_shown(run: RunDirectory) -> None:
    assert run.last_metrics() == {}
    run.metrics.write_text("step,loss,val_loss\n1,3.0,\n2,2.0,\n2,,2.5\n3,1.0,\n")
    assert run.last_metrics() == {"step": "3", "loss": "1.0", "val_loss": "2.5"}


def test_only_the_end_of_a_large_table_is_read(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file, "MAX_METRICS_READ", 1000)
    rows = "".join(f"{step},{step / 7},\n" for step in range(2, 1000))
    run.metrics.write_text(f"step,loss,val_loss\n1,3.0,2.5\n{rows}1000,0.")  # the last row is being written
    assert run.last_metrics() == {"step": "999", "loss": str(999 / 7)}
    assert run.last_step() == 999


@pytest.mark.parametrize("text", ["", "step,loss\n", "step,loss\n1,2"])
def test_a_table_without_a_whole_row_is_before_the_first_step(run: RunDirectory, text: str) -> None:
    run.metrics.write_text(text)
    assert run.last_metrics() == {} and run.last_step() == 0
