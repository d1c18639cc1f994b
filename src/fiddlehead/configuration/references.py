"""Names of classes and functions: from an object to its name, and back, without importing what is not trusted.

A recipe file may come from anybody. Loading one imports modules and, once it is run, calls what it names; so only
classes and functions of trusted packages may be named, and of those not the ones that load, fetch or start things.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from fiddlehead.errors import ConfigError, nearest

# Of this package a recipe may name what these export: the parts of a run, which start and write nothing when built.
PARTS = ("fiddlehead.models", "fiddlehead.data", "fiddlehead.training")

# And the tasks: a recipe says which one it is for, and the command that is typed must agree.
TASKS = ("fiddlehead.tasks:pretrain", "fiddlehead.tasks:finetune")

# What else a recipe may name unasked. Of torch only the areas that a run is made of: too much of the rest runs code.
TRUSTED = (
    "lightning.pytorch",
    "lightning.fabric",
    "torch.nn",
    "torch._C._nn",
    "torch.optim",
    "torch.utils.data",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.profiler",
)

# Packages whose front module only passes on what trusted modules define.
FRONTS = ("lightning", "torch", "torch.distributed", "torch.utils")

SAFE_BUILTINS = ("bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple")

_RUNS_FILES = "it runs code from a file"
_FETCHES = "it downloads, and may run what it downloaded"
_STARTS = "it starts programs"
_OPENS = "it would let a recipe load and name anything else"

# Never, even when a caller trusts the package: the module, or the module and name, and why.
REFUSED = {
    "torch.load": _RUNS_FILES,
    "torch.serialization": _RUNS_FILES,
    "torch.storage": _RUNS_FILES,
    "torch.jit": _RUNS_FILES,
    "torch.package": _RUNS_FILES,
    "torch.export": _RUNS_FILES,
    "torch._export": _RUNS_FILES,
    "torch._inductor": _RUNS_FILES,
    "torch._dynamo": _RUNS_FILES,
    "torch.fx": "it compiles source text",
    "torch._ops": _RUNS_FILES,
    "torch._classes": _RUNS_FILES,
    "torch.distributed.checkpoint": _RUNS_FILES,
    "torch.from_file": "it maps and may overwrite a file",
    "torch.hub": _FETCHES,
    "torch.utils.model_zoo": _FETCHES,
    "torch.utils.data.datapipes": _FETCHES,
    "torch.utils.cpp_extension": "it compiles and runs code",
    "torch.utils.benchmark": "it runs source text",
    "torch.utils.collect_env": _STARTS,
    "torch.testing": _STARTS,
    "torch.distributed.run": _STARTS,
    "torch.distributed.launch": _STARTS,
    "torch.distributed.launcher": _STARTS,
    "torch.distributed.elastic": _STARTS,
    "torch.distributed.rpc": _STARTS,
    "torch.multiprocessing": _STARTS,
    "lightning.pytorch.cli": _STARTS,
    "lightning.fabric.cli": _STARTS,
    "lightning.pytorch.core.saving": _RUNS_FILES,
    "lightning.pytorch.demos": _FETCHES,
    "lightning.pytorch.utilities.model_registry": _FETCHES,
    "lightning.fabric.utilities.cloud_io": _RUNS_FILES,
    "lightning.fabric.utilities.load": _RUNS_FILES,
    "fiddlehead.cli": _STARTS,
    "fiddlehead.launch": _STARTS,
    "fiddlehead.job": _STARTS,
    "fiddlehead.workers": _STARTS,
    "fiddlehead.recipe": _OPENS,
    "fiddlehead.configuration": _OPENS,
    "fiddlehead.overrides": _OPENS,
    "builtins": "only these builtins may be named: " + ", ".join(SAFE_BUILTINS),
}


def trusted(reference: str, allow: Sequence[str] = ()) -> Any:
    """The class or function named by `reference`, of a trusted module or one below a package of `allow`.

    Both the module that is named and the one that defines the object must be trusted: ``torch.os.system`` is not
    torch's. Raises ConfigError if not, and if there is no such thing.
    """

    def may_import(module: str) -> None:
        if module != "builtins" and module not in FRONTS and not _under(module, ("fiddlehead",)):
            _check(module, reference, allow)

    if any(part.startswith("__") for part in reference.replace(":", ".").split(".")):
        raise ConfigError(f"{reference}: names with two leading underscores may not be used in a recipe file")
    value = locate(reference, may_import)
    check_trusted(value, reference, allow)
    return value


def check_trusted(value: Any, reference: str, allow: Sequence[str] = ()) -> None:
    """Raises ConfigError unless `value`, named by `reference`, is a class or function that a recipe file may name."""
    name = getattr(value, "__name__", "")
    if any(value is getattr(builtins, safe) for safe in SAFE_BUILTINS):
        return
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        raise ConfigError(f"{reference} is a {type(value).__name__}, not a class or a function")
    module = value.__module__ or ""
    if name == "load_from_checkpoint":
        raise ConfigError(f"{reference} may not be used in a recipe file: {_RUNS_FILES}")
    _check_refused(f"{module}.{name}", reference)
    if module.partition(".")[0] == "fiddlehead" and not _under(module, allow):
        _check_exported(value, reference)
        return
    if module == "torch" and inspect.isbuiltin(value) and not name.startswith("_"):
        return  # plain mathematics: torch.tanh and its like
    _check(module, reference, allow)
    if inspect.isclass(value):
        return
    if _is_method(value):
        raise ConfigError(f"{reference} is a method; name a class or a function")
    package = module.partition(".")[0]
    if package == "lightning" or (package == "torch" and (name.startswith("_") or "." in value.__qualname__)):
        raise ConfigError(f"{reference}: of {package} a recipe file may name classes, but not this function")


def _check_exported(value: Any, reference: str) -> None:
    """Raises ConfigError unless `value` is a task, or a part of a run that its package exports."""
    if f"{value.__module__}:{value.__qualname__}" in TASKS:
        return
    for package in PARTS:
        if value.__module__.startswith(f"{package}."):
            exported = importlib.import_module(package)
            if value.__name__ in exported.__all__ and getattr(exported, value.__name__) is value:
                return
    raise ConfigError(
        f"{reference} may not be used in a recipe file: of fiddlehead only {', '.join(PARTS)} export to it"
    )


def _is_method(function: Any) -> bool:
    """Whether `function` is an instance's method, which takes any object as its first argument."""
    owner, _, name = function.__qualname__.rpartition(".")
    if not owner or not inspect.isfunction(function) or "<locals>" in owner:
        return False
    return not isinstance(inspect.getattr_static(locate(f"{function.__module__}:{owner}"), name), staticmethod)


