"""Plain attention in float32 (float64 for float64 inputs): it defines the right result, and is slow.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, D head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from fiddlehead.attention.backends.backend import Extras, Passes
from fiddlehead.attention.backends.masks import alibi_bias, gathered, visible
from fiddlehead.attention.spec import AttentionSpec, Target

NAME = "reference"
PLACE = 90
SWITCHES: tuple[str, ...] = ("NVTE_UNFUSED_ATTN",)


def place(spec: AttentionSpec, target: Target) -> float | None:
    """Behind every kernel."""
    return PLACE


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """It serves every floating-point call, in memory quadratic in the sequence length."""
    if not spec.dtype.is_floating_point:
        return f"needs a floating-point dtype, not {spec.dtype}"
    return None


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> torch.Tensor:
    """Attend: q (B, T, H, D), k and v (B, S, G, D), or packed; returns q's shape and dtype."""
    k, v = gathered(k, extras), gathered(v, extras)
    if spec.packed:  # one sequence, of which only the parts of the same document see each other
        q, k, v = q[None], k[None], v[None]
    if torch.compiler.is_compiling():
        left, right = spec.window_size
        out = forward(
            q,
            k,
            v,
            cu_seqlens_q=extras.cu_seqlens_q,
            cu_seqlens_k=extras.cu_seqlens_k,
            padding_mask=extras.padding_mask,
            alibi_slopes=extras.alibi_slopes,
            sinks=extras.sinks,
            cache_lengths=extras.cache_lengths,
            causal=spec.causal,
            left=left,
            right=right,
            softcap=spec.softcap,
            dropout=spec.dropout,
            scale=scale,
        )[0]
    else:
        out = attention(q, k, v, spec, scale, extras)
    return out[0] if spec.packed else out


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    scale: float,
    extras: Extras,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Attend, with a leading batch dimension on every tensor; packed sequences are one batch."""
    with without_autocast(q.device):
        mask = visible(q.shape[1], k.shape[1], spec, extras, q.device)
        weights, _ = softmax(q, k, mask, spec, scale, extras)
        if spec.dropout:
            weights = weights * kept(weights, spec.dropout, generator)
        # In the weights' own order of dimensions: another one would copy them.
        out = torch.einsum("bgrts,bsgd->bgrtd", weights, v.to(weights.dtype)).permute(0, 3, 1, 2, 4)
        out = without_blind(out, mask)
    return out.flatten(2, 3).to(q.dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast, which would make the products bfloat16; devices such as "meta" have none to turn off."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    spec: AttentionSpec,
    scale: float,
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention weights before dropout, and the scores before mask and ALiBi, both (B, G, R, T, S)."""
    logits, scores = _logits(q, k, mask, spec, scale, extras)
    if extras.sinks is None:
        return logits.softmax(dim=-1), scores
    B, G, R, T, _ = logits.shape
    sinks = extras.sinks.to(logits.dtype).view(1, G, R, 1, 1).expand(B, -1, -1, T, -1)
    return torch.cat([logits, sinks], dim=-1).softmax(dim=-1)[..., :-1], scores


