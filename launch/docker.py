"""The Docker executor: NeMo-Run starts one container with the run's script, and the engine knows its state."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from fiddlehead.environment import kernel_folders
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files import secret_files
from fiddlehead.files.paths import cache_folder, user_path
from fiddlehead.launch import docker_engine as engine
from fiddlehead.launch import nemo, secrets
from fiddlehead.launch.executor import Executor, gpus_here
from fiddlehead.launch.reconcile import Answer
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import Status

if TYPE_CHECKING:
    from docker import DockerClient

OPTIONS = {
    **{name: f"is executor.{setting}" for name, setting in {
        "image": "image", "shm_size": "shm_size", "mem_limit": "memory", "network": "network", "mounts": "mounts",
        "volumes": "mounts", "device_requests": "gpus", "environment": "env_vars",
    }.items()},
    **dict.fromkeys(("command", "entrypoint", "working_dir"), "the container runs the job's script"),
    **dict.fromkeys(("name", "hostname", "labels", "extra_hosts"), "the run is found by it"),
    **dict.fromkeys(("detach", "remove", "auto_remove", "init", "restart_policy"), "the launcher decides it"),
    **dict.fromkeys(("user", "group_add"), "the job has this user and its groups"),
}  # fmt: skip
"""The arguments of the Docker client that only the launcher sets, and what to use instead."""


def docker(image: str, gpus: int = 0, mounts: Sequence[str] = (), **settings: Any) -> DockerExecutor:
    """A container on this machine.

    It sees the working directory, in which secrets are hidden, and the folder of runs, both read-only. It writes to the
    run directory and to the cache folder (`$FIDDLEHEAD_CACHE` or `~/.cache/fiddlehead`). All have the same paths as
    outside.

    Args:
        image: the container's image, with Python, PyTorch and this package; see the Dockerfile.
        gpus: the number of GPUs; 0 means the recipe's devices, if they are GPUs.
        mounts: additional mounts, "SOURCE[:TARGET][:ro]"; the target is the source's path by default.
        settings: other settings of `DockerExecutor`.

    Raises:
        ConfigError: a setting is unknown, or has an impossible value.
    """
    return DockerExecutor.of(image=image, gpus=gpus, mounts=mounts, **settings)


@dataclass(frozen=True, kw_only=True)
class DockerExecutor(Executor):
    """A container on this machine, which is removed when its job has ended."""

    nodes: int = 1
    image: str
    gpus: int = 0
    mounts: Sequence[str] = ()
    shm_size: str = "16g"
    """The most that `/dev/shm` may hold, through which data loaders and NCCL pass tensors: "512m", "16g"."""
    memory: str = ""
    """The most memory that the job may have; "" sets no limit."""
    network: str = "nemo_run"
    """"host" for the machine's own, or the name of a bridge network, which is made if it is missing."""
    additional_kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of the Docker client's `containers.run`, such as `{"ipc_mode": "host"}`."""
    python: str = "python"
    """The image's interpreter."""

    kind: ClassVar[str] = "docker"

    def problems(self) -> list[Problem]:
        """As `Executor.problems`."""
        problems = super().problems()
        if not self.image:
            problems.append(Problem("image", "", "name the image to run, as of `docker build -t fiddlehead .`"))
        if self.nodes > 1:
            problems.append(Problem("nodes", self.nodes, "a container runs on one machine; executor=slurm has more"))
        if self.gpus < 0:
            problems.append(Problem("gpus", self.gpus, "must be 0 or more"))
        for name, size in (("shm_size", self.shm_size), ("memory", self.memory or "0")):
            if not re.fullmatch(r"\d+[bkmg]?", size, re.IGNORECASE):
                problems.append(Problem(name, size, "must be a number of bytes or have a unit: '512m', '16g'"))
        if self.network in ("", "none", "bridge", "default"):
            message = "NeMo-Run takes 'host', or a bridge network with its own name"
            problems.append(Problem("network", self.network, message))
        problems += [
            Problem(f"additional_kwargs.{name}", message=OPTIONS[name])
            for name in self.additional_kwargs
            if name in OPTIONS
        ]
        try:
            json.dumps(self.additional_kwargs)
        except TypeError as error:
            problems.append(Problem("additional_kwargs", message=f"cannot be written down with the run: {error}"))
        return problems

    @property
    def shares_environment(self) -> bool:
        """False: the image has its own packages."""
        return False

    def devices_per_node(self) -> int:
        """The number of devices of the container; 0 follows `trainer.devices`."""
        return self.ntasks_per_node or self.gpus

    def gpus_of_a_node(self, nodes: int = 1) -> int:
        """The number of GPUs of the container, or else of this machine."""
        return self.gpus or super().gpus_of_a_node(nodes)

    def gpu_types(self) -> Collection[str]:
        """The GPU of this machine, where the container runs."""
        import torch

        return (torch.cuda.get_device_name(0),) if gpus_here() else ()

    def fitted(self, devices: int, accelerator: str, nodes: int = 1) -> Self:
        """These settings with one process for each device of the recipe, and GPUs if it uses them."""
        gpus = self.gpus or (devices if accelerator in ("gpu", "cuda") else 0)
        return replace(self, ntasks_per_node=devices, gpus=gpus)

    def check(self, run: RunDirectory) -> None:
        """Checks the image, the GPUs and the mounts.

        Raises:
            ConfigError: with every problem.
        """
        problems = [
            Problem("", message=f"the job would have this machine's {folder} instead of the image's; start elsewhere")
            for folder in {str(Path.cwd()), str(run.path.parent)}
            if re.fullmatch(r"/(bin|dev|etc|lib|lib64|opt|proc|run|sbin|sys|tmp|usr)?", folder)
        ]
        try:
            for mount in _mounts(run, self.mounts):
                if not Path(mount.source).exists():
                    problems.append(Problem("executor.mounts", message=f"{mount.source} does not exist"))
        except ConfigError as error:
            problems += error.problems
        try:
            with engine.connect() as client:
                problems += [problem for problem in (engine.why_not(client, self.image),) if problem]
                if self.gpus and not engine.has_gpus(client):
                    message = "the engine has no GPUs; install the NVIDIA Container Toolkit"
                    problems.append(Problem("executor.gpus", self.gpus, message))
        except ConfigError as error:
            problems += error.problems
        refuse(problems)

    def submit(self, run: RunDirectory, *, after: Sequence[str] = (), after_any: Sequence[str] = ()) -> str:
        """Starts the container and returns its name; pulls the image if this machine has not got it.

        Raises:
            ConfigError: the engine refused, with its words.
        """
        if after or after_any:
            message = "containers are not queued; start the run when the other has ended"
            raise ConfigError(Problem("executor", "docker", message))
        name = container_name(run)
        with engine.connect() as client:
            # A launcher that was killed between the two steps of starting a container has left one with this name.
            engine.remove(client, run, status=["created", "exited", "dead"])
            if engine.is_missing(client, self.image):
                print(f"pulling {self.image}, which this machine has not got yet", flush=True)  # noqa: T201
            try:
                self._start(client, run, name)
            except BaseException:
                engine.remove(client, run)
                raise
            finally:
                secrets.remove(run)  # once started, the container has hold of the file without its name
        return name

    def _start(self, client: DockerClient, run: RunDirectory, name: str) -> None:
        from docker.types import Mount

        settings = {
            "container_image": self.image,
            "num_gpus": self.gpus or None,
            "shm_size": self.shm_size,
            "network": self.network,
            "env_vars": _environment(),
        }
        options = {
            **self.additional_kwargs,
            "init": True,  # reaps orphans, and passes `docker stop` on to the job
            "user": engine.user(client),
            "group_add": os.getgroups(),
            "mem_limit": self.memory or None,
            # Unlike `volumes`, these may have colons in their paths, and a missing source is not made by root.
            "mounts": [
                Mount(
                    mount.target,
                    mount.source or None,
                    type="bind" if mount.source else "tmpfs",
                    read_only=mount.read_only,
                )
                for mount in _mounts(run, self.mounts)
            ],
        }
        nemo.start_container(client, name, run.script, engine.label(run), settings, options)

    def starters(self, run: RunDirectory, *, has_secrets: bool) -> dict[str, str]:
        """The command line of `docker` that starts the same container, for an engine that is not rootless."""
        name = container_name(run)
        mounts = _mounts(run, self.mounts, has_secrets=has_secrets)
        options = [
            *("--detach", "--rm", "--init", f"--name={name}", f"--hostname={name}", f"--network={self.network}"),
            *([f"--add-host={name}:127.0.0.1"] if self.network == "host" else []),
            f"--user={os.getuid()}:{os.getgid()}",
            *(f"--group-add={group}" for group in os.getgroups()),
            f"--shm-size={self.shm_size}",
            *([f"--memory={self.memory}"] if self.memory else []),
            *([f'--gpus=count={self.gpus},"capabilities=compute,utility"'] if self.gpus else []),
            *(f"--env={key}={value}" for key, value in _environment().items()),
            *(f"--mount={mount.option()}" for mount in mounts),
            f"--label={engine.LABEL}={engine.label(run)}",
            "--entrypoint=bash",
        ]
        words = ["docker run", *map(shlex.quote, options), shlex.quote(self.image), shlex.quote(str(run.script))]
        return {"docker": " \\\n    ".join(words) + "\n"}

    def ask(self, going: Mapping[RunDirectory, Status]) -> Mapping[RunDirectory, Answer]:
        """Asks the engine which runs have a container, and how the other runs ended."""
        return engine.answers(going)

    def kill(self, run: RunDirectory) -> None:
        """Removes the run's container, running or not.

        Raises:
            ConfigError: the engine does not answer.
        """
        with engine.connect() as client:
            engine.remove(client, run)


