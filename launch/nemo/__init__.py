"""All use of NeMo-Run: how its parts start jobs, and workarounds for its side effects.

- `start_process`: its experiment with a LocalExecutor, for `local`
- `start_container`: its DockerContainer, for `docker`
- `sbatch_script`: its SlurmBatchRequest, for `slurm`
- `open_tunnel`: its SSHTunnel, for a cluster on another machine
- `hand_over`, `experiment_of`: its experiment with any executor, for those that are not taken over

The other files of this folder: `settings`, `fields` and `takes` make our executors from NeMo-Run's, `accept` does so
wherever an executor is expected, and `handed` is for those that are used as they are; `experiments` and `runner` make
runs of the recipes in NeMo-Run's experiments, `planned` plans these, and `plugins` has NeMo's plugins for them.

Each workaround has a test in tests/launch/nemo/, which fails when a new release of NeMo-Run no longer needs it.
fiddlehead.recipe.in_nemo_run makes NeMo-Run accept a `Recipe` as its own configuration; it needs no launcher. NeMo-Run
is imported when it is first needed.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiddlehead.errors import ConfigError, Problem

if TYPE_CHECKING:
    from docker import DockerClient
    from nemo_run import Experiment

_experiments: list[Experiment] = []
"""Kept until this process ends: an `Experiment` that is deleted takes a handler from the root logger with it."""


def start_process(name: str, script: Path, folder: Path) -> int:
    """Starts a shell script on this machine, in a session of its own, and returns its process id.

    Args:
        name: of NeMo-Run's experiment.
        script: continues after this process, and redirects its own output.
        folder: where NeMo-Run keeps its own files.
    """
    import nemo_run

    with _logging_kept():
        experiment = nemo_run.Experiment(
            name,
            executor=nemo_run.LocalExecutor(),
            base_dir=str(folder),
            log_level="ERROR",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
            serialize_metadata_for_scripts=False,
        )
        _experiments.append(experiment)
        with experiment:
            experiment.add(nemo_run.Script(inline=f"exec bash {shlex.quote(str(script))}"), name="job")
            experiment.run()
            experiment.detach = True  # only that leaving this block does not wait
            return _release(experiment)


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """Restores the root logger's handlers and level after NeMo-Run has set them; they belong to the program."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # it would close them
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _release(experiment: Experiment) -> int:
    """Keeps NeMo-Run's local scheduler from ending this job when it ends itself; returns the job's process id."""
    scheduler: Any = experiment._runner._scheduler("local_persistent")
    (job,) = [replica for app in scheduler._apps.values() for group in app.role_replicas.values() for replica in group]
    for stream in (job.stdout, job.stderr, job.combined):  # the job's own log has its output
        if stream:
            stream.close()  # the last is a thread that copies, and would keep this process from leaving
    scheduler.close = lambda: None
    job.proc.returncode = 0  # else subprocess warns of a process that was left running
    return job.proc.pid


def hand_over(title: str, executor: Any, script: str) -> str:
    """Runs shell lines as the task `job` of an experiment with an executor of NeMo-Run's; returns the experiment's id.

    Raises:
        ConfigError: NeMo-Run does not know such an executor, or refuses it.
    """
    import nemo_run

    _register(type(executor))
    with _logging_kept():
        experiment = nemo_run.Experiment(
            title,
            executor=executor,
            log_level="ERROR",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
        )
        _experiments.append(experiment)
        try:
            with experiment:
                experiment.add(nemo_run.Script(inline=script), name="job")
                experiment.run()
                experiment.detach = True
                experiment._runner.close = lambda: None  # it would end the jobs of this machine
        except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
            name = type(executor).__name__
            message = f"NeMo-Run cannot start it: {type(error).__name__}: {error}"
            raise ConfigError(Problem("executor", name, message)) from error
    return experiment._id


def _register(kind: type) -> None:
    """Lets NeMo-Run start a user's subclass of one of its executors, which it knows by their exact classes."""
    from nemo_run import Experiment
    from nemo_run.run.torchx_backend.schedulers.api import EXECUTOR_MAPPING

    if kind not in EXECUTOR_MAPPING:
        known = next((each for each in kind.__mro__ if each in EXECUTOR_MAPPING), None)
        if known is None:
            message = "NeMo-Run has no scheduler for it; add one to its EXECUTOR_MAPPING, or inherit from an executor"
            raise ConfigError(Problem("executor", kind.__name__, message))
        EXECUTOR_MAPPING[kind] = EXECUTOR_MAPPING[known]
    if kind not in Experiment._PARALLEL_SUPPORTED_EXECUTORS:
        Experiment._PARALLEL_SUPPORTED_EXECUTORS += (kind,)  # type: ignore[assignment]


