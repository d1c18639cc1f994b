"""The shards of parameters: which part of each parameter a process has."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fiddlehead.errors import Problem, refuse
from fiddlehead.models.config import TransformerConfig, split_heads

Slices = tuple[slice, ...]
ContextMethod = Literal["auto", "ulysses", "ring"]
"""How the processes of "cp" share attention: by exchanging tokens for heads ("ulysses"), by passing keys and values on
("ring"), or by the first, and by both where there are more processes than heads allow ("auto")."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this process's part of a tensor, which FSDP2 may have sharded."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return getattr(own, "_tensor", own)  # torchao wraps the weights that FSDP2 gathers in float8


def fsdp_slices(tensor: torch.Tensor) -> Slices:
    """Returns the place of `local(tensor)` in a tensor, which FSDP2 may have sharded."""
    sizes, starts = tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


class LocalSlice(NamedTuple):
    """A rectangular part of a shard."""

    local: Slices
    """Its place in the shard."""
    whole: Slices
    """Its place in the whole tensor."""
    ranks: int
    """How many processes have it."""
    replicas: int
    """The number of these along the mesh dimension that splits the parameter; 1 if it is not split."""


class Layout:
    """The places of the shards of a model's parameters on the processes of a mesh.

    Methods take a tensor with this process's part of a parameter, or of a tensor of its shape, after `parallelize`; a
    DTensor is a further shard of that. They also take the parameter's name in `Transformer`; a prefix before "layers."
    is ignored.

    Args:
        mesh: with the used dimensions among those that `fiddlehead.models.parallel` names.
        twice: the names of parameters that the processes of two stages of a pipeline have.
    """

    def __init__(self, config: TransformerConfig, mesh: DeviceMesh, twice: Collection[str] = ()) -> None:
        self.config, self.mesh, self.twice = config, mesh, twice
        self._known: dict[tuple[Any, ...], list[LocalSlice]] = {}

    def local_slices(self, name: str, tensor: torch.Tensor) -> list[LocalSlice]:
        """Returns this process's slices of a parameter: one, or several if layers are fused."""
        cut = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        key = name, tensor.shape, cut
        if key not in self._known:  # it is asked for every gradient of every step
            self._known[key] = self._find_local_slices(name, tensor)
        return self._known[key]

    def shape(self, name: str, tensor: torch.Tensor) -> torch.Size:
        """Returns the shape of the whole parameter."""
        own, shape = self._shard(name), list(tensor.shape)
        if own is not None:
            shape[own.dim] = own.whole
        return torch.Size(shape)

    def own(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """Returns this process's part of a parameter, as `parallelize` splits it; `whole` if it is not split."""
        own = self._shard(name)
        if own is None:
            return whole
        return torch.cat([whole.narrow(own.dim, each.start, each.size) for each in own.ranges], dim=own.dim)

    def gather(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the whole parameter; all processes call it together. The part may be in main memory."""
        tensor = tensor.to(self.mesh.device_type)
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        own = self._shard(name)
        if own is None:
            return tensor
        size = size_of(self.mesh, own.mesh_dim)
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.mesh.get_group(own.mesh_dim))
        whole = tensor.new_empty(self.shape(name, tensor))
        for rank, part in enumerate(parts):
            ranges = shard_of(name, self.config, size, rank).ranges  # pyright: ignore[reportOptionalMemberAccess]
            for each, rows in zip(ranges, part.split([each.size for each in ranges], dim=own.dim), strict=True):
                whole.narrow(own.dim, each.start, each.size).copy_(rows)
        return whole

    def _find_local_slices(self, name: str, tensor: torch.Tensor) -> list[LocalSlice]:
        within, ranks = fsdp_slices(tensor), self.mesh.size() * (2 if name in self.twice else 1)
        if isinstance(tensor, DTensor):
            ranks //= _shards(tensor)
        everything = tuple(slice(each.stop - each.start) for each in within)
        own = self._shard(name)
        if own is None:
            return [LocalSlice(everything, within, ranks, 1)]
        dim, at, slices = own.dim, 0, []
        for each in own.ranges:
            # The rows of the range that FSDP2 left on this process, counted from the beginning of the range.
            first, last = (min(max(edge - at, 0), each.size) for edge in (within[dim].start, within[dim].stop))
            here = [*everything]
            here[dim] = slice(at + first - within[dim].start, at + last - within[dim].start)
            whole = [*within]
            whole[dim] = slice(each.start + first, each.start + last)
            if first < last:
                having = ranks // size_of(self.mesh, own.mesh_dim) * each.replicas
                slices.append(LocalSlice(tuple(here), tuple(whole), having, each.replicas))
            at += each.size
        return slices

    def _shard(self, name: str) -> ParameterShard | None:
        split_over = splits_over(name, self.config)
        if split_over is None or (size := size_of(self.mesh, split_over)) == 1:
            return None
        return shard_of(name, self.config, size, self.mesh.get_local_rank(split_over))


class ShardRange(NamedTuple):
    """Consecutive rows, or columns, of a parameter in a shard."""

    start: int
    size: int
    replicas: int = 1
    """The number of processes along the mesh dimension that have it."""


class ParameterShard(NamedTuple):
    """The shard of a parameter that a process has along one dimension of the mesh."""

    mesh_dim: str
    """The dimension of the mesh that the parameter is split over."""
    dim: int
    """The parameter's dimension that is split."""
    whole: int
    """The size of that dimension in the whole parameter."""
    ranges: tuple[ShardRange, ...]
    """They follow one another in the shard."""


def shard_of(name: str, config: TransformerConfig, size: int, rank: int) -> ParameterShard | None:
    """Returns the shard of a parameter on process `rank` of `size`; None if all processes have the whole parameter.

    If there are fewer key/value heads than processes, several processes have the same head.
    """
    H, G, D, width = config.num_attention_heads, config.groups, config.head_dim, config.ffn_size

    def even(count: int, width: int = 1, offset: int = 0) -> ShardRange:
        """This process's part of `count` items of `width` rows each; with fewer items than processes, it is shared."""
        replicas = max(size // count, 1)
        each = count * replicas // size * width
        return ShardRange(offset + rank // replicas * each, each, replicas)

    def heads(count: int, offset: int = 0) -> ShardRange:
        return even(count, D, offset * D)

    match splits_over(name, config), _kind(name):
        case None, _:
            return None
        case "ep", _:
            experts = config.num_moe_experts or 0
            return ParameterShard("ep", 0, experts, (even(experts),))
        case _, "linear_qkv.weight" | "linear_qkv.bias" | "linear_qkv.lora_b" | "linear_qkv.magnitude":
            return ParameterShard("tp", 0, (H + 2 * G) * D, (heads(H), heads(G, H), heads(G, H + G)))
        case _, "linear_proj.weight" | "linear_proj.lora_a":
            return ParameterShard("tp", 1, H * D, (heads(H),))
        case _, "linear_fc1.weight" | "linear_fc1.bias" | "linear_fc1.lora_b" | "linear_fc1.magnitude":
            both = (even(width), even(width, offset=width))
            return (
                ParameterShard("tp", 0, 2 * width, both) if config.gated else ParameterShard("tp", 0, width, both[:1])
            )
        case _, "linear_fc2.weight" | "linear_fc2.lora_a":
            return ParameterShard("tp", 1, width, (even(width),))
        case _, "sinks":
            return ParameterShard("tp", 0, H, (even(H),))
        case _, "q_layernorm.weight":
            return ParameterShard("tp", 0, H * D, (heads(H),))
        case _, "k_layernorm.weight":
            return ParameterShard("tp", 0, G * D, (heads(G),))
    raise AssertionError(name)


def splits_over(name: str, config: TransformerConfig) -> str | None:
    """The dimension of a mesh that a parameter is split over, "tp" or "ep"; None if it is whole everywhere."""
    if ".mlp.experts." in name:
        return "ep"
    kind = _kind(name)
    if kind in ("q_layernorm.weight", "k_layernorm.weight"):
        return "tp" if config.qk_layernorm == "projection" else None
    return "tp" if kind in TENSOR_PARALLEL else None


TENSOR_PARALLEL = (
    *(f"linear_{layer}.{part}" for layer in ("qkv", "fc1") for part in ("weight", "bias", "lora_b", "magnitude")),
    *(f"linear_{layer}.{part}" for layer in ("proj", "fc2") for part in ("weight", "lora_a")),
    "sinks",
)


def replicas(config: TransformerConfig, tp: int) -> int:
    """The number of processes of a tensor-parallel group that have the same key/value heads."""
    return max(tp // config.groups, 1)


def size_of(mesh: DeviceMesh, dim: str) -> int:
    """The number of processes along a dimension of a mesh; 1 if the mesh does not have it."""
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index(dim)) if dim in names else 1


def ring_size(config: TransformerConfig, tp: int, cp: int, method: ContextMethod) -> int:
    """The number of parts of a sequence whose keys and values go round; 1: there is no ring.

    With "auto", as many neighbours as possible exchange heads, and the ring has a part for each such group.
    """
    if method == "auto":
        heads, groups = split_heads(config.num_attention_heads, config.groups, tp)
        return cp // max(n for n in range(1, cp + 1) if cp % n == 0 and _fits(heads, groups, n))
    return cp if method == "ring" else 1


def length_divisor(cp: int, tp: int, ring: int) -> int:
    """What divides the length of the sequences: cp x tp, and two chunks for each part of a ring."""
    return math.lcm(cp * tp, 2 * ring if ring > 1 else 1)


def refuse_sizes(
    config: TransformerConfig, *, tp: int = 1, cp: int = 1, ep: int = 1, method: ContextMethod = "auto"
) -> None:
    """Raises ConfigError, with the allowed sizes, if a model cannot be split over these numbers of processes.

    `local_batch` checks the length of the sequences.
    """
    H, G = config.num_attention_heads, config.groups
    problems = []

    def tp_fits(size: int) -> bool:
        return _fits(H, G, size) and (config.num_moe_experts is not None or config.ffn_size % size == 0)

    if not tp_fits(tp):
        why = f"must divide num_attention_heads={H}"
        if config.num_moe_experts is None:
            why += f" and ffn_hidden_size={config.ffn_size}"
        why += f", and divide num_query_groups={G} or be a multiple of it"
        problems.append(Problem("tp", tp, why, [n for n in range(1, H + 1) if tp_fits(n)]))
    else:
        problems += _refused_context(config, tp, cp, method)
    if ep > 1 and config.num_moe_experts is None:
        problems.append(Problem("ep", ep, "num_moe_experts=None, there are no experts to split", (1,)))
    elif (E := config.num_moe_experts or 1) % ep:
        allowed = [n for n in range(1, E + 1) if E % n == 0]
        problems.append(Problem("ep", ep, f"must divide num_moe_experts={E}", allowed))
    refuse(problems)


def _refused_context(config: TransformerConfig, tp: int, cp: int, method: ContextMethod) -> list[Problem]:
    """Why "cp" processes cannot share attention by this method."""
    heads, groups = split_heads(config.num_attention_heads, config.groups, tp)
    rings = ring_size(config, tp, cp, method) > 1
    if not rings and _fits(heads, groups, cp):
        return []
    allowed = [n for n in range(1, heads + 1) if _fits(heads, groups, n)]
    ring = _not_in_ring(config)
    must = (
        f"must divide the {heads} query heads of a process (tp={tp}), and divide its {groups} key/value heads or be a "
        "multiple of them"
    )
    if rings:
        if ring is None:
            return []
        if cp in allowed:
            return [Problem("cp", cp, f"{ring}; set context_parallel_method='ulysses'")]
        return [Problem("cp", cp, f"{must}; {ring}", allowed)]
    instead = ring or "context_parallel_method='auto' allows other numbers"
    return [Problem("cp", cp, f"{must}; {instead}", allowed)]


def _not_in_ring(config: TransformerConfig) -> str | None:
    """What of a model ring attention does not have; None if it has everything."""
    lefts = {config.window(layer)[0] for layer in range(config.num_layers)}
    if any(0 <= left < (config.seq_length or math.inf) - 1 for left in lefts):  # others leave nothing out
        return f"ring attention has no windows (window_size={config.window_size})"
    if config.attention_dropout:
        return f"ring attention has no attention_dropout={config.attention_dropout:g}"
    return None


def _fits(heads: int, groups: int, size: int) -> bool:
    """Whether so many processes can share the heads of attention."""
    return heads % size == 0 and (groups % size == 0 or size % groups == 0)


def _shards(tensor: DTensor) -> int:
    """Returns the number of shards into which FSDP2 has cut a tensor."""
    parts = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        assert not placement.is_partial(), "a tensor that is yet to be added up over the ranks"
        parts *= 1 if placement.is_replicate() else size
    return parts


def _kind(name: str) -> str:
    """The last two parts of a name in a layer; the last one for the attention's own parameters."""
    found = re.search(r"(sinks|[a-z0-9_]+\.(?:weight|bias|lora_a|lora_b|magnitude))$", name)
    return found[1] if found else name
