"""The needs of an attention call, and the device on which it would run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from fiddlehead.attention.packages import Packages, installed
from fiddlehead.errors import ConfigError, Problem

GPUS: dict[str, tuple[int, int]] = {
    "v100": (7, 0),
    "t4": (7, 5),
    "a100": (8, 0),
    "a10g": (8, 6),
    "l4": (8, 9),
    "l40s": (8, 9),
    "rtx4090": (8, 9),
    "h100": (9, 0),
    "h200": (9, 0),
    "b200": (10, 0),
    "b300": (10, 3),
    "rtx5090": (12, 0),
}
"""CUDA compute capability of the GPUs that `Target.gpu` knows by name."""


LENGTHS = (1024, 2048, 4096, 8192, 16384)
"""The classes of sequence lengths, in keys. Kernels differ in speed on short sequences."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The needs of one attention call; calls with equal specs get the same backend.

    `num_query_groups` is the number of key/value heads: 1 is multi-query attention, `num_attention_heads` is
    multi-head attention, a divisor between them is grouped-query attention (Ainslie et al. 2023).
    """

    dtype: torch.dtype
    head_dim: int
    num_attention_heads: int
    num_query_groups: int
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    """Keys seen to the left and to the right of a query's own position; -1 is no limit."""
    softcap: float = 0.0
    """Scores become softcap x tanh(score / softcap); 0 leaves them."""
    alibi: bool = False
    sinks: bool = False
    dropout: float = 0.0
    padding_mask: bool = False
    packed: bool = False
    """Sequences of different lengths follow each other without padding; `cu_seqlens` has their borders."""
    cached: bool = False
    """Keys and values are a cache, which each sequence has filled to its own length."""
    page_size: int = 0
    """Positions in one page of a paged cache; 0: the cache is not paged."""
    same_length: bool = True
    """There are as many queries as keys."""
    length: int = 0
    """The smallest of `LENGTHS` that holds the longest sequence's keys; 0: longer, or unknown."""
    training: bool = True
    """Gradients are wanted."""
    deterministic: bool = False
    """Gradients must be bitwise the same each time."""
    by_passes: bool = False
    """Each pass is called by itself, with the logarithms of the softmaxes' sums, and not through autograd: for a part
    of the keys, in ring attention, or for some heads at a time."""

    @property
    def has_extras(self) -> bool:
        """Whether a call has tensors besides q, k and v."""
        return self.packed or self.cached or self.alibi or self.sinks or self.padding_mask

    def __str__(self) -> str:
        heads = f"{self.num_attention_heads}/{self.num_query_groups} heads of {self.head_dim}"
        parts = [str(self.dtype).removeprefix("torch."), heads, "causal" if self.causal else "full"]
        if self.window_size != (-1, -1):
            parts.append(f"window {self.window_size}")
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        parts += [name for name in ("alibi", "sinks") if getattr(self, name)]
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        parts += ["padding mask"] if self.padding_mask else []
        parts += ["packed"] if self.packed else []
        if self.cached:
            parts.append(f"cache in pages of {self.page_size}" if self.page_size else "cache")
        elif not self.same_length:
            parts.append("other query than key length")
        parts += [f"up to {self.length} keys"] if self.length else []
        parts.append("training" if self.training else "inference")
        parts += ["deterministic"] if self.deterministic else []
        parts += ["pass by pass"] if self.by_passes else []
        return ", ".join(parts)


def length_class(keys: int) -> int:
    """`AttentionSpec.length` for this many keys."""
    return next((length for length in LENGTHS if keys <= length), 0)


@dataclass(frozen=True)
class Target:
    """The device on which a call would run; it need not be on this machine."""

    device_type: str
    name: str
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability; (0, 0) on a CPU."""
    packages: Packages = field(default_factory=lambda: installed(probe=False))

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """A device of this machine, with the packages that work on it.

        Raises:
            ConfigError: PyTorch finds no such device.
        """
        return _target_of(device.type, device.index)

    @classmethod
    def gpu(cls, name: str, packages: Packages | None = None) -> Target:
        """A GPU by the name of its model, such as "h100". It need not be on this machine.

        Args:
            packages: the packages assumed to be installed; None: those of this environment, without trying them.

        Raises:
            ConfigError: no such GPU is known.
        """
        key = name.lower()
        if key not in GPUS:
            raise ConfigError(Problem.unknown("gpu", key, "GPU", GPUS))
        return cls("cuda", key, GPUS[key], packages or installed(probe=False))

    @property
    def sm(self) -> int:
        """The capability as NVIDIA's compiler writes it: 90 for (9, 0)."""
        return self.capability[0] * 10 + self.capability[1]


@lru_cache(maxsize=64)
def _target_of(device_type: str, index: int | None) -> Target:
    if device_type != "cuda":
        return Target(device_type, device_type, packages=Packages(torch.__version__, None))
    if not torch.cuda.is_available():
        raise ConfigError(Problem("device", "cuda", "PyTorch finds no CUDA GPU on this machine"))
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    return Target("cuda", properties.name, (properties.major, properties.minor), installed(probe=True))