def experiment_of(name: str) -> Any:
    """The experiment with this id, of this process or as NeMo-Run has saved it; None if there is none."""
    import nemo_run
    from nemo_run.run.experiment import DummyConsole

    for experiment in _experiments:
        if experiment._id == name:
            return experiment
    if not re.fullmatch(r"[A-Za-z0-9-]+_\d+", name):
        return None
    try:
        with _logging_kept():
            experiment = nemo_run.Experiment.from_id(name)
    except (AssertionError, OSError, ValueError, ImportError):
        return None
    experiment.console = DummyConsole()  # it would print where a table is shown
    _experiments.append(experiment)
    return experiment


def start_container(
    client: DockerClient,
    name: str,
    script: Path,
    label: str,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Starts a container that runs a shell script.

    Args:
        name: of the container.
        script: its path in the container.
        label: the value of the label `nemo-run/id`.
        settings: arguments of NeMo-Run's DockerExecutor.
        options: more arguments of the Docker client's `containers.run`.

    Raises:
        ConfigError: NeMo-Run's lock on the network belongs to another user.
    """
    from nemo_run.core.execution import docker

    # NeMo-Run's own command becomes unused arguments of this one. It would run the job in a pipeline inside double
    # quotes: no signal gets through, a quote breaks it, and a killed job would leave no exit code.
    entry = {"entrypoint": ["bash", str(script)]}
    # NeMo-Run gives the container its name as the hostname, which the machine's own network cannot resolve.
    hosts = {"extra_hosts": {name: "127.0.0.1"} if settings["network"] == "host" else {}}
    executor = docker.DockerExecutor(**settings, additional_kwargs={**entry, **hosts, **options})
    executor.experiment_id = name
    container = docker.DockerContainer(name=name, command=[], executor=executor, extra_env={})
    try:
        container.run(client, label)
    except PermissionError as error:
        message = (
            f"NeMo-Run locks {error.filename}, which another user owns; set TMPDIR to a folder of yours, or "
            "executor.network=host"
        )
        raise ConfigError(Problem("executor.network", settings["network"], message)) from error


def sbatch_script(name: str, place: Path, output: str, command: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The sbatch script of a job with one step, which runs `command` on every node.

    Args:
        name: of the job.
        place: the job's working directory on the cluster.
        output: the file for Slurm's own output, a pattern of sbatch; one file for all attempts.
        settings: arguments of NeMo-Run's SlurmExecutor, unquoted.
    """
    from nemo_run.core.execution import slurm

    class Details(slurm.SlurmJobDetails):
        @property
        def stdout(self) -> Path:
            return Path(output)

        @property
        def srun_stdout(self) -> Path:
            return Path(shlex.quote(output))

    # NeMo-Run means to quote the words of its srun line, and does not.
    image, mounts = settings.get("container_image"), settings.get("container_mounts") or []
    quoted = {
        "container_image": shlex.quote(image) if image else None,
        "container_mounts": [shlex.quote(mount) for mount in mounts],
        "srun_args": [shlex.quote(argument) for argument in settings.get("srun_args") or []],
    }
    # Where a run is. Without Pyxis NeMo-Run writes that in place of /nemo_run, be it a part of a user's own path.
    folder = shlex.quote(str(place.parent)) if image else "/"
    executor = slurm.SlurmExecutor(
        **{**settings, **quoted},
        job_details=Details(job_name=name, folder=str(place)),
        tunnel=slurm.LocalTunnel(job_dir=folder),
    )
    executor.job_dir = shlex.quote(place.name) if image else "nemo_run"
    request = slurm.SlurmBatchRequest(
        launch_cmd=["sbatch", "--parsable"],
        jobs=[name],
        command_groups=[[shlex.join(command)]],
        executor=executor,
        max_retries=0,  # it would queue every failure again; the script itself does so for those that ask for it
        extra_env={},
    )
    text = request.materialize().replace("--chdir /nemo_run/code", f"--chdir {shlex.quote(str(place))}")
    return text if settings.get("account") else re.sub(r"#SBATCH --account=.*\n", "", text)


def open_tunnel(host: str, user: str, port: int | None, identity: str | None) -> Any:
    """NeMo-Run's SSH tunnel to a machine. It is not connected yet, and is closed when this process ends."""
    from nemo_run import SSHTunnel
    from rich.console import Console

    tunnel = SSHTunnel(host=host, user=user, port=port, identity=identity, job_dir="")
    tunnel.console = Console(quiet=True)  # it would announce each connection in the middle of a table
    atexit.register(tunnel.cleanup)
    return tunnel


def connect(tunnel: Any) -> Any:
    """Connects a tunnel, or reconnects it, and returns its SSH client.

    Raises:
        PermissionError: no key or password was accepted.
    """
    try:
        tunnel.connect()
    except SystemExit:  # NeMo-Run's way to say it
        raise PermissionError("no key or password was accepted") from None
    return tunnel.session.client
