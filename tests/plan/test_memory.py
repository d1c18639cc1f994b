"""The memory that a plan predicts: beside measured peaks, beside what autograd keeps, and as sizes change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddlehead.attention import Packages, Target
from fiddlehead.attention.packages import CUDNN_OF_CUDA_BUILDS
from fiddlehead.errors import ConfigError
from fiddlehead.models import LoRA, Transformer, TransformerConfig, gated_mlp, nf4
from fiddlehead.models.computation import Computation
from fiddlehead.models.linear_cross_entropy import CHUNK_TOKENS
from fiddlehead.models.mlp_choice import MlpChoice
from fiddlehead.models.parallel import stages
from fiddlehead.plan import attention
from fiddlehead.plan.activations import Setting
from fiddlehead.plan.attention_calls import calls_of
from fiddlehead.plan.cards import CARDS, Card
from fiddlehead.plan.memory import GIB, Held, Memory, main_memory, memory, moments
from fiddlehead.plan.rank_memory import Devices, Training
from fiddlehead.plan.speed import speed
from fiddlehead.recipe import catalog
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.training import LanguageModel, Parallel, PreferenceModel
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.preference import answer_log_probabilities
from tests.allocated import Allocated
from tests.models.test_gated_mlp import defined_product
from tests.training.conftest import Parts, plan_of

MEASURED: dict[str, Any] = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "plan.json").read_text())[
    "figures"
]
QUACK: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "train_mlp.json").read_text()
)["figures"]
WITHOUT_PACKAGES = Target.gpu("h100", Packages("2.11.0", CUDNN_OF_CUDA_BUILDS))
"""What it was measured on."""


def points() -> Iterator[Any]:
    """Each case with each point that was measured."""
    for case, measured in MEASURED.items():
        found = measured["points"]
        # A pipeline does both passes in `backward`.
        names = ["backward", "optimizer", *([] if "pp" in case else ["ended"])] + (
            ["peak"] if measured.get("peak") else []
        )
        for name in names:
            size = found["forward"]["after"] if name == "ended" else measured["peak"] if name == "peak" else None
            yield pytest.param(case, name, size or found[name]["peak"], id=f"{case} {name}")


@cache
def parts_of(case: str) -> tuple[TransformerConfig, Held, Setting, Any, Any]:
    """What a measured case is worked out from, and its data and trainer; from its recipe and edits."""
    adapters = "lora" in case
    files = ("model.init_from", "model.lora=", "data.paths", "data.tokenizer")
    edits = [edit for edit in MEASURED[case]["edits"] if not edit.startswith(files)]
    recipe = catalog.find_recipe(MEASURED[case]["recipe"])()
    if adapters:  # the weights that they began with had six layers, and one matrix for embedding and output
        recipe.model.config = catalog.find_recipe("llama3_8b")().model.config
        recipe.model.init_from, recipe.model.lora = "weights", fdl.Config(LoRA, rank=16)
        edits = [edit for edit in edits if edit != "model.config=None"]
        edits += ["model.config.num_layers=6", "model.config.share_embeddings_and_output_weights=True"]
    if MEASURED[case]["recipe"] != "dpo":
        recipe.model.activation_checkpointing = None  # as the recipes were when it was measured
    recipe = apply_overrides(recipe, [*edits, "trainer.accelerator=cpu"], find=catalog.find_part)
    recipe.model.config.vocab_size = recipe.model.config.vocab_size or 50_257
    recipe.model.config.seq_length = recipe.data.seq_length
    built: list[Any] = [fdl.build(getattr(recipe, part)) for part in ("model", "trainer", "data", "optim")]
    model, trainer, data, optim = built
    world_size = trainer.num_devices * trainer.num_nodes
    sizes = Sizes(world_size, world_size)
    if isinstance(trainer.strategy, Parallel):
        sizes = trainer.strategy.sizes(world_size)
    transformer = model.on_meta()
    calls = calls_of(model, transformer.config, data, str(trainer.precision), trainer.strategy, transformer=transformer)
    by_flex = attention.share(attention.explain_calls(calls, WITHOUT_PACKAGES), "flex")
    training = Training(model, transformer, data, Devices.of(trainer), optim, by_flex)
    setting = replace(
        training.setting(sizes),
        fuses=MEASURED[case].get("mlp") == "triton",
        overlaps=case.startswith("tp "),
        bfloat16_gradients=False,  # as they were when it was measured
    )
    return transformer.config, training.held(sizes), setting, data, trainer


@contextmanager
def as_measured(case: str) -> Iterator[None]:
    """In the block, a case is planned as it was measured: with even stages of a pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        if case.startswith("pp "):
            patch.setattr(stages, "HEAD", 0.0)
            stages.first_layers.cache_clear()
        yield
    stages.first_layers.cache_clear()


