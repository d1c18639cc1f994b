"""The summary of a plan: its sections, and what is said of data that is here, elsewhere, or not there yet."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fiddlehead.cli.common import add_row, table
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.data.batches import Windows
from fiddlehead.data.random_tokens import RandomTokens
from fiddlehead.data.token_file import TokenFile
from fiddlehead.errors import ConfigError
from fiddlehead.launch import plan
from fiddlehead.plan.cards import Card
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes import llama
from fiddlehead.training import AdamW, CosineAnnealing, Muon
from tests.data.test_records import COMPLETION, lines
from tests.training.conftest import Parts, plan_of

SECTIONS = ["data", "model", "step", "optimizer", "memory", "speed", "attention", "feed-forward", "resume", "where"]


def text_of(found: Any, section: str) -> str:
    return "\n".join(found.sections()[section])


def test_the_sections_are_in_one_order_and_no_word_is_broken_at_80_columns() -> None:
    recipe = llama.llama31_405b()
    rows = plan(recipe, target="h100").rows(name="llama31_405b", usd_per_gpu_hour=2.5)
    assert [name for name, _ in rows if name] == SECTIONS
    made = table("llama31_405b", "on h100")
    for row in rows:
        add_row(made, *row)
    console = Console(file=io.StringIO(), width=80)
    console.print(made)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    assert {word for _, text in rows for word in text.split() if "/" not in word} <= set(shown.split())
    assert "406 B parameters" in shown and "1.42 T tokens" in shown and "0 to 8e-5 in 2,000 steps" in shown
    assert "waiting for InfiniBand" in shown and " USD at 2.5 USD a GPU-hour" in shown and " kWh" in shown


def test_a_tokenized_folder_is_counted(parts: Parts, dataset: Path) -> None:
    made = parts(max_steps=1000, val_check_interval=250)
    found = plan_of(made).data
    windows = len(Windows([TokenFile(dataset, "train")], 16))
    assert found.tokens == len(TokenFile(dataset, "train"))
    assert found.epochs == pytest.approx(1000 * 4 / windows) and found.val_samples == 8
    said = "\n".join(found.lines())
    assert f"{dataset}: " in said and "257 tokens; the model has rows for 257" in said
    assert "validation: 8 sequences, 128 tokens, every 250 steps and at the end" in said
    json.dumps(found.to_dict())
    assert found.to_dict()["epochs"] == found.epochs and not found.unknown
    assert plan_of(parts(val_samples=0)).data.lines()[-1] == "no validation"


def test_data_that_is_elsewhere_is_named_and_all_else_is_planned(parts: Parts, tmp_path: Path) -> None:
    made = parts(vocab_size=300)
    made["data"] = PreTrainingDataModule(tmp_path / "away", seq_length=16, micro_batch_size=4, global_batch_size=4)
    found = plan_of(made)
    assert found.parameters > 0 and found.missing[0].startswith("data.paths=")
    said = text_of(found, "data")
    assert f"{tmp_path / 'away'}" in said and "no such folder" in said
    assert "not known before: its tokens, the tokenizer, its vocabulary, the epochs" in said
    assert found.to_dict()["data"]["epochs"] is None
    made["model"].config = replace(made["model"].config, vocab_size=None)
    with pytest.raises(ConfigError, match="no such folder"):  # without its vocabulary nothing is known
        plan_of(made)


def test_a_dry_run_refuses_data_that_is_named_and_not_here(working_directory: Path) -> None:
    recipe = apply_overrides(llama.llama32_1b(), ["data.paths=away", "trainer.accelerator=cpu", "trainer.devices=1"])
    made = plan(recipe)
    assert made.missing == made.training.missing and not made.problems
    with pytest.raises(ConfigError, match=r"^data\.paths='away': is not a dataset: there is no such folder"):
        made.dry_run()
    plan(apply_overrides(recipe, ["data.paths=None"])).dry_run()


@pytest.mark.parametrize("packed", [True, False])
def test_examples_are_counted_by_path(parts: Parts, pretrain: Any, tmp_path: Path, packed: bool) -> None:
    made = parts(init_from=pretrain(max_steps=4).path, max_steps=20)
    first, second = lines(tmp_path / "a.jsonl", *[COMPLETION] * 30), lines(tmp_path / "ab.jsonl", *[COMPLETION] * 10)
    made["data"] = FineTuningDataModule([first, second], val_fraction=0.1, seq_length=16, packed=packed)
    found = plan_of(made).data
    assert [each.examples for each in found.known.train] == [27, 9] and found.examples == 36
    assert (found.epochs, found.least_epochs) == (None if packed else 20 * 8 / 36, 20 * 8 / 36)
    said = "\n".join(found.lines())
    assert f"{first}: 27 examples" in said and ("packed into rows" in said) == packed
    assert "of 4 examples" in said
    made["data"] = FineTuningDataModule(tmp_path / "away.jsonl", seq_length=16)
    away = plan_of(made)
    assert "no such file or folder" in away.missing[0] and "not known before: its tokens" in text_of(away, "data")


def test_random_tokens_have_nothing_to_know(parts: Parts) -> None:
    made = parts()
    made["data"] = RandomTokens(257, seq_length=16, micro_batch_size=4, global_batch_size=4)
    assert plan_of(made).data.lines()[0] == "random tokens" and not plan_of(made).data.unknown


def test_the_optimizer_is_said_with_what_differs_from_its_defaults(parts: Parts) -> None:
    made = parts(gradient_clip_val=None)
    made["optim"] = AdamW(lr=3e-4, betas=(0.9, 0.98), state_bits=8, weight_decay=0.0)
    found = plan_of(made)
    first, rate = found.sections()["optimizer"]
    assert first.endswith(", no weight decay, betas 0.9 and 0.98, state_bits 8, gradients not clipped")
    assert rate == "learning rate 3e-4, cosine to 0 at 12"
    made["optim"] = Muon(lr=1e-2, adamw_lr=3e-3, lr_scheduler=CosineAnnealing(warmup_steps=2))
    said = text_of(plan_of(made), "optimizer")
    assert "Muon, weight decay 0.1, adamw_lr 3e-3" in said and "betas" not in said
    assert plan_of(made).to_dict()["optimizer"]["settings"] == {"adamw_lr": 3e-3}


def test_the_parts_of_the_memory_add_up_to_what_is_said_to_be_needed(parts: Parts) -> None:
    found = plan_of(parts(compile="layers", precision="bf16-mixed"), target=Card.parse("h100"))
    assert found.memory is not None
    assert sum(found.memory.parts().values()) == found.memory.peak
    said = found.sections()["memory"]
    needed = (1.03 * found.memory.peak + found.memory.outside) / 2**30
    assert f"the run needs {needed:.1f} GiB at its peak, in {found.memory.where}" in said[0]
    of_parts = [float(line.split()[0]) for line in said if line.split()[1] == "GiB" and " for " not in line]
    assert sum(of_parts) == pytest.approx(needed, abs=0.05)
    assert any("workspace" in line for line in said) and any("CUDA context" in line for line in said)
    assert found.speed is not None and found.sections()["speed"][0].endswith(f"MFU {found.speed.mfu:.1%}")
    measured = replace(found, speed=replace(found.speed, calibrated=True))
    assert "by what `fiddlehead bench --calibrate` measured" in measured.sections()["speed"]


def test_what_is_not_worked_out_is_said(parts: Parts) -> None:
    assert "not worked out on a CPU" in text_of(plan_of(parts()), "memory")
    on_any = plan_of(parts(precision="bf16-mixed"), target=None)
    assert "the GPU is not" in text_of(on_any, "speed")
    assert "in float32" in text_of(plan_of(parts(), target=Card.parse("h100")), "speed")


def test_a_run_that_goes_on_says_from_where_and_how_far_it_is(pretrain: Any, parts: Parts) -> None:
    run = pretrain(max_steps=4)
    recipe = llama.llama32_1b()
    recipe.log.dir, recipe.resume = str(run.path.parent / "other"), str(run.checkpoints / "step-00000004")
    made = plan(recipe, target="h100")
    rows = [text for _, text in made.rows()]
    assert f"from {run.checkpoints / 'step-00000004'}" in rows and made.to_dict()["resume"]["step"] == 4
    steps = made.training.max_steps
    assert any(text.startswith(f"step 4 of {steps:,}: {steps - 4:,} steps are left, ") for text in rows)
    recipe.resume = "auto"
    assert ("resume", "anew, from step 0") in plan(recipe, target="h100").rows()
    where = dict(plan(recipe, target="h100").rows(name="big"))["where"]
    assert where == f"{run.path.parent / 'other' / 'big-DATE-TIME'}, in this process"
