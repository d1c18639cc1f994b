"""PyTorch's FlexAttention: a kernel that torch.compile makes for each spec, on GPUs and, without gradients, on CPUs.

Every mask here is a range of keys for each query, `begin` to `end`, and optionally a padding mask. Blocks of scores
outside the ranges of their queries are skipped. Memory is linear in the sequence length, except for one small number
for each block of 128 x 128 scores.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, Q and K blocks of queries and keys.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import types
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from fiddlehead.attention.backends.backend import Extras, generation
from fiddlehead.attention.backends.masks import segments
from fiddlehead.attention.backends.sdpa import HALF, dtype_name, first
from fiddlehead.attention.spec import AttentionSpec, Target

BLOCK = 128
"""Queries, and keys, in one block: the least that all of the kernel's tile sizes divide."""

NAME = "flex"
PLACE = 70
SWITCHES: tuple[str, ...] = ()


def place(spec: AttentionSpec, target: Target) -> float | None:
    """Behind the ready-made kernels; on a CPU, where it compiles C++, behind the reference too."""
    return 95 if generation(spec, target) == "cpu" else PLACE


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The rules are those of PyTorch's flex_attention.py and of inductor's kernels for it, in 2.11 to 2.13."""
    rules: list[tuple[object, str]] = [
        (target.device_type not in ("cpu", "cuda"), f"needs an NVIDIA GPU or a CPU, not {target.device_type}"),
        (spec.dtype not in (*HALF, torch.float32), f"{dtype_name(spec)}: only float16, bfloat16 and float32"),
        (spec.dropout, "dropout: FlexAttention has none"),
        (spec.page_size, "paged cache: its keys must lie in one piece"),
        (
            os.environ.get("TORCHDYNAMO_DISABLE") == "1",
            "TORCHDYNAMO_DISABLE=1: there is no kernel without the compiler",
        ),
    ]
    if target.device_type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        rules += [
            (spec.training, "training: its CPU kernel has no gradients"),
            (spec.sinks, "sinks: its CPU kernel does not return the softmax's sum"),
            (
                torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
                f"its CPU kernel needs AVX2, PyTorch has {torch.backends.cpu.get_cpu_capability()} here",
            ),
            (shutil.which(compiler) is None, f"no C++ compiler: {compiler} is not on the PATH (CXX names another)"),
        ]
    else:
        rules += [
            (target.sm < 80, f"sm{target.sm}: Triton is made for sm80 and later"),
            # As an H100 showed with PyTorch 2.11.
            (spec.sinks and spec.training, "sinks: its gradients through the softmax's sum are wrong"),
            (spec.head_dim < 16, f"head_dim={spec.head_dim}: at least 16"),
            # A PyTorch for CPUs brings no Triton, but it only explains what a GPU elsewhere would do.
            (torch.version.cuda and importlib.util.find_spec("triton") is None, "triton is not installed"),
        ]
    return first(rules)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float, extras: Extras
) -> torch.Tensor:
    """Attend: q (B, T, H, D), k and v (B, S, G, D), or packed; returns q's shape and dtype.

    The first call of a spec compiles for some seconds, as do the first ones with other lengths.

    Raises:
        RuntimeError: a setting turns off torch.compile; FlexAttention would run without a kernel, a hundred times
            slower and in quadratic memory.
    """
    if spec.packed:
        q, k, v = q[None], k[None], v[None]
    if torch.compiler.is_compiling():
        sight = _sight(q.shape[1], k.shape[1], spec, extras, q.device)
        out = _attention(q, k, v, sight, extras.padding_mask, extras.alibi_slopes, extras.sinks, spec, scale)
        return out[0] if spec.packed else out
    sight = _kept_sight(q.shape[1], k.shape[1], spec, extras, q.device)
    padding_mask = extras.padding_mask
    slopes = None if extras.alibi_slopes is None else extras.alibi_slopes.detach()
    captured: tuple[torch.Size, ...] = ()
    if q.device.type == "cpu":
        q, k, v = q.detach(), k.detach(), v.detach()  # also without gradients it refuses tensors that ask for them
        padding_mask = None if padding_mask is None else _with_few_sizes(padding_mask)
        # A call keeps the sizes of what its mask reads, as the CPU's compiler cannot leave them open.
        read = [x for x in (sight.begin, sight.end, sight.position, padding_mask, slopes) if x is not None]
        for x in read:
            torch._dynamo.mark_static(x)
        captured = tuple(x.shape for x in read)
    # Sizes of 1 are compiled anew in any case. All others share a function: the first sizes get a kernel of their own,
    # and from the second on those that vary are left open.
    ones = (q.shape[0] == 1, q.shape[1] == 1, k.shape[1] == 1)
    compiled = _compiled(spec, scale, q.device, ones, captured)
    out = compiled(q, k, v, sight, padding_mask, slopes, extras.sinks, spec, scale)
    return out[0] if spec.packed else out


class Sight(NamedTuple):
    """The keys that each query sees, (T,) or (B, T) int32, and the blocks of visible scores."""

    begin: torch.Tensor
    """The first key that the query sees."""
    end: torch.Tensor
    """The key after the last one."""
    position: torch.Tensor | None
    """The key at which the query stands; only for ALiBi."""
    blocks: tuple[torch.Tensor, ...]
    """The arguments of `BlockMask`: for each block of queries, the number of partly visible blocks of keys, (B or 1, 1,
    Q), and a list of blocks with these first, (B or 1, 1, Q, K); the same for completely visible blocks; and all four
    for each block of keys."""


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sight: Sight,
    padding_mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    spec: AttentionSpec,
    scale: float,
) -> torch.Tensor:
    """The function to compile: q (B, T, H, D), k and v (B, S, G, D) to (B, T, H, D)."""
    if not torch.compiler.is_compiling():
        raise RuntimeError("attention_backend=flex: torch.compile is switched off, and there is no kernel without it")
    begin, end, position = sight.begin, sight.end, sight.position

    def mask_mod(b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        row = (t,) if begin.dim() == 1 else (b, t)
        seen = (begin[row] <= s) & (s < end[row])
        return seen if padding_mask is None else seen & padding_mask[b, s]

    def score_mod(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, t: torch.Tensor, s: torch.Tensor
    ) -> torch.Tensor:
        if spec.softcap:
            score = spec.softcap * torch.tanh(score / spec.softcap)
        if slopes is not None:
            assert position is not None
            slope = slopes[h] if slopes.dim() == 1 else slopes[b, h]
            at = position[t] if position.dim() == 1 else position[b, t]
            score = score - slope * (at - s).abs()
        return score

    lengths = (q.shape[1], k.shape[1])
    out, aux = flex_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=score_mod if spec.softcap or slopes is not None else None,
        block_mask=BlockMask(lengths, *sight.blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod),
        scale=scale,
        # Its other kernel, for decoding, is taken for up to 128 queries but has no tiles for so many.
        kernel_options={"BACKEND": "TRITON"} if q.device.type == "cuda" and spec.training else None,
        enable_gqa=spec.num_query_groups != spec.num_attention_heads,
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is not None:
        assert aux.lse is not None
        # The sink takes its part of the softmax afterwards; a query that sees no key stays at zero.
        out = (out * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None]).to(q.dtype)
    return out.transpose(1, 2)


@lru_cache(maxsize=256)
def _compiled(*kind: Any) -> Callable[..., torch.Tensor]:
    """A compiled `_attention` for one kind of call, with its own code object and name.

    The compiler allows eight recompilations of a code object. By name, also across processes, it remembers which sizes
    and numbers have varied; a softcap that seems to vary would not compile.
    """
    name = f"flex_attention_{hashlib.sha256(repr(kind).encode()).hexdigest()[:16]}"
    function = types.FunctionType(_attention.__code__.replace(co_name=name), _attention.__globals__)
    return torch.compile(function, fullgraph=True)


def _kept_sight(T: int, S: int, spec: AttentionSpec, extras: Extras, device: torch.device) -> Sight:
    """The `_sight` of these lengths or of these very tensors, which all layers of a model share."""
    tensors = (extras.cu_seqlens_q, extras.cu_seqlens_k, extras.padding_mask, extras.cache_lengths)
    given = [x for x in tensors if x is not None]
    kind = (T, S, spec.causal, spec.window_size, spec.alibi)
    if not given:
        return _sight_of_lengths(*kind, device)
    if any(x.is_inference() for x in given):  # whether they have changed is not known of these
        return _finished(T, S, spec, extras, device)
    versions = tuple(x._version for x in given)
    kept: dict[Any, Any] = _sights.setdefault(given[0], {})  # type: ignore[assignment]
    others, seen_versions, sight = kept.get(kind, ((), (), None))
    same = len(others) == len(given) and all(ref() is x for ref, x in zip(others, given, strict=True))
    if sight is None or not same or seen_versions != versions:
        sight = _finished(T, S, spec, extras, device)
        kept[kind] = (tuple(weakref.ref(x) for x in given), versions, sight)
    return sight


_sights = WeakTensorKeyDictionary()
"""The sight of each kind of mask, by the tensor that decides it; it is dropped with that tensor."""


@lru_cache(maxsize=64)
def _sight_of_lengths(
    T: int, S: int, causal: bool, window_size: tuple[int, int], alibi: bool, device: torch.device
) -> Sight:
    spec = AttentionSpec(
        dtype=torch.float32,
        head_dim=1,
        num_attention_heads=1,
        num_query_groups=1,
        causal=causal,
        window_size=window_size,
        alibi=alibi,
    )
    return _finished(T, S, spec, Extras(), device)


def _finished(T: int, S: int, spec: AttentionSpec, extras: Extras, device: torch.device) -> Sight:
    """The `_sight` as a compiled call outside of any graph takes it."""
    with torch.inference_mode(False):  # or it could not serve a later call with gradients
        sight = _sight(T, S, spec, extras, device)
        if device.type == "cpu":
            rows = [None if x is None else _with_few_sizes(x) for x in sight[:3]]
            sight = Sight(*rows, sight.blocks)  # type: ignore[arg-type]
    return sight


def _with_few_sizes(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension filled up to a power of two: each size is compiled for on a CPU."""
    return F.pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))


