"""Hugging Face's model families: which of their tensors and settings are which of ours.

A family is data. `modules` says which modules of Hugging Face's hold what one of ours holds, one after another, and
`settings` which field of its `config.json` is which field of `TransformerConfig`; what takes more thought than a new
name is a pair of functions, one for each direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fiddlehead.checkpoints.huggingface.family_defaults import Fields, completed
from fiddlehead.errors import ConfigError, unknown
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.rope import LinearRopeScaling, LongRopeScaling, RopeScaling, Scaling, YarnRopeScaling
from fiddlehead.numbers import is_number

Modules = Mapping[str, str | tuple[str, ...]]

SETTINGS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}

_LAYER, _ATTENTION, _MLP = "model.layers.*.", "model.layers.*.self_attn.", "model.layers.*.mlp."
LLAMA_MODULES: Modules = {
    "embedding": "model.embed_tokens",
    "final_layernorm": "model.norm",
    "output_layer": "lm_head",
    "layers.*.input_layernorm": _LAYER + "input_layernorm",
    "layers.*.pre_mlp_layernorm": _LAYER + "post_attention_layernorm",
    "layers.*.self_attention.linear_qkv": (_ATTENTION + "q_proj", _ATTENTION + "k_proj", _ATTENTION + "v_proj"),
    "layers.*.self_attention.q_layernorm": _ATTENTION + "q_norm",
    "layers.*.self_attention.k_layernorm": _ATTENTION + "k_norm",
    "layers.*.self_attention.linear_proj": _ATTENTION + "o_proj",
    "layers.*.mlp.linear_fc1": (_MLP + "gate_proj", _MLP + "up_proj"),
    "layers.*.mlp.linear_fc2": _MLP + "down_proj",
}


_MAX_POSITIONS = 1 << 40


def _nothing(_: Any) -> Fields:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face's."""

    model_type: str
    architecture: str
    modules: Modules = field(default_factory=lambda: LLAMA_MODULES)
    """The names of their modules (or single parameters) for each of ours, with * for the number of a layer and # for
    that of an expert. What several of theirs hold lies one after another in ours, row by row."""
    transposed: tuple[str, ...] = ()
    """Ends of the names of those parameters of ours that are stored (in, out) there."""
    interleaved: tuple[str, ...] = ()
    """The same of those of which a gate's rows and the other projection's are stored there in turns."""
    ignored: tuple[str, ...] = ()
    """Ends of the names of tensors that hold no parameter."""
    fixed: Fields = field(default_factory=dict)
    """Fields of `TransformerConfig` that are the same in all models of the family."""
    settings: Mapping[str, str] = field(default_factory=lambda: SETTINGS)
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that `config.json` may have for a setting, each with its usual one."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Settings that change a model in a way not known here, and the values that do not, the default first."""
    read: Callable[[Fields], Fields] = _nothing
    """From settings to fields of `TransformerConfig`, for what is more than a new name."""
    write: Callable[[TransformerConfig], Fields] = _nothing
    """The same back."""

    def config(self, settings: Fields) -> TransformerConfig:
        """The model that a `config.json` describes.

        Raises:
            ConfigError: it says something that no model here can be.
        """
        twice = [
            f"{name}={settings[name]!r}: is the same setting as {usual}={settings[usual]!r}"
            for name, usual in self.aliases.items()
            if name in settings and settings.get(usual, settings[name]) != settings[name]
        ]
        settings = {self.aliases.get(name, name): value for name, value in settings.items()}
        problems = twice + [
            f"{name}={settings[name]!r}: allowed: {', '.join(map(repr, values))}"
            for name, values in self.required.items()
            if settings.get(name, values[0]) not in values
        ]
        if settings.get("quantization_config"):
            problems.append(
                "quantization_config: quantized weights are not read; load them with transformers, dequantized, and "
                "save them from there"
            )
        try:
            settings = completed(self.model_type, settings)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(*problems)
        given = {ours: settings.get(theirs) for theirs, ours in self.settings.items()}
        renamed = {name: value for name, value in given.items() if value is not None}
        fields = renamed | self.fixed | self.read(settings)
        if fields.get("num_query_groups") == fields["num_attention_heads"]:
            fields["num_query_groups"] = None
        if fields.get("kv_channels") and fields["kv_channels"] * fields["num_attention_heads"] == fields["hidden_size"]:
            fields["kv_channels"] = None
        return TransformerConfig(**fields)

    def config_json(self, config: TransformerConfig) -> Fields:
        """What `config.json` says of a model; the opposite of `config`."""
        values: Fields = {"architectures": [self.architecture], "model_type": self.model_type}
        values |= {name: options[0] for name, options in self.required.items()}
        explicit = replace(
            config,
            num_query_groups=config.groups,
            kv_channels=config.head_dim,
            ffn_hidden_size=config.ffn_size,
            moe_ffn_hidden_size=config.expert_size,
        )
        values |= {theirs: getattr(explicit, ours) for theirs, ours in self.settings.items()}
        return values | self.write(config)

    def expresses(self, config: TransformerConfig) -> bool:
        """Whether the family has a model of this shape."""
        try:
            return same_model(self.config(self.config_json(config)), config)
        except (ConfigError, KeyError):
            return False


