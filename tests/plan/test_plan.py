"""The sizes of a run and all its problems, before it starts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from fiddlehead import tasks
from fiddlehead.attention import BACKENDS
from fiddlehead.checkpoints.folder import step_folder
from fiddlehead.checkpoints.weights import open_weights
from fiddlehead.data import ByteTokenizer, PreTrainingDataModule, TokenizerFile
from fiddlehead.data.token_writer import TokenDatasetWriter, encode_documents
from fiddlehead.errors import ConfigError
from fiddlehead.models import LoRA
from fiddlehead.plan.attention import on_longest, ranges
from fiddlehead.training import Parallel
from tests.data.small_tokenizers import save_gemma
from tests.training.conftest import Parts, parameters, plan_of


def test_the_parts_complete_each_other(parts: Parts) -> None:
    made = parts(micro_batch_size=2, global_batch_size=6, val_check_interval=5)
    found = plan_of(made)
    vocabulary = ByteTokenizer().vocab_size
    assert (made["model"].config.vocab_size, made["trainer"].accumulate_grad_batches) == (None, 1)  # not by planning
    found.apply(made["model"], made["data"], made["trainer"])
    assert (found.config.vocab_size, found.config.seq_length) == (vocabulary, 16)
    assert made["model"].config == found.config
    assert (found.accumulate_grad_batches, made["trainer"].accumulate_grad_batches) == (3, 3)
    assert (found.tokens_per_step, found.max_steps, found.world_size) == (6 * 16, 12, 1)
    assert [(served.during, served.layers, served.choice.backend) for served in found.attention] == [
        ("training", (0, 1), "sdpa_flash"),
        ("validation", (0, 1), "sdpa_flash"),
    ]
    assert found.state_gib * 2**30 == 16 * found.parameters


def test_the_ranks_share_what_the_strategy_says(parts: Parts) -> None:
    settings: dict[str, Any] = {"devices": 4, "micro_batch_size": 2, "global_batch_size": 16}
    shared = plan_of(parts(strategy=Parallel(data_parallel_replicate=2), **settings))
    copies = plan_of(parts(strategy="ddp", **settings))
    split = plan_of(parts(strategy=Parallel(tensor_parallel=2), **settings))
    assert (shared.world_size, shared.data_parallel, shared.accumulate_grad_batches) == (4, 4, 2)
    assert (copies.data_parallel, copies.accumulate_grad_batches) == (4, 2)
    assert shared.device_gib == pytest.approx(shared.state_gib / 2) and copies.device_gib == copies.state_gib
    # What the layers' products do not multiply with is cut over the data-parallel ranks only.
    assert split.state_gib / 4 < split.device_gib < split.state_gib / 2
    assert dict(shared.rows())["memory"].startswith(
        f"{shared.state_gib / 2:.2f} GiB on each device (of {copies.state_gib:.2f} GiB in all) for"
    )
    settings["num_layers"] = 4
    whole = plan_of(parts(**settings | {"devices": 1}))
    in_stages = plan_of(parts(strategy=Parallel(pipeline_parallel=4), **settings))
    both = plan_of(parts(strategy=Parallel(pipeline_parallel=2), **settings))
    assert (in_stages.data_parallel, in_stages.accumulate_grad_batches) == (1, 8)
    output = 16 * (ByteTokenizer().vocab_size + 1)  # with the norm before it; the embedding has less
    layer = (whole.parameters - 2 * output + 16) // 4
    assert in_stages.device_gib * 2**30 == pytest.approx(16 * (layer + output))
    # The layers of a rank are cut over two, and in a step gathered, and so are their gradients.
    assert both.device_gib * 2**30 == pytest.approx((16 / 2 + 8) * (2 * layer + output))
    with pytest.raises(ConfigError, match="'model': a model cut over several devices takes 'layers' or None"):
        plan_of(parts(strategy=Parallel(), compile="model", **settings))
    with pytest.raises(
        ConfigError, match=r"^trainer\.strategy\.data_parallel=3: 4 devices with .* make it 4; allowed: 4, None"
    ):
        plan_of(parts(strategy=Parallel(data_parallel=3), **settings))


def test_the_parameters_are_those_that_will_be_saved(parts: Parts) -> None:
    made = parts(max_steps=2)
    found = plan_of(made)
    run = tasks.pretrain(**made)
    assert sum(tensor.numel() for tensor in parameters(run, 2).values()) == found.parameters
    assert open_weights(run.path).config == found.config


def test_a_plan_changes_nothing_the_second_time(parts: Parts) -> None:
    made = parts(micro_batch_size=2, global_batch_size=6, val_check_interval=5)
    first = plan_of(made)
    interval = made["trainer"].val_check_interval
    assert plan_of(made) == first
    assert made["trainer"].val_check_interval == interval == 5


def test_validation_is_counted_in_steps_also_when_accumulating(parts: Parts) -> None:
    made = parts(micro_batch_size=2, global_batch_size=6, val_check_interval=5)
    plan_of(made)
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
        "trainer.gradient_clip_val",
        "trainer.val_check_interval",
        "model.config.vocab_size",
        "model.config.seq_length",
    ]
    assert not Path(made["log"].dir).exists()


def test_epochs_and_batches_are_refused_with_what_they_are_in_steps_and_samples(parts: Parts) -> None:
    made = parts(micro_batch_size=2, limit_val_batches=3)
    data, trainer = made["data"], made["trainer"]
    data.setup()
    steps = len(data._train) / 4
    trainer.fit_loop.max_epochs = 2
    trainer.val_check_interval = 0.25
    with pytest.raises(ConfigError) as error:
        plan_of(made)
    interval, epochs, batches = error.value.problems
    assert interval.endswith(f"so much of an epoch of this data is {round(steps / 4)}")
    assert epochs.endswith(f"so many epochs of this data are trainer.max_steps={math.ceil(2 * steps)}")
    assert batches.endswith("and set data.val_samples=6")
    trainer.limit_val_batches = 0.5
    with pytest.raises(ConfigError, match=rf"data.val_samples={round(len(data._val) / 2)}$"):
        plan_of(made)
    made["data"] = PreTrainingDataModule(corpus="stdlib", seq_length=16, global_batch_size=4)  # not known yet
    with pytest.raises(ConfigError) as error:
        plan_of(made)
    assert error.value.problems[1] == "trainer.max_epochs=2: trainer.max_steps ends a run; leave it at -1"


@pytest.mark.parametrize("name", ["limit_train_batches", "limit_val_batches"])
def test_one_batch_is_not_all_of_them(parts: Parts, name: str) -> None:
    """Lightning takes 1.0 for all batches and 1 for one; 1 == 1.0."""
    assert plan_of(parts(**{name: 1.0}))
    with pytest.raises(ConfigError, match=rf"^trainer\.{name}=1: "):
        plan_of(parts(**{name: 1}))


@pytest.mark.parametrize("every", [0, 2])
def test_a_validation_that_would_never_come_is_refused(parts: Parts, every: int) -> None:
    made = parts()
    made["trainer"].check_val_every_n_epoch = every
    with pytest.raises(ConfigError, match=rf"^trainer\.check_val_every_n_epoch={every}: .* set trainer\.val_check_int"):
        plan_of(made)


@pytest.mark.parametrize("steps", [10**8, 2**63, 10**20])
def test_more_steps_than_the_names_of_checkpoints_have_digits_for_are_refused(parts: Parts, steps: int) -> None:
    """What would be newest is found by its name; and 64 bits do not hold all samples of so many steps."""
    with pytest.raises(ConfigError, match=rf"^trainer\.max_steps={steps}: must be at most 99,999,999: a checkpoint's"):
        plan_of(parts(max_steps=steps))
    assert plan_of(parts(max_steps=10**8 - 1)).max_steps == 10**8 - 1
    assert step_folder(10**8 - 1) > step_folder(10**7)


@pytest.mark.parametrize(("least", "fits"), [(None, True), (0, True), (4, True), (5, False), (-1, False), (0.5, False)])
def test_a_run_cannot_have_more_steps_than_it_ends_with(parts: Parts, least: Any, fits: bool) -> None:
    made = parts(max_steps=4, min_steps=least)
    if fits:
        assert plan_of(made)
        return
    said = "must be a whole number of steps, at most trainer.max_steps=4, or None"
    with pytest.raises(ConfigError, match=rf"^trainer\.min_steps={least}: {said}$"):
        plan_of(made)


def test_a_least_number_of_epochs_is_refused(parts: Parts) -> None:
    """A run is never through with one, so nothing could end it early."""
    with pytest.raises(ConfigError, match=r"^trainer\.min_epochs=1: .* set trainer\.min_steps$"):
        plan_of(parts(min_epochs=1))


@pytest.mark.parametrize(
    "given",
    [
        {"moe_aux_loss_coeff": 0.01},
        {"moe_router_topk": 1},
        {"moe_ffn_hidden_size": 8},
        {"moe_router_pre_softmax": True},
    ],
)
def test_settings_of_experts_are_refused_where_there_are_none(parts: Parts, given: dict[str, Any]) -> None:
    ((name, value),) = given.items()
    with pytest.raises(ConfigError, match=rf"^model\.config\.{name}={value}: there are no experts; set model\.config"):
        plan_of(parts(**given))
    assert plan_of(parts(**given, num_moe_experts=2))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_bounds_is_refused(parts: Parts, seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"^seed={seed}: must be a whole number from 0 to 4294967295$"):
        plan_of(parts(), seed=seed)
    assert plan_of(parts(), seed=2**32 - 1)


def test_float16_is_refused_with_the_reason(parts: Parts) -> None:
    made = parts(precision="32-true")
    made["trainer"].strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ConfigError, match=r"^trainer.precision='16-mixed': the loss scaling of float16 hides"):
        plan_of(made)


def test_a_tokenizer_may_have_more_tokens_than_the_model_has_rows(parts: Parts, tmp_path: Path) -> None:
    """Gemma's text models have no row for the token of an image."""
    tokenizer = TokenizerFile(save_gemma(tmp_path / "gemma"))
    with TokenDatasetWriter(tmp_path / "data", tokenizer, []) as writer:
        tokens = encode_documents(tokenizer, ["def f(x): return x"] * 20)
        for split in ("train", "val"):
            writer.add(split, tokens, 20, 360)
        writer.finish()
    made = parts(vocab_size=tokenizer.vocab_size - 1)
    made["data"] = PreTrainingDataModule(tmp_path / "data", seq_length=16, micro_batch_size=2, global_batch_size=4)
    found = plan_of(made)
    found.apply(made["model"], made["data"], made["trainer"])
    assert found.config.vocab_size == made["data"].model_vocab_size == tokenizer.vocab_size - 1
    largest = int(tokens.max())
    made = parts(vocab_size=largest)
    made["data"] = PreTrainingDataModule(tmp_path / "data", seq_length=16, micro_batch_size=2, global_batch_size=4)
    with pytest.raises(ConfigError, match=rf"vocab_size={largest}: .*train\.bin: at \d+ is the token '.*'"):
        plan_of(made)


