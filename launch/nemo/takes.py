"""Ways to take a field of a NeMo-Run executor over: each makes settings of ours from it, or refuses its value."""

from __future__ import annotations

import glob
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.launch import secrets

Settings = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """What becomes of one field."""

    says: str
    """The words of the table in docs/nemo_run.md."""
    take: Callable[[Any, Any], Settings] = lambda owner, value: {}
    """From the object and the field's value to settings of ours; ConfigError if the value cannot be had here."""
    refused: bool = False
    """Whether every value but the default is refused."""
    is_part: bool = False
    """Whether its value is an object, or a mapping of objects, whose own fields are taken too."""


def same(name: str, says: str = "") -> Field:
    """It is our setting `name`; without a value, our default stands."""
    text = f"`{name}`{says and '; ' + says}"
    return Field(text, lambda owner, value: {} if value in (None, "", [], {}) else {name: _plain(value)})


def option(name: str) -> Field:
    """It is the option of sbatch that has this name."""

    def take(owner: Any, value: Any) -> Settings:
        return {} if value is None else {"additional_parameters": {name: value}}

    return Field(f"`additional_parameters`, `{name}`", take)


def argument(name: str) -> Field:
    """It is the argument of the Docker client that has this name."""

    def take(owner: Any, value: Any) -> Settings:
        return {"additional_kwargs": {name: value}} if value else {}

    return Field(f"`additional_kwargs`, `{name}`", take)


def refused(says: str) -> Field:
    """Every value but the default is refused; the words say what to use instead."""
    return Field(says, refused=True)


def unused(says: str) -> Field:
    """It has nothing to decide here; the words say why."""
    return Field(says)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, (list, tuple)) else value


# -- what takes more than a name


def variables(owner: Any, variables: Mapping[str, str]) -> Settings:
    """Variables of the job; those that look like secrets, and are also in this process's environment, are secrets."""
    secret = [name for name in variables if secrets.looks_secret(name)]
    refuse(
        Problem(f"env_vars.{name}", message="looks like a secret, which files would show; export it where you launch")
        for name in secret
        if os.environ.get(name) != variables[name]
    )
    plain = {name: str(value) for name, value in variables.items() if name not in secret}
    return {"env_vars": plain, **({"secrets": secret} if secret else {})}


def subpath(packager: Any, path: str) -> Settings:
    """The folder in which the job starts: the working directory, if that is it."""
    if path and Path.cwd().parts[-len(Path(path).parts) :] != Path(path).parts:
        raise ConfigError(Problem("subpath", path, f"the job starts in {Path.cwd()}, as the launch does; start there"))
    return {}


def pattern(packager: Any, patterns: str | list[str]) -> Settings:
    """Files that a packager adds are shipped anyway, if they are in the working directory and git ignores none."""
    here = Path.cwd().resolve()
    given = [pattern for pattern in ([patterns] if isinstance(patterns, str) else patterns) if pattern]
    outside = [pattern for pattern in given if not (here / pattern).resolve().is_relative_to(here)]
    message = "is not in the working directory, which is what is shipped; mount it, or start there"
    refuse(Problem("include_pattern", pattern, message) for pattern in outside)
    found = [Path(name) for pattern in given for name in glob.glob(str(here / pattern))]  # noqa: PTH207  # it may be absolute
    files = [file for path in found for file in (path, *path.rglob("*")) if file.is_file()]
    listing = "\n".join(map(str, files))
    ignored = subprocess.run(["git", "check-ignore", "--stdin"], input=listing, capture_output=True, text=True)
    refuse(
        Problem(
            "include_pattern", given, f"git ignores {line}, so that it is not shipped; let git track it, or mount it"
        )
        for line in ignored.stdout.splitlines()[:1]
    )
    return {}


def _is_torchrun(executor: Any) -> bool:
    launcher = executor.launcher
    return launcher == "torchrun" or type(launcher).__name__ == "Torchrun"


def started(executor: Any, launcher: Any) -> Settings:
    """The launcher that starts the processes as theirs would."""
    return {"launcher": "torchrun" if _is_torchrun(executor) else "srun"}


def _count(executor: Any) -> int:
    """The processes with a device on each node of a Slurm job; 0 if the executor does not say."""
    tasks = executor.ntasks_per_node
    return executor.torchrun_nproc_per_node or (tasks if tasks > 1 else executor.gpus_per_task or 0)


def processes(executor: Any, tasks: int) -> Settings:
    """The processes with a device on each node."""
    return {"ntasks_per_node": _count(executor)}


def gpus_per_task(executor: Any, gpus: int | None) -> Settings:
    """The GPUs of a node, from those of a task."""
    tasks = executor.ntasks_per_node
    if gpus is None:
        return {}
    if gpus > 1 and tasks > 1:
        message = f"a process has one device here; set gpus_per_node={gpus * tasks} and ntasks_per_node={gpus * tasks}"
        raise ConfigError(Problem("gpus_per_task", gpus, message))
    return {} if executor.gpus_per_node else {"gpus_per_node": gpus * tasks}


def cpus(executor: Any, cpus: int | None) -> Settings:
    """CPUs of each process; a task of NeMo-Run's may start several."""
    if cpus is None:
        return {}
    tasks = 1 if _is_torchrun(executor) else executor.ntasks_per_node
    processes = _count(executor) or executor.gpus_per_node or tasks
    if cpus * tasks % processes:
        message = f"cannot be divided among the {processes // tasks} processes that a task starts"
        raise ConfigError(Problem("cpus_per_task", cpus, message))
    return {"cpus_per_task": cpus * tasks // processes}


def exclusive(executor: Any, value: bool | str | None) -> Settings:
    """Whether the nodes are shared."""
    if isinstance(value, str) and value:
        raise ConfigError(Problem("exclusive", value, "a node is shared, or it is not", (True, False)))
    return {"exclusive": bool(value)}


def signal(executor: Any, value: str | None) -> Settings:
    """How long before the time limit the run is warned."""
    if value is None:
        return {}
    match = re.fullmatch(r"(?:[BR]+:)?\w+(?:@(\d+))?", value)
    if not match:
        raise ConfigError(Problem("signal", value, "is not [B:]SIGNAL[@SECONDS]"))
    return {"save_before": int(match[1] or 60)}


def container_variables(executor: Any, names: list[str] | None) -> Settings:
    """The variables of the host that the container keeps."""
    return {"srun_args": [f"--container-env={','.join(names)}"]} if names else {}


def ulimits(executor: Any, limits: list[str]) -> Settings:
    """Limits of the container's processes."""
    made = []
    for limit in limits:
        match = re.fullmatch(r"(\w+)[=:](-?\d+)(?::(-?\d+))?", limit)
        if not match:
            raise ConfigError(Problem("ulimits", limit, "is not NAME=SOFT[:HARD]"))
        made.append({"Name": match[1], "Soft": int(match[2]), "Hard": int(match[3] or match[2])})
    return {"additional_kwargs": {"ulimits": made}} if made else {}


def more_than_one(owner: Any, tasks: int) -> Settings:
    """A number that was given; the default of 1 says nothing."""
    return {"ntasks_per_node": tasks if tasks > 1 else 0}
