"""Computes attention for some of the key/value heads at a time, with the query heads that read them.

Only some heads' queries, keys, values and gradients are then in memory, and the kernel's float32 sum of the gradient of
their queries. All heads have the outputs of attention, which the backward pass and `linear_proj` need, and the gradient
of `linear_qkv`'s output. So these two layers have the same products as without tiles, and only the gradients of the
norms of heads are summed over tiles.

Shapes: B batch, T time, C hidden size, H query heads, G key/value heads, D head dim; a tile has n of the G heads, and
n H / G query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F

from fiddlehead.attention.parts import Part, attend_to_part, part_gradients
from fiddlehead.errors import Problem
from fiddlehead.models.autocast import product_dtype
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.norms import rms_norm_gradients, rms_normed
from fiddlehead.models.rope import rotate

Tensor = torch.Tensor

TOKENS = 32768
"""For so many tokens at a time, queries and keys are projected, normed and turned, which takes several tensors."""


class Tensors(NamedTuple):
    """What attention computes with, besides the output layer's weights."""

    x: Tensor
    """The input, (B, T, C)."""
    weight: Tensor
    """Of `linear_qkv`, ((H + 2 G) D, C)."""
    bias: Tensor | None
    q_norm: Tensor | None
    """The weight of the norm of each query head, (D,), and the same of keys; both or none."""
    k_norm: Tensor | None
    cos: Tensor | None
    """As in `Rope`; both or none."""
    sin: Tensor | None
    cu_seqlens: Tensor | None
    """Where documents are kept apart."""


class Numbers(NamedTuple):
    """How attention is computed."""

    heads: int
    """H."""
    groups: int
    """G."""
    at_a_time: int
    """n, a divisor of G."""
    scale: float
    softcap: float
    left: int
    """The window."""
    right: int
    eps: float
    """Of the norms of heads."""
    zero_centered: bool
    max_seqlen: int
    """Of documents; 0 without them."""
    training: bool
    """Whether gradients are wanted."""
    backend: str


def refused(
    config: TransformerConfig, at_a_time: int, *, tensor: int = 1, context: int = 1, adapters: bool = False
) -> list[Problem]:
    """Why a model's attention cannot be computed for so many key/value heads at a time; empty if it can.

    Args:
        tensor: processes that share each layer.
        context: processes that share each sequence.
        adapters: whether attention has adapters.
    """
    reasons = {
        "config.qk_layernorm='projection' norms all heads together; set None here": config.qk_layernorm == "projection",
        "config.attention_sinks=True: a tile has no sinks; set None here": config.attention_sinks,
        f"config.attention_dropout={config.attention_dropout!r}: a tile has no dropout; set None here, or 0 there": (
            config.attention_dropout > 0
        ),
        "ranks share its heads; set trainer.strategy.tensor_parallel=1, or None here": tensor > 1,
        "ranks share its sequences; set trainer.strategy.context_parallel=1, or None here": context > 1,
        "adapters change its products; set model.lora=None, or None here": adapters,
    }
    problems = [Problem("tiled_attention", at_a_time, reason) for reason, holds in reasons.items() if holds]
    if config.groups % at_a_time:
        allowed = (*(n for n in range(1, config.groups + 1) if config.groups % n == 0), None)
        message = f"does not divide the {config.groups} key/value heads"
        problems.append(Problem("tiled_attention", at_a_time, message, allowed))
    return problems


