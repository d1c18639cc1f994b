"""Ranks that work together outside training; they communicate on the CPU, so that no device waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from fiddlehead.errors import RunError

T = TypeVar("T")


class TeamError(RunError):
    """Another rank failed."""


@dataclass(frozen=True)
class Team:
    """All ranks of a run, or one that is alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_all_ranks(cls) -> Team:
        """All processes that torch.distributed knows, which have to call this together; one thread each may use it."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        # Reading or writing a large checkpoint takes longer than the default timeout.
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(hours=4))
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def first(self) -> bool:
        """Whether this rank does the work that is done once."""
        return self.rank == 0

    def all(self, work: Callable[[], T]) -> list[T]:
        """The results of `work` on each rank; if it raises on one, all ranks raise.

        Raises:
            TeamError: another rank's work failed.
        """
        if self.group is None:
            return [work()]
        answer = raised = None
        try:
            answer = work()
        except Exception as error:
            raised = error
        answers: list = [None] * self.size
        dist.all_gather_object(answers, (answer, None if raised is None else f"{raised}"), group=self.group)
        if raised is not None:
            raise raised
        problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(answers) if problem is not None]
        if problems:
            raise TeamError("; ".join(problems))
        return [answer for answer, _ in answers]