_INCIDENTAL = (
    *("attention_backend", "attention_dropout", "hidden_dropout", "init_method_std", "moe_aux_loss_coeff"),
    *("window_size", "window_attn_skip_freq", "rotary_base", "rotary_base_local", "rotary_percent", "rope_scaling"),
    *("num_query_groups", "kv_channels", "ffn_hidden_size", "moe_ffn_hidden_size"),
)


def same_model(one: TransformerConfig, other: TransformerConfig) -> bool:
    """Whether two configurations compute the same, dropout left aside."""

    def essence(config: TransformerConfig) -> Fields:
        layers = range(config.num_layers)
        uses_rope = config.position_embedding_type == "rope"
        return {name: value for name, value in asdict(config).items() if name not in _INCIDENTAL} | {
            "add_qkv_bias": config.add_qkv_bias or config.add_bias_linear,
            "softmax_scale": config.softmax_scale or config.head_dim**-0.5,
            "heads": (config.groups, config.head_dim),
            "width": config.ffn_size if config.num_moe_experts is None else config.expert_size,
            "moe_router_topk": config.num_moe_experts and config.moe_router_topk,
            "windows": [config.window(layer) for layer in layers],
            "rotary": [config.rotary(layer) for layer in layers] if uses_rope else None,
        }

    return essence(one) == essence(other)


def family_of(settings: Fields, where: str) -> Family:
    """The family that a `config.json` belongs to.

    Raises:
        ConfigError: it is none of those known here.
    """
    model_type = str(settings.get("model_type"))
    if model_type not in FAMILIES:
        raise ConfigError(f"{where}: model_type={model_type!r}: {unknown('family', model_type, list(FAMILIES))}")
    return FAMILIES[model_type]


def family_for(config: TransformerConfig) -> Family:
    """The first family that has a model of this shape.

    Raises:
        ConfigError: none has.
    """
    for family in FAMILIES.values():
        if family.expresses(config):
            return family
    raise ConfigError(f"no Hugging Face family has a model of this shape; known: {', '.join(FAMILIES)}")


# -- what several families share


_KINDS_OF_LAYER = ("full_attention", "sliding_attention")


def _read_rope(settings: Fields) -> Fields:
    """What the rotary positions of all layers are; the older `rope_scaling` counts before `rope_parameters`."""
    parameters = settings["rope_scaling"] or settings["rope_parameters"] or {}
    if nested := [kind for kind in _KINDS_OF_LAYER if kind in parameters]:
        raise ConfigError(f"rope_parameters: differ between layers ({', '.join(nested)}); only Gemma 3's may")
    return _rotary(parameters, settings)


