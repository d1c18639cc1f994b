"""`Family`: maps Hugging Face's tensors and settings of a family of models to ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fiddlehead.checkpoints.huggingface.families.defaults import COMMON, Fields, completed
from fiddlehead.checkpoints.huggingface.families.rotary import read_rope, write_rope
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.models.config import TransformerConfig

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

LAYER, ATTENTION, MLP = "model.layers.*.", "model.layers.*.self_attn.", "model.layers.*.mlp."
LLAMA_MODULES: Modules = {
    "embedding": "model.embed_tokens",
    "final_layernorm": "model.norm",
    "output_layer": "lm_head",
    "layers.*.input_layernorm": LAYER + "input_layernorm",
    "layers.*.pre_mlp_layernorm": LAYER + "post_attention_layernorm",
    "layers.*.self_attention.linear_qkv": (ATTENTION + "q_proj", ATTENTION + "k_proj", ATTENTION + "v_proj"),
    "layers.*.self_attention.q_layernorm": ATTENTION + "q_norm",
    "layers.*.self_attention.k_layernorm": ATTENTION + "k_norm",
    "layers.*.self_attention.linear_proj": ATTENTION + "o_proj",
    "layers.*.mlp.linear_fc1": (MLP + "gate_proj", MLP + "up_proj"),
    "layers.*.mlp.linear_fc2": MLP + "down_proj",
}
SILU = {"hidden_act": ("silu",)}
NO_BIAS = {"attention_bias": (False,)}


def no_fields(_: Any) -> Fields:
    """For a family that needs no `read`, or no `write`."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face. What is not given is as in Llama.

    Raises:
        ConfigError: it names a field that `TransformerConfig` does not have.
    """

    model_type: str
    """As `config.json` has it."""
    architecture: str
    """The name of the model's class in transformers."""
    modules: Modules = field(default_factory=lambda: LLAMA_MODULES)
    """For each of our modules (or single parameters), Hugging Face's names, with * for the number of a layer and # for
    the number of an expert. If several of theirs form one of ours, their rows are in this order."""
    transposed: tuple[str, ...] = ()
    """Endings of the names of our parameters that their files store as (in, out)."""
    interleaved: tuple[str, ...] = ()
    """Endings of the names of our parameters where their files store rows of the gate and of the other projection in
    turns."""
    ignored: tuple[str, ...] = ()
    """Endings of the names of their tensors that are not parameters."""
    fixed: Fields = field(default_factory=dict)
    """Fields of `TransformerConfig` that are the same in all models of the family."""
    settings: Mapping[str, str] = field(default_factory=lambda: SETTINGS)
    """For each field of `config.json`, the field of `TransformerConfig` with the same value."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that `config.json` may have for a setting, each with its usual name."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Settings that change a model in a way not supported here, with the values that do not. The first is the
    default."""
    read: Callable[[Fields], Fields] = read_rope
    """Computes the fields of `TransformerConfig` whose values differ."""
    write: Callable[[TransformerConfig], Fields] = write_rope
    """The reverse of `read`."""
    defaults: Fields = field(default_factory=lambda: COMMON | {"head_dim": None})
    """The values of fields that `config.json` leaves out. Other settings must be in `config.json`."""
    nullable: tuple[str, ...] = ()
    """Fields that may be null although their default is not; null turns them off."""
    precedence: int = 100
    """If a model fits several families, the one with the lowest number exports it."""

    def __post_init__(self) -> None:
        known = [each.name for each in fields(TransformerConfig)]
        refuse(
            Problem.unknown(f"family {self.model_type!r}: {where}", name, "field of TransformerConfig", known)
            for where, names in (("fixed", self.fixed), ("settings", self.settings.values()))
            for name in names
            if name not in known
        )

    def config(self, settings: Fields) -> TransformerConfig:
        """Makes the configuration of the model that a `config.json` describes.

        Raises:
            ConfigError: it needs something that is not supported; with all problems.
        """
        twice = [
            Problem(name, settings[name], f"is the same setting as {usual}={settings[usual]!r}")
            for name, usual in self.aliases.items()
            if name in settings and settings.get(usual, settings[name]) != settings[name]
        ]
        settings = {self.aliases.get(name, name): value for name, value in settings.items()}
        problems = twice + [
            Problem(name, settings[name], f"must be {' or '.join(map(repr, values))}")
            for name, values in self.required.items()
            if settings.get(name, values[0]) not in values
        ]
        if settings.get("quantization_config"):
            message = "quantized weights are not read; dequantize them with transformers, and save them from there"
            problems.append(Problem("quantization_config", message=message))
        try:
            settings = completed(settings, self.defaults, self.nullable)
        except ConfigError as error:
            problems += error.problems
        problems += [Problem(name, message="is missing") for name in self.settings if name not in settings]
        refuse(problems)
        given = {name: settings.get(theirs) for theirs, name in self.settings.items()}
        renamed = {name: value for name, value in given.items() if value is not None}
        ours = renamed | self.fixed | self.read(settings)
        if ours.get("num_query_groups") == ours["num_attention_heads"]:
            ours["num_query_groups"] = None
        if ours.get("kv_channels") and ours["kv_channels"] * ours["num_attention_heads"] == ours["hidden_size"]:
            ours["kv_channels"] = None
        return TransformerConfig(**ours)

    def config_json(self, config: TransformerConfig) -> Fields:
        """Makes a model's `config.json`; the opposite of `config`."""
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
    """Whether two configurations compute the same, apart from dropout."""

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
