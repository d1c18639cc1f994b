"""MLflow has one run for all attempts of a run, with the metrics' names of the other loggers.

Where MLflow is installed, it records in its own store; otherwise, a stand-in for its client records in a file.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import Log
from fiddlehead.training.mlflow_logger import mlflow_logger
from tests.training.conftest import KillAfter, Killed, rows

Pretrain = Callable[..., RunDirectory]
RECIPE = (
    "_target_: fiddlehead.tasks:pretrain\n_partial_: true\noptim:\n  betas:\n  - _target_: builtins:float\n    x: 0.9\n"
)

STAND_IN = '''
"""A stand-in for MLflow: the calls of Lightning's logger, which it records in a file."""
import json, pathlib, types
from dataclasses import asdict, dataclass


class Missing(Exception):
    error_code = "RESOURCE_DOES_NOT_EXIST"


@dataclass
class Metric:
    key: str
    value: float
    timestamp: int
    step: int


@dataclass
class Param:
    key: str
    value: str


class MlflowClient:
    def __init__(self, uri):
        if uri == "no://server":
            raise ValueError("no such scheme")
        self.file = pathlib.Path(uri.removeprefix("file:"))
        self.runs = json.loads(self.file.read_text()) if self.file.exists() else {}

    def save(self):
        self.file.write_text(json.dumps(self.runs))

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name, artifact_location=None):
        return name

    def get_run(self, run_id):
        if run_id not in self.runs:
            raise Missing(run_id)
        return types.SimpleNamespace(info=types.SimpleNamespace(experiment_id="e"))

    def create_run(self, experiment_id, tags):
        run_id = f"{len(self.runs):032x}"
        self.runs[run_id] = {"name": tags["mlflow.runName"], "params": {}, "metrics": [], "status": ["RUNNING"]}
        self.save()
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def update_run(self, run_id, status):
        self.runs[run_id]["status"].append(status)
        self.save()

    set_terminated = update_run

    def log_batch(self, run_id, metrics=(), params=()):
        if self.file.with_name("down").exists():
            raise ConnectionError("the server is down")
        self.runs[run_id]["metrics"] += map(asdict, metrics)
        self.runs[run_id]["params"] |= {each.key: each.value for each in params}
        self.save()


def set_tracking_uri(uri):
    pass
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file in which the stand-in records."""
    package = tmp_path / "packages" / "mlflow"
    for name, text in {
        "__init__": STAND_IN, "tracking/__init__": "from mlflow import MlflowClient",
        "entities": "from mlflow import Metric, Param", "utils/__init__": "",
        "utils/mlflow_tags": "MLFLOW_RUN_NAME = 'mlflow.runName'",
        "tracking/context/__init__": "", "tracking/context/registry": "resolve_tags = dict",
    }.items():  # fmt: skip
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(package.parent)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "mlflow"}
    lightning = importlib.import_module("lightning.pytorch.loggers.mlflow")
    monkeypatch.setattr(lightning, "_MLFLOW_AVAILABLE", True)
    yield tmp_path / "store.json"
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        del sys.modules[name]
    sys.modules.update(before)


def recorded(store: Path) -> dict[str, Any]:
    return json.loads(store.read_text())


def test_attempts_of_a_run_are_one_run_in_mlflow(
    pretrain: Pretrain, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path / "runs" / "run")
    run.path.mkdir(parents=True)
    run.recipe.write_text(RECIPE)
    told: dict[str, Any] = {"mlflow": True, "mlflow_uri": f"file:{stand_in}", "max_steps": 8, "every_n_steps": 2}
    with pytest.raises(Killed):
        pretrain(**told, callbacks=[KillAfter(5)])
    pretrain(**told)
    ((run_id, found),) = recorded(stand_in).items()
    assert run.mlflow_id == run_id and found["name"] == "run"
    assert found["status"] == ["RUNNING", "FAILED", "RUNNING", "FINISHED"]
    losses = {each["step"]: each["value"] for each in found["metrics"] if each["key"] == "train/loss"}
    assert losses == {int(step): float(loss) for step, loss in rows(run, "step", "loss") if loss}
    assert {"val/loss", "train/lr", "perf/tokens_per_s"} <= {each["key"] for each in found["metrics"]}
    assert found["params"]["optim.betas_0_.x"] == "0.9" and found["params"]["task"] == "fiddlehead.tasks:pretrain"
    assert "MLflow: run 0000" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs MLflow")
def test_mlflow_itself_goes_on_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.recipe.write_text(RECIPE)
    uri = f"file:{tmp_path}/mlruns"
    for step, value in ((3, 1.5), (4, 1.25)):
        logger: Any = mlflow_logger(run, uri, "ferns")
        logger.log_metrics({"train/loss": value}, step)
        logger.finalize("failed" if step == 3 else "success")
    client = importlib.import_module("mlflow").MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("ferns").experiment_id])
    history = client.get_metric_history(run.mlflow_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(3, 1.5), (4, 1.25)]
    assert (found.info.run_id, found.info.status, found.info.run_name) == (run.mlflow_id, "FINISHED", "run")
    assert found.data.params == {"task": "fiddlehead.tasks:pretrain", "optim.betas_0_": "builtins:float",
                                 "optim.betas_0_.x": "0.9"}  # fmt: skip
    client.set_terminated(run.mlflow_id)
    run.write_mlflow_id("0" * 32)
    mlflow_logger(run, uri, "ferns").log_metrics({"train/loss": 1.0}, 5)
    assert run.mlflow_id != "0" * 32 and len(client.search_runs([found.info.experiment_id])) == 2


def test_training_goes_on_without_a_server_that_fails(
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.recipe.write_text(RECIPE)
    logger: Any = mlflow_logger(run, f"file:{stand_in}", "ferns")
    assert not stand_in.exists()  # a plan asks no server
    logger.log_metrics({"train/loss": 1.0}, 1)
    (tmp_path / "down").touch()
    logger.log_metrics({"train/loss": 0.5}, 2)
    logger.log_metrics({"train/loss": 0.5}, 3)
    logger.finalize("success")
    said = capsys.readouterr().out
    assert not [each for each in caplog.records if each.name.startswith("lightning")]  # the experiment was new
    assert said.count("MLflow records no more of this attempt (ConnectionError('the server is down'))") == 1
    run.write_mlflow_id("f" * 32)  # the server has lost it
    (tmp_path / "down").unlink()
    mlflow_logger(run, f"file:{stand_in}", "ferns").log_metrics({"train/loss": 0.5}, 2)
    assert "so another one is begun" in capsys.readouterr().out and len(recorded(stand_in)) == 2


def test_what_cannot_be_is_said(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"^mlflow_uri=None: name the tracking server"):
        Log(mlflow=True)
    with pytest.raises(ConfigError, match=r"^mlflow_uri: has a user or a password, which files would show"):
        Log(mlflow_uri="https://me:secret@tracker")
    with pytest.raises(ConfigError, match=r"^mlflow_experiment='': must name"):
        Log(mlflow_experiment="")
    with pytest.raises(ConfigError, match=r"^log.mlflow_uri='no://server': MLflow refuses it: no such scheme"):
        Log(mlflow=True, mlflow_uri="no://server").open(RunDirectory(tmp_path), 0)
    monkeypatch.setattr("fiddlehead.training.loggers.find_spec", lambda name: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    with pytest.raises(ConfigError, match=r"^log.mlflow=True: needs MLflow: pip install 'fiddlehead\[mlflow\]'"):
        Log(mlflow=True).open(RunDirectory(tmp_path), 0)