def _logits(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    spec: AttentionSpec,
    scale: float,
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores with mask and ALiBi, and without them, both (B, G, R, T, S)."""
    (T, H), (S, G) = q.shape[1:3], k.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("btgrd,bsgd->bgrts", q.to(dtype).unflatten(2, (G, H // G)) * scale, k.to(dtype))
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    logits = scores
    if extras.alibi_slopes is not None:
        logits = logits - alibi_bias(T, S, extras, dtype).unflatten(1, (G, H // G))
    if mask is not None:  # by a finite number: the softmax of -inf alone is NaN
        logits = logits.masked_fill(~mask[:, None, None], torch.finfo(dtype).min)
    return logits, scores


def without_blind(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x (B, T, G, R, D) with zeros for queries that see no key, to which `softmax` gives equal weights."""
    return x if mask is None else x.masked_fill(~mask.any(dim=-1)[:, :, None, None, None], 0.0)


def _part_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if spec.packed:
        q, k, v = q[None], k[None], v[None]
    with without_autocast(q.device):
        mask = visible(q.shape[1], k.shape[1], spec, extras, q.device)
        logits, _ = _logits(q, k, mask, spec, scale, extras)
        lse = logits.logsumexp(dim=-1, keepdim=True)
        out = without_blind(torch.einsum("bgrts,bsgd->btgrd", (logits - lse).exp(), v.to(logits.dtype)), mask)
        lse = lse.squeeze(-1).flatten(1, 2)
        if mask is not None:
            lse = lse.masked_fill(~mask.any(dim=-1)[:, None], float("-inf"))
    out = out.flatten(2, 3).to(q.dtype)
    return (out[0], lse[0], lse.new_empty(0)) if spec.packed else (out, lse, lse.new_empty(0))


def _part_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    state: torch.Tensor,
    spec: AttentionSpec,
    scale: float,
    extras: Extras,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    if spec.packed:
        dout, q, k, v, out, lse = (x[None] for x in (dout, q, k, v, out, lse))
    G = k.shape[2]
    with without_autocast(q.device):
        mask = visible(q.shape[1], k.shape[1], spec, extras, q.device)
        logits, scores = _logits(q, k, mask, spec, scale, extras)
        weights = (logits - lse.unflatten(1, (G, -1))[..., None]).exp()
        d_out, out = (x.to(weights.dtype).unflatten(2, (G, -1)) for x in (dout, out))
        dv = torch.einsum("bgrts,btgrd->bsgd", weights, d_out).to(q.dtype)
        mean = (d_out * out).sum(dim=-1).permute(0, 2, 3, 1)[..., None]
        d_weights = torch.einsum("btgrd,bsgd->bgrts", d_out, v.to(weights.dtype))
        dq, dk = _gradients(weights * (d_weights - mean) * scale, scores, q, k, spec.softcap)
    return (dq[0], dk[0], dv[0], None) if spec.packed else (dq, dk, dv, None)


PASSES = Passes(_part_forward, _part_backward)


def kept(weights: torch.Tensor, dropout: float, generator: torch.Generator | None) -> torch.Tensor:
    """The factor of each weight under dropout: 0, or 1 / (1 - dropout)."""
    return torch.empty_like(weights).bernoulli_(1 - dropout, generator=generator) / (1 - dropout)


# Under torch.compile the two passes are an operator each, so that a graph shows them as one node, as any other backend.
@torch.library.custom_op("fiddlehead::reference_forward", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    cache_lengths: torch.Tensor | None,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` with the fields of spec and extras one by one; also returns the seed of its dropout."""
    extras = Extras(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        padding_mask=padding_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        cache_lengths=cache_lengths,
    )
    spec = _spec(q, k, extras, causal, left, right, softcap, dropout)
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.int64)
    return attention(q, k, v, spec, scale, extras, _generator(seed, spec, q.device)), seed


@forward.register_fake
def _(q, *rest):
    return torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("fiddlehead::reference_backward", mutates_args=())
def backward(
    out_gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    cache_lengths: torch.Tensor | None,
    seed: torch.Tensor,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v and sinks, the weights computed once more."""
    extras = Extras(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        padding_mask=padding_mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        cache_lengths=cache_lengths,
    )
    spec = _spec(q, k, extras, causal, left, right, softcap, dropout)
    G = k.shape[2]
    with without_autocast(q.device):
        mask = visible(q.shape[1], k.shape[1], spec, extras, q.device)
        weights, scores = softmax(q, k, mask, spec, scale, extras)
        d_out = without_blind(out_gradient.to(weights.dtype).unflatten(2, (G, -1)), mask)
        d_weights = torch.einsum("btgrd,bsgd->bgrts", d_out, v.to(weights.dtype))
        dropped = weights
        if dropout:
            factor = kept(weights, dropout, _generator(seed, spec, q.device))
            dropped, d_weights = weights * factor, d_weights * factor
        dv = torch.einsum("bgrts,btgrd->bsgd", dropped, d_out).to(q.dtype).contiguous()
        mean = (weights * d_weights).sum(dim=-1, keepdim=True)
        dq, dk = _gradients(weights * (d_weights - mean) * scale, scores, q, k, softcap)
    d_sinks = q.new_zeros(0)
    if sinks is not None:  # the sink's own weight is what the others leave of 1
        d_sinks = ((weights.sum(dim=-1, keepdim=True) - 1) * mean).sum(dim=(0, 3, 4)).flatten().to(sinks.dtype)
    return dq, dk, dv, d_sinks


def _gradients(
    d_logits: torch.Tensor, scores: torch.Tensor, q: torch.Tensor, k: torch.Tensor, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of q and k from those of the logits."""
    if softcap:
        d_logits = d_logits * (1 - (scores / softcap) ** 2)
    dq = torch.einsum("bgrts,bsgd->btgrd", d_logits, k.to(d_logits.dtype)).flatten(2, 3)
    dk = torch.einsum("bgrts,btgrd->bsgd", d_logits, q.to(d_logits.dtype).unflatten(2, (k.shape[2], -1)))
    return dq.to(q.dtype).contiguous(), dk.to(q.dtype).contiguous()


@backward.register_fake
def _(out_gradient, q, k, v, cu_q, cu_k, padding_mask, alibi_slopes, sinks, *rest):
    d_sinks = q.new_zeros(0) if sinks is None else torch.empty_like(sinks)
    return *(x.new_empty(x.shape) for x in (q, k, v)), d_sinks


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:9], output[1])
    ctx.numbers = inputs[9:]


def _backward(ctx, out_gradient, _):
    *d_qkv, d_sinks = backward(out_gradient, *ctx.saved_tensors, *ctx.numbers)
    sinks = ctx.saved_tensors[7]
    return *d_qkv, *[None] * 4, None if sinks is None else d_sinks, *[None] * 7


forward.register_autograd(_backward, setup_context=_setup_context)


def _spec(
    q: torch.Tensor,
    k: torch.Tensor,
    extras: Extras,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    dropout: float,
) -> AttentionSpec:
    """The fields that `attention` and the mask go by."""
    return AttentionSpec(
        dtype=q.dtype,
        head_dim=q.shape[-1],
        num_attention_heads=q.shape[-2],
        num_query_groups=k.shape[-2],
        causal=causal,
        window_size=(left, right),
        softcap=softcap,
        dropout=dropout,
        padding_mask=extras.padding_mask is not None,
        packed=extras.cu_seqlens_q is not None,
        cached=extras.cache_lengths is not None,
    )


def _generator(seed: torch.Tensor, spec: AttentionSpec, device: torch.device) -> torch.Generator | None:
    return torch.Generator(device).manual_seed(int(seed)) if spec.dropout else None