def test_a_batch_that_does_not_divide_is_the_data_s_problem(parts: Parts) -> None:
    made = parts()
    made["data"].global_batch_size = 6
    with pytest.raises(ConfigError, match=r"^data\.global_batch_size=6"):
        plan_of(made)


def test_a_run_without_an_end_is_refused(parts: Parts) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps=-1: must be 1 or more"):
        plan_of(parts(max_steps=-1))


def test_a_larger_vocabulary_and_a_longer_model_are_the_user_s_choice(parts: Parts) -> None:
    made = parts(vocab_size=300)
    made["model"].config = replace(made["model"].config, seq_length=64)
    found = plan_of(made)
    assert (found.config.vocab_size, found.config.seq_length) == (300, 64)


def test_rows_are_for_people(parts: Parts) -> None:
    text = dict(plan_of(parts(micro_batch_size=2)).rows())
    assert text["model"] == "16 k parameters, 2 layers"
    assert text["step"] == "64 tokens: 1 device x 2 sequences x 2 accumulated"
    assert text["attention"] == "sdpa_flash on cpu"


def test_layers_with_another_window_are_told_apart(parts: Parts) -> None:
    made = parts(window_size=(3, 0), window_attn_skip_freq=2, separate_documents=True)
    found = plan_of(made)
    windowed, full = on_longest(found.attention)
    assert (windowed.layers, full.layers) == ((0,), (1,))
    first, second = windowed.choice, full.choice
    assert first.spec.window_size == (3, 0) and second.spec.window_size == (-1, -1)
    assert first.spec.packed and second.spec.packed
    assert dict(found.rows())["attention"] == "sdpa_flash on cpu"  # said once, as it serves both


