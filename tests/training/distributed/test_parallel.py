"""Training on many ranks gives the same result as on one."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fiddlehead import tasks
from fiddlehead.checkpoints.folder import read_state, read_tensors
from fiddlehead.checkpoints.weights import open_weights
from fiddlehead.data import FineTuningDataModule
from fiddlehead.errors import ConfigError
from fiddlehead.models import LoRA, Transformer, TransformerConfig
from fiddlehead.models.parallel import Layout, keep_stages
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import LanguageModel, Parallel, PreferenceModel
from fiddlehead.training.distributed.gradients import global_norm, scale
from fiddlehead.training.distributed.sizes import Counted, Sizes
from tests.training.conftest import Killed, make_parts
from tests.training.layouts import SETTINGS, TRAINED, losses, train
from tests.training.ranks import on_ranks

# -- training


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("fsdp-2", "plain"),
        pytest.param("fsdp-4", "plain", marks=pytest.mark.long),
        ("hsdp-2x2", "plain"),
        pytest.param("fsdp-2", "experts", marks=pytest.mark.long),
        ("fsdp-2", "muon"),
        pytest.param("hsdp-2x2", "documents", marks=pytest.mark.long),
        pytest.param("cp-2", "plain", marks=pytest.mark.long),
        ("fsdp-2-cp-2", "documents"),
        ("ring-2", "documents"),
        *(
            pytest.param(layout, settings, marks=pytest.mark.long)
            for layout, settings in (("fsdp-2-ring-2", "experts"), ("pp-2-ring-2", "documents"))
        ),
        ("tp-2", "plain"),
        pytest.param("fsdp-2-tp-2", "documents", marks=pytest.mark.long),
        pytest.param("cp-2-tp-2", "documents", marks=pytest.mark.long),
        pytest.param("tp-4", "experts", marks=pytest.mark.long),
        ("ep-2", "experts"),
        pytest.param("fsdp-2-ep-2", "experts", marks=pytest.mark.long),
        pytest.param("hsdp-2x2-ep-2", "experts", marks=pytest.mark.long),
        pytest.param("ep-2-tp-2", "experts", marks=pytest.mark.long),
        pytest.param("pp-2", "documents", marks=pytest.mark.long),
        pytest.param("pp-2-twice", "deep", marks=pytest.mark.long),
        ("pp-2", "mixture"),
        ("pp-2-zbv", "odd"),
        *(
            pytest.param(layout, settings, marks=pytest.mark.long)
            for layout, settings in (
                ("pp-2", "odd"),
                ("pp-2-zero", "odd"),
                ("pp-2-twice-zero", "odd"),
                ("pp-2-dual", "odd"),
                ("pp-4-zero", "odd"),
                ("pp-2-zbv-fsdp-2", "odd"),
                ("pp-2-dual-cp-2", "odd"),
                ("pp-2-zbv", "odd mixture"),
            )
        ),
        ("pp-2-tp-2", "tied"),
        pytest.param("pp-2-fsdp-2", "documents", marks=pytest.mark.long),
        *(
            pytest.param(layout, settings, marks=pytest.mark.long)
            for layout, settings in (
                ("ep-2-cp-2", "experts"),
                ("hsdp-2x2-tp-2", "documents"),
                ("hsdp-2x2-cp-2", "documents"),
                ("pp-4", "deep"),
                ("pp-2-twice-fsdp-2", "deep"),
                ("pp-2-tp-2", "documents"),
                ("pp-2-cp-2", "documents"),
                ("pp-2-ep-2", "experts"),
                ("tp-4", "tied"),
            )
        ),
    ],
)
def test_the_losses_are_those_of_one_process(
    dataset: Path, one: Callable[[str], Path], tmp_path: Path, layout: str, settings: str
) -> None:
    run = train(layout, dataset, tmp_path, **SETTINGS[settings])
    assert losses(run).shape == (8, 3)
    torch.testing.assert_close(losses(run), losses(one(settings)), rtol=1e-5, atol=0)
    for kind in ("model", "optimizer"):
        expected, found = (tensors_of(folder, kind) for folder in (one(settings), run))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            difference = (found[name].load() - tensor.load()).norm()
            assert difference <= 1e-2 * tensor.load().norm(), name


@pytest.mark.parametrize(("layout", "settings"), [("1", "documents"), ("fsdp-2", "plain")])
def test_tiles_of_heads_change_nothing(
    dataset: Path, one: Callable[[str], Path], tmp_path: Path, layout: str, settings: str
) -> None:
    how: dict[str, Any] = {"activation_checkpointing": "full", "tiled_mlp": 5, "tiled_attention": 1}
    run = train(layout, dataset, tmp_path, **SETTINGS[settings] | how)
    torch.testing.assert_close(losses(run), losses(one(settings)), rtol=1e-5, atol=0)


def tensors_of(run: Path, kind: str) -> dict[str, Any]:
    """The tensors in a run's last checkpoint."""
    folder = RunDirectory(run).checkpoints / "step-00000006"
    return read_tensors(folder, read_state(folder), kind)


