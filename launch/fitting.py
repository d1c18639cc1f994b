"""Fits a recipe to its executor: the number and kind of machines and devices."""

from __future__ import annotations

import inspect
import os
import shutil
import socket
import sys
from typing import Any

import fiddle as fdl
from fiddle import history

from fiddlehead.errors import Problem, refuse
from fiddlehead.launch.executor import Executor, gpus_here
from fiddlehead.numbers import is_whole
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.leaves import name_of
from fiddlehead.recipe.mistyped import mistyped

GPU = ("gpu", "cuda")
_SETTINGS = {
    "trainer": ("accelerator", "devices", "num_nodes", "precision", "val_check_interval", "check_val_every_n_epoch"),
    "log": ("dir", "name", "nsys", "tensorboard", "mlflow"),
}
"""The arguments of a recipe's parts that a launch reads, and partly sets."""


def setting_problems(recipe: Recipe) -> list[Problem]:
    """Values of other types than their parts ask for; and parts that hide the arguments which a launch reads."""
    problems = mistyped(recipe)
    for part, names in _SETTINGS.items():
        config = recipe.__arguments__.get(part)
        if isinstance(config, fdl.Config) and (hidden := [name for name in names if not hasattr(config, name)]):
            function = name_of(fdl.get_callable(config))
            message = (
                f"{function} takes no {', '.join(hidden)}, which a launch reads; use fdl.Config({part.title()}, ...)"
            )
            problems.append(Problem(part, message=message))
    return problems


def fit_to_executor(recipe: Recipe, executor: Executor | None) -> Recipe:
    """Returns a copy of the recipe whose trainer uses the executor's machines and devices; None means one process here.

    The executor overrides settings of the recipe function; settings of the user must agree with it. "auto" becomes all
    GPUs of each machine, or one process where there are none. The global batch stays the same.

    Raises:
        ConfigError: the user's settings contradict the executor, or the executor does not know its devices.
    """
    recipe = recipe.clone()
    if "trainer" not in recipe.__arguments__:
        return recipe
    trainer = recipe.trainer
    problems = [
        Problem(f"trainer.{name}", value, f"must be {what}")
        for name, value, what in (
            ("num_nodes", trainer.num_nodes, "how many machines (1 or more)"),
            ("devices", _automatic(trainer.devices), "how many there are on a node (1 or more), or 'auto'"),
        )
        if value != "auto" and not (is_whole(value) and value >= 1)
    ]
    refuse(problems)
    nodes = 1 if executor is None else executor.nodes or trainer.num_nodes
    given = 1 if executor is None else executor.devices_per_node()
    accelerator, devices = trainer.accelerator, _automatic(trainer.devices)
    if accelerator == "auto":
        accelerator = "gpu" if _gpus(executor, nodes) else "cpu"
    if not given and devices == "auto":
        given = _gpus(executor, nodes) or 1 if accelerator in GPU else 1
    given = given or int(devices)
    where = "one process without an executor" if executor is None else f"the executor gives {given} on each node"
    if devices not in ("auto", given) and _is_users(trainer, "devices"):
        problems.append(Problem("trainer.devices", devices, f"{where}; set one of them, or both alike"))
    if trainer.num_nodes != nodes and _is_users(trainer, "num_nodes"):
        where = "one process without an executor" if executor is None else f"executor.nodes={nodes}"
        problems.append(Problem("trainer.num_nodes", trainer.num_nodes, f"{where}; set one of them, or both alike"))
    refuse(problems)
    for name, value in (("accelerator", accelerator), ("devices", given), ("num_nodes", nodes)):
        if getattr(trainer, name) != value:
            setattr(trainer, name, value)
    compiled = "model" in recipe.__arguments__ and recipe.model.__arguments__.get("compile")
    if accelerator == "cpu" and compiled and not _is_users(recipe.model, "compile"):
        recipe.model.compile = None  # recipes for GPUs ask for it; on a CPU it takes minutes, and a C++ compiler
    return recipe


