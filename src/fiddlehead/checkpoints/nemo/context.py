"""Reads `context/model.yaml` of NeMo 2.0: the settings of a model, as data, in Megatron-core's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from fiddlehead.checkpoints.nemo.io_json import read_model
from fiddlehead.checkpoints.nemo.tensor_map import MegatronTensors
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.foreign import inside, read_text, reason
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.rope import LinearRopeScaling, RopeScaling, Scaling
from fiddlehead.numbers import is_number, is_whole

Fields = Mapping[str, Any]

MODELS = (
    *("Llama", "CodeLlama", "Mistral", "Mixtral", "Qwen2", "Qwen25", "Qwen3", "Gemma", "Gemma2", "Nemotron"),
    *("Starcoder2", "Phi3", "GPT"),
)
"""The beginnings of the names of NeMo's classes whose models are read."""
_OTHER_MODELS = ("Llama4", "Gemma3", "NemotronH")
"""Classes that begin like these and are others."""
_SAME = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"),
    *("vocab_size", "seq_length", "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma"),
    *("position_embedding_type", "rotary_base", "rotary_percent", "add_bias_linear", "add_qkv_bias"),
    *("share_embeddings_and_output_weights", "window_attn_skip_freq", "attn_logit_softcapping"),
    *("final_logit_softcapping", "softmax_scale", "num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"),
    *("moe_router_pre_softmax", "moe_aux_loss_coeff", "attention_dropout", "hidden_dropout", "init_method_std"),
)
"""The settings that have the same name and meaning here."""
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "multi_latent_attention": (False, None),
    "moe_shared_expert_intermediate_size": (None, 0),
    "moe_layer_freq": (1, None),
    "moe_router_score_function": ("softmax", None),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_topk_scaling_factor": (None, 1, 1.0),
    "moe_router_num_groups": (None, 1),
    "rotary_interleaved": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "heterogeneous_layers_config_path": (None, ""),
    "mtp_num_layers": (None, 0),
    "no_rope_freq": (None, 0),
}
"""Settings that change a model in a way not supported here, with the values that do not."""
_SIZES = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size"),
    *("moe_router_topk", "moe_ffn_hidden_size"),
)
_SMALL = 1 << 16
"""A size that is cheap to try; if it is wrong, the tensors have another shape."""
_FILE = "context/model.yaml"


@dataclass(frozen=True)
class Context:
    """The settings of a model; empty if the checkpoint has no context."""

    file: Path
    settings: Fields
    names: tuple[str, ...]
    """The names of the classes of the model and of its config."""

    @classmethod
    def read(cls, checkpoint: Path) -> Context:
        """Reads the context of a checkpoint.

        Raises:
            ConfigError: it cannot be read, or it is of a model that is not read.
        """
        file = inside(checkpoint, _FILE)
        if file.is_file():
            model = _read(file)
            config = model.get("config")
            config = config if isinstance(config, dict) else {}
        else:
            older = inside(checkpoint, "context/io.json")
            file = older if older.is_file() else checkpoint / "context"
            model, config = read_model(older) if older.is_file() else ({}, {})
        names = tuple(str(each["_target_"]).rpartition(".")[2] for each in (model, config) if "_target_" in each)
        refuse(Problem.in_file(file, f"has a {name}, which is not read; read are: {', '.join(MODELS)}")
               for name in names if not _is_read(name))  # fmt: skip
        return cls(file, config, names)

    def config(self, tensors: MegatronTensors, given: Fields, tokens: int | None) -> tuple[TransformerConfig, bool]:
        """The shape of the model, from the settings, the shapes of the tensors, and what the user gives.

        Args:
            given: fields of `TransformerConfig` that replace those of the settings.
            tokens: the tokenizer's vocabulary; None if there is no tokenizer.

        Returns:
            The shape, and whether 1 is to be added to the weights of the LayerNorms.

        Raises:
            ConfigError: something is not known, or not supported; with all problems.
        """
        names = [each.name for each in fields(TransformerConfig)]
        problems = [Problem.unknown("--set", name, "field", names) for name in given if name not in names]
        for name, values in _PLAIN.items():
            if self.settings.get(name, values[0]) not in values:
                message = f"{name}={self.settings[name]!r} is not supported; only {values[0]!r} is"
                problems.append(Problem.in_file(self.file, message))
        shown = tensors.shapes()
        try:
            ours = shown | self._ours(tensors)
        except ConfigError as error:
            raise ConfigError(*problems, *(Problem.in_file(self.file, each) for each in error.problems)) from error
        if tokens is not None and self.settings.get("vocab_size") is None:
            ours["vocab_size"] = min(tokens, shown["vocab_size"])
        ours |= given
        sizes = _SIZES if ours.get("position_embedding_type") != "learned_absolute" else (*_SIZES, "seq_length")
        problems += [
            Problem(name, ours[name], f"no tensor is as large; the longest side is {tensors.longest}")
            for name in sizes  # before anything of such a size is made
            if is_whole(ours.get(name)) and ours[name] > max(tensors.longest, _SMALL)
        ]
        for name in ("num_layers", "num_moe_experts"):  # before anything is made for each of them
            if ours.get(name) != shown.get(name):
                problems.append(Problem(name, ours.get(name), f"the tensors are those of {shown.get(name)}"))
        problems += [
            Problem("--set", message=f"{self.file} does not say {name}; give --set {name}=VALUE")
            for name in self._needed(ours)
            if name not in ours
        ]
        refuse(problems)
        ours |= {name: value for name, value in tensors.head_shapes(ours).items() if ours.get(name) is None}
        adds_one = ours.get("normalization") == "LayerNorm" and bool(ours.pop("layernorm_zero_centered_gamma", False))
        try:
            return TransformerConfig.from_dict(ours), adds_one
        except ConfigError as error:
            raise ConfigError(*(Problem.in_file(self.file, problem) for problem in error.problems)) from error

    def _needed(self, ours: Fields) -> list[str]:
        """The fields that must be given if the settings do not have them, as the tensors do not show them."""
        needed = ["num_attention_heads", "layernorm_epsilon", "activation"]
        if not self.settings:  # what NeMo leaves out has its default there
            needed.append("layernorm_zero_centered_gamma")
        if ours.get("position_embedding_type", "rope") == "rope":
            needed.append("rotary_base")
        return [*needed, "moe_router_topk"] if ours.get("num_moe_experts") else needed

    def _ours(self, tensors: MegatronTensors) -> dict[str, Any]:
        settings = self.settings
        ours = {name: settings[name] for name in _SAME if settings.get(name) is not None}
        if "activation_func" in settings:
            ours["activation"] = _activation(settings)
        if settings.get("qk_layernorm"):
            ours["qk_layernorm"] = "head"
        if (window := settings.get("window_size")) is not None:
            ours["window_size"] = _window(window)
        if scaling := _scaling(settings):
            ours["rope_scaling"] = scaling
        if any(name.startswith("Gemma") for name in self.names):
            ours["embedding_multiplier"] = math.sqrt(tensors.hidden_size)
        if any(name.startswith("Gemma2") for name in self.names):
            ours.setdefault("window_attn_skip_freq", 2 if "window_size" in ours else None)
            if is_number(scalar := settings.get("query_pre_attn_scalar")) and scalar > 0:
                ours["softmax_scale"] = scalar**-0.5
        return ours


