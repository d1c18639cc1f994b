"""The base of every recipe: call it, then change lines."""

from __future__ import annotations

from copy import deepcopy

import fiddle as fdl
from lightning.pytorch import Trainer

from fiddlehead import tasks
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.models import TransformerConfig
from fiddlehead.recipe import Recipe
from fiddlehead.training import AdamW, Checkpoint, CosineAnnealing, LanguageModel, Log, Parallel


def pretrain(
    model: fdl.Config[TransformerConfig],
    *,
    seq_length: int,
    global_batch_size: int = 512,
    micro_batch_size: int = 1,
    max_steps: int = 300_000,
    lr: float = 3e-4,
    warmup_steps: int = 2000,
    devices: int | str = 8,
    num_nodes: int = 1,
    accelerator: str = "gpu",
    precision: str = "bf16-mixed",
    activation_checkpointing: str | float | None = None,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
) -> Recipe:
    """A pretraining run of `model` with the settings that most runs share; the user sets `data.paths`."""
    recipe = Recipe(
        tasks.pretrain,
        model=fdl.Config(LanguageModel, config=deepcopy(model)),  # many recipes may start from one model
        data=fdl.Config(
            PreTrainingDataModule,
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
        ),
        trainer=fdl.Config(
            Trainer,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            precision=precision,
            max_steps=max_steps,
            gradient_clip_val=1.0,
            log_every_n_steps=10,
            val_check_interval=1000,
            # A run ends by steps; its data has no end. What Lightning would print, save and sample is done here.
            max_epochs=-1,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            callbacks=[],  # for recipes that append to them
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ),
        optim=fdl.Config(
            AdamW,
            lr=lr,
            # 3e-5, not 2.9999999999999997e-5.
            lr_scheduler=fdl.Config(CosineAnnealing, warmup_steps=warmup_steps, min_lr=round(lr / 10, 12)),
        ),
        log=fdl.Config(Log),
        checkpoint=fdl.Config(Checkpoint),
    )
    if accelerator == "gpu":
        recipe.model.compile = "layers"
    if accelerator == "gpu" and (devices != 1 or num_nodes > 1):
        recipe.trainer.strategy = fdl.Config(Parallel)
    return laid_out(
        recipe,
        micro_batch_size=micro_batch_size,
        activation_checkpointing=activation_checkpointing,
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
    )


def laid_out(
    recipe: Recipe,
    *,
    micro_batch_size: int = 1,
    activation_checkpointing: str | float | None = None,
    tensor_parallel: int = 1,
    context_parallel: int = 1,
) -> Recipe:
    """The recipe with another layout on its GPUs, such as `fiddlehead plan RECIPE --fit` finds; sets what is not 1."""
    recipe.data.micro_batch_size = micro_batch_size
    if activation_checkpointing is not None:
        recipe.model.activation_checkpointing = activation_checkpointing
    if tensor_parallel > 1:
        recipe.trainer.strategy.tensor_parallel = tensor_parallel
    if context_parallel > 1:
        recipe.trainer.strategy.context_parallel = context_parallel
    return recipe


def finetune(
    *,
    seq_length: int = 2048,
    global_batch_size: int = 32,
    micro_batch_size: int = 1,
    max_steps: int = 1000,
    lr: float,
    devices: int | str = "auto",
    accelerator: str = "gpu",
    precision: str = "bf16-mixed",
) -> Recipe:
    """A fine-tuning run of the weights `model.init_from` on the examples in `data.paths`, on all GPUs of a machine."""
    recipe = pretrain(
        fdl.Config(TransformerConfig),
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        max_steps=max_steps,
        lr=lr,
        warmup_steps=max_steps // 20,
        devices=devices,
        accelerator=accelerator,
        precision=precision,
    )
    recipe = Recipe(tasks.finetune, **fdl.ordered_arguments(recipe))
    recipe.model.config = None  # its shape is that of the weights
    fdl.update_callable(recipe.data, FineTuningDataModule)
    recipe.trainer.val_check_interval = recipe.checkpoint.every_n_steps = 100
    return recipe


def uptrain(recipe: Recipe, init_from: str, fraction: float = 0.05) -> Recipe:
    """A recipe that continues a pretraining run from weights whose key/value heads were merged into fewer.

    It takes `fraction` of the run's steps (Ainslie et al. 2023), a tenth of them as warm-up, at a quarter of its
    learning rate: the full rate would undo more of the pretraining than so few steps can restore.
    """
    recipe.optim.lr /= 4
    recipe.model.config = None  # its shape is that of the weights
    recipe.model.init_from = init_from
    recipe.trainer.max_steps = max(1, round(fraction * recipe.trainer.max_steps))
    recipe.optim.lr_scheduler.warmup_steps = recipe.trainer.max_steps // 10
    recipe.trainer.val_check_interval = recipe.checkpoint.every_n_steps = recipe.trainer.max_steps
    return recipe
