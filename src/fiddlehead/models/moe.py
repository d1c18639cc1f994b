"""Mixtures of experts: a router sends each token through a few of many feed-forward layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fiddlehead.models.autocast import product_dtype
from fiddlehead.models.collectives import Group, all_reduce, exchange_counts, exchange_rows
from fiddlehead.models.config import TransformerConfig


class Sequences(NamedTuple):
    """The sequences of a process's tokens, over which the load of the experts is balanced."""

    number: torch.Tensor
    """The index of each token's sequence, (tokens,)."""
    total: int
    """The number of sequences; some may be empty."""
    counted: torch.Tensor | None
    """Whether a token counts, (tokens,) bool: padding does not. None: all tokens count."""


class MoE(nn.Module):
    """Chooses `moe_router_topk` of `num_moe_experts` feed-forward layers for each token, and adds their outputs.

    The tokens are sorted by expert, so one grouped matrix product computes all experts. No token is dropped, and the
    host does not wait for the device. E experts, C channels, F the width of an expert.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        E, C, width = config.num_moe_experts or 0, config.hidden_size, config.expert_size
        self.router = nn.Linear(C, E, bias=config.add_bias_linear)
        self.experts = Experts(
            E, C, width, activation=config.activation, gated=config.gated, bias=config.add_bias_linear
        )
        self.sequence_groups: tuple[Group, ...] = ()
        """The processes that share sequences: a sequence's tokens are counted over all of them."""
        self.aux_loss: torch.Tensor | None = None
        """This process's part of the latest forward pass's balancing loss, as `Transformer.aux_loss` defines it."""

    def forward(self, x: torch.Tensor, sequences: Sequences | None = None) -> torch.Tensor:
        """(B, T, C) to (B, T, C).

        Args:
            sequences: the sequences over which the load is balanced; None: no balancing loss.
        """
        tokens = x.flatten(0, -2)
        scores = self.router(x).flatten(0, -2).float()  # an adapter of the router drops by sequences
        k, E = self.config.moe_router_topk, scores.shape[-1]
        top, chosen = scores.topk(k, dim=-1)
        if self.config.moe_router_pre_softmax:
            weights = scores.softmax(dim=-1).gather(-1, chosen)
        else:
            weights = top.softmax(dim=-1)
        expert, order = chosen.flatten().sort(stable=True)
        counts = torch.zeros(E, dtype=torch.int32, device=x.device)
        counts = counts.scatter_add(0, expert, torch.ones_like(expert, dtype=torch.int32))
        self.aux_loss = None if sequences is None else self._balancing_loss(scores, chosen, sequences)
        h = self.experts(tokens[order // k], expert, counts)
        out = torch.empty_like(h).index_copy(0, order, h)  # back in the tokens' order, for a deterministic sum
        return (out.view(-1, k, out.shape[-1]) * weights[..., None]).sum(dim=1).to(x.dtype).view_as(x)

    def _balancing_loss(self, scores: torch.Tensor, chosen: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """The balancing loss of this process's tokens; router logits (tokens, E), chosen experts (tokens, k)."""
        E = scores.shape[-1]
        number, total, counted = sequences
        place = number[:, None] * E + chosen
        served = scores.new_ones(place.shape) if counted is None else counted[:, None].expand_as(place).to(scores.dtype)
        # Whole numbers, so that the sum is the same in any order.
        load = scores.new_zeros(total * E).scatter_add(0, place.flatten(), served.flatten())
        for group in self.sequence_groups:
            load = all_reduce(load, group)
        load = load.view(total, E)
        fraction = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
        each = (fraction[number] * scores.softmax(dim=-1)).sum(dim=-1)
        balance = each.sum() if counted is None else (each * counted).sum()
        return self.config.moe_aux_loss_coeff * E * balance


class Experts(nn.Module):
    """The two layers of all experts. If `group` splits them, a process has E / n experts, in order.

    Rows then travel to the processes of their experts and back, and each process waits for the number of its rows.
    """

    def __init__(self, E: int, C: int, width: int, *, activation: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.group = Group()
        self.linear_fc1 = GroupedLinear(E, C, 2 * width if gated else width, bias)
        self.linear_fc2 = GroupedLinear(E, width, C, bias)

    def forward(self, x: torch.Tensor, expert: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """(rows, C) to (rows, C); the arguments are those of `GroupedLinear.forward`, of all E experts."""
        if self.group.size == 1:
            return self._serve(x, expert, counts)
        here = counts.view(self.group.size, -1)
        there = exchange_counts(here, self.group)
        sent, received = torch.stack([here, there]).sum(dim=-1).tolist()
        x = exchange_rows(x.to(product_dtype(x)), sent, received, self.group)
        h = self._serve_unsorted(x, there)
        return exchange_rows(h, received, sent, self.group)

    def _serve_unsorted(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Computes rows that are sorted by their source process, then by expert; counts (n, E / n)."""
        own = torch.arange(counts.shape[1], device=x.device).expand_as(counts)
        expert = own.flatten().repeat_interleave(counts.flatten(), output_size=len(x))
        counts = counts.sum(dim=0, dtype=torch.int32)
        rows = len(x)
        if not rows:  # the grouped product's gradient needs one
            x, expert = F.pad(x, (0, 0, 0, 1)), F.pad(expert, (0, 1))
            counts = F.pad(counts.new_ones(1), (0, len(counts) - 1))
        expert, order = expert.sort(stable=True)
        h = self._serve(x[order], expert, counts)
        return torch.empty_like(h).index_copy(0, order, h)[:rows]

    def _serve(self, x: torch.Tensor, expert: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        h = activate(self.linear_fc1(x, expert, counts), self.activation)
        return self.linear_fc2(h, expert, counts)


class GroupedLinear(nn.Module):
    """E linear layers, each for its own rows: weight (E, out, in), bias (E, out)."""

    def __init__(self, E: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(E, outputs)) if bias else None

    def forward(self, x: torch.Tensor, expert: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """(rows, in) to (rows, out).

        Args:
            x: rows, sorted by expert.
            expert: the expert of each row, (rows,).
            counts: the number of rows of each expert, (E,) int32.
        """
        dtype = product_dtype(x)  # autocast knows no grouped product
        x, weight = x.to(dtype), self.weight.to(dtype)
        ends = counts.cumsum(0, dtype=torch.int32)
        x = F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
        return x if self.bias is None else x + self.bias[expert].to(x.dtype)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """(…, 2F), gate first, to (…, F); plain GELU and squared ReLU have no gate, and keep the width."""
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, dim=-1)
    if activation == "squared_relu":
        return F.relu(x).square()
    if activation == "swiglu":
        return F.silu(gate) * up
    if activation == "geglu":
        return F.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)
