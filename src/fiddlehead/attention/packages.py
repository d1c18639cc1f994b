"""Finds the installed packages with attention kernels, their versions, and whether they work."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch.torch_version import TorchVersion

logger = logging.getLogger(__name__)

CUDNN_OF_CUDA_BUILDS = "9.19.0"
"""The version in PyTorch 2.11 for CUDA 13. It is assumed for another machine's GPU if the PyTorch here has no CUDA."""
NEWEST_KNOWN = {"flash2": "2.8.3.post2", "flash3": "3.0.0", "flash4": "4.0.0b36"}
"""The newest version tried of each package, named after its major version; newer ones are used, with a note."""


@dataclass(frozen=True)
class Package:
    """One package as found, or as assumed."""

    version: str | None = None
    """None: it is not installed."""
    problem: str | None = None
    """Why it cannot be used although it is installed."""

    def why_not(self, name: str, oldest: str = "0") -> str | None:
        """Why kernels of this package, called `name`, cannot be used; None if they can, from version `oldest` on."""
        if self.version is None:
            return f"{name} is not installed"
        if self.problem is not None:
            return f"{name} {self.version} is installed but {self.problem}"
        if self._release and self._release < oldest:
            return f"{name} {self.version} is installed but too old: at least {oldest} is needed"
        return None

    @property
    def note(self) -> str | None:
        """Says that a version is newer than the newest that was tried; None if it is not."""
        release = self._release
        newest = NEWEST_KNOWN.get(f"flash{release.partition('.')[0]}") if release else None
        return f"newer than {newest}, the newest tried" if release and newest and release > newest else None

    @property
    def _release(self) -> TorchVersion | None:
        """The version without a build's suffix; None if it cannot be compared."""
        release = (self.version or "").partition("+")[0]
        return TorchVersion(release) if release[:1].isdigit() else None


@dataclass(frozen=True)
class Packages:
    """The versions that decide what a backend can do."""

    torch: str
    cudnn: str | None
    """As PyTorch brings it; None: without."""
    flash2: Package = Package()
    flash3: Package = Package()
    flash4: Package = Package()


@dataclass(frozen=True)
class _Source:
    """The module of a package's attention function, under each name that it has had."""

    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    operator: str
    """A function that torch.compile's operators are made of, and an argument that tells those from older ones."""
    argument: str


SOURCES = {
    "flash2": _Source(("flash_attn.flash_attn_interface",), ("flash-attn",), "_flash_attn_forward", "window_size_left"),
    "flash3": _Source(
        (
            "flash_attn_interface",
            "flash_attn_3.flash_attn_interface",
            "flashattn_hopper.flash_attn_interface",
        ),
        ("flash-attn-3", "flashattn-hopper"),
        "_flash_attn_forward",
        "window_size_left",
    ),
    "flash4": _Source(("flash_attn.cute.interface",), ("flash-attn-4",), "_flash_attn_bwd", "learnable_sink"),
}


def installed(*, probe: bool) -> Packages:
    """The packages of this environment.

    Args:
        probe: also import each package's attention function, which is the only proof that it works. Otherwise only the
            installed versions are looked up, as for a GPU that is not here, and a PyTorch without CUDA counts as one
            with CUDA.
    """
    number = _cudnn()
    cudnn = _cudnn_version(number) if number else None
    if cudnn is None and not probe and torch.version.cuda is None:
        cudnn = CUDNN_OF_CUDA_BUILDS
    found = {name: _probed(name) if probe else _listed(name) for name in SOURCES}
    return Packages(torch.__version__, cudnn, **found)


def _cudnn() -> int | None:
    """The version number of the cuDNN that PyTorch finds; None if there is none, or PyTorch refuses it."""
    try:
        return torch.backends.cudnn.version()
    except RuntimeError as error:  # another release of it comes first on LD_LIBRARY_PATH
        logger.warning("cuDNN cannot be used: %s", error)
        return None


def interface(name: str) -> ModuleType:
    """The module with the functions of "flash2", "flash3" or "flash4".

    Raises:
        ImportError: it is not installed, or broken; call `installed(probe=True)` first.
    """
    module = _import(name)
    if module is None:
        raise ModuleNotFoundError(f"No module named {SOURCES[name].modules[0]!r}", name=SOURCES[name].modules[0])
    return module


@lru_cache
def function(package: str, name: str) -> Callable[..., Any]:
    """A function of "flash2", "flash3" or "flash4" as it was written.

    Some are wrapped as operators of PyTorch, whose dispatch takes longer than a small kernel.
    """
    found = getattr(interface(package), name)
    return getattr(found, "_init_fn", found)


@lru_cache
def _import(name: str) -> ModuleType | None:
    """The module; None if it is not installed; whatever its import raises if it is broken."""
    source = SOURCES[name]
    for path in source.modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # which are for its authors
                module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            # Another module than the one asked for is missing where the package is there but lacks what it needs.
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise
            continue
        getattr(module, "flash_attn_func")  # noqa: B009  a package of that name may be something else
        function = getattr(module, source.operator)
        if source.argument not in inspect.signature(getattr(function, "_init_fn", function)).parameters:
            raise ImportError(f"{source.operator} of {path} has no {source.argument}: it is too old")
        return module
    return None


@lru_cache
def _probed(name: str) -> Package:
    try:
        module = _import(name)
    except Exception as error:  # whatever a compiled extension does when it does not fit
        package = Package(_version(name), f"its import fails: {_first_line(error)}{_hint(error)}")
        logger.warning("%s cannot be used: %s", SOURCES[name].distributions[0], package.problem)
        return package
    return Package() if module is None else Package(_version(name, module))


@lru_cache
def _listed(name: str) -> Package:
    version = _version(name)
    return Package(None if version == "of unknown version" else version)


def _version(name: str, module: Any = None) -> str:
    for distribution in SOURCES[name].distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    package = importlib.import_module(module.__name__.partition(".")[0]) if module else None
    return str(getattr(package, "__version__", "of unknown version"))


def _hint(error: Exception) -> str:
    if "undefined symbol" in str(error) or "cannot open shared object" in str(error):
        return f" (built for another PyTorch or CUDA than {torch.__version__}: build or install it again)"
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _cudnn_version(number: int) -> str:
    """91900 is 9.19.0; before cuDNN 9 the major version had one digit less behind it."""
    major = number // 10000 if number >= 90000 else number // 1000
    minor = number % (10000 if number >= 90000 else 1000) // 100
    return f"{major}.{minor}.{number % 100}"
