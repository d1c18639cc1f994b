"""Runs that need the weights they began with again: adapters, and preferences, whose reference they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
import torch
from safetensors.torch import load_file, save_file

from fiddlehead import tasks
from fiddlehead.checkpoints import fingerprint
from fiddlehead.checkpoints.folder import read_state, write_state
from fiddlehead.checkpoints.huggingface.convert import export_adapters, export_checkpoint, import_checkpoint
from fiddlehead.checkpoints.weights import find_weights, open_weights
from fiddlehead.data import FineTuningDataModule
from fiddlehead.errors import ConfigError
from fiddlehead.launch import launch, plan
from fiddlehead.models import LoRA
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.team import TeamError
from fiddlehead.training import LanguageModel, Parallel, PreferenceModel
from tests.training.conftest import KillAfter, Killed, Parts, make_parts, rows
from tests.training.ranks import on_ranks

SAID = "no longer has the weights with which the training began; put those back, or start a new run"


@pytest.fixture(scope="module")
def exported(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    run = tasks.pretrain(**make_parts(dataset, folder, name="base"))
    export_checkpoint(run.path, folder / "hf", shard_bytes=2000, progress=False)
    return folder / "hf"


@pytest.fixture
def base(exported: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder of several files."""
    folder = shutil.copytree(exported, tmp_path / "weights")
    assert len([*folder.glob("*.safetensors")]) > 3
    return folder


