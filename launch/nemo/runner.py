"""What NeMo-Run's runner calls in a job: it makes the run's directory, and then does what `fiddlehead.job` does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fiddlehead import job
from fiddlehead.errors import ConfigError, RunError
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.fitting import fit_to_executor
from fiddlehead.launch.nemo.planned import Started
from fiddlehead.launch.slurm import SlurmExecutor
from fiddlehead.launch.submit import write_run
from fiddlehead.recipe import Recipe, trust
from fiddlehead.run import workers
from fiddlehead.run.directory import RunDirectory

_PATIENCE = 120.0
"""Seconds that the other processes of a job wait for the first one to write the run down."""


def run_in_job(recipe: str, folder: str, name: str, allow: Sequence[str] = (), executor: str = "") -> None:
    """Runs a recipe as the run `name` in `folder`. Every process of the job calls it; the first one writes the status.

    Exits with the job's exit code if that is not 0.

    Args:
        recipe: as YAML.
        allow: names of a user's own that the recipe may use.
        executor: settings of our executor that knows a Slurm job's state, as JSON; "" if none does.
    """
    try:
        code = _run(recipe, Path(folder), name, allow, executor)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        code = 2 if isinstance(error, ConfigError) else 1
    if code:
        sys.exit(code)


def _run(text: str, folder: Path, name: str, allow: Sequence[str], executor: str) -> int:
    recipe = fit_to_executor(Recipe.from_yaml(text, allow=tuple(allow)), _started())
    recipe.log.dir, recipe.log.name = str(folder.absolute()), name
    run = RunDirectory(folder.absolute() / name)
    _set_address(int(recipe.trainer.num_nodes) * int(recipe.trainer.devices))
    # NeMo-Run's script queues a Slurm job again as often as this says.
    if "SLURM_JOB_ID" in os.environ:
        os.environ.setdefault("FIDDLEHEAD_REQUEUES", os.environ.get("TORCHX_MAX_RETRIES", "0"))
    arguments = [str(run.recipe), *(word for each in allow for word in ("--allow", each))]
    if not workers.is_first():
        _wait_for(run, recipe.to_yaml())
        return job.main(arguments)
    if not _is_next_attempt(run):
        write_run(recipe, None, name=None, command=f"nemo_run: {shlex.join(sys.argv)}", allow=allow)
        _note_job(run, recipe, executor)
    with _copied_to(run.log):
        return job.main(arguments)


def _note_job(run: RunDirectory, recipe: Recipe, executor: str) -> None:
    """Notes which job the run is, and who knows its state: Slurm, or else only the run's own process."""
    kind = "nemo_run"
    if executor and _job_number():
        ours = SlurmExecutor.of(**json.loads(executor))
        ours.save(run)
        trust.remember(run, recipe.names_to_allow())
        kind = ours.kind
    status = run.written_status()
    if status is not None:
        run.write_status(replace(status, executor=kind))
    run.write_job_id(_job_number())


def _started() -> Executor:
    """The nodes and the processes on each that NeMo-Run has started, by Slurm or by torchrun."""
    number = lambda variable: int(os.environ.get(variable) or 0)  # noqa: E731
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = number("LOCAL_WORLD_SIZE")
        return Started(nodes=number("WORLD_SIZE") // devices, ntasks_per_node=devices)
    nodes, tasks = number("SLURM_NNODES"), number("SLURM_STEP_NUM_TASKS")
    return Started(nodes=nodes, ntasks_per_node=tasks // nodes if nodes and tasks > nodes else 0)


def _set_address(world_size: int) -> None:
    """Sets the address of the first process of a Slurm job, which NeMo-Run leaves to Lightning."""
    if world_size > 1 and "SLURM_NODELIST" in os.environ and "MASTER_ADDR" not in os.environ:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        slurm = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = _address_of(slurm.main_address), str(slurm.main_port)


def _address_of(node: str) -> str:
    """The address by which Slurm knows a node, whose name the network may not know; the name, in a container."""
    if not shutil.which("scontrol"):
        return node
    shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True).stdout
    found = re.search(r"NodeAddr=(\S+)", shown)
    return found[1] if found else node


def _is_next_attempt(run: RunDirectory) -> bool:
    """Whether the run was written down by this very job, before it was queued or started again."""
    status = run.written_status()
    number = _job_number()
    return status is not None and not status.state.ended and bool(number) and run.job_id == number


def _job_number() -> str:
    return os.environ.get("SLURM_JOB_ID", "")


def _wait_for(run: RunDirectory, recipe: str) -> None:
    """Waits until the first process has written the run down."""
    deadline = time.monotonic() + _PATIENCE
    while not (run.recipe.exists() and run.recipe.read_text() == recipe):
        if time.monotonic() > deadline:
            raise RunError(f"the first process of the job has not written {run.recipe} in {_PATIENCE:g} s")
        time.sleep(0.2)


@contextlib.contextmanager
def _copied_to(log: Path) -> Iterator[None]:
    """Appends the output of this process and of those that it starts to a file; it also goes where it went."""
    now = f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}"
    where = f"slurm job {_job_number()}" if _job_number() else "NeMo-Run"
    with log.open("a") as file:
        file.write(f"=== started {now} on {socket.gethostname()} ({where})\n")
    # A signal to the job's processes must not end this one before the last line.
    command = ["sh", "-c", 'trap "" INT TERM USR1; exec tee -a "$0"', str(log)]
    copy = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert copy.stdin is not None
    kept = [os.dup(1), os.dup(2)]
    for number in (1, 2):
        os.dup2(copy.stdin.fileno(), number)
    copy.stdin.close()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
            os.close(before)
        copy.wait()
