"""The memory that a backend needs in addition to its inputs, computed from the allocations in the kernels' code."""

from __future__ import annotations

from fiddlehead.attention.spec import AttentionSpec

FLOAT32 = 4
PROCESSORS = 132
"""Multiprocessors of an H100. flash-attn 2 spreads its deterministic backward pass over a GPU's, each part in a
buffer of its own; other data-centre GPUs have 108 to 160."""


def extra_bytes(backend: str, spec: AttentionSpec, batch: int, seq_length: int, *, device_type: str = "cuda") -> int:
    """The bytes that one layer allocates in addition to q, k and v, with the backward pass if training.

    It is the peak: the output, the tensors kept for the backward pass, the gradients of q, k and v, and the kernels'
    buffers. The gradient of the output belongs to the next layer. Lengths are not rounded up to the kernels' blocks.

    Args:
        batch: the number of sequences; packed, of sequences with `seq_length` tokens that would hold all tokens.
        seq_length: queries, and keys, of each sequence.
    """
    on_cpu = device_type == "cpu"
    sizes = _Sizes(spec, batch * seq_length)
    # Packed sequences lie one after another in one long sequence, of which each has a part of the scores.
    pairs = (batch * seq_length) ** 2 if spec.packed else batch * seq_length**2
    scores = pairs * spec.num_attention_heads * (8 if spec.dtype.itemsize == 8 else FLOAT32)
    total = sizes.out + sizes.rows
    if backend == "reference":
        # Weights, their gradient, and the scores' gradient that is made of both.
        total += scores * (3 + (spec.softcap > 0) + (spec.dropout > 0))
    elif backend == "sdpa_efficient":
        total += sizes.repeated if spec.num_query_groups < spec.num_attention_heads else 0
        total += scores if spec.alibi else 0
    elif backend == "cudnn":
        total += pairs * spec.dtype.itemsize if spec.padding_mask else 0
    total += _backward(backend, spec, sizes, batch, on_cpu) if spec.training else 0
    if backend == "sdpa_flash" and on_cpu and spec.packed:
        total += sizes.out + sizes.kv  # one sequence's after another, and then in one piece
    if backend == "sdpa_flash" and on_cpu and _needs_mask(spec):
        own = spec.padding_mask or spec.cached or spec.packed  # a mask for each sequence, or one for all
        masked = batch * seq_length**2 if own else seq_length**2
        return max(10 * masked, total + FLOAT32 * masked)  # while it is made, and afterwards
    return total


class _Sizes:
    """The bytes of the kernels' allocations. H query heads, G key/value heads, D head dim."""

    def __init__(self, spec: AttentionSpec, tokens: int) -> None:
        H, G, D = spec.num_attention_heads, spec.num_query_groups, spec.head_dim
        width = spec.dtype.itemsize
        rounded = -(-D // 32) * 32  # as the kernels' float32 buffers are
        self.rows = tokens * H * FLOAT32
        """A float32 for each query and head, such as the softmax's logarithm."""
        self.out = tokens * H * D * width
        """The output, or q's gradient."""
        self.kv = 2 * tokens * G * D * width
        """The gradients of k and v."""
        self.repeated = 2 * tokens * H * D * width
        """k and v, or their gradients, with a copy for each query head."""
        self.q_sum = tokens * H * rounded * FLOAT32
        """q's gradient, added up in float32."""
        self.kv_sum = 2 * tokens * G * rounded * FLOAT32
        """The gradients of k and v, added up in float32."""


def _backward(backend: str, spec: AttentionSpec, sizes: _Sizes, batch: int, on_cpu: bool) -> int:
    """The additional bytes of the backward pass."""
    grouped = spec.num_query_groups < spec.num_attention_heads
    gradients = sizes.out + sizes.kv
    if backend == "reference" or (backend == "sdpa_flash" and on_cpu):
        return gradients
    if backend == "flex":
        return gradients + sizes.rows
    if backend in ("flash3", "flash4"):
        return gradients + 2 * sizes.rows + sizes.q_sum + (sizes.kv_sum if grouped else 0)
    if backend == "sdpa_efficient":
        sums = sizes.q_sum if spec.dtype.itemsize == 2 else 0
        return gradients + sizes.rows + sums + (sizes.repeated if grouped else 0)
    # flash-attn 2 and PyTorch's build of it. What cuDNN takes was measured, and is the same within an eighth.
    parts = 1
    if spec.deterministic and backend != "cudnn":
        parts = -(-PROCESSORS // (batch * spec.num_attention_heads))
    return gradients + sizes.rows + parts * sizes.q_sum + (sizes.repeated if grouped else 0)


def _needs_mask(spec: AttentionSpec) -> bool:
    """Whether PyTorch's CPU kernel, which knows the square causal mask only, is given a mask."""
    special = spec.alibi or spec.padding_mask or spec.cached or spec.window_size != (-1, -1)
    return special or (spec.causal and not spec.same_length)
