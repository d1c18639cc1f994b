"""What a task has beside a part reaches the part's constructor, and is no field of the part."""

from __future__ import annotations

from typing import Any

import fiddle as fdl
import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipe.from_task import from_task
from tests.recipe_parts import Log, Optim


class Learner:
    @from_task("optim", "seed")
    def __init__(self, size: int = 1, log: Log | None = None, *, optim: Optim | None = None, seed: int = 7) -> None:
        if size < 1:
            raise ValueError("too small")
        self.size, self.log, self.optim, self.seed = size, log, optim, seed


class Inherited(Learner):
    pass


class OwnConstructor(Learner):
    def __init__(self, size: int = 2) -> None:
        super().__init__(size)


class Checked:
    def __init__(self, lr: float = 0.5) -> None:
        if lr < 0:
            raise ValueError("lr is negative")


def train(learner: Any, others: Any = None, optim: Any = None, seed: int = 3) -> None: ...


@pytest.mark.parametrize("kind", [Learner, Inherited])
def test_a_constructor_gets_the_very_argument_of_the_task(kind: type) -> None:
    built = Recipe(train, learner=fdl.Config(kind, size=4), optim=fdl.Config(Optim, lr=0.25)).build_arguments()
    assert built["learner"].optim is built["optim"] and built["optim"].lr == 0.25
    assert (built["learner"].size, built["learner"].seed) == (4, 7)  # the recipe does not set a seed
    assert Recipe(train, learner=fdl.Config(kind), seed=5).build_arguments()["learner"].seed == 5


def test_it_is_handed_to_the_arguments_of_the_task_only() -> None:
    given = {"learner": fdl.Config(OwnConstructor), "others": [fdl.Config(Learner)], "optim": fdl.Config(Optim)}
    built = Recipe(train, **given).build_arguments()
    assert built["learner"].optim is None and built["others"][0].optim is None


def test_a_recipe_cannot_set_it_on_the_part() -> None:
    recipe = Recipe(train, learner=fdl.Config(Learner), optim=fdl.Config(Optim))
    with pytest.raises(AttributeError):
        recipe.learner.optim = 1
    with pytest.raises(ConfigError, match="optim"):
        apply_overrides(recipe, ["learner.optim=None"])
    assert "learner.seed" not in recipe.sources() and Learner(optim=Optim(), seed=1).seed == 1


def test_the_problems_of_both_are_found_at_their_own_places() -> None:
    recipe = Recipe(train, learner=fdl.Config(Learner, size=0), optim=fdl.Config(Checked, lr=-1.0))
    with pytest.raises(ConfigError) as error:
        recipe.build_arguments()
    assert sorted(error.value.problems) == ["learner: Learner: too small", "optim: Checked: lr is negative"]