def test_one_device_is_trained_on_as_without_a_strategy(
    dataset: Path, tmp_path: Path, one: Callable[[str], Path]
) -> None:
    tasks.pretrain(**make_parts(dataset, tmp_path, strategy=Parallel(), **TRAINED))
    assert torch.equal(losses(tmp_path / "run"), losses(one("plain")))


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": "full", "tiled_mlp": 5},
        pytest.param({"activation_checkpointing": "selective"}, marks=pytest.mark.long),
        pytest.param({"activation_checkpointing": "full"}, marks=pytest.mark.long),
        pytest.param({"compile": "layers"}, marks=pytest.mark.long),
        pytest.param({"compile": "layers", "activation_checkpointing": "full", "tiled_mlp": 5}, marks=pytest.mark.slow),
    ],
    ids=["tiled and recomputed", "partly recomputed", "recomputed", "compiled", "compiled, tiled and recomputed"],
)
@pytest.mark.parametrize("layout", ["fsdp-2", pytest.param("ring-2", marks=[pytest.mark.slow, pytest.mark.long])])
def test_what_makes_a_step_faster_or_smaller_changes_nothing(
    dataset: Path, one: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], layout: str
) -> None:
    run = train(layout, dataset, tmp_path, **changes)
    torch.testing.assert_close(losses(run), losses(one("plain")), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("precision", "stored"), [pytest.param("bf16-mixed", "F32", marks=pytest.mark.long), ("bf16-true", "BF16")]
)
def test_bfloat16_is_close_to_one_process_s(dataset: Path, tmp_path: Path, precision: str, stored: str) -> None:
    runs = [train(layout, dataset, tmp_path / layout, precision=precision) for layout in ("1", "hsdp-2x2")]
    torch.testing.assert_close(losses(runs[1])[:, 0], losses(runs[0])[:, 0], rtol=1e-2, atol=0)
    weights = open_weights(runs[1])
    assert {weights.dtype("layers.0.mlp.linear_fc1.weight")} == {stored}


