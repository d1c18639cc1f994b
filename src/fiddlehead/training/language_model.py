"""The LightningModule: the loss, the optimizer, gradient clipping, validation and checkpoints."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule

from fiddlehead.attention import Target
from fiddlehead.data.documents import NO_LABEL
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.models import LoRA, Transformer, TransformerConfig
from fiddlehead.models.bfloat16_weights import in_bfloat16
from fiddlehead.models.computation import Computation
from fiddlehead.models.lora import PEFT_NAMES
from fiddlehead.models.meta import shapes_only
from fiddlehead.models.mlp_choice import MlpBackend, MlpChoice
from fiddlehead.models.speed import Compile, Float8, Recompute, rescale_gathered
from fiddlehead.recipe.from_task import from_task
from fiddlehead.recipe.resumable import Resumable
from fiddlehead.training.bfloat16_gradients import makes_bfloat16_gradients
from fiddlehead.training.distributed.gradients import clip, gradients_of
from fiddlehead.training.distributed.parallel import Parallel
from fiddlehead.training.distributed.pipeline import Pipeline
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.divisors import Divisors
from fiddlehead.training.feed_forward import try_mlp
from fiddlehead.training.initial import UNKNOWN, InitialWeights
from fiddlehead.training.metrics_csv import log_row
from fiddlehead.training.model_problems import refused_model
from fiddlehead.training.non_finite import FirstNonFinite, NonFiniteError
from fiddlehead.training.optim import Optim
from fiddlehead.training.optim.resumed import Settings, resume_with, settings_of


class LanguageModel(LightningModule):
    """A transformer that learns to predict the next token.

    `configure_model` makes the parameters, when the strategy and precision are known. Until then the module takes no
    memory, and `config` may be completed with what follows from the data.

    Args:
        config: the model's shape; None takes that of `init_from`.
        init_from: begin with these weights instead of random ones: a run's name, a checkpoint, the output of
            `fiddlehead import`, or a Hugging Face checkpoint's folder.
        lora: train low-rank adapters only; a checkpoint then has nothing else, and needs `init_from`.
        compile: what `torch.compile` compiles at once: "layers", or the whole "model", whose first step takes longer.
        activation_checkpointing: what the backward pass recomputes to save memory: everything inside a layer ("full"),
            all but its matrix products ("selective"), or all but this part of the activations (0 to 1).
        fp8: float8 matrix products in the layers, by torchao's recipe of this name; needs an Ada GPU or later.
        fp8_all_gather: several devices gather the layers' weights in float8, half the bytes; with fp8="tensorwise".
        tiled_mlp: compute the feed-forward of each layer for so many tokens at a time, such as 8192, in both passes; it
            saves memory where sequences are long. None computes it for all tokens at once.
        tiled_attention: compute attention for so many key/value heads at a time, with the query heads that read them,
            in both passes; it saves memory where sequences are long. None computes all heads at once.
        activation_offloading: keep the inputs of the layers in main memory until the backward pass; with
            `activation_checkpointing="full"`.
        mlp_backend: what computes the feed-forward: "torch"; "quack", whose products apply SwiGLU themselves; or, with
            adapters, "triton", whose kernels apply them and SwiGLU together. "auto" takes what was fastest: a kernel
            where it is installed, on a Hopper GPU, in bfloat16.
        optim: the optimizer's settings, without which it cannot be trained; a recipe has them beside the model.
    """

    VALIDATION: ClassVar = ("val_loss", "val_nats_per_byte")
    """The metrics that a validation logs, for callbacks that watch one."""
    transformer: Transformer
    """The model itself; `configure_model` makes it."""
    _step_divisors: Divisors  # of the current step; its first micro-batch sets them

    @from_task("optim")
    def __init__(
        self,
        config: TransformerConfig | None = None,
        init_from: str | Path | None = None,
        lora: LoRA | None = None,
        *,
        compile: Resumable[Compile | None] = None,
        activation_checkpointing: Resumable[Recompute | None] = None,
        fp8: Float8 | None = None,
        fp8_all_gather: Resumable[bool] = False,
        tiled_mlp: Resumable[int | None] = None,
        tiled_attention: Resumable[int | None] = None,
        activation_offloading: Resumable[bool] = False,
        mlp_backend: Resumable[MlpBackend] = "auto",
        optim: Optim | None = None,
    ) -> None:
        super().__init__()
        how = (compile, activation_checkpointing, fp8, fp8_all_gather, tiled_mlp, tiled_attention)
        self.computation = Computation(*how, activation_offloading, mlp_backend)
        refuse(self.computation.problems())
        self._config, self.lora, self.optim = config, lora, optim
        self.initial = InitialWeights(init_from, needed=self._needs_weights())
        """Those of `init_from`."""
        self.mlp = MlpChoice("torch")
        """What computes the feed-forward; `setup` finds it."""
        self.lr = 0.0
        self.grad_norm = torch.zeros(())
        self.token_bytes: torch.Tensor | None = None
        self._loss_sum = torch.zeros(())
        self._losses = 0
        self._non_finite = FirstNonFinite()
        self._settings: Settings = ()
        """The optimizer's, by the recipe."""

    def __getattr__(self, name: str) -> Any:
        if name == "transformer" and name not in self._modules:
            raise AttributeError("the model has no parameters yet: call configure_model() first")
        return super().__getattr__(name)

    @property
    def config(self) -> TransformerConfig:
        """The model's shape; call `take_shape` first if it is that of `init_from`."""
        if self._config is None:
            raise RuntimeError("the shape is that of init_from: call take_shape() first")
        return self._config

    @config.setter
    def config(self, config: TransformerConfig) -> None:
        self._config = config

    def take_shape(self) -> None:
        """Takes the shape from the weights of `init_from`, or compares it with them.

        If there is nothing at `init_from` and `config` is set, the model can be planned; `initial.missing` says what it
        lacks.

        Raises:
            ConfigError: the shape is not known, or the weights are of another shape than `config`.
        """
        self._config = self.initial.find(self._config)

    def _needs_weights(self) -> str:
        """Why the model needs the weights of another; "" if random ones will do."""
        if self.lora is None:
            return ""
        return UNKNOWN if self._config is None else "adapters need a model to change; name one, or set lora=None"

    def problems(self, precision: str, sizes: Sizes) -> list[Problem]:
        """Why the model cannot be trained with this precision on ranks of these sizes; empty if it can."""
        return refused_model(self, precision, sizes)

    def on_meta(self, config: TransformerConfig | None = None) -> Transformer:
        """The model as it will be trained, on the meta device.

        Args:
            config: its shape, if `self.config` is not complete yet.

        Raises:
            ConfigError: the adapters match none of its layers.
        """
        with shapes_only():
            transformer = Transformer(config or self.config)
            if self.lora is not None:
                try:
                    self.lora.apply(transformer)
                except ConfigError as error:
                    raise error.under("lora") from error
        return transformer

    def setup(self, stage: str) -> None:
        """Finds what computes the feed-forward, by trying it; warns if it is installed and does not work.

        Raises:
            ConfigError: a kernel is asked for, and it cannot.
        """
        if not hasattr(self, "transformer"):
            strategy, world_size = self._parallel, self.trainer.world_size
            sizes = Sizes(1, 1) if strategy is None else strategy.sizes(world_size)
            device = Target.of(self.trainer.strategy.root_device)
            self.mlp = try_mlp(self, str(self.trainer.precision), sizes, device)

    def configure_model(self) -> None:
        """Makes the parameters, once."""
        if not hasattr(self, "transformer"):
            change = partial(self.computation.apply, mlp=self.mlp, gathers_float8=self._gathers_float8)
            self.transformer = self.initial.transformer(self.config, self.lora, self._parallel, change)

    @property
    def _gathers_float8(self) -> bool:
        strategy = self._parallel
        return self.computation.fp8_all_gather and strategy is not None and strategy.world_size > 1

    @property
    def _parallel(self) -> Parallel | None:
        """The trainer's strategy, if it may split the model."""
        strategy = None if self._trainer is None else self._trainer.strategy
        return strategy if isinstance(strategy, Parallel) else None

    def on_fit_start(self) -> None:
        """Takes the bytes of each token from the data, and compares the tokenizer with that of `init_from`."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.token_bytes = data.token_bytes
        self.initial.refuse_other_tokenizer(data.tokenizer)

    def forward(
        self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None, max_seqlen: int | None = None
    ) -> torch.Tensor:
        """Token ids (B, T) to logits (B, T, V); other arguments separate documents, as in `Transformer.forward`."""
        return self.transformer(input_ids, cu_seqlens, max_seqlen)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """The cross-entropy, in nats a token, plus the balancing loss of a mixture of experts.

        The cross-entropy is a mean over the labelled tokens of the whole step, and the balancing loss a mean over all
        its tokens without padding, whatever part of them a micro-batch or a rank has. Only the cross-entropy is logged.

        In a pipeline a micro-batch only waits here for the others of its step.
        """
        batch = self._own_tokens(batch)
        divisors = self._divisors(batch, batch_idx)
        if self._pipeline is not None:
            self._pipeline.waiting.append({**batch, "dropout_seed": self.transformer.dropout_seed})
            return torch.zeros((), device=batch["labels"].device)
        # What divides the loss later is part of its divisor, so that the gradient of what is divided is 1.
        later = self._divides_later
        with self._training_weights():
            loss = self._nats(batch, divisors.labels * later) * later
        self._note_loss(loss.detach())
        return self._with_balance(loss, divisors)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass; in a pipeline, both passes of all micro-batches once the last one has arrived."""
        if self._pipeline is None:
            super().backward(loss, *args, **kwargs)
        elif len(self._pipeline.waiting) == self.trainer.accumulate_grad_batches:
            with self.trainer.precision_plugin.train_step_context():
                divisors = self._step_divisors
                self._note_loss(self._pipeline.train(divisors.labels, divisors.tokens))

    @property
    def _pipeline(self) -> Pipeline | None:
        return None if self._parallel is None else self._parallel.pipeline

    @property
    def _divides_later(self) -> int:
        """What Lightning and the strategy divide the loss of a micro-batch by before its backward pass."""
        tensor = 1 if self._parallel is None else self._parallel.tensor_parallel
        return self.trainer.accumulate_grad_batches * tensor

    def _own_tokens(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch."""
        return batch if self._parallel is None else dict(self._parallel.own_tokens(batch))

    def _divisors(self, batch: dict[str, Any], batch_idx: int) -> Divisors:
        """The divisors of a micro-batch; all ranks call it together."""
        accumulate = self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            parts = self.transformer.split.parts
            self._step_divisors = Divisors.of_step(batch, accumulate, self.trainer.strategy, parts)
        return self._step_divisors

    def _training_weights(self) -> AbstractContextManager[None]:
        """In the block, the layers have the weights of a forward pass that is trained on: see `in_bfloat16`."""
        trainer = self.trainer
        makes = makes_bfloat16_gradients(
            self,
            next(iter(trainer.optimizers), None),
            precision=str(trainer.precision),
            strategy=trainer.strategy,
            devices=trainer.world_size,
        )
        return in_bfloat16(self.transformer, adds_up=trainer.accumulate_grad_batches > 1) if makes else nullcontext()

    def _with_balance(self, loss: torch.Tensor, divisors: Divisors) -> torch.Tensor:
        """The loss and, in a mixture, the balancing loss of the latest forward pass."""
        balance = self.transformer.aux_loss()
        return loss if balance is None else loss + balance / divisors.tokens

    def _nats(self, batch: dict[str, Any], divisor: torch.Tensor | int = 1) -> torch.Tensor:
        """The sum of the cross-entropy over this rank's part of a batch, divided by `divisor`."""
        documents = batch.get("cu_seqlens"), batch.get("max_seqlen")
        labels, padding = batch["labels"], batch.get("padding")
        return self.transformer(batch["input_ids"], *documents, labels=labels, divisor=divisor, padding=padding)

    def _note_loss(self, loss: torch.Tensor) -> None:
        self._loss_sum = self._loss_sum.to(loss.device) + loss
        self._losses += 1

    def take_loss(self) -> torch.Tensor:
        """The mean loss since the last call; its mean over the ranks is the loss of the step."""
        loss = self._loss_sum / max(self._losses, 1)
        self._loss_sum, self._losses = torch.zeros_like(self._loss_sum), 0
        return loss

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule, over the trainer's `max_steps`.

        Raises:
            ConfigError: the model was made without `optim`.
        """
        if self.optim is None:
            raise ConfigError(Problem("optim", None, "a model that is trained needs an optimizer, such as AdamW()"))
        fused = {f"transformer.{name}": rows for name, rows in self.transformer.fused_rows().items()}
        layout = None if self._parallel is None else self._parallel.layout
        built = self.optim.build(self.named_parameters(), self.trainer.max_steps, fused, layout)
        self._settings = settings_of(built["optimizer"], self.optim)
        return built

    def on_train_start(self) -> None:
        """Sets the learning rate by the schedule, and the optimizer's other settings by the recipe."""
        for config in self.trainer.lr_scheduler_configs:
            resume_with(self._settings, config.scheduler)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clips the global norm, also in mixed precision with a fused optimizer, where Lightning refuses.

        As with Lightning, None and 0 clip nothing. An optimizer that clips within its step leaves the gradients as they
        are: callbacks then see them before clipping.
        """
        limit = float(gradient_clip_val or math.inf)
        self.lr = optimizer.param_groups[0]["lr"]  # noted here, because the schedule advances before the step is logged
        self.grad_norm = self._clip(limit, optimizer)
        self._non_finite.note(self.trainer.global_step + 1, self._loss_sum, self.grad_norm)
        if self.grad_norm.device.type == "cpu":  # before the optimizer's step; on a GPU looking stalls
            self.raise_if_non_finite()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        """Takes the step and frees the gradients.

        Lightning frees them when the next forward pass has ended. Memory is at its peak there, so they would be part of
        the peak. Callbacks see them in `on_before_zero_grad`, which Lightning then calls again without gradients.
        """
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self._gathers_float8:
            rescale_gathered(self.transformer)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            callback.on_before_zero_grad(self.trainer, self, optimizer)  # type: ignore[arg-type]
        optimizer.zero_grad()

    def _clip(self, limit: float, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Reduces the gradients of the step and clips them to the norm `limit`; returns the norm before clipping."""
        layout = None
        if self._parallel is not None:
            self._parallel.reduce_gradients()
            layout = self._parallel.layout
        return clip(gradients_of(self.named_parameters()), limit, layout, optimizer)

    def raise_if_non_finite(self) -> None:
        """Raises NonFiniteError if a step so far was not finite; waits for the device."""
        if (step := self._non_finite.look()) is not None:
            indices = self.trainer.datamodule.batch_indices(step - 1)  # type: ignore[attr-defined]
            raise NonFiniteError(
                f"step {step}: the loss or the gradient is not finite (gradient norm {float(self.grad_norm)}). "
                f"The batch held the samples {indices}"
            )

    def on_validation_epoch_start(self) -> None:
        """Resets the three sums of a validation: here nats, tokens, bytes."""
        self._validation = torch.zeros(3, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Adds one batch to the sums; in a pipeline, to those of the rank that has the last stage."""
        batch = self._own_tokens(batch)
        nats = self._nats(batch) if self._pipeline is None else self._pipeline.nats(batch)
        if nats is None:
            return
        labels = batch["labels"].flatten()
        counted = labels != NO_LABEL
        self._validation[0] += nats
        self._validation[1] += counted.sum()
        if self.token_bytes is not None:
            self._validation[2] += (self.token_bytes.to(labels.device)[labels * counted] * counted).sum()

    def on_validation_epoch_end(self) -> None:
        """Logs `val_loss` in nats a token and, where the tokenizer knows its bytes, `val_nats_per_byte`."""
        if self.trainer.sanity_checking:
            return
        total = self.trainer.strategy.reduce(self._validation, reduce_op="sum")
        nats, tokens, text_bytes = total.tolist()  # type: ignore[union-attr]
        metrics = {"val_loss": nats / tokens}
        if text_bytes:
            metrics["val_nats_per_byte"] = nats / text_bytes
        self._log_validation(metrics)

    def _log_validation(self, metrics: dict[str, float]) -> None:
        self.log_dict(metrics, logger=False, sync_dist=True)  # for callbacks that watch a metric, such as EarlyStopping
        log_row(self.trainer.loggers, metrics, self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the model's configuration, so that a checkpoint can be loaded without its recipe."""
        checkpoint |= {"config": asdict(self.config), **self.initial.written()}
        if self.lora is not None:
            checkpoint["lora"] = asdict(self.lora)
            state = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {name: x for name, x in state if name.rpartition(".")[2] in PEFT_NAMES}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the base weights to a checkpoint that has only adapters; the model has them already.

        Raises:
            ConfigError: they are not those that the checkpoint was trained with.
        """
        self.initial.refuse_changed(checkpoint)
        if self.lora is not None:
            checkpoint["state_dict"] = self.trainer.strategy.lightning_module_state_dict() | checkpoint["state_dict"]
