"""What NeMo-Run's users write in their recipes works in ours."""

from __future__ import annotations

from pathlib import Path

import fiddle as fdl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback

from fiddlehead.cli.common import load_recipe
from fiddlehead.data import ByteTokenizer, PreTrainingDataModule
from fiddlehead.errors import ConfigError
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.training.optim import AdamW

PARTS = [
    "@run.autoconvert\ndef fast(lr: float = 0.25) -> AdamW:\n    return AdamW(lr=lr)",
    "@run.cli.factory\n@run.autoconvert\ndef fast(lr: float = 0.25) -> AdamW:\n    return AdamW(lr=lr)",
    "def fast(lr: float = 0.25) -> run.Config[AdamW]:\n    return run.Config(AdamW, lr=lr)",
]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_a_function_of_nemo_run_s_makes_is_as_fiddle_s(part: str, working_directory: Path) -> None:
    Path("recipes").mkdir()
    module = f"part_{PARTS.index(part)}"  # a module is imported once in a process
    Path(f"recipes/{module}.py").write_text(
        "import nemo_run as run\nfrom fiddlehead.recipe import Recipe\nfrom fiddlehead.recipes.tiny import tiny_test\n"
        f"from fiddlehead.training.optim import AdamW\n\n\n{part}\n\n\n"
        f"def {module}(lr: float = 0.5) -> Recipe:\n    recipe = tiny_test()\n    recipe.optim = fast(lr)\n"
        "    return recipe\n"
    )
    expected = tiny_test()
    for name, lr in {module: 0.5, f"{module}(lr=0.125)": 0.125}.items():
        expected.optim = fdl.Config(AdamW, lr=lr)
        recipe, _ = load_recipe(name, [])
        assert recipe.to_yaml() == expected.to_yaml()
        assert Recipe.from_yaml(recipe.to_yaml()) == expected


FILE = """
import nemo_run as run
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from fiddlehead.data import ByteTokenizer, PreTrainingDataModule
from fiddlehead.recipe import Recipe
from fiddlehead.recipes.tiny import tiny_test


@run.cli.factory
def of_parts(steps: int = 7) -> Recipe:
    recipe = tiny_test()
    sizes = {"seq_length": 32, "micro_batch_size": 4, "global_batch_size": 8}
    recipe.data = run.Config(PreTrainingDataModule, tokenizer=run.Config(ByteTokenizer), corpus="stdlib", **sizes)
    recipe.trainer.callbacks.append(run.Config(EarlyStopping, monitor="val_loss"))
    recipe.trainer.callbacks.append(run.Config(LambdaCallback, on_fit_start=run.Partial(print, "fit", sep="-")))
    recipe.trainer.max_steps = steps
    return recipe


@run.cli.factory
@run.autoconvert
def converted() -> Recipe:
    return tiny_test()
"""


def test_a_recipe_of_nemo_run_s_parts_under_its_decorator_is_as_fiddle_s(working_directory: Path) -> None:
    Path("recipes").mkdir()
    Path("recipes/parts.py").write_text(FILE)
    expected = tiny_test()
    expected.data = fdl.Config(
        PreTrainingDataModule, tokenizer=fdl.Config(ByteTokenizer), corpus="stdlib", seq_length=32,
        micro_batch_size=4, global_batch_size=8,
    )  # fmt: skip
    printed = fdl.Partial(print, "fit", sep="-")
    expected.trainer.callbacks = [
        fdl.Config(EarlyStopping, monitor="val_loss"), fdl.Config(LambdaCallback, on_fit_start=printed),
    ]  # fmt: skip
    expected.trainer.max_steps = 9
    recipe, _ = load_recipe("of_parts(steps=9)", [])
    assert recipe.to_yaml() == expected.to_yaml()
    assert Recipe.from_yaml(recipe.to_yaml(), allow=recipe.names_to_allow()) == expected == recipe
    with pytest.raises(ConfigError, match="converted returned a Config, not a Recipe; without NeMo-Run's autoconvert"):
        load_recipe("converted", [])