def _sight(T: int, S: int, spec: AttentionSpec, extras: Extras, device: torch.device) -> Sight:
    """The keys that each query sees, as in `masks.visible`, without waiting for the device."""
    t = torch.arange(T, device=device, dtype=torch.int32)
    if extras.cu_seqlens_q is not None:
        assert extras.cu_seqlens_k is not None
        last = len(extras.cu_seqlens_q) - 2
        n = segments(extras.cu_seqlens_q, T)
        own = n.clamp(max=last)
        begin, end = extras.cu_seqlens_k[:-1][own], extras.cu_seqlens_k[1:][own]
        position = t - extras.cu_seqlens_q[1:][own] + end
        end = torch.where(n <= last, end, begin)  # tokens after the last sequence see nothing
    elif extras.cache_lengths is not None:
        end = extras.cache_lengths[:, None].clamp(max=S).expand(-1, T)
        begin, position = torch.zeros_like(end), t - T + extras.cache_lengths[:, None]
    else:
        begin, end, position = torch.zeros_like(t), torch.full_like(t, S), t + (S - T)
    left, right = spec.window_size
    right = 0 if spec.causal else right
    begin = torch.maximum(begin, position - left) if left >= 0 else begin
    end = torch.minimum(end, position + (right + 1)) if right >= 0 else end
    begin, end = begin.int(), end.int()
    return Sight(begin, end, position.int() if spec.alibi else None, _blocks(begin, end, S, extras.padding_mask))


