"""The first check of a job: whether this machine has what the run needs.

It imports none of the packages that it looks for, so that a node without them says so at once.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.recipe import project
from fiddlehead.recipe.allowed import BY_NAME_ONLY
from fiddlehead.recipe.plain import plain_recipe
from fiddlehead.run.directory import RunDirectory

PACKAGES = ("torch", "lightning", "fiddle", "numpy", "pydantic", "safetensors", "tokenizers", "yaml")
DEVICES = Path("/dev")
MIN_FREE_BYTES = 2**30


def check(run: RunDirectory, names: Sequence[str] = ()) -> None:
    """Refuses a machine on which `run` cannot work, and warns of what may go wrong.

    Args:
        names: what its recipe names besides its own parts: modules, or names, ``package.module:name``.

    Raises:
        ConfigError: with every problem, each naming the machine.
    """
    host = socket.gethostname()
    if any(name.partition(":")[0].partition(".")[0] not in BY_NAME_ONLY for name in names):
        project.make_importable()
    modules = dict.fromkeys((*PACKAGES, *(name.partition(":")[0] for name in names)))
    missing = [module for module in modules if not importable(module)]
    if missing:
        raise ConfigError(
            f"{host} cannot import {', '.join(missing)} (the interpreter is {sys.executable}); is it the environment "
            "of the launch? executor.python and executor.setup_lines set that of a job"
        )
    trainer = plain_recipe(run.recipe).get("trainer", {})
    devices = trainer.get("devices", 1)
    wanted = devices if isinstance(devices, int) else 1
    if trainer.get("accelerator") in ("gpu", "cuda") and wanted > (found := gpus()):
        message = f"{host} gives this job {found} GPU{'s' * (found != 1)}"
        raise ConfigError(Problem("trainer.devices", devices, message))
    for warning in _warnings(run, host):
        print(f"WARNING: {warning}", flush=True)  # noqa: T201


def importable(module: str) -> bool:
    """Whether a module exists. It imports neither the module nor its packages."""
    package, *parts = module.split(".")
    spec: ModuleSpec | None = find_spec(package)
    name = package
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return False
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec is not None


def gpus() -> int:
    """The number of NVIDIA GPUs that this process may use."""
    # A container's devices, or else the driver's list; of these a scheduler's variable names ours.
    found = len(list(DEVICES.glob("nvidia[0-9]*"))) or _listed_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else min(found, _visible(visible, found))


def _visible(names: str, found: int) -> int:
    """The number of GPUs that CUDA takes from `CUDA_VISIBLE_DEVICES`: those before the first wrong name."""
    seen: list[str] = []
    for name in map(str.strip, names.split(",")):
        number = name.removeprefix("+").lstrip("0") or "0"
        if name in seen:
            return 0  # named twice, none counts
        if not name.startswith(("GPU-", "MIG-")) and not (number.isdecimal() and name and int(number) < found):
            break
        seen.append(name)
    return len(seen)


def _listed_gpus() -> int:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def _warnings(run: RunDirectory, host: str) -> list[str]:
    warnings = []
    free = shutil.disk_usage(run.path).free
    if free < MIN_FREE_BYTES:
        warnings.append(f"only {free / 2**20:,.0f} MiB are free in {run.path}")
    if run.environment.exists():
        try:
            before = json.loads(run.environment.read_text())["packages"]["torch"]
        except (ValueError, KeyError, TypeError):
            return [*warnings, f"{run.environment} does not say which torch the run was launched with"]
        here = importlib.metadata.version("torch")
        if before != here:
            warnings.append(f"torch is {here} on {host}, and {before} where the run was launched")
    return warnings
