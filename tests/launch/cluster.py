"""Lets tests use and break the Slurm cluster of `tests/sandbox/slurm.sh`."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fiddlehead.launch import watch
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss")
"""What of `metrics.csv` is the same however often a run was interrupted; the speeds are not."""

PACED = '''
import os
import time
from dataclasses import dataclass

import fiddle as fdl

from fiddlehead.recipe import Recipe
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.training import WarmupStableDecay


@dataclass(frozen=True, kw_only=True)
class Paced(WarmupStableDecay):
    """tiny_test's schedule, with what a test needs of a step."""

    pause: float = 0.0
    fails_at: int = -1
    shows: str = ""

    def __call__(self, step, max_steps, lr):
        if step == self.fails_at:
            raise RuntimeError(f"step {step} cannot be done")
        if self.shows and step == 0:
            import hashlib

            print(self.shows, hashlib.sha256(os.environ[self.shows].encode()).hexdigest())
        if step:  # the zeroth call is at the start, not after a step
            time.sleep(self.pause)
        return super().__call__(step, max_steps, lr)


def paced() -> Recipe:
    """tiny_test, as slow as `optim.lr_scheduler.pause` says."""
    recipe = tiny_test()
    recipe.optim.lr_scheduler = fdl.Config(Paced, warmup_steps=5, decay_fraction=0.3)
    return recipe
'''
"""A user's recipe file."""

MINUTE = '''
from fiddlehead.launch.slurm import SlurmExecutor, slurm


def minute() -> SlurmExecutor:
    """At most a minute at a time."""
    return slurm(partition="batch", time="00:01:00", save_before=5)
