"""Every field of recipes and executors: its type, default, meaning and allowed values, as the code declares them."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import fiddle as fdl

from fiddlehead import __version__
from fiddlehead.errors import ConfigError
from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.paths import cache_folder
from fiddlehead.recipe import catalog, project
from fiddlehead.recipe.allowed import PARTS, TASKS, is_trainer
from fiddlehead.recipe.hints import choices, describe, is_union, members, parameter_hint, written_hint
from fiddlehead.recipe.kinds import check_kind
from fiddlehead.recipe.leaves import show
from fiddlehead.recipe.resumable import TRAINER, is_marked

OURS = ("fiddlehead.data", "fiddlehead.models", "fiddlehead.training", "lightning")
"""The packages whose parts are described."""
EXECUTOR = "executor"


@dataclass(frozen=True)
class Field:
    """A parameter of a task, of a part of a recipe or of an executor."""

    path: str
    """Where an edit finds it: "optim.lr", "executor.time"."""
    owner: str
    """The class or function that has it."""
    type: str
    default: str
    """As one would write it; "" if the field must be set."""
    doc: str
    resumable: bool
    """Whether it may change when a run goes on from its checkpoint."""
    allowed: list[str] = field(default_factory=list)
    """The values that the type allows, if these are few."""
    parts: list[str] = field(default_factory=list)
    """The parts of a recipe that may stand here, by name."""


def known_fields() -> list[Field]:
    """`recipe_fields` and `executor_fields`, from the cache folder if they are there.

    Otherwise PyTorch and Lightning are imported to find them, which takes seconds.
    """
    file = cache_folder() / f"fields-{_fingerprint()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [Field(**each) for each in json.loads(file.read_text(encoding="utf-8"))]
    found = [*recipe_fields(), *executor_fields()]
    with contextlib.suppress(OSError):  # a folder that cannot be written costs time, no more
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob("fields-*.json"):
            old.unlink()
        write_atomically(file, json.dumps([dataclasses.asdict(each) for each in found]))
    return found


def _fingerprint() -> str:
    """Another text for another version of this package, of Python or of Lightning, and for changed sources."""
    sources = sorted((str(file), file.stat().st_mtime_ns) for file in Path(project.HOME, "fiddlehead").rglob("*.py"))
    found = [__version__, sys.version, metadata.version("lightning"), sources]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def may_change(function: Callable[..., Any], name: str) -> bool:
    """Whether the parameter `name` of a class or function, with all below it, may change when a run continues."""
    return (name in TRAINER and is_trainer(function)) or is_marked(written_hint(function, name))


def recipe_fields() -> Iterator[Field]:
    """The fields of every recipe, in the order of the tasks' parameters; one for each class that has it."""
    seen: set[tuple[str, str]] = set()
    for module, tasks in TASKS.items():
        for task in sorted(tasks, reverse=True):  # pretrain first: finetune has the same parameters
            for each in _fields_of(getattr(importlib.import_module(module), task), "", resumable=False):
                key = (each.path, "" if each.owner in tasks else each.owner)
                if key not in seen:
                    yield each
                seen.add(key)


def executor_fields() -> Iterator[Field]:
    """The settings of the executors that come with the package."""
    for entry in catalog.executors():
        if not entry.module.startswith("fiddlehead."):
            continue
        function = entry.load()
        kind = typing.get_type_hints(function)["return"]
        own = {name: each for name, each in parameters(function).items() if each.kind is not each.VAR_KEYWORD}
        docs = docs_of(kind) | {name: text for name, text in docs_of(function).items() if name in own}
        for name, parameter in (parameters(kind) | own).items():
            declarer = function if name in own else kind
            hint = parameter_hint(declarer, name)
            yield Field(
                f"{EXECUTOR}.{name}", entry.name, _written(hint), _default(declarer, parameter), docs.get(name, ""),
                resumable=True, allowed=allowed_values(hint),
            )  # fmt: skip


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a class or function by name, without `self`."""
    found = inspect.signature(function).parameters
    return {name: each for name, each in found.items() if each.kind is not each.VAR_POSITIONAL}


def parts_for(hint: Any) -> list[type]:
    """The parts of `described_parts` that a parameter of this type accepts."""
    found = []
    for part, configured in _configured() if members(hint) else ():
        try:
            check_kind(configured, hint)
        except ConfigError:
            continue
        found.append(part)
    return found


def allowed_values(hint: Any) -> list[str]:
    """The values of a type that has few, as an edit writes them; empty for another type."""
    found: list[str] = []
    for kind in members(hint):
        found += ["true", "false"] if kind is bool else map(str, choices(kind))
    if found and type(None) in typing.get_args(hint):
        found.append("None")
    return list(dict.fromkeys(found))


def _fields_of(
    function: Callable[..., Any], prefix: str, above: tuple[type, ...] = (), *, resumable: bool
) -> Iterator[Field]:
    """The fields of a class or function, and of the parts that they take; those `above` are not below themselves."""
    docs = docs_of(function)
    own = {name: parts_for(parameter_hint(function, name)) for name in parameters(function)}
    above = (*above, *(part for parts in own.values() for part in parts)) if not prefix else above
    for name, parameter in parameters(function).items():
        hint = parameter_hint(function, name)
        free = resumable or may_change(function, name)
        parts = [part for part in own[name] if not prefix or part not in above]
        path = f"{prefix}{name}"
        yield Field(
            path, function.__name__, _written(hint), _default(function, parameter), docs.get(name, ""), free,
            allowed_values(hint), [part.__name__ for part in parts],
        )  # fmt: skip
        for part in parts:
            yield from _fields_of(part, f"{path}.", above, resumable=free)


@functools.cache
def described_parts() -> tuple[type, ...]:
    """The parts of recipes that come with the package, and Lightning's Trainer."""
    return tuple(getattr(importlib.import_module(package), name) for package in OURS for name in PARTS[package])


