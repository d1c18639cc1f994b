"""The base of all executors: settings that are saved with the run, and the operations that each executor implements."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar, Self

from fiddlehead.environment import wandb_mode_problems
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.atomic import write_atomically
from fiddlehead.launch import secrets
from fiddlehead.launch.nemo.settings import settings_of
from fiddlehead.launch.reconcile import Answer, reconcile
from fiddlehead.recipe.allowed import reference_to
from fiddlehead.recipe.coercion import coerce
from fiddlehead.recipe.hints import Unevaluated, parameter_hint
from fiddlehead.recipe.nemo_names import nemo_hint
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


_NO_SLURM = """\
# A launcher may itself be in a Slurm job, which is not this one.
unset "${!SLURM_@}" MASTER_ADDR MASTER_PORT
"""


def where_process(status: Status) -> str:
    """Where the process of a run is, or was, in a few words."""
    return f"{status.executor} on {status.host}, process {status.pid}"


def on_host(status: Status) -> str:
    """ " on HOST", for a run that has one."""
    return f" on {status.host}" if status.state is not State.PENDING else ""


def _no_factory(text: str) -> Any:
    raise ConfigError(f"{text!r} names nothing that a setting can be")


def gpus_here() -> int:
    """How many GPUs this machine has for this process."""
    import torch

    return torch.cuda.device_count()


@dataclass(frozen=True, kw_only=True)
class Executor(ABC):
    """Where a run goes. Each kind is one file of `launch/`, with a function of the same name that returns it."""

    nodes: int | None = None
    """The number of machines; None follows `trainer.num_nodes`."""
    ntasks_per_node: int = 0
    """Processes on each machine, each with its own device; 0 follows the requested GPUs, or `trainer.devices`."""
    env_vars: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job. They are written down with the run, so secrets do not belong here."""
    secrets: Sequence[str] = ()
    """Names of environment variables whose present values the job shall have, beside WANDB_API_KEY and HF_TOKEN; only
    the names are written down."""
    setup_lines: str = ""
    """Shell lines that the job's script runs first on every node: `module load cuda`, `source venv/bin/activate`."""
    python: str = ""
    """The interpreter; "" is the `python` that `setup_lines` activate, or else that of the launcher."""
    unshipped: Sequence[str] = ()
    """The user's modules, with their submodules, that need not be shipped: the job's environment has them, or the job
    never imports them."""

    kind: ClassVar[str]
    """The executor's name on the command line and in a run's status."""
    ships_code: ClassVar[bool] = True
    """Whether the job imports a copy of the working tree instead of the tree itself."""
    queues: ClassVar[bool] = False
    """Whether a job can be submitted before the jobs for which it waits have ended."""
    dies_with_launcher: ClassVar[bool] = True
    """Whether the job of an attached launch ends whenever the launcher ends."""
    begins_at_once: ClassVar[bool] = False
    """Whether a submitted job begins at once; it is then asked to stop instead of being killed."""

    def __post_init__(self) -> None:
        refuse(self._type_problems() or self.problems())

    def problems(self) -> list[Problem]:
        """The problems of the settings; their types have been checked before."""
        problems = [
            Problem(name, getattr(self, name), f"must be {least} or more")
            for name, least in (("nodes", 1), ("ntasks_per_node", 0))
            if (value := getattr(self, name)) is not None and value < least
        ]
        for name in (*self.env_vars, *self.secrets):
            if not _NAME.fullmatch(name):
                problems.append(Problem("", message=f"{name!r} is not the name of an environment variable"))
        problems += [
            Problem(f"env_vars.{name}", message="looks like a secret, which files would show; use secrets instead")
            for name in self.env_vars
            if secrets.looks_secret(name)
        ]
        problems += [
            Problem(setting.name, value, "must be one line, without control characters")
            for setting in fields(self)
            if isinstance(value := getattr(self, setting.name), str) and setting.name != "setup_lines"
            if not value.isprintable()
        ]
        problems += [each.under("env_vars") for each in wandb_mode_problems(self.env_vars.get("WANDB_MODE"))]
        return problems

    def _type_problems(self) -> list[Problem]:
        """The settings whose values do not fit their annotations, by the rules of the command line."""
        problems = []
        for setting in fields(self):
            value, hint = getattr(self, setting.name), parameter_hint(type(self), setting.name)
            try:
                if not isinstance(hint, Unevaluated):
                    coerce(value, hint, _no_factory)
            except ConfigError as error:
                problems += error.of(setting.name, value).problems
        return problems

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Builds an executor from settings by name.

        Raises:
            ConfigError: a setting is unknown, or has an impossible value.
        """
        known = [setting.name for setting in fields(cls)]
        refuse(
            nemo_hint(cls, name) or Problem.unknown("", name, f"setting of {cls.kind}", known)
            for name in settings
            if name not in known
        )
        return cls(**settings)

    @classmethod
    def of_nemo_run(cls, executor: Any) -> Self:
        """These settings, taken over from NeMo-Run's executor of the same kind; docs/nemo_run.md says how.

        Raises:
            ConfigError: it is of another kind, or has fields without a counterpart here; the message says what to use.
        """
        return cls.of(**settings_of(executor, cls.kind))

    @property
    def keeps_runs_elsewhere(self) -> bool:
        """Whether the run directories here are mirrors, without checkpoints, of those on another machine."""
        return False

    @property
    def shares_environment(self) -> bool:
        """Whether the job sees this machine's files, and what is installed here, at their own paths."""
        return True

    @property
    def is_plain(self) -> bool:
        """Whether a job runs on this machine with default settings: without commands and variables of its own."""
        return False

    @property
    def started_by_torchrun(self) -> bool:
        """Whether torchrun starts the job's script once for each device of each node, and tells it its rank."""
        return False

    @property
    def time_limit(self) -> int | None:
        """Seconds that an attempt may take; None means no limit."""
        return None

    def sent(self, status: Status) -> bool:
        """Whether the run that has written `status` was sent to this kind of executor."""
        return status.executor == self.kind

    @classmethod
    def where(cls, run: RunDirectory, status: Status) -> str:
        """Where a run is, or was, in a few words."""
        return f"{cls.kind} {run.job_id}{on_host(status)}"

    def start_lines(self) -> str:
        """The first shell lines of the job's script: they unset variables that belong to the launcher."""
        return _NO_SLURM

    def where_lines(self) -> str:
        """Shell lines that set `_where` in the job's script, for the first line of its log."""
        return f"_where={quote(self.kind)}"

    def requeue_lines(self) -> str:
        """Shell lines that set how often a job may be requeued, and the exit code by which it asks for that."""
        return ""

    def devices_per_node(self) -> int:
        """How many devices each machine gives the run; 0 follows `trainer.devices`."""
        return self.ntasks_per_node

    def gpus_of_a_node(self, nodes: int = 1) -> int:
        """The number of GPUs on each of `nodes` machines, for a run that uses all of them; 0 if there are none.

        Raises:
            ConfigError: the number is unknown.
        """
        return gpus_here()

    def gpu_types(self) -> Collection[str]:
        """The kinds of GPU that a job may get, as CUDA or the cluster names them; none if that is not known."""
        return ()

    def fitted(self, devices: int, accelerator: str, nodes: int = 1) -> Self:
        """These settings, completed for a recipe that uses `devices` on each of `nodes`."""
        return replace(self, ntasks_per_node=devices, nodes=self.nodes or nodes)

    def queue(self) -> str:
        """The queue that knows a job's state: runs of executors with the same queue are asked for together."""
        return self.kind

    def place(self, run: RunDirectory) -> Path:
        """Where the job sees the run directory."""
        return run.path

    def deliver_secrets(self, run: RunDirectory, values: Mapping[str, str]) -> str:
        """Writes secrets to a file that only the user can read; returns its path as the job sees it, or ""."""
        return str(secrets.write(run, values)) if values else ""

    def secrets_file(self, run: RunDirectory) -> str:
        """The path of a run's secrets, if it has any, as the job sees it; "" if the job inherits them."""
        return str(secrets.file(run))

    def starters(self, run: RunDirectory, *, has_secrets: bool) -> dict[str, str]:
        """The files and commands that start `run.script`, by name, as `submit` uses them. Nothing is asked.

        Args:
            has_secrets: whether the run has secrets.
        """
        return {}

    @abstractmethod
    def check(self, run: RunDirectory) -> None:
        """Asks the machine or cluster whether it can run the job; nothing is submitted.

        Raises:
            ConfigError: it cannot; the message says what it offers.
        """

    @abstractmethod
    def submit(self, run: RunDirectory, *, after: Sequence[str] = (), after_any: Sequence[str] = ()) -> str:
        """Starts `run.script` on every node and returns the job's id. The run directory must be complete.

        Args:
            after: ids of jobs of the same executor that must succeed first.
            after_any: ids of such jobs that must end first, in any state.
        """

    def ask(self, going: Mapping[RunDirectory, Status]) -> Mapping[RunDirectory, Answer]:
        """The scheduler's answers for the jobs of runs that have not ended; it is asked once for all of them.

        Args:
            going: the status that each of these runs has written.
        """
        return {}

    def states(self, runs: Sequence[RunDirectory]) -> list[Status | None]:
        """The state of each run: its status file, corrected by the scheduler's answer about its job."""
        before = [(run, run.written_status()) for run in runs]
        going = {run: status for run, status in before if status is not None and not status.state.ended}
        answers = self.ask(going) if going else {}
        return [reconcile(run, status, answers.get(run, Answer())) for run, status in before]

    @abstractmethod
    def kill(self, run: RunDirectory) -> None:
        """Ends a run's job at once, or removes it from the queue."""

    def save(self, run: RunDirectory) -> None:
        """Writes the settings into the run directory, for `load`."""
        write_atomically(run.executor, json.dumps(self.to_dict(), indent=1) + "\n", mode=0o600)

    def to_dict(self) -> dict[str, Any]:
        """The kind and the settings, as JSON values; for a user's own executor also the name of its class."""
        ours = type(self).__module__.startswith("fiddlehead.")
        own = {} if ours else {"class": reference_to(type(self))}
        return {"kind": self.kind, **own, **asdict(self)}
