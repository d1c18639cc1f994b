"""NVIDIA cuDNN's fused attention, through PyTorch.

It supports grouped heads, and its memory is linear in the sequence length. Only a padding mask is materialized, as a
(T, S) matrix for each sequence in the inputs' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fiddlehead.attention.backends import reference
from fiddlehead.attention.backends.backend import FIRST, Extras, Passes, generation
from fiddlehead.attention.backends.hopper import cudnn_starts_first, gradient_padding, is_decoding
from fiddlehead.attention.backends.masks import visible
from fiddlehead.attention.backends.sdpa import HALF, dtype_name, first, hiding, outside
from fiddlehead.attention.spec import AttentionSpec, Target

NAME = "cudnn"
PLACE = 40
SWITCHES: tuple[str, ...] = ("NVTE_FUSED_ATTN",)


def place(spec: AttentionSpec, target: Target) -> float | None:
    """Behind flash-attn 3 and 4; on Hopper ahead of them on short sequences, as an H100 measured it."""
    kind = generation(spec, target)
    if kind != "hopper":
        return PLACE if kind in ("ampere", "blackwell") else None
    if is_decoding(spec):
        return 54
    if cudnn_starts_first(spec):
        return FIRST
    # flash-attn 4 makes padded copies for its gradients, which only longer sequences are worth.
    short = 0 < spec.length <= (2048 if spec.head_dim <= 80 else 4096)
    return 25 if spec.training and gradient_padding(spec.head_dim) and short else PLACE


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The rules are those of PyTorch's sdp_utils.cpp and MHA.cpp, in 2.11 to 2.13.

    Head dims above 128 are refused although some GPUs support them: PyTorch releases differ in the cuDNN versions for
    which they allow them.
    """
    version = target.packages.cudnn
    number = tuple(int(part) for part in (version or "0").split("."))
    return first(
        [
            outside(target, 80, 121),
            (version is None, "this PyTorch is built without cuDNN"),
            (number < (9,), f"cuDNN {version}: needs 9 or newer"),
            (spec.dtype not in HALF, f"{dtype_name(spec)}: only float16 and bfloat16"),
            (spec.head_dim % 8, f"head_dim={spec.head_dim}: only multiples of 8"),
            (spec.head_dim > 128, f"head_dim={spec.head_dim}: at most 128 (preference)"),
            (spec.softcap, "softcap: PyTorch's cuDNN attention has none"),
            (spec.alibi, "alibi: only as a mask in the inputs' dtype, which would round the distances"),
            (spec.sinks, "sinks: PyTorch's cuDNN attention has none"),
            (spec.window_size != (-1, -1), "window: PyTorch's cuDNN attention would need it as a dense mask"),
            (spec.packed, "packed sequences: PyTorch's operator for them cannot be traced and takes no grouped heads"),
            (spec.cached, "cache: PyTorch's cuDNN attention has no lengths of filled caches"),
            (
                spec.causal and not spec.same_length,
                "causal with another query than key length: its mask is aligned top-left",
            ),
            (spec.deterministic and spec.training, "deterministic: its gradients are not"),
            (spec.dropout and (9, 11) <= number < (9, 14), f"dropout: cuDNN {version} has none (9.11 to 9.13)"),
        ]
    )


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> torch.Tensor:
    """Attend: q (B, T, H, D), k and v (B, S, G, D); returns (B, T, H, D)."""
    T, S = q.shape[1], k.shape[1]
    mask = visible(T, S, spec, extras, q.device) if spec.padding_mask else None
    if S == 1:  # cuDNN wants two keys: another one, that is hidden
        mask = torch.ones(1, T, 1, dtype=torch.bool, device=q.device) if mask is None else mask
        mask = F.pad(mask, (0, 1))
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    if spec.dropout and T == 1:  # and two queries, where it drops weights
        q = F.pad(q, (0, 0, 0, 0, 0, 1))
        mask = None if mask is None else mask.expand(-1, 2, -1)
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        None if mask is None else hiding(mask, q.dtype)[:, None],
        spec.training,
        spec.dropout,
        spec.causal and mask is None,
        False,  # return_debug_mask
        scale=scale,
    )[0].transpose(1, 2)
    if spec.padding_mask:
        assert mask is not None
        out = out.masked_fill(~mask.any(dim=-1)[:, :, None, None], 0.0)
    return out if out.shape[1] == T else out[:, :T]


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if k.shape[1] == 1:  # cuDNN wants two keys
        return reference.PASSES.forward(q, k, v, spec, scale, extras)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        None,
        True,  # compute_log_sumexp
        0.0,
        spec.causal,
        False,  # return_debug_mask
        scale=scale,
    )
    return out.transpose(1, 2), lse.view(lse.shape[:3]), q.new_empty(0, dtype=torch.int64)


def _backward(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if k.shape[1] == 1:
        return reference.PASSES.backward(dout, q, k, v, out, lse, state, spec, scale, extras)
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # a dropout would be drawn from these two
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(x.transpose(1, 2) for x in (dout, q, k, v, out)),
        lse[..., None],
        unused,
        unused,
        None,  # attn_bias
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        spec.causal,
        scale=scale,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None


PASSES = Passes(_forward, _backward)