def attend_in_tiles(of: Tensors, proj: Tensor, proj_bias: Tensor | None, numbers: Numbers) -> Tensor:
    """Causal self-attention of all heads, and the product with the output layer's weights: (B, T, C).

    Args:
        proj: the weights of `linear_proj`, (C, H D).

    Raises:
        ConfigError: no backend serves the call of a tile by passes.
    """
    dtype = product_dtype(of.x)
    bias, proj_bias = (None if each is None else each.to(dtype) for each in (of.bias, proj_bias))
    tensors = of._replace(x=of.x.to(dtype), weight=of.weight.to(dtype), bias=bias)
    return _InTiles.apply(*tensors, proj.to(dtype), proj_bias, numbers)  # type: ignore[return-value]


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, proj, proj_bias, numbers = args
        out, lse = _forward(*tensors, *numbers)
        ctx.save_for_backward(*tensors, proj, out, lse)
        ctx.numbers = numbers
        return F.linear(out.flatten(2), proj, proj_bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        needs_x, needs_weight, needs_bias, needs_q, needs_k, *_, needs_proj, needs_proj_bias, _ = ctx.needs_input_grad
        # A layer that is computed again gives its tensors once, so that each is freed where it is needed no more.
        *tensors, proj, out, lse = ctx.saved_tensors
        dqkv, dq_norm, dk_norm = _backward(dy, proj, out, lse, *tensors, *ctx.numbers)
        dproj = dy.flatten(0, 1).T @ out.flatten(0, 1).flatten(1) if needs_proj else None
        dproj_bias = dy.sum(dim=(0, 1)) if needs_proj_bias else None
        del out, lse
        x, weight = tensors[:2]
        del tensors
        dweight = dqkv.flatten(0, 1).T @ x.flatten(0, 1) if needs_weight else None
        dbias = dqkv.sum(dim=(0, 1)) if needs_bias else None
        del x
        dx = dqkv @ weight if needs_x else None
        norms = (dq_norm if needs_q else None, dk_norm if needs_k else None)
        return dx, dweight, dbias, *norms, None, None, None, dproj, dproj_bias, None


class _Tile(NamedTuple):
    """The heads of a tile."""

    queries: slice
    """Of the H query heads; the next two: of the H + 2 G heads that `linear_qkv` gives."""
    keys: slice
    values: slice

    @property
    def rows(self) -> tuple[slice, slice, slice]:
        """Its rows among the heads that `linear_qkv` gives."""
        return self.queries, self.keys, self.values


def _tiles(how: Numbers) -> Iterator[_Tile]:
    H, G, n = how.heads, how.groups, how.at_a_time
    for first in range(0, G, n):
        queries = slice(first * H // G, (first + n) * H // G)
        yield _Tile(queries, *(slice(start + first, start + first + n) for start in (H, H + G)))


def _parts(of: Tensors) -> Iterator[slice]:
    """The tokens of each sequence, `TOKENS` of all sequences at a time."""
    B, T, _ = of.x.shape
    step = max(1, TOKENS // B)
    return (slice(start, start + step) for start in range(0, T, step))


def _of_tile(of: Tensors, how: Numbers, tile: _Tile) -> tuple[Tensor, Tensor | None]:
    """The rows of the weight that give the tile's queries, keys and values, one after another; and of the bias."""
    D = of.weight.shape[0] // (how.heads + 2 * how.groups)
    weight = torch.cat([of.weight.unflatten(0, (-1, D))[rows] for rows in tile.rows]).flatten(0, 1)
    if of.bias is None:
        return weight, None
    return weight, torch.cat([of.bias.unflatten(0, (-1, D))[rows] for rows in tile.rows]).flatten()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of some tokens of each sequence, (B, t, C) to (B t, out)."""
    # As a matrix, with which the product and the bias are added before they are rounded.
    return F.linear(x.reshape(-1, x.shape[-1]), weight, bias)


def _projected(of: Tensors, how: Numbers, tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
    """The tile's queries, keys and values, (B, T, heads, D), normed and turned."""
    weight, bias = _of_tile(of, how, tile)
    queries, keys, values = sizes = [rows.stop - rows.start for rows in tile.rows]
    B, T, _ = of.x.shape
    qkv = of.x.new_empty(B, T, queries + keys + values, len(weight) // (queries + keys + values))
    for tokens in _parts(of):
        some = _product(of.x[:, tokens], weight, bias).view(B, -1, *qkv.shape[2:])
        qk, qkv[:, tokens, queries + keys :] = some.split([queries + keys, values], dim=2)
        if of.q_norm is not None and of.k_norm is not None:
            parts = zip(qk.split([queries, keys], dim=2), (of.q_norm, of.k_norm), strict=True)
            qk = torch.cat([rms_normed(x, w, how.eps, zero_centered=how.zero_centered) for x, w in parts], dim=2)
        if of.cos is not None and of.sin is not None:
            qk = rotate(qk, (of.cos[..., tokens, :, :], of.sin[..., tokens, :, :]))
        qkv[:, tokens, : queries + keys] = qk
    q, k, v = qkv.split(sizes, dim=2)
    return q, k, v


def _part(of: Tensors, how: Numbers) -> Part:
    part = Part(how.scale, True, (how.left, how.right), how.softcap, training=how.training, backend=how.backend)
    if of.cu_seqlens is None:
        return part
    return part._replace(
        cu_seqlens_q=of.cu_seqlens,
        cu_seqlens_k=of.cu_seqlens,
        max_seqlen_q=how.max_seqlen,
        max_seqlen_k=how.max_seqlen,
    )


# One operator for each pass, so that a compiled layer has them as one node each, as any other attention, and so that
# selective recomputation keeps what the first one gives.
_KINDS = {int: "SymInt", float: "float", bool: "bool", str: "str"}
_NUMBERS = ", ".join(f"{_KINDS[kind]} {name}" for name, kind in get_type_hints(Numbers).items())
_TENSORS = "Tensor x, Tensor weight" + "".join(f", Tensor? {name}" for name in Tensors._fields[2:])


def _unflattened(args: tuple[Any, ...]) -> tuple[Tensors, Numbers]:
    return Tensors(*args[: len(Tensors._fields)]), Numbers(*args[len(Tensors._fields) :])


@torch.library.custom_op(
    "fiddlehead::head_tiles_forward", mutates_args=(), schema=f"({_TENSORS}, {_NUMBERS}) -> (Tensor out, Tensor lse)"
)
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    """What attention gives, (B, T, H, D), and the logarithm of each softmax's sum, (B, H, T): +inf without keys."""
    of, how = _unflattened(args)
    out, lse = _like_outputs(of, how)
    for tile in _tiles(how):
        q, k, v = _projected(of, how, tile)
        out[:, :, tile.queries], lse[:, tile.queries] = attend_to_part(q, k, v, _part(of, how))
        del q, k, v  # before the next tile's
    return out, lse.masked_fill_(lse == float("-inf"), float("inf"))


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return _like_outputs(*_unflattened(args))


def _like_outputs(of: Tensors, how: Numbers) -> tuple[Tensor, Tensor]:
    (B, T, _), H = of.x.shape, how.heads
    wide = torch.promote_types(of.x.dtype, torch.float32)
    D = of.weight.shape[0] // (H + 2 * how.groups)
    return of.x.new_empty(B, T, H, D), of.x.new_empty(B, H, T, dtype=wide)


@torch.library.custom_op(
    "fiddlehead::head_tiles_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor proj, Tensor out, Tensor lse, {_TENSORS}, {_NUMBERS}) "
    "-> (Tensor dqkv, Tensor dq_norm, Tensor dk_norm)",
)
def _backward(dy: Tensor, proj: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what `linear_qkv` gives, (B, T, (H + 2 G) D), and of the norms' weights, if there are any."""
    of, how = _unflattened(args)
    dqkv = of.x.new_empty(*of.x.shape[:2], how.heads + 2 * how.groups, out.shape[-1])
    norms = (of.q_norm, of.k_norm)
    of_norms = [dqkv.new_zeros(0 if norm is None else len(norm), dtype=lse.dtype) for norm in norms]
    for tile in _tiles(how):
        q, k, v = _projected(of, how, tile)
        dout = (dy @ proj.unflatten(1, out.shape[2:])[:, tile.queries].flatten(1)).view(q.shape)
        of_heads = out[:, :, tile.queries].contiguous(), lse[:, tile.queries].contiguous()
        gradients = part_gradients(dout, q, k, v, *of_heads, _part(of, how))
        del q, k, v, dout, of_heads
        _through_projection(gradients, of, how, tile, dqkv, of_norms)
        del gradients  # before the next tile's
    dq_norm, dk_norm = (
        found.to(of.x.dtype if norm is None else norm.dtype) for found, norm in zip(of_norms, norms, strict=True)
    )
    return dqkv.flatten(2), dq_norm, dk_norm


@_backward.register_fake
def _(dy: Tensor, proj: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    of, _ = _unflattened(args)
    x = of.x
    norms = (x.new_empty(0) if norm is None else torch.empty_like(norm) for norm in (of.q_norm, of.k_norm))
    dq_norm, dk_norm = norms
    return x.new_empty(*x.shape[:2], len(of.weight)), dq_norm, dk_norm


def _through_projection(
    gradients: tuple[Tensor, Tensor, Tensor],
    of: Tensors,
    how: Numbers,
    tile: _Tile,
    dqkv: Tensor,
    of_norms: list[Tensor],
) -> None:
    """Writes a tile's part of `dqkv` from the gradients of its queries, keys and values, and adds to `of_norms`."""
    weight, bias = _of_tile(of, how, tile)
    for tokens in _parts(of):
        parts = [x[:, tokens] for x in gradients]
        if of.cos is not None and of.sin is not None:  # the gradient turns back
            back = of.cos[..., tokens, :, :], -of.sin[..., tokens, :, :]
            parts[:2] = [rotate(x, back) for x in parts[:2]]
        if of.q_norm is not None and of.k_norm is not None:
            sizes = [x.shape[2] for x in parts]
            some = _product(of.x[:, tokens], weight, bias).view(len(of.x), -1, sum(sizes), dqkv.shape[-1])
            for number, (x, norm) in enumerate(zip(some.split(sizes, dim=2), (of.q_norm, of.k_norm), strict=False)):
                parts[number], of_norm = rms_norm_gradients(
                    parts[number], x, norm, how.eps, zero_centered=how.zero_centered
                )
                of_norms[number] += of_norm
        for rows, part in zip(tile.rows, parts, strict=True):
            dqkv[:, tokens, rows] = part
