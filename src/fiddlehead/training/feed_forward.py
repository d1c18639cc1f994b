"""What computes the feed-forward of a model's layers on the ranks of a training."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from fiddlehead.attention import Target
from fiddlehead.errors import Problem, refuse
from fiddlehead.models import TransformerConfig, adapted_mlp, gated_mlp
from fiddlehead.models.autocast import compute_dtype
from fiddlehead.models.mlp_choice import RECOMPUTED, MlpChoice
from fiddlehead.training.distributed.sizes import Sizes

if TYPE_CHECKING:
    from fiddlehead.training.language_model import LanguageModel


def choose_mlp(
    model: LanguageModel,
    precision: str,
    sizes: Sizes,
    target: Target | None,
    *,
    config: TransformerConfig | None = None,
    probe: bool = False,
) -> MlpChoice:
    """What computes the feed-forward on ranks of these sizes.

    Args:
        target: the ranks' device; None means any GPU on which kernels could compute it.
        config: the model's shape, if `model.config` is not complete yet.
        probe: also try the kernels out, on this machine's GPU.
    """
    if model.computation.mlp_backend == "torch":
        return MlpChoice("torch")
    reason = _excluding(model, sizes)
    if reason is None:
        kernels: Any = gated_mlp if model.lora is None else adapted_mlp
        config = config or model.config
        of_model = [config] if model.lora is None else [config, model.lora]
        dtype, tensor = compute_dtype(precision), sizes.tensor
        if target is None:
            reason = kernels.why_not_anywhere(*of_model, dtype, tensor)
        else:
            reason = kernels.why_not(*of_model, dtype, target, tensor, probe=probe)
    if reason is not None:
        return MlpChoice("torch", reason)
    return MlpChoice("quack" if model.lora is None else "triton")


def try_mlp(model: LanguageModel, precision: str, sizes: Sizes, target: Target) -> MlpChoice:
    """As `choose_mlp`, with the kernels tried out; warns if they are installed and do not work.

    Raises:
        ConfigError: a kernel is asked for, and it cannot.
    """
    of_run = model, precision, sizes, target
    choice = choose_mlp(*of_run, probe=True)
    refuse(refused_mlp(model, choice))
    if choice != choose_mlp(*of_run):
        warnings.warn(f"PyTorch computes the feed-forward: {choice.why_not}", stacklevel=3)
    return choice


def refused_mlp(model: LanguageModel, choice: MlpChoice) -> list[Problem]:
    """The problem if a kernel is asked for and there is a reason why it is not taken; otherwise empty."""
    asked = model.computation.mlp_backend
    if asked == "auto" or not choice.why_not:
        return []
    return [Problem("model.mlp_backend", asked, f"cannot compute this feed-forward: {choice.why_not}")]


def _excluding(model: LanguageModel, sizes: Sizes) -> str | None:
    """The setting with which no kernel for the feed-forward goes, or not the named one; None if there is none."""
    computation = model.computation
    if model.lora is not None and computation.mlp_backend == "quack":
        return "lora: adapters change its products; 'triton' has kernels for them"
    if model.lora is None and computation.mlp_backend == "triton":
        return "lora=None: its kernels are for adapters; 'quack' is for models without"
    if computation.fp8 is not None:
        return f"fp8={computation.fp8!r}: its products are not in float8"
    if computation.tiled_mlp is not None:
        return "tiled_mlp: tiles have PyTorch's products"
    if computation.activation_checkpointing not in RECOMPUTED:
        recompute = computation.activation_checkpointing
        return f"activation_checkpointing={recompute!r}: what is kept is chosen by PyTorch's operations"
    if sizes.pipeline > 1:
        return "pipeline_parallel: its schedules may part the gradients of weights from those of activations"
    return None
