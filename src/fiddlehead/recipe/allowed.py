"""Names of the classes and functions that a recipe may use, from an object to its name and back.

A recipe file may come from anybody. What it names is imported, and is called when the recipe is checked or run. So a
file may name only the parts that are listed here, and those that its reader allows by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from fiddlehead.errors import ConfigError, nearest
from fiddlehead.recipe import project

PARTS: Mapping[str, tuple[str, ...]] = {
    "fiddlehead.data": (
        "BPETokenizer",
        "ByteTokenizer",
        "FineTuningDataModule",
        "PreTrainingDataModule",
        "TokenizerFile",
    ),
    "fiddlehead.models": (
        "LinearRopeScaling",
        "LoRA",
        "LongRopeScaling",
        "RopeScaling",
        "TransformerConfig",
        "YarnRopeScaling",
    ),
    "fiddlehead.training": (
        "AdamW",
        "Checkpoint",
        "CosineAnnealing",
        "LanguageModel",
        "Log",
        "Muon",
        "Parallel",
        "PreferenceModel",
        "WarmupStableDecay",
    ),
    "lightning": ("Trainer",),
    "lightning.pytorch": ("Trainer",),
    # Those that take no function, and write no file.
    "lightning.pytorch.callbacks": (
        "DeviceStatsMonitor",
        "EarlyStopping",
        "LearningRateMonitor",
        "ModelSummary",
        "TQDMProgressBar",
        "Timer",
    ),
    # For a user's own parts: an optimizer's class, an activation, a type.
    "torch.optim": ("Adam", "AdamW", "NAdam", "RAdam", "SGD"),
    "torch.nn.functional": ("gelu", "relu", "silu"),
    "builtins": ("bool", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple"),
}
"""The names that every recipe may use, by the package that exports them: none of them runs code or writes files when
built."""

FORMER = {
    "fiddlehead.training": (
        "fiddlehead.training.checkpoint",
        "fiddlehead.training.optim",
        "fiddlehead.training.parallel",
    )
}
"""Modules that parts of a package were named by, in recipes that earlier versions wrote."""

TASKS: Mapping[str, tuple[str, ...]] = {"fiddlehead.tasks": ("finetune", "pretrain")}
"""The tasks of a recipe."""

WITHHELD = {
    "default_root_dir": "it can be an address, which a trainer opens; a run's files are in its folder",
    "model_registry": "it would send checkpoints away",
}
"""Arguments of Lightning's Trainer that a recipe file may not set, and why."""

BY_NAME_ONLY = frozenset({*sys.stdlib_module_names, "fiddle", "fiddlehead", "lightning", "numpy", "torch"})
"""Packages that cannot be allowed whole: each has functions that run, load or import anything."""


def named(reference: str, allow: Sequence[str] = (), *, task: bool = False) -> Any:
    """The class or function that ``package.module:name`` or ``package.module.name`` names.

    Args:
        allow: additional names: modules, with their submodules, and single names, ``package.module:name``.
        task: whether it may also be a task.

    Raises:
        ConfigError: the name is not allowed, and was not imported; or it is allowed but does not exist.
    """
    dotted = _dotted(reference)
    found = _listed(reference, task=task)
    if found is not None:
        return found
    exact = next((entry for entry in allow if entry.replace(":", ".") == dotted), None)
    module = reference.partition(":")[0]
    if exact is None and not _is_below(module, allow):
        raise ConfigError(f"{reference} is not trusted: {_advice(reference)}")
    value = locate(reference if exact is None else exact)
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        raise ConfigError(f"{reference} is a {type(value).__name__}, not a class or a function")
    if exact is None and not _is_below(value.__module__ or "", allow) and not is_listed(value):
        home = value.__module__ or "no module"
        raise ConfigError(f"{reference} belongs to {home}, which is not trusted; if you trust it, --allow {reference}")
    if _is_method(value):
        raise ConfigError(f"{reference} is a method; name a class or a function")
    return value


def is_listed(value: Any, *, task: bool = False) -> bool:
    """Whether a recipe file may name the class or function `value` without any `allow`."""
    try:
        return _listed(reference_to(value), task=task) is value
    except ConfigError:
        return False


def is_trainer(function: Any) -> bool:
    """Whether a class is Lightning's Trainer, or derived from it; Lightning is not imported to know."""
    bases = getattr(function, "__mro__", ())
    return any(base.__name__ == "Trainer" and base.__module__.startswith("lightning.") for base in bases)


def withheld_problem(function: Any, name: str | int) -> str:
    """Why a recipe file may not set the argument `name` of a class or function; "" if it may."""
    withheld = name in WITHHELD and is_trainer(function)
    return f"may not be set in a recipe file: {WITHHELD[name]}" if withheld else ""  # type: ignore[index]


def locate(reference: str) -> Any:
    """Finds ``package.module:name`` or ``package.module.name``; the user's modules come after the installed ones.

    Raises:
        ConfigError: there is no such module or name, or the module only imports it from another one.
    """
    _dotted(reference)
    if reference.partition(":")[0].partition(".")[0] not in BY_NAME_ONLY:
        project.make_importable()
    module_name, _, qualname = reference.partition(":")
    if not qualname:
        module_name, qualname = _split(reference)
    module = _import(module_name, reference)
    value: Any = module
    for part in qualname.split("."):
        if isinstance(value, ModuleType) and value is not module:
            raise ConfigError(f"{reference}: {module_name} only imports {value.__name__}; name it by its own module")
        if not hasattr(value, part):
            match = nearest(part, dir(value))
            hint = f"; did you mean {match!r}?" if match else ""
            raise ConfigError(f"{reference}: {module_name} has no {part!r}{hint}")
        value = getattr(value, part)
    if isinstance(value, ModuleType):
        raise ConfigError(f"{reference} is a module, not a class or a function")
    return value


