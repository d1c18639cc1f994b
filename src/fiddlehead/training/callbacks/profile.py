"""Profiles chosen steps: a timeline, the slowest operations, and on a GPU its memory allocations."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch.profiler import ProfilerActivity, record_function

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.run.console import say
from fiddlehead.training.callbacks.checkpoint import at_step_end
from fiddlehead.training.callbacks.phases import Phases

ROWS = 40
"""The number of listed operations."""
MAX_ALLOCATIONS = 100_000
"""The most allocations and releases of memory to record."""

Interval = tuple[float, float]


def parse_steps(text: str, field: str = "profile") -> tuple[int, int]:
    """The first and the last step of `10:12`, counted from 1.

    Args:
        field: the field that has the text, for errors.

    Raises:
        ConfigError: it is not a range of steps.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        said = f", such as {text}:{text} for one step" if text.isdecimal() else ", such as 10:12"
        raise ConfigError(Problem(field, text, f"must be FIRST:LAST, the numbers of two steps{said}"))
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last:
        why = "steps are counted from 1" if first < 1 else f"ends before it begins; did you mean {last}:{first}?"
        raise ConfigError(Problem(field, text, why))
    return first, last


class ProfiledSteps(Callback):
    """Profiles steps on the first rank, including the loading of their batches; a subclass says with what.

    Each step, its batches, forward and backward passes are marked. If a run resumes or stops in the middle of the
    steps, only a part of them is profiled.

    Args:
        steps: the first and the last one.
        phases: its clock stops while the profiler starts and stops.
    """

    range: ClassVar[Callable[[str], AbstractContextManager]]
    """Makes a context whose operations the profiler shows under a name."""

    def __init__(self, steps: tuple[int, int], phases: Phases) -> None:
        self.first, self.last = steps
        self.phases = phases
        self._profiling = False
        self._step: AbstractContextManager | None = None
        self._others: Any = None

    def start(self, trainer: Trainer) -> None:
        """Starts the profiler."""
        raise NotImplementedError

    def stop(self, trainer: Trainer) -> None:
        """Stops the profiler and writes what it has recorded."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints a line if no step is left to profile."""
        if trainer.global_step >= self.last:
            say(f"profile: steps {self.first} to {self.last} are done already, so nothing is profiled")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins with the first step to profile."""
        step = trainer.global_step + 1
        if not self._profiling and trainer.is_global_zero and self.first <= step <= self.last:
            self.first, self._profiling = step, True
            self.phases.pause("profile")
            self.start(trainer)
            self._others, trainer.profiler = trainer.profiler, _Ranges(type(self).range)  # type: ignore[attr-defined]
        if self._profiling and self._step is None:
            self._step = _entered(type(self).range(f"step {step}"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends with the last step."""
        if not self._profiling or not at_step_end(trainer):
            return
        self._leave_step()
        if trainer.global_step >= self.last:
            self._finish(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the steps so far if the run ends early."""
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the steps so far if the run is stopped."""
        self._finish(trainer)

    def _leave_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _finish(self, trainer: Trainer) -> None:
        """Ends the profile with this step."""
        if not self._profiling:
            return
        self._profiling = False
        self.phases.pause("profile")
        self._leave_step()
        trainer.profiler = self._others  # type: ignore[attr-defined]
        self.stop(trainer)


class Profile(ProfiledSteps):
    """Profiles steps with PyTorch's profiler, and writes the results to a folder.

    `rank0-steps-10-12.json.gz` is the timeline. `.txt` has the slowest operations; `.memory.pickle`, on a GPU, has
    every allocation.

    Args:
        steps, phases: as of `ProfiledSteps`.
        shapes: also record the shapes of the operations' inputs, which takes time.
    """

    range = record_function

    def __init__(self, steps: tuple[int, int], folder: Path, phases: Phases, *, shapes: bool = False) -> None:
        super().__init__(steps, phases)
        self.folder, self.shapes = folder, shapes
        self._profiler: torch.profiler.profile | None = None

    def start(self, trainer: Trainer) -> None:
        """Starts PyTorch's profiler, and on a GPU the recording of its memory."""
        activities = [ProfilerActivity.CPU]
        if trainer.strategy.root_device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MAX_ALLOCATIONS)
        # torch 2.11 warns where events are not kept from cycle to cycle, of which there is one.
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=self.shapes, acc_events=True)
        self._profiler.start()

    def stop(self, trainer: Trainer) -> None:
        """Writes the profile up to the end of this step."""
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        profiler.stop()
        try:
            self._write(trainer, profiler)
        finally:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, trainer: Trainer, profiler: torch.profiler.profile) -> None:
        step = trainer.global_step
        self.folder.mkdir(exist_ok=True)
        timeline = self.folder / f"rank0-steps-{self.first}-{step}.json.gz"
        profiler.export_chrome_trace(str(timeline))
        listing = timeline.with_name(timeline.name.replace(".json.gz", ".txt"))
        listing.write_text(_listing(profiler, f"steps {self.first} to {step}"))
        say(f"profile: steps {self.first} to {step} are in {timeline}; open it at https://ui.perfetto.dev")
        say(f"profile: the slowest operations are in {listing}")
        if trainer.strategy.root_device.type == "cuda":
            memory = timeline.with_name(timeline.name.replace(".json.gz", ".memory.pickle"))
            torch.cuda.memory._dump_snapshot(str(memory))
            say(f"profile: the GPU's memory is in {memory}; open it at https://pytorch.org/memory_viz")


class _Ranges(Profiler):
    """Replaces Lightning's profiler: Lightning calls it when a part of a step begins and ends."""

    NAMES: ClassVar = {"train_dataloader_next": "data", "training_step": "forward", "backward": "backward"}
    """Their names in the timeline; PyTorch's profiler marks the optimizer's step itself."""

    def __init__(self, range_of: Callable[[str], AbstractContextManager]) -> None:
        super().__init__()
        self._range_of = range_of
        self._open: dict[str, AbstractContextManager] = {}

    def start(self, action_name: str) -> None:
        """Opens the range of an action that is shown."""
        owner, _, action = action_name.rpartition(".")
        if action in self.NAMES and not owner.startswith("[Callback]"):
            self._open[action_name] = _entered(self._range_of(self.NAMES[action]))

    def stop(self, action_name: str) -> None:
        """Closes it."""
        if action_name in self._open:
            self._open.pop(action_name).__exit__(None, None, None)


def _entered(context: AbstractContextManager) -> AbstractContextManager:
    context.__enter__()
    return context


def _listing(profiler: torch.profiler.profile, title: str) -> str:
    """A table of the slowest operations, and on a GPU the share of time in which it is busy."""
    kernels = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    key = "self_device_time_total" if kernels else "self_cpu_time_total"
    averages = profiler.key_averages()
    lines = [title]
    if kernels:
        span = max(end for _, end, _ in kernels) - min(start for start, _, _ in kernels)
        busy = covered([(start, end) for start, end, _ in kernels])
        computing = covered([(start, end) for start, end, name in kernels if "nccl" not in name.lower()])
        lines.append(f"from the first kernel to the last {span / 1e3:,.1f} ms; the GPU is busy for {busy / span:.1%}")
        if busy > computing:
            lines.append(f"communication that is not hidden behind computing: {(busy - computing) / span:.1%}")
    lines.append(averages.table(sort_by=key, row_limit=ROWS, max_name_column_width=90))
    return "\n".join(lines) + "\n"


def covered(intervals: list[Interval]) -> float:
    """The time covered by at least one of the intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
