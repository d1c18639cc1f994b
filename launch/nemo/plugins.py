"""Plugins of NeMo 2.0, by their names, for recipes in NeMo-Run's experiments.

`experiment.add(recipe, executor=..., plugins=[PreemptionPlugin(preempt_time=120)])` sets the fields of the recipe and
the executor that mean the same here. A field that means nothing here is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import nemo_run as run

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.recipe import Recipe

_IN_PLACE = "a failed job is not restarted in place; num_job_retries_on_failure queues it again; leave it out"
_HANGS = "a process that hangs is not detected by its heartbeat; leave it out"


@dataclass(kw_only=True)
class _Plugin(run.Plugin):
    """A plugin whose fields are NeMo's."""

    refused: ClassVar[dict[str, str]] = {}
    """The fields of NeMo's that mean nothing here unless they have their default, and why."""

    def setup(self, task: Any, executor: Any) -> None:
        """NeMo-Run calls it when the task is added.

        Raises:
            ConfigError: the task is not a recipe that trains, or a field cannot be had here.
        """
        name = type(self).__name__
        if not (isinstance(task, Recipe) and task.is_training):
            raise ConfigError(Problem("plugins", name, "is for recipes; add this task without it"))
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name in self.refused}
        defaults = {each.name: each.default for each in fields(self)}
        refuse(
            Problem(f"{name}.{field}", value, self.refused[field])
            for field, value in given.items()
            if value != defaults[field]
        )
        self.apply(task, executor)

    def apply(self, recipe: Recipe, executor: Any) -> None:
        """Sets what the plugin means; NeMo-Run has made copies of both for this task."""


@dataclass(kw_only=True)
class PreemptionPlugin(_Plugin):
    """Warns a Slurm job before its time limit, so that it saves its step and, with `retries`, is queued again.

    A run is always saved when it is preempted or asked to stop; a plugin is not needed for that. Other executors have
    no time limit, so there it changes nothing.
    """

    preempt_time: int = 60
    """Seconds before the limit."""
    callbacks: Sequence[Any] = ()
    """Configurations of callbacks to add; NeMo's PreemptionCallback is not needed."""

    def apply(self, recipe: Recipe, executor: Any) -> None:
        """Sets the executor's `signal`."""
        if isinstance(executor, run.SlurmExecutor):
            executor.signal = f"USR1@{self.preempt_time}"
        recipe.trainer.callbacks = [*(recipe.trainer.callbacks or ()), *self.callbacks]


@dataclass(kw_only=True)
class FaultTolerancePlugin(_Plugin):
    """Queues a job that fails again; it then goes on from its newest checkpoint."""

    num_in_job_restarts: int = 3
    num_job_retries_on_failure: int = 2
    """How often the job is queued again."""
    initial_rank_heartbeat_timeout: int = 1800
    rank_heartbeat_timeout: int = 300

    refused: ClassVar = {
        "num_in_job_restarts": _IN_PLACE,
        "initial_rank_heartbeat_timeout": _HANGS,
        "rank_heartbeat_timeout": _HANGS,
    }

    def apply(self, recipe: Recipe, executor: Any) -> None:
        """Sets the executor's `retries`."""
        if not isinstance(executor, run.SlurmExecutor):
            message = f"a job of {type(executor).__name__} is not queued again; start the run again by its log.name"
            raise ConfigError(Problem("plugins", "FaultTolerancePlugin", message))
        executor.retries = self.num_job_retries_on_failure


@dataclass(kw_only=True)
class NsysPlugin(_Plugin):
    """Profiles steps with NVIDIA Nsight Systems, as `log.nsys` does. NeMo counts steps from 0."""

    start_step: int
    end_step: int
    ranks: list[int] | None = None
    nsys_trace: list[str] | None = None
    """What `nsys --trace` records; None is NVTX and CUDA."""

    def apply(self, recipe: Recipe, executor: Any) -> None:
        """Sets `log.nsys`, and NeMo-Run's launcher."""
        if self.ranks not in (None, [0]):
            raise ConfigError(Problem("NsysPlugin.ranks", self.ranks, "the first rank says when; leave it out"))
        recipe.log.nsys = f"{self.start_step + 1}:{self.end_step + 1}"
        if self.nsys_trace:
            executor.get_launcher().nsys_trace = self.nsys_trace


