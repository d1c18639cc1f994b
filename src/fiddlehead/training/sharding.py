"""Parameters of which each rank holds a part: how they are cut, filled and put together again (FSDP2).

A rank never holds more than its parts, the layer at work, and one whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

from fiddlehead.models import LoRA, Transformer
from fiddlehead.models.safetensors_files import Stored
from fiddlehead.training.weights import Weights

Slices = tuple[slice, ...]


def shard(
    transformer: Transformer, mesh: DeviceMesh, device: torch.device, precision: str, *, reshard_after_forward: bool
) -> None:
    """Cuts the parameters over `mesh`, in place; they must be on the meta device, and have no values on `device` yet.

    Each layer is gathered when it is its turn, while the one before computes. What is outside the layers stays gathered
    from the forward pass to the end of the backward pass.

    Args:
        mesh: one dimension to cut over; or two, of which the first holds copies (HSDP).
        precision: Lightning's; with "bf16-mixed" the parts are float32, and what is gathered is bfloat16.
        reshard_after_forward: gather a layer again for its backward pass, rather than keep it in memory until then.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # a layer takes rotary tables, which must stay float32
    )
    last = len(transformer.layers) - 1
    for number, block in enumerate(transformer.layers):
        # The last layer's backward pass comes at once.
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward and number != last)
    fully_shard(transformer, mesh=mesh, mp_policy=policy)
    transformer.to_empty(device=device)


@torch.no_grad()
def draw(transformer: Transformer) -> None:
    """Initializes parameters that are sharded to bit for bit what `Transformer(config)` draws on one such device."""
    for parameter in transformer.parameters():
        parameter.zero_()
    with _DrawWhole():
        for module in transformer.modules():  # in the order in which their constructors draw
            if isinstance(reset := getattr(module, "reset_parameters", None), Callable):
                reset()
        transformer.initialize()


@torch.no_grad()
def draw_adapters(transformer: Transformer, lora: LoRA) -> None:
    """Starts adapters that are sharded, bit for bit as `lora.apply` does on one such device."""
    with _DrawWhole():
        for name in lora.adapted(transformer):
            layer: Any = transformer.get_submodule(name)
            layer.reset_adapter()


@torch.no_grad()
def load(transformer: Transformer, names: Iterable[str], weights: Weights) -> None:
    """Fills the parameters of these names with this rank's part of given weights."""
    parameters = dict(transformer.named_parameters())
    for name in names:
        local(parameters[name]).copy_(weights.load(name, part(parameters[name])))


def part(tensor: torch.Tensor) -> Slices:
    """Where this rank's part lies in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def read(tensor: torch.Tensor, stored: Stored) -> None:
    """Copies this rank's part of a tensor in a file into `tensor`, without reading the rest."""
    local(tensor).copy_(stored.load(part(tensor)))


def is_sharded(transformer: torch.nn.Module | None) -> bool:
    """Whether the ranks have to call it together."""
    return isinstance(transformer, FSDPModule)


class _DrawWhole(TorchDispatchMode):
    """Draws what is to be random in a sharded tensor for the whole of it, as one device would, and keeps the part."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawing = func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
        if not (drawing and isinstance(tensor := args[0], DTensor)):
            return func(*args, **(kwargs or {}))
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        local(tensor).copy_(func(whole, *args[1:], **(kwargs or {}))[part(tensor)])
        return tensor
