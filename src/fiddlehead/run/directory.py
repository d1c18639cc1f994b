"""Run directories: where a run keeps everything about itself, and what its state is.

A run is a folder, `runs/NAME` by default. The recipe, the command and the environment are written before anything
starts; the job adds its status, log, metrics and checkpoints. Nothing else remembers a run, so a folder that is copied
or moved is still the whole run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from fiddlehead.errors import FULL_DISK, ConfigError, unknown
from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.foreign import filled, read_json, reason
from fiddlehead.files.paths import user_path
from fiddlehead.run import locks
from fiddlehead.run.processes import is_running, this_boot, this_machine
from fiddlehead.run.processes import started as process_started

MAX_METRICS_READ = 2**20
"""How much of the end of `metrics.csv` is read for its newest values, in bytes: some eight thousand rows."""
MAX_LINES_READ = 2**16
"""How much of the end of a log is read for its last lines, in bytes."""
_LATEST = 1e12
"""Seconds since the epoch that no status has."""
HEARTBEAT, MISSING = 30.0, 600.0
"""Seconds between two signs of life of a run's process, and after how many without one it is gone."""

PRIVATE = 0o770
"""The mode of a run's folder, less the user's umask: code, patches and logs are nothing for others."""


class State(StrEnum):
    """What has become of a run."""

    PENDING = "PENDING"
    """Handed over, or requeued, and has not begun."""
    RUNNING = "RUNNING"
    INTERRUPTED = "INTERRUPTED"
    """The job has saved its last step and left before its end, to be requeued."""
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    DIED = "DIED"
    """The process is gone and said nothing: killed, out of memory, or the machine went down."""
    DAMAGED = "DAMAGED"
    """Its status cannot be read; never written."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen without a new attempt."""
        return self not in (State.PENDING, State.RUNNING, State.INTERRUPTED)


@dataclass(frozen=True)
class Status:
    """The content of a run's `status` file, written by whoever is responsible for the run at the moment."""

    state: State
    host: str = ""
    machine: str = ""
    """`this_machine` of the process, by which it is found when the host has another name."""
    pid: int = 0
    process_started: int = 0
    """When the process began, as `processes.started` says: a pid alone may since belong to another process."""
    attempt: int = 1
    started: float = 0.0
    ended: float | None = None
    exit_code: int | None = None
    reason: str = ""
    executor: str = "direct"
    failures: int = 0
    """How often in a row the run has failed at `failed_step`."""
    failed_step: int = -1


