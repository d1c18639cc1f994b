"""Records a run's code, packages and hardware. Environment variables are not recorded: they may hold secrets."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from fiddlehead.errors import Problem
from fiddlehead.files import secret_files
from fiddlehead.files.paths import cache_folder
from fiddlehead.run.processes import sysctl

MAX_PATCH_BYTES = 2_000_000
WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
"""The values of WANDB_MODE that W&B knows."""


def kernel_folders() -> dict[str, str]:
    """The folders for compiled kernels, by the environment variables of PyTorch, Triton and quack that name them."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "TRITON_CACHE_DIR": "triton", "QUACK_CACHE_DIR": "quack"}
    return {variable: str(cache_folder() / folder) for variable, folder in folders.items()}


def wandb_mode_problems(mode: str | None) -> list[Problem]:
    """The problems of the value of WANDB_MODE."""
    if not mode or mode in WANDB_MODES:
        return []
    return [Problem.unknown("WANDB_MODE", mode, "mode", WANDB_MODES)]


def describe_environment(directory: Path) -> dict[str, Any]:
    """The environment of this process, as JSON values; `directory` is where the user's code is."""
    return {
        "git": _git(directory),
        "launched_in": str(directory),
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "packages": _packages(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _lines("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
    }


def free_main_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The bytes of main memory that this process may still take: of the machine, or of its container (cgroup v2)."""
    free = psutil.virtual_memory().available
    try:
        most, taken = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return free if most == "max" else min(free, int(most) - int(taken) + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return free


def describe_machine(packages: Sequence[str]) -> dict[str, Any]:
    """The conditions of a measurement, as JSON values: the date, processors, GPUs, and versions of `packages`."""
    revision = _lines("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "revision": revision[0] if revision else None,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "gpus": describe_gpus(),
        "python": platform.python_version(),
        "versions": versions,
    }


def describe_gpus(uuid: str = "") -> list[dict[str, Any]]:
    """The GPUs of this machine and their current clock rates; unknown values are left out.

    Args:
        uuid: of the only one to describe, as nvidia-smi has it; "" is all of them.
    """
    fields = {
        "name": "name",
        "driver": "driver_version",
        "sm_mhz": "clocks.sm",
        "max_sm_mhz": "clocks.max.sm",
        "memory_mhz": "clocks.mem",
        "watts": "power.draw",
        "max_watts": "power.limit",
        "celsius": "temperature.gpu",
    }
    rows = _lines(
        "nvidia-smi",
        f"--query-gpu={','.join(fields.values())}",
        "--format=csv,noheader,nounits",
        *([f"--id={uuid}"] if uuid else []),
    )
    return [
        {
            name: value if name in ("name", "driver") else float(value)
            for name, value in zip(fields, row.split(", "), strict=True)
            if not value.startswith("[")
        }
        for row in rows
    ]


def _cpu_model() -> str:
    """The name of the processor from Linux or macOS, or else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return sysctl("machdep.cpu.brand_string") or platform.processor()


def _packages() -> dict[str, str]:
    """The version of each package, without broken remains of an interrupted installation.

    Its two lines are looked for: to parse what hundreds of packages say of themselves takes a second or two.
    """
    found = {}
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        fields = dict(re.findall(r"^(Name|Version):[ \t]*(\S+)", text.partition("\n\n")[0], re.MULTILINE))
        if "Name" in fields:
            found[fields["Name"]] = fields.get("Version", "")
    return dict(sorted(found.items()))


def _git(directory: Path) -> dict[str, Any] | None:
    """The revision, untracked files and uncommitted changes; None outside a repository.

    The patch leaves out files that look like secrets; their names are in `left_out`.
    """
    git = ("git", "-C", str(directory))
    revision = _lines(*git, "rev-parse", "HEAD")
    if not revision:
        return None
    # Without renames, so that a file shows under both of its names; without a user's filters, which may decrypt.
    diff = (*git, "diff", "HEAD", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color", "--no-relative")
    diff = (*diff, "--submodule=short")
    names = [name for name in _output(*diff, "--name-only", "-z").split("\0") if name]
    left_out = [name for name in names if secret_files.pattern(name)]
    left_out += sorted(_with_private_keys(git, names) - {*left_out})
    excluded = [f":(top,literal,exclude){name}" for name in left_out]
    patch = _output(*diff, "--binary", "--", ":(top)", *excluded) if names else ""
    if len(patch) > MAX_PATCH_BYTES:
        patch = f"not kept: {len(patch)} bytes"
    untracked = _lines(*git, "ls-files", "--others", "--exclude-standard")
    return {"revision": revision[0], "patch": patch, "untracked": untracked, "left_out": left_out}


def _with_private_keys(git: tuple[str, ...], names: Sequence[str]) -> set[str]:
    """The changed files that contain a private key, now or in the commit."""
    if not names:
        return set()
    committed = _output(*git, "grep", "-lzaE", "--full-name", "-e", secret_files.PRIVATE_KEY, "HEAD", "--", ":(top)")
    found = {name.removeprefix("HEAD:") for name in committed.split("\0")}
    top = Path(_output(*git, "rev-parse", "--show-toplevel").removesuffix("\n"))
    for name in names:
        with contextlib.suppress(OSError):  # it was deleted, or is a submodule
            if secret_files.has_private_key((top / name).read_bytes()):
                found.add(name)
    return found.intersection(names)


def _lines(*command: str) -> list[str]:
    """The output lines of a command; none if it does not exist or fails."""
    return _output(*command).splitlines()


def _output(*command: str) -> str:
    """The exact output of a command (bytes that are not UTF-8 become surrogates), so that a patch applies."""
    try:
        result = subprocess.run(command, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.decode(errors="surrogateescape")
