"""Writes models of transformers as NeMo 2.0 writes them: Megatron-core's names, by PyTorch's own distributed writer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint import state_dict_saver

FUNCTIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu_pytorch_tanh": "nemo.collections.llm.fn.activation.openai_gelu",
    "relu2": "nemo.collections.llm.fn.activation.squared_relu",
}


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """Queries, keys and values as Megatron has them: for each group its queries, its key, its value."""
    D, rest = q.shape[0] // heads, q.shape[1:]
    rows = []
    for group in range(groups):
        for head in range(heads // groups):
            first = (group * (heads // groups) + head) * D
            rows.append(q[first : first + D])
        rows += [k[group * D : (group + 1) * D], v[group * D : (group + 1) * D]]
    return torch.cat(rows).reshape(-1, *rest)


def layer_tensors(model: Any, number: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer by Megatron's names."""
    config, state = model.config, model.state_dict()
    H, G = config.num_attention_heads, config.num_key_value_heads

    def theirs(name: str) -> torch.Tensor | None:
        return state.get(f"model.layers.{number}.{name}")

    found: dict[str, torch.Tensor | None] = {}
    for kind in ("weight", "bias"):
        q, k, v = (theirs(f"self_attn.{part}_proj.{kind}") for part in "qkv")
        if q is not None and k is not None and v is not None:
            found[f"self_attention.linear_qkv.{kind}"] = grouped(q, k, v, H, G)
        found[f"self_attention.linear_proj.{kind}"] = theirs(f"self_attn.o_proj.{kind}")
        found[f"self_attention.linear_qkv.layer_norm_{kind}"] = theirs(f"input_layernorm.{kind}")
        for part in ("q", "k"):
            found[f"self_attention.{part}_layernorm.{kind}"] = theirs(f"self_attn.{part}_norm.{kind}")
        gate, up = theirs(f"mlp.gate_proj.{kind}"), theirs(f"mlp.up_proj.{kind}")
        found[f"mlp.linear_fc1.{kind}"] = up if gate is None or up is None else torch.cat([gate, up])
        found[f"mlp.linear_fc2.{kind}"] = theirs(f"mlp.down_proj.{kind}")
        after = theirs(f"post_attention_layernorm.{kind}")
        before_mlp = theirs(f"pre_feedforward_layernorm.{kind}")
        if before_mlp is not None:  # Gemma 2
            found[f"self_attention.linear_proj.post_layernorm.{kind}"] = after
            found[f"mlp.linear_fc1.layer_norm_{kind}"] = before_mlp
            found[f"mlp.linear_fc2.post_layernorm.{kind}"] = theirs(f"post_feedforward_layernorm.{kind}")
        elif theirs("mlp.gate.weight") is not None:  # experts
            found[f"pre_mlp_layernorm.{kind}"] = after
        else:
            found[f"mlp.linear_fc1.layer_norm_{kind}"] = after
    found["mlp.router.weight"] = theirs("mlp.gate.weight")
    found["mlp.experts.experts.linear_fc1.weight"] = theirs("mlp.experts.gate_up_proj")
    found["mlp.experts.experts.linear_fc2.weight"] = theirs("mlp.experts.down_proj")
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def tensors(model: Any, *, stacked: bool = True, padding: int = 0, experts: str = "stacked") -> dict[str, torch.Tensor]:
    """All tensors by Megatron's names; with `stacked`, equal layers are one tensor."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    embedding = state["model.embed_tokens.weight"]
    extra = torch.randn(padding, embedding.shape[1], dtype=embedding.dtype)
    found = {"embedding.word_embeddings.weight": torch.cat([embedding, extra])}
    found |= {
        f"decoder.final_layernorm.{kind}": state[f"model.norm.{kind}"]
        for kind in ("weight", "bias")
        if f"model.norm.{kind}" in state
    }
    if not model.config.tie_word_embeddings:
        found["output_layer.weight"] = torch.cat([state["lm_head.weight"], extra])
    layers = [layer_tensors(model, number) for number in range(model.config.num_hidden_layers)]
    if experts != "stacked":
        layers = [apart(layer, experts) for layer in layers]
    if stacked:
        found |= {f"decoder.layers.{name}": torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    else:
        found |= {
            f"decoder.layers.{n}.{name}": tensor for n, layer in enumerate(layers) for name, tensor in layer.items()
        }
    return {f"module.{name}": tensor.clone() for name, tensor in found.items()}


def apart(layer: dict[str, torch.Tensor], pattern: str) -> dict[str, torch.Tensor]:
    """The experts of a layer each by themselves, such as `mlp.experts.local_experts.{expert}.{linear}.weight`."""
    found = {}
    for name, tensor in layer.items():
        if name.startswith("mlp.experts."):
            linear = name.split(".")[-2]
            found |= {pattern.format(expert=e, linear=linear): each for e, each in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def settings(model: Any, **changes: Any) -> dict[str, Any]:
    """The content of `context/model.yaml` for a model of transformers."""
    config, kind = model.config, type(model).__name__.removesuffix("ForCausalLM")
    rope = config.rope_parameters
    gated = "model.layers.0.mlp.gate_proj.weight" in model.state_dict() or hasattr(config, "num_local_experts")
    found: dict[str, Any] = {
        "_target_": f"nemo.collections.llm.gpt.model.{kind.lower()}.{kind}Config",
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None),
        "layernorm_epsilon": getattr(config, "rms_norm_eps", None) or config.norm_eps,
        "normalization": "LayerNorm" if kind == "Nemotron" else "RMSNorm",
        "layernorm_zero_centered_gamma": kind in ("Gemma2", "Nemotron"),
        "activation_func": {
            "_target_": FUNCTIONS[getattr(config, "hidden_activation", None) or config.hidden_act],
            "_call_": False,
        },
        "gated_linear_unit": gated,
        "add_bias_linear": False,
        "add_qkv_bias": kind == "Qwen2",
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
        "rotary_interleaved": False,
        "seq_length": config.max_position_embeddings,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "params_dtype": {"_target_": "torch.float32", "_call_": False},
        "num_moe_experts": getattr(config, "num_local_experts", None),
        "moe_router_topk": getattr(config, "num_experts_per_tok", 2),
        "multi_latent_attention": False,
    }
    if kind == "Gemma2":
        found |= {
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    if getattr(config, "sliding_window", None) is not None and kind != "Qwen2":
        found["window_size"] = [config.sliding_window, 0]
    if rope.get("rope_type") == "llama3":
        found |= {
            "scale_factor": rope["factor"],
            "low_freq_factor": rope["low_freq_factor"],
            "high_freq_factor": rope["high_freq_factor"],
            "old_context_len": rope["original_max_position_embeddings"],
        }
    model_class = f"nemo.collections.llm.gpt.model.{kind.lower()}.{kind}Model"
    return {"_target_": model_class, "config": found | changes, "optim": {"_target_": "x.Y"}, "tokenizer": None}


def write(folder: Path, tensors: dict[str, Any], context: dict[str, Any] | None) -> Path:
    """Writes a checkpoint with these tensors, and `context/model.yaml` unless it is None."""
    extra = {"module.decoder.layers.self_attention.linear_qkv._extra_state": {"any": "bytes"}}
    optimizer = {"optimizer.state.exp_avg.module.embedding.word_embeddings.weight": torch.zeros(3, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        state_dict_saver.save(tensors | extra | optimizer, checkpoint_id=folder / "weights")
    if context is not None:
        (folder / "context").mkdir()
        (folder / "context/model.yaml").write_text(yaml.safe_dump(context))
    return folder
