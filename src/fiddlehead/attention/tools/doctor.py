"""Tries the attention kernels of this machine and compares each result with the reference."""

from __future__ import annotations

import platform
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isnan

import torch

from fiddlehead.attention import packages
from fiddlehead.attention.backends import BACKENDS
from fiddlehead.attention.packages import Package, Packages
from fiddlehead.attention.selection import explain, preference
from fiddlehead.attention.spec import AttentionSpec, Target, length_class
from fiddlehead.attention.tools.trial import KEYS, trial, wrong
from fiddlehead.errors import Problem

HEADS, GROUPS = 4, 2
HEAD_DIMS = (64, 80, 112)
"""A usual one, and two that do not fill tiles of 32 channels: some kernels are wrong only with these."""

INSTALL = {
    "flash2": 'MAX_JOBS=4 pip install --no-build-isolation "fiddlehead[flash2]"',
    "flash3": "pip install --no-build-isolation ./hopper, in a checkout of Dao-AILab/flash-attention",
    "flash4": 'pip install "fiddlehead[flash]"',
}
"""How each package is installed."""

REINSTALL = {
    "flash2": "pip uninstall -y flash-attn; FLASH_ATTENTION_FORCE_BUILD=TRUE MAX_JOBS=4 pip install "
    '--no-build-isolation --no-cache-dir "fiddlehead[flash2]"',
    "flash3": "pip uninstall -y flash-attn-3; pip install --no-build-isolation --no-cache-dir ./hopper, in a checkout "
    "of Dao-AILab/flash-attention",
    "flash4": 'pip install --upgrade "fiddlehead[flash]"',
}
"""How each package is installed again for the installed PyTorch."""


@dataclass(frozen=True)
class Finding:
    """The result for one backend."""

    backend: str
    version: str | None
    """The version of its package; None: it is not installed."""
    state: str
    """"works", "unavailable" (not installed, or not for this machine or these settings) or "broken"."""
    detail: str = ""
    """Why it does not work."""
    error: float | None = None
    """The largest relative error (of norms) of the output and of the gradients of q, k and v."""


@dataclass(frozen=True)
class Report:
    """The results of `examine`."""

    facts: dict[str, str]
    """Versions and hardware, by name."""
    findings: tuple[Finding, ...]
    """Each backend, in order of preference on this device."""
    advice: tuple[str, ...]
    """What to install, or to install again; empty if nothing is missing."""

    @property
    def healthy(self) -> bool:
        """Whether a backend works and no installed one is broken."""
        states = {finding.state for finding in self.findings}
        return "works" in states and "broken" not in states