def container_name(run: RunDirectory) -> str:
    """The name of a run's container: at most 32 characters that are allowed in names of containers and hosts."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", run.name).strip("-")[:23].rstrip("-") or "run"
    return f"{readable}-{hashlib.sha256(engine.label(run).encode()).hexdigest()[:8]}"


class _Mount(NamedTuple):
    source: str
    """"" for an empty folder."""
    target: str
    read_only: bool

    def option(self) -> str:
        """The value of `docker run --mount`, which is a line of CSV."""
        kind = ["type=bind", f"source={self.source}"] if self.source else ["type=tmpfs"]
        line = io.StringIO()
        csv.writer(line).writerow([*kind, f"target={self.target}", *(["readonly"] if self.read_only else [])])
        return line.getvalue().strip()


def _mounts(run: RunDirectory, texts: Sequence[str], *, has_secrets: bool = False) -> list[_Mount]:
    """The container's mounts; at the same target, the user's mount replaces ours.

    Args:
        has_secrets: whether the run has a file with secrets that is not written yet.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)  # else the engine would, and as root
    except OSError as error:
        message = f"cannot be made: {error.strerror}; name another in FIDDLEHEAD_CACHE"
        raise ConfigError(Problem.in_file(cache, message)) from error
    mounts = [
        _Mount(str(Path.cwd()), str(Path.cwd()), True),
        *_covers(Path.cwd(), run.path.parent),
        _Mount(str(run.path.parent), str(run.path.parent), True),
        _Mount(str(run.path), str(run.path), False),
        _Mount(str(cache), str(cache), False),
    ]
    secrets_file = str(secrets.file(run))
    if has_secrets or Path(secrets_file).exists():
        mounts.append(_Mount(secrets_file, secrets_file, True))
    mounts += [_parsed(text) for text in texts]
    return list({mount.target: mount for mount in mounts}.values())


