"""Adapters: their results and files against PEFT, and the weights that they do not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fiddlehead.errors import ConfigError
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.lora import (
    LoRA,
    LoRALinear,
    adapter_state,
    load_adapter_state,
    merge,
    merge_state,
    reset_adapters,
    save_peft,
    to_peft,
)

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 32,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "vocab_size": 31,
    "init_method_std": 0.2,
}
IDS = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))
LAYERS = [
    f"layers.{i}.{name}"
    for i in range(2)
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
]
BOTH = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def transformer(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**(SMALL | changes)))


def randomize(model: nn.Module) -> None:
    """Draws the adapters, as if they had learned: a new `lora_b` is 0, and hides everything."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in adapter_state(model).items():
        drawn = 0.3 * torch.randn(tensor.shape, generator=generator)
        tensor.copy_(tensor * (1 + drawn) if name.endswith("magnitude") else drawn)


def adapted(lora: LoRA, **changes: Any) -> Transformer:
    model = transformer(**changes)
    lora.apply(model)
    randomize(model)
    return model


def parts() -> dict[str, list[tuple[str, int]]]:
    """What Llama's modules are in Hugging Face's, for SMALL: 6 query and 2 key/value heads of 4 channels."""
    found: dict[str, list[tuple[str, int]]] = {}
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        qkv = [(f"{attention}.q_proj", 24), (f"{attention}.k_proj", 8), (f"{attention}.v_proj", 8)]
        found[f"layers.{i}.self_attention.linear_qkv"] = qkv
        found[f"layers.{i}.self_attention.linear_proj"] = [(f"{attention}.o_proj", 24)]
        found[f"layers.{i}.mlp.linear_fc1"] = [(f"{mlp}.gate_proj", 32), (f"{mlp}.up_proj", 32)]
        found[f"layers.{i}.mlp.linear_fc2"] = [(f"{mlp}.down_proj", 24)]
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@BOTH
def test_a_layer_and_its_gradients_are_pefts(dora: bool, bias: bool, dropout: float) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = LoRALinear(nn.Linear(12, 20, bias=bias), LoRA(rank=3, alpha=7, dropout=dropout, dora=dora))
    config = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout, use_dora=dora, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(12, 20, bias=bias)))[0]
    pairs = [(ours.lora_a, theirs.lora_A.default.weight), (ours.lora_b, theirs.lora_B.default.weight)]
    randomize(nn.ModuleList([ours]))
    if dora:
        assert ours.magnitude is not None
        pairs.append((ours.magnitude, theirs.lora_magnitude_vector.default.weight))
    with torch.no_grad():
        for mine, other in [*pairs, (ours.weight, theirs.base_layer.weight)]:
            other.copy_(mine)
        if bias:
            theirs.base_layer.bias.copy_(ours.bias)

    x, target = torch.randn(5, 12), torch.randn(5, 20)
    outputs = []
    for layer in (ours, theirs):
        torch.manual_seed(3)  # the same channels are dropped
        outputs.append(layer(x))
        ((outputs[-1] - target) ** 2).mean().backward()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for mine, other in pairs:
        assert other.grad.norm() > 1e-3
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)
    ours.eval()
    assert (ours(x) - outputs[0]).abs().max() > 0.1 or not dropout, "dropout was to be seen in training"
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "mixed"])
def test_in_bfloat16_a_layer_is_pefts_under_autocast(autocast: bool) -> None:
    """Its adapters are float32 and so are their gradients, whoever makes the products bfloat16."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Linear(96, 80, bias=False).bfloat16()
    ours = LoRALinear(base, LoRA(rank=8, alpha=16))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(96, 80, bias=False)))[0]
    randomize(nn.ModuleList([ours]))
    pairs = [(ours.lora_a, theirs.lora_A.default.weight), (ours.lora_b, theirs.lora_B.default.weight)]
    with torch.no_grad():
        for mine, other in [*pairs, (ours.weight, theirs.base_layer.weight)]:
            other.copy_(mine)
    x, target = torch.randn(64, 96).bfloat16(), torch.randn(64, 80)
    outputs = []
    for layer, given, enabled in ((ours, x, autocast), (theirs, x.float(), True), (theirs, x.float(), False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(layer(given))
        theirs.zero_grad()
        ((outputs[-1].float() - target) ** 2).mean().backward()
        outputs += [other.grad.clone() for _, other in pairs] if layer is theirs else [mine.grad for mine, _ in pairs]
    assert outputs[0].dtype == torch.bfloat16 and outputs[1].dtype == outputs[2].dtype == torch.float32
    for mine, theirs_too, exact in zip(outputs[:3], outputs[3:6], outputs[6:], strict=True):
        error, allowed = ((each.float() - exact).norm() for each in (mine, theirs_too))
        assert 0 < error < 1.5 * allowed + 1e-6


def test_what_is_frozen_has_no_gradient_and_none_is_computed() -> None:
    model = transformer(attention_backend="reference")
    LoRA(rank=3).apply(model)
    with FlopCounterMode(display=False) as counter:
        model(IDS).sum().backward()
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = model.config.train_flops_per_token(IDS.shape[1], causal=False, adapters=adapters)
    first = model.get_submodule("layers.0.self_attention.linear_qkv")
    assert isinstance(first, LoRALinear)
    # Nothing before the first layer learns: what goes into it gets no gradient.
    spared = 2 * (first.weight.numel() + first.lora_a.numel())
    assert counter.get_total_flops() == IDS.numel() * (flops - spared)


@BOTH
def test_new_adapters_change_nothing_and_alone_learn(dora: bool) -> None:
    model = transformer(add_bias_linear=True)
    names, expected = list(model.state_dict()), model(IDS)
    weight = model.get_parameter("layers.0.mlp.linear_fc1.weight")
    LoRA(rank=3, dora=dora).apply(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    assert model.get_parameter("layers.0.mlp.linear_fc1.weight") is weight

    suffixes = ["lora_a", "lora_b", *(["magnitude"] if dora else [])]
    own = {f"{layer}.{suffix}" for layer in LAYERS for suffix in suffixes}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == own
    assert set(model.state_dict()) == own | set(names)
    assert set(adapter_state(model)) == own
    bound = 1 / 24**0.5  # Kaiming's, with a = sqrt(5): that of nn.Linear
    a = model.get_parameter("layers.0.self_attention.linear_qkv.lora_a")
    assert a.shape == (3, 24) and 0.8 * bound < a.abs().max() < bound


@BOTH
def test_training_moves_the_adapters_only(dora: bool) -> None:
    model = transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    LoRA(rank=3, dora=dora).apply(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("linear_qkv",), [name for name in LAYERS if "qkv" in name]),
        (("layers.0.*.linear_qkv", "*.mlp.*"), [LAYERS[0], *LAYERS[2:4], *LAYERS[6:]]),
        (("layers.1.*",), LAYERS[4:]),
        (("linear_fc?",), [name for name in LAYERS if "fc" in name]),
        (("*", "linear_qkv"), LAYERS),  # not the output layer
    ],
)
def test_patterns_choose_the_layers(patterns: tuple[str, ...], expected: list[str]) -> None:
    model = transformer()
    LoRA(target_modules=patterns).apply(model)
    assert [name for name, module in model.named_modules() if isinstance(module, LoRALinear)] == expected


def test_patterns_without_a_layer_are_refused_together() -> None:
    model = transformer()
    lora = LoRA(target_modules=("linear_kqv", "linear_proj", "layers.2.mlp.linear_fc1", "output_layer", "x"))
    with pytest.raises(ConfigError) as caught:
        lora.apply(model)
    first, second, third, fourth = caught.value.problems
    assert first == "target_modules='linear_kqv': unknown linear layer 'linear_kqv'; did you mean 'linear_qkv'?"
    assert second.startswith("target_modules='layers.2.mlp.linear_fc1': unknown linear layer 'layers.2.mlp.linear_fc1'")
    assert second.endswith("; did you mean 'layers.1.mlp.linear_fc1'?")
    assert "'output_layer' is output_layer, a Linear, which takes no adapter" in third
    assert fourth.endswith("'x'; allowed: linear_qkv, linear_proj, linear_fc1, linear_fc2")
    assert all(parameter.requires_grad for parameter in model.parameters()), "a refused model is left as it was"


def test_experts_take_no_adapters() -> None:
    model = transformer(num_moe_experts=2)
    with pytest.raises(ConfigError, match=r"'linear_fc1' is layers\.0\.mlp\.experts\.linear_fc1, a GroupedLinear") as e:
        LoRA().apply(model)
    assert len(e.value.problems) == 2
    LoRA(target_modules=("linear_qkv", "router")).apply(model)
    assert isinstance(model.get_submodule("layers.1.mlp.router"), LoRALinear)


def test_impossible_values_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        LoRA(rank=0, alpha=1.5, dropout=1.0, target_modules="linear_qkv", dora=1)  # pyright: ignore
    fields = [problem.split("=")[0] for problem in caught.value.problems]
    assert fields == ["rank", "alpha", "dropout", "target_modules", "dora"]
    with pytest.raises(ConfigError, match="at least one"):
        LoRA(target_modules=())


def test_adapters_are_put_on_once() -> None:
    model = adapted(LoRA())
    with pytest.raises(ConfigError, match="adapters already"):
        LoRA().apply(model)


@pytest.mark.parametrize("assign", [True, False], ids=["assigned", "copied"])
@BOTH
def test_a_model_without_memory_takes_a_base_checkpoint(dora: bool, assign: bool) -> None:
    base = transformer()
    with torch.device("meta"):
        model = Transformer(base.config)
        LoRA(rank=3, dora=dora).apply(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict(), assign=assign)
    torch.testing.assert_close(model(IDS), base(IDS), rtol=1e-5, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_state(model))
    randomize(model)
    assert (model(IDS) - base(IDS)).abs().max() > 0.1


def test_weights_drawn_anew_need_new_adapters() -> None:
    model = adapted(LoRA(dora=True))
    model.initialize()
    reset_adapters(model)
    fresh, merged = model(IDS), merge_state(model.state_dict(), LoRA(dora=True))
    base = transformer()
    base.load_state_dict(merged)
    torch.testing.assert_close(base(IDS), fresh, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged["layers.0.mlp.linear_fc1.weight"], model.layers[0].mlp.linear_fc1.weight)  # pyright: ignore


def test_a_checkpoint_with_some_of_the_adapters_is_refused() -> None:
    model = adapted(LoRA(dora=True))
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = adapted(LoRA(dora=True, target_modules=("linear_qkv",)))
    with pytest.raises(RuntimeError, match=r"Missing key.*linear_proj\.lora_a"):
        model.load_state_dict(other.state_dict())
    model.load_state_dict({}, strict=False)
    assert torch.equal(model.layers[1].mlp.linear_fc2.lora_b, saved["layers.1.mlp.linear_fc2.lora_b"])  # pyright: ignore
    model.load_state_dict(saved)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name])


@BOTH
def test_a_merged_model_is_ordinary_and_computes_the_same(dora: bool) -> None:
    lora = LoRA(rank=3, dora=dora, target_modules=("linear_qkv", "linear_fc2"))
    model = adapted(lora, add_bias_linear=True).double().eval()
    expected, state = model(IDS), merge_state(model.state_dict(), lora)
    base = transformer(add_bias_linear=True).double()
    assert (base(IDS) - expected).abs().max() > 0.1, "the adapters were to matter"
    base.load_state_dict(state)
    torch.testing.assert_close(base(IDS), expected, rtol=1e-9, atol=1e-9)

    merge(model)
    assert not any(isinstance(module, LoRALinear) or module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == list(state) == list(base.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    lora.apply(model)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(IDS), expected, rtol=1e-9, atol=1e-9)


@BOTH
def test_bfloat16_weights_have_float32_adapters_and_merge_in_float32(dora: bool) -> None:
    lora = LoRA(rank=3, dora=dora)
    model = transformer().bfloat16()
    lora.apply(model)
    randomize(model)
    assert {tensor.dtype for tensor in adapter_state(model).values()} == {torch.float32}
    assert model(IDS).dtype == torch.bfloat16
    state = model.state_dict()
    exact = {name: tensor.double() for name, tensor in state.items()}
    for name, tensor in merge_state(exact, lora).items():
        assert torch.equal(merge_state(state, lora)[name], tensor.bfloat16()), name


@BOTH
def test_autocast_costs_no_more_than_in_an_ordinary_model(dora: bool) -> None:
    lora = LoRA(rank=3, alpha=2, dora=dora, dropout=0.1)
    model, ordinary = adapted(lora).eval(), transformer()
    ordinary.load_state_dict(merge_state(model.state_dict(), lora))
    expected = model(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        for name, tensor in merge_state(model.state_dict(), lora).items():
            assert torch.equal(tensor, ordinary.state_dict()[name]), name
        found, reference = model(IDS), ordinary(IDS)
        model.train()(IDS).float().sum().backward()
    assert found.dtype == torch.bfloat16
    assert 0 < (found - expected).norm() < 2 * (reference - expected).norm() < 0.2 * expected.norm()
    for name in adapter_state(model):
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.dtype == torch.float32 and gradient.norm() > 0


def test_a_model_without_memory_has_a_forward_pass() -> None:
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(4, 6), LoRA(dora=True, dropout=0.1))
    assert layer(torch.empty(2, 4, device="meta")).shape == (2, 6)


@BOTH
def test_adapters_are_loaded_or_refused(dora: bool) -> None:
    model, other = adapted(LoRA(rank=3, dora=dora)), transformer()
    LoRA(rank=3, dora=dora).apply(other)
    load_adapter_state(other, {name: tensor.bfloat16() for name, tensor in adapter_state(model).items()})
    for name, tensor in adapter_state(model).items():
        found = adapter_state(other)[name]
        assert torch.equal(found, tensor.bfloat16().float())

    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    first, second, third = "layers.0.mlp.linear_fc1.lora_a", "layers.0.mlp.linear_fc1.lora_b", "layers.9.lora_a"
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items() if name != first}
    wrong |= {second: torch.zeros(64, 5), third: torch.zeros(1)}
    with pytest.raises(ConfigError) as caught:
        load_adapter_state(model, wrong)
    assert sorted(caught.value.problems) == [
        f"{first}: is missing among the adapters, and (3, 24) in the model",
        f"{second}: is (64, 5) among the adapters, and (64, 3) in the model",
        f"{third}: is (1,) among the adapters, and missing in the model",
    ]
    assert all(torch.equal(tensor, state[name]) for name, tensor in adapter_state(model).items())


def llama(model: Transformer) -> Any:
    """Hugging Face's Llama with the weights of a model of SMALL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=model.config.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.config.rotary_base},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    weights = hf_weights(model.state_dict())
    theirs.load_state_dict(weights)
    return theirs