def examine(progress: Callable[[str], None] = lambda _: None) -> Report:
    """Tries every backend on this machine's GPU, or on its CPU if PyTorch finds no GPU. It raises nothing.

    Args:
        progress: is called with the name of each backend before it is tried; this takes many seconds if kernels must be
            compiled.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the packages have to say to their developers
        usable, problem = _cuda()
        listed = _nvidia_smi()
        found = packages.installed(probe=True)
        device = torch.device("cuda", torch.cuda.current_device()) if usable else torch.device("cpu")
        target = replace(Target.of(device), packages=found)
        spec = AttentionSpec(
            dtype=_dtype(target),
            head_dim=HEAD_DIMS[0],
            num_attention_heads=HEADS,
            num_query_groups=GROUPS,
            length=length_class(KEYS),
        )
        findings = tuple(_findings(spec, target, device, progress))
    return Report(_facts(listed, found), findings, tuple(_advice(findings, target, listed, problem)))


def _findings(
    spec: AttentionSpec, target: Target, device: torch.device, progress: Callable[[str], None] = lambda _: None
) -> Iterator[Finding]:
    order = preference(spec, target)
    poisoned = ""
    for name in [*order, *(name for name in BACKENDS if name not in order)]:
        package = getattr(target.packages, name, target.packages.torch)  # cuDNN's is its version
        version = package.version if isinstance(package, Package) else package
        problem = package.problem if isinstance(package, Package) else None
        if problem is not None:
            state = "unavailable" if _only_lacks_the_driver(problem, target) else "broken"
            yield Finding(name, version, state, problem)
            continue
        reason = explain(spec, target, name).reasons.get(name)
        if reason is None and poisoned:
            reason = f"not tried: {poisoned} made CUDA fail for the rest of this process"
        if reason is not None:
            yield Finding(name, version, "unavailable", reason)
            continue
        progress(name)
        finding = _tried(name, version, spec, device)
        if finding.state == "broken" and device.type == "cuda" and not cuda_works():
            poisoned = name
        yield finding


def _tried(name: str, version: str | None, spec: AttentionSpec, device: torch.device) -> Finding:
    """A forward and backward pass for each head dim, compared with the reference in float64."""
    largest, problems = 0.0, []
    # Compiling FlexAttention for one head dim takes longer than all other backends together.
    head_dims = HEAD_DIMS[1:2] if name == "flex" else HEAD_DIMS
    for spec in (replace(spec, head_dim=head_dim) for head_dim in head_dims):
        try:
            errors = trial(name, spec, device)
        except Exception as error:  # whatever a kernel that does not fit raises
            message = (str(error).strip().splitlines() or [""])[0]
            return Finding(name, version, "broken", f"it fails: {type(error).__name__}: {message}")
        largest = float(max(largest, *errors.values(), key=lambda error: (isnan(error), error)))
        if problem := wrong(errors, spec):
            problems.append(Problem("head_dim", spec.head_dim, problem))
    if problems:
        return Finding(name, version, "broken", f"it is wrong: {'; '.join(problems)}", largest)
    return Finding(name, version, "works", error=largest)


def _dtype(target: Target) -> torch.dtype:
    """The usual dtype of training on the device."""
    if target.device_type != "cuda":
        return torch.float32
    return torch.bfloat16 if target.sm >= 80 else torch.float16


def _cuda() -> tuple[bool, str]:
    """Whether PyTorch can use a GPU, and its error if it cannot."""
    if torch.version.cuda is None:
        return False, "this PyTorch is built without CUDA"
    try:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
    except Exception as error:  # no driver, one that is too old, a GPU that is taken
        return False, (str(error).strip().splitlines() or ["PyTorch cannot use it"])[0]
    return True, ""


def cuda_works() -> bool:
    """Whether PyTorch can compute on a GPU; after a kernel's invalid memory access it cannot."""
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item())
    except Exception:  # no GPU, or as above
        return False


def _only_lacks_the_driver(problem: str, target: Target) -> bool:
    """Whether only the driver's library is missing, as on a login node without a GPU."""
    return target.device_type != "cuda" and "libcuda.so" in problem


def _nvidia_smi() -> list[tuple[str, str]]:
    """Name and driver version of each GPU that the driver lists, whether PyTorch can use it or not."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [(name.strip(), driver.strip()) for name, _, driver in (line.rpartition(",") for line in lines)]


def _facts(listed: list[tuple[str, str]], found: Packages) -> dict[str, str]:
    facts = {
        "Python": platform.python_version(),
        "PyTorch": found.torch,
        "CUDA": torch.version.cuda or "none: this PyTorch is built without",
        "cuDNN": found.cudnn or "none: this PyTorch is built without",
        "driver": listed[0][1] if listed else "none found (nvidia-smi)",
    }
    if not torch.cuda.is_available():
        names = ", ".join(name for name, _ in listed)
        facts["GPU"] = f"{names}, but PyTorch cannot use it" if listed else "none"
        return facts
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = f"{gpu.name}, sm{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    return facts


def _advice(
    findings: tuple[Finding, ...], target: Target, listed: list[tuple[str, str]], problem: str
) -> Iterator[str]:
    if listed and target.device_type != "cuda":
        hint = "install the build of PyTorch for the driver's CUDA first: https://pytorch.org/get-started/locally"
        yield f"there is a GPU, but PyTorch cannot use it ({problem}): {hint}"
    by_name = {finding.backend: finding for finding in findings}
    for name, command in REINSTALL.items():
        if by_name[name].state == "broken":
            yield f"{name} is installed but broken; install it again for PyTorch {target.packages.torch}:  {command}"
    if target.device_type != "cuda" or target.sm < 80:
        return
    best = "flash2" if target.sm < 90 else "flash4"
    if by_name[best].version is None:
        yield f"the fastest kernels for this GPU are those of {best}:  {INSTALL[best]}"
