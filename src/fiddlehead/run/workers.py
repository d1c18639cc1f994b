"""The training processes of a run, one for each device.

The job's process on a node starts them, with the environment variables that torchrun gives its workers, and waits; or
`srun`, or torchrun itself, has started one process for each device already. They talk through torch.distributed. What
a signal, or another node's failure, means to them reaches them through the run directory, which all nodes share.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from fiddlehead.errors import ConfigError, Problem, StopRequested
from fiddlehead.recipe.plain import plain_recipe
from fiddlehead.run import outcomes, signals
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.processes import die_with_parent, usable_cpus
from fiddlehead.run.status import StopRequest

PATIENCE = 60.0
"""Seconds that the other processes have to leave after one that was asked to stop."""
_PARENT = "FIDDLEHEAD_PARENT"
JOB_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE",
    _PARENT, "FIDDLEHEAD_REQUEUES", "FIDDLEHEAD_LAUNCHER_LOCK",
)  # fmt: skip
"""Environment variables that tell a process of a job which one it is: torchrun's, IBM's jsrun's and our own.

`MASTER_ADDR` and `MASTER_PORT` are not among them, as a job on several nodes is given them."""


@dataclass(frozen=True)
class Rank:
    """One of the processes that train together."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int

    def variables(self, address: str, port: int | str) -> dict[str, str]:
        """The environment variables by which torch and Lightning know it, as torchrun sets them."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            # Lightning takes such a process for torchrun's, and leaves Slurm alone.
            "TORCHELASTIC_RUN_ID": os.environ.get("SLURM_JOB_ID", "job"),
        }


def around_us() -> list[str]:
    """The environment variables of a job that this process was started in, and which is not the one that it starts."""
    slurm = [
        name for name in os.environ if name.startswith("SLURM_") and not name.startswith(("SLURM_CONF", "SLURM_JWT"))
    ]
    return [*slurm, *(name for name in JOB_VARIABLES if name in os.environ)]


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """In the block this process is no part of the job that it was started in: Lightning would believe that it is."""
    hidden = {name: os.environ.pop(name) for name in around_us()}
    try:
        yield
    finally:
        os.environ.update(hidden)


def is_first() -> bool:
    """Whether this process is responsible for the run: the first one of its job that was not started by another."""
    names = ["SLURM_PROCID", "SLURM_NODEID"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names.append("RANK")
    return not started_by_job() and all(os.environ.get(name, "0") == "0" for name in names)


def started_by_job() -> bool:
    """Whether this is a process that `run_workers` has started."""
    return _PARENT in os.environ


def this_rank(nodes: int, devices: int) -> Rank | None:
    """Which of `nodes` times `devices` processes this one is; None if it is to start those of its node.

    Raises:
        ConfigError: the job has another number of nodes or processes.
    """
    world_size = nodes * devices
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        found = Rank(*map(_number, names))
    elif _number("SLURM_STEP_NUM_TASKS", 1) > nodes:
        numbers = map(_number, ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
        found = Rank(*numbers, local_world_size=devices, node=_number("SLURM_NODEID"))
    elif nodes > 1 and _number("SLURM_NNODES", 1) != nodes:
        raise ConfigError(Problem("trainer.num_nodes", nodes, f"the job has {_number('SLURM_NNODES', 1)}"))
    else:
        return Rank(0, 1, 0, 1, 0) if world_size == 1 else None
    if found.world_size != world_size:
        message = f"with trainer.devices={devices} needs {world_size} processes, and {found.world_size} were started"
        raise ConfigError(Problem("trainer.num_nodes", nodes, message))
    return found


def _number(variable: str, default: int = 0) -> int:
    return int(os.environ.get(variable, default))


def size(run: RunDirectory) -> tuple[int, int]:
    """Nodes and devices on each, as the run's recipe has them."""
    trainer = plain_recipe(run.recipe).get("trainer", {})
    nodes, devices = trainer.get("num_nodes", 1), trainer.get("devices", 1)
    return nodes, devices if isinstance(devices, int) else 1


# -- in the process that starts them