def _rotary(parameters: Fields, settings: Fields) -> Fields:
    older = ("rope_theta", "partial_rotary_factor")
    parameters = {name: settings[name] for name in older if settings.get(name) is not None} | parameters
    part = parameters.get("partial_rotary_factor", 1.0)
    if part != 1.0 and settings["model_type"] != "phi3":
        raise ConfigError(f"partial_rotary_factor={part!r}: only Phi-3 has it")
    base = _number(parameters, "rope_theta")
    return {"rotary_base": float(base), "rotary_percent": part, "rope_scaling": _scaling(parameters, settings)}


def _number(parameters: Fields, name: str) -> float:
    value = parameters.get(name)
    if not is_number(value):
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        raise ConfigError(f"rope_parameters.{name}={value!r}: must be a number; rope_type={kind!r} needs it")
    return value


def _factors(parameters: Fields, name: str) -> tuple[float, ...]:
    values = parameters.get(name)
    if not isinstance(values, list) or not all(map(is_number, values)):
        raise ConfigError(f"rope_parameters.{name}={values!r}: must be a list of numbers")
    return tuple(values)


def _scaling(parameters: Fields, settings: Fields) -> Scaling | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if settings["model_type"] == "phi3" and kind in ("su", "yarn"):  # as Phi-3 first called it
        kind = "longrope"
    if settings["model_type"] == "phi3" and kind not in ("default", "longrope"):
        raise ConfigError(f"rope_type={kind!r}: Phi-3 has 'default' or 'longrope'")
    # Beside the parameters it counts before what is among them.
    longest = settings["max_position_embeddings"]
    original = settings.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    original = original or longest
    for name, value in (("max_position_embeddings", longest), ("original_max_position_embeddings", original)):
        if not is_number(value) or not 1 <= value < _MAX_POSITIONS:
            raise ConfigError(f"{name}={value!r}: must be a whole number of 1 or more, below {_MAX_POSITIONS}")
    factor = longest / original
    by_length = kind == "longrope" or (kind == "yarn" and "factor" in parameters)
    if kind in ("linear", "llama3", "yarn", "longrope") and not (by_length and parameters.get("factor") is None):
        factor = _number(parameters, "factor")
    match kind:
        case "default":
            return None
        case "linear":
            return LinearRopeScaling(scale_factor=factor)
        case "llama3":
            return RopeScaling(
                scale_factor=factor,
                low_freq_factor=_number(parameters, "low_freq_factor"),
                high_freq_factor=_number(parameters, "high_freq_factor"),
                old_context_len=original,
            )
        case "yarn":
            scaling = YarnRopeScaling(
                scale_factor=factor,
                old_context_len=original,
                beta_fast=parameters.get("beta_fast") or 32.0,
                beta_slow=parameters.get("beta_slow") or 1.0,
                mscale=parameters.get("attention_factor"),
                truncate=parameters.get("truncate", True),
            )
            over, under = (parameters.get(name) and _number(parameters, name) for name in ("mscale", "mscale_all_dim"))
            if scaling.mscale is None and over and under:
                growth = 0.1 * math.log(max(scaling.scale_factor, 1.0))
                scaling = replace(scaling, mscale=(over * growth + 1) / (under * growth + 1))
            return scaling
        case "longrope":
            return LongRopeScaling(
                short_factor=_factors(parameters, "short_factor"),
                long_factor=_factors(parameters, "long_factor"),
                scale_factor=factor,
                old_context_len=original,
                mscale=parameters.get("attention_factor"),
            )
    allowed = ("default", "linear", "llama3", "yarn", "longrope")
    raise ConfigError(f"rope_type={kind!r}: {unknown('kind of rotary positions', str(kind), allowed)}")


