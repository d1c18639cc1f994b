"""The metrics of a training run, and the lines that it prints."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fiddlehead.models import TransformerConfig
from fiddlehead.run.console import say
from fiddlehead.run.terminal import progress_line
from fiddlehead.training.callbacks.checkpoint import at_step_end
from fiddlehead.training.callbacks.phases import Phases, Window, exposed_communication
from fiddlehead.training.metrics_csv import log_row


class Metrics(Callback):
    """Logs every `every_n_steps`, and at the first and last step, and prints a line each time.

    Columns: `loss` (mean over the global batch, nats for a token), `lr`, `grad_norm` (before clipping), `tokens` (since
        the run began), `tokens_per_s`, `tflops_per_s` (model FLOPs on one device), `memory_gib` (peak of the device; on
        a CPU, of the process), `seconds_per_step` and its parts `seconds_data`, `seconds_forward`, `seconds_backward`
        and `seconds_optimizer`, means since the last line (`Phases`). Rates leave out validation and checkpoints.

    If the device's peak is known, also `mfu`, the model's FLOPs as a part of the peak, without keys that a causal mask
    or a window hides, and `mfu_full`, the same as if every token saw all keys, as PaLM (Chowdhery et al. 2022), nanoGPT
    and torchtitan report it; see `TransformerConfig.train_flops_per_token`. With DDP, also `seconds_communication`: how
    much longer than the backward computation the exchange of gradients takes.
    """

    def __init__(
        self, tokens_per_step: int, seq_length: int, every_n_steps: int, phases: Phases, peak_flops: float = 0.0
    ) -> None:
        """Args: peak_flops: of each device, a second; 0 if that is not known."""
        self.tokens_per_step, self.seq_length, self.every_n_steps = tokens_per_step, seq_length, every_n_steps
        self.phases, self.peak_flops = phases, peak_flops
        self.window = Window(0.0, ())
        """The steps of the newest line."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the validation."""
        if trainer.sanity_checking:  # it logs nothing
            return
        per_byte = trainer.callback_metrics.get("val_nats_per_byte")
        per_byte = "" if per_byte is None else f"  ({float(per_byte):.4f} nats/byte)"
        say(f"step {trainer.global_step:>6}  validation loss {trainer.callback_metrics['val_loss']:.4f}{per_byte}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the step if it is due."""
        if not at_step_end(trainer):
            return
        self.phases.end_step()
        step = trainer.global_step
        loss = pl_module.take_loss()  # type: ignore[operator]
        if not (step == 1 or step % self.every_n_steps == 0 or step == trainer.max_steps):
            return
        loss = trainer.strategy.reduce(loss, reduce_op="mean")
        pl_module.raise_if_non_finite()  # type: ignore[operator]
        loss = float(loss)  # waits for the device
        self.window = self.phases.take()
        metrics = self._measure(trainer, pl_module, loss)
        log_row(trainer.loggers, metrics, step)
        say(progress_line(metrics, step, int(trainer.max_steps)))

    def _measure(self, trainer: Trainer, module: LightningModule, loss: float) -> dict[str, float]:
        seconds_per_step = self.window.seconds / len(self.window.steps)
        config: Any = module.config
        rate = self.tokens_per_step / seconds_per_step
        rates = speed(config, self.seq_length, rate, trainer.world_size, self.peak_flops, num_adapted(module))
        metrics = {
            "loss": loss,
            "lr": float(module.lr),  # type: ignore[arg-type]
            "grad_norm": float(module.grad_norm),  # type: ignore[arg-type]
            "tokens": trainer.global_step * self.tokens_per_step,
            **rates,
            "memory_gib": peak_memory(module.device),
            "seconds_per_step": seconds_per_step,
            **self.window.means(),
        }
        communication = exposed_communication(trainer)
        if communication is not None:
            metrics["seconds_communication"] = communication
        return metrics


def speed(
    config: TransformerConfig,
    seq_length: int,
    tokens_per_s: float,
    devices: int,
    peak: float,
    adapters: int | None = None,
) -> dict[str, float]:
    """Converts `tokens_per_s` on `devices` to `tflops_per_s`, and to both MFUs if the peak is known.

    Args:
        peak: of each device, FLOPs a second; 0 if it is not known.
        adapters: as in `TransformerConfig.train_flops_per_token`.
    """
    flops, full = (
        tokens_per_s / devices * config.train_flops_per_token(seq_length, causal=causal, adapters=adapters)
        for causal in (True, False)
    )
    rates = {"tokens_per_s": tokens_per_s, "tflops_per_s": flops / 1e12}
    if peak:
        rates |= {"mfu": flops / peak, "mfu_full": full / peak}
    return rates


def num_adapted(module: Any) -> int | None:
    """The number of parameters of a LanguageModel's adapters; None if the whole model is trained."""
    if getattr(module, "lora", None) is None:
        return None
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def peak_memory(device: torch.device) -> float:
    """The peak so far in GiB: allocated memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