def _blocks(
    begin: torch.Tensor, end: torch.Tensor, S: int, padding_mask: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The `Sight.blocks` of these ranges of keys; blocks beyond the edge count as partly visible."""
    start = torch.arange(0, S, BLOCK, device=begin.device, dtype=torch.int32)
    stop = start + BLOCK
    some = (_rows(begin, S).amin(-1)[..., None] < stop) & (_rows(end, 0).amax(-1)[..., None] > start)
    whole = (_rows(begin, S).amax(-1)[..., None] <= start) & (_rows(end, 0).amin(-1)[..., None] >= stop)
    if padding_mask is not None:
        real = _rows(padding_mask, False)
        some, whole = some & real.any(-1)[:, None], whole & real.all(-1)[:, None]
    some, whole = (x if x.dim() == 3 else x[None] for x in (some, whole))
    part, whole = (some & ~whole)[:, None], whole[:, None]
    return *_listed(part), *_listed(whole), *_listed(part.mT), *_listed(whole.mT)


def _rows(x: torch.Tensor, filling: float) -> torch.Tensor:
    """(..., T) as (..., Q, BLOCK)."""
    blocks = -(-x.shape[-1] // BLOCK)
    return F.pad(x, (0, blocks * BLOCK - x.shape[-1]), value=filling).unflatten(-1, (blocks, BLOCK))


def _listed(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of visible blocks in each row, (..., Q), and the row's blocks, visible ones first, (..., Q, K)."""
    # The kernels read the rows one after another, whatever the strides.
    order = seen.int().argsort(dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32).contiguous(), order.int().contiguous()
