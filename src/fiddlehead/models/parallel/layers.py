"""Reduces a transformer's layers, and a batch, to one process's part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.models import head_tiles
from fiddlehead.models.block import MLP, Attention, Block
from fiddlehead.models.collectives import (
    Group,
    HeadExchange,
    SequenceSplit,
    all_reduce,
    by_process,
    by_sequence,
    linear_of_columns,
    linear_of_whole,
)
from fiddlehead.models.config import split_heads
from fiddlehead.models.lora import LoRALinear
from fiddlehead.models.moe import MoE
from fiddlehead.models.norms import ZeroCenteredRMSNorm
from fiddlehead.models.parallel.shards import (
    ContextMethod,
    Layout,
    length_divisor,
    local,
    refuse_sizes,
    replicas,
    ring_size,
)
from fiddlehead.models.ring import Ring
from fiddlehead.models.transformer import Transformer


def parallelize(
    transformer: Transformer, mesh: DeviceMesh, method: ContextMethod = "auto", *, copies: bool = False
) -> None:
    """Reduces a transformer, in place, to this process's part along "tp", "cp" and "ep" of a mesh.

    It then takes `local_batch`es and returns the logits of their tokens. Parameters may be on the meta device; values
    must be the same on all processes. Call it before `fully_shard`.

    Args:
        method: how the processes along "cp" share attention.
        copies: whether those along "tp" exchange tokens by `peer_copies`, which `connect` must have prepared.

    Raises:
        ConfigError: the model cannot be split in this way.
    """
    config = transformer.config
    tp, cp, ep = (Group.of(mesh, dim) for dim in ("tp", "cp", "ep"))
    tp = replace(tp, copies=copies and tp.size > 1)
    refuse_sizes(config, tp=tp.size, cp=cp.size, ep=ep.size, method=method)
    ring = ring_size(config, tp.size, cp.size, method)
    exchanging = cp.part(cp.size // ring)
    layout = Layout(config, mesh)
    for name, parameter in list(transformer.named_parameters()):
        own = layout.own(name, parameter.detach())
        if own.shape != parameter.shape:
            owner, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(owner), leaf, nn.Parameter(own, parameter.requires_grad))
    transformer.split = SequenceSplit(cp, tp, ring)
    for module in list(transformer.modules()):
        if isinstance(module, Block | LoRALinear):
            module.split = transformer.split
    for module in list(transformer.modules()):
        if isinstance(module, Attention):
            if module.tiled is not None:
                refuse(head_tiles.refused(config, module.tiled, tensor=tp.size, context=cp.size))
            if exchanging.size > 1:
                module.exchange = HeadExchange(exchanging)
            if ring > 1:
                module.ring = Ring(cp, ring)
            if tp.size > 1:
                module.heads, module.groups = split_heads(module.heads, module.groups, tp.size)
                module.linear_qkv = _column_parallel(module.linear_qkv, tp)
                module.linear_proj = _row_parallel(module.linear_proj, tp)
                if module.q_layernorm is not None and config.qk_layernorm == "projection":
                    module.q_layernorm = SplitRMSNorm(module.q_layernorm, tp, 1)
                    module.k_layernorm = SplitRMSNorm(module.k_layernorm, tp, replicas(config, tp.size))
        elif isinstance(module, MoE):
            module.sequence_groups = tuple(group for group in (cp, tp) if group.size > 1)
            module.experts.group = ep
        elif isinstance(module, MLP) and tp.size > 1:
            # Between the two each token is by itself, so that their order does not matter.
            ordered = any(isinstance(linear, LoRALinear) for linear in (module.linear_fc1, module.linear_fc2))
            module.linear_fc1 = _column_parallel(module.linear_fc1, tp, ordered)
            module.linear_fc2 = _row_parallel(module.linear_fc2, tp, ordered)
            module.group = tp


def local_batch(batch: Mapping[str, Any], mesh: DeviceMesh, ring: int = 1) -> dict[str, Any]:
    """A batch with this process's part of `input_ids`, `labels` and `padding`, (B, T) to (B, T / (cp x tp)).

    All processes along "cp" and "tp" must have the same batch. `cu_seqlens` remain those of the whole sequences.

    Args:
        ring: as the model's `split` has it.

    Raises:
        ConfigError: T is not a multiple of cp x tp, and of 2 x ring if there is one.
    """
    split = SequenceSplit(Group.of(mesh, "cp"), Group.of(mesh, "tp"), ring)
    of = length_divisor(split.cp.size, split.tp.size, ring)
    local = dict(batch)
    for name in ("input_ids", "labels", "padding"):
        if name not in batch:
            continue
        length = batch[name].shape[1]
        if length % of:
            nearest = max(round(length / of), 1) * of
            sizes = f"cp x tp={split.parts}"
            if of != split.parts:
                sizes = f"{of}, for a ring of {ring} and {sizes}"
            message = f"a sequence has {length} tokens; must be a multiple of {sizes}, such as {nearest}"
            raise ConfigError(Problem(name, message=message))
        local[name] = split.own(batch[name], dim=1).contiguous()
    return local


class _Split(nn.Linear):
    """A linear layer with one process's part of the parameters.

    Args:
        ordered: whether the whole sequences, which are its output or its input, are (B, T, ...); otherwise one
            process's tokens follow another's, (n x B, t, ...), which saves a copy.
    """

    def __init__(self, linear: nn.Linear, group: Group, ordered: bool) -> None:
        out_features, in_features = linear.weight.shape
        super().__init__(in_features, out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.group, self.ordered = group, ordered
        self.train(linear.training)


class ColumnParallelLinear(_Split):
    """A part of the sequence, (B, t, in), to a part of the outputs for the whole sequence, (B, T, out / n)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = linear_of_whole(input, self.weight, self.bias, self.group)
        return by_sequence(out, self.group.size) if self.ordered else out


