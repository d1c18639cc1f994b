"""Compilation, recomputation, offloading, tiles and float8 for a `Transformer`; parameters and their names stay."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.models import head_tiles
from fiddlehead.models.adapted_mlp import adapted_mlp
from fiddlehead.models.block import MLP, Block
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.gated_mlp import gated_mlp
from fiddlehead.models.lora import LoRALinear
from fiddlehead.models.moe import MoE
from fiddlehead.models.offload import HostMemory
from fiddlehead.models.transformer import Transformer

Compile = Literal["layers", "model"]
Recompute = Literal["selective", "full"] | float
Float8 = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]


def fuse_mlp(transformer: Transformer, backend: Literal["quack", "triton", "torch"]) -> None:
    """Computes the feed-forward of each layer with SwiGLU in kernels, which `why_not` of their modules must allow.

    Args:
        backend: "quack" for layers without adapters, "triton" for those with adapters; "torch" changes nothing.
    """
    if backend == "torch":
        return
    layers: Any = transformer.layers
    for layer in layers:
        layer.mlp.fused = _by_quack if backend == "quack" else _by_triton


def _by_quack(mlp: MLP, x: torch.Tensor) -> torch.Tensor:
    return gated_mlp(x, mlp.linear_fc1.weight, mlp.linear_fc2.weight, mlp.group)


def _by_triton(mlp: MLP, x: torch.Tensor) -> torch.Tensor:
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    assert isinstance(fc1, LoRALinear) and isinstance(fc2, LoRALinear)
    return adapted_mlp(x, fc1.weight, *fc1.factors, fc2.weight, *fc2.factors)


def tile_mlp(transformer: Transformer, tokens: int) -> None:
    """Computes the feed-forward of each layer, with its norms, for so many tokens at a time.

    The backward pass computes each tile again, so that the intermediate tensors of only one tile are in memory. Call it
    before `recompute_activations` and `compile_transformer`.

    Raises:
        ConfigError: the model is a mixture of experts.
    """
    refuse(refused_mixture(transformer.config, tokens))
    layers: Any = transformer.layers
    for layer in layers:
        layer.tiled_mlp = tokens


def tile_attention(transformer: Transformer, groups: int) -> None:
    """Computes attention for so many key/value heads at a time, with the query heads that read them.

    The backward pass computes the queries, keys and values of each tile again, and attention itself not.

    Raises:
        ConfigError: the model's attention cannot be computed so.
    """
    layers: Any = transformer.layers
    adapters = any(isinstance(module, LoRALinear) for layer in layers for module in layer.self_attention.children())
    refuse(head_tiles.refused(transformer.config, groups, adapters=adapters))
    for layer in layers:
        layer.self_attention.tiled = groups


def refused_mixture(config: TransformerConfig, tokens: int) -> list[Problem]:
    """The problem of a mixture of experts with tiles; empty if it is none."""
    if config.num_moe_experts is None:
        return []
    message = "the experts of a mixture are not computed in tiles; set None here"
    return [Problem("tiled_mlp", tokens, message)]


def convert_to_float8(transformer: Transformer, recipe: Float8, all_gather: bool = False) -> None:
    """Computes the layers' linear products with float8 operands, dynamically scaled, forward and backward.

    The parameters stay as they are. Layers whose sizes are not multiples of 16, the router of a mixture and the output
    layer stay in the higher precision. torchao does it (https://github.com/pytorch/ao, float8).

    Args:
        all_gather: FSDP2, which is to shard the model afterwards, gathers these weights in float8; with "tensorwise".

    Raises:
        ConfigError: torchao is not installed, or the GPU is older than Ada and Hopper.
    """
    try:
        from torchao.float8 import (  # pyright: ignore[reportMissingImports]
            Float8LinearConfig,
            convert_to_float8_training,
        )
    except ImportError as error:
        raise ConfigError(
            Problem("fp8", recipe, f"needs torchao: pip install 'fiddlehead[torchao]' ({error})")
        ) from error
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError(Problem("fp8", recipe, f"{torch.cuda.get_device_name()} has no float8; set fp8=None"))

    def converts(module: nn.Module, name: str) -> bool:
        sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (1,)
        return not name.endswith("router") and all(size % 16 == 0 for size in sizes)

    config = replace(Float8LinearConfig.from_recipe_name(recipe), enable_fsdp_float8_all_gather=all_gather)
    for layer in transformer.layers:
        convert_to_float8_training(layer, config=config, module_filter_fn=converts)


def rescale_gathered(transformer: Transformer) -> None:
    """Works out the scales of all weights that are gathered in float8; all ranks call it after each optimizer step.

    Otherwise the ranks would exchange the scale of each weight whenever it is gathered.
    """
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp  # pyright: ignore[reportMissingImports]

    precompute_float8_dynamic_scale_for_fsdp(transformer)


def recompute_activations(transformer: Transformer, recompute: Recompute) -> None:
    """Recomputes activations in the backward pass instead of keeping them from the forward pass.

    "full" keeps only each layer's input (Chen et al. 2016). "selective" keeps the outputs of matrix products and
    attention, and recomputes the cheap rest. A number is the part of the activations that the compiler may keep; it
    chooses those that are most expensive to recompute.

    Where the feed-forward is computed in tiles, it is computed again by itself. With "full" the rest of a layer is
    computed again before it, and the feed-forward once.
    """
    if isinstance(recompute, int | float):
        transformer.activation_memory_budget = float(recompute)
        return
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_not_of_contexts)
    contexts: dict[str, Any] = {}
    if recompute == "selective":
        contexts["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    layers: Any = transformer.layers
    for layer in layers:
        own = contexts
        if isinstance(layer.mlp, MoE) and transformer.config.moe_aux_loss_coeff:
            own = {"context_fn": functools.partial(_keeping_aux_loss, layer.mlp, contexts.get("context_fn"))}
        # Replaces the layer's forward and not the layer, so that the names of the parameters stay.
        if layer.tiled_mlp is None:
            layer.forward = checkpointed(layer.forward, own)
        elif recompute == "full":
            own = {"context_fn": functools.partial(_without_output, layer)}
            layer.forward = checkpointed(layer.forward, own)
        else:
            layer.attention_sublayer = checkpointed(layer.attention_sublayer, own)


def offload_inputs(transformer: Transformer) -> None:
    """Keeps the input of each layer in main memory until its backward pass; on a CPU it changes nothing.

    Call it after `recompute_activations` with "full", and before `compile_transformer`.
    """
    memory = HostMemory()
    for layer in transformer.layers:
        layer.forward = memory.keeping_input(layer.forward)


def compile_transformer(transformer: Transformer, compile: Compile) -> None:
    """Compiles each layer, or the model from the embedding to the last norm; and the softmax of the loss.

    The compiler compiles one layer for all equal layers; with many layers the first step is then minutes earlier. A
    layer with tiles is compiled in two parts: attention, and a tile of the feed-forward.
    """
    transformer.compiled = True
    budget = transformer.activation_memory_budget
    if compile == "model":
        transformer.joins_gradients = False  # the compiled model has the embedding in it
        transformer.hidden = _within(budget, torch.compile(transformer.hidden, fullgraph=True))
        return
    layers: Any = transformer.layers
    for layer in layers:
        # The hooks that a strategy puts on the layer, which gather its parameters, must not be compiled.
        for name in ("forward",) if layer.tiled_mlp is None else ("attention_sublayer", "mlp_sublayer"):
            setattr(layer, name, _within(budget, torch.compile(getattr(layer, name), fullgraph=True)))


def _within(budget: float | None, compiled: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Sets the part of the activations that the compiler keeps for one call, since it compiles during the call."""
    if budget is None:
        return compiled

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._functorch.config.patch(activation_memory_budget=budget):  # pyright: ignore
            return compiled(*args, **kwargs)

    return run


def checkpointed(forward: Callable[..., torch.Tensor], contexts: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """A function of which only the inputs are kept, and what `contexts`, arguments of `checkpoint`, say."""

    def run(*args: Any) -> torch.Tensor:  # a function of ours: the compiler passes over PyTorch's own files
        given: dict[str, Any] = contexts
        if torch.compiler.is_compiling() and not contexts:
            given = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_nothing)}
        return checkpoint(forward, *args, use_reentrant=False, **given)

    return run


