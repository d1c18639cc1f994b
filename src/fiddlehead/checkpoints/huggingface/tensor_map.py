"""Maps one of our tensors to the tensors of a Hugging Face checkpoint with the same numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fiddlehead.checkpoints.huggingface.families import Family
from fiddlehead.models.config import TransformerConfig
from fiddlehead.models.meta import shapes_only
from fiddlehead.models.transformer import Transformer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class MappedTensor:
    """A parameter of `Transformer`, and the tensors of a Hugging Face checkpoint that it is made of."""

    name: str
    shape: Shape
    theirs: tuple[tuple[str, Shape], ...]
    """Names and shapes, in the order in which their rows follow each other in ours."""
    transposed: bool = False
    interleaved: bool = False

    @property
    def plain(self) -> bool:
        """Whether the bytes of theirs, one after another, are those of ours."""
        return not self.transposed and not self.interleaved

    def to_ours(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensor, from theirs."""
        x = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        if self.transposed:
            x = x.transpose(-2, -1)
        if self.interleaved:
            x = torch.cat([x[:, 0::2], x[:, 1::2]], dim=1)
        return x.contiguous().view(self.shape)

    def to_theirs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Their tensors, from ours."""
        if self.interleaved:
            x = torch.stack(x.chunk(2, dim=1), dim=2).flatten(1, 2)
        if self.transposed:
            x = x.transpose(-2, -1)
        if len(self.theirs) == 1:
            return [x.contiguous()]
        rows = [shape[0] for _, shape in self.theirs]
        return [
            part.contiguous() for part in x.reshape(sum(rows), -1).view(sum(rows), *self.theirs[0][1][1:]).split(rows)
        ]


def tensor_map(family: Family, config: TransformerConfig) -> list[MappedTensor]:
    """Every parameter of a model of `family`, in the order of the module."""
    with shapes_only():
        parameters = Transformer(config).state_dict()
    return [_mapped(name, tuple(tensor.shape), family, config) for name, tensor in parameters.items()]


def _mapped(name: str, shape: Shape, family: Family, config: TransformerConfig) -> MappedTensor:
    layer = next(iter(re.findall(r"^layers\.(\d+)\.", name)), "")
    pattern = re.sub(r"^layers\.\d+\.", "layers.*.", name)
    module, _, kind = pattern.rpartition(".")
    theirs, suffix = family.modules.get(pattern), ""
    if theirs is None:
        theirs, suffix = family.modules[module], f".{kind}"
    names = [theirs] if isinstance(theirs, str) else list(theirs)
    names = [name.replace("*", layer) + suffix for name in names]
    transposed = name.endswith(family.transposed) if family.transposed else False
    interleaved = name.endswith(family.interleaved) if family.interleaved else False
    if "#" in names[0]:
        E, rows, *rest = shape
        part = (rows // len(names), *rest)
        each = [(name.replace("#", str(expert)), part) for expert in range(E) for name in names]
        return MappedTensor(name, shape, tuple(each))
    if len(names) == 1:
        single = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        return MappedTensor(name, shape, ((names[0], single),), transposed, interleaved)
    D = config.head_dim
    rows = [shape[0] // len(names)] * len(names)
    if len(names) == 3:  # queries, keys, values
        rows = [config.num_attention_heads * D, config.groups * D, config.groups * D]
    return MappedTensor(name, shape, tuple((name, (n, *shape[1:])) for name, n in zip(names, rows, strict=True)))