def test_different_kernels_are_said_with_their_layers(parts: Parts) -> None:
    found = plan_of(parts(window_size=(3, 0), window_attn_skip_freq=2))
    windowed, full = on_longest(found.attention)
    mixed = (windowed, full._replace(choice=replace(full.choice, candidates=("reference",))))
    rows = replace(found, attention=mixed).rows()
    assert rows[-2:] == [("attention", "sdpa_flash on cpu: layers 0"), ("", "reference on cpu: layers 1")]
    choice = replace(windowed.choice, asked="measured", candidates=("flex", "cudnn"))
    measured = replace(found, attention=(windowed._replace(layers=(0, 1), choice=choice),))
    assert measured.rows()[-1] == ("attention", "the fastest of flex, cudnn on cpu")


def test_the_layers_are_listed_as_ranges() -> None:
    assert ranges([0, 1, 2, 3, 5, 7, 8]) == "0-3, 5, 7-8"


def test_a_backend_that_cannot_serve_is_refused_with_its_reason(parts: Parts) -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.config\.attention_backend='flash2': .* on cpu: flash2: needs an NVIDIA"
    ):
        plan_of(parts(attention_backend="flash2"))


def test_on_another_machine_only_what_no_gpu_can_do_is_refused(parts: Parts) -> None:
    made = parts(attention_backend="flash2", precision="bf16-mixed")
    made["model"].config = replace(made["model"].config, kv_channels=64)
    found = plan_of(made, target=None)
    assert found.attention == () and found.rows()[-1] == ("attention", "flash2, on the GPU that trains")
    made = parts(attention_backend="flash2")
    with pytest.raises(
        ConfigError, match=r"^model\.config\.attention_backend='flash2': cannot serve .* on any GPU: .*float32"
    ):
        plan_of(made, target=None)