def reference_to(value: Any) -> str:
    """``module:name`` from which `locate` finds the class or function `value` again; ConfigError if there is none.

    A part of this package is named by the package that exports it, so the name stays when its module is moved.
    """
    name = getattr(value, "__name__", "")
    for package, parts in PARTS.items():
        ours = package.startswith("fiddlehead.") and name in parts
        if ours and getattr(sys.modules.get(package), name, None) is value:
            return f"{package}:{name}"
    return _in_its_module(value)


def _in_its_module(value: Any) -> str:
    """``module:name``, with the module that defines `value`; ConfigError if it cannot be found there."""
    name = getattr(value, "__name__", "")
    qualname = getattr(value, "__qualname__", "")
    module = getattr(value, "__module__", None) or ""
    if "<lambda>" in qualname:
        raise ConfigError("a lambda has no name to write; define a function in a module")
    if "<locals>" in qualname:
        raise ConfigError(f"{qualname} is defined inside a function; move it to the top of its module")
    if module == "__main__":
        raise ConfigError(f"{qualname} is defined in the script that runs; move it to a module that can be imported")
    # Builtin functions of torch give a private module as their own, or a name as if they were its methods.
    homes = ("torch.nn.functional", module) if module == "torch._C._nn" else (module,)
    for home in homes:
        for candidate in (qualname, name):
            found: Any = sys.modules.get(home)
            for part in candidate.split("."):
                found = getattr(found, part, None)
            if found is not None and (found is value or (inspect.ismethod(value) and found == value)):
                return f"{home}:{candidate}"
    raise ConfigError(f"{value!r} cannot be imported by its name; define it at the top of a module")


def _dotted(reference: str) -> str:
    """`reference` with dots alone; ConfigError if it is not a name, or one of Python's own machinery."""
    module, colon, qualname = reference.partition(":")
    parts = f"{module}.{qualname}".split(".") if colon else module.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{reference!r} is not of the form package.module:name")
    if any(part.startswith("__") for part in parts):
        raise ConfigError(f"{reference}: a name with two leading underscores may not be used")
    return ".".join(parts)


@functools.cache
def _listed(reference: str, *, task: bool) -> Any:
    """The listed class or function of this name, by the package that exports it or its module; None if it is not."""
    dotted = reference.replace(":", ".")
    top, _, rest = dotted.partition(".")
    name = rest.rpartition(".")[2]
    for names in (PARTS, TASKS) if task else (PARTS,):
        for package, exported in names.items():
            if name in exported and package.partition(".")[0] == top:
                value = getattr(importlib.import_module(package), name)
                homes = (package, *FORMER.get(package, ()))
                if dotted in (*(f"{home}.{name}" for home in homes), _in_its_module(value).replace(":", ".")):
                    return value
    return None


def _is_below(module: str, allow: Sequence[str]) -> bool:
    """Whether `module` is one of those that may be imported whole."""
    packages = [entry for entry in allow if entry.partition(".")[0] not in BY_NAME_ONLY]
    return any(module == package or module.startswith(package + ".") for package in packages)


def _advice(reference: str) -> str:
    """Advice for a name that is not allowed: what to write or to allow instead."""
    package, _, name = reference.replace(":", ".").rpartition(".")
    close = nearest(name, PARTS.get(package, ()))
    similar = [f"{package}:{close}"] if close else [f"{home}:{name}" for home, parts in PARTS.items() if name in parts]
    meant = f"did you mean {similar[0]!r}? Else, " if similar else ""
    module = reference.partition(":")[0]
    whole = ":" in reference and module.partition(".")[0] not in BY_NAME_ONLY
    return f"{meant}if you trust who wrote it, --allow {module if whole else reference}"


def _is_method(function: Any) -> bool:
    """Whether `function` is an instance's method, which takes any object as its first argument."""
    owner, _, name = function.__qualname__.rpartition(".")
    if not owner or not inspect.isfunction(function) or "<locals>" in owner:
        return False
    holder: Any = sys.modules.get(function.__module__)
    for part in owner.split("."):
        holder = getattr(holder, part, None)
    return holder is None or not isinstance(inspect.getattr_static(holder, name, None), staticmethod)


def _split(reference: str) -> tuple[str, str]:
    """The longest importable module of a dotted name, and the rest."""
    parts = reference.split(".")
    end = 1
    module = _import(parts[0], reference)
    while end < len(parts) - 1:
        if not hasattr(module, "__path__") or importlib.util.find_spec(f"{module.__name__}.{parts[end]}") is None:
            break
        module = _import(f"{module.__name__}.{parts[end]}", reference)
        end += 1
    return module.__name__, ".".join(parts[end:])


def _import(module: str, reference: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{reference}: there is no module {error.name!r}") from error
    except ImportError as error:
        raise ConfigError(f"{reference}: {module} cannot be imported: {error}") from error