@dataclass(frozen=True)
class StopRequest:
    """That a run shall save the step in hand and leave; the content of its `stop` file."""

    reason: str
    requeue: bool = False
    """Whether it is to go on later, or is cancelled."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.path.name

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def log(self) -> Path:
        """Everything that the job printed, all attempts."""
        return self.path / "log.txt"

    @property
    def metrics(self) -> Path:
        """One row a logged step."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """A folder for each checkpoint."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the run's tokens came from."""
        return self.path / "tokenizer.json"

    @property
    def environment(self) -> Path:
        """Code revision and patch, packages and hardware."""
        return self.path / "environment.json"

    @property
    def command(self) -> Path:
        """What was typed to start the run, a line for each attempt."""
        return self.path / "command"

    @property
    def executor(self) -> Path:
        """Where the run was sent, and how."""
        return self.path / "executor.json"

    @property
    def job_id(self) -> str:
        """The executor's id of the newest job: Slurm's number, a container's name; "" before it was submitted."""
        file = self.path / "job_id"
        return file.read_text(errors="replace").strip() if file.exists() else ""

    @property
    def script(self) -> Path:
        """The shell script that runs the job on each node, whatever the executor."""
        return self.path / "job.sh"

    @property
    def code(self) -> Path:
        """The copy of the working tree that the job imports; missing where it imports the tree itself."""
        return self.path / "code"

    @property
    def logs(self) -> Path:
        """What the ranks other than the first printed, a file for each."""
        return self.path / "logs"

    @property
    def launcher_lock(self) -> Path:
        """Locked by the launcher of an attached job for as long as it lives."""
        return self.path / ".launcher"

    @property
    def lock(self) -> Path:
        """Locked by the process that has the run to itself, and touched by it now and then."""
        return self.path / ".lock"

    @property
    def submitted(self) -> bool:
        """Whether `job_id` is that of the newest submission, and not of one before."""
        try:
            return (self.path / "job_id").stat().st_mtime_ns >= self.command.stat().st_mtime_ns
        except FileNotFoundError:
            return False

    @property
    def scheduler_log(self) -> Path:
        """What the scheduler and its script printed, outside the job."""
        return self.path / "scheduler.txt"

    def last_error(self) -> str:
        """What the job's script said in the last line of the log, if that is an error."""
        last = "".join(last_lines(self.log, 1))
        return last.removeprefix("error: ") if last.startswith("error: ") else ""

    @property
    def wandb_id(self) -> str:
        """The W&B id of this run, the same for all its attempts."""
        file = self.path / "wandb_id"
        if not file.exists():
            write_atomically(file, secrets.token_hex(4))
        return file.read_text(errors="replace")

    def status(self) -> Status | None:
        """What the status file says, corrected by a look at the process; None before the run was submitted."""
        status = self.written_status()
        while status and not status.state.ended and not alive(self, status):
            before, status = status, self.written_status()
            if status == before:  # else it has begun or ended since it was read
                where = "" if is_here(before) else f" of {before.host}"
                return replace(before, state=State.DIED, reason=before.reason or f"process {before.pid}{where} is gone")
        return status

    def status_of_launch(self) -> Status | None:
        """Like `status`, for a run that was not submitted when it was looked at.

        If it was submitted since then, its launcher may be gone, and that says nothing of the job.
        """
        found = self.status()
        return self.written_status() if self.submitted else found

    def written_status(self) -> Status | None:
        """What the status file says.

        Raises:
            ConfigError: it cannot be read, or is not a status; it says what to do.
        """
        try:
            written = read_json(self.path / "status")
            names = [field.name for field in fields(Status)]
            known = {name: written[name] for name in names if name in written} if isinstance(written, dict) else written
            status = filled(Status, known)
            times = (status.started, status.ended or 0.0)
            if status.state is State.DAMAGED or not all(abs(time) <= _LATEST for time in times):
                raise ValueError(f"state={str(status.state)!r}, started={status.started}, ended={status.ended}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ConfigError(f"{self.path}/status cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(
                f"{self.path}/status is damaged: {reason(error)}; delete it once the run's process is gone, and start "
                "the run again: it goes on from its newest checkpoint"
            ) from error
        return status

    def write_status(self, status: Status) -> None:
        """Replaces the status file; on a full disk it is written over, as what is there takes no more room."""
        file, values = self.path / "status", asdict(status)
        try:
            write_atomically(file, json.dumps(values, indent=2) + "\n")
        except OSError as error:
            if error.errno not in FULL_DISK or not file.exists():
                raise
            found = file.stat()
            values["reason"] = values["reason"].encode("ascii", "replace").decode()  # else a letter takes six bytes
            beyond = len(json.dumps(values, indent=2)) + 1 - max(found.st_size, 512 * found.st_blocks)
            if beyond > 0:
                values["reason"] = values["reason"][:-beyond]
            text = json.dumps(values, indent=2) + "\n"
            with file.open("r+") as stream:
                stream.write(text.ljust(found.st_size))  # JSON may end in blanks, so that nothing is left to cut off

    def request_stop(self, request: StopRequest) -> None:
        """Asks the job, wherever it runs, to save the step in hand and leave.

        An earlier request stands, unless that was to go on later and this one is not.
        """
        earlier = self.stop_request()
        if earlier is None or (earlier.requeue and not request.requeue):
            write_atomically(self._stop, json.dumps(asdict(request)) + "\n")

    def stop_request(self) -> StopRequest | None:
        """What was asked of the present attempt; None is to go on."""
        try:
            return filled(StopRequest, read_json(self._stop))
        except OSError:  # it is not there; or a shared file system stumbles, and will be asked again
            return None
        except ValueError:
            return StopRequest("someone wrote its stop file by hand")

    def stop_requested_since_submission(self) -> bool:
        """Whether there is a request and it is younger than the newest line of `command`."""
        try:
            return self._stop.stat().st_mtime_ns >= self.command.stat().st_mtime_ns
        except OSError:
            return False

    def clear_stop_request(self) -> None:
        """Forgets what was asked of an earlier attempt."""
        self._stop.unlink(missing_ok=True)

    @property
    def _stop(self) -> Path:
        return self.path / "stop"

    def last_metrics(self) -> dict[str, str]:
        """The newest value of each metric, as text; empty before the first.

        Of a large file the end is read, so a metric that was not logged for thousands of steps is left out; so is one
        of `spoiled_metrics`.
        """
        return {name: value for name, value in self._newest_values().items() if is_number(value)}

    def spoiled_metrics(self) -> dict[str, str]:
        """What `metrics.csv` has as the newest value of a metric, and is not a number."""
        return {name: value for name, value in self._newest_values().items() if not is_number(value)}

    def _newest_values(self) -> dict[str, str]:
        latest: dict[str, str] = {}
        header, rows = self._newest_rows()
        for row in rows:
            for name, value in zip(header, row, strict=False):
                if value:
                    latest.setdefault(name, value)
            if len(latest) == len(header):
                break
        return {name: latest[name] for name in header if name in latest}

    def last_step(self) -> int:
        """The newest step in `metrics.csv`; 0 before the first."""
        _, rows = self._newest_rows()
        return next((int(row[0]) for row in rows if row and row[0].isdecimal() and len(row[0]) < 20), 0)

    def _newest_rows(self) -> tuple[list[str], Iterator[list[str]]]:
        """The columns of `metrics.csv` and its rows, the newest first, without a last one that is cut short."""
        try:
            with self.metrics.open("rb") as file:
                first = file.readline()
                start = max(file.tell(), file.seek(0, os.SEEK_END) - MAX_METRICS_READ)
                file.seek(start)
                lines = file.read().decode(errors="replace").replace("\0", "\ufffd").split("\n")
        except FileNotFoundError:
            return [], iter(())
        if start > len(first):
            del lines[0]  # its beginning was not read
        columns = next(_rows([first.decode(errors="replace").replace("\0", "\ufffd")]), [])
        return columns, _rows(lines[-2::-1])


@contextlib.contextmanager
def exclusive(run: RunDirectory, patience: float = 1.0) -> Iterator[None]:
    """Keeps every other process from writing to a run; the lock ends with this block or with the process.

    Args:
        patience: for how many seconds to wait for another process to leave; one that only looks has left at once.

    Raises:
        ConfigError: another process has it.
    """
    deadline = time.monotonic() + patience
    with run.lock.open("a") as file:  # opened for writing anew it would seem to have been touched
        while not locks.take(file):
            if time.monotonic() >= deadline:
                raise ConfigError(f"log.name={run.name!r} is running: another process holds {file.name}")
            time.sleep(0.1)
        os.utime(run.lock)
        yield


def this_process(attempt: int, executor: str) -> Status:
    """The status of a run for which this process is responsible from now on."""
    return Status(
        State.RUNNING,
        host=socket.gethostname(),
        machine=this_machine(),
        pid=os.getpid(),
        process_started=process_started(os.getpid()) or 0,
        attempt=attempt,
        started=time.time(),
        executor=executor,
    )


def _rows(lines: list[str]) -> Iterator[list[str]]:
    """The rows of CSV, each on a line; a line that is not CSV is a row with one cell."""
    import csv

    for line in lines:
        try:
            yield from csv.reader([line])
        except csv.Error:
            yield [line]


def is_number(text: str) -> bool:
    """Whether a text is a number, infinity and NaN among them."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def find_run(name: str, directory: str | Path = "runs") -> RunDirectory:
    """The run called `name` in `directory`, or in the folder that `name` is the path of.

    Raises:
        ConfigError: there is no such run.
    """
    for path in (user_path(directory) / name, user_path(name)):
        if (path / "recipe.yaml").is_file():
            return RunDirectory(path.resolve())
    names = [run.name for run in list_runs(directory)]
    raise ConfigError(f"{unknown('run', name, names)} (looked in {directory}/)")


def list_runs(directory: str | Path = "runs") -> list[RunDirectory]:
    """Every run in `directory`, the oldest first."""
    folders = user_path(directory).glob("*/recipe.yaml")
    return [RunDirectory(file.parent.resolve()) for file in sorted(folders, key=lambda file: file.stat().st_mtime)]


def reserve_name(recipe: str, directory: str | Path = "runs") -> str:
    """Makes the folder of a new run and returns its name: the recipe's, the date and the time."""
    name = f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        with contextlib.suppress(FileExistsError):  # another run began in the same second
            (user_path(directory) / (name + suffix)).mkdir(PRIVATE, parents=True)
            return name + suffix
    raise ConfigError(f"log.name: a thousand runs called {name} began in one second; give this one a name")


def last_lines(file: Path, count: int) -> list[str]:
    """The last lines of a text that may be larger than memory, without blank ones at its end; none without a file.

    What is more than `MAX_LINES_READ` bytes from the end is left out.
    """
    if not file.exists():
        return []
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - MAX_LINES_READ))
        return stream.read().decode(errors="replace").rstrip().splitlines()[-count:]


