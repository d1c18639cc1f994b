"""Makes NeMo-Run accept a `Recipe` as its own configuration, if it is loaded; nothing here imports it.

A `Recipe` is a `run.Partial` for NeMo-Run: for its factories, its experiments and its own runner.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import fiddle as fdl
import yaml


class ReturnType:
    """What `Recipe.__origin__` is: NeMo-Run's `cli.factory` asks a function's return type for it.

    NeMo-Run takes a function that returns `run.Partial[task]`; one that returns a Recipe is as good. Without NeMo-Run,
    a Recipe does not have this attribute.
    """

    def __get__(self, recipe: fdl.Partial | None, kind: type[fdl.Partial]) -> type:
        register(kind)
        nemo_run = sys.modules.get("nemo_run.config")
        if nemo_run is None or recipe is not None:
            raise AttributeError("__origin__")
        return nemo_run.Partial


def register(kind: type[fdl.Partial]) -> None:
    """If NeMo-Run is loaded, makes it accept a Recipe as its own Partial, which only adds pictures to Fiddle's.

    Args:
        kind: the class `Recipe`, here and in `join_experiments`.
    """
    nemo_run = sys.modules.get("nemo_run.config")
    if nemo_run is None or not hasattr(nemo_run, "register_supported_cast"):  # not loaded, or still loading
        return
    nemo_run.Partial.register(kind)
    nemo_run.register_supported_cast(kind, nemo_run.Partial)

    def represent(dumper: yaml.SafeDumper, recipe: fdl.Partial) -> yaml.Node:
        return dumper.represent_data(nemo_run.Partial.__unflatten__(*recipe.__flatten__()))

    yaml.SafeDumper.add_representer(kind, represent)  # the copy that an experiment keeps for people to read
    api: Any = sys.modules.get("nemo_run.cli.api")
    if hasattr(api, "_get_return_type") and not hasattr(api._get_return_type, "__wrapped__"):
        api._get_return_type = _as_partial(api._get_return_type, kind)


def join_experiments(kind: type[fdl.Partial]) -> None:
    """If NeMo-Run's experiments are loaded, makes them take recipes."""
    register(kind)
    if "nemo_run.run.experiment" in sys.modules:
        from fiddlehead.launch.nemo.experiments import accept_recipes

        accept_recipes()


def _as_partial(theirs: Callable[[Any], Any], kind: type[fdl.Partial]) -> Callable[[Any], Any]:
    """As NeMo-Run's own function that returns the return type of a function, where a Recipe is a `run.Partial`."""

    @functools.wraps(theirs)
    def return_type(function: Any) -> Any:
        found = theirs(function)
        return sys.modules["nemo_run.config"].Partial[kind] if found is kind else found

    return return_type
