"""What a run's plan predicts, as its `plan.json` says it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """The memory and the speed that a plan predicts; None and "" stand for what it does not know."""

    gpus: int
    """How many processes train, each with its device."""
    max_steps: int
    tokens_per_step: int
    gpu: str = ""
    """The GPU for which it was planned."""
    gpu_gib: float | None = None
    """The memory of that GPU."""
    needed_gib: float | None = None
    """What the GPU that has the most needs, with what is outside PyTorch."""
    memory_gib: float | None = None
    """What PyTorch has allocated of it at the peak, as `memory_gib` of the metrics."""
    tokens_per_s: float | None = None
    """Of all GPUs together."""
    mfu: float | None = None
    seconds_per_step: float | None = None
    seconds_computing: float | None = None
    """The seconds of a step in its forward and backward passes, without those of communication."""
    seconds_communication: float | None = None
    """That part of a step's communication which no computation hides."""
    seconds_optimizer: float | None = None
    despite: tuple[str, ...] = ()
    """The names of the refusals that the user has overridden."""

    def hours_left(self, step: int) -> float | None:
        """The hours from `step` to the end of the run."""
        return None if self.seconds_per_step is None else self.seconds_per_step * (self.max_steps - step) / 3600

    @property
    def knows(self) -> bool:
        """Whether there is anything to compare a run with."""
        return self.memory_gib is not None or self.seconds_per_step is not None


def difference(planned: float, measured: float) -> str:
    """By how much a measured value differs from the planned one, in percent of that."""
    return f"{measured / planned - 1:+.1%}"