def _write_rope(config: TransformerConfig) -> Fields:
    """`rope_parameters`, and the same the older way for tools that know only that."""
    base, scaling = config.rotary_base, config.rope_scaling
    scaled: Fields | None = None
    match scaling:
        case LinearRopeScaling():
            scaled = {"rope_type": "linear", "factor": scaling.scale_factor}
        case RopeScaling():
            scaled = {
                "rope_type": "llama3",
                "factor": scaling.scale_factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.old_context_len,
            }
        case YarnRopeScaling():
            scaled = {
                "rope_type": "yarn",
                "factor": scaling.scale_factor,
                "original_max_position_embeddings": scaling.old_context_len,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
        case LongRopeScaling():
            scaled = {
                "rope_type": "longrope",
                "factor": scaling.scale_factor,
                "short_factor": list(scaling.short_factor),
                "long_factor": list(scaling.long_factor),
                "original_max_position_embeddings": scaling.old_context_len,
            }
    if scaled and (mscale := getattr(scaling, "mscale", None)) is not None:
        scaled["attention_factor"] = mscale
    parameters: Fields = {"rope_type": "default", "rope_theta": base} | (scaled or {})
    if config.rotary_percent != 1.0:
        parameters["partial_rotary_factor"] = config.rotary_percent
    return {"rope_parameters": parameters, "rope_theta": base, "rope_scaling": scaled}


def _read_window(settings: Fields) -> Fields:
    return _read_rope(settings) | {"window_size": _window_size(settings)}


def _window_size(settings: Fields) -> tuple[int, int] | None:
    window = settings["sliding_window"]
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise ConfigError(f"sliding_window={window!r}: must be a whole number of 1 or more, or null")
    return None if window is None else (window - 1, 0)


def _write_window(config: TransformerConfig) -> Fields:
    return _write_rope(config) | {"sliding_window": _sliding_window(config)}


def _sliding_window(config: TransformerConfig) -> int | None:
    return None if config.window_size is None else config.window_size[0] + 1


def _layer_types(config: TransformerConfig) -> list[str]:
    windows = (config.window(layer) for layer in range(config.num_layers))
    return ["full_attention" if window == (-1, -1) else "sliding_attention" for window in windows]


def _read_layer_types(settings: Fields, types: list[str] | None) -> Fields:
    """The window, and which layers have it: as a number where it is every N-th layer that has none."""
    if types is not None and (other := sorted({str(kind) for kind in types} - set(_KINDS_OF_LAYER))):
        raise ConfigError(f"layer_types: {', '.join(other)}: allowed: {', '.join(_KINDS_OF_LAYER)}")
    if types is not None and len(types) != settings["num_hidden_layers"]:
        raise ConfigError(f"layer_types has {len(types)} names; num_hidden_layers={settings['num_hidden_layers']!r}")
    fields: Fields = {"window_size": _window_size(settings)}
    if fields["window_size"] is None or types is None or "sliding_attention" not in types:
        return {"window_size": None}
    marks = tuple(int(kind == "sliding_attention") for kind in types)
    for every in (2, 3, 4, 5, 6, 7, 8):
        if marks == tuple(int((layer + 1) % every != 0) for layer in range(len(marks))):
            return fields | {"window_attn_skip_freq": every}
    return fields | {"window_attn_skip_freq": None if all(marks) else marks}


def _types(settings: Fields, has_window: Callable[[int], bool]) -> list[str]:
    return [_KINDS_OF_LAYER[has_window(layer)] for layer in range(settings["num_hidden_layers"])]


# -- the families


def _read_llama(settings: Fields) -> Fields:
    biases = [settings[name] for name in ("attention_bias", "mlp_bias")]
    if biases[0] != biases[1]:
        raise ConfigError(f"attention_bias={biases[0]}, mlp_bias={biases[1]}: both or none")
    return _read_rope(settings) | {"add_bias_linear": biases[0]}


def _write_llama(config: TransformerConfig) -> Fields:
    bias = config.add_bias_linear
    return _write_rope(config) | {"hidden_act": "silu", "attention_bias": bias, "mlp_bias": bias}


def _read_qwen(settings: Fields) -> Fields:
    types = settings["layer_types"]
    if not settings["use_sliding_window"]:
        settings = settings | {"sliding_window": None}
    elif types is None:
        first = settings["max_window_layers"]
        types = _types(settings, lambda layer: layer >= first)
    return _read_rope(settings) | _read_layer_types(settings, types)


def _write_qwen(config: TransformerConfig) -> Fields:
    window = _sliding_window(config)
    first = next((layer for layer, kind in enumerate(_layer_types(config)) if kind == "sliding_attention"), None)
    return _write_rope(config) | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": config.num_layers if first is None else first,
        "layer_types": _layer_types(config),
    }