class RowParallelLinear(_Split):
    """A part of the inputs for the whole sequence, (B, T, in / n), to a part of the sequence, (B, t, out)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = by_process(input, self.group.size) if self.ordered else input
        return _with_bias(linear_of_columns(x, self.weight, self.group), self.bias)


class _SplitLoRA(LoRALinear):
    """A linear layer with an adapter, with one process's part of the parameters of both."""

    joined = False

    def __init__(self, linear: LoRALinear, group: Group) -> None:
        out_features, in_features = linear.weight.shape
        nn.Linear.__init__(self, in_features, out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a, self.lora_b, self.magnitude = linear.lora_a, linear.lora_b, linear.magnitude
        self.lora, self.fan_in, self.enabled, self.split = linear.lora, linear.fan_in, linear.enabled, linear.split
        self.group = group
        self.train(linear.training)


class ColumnParallelLoRA(_SplitLoRA):
    """As `ColumnParallelLinear`. `lora_b` and `magnitude` are split by rows like the weights; `lora_a` is whole.

    Each process computes the product with `lora_a` for its part of the sequence, and only that is gathered.
    """

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return by_sequence(linear_of_whole(x, self.weight, bias, self.group), self.group.size)

    def _change(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return by_sequence(linear_of_whole(F.linear(x, a), b, None, self.group), self.group.size)


class RowParallelLoRA(_SplitLoRA):
    """As `RowParallelLinear`. `lora_a` is split by columns like the weights; `lora_b` and `magnitude` are whole."""

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _with_bias(linear_of_columns(by_process(x, self.group.size), self.weight, self.group), bias)

    def _change(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.linear(linear_of_columns(by_process(x, self.group.size), a, self.group), b)

    def _dropout(self, x: torch.Tensor) -> torch.Tensor:
        return self.split.dropout_of_columns(x, self.lora.dropout, self.training)

    def _lengths(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        lengths = super()._lengths(weight, dtype)
        if not lengths.is_meta:
            own = local(lengths)
            own.copy_(all_reduce(own.square(), self.group).sqrt())
        return lengths


def _column_parallel(linear: nn.Linear, group: Group, ordered: bool = True) -> nn.Linear:
    if isinstance(linear, LoRALinear):
        return ColumnParallelLoRA(linear, group)
    return ColumnParallelLinear(linear, group, ordered)


def _row_parallel(linear: nn.Linear, group: Group, ordered: bool = True) -> nn.Linear:
    return (
        RowParallelLoRA(linear, group) if isinstance(linear, LoRALinear) else RowParallelLinear(linear, group, ordered)
    )


def _with_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias.to(x.dtype)


class SplitRMSNorm(nn.Module):
    """RMSNorm of channels that are split over processes; `replicas` processes have the same channels."""

    def __init__(self, norm: Any, group: Group, replicas: int) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps, self.zero_centered = norm.eps, isinstance(norm, ZeroCenteredRMSNorm)
        self.group, self.replicas = group, replicas
        self.size = self.weight.numel() * group.size // replicas

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size / n) to the same."""
        wide = x.float()
        squares = all_reduce(wide.square().sum(dim=-1, keepdim=True), self.group) / self.replicas
        weight = self.weight.float()
        wide = wide * torch.rsqrt(squares / self.size + self.eps) * (1 + weight if self.zero_centered else weight)
        return wide.to(x.dtype)