def scale(folder: Path, by: float = 1.1, only: str = "") -> None:
    """Overwrites the weights, or those whose name has `only` in it, with larger ones."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: x * by if only in name else x for name, x in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})


def given(parts: Parts, base: Path, lora: LoRA | None = LoRA(rank=2), **changes: Any) -> dict[str, Any]:  # noqa: B008
    return parts(**({"name": "tuned"} | changes)) | {"model": LanguageModel(init_from=base, lora=lora)}


def cut(parts: Parts, base: Path, lora: LoRA | None = LoRA(rank=2)) -> RunDirectory:  # noqa: B008
    made = given(parts, base, lora, callbacks=[KillAfter(6)])
    with pytest.raises(Killed):
        tasks.pretrain(**made)
    return RunDirectory(Path(made["log"].dir) / "tuned")


def forget_base(checkpoint: Path) -> None:
    """Makes a checkpoint one of an earlier version."""
    state = read_state(checkpoint)
    files = state.pop("files")
    assert state.pop("base")
    (checkpoint / "state.json").unlink()
    write_state(checkpoint, state, files)


@pytest.mark.parametrize("lora", [LoRA(rank=2), LoRA(rank=2, dora=True), LoRA(rank=2, quantize_base="nf4")])
def test_adapters_of_weights_that_were_overwritten_are_refused_wherever_they_are_used(
    parts: Parts, base: Path, lora: LoRA, tmp_path: Path
) -> None:
    run = cut(parts, base, lora)
    open_weights(run.path)
    scale(base)
    for use in (
        lambda: tasks.pretrain(**given(parts, base, lora)),
        lambda: tasks.pretrain(**given(parts, base, lora, name="other", resume=run.checkpoints / "step-00000004")),
        lambda: tasks.pretrain(**given(parts, run.path, lora, name="from_it")),
        lambda: open_weights(run.path),
        lambda: export_checkpoint(run.path, tmp_path / "out", progress=False),
        lambda: export_adapters(run.path, tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=SAID) as error:
            use()
        assert str(base) in str(error.value) and str(run.checkpoints / "step-00000004") in str(error.value)
    assert not (tmp_path / "out").exists() and not (run.path.parent / "other").exists()


def test_adapters_from_before_bases_were_compared_are_still_used(parts: Parts, base: Path) -> None:
    run = cut(parts, base)
    forget_base(find_weights(run.path))
    scale(base)
    open_weights(run.path)
    tasks.pretrain(**given(parts, base))
    scale(base)
    with pytest.raises(ConfigError, match=SAID):
        open_weights(run.path)


def test_a_base_may_be_moved_and_copied(parts: Parts, base: Path, tmp_path: Path) -> None:
    whole = tasks.pretrain(**given(parts, base, name="whole"))
    run = cut(parts, base)
    shutil.copytree(base, tmp_path / "copy")
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match=r"has only adapters: .*unknown run"):
        open_weights(run.path)
    shutil.copytree(tmp_path / "copy", base, copy_function=shutil.copyfile)  # with other times and inodes
    open_weights(run.path)
    shutil.rmtree(base)
    tasks.pretrain(**given(parts, tmp_path / "copy"))
    assert rows(run, "step", "loss", "grad_norm") == rows(whole, "step", "loss", "grad_norm")
    assert read_state(find_weights(run.path))["init_from"] == str(tmp_path / "copy")
    open_weights(run.path)


def test_a_run_goes_on_where_its_base_was_if_other_weights_are_named(parts: Parts, base: Path, tmp_path: Path) -> None:
    run = cut(parts, base)
    scale(shutil.copytree(base, tmp_path / "other"))
    tasks.pretrain(**given(parts, tmp_path / "other"))
    assert read_state(find_weights(run.path))["init_from"] == str(base)


def test_a_base_of_ours_is_compared_by_its_checksums_also_below_other_adapters(
    parts: Parts, base: Path, tmp_path: Path
) -> None:
    import_checkpoint(str(base), tmp_path / "ours", progress=False)
    first = tasks.pretrain(**given(parts, tmp_path / "ours", name="first", max_steps=2))
    second = tasks.pretrain(**given(parts, find_weights(first.path), name="second", max_steps=2))
    open_weights(second.path)
    forget_base(find_weights(first.path))  # so that only the second one can tell
    open_weights(second.path)
    shutil.rmtree(tmp_path / "ours")
    scale(base, only="layers.1.input_layernorm")
    import_checkpoint(str(base), tmp_path / "ours", progress=False)
    open_weights(first.path)
    with pytest.raises(ConfigError, match=SAID):
        open_weights(second.path)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_preferences_need_the_same_reference(parts: Parts, base: Path, lora: LoRA | None, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(20 * (json.dumps({"prompt": "a:", "chosen": "b", "rejected": "c"}) + "\n"))
    data = {"seq_length": 16, "micro_batch_size": 4, "global_batch_size": 4, "val_samples": 4, "preference": True}

    def made(**changes: Any) -> dict[str, Any]:
        model = PreferenceModel(init_from=base, lora=lora)
        return parts(name="tuned", **changes) | {"model": model, "data": FineTuningDataModule(pairs, **data)}

    with pytest.raises(Killed):
        tasks.finetune(**made(callbacks=[KillAfter(6)]))
    run = RunDirectory(tmp_path / "runs" / "tuned")
    scale(base)
    with pytest.raises(ConfigError, match=SAID):
        tasks.finetune(**made())
    if lora is None:  # the model itself is whole
        open_weights(run.path)


def test_a_run_that_has_all_its_weights_needs_its_base_no_more(parts: Parts, base: Path) -> None:
    run = cut(parts, base, None)
    scale(base)
    open_weights(run.path)
    assert tasks.pretrain(**given(parts, base, None)).path == run.path
    assert "base" not in read_state(find_weights(run.path))


def test_a_fingerprint_is_of_every_tensor_and_of_nothing_else(base: Path, tmp_path: Path) -> None:
    before = open_weights(base).fingerprint()
    whole = {name: x for file in base.glob("*.safetensors") for name, x in load_file(file).items()}
    one = tmp_path / "one file"
    one.mkdir()
    shutil.copyfile(base / "config.json", one / "config.json")

    def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, one / "model.safetensors", {"format": "pt"})
        return open_weights(one).fingerprint()

    assert fingerprint(whole) == before
    found = {fingerprint(whole | {name: x * 1.1}) for name, x in whole.items()}
    found |= {fingerprint({name: x.bfloat16() for name, x in whole.items()})}
    assert len(found | {before}) == len(whole) + 2


@pytest.mark.parametrize("at", [0, 0.35, 0.7, 1])
def test_a_large_tensor_is_sampled_from_its_start_to_its_end(
    base: Path, at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fiddlehead.checkpoints.fingerprint._WHOLE", 64)
    monkeypatch.setattr("fiddlehead.checkpoints.fingerprint._SAMPLE", 16)
    before = open_weights(base).fingerprint()
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        for x in tensors.values():
            flat, width = x.view(-1), max(1, x.numel() // 3)  # a third of it
            start = int(at * (flat.numel() - width))
            flat[start : start + width] += 1
        save_file(tensors, file, {"format": "pt"})
    assert open_weights(base).fingerprint() != before


def reads(dataset: Path, runs: Path, base: Path, devices: int) -> tuple[int, str]:
    """How often a rank that calls this reads samples of the base while it trains two more steps, and what it raises."""
    read, said = 0, ""
    original: Callable[..., str] = fingerprint.of_tensors

    def counted(tensors: Any) -> str:
        nonlocal read
        read += 1
        return original(tensors)

    split: dict[str, Any] = {"strategy": Parallel()} if devices > 1 else {}
    made = given(partial(make_parts, dataset, runs), base, max_steps=2, devices=devices, global_batch_size=8, **split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "of_tensors", counted)
        try:
            tasks.pretrain(**made)
        except (ConfigError, TeamError) as error:
            said = str(error)
    return read, said


def test_one_rank_reads_the_base_and_all_refuse_another(dataset: Path, base: Path, tmp_path: Path) -> None:
    assert reads(dataset, tmp_path / "alone", base, 1) == (1, "")
    of_ranks = partial(on_ranks, 2, reads, dataset, tmp_path / "two", base, 2)
    assert of_ranks() == [(1, ""), (0, "")]
    scale(base)
    (first, said), (other, also) = of_ranks()
    assert first and not other
    assert SAID in said and SAID in also


def test_a_plan_refuses_another_base(dataset: Path, base: Path, tmp_path: Path) -> None:
    recipe = apply_overrides(
        tiny_test(),
        [
            *("model.config=None", f"model.init_from={base}", "trainer.max_steps=2"),
            *(f"data.paths={dataset}", "data.corpus=None", "data.tokenizer=None", "data.seq_length=16"),
            *("log.name=planned", f"log.dir={tmp_path}", "trainer.devices=1"),
        ],
    )
    recipe.model.lora = fdl.Config(LoRA, rank=2)
    launch(recipe)
    assert not plan(recipe).problems
    scale(base)
    (problem,) = plan(recipe).problems
    assert problem.startswith(f"model.init_from={str(base)!r}: {SAID}")