'''
"""A user's cluster file."""


@dataclass(frozen=True)
class Cluster:
    """The cluster, and a user's project folder from which runs are sent there."""

    project: Path
    folder: Path
    """Of the cluster: where `slurm.sh` keeps the settings, logs and state."""

    @property
    def accounting(self) -> bool:
        """Whether `sacct` knows anything."""
        return "accounting_storage/none" not in ask("scontrol", "show", "config")

    def command(self, *arguments: str) -> list[str]:
        """`fiddlehead ...`, without a word of the user's own settings."""
        return [sys.executable, "-c", "from fiddlehead.cli import main; main()", *arguments]

    def fiddlehead(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.project, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def pretrain(
        self, name: str, *arguments: str, recipe: str = "paced", executor: str = "slurm(partition=batch)"
    ) -> list[str]:
        """The arguments of a run in the partition whose jobs can be preempted, with one thread a process."""
        return [
            "pretrain", "--factory", recipe, f"log.name={name}", "--yes", f"executor={executor}",
            "executor.env_vars.OMP_NUM_THREADS=1", *arguments,
        ]  # fmt: skip

    def submit(
        self, name: str, *arguments: str, executor: str = "slurm(partition=batch)", **environment: str
    ) -> RunDirectory:
        """Sends a run off and does not wait for it."""
        result = self.fiddlehead(*self.pretrain(name, "--detach", *arguments, executor=executor), **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return self.run(name)

    def run(self, name: str) -> RunDirectory:
        """The directory of the run called `name`."""
        return RunDirectory(self.project / "runs" / name)

    def block(self, *arguments: str, partition: str = "batch", seconds: int = 600) -> str:
        """Occupies whole nodes, from now on or as soon as it may; returns the job's id."""
        script = f"--wrap=sleep {seconds}"
        return ask(
            "sbatch", "--parsable", "--exclusive", "--output=/dev/null", f"--partition={partition}", *arguments, script
        ).strip()

    def preempt(self, run: RunDirectory) -> None:
        """Takes the nodes of a run away for a moment, as Slurm does for a job of more weight."""
        restarts = self.restarts(run)
        urgent = self.block(f"--nodelist={self.nodes(run)}", partition="urgent", seconds=2)
        wait_until(lambda: self.restarts(run) > restarts, 60, f"job {urgent} to preempt {run.name}")

    def job(self, run: RunDirectory) -> dict[str, str]:
        """What the controller says of a run's job; empty when it has forgotten it."""
        shown = subprocess.run(["scontrol", "show", "--oneliner", "job", run.job_id], capture_output=True, text=True)
        return dict(field.split("=", 1) for field in shown.stdout.split() if "=" in field)

    def nodes(self, run: RunDirectory) -> str:
        """The nodes of a run's job, as Slurm writes them."""
        return self.job(run)["NodeList"]

    def restarts(self, run: RunDirectory) -> int:
        """How often a run's job was requeued."""
        return int(self.job(run)["Restarts"])

    def daemon(self, name: str) -> int:
        """The process id of slurmctld, or of slurmd.NODE."""
        return int((self.folder / "run" / f"{name}.pid").read_text())

    def lose(self, node: str) -> None:
        """Everything on a node dies at once, as when its power fails; the controller is told."""
        processes = self.processes(SLURMD_NODENAME=node)
        # First those that would tell the controller of the others' end.
        parents = {parent(process) for process in processes} - set(processes) - {0, 1}
        for process in [self.daemon(f"slurmd.{node}"), *sorted(parents), *processes]:
            kill(process)
        ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def processes(self, **environment: str) -> list[int]:
        """The processes of this cluster that were started with these environment variables."""
        wanted = [f"{name}={value}" for name, value in {"SLURM_CONF": os.environ["SLURM_CONF"], **environment}.items()]
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                present = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended
                continue
            if all(variable in present for variable in wanted):
                found.append(int(process.name))
        return found

    def stop_controller(self) -> None:
        """Ends slurmctld, which first saves what it knows."""
        process = self.daemon("slurmctld")
        os.kill(process, signal.SIGTERM)
        wait_until(lambda: not alive(process), 20, "slurmctld to end")

    def start_controller(self) -> None:
        """Starts slurmctld if it does not run."""
        if not (self.folder / "run" / "slurmctld.pid").exists() or not alive(self.daemon("slurmctld")):
            ask("slurmctld")
        answers = lambda: subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0  # noqa: E731
        wait_until(answers, 30, "slurmctld to answer")

    def repair(self) -> None:
        """Ends all jobs, starts the daemons that a test has ended, and waits until every node is idle."""
        self.start_controller()
        ask("scancel", "--quiet", "--user=root")
        for file in (self.folder / "run").glob("slurmd.*.pid"):
            node = file.name.split(".")[1]
            if not alive(int(file.read_text())):
                ask("slurmd", "-N", node)
        wait_until(lambda: not ask("squeue", "--noheader"), 60, "the queue to empty")
        for node in ask(
            "sinfo", "--noheader", "--Node", "--partition=batch", "--states=down,drain", "--format=%N"
        ).split():
            ask("scontrol", "update", f"nodename={node}", "state=resume")
        wait_until(lambda: self._idle(), 60, "the nodes to be idle")

    def _idle(self) -> bool:
        return set(ask("sinfo", "--noheader", "--Node", "--format=%T").split()) == {"idle"}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """An idle cluster of `tests/sandbox/slurm.sh`, and a project with the recipe `paced`.

    Another cluster is left alone: what is done here ends everyone's jobs.
    """
    settings = Path(os.environ.get("SLURM_CONF") or "/nowhere")
    if not settings.is_file() or "ClusterName=fiddlehead\n" not in settings.read_text():
        pytest.skip("needs the cluster of tests/sandbox/slurm.sh, whose `start` says what to export")
    project = tmp_path / "project"
    (project / "recipes").mkdir(parents=True)
    (project / "recipes" / "paced.py").write_text(PACED)
    (project / "launch").mkdir()
    (project / "launch" / "minute.py").write_text(MINUTE)
    monkeypatch.setenv("FIDDLEHEAD_SECRETS", str(tmp_path / "secrets"))
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "nemo_run"))
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    made = Cluster(project, settings.parent.parent)
    made.repair()
    yield made
    made.repair()


def ask(*command: str) -> str:
    """What a program prints; it must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Waits for something that happens elsewhere."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.1)


def state_of(run: RunDirectory) -> Status:
    """What `fiddlehead runs` would say of a run."""
    (status,) = watch.states([run])
    assert status is not None
    return status


def end_of(run: RunDirectory, seconds: float = 180) -> Status:
    """Waits for the end of a run, as a later process sees it."""
    wait_until(lambda: state_of(run).state.ended, seconds, f"{run.name} to end")
    return state_of(run)


def succeed(run: RunDirectory, seconds: float = 180) -> None:
    """Waits for the end of a run, which must be a good one."""
    status = end_of(run, seconds)
    assert status.state is State.SUCCEEDED, f"{status}\n{output_of(run)}"


def output_of(run: RunDirectory) -> str:
    """All that a run and its scheduler printed."""
    files = [run.scheduler_log, run.log, *sorted(run.logs.glob("*"))]
    return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')}" for file in files if file.exists())


def at_step(run: RunDirectory, step: int, seconds: float = 120) -> None:
    """Waits until a run has logged a step."""

    def reached() -> bool:
        status = run.written_status()
        assert status is None or not status.state.ended, f"{status}\n{output_of(run)}"
        return int(run.last_metrics().get("step", 0)) >= step

    wait_until(reached, seconds, f"step {step} of {run.name}")


def starts_of(run: RunDirectory) -> int:
    """How often a run's job has begun, as its log tells."""
    return len(re.findall(r"^=== started ", run.log.read_text(), re.MULTILINE))


def steps_of(run: RunDirectory) -> list[int]:
    """The steps in the order in which they were trained, those of all attempts."""
    return [int(step) for step in re.findall(r"^step +(\d+)/", run.log.read_text(), re.MULTILINE)]


def losses(run: RunDirectory) -> list[tuple[str, ...]]:
    """What a run has measured, to the last bit."""
    with run.metrics.open() as file:
        return [tuple(row[name] for name in COLUMNS) for row in csv.DictReader(file)]


def alive(process: int) -> bool:
    """Whether there is such a process, and not only its remains."""
    return _stat(process)[0] != "Z"


def parent(process: int) -> int:
    """The process that started this one; 0 if it has ended."""
    return int(_stat(process)[1])


def _stat(process: int) -> list[str]:
    """State, parent and more of a process; that of a dead one if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z", "0"]


def kill(process: int) -> None:
    """SIGKILL; the process may have ended already."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
    wait_until(lambda: not alive(process), 10, f"process {process} to die")
