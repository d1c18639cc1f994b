"""The way from `launch` to the training step is short, and docs/architecture.md says which files it goes through."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import pytest

import fiddlehead
from fiddlehead.launch import launch
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.training import LanguageModel

PACKAGE = Path(fiddlehead.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def test_few_functions_are_between_a_launch_and_a_training_step(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks: list[list[traceback.FrameSummary]] = []
    step = LanguageModel.training_step

    def watched(self: LanguageModel, *arguments: Any) -> Any:
        stacks.append(list(traceback.extract_stack())[:-1])
        return step(self, *arguments)

    monkeypatch.setattr(LanguageModel, "training_step", watched)
    recipe = tiny_test()
    recipe.trainer.max_steps = 1
    launch(recipe)
    links = {(PACKAGE / link).resolve(): PACKAGE / link for link in ("launch", "recipes")}
    way = []
    for frame in stacks[0]:
        file = Path(frame.filename).resolve()
        file = links[file.parent] / file.name if file.parent in links else file
        if file.is_relative_to(PACKAGE):
            way.append(str(file.relative_to(PACKAGE)))
    way.append("training/language_model.py")
    assert len(way) <= 8
    told = re.findall(r"^\d\. `([\w/.]+)`:", PAGE.read_text(), re.MULTILINE)
    assert [file for number, file in enumerate(way) if file not in way[:number]] == told


def test_every_folder_that_the_page_names_is_there() -> None:
    root = PAGE.parents[1]
    named = set(re.findall(r"`((?:src/|launch/|recipes/)[\w/.]*)`", PAGE.read_text()))
    assert len(named) > 15 and all((root / path).exists() for path in named)
    packages = {f"src/fiddlehead/{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.glob("*/__init__.py")}
    assert packages - {"src/fiddlehead/launch/", "src/fiddlehead/recipes/"} <= named | {"src/fiddlehead/attention/"}