def _covers(directory: Path, runs: Path) -> list[_Mount]:
    """Mounts that hide the files and folders below `directory` whose names look like secrets."""
    covers = []
    for folder, folders, files in os.walk(directory):
        here = Path(folder).relative_to(directory)
        secret = [name for name in folders if secret_files.pattern(str(here / name / "any"))]
        covers += [_Mount("", str(directory / here / name), True) for name in secret]
        covers += [
            _Mount(os.devnull, str(directory / here / name), True)
            for name in files
            if secret_files.pattern(str(here / name)) and not (directory / here / name).is_symlink()
        ]
        # The certificates that packages bring are public, and runs are kept without secrets.
        folders[:] = [
            name
            for name in folders
            if name not in (*secret, ".git", "site-packages", "dist-packages") and directory / here / name != runs
        ]
    return covers


def _parsed(text: str) -> _Mount:
    """A mount from "SOURCE[:TARGET][:ro]"."""
    match = re.fullmatch(r"(?P<source>[/~][^:]*)(:(?P<target>/[^:]*))?(:(?P<mode>ro|rw))?", text)
    if not match:
        raise ConfigError(Problem("executor.mounts", text, "must be SOURCE[:TARGET][:ro] with absolute paths"))
    source = str(user_path(match["source"]))
    return _Mount(source, match["target"] or source, match["mode"] == "ro")


def _environment() -> dict[str, str]:
    """Environment variables for folders of prepared data and compiled kernels, which are kept after the container."""
    return {"FIDDLEHEAD_CACHE": str(cache_folder()), **kernel_folders()}
