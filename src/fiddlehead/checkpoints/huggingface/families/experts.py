"""Mixtures of experts in `config.json`."""

from __future__ import annotations

from fiddlehead.checkpoints.huggingface.families.defaults import Fields
from fiddlehead.models.config import TransformerConfig


def read_balance(settings: Fields) -> Fields:
    """The weight of the balancing loss, which transformers has for the mean over layers, and k times as large.

    With an even load transformers' loss is k = `num_experts_per_tok`, and the one here is 1 for each layer. (It also
    takes the mean over all layers of an expert's load and probability before it multiplies them.)
    """
    weight, k, layers = (settings[n] for n in ("router_aux_loss_coef", "num_experts_per_tok", "num_hidden_layers"))
    if all(isinstance(number, int | float) for number in (weight, k, layers)) and layers:
        weight = _rounded(weight * k / layers)
    return {"moe_aux_loss_coeff": weight}  # `TransformerConfig` refuses what is not a number


def write_balance(config: TransformerConfig) -> Fields:
    return {"router_aux_loss_coef": _rounded(config.moe_aux_loss_coeff * config.num_layers / config.moe_router_topk)}


def _rounded(number: float) -> float:
    """Without the last digits, so that a number is the same after the way there and back."""
    return float(f"{number:.12g}")
