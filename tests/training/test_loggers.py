"""The usual tools can read the logs."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, Logger

from fiddlehead.errors import ConfigError
from fiddlehead.launch import plan
from fiddlehead.launch.fitting import missing_trackers
from fiddlehead.launch.local import local
from fiddlehead.launch.slurm import slurm
from fiddlehead.recipe.plain import plain_recipe
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.metric_names import column, grouped_name
from fiddlehead.runs.wandb_folder import read_wandb
from fiddlehead.training import Log
from fiddlehead.training.metrics_csv import MetricsCSV
from tests.training.conftest import KillAfter, Killed, rows

Pretrain = Callable[..., RunDirectory]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


# -- metrics.csv


@given(st.lists(st.floats(), min_size=1, max_size=5))
def test_floats_read_back_as_the_same_floats(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("csv") / "metrics.csv"
    logger = MetricsCSV(path)
    for step, value in enumerate(values, 1):
        logger.log_metrics({"loss": value}, step)
    for value, row in zip(values, table(path), strict=True):
        assert float(row["loss"]) == value or math.isnan(value)


def test_a_new_metric_gets_a_column_and_the_epoch_none(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"loss": 2.0, "epoch": 0}, 1)
    logger.log_metrics({"loss": 1.5, "mfu": 0.5}, 2)
    logger.log_metrics({"val_loss": 1.0}, 2)
    assert table(logger.path) == [
        {"step": "1", "loss": "2.0"},
        {"step": "2", "loss": "1.5", "mfu": "0.5"},
        {"step": "2", "val_loss": "1.0"},
    ]
    assert logger.path.read_text().splitlines()[0].endswith(",mfu")
    logger.log_metrics({"mfu": 0.6}, 3)
    assert MetricsCSV(logger.path, 2).path.read_text().splitlines()[0].endswith(",mfu")


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    for step in range(1, 12):
        logger.log_metrics({"loss": float(step)}, step)
    kept = logger.path.read_text().splitlines()[:10]
    MetricsCSV(logger.path, 9)
    assert logger.path.read_text().splitlines() == kept
    MetricsCSV(logger.path)  # a run that starts again
    assert table(logger.path) == []


def test_a_row_that_a_crash_cut_short_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    for step in (11, 12):
        logger.log_metrics({"loss": 0.125, "tokens_per_s": 1234.5}, step)
    whole = logger.path.read_text()
    start = whole.rindex("12,")
    for end in range(start, len(whole)):
        logger.path.write_text(whole[:end])
        MetricsCSV(logger.path, 12)
        assert [row["step"] for row in table(logger.path)] == ["11"], whole[start:end]
    logger.path.write_text(whole)
    MetricsCSV(logger.path, 12)
    assert [row["step"] for row in table(logger.path)] == ["11", "12"]


def test_every_logged_step_has_its_row(pretrain: Pretrain) -> None:
    run = pretrain(log_every_n_steps=5, val_check_interval=6)
    assert rows(run, "step") == [("1",), ("5",), ("6",), ("10",), ("12",), ("12",)]
    assert [row for row in rows(run, "tokens") if row[0]] == [(str(64 * step),) for step in (1, 5, 10, 12)]
    assert run.last_metrics()["step"] == "12" and run.last_metrics()["val_loss"]
    assert all(float(value) > 0 for value, *_ in rows(run, "tokens_per_s") if value)


# -- TensorBoard


def test_tensorboard_that_is_not_installed_is_named_with_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fiddlehead.training.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fiddlehead\[tensorboard\]'$"):
        Log(tensorboard=True).open(RunDirectory(tmp_path), 0)


def test_a_tracker_that_is_not_installed_is_missing_before_the_start(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fiddlehead.training.loggers.find_spec", lambda name: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    recipe = tiny_test()
    recipe.log.dir, recipe.log.tensorboard, recipe.log.mlflow = str(tmp_path), True, True
    trackers = {"tensorboard": "tensorboard", "mlflow": "MLflow"}
    said = {f"log.{field}=True: needs {name}: pip install 'fiddlehead[{field}]'" for field, name in trackers.items()}
    for executor in (None, local()):
        made = plan(recipe, executor)
        assert said == set(made.missing)
        with pytest.raises(ConfigError, match="needs MLflow"):
            made.submit(name="a")
    for executor in (local(setup_lines=". venv/bin/activate"), slurm(container="image.sqsh")):
        assert missing_trackers(recipe, executor) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_lists_the_recipe_as_hyper_parameters(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plugin = importlib.import_module("tensorboard.plugins.hparams.plugin_data_pb2")
    run = RunDirectory(tmp_path)
    run.recipe.write_text(RECIPE)
    for resumed in (0, 4):
        (logger,) = Log(tensorboard=True).open(run, resumed)[1:]
        logger.log_metrics({"train/loss": 2.0}, resumed + 1)
        logger.finalize("success")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    listed = plugin.HParamsPluginData.FromString(data).session_start_info.hparams
    assert {name: value.number_value or value.string_value for name, value in listed.items()} == {
        "model.hidden_size": 64.0,
        "resume": "auto",
        "sizes": "[1, 2]",
    }
    data = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    found = plugin.HParamsPluginData.FromString(data).experiment.metric_infos
    assert {info.name.tag for info in found} == {"train/loss", "val/loss"}
    assert events.Tags()["scalars"] == ["train/loss"]  # no point that the run does not have


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_reads_what_the_csv_file_has(pretrain: Pretrain) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(Killed):
        pretrain(tensorboard=True, callbacks=[KillAfter(10)])
    run = pretrain(tensorboard=True)
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    names = {
        "loss": "train/loss",
        "grad_norm": "train/grad_norm",
        "val_loss": "val/loss",
        "tokens_per_s": "perf/tokens_per_s",
        "seconds_optimizer": "perf/seconds_optimizer",
    }
    for name, tag in names.items():
        expected = [(int(step), float(value)) for step, value in rows(run, "step", name) if value]
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected], name
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])  # stored as float32


# -- any Lightning logger


class Remembering(Logger):
    """Keeps what it is told."""

    name, version = "remembering", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.parameters: Any = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.parameters = params


def test_a_logger_of_lightning_gets_the_recipe_and_every_row(pretrain: Pretrain, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "run")
    run.path.mkdir(parents=True)
    run.recipe.write_text(RECIPE)
    own, theirs = Remembering(), CSVLogger(tmp_path / "theirs", name="", version="")
    pretrain(max_steps=4, loggers=[own, theirs])
    assert own.parameters == PLAIN
    found = [(str(step), repr(row["train/loss"])) for step, row in own.rows if "train/loss" in row]
    assert found == [row for row in rows(run, "step", "loss") if row[1]]
    assert [row for row in own.rows if "val/loss" in row[1]][-1][0] == 4
    assert {"train/lr", "perf/tokens_per_s"} <= own.rows[0][1].keys()
    assert {"train/loss", "val/loss"} <= table(tmp_path / "theirs" / "metrics.csv")[-1].keys() | own.rows[0][1].keys()
    assert "hidden_size: 64" in (tmp_path / "theirs" / "hparams.yaml").read_text()


def test_what_is_not_a_logger_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^loggers\[1\]='str': is not a Lightning logger"):
        Log(loggers=[Remembering(), "mlflow"])  # type: ignore[list-item]


@given(st.text())
def test_a_column_has_one_name_in_a_group(name: str) -> None:
    assert column(grouped_name(name)) == name or "/" in name


# -- W&B

RECIPE = """\
!Partial:fiddlehead.tasks.pretrain
model: !Config:fiddlehead.training.LanguageModel
  hidden_size: 64