def hf_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"embedding": "model.embed_tokens", "final_layernorm": "model.norm", "output_layer": "lm_head"}
    for i in range(2):
        names[f"layers.{i}.input_layernorm"] = f"model.layers.{i}.input_layernorm"
        names[f"layers.{i}.pre_mlp_layernorm"] = f"model.layers.{i}.post_attention_layernorm"
    weights = {f"{there}.weight": state[f"{here}.weight"] for here, there in names.items()}
    for layer, modules in parts().items():
        rows = state[f"{layer}.weight"].split([rows for _, rows in modules])
        weights |= {f"{module}.weight": own for (module, _), own in zip(modules, rows, strict=True)}
    return weights


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 asks for it
@pytest.mark.parametrize(
    "patterns", [("linear_*",), ("linear_qkv", "layers.1.*.linear_fc1")], ids=["everywhere", "in some layers"]
)
@BOTH
def test_peft_reads_the_adapters(dora: bool, patterns: tuple[str, ...], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, lora = transformer(), LoRA(rank=3, alpha=5, dora=dora, dropout=0.1, target_modules=patterns)
    theirs = llama(base)
    model = adapted(lora).eval()
    torch.testing.assert_close(theirs(IDS).logits, base(IDS), rtol=1e-5, atol=1e-5)

    save_peft(tmp_path / "adapter", *to_peft(adapter_state(model), parts(), lora))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert (base(IDS) - model(IDS)).abs().max() > 0.1, "the adapters were to matter"
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-5, atol=1e-5)

    merge(model)
    merged = theirs.merge_and_unload().state_dict()
    expected = hf_weights(model.state_dict())
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text)