def test_a_run_writes_down_which_kernel_served_it(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    run = tasks.pretrain(**parts(max_steps=1))
    assert "attention: sdpa_flash on cpu\n" in capsys.readouterr().out
    entry, validation = json.loads((run.path / "attention.json").read_text())
    assert (entry["during"], validation["during"]) == ("training", "validation")
    assert (entry["lengths"], entry["layers_by_pipeline_rank"]) == ([16], [[0, 1]])
    assert validation["spec"] == entry["spec"] | {"training": False}
    assert (entry["layers"], entry["asked"], entry["backend"]) == ([0, 1], "auto", "sdpa_flash")
    assert (entry["spec"]["dtype"], entry["spec"]["num_query_groups"]) == ("float32", 2)
    assert entry["reasons"]["cudnn"] and entry["packages"]["torch"] == torch.__version__
    assert entry["target"] == {"device_type": "cpu", "name": "cpu", "capability": [0, 0]}
    errors = entry["trials"]["sdpa_flash"]
    assert errors.keys() == {"out", "dq", "dk", "dv"} and 0 < max(errors.values()) < entry["limit"] / 10
    run = tasks.pretrain(**parts(max_steps=1, name="measured", attention_backend="measured"))
    entry, _ = json.loads((run.path / "attention.json").read_text())
    assert entry["backend"] is None and set(entry["candidates"]) >= {"sdpa_flash", "reference"}
    assert entry["trials"].keys() == {"sdpa_flash"}  # the reference would only be taken if there were nothing else


def test_a_run_whose_kernel_has_wrong_gradients_does_not_begin(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BACKENDS["sdpa_flash"].run
    monkeypatch.setattr(
        BACKENDS["sdpa_flash"], "run", lambda q, k, v, *rest: right(q, k, 1.1 * v - 0.1 * v.detach(), *rest)
    )
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(Path(parts(max_steps=1)["log"].dir) / "cache"))
    with pytest.raises(
        ConfigError, match=r"^model\.config\.attention_backend='sdpa_flash': is wrong on cpu .* of dv 1\.0e-01"
    ):
        tasks.pretrain(**parts(max_steps=1))


def test_what_cannot_be_compiled_with_experts_is_said_before(parts: Parts) -> None:
    made = parts(num_moe_experts=4, moe_aux_loss_coeff=0.1, compile="layers", activation_checkpointing="full")
    with pytest.raises(ConfigError) as refused:
        plan_of(made)
    assert [problem.split("=")[0] for problem in refused.value.problems] == [
        "model.compile",
        "model.activation_checkpointing",
    ]
    plan_of(parts(num_moe_experts=4, compile="layers", activation_checkpointing=0.5, precision="bf16-mixed"))


def test_a_sequence_is_shared_by_as_many_ranks_as_divide_it_and_with_ulysses_the_heads(parts: Parts) -> None:
    settings: dict[str, Any] = {"devices": 3, "micro_batch_size": 2, "global_batch_size": 2}
    with pytest.raises(ConfigError) as refused:
        plan_of(parts(strategy=Parallel(context_parallel=3, context_parallel_method="ulysses"), **settings))
    heads, length = refused.value.problems
    assert heads.startswith("trainer.strategy.context_parallel=3: must divide") and "allowed: 1, 2, 4" in heads
    assert "context_parallel_method='auto' allows other numbers" in heads
    assert length == "trainer.strategy.context_parallel=3: does not divide data.seq_length=16"
    with pytest.raises(ConfigError, match="seq_length=15 to be a multiple of 6"):
        plan_of(parts(strategy=Parallel(context_parallel=3), seq_length=15, **settings))
    plan_of(parts(strategy=Parallel(context_parallel=3), seq_length=18, **settings))
    with pytest.raises(ConfigError, match="context_parallel_method='a2a': unknown method"):
        Parallel(context_parallel_method="a2a")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("split", "changes", "problem"),
    [
        (
            {"tensor_parallel": 4},
            {"num_attention_heads": 2},
            "trainer.strategy.tensor_parallel=4: must divide num_atten",
        ),
        ({"expert_parallel": 2}, {}, "trainer.strategy.expert_parallel=2: num_moe_experts=None, there are no experts"),
        (
            {"tensor_parallel": 2, "context_parallel": 2},
            {"seq_length": 18},
            "tensor_parallel=2: times context_parallel=2 does not divide data.seq_length=18",
        ),
        ({"tensor_parallel": 2}, {"fp8": "tensorwise"}, "model.fp8='tensorwise': not for split layers"),
        (
            {"expert_parallel": 2},
            {"num_moe_experts": 4, "compile": "layers"},
            "model.compile='layers': ranks wait for the numbers",
        ),
        (
            {"pipeline_parallel": 4},
            {},
            "_parallel=4: model.config.num_layers=2: is fewer than the 4 stages; each needs one",
        ),
        (
            {"pipeline_parallel": 2, "pipeline_stages_per_rank": 2},
            {"num_layers": 3},
            "_parallel=2: with pipeline_stages_per_rank=2: model.config.num_layers=3: is fewer than the 4 stages",
        ),
        (
            {"pipeline_parallel": 2},
            {"micro_batch_size": 2},
            "pipeline_parallel=2: a step has 1 micro-batches on each data-parallel rank, and needs 2 or more; change",
        ),
        (
            {"pipeline_parallel": 2, "pipeline_stages_per_rank": 2},
            {"num_layers": 4, "global_batch_size": 6},
            "a step has 3 micro-batches on each data-parallel rank, and needs a multiple of 2; change",
        ),
        (
            {"pipeline_stages_per_rank": 2},
            {},
            "trainer.strategy.pipeline_stages_per_rank=2: there is no pipeline; allowed: 1",
        ),
        (
            {"pipeline_schedule": "DualPipeV"},
            {},
            "trainer.strategy.pipeline_schedule='DualPipeV': there is no pipeline; allowed: 1F1B",
        ),
        (
            {"pipeline_parallel": 2, "pipeline_schedule": "ZBVZeroBubble"},
            {},
            "pipeline_stages_per_rank=1: pipeline_schedule='ZBVZeroBubble' is for 2 stages on each rank; allowed: 2",
        ),
        (
            {"pipeline_parallel": 2, "pipeline_stages_per_rank": 2, "pipeline_schedule": "ZBVZeroBubble"},
            {"num_layers": 4, "share_embeddings_and_output_weights": True},
            "pipeline_schedule='ZBVZeroBubble': puts the first and the last stage on one rank",
        ),
        (
            {"pipeline_parallel": 2, "pipeline_stages_per_rank": 2, "pipeline_schedule": "DualPipeV"},
            {"num_layers": 4, "global_batch_size": 4},
            "a step has 2 micro-batches on each data-parallel rank, and needs 4 or more; change",
        ),
        *(
            (
                {"pipeline_parallel": 2, "pipeline_schedule": "InterleavedZeroBubble", **split},
                changes,
                f"{field}={value!r}: {why}",
            )
            for split, changes, field, value, why in (
                ({}, {"compile": "layers"}, "model.compile", "layers", "a compiled layer computes all"),
                (
                    {},
                    {"activation_checkpointing": "full"},
                    "model.activation_checkpointing",
                    "full",
                    "a layer would be computed again for the gradient of each weight; set None here, or",
                ),
                ({}, {"fp8": "tensorwise"}, "model.fp8", "tensorwise", "a product in float8 computes both"),
                ({}, {"tiled_mlp": 8}, "model.tiled_mlp", 8, "a tile computes all of its gradients"),
                ({}, {"tiled_attention": 1}, "model.tiled_attention", 1, "attention in tiles computes all"),
                ({"tensor_parallel": 2}, {}, "trainer.strategy.tensor_parallel", 2, "a split product computes both"),
            )
        ),
    ],
)
def test_what_does_not_go_with_a_split_is_refused(
    parts: Parts, split: dict[str, int], changes: dict[str, Any], problem: str
) -> None:
    made = {"devices": 4, "micro_batch_size": 1, "precision": "bf16-mixed", "strategy": Parallel(**split)}
    with pytest.raises(ConfigError) as refused:
        plan_of(parts(**made | changes))
    assert any(problem in said for said in refused.value.problems), refused.value.problems