def locate(reference: str, may_import: Callable[[str], None] = lambda _: None) -> Any:
    """What ``package.module:name`` or ``package.module.name`` names.

    `may_import` sees the name of each module before it is imported and raises to forbid it. Raises ConfigError if
    there is no such module or name, or if the way there leads through another module's imports.
    """
    module_name, colon, qualname = reference.partition(":")
    if not all(part.isidentifier() for part in f"{module_name}.{qualname or 'x'}".split(".")):
        raise ConfigError(f"{reference!r} is not of the form package.module:name")
    if not colon:
        module_name, qualname = _split(reference, may_import)
    module = _import(module_name, reference, may_import)
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
    """``module:name`` from which `locate` finds the class or function `value` again; ConfigError if there is none."""
    name = getattr(value, "__name__", "")
    qualname = getattr(value, "__qualname__", "")
    module = getattr(value, "__module__", None) or ""
    if "<lambda>" in qualname:
        raise ConfigError("a lambda has no name to write; define a function in a module")
    if "<locals>" in qualname:
        raise ConfigError(f"{qualname} is defined inside a function; move it to the top of its module")
    if module == "__main__":
        raise ConfigError(f"{qualname} is defined in the script that runs; move it to a module that can be imported")
    # Builtin functions of torch know only their private home, or call themselves a method of it.
    homes = ("torch.nn.functional", module) if module == "torch._C._nn" else (module,)
    for home in homes:
        for candidate in (qualname, name):
            found: Any = sys.modules.get(home)
            for part in candidate.split("."):
                found = getattr(found, part, None)
            if found is not None and (found is value or (inspect.ismethod(value) and found == value)):
                return f"{home}:{candidate}"
    raise ConfigError(f"{value!r} cannot be imported by its name; define it at the top of a module")


def is_trusted(value: Any) -> bool:
    """Whether a recipe file may name the class or function `value` without any `allow`."""
    try:
        check_trusted(value, "")
    except ConfigError:
        return False
    return True


def _under(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _check_refused(name: str, reference: str) -> None:
    for refused, reason in REFUSED.items():
        if _under(name, (refused,)):
            raise ConfigError(f"{reference} may not be used in a recipe file: {reason}")


def _check(module: str, reference: str, allow: Sequence[str]) -> None:
    _check_refused(module, reference)
    if not _under(module, (*TRUSTED, *allow)):
        raise ConfigError(
            f"{reference} belongs to {module or 'no module'}, which is not trusted; "
            f"if you trust the file, allow {module.partition('.')[0]!r}"
        )


def _split(reference: str, may_import: Callable[[str], None]) -> tuple[str, str]:
    """The longest importable module of a dotted name, and the rest."""
    parts = reference.split(".")
    if len(parts) == 1:
        raise ConfigError(f"{reference!r} is not of the form package.module:name")
    end = 1
    module = _import(parts[0], reference, may_import)
    while end < len(parts) - 1:
        if not hasattr(module, "__path__") or importlib.util.find_spec(f"{module.__name__}.{parts[end]}") is None:
            break
        module = _import(f"{module.__name__}.{parts[end]}", reference, may_import)
        end += 1
    return module.__name__, ".".join(parts[end:])


def _import(module: str, reference: str, may_import: Callable[[str], None]) -> ModuleType:
    may_import(module)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{reference}: there is no module {error.name!r}") from error
    except ImportError as error:
        raise ConfigError(f"{reference}: {module} cannot be imported: {error}") from error
