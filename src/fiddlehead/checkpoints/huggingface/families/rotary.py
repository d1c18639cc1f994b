"""Rotary positions in `config.json`: the same in all layers, and scaled in one of the known ways."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fiddlehead.checkpoints.huggingface.families.defaults import Fields
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.rope import LinearRopeScaling, LongRopeScaling, RopeScaling, Scaling, YarnRopeScaling
from fiddlehead.numbers import is_number

KINDS_OF_LAYER = ("full_attention", "sliding_attention")
_MAX_POSITIONS = 1 << 40


def read_rope(settings: Fields) -> Fields:
    """Reads the rotary positions, which are the same in all layers."""
    return rotary(rope_parameters(settings), settings)


def rope_parameters(settings: Fields) -> Fields:
    """Returns the parameters of all layers; the older `rope_scaling` comes before `rope_parameters`."""
    parameters = settings["rope_scaling"] or settings["rope_parameters"] or {}
    if nested := [kind for kind in KINDS_OF_LAYER if kind in parameters]:
        message = f"differ between layers ({', '.join(nested)}), which only Gemma 3 may"
        raise ConfigError(Problem("rope_parameters", message=message))
    return parameters


def rotary(parameters: Fields, settings: Fields, *, partial: bool = False) -> Fields:
    """Makes fields of `TransformerConfig` from the parameters of some layers.

    Args:
        partial: allow a `partial_rotary_factor` other than 1.
    """
    older = ("rope_theta", "partial_rotary_factor")
    parameters = {name: settings[name] for name in older if settings.get(name) is not None} | parameters
    part = parameters.get("partial_rotary_factor", 1.0)
    if part != 1.0 and not partial:
        raise ConfigError(Problem("partial_rotary_factor", part, "only Phi-3 has it"))
    base = _number(parameters, "rope_theta")
    return {"rotary_base": float(base), "rotary_percent": part, "rope_scaling": _scaling(parameters, settings)}


def kind_of(parameters: Fields) -> Any:
    """Returns the kind of scaling; `type` is the older name."""
    return parameters.get("rope_type", parameters.get("type", "default"))


def _number(parameters: Fields, name: str) -> float:
    value = parameters.get(name)
    if not is_number(value):
        kind = kind_of(parameters)
        raise ConfigError(Problem(f"rope_parameters.{name}", value, f"must be a number; rope_type={kind!r} needs it"))
    return value


def _factors(parameters: Fields, name: str) -> tuple[float, ...]:
    values = parameters.get(name)
    if not isinstance(values, list) or not all(map(is_number, values)):
        raise ConfigError(Problem(f"rope_parameters.{name}", values, "must be a list of numbers"))
    return tuple(values)


def _scaling(parameters: Fields, settings: Fields) -> Scaling | None:
    kind = kind_of(parameters)
    if settings["model_type"] == "phi3" and kind in ("su", "yarn"):  # as Phi-3 first called it
        kind = "longrope"
    if settings["model_type"] == "phi3" and kind not in ("default", "longrope"):
        raise ConfigError(Problem("rope_type", kind, "must be 'default' or 'longrope' in Phi-3"))
    # A value beside the parameters comes before one among them.
    longest = settings["max_position_embeddings"]
    original = settings.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    original = original or longest
    for name, value in (("max_position_embeddings", longest), ("original_max_position_embeddings", original)):
        if not is_number(value) or not 1 <= value < _MAX_POSITIONS:
            raise ConfigError(Problem(name, value, f"must be a whole number of 1 or more, below {_MAX_POSITIONS}"))
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
    raise ConfigError(Problem.unknown("rope_type", kind, "kind of rotary positions", allowed))


def write_rope(config: TransformerConfig) -> Fields:
    """Writes `rope_parameters`, and the older fields for tools that know only those."""
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
