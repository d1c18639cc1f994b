"""PyTorch's memory-efficient attention, from xformers: for older GPUs and for float32.

It has no kernel for grouped heads: keys and values are repeated in memory for all query heads. A padding mask needs
memory linear in the sequence length, ALiBi quadratic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fiddlehead.attention.backends.backend import Extras, generation
from fiddlehead.attention.backends.masks import alibi_bias, seen
from fiddlehead.attention.backends.sdpa import HALF, dtype_name, first, hiding, outside
from fiddlehead.attention.spec import AttentionSpec, Target

FULL, CAUSAL_BOTTOM_RIGHT = 0, 2
"""The operator's numbers for its masks."""

NAME = "sdpa_efficient"
PLACE = 60
SWITCHES: tuple[str, ...] = ()


def place(spec: AttentionSpec, target: Target) -> float | None:
    """First on older GPUs; behind FlexAttention on others, as it repeats the heads of keys and values."""
    return {"cpu": None, "older": PLACE}.get(generation(spec, target), 80)


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The rules are those of PyTorch's sdp_utils.cpp and attention.cu, in 2.11 to 2.13."""
    dtypes = (torch.float16, torch.float32, *([torch.bfloat16] if target.sm >= 80 else []))
    if spec.dtype in HALF:
        multiple = 8 if target.sm >= 70 else 1
    else:
        multiple = 4 if target.sm >= 80 else 1
    biased = spec.alibi or spec.padding_mask
    return first(
        [
            outside(target, 50, 121),
            (
                spec.dtype not in dtypes,
                f"{dtype_name(spec)} on sm{target.sm}: only {', '.join(str(x).removeprefix('torch.') for x in dtypes)}",
            ),
            (spec.head_dim % multiple, f"head_dim={spec.head_dim}: only multiples of {multiple}"),
            (spec.softcap, "softcap: has none"),
            (spec.sinks, "sinks: has none"),
            (
                spec.alibi and spec.dtype in HALF,
                "alibi: only in float32, as its bias in the inputs' dtype would round the distances (preference)",
            ),
            (
                spec.window_size != (-1, -1) and not (spec.causal and spec.same_length),
                "window: only with a causal mask, and as many queries as keys",
            ),
            (spec.cached, "cache: takes no lengths of filled caches but of packed sequences"),
            (spec.packed and biased, "packed sequences: not with a padding mask or ALiBi"),
        ]
    )


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> torch.Tensor:
    """Attend: q (B, T, H, D), k and v (B, S, G, D), or packed; returns q's shape."""
    if spec.num_query_groups != spec.num_attention_heads:
        times = spec.num_attention_heads // spec.num_query_groups
        k, v = (x.repeat_interleave(times, dim=-2) for x in (k, v))
    max_q, max_k = q.shape[1], k.shape[1]
    if spec.packed:
        q, k, v = q[None], k[None], v[None]
        max_q, max_k = extras.max_seqlen_q, extras.max_seqlen_k
    out = forward(
        q,
        k,
        v,
        _bias(q, k, spec, extras),
        extras.cu_seqlens_q,
        extras.cu_seqlens_k,
        max_q,
        max_k,
        CAUSAL_BOTTOM_RIGHT if spec.causal else FULL,
        spec.window_size[0] + 1,  # counts the query's own position; 0 is no window
        spec.dropout,
        scale,
        spec.training,
        spec.deterministic,
    )[0]
    if spec.padding_mask:
        sees_one = seen(q.shape[1], k.shape[1], spec, extras)
        out = out.masked_fill(~sees_one[:, :, None, None], 0.0)
    return out[0] if spec.packed else out


def _bias(q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec, extras: Extras) -> torch.Tensor | None:
    """The bias of the scores, which broadcasts to (B, H, T, S); None: no bias."""
    bias = None
    if extras.padding_mask is not None:
        bias = hiding(extras.padding_mask, q.dtype)[:, None, None, :]
    if spec.alibi:
        distances = -alibi_bias(q.shape[1], k.shape[1], extras, q.dtype)
        bias = distances if bias is None else bias + distances
    return bias


def _laid_out(bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The bias as the kernels read it, 16 numbers at once: rows begin at multiples of that."""
    if bias is None:
        return None
    (B, T, H), S = q.shape[:3], k.shape[1]
    return F.pad(bias, (0, -S % 16))[..., :S].expand(B, H, T, S)


# PyTorch's own autograd formula forgets the window, and its fake backward cannot be traced: these two operators call
# the kernels with everything, and are one node each in a graph.
@torch.library.custom_op(
    "fiddlehead::efficient_forward",
    mutates_args=(),
    device_types="cuda",
    tags=(torch.Tag.nondeterministic_seeded,),
)
def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    mask_type: int,
    window: int,
    dropout: float,
    scale: float,
    training: bool,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the kernel with repeated heads; returns the output, its logsumexp, and the state of dropout."""
    packed = cu_seqlens_q is not None
    return torch.ops.aten._efficient_attention_forward(
        q,
        k,
        v,
        _laid_out(bias, q, k),
        cu_seqlens_q,
        cu_seqlens_k,
        max_q if packed else None,
        max_k if packed else None,
        dropout,
        mask_type,
        training,
        scale=scale,
        window_size=window or None,
    )[:4]


@forward.register_fake
def _(q, k, v, bias, cu_seqlens_q, cu_seqlens_k, max_q, max_k, mask_type, window, dropout, scale, training, _det):
    sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    logsumexp = q.new_empty(sequences, q.shape[2], (max_q + 31) // 32 * 32 if training else 0, dtype=torch.float32)
    seed, offset = (torch.empty((), dtype=torch.int64, device="cpu") for _ in range(2))
    return q.new_empty(q.shape), logsumexp, seed, offset


@torch.library.custom_op("fiddlehead::efficient_backward", mutates_args=(), device_types="cuda")
def backward(
    out_gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    max_q: int,
    max_k: int,
    mask_type: int,
    window: int,
    dropout: float,
    scale: float,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v."""
    gradients = torch.ops.aten._efficient_attention_backward(
        out_gradient.contiguous(),
        q,
        k,
        v,
        _laid_out(bias, q, k),
        out,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        logsumexp,
        dropout,
        seed,
        offset,
        mask_type,
        False,  # bias_requires_grad
        scale=scale,
        num_splits_key=1 if deterministic else None,  # parts of the keys are added in the order they come in
        window_size=window or None,
    )
    dq, dk, dv = (gradient.contiguous() for gradient in gradients[:3])
    return dq, dk, dv


@backward.register_fake
def _(out_gradient, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    tensors, numbers = inputs[:6], inputs[6:]
    *numbers, _training, deterministic = numbers
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = (*numbers, deterministic)


def _backward(ctx, out_gradient, *_):
    return *backward(out_gradient, *ctx.saved_tensors, *ctx.numbers), *[None] * 11


forward.register_autograd(_backward, setup_context=_setup_context)