def test_a_schedule_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline_schedule='ZBV': unknown schedule"):
        Parallel(pipeline_schedule="ZBV")  # type: ignore[arg-type]


@pytest.mark.parametrize("dimension", ["tensor_parallel", "pipeline_parallel"])
def test_weights_in_4_bits_are_not_split(parts: Parts, dimension: str) -> None:
    split = Parallel(**{dimension: 2})
    made = parts(devices=2, micro_batch_size=1, strategy=split, lora=LoRA(rank=2, quantize_base="nf4"))
    problem = f"model.lora.quantize_base='nf4': .* trainer.strategy.{dimension}=1"
    with pytest.raises(ConfigError, match=problem):
        plan_of(made)


@pytest.mark.parametrize(
    ("base", "changes", "problem"),
    [
        (None, {"fp8": "tensorwise", "precision": "bf16-mixed"}, "model.fp8='tensorwise': layers with adapters"),
        ("nf4", {"fp8": "tensorwise", "precision": "bf16-mixed"}, "model.fp8='tensorwise': layers with adapters"),
        ("nf4", {"num_moe_experts": 4}, "model.lora.quantize_base='nf4': the experts of a mixture are not stored in 4"),
    ],
)
def test_what_does_not_go_with_adapters_or_weights_in_4_bits_is_refused(
    parts: Parts, base: Literal["nf4"] | None, changes: dict[str, Any], problem: str
) -> None:
    """Float8 products would replace the layers, and their adapters with them."""
    made = parts(**{"precision": "32-true"} | changes)
    made["model"].lora = LoRA(rank=2, target_modules=["linear_qkv"], quantize_base=base)
    with pytest.raises(ConfigError) as refused:
        plan_of(made)
    assert any(str(said).startswith(problem) for said in refused.value.problems), refused.value.problems


