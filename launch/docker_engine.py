"""Questions to the Docker engine: its images, the containers of runs, and how they ended."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fiddlehead.errors import ConfigError, Problem, nearest
from fiddlehead.launch.reconcile import Answer, Phase
from fiddlehead.run.alive import is_here
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status

if TYPE_CHECKING:
    from docker import DockerClient

LABEL = "nemo-run/id"
"""The label by which NeMo-Run tells containers apart; its value is here the run directory's path."""


@contextlib.contextmanager
def connect() -> Iterator[DockerClient]:
    """Connects to the engine; an error of the engine in the block becomes a ConfigError with its message.

    Raises:
        ConfigError: there is no engine, or this user may not use it.
    """
    import docker
    from docker.errors import APIError, DockerException
    from requests.exceptions import RequestException

    address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock (DOCKER_HOST is not set)"
    try:
        reach()
        with contextlib.closing(docker.from_env()) as client:
            yield client
    except APIError as error:
        message = f"the engine at {address} refused: {error.explanation or error}"
        raise ConfigError(Problem("executor", "docker", message)) from error
    except (DockerException, RequestException, UnreachableError) as error:
        if "Permission denied" in str(error):
            hint = "this user may not use it; the group `docker` may"
        else:
            hint = "is it running? `docker context ls` shows where, and DOCKER_HOST tells this command"
        message = f"no answer from the engine at {address}; {hint} ({error})"
        raise ConfigError(Problem("executor", "docker", message)) from error


def reach() -> None:
    """Raises OSError if nothing listens at the engine's socket: docker-py would leave its own socket open."""
    address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if address.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(address.removeprefix("unix://"))
            except OSError as error:
                raise UnreachableError(str(error)) from error


class UnreachableError(OSError):
    """Nothing listens at the engine's socket."""


def is_missing(client: DockerClient, image: str) -> bool:
    """Whether this machine has no such image."""
    from docker.errors import ImageNotFound

    try:
        client.images.get(image)
    except ImageNotFound:
        return True
    return False


def why_not(client: DockerClient, image: str) -> str:
    """Why no container can be made of `image`; "" if it is here or can be pulled."""
    from docker.errors import APIError

    if not is_missing(client, image):
        return ""
    try:
        client.images.get_registry_data(image)
    except APIError as error:
        here = sorted(tag for found in client.images.list() for tag in found.tags)
        match = nearest(image, here)
        hint = f"did you mean {match!r}?" if match else f"images here: {', '.join(here) or 'none'}"
        return f"executor.image={image!r}: not on this machine, and cannot be pulled ({error.explanation}); {hint}"
    return ""


def has_gpus(client: DockerClient) -> bool:
    """Whether the engine can give GPUs: by a runtime that it was told of, or by the toolkit's hook."""
    return "nvidia" in client.info().get("Runtimes", {}) or shutil.which("nvidia-container-runtime-hook") is not None


def user(client: DockerClient) -> str:
    """The user and groups that a job needs in its container, so that its files belong to the launching user."""
    rootless = any("rootless" in option for option in client.info().get("SecurityOptions", []))
    return "0:0" if rootless else f"{os.getuid()}:{os.getgid()}"


def label(run: RunDirectory) -> str:
    """The label that identifies a run's container, independent of links to the run's folder."""
    return os.path.realpath(run.path)


def remove(client: DockerClient, run: RunDirectory, status: Sequence[str] = ()) -> None:
    """Removes a run's containers, running or not; with `status`, only those in these states."""
    from docker.errors import APIError

    filters: dict[str, str | list[str]] = {"label": f"{LABEL}={label(run)}"}
    if status:
        filters["status"] = list(status)
    for found in client.api.containers(all=True, filters=filters):
        try:
            client.api.remove_container(found["Id"], force=True)
        except APIError as error:
            if error.status_code not in (404, 409):  # gone, or about to be
                raise


def answers(going: Mapping[RunDirectory, Status]) -> dict[RunDirectory, Answer]:
    """The engine's answer for each run; it is asked once for all running containers.

    If it does not answer, this warns once and returns no answers.
    """
    submitted = {run for run in going if run.submitted}  # before it is asked: what is submitted later it does not know
    try:
        with connect() as client:
            running = {found["Labels"][LABEL] for found in client.api.containers(filters={"label": LABEL})}
            return {
                run: _without_container(client, run, status, run in submitted)
                for run, status in going.items()
                if label(run) not in running
            }
    except ConfigError as error:
        _warn_once(f"WARNING: {error}; the runs' own words are shown")
        return {}


def _without_container(client: DockerClient, run: RunDirectory, status: Status, submitted: bool) -> Answer:
    """The answer for a run that has written `status` and has no running container."""
    begun = status.state is not State.PENDING
    if begun and is_here(status):
        return Answer(Phase.PROCESS)  # by hand
    if not (begun or submitted):
        return Answer(Phase.LAUNCHING)  # its launcher is still at it, pulling perhaps
    code, ended, out_of_memory = _ending(client, run, status.started)
    how = "its container is gone" if code is None else f"its container ended with exit code {code}"
    when = "and it has not said why" if begun else "before the job began"
    if code == 127 and not begun:
        when += "; has the image a bash?"
    return Answer(Phase.ENDED, f"{'out of memory: ' * out_of_memory}{how}, {when}", exit_code=code, ended=ended)


def _ending(client: DockerClient, run: RunDirectory, since: float) -> tuple[int | None, float | None, bool]:
    """The exit code of a run's removed container, when it ended, and whether it ran out of memory.

    The engine keeps only its newest 256 events.
    """
    code, ended, out_of_memory = None, None, False
    for event in client.events(
        since=f"{since:.6f}",
        until=f"{time.time():.6f}",
        filters={"label": f"{LABEL}={label(run)}", "event": ["oom", "die"]},
        decode=True,
    ):
        out_of_memory |= event["Action"] == "oom"
        if event["Action"] == "die":
            code, ended = int(event["Actor"]["Attributes"]["exitCode"]), event["timeNano"] / 1e9
    return code, ended, out_of_memory


@functools.cache
def _warn_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201