def yielded(recipe: Recipe, fitted: Recipe) -> list[str]:
    """A sentence for each setting of the recipe that the executor, or a machine without GPUs, overrides."""
    sentences = []
    for difference in fitted.diff(recipe):
        unsaid = ("auto", -1, "-1") if difference.path != "trainer.num_nodes" else (1,)
        if difference.right not in unsaid:
            sentences.append(f"{difference.path}={difference.left!r}; the recipe has {difference.right!r}")
    if any(not sentence.startswith("model") for sentence in sentences):
        sentences.append(f"data.global_batch_size={recipe.data.global_batch_size} stays as it is")
    return sentences


def missing_here(recipe: Recipe) -> str:
    """Why a recipe that was fitted to this machine cannot run on it; "" if it can."""
    trainer = recipe.trainer
    if trainer.accelerator not in GPU or not isinstance(trainer.devices, int) or trainer.devices <= gpus_here():
        return ""
    found = gpus_here()
    fewer = f"trainer.devices={found}" if found else "trainer.accelerator=cpu"
    return (
        f"trainer.devices={trainer.devices} with trainer.accelerator={trainer.accelerator!r}: {socket.gethostname()} "
        f"has {found or 'no'} GPU{'s' * (found != 1)}; set {fewer}, or name an executor that has them"
    )


def nsys_problems(recipe: Recipe) -> list[Problem]:
    """The problems of profiling a fitted recipe with Nsight Systems, wherever it runs."""
    steps = _nsys(recipe)
    if steps is None or recipe.trainer.accelerator != "cpu":
        return []
    from fiddlehead.training.callbacks.nsys import NEEDS_GPUS

    return [Problem("log.nsys", steps, NEEDS_GPUS)]


def missing_nsys(recipe: Recipe, executor: Executor | None) -> str:
    """Why this machine cannot run the job of a recipe under `nsys`; "" if it can, or need not."""
    steps = _nsys(recipe)
    if steps is None:
        return ""
    if executor is None:
        if "NSYS_PROFILING_SESSION_ID" in os.environ:  # nsys has started this process
            return ""
        return Problem("log.nsys", steps, "the job's script starts nsys; name an executor for it, such as local()")
    if executor.ships_code or executor.setup_lines or shutil.which("nsys"):
        return ""
    message = "there is no nsys in the PATH; install NVIDIA Nsight Systems, or load it in executor.setup_lines"
    return Problem("log.nsys", steps, message)


def missing_trackers(recipe: Recipe, executor: Executor | None) -> list[Problem]:
    """The trackers that a recipe selects and its job will not find, as far as this machine shows."""
    from fiddlehead.training.loggers import lacking

    elsewhere = executor is not None and (not executor.shares_environment or bool(executor.setup_lines))
    return [] if elsewhere or "log" not in recipe.__arguments__ else lacking(recipe.log)


def _nsys(recipe: Recipe) -> str | None:
    """The steps that Nsight Systems profiles."""
    return recipe.log.nsys if "log" in recipe.__arguments__ else None


def _automatic(devices: Any) -> Any:
    """`trainer.devices`, with one word for all of them."""
    return "auto" if devices in ("auto", -1, "-1") else devices


def _gpus(executor: Executor | None, nodes: int) -> int:
    """How many GPUs "auto" stands for on each machine."""
    return min(1, gpus_here()) if executor is None else executor.gpus_of_a_node(nodes)


def _is_users(config: fdl.Buildable, name: str) -> bool:
    """Whether a value was set by the recipe's user: typed, or set in a program after the recipe function returned."""
    entries = config.__argument_history__[name]
    return bool(entries) and not _in_a_recipe(entries[-1].location)


def _in_a_recipe(location: history.Location) -> bool:
    """Whether a value was set by a recipe: in a YAML file, or in a function that says it returns a `Recipe`."""
    if location.function_name is None:
        return location.line_number > 0  # edits that were typed have no line
    modules = [module for module in list(sys.modules.values()) if getattr(module, "__file__", "") == location.filename]
    functions = [getattr(module, location.function_name, None) for module in modules]
    returned = [inspect.get_annotations(function).get("return") for function in functions if callable(function)]
    return any(kind is Recipe or str(kind).endswith("Recipe") for kind in returned)
