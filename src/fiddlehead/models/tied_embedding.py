"""The lookup of an embedding that shares its weight with the output layer, and the gradient of both in one tensor.

The output layer's gradient has a value for each weight, and the embedding's only has rows for the tokens of the batch.
PyTorch makes a second tensor as large as the weight for these, and adds the two. Here they are added in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fiddlehead.models.scaled import HAS_TRITON

_BY_KERNEL = (torch.float32, torch.bfloat16, torch.float16)


def tied_embedding(weight: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of token ids, (..., C), and the weight for the output layer, (V, C).

    The second is the weight itself, as an output of the lookup. So the lookup's backward pass gets the gradients of
    both, whichever is used and in whatever order. It overwrites the weight's: what uses the weight must leave a
    gradient that nobody else reads, as `linear_cross_entropy` does.

    Args:
        weight: (V, C).
        input_ids: token ids of any shape.
    """
    both: Any = _TiedEmbedding.apply(weight, input_ids)
    return both


class TiedLookup:
    """`tied_embedding` in the place of an embedding; `weight` is the output layer's once it was called.

    It does not keep the rows, which are float32 in mixed precision.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (...) to their embeddings, (..., C)."""
        rows, self.weight = tied_embedding(self.weight, input_ids)
        return rows


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(input_ids)
        ctx.vocabulary = len(weight)
        ctx.set_materialize_grads(False)
        return F.embedding(input_ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        of_rows, of_output = grad_outputs
        (input_ids,) = ctx.saved_tensors
        if of_rows is None:
            return of_output, None
        if of_output is None:
            return _dense(of_rows, input_ids, ctx.vocabulary), None
        return add_rows_(of_output, input_ids.flatten(), of_rows.reshape(-1, of_rows.shape[-1])), None


def add_rows_(total: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Adds each of `rows` (N, C), in place, to the row of `total` (V, C) with its number in `ids` (N,).

    The rows of one number are summed in float32 at least, and the sum is added with one rounding. The result does not
    depend on how threads follow each other. The host does not wait for a GPU, if Triton is installed.
    """
    if total.is_cuda and HAS_TRITON and total.dtype in _BY_KERNEL and total.is_contiguous():
        from fiddlehead.models.rows_kernel import add_rows_ as on_gpu

        return on_gpu(total, ids, rows.contiguous())
    numbers, places = ids.unique(return_inverse=True)
    sums = _dense(rows if rows.dtype == torch.float64 else rows.float(), places, len(numbers))
    if total.dtype == sums.dtype:
        return total.index_add_(0, numbers, sums)  # in any order: no two have the same number
    return total.index_copy_(0, numbers, (sums + total[numbers]).to(total.dtype))


def _dense(rows: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    """What PyTorch gives as an embedding's gradient: (count, C), with the sums of the rows of each id."""
    return torch.ops.aten.embedding_dense_backward(rows, ids, count, -1, False)