def plain_recipe(file: Path) -> dict[str, Any]:
    """A saved recipe as plain nested values, for a logger to show; tagged values become their text.

    Raises:
        ConfigError: the file is not a recipe.
    """

    import yaml

    class Plain(yaml.SafeLoader):
        pass

    def construct(loader: Any, suffix: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return node.value
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_mapping(node, deep=True)

    Plain.add_multi_constructor("!", construct)
    if not file.exists():
        return {}
    try:
        loaded = yaml.load(file.read_text(encoding="utf-8"), Plain)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} is not a recipe")
    return loaded


def is_here(status: Status) -> bool:
    """Whether the process that wrote `status` was one of this machine, or container, so that its number says who it is.

    The name of the machine does not count, unless nothing better was written down: it may be another by now.
    """
    return status.machine == this_machine() if status.machine else status.host == socket.gethostname()


def alive(run: RunDirectory, status: Status) -> bool:
    """Whether the process that wrote `status` runs.

    One that cannot be looked at from here runs if it holds the run's lock. Where it does not, it is gone if it would
    have to share the lock with this machine, or if it has not touched the lock for `MISSING` seconds.
    """
    if is_here(status) and (known := is_running(status.pid, status.process_started)) is not None:
        return known
    if is_locked(run):
        return True
    boot = status.machine.partition("/")[0]
    if boot and this_boot():
        if boot != this_boot() and status.host == socket.gethostname():
            return False  # it was this machine, which has started again since
        if boot == this_boot() and status.state is not State.PENDING:  # before it begins, a run is not locked
            return False
    return time.time() - last_heard_of(run, status) < MISSING


def is_locked(run: RunDirectory) -> bool:
    """Whether a process, on whatever machine, has the run to itself; False also where the file system cannot say."""
    return locks.is_taken(run.lock)


def last_heard_of(run: RunDirectory, status: Status) -> float:
    """When the run's process has last shown that it runs, in seconds since the epoch."""
    touched = run.lock.stat().st_mtime if run.lock.exists() else 0.0
    return max(status.started, touched)


def way_out(run: RunDirectory) -> str:
    """What to do about a run whose machine is gone, in words."""
    return f"if that is gone: `fiddlehead runs cancel {run.name} --force`"


@contextlib.contextmanager
def showing_life(run: RunDirectory) -> Iterator[None]:
    """Touches the run's lock every `HEARTBEAT` seconds until the block ends, for those who cannot see this process."""
    over = threading.Event()

    def touch() -> None:
        while not over.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # a shared file system stumbles; the next time is soon
                os.utime(run.lock)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