def predicted(case: str) -> dict[str, Memory]:
    """The moments of a measured case."""
    with as_measured(case):
        return moments(*parts_of(case)[:3])


@pytest.mark.parametrize(("case", "point", "measured"), list(points()))
def test_a_measured_training_takes_what_is_predicted(case: str, point: str, measured: int) -> None:
    found = predicted(case)
    # The gradients of the loss of preferences are taken in the backward pass, and of the others in the forward pass.
    backward = ["last", "first", "embedding", *(["forward"] if "dpo" in case else [])]
    at = {"backward": backward, "peak": list(found)}.get(point, [point])
    then = {"forward": logits_gradient(case), "embedding": embedding_gradient(case)}
    assert max(found[name].peak + then.get(name, 0) for name in at) == pytest.approx(measured, rel=0.05)


def logits_gradient(case: str) -> int:
    """Bytes of the gradient of a chunk's logits, which was a tensor of its own when most cases were measured.

    Now it overwrites them. On an H200, "1b b8" took 59.18 GiB before and 58.22 after.
    """
    config, _, setting, *_ = parts_of(case)
    if not setting.compiled or setting.compares or "state offloaded" in case or "mlp" in MEASURED[case]:
        return 0
    return setting.of_products * min(setting.tokens, CHUNK_TOKENS) * (config.vocab_size or 0)


def embedding_gradient(case: str) -> int:
    """Bytes of a tied embedding's gradient, which was a tensor as large as the weight when the cases were measured.

    Now its rows are added to the output layer's gradient.
    """
    config, _, setting, *_ = parts_of(case)
    if not config.share_embeddings_and_output_weights or setting.fsdp or setting.adapters or not setting.joins:
        return 0
    return setting.of_weights * (config.vocab_size or 0) * config.hidden_size


def test_the_gradient_of_the_logits_takes_no_memory_of_its_own() -> None:
    assert max(each.peak for each in predicted("1b b8").values()) == pytest.approx(58.22 * GIB, rel=0.005)


SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 192,
    "ffn_hidden_size": 592,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "vocab_size": 96,
    "seq_length": 64,
}
GPT: dict[str, Any] = {
    "normalization": "LayerNorm",
    "activation": "gelu",
    "position_embedding_type": "learned_absolute",
    "add_bias_linear": True,
    "hidden_dropout": 0.1,
    "num_query_groups": None,
}
OTHERS: dict[str, dict[str, Any]] = {
    "norms after": {"norm_placement": "post", "qk_layernorm": "projection", "kv_channels": 40},
    "norms before and after": {"norm_placement": "both", "qk_layernorm": "head", "activation": "geglu"},
    "as GPT-2": GPT,
    "a mixture": {"num_moe_experts": 4, "moe_router_topk": 2},
}


