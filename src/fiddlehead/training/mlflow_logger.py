"""Lightning's MLflow logger, with one MLflow run for all attempts of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, MLFlowLogger

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.recipe.plain import flat, plain_recipe
from fiddlehead.run.console import say
from fiddlehead.run.directory import RunDirectory

MAX_VALUE = 500
"""The longest value of a parameter that every server takes."""


def tracking_uri(given: str | None) -> str:
    """Where MLflow records: as the recipe says, or else as MLFLOW_TRACKING_URI does; "" if neither says it."""
    return given or os.environ.get("MLFLOW_TRACKING_URI", "")


def mlflow_logger(run: RunDirectory, uri: str, experiment: str) -> Logger:
    """A logger for the MLflow run of `run`: that of its earlier attempts, or a new one.

    If the server fails, training goes on without it.

    Raises:
        ConfigError: MLflow refuses the URI.
    """
    try:
        return OneRun(run, uri, experiment)
    except Exception as error:  # of MLflow's own class, and MLflow is an extra
        raise ConfigError(Problem("log.mlflow_uri", uri, f"MLflow refuses it: {error}")) from error


class OneRun(MLFlowLogger):
    """Begins the run, or goes on with it, when Lightning or the first metrics ask for it."""

    begun = lost = False

    def __init__(self, run: RunDirectory, uri: str, experiment: str) -> None:
        super().__init__(experiment_name=experiment, run_name=run.name, tracking_uri=uri)
        self.directory, self.uri, self.title = run, uri, experiment

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if not (self.begun or self.lost):
            self._try(self._begin)
        return self._mlflow_client

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        _ = self.experiment
        if self.begun and not self.lost:
            self._try(lambda: MLFlowLogger.log_metrics(self, metrics, step))

    def finalize(self, status: str = "success") -> None:
        if self.begun and not self.lost:
            self._try(lambda: MLFlowLogger.finalize(self, status))

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self.lost = True
            say(f"WARNING: MLflow records no more of this attempt ({error!r}); metrics.csv has all")

    def _begin(self) -> None:
        self.begun = True
        self._run_id = self._recorded(self.directory.mlflow_id)
        is_new = self._run_id is None
        client = MLFlowLogger.experiment.fget(self)  # makes the run, if there is none
        if is_new:
            self.directory.write_mlflow_id(str(self._run_id))
            self._log_recipe()
        else:
            client.update_run(self._run_id, status="RUNNING")
        say(f"MLflow: run {self._run_id} of the experiment {self.title!r} at {self.uri}")

    def _recorded(self, run_id: str) -> str | None:
        """The id of an earlier attempt's run; None if there is none, or if the server has it no more."""
        if not run_id:
            return None
        try:
            self._mlflow_client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            say(f"WARNING: {self.uri} has no run {run_id}, so another one is begun")
            return None
        return run_id

    def _log_recipe(self) -> None:
        values = flat(plain_recipe(self.directory.recipe))
        self.log_hyperparams(
            {re.sub(r"[^\w./ -]", "_", path): str(value)[:MAX_VALUE] for path, value in values.items()}
        )
