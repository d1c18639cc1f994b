"""Triton kernels for SwiGLU with adapters around it: one pass forward and one back over a layer's widest tensors.

The adapters' products have 16 to 64 columns, so they take little time beside reading the tensors they are made of. As
products of their own they read them again. Sums over tokens, and over the feed-forward's width, are of parts that
programs write, in a fixed order, so that results repeat.

Shapes: N tokens, F feed-forward size, R rank.
"""

# PyTorch brings Triton only in its builds for GPUs, and a type checker cannot check kernels.
# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 4
"""Of the width in the forward pass: 4, with tiles of 128 columns, was the fastest of those tried on an H100."""
PARTS_OF_TOKENS = {16: 8, 32: 4, 64: 4}
"""In the backward pass, by rank: the fastest of those tried on an H100 with 8,192 tokens of Llama 3 8B, or near it."""


def activate(before: Tensor, z1: Tensor, b1: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """As `adapted_mlp._activate`, for a rank of 16, 32 or 64."""
    (N, width), R = before.shape, z1.shape[1]
    F = width // 2
    activated = before.new_empty(N, F)
    tokens, columns = 64, 128
    chunk = triton.cdiv(triton.cdiv(F, PARTS), columns) * columns
    parts = triton.cdiv(F, chunk)
    z2 = torch.empty(parts, N, R, dtype=torch.float32, device=before.device)
    if N:
        _activate[triton.cdiv(N, tokens), parts](
            before, z1, b1, a2, activated, z2, N, F,
            CHUNK=chunk, TOKENS=tokens, COLUMNS=columns, R=R, num_warps=4, num_stages=2 if R == 64 else 3,
        )  # fmt: skip
    return activated, z2.sum(0).to(before.dtype)


def gradients(
    dactivated: Tensor, before: Tensor, z1: Tensor, b1: Tensor, dz2: Tensor, a2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `adapted_mlp._gradients`, for a rank of 16, 32 or 64."""
    (N, F), R = dactivated.shape, z1.shape[1]
    dbefore = torch.empty_like(before)
    tokens, columns = 32 if R == 64 else 64, 64
    chunk = triton.cdiv(triton.cdiv(N, PARTS_OF_TOKENS[R]), tokens) * tokens
    parts, parts_of_width = triton.cdiv(N, chunk), triton.cdiv(F, columns)
    dz1 = torch.empty(parts_of_width, N, R, dtype=torch.float32, device=before.device)
    small = torch.empty(parts, 3 * F, R, dtype=torch.float32, device=before.device)
    if N:
        _gradients[parts, parts_of_width](
            dactivated, before, z1, b1, dz2, a2, dbefore, dz1, small, N, F,
            CHUNK=chunk, TOKENS=tokens, COLUMNS=columns, R=R, num_warps=4, num_stages=1 if R == 16 else 3,
        )  # fmt: skip
    db1, da2 = small.sum(0).split([2 * F, F])
    return dbefore, dz1.sum(0).to(before.dtype), db1, da2.T


@triton.jit
def _activate(
    before,
    z1,
    b1,
    a2,
    activated,
    z2,
    N,
    F,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
):
    i, j = tl.program_id(0), tl.program_id(1)
    row, r = (i * TOKENS + tl.arange(0, TOKENS))[:, None], tl.arange(0, R)
    at = row.to(tl.int64) * (2 * F)
    z = tl.load(z1 + row * R + r[None, :], mask=row < N, other=0.0)
    total = tl.zeros((TOKENS, R), tl.float32)
    for first in tl.range(j * CHUNK, j * CHUNK + CHUNK, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        inside = (row < N) & (column < F)
        gate = tl.load(before + at + column, mask=inside, other=0.0)
        up = tl.load(before + at + F + column, mask=inside, other=0.0)
        b_gate = tl.load(b1 + column * R + r[:, None], mask=column < F, other=0.0)
        b_up = tl.load(b1 + (F + column) * R + r[:, None], mask=column < F, other=0.0)
        gate = tl.dot(z, b_gate) + gate.to(tl.float32)
        up = tl.dot(z, b_up) + up.to(tl.float32)
        y = (gate / (1 + tl.exp(-gate)) * up).to(activated.dtype.element_ty)
        tl.store(activated + row.to(tl.int64) * F + column, y, mask=inside)
        a = tl.load(a2 + r[:, None] * F + column, mask=column < F, other=0.0)
        total = tl.dot(y, tl.trans(a), total)
    tl.store(z2 + (j * N + row).to(tl.int64) * R + r[None, :], total, mask=row < N)


@triton.jit
def _gradients(
    dactivated,
    before,
    z1,
    b1,
    dz2,
    a2,
    dbefore,
    dz1,
    small,
    N,
    F,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
):
    i, j = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, R)
    dtype = dbefore.dtype.element_ty
    columns = j * COLUMNS + tl.arange(0, COLUMNS)
    column, of_width = columns[None, :], columns[:, None]
    b_gate = tl.load(b1 + column * R + r[:, None], mask=column < F, other=0.0)
    b_up = tl.load(b1 + (F + column) * R + r[:, None], mask=column < F, other=0.0)
    a = tl.load(a2 + r[:, None] * F + column, mask=column < F, other=0.0)
    db_gate = tl.zeros((COLUMNS, R), tl.float32)
    db_up = tl.zeros((COLUMNS, R), tl.float32)
    da = tl.zeros((COLUMNS, R), tl.float32)
    for first in tl.range(i * CHUNK, i * CHUNK + CHUNK, TOKENS):
        row = (first + tl.arange(0, TOKENS))[:, None]
        inside = (row < N) & (column < F)
        at = row.to(tl.int64) * (2 * F)
        z = tl.load(z1 + row * R + r[None, :], mask=row < N, other=0.0)
        dz = tl.load(dz2 + row * R + r[None, :], mask=row < N, other=0.0)
        gate = tl.load(before + at + column, mask=inside, other=0.0)
        up = tl.load(before + at + F + column, mask=inside, other=0.0)
        d = tl.load(dactivated + row.to(tl.int64) * F + column, mask=inside, other=0.0)
        gate = tl.dot(z, b_gate) + gate.to(tl.float32)
        up = tl.dot(z, b_up) + up.to(tl.float32)
        d = tl.dot(dz, a) + d.to(tl.float32)
        s = 1 / (1 + tl.exp(-gate))
        y = (gate * s * up).to(dtype)
        d_gate = (d * up * s * (1 + gate * (1 - s))).to(dtype)
        d_up = (d * gate * s).to(dtype)
        tl.store(dbefore + at + column, d_gate, mask=inside)
        tl.store(dbefore + at + F + column, d_up, mask=inside)
        of_row = tl.dot(d_up, tl.trans(b_up), tl.dot(d_gate, tl.trans(b_gate)))
        tl.store(dz1 + (j * N + row).to(tl.int64) * R + r[None, :], of_row, mask=row < N)
        db_gate = tl.dot(tl.trans(d_gate), z, db_gate)
        db_up = tl.dot(tl.trans(d_up), z, db_up)
        da = tl.dot(tl.trans(y), dz, da)
    at = (i * 3 * F + of_width).to(tl.int64) * R + r[None, :]
    tl.store(small + at, db_gate, mask=of_width < F)
    tl.store(small + at + F * R, db_up, mask=of_width < F)
    tl.store(small + at + 2 * F * R, da, mask=of_width < F)