def _is_read(name: str) -> bool:
    begins = [known for known in (*MODELS, *_OTHER_MODELS) if name.startswith(known)]
    return bool(begins) and max(begins, key=len) in MODELS


def _activation(settings: Fields) -> str:
    function = settings["activation_func"]
    name = str(function.get("_target_") if isinstance(function, dict) else function).rpartition(".")[2]
    gated = bool(settings.get("gated_linear_unit"))
    if name == "gelu" and settings.get("bias_activation_fusion", True) is False:
        raise ConfigError(
            Problem("activation_func", name, "without bias_activation_fusion is exact; here is its tanh form")
        )
    known = {"silu": ("", "swiglu"), "swish": ("", "swiglu")}
    known |= dict.fromkeys(("gelu", "openai_gelu", "fast_gelu", "quick_gelu_tanh"), ("gelu", "geglu"))
    known["squared_relu"] = ("squared_relu", "")
    found = known.get(name, ("", ""))[gated]
    if not found:
        allowed = "allowed: silu and gelu with a gate, gelu and squared_relu without"
        raise ConfigError(
            Problem("activation_func", name, f"with gated_linear_unit={gated} is not supported; {allowed}")
        )
    return found


def _window(window: Any) -> tuple[int, int]:
    if not isinstance(window, list | tuple) or len(window) != 2 or not all(is_whole(side) for side in window):
        raise ConfigError(Problem("window_size", window, "must be two whole numbers"))
    # NeMo takes the size from Hugging Face's `sliding_window`, which counts the token itself.
    return (window[0] - 1 if window[0] > 0 else window[0]), window[1]


def _scaling(settings: Fields) -> Scaling | None:
    names = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
    if all(is_number(settings.get(name)) for name in names):  # Llama 3.1 and later
        return RopeScaling(**{name: settings[name] for name in names})
    if settings.get("rope_scaling") is True:
        factor = settings.get("rope_scaling_factor", 8.0)
        return RopeScaling(scale_factor=float(factor) if is_number(factor) else 8.0)
    factor = settings.get("seq_len_interpolation_factor")
    return LinearRopeScaling(scale_factor=float(factor)) if is_number(factor) and factor != 1 else None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = yaml.load(read_text(file, 1 << 20), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(Problem.in_file(file, f"cannot be read: {reason(error)}")) from error
    if not isinstance(found, dict):
        raise ConfigError(Problem.in_file(file, f"must hold a mapping, not a {type(found).__name__}"))
    return found
