"""Triton kernels that add rows to some rows of a large matrix: each of these is read and written once.

Rows are sorted by where they are to be added, so that rows of one sum follow each other. The first kernel has a program
for each chunk of them. Of a sum that goes beyond a chunk, as a frequent token's does, programs write a part each, which
the second kernel adds up. All in a fixed order, so that results repeat.
"""

# PyTorch brings Triton only in its builds for GPUs, and a type checker cannot check kernels.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK, BLOCK, WARPS = 32, 512, 4
"""Rows and columns of a program of the first kernel, and its warps."""
PARTS, COLUMNS = 16, 128
"""Parts that a program of the second kernel reads at once, and their columns."""


def add_rows_(total: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """As `tied_embedding.add_rows_`, on a GPU, for contiguous tensors of 32 or 16 bits."""
    N, C = rows.shape
    if rows.numel() == 0:
        return total
    sorted_ids, order = ids.to(torch.int32).sort(stable=True)  # with half the passes of 64 bits
    chunks = triton.cdiv(N, CHUNK)
    # Of the sum that comes from an earlier chunk, and of the one that goes on in a later chunk.
    parts = torch.empty(chunks, 2, C, dtype=torch.float32, device=total.device)
    _add_chunks[chunks, triton.cdiv(C, BLOCK)](
        total, rows, sorted_ids, order, parts, N, C, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS
    )
    if chunks > 1:
        _add_long[chunks, triton.cdiv(C, COLUMNS)](
            total, sorted_ids, parts, N, C, chunks, CHUNK=CHUNK, PARTS=PARTS, COLUMNS=COLUMNS, num_warps=WARPS
        )
    torch.autograd.graph.increment_version(total)
    return total


@triton.jit
def _add_chunks(
    total,
    rows,
    sorted_ids,
    order,
    parts,
    N,
    C,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, N)
    before = tl.load(sorted_ids + first - 1, mask=first > 0, other=-1)
    here = tl.load(sorted_ids + first)
    sums = tl.zeros((BLOCK,), tl.float32)
    for place in range(first, end):
        row = tl.load(order + place).to(tl.int64)
        following = tl.load(sorted_ids + place + 1, mask=place + 1 < N, other=-1)
        sums += tl.load(rows + row * C + columns, mask=inside, other=0.0).to(tl.float32)
        if (here != following) | (place + 1 == end):
            if here == before:
                tl.store(parts + chunk.to(tl.int64) * 2 * C + columns, sums, mask=inside)
            elif here == following:
                tl.store(parts + (chunk.to(tl.int64) * 2 + 1) * C + columns, sums, mask=inside)
            else:
                there = total + here.to(tl.int64) * C + columns
                sums += tl.load(there, mask=inside, other=0.0).to(tl.float32)
                tl.store(there, sums.to(total.dtype.element_ty), mask=inside)
            sums = tl.zeros((BLOCK,), tl.float32)
        here = following


@triton.jit
def _add_long(
    total,
    sorted_ids,
    parts,
    N,
    C,
    chunks,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    after = first + CHUNK
    if after < N:
        here = tl.load(sorted_ids + after - 1)
        before = tl.load(sorted_ids + first - 1, mask=first > 0, other=-1)
        if (here == tl.load(sorted_ids + after)) & (here != before):  # a sum begins here and goes on
            columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            inside = columns < C
            sums = tl.load(parts + (chunk.to(tl.int64) * 2 + 1) * C + columns, mask=inside, other=0.0)
            later = chunk + 1
            more = True
            while more:
                them = later + tl.arange(0, PARTS)
                belong = tl.load(sorted_ids + them * CHUNK, mask=them < chunks, other=-1) == here
                at = parts + them.to(tl.int64)[:, None] * 2 * C + columns[None, :]
                sums += tl.sum(tl.load(at, mask=belong[:, None] & inside[None, :], other=0.0), 0)
                later += PARTS
                more = tl.load(sorted_ids + later * CHUNK, mask=later < chunks, other=-1) == here
            there = total + here.to(tl.int64) * C + columns
            sums += tl.load(there, mask=inside, other=0.0).to(tl.float32)
            tl.store(there, sums.to(total.dtype.element_ty), mask=inside)
