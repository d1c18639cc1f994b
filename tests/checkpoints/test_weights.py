"""Runs that start from given weights: all of them, with adapters, and with fewer key/value heads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fiddlehead import tasks
from fiddlehead.checkpoints.folder import write_folder, write_state
from fiddlehead.checkpoints.grouped_query import convert_gqa
from fiddlehead.checkpoints.huggingface.convert import export_adapters, export_checkpoint
from fiddlehead.checkpoints.weights import find_weights, load_transformer, open_weights
from fiddlehead.data import TokenizerFile
from fiddlehead.errors import ConfigError
from fiddlehead.models import LoRA, Transformer, TransformerConfig
from fiddlehead.plan.resume import resume_point
from fiddlehead.plan.training import begin, plan_training
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import LanguageModel, PreferenceModel
from tests.training.conftest import KillAfter, Killed, Parts, make_parts, rows

Pretrain = Callable[..., RunDirectory]
IDS = torch.arange(40).view(2, 20) % 257


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks.pretrain(**make_parts(dataset, tmp_path_factory.mktemp("runs"), name="base")).path


@pytest.fixture
def base(trained: Path, tmp_path: Path) -> RunDirectory:
    """A run of twelve steps, whose model has four heads in two groups: a copy of its own for each test."""
    return RunDirectory(shutil.copytree(trained, tmp_path / "runs" / "base", symlinks=True))


def losses(run: RunDirectory) -> list[float]:
    return [float(loss) for (loss,) in rows(run, "loss") if loss]


def loaded(source: Path) -> Transformer:
    return load_transformer(open_weights(source)).eval()


def beginning_with(parts: Parts, source: Path, lora: LoRA | None = None, **changes: Any) -> dict[str, Any]:
    return parts(**changes) | {"model": LanguageModel(init_from=source, lora=lora)}


def test_a_run_begins_with_the_weights_it_is_given(base: RunDirectory, parts: Parts) -> None:
    run = tasks.pretrain(**beginning_with(parts, base.path, max_steps=2, lr=1e-30))
    assert torch.allclose(loaded(run.path)(IDS), loaded(base.path)(IDS), atol=1e-6)
    fresh = tasks.pretrain(**parts(name="fresh", max_steps=2, lr=1e-30))
    assert losses(run)[0] < losses(fresh)[0] - 1


def test_weights_of_another_shape_are_refused(base: RunDirectory, parts: Parts) -> None:
    wrong = TransformerConfig(num_layers=3, hidden_size=16, num_attention_heads=4, num_query_groups=1)
    given = parts() | {"model": LanguageModel(wrong, init_from=base.path)}
    with pytest.raises(ConfigError) as error:
        tasks.pretrain(**given)
    assert "model.config.num_layers=3: init_from=" in str(error.value)
    assert "model.config.num_query_groups=1: init_from=" in str(error.value)


def test_a_model_needs_a_shape_and_adapters_a_model(parts: Parts) -> None:
    shape = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    for model, said in (
        (LanguageModel(), "model.init_from=None: name the model to begin with"),
        (LanguageModel(shape, lora=LoRA()), "model.init_from=None: adapters need a model"),
        (PreferenceModel(shape), "model.init_from=None: name a model that can answer already"),
    ):
        with pytest.raises(ConfigError, match=said):
            tasks.pretrain(**parts() | {"model": model})


def test_a_known_shape_is_planned_without_the_weights_and_the_plan_says_so(parts: Parts, tmp_path: Path) -> None:
    shape = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=300)
    given = parts() | {"model": LanguageModel(shape, init_from=tmp_path / "nowhere", lora=LoRA())}
    begin(*(given[name] for name in ("model", "data", "trainer", "optim")))
    plan = plan_training(**given, target=None)
    assert plan.parameters > plan.trained > 0
    assert [reason for reason in plan.missing if "nowhere': unknown run" in reason]
    assert any("the shape is model.config's, without weights: model.init_from=" in line for _, line in plan.rows())
    with pytest.raises(ConfigError, match=r"model.init_from='.*nowhere': unknown run"):
        tasks.pretrain(**given)


def test_weights_that_are_not_there_are_refused(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.init_from='.*nowhere': unknown run"):
        tasks.pretrain(**beginning_with(parts, tmp_path / "nowhere"))


def test_another_tokenizer_than_the_model_s_is_refused(base: RunDirectory, parts: Parts) -> None:
    text = base.tokenizer.read_text().replace("<|endoftext|>", "<|end_of_text|>")
    base.tokenizer.write_text(text)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: differs from the one in"):
        tasks.pretrain(**beginning_with(parts, base.path))


def test_documents_end_in_one_of_the_ends_that_the_model_knows(base: RunDirectory, parts: Parts) -> None:
    """The data's end in <|endoftext|>; the folder of the model names another."""
    (base.path / "tokenizer_config.json").write_text('{"eos_token": "Z"}')
    with pytest.raises(ConfigError, match=r"documents end in '<\|endoftext\|>', there in 'Z'"):
        tasks.pretrain(**beginning_with(parts, base.path))
    (base.path / "generation_config.json").write_text('{"eos_token_id": [90, 256]}')
    run = tasks.pretrain(**beginning_with(parts, base.path, max_steps=1, name="knows_it"))
    assert TokenizerFile(run.path).stop_ids == [256]  # what the run learned


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_all_that_is_trained_and_saved(base: RunDirectory, parts: Parts, dora: bool) -> None:
    run = tasks.pretrain(**beginning_with(parts, base.path, LoRA(rank=2, dora=dora), max_steps=60, lr=3e-2))
    weights = open_weights(run.path)
    assert weights.tensors and all(name.endswith(("lora_a", "lora_b", "magnitude")) for name in weights.tensors)
    before, after = loaded(base.path).state_dict(), loaded(run.path).state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if ".linear_" in name and name.endswith("weight")}
    assert sum(losses(run)[-10:]) < sum(losses(run)[:10])