@functools.cache
def _configured() -> tuple[tuple[type, fdl.Config], ...]:
    """Each of `described_parts` with a configuration of it, of which hundreds of parameters are asked."""
    return tuple((part, fdl.Config(part)) for part in described_parts())


def _written(hint: Any) -> str:
    """A type as `describe` writes it, the members of a union in the order of the alphabet, None last.

    Python has one object for `int | float` and `float | int`: their order would depend on what was imported before.
    """
    if not is_union(hint):
        return describe(hint)
    kinds = sorted({describe(kind) for kind in typing.get_args(hint) if kind is not type(None)}, key=str.lower)
    return " | ".join([*kinds, *(["None"] if type(None) in typing.get_args(hint) else [])])


def _default(function: Callable[..., Any], parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    for each in dataclasses.fields(function) if dataclasses.is_dataclass(function) else ():
        if each.name == parameter.name and each.default_factory is not dataclasses.MISSING:
            return show(each.default_factory())
    return show(parameter.default)


@functools.cache
def docs_of(function: Callable[..., Any]) -> dict[str, str]:
    """The meaning of each parameter: from the Args of docstrings, and from the strings below a class's fields."""
    docs: dict[str, str] = {}
    for owner in reversed(function.__mro__) if inspect.isclass(function) else [function]:
        if owner is object or owner.__module__ == "builtins":
            continue
        for source in (owner, vars(owner).get("__init__")) if inspect.isclass(owner) else (owner,):
            docs |= _arguments(inspect.getdoc(source) or "") if source is not None else {}
        if inspect.isclass(owner) and dataclasses.is_dataclass(owner):
            docs |= _below_fields(owner)
        for name in parameters(function) if inspect.isclass(owner) else ():
            if name not in docs and (text := _sentences(owner.__doc__ or "", name)):
                docs[name] = text
    return docs


def _arguments(doc: str) -> dict[str, str]:
    """The texts of the section `Args:` of a docstring, by the names of the arguments."""
    match = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    if not match:
        return {}
    section = textwrap.dedent(match[1])
    found = re.findall(r"^(\w+)(?: \([^)]*\))?:\s*(.*(?:\n(?:[ \t]+.*)?)*)", section, re.MULTILINE)
    return {name: _plain(text) for name, text in found}


def _sentences(doc: str, name: str) -> str:
    """The sentences of a docstring about a parameter that has no text of its own."""
    text = " ".join(doc.split("Args:")[0].split())
    return " ".join(each for each in re.split(r"(?<=[.)]) (?=[A-Z`])", text) if f"`{name}`" in each)


def _below_fields(owner: type) -> dict[str, str]:
    """The texts below the fields of a class."""
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    except (OSError, TypeError, SyntaxError):
        return {}
    assert isinstance(body, ast.ClassDef)
    found = {}
    for declared, text in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name) and is_text:
            found[declared.target.id] = _plain(str(text.value.value))  # type: ignore[union-attr]
    return found


def _plain(text: str) -> str:
    """The first paragraph as one line, without the markup of Sphinx."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text.strip().split("\n\n")[0]).replace("``", "`")
    text = re.sub(r"\s*Default(s to)?:? `[^`]*`\.?$", "", " ".join(text.split()))
    return text[:1].upper() + text[1:]