def _not_of_contexts(record: logging.LogRecord) -> bool:
    """Leaves out a warning of operations in place under "selective" and "full", which layers do not have."""
    return "context_fn is passed" not in record.getMessage()


def _keep_nothing(ctx: Any, op: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Says what the compiler of PyTorch 2.11 does not know of operations inside an autograd.Function, and kept them."""
    return CheckpointPolicy.PREFER_RECOMPUTE


def _without_output(layer: Block) -> tuple[Any, Any]:
    """Contexts of a forward pass and of what is computed again, for which the layer is told that nobody reads it."""

    @contextlib.contextmanager
    def recomputing() -> Iterator[None]:
        layer.recomputing = True
        try:
            yield
        finally:
            layer.recomputing = False

    return contextlib.nullcontext(), recomputing()


def _keeping_aux_loss(mixture: MoE, others: Callable[[], Any] | None) -> tuple[Any, Any]:
    """Contexts of a forward pass and of what is computed again, in which the balancing loss is not to change.

    That of the second time would hold the tensors that it came from until the next step.
    """
    forward, again = (contextlib.nullcontext(), contextlib.nullcontext()) if others is None else others()

    @contextlib.contextmanager
    def recomputing() -> Iterator[None]:
        loss = mixture.aux_loss
        try:
            with again:
                yield
        finally:
            mixture.aux_loss = loss

    return forward, recomputing()


def _keep_products(ctx: Any, op: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in _PRODUCTS or getattr(op, "namespace", None) == "fiddlehead"
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._scaled_mm.default,
    _ATEN._grouped_mm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
