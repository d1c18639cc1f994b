"""Why a model cannot be trained as it is set: its settings that exclude each other, or what the ranks share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fiddlehead.errors import Problem
from fiddlehead.models import adapted_mlp, gated_mlp, head_tiles
from fiddlehead.models.autocast import compute_dtype
from fiddlehead.models.mlp_choice import RECOMPUTED
from fiddlehead.models.speed import refused_mixture
from fiddlehead.training.distributed.sizes import Sizes

if TYPE_CHECKING:
    from fiddlehead.training.language_model import LanguageModel


def refused_model(model: LanguageModel, precision: str, sizes: Sizes) -> list[Problem]:
    """Why a model cannot be trained with this precision on ranks of these sizes; empty if it can."""
    problems = _of_float8(model, sizes) + _of_quantized(model, sizes)
    if model.tiled_mlp is not None:
        problems += [each.under("model") for each in refused_mixture(model.config, model.tiled_mlp)]
    if model.tiled_attention is not None:
        shared = {"tensor": sizes.tensor, "context": sizes.context, "adapters": model.lora is not None}
        refused = head_tiles.refused(model.config, model.tiled_attention, **shared)
        problems += [each.under("model") for each in refused]
    dtype = compute_dtype(precision)
    reason = excludes_fused_mlp(model, sizes)
    if reason is None:
        of_run = dtype, sizes.tensor
        reason = (
            gated_mlp.why_not_anywhere(model.config, *of_run)
            if model.lora is None
            else adapted_mlp.why_not_anywhere(model.config, model.lora, *of_run)
        )
    return problems + refused_mlp(model, reason) + _of_compiled_mixture(model, precision, sizes)


def excludes_fused_mlp(model: LanguageModel, sizes: Sizes) -> str | None:
    """The setting with which no kernel for the feed-forward goes, or not the named one; None if there is none."""
    if model.lora is not None and model.mlp_backend == "quack":
        return "lora: adapters change its products; 'triton' has kernels for them"
    if model.lora is None and model.mlp_backend == "triton":
        return "lora=None: its kernels are for adapters; 'quack' is for models without"
    if model.fp8 is not None:
        return f"fp8={model.fp8!r}: its products are not in float8"
    if model.tiled_mlp is not None:
        return "tiled_mlp: tiles have PyTorch's products"
    if model.recompute not in RECOMPUTED:
        return f"activation_checkpointing={model.recompute!r}: what is kept is chosen by PyTorch's operations"
    if sizes.pipeline > 1:
        return "pipeline_parallel: its schedules may part the gradients of weights from those of activations"
    return None


def refused_mlp(model: LanguageModel, why_not: str | None) -> list[Problem]:
    """The problem if a kernel is asked for and there is a reason why it is not taken; otherwise empty."""
    if model.mlp_backend in ("auto", "torch") or not why_not:
        return []
    return [Problem("model.mlp_backend", model.mlp_backend, f"cannot compute this feed-forward: {why_not}")]


def _of_float8(model: LanguageModel, sizes: Sizes) -> list[Problem]:
    problems = []
    if model.lora is not None and model.fp8 is not None:
        message = "layers with adapters have no float8 products; set None here, or model.lora=None"
        problems.append(Problem("model.fp8", model.fp8, message))
    if sizes.tensor > 1 and model.fp8 is not None:
        message = "not for split layers; set trainer.strategy.tensor_parallel=1, or None here"
        problems.append(Problem("model.fp8", model.fp8, message))
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
    if model.compile_mode is None or model.config.num_moe_experts is None:
        return []
    problems = []
    if sizes.expert > 1:
        message = (
            "ranks wait for the numbers of tokens of their experts, which cannot be compiled; set None here, or "
            "trainer.strategy.expert_parallel=1"
        )
        problems.append(Problem("model.compile", model.compile_mode, message))
    if precision == "32-true":
        message = "experts' products are compiled in bfloat16 only; set trainer.precision=bf16-mixed, or None here"
        problems.append(Problem("model.compile", model.compile_mode, message))
    if isinstance(model.recompute, str) and model.config.moe_aux_loss_coeff:
        message = (
            "a compiled layer with experts cannot be recomputed whole, because its balancing loss leaves it; give "
            "the part to keep, such as 0.5, or set compile=None"
        )
        problems.append(Problem("model.activation_checkpointing", model.recompute, message))
    return problems