@pytest.mark.parametrize(
    ("changes", "tiled_mlp"),
    [(changes, None) for changes in OTHERS.values()]
    + [(changes, 50) for name, changes in OTHERS.items() if name != "a mixture"],
    ids=[*OTHERS, *(f"{name}, tiled" for name in OTHERS if name != "a mixture")],
)
def test_layers_keep_what_is_counted(
    changes: dict[str, Any], tiled_mlp: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd says what compiled layers keep; those that are not compiled keep other tensors on a CPU."""
    kept, counted = kept_and_counted(changes, Setting(3 * 64, tiled_mlp=tiled_mlp), monkeypatch)
    assert counted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("tiled_mlp", [None, 50])
@pytest.mark.parametrize("name", ["norms before and after", "as GPT-2"])
def test_layers_with_tiles_of_heads_keep_what_is_counted(
    name: str, tiled_mlp: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(3 * 64, tiled_mlp=tiled_mlp, tiled_attention=1)
    kept, counted = kept_and_counted(OTHERS[name], setting, monkeypatch)
    assert counted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("tiled_mlp", [None, 50])
@pytest.mark.parametrize("name", ["", "norms after", "norms before and after", "as GPT-2"])
def test_selective_layers_keep_what_is_counted(
    name: str, tiled_mlp: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(3 * 64, tiled_mlp=tiled_mlp, recompute="selective")
    kept, counted = kept_and_counted(OTHERS.get(name, {}), setting, monkeypatch)
    assert counted == pytest.approx(kept, rel=0.02)


PARTS = [({}, part) for part in (0.15, 0.4, 0.65, 0.9)] + [
    (OTHERS[name], part)
    for name, part in [("norms after", 0.9), ("norms before and after", 0.55), ("as GPT-2", 0.9), ("a mixture", 0.65)]
]


@pytest.mark.parametrize(("changes", "part"), PARTS, ids=[f"{part}-{'-'.join(changes)}" for changes, part in PARTS])
def test_the_partitioner_keeps_what_is_counted(
    changes: dict[str, Any], part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not compared where the CPU's attention, whose output is counted twice there, changes the choice."""
    kept, counted = kept_and_counted(changes, Setting(8 * 256, recompute=part), monkeypatch)
    assert counted == pytest.approx(kept, rel=0.02)


def kept_and_counted(changes: dict[str, Any], setting: Setting, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """The bytes that layers keep, by autograd and by the plan; the compiler's first half decides, with no kernels."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    config = TransformerConfig(**SHAPE | changes)
    torch._dynamo.reset()
    transformer = Transformer(config)
    if setting.adapters:
        LoRA(rank=1).apply(transformer.bfloat16())  # as weights that are not trained are in a run
    monkeypatch.setattr(gated_mlp, "_product", defined_product)
    mlp = MlpChoice("torch" if not setting.fused_mlp else "triton" if setting.adapters else "quack")
    tiles = {"tiled_mlp": setting.tiled_mlp, "tiled_attention": setting.tiled_attention}
    Computation("layers", setting.recompute, **tiles).apply(transformer, mlp, gathers_float8=False)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    shape = setting.tokens // 64, 64
    x = torch.randn(*shape, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    places = transformer.places(torch.zeros(shape, dtype=torch.int64))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        transformer.run_layers(transformer.layers, x, places)
    own = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    found = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    ended = moments(config, Held(0, 0, 0), setting)["ended"]
    last_norm = setting.of_weights * setting.tokens * config.hidden_size
    return found, ended.activations - last_norm + ended.copies


@pytest.mark.parametrize("changes", [{}, {"norm_placement": "post", "ffn_hidden_size": 56}], ids=str)
@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("adapters", [False, True], ids=["", "adapters"])
def test_with_kernels_for_the_feed_forward_layers_keep_what_is_counted(
    changes: dict[str, Any], recompute: Any, adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(32 * 64, recompute=recompute, adapters=adapters, fuses=True)
    kept, counted = kept_and_counted(changes, setting, monkeypatch)
    assert counted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("arm", QUACK)
def test_with_quacks_feed_forward_a_step_takes_what_was_measured(arm: str) -> None:
    measured, case = QUACK[arm], "1b b8 bf16-true" if "true" in arm else "1b b8"
    config, held, setting, *_ = parts_of(case)
    setting = replace(setting, fuses=measured["mlp"] == "quack")
    peak = max(each.peak for each in moments(config, held, setting).values())
    assert peak == pytest.approx(measured["gib"] * GIB, rel=0.03)
    found = speed(config, held, setting, CARDS["h100"], 4096, gpus=1, gpus_per_node=1)
    assert found is not None
    assert found.tokens_per_s == pytest.approx(measured["tokens_per_s"], rel=0.1)


@pytest.mark.parametrize(("name", "overlaps"), [("1b, tp 2", True), ("1b, tp 2, NCCL", False)])
def test_split_layers_take_what_was_measured(name: str, overlaps: bool) -> None:
    two = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "many_two_overlap.json").read_text())
    measured = two["figures"]["speed"][name]["figures"]
    config, held, setting, *_ = parts_of("tp 1b b4")
    setting = replace(setting, tokens=8 * 4096, sequences=8, fuses=True, overlaps=overlaps)
    assert max(each.peak for each in moments(config, held, setting).values()) == pytest.approx(
        measured["memory_gib"] * GIB, rel=0.01
    )
    found = speed(config, held, setting, CARDS["h200"], 4096, gpus=2, gpus_per_node=8)
    assert found is not None
    assert found.step == pytest.approx(measured["seconds_per_step"]["median"], rel=0.05)


SHAPES = st.builds(
    TransformerConfig,
    num_layers=st.integers(2, 40),
    hidden_size=st.integers(1, 60).map(lambda n: 128 * n),
    ffn_hidden_size=st.integers(1, 20_000),
    num_attention_heads=st.just(8),
    num_query_groups=st.sampled_from([1, 2, 8]),
    vocab_size=st.integers(100, 200_000),
    norm_placement=st.sampled_from(["pre", "post", "both"]),
    qk_layernorm=st.sampled_from([None, "head", "projection"]),
    activation=st.sampled_from(["swiglu", "geglu"]),
    share_embeddings_and_output_weights=st.booleans(),
    num_moe_experts=st.sampled_from([None, 8]),
)
SETTINGS = st.builds(
    Setting,
    tokens=st.integers(1, 200_000),
    precision=st.sampled_from(["bf16-mixed", "bf16-true", "32-true"]),
    compiled=st.booleans(),
    micro_batches=st.sampled_from([1, 4]),
    sizes=st.sampled_from([None, Sizes(8, 1), Sizes(4, 2, context=2)]),
)


@given(SHAPES, SETTINGS)
@settings(max_examples=60, deadline=None)
def test_recomputing_more_never_needs_more(config: TransformerConfig, setting: Setting) -> None:
    """Less is kept, and less needed; where the compiler chooses a part, what it computes again may be more."""
    parts: tuple[Any, ...] = (None, "selective", "full") if not setting.compiled else (None, 0.9, 0.5, 0.0)
    found = [moments(config, Held(1e9, 1e9, 2e9), replace(setting, recompute=each)) for each in parts]
    kept = [each["ended"].activations for each in found]
    assert kept == sorted(kept, reverse=True)
    peaks = [max(at.peak for at in each.values()) for each in (found if not setting.compiled else found[::3])]
    assert peaks == sorted(peaks, reverse=True)


@given(SHAPES, SETTINGS, st.integers(1, 100_000))
@settings(max_examples=60, deadline=None)
def test_more_tokens_never_need_less(config: TransformerConfig, setting: Setting, more: int) -> None:
    held = Held(1e9, 1e9, 2e9)
    longer = replace(setting, tokens=setting.tokens + more)
    assert memory(config, held, setting).peak <= memory(config, held, longer).peak


def test_tiles_of_a_long_sequence_need_less() -> None:
    """Two ranks share a sequence of 524,288 tokens of a Llama 3.2 1B."""
    config, held, setting, _, _ = parts_of("cp 1b 32k full")
    long = replace(setting, tokens=2**19)
    tiles = (None, 2**18, 2**16, 2**13)
    peaks = [memory(config, held, replace(long, tiled_mlp=tile)) for tile in tiles]
    assert [each.peak for each in peaks] == sorted((each.peak for each in peaks), reverse=True)
    assert [each.fits(79.2) for each in peaks[::3]] == ["does not fit", "fits"]
    for recompute in ("selective", None):  # what is kept: the input and the middle of each layer, and attention's
        kept = memory(config, held, replace(long, tiled_mlp=2**13, recompute=recompute)).activations
        assert peaks[-1].activations < kept < memory(config, held, replace(long, recompute=recompute)).activations


def test_inputs_in_main_memory_leave_the_gpu_two_of_them() -> None:
    config, held, setting, _, _ = parts_of("cp 1b 32k full")
    here = replace(setting, tokens=2**19, tiled_mlp=2**13)
    peaks = [moments(config, held, replace(here, offloads=offloads))["last"].peak for offloads in (False, True)]
    one = 2 * 2**18 * config.hidden_size
    assert peaks[0] - peaks[1] == pytest.approx((config.num_layers - 2) * one)


def test_what_is_in_main_memory_is_counted_for_each_rank() -> None:
    config, held, setting, _, _ = parts_of("cp 1b 32k full")
    there = replace(held, optimizer=0.0, offloaded=held.optimizer)
    assert main_memory(config, held, setting) == {}
    assert main_memory(config, there, setting) == {"optimizer state": held.optimizer}
    inputs = 2 * config.num_layers * setting.tokens / 2 * config.hidden_size
    assert main_memory(config, held, replace(setting, offloads=True)) == {"the inputs of layers": inputs}
    peaks = [memory(config, each, setting).peak for each in (held, there)]
    assert peaks[0] - peaks[1] == pytest.approx(held.optimizer)


def test_a_loss_that_compares_answers_has_what_is_counted() -> None:
    """Two answers in a row: the gradients of all logits, and of the scores before, beside the log-probabilities."""
    tokens, config = 256, TransformerConfig(**SHAPE | {"vocab_size": 20_000, "seq_length": 256})
    transformer = Transformer(config)
    batch = {
        "input_ids": torch.randint(20_000, (1, tokens)),
        "labels": torch.randint(20_000, (1, tokens)),
        "cu_seqlens": torch.tensor([0, 100, tokens], dtype=torch.int32),
        "max_seqlen": 156,
    }
    with Allocated() as allocated, torch.autocast("cpu", torch.bfloat16):
        answer_log_probabilities(transformer, batch).sum().backward()
    setting = Setting(tokens, compiled=False, compares=True)
    found = moments(config, Held(0, 0, 0), setting)["forward"]
    assert found.loss == pytest.approx(12 * tokens * 20_000 + 2 * 20_000 * config.hidden_size)
    assert found.loss == pytest.approx(allocated.peak, rel=0.1)


@pytest.mark.parametrize(
    ("lora", "precision", "size"), [(None, "bf16-mixed", 4), (None, "bf16-true", 2), (LoRA(rank=2), "bf16-mixed", 0)]
)
def test_a_reference_is_held_where_there_are_no_adapters(
    parts: Parts, lora: LoRA | None, precision: str, size: int
) -> None:
    made = parts(precision=precision)
    config = replace(made["model"].config, vocab_size=96, seq_length=64)
    several = []
    for kind in (LanguageModel, PreferenceModel):
        model = kind(config, init_from="weights", lora=lora)
        training = Training(model, model.on_meta(), made["data"], Devices.of(made["trainer"]), made["optim"])
        setting = training.setting(Sizes(1, 1))
        several.append(
            (training.whole, speed(config, training.whole, setting, CARDS["h100"], 64, gpus=1, gpus_per_node=1))
        )
        number = sum(training.counted.numbers.values())
    (learns, alone), (compares, twice) = several
    assert compares.parameters - learns.parameters == size * number
    assert (compares.gradients, compares.optimizer) == (learns.gradients, learns.optimizer)
    assert alone is not None and twice is not None
    # A forward pass more: one product for two or, with full gradients, three.
    assert twice.products / alone.products == pytest.approx(3 / 2 if lora else 4 / 3)
    assert twice.attention > alone.attention and twice.memory_bound > alone.memory_bound


def test_a_plan_for_a_card_says_whether_it_fits(parts: Parts) -> None:
    made = parts(compile="layers", precision="bf16-mixed")
    found = plan_of(made, target=Card.parse("h100"))
    assert found.memory is not None and found.fits is True and found.verdict == "fits"
    assert found.memory.parameters + found.memory.optimizer == pytest.approx(12 * found.parameters)
    assert dict(found.rows())["memory"].startswith("fits: h100 has 79.2 GiB, and the run needs ")
    json.dumps(found.to_dict())
    assert found.to_dict()["memory"]["peak"] == found.memory.peak
    small = plan_of(
        made, target=Card("small", (1.03 * found.memory.peak + found.memory.outside) / GIB + 1e-6, 1.0, 1.0)
    )
    assert (small.fits, small.verdict) == (True, "tight")
    smaller = plan_of(made, target=Card("smaller", found.memory.outside / GIB, 1.0, 1.0))
    assert (smaller.fits, smaller.attention) == (False, ())
    unknown = plan_of(made, target=None)
    assert unknown.memory == found.memory and unknown.fits is None
    on_a_cpu = plan_of(made)
    assert (on_a_cpu.memory, on_a_cpu.card, on_a_cpu.fits) == (None, None, None)


def test_a_device_of_this_machine_is_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    device, found = torch.device("cuda", 0), []
    for name, gib in (
        ("NVIDIA H100 80GB HBM3", 79.2),
        ("NVIDIA A100-SXM4-40GB", 39.4),
        ("NVIDIA A100-SXM4-80GB", 79.3),
        ("NVIDIA GeForce RTX 4090", 23.6),
        ("NVIDIA H100 PCIe", 79.2),
        ("NVIDIA GeForce GT 1030", 2.0),
    ):
        here = SimpleNamespace(name=name, total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, here=here: here)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        card = Card.of(Target("cuda", name), device)
        assert card is not None and (card.name, card.gib) == (name, gib)
        found.append((card.flops / 1e12, card.bytes_per_s / 1e9))
    assert found == [(989, 3350), (312, 1555), (312, 2039), (165, 1008), (756, 2000), (0, 0)]
    assert Card.of(Target("cpu", "cpu"), torch.device("cpu")) is None


def test_a_card_has_a_name_or_numbers() -> None:
    assert Card.parse("H200") == CARDS["h200"]
    assert Card.parse("mine = 48, 181,864") == Card("mine", 48.0, 181e12, 864e9)
    assert Card.parse("mine=48,181,864,300") == Card("mine", 48.0, 181e12, 864e9, watts=300)
    assert all(card.target is not None for card in CARDS.values())
    for text, said in (
        ("h101", "did you mean 'h100'"),
        ("mine=48", "must be NAME=GiB"),
        ("mine=48,1,many", "must be NAME=GiB"),
        ("=48,1,1", "needs a name"),
        ("mine=48,0,1", "numbers above 0"),
        ("mine=nan,1,1", "numbers above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            Card.parse(text)


def test_frozen_weights_in_4_bits_take_what_they_take_in_the_model() -> None:
    recipe = catalog.find_recipe("llama3_8b").finetune_recipe(peft_scheme="qlora")  # type: ignore[attr-defined]
    recipe.model.config.num_layers, recipe.data.micro_batch_size = 4, 1
    recipe.model.activation_checkpointing = "full"
    recipe = apply_overrides(recipe, ["trainer.accelerator=cpu"], find=catalog.find_part)
    model, data, optim = (fdl.build(getattr(recipe, part)) for part in ("model", "data", "optim"))
    training = Training(model, model.on_meta(), data, Devices("auto", "bf16-mixed", 1, 1), optim)
    with torch.device("meta"):
        real = Transformer(model.config).bfloat16()
        nf4.quantize_layers(real)
        model.lora.apply(real)
    assert training.whole.parameters == pytest.approx(sum(tensor.nbytes for tensor in real.parameters()), rel=1e-4)
    setting = training.setting(Sizes(1, 1))
    eager, compiled, full = (
        moments(real.config, training.whole, replace(setting, **changes))["last"].transient
        for changes in ({"compiled": False}, {"compiled": True}, {"compiled": True, "quantizes": False})
    )
    largest = real.layers[0].mlp.linear_fc1  # type: ignore[union-attr]
    assert compiled - full == 2 * largest.in_features * largest.out_features  # in bfloat16
    assert eager > compiled
    cut = replace(setting, sizes=Sizes(2, 1))
    gathered = [
        moments(real.config, training.whole, replace(cut, quantizes=each))["last"].copies for each in (True, False)
    ]
    assert 0.25 < gathered[0] / gathered[1] < 1  # the vocabulary is gathered as before


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_ranks_that_only_share_layers_have_copies_of_weights_as_one_device_has(recompute: Any) -> None:
    config, held, setting, *_ = parts_of("1b b4")
    setting = replace(setting, recompute=recompute)
    for at in ("ended", "forward", "last", "first", "embedding"):
        alone, split = (
            moments(config, held, replace(setting, sizes=sizes))[at] for sizes in (None, Sizes(1, 1, tensor=2))
        )
        assert split.copies == alone.copies / 2, at
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sizes, "fsdp", True)
            assert moments(config, held, replace(setting, sizes=Sizes(1, 1, tensor=2)))[at].copies > split.copies


def test_frozen_weights_are_in_bfloat16_unless_fsdp_has_them(parts: Parts) -> None:
    made = parts(precision="bf16-mixed")
    config, lora = replace(made["model"].config, vocab_size=96, seq_length=64), LoRA(rank=2)
    model = LanguageModel(config, init_from="weights", lora=lora)
    training = Training(model, model.on_meta(), made["data"], Devices(Parallel(), "bf16-mixed", 4, 1), made["optim"])
    learned = sum(training.trained.numbers.values())
    frozen = sum(training.counted.numbers.values()) - learned
    several = ((Sizes(1, 1, tensor=4), 2), (Sizes(2, 1, tensor=2), 4), (Sizes(1, 1, pipeline=2, stages=2), 4))
    for sizes, each in several:
        share = sizes.held(training.counted) / (frozen + learned)
        assert training.held(sizes).parameters == pytest.approx(share * (each * frozen + 4 * learned))