def test_the_files_are_pefts(tmp_path: Path) -> None:
    lora = LoRA(rank=3, alpha=5, dora=True, dropout=0.1, target_modules=("linear_qkv", "layers.1.*.linear_fc2"))
    tensors, config = to_peft(adapter_state(adapted(lora)), parts(), lora, "meta-llama/Llama-3.2-1B")
    save_peft(tmp_path / "new" / "folder", tensors, config)
    assert json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "meta-llama/Llama-3.2-1B",
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "target_modules": ["k_proj", "model.layers.1.mlp.down_proj", "q_proj", "v_proj"],
        "use_dora": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    prefix = "base_model.model.model.layers.1.self_attn.k_proj"
    assert shapes[f"{prefix}.lora_A.weight"] == (3, 24)
    assert shapes[f"{prefix}.lora_B.weight"] == (8, 3)
    assert shapes[f"{prefix}.lora_magnitude_vector"] == (8,)
    assert len(shapes) == 3 * (2 * 3 + 1)


def test_parts_that_do_not_fit_are_refused() -> None:
    lora, wrong = LoRA(target_modules=("linear_qkv", "linear_fc1")), parts()
    del wrong["layers.0.self_attention.linear_qkv"]
    wrong["layers.1.mlp.linear_fc1"] = [("model.layers.1.mlp.up_proj", 32)]
    with pytest.raises(ConfigError) as caught:
        to_peft(adapter_state(adapted(lora)), wrong, lora)
    first, second = caught.value.problems
    assert "layers.0.self_attention.linear_qkv" in first and "40 rows" in first
    assert "layers.1.mlp.linear_fc1" in second and "64 rows" in second