_GEMMA = {
    "activation": "geglu",
    "layernorm_zero_centered_gamma": True,
    "norm_placement": "both",
}
_GEMMA_MODULES = {
    **LLAMA_MODULES,
    "layers.*.post_attention_layernorm": _LAYER + "post_attention_layernorm",
    "layers.*.pre_mlp_layernorm": _LAYER + "pre_feedforward_layernorm",
    "layers.*.post_mlp_layernorm": _LAYER + "post_feedforward_layernorm",
}
_GEMMA_SETTINGS = {
    **SETTINGS,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_REQUIRED = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
}


def _read_gemma(settings: Fields, full_every: int) -> Fields:
    types = settings["layer_types"] or _types(settings, lambda layer: (layer + 1) % full_every != 0)
    if settings["query_pre_attn_scalar"] <= 0:
        raise ConfigError(f"query_pre_attn_scalar={settings['query_pre_attn_scalar']!r}: must be above 0")
    return _read_layer_types(settings, types) | {
        "softmax_scale": settings["query_pre_attn_scalar"] ** -0.5,
        "embedding_multiplier": settings["hidden_size"] ** 0.5,
    }


def _write_gemma(config: TransformerConfig) -> Fields:
    scale = config.softmax_scale or config.head_dim**-0.5
    if config.embedding_multiplier != config.hidden_size**0.5:
        raise ConfigError("embedding_multiplier: Gemma's is the square root of hidden_size")
    return _write_window(config) | {
        "layer_types": _layer_types(config),
        "query_pre_attn_scalar": round(scale**-2),
        "hidden_act": "gelu_pytorch_tanh",
    }


def _read_gemma2(settings: Fields) -> Fields:
    return _read_rope(settings) | _read_gemma(settings, full_every=2)


def _read_gemma3(settings: Fields) -> Fields:
    parameters = settings["rope_parameters"] or {}
    if parameters and not any(kind in parameters for kind in _KINDS_OF_LAYER):
        raise ConfigError(f"rope_parameters: Gemma 3's have {' and '.join(_KINDS_OF_LAYER)}")
    scaling = settings["rope_scaling"] or {}
    if "type" in scaling and "rope_type" not in scaling:
        raise ConfigError(f"rope_scaling.type={scaling['type']!r}: Gemma 3's is called rope_type")
    full, local = (parameters.get(kind) or {} for kind in _KINDS_OF_LAYER)
    if not isinstance(full, dict) or not isinstance(local, dict):
        raise ConfigError(f"rope_parameters: {' and '.join(_KINDS_OF_LAYER)} must be objects")
    if settings["sliding_window_pattern"] < 1:
        raise ConfigError(f"sliding_window_pattern={settings['sliding_window_pattern']}: must be 1 or more")
    fields = _read_gemma(settings, full_every=settings["sliding_window_pattern"])
    local = _rotary(local, settings | {"rope_theta": settings["rope_local_base_freq"]})
    if local["rope_scaling"] is not None:
        raise ConfigError("rope_parameters.sliding_attention: only rope_type='default' is known there")
    base = local["rotary_base"] if fields["window_size"] is not None else None
    return fields | _rotary(full | scaling, settings) | {"rotary_base_local": base}


def _write_gemma3(config: TransformerConfig) -> Fields:
    fields = _write_gemma(config)
    local = config.rotary_base if config.rotary_base_local is None else config.rotary_base_local
    sliding = {"rope_type": "default", "rope_theta": local}
    return fields | {
        "rope_parameters": {"full_attention": fields["rope_parameters"], "sliding_attention": sliding},
        "rope_local_base_freq": local,
    }