class Start(Callback):
    """Keeps what a run begins with, and ends it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = {name: tensor.detach() for name, tensor in pl_module.named_parameters()}
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        self.parameters = {name: tensor.float().numpy() for name, tensor in whole.items()}
        self.elements = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in tensors.values())
        raise Killed


def start(dataset: Path, runs: Path, **changes: Any) -> tuple[dict[str, Any], int]:
    """What a run begins with, and how many elements of it this rank holds."""
    kept = Start()
    if changes.get("devices", 1) > 1:
        changes["strategy"] = Parallel()
    with pytest.raises(Killed):
        tasks.pretrain(**make_parts(dataset, runs, callbacks=[kept], **changes))
    return kept.parameters, kept.elements


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"precision": "bf16-true"}, marks=pytest.mark.long),
        {"num_moe_experts": 4, "add_bias_linear": True, "attention_sinks": True, "normalization": "LayerNorm"},
        pytest.param(
            {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"layernorm_zero_centered_gamma": True, "norm_placement": "both", "qk_layernorm": "head"},
            marks=pytest.mark.long,
        ),
        {"init_from": "plain"},
        pytest.param({"init_from": "plain", "lora": LoRA(rank=2, dora=True)}, marks=pytest.mark.long),
        {"init_from": "plain", "lora": LoRA(rank=2), "precision": "bf16-true"},
        {"init_from": "plain", "lora": LoRA(rank=2, dora=True, quantize_base="nf4")},
    ],
    ids=["plain", "bf16-true", "experts", "learned-tied", "zero-centered", "weights", "dora", "lora-bf16", "nf4"],
)
def test_ranks_begin_with_parts_of_what_one_process_begins_with(
    dataset: Path, one: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "init_from" in changes:
        changes = changes | {"init_from": one(changes["init_from"])}
    whole, elements = start(dataset, tmp_path / "one", **changes)
    of_ranks = on_ranks(2, start, dataset, tmp_path / "many", devices=2, global_batch_size=8, **changes)
    for parts, _ in of_ranks:
        assert parts.keys() == whole.keys()
        assert all(np.array_equal(parts[name], whole[name], equal_nan=True) for name in whole)  # bits may look like NaN
    held = [count for _, count in of_ranks]
    assert sum(held) == elements and min(held) > 0.4 * elements


def tune(base: Path, runs: Path, examples: Path, lora: LoRA | None, devices: int = 1, **split: Any) -> str:
    """Learns preferences, or answers, on the ranks that call this; what it prints."""
    preference = examples.stem == "pairs"
    model = (PreferenceModel if preference else LanguageModel)(init_from=base, lora=lora)
    made = make_parts(
        base, runs, max_steps=8, devices=devices, **({"strategy": Parallel(**split)} if devices > 1 else {})
    )
    data = FineTuningDataModule(
        examples, seq_length=16, micro_batch_size=2, global_batch_size=4, val_samples=8, preference=preference
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        tasks.finetune(**made | {"model": model, "data": data})
    return out.getvalue()


RING = {"context_parallel": 2, "context_parallel_method": "ring"}
QLORA = LoRA(rank=2, quantize_base="nf4")


@pytest.mark.parametrize(
    ("name", "lora", "split"),
    [
        ("pairs", None, {}),
        pytest.param("pairs", LoRA(rank=2), {}, marks=pytest.mark.long),
        pytest.param("answers", None, {}, marks=pytest.mark.long),
        # A large alpha would amplify the rounding of sums with each step of AdamW.
        ("answers", LoRA(rank=2, alpha=2), {}),
        ("answers", QLORA, {}),
        pytest.param("pairs", None, {"context_parallel": 2}, marks=pytest.mark.long),
        pytest.param("pairs", None, RING, marks=pytest.mark.long),
        pytest.param("answers", LoRA(rank=2, alpha=2), RING, marks=pytest.mark.long),
        ("pairs", LoRA(rank=2), {"tensor_parallel": 2}),
        pytest.param("pairs", None, {"tensor_parallel": 2}, marks=pytest.mark.long),
    ],
    ids=[
        "pairs",
        "pairs-lora",
        "answers",
        "answers-lora",
        "answers-qlora",
        "pairs-cp",
        "pairs-ring",
        "answers-ring",
        "pairs-lora-tp",
        "pairs-tp",
    ],
)
def test_ranks_learn_answers_and_preferences_as_one_process_does(
    one: Callable[[str], Path], tmp_path: Path, name: str, lora: LoRA | None, split: dict[str, Any]
) -> None:
    examples = tmp_path / f"{name}.jsonl"
    words = ["fern", "moss", "leaf", "spore", "frond"]
    pairs = [{"prompt": a, "chosen": b, "rejected": a} for a in words for b in words * 2]
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    examples.write_text("".join(json.dumps(line) + "\n" for line in (pairs if name == "pairs" else answers)))
    alone = tune(one("plain"), tmp_path / "one", examples, lora)
    printed, silence = on_ranks(2, tune, one("plain"), tmp_path / "many", examples, lora, devices=2, **split)
    found, expected = losses(tmp_path / "many" / "run"), losses(tmp_path / "one" / "run")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    asked = [line for line in alone.splitlines() if "it answers" in line]
    # Ranks that share a sequence cannot answer.
    assert [line for line in printed.splitlines() if "it answers" in line] == ([] if split else asked)
    assert len(asked) == 2 and not silence


@pytest.mark.parametrize(
    ("layout", "lora", "dropout"),
    [("pp-2-tp-2", LoRA(rank=2, alpha=2, dora=True, dropout=0.1), 0.1), ("pp-2-zero", LoRA(rank=2, alpha=2), 0.0)],
    ids=["pp-2-tp-2", "pp-2-zero"],
)
def test_adapters_on_split_layers_and_stages_learn_what_they_learn_on_one_process(
    dataset: Path, one: Callable[[str], Path], tmp_path: Path, layout: str, lora: LoRA, dropout: float
) -> None:
    changes = {"init_from": one("plain"), "lora": lora, "hidden_dropout": dropout, "micro_batch_size": 4}
    alone = train("1", dataset, tmp_path / "alone", **changes)
    train("1", dataset, tmp_path, killed_after=5, **changes)
    run = train(layout, dataset, tmp_path, **changes)  # goes on from a checkpoint of one process
    torch.testing.assert_close(losses(run), losses(alone), rtol=1e-5, atol=0)
    for kind in ("model", "optimizer"):
        expected, found = (tensors_of(folder, kind) for folder in (alone, run))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].load(), tensor.load(), rtol=1e-3, atol=1e-6)


def norms(seed: int) -> tuple[float, float, float]:
    """The norm of gradients that are cut in different ways: as found, as it is, and as found once they are halved."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 6), (5, 3), (3, 7), (1, 4), (6,)]
    whole = [torch.randn(shape, generator=generator) for shape in shapes]
    cuts: list[Any] = [(mesh, (Shard(0), Shard(1))), (mesh, (Replicate(), Shard(0))), (mesh["b"], (Shard(1),))]
    cuts += [(mesh, (Shard(0), Replicate())), None]
    gradients = {
        str(number): tensor if cut is None else distribute_tensor(tensor, *cut)
        for number, (tensor, cut) in enumerate(zip(whole, cuts, strict=True))
    }
    layout = Layout(TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, vocab_size=9), mesh)
    expected = float(torch.cat([tensor.flatten() for tensor in whole]).double().norm())
    found = float(global_norm(gradients, layout))
    scale(gradients, torch.tensor(0.5))
    return found, expected, float(global_norm(gradients, layout))