def run_workers(run: RunDirectory, nodes: int, devices: int, arguments: Sequence[str]) -> None:
    """Runs the job's command once for each of this node's devices, and waits for all to end.

    Raises:
        ConfigError: nothing says where the other nodes are.
        StopRequested: they were asked to stop, and have saved their step.
        outcomes.WorkersFailedError: one failed, here or on another node; those here were ended.
    """
    node = _number("SLURM_NODEID") if nodes > 1 else 0
    signals.stop_after_step(run)
    threads = str(max(1, usable_cpus() // devices))
    first = node * devices
    with socket.socket() as reserved:
        address, port = free_address(reserved) if nodes == 1 else given_address()
        processes: dict[int, subprocess.Popen] = {}
        try:
            for local_rank in range(devices):
                rank = Rank(first + local_rank, nodes * devices, local_rank, devices, node)
                variables = {"OMP_NUM_THREADS": threads, **os.environ, **rank.variables(address, port)}
                variables[_PARENT] = str(os.getpid())
                command = [sys.executable, "-u", "-m", "fiddlehead.job", *arguments]
                processes[rank.rank] = subprocess.Popen(command, env=variables)
            codes = _wait(run, processes, alone=nodes == 1)
        finally:
            for process in processes.values():
                process.kill()  # they ignore all but this
                process.wait()
    _conclude(run, codes, alone=nodes == 1)


def _wait(run: RunDirectory, processes: dict[int, subprocess.Popen], *, alone: bool) -> dict[int, int | None]:
    """Waits until all have ended, or one has failed, or one was asked to stop and the others had time to.

    Returns the exit codes by rank, None for those that still run.
    """
    deadline = float("inf")
    next_look = 0.0
    while True:
        codes = {rank: process.poll() for rank, process in processes.items()}
        seen = set(codes.values())
        if None not in seen or time.monotonic() > deadline:
            return codes
        if not alone and time.monotonic() > next_look:
            seen |= {outcome.exit_code for outcome in outcomes.read(run)}
            next_look = time.monotonic() + 1.0
        if seen.intersection(outcomes.STOPPED):
            deadline = min(deadline, time.monotonic() + PATIENCE)
        elif seen - {None, 0}:
            return codes
        time.sleep(0.1)


def _conclude(run: RunDirectory, codes: dict[int, int | None], *, alone: bool) -> None:
    """Raises what the processes of all nodes ended with, if they did not all succeed."""
    told = {outcome.who for outcome in outcomes.read(run)}
    failed = {rank: code for rank, code in codes.items() if code is not None and code not in (0, *outcomes.STOPPED)}
    for rank, code in failed.items():
        if f"rank {rank}" not in told:
            how = f"ended with exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
            outcomes.leave(run, f"rank {rank}", code, how)
    if failed and not alone:
        time.sleep(1.0)  # the cause may be another node's, which is as busy to say so
    stopped = [code for code in codes.values() if code in outcomes.STOPPED]
    verdict = outcomes.conclusion(run)
    if verdict is None and stopped:
        verdict = StopRequested("stopped, as the first rank was asked to", requeue=75 in stopped)
    if verdict is not None:
        raise verdict


# -- in the processes themselves


def become_worker(run: RunDirectory) -> None:
    """Makes this process, which `run_workers` has started, end with its parent, and leaves signals to that."""
    signals.ignore()
    die_with_parent(int(os.environ[_PARENT]))
    log_to_own_file(run)

    def leave(request: StopRequest) -> None:
        stop = signals.without_a_step(request)
        outcomes.leave(run, outcomes.own_name(), stop.exit_code, str(stop))
        os._exit(stop.exit_code)

    if os.environ["GROUP_RANK"] == "0":  # on other nodes, the stop file may yet be an earlier attempt's
        signals.watch_until_training(run, leave)


def join(run: RunDirectory, rank: Rank) -> None:
    """Makes this process, which the job or its scheduler has started, the `rank` that it is.

    Raises:
        ConfigError: nothing says where the first rank is.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        reserved = socket.socket()
        os.environ.update(rank.variables(*(given_address() if rank.world_size > 1 else free_address(reserved))))
        reserved.detach()  # open for as long as this process lives
    if rank.rank > 0:
        signals.ignore()
        log_to_own_file(run)
    else:
        signals.watch_until_training(run, lambda request: os.kill(os.getpid(), signal.SIGINT))


def log_to_own_file(run: RunDirectory) -> None:
    """Sends what this process prints to the file of its rank; the first rank's is the run's log."""
    rank = os.environ["RANK"]
    if rank == "0":
        return
    run.logs.mkdir(exist_ok=True)
    with outcomes.log_of(run, f"rank {rank}").open("a") as file:
        if os.path.sameopenfile(file.fileno(), sys.stdout.fileno()):
            return  # the job's script has done it
        file.write(
            f"=== started {datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z} on {socket.gethostname()} ({_where()})\n"
        )
        file.flush()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def _where() -> str:
    place = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    if "SLURM_JOB_ID" in os.environ:
        place += f", slurm job {os.environ['SLURM_JOB_ID']}"
    if _number("SLURM_RESTART_COUNT"):
        place += f", restart {os.environ['SLURM_RESTART_COUNT']}"
    return place


# -- where they meet


def given_address() -> tuple[str, int]:
    """The address and port of the first rank, which whoever starts a job on several nodes sets.

    Raises:
        ConfigError: they are not set.
    """
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise ConfigError("MASTER_ADDR and MASTER_PORT must be the address and port of the first process") from None


def free_address(reserved: socket.socket) -> tuple[str, int]:
    """An address and port on this machine, which no other process is given for as long as `reserved` is open."""
    # Bound but not listening: the first rank, which sets this option too, can still listen there.
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved.getsockname()