def _write_phi3(config: TransformerConfig) -> Fields:
    fields = _write_window(config) | {"partial_rotary_factor": config.rotary_percent}
    if isinstance(scaling := config.rope_scaling, LongRopeScaling):
        fields["original_max_position_embeddings"] = scaling.old_context_len
    return fields


def _read_starcoder2(settings: Fields) -> Fields:
    return _read_window(settings) | {"hidden_dropout": settings["residual_dropout"]}


def _write_starcoder2(config: TransformerConfig) -> Fields:
    dropout = config.hidden_dropout
    return _write_window(config) | {"residual_dropout": dropout, "embedding_dropout": dropout}


def _write_gpt2(config: TransformerConfig) -> Fields:
    if config.groups != config.num_attention_heads or config.head_dim * config.groups != config.hidden_size:
        raise ConfigError("GPT-2 has as many key/value heads as heads, of hidden_size / heads")
    return {"embd_pdrop": config.hidden_dropout}


def _read_granite(settings: Fields) -> Fields:
    return _read_rope(settings) | {"softmax_scale": settings["attention_multiplier"]}


def _write_granite(config: TransformerConfig) -> Fields:
    return _write_rope(config) | {"attention_multiplier": config.softmax_scale or config.head_dim**-0.5}


def _read_balance(settings: Fields) -> Fields:
    """The weight of the balancing loss, which transformers has for the mean over layers, and k times as large.

    With an even load transformers' loss is k = `num_experts_per_tok`, and the one here is 1 for each layer. (It also
    takes the mean over all layers of an expert's load and probability before it multiplies them.)
    """
    weight, k, layers = (settings[n] for n in ("router_aux_loss_coef", "num_experts_per_tok", "num_hidden_layers"))
    if all(isinstance(number, int | float) for number in (weight, k, layers)) and layers:
        weight = _rounded(weight * k / layers)
    return {"moe_aux_loss_coeff": weight}  # `TransformerConfig` refuses what is no number


def _write_balance(config: TransformerConfig) -> Fields:
    return {"router_aux_loss_coef": _rounded(config.moe_aux_loss_coeff * config.num_layers / config.moe_router_topk)}


def _rounded(number: float) -> float:
    """Without the last digits, so that a number is the same after the way there and back."""
    return float(f"{number:.12g}")


def _read_mixtral(settings: Fields) -> Fields:
    return _read_window(settings) | _read_balance(settings)


def _write_mixtral(config: TransformerConfig) -> Fields:
    return _write_window(config) | _write_balance(config)


def _read_qwen3_moe(settings: Fields) -> Fields:
    window = _window_size(settings) if settings["use_sliding_window"] else None
    return (
        _read_rope(settings)
        | _read_balance(settings)
        | {
            "window_size": window,  # of all layers
            "moe_router_pre_softmax": not settings["norm_topk_prob"],
        }
    )


def _write_qwen3_moe(config: TransformerConfig) -> Fields:
    return (
        _write_window(config)
        | _write_balance(config)
        | {
            "use_sliding_window": config.window_size is not None,
            "norm_topk_prob": not config.moe_router_pre_softmax,
        }
    )


def _read_gpt_oss(settings: Fields) -> Fields:
    types = settings["layer_types"] or _types(settings, lambda layer: layer % 2 == 0)
    return _read_rope(settings) | _read_layer_types(settings, types) | _read_balance(settings)


def _write_gpt_oss(config: TransformerConfig) -> Fields:
    return _write_window(config) | _write_balance(config) | {"layer_types": _layer_types(config)}


_SILU = {"hidden_act": ("silu",)}
_NO_BIAS = {"attention_bias": (False,)}
_QWEN3 = {"qk_layernorm": "head"}