@dataclass(kw_only=True)
class WandbPlugin(_Plugin):
    """Records the run in Weights & Biases, as `log.wandb` does.

    The API key is not written down, as NeMo's plugin does: the job must have WANDB_API_KEY or ~/.netrc.
    """

    name: str = ""
    """The run's name, here and in W&B; "" leaves `log.name`."""
    logger_fn: Callable[..., Any] | None = None
    """Returns a configuration of W&B's logger, whose project, entity, group, tags and notes are taken."""
    base_url: str = "https://api.wandb.ai"
    """The server."""
    log_task_config: bool = True

    refused: ClassVar = {"log_task_config": "W&B always has the recipe; leave it out"}

    def apply(self, recipe: Recipe, executor: Any) -> None:
        """Sets `log.wandb` and the fields of `log` that begin with it."""
        if self.name and recipe.log.name not in (None, self.name):
            message = f"the run has one name, and log.name={recipe.log.name!r}; leave one of them out"
            raise ConfigError(Problem("WandbPlugin.name", self.name, message))
        recipe.log.wandb = True
        recipe.log.name = self.name or recipe.log.name
        if self.base_url != WandbPlugin.base_url:
            executor.env_vars["WANDB_BASE_URL"] = self.base_url
        if self.logger_fn is None:
            return
        given = dict(self.logger_fn(name=self.name).__arguments__)
        given.pop("name", None)
        taken = ("project", "entity", "group", "tags", "notes")
        refuse(
            Problem(f"WandbPlugin.logger_fn.{field}", value, "is not taken over; leave it out", taken)
            for field, value in given.items()
            if field not in taken
        )
        for field, value in given.items():
            setattr(recipe.log, f"wandb_{field}", value)


@dataclass(kw_only=True)
class ConfigValidationPlugin(_Plugin):
    """Changes nothing: every recipe is planned when it is added, with its executor, and refused if it cannot run."""

    validate_preemption: bool = True
    validate_checkpoint_dir: bool = True
    validate_serialization: bool = True
    validate_wandb: bool = False
    validate_nodes_and_devices: bool = True

    def apply(self, recipe: Recipe, executor: Any) -> None:
        """Refuses a run that is not recorded in W&B, if that is to be validated."""
        if self.validate_wandb and not recipe.log.wandb:
            raise ConfigError(Problem("log.wandb", recipe.log.wandb, "ConfigValidationPlugin.validate_wandb is set"))


@dataclass(kw_only=True)
class PerfEnvPlugin(_Plugin):
    """Sets the size of the messages between pipeline stages.

    Nothing else is needed: its other variables are of Transformer Engine and Megatron, which are not used here.
    """

    enable_layernorm_sm_margin: bool = True
    layernorm_sm_margin: int = 16
    enable_vboost: bool = False
    nccl_pp_comm_chunksize: int | None = None
    """NCCL_P2P_NET_CHUNKSIZE, in bytes."""

    refused: ClassVar = {
        "enable_vboost": "set the clocks in the executor's setup_lines: sudo nvidia-smi boost-slider --vboost 1"
    }

    def apply(self, recipe: Recipe, executor: Any) -> None:
        """Sets the executor's `env_vars`."""
        if self.nccl_pp_comm_chunksize is not None:
            executor.env_vars["NCCL_P2P_NET_CHUNKSIZE"] = str(self.nccl_pp_comm_chunksize)


@dataclass(kw_only=True)
class DespitePlugin(_Plugin):
    """Adds a recipe although its plan says that it will run out of memory or time."""

    despite: Sequence[str] = ()
    """As of `recipe.launch`: "memory", "time"."""
