"""Which part of each parameter a process has."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fiddlehead.errors import ConfigError
from fiddlehead.models.config import TransformerConfig


class Part(NamedTuple):
    """What a process has of a parameter: ranges along a dimension, one after another."""

    mesh_dim: str
    """The dimension of the mesh that the parameter is split over."""
    dim: int
    ranges: tuple[tuple[int, int], ...]


def shard_tensor(name: str, full: torch.Tensor, config: TransformerConfig, mesh: DeviceMesh) -> torch.Tensor:
    """This process's part of a parameter, or of something of its shape; `full` itself where all have all of it.

    Args:
        name: of the parameter in `Transformer`; what stands before "layers." counts for nothing.
        full: the parameter of a model on one process.
    """
    split_over = splits_over(name, config)
    if split_over is None or (size := size_of(mesh, split_over)) == 1:
        return full
    own = part_of(name, config, size, mesh.get_local_rank(split_over))
    assert own is not None
    return torch.cat([full.narrow(own.dim, start, stop - start) for start, stop in own.ranges], dim=own.dim)


def gather_tensor(name: str, local: torch.Tensor, config: TransformerConfig, mesh: DeviceMesh) -> torch.Tensor:
    """The inverse of `shard_tensor`, which all processes along the mesh's dimension call together."""
    split_over = splits_over(name, config)
    if split_over is None or (size := size_of(mesh, split_over)) == 1:
        return local
    locals_ = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(locals_, local.contiguous(), group=mesh.get_group(split_over))
    parts = [part_of(name, config, size, rank) for rank in range(size)]
    shape = list(local.shape)
    dim = parts[0].dim  # pyright: ignore[reportOptionalMemberAccess]
    shape[dim] = max(stop for own in parts if own for _, stop in own.ranges)
    full = local.new_empty(shape)
    for own, tensor in zip(parts, locals_, strict=True):
        assert own is not None
        for (start, stop), piece in zip(
            own.ranges, tensor.split([stop - start for start, stop in own.ranges], dim=dim), strict=True
        ):
            full.narrow(dim, start, stop - start).copy_(piece)
    return full


def part_of(name: str, config: TransformerConfig, size: int, rank: int) -> Part | None:
    """What the process `rank` of `size` has of a parameter; None if all have all of it.

    Where there are fewer key/value heads than processes, several have the same one.
    """
    H, G, D, width = config.num_attention_heads, config.groups, config.head_dim, config.ffn_size
    heads = _even(H, size, rank)
    kv = _even(G, size, rank) if size <= G else (rank * G // size, rank * G // size + 1)
    q_rows, kv_rows = (heads[0] * D, heads[1] * D), (kv[0] * D, kv[1] * D)
    match splits_over(name, config), _kind(name):
        case None, _:
            return None
        case "ep", _:
            return Part("ep", 0, (_even(config.num_moe_experts or 0, size, rank),))
        case _, "linear_qkv.weight" | "linear_qkv.bias":
            k, v = ((kv_rows[0] + first, kv_rows[1] + first) for first in (H * D, (H + G) * D))
            return Part("tp", 0, (q_rows, k, v))
        case _, "linear_proj.weight":
            return Part("tp", 1, (q_rows,))
        case _, "linear_fc1.weight" | "linear_fc1.bias":
            start, stop = _even(width, size, rank)
            return Part("tp", 0, ((start, stop), (width + start, width + stop))[: 2 if config.gated else 1])
        case _, "linear_fc2.weight":
            return Part("tp", 1, (_even(width, size, rank),))
        case _, "sinks":
            return Part("tp", 0, (heads,))
        case _, "q_layernorm.weight":
            return Part("tp", 0, (q_rows,))
        case _, "k_layernorm.weight":
            return Part("tp", 0, (kv_rows,))
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
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_proj.weight",
    "linear_fc1.weight",
    "linear_fc1.bias",
    "linear_fc2.weight",
    "sinks",
)


def copied_from(name: str, config: TransformerConfig, tp: int) -> int | None:
    """The row from which on a process's part is in `copies` of them; None if there is none such."""
    if copies(config, tp) == 1:
        return None
    if _kind(name) in ("linear_qkv.weight", "linear_qkv.bias"):
        return config.num_attention_heads // tp * config.head_dim
    return 0 if _kind(name) == "k_layernorm.weight" and config.qk_layernorm == "projection" else None


def copies(config: TransformerConfig, tp: int) -> int:
    """How many processes of a tensor-parallel group have the same key/value heads."""
    return max(tp // config.groups, 1)


def size_of(mesh: DeviceMesh, dim: str) -> int:
    """How many processes there are along a dimension of a mesh, which may lack it."""
    names = mesh.mesh_dim_names or ()
    return mesh.size(names.index(dim)) if dim in names else 1


def refuse_sizes(config: TransformerConfig, *, tp: int = 1, cp: int = 1, ep: int = 1) -> None:
    """Raises ConfigError, with the allowed sizes, if a model cannot be split over so many processes.

    The length of the sequences is a matter of the batch, see `local_batch`.
    """
    H, G = config.num_attention_heads, config.groups
    problems = []

    def refuse(dim: str, size: int, why: str, allowed: list[int]) -> None:
        problems.append(f"{dim}={size}: {why}; allowed: {', '.join(map(str, allowed))}")

    def fits(heads: int, groups: int, size: int) -> bool:
        return heads % size == 0 and (groups % size == 0 or size % groups == 0)

    def tp_fits(size: int) -> bool:
        return fits(H, G, size) and (config.num_moe_experts is not None or config.ffn_size % size == 0)

    if not tp_fits(tp):
        why = f"must divide num_attention_heads={H}"
        if config.num_moe_experts is None:
            why += f" and ffn_hidden_size={config.ffn_size}"
        why += f", and divide num_query_groups={G} or be a multiple of it"
        refuse("tp", tp, why, [n for n in range(1, H + 1) if tp_fits(n)])
    else:
        heads, groups = H // tp, max(G // tp, 1)
        if not fits(heads, groups, cp):
            why = (
                f"must divide the {heads} query heads of a process (tp={tp}), and divide its {groups} key/value heads "
                "or be a multiple of them"
            )
            refuse("cp", cp, why, [n for n in range(1, heads + 1) if fits(heads, groups, n)])
    if ep > 1 and config.num_moe_experts is None:
        refuse("ep", ep, "num_moe_experts=None, there are no experts to split", [1])
    elif (E := config.num_moe_experts or 1) % ep:
        refuse("ep", ep, f"must divide num_moe_experts={E}", [n for n in range(1, E + 1) if E % n == 0])
    if problems:
        raise ConfigError(*problems)


def _even(whole: int, size: int, rank: int) -> tuple[int, int]:
    return whole // size * rank, whole // size * (rank + 1)


def _kind(name: str) -> str:
    """The last two parts of a name in a layer, or the last one if it is the attention's own."""
    found = re.search(r"(sinks|[a-z0-9_]+\.(?:weight|bias))$", name)
    return found[1] if found else name
