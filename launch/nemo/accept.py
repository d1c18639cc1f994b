"""Executors of NeMo-Run's, accepted wherever one of ours is expected."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import fiddle as fdl

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.launch.docker import DockerExecutor
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.local import LocalExecutor
from fiddlehead.launch.nemo.handed import HandedExecutor
from fiddlehead.launch.nemo.settings import kind_of
from fiddlehead.launch.slurm import SlurmExecutor

_KINDS = {kind.kind: kind for kind in (LocalExecutor, SlurmExecutor, DockerExecutor)}


def accepted(given: Any) -> Executor | None:
    """Our executor for one of ours, for one of NeMo-Run's, or for a configuration of one; None for None.

    NeMo-Run's executors for this machine, Slurm and Docker are taken over. The others, and subclasses of a user's, are
    handed to NeMo-Run as they are.

    Raises:
        ConfigError: it is something else, or has fields that cannot be had here.
    """
    if isinstance(given, fdl.Buildable):
        given = fdl.build(given)
    if given is None or isinstance(given, Executor):
        return given
    if kind := kind_of(given, exact=True):
        return _KINDS[kind].of_nemo_run(given)
    if any(
        f"{each.__module__}.{each.__name__}" == "nemo_run.core.execution.base.Executor" for each in type(given).__mro__
    ):
        return HandedExecutor.of_nemo_run(given)
    name = f"{type(given).__module__}.{type(given).__name__}"
    message = f"a {name} is not an executor{uncalled(given)}; use one of fiddlehead.launch, or one of NeMo-Run's"
    raise ConfigError(Problem("", message=message))


def uncalled(given: Any) -> str:
    """What to say of a function in the place of what it makes; "" for anything else."""
    return f"; call it: {given.__name__}()" if isinstance(given, FunctionType) else ""
