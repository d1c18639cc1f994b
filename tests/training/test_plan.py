"""What a run amounts to, and everything that is wrong with it, before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fiddlehead import tasks
from fiddlehead.data import ByteTokenizer
from fiddlehead.errors import ConfigError
from fiddlehead.training.checkpoint import load_transformer_state
from tests.training.conftest import Parts


def plan(parts: dict[str, Any]) -> tasks.Plan:
    return tasks.plan_pretrain(parts["model"], parts["data"], parts["trainer"], parts["optim"])


def test_the_parts_complete_each_other(parts: Parts) -> None:
    made = parts(micro_batch_size=2, global_batch_size=6, val_check_interval=5)
    found = plan(made)
    vocabulary = ByteTokenizer().vocab_size
    assert (found.config.vocab_size, found.config.seq_length) == (vocabulary, 16)
    assert made["model"].config == found.config
    assert (found.accumulate_grad_batches, made["trainer"].accumulate_grad_batches) == (3, 3)
    assert (found.tokens_per_step, found.max_steps, found.world_size) == (6 * 16, 12, 1)
    assert found.attention.backend == "sdpa"
    assert found.state_gib * 2**30 == 16 * found.parameters


def test_the_parameters_are_those_that_will_be_saved(parts: Parts) -> None:
    made = parts(max_steps=2)
    found = plan(made)
    run = tasks.pretrain(**made)
    config, tensors = load_transformer_state(run.checkpoints / "step-00000002")
    assert sum(tensor.numel() for tensor in tensors.values()) == found.parameters
    assert config == vars(found.config)


def test_a_plan_changes_nothing_the_second_time(parts: Parts) -> None:
    made = parts(micro_batch_size=2, global_batch_size=6, val_check_interval=5)
    first = plan(made)
    interval = made["trainer"].val_check_interval
    assert plan(made) == first
    assert made["trainer"].val_check_interval == interval == 5


def test_validation_is_counted_in_steps_also_when_accumulating(parts: Parts) -> None:
    made = parts(micro_batch_size=2, global_batch_size=6, val_check_interval=5)
    plan(made)
    run = tasks.pretrain(**made)
    text = run.metrics.read_text().splitlines()
    names = text[0].split(",")
    values = [dict(zip(names, line.split(","), strict=True)) for line in text[1:]]
    assert [row["step"] for row in values if row["val_loss"]] == ["5", "10", "12"]


def test_all_problems_are_listed_at_once_and_nothing_is_started(parts: Parts) -> None:
    made = parts(
        max_steps=4,
        vocab_size=7,
        gradient_clip_val=-1.0,
        accumulate_grad_batches=3,
    )
    made["trainer"].val_check_interval = 0.3
    made["model"].config = replace(made["model"].config, seq_length=8)
    with pytest.raises(ConfigError) as error:
        tasks.pretrain(**made)
    assert [problem.split("=")[0] for problem in error.value.problems] == [
        "trainer.accumulate_grad_batches",
        "trainer.val_check_interval",
        "trainer.gradient_clip_val",
        "model.config.vocab_size",
        "model.config.seq_length",
    ]
    assert not Path(made["log"].dir).exists()


def test_a_batch_that_does_not_divide_is_the_data_s_problem(parts: Parts) -> None:
    made = parts()
    made["data"].global_batch_size = 6
    with pytest.raises(ConfigError, match=r"^data\.global_batch_size=6"):
        plan(made)


def test_a_run_without_an_end_is_refused(parts: Parts) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps=-1: must be 1 or more"):
        plan(parts(max_steps=-1))


def test_a_larger_vocabulary_and_a_longer_model_are_the_user_s_choice(parts: Parts) -> None:
    made = parts(vocab_size=300)
    made["model"].config = replace(made["model"].config, seq_length=64)
    found = plan(made)
    assert (found.config.vocab_size, found.config.seq_length) == (300, 64)


def test_rows_are_for_people(parts: Parts) -> None:
    text = dict(plan(parts(micro_batch_size=2)).rows())
    assert "4 heads in 2 groups of 4 channels" in text["model"]
    assert text["a step"] == "64 tokens: 1 devices x 2 sequences x 2 accumulated"
    assert text["the run"].startswith("12 steps, ")
    assert text["attention"] == "sdpa on cpu"