resume: auto
sizes: !tuple [1, 2]
"""
TOLD = {"wandb_entity": "moss", "wandb_group": "ferns", "wandb_tags": ["a", "b"], "wandb_notes": "the first"}
PLAIN = {"model": {"hidden_size": 64}, "resume": "auto", "sizes": [1, 2]}


def test_a_recipe_is_shown_as_plain_values(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    assert plain_recipe(file) == {}
    file.write_text(RECIPE)
    assert plain_recipe(file) == PLAIN


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has never heard of W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    (tmp_path / "home").mkdir()


def wandb_records(folder: Path) -> list[Any]:
    """The records of an offline run: protocol buffers in LevelDB's log format, after seven bytes of W&B's own."""
    Record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    (file,) = folder.glob("*.wandb")
    content, at, records, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no header fits before the end of the block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_wandb_without_a_key_records_offline_and_asks_nothing(
    pretrain: Pretrain, no_key: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    run = RunDirectory(tmp_path / "runs" / "run")
    run.path.mkdir(parents=True)
    run.recipe.write_text(RECIPE)
    ids = []
    folder = run.path
    for attempt in (1, 2):
        with pytest.raises(Killed) if attempt == 1 else nullcontext():
            pretrain(wandb=True, callbacks=[KillAfter(6)] if attempt == 1 else [], **TOLD)
        wandb.finish()
        wandb.teardown()  # waits for its service, which may still be writing
        printed = capsys.readouterr()
        assert "wandb: " not in printed.out + printed.err  # what W&B prints of its own
        said = [line for line in printed.out.splitlines() if "recording offline" in line]
        assert said == [f"W&B has no API key here: recording offline. Later: fiddlehead runs sync {run.name}"]
        folder = max((run.path / "wandb").glob("offline-run-*"))  # the name has the time
        ids.append(folder.name.rpartition("-")[2])
    assert ids[0] == ids[1] == run.wandb_id

    (told,) = [record.run for record in wandb_records(folder) if record.HasField("run")]
    assert (told.entity, told.run_group, list(told.tags), told.notes) == ("moss", "ferns", ["a", "b"], "the first")
    assert {"loss", "val_loss", "tokens_per_s"} <= set(read_wandb(folder).history.columns)
    logged: dict[str, list[float]] = {}
    config: dict[str, Any] = {}
    for record in wandb_records(folder):
        # The configuration comes with the run, or right after it.
        updates = record.run.config.update if record.HasField("run") else record.config.update
        config |= {item.key: json.loads(item.value_json) for item in updates}
        for item in record.history.item:
            logged.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert {name: config.get(name) for name in PLAIN} == PLAIN
    expected = [float(value) for step, value in rows(run, "step", "loss") if value and int(step) > 4]
    assert logged["train/loss"] == pytest.approx(expected)


def test_runs_of_one_process_are_runs_of_their_own_in_wandb(pretrain: Pretrain, no_key: None, tmp_path: Path) -> None:
    """As in a notebook; the second one's metrics were written into the first one's run."""
    wandb = pytest.importorskip("wandb")
    runs = [RunDirectory(tmp_path / "runs" / name) for name in "ab"]
    for run in runs:
        run.path.mkdir(parents=True)
        run.recipe.write_text(RECIPE)
        pretrain(wandb=True, name=run.name, max_steps=4)
        assert wandb.run is None
    wandb.teardown()  # waits for its service, which may still be writing
    for run in runs:
        (folder,) = (run.path / "wandb").glob("offline-run-*")
        assert folder.name.endswith(run.wandb_id)
        assert max(read_wandb(folder).history.steps) == 4


def test_a_run_of_wandb_s_that_a_user_has_begun_is_not_written_into(
    pretrain: Pretrain, no_key: None, tmp_path: Path
) -> None:
    wandb = pytest.importorskip("wandb")
    path = tmp_path / "runs" / "run"
    path.mkdir(parents=True)
    RunDirectory(path).recipe.write_text(RECIPE)
    wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    try:
        with pytest.raises(ConfigError, match=r"^log\.wandb=True: a W&B run is in progress in this process"):
            pretrain(wandb=True)
    finally:
        wandb.finish()
        wandb.teardown()


def test_the_wandb_id_is_the_run_s(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b")
    for run in (first, second):
        run.path.mkdir()
    assert first.wandb_id == first.wandb_id != second.wandb_id


@pytest.mark.parametrize("project", ["team/project", "a#b", "", "x" * 129, "what?"])
def test_a_project_that_wandb_would_refuse_is_refused_before_the_job(project: str) -> None:
    """By its own rule: what it takes is taken here."""
    with pytest.raises(ConfigError, match=r"^wandb_project="):
        Log(wandb_project=project)
    assert Log(wandb_project="Projekt 1.0_für-alle").wandb_project


@pytest.mark.parametrize(
    "wrong",
    [
        {"wandb_tags": "one"},
        {"wandb_tags": ["x" * 65]},
        {"wandb_tags": [""]},
        {"wandb_group": ""},
        {"wandb_group": "x" * 129},
        {"wandb_entity": "team/project"},
    ],
)
def test_what_wandb_would_refuse_is_refused_before_the_job(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(wrong))}="):
        Log(**wrong)


def test_only_what_is_asked_for_is_logged(tmp_path: Path) -> None:
    assert [type(logger) for logger in Log().open(RunDirectory(tmp_path), 0)] == [MetricsCSV]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_outlives_wandb_s_service(no_key: None, tmp_path: Path) -> None:
    """A scheduler's SIGTERM reaches every process of a job, and W&B's dies of it; the step must still be saved."""
    command = [sys.executable, "-c", "from fiddlehead.cli import main; main()", "pretrain", "-f", "tiny_test", "--yes"]
    options = ["log.name=w", "log.wandb=true", "trainer.max_steps=100000", "--direct"]
    with subprocess.Popen([*command, *options], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        found = RunDirectory(tmp_path / "runs" / "w")
        wait_until(lambda: found.last_step() > 3)
        for service in wandb_services(run.pid):
            os.kill(service, signal.SIGTERM)
        step = found.last_step()
        wait_until(lambda: found.last_step() > step + 20)
        run.send_signal(signal.SIGTERM)
        output = run.communicate(timeout=60)[0].decode()
    assert run.returncode == 130, output
    assert output.count("WARNING: W&B records no more of this attempt") == 1
    assert f"step-{found.last_step():08d}" in {path.name for path in found.checkpoints.iterdir()}


def wandb_services(parent: int) -> list[int]:
    """The processes that W&B has started for a process; there is at least one."""
    table = subprocess.run(["ps", "-e", "-o", "pid,ppid,args", "--no-headers"], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    found = [int(pid) for pid, ppid, words in rows if int(ppid) == parent and "wandb" in words]
    assert found, table
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
