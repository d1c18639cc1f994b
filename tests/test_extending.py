"""Each part that a user may add is one new file, found without registration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fiddlehead.cli.common import configure_executor, load_recipe
from fiddlehead.errors import ConfigError
from fiddlehead.launch import launch, plan, watch
from fiddlehead.launch.submit import write_run
from fiddlehead.recipe import trust
from fiddlehead.run import State
from tests.conftest import forget_modules

OPTIMIZER = '''
"""Plain stochastic gradient descent."""
from dataclasses import dataclass

import torch

from fiddlehead.training.optim import Optim


@dataclass(frozen=True, kw_only=True)
class SGD(Optim):
    momentum: float = 0.9

    def optimizer(self, named_parameters, fused={}):
        parameters = [parameter for _, parameter in named_parameters]
        return torch.optim.SGD(self.groups(parameters), lr=self.lr, momentum=self.momentum)

    def state_bytes(self, named_parameters, precision):
        return sum(4 * parameter.numel() for _, parameter in named_parameters)
'''
CALLBACK = '''
"""Writes a line at each step."""
from pathlib import Path

from lightning.pytorch import Callback


class Counted(Callback):
    def __init__(self, file):
        self.file = file

    def on_train_batch_end(self, trainer, *_):
        with Path(self.file).open("a") as file:
            file.write(f"{trainer.global_step}\\n")
'''
DATA = '''
"""Sequences of one token after the other."""
import torch

from fiddlehead.data import ByteTokenizer
from fiddlehead.data.steps import StepDataModule


class Counting(StepDataModule):
    separate_documents = False
    vocab_size = 256

    def __init__(self, seq_length=16, global_batch_size=4):
        super().__init__(seq_length, 2, global_batch_size, 2, 0, 0, [])

    def missing_rows(self, vocab_size):
        return [] if vocab_size >= 256 else ["counts to 256"]

    def setup(self, stage=None):
        self._train = self._val = Sequences(self.seq_length)
        self._tokenizer = ByteTokenizer()


class Sequences:
    def __init__(self, seq_length):
        self.seq_length = seq_length

    def __len__(self):
        return 64

    def __getitems__(self, indices):
        rows = torch.tensor([[(index + i) % 256 for i in range(self.seq_length + 1)] for index in indices])
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        return {"input_ids": tokens, "labels": labels, "index": torch.tensor(indices)}
'''
RECIPE = '''
import fiddle as fdl

from fiddlehead.recipe import Recipe
from fiddlehead.recipes.tiny import tiny_test
from my_callback import Counted
from my_data import Counting
from my_optimizer import SGD


def mine() -> Recipe:
    """All of my own parts."""
    recipe = tiny_test()
    recipe.optim = fdl.Config(SGD, lr=0.05)
    recipe.data = fdl.Config(Counting)
    recipe.trainer.callbacks = [fdl.Config(Counted, file="steps.txt")]
    recipe.trainer.max_steps = 6
    recipe.trainer.val_check_interval = 3
    return recipe
'''
EXECUTOR = '''
"""A scheduler of our own: here it starts a job at once."""
from dataclasses import dataclass
from typing import ClassVar

from fiddlehead.launch.local import LocalExecutor


@dataclass(frozen=True, kw_only=True)
class OursExecutor(LocalExecutor):
    queue_name: str = "long"

    kind: ClassVar[str] = "ours"


def ours(**settings) -> OursExecutor:
    """Our scheduler's queue."""
    return OursExecutor.of(**settings)
'''


@pytest.fixture
def project(working_directory: Path) -> Iterator[Path]:
    """A project with a file for each part."""
    files = {
        "my_optimizer.py": OPTIMIZER,
        "my_callback.py": CALLBACK,
        "my_data.py": DATA,
        "recipes/mine.py": RECIPE,
        "launch/ours.py": EXECUTOR,
    }
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    forget_modules()  # another test's
    yield working_directory
    forget_modules("my_optimizer", "my_callback", "my_data")


def test_an_optimizer_a_callback_a_data_reader_and_a_recipe_train_a_model(project: Path) -> None:
    recipe, _ = load_recipe("mine", ["log.name=mine"], ())
    made = plan(recipe)
    assert not made.problems and made.training.state_gib > 0
    run = launch(recipe)
    assert sorted(set(Path("steps.txt").read_text().split())) == ["0", "1", "2", "3", "4", "5", "6"]
    assert run.last_step() == 6 and float(run.last_metrics()["loss"]) < 6
    assert load_recipe("mine", ["log.name=mine", "trainer.max_steps=7"], ())[0].launch().last_step() == 7


def test_an_executor_is_found_by_its_file_and_again_by_the_run_that_it_was_sent(project: Path) -> None:
    executor, _ = configure_executor(["executor=ours", "executor.queue_name=short"])
    made = plan(load_recipe("tiny_test", ["log.name=a"], ())[0], executor)
    made.refuse_problems()
    run = write_run(made.recipe, made.executor, name=None, command=None)
    forget_modules()  # as in another process
    found = watch.load_executor(run)
    assert type(found).__name__ == "OursExecutor" and getattr(found, "queue_name", "") == "short"
    trust.forget(run)
    with pytest.raises(ConfigError, match=r"names launch\.ours:OursExecutor, which is not an executor of fiddlehead"):
        watch.load_executor(run)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NeMo-Run's, of what it imports
def test_a_run_goes_through_an_executor_of_one_file(project: Path) -> None:
    executor, _ = configure_executor(["executor=ours"])
    recipe, _ = load_recipe("tiny_test", ["log.name=a", "trainer.max_steps=1"], ())
    run = launch(recipe, executor)
    (status,) = watch.states([run])
    assert status and (status.state, status.executor) == (State.SUCCEEDED, "ours")
