"""Calls a flash-attn package: through autograd, or under torch.compile as one forward and one backward operator.

Both use the packages' functions for the two passes. The packages' own differentiable functions either cannot be traced
or are more than one node, and some reach their kernels through an operator whose dispatch takes longer than a small
kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fiddlehead.attention.backends.backend import Backward, Extras, Forward, Run
from fiddlehead.attention.spec import AttentionSpec
from fiddlehead.errors import ConfigError, Problem

Tensor = torch.Tensor

# An operator takes tensors and numbers only: these, in this order, are what a spec, a scale and extras come to.
_TENSORS = ("cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "sinks", "cache_lengths", "page_table")
_NUMBERS = {
    "max_seqlen_q": "SymInt",
    "max_seqlen_k": "SymInt",
    "causal": "bool",
    "window_left": "SymInt",
    "window_right": "SymInt",
    "softcap": "float",
    "dropout": "float",
    "scale": "float",
    "deterministic": "bool",
}
_QKV = "Tensor q, Tensor k, Tensor v"
_CALL = ", ".join([*(f"Tensor? {name}" for name in _TENSORS), *(f"{kind} {name}" for name, kind in _NUMBERS.items())])
_SINKS = _TENSORS.index("sinks")


def register(
    name: str, forward: Forward, backward: Backward, from_cache: Run, *, switch: str, random: bool = False
) -> Run:
    """The `run` of the backend `name`; makes the operators fiddlehead::{name}, {name}_forward and {name}_backward.

    Args:
        forward: computes attention, and keeps the tensors that `backward` needs.
        backward: the gradients.
        from_cache: attends to a cache that each sequence has filled to another length; has no gradients.
        switch: the environment variable that turns off this backend alone.
        random: whether there is dropout; the compiler then never merges or repeats a call.

    Returns:
        A function that raises ConfigError if the package was built without a feature that a call needs.
    """

    inference_op, forward_op = _operators(name, forward, backward, lambda *call: run(*call), switch, random)
    eager = _autograd_function(name, forward, backward, switch)

    def run(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scale: float, extras: Extras) -> Tensor:
        if torch.compiler.is_compiling():
            call = _flattened(spec, scale, extras)
            return forward_op(q, k, v, **call)[0] if spec.training else inference_op(q, k, v, **call)
        try:
            if spec.training:
                return eager.apply(q, k, v, extras.sinks, spec, scale, extras)
            if spec.cached:
                return from_cache(q, k, v, spec, scale, extras)
            return forward(q, k, v, spec, scale, extras)[0]
        except RuntimeError as error:
            _raise_if_built_without(error, name, switch)
            raise

    return run


def _operators(
    name: str, forward: Forward, backward: Backward, run: Callable[..., Tensor], switch: str, random: bool
) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Makes the operators; returns the one without gradients, which calls `run`, and the one with them."""

    def operator(suffix: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
        draws = random and suffix != "_backward"  # which draws again what the state says
        tags = (torch.Tag.nondeterministic_seeded,) if draws else ()
        return torch.library.custom_op(f"fiddlehead::{name}{suffix}", mutates_args=(), schema=schema, tags=tags)

    @operator("", f"({_QKV}, {_CALL}) -> Tensor")
    def inference_op(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> Tensor:
        return run(q, k, v, *_unflattened(q, k, call, training=False)).contiguous()

    @inference_op.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> Tensor:
        return q.new_empty(q.shape)

    @operator("_forward", f"({_QKV}, {_CALL}) -> (Tensor out, Tensor lse, Tensor rng_state)")
    def forward_op(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
        with errors_explained(name, switch):
            out, lse, rng_state = forward(q, k, v, *_unflattened(q, k, call, training=True))
        return out.contiguous(), lse.contiguous(), rng_state

    @forward_op.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
        lse = q.new_empty(q.transpose(-3, -2).shape[:-1], dtype=torch.float32)
        return q.new_empty(q.shape), lse, q.new_empty(2 if random else 0, dtype=torch.int64)

    schema = f"(Tensor dout, {_QKV}, Tensor out, Tensor lse, Tensor rng_state, {_CALL})"

    @operator("_backward", f"{schema} -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)")
    def backward_op(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        saved, call = rest[:3], rest[3:]
        with errors_explained(name, switch):
            *gradients, dsinks = backward(dout, q, k, v, *saved, *_unflattened(q, k, call, training=True))
        return *gradients, q.new_empty(0) if dsinks is None else dsinks

    @backward_op.register_fake
    def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        sinks = rest[3 + _SINKS]
        return *contiguous_like(q, k, v), q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        qkv, tensors, ctx.numbers = inputs[:3], inputs[3 : 3 + len(_TENSORS)], inputs[3 + len(_TENSORS) :]
        ctx.save_for_backward(*qkv, *output, *tensors)

    def gradients(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *dqkv, dsinks = backward_op(dout, *ctx.saved_tensors, *ctx.numbers)
        of_call: list[Tensor | None] = [None] * (len(_TENSORS) + len(_NUMBERS))
        if ctx.saved_tensors[6 + _SINKS] is not None:
            of_call[_SINKS] = dsinks
        return *dqkv, *of_call

    forward_op.register_autograd(gradients, setup_context=save)
    return inference_op, forward_op


def _autograd_function(name: str, forward: Forward, backward: Backward, switch: str) -> type[torch.autograd.Function]:
    """The two passes for calls outside torch.compile."""

    class Attention(torch.autograd.Function):  # whose errors no context manager explains: one takes microseconds
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, _sinks: Tensor | None, *call: Any) -> Tensor:
            out, lse, rng_state = forward(q, k, v, *call)
            ctx.save_for_backward(q, k, v, out, lse, rng_state)
            ctx.call = call
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            try:
                gradients = backward(*grad_outputs, *ctx.saved_tensors, *ctx.call)
            except RuntimeError as error:
                _raise_if_built_without(error, name, switch)
                raise
            return *gradients, None, None, None

    return Attention


def contiguous_like(*tensors: Tensor) -> list[Tensor]:
    """New contiguous tensors, whatever the strides of those given, such as views of a fused projection."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


@contextmanager
def errors_explained(backend: str, switch: str) -> Iterator[None]:
    """Raises a ConfigError in place of a package's error that its build lacks what a call needs."""
    try:
        yield
    except RuntimeError as error:
        _raise_if_built_without(error, backend, switch)
        raise


def _raise_if_built_without(error: RuntimeError, backend: str, switch: str) -> None:
    """Raises a ConfigError if the error is that the package's build lacks what the call needs."""
    found = re.search(r"flash attention build does not support ([^.\n]+)", str(error), re.IGNORECASE)
    if found:
        message = (
            f"this flash-attn was built without {found[1]}; install a build that has it, name another backend, "
            f"or set {switch}=0, so that auto takes another"
        )
        raise ConfigError(Problem("attention_backend", backend, message)) from error


def _flattened(spec: AttentionSpec, scale: float, extras: Extras) -> dict[str, Any]:
    left, right = spec.window_size
    return {
        "cu_seqlens_q": extras.cu_seqlens_q,
        "cu_seqlens_k": extras.cu_seqlens_k,
        "alibi_slopes": extras.alibi_slopes,
        "sinks": extras.sinks,
        "cache_lengths": extras.cache_lengths,
        "page_table": extras.page_table,
        "max_seqlen_q": extras.max_seqlen_q,
        "max_seqlen_k": extras.max_seqlen_k,
        "causal": spec.causal,
        "window_left": left,
        "window_right": right,
        "softcap": spec.softcap,
        "dropout": spec.dropout,
        "scale": scale,
        "deterministic": spec.deterministic,
    }


def _unflattened(q: Tensor, k: Tensor, call: tuple[Any, ...], *, training: bool) -> tuple[AttentionSpec, float, Extras]:
    named = dict(zip((*_TENSORS, *_NUMBERS), call, strict=True))
    extras = Extras(**{name: named[name] for name in Extras._fields if name in named})
    spec = AttentionSpec(
        dtype=q.dtype,
        head_dim=q.shape[-1],
        num_attention_heads=q.shape[-2],
        num_query_groups=k.shape[-2],
        causal=named["causal"],
        window_size=(named["window_left"], named["window_right"]),
        softcap=named["softcap"],
        alibi=extras.alibi_slopes is not None,
        sinks=extras.sinks is not None,
        dropout=named["dropout"],
        packed=extras.cu_seqlens_q is not None,
        cached=extras.cache_lengths is not None,
        page_size=k.shape[1] if extras.page_table is not None else 0,
        training=training,
        deterministic=named["deterministic"],
    )
    return spec, named["scale"], extras
