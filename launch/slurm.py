"""The Slurm executor: submits runs to a cluster's queue, from its login node or over SSH."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.paths import user_path
from fiddlehead.launch import mirror, secrets, slurm_offer, slurm_queue, slurm_script
from fiddlehead.launch.executor import Executor, on_host
from fiddlehead.launch.nemo.settings import settings_of
from fiddlehead.launch.reconcile import Answer
from fiddlehead.launch.shell import Shell
from fiddlehead.launch.slurm_offer import seconds
from fiddlehead.launch.slurm_script import batch_script, sbatch_option_problems
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import Status


def slurm(
    account: str | None = None,
    partition: str | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    time: str = "01:00:00",
    container: str | None = None,
    **settings: Any,
) -> SlurmExecutor:
    """Nodes of a Slurm cluster, from its login node or over SSH.

    Args:
        account: the account that is charged.
        partition: the partition; None means the cluster's default.
        nodes: the number of nodes; None means the recipe's `trainer.num_nodes`.
        gpus_per_node: the number of GPUs on each node; None means the recipe's devices, if they are GPUs, and for
            `trainer.devices=auto` all GPUs of the partition's nodes.
        time: the time limit of one attempt, as in `sbatch --time`; the run continues in the next attempt.
        container: an image, for Pyxis or Apptainer; None means the environment of this process.
        settings: other settings of `SlurmExecutor`.

    Raises:
        ConfigError: a setting is unknown, or has an impossible value.
    """
    return SlurmExecutor.of(
        account=account,
        partition=partition,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time=time,
        container=container,
        **settings,
    )


@dataclass(frozen=True, kw_only=True)
class SlurmExecutor(Executor):
    """Nodes of a Slurm cluster. Settings have NeMo-Run's names, and mean the same as in sbatch."""

    account: str | None = None
    partition: str | None = None
    gpus_per_node: int | None = None
    time: str = "01:00:00"
    qos: str | None = None
    """The quality of service."""
    mem: str | None = None
    """The memory of each node, such as "64G"; None is the cluster's default."""
    cpus_per_task: int | None = None
    """CPUs for each process with a device, for both launchers; None means one, or all if `exclusive`."""
    constraint: str | None = None
    """Features that the nodes must have."""
    nodelist: str | None = None
    """Nodes that the job must have."""
    exclude: str | None = None
    """Nodes that the job must not have."""
    exclusive: bool = False
    """Whether no other job shares the nodes."""
    gres: str | None = None
    """Generic resources of each node, as in `sbatch --gres`."""
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    """More options of sbatch, such as `{"reservation": "maintenance"}`."""
    srun_args: Sequence[str] = ()
    """More options of srun."""
    container: str | None = None
    container_runtime: str = "pyxis"
    """The runtime of `container`: "pyxis" or "apptainer"."""
    container_mounts: Sequence[str] = ()
    """More folders for the container, SOURCE:TARGET; the run directory and the working directory are always there."""
    launcher: str = "torchrun"
    """"torchrun" starts one process on each node, which starts one for each device; "srun" starts all of them."""
    save_before: int = 120
    """Seconds before the time limit at which the run saves and leaves, to be queued again; Slurm may be a minute early.
    It must be enough for one step and one checkpoint."""
    requeues: int = 1000
    """The most requeues of the run, including Slurm's own; 0 means never."""
    host: str | None = None
    """The login node, to submit over SSH; None is this machine."""
    user: str | None = None
    """The user on the login node; None is SSH's own choice."""
    port: int | None = None
    """The port of the login node's SSH; None is SSH's own choice."""
    identity: str | None = None
    """The private key's file; None is SSH's own choice."""
    remote_dir: str = ""
    """The folder of runs on the cluster, over SSH."""

    job_name_prefix: str = ""
    """Stands before the run's name in Slurm's name of the job."""

    kind: ClassVar[str] = "slurm"
    queues: ClassVar[bool] = True
    dies_with_launcher: ClassVar[bool] = False

    def problems(self) -> list[Problem]:
        """As `Executor.problems`."""
        problems = super().problems()
        for name, allowed in (("container_runtime", ("pyxis", "apptainer")), ("launcher", ("torchrun", "srun"))):
            if getattr(self, name) not in allowed:
                problems.append(Problem(name, getattr(self, name), "", allowed))
        for name, least in (("save_before", 0), ("requeues", 0), ("gpus_per_node", 0), ("cpus_per_task", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(Problem(name, value, f"must be {least} or more"))
        try:
            limit = seconds(self.time)
            if limit is not None and self.save_before >= limit:
                problems.append(Problem("save_before", self.save_before, f"must be less than time={self.time!r}"))
        except ConfigError as error:
            problems += error.problems
        if self.host:
            problems += [
                Problem.in_file(repr(path), f"write the whole path on {self.host}, whose homes are not known here")
                for path in (self.container or "", *self.container_mounts)
                if path.startswith("~")
            ]
        if self.host and not PurePosixPath(self.remote_dir).is_absolute():
            problems.append(Problem("remote_dir", self.remote_dir, f"must be an absolute path on {self.host}"))
        if not self.host:
            problems += [
                Problem(name, value, "is for a host, which is not set")
                for name in ("user", "port", "identity", "remote_dir")
                if (value := getattr(self, name))
            ]
        return [*problems, *sbatch_option_problems(self.additional_parameters)]

    @classmethod
    def of_nemo_run(cls, executor: Any) -> Self:
        """As `Executor.of_nemo_run`; if the time limit is shorter than `save_before`, half of it is kept for saving."""
        settings = settings_of(executor, cls.kind)
        limit = seconds(settings["time"])
        if "save_before" not in settings and limit is not None and limit <= cls.save_before:
            settings["save_before"] = limit // 2
        return cls.of(**settings)

    @property
    def keeps_runs_elsewhere(self) -> bool:
        """Whether runs are kept on a cluster reached over SSH."""
        return self.host is not None

    @property
    def shares_environment(self) -> bool:
        """Whether the nodes run the job in this machine's environment: not in a container, nor on another cluster."""
        return not self.host and not self.container

    def devices_per_node(self) -> int:
        """How many devices each node gives the run; 0 follows `trainer.devices`."""
        return self.ntasks_per_node or self._named_gpus()

    def gpus_of_a_node(self, nodes: int = 1) -> int:
        """The number of GPUs in the settings, or else of the partition's nodes.

        Raises:
            ConfigError: the settings name no number, and Slurm does not know it.
        """
        return self._named_gpus() or slurm_offer.gpus_of_a_node(self.shell(), self.partition, nodes)

    def gpu_types(self) -> Collection[str]:
        """The types in the settings, or else those of the partition; none if Slurm does not say."""
        if named := slurm_offer.types_of_gpus(self.gres or ""):
            return named
        try:
            return slurm_offer.gpu_types(self.shell(), self.partition)
        except ConfigError:  # `check` says so
            return ()

    def _named_gpus(self) -> int:
        """How many GPUs the settings ask for on each node."""
        return self.gpus_per_node or slurm_offer.count_gpus(self.gres or "")

    def fitted(self, devices: int, accelerator: str, nodes: int = 1) -> Self:
        """These settings with as many processes as the recipe has devices, and GPUs for them if it uses any."""
        gpus = self.gpus_per_node
        if gpus is None and not self.gres and accelerator in ("gpu", "cuda"):
            gpus = devices
        # A container may mount the environment of this process, but should use its image's environment.
        python = self.python or ("python3" if self.container else "")
        nodes = self.nodes or nodes
        return replace(self, nodes=nodes, ntasks_per_node=devices, gpus_per_node=gpus, python=python)

    @property
    def time_limit(self) -> int | None:
        """Seconds that an attempt may take; None means no limit."""
        return seconds(self.time)

    @classmethod
    def where(cls, run: RunDirectory, status: Status) -> str:
        """The job's number, and its first node."""
        return f"slurm job {run.job_id}{on_host(status)}"

    def start_lines(self) -> str:
        """No lines: the environment is already the job's own."""
        return ""

    def where_lines(self) -> str:
        """As `Executor.where_lines`."""
        return slurm_script.WHERE

    def requeue_lines(self) -> str:
        """As `Executor.requeue_lines`; a job that is run by hand is not requeued."""
        return slurm_script.requeue_lines(self.requeues)

    def queue(self) -> str:
        """Slurm's name, the machine on which it is asked, and the folder of runs there."""
        return f"slurm {self.user or ''}@{self.host or ''}:{self.port or ''}{self.remote_dir}"

    def place(self, run: RunDirectory) -> Path:
        """The run directory on the cluster: over SSH in `remote_dir`, otherwise the same, shared directory."""
        return Path(self.remote_dir) / run.name if self.host else run.path

    def secrets_file(self, run: RunDirectory) -> str:
        """The path of a run's secrets, if it has any, as the job sees it; over SSH, beside the run directories."""
        file = secrets.file(run)
        return str(Path(self.remote_dir) / ".secrets" / file.name if self.host else file)

    def deliver_secrets(self, run: RunDirectory, values: Mapping[str, str]) -> str:
        """Writes the secrets file; over SSH the secrets are sent through the connection, not in a command."""
        if not self.host or not values:
            return super().deliver_secrets(run, values)
        file = self.secrets_file(run)
        mirror.write_secret(self.shell(), Path(file), secrets.text(values))
        return file

    def shell(self) -> Shell:
        """Where Slurm's commands are run."""
        identity = str(user_path(self.identity)) if self.identity else None
        return Shell(self.host, self.user, self.port, identity, before=slurm_offer.WITHOUT_SETTINGS)

    def check(self, run: RunDirectory) -> None:
        """Asks the cluster about the settings, and lets sbatch test the script.

        Raises:
            ConfigError: with every problem.
        """
        shell = self.shell()
        if not shell.succeeds("command -v sbatch"):
            where = f"over SSH it is looked for as in `ssh {self.host} sbatch`" if self.host else "or set executor.host"
            message = f"there is no sbatch on {shell.name}; launch from a login node, {where}"
            raise ConfigError(Problem("executor", "slurm", message))
        slurm_offer.warn_of_settings(shell)
        problems = slurm_offer.problems(
            shell, self.partition, self.account, self.nodes or 1, self.time, self.gpus_per_node
        )
        pyxis = self.container and self.container_runtime == "pyxis"
        if pyxis and not shell.succeeds("srun --help | grep -q -e --container-image"):
            message = (
                f"{shell.name} has no Pyxis; with Apptainer on the nodes, set executor.container_runtime=apptainer"
            )
            problems.append(Problem("executor.container", self.container, message))
        if self.host and mirror.is_taken(shell, run, self.place(run)):
            message = f"{self.place(run)} on {shell.name} is another run; choose another name"
            problems.append(Problem("log.name", run.name, message))
        if not problems:
            answer = shell.ask("sbatch --test-only", batch_script(self, run).encode(), self._not_passed_on())
            if answer.code and not _would_wait(answer.error) and not self._may_wait(answer.error):
                problems.append(_refusal(answer.error))
        refuse(problems)

    def _may_wait(self, said: str) -> bool:
        """Whether `sbatch --test-only` may fail only because nodes are unavailable; the job is then accepted.

        It gives the same reason for resources that no node will ever have; only `sbatch` itself distinguishes the two.
        """
        unavailable = "node configuration is not available" in said
        return unavailable and slurm_offer.has_nodes_away(self.shell(), self.partition)

    def starters(self, run: RunDirectory, *, has_secrets: bool) -> dict[str, str]:
        """The script for sbatch."""
        return {"sbatch.sh": batch_script(self, run)}

    def submit(self, run: RunDirectory, *, after: Sequence[str] = (), after_any: Sequence[str] = ()) -> str:
        """Submits `RUN/sbatch.sh`, and returns the job's number.

        Raises:
            ConfigError: Slurm refused the job.
        """
        file = run.path / "sbatch.sh"
        write_atomically(file, batch_script(self, run, after, after_any))
        shell, place = self.shell(), self.place(run)
        if self.host:
            mirror.send(shell, run, place)
        command = f"cd {shlex.quote(str(place))} && sbatch --parsable {file.name}"
        answer = shell.ask(command, without=self._not_passed_on())
        number = re.search(r"^(\d+)(;\S+)?$", answer.out, re.MULTILINE)
        if answer.code or number is None:
            raise ConfigError(_refusal(answer.error))
        return number[1]

    def ask(self, going: Mapping[RunDirectory, Status]) -> Mapping[RunDirectory, Answer]:
        """The answers of squeue, sacct and scontrol for each run's job; over SSH, it also updates the mirrors."""
        return slurm_queue.answers(self.shell(), going, self._fetch)

    def _fetch(self, runs: Sequence[RunDirectory]) -> None:
        if self.host and runs:
            mirror.fetch(self.shell(), {run.path: self.place(run) for run in runs})

    def states(self, runs: Sequence[RunDirectory]) -> list[Status | None]:
        """As `Executor.states`; also removes secrets that ended runs have left."""
        going = slurm_queue.going(runs)
        found = super().states(runs)
        ended = [run for run, status in zip(runs, found, strict=True) if status and status.state.ended]
        self._remove_secrets([run for run in ended if run in going])
        return found

    def kill(self, run: RunDirectory) -> None:
        """Cancels the run's job; it has Slurm's `KillWait` seconds to save its step."""
        if run.job_id:
            answer = self.shell().ask(f"scancel {shlex.quote(run.job_id)}")
            if answer.code:
                raise ConfigError(f"run {run.name!r} cannot be cancelled: scancel {run.job_id}: {answer.said}")
        self._remove_secrets([run])

    def _remove_secrets(self, runs: Sequence[RunDirectory]) -> None:
        """Removes the secrets of ended runs, which jobs remove themselves if they end normally."""
        if not self.host:
            for run in runs:
                secrets.remove(run)
        elif runs:
            self.shell().ask(shlex.join(["rm", "-f", *(self.secrets_file(run) for run in runs)]))

    def _not_passed_on(self) -> list[str]:
        """Environment variables to hide from sbatch, which copies all of them."""
        return [*secrets.ALWAYS, *self.secrets]


def _refusal(said: str) -> Problem:
    """A readable form of sbatch's refusal of a job."""
    lines = [re.sub(r"^(sbatch: )?(error: |fatal: )?(allocation failure: )?", "", line) for line in said.splitlines()]
    reasons = "; ".join(line for line in dict.fromkeys(lines) if line.strip())
    return Problem("executor", message=f"sbatch refuses the job: {reasons or 'without a reason'}")


def _would_wait(said: str) -> bool:
    """Whether `sbatch --test-only` says only that a job cannot start now, so that `sbatch` takes it."""
    busy = "are busy|not available \\(down|required for job are down"
    return re.search(busy, said, re.IGNORECASE) is not None
