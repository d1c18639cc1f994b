"""A profile has the chosen steps, and no others."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fiddlehead import tasks
from fiddlehead.errors import ConfigError
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import Log
from fiddlehead.training.callbacks.profile import _listing, covered, parse_steps
from tests.training.conftest import KillAfter, Killed, rows

Pretrain = Callable[..., RunDirectory]
Parts = Callable[..., dict[str, Any]]


def events(file: Path) -> list[dict[str, Any]]:
    """What a timeline has: each with its name, and begin and duration in microseconds."""
    return [event for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] if event.get("dur")]


def inside(found: list[dict[str, Any]], outer: str, inner: str) -> int:
    """How many of the events called `inner` lie within the one called `outer`."""
    (frame,) = [event for event in found if event["name"] == outer and event["cat"] == "user_annotation"]
    end = frame["ts"] + frame["dur"]
    return sum(1 for e in found if e["name"] == inner and frame["ts"] <= e["ts"] and e["ts"] + e["dur"] <= end + 1e-3)


@pytest.mark.parametrize(("micro_batches", "batch"), [(1, 4), (2, 2)])
def test_the_timeline_has_the_steps_and_what_was_done_in_them(
    pretrain: Pretrain, capsys: pytest.CaptureFixture[str], micro_batches: int, batch: int
):
    run = pretrain(max_steps=6, profile="3:4", val_check_interval=3, micro_batch_size=batch)
    assert sorted(path.name for path in (run.path / "profile").iterdir()) == [
        "rank0-steps-3-4.json.gz",
        "rank0-steps-3-4.txt",
    ]
    found = events(run.path / "profile" / "rank0-steps-3-4.json.gz")
    assert {event["name"] for event in found if re.fullmatch(r"step \d+", event["name"])} == {"step 3", "step 4"}
    for step in ("step 3", "step 4"):
        assert inside(found, step, "Optimizer.step#ClippingAdamW.step") == 1
        assert inside(found, step, "forward") == inside(found, step, "backward") == micro_batches
        losses = inside(found, step, "_LinearCrossEntropy"), inside(found, step, "_LinearCrossEntropyBackward")
        assert losses == (micro_batches, micro_batches)
    listing = (run.path / "profile" / "rank0-steps-3-4.txt").read_text()
    assert listing.startswith("steps 3 to 4\n") and "aten::mm" in listing
    said = capsys.readouterr().out
    assert "open it at https://ui.perfetto.dev" in said and str(run.path / "profile" / "rank0-steps-3-4.txt") in said


def test_shapes_are_recorded_if_asked_for(pretrain: Pretrain):
    for name, shapes in (("with", True), ("without", False)):
        run = pretrain(name=name, max_steps=2, profile="2:2", profile_shapes=shapes)
        found = events(run.path / "profile" / "rank0-steps-2-2.json.gz")
        assert any("Input Dims" in event.get("args", {}) for event in found) == shapes


def test_it_changes_no_loss_and_its_files_are_no_part_of_a_step(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch):
    export = torch.profiler.profile.export_chrome_trace

    def slowly(self: torch.profiler.profile, path: str) -> None:
        time.sleep(4)
        export(self, path)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", slowly)
    profiled = pretrain(name="with", profile="2:3", max_steps=5, val_samples=0)
    assert rows(profiled, "loss", "grad_norm") == rows(pretrain(max_steps=5, val_samples=0), "loss", "grad_norm")
    assert all(float(seconds) < 3.5 for (seconds,) in rows(profiled, "seconds_per_step")[2:])


def test_a_resumed_run_profiles_the_rest_of_the_steps(
    pretrain: Pretrain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(Killed):
        pretrain(profile="5:7", max_steps=8, every_n_steps=5, callbacks=[KillAfter(6)])
    folder = tmp_path / "runs" / "run" / "profile"
    assert {path.name for path in folder.iterdir()} == {"rank0-steps-5-6.json.gz", "rank0-steps-5-6.txt"}
    pretrain(profile="5:7", max_steps=8, every_n_steps=5)
    names = {event["name"] for event in events(folder / "rank0-steps-6-7.json.gz")}
    assert {"step 6", "step 7"} <= names and "step 5" not in names
    pretrain(profile="5:7", max_steps=10)
    assert "steps 5 to 7 are done already" in capsys.readouterr().out
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12:10", "ends before it begins; did you mean 10:12?"),
        ("0:3", "steps are counted from 1"),
        ("ten", "must be FIRST:LAST, the numbers of two steps, such as 10:12"),
        ("10", "must be FIRST:LAST, the numbers of two steps, such as 10:10 for one step"),
        ("10:12:2", "must be FIRST:LAST"),
        ("-1:3", "must be FIRST:LAST"),
        ("", "must be FIRST:LAST"),
    ],
)
def test_bad_steps_are_refused(text: str, said: str):
    with pytest.raises(ConfigError, match=re.escape(f"profile={text!r}: {said}")):
        Log(profile=text)


def test_steps_that_the_run_does_not_have_are_refused(parts: Parts):
    assert parse_steps("10:12") == (10, 12)
    with pytest.raises(ConfigError, match=r"log\.profile='10:13': the run ends with step trainer\.max_steps=12"):
        tasks.pretrain(**parts(profile="10:13"))


def test_time_that_is_covered_twice_counts_once():
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5


class Events:
    """Stands for a profiler that has seen kernels; times are in microseconds."""

    def __init__(self, *kernels: tuple[float, float, str]) -> None:
        self.kernels = kernels

    def events(self) -> list[Any]:
        range_ = {"device_type": SimpleNamespace(name="CUDA"), "is_user_annotation": True}
        spans = [SimpleNamespace(**range_, name="forward", time_range=SimpleNamespace(start=0, end=10_000))]
        return spans + [
            SimpleNamespace(
                device_type=SimpleNamespace(name="CUDA"),
                is_user_annotation=False,
                name=name,
                time_range=SimpleNamespace(start=start, end=end),
            )
            for start, end, name in self.kernels
        ]

    def key_averages(self) -> Any:
        return SimpleNamespace(table=lambda sort_by, **_: f"sorted by {sort_by}")


def test_the_listing_says_how_busy_a_gpu_was():
    one: Any = Events((1000, 3000, "gemm"), (2000, 4000, "gemm"), (5000, 6000, "softmax"))
    assert _listing(one, "step 1").splitlines() == [
        "step 1",
        "from the first kernel to the last 5.0 ms; the GPU is busy for 80.0%",
        "sorted by self_device_time_total",
    ]
    many: Any = Events((1000, 3000, "gemm"), (2000, 4000, "ncclDevKernel_AllReduce"), (5000, 6000, "softmax"))
    assert "communication that is not hidden behind computing: 20.0%" in _listing(many, "step 1")