FAMILIES = {
    family.model_type: family
    for family in (
        # Also SmolLM 2.
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            ignored=("rotary_emb.inv_freq",),
            required=_SILU,
            read=_read_llama,
            write=_write_llama,
        ),
        Family(
            model_type="mistral",
            architecture="MistralForCausalLM",
            required=_SILU,
            read=_read_window,
            write=_write_window,
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            fixed={"add_qkv_bias": True},
            required=_SILU,
            read=_read_qwen,
            write=_write_qwen,
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            fixed=_QWEN3,
            required=_SILU | _NO_BIAS,
            read=_read_qwen,
            write=_write_qwen,
        ),
        Family(
            model_type="gemma2",
            architecture="Gemma2ForCausalLM",
            modules=_GEMMA_MODULES,
            fixed=_GEMMA,
            settings=_GEMMA_SETTINGS,
            required=_GEMMA_REQUIRED,
            read=_read_gemma2,
            write=_write_gemma,
        ),
        Family(
            model_type="gemma3_text",
            architecture="Gemma3ForCausalLM",
            modules=_GEMMA_MODULES,
            fixed=_GEMMA | {"qk_layernorm": "head"},
            settings=_GEMMA_SETTINGS,
            required=_GEMMA_REQUIRED,
            read=_read_gemma3,
            write=_write_gemma3,
        ),
        # Also Phi-4.
        Family(
            model_type="phi3",
            architecture="Phi3ForCausalLM",
            modules={
                **LLAMA_MODULES,
                "layers.*.self_attention.linear_qkv": _ATTENTION + "qkv_proj",
                "layers.*.mlp.linear_fc1": _MLP + "gate_up_proj",
            },
            settings={theirs: ours for theirs, ours in SETTINGS.items() if theirs != "head_dim"},
            required=_SILU | {"resid_pdrop": (0.0, 0), "embd_pdrop": (0.0, 0)},
            read=_read_window,
            write=_write_phi3,
        ),
        Family(
            model_type="starcoder2",
            architecture="Starcoder2ForCausalLM",
            modules={
                **LLAMA_MODULES,
                "layers.*.mlp.linear_fc1": _MLP + "c_fc",
                "layers.*.mlp.linear_fc2": _MLP + "c_proj",
            },
            fixed={"normalization": "LayerNorm", "activation": "gelu", "add_bias_linear": True},
            settings={
                "norm_epsilon" if theirs == "rms_norm_eps" else theirs: ours
                for theirs, ours in SETTINGS.items()
                if theirs != "head_dim"
            },
            required={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)},
            read=_read_starcoder2,
            write=_write_starcoder2,
        ),
        Family(
            model_type="gpt2",
            architecture="GPT2LMHeadModel",
            modules={
                "embedding": "transformer.wte",
                "position_embedding": "transformer.wpe",
                "final_layernorm": "transformer.ln_f",
                "output_layer": "lm_head",
                "layers.*.input_layernorm": "transformer.h.*.ln_1",
                "layers.*.pre_mlp_layernorm": "transformer.h.*.ln_2",
                "layers.*.self_attention.linear_qkv": "transformer.h.*.attn.c_attn",
                "layers.*.self_attention.linear_proj": "transformer.h.*.attn.c_proj",
                "layers.*.mlp.linear_fc1": "transformer.h.*.mlp.c_fc",
                "layers.*.mlp.linear_fc2": "transformer.h.*.mlp.c_proj",
            },
            transposed=("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight"),
            ignored=(".attn.bias", ".attn.masked_bias"),
            fixed={
                "normalization": "LayerNorm",
                "activation": "gelu",
                "add_bias_linear": True,
                "position_embedding_type": "learned_absolute",
            },
            aliases={
                "num_hidden_layers": "n_layer",
                "hidden_size": "n_embd",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
            },
            settings={
                "n_layer": "num_layers",
                "n_embd": "hidden_size",
                "n_inner": "ffn_hidden_size",
                "n_head": "num_attention_heads",
                "n_positions": "seq_length",
                "vocab_size": "vocab_size",
                "layer_norm_epsilon": "layernorm_epsilon",
                "initializer_range": "init_method_std",
                "attn_pdrop": "attention_dropout",
                "resid_pdrop": "hidden_dropout",
                "tie_word_embeddings": "share_embeddings_and_output_weights",
            },
            required={
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,),
            },
            write=_write_gpt2,
        ),
        Family(
            model_type="olmo2",
            architecture="Olmo2ForCausalLM",
            modules={
                **LLAMA_MODULES,
                "layers.*.post_attention_layernorm": _LAYER + "post_attention_layernorm",
                "layers.*.post_mlp_layernorm": _LAYER + "post_feedforward_layernorm",
            },
            fixed={"norm_placement": "post", "qk_layernorm": "projection"},
            settings={theirs: ours for theirs, ours in SETTINGS.items() if theirs != "head_dim"},
            required=_SILU | _NO_BIAS,
            read=_read_rope,
            write=_write_rope,
        ),
        Family(
            model_type="granite",
            architecture="GraniteForCausalLM",
            settings={
                **{theirs: ours for theirs, ours in SETTINGS.items() if theirs != "head_dim"},
                "embedding_multiplier": "embedding_multiplier",
                "residual_multiplier": "residual_multiplier",
                "logits_scaling": "logits_scaling",
            },
            required=_SILU | _NO_BIAS | {"mlp_bias": (False,)},
            read=_read_granite,
            write=_write_granite,
        ),
        Family(
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            modules={
                **LLAMA_MODULES,
                "layers.*.mlp.router": _LAYER + "block_sparse_moe.gate",
                "layers.*.mlp.experts.linear_fc1": (
                    _LAYER + "block_sparse_moe.experts.#.w1",
                    _LAYER + "block_sparse_moe.experts.#.w3",
                ),
                "layers.*.mlp.experts.linear_fc2": _LAYER + "block_sparse_moe.experts.#.w2",
            },
            aliases={"num_experts": "num_local_experts"},
            settings={
                **SETTINGS,
                "num_local_experts": "num_moe_experts",
                "num_experts_per_tok": "moe_router_topk",
            },
            required=_SILU | {"router_jitter_noise": (0.0, 0)},
            read=_read_mixtral,
            write=_write_mixtral,
        ),
        Family(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            modules={
                **LLAMA_MODULES,
                "layers.*.mlp.router": _MLP + "gate",
                "layers.*.mlp.experts.linear_fc1": (_MLP + "experts.#.gate_proj", _MLP + "experts.#.up_proj"),
                "layers.*.mlp.experts.linear_fc2": _MLP + "experts.#.down_proj",
            },
            fixed=_QWEN3,
            aliases={"num_experts": "num_local_experts"},
            settings={
                **SETTINGS,
                "num_local_experts": "num_moe_experts",
                "num_experts_per_tok": "moe_router_topk",
                "moe_intermediate_size": "moe_ffn_hidden_size",
            },
            required=_SILU | _NO_BIAS | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
            read=_read_qwen3_moe,
            write=_write_qwen3_moe,
        ),
        Family(
            model_type="gpt_oss",
            architecture="GptOssForCausalLM",
            modules={
                **LLAMA_MODULES,
                "layers.*.self_attention.sinks": _ATTENTION + "sinks",
                "layers.*.mlp.router": _MLP + "router",
                "layers.*.mlp.experts.linear_fc1.weight": _MLP + "experts.gate_up_proj",
                "layers.*.mlp.experts.linear_fc1.bias": _MLP + "experts.gate_up_proj_bias",
                "layers.*.mlp.experts.linear_fc2.weight": _MLP + "experts.down_proj",
                "layers.*.mlp.experts.linear_fc2.bias": _MLP + "experts.down_proj_bias",
            },
            transposed=("experts.linear_fc1.weight", "experts.linear_fc2.weight"),
            interleaved=("experts.linear_fc1.weight", "experts.linear_fc1.bias"),
            fixed={"activation": "clamped_swiglu", "add_bias_linear": True, "attention_sinks": True},
            aliases={"num_experts": "num_local_experts"},
            settings={
                **SETTINGS,
                "num_local_experts": "num_moe_experts",
                "num_experts_per_tok": "moe_router_topk",
            },
            required=_SILU | {"attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
            read=_read_gpt_oss,
            write=_write_gpt_oss,
        ),
    )
}
