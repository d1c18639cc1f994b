"""The KV cache: keys and values of earlier tokens.

Shapes: B sequences, T new positions of each, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fiddlehead.errors import ConfigError, Problem, refuse


class CacheView(NamedTuple):
    """The keys and values that attention reads, and how they are stored; the names are those of `Extras`."""

    k: torch.Tensor
    v: torch.Tensor
    cache_lengths: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    page_size: int = 0


class KVCache:
    """The keys and values of one layer for B sequences, which `attend(..., kv_cache=cache)` appends to and reads.

    While all sequences have the same length and the cache is not paged, attention reads plain views of the filled part,
    and any backend can serve. Otherwise each sequence's length is kept on the device, attention reads the whole
    storage, whose shape never changes, and only backends that support cache lengths can serve. The host never waits for
    the device.

    There are no gradients: decode under `torch.no_grad()`.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, page_table: torch.Tensor | None = None) -> None:
        """Uses existing storage; `allocate` makes new storage.

        Args:
            k: (B, max_length, G, D); paged (pages, page size, G, D), where other caches may own some pages. Kernels
                multiply unfilled positions by zero, so they must hold neither NaN nor infinity.
            v: as k.
            page_table: paged: the pages of each sequence in order, (B, pages of a sequence) int32.

        Raises:
            ConfigError: the shapes, dtypes or devices do not fit together.
        """
        if k.dim() != 4 or k.shape != v.shape or (k.dtype, k.device) != (v.dtype, v.device):
            raise ConfigError(
                f"k{tuple(k.shape)} {k.dtype} on {k.device} and v{tuple(v.shape)} {v.dtype} on {v.device}: "
                "expected two alike of four dimensions"
            )
        if page_table is not None and (page_table.dim() != 2 or page_table.dtype != torch.int32):
            message = f"is {tuple(page_table.shape)} {page_table.dtype}; expected (B, pages of a sequence) int32"
            raise ConfigError(Problem("page_table", message=message))
        self.k = k
        self.v = v
        self.page_table = page_table
        self.page_size = 0 if page_table is None else k.shape[1]
        self.batch, self.max_length = k.shape[:2] if page_table is None else page_table.shape
        self.max_length *= self.page_size or 1
        self._rows = torch.arange(self.batch, device=k.device)[:, None]
        # Changed in place alone, so that a captured CUDA graph finds it and moves on with each replay.
        self._lengths = torch.zeros(self.batch, dtype=torch.int32, device=k.device)
        self.reset()

    @classmethod
    def allocate(
        cls,
        batch: int,
        max_length: int,
        num_query_groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        page_size: int = 0,
    ) -> KVCache:
        """An empty cache.

        Args:
            max_length: positions of each sequence, rounded up to whole pages.
            num_query_groups: key/value heads.
            page_size: positions in a page; 0: not paged. flash-attn 2 takes multiples of 256.

        Raises:
            ConfigError: a size is below 1, or `page_size` below 0.
        """
        sizes = {"batch": batch, "max_length": max_length, "num_query_groups": num_query_groups, "head_dim": head_dim}
        problems = [Problem(name, size, "must be 1 or more") for name, size in sizes.items() if size < 1]
        if page_size < 0:
            problems.append(Problem("page_size", page_size, "must be 1 or more, or 0 for a cache that is not paged"))
        refuse(problems)
        page_table, blocks, positions = None, batch, max_length
        if page_size:
            pages = -(-max_length // page_size)
            blocks, positions = batch * pages, page_size
            page_table = torch.arange(blocks, dtype=torch.int32, device=device).view(batch, pages)
        k, v = (
            torch.zeros(blocks, positions, num_query_groups, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        return cls(k, v, page_table)

    @property
    def length(self) -> int:
        """The positions taken of each sequence, with padding; no sequence is longer."""
        return self._taken

    @property
    def lengths(self) -> torch.Tensor:
        """How many positions each sequence holds, a new (B,) int32 tensor."""
        return self._lengths.clone() if self._on_device else torch.full_like(self._lengths, self._taken)

    @property
    def device_lengths(self) -> torch.Tensor:
        """How many positions each sequence holds, (B,) int32, changed in place by each step.

        Raises:
            ConfigError: the lengths are not counted on the device, because all are the same.
        """
        if not self._on_device:
            raise ConfigError(Problem("new_lengths", message="is needed, so that lengths are counted on the device"))
        return self._lengths

    @property
    def nbytes(self) -> int:
        """Bytes of the storage of keys and values, filled or not."""
        return self.k.nbytes + self.v.nbytes

    def next_positions(self, T: int) -> torch.Tensor:
        """The positions of the next T tokens: (T,) if they are the same in all sequences, else (B, T)."""
        new = torch.arange(T, device=self.k.device)
        return self._lengths[:, None] + new if self._on_device else new + self._taken

    def reset(self) -> None:
        """Empties the cache and keeps its storage."""
        self._taken = 0
        self._on_device = self.page_table is not None
        """Whether `_lengths` counts, and not `_taken` alone."""
        self._lengths.zero_()

    def truncate(self, length: int) -> None:
        """Forgets the positions of each sequence after the first `length`, if it has more."""
        if self._on_device:
            self._lengths.clamp_(max=length)
        self._taken = min(self._taken, length)

    def write(self, k: torch.Tensor, v: torch.Tensor) -> CacheView:
        """Writes new positions behind the present ones; they count only after `advance`.

        Args:
            k: (B, T, G, D) in the cache's dtype.
            v: as k.

        Returns:
            The keys and values for attention, with the new positions at each sequence's end.

        Raises:
            ConfigError: they do not fit the cache, there is no room for them, or they require gradients.
        """
        T = self._checked(k, v)
        if not self._on_device:
            end = self._taken + T
            self.k[:, self._taken : end] = k
            self.v[:, self._taken : end] = v
            return CacheView(self.k[:, :end], self.v[:, :end])
        position = self._lengths[:, None] + torch.arange(T, device=k.device)
        block = self._rows
        if self.page_table is not None:
            block = self.page_table.gather(1, position // self.page_size)
            position = position % self.page_size
        self.k[block, position] = k
        self.v[block, position] = v
        return CacheView(self.k, self.v, self._lengths + T, self.page_table, self.page_size)

    def advance(self, T: int, new_lengths: torch.Tensor | None = None) -> None:
        """Counts T positions that `write` has written.

        Args:
            new_lengths: how many of the T each sequence keeps, (B,) integers from 0 to T; all if None. The next write
                overwrites the others, which were padding on the right. From here on the lengths are on the device.

        Raises:
            ConfigError: `new_lengths` is not (B,).
        """
        if new_lengths is not None:
            if new_lengths.shape != (self.batch,):
                message = f"has shape {tuple(new_lengths.shape)}; expected ({self.batch},), one for each sequence"
                raise ConfigError(Problem("new_lengths", message=message))
            if not self._on_device:
                self._lengths.fill_(self._taken)
                self._on_device = True
        if self._on_device:
            self._lengths += T if new_lengths is None else new_lengths
        self._taken += T

    def count_replayed(self, T: int) -> None:
        """Counts T positions that were counted on the device already, as by a captured CUDA graph."""
        self._taken += T

    def _checked(self, k: torch.Tensor, v: torch.Tensor) -> int:
        """T, the number of new positions of each sequence."""
        G, D = self.k.shape[2:]
        if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (self.batch, G, D) or k.shape != v.shape:
            raise ConfigError(
                f"k{tuple(k.shape)}, v{tuple(v.shape)} do not fit the cache: expected ({self.batch}, T, {G}, {D}) twice"
            )
        if k.dtype != self.k.dtype or v.dtype != self.k.dtype or k.device != self.k.device or v.device != self.k.device:
            raise ConfigError(
                f"k is {k.dtype} on {k.device} and v {v.dtype} on {v.device}: "
                f"the cache is {self.k.dtype} on {self.k.device}"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ConfigError(Problem("kv_cache", message="has no gradients; decode under torch.no_grad()"))
        self.refuse_full(k.shape[1])
        return k.shape[1]

    def refuse_full(self, T: int) -> None:
        """Raises ConfigError if there is no room for T more positions."""
        if self._taken + T > self.max_length:
            message = f"{self._taken} positions are taken, with padding, and {T} more do not fit"
            raise ConfigError(Problem("max_length", self.max_length, message))


def truncate_together(caches: Sequence[KVCache], length: int) -> None:
    """As `KVCache.truncate` of each, at once."""
    torch._foreach_clamp_max_([cache.device_lengths for cache in caches], length)  # pyright: ignore
    for cache in caches:
        cache._taken = min(cache._taken, length)


def advance_together(caches: Sequence[KVCache], T: int) -> None:
    """Counts T positions of each sequence, which a kernel has written, in caches that count on the device."""
    for cache in caches:
        cache.count_replayed(T)
    torch._foreach_add_([cache.device_lengths for cache in caches], T)  # pyright: ignore