def test_adapters_go_on_with_what_they_began_with(base: RunDirectory, parts: Parts) -> None:
    """Also if the run that they began from has gone on in the meantime."""
    lora = LoRA(rank=2)
    whole = tasks.pretrain(**beginning_with(parts, base.path, lora, name="whole"))
    with pytest.raises(Killed):
        tasks.pretrain(**beginning_with(parts, base.path, lora, name="cut", callbacks=[KillAfter(6)]))
    tasks.pretrain(**parts(name="base", max_steps=16))
    cut = tasks.pretrain(**beginning_with(parts, base.path, lora, name="cut"))
    assert rows(cut, "step", "loss", "grad_norm") == rows(whole, "step", "loss", "grad_norm")


def test_adapters_go_on_exactly(base: RunDirectory, parts: Parts) -> None:
    lora = LoRA(rank=2, dropout=0.1)
    whole = tasks.pretrain(**beginning_with(parts, base.path, lora, name="whole"))
    with pytest.raises(Killed):
        tasks.pretrain(**beginning_with(parts, base.path, lora, name="cut", callbacks=[KillAfter(6)]))
    cut = tasks.pretrain(**beginning_with(parts, base.path, lora, name="cut"))
    assert rows(cut, "step", "loss", "grad_norm") == rows(whole, "step", "loss", "grad_norm")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 under transformers 5
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_the_same_in_transformers_and_peft(
    base: RunDirectory, parts: Parts, tmp_path: Path, dora: bool
) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    run = tasks.pretrain(**beginning_with(parts, base.path, LoRA(rank=2, dora=dora)))
    ours = loaded(run.path)(IDS)
    export_checkpoint(base.path, tmp_path / "base", progress=False)
    export_checkpoint(run.path, tmp_path / "merged", progress=False)
    export_adapters(run.path, tmp_path / "adapters")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(IDS).logits, ours, atol=1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapters")
    assert torch.allclose(adapted(IDS).logits, ours, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.decode(tokenizer.encode("fern moss")) == "fern moss"


def test_adapters_without_what_they_belong_to_are_refused(base: RunDirectory, parts: Parts) -> None:
    run = tasks.pretrain(**beginning_with(parts, base.path, LoRA(rank=2)))
    base.path.rename(base.path.with_name("elsewhere"))
    with pytest.raises(ConfigError, match="has only adapters: unknown run"):
        open_weights(run.path)


def test_a_run_without_adapters_has_none_to_export(base: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no adapters"):
        export_adapters(base.path, tmp_path / "out")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", ["mean", "first"])
def test_heads_that_are_alike_are_pooled_without_a_change(groups: int, method: Any, tmp_path: Path) -> None:
    """A grouped-query model written out as multi-head comes back as it was."""
    config = TransformerConfig(
        num_layers=2, hidden_size=24, num_attention_heads=4, num_query_groups=groups, kv_channels=8, vocab_size=257,
        add_bias_linear=True, qk_layernorm="projection", norm_placement="post",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    spread = {}
    for name, tensor in model.state_dict().items():
        if ".linear_qkv." in name:
            q, k, v = tensor.split([32, groups * 8, groups * 8])
            k, v = (x.unflatten(0, (groups, 8)).repeat_interleave(4 // groups, dim=0).flatten(0, 1) for x in (k, v))
            tensor = torch.cat([q, k, v])
        elif "k_layernorm" in name:
            tensor = tensor.unflatten(0, (groups, 8)).repeat_interleave(4 // groups, dim=0).flatten()
        spread[f"transformer.{name}"] = tensor.contiguous()
    multi_head = TransformerConfig(**(asdict(config) | {"num_query_groups": None}))
    with write_folder(tmp_path / "mha") as folder:
        save_file(spread, folder / "model.safetensors")
        write_state(folder, {"config": asdict(multi_head), "step": 0, "val_loss": None})
    assert torch.allclose(loaded(tmp_path / "mha")(IDS), model(IDS), atol=1e-5)
    convert_gqa(tmp_path / "mha", tmp_path / "gqa", groups, method, progress=False)
    assert torch.allclose(loaded(tmp_path / "gqa")(IDS), model(IDS), atol=1e-5)


def test_a_converted_run_goes_on(base: RunDirectory, parts: Parts, tmp_path: Path) -> None:
    convert_gqa(base.path, tmp_path / "mqa", 1, progress=False)
    run = tasks.pretrain(**beginning_with(parts, tmp_path / "mqa"))
    assert open_weights(run.path).config.num_query_groups == 1
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("groups", [0, 2, 3])
def test_groups_that_do_not_divide_are_refused(base: RunDirectory, groups: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"num_query_groups={groups}: the model has 2 key/value heads; allowed: 1"):
        convert_gqa(base.path, tmp_path / "out", groups, progress=False)


def test_an_unknown_method_is_refused(base: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown method 'median'; did you mean 'mean'"):
        convert_gqa(base.path, tmp_path / "out", 1, "median", progress=False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: {f"body.{name}": tensor for name, tensor in tensors.items()}, "embedding.weight: is missing"),
        (lambda tensors: tensors | {"embedding.weight": torch.zeros(3, 4)}, r"embedding.weight: is \[3, 4\], and the"),
        (None, "has no config: a LanguageModel writes it"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_tensors(tmp_path: Path, change: Any, said: str) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4, vocab_size=32, seq_length=8)
    tensors = dict(Transformer(config).state_dict())
    with write_folder(tmp_path / "step-00000001") as folder:
        written = tensors if change is None else change(tensors)
        save_file({f"transformer.{name}": tensor for name, tensor in written.items()}, folder / "model.safetensors")
        write_state(folder, {"step": 1} | ({"config": asdict(config)} if change else {}))
    with pytest.raises(ConfigError, match=said):
        open_weights(tmp_path / "step-00000001")


@pytest.mark.parametrize("part", ["", "weights"])
def test_a_checkpoint_of_nemo_is_answered_with_what_imports_it(tmp_path: Path, part: str) -> None:
    for name in ("weights", "context"):
        (tmp_path / "step=10" / name).mkdir(parents=True)
    said = f"is a checkpoint of NeMo; .* `fiddlehead import nemo {tmp_path / 'step=10'} --out OUT`"
    named = tmp_path / "step=10" / part
    with pytest.raises(ConfigError, match=said):
        find_weights(named)
    with pytest.raises(ConfigError, match=f"^resume='{named}': .*{said}"):
        resume_point(RunDirectory(tmp_path / "runs" / "a"), str(named))
    (tmp_path / "step=10" / "context").rmdir()
    with pytest.raises(ConfigError, match="has no weights"):
        find_weights(named)
