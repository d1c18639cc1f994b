"""The types of values that a program sets, against the types that the parts ask for."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import numpy as np
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Timer

from fiddlehead import recipes
from fiddlehead.data import PreTrainingDataModule
from fiddlehead.errors import ConfigError
from fiddlehead.launch import plan, search
from fiddlehead.models import TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipe.mistyped import mistyped
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.training import AdamW


class Own(Callback):
    """A user's; what its arguments take is its own business."""

    def __init__(self, every: int = 1) -> None:
        self.every = every


def own_trainer(steps: int) -> Trainer:
    return Trainer(max_steps=steps)


def edited(path: str, value: Any) -> Recipe:
    recipe = tiny_test()
    owner = recipe
    *above, last = path.split(".")
    for name in above:
        owner = getattr(owner, name)
    setattr(owner, last, value)
    return recipe


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("trainer.max_steps", "4", "='4': expects int"),
        ("trainer.max_steps", 4.0, "=4.0: expects int"),
        ("optim.lr", "1e-3", "='1e-3': expects float"),
        ("optim.lr_scheduler", None, "=None: expects Schedule"),
        ("log", None, "=None: expects Log"),
        ("log.tensorboard", "false", "='false': expects bool"),
        ("model.compile", True, "=True: expects 'layers' | 'model' | None"),
        ("model.config", {"num_layers": 2}, ": expects TransformerConfig | None, not a dict"),
        ("model.config", fdl.Config(Timer), ": expects TransformerConfig | None, not a configuration of Timer"),
        ("trainer", None, "=None: expects Trainer"),
        ("trainer.callbacks", (fdl.Config(Timer),), "not a tuple"),
        ("trainer.callbacks", [Own], "| None; write fdl.Config(Own) instead of the class"),
        ("trainer.callbacks", [Timer], "write fdl.Config(Timer) instead of the class"),
        ("optim", fdl.Partial(AdamW, lr=1e-3), ": expects Optim, not a partial; write fdl.Config(AdamW, ...)"),
        ("optim", functools.partial(AdamW, lr=1e-3), ": expects Optim, not a partial; write fdl.Config(AdamW, ...)"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_path(path: str, value: Any, said: str) -> None:
    (problem,) = plan(edited(path, value)).problems
    assert problem.startswith(path)
    assert said in problem
    with pytest.raises(ConfigError, match=f"^{path}"):
        search(edited(path, value), target="h100")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optim.lr", 1),
        ("optim.betas", [0.9, 0.99]),
        ("log.dir", Path("runs")),
        ("trainer.callbacks", None),
        ("trainer.callbacks", fdl.Config(Timer)),
        ("trainer.callbacks", [fdl.Config(Own, every=2.5)]),
        ("trainer.max_time", {"minutes": 1}),
        ("trainer.accelerator", "cpu"),
        ("checkpoint.keep_best", 2),
        ("data.paths", [30, Path("a"), 70, "b"]),
    ],
)
def test_what_the_command_line_takes_is_taken(path: str, value: Any) -> None:
    assert not mistyped(edited(path, value))


def test_live_objects_are_refused_as_such() -> None:
    (problem,) = plan(edited("trainer", Trainer(logger=False, accelerator="cpu"))).problems
    assert "use fdl.Config(Trainer, ...) in its place" in problem
    assert not mistyped(edited("model.config", TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)))


@pytest.mark.parametrize("value", [np.int64(2), np.float32(0.5), np.bool_(True)])
def test_a_number_of_numpy_is_refused_with_the_plain_one(value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"a numpy\.\w+ cannot be written; use the plain {value.item()}, or \.item"):
        edited("optim.lr", value).to_yaml()


def test_a_trainer_that_hides_what_a_launch_sets_is_refused() -> None:
    (problem,) = plan(edited("trainer", fdl.Config(own_trainer, steps=2))).problems
    assert problem.startswith("trainer: own_trainer takes no accelerator, devices, num_nodes, ")


def _built_in() -> list[Callable[[], Recipe]]:
    modules = [
        importlib.import_module(f"{recipes.__name__}.{each.name}") for each in pkgutil.iter_modules(recipes.__path__)
    ]
    return [
        function
        for module in modules
        for function in vars(module).values()
        if getattr(function, "__module__", "") == module.__name__
        and str(inspect.signature(function).return_annotation).endswith("Recipe")
        and all(each.default is not each.empty for each in inspect.signature(function).parameters.values())
    ]


def test_every_built_in_recipe_has_the_types_that_its_parts_ask_for() -> None:
    functions = _built_in()
    assert len(functions) > 40
    assert not {function.__name__: found for function in functions if (found := mistyped(function()))}


@pytest.mark.parametrize("edit", ["trainer.max_steps='4'", "model.compile=true", "optim.lr=None", "log.dir=None"])
def test_the_command_line_refuses_the_same(edit: str) -> None:
    path, _, text = edit.partition("=")
    value = {"'4'": "4", "true": True, "None": None}[text]
    assert mistyped(edited(path, value))
    with pytest.raises(ConfigError, match=f"^{path}"):
        apply_overrides(tiny_test(), [edit])


def test_a_part_that_a_user_wrote_is_not_asked() -> None:
    recipe = tiny_test()
    recipe.data = fdl.Config(OwnData, seq_length="long")
    assert not mistyped(recipe)


class OwnData(PreTrainingDataModule):
    """Takes a text where its base takes a number."""

    def __init__(self, seq_length: int) -> None:
        super().__init__(seq_length=len(str(seq_length)))
