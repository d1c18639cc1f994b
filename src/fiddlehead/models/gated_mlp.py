"""The feed-forward with SwiGLU inside its matrix products, by quack-kernels, which flash-attn 4 brings along.

The first product computes `silu(gate) * up` of what it has in registers, and the product with the output's gradient
computes the gradient of that. So no kernel reads and writes the widest tensors of a layer for SwiGLU alone, and the
backward pass needs only the first product's output: the activations are computed again on the way.

Shapes: N tokens, C hidden size, F feed-forward size.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from fiddlehead.attention import Package, Target
from fiddlehead.models import mlp_choice, peer_products
from fiddlehead.models.autocast import product_dtype
from fiddlehead.models.collectives import Group, end, start_gather, start_reduce_scatter
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.peer_copies import connected

OLDEST = "0.6.5"
"""Of quack-kernels: no older one was tried."""
_ALIGNED = 8
"""The kernels copy 16 bytes at a time."""


def why_not(
    config: TransformerConfig, dtype: torch.dtype, target: Target, tensor: int = 1, *, probe: bool = False
) -> str | None:
    """Why quack's products cannot compute a model's feed-forward on `target`; None if they can.

    Args:
        dtype: of the products.
        tensor: the processes that share the feed-forward's width.
        probe: also compute a small feed-forward, on this machine's GPU; otherwise only the version is looked up.
    """
    package = tried if probe else lambda: (installed(), None)
    return (
        mlp_choice.why_not_there(target) or why_not_anywhere(config, dtype, tensor) or why_not_installed(package()[0])
    )


def why_not_anywhere(config: TransformerConfig, dtype: torch.dtype, tensor: int = 1) -> str | None:
    """Why quack's products cannot compute a model's feed-forward on any GPU; None if they can on some."""
    if reason := mlp_choice.why_not_anywhere(config, dtype):
        return reason
    for name, size in (("hidden_size", config.hidden_size), ("ffn_hidden_size", config.ffn_size)):
        if size % _ALIGNED:
            return f"{name}={size}: only multiples of {_ALIGNED}"
    if config.ffn_size % (_ALIGNED * tensor):
        return f"ffn_hidden_size={config.ffn_size} over tensor_parallel={tensor}: only multiples of {_ALIGNED}"
    return None


def why_not_installed(package: Package) -> str | None:
    """Why quack-kernels cannot be used as it is installed; None if it can."""
    return package.why_not("quack-kernels", oldest=OLDEST)


@lru_cache
def installed() -> Package:
    """quack-kernels by its version alone."""
    return mlp_choice.installed("quack-kernels")


@lru_cache
def tried() -> tuple[Package, float | None]:
    """quack-kernels as it works on this machine's GPU, and the largest of `small_errors` if it was computed."""
    package = installed()
    return (package, None) if why_not_installed(package) else mlp_choice.try_out(package, small_errors)


