"""The decoder against the models of Hugging Face transformers with the same weights: logits and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fiddlehead.models import RopeScaling, Transformer, TransformerConfig

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")

VOCABULARY, LAYERS = 61, 3
Weights = dict[str, torch.Tensor]


def llama_weights(hf: Weights) -> Weights:
    """Hugging Face's Llama weights under this package's names; also maps their gradients."""
    ours = {
        "embedding.weight": hf["model.embed_tokens.weight"],
        "final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    for i in range(LAYERS):
        here, there = f"layers.{i}", f"model.layers.{i}"
        ours[f"{here}.input_layernorm.weight"] = hf[f"{there}.input_layernorm.weight"]
        ours[f"{here}.pre_mlp_layernorm.weight"] = hf[f"{there}.post_attention_layernorm.weight"]
        qkv = [hf[f"{there}.self_attn.{name}_proj.weight"] for name in "qkv"]
        ours[f"{here}.self_attention.linear_qkv.weight"] = torch.cat(qkv)
        ours[f"{here}.self_attention.linear_proj.weight"] = hf[f"{there}.self_attn.o_proj.weight"]
        gate_up = [hf[f"{there}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        ours[f"{here}.mlp.linear_fc1.weight"] = torch.cat(gate_up)
        ours[f"{here}.mlp.linear_fc2.weight"] = hf[f"{there}.mlp.down_proj.weight"]
    return ours


def gpt2_weights(hf: Weights) -> Weights:
    """Hugging Face's GPT-2 weights under this package's names; its matrices are stored (in, out)."""
    ours = {"embedding.weight": hf["transformer.wte.weight"], "position_embedding.weight": hf["transformer.wpe.weight"]}
    names = {
        "input_layernorm": "ln_1",
        "self_attention.linear_qkv": "attn.c_attn",
        "self_attention.linear_proj": "attn.c_proj",
        "pre_mlp_layernorm": "ln_2",
        "mlp.linear_fc1": "mlp.c_fc",
        "mlp.linear_fc2": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        ours[f"final_layernorm.{kind}"] = hf[f"transformer.ln_f.{kind}"]
        for i in range(LAYERS):
            for here, there in names.items():
                tensor = hf[f"transformer.h.{i}.{there}.{kind}"]
                ours[f"layers.{i}.{here}.{kind}"] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
    return ours


def llama() -> tuple[Any, TransformerConfig]:
    # A head dim that is not hidden / heads, an odd vocabulary, a base and an epsilon that are nobody's default.
    theirs = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=3,
        head_dim=6,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    ours = TransformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        ffn_hidden_size=56,
        num_layers=LAYERS,
        num_attention_heads=12,
        num_query_groups=3,
        kv_channels=6,
        layernorm_epsilon=1e-3,
        rotary_base=500.0,
    )
    return transformers.LlamaForCausalLM(theirs), ours


def llama31() -> tuple[Any, TransformerConfig]:
    """Its three channel pairs turn 10, 1.3 and 0.2 times in 64 positions: kept, in between, and slowed down."""
    model, ours = llama()
    scaling = {"factor": 5.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope = {"rope_type": "llama3", "rope_theta": 500.0, **scaling}
    theirs = transformers.LlamaConfig(**(model.config.to_dict() | {"rope_parameters": rope}))
    return transformers.LlamaForCausalLM(theirs), replace(
        ours, rope_scaling=RopeScaling(scale_factor=5.0, low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=64)
    )


def mistral() -> tuple[Any, TransformerConfig]:
    model, ours = llama()
    theirs = transformers.MistralConfig(**(model.config.to_dict() | {"model_type": "mistral", "sliding_window": 5}))
    return transformers.MistralForCausalLM(theirs), replace(ours, window_size=(4, 0))


def gpt2() -> tuple[Any, TransformerConfig]:
    theirs = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=20,
        n_embd=36,
        n_layer=LAYERS,
        n_head=6,
        n_inner=50,
        layer_norm_epsilon=1e-3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    ours = TransformerConfig(
        vocab_size=VOCABULARY,
        seq_length=20,
        hidden_size=36,
        ffn_hidden_size=50,
        num_layers=LAYERS,
        num_attention_heads=6,
        layernorm_epsilon=1e-3,
        normalization="LayerNorm",
        activation="gelu",
        position_embedding_type="learned_absolute",
        add_bias_linear=True,
        share_embeddings_and_output_weights=True,
    )
    return transformers.GPT2LMHeadModel(theirs), ours


def randomize(model: torch.nn.Module) -> None:
    """Draws every parameter, norms and biases too: initial ones hide a swap, and leave the logits near zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = spread + (1 if parameter.dim() == 1 else 0)


@pytest.mark.parametrize("backend", ["sdpa_flash", "reference"])
@pytest.mark.parametrize(
    ("family", "mapped"),
    [(llama, llama_weights), (llama31, llama_weights), (mistral, llama_weights), (gpt2, gpt2_weights)],
    ids=["llama", "llama31", "mistral", "gpt2"],
)
def test_logits_and_gradients_are_equal(
    family: Callable[[], tuple[Any, TransformerConfig]], mapped: Callable[[Weights], Weights], backend: str
) -> None:
    hf_model, config = family()
    randomize(hf_model)
    model = Transformer(replace(config, attention_backend=backend))
    model.load_state_dict(mapped(dict(hf_model.named_parameters()) | dict(hf_model.state_dict())))
    ids = torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))

    expected, found = hf_model(ids).logits, model(ids)
    assert expected.std() > 0.5, "logits near zero would agree whatever the model does"
    assert_near(found, expected, "logits")

    for logits in (expected, found):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in hf_model.named_parameters()}
    for name, gradient in mapped(gradients).items():
        found_gradient = model.get_parameter(name).grad
        assert found_gradient is not None and gradient.norm() > 0
        assert_near(found_gradient, gradient, name)


def assert_near(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """To 1e-5 of the tensor's largest value."""
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"{name}: relative error {error:.1e}"
