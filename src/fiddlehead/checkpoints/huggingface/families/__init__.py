"""The families of Hugging Face models that are read and written.

A family is data, a `Family`. Each module of this package has one family or a few related ones, and is found without
being listed anywhere. A module of yours adds a family with `register`.
"""

from __future__ import annotations

import importlib
import pkgutil

from fiddlehead.checkpoints.huggingface.families.base import LLAMA_MODULES, SETTINGS, Family, same_model
from fiddlehead.checkpoints.huggingface.families.defaults import Fields
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.config import TransformerConfig

__all__ = [
    "FAMILIES",
    "LLAMA_MODULES",
    "SETTINGS",
    "Family",
    "family_for",
    "family_of",
    "register",
    "same_model",
]


def _built_in() -> dict[str, Family]:
    """Finds the families of this package's modules."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [each for module in modules for each in vars(module).values() if isinstance(each, Family)]
    return {family.model_type: family for family in sorted(found, key=lambda family: family.precedence)}


FAMILIES = _built_in()
"""The families by `model_type`, in the order of preference for an export."""
_BUILT_IN = frozenset(FAMILIES)


def register(family: Family) -> None:
    """Adds a family for this process, behind the present ones; it replaces your earlier family of the same name.

    Raises:
        ConfigError: this package has a family of this `model_type`.
    """
    if family.model_type in _BUILT_IN:
        raise ConfigError(Problem("model_type", family.model_type, "is a family of fiddlehead; choose another name"))
    FAMILIES[family.model_type] = family


def family_of(settings: Fields, where: str) -> Family:
    """Returns the family that a `config.json` belongs to.

    Raises:
        ConfigError: the family is unknown.
    """
    if settings.get("model_type") is None:
        message = f"names no family of models; set it to one of {', '.join(FAMILIES)}"
        raise ConfigError(Problem.in_file(where, Problem("model_type", None, message)))
    model_type = str(settings["model_type"])
    if model_type not in FAMILIES:
        raise ConfigError(Problem.in_file(where, Problem.unknown("model_type", model_type, "family", FAMILIES)))
    return FAMILIES[model_type]


def family_for(config: TransformerConfig) -> Family:
    """Returns the first family that has a model of this shape.

    Raises:
        ConfigError: no family has one.
    """
    for family in FAMILIES.values():
        if family.expresses(config):
            return family
    raise ConfigError(f"no Hugging Face family has a model of this shape; known: {', '.join(FAMILIES)}")