def test_the_norm_is_that_of_all_gradients_however_they_are_cut() -> None:
    for found, expected, halved in on_ranks(4, norms, 3):
        assert found == pytest.approx(expected, rel=1e-6)
        assert halved == pytest.approx(expected / 2, rel=1e-6)


# -- sizes


@pytest.mark.parametrize(
    ("strategy", "devices", "sizes"),
    [
        ({}, 1, (1, 1, 1, 1, 1, 1)),
        ({}, 8, (1, 1, 8, 1, 1, 1)),
        ({"data_parallel": 8}, 8, (1, 1, 8, 1, 1, 1)),
        ({"data_parallel_replicate": 2}, 8, (1, 2, 4, 1, 1, 1)),
        ({"expert_parallel": 2, "tensor_parallel": 2}, 8, (1, 1, 2, 2, 1, 2)),
        ({"pipeline_parallel": 2, "tensor_parallel": 2}, 8, (2, 1, 2, 1, 1, 2)),
    ],
)
def test_the_data_parallel_ranks_are_what_the_devices_allow(
    strategy: dict[str, int], devices: int, sizes: tuple[int, ...]
) -> None:
    assert Parallel(**strategy).sizes(devices).mesh == sizes


@pytest.mark.parametrize("tied", [False, True])
def test_the_parameters_of_the_rank_with_most_are_counted(tied: bool) -> None:
    shape = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 101}
    config = TransformerConfig(**shape, share_embeddings_and_output_weights=tied)

    def adapted() -> Transformer:
        with torch.device("meta"):
            transformer = Transformer(config)
            LoRA(rank=2, target_modules=["layers.2.*"]).apply(transformer)
        return transformer

    for trained in (False, True):
        of_ranks = []
        for rank in range(2):
            transformer = adapted()
            keep_stages(transformer, [rank, rank + 2], 4)
            held = [p.numel() for p in transformer.parameters() if p.requires_grad or not trained]
            of_ranks.append(sum(held))
        sizes = Sizes(data=1, replicate=1, pipeline=2, stages=4)
        assert sizes.held(Counted.of(adapted(), trained=trained)) == max(of_ranks)


def test_ranks_that_share_a_layer_or_a_sequence_train_on_the_same_samples() -> None:
    sizes = Sizes(data=4, replicate=2, expert=2, context=2, tensor=2, pipeline=2)
    mesh = torch.arange(32).view(sizes.mesh)
    assert [sizes.data_rank(rank) for rank in range(32)] == [rank // 4 for rank in range(16)] * 2
    assert {sizes.data_rank(int(rank)) for rank in mesh[:, 1, 0, 0].flatten()} == {2}


def test_answers_are_not_compared_in_a_pipeline() -> None:
    (problem,) = PreferenceModel(init_from="some").problems("32-true", Sizes(data=1, replicate=1, pipeline=2))
    assert problem.startswith("trainer.strategy.pipeline_parallel=2: the reference would need stages of its own")


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel=3: does not divide the 8 devices; allowed products: 1, 2, 4, 8"),
        (
            {"data_parallel": 4},
            "data_parallel=4: 8 devices with tensor_parallel=1, .* make it 8; allowed: 8, None",
        ),
        ({"data_parallel_replicate": 3}, "data_parallel_replicate=3: does not divide the 8 .*; allowed: 1, 2, 4, 8"),
        (
            {"data_parallel_replicate": 2, "expert_parallel": 8},
            "expert_parallel=8: does not .* 4 .* copy; allowed: 1, 2, 4",
        ),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(strategy: dict[str, int], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Parallel(**strategy).sizes(8)
    with pytest.raises(ConfigError, match="data_parallel=0: must be a whole number of 1 or more"):
        Parallel(data_parallel=0)


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16() -> None:
    torch.manual_seed(0)
    gradients = {str(n): torch.randn(50, n + 1).bfloat16() for n in range(4)}
    exact = torch.cat([gradient.double().flatten() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(global_norm(gradients).double(), exact, rtol=1e-6, atol=0)