def small_errors(device: torch.device) -> dict[str, float]:
    """The relative errors of the output and the gradients of a small feed-forward, against float64."""

    def exact(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ w1.T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ w2.T

    shapes = {"x": (72, 64), "w1": (2 * 136, 64), "w2": (64, 136), "dy": (72, 64)}
    return mlp_choice.errors_of(gated_mlp, exact, shapes, device)


def gated_mlp(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, group: Group | None = None) -> torch.Tensor:
    """`(silu(x @ gate.T) * (x @ up.T)) @ w2.T`, (..., C), in the dtype of products: see `product_dtype`.

    Args:
        x: (..., C); with a group (B, t, C), this process's part of each sequence.
        w1: (2 F, C): the rows of `gate`, then those of `up`.
        w2: (C, F).
        group: processes that share F: each has so many rows of `gate` and of `up`, and columns of `w2`.
    """
    dtype = product_dtype(x)
    return _GatedMlp.apply(x.to(dtype), w1.to(dtype), w2.to(dtype), group)


class _GatedMlp(torch.autograd.Function):
    """Keeps the first product's output. Processes that share F gather whole sequences, in the backward pass again.

    The second product is not part of an operator, so a compiled layer that is computed again leaves it out.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, group: Group | None) -> torch.Tensor:
        if group is not None and group.copies:
            before, activated = _peer_product_op(x.flatten(0, -2), w1, group.name, group.size)
            y = peer_products.sum_of_products(activated, w2, group.name, group.size).view(x.shape)
        else:
            whole = x if group is None else end(start_gather(x, group))
            before, activated = _product_op(whole.flatten(0, -2), w1)
            y = (activated @ w2.T).view(whole.shape)
            y = y if group is None else end(start_reduce_scatter(y, group))
        ctx.save_for_backward(x, w1, w2, before)
        ctx.group = group
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,), (x, w1, w2, before), group = grads, ctx.saved_tensors, ctx.group
        _, wants_w1, wants_w2, _ = ctx.needs_input_grad
        if group is not None and group.copies:
            given = x.flatten(0, -2), dy.flatten(0, -2), w1, w2, before
            own, others, dw1, dw2 = _peer_gradients_op(*given, group.name, group.size, wants_w1, wants_w2)
            dx = peer_products.end_sum(own, others).view(x.shape)
            return dx, _deinterleaved(dw1) if wants_w1 else None, dw2 if wants_w2 else None, None
        if group is not None:
            dy = end(start_gather(dy, group))
            x = start_gather(x, group)  # while the next two products are computed
        rows = dy.flatten(0, -2)
        dx, dbefore, activated = _gradient_op(rows, w1, w2, before)
        dx = dx.view(dy.shape)
        if group is not None:
            dx, x = start_reduce_scatter(dx, group), end(x)
        dw2 = rows.T @ activated if wants_w2 else None
        dw1 = _deinterleaved(dbefore.T @ x.flatten(0, -2)) if wants_w1 else None
        return dx if group is None else end(dx), dw1, dw2, None


def _interleaved(w1: torch.Tensor) -> torch.Tensor:
    """The rows of gate and up, interleaved, as quack has them: a tile then has the gate and the up of its channels."""
    return w1.view(2, w1.shape[0] // 2, -1).transpose(0, 1).reshape(w1.shape)


def _deinterleaved(w1: torch.Tensor) -> torch.Tensor:
    return w1.view(w1.shape[0] // 2, 2, -1).transpose(0, 1).reshape(w1.shape)


# The compiler calls operators and does not look into them. The backward pass interleaves the weights in its operator:
# the compiler would do it in the forward pass and keep them, even where FSDP frees the weights that it has gathered.
@torch.library.custom_op(
    "fiddlehead::gated_product", mutates_args=(), schema="(Tensor x, Tensor w1) -> (Tensor before, Tensor activated)"
)
def _product_op(x: torch.Tensor, w1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _product(x.contiguous(), w1.contiguous())


@_product_op.register_fake
def _(x: torch.Tensor, w1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0], w1.shape[0]), x.new_empty(x.shape[0], w1.shape[0] // 2)


@torch.library.custom_op(
    "fiddlehead::gated_gradient",
    mutates_args=(),
    schema="(Tensor dy, Tensor w1, Tensor w2, Tensor before) -> (Tensor dx, Tensor dbefore, Tensor activated)",
)
def _gradient_op(
    dy: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dbefore, activated = _gradient(dy.contiguous(), w2, before)
    return dbefore @ _interleaved(w1), dbefore, activated


@_gradient_op.register_fake
def _(
    dy: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    activated = before.new_empty(before.shape[0], before.shape[1] // 2)
    return dy.new_empty(dy.shape[0], w1.shape[1]), before.new_empty(before.shape), activated


# The same for processes that share F and copy from each other's memories, from the rows that this process has itself.
@torch.library.custom_op(
    "fiddlehead::peer_gated_product",
    mutates_args=(),
    schema="(Tensor x, Tensor w1, str group, int size) -> (Tensor before, Tensor activated)",
)
def _peer_product_op(x: torch.Tensor, w1: torch.Tensor, group: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    outs = _shapes_of_product(x, w1, group, size)
    w1, parts = w1.contiguous(), list(zip(*(out.chunk(size) for out in outs), strict=True))
    connected(group).gather_while(x.contiguous(), lambda each, rows: _product(rows, w1, parts[each]))
    return outs


@_peer_product_op.register_fake
def _shapes_of_product(x: torch.Tensor, w1: torch.Tensor, group: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    N = size * x.shape[0]
    return x.new_empty(N, w1.shape[0]), x.new_empty(N, w1.shape[0] // 2)


@torch.library.custom_op(
    "fiddlehead::peer_gated_gradients",
    mutates_args=(),
    schema="(Tensor x, Tensor dy, Tensor w1, Tensor w2, Tensor before, str group, int size, bool of_w1, bool of_w2)"
    " -> (Tensor own, Tensor others, Tensor dw1, Tensor dw2)",
)
def _peer_gradients_op(
    x: torch.Tensor,
    dy: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    before: torch.Tensor,
    group: str,
    size: int,
    of_w1: bool,
    of_w2: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `end_sum` turns into the gradient of x, and the gradients of w1, interleaved, and of w2."""
    peers = connected(group)
    dbefore, activated = torch.empty_like(before), before.new_empty(before.shape[0], before.shape[1] // 2)
    parts = list(zip(*(each.chunk(size) for each in (before, dbefore, activated)), strict=True))

    def compute(each: int, rows: torch.Tensor) -> None:
        before, *outs = parts[each]
        _gradient(rows, w2, before, outs)

    dy = peers.gather_while(dy.contiguous(), compute, keep=of_w2)
    gathering = peers.gather(x.contiguous()) if of_w1 else None
    own, others = peers.start_sum(dbefore, _interleaved(w1))
    dw2 = dy.T @ activated if of_w2 else w2.new_empty(0)
    return own, others, w1.new_empty(0) if gathering is None else dbefore.T @ gathering.end(), dw2


@_peer_gradients_op.register_fake
def _(
    x: torch.Tensor,
    dy: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    before: torch.Tensor,
    group: str,
    size: int,
    of_w1: bool,
    of_w2: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dw1, dw2 = (each.new_empty(each.shape if wanted else 0) for each, wanted in ((w1, of_w1), (w2, of_w2)))
    return x.new_empty(x.shape), x.new_empty(x.shape), dw1, dw2


def _product(x: torch.Tensor, w1: torch.Tensor, outs: Sequence[torch.Tensor] = ()) -> Any:
    """`x @ w1.T`, (N, 2 F), with gate and up interleaved; and the activations, (N, F). `outs`: where they are to be."""
    quack = importlib.import_module("quack.gemm_interface")
    config = _kernel(tile_m=192, cluster_n=2)
    given = dict(zip(("preact_out", "postact_out"), outs, strict=False))
    # "B": the kernel reads the rows of gate and up where they are.
    return quack.gemm_gated(x, w1.T, activation="swiglu", config=config, concat_layout=("B",), **given)


def _gradient(dy: torch.Tensor, w2: torch.Tensor, before: torch.Tensor, outs: Sequence[torch.Tensor] = ()) -> Any:
    """The gradient of `before`, (N, 2 F), interleaved as it is; and the activations again, (N, F). `outs`: as above."""
    quack = importlib.import_module("quack.gemm_interface")
    config = _kernel(tile_m=128, cluster_n=2)
    given = dict(zip(("dx_out", "postact_out"), outs, strict=False))
    return quack.gemm_dgated(dy, w2, before, activation="swiglu", config=config, dynamic_scheduler=False, **given)


@lru_cache
def _kernel(*, tile_m: int, cluster_n: int) -> Any:
    """The kernel that was fastest on an H100 for 32,768 tokens of Llama 3.2 1B; quack's search takes half a minute."""
    configs = importlib.import_module("quack.gemm_config")
    return configs.GemmConfig(
        tile_m=tile_m, tile_n=128, pingpong=True, is_dynamic_persistent=False, cluster_m=1, cluster_n=cluster_n
    )
