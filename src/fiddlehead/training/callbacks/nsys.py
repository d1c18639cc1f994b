"""Tells NVIDIA Nsight Systems, under which the job runs, which steps to record."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.run.console import say
from fiddlehead.training.callbacks.profile import ProfiledSteps

NEEDS_GPUS = "Nsight Systems records what GPUs do; set log.profile instead, which also profiles a CPU"


class Nsys(ProfiledSteps):
    """Opens and closes the range of CUDA's profiler that `nsys profile --capture-range=cudaProfilerApi` records.

    `launch.script` runs the job under `nsys`, which then writes the report.
    """

    range = torch.cuda.nvtx.range

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a device that is not a GPU.

        Raises:
            ConfigError: it is another device.
        """
        if trainer.strategy.root_device.type != "cuda":
            raise ConfigError(Problem("log.nsys", f"{self.first}:{self.last}", NEEDS_GPUS))

    def start(self, trainer: Trainer) -> None:
        """Begins when earlier kernels have ended, so that none of theirs is recorded."""
        torch.cuda.synchronize()
        torch.cuda.profiler.start()

    def stop(self, trainer: Trainer) -> None:
        """Ends when the kernels of the last step have ended."""
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        say(f"nsys: steps {self.first} to {trainer.global_step} are recorded; nsys writes its report as the job ends")
