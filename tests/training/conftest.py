"""A tiny dataset, and runs small enough to repeat in a test."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from fiddlehead import tasks
from fiddlehead.checkpoints.weights import CheckpointWeights
from fiddlehead.data import ByteTokenizer, PreTrainingDataModule
from fiddlehead.data.tokenize import tokenize
from fiddlehead.models import TransformerConfig
from fiddlehead.plan.training import TrainingPlan, begin, plan_training
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import AdamW, Checkpoint, CosineAnnealing, LanguageModel, Log
from tests.conftest import once

Parts = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenized folder: 200 short documents of bytes."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0).choices(["fern", "frond", "spore", "moss", "leaf"], k=4000)
    for i in range(200):
        (folder / f"{i:03}.txt").write_text(" ".join(words[20 * i : 20 * i + 20]))
    out = tmp_path_factory.mktemp("tokens") / "bytes"
    tokenize([folder], ByteTokenizer(), out, val_fraction=0.1, workers=1, progress=False)
    return out


@pytest.fixture
def parts(dataset: Path, tmp_path: Path) -> Parts:
    """Makes the arguments of `tasks.pretrain`; the names of all parts' fields are taken together."""
    return partial(make_parts, dataset, tmp_path / "runs")


def make_parts(dataset: Path, runs: Path, **changes: Any) -> dict[str, Any]:
    """What the fixture `parts` makes."""

    def take(**defaults: Any) -> dict[str, Any]:
        return {name: changes.pop(name, value) for name, value in defaults.items()}

    config = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2}
    config |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "attention_backend": "auto"}
    fields = TransformerConfig.__dataclass_fields__.keys() - {"seq_length"}  # that is the data's
    config |= {name: changes.pop(name) for name in list(changes) if name in fields}
    start = take(init_from=None, lora=None, compile=None, activation_checkpointing=None, fp8=None, tiled_mlp=None)
    start |= take(tiled_attention=None, activation_offloading=False, mlp_backend="auto", fp8_all_gather=False)
    optim = changes.pop("optim", AdamW)
    bits = take(state_bits=32, state_offloading=False) if optim is AdamW else {}
    made = {
        "model": LanguageModel(None if start["init_from"] else TransformerConfig(**config), **start),
        "data": PreTrainingDataModule(
            **take(
                paths=dataset,
                seq_length=16,
                micro_batch_size=4,
                global_batch_size=4,
                val_samples=8,
                separate_documents=False,
                allow_changed=False,
            )
        ),
        "optim": optim(**take(lr=1e-2, lr_scheduler=CosineAnnealing(warmup_steps=2)), **bits),
        "log": Log(
            **take(name="run", dir=str(runs)),
            **{name: changes.pop(name) for name in list(changes) if name in Log.__dataclass_fields__},
        ),
        "checkpoint": Checkpoint(
            **take(every_n_steps=4, keep_last=9, keep_best=True, asynchronous=False, every_n_minutes=None)
        ),
        "resume": changes.pop("resume", "auto"),
    }
    settings = take(
        max_steps=12, val_check_interval=4, gradient_clip_val=1.0, log_every_n_steps=1, precision="32-true", devices=1
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    made["trainer"] = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **settings,
        **quiet,
        **changes,
    )
    return made


@pytest.fixture
def pretrain(parts: Parts) -> Callable[..., RunDirectory]:
    """Runs `tasks.pretrain` on `parts(...)`."""
    return lambda **changes: tasks.pretrain(**parts(**changes))


@pytest.fixture(scope="session")
def one(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of one process with the settings of a name, which is made when it is first asked for."""
    from tests.training.layouts import SETTINGS, train

    def run(name: str) -> Path:
        settings = SETTINGS[name]
        return once(tmp_path_factory, f"one-{name}", lambda runs: train("1", dataset, runs, **settings)) / "run"

    return run


class Killed(BaseException):
    """What stands for a process that ends without a word."""


class KillAfter(Callback):
    """Ends the run before the first micro-batch after `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Killed


def rows(run: RunDirectory, *names: str) -> list[tuple[str, ...]]:
    """The text of these columns of metrics.csv, a tuple for each row."""
    with run.metrics.open(newline="") as file:
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


def parameters(run: RunDirectory, step: int) -> dict[str, torch.Tensor]:
    """The parameters in a run's checkpoint."""
    weights = CheckpointWeights.open(run.checkpoints / f"step-{step:08d}")
    return {name: tensor.load() for name, tensor in weights.tensors.items()}


def plan_of(parts: Mapping[str, Any], **how: Any) -> TrainingPlan:
    """What a task works out of its parts before it trains."""
    given = parts["model"], parts["data"], parts["trainer"], parts["optim"]
    begin(*given)
    return plan_training(*given, **how)
