"""Processes that read each other's files in the place of the memory of each other's GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fiddlehead.models import peer_copies
from fiddlehead.models.peer_copies import Peers, Slot


class FileSlot(Slot):
    """A file of each process, mapped by all."""

    peers: FilePeers

    def of(self, rank: int, shape: torch.Size, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        count = shape.numel()
        return self.handle[rank].view(dtype)[offset : offset + count].view(shape)

    def grow(self, size: int) -> None:
        self.peers.files += 1
        prefix = "-".join(map(str, (dist.get_process_group_ranks(self.peers.group)[0], self.peers.files)))
        paths = [self.peers.folder / f"peers-{prefix}-{rank}" for rank in range(self.peers.size)]
        self.size = -(-size // 8) * 8
        paths[self.peers.rank].write_bytes(b"\xff" * self.size)  # not a number
        self.meet()
        self.handle = [
            torch.from_file(str(path), shared=True, size=self.size, dtype=torch.uint8)  # type: ignore[call-overload]
            for path in paths
        ]
        self.meet()

    def meet(self) -> None:
        dist.barrier(self.peers.group)


class FilePeers(Peers):
    """`Peers` without streams: each operation ends before the next one begins."""

    def __init__(self, group: dist.ProcessGroup, folder: Path) -> None:
        self.group, self.folder, self.files = group, folder, 0
        self.name, self.size, self.rank, self.device = group.group_name, group.size(), group.rank(), torch.device("cpu")
        self.slots = [FileSlot(self), FileSlot(self)]

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def mark(self) -> Any:
        return None

    def wait(self, mark: Any) -> None:
        pass

    def note(self, started: torch.Tensor) -> None:
        pass


def connect(mesh: DeviceMesh, folder: Path) -> None:
    """Lets the processes along "tp" copy from each other's files."""
    group = mesh.get_group("tp")
    peer_copies._peers[group.group_name] = FilePeers(group, folder)