@pytest.mark.parametrize(
    ("callback", "advice"),
    [
        (GradientAccumulationScheduler(scheduling={0: 2}), "data.global_batch_size"),
        (BatchSizeFinder(), "data.micro_batch_size"),
        (LearningRateFinder(), "optim.lr"),
        (StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1), "EMAWeightAveraging"),
    ],
)
def test_callbacks_that_change_what_the_recipe_says_are_refused(parts: Parts, callback: Any, advice: str) -> None:
    """The first trained for ever, with one micro-batch in a step; the last averaged nothing."""
    with pytest.raises(ConfigError, match=rf"^trainer\.callbacks\[0\]: {type(callback).__name__}: .*{advice}"):
        plan_of(parts(callbacks=[callback]))


@pytest.mark.parametrize("strategy", ["ddp_notebook", "ddp_spawn"])
def test_a_strategy_that_starts_processes_from_python_is_refused(parts: Parts, strategy: str) -> None:
    """One that forks waited for ever: its child inherited the locks of this process's threads."""
    with pytest.raises(ConfigError, match=r"^trainer\.strategy: starts processes by '(fork|spawn)'"):
        plan_of(parts(strategy=strategy))


@pytest.mark.parametrize("setting", [{"fast_dev_run": 3}, {"overfit_batches": 2}, {"overfit_batches": 0.5}])
def test_a_trial_of_lightning_s_is_refused_alone_and_not_for_the_limits_that_it_sets(
    parts: Parts, setting: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(parts(**setting))
    (name,) = setting
    assert [problem.path for problem in error.value.problems] == [f"trainer.{name}"]


def test_the_kind_of_clipping_that_is_refused_is_named_as_it_is_written(parts: Parts) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.gradient_clip_algorithm='value': allowed: norm$"):
        plan_of(parts(gradient_clip_algorithm="value"))
