"""Why a model cannot be trained as it is set: its settings that exclude each other, or what the ranks share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fiddlehead.errors import Problem
from fiddlehead.models import head_tiles
from fiddlehead.models.speed import refused_mixture
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.feed_forward import choose_mlp, refused_mlp

if TYPE_CHECKING:
    from fiddlehead.training.language_model import LanguageModel


def refused_model(model: LanguageModel, precision: str, sizes: Sizes) -> list[Problem]:
    """Why a model cannot be trained with this precision on ranks of these sizes; empty if it can."""
    problems = _of_float8(model, sizes) + _of_quantized(model, sizes)
    tokens, groups = model.computation.tiled_mlp, model.computation.tiled_attention
    if tokens is not None:
        problems += [each.under("model") for each in refused_mixture(model.config, tokens)]
    if groups is not None:
        shared = {"tensor": sizes.tensor, "context": sizes.context, "adapters": model.lora is not None}
        problems += [each.under("model") for each in head_tiles.refused(model.config, groups, **shared)]
    refused = refused_mlp(model, choose_mlp(model, precision, sizes, None))
    return problems + refused + _of_compiled_mixture(model, precision, sizes)


def _of_float8(model: LanguageModel, sizes: Sizes) -> list[Problem]:
    if (fp8 := model.computation.fp8) is None:
        return []
    problems = []
    if model.lora is not None:
        message = "layers with adapters have no float8 products; set None here, or model.lora=None"
        problems.append(Problem("model.fp8", fp8, message))
    if sizes.tensor > 1:
        message = "not for split layers; set trainer.strategy.tensor_parallel=1, or None here"
        problems.append(Problem("model.fp8", fp8, message))
    return problems


def _of_quantized(model: LanguageModel, sizes: Sizes) -> list[Problem]:
    if model.lora is None or (base := model.lora.quantize_base) is None:
        return []
    problems = []
    for field, size in (("tensor_parallel", sizes.tensor), ("pipeline_parallel", sizes.pipeline)):
        if size > 1:
            message = f"weights in 4 bits cannot be split; set None here, or trainer.strategy.{field}=1"
            problems.append(Problem("model.lora.quantize_base", base, message))
    if model.config.num_moe_experts is not None:
        message = "the experts of a mixture are not stored in 4 bits; set None here"
        problems.append(Problem("model.lora.quantize_base", base, message))
    return problems


def _of_compiled_mixture(model: LanguageModel, precision: str, sizes: Sizes) -> list[Problem]:
    compile, recompute = model.computation.compile, model.computation.activation_checkpointing
    if compile is None or model.config.num_moe_experts is None:
        return []
    problems = []
    if sizes.expert > 1:
        message = (
            "ranks wait for the numbers of tokens of their experts, which cannot be compiled; set None here, or "
            "trainer.strategy.expert_parallel=1"
        )
        problems.append(Problem("model.compile", compile, message))
    if precision == "32-true":
        message = "experts' products are compiled in bfloat16 only; set trainer.precision=bf16-mixed, or None here"
        problems.append(Problem("model.compile", compile, message))
    if isinstance(recompute, str) and model.config.moe_aux_loss_coeff:
        message = (
            "a compiled layer with experts cannot be recomputed whole, because its balancing loss leaves it; give "
            "the part to keep, such as 0.5, or set compile=None"
        )
        problems.append(Problem("model.activation_checkpointing", recompute, message))
    return problems
