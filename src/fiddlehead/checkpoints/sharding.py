"""Sharded parameters: how they are sharded, filled and gathered.

A rank never holds more than its shards, the layer at work, and one whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fiddlehead.checkpoints.safetensors_files import StoredTensor
from fiddlehead.checkpoints.weights import Weights
from fiddlehead.models import LoRA, Transformer, nf4
from fiddlehead.models.meta import shapes_only
from fiddlehead.models.moe import MoE
from fiddlehead.models.parallel import Layout, Stage, local


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of which this rank holds a shard, on its way to a checkpoint."""

    name: str
    """The name of the parameter that it is, or that has the same shape."""
    local: torch.Tensor
    """The shard. If the tensor is in a stage of other ranks, it is whole and on the meta device."""
    layout: Layout
    pipeline_rank: int = 0
    """The pipeline rank of those that have it."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole tensor."""
        return self.layout.shape(self.name, self.local)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the shard and of the whole tensor."""
        return self.local.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def is_here(self) -> bool:
        """Whether this rank has a shard of it."""
        return not self.local.is_meta

    def gather(self) -> torch.Tensor:
        """Returns the whole tensor; all ranks that have it call this together."""
        return self.layout.gather(self.name, self.local)


def shard(
    transformer: Transformer | Stage,
    mesh: DeviceMesh,
    experts_mesh: DeviceMesh,
    device: torch.device,
    precision: str,
    *,
    reshard_after_forward: bool,
) -> None:
    """Cuts the parameters over `mesh`, in place; they must be on the meta device, and have no values on `device` yet.

    Each layer is gathered when it is its turn, while the one before computes. What is outside the layers stays gathered
    from the forward pass to the end of the backward pass.

    Args:
        mesh: one dimension to cut over; or two, of which the first holds replicas (HSDP).
        experts_mesh: the same for the experts' layers, of which ranks may have some only.
        precision: Lightning's; with "bf16-mixed" the shards are float32, and what is gathered is bfloat16.
        reshard_after_forward: gather a layer again for its backward pass, rather than keep it in memory until then.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # a layer takes rotary tables, which must stay float32
    )
    last = len(transformer.layers) - 1
    for number, block in enumerate(transformer.layers):
        reshard = reshard_after_forward and number != last  # the last layer's backward pass comes at once
        if isinstance(block.mlp, MoE) and experts_mesh != mesh:
            fully_shard(block.mlp.experts, mesh=experts_mesh, mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(transformer, mesh=mesh, mp_policy=policy)
    transformer.to_empty(device=device)


@torch.no_grad()
def draw(transformer: Transformer, layout: Layout) -> None:
    """Initializes parameters that are sharded to bit for bit what `Transformer(config)` draws on one such device."""
    with shapes_only():
        whole = Transformer(transformer.config)
    parameters = dict(transformer.named_parameters())
    for parameter in parameters.values():
        parameter.zero_()
    # What is in a stage of other ranks is drawn too, and not kept.
    targets = {id(drawn): (name, parameters.get(name, drawn)) for name, drawn in whole.named_parameters()}
    with _Draw(targets, layout):
        for module in whole.modules():  # in the order in which their constructors draw
            if isinstance(reset := getattr(module, "reset_parameters", None), Callable):
                reset()
        whole.initialize()


@torch.no_grad()
def draw_adapters(transformer: Transformer, lora: LoRA, layout: Layout) -> None:
    """Starts adapters that are sharded, bit for bit as `lora.apply` does on one such device."""
    with shapes_only():
        whole = Transformer(transformer.config)
        lora.apply(whole)
    # What is in a stage of other ranks is drawn too, and not kept.
    parameters = {**dict(whole.named_parameters()), **dict(transformer.named_parameters())}
    layers: dict[str, Any] = {**dict(whole.named_modules()), **dict(transformer.named_modules())}
    with _Draw({id(parameter): (name, parameter) for name, parameter in parameters.items()}, layout):
        for name in lora.adapted(whole):
            layers[name].reset_adapter()


@torch.no_grad()
def load(transformer: Transformer, names: Iterable[str], weights: Weights, layout: Layout) -> None:
    """Fills this rank's shards of the parameters of these names, as far as it has them, from given weights.

    A weight in NF4 is quantized as a whole, on the shard's device, because its scales depend on each other.
    """
    parameters, quantized = dict(transformer.named_parameters()), nf4.quantized(transformer)
    for name in (name for name in names if name in parameters):
        shard = local(parameters[name])
        bits = nf4.quantize(weights.load(name).to(shard.device)) if name in quantized else None
        for each in layout.local_slices(name, parameters[name]):
            shard[each.local] = weights.load(name, each.whole) if bits is None else bits[each.whole]


@torch.no_grad()
def read(name: str, tensor: torch.Tensor, stored: StoredTensor, layout: Layout) -> None:
    """Reads this rank's shard of a tensor in a file into `tensor`, and nothing else of the file."""
    for each in layout.local_slices(name, tensor):
        local(tensor)[each.local] = stored.load(each.whole)


def is_sharded(transformer: torch.nn.Module | None) -> bool:
    """Whether the ranks have to call it together."""
    return isinstance(transformer, FSDPModule)


class _Draw(TorchDispatchMode):
    """Draws random numbers for a whole parameter, as one device would, and keeps this rank's shard.

    Args:
        parameters: by the identity of the tensor that is written to, the parameter that is meant, and its name.
    """

    def __init__(self, parameters: Mapping[int, tuple[str, torch.Tensor]], layout: Layout) -> None:
        super().__init__()
        self.parameters, self.layout = parameters, layout
        self.device = next(parameter.device for _, parameter in parameters.values() if not parameter.is_meta)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, parameter = self.parameters.get(id(args[0]) if args else 0, ("", None))
        if parameter is None or not func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        copies = func is torch.ops.aten.copy_.default
        if copies and isinstance(parameter, DTensor) and not isinstance(args[1], DTensor):  # from a whole tensor
            for each in self.layout.local_slices(name, parameter):
                local(parameter)[each.local] = args[1][each.whole]
            return args[0]
        if func not in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            func(parameter if parameter is args[0] else local(parameter), *args[1:], **(kwargs or {}))
            return args[0]
        shape = self.layout.shape(name, parameter)
        whole = func(torch.empty(shape, dtype=parameter.dtype, device=self.device), *args[1:], **(kwargs or {}))
        for each in [] if parameter.is_meta else self.layout.local_slices(name, parameter):
            local(parameter)[each.local] = whole[each.whole]
        return args[0]
