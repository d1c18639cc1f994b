"""What NeMo-Run's users write in their recipes works in ours."""

from __future__ import annotations

from pathlib import Path

import fiddle as fdl
import pytest

from fiddlehead.cli.common import load_recipe
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
