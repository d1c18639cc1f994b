"""The files of a run; `fiddlehead.run` says what each is for, and who writes it when."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fiddlehead.errors import FULL_DISK, ConfigError, Problem
from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.foreign import filled, read_json, reason
from fiddlehead.run import history, locks, metrics_file
from fiddlehead.run.alive import alive, is_here
from fiddlehead.run.history import History
from fiddlehead.run.prediction import Prediction
from fiddlehead.run.status import State, Status, StopRequest

if TYPE_CHECKING:
    import pandas  # pyright: ignore[reportMissingImports]  # an optional extra

MAX_LINES_READ = 2**16
"""The bytes at the end of a log that are read for its last lines."""
_LATEST = 1e12
"""Seconds since the epoch that no status has."""
PRIVATE = 0o770
"""The mode of a run's folder, less the user's umask: code, patches and logs are nothing for others."""


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
    def sources(self) -> Path:
        """Where each value of the recipe was set: a file and a line, or the command line."""
        return self.path / "sources.json"

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
    def plan(self) -> Path:
        """What the plan predicts of memory and speed."""
        return self.path / "plan.json"

    def write_prediction(self, prediction: Prediction) -> None:
        """Writes what the plan predicts."""
        write_atomically(self.plan, json.dumps(asdict(prediction), indent=1) + "\n")

    def prediction(self) -> Prediction | None:
        """What the plan predicted; None of a run that has no plan, or a damaged one, which `damage.find` tells."""
        try:
            return filled(Prediction, read_json(self.plan))
        except (OSError, ValueError):
            return None

    @property
    def job_id(self) -> str:
        """The executor's id of the newest job: Slurm's number, a container's name; "" before it was submitted."""
        return self._job[0]

    def write_job_id(self, job_id: str) -> None:
        """Notes the id of the job that was handed over, and with which attempt."""
        status = self._status_or_none()
        write_atomically(self.path / "job_id", f"{job_id}\n{status.submission if status else 0}\n")

    @property
    def _job(self) -> tuple[str, int]:
        """The id of the newest job, and the attempt with which it was handed over; 0 is not known."""
        file = self.path / "job_id"
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        number = lines[1].strip() if len(lines) > 1 else ""
        known = number.isascii() and number.isdecimal() and len(number) < 20
        return lines[0].strip() if lines else "", int(number) if known else 0

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
        (job_id, submission), status = self._job, self.written_status()
        # A launcher of an earlier version has numbered nothing.
        return bool(job_id) and (status is None or status.submission in (0, submission))

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

    @property
    def wandb_url(self) -> str:
        """The address of this run in W&B; "" if it is not known, as for an offline one."""
        file = self.path / "wandb_url"
        return file.read_text(errors="replace").strip() if file.exists() else ""

    def write_wandb_url(self, url: str) -> None:
        """Notes the address of this run in W&B."""
        write_atomically(self.path / "wandb_url", f"{url}\n")

    @property
    def mlflow_id(self) -> str:
        """The id of this run in MLflow, which all its attempts go on with; "" if it has none, or a damaged one."""
        file = self.path / "mlflow_id"
        found = file.read_text(errors="replace").strip() if file.exists() else ""
        return found if re.fullmatch(r"\w{1,64}", found, re.ASCII) else ""

    def write_mlflow_id(self, run_id: str) -> None:
        """Notes the id of this run in MLflow."""
        write_atomically(self.path / "mlflow_id", f"{run_id}\n")

    @property
    def early_end(self) -> str:
        """Why the newest attempt ended before its last step, though it succeeded; "" if it did not."""
        file = self.path / "early_end"
        return file.read_text(errors="replace").strip() if file.exists() else ""

    def write_early_end(self, reason: str) -> None:
        """Notes why the attempt ends before its last step; "" forgets it."""
        if reason:
            write_atomically(self.path / "early_end", f"{reason}\n")
        else:
            (self.path / "early_end").unlink(missing_ok=True)

    def status(self) -> Status | None:
        """What the status file says, corrected by a look at the process; None before the run was submitted."""
        status = self.written_status()
        while status and not status.state.ended and not alive(self.lock, status):
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
            raise ConfigError(Problem.in_file(f"{self.path}/status", f"cannot be read: {error.strerror}")) from error
        except ValueError as error:
            message = (
                f"is damaged: {reason(error)}; delete it once the run's process is gone, and start the run again: it "
                "goes on from its newest checkpoint"
            )
            raise ConfigError(Problem.in_file(f"{self.path}/status", message)) from error
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

        An earlier request stands, unless it was of an earlier submission, or to go on later and this one is not.
        """
        earlier, status = self.stop_request(), self._status_or_none()
        if earlier is None or _is_outdated(earlier, status) or (earlier.requeue and not request.requeue):
            request = replace(request, attempt=status.attempt if status else 0)
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
        """Whether there is a request, and it is not of a submission before the newest one."""
        request, status = self.stop_request(), self._status_or_none()
        return request is not None and status is not None and not _is_outdated(request, status)

    def clear_stop_request(self) -> None:
        """Forgets what was asked of an earlier attempt, before the next one can be asked anything."""
        self._stop.unlink(missing_ok=True)

    def _status_or_none(self) -> Status | None:
        """`written_status`; None also if that is damaged, which must not keep a run from being stopped."""
        try:
            return self.written_status()
        except ConfigError:
            return None

    @property
    def _stop(self) -> Path:
        return self.path / "stop"

    def history(self) -> History:
        """All logged metrics, as `fiddlehead.run.history.read`."""
        return history.read(self.metrics)

    def frame(self) -> pandas.DataFrame:
        """All logged metrics as a pandas DataFrame: a row for each logged step, a column for each metric.

        Raises:
            ConfigError: pandas is not installed.
        """
        from fiddlehead.run.frame import frame

        return frame(self.history())

    def last_metrics(self) -> dict[str, str]:
        """As `metrics_file.last_values`."""
        return metrics_file.last_values(self.metrics)

    def spoiled_metrics(self) -> dict[str, str]:
        """As `metrics_file.spoiled_values`."""
        return metrics_file.spoiled_values(self.metrics)

    def last_step(self) -> int:
        """As `metrics_file.last_step`."""
        return metrics_file.last_step(self.metrics)


def _is_outdated(request: StopRequest, status: Status | None) -> bool:
    """Whether a request is of an earlier submission; a launch deletes what has no number, so that is of this one."""
    return status is not None and 0 < request.attempt < status.submission


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
                raise ConfigError(Problem("log.name", run.name, f"is running: another process holds {file.name}"))
            time.sleep(0.1)
        os.utime(run.lock)
        yield


def last_lines(file: Path, count: int) -> list[str]:
    """The last lines of a text that may be larger than memory, without blank ones at its end; none without a file.

    What is more than `MAX_LINES_READ` bytes from the end is left out.
    """
    if not file.exists():
        return []
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - MAX_LINES_READ))
        return stream.read().decode(errors="replace").rstrip().splitlines()[-count:]
