"""What NeMo 2.0 and NeMo-Run call things, and what they are called here: one table, for errors, migration and docs."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fiddle as fdl
from fiddle import history

from fiddlehead.errors import Problem, nearest


@dataclass(frozen=True)
class Name:
    """A field of NeMo's recipes or of NeMo-Run's executors."""

    nemo: str
    """Its path there: ``optim.config.lr``; ``executor.`` begins an executor's, ``peft.`` an adapter's."""
    ours: str
    """Its path here; "" if there is nothing like it, or nothing to set."""
    note: str = ""
    """What else there is to know; required where `ours` is ""."""
    same: bool = True
    """Whether it has the same values here."""

    def __str__(self) -> str:
        if not self.ours:
            return f"NeMo's {self.nemo} has no equivalent: {self.note}"
        called = "has the same name" if self.ours == self.nemo else f"is {self.ours} here"
        return f"NeMo's {self.nemo} {called}{f': {self.note}' if self.note else ''}"


_STRATEGY, _EXECUTOR = "trainer.strategy", "executor"
_ALWAYS = "it is always so here; leave it out"

NAMES = (
    # The strategy.
    Name(f"{_STRATEGY}.tensor_model_parallel_size", f"{_STRATEGY}.tensor_parallel"),
    Name(f"{_STRATEGY}.pipeline_model_parallel_size", f"{_STRATEGY}.pipeline_parallel"),
    Name(f"{_STRATEGY}.virtual_pipeline_model_parallel_size", f"{_STRATEGY}.pipeline_stages_per_rank"),
    Name(f"{_STRATEGY}.context_parallel_size", f"{_STRATEGY}.context_parallel"),
    Name(f"{_STRATEGY}.expert_model_parallel_size", f"{_STRATEGY}.expert_parallel"),
    Name(f"{_STRATEGY}.expert_tensor_parallel_size", "", "experts are not split; leave it out"),
    Name(f"{_STRATEGY}.sequence_parallel", "", "tensor parallelism always splits the sequence too; leave it out"),
    Name(f"{_STRATEGY}.ckpt_async_save", "checkpoint.asynchronous"),
    Name(f"{_STRATEGY}.ckpt_load_strictness", "", "all tensors must be there and have their shapes; leave it out"),
    Name(f"{_STRATEGY}.ckpt_parallel_load", "", _ALWAYS),
    Name(f"{_STRATEGY}.ckpt_include_optimizer", "", _ALWAYS),
    Name(f"{_STRATEGY}.pipeline_dtype", "", "trainer.precision decides; leave it out"),
    Name(f"{_STRATEGY}.gradient_as_bucket_view", "", "gradients are sharded and not copied to buckets; leave it out"),
    Name(f"{_STRATEGY}.ddp", "", "gradients are reduced and sharded by FSDP2; leave it out"),
    Name(f"{_STRATEGY}.fsdp", "", "weights are sharded by FSDP2; leave it out"),
    Name(f"{_STRATEGY}.save_ckpt_format", "", "checkpoints are safetensors; leave it out"),
    # The trainer.
    Name("trainer.limit_val_batches", "data.val_samples", "it counts samples, not batches", same=False),
    Name("trainer.limit_test_batches", "", "there are no test batches; leave it out"),
    Name("trainer.max_epochs", "trainer.max_steps", "a run ends by steps; a plan says how many", same=False),
    Name("trainer.plugins", "trainer.precision", "'bf16-mixed' for bf16_mixed(), 'bf16-true' for bf16", same=False),
    Name("trainer.logger", "log.loggers", "a list; log.tensorboard and log.wandb need none", same=False),
    Name("trainer.use_distributed_sampler", "trainer.use_distributed_sampler", "leave it as it is"),
    # The optimizer.
    Name("optim.config.lr", "optim.lr"),
    Name("optim.config.min_lr", "optim.lr_scheduler.min_lr"),
    Name("optim.config.weight_decay", "optim.weight_decay"),
    Name("optim.config.adam_beta1", "optim.betas[0]"),
    Name("optim.config.adam_beta2", "optim.betas[1]"),
    Name("optim.config.adam_eps", "optim.eps"),
    Name("optim.config.clip_grad", "trainer.gradient_clip_val"),
    Name("optim.max_lr", "optim.lr"),
    Name("optim.min_lr", "optim.lr_scheduler.min_lr"),
    Name("optim.warmup_steps", "optim.lr_scheduler.warmup_steps"),
    Name("optim.config.optimizer", "optim", "AdamW or Muon", same=False),
    Name("optim.config.bf16", "", "trainer.precision decides; leave it out"),
    Name("optim.config.fp16", "", "float16 is not used; trainer.precision is 'bf16-mixed' or 'bf16-true'"),
    Name("optim.config.use_distributed_optimizer", "", "the optimizer's state is always sharded; leave it out"),
    Name("optim.config.use_precision_aware_optimizer", "optim.state_bits", "8 or 32 bits", same=False),
    Name("optim.config.optimizer_cpu_offload", "optim.state_offloading", "the GPU computes the step"),
    Name("optim.config.optimizer_offload_fraction", "", "all of the state is in main memory; leave it out"),
    Name("optim.config.overlap_cpu_optimizer_d2h_h2d", "", _ALWAYS),
    Name("optim.config.use_torch_optimizer_for_cpu_offload", "", "the GPU computes the step; leave it out"),
    Name("optim.config.pin_cpu_params", "", "weights stay on the GPU; leave it out"),
    Name("optim.config.pin_cpu_grads", "", "gradients stay on the GPU; leave it out"),
    Name("optim.lr_scheduler.warmup_steps", "optim.lr_scheduler.warmup_steps"),
    Name("optim.lr_scheduler.min_lr", "optim.lr_scheduler.min_lr"),
    Name("optim.lr_scheduler.constant_steps", "", "WarmupStableDecay holds the rate before it decays"),
    Name("optim.lr_scheduler.max_steps", "trainer.max_steps"),
    # Logs and checkpoints.
    Name("log.log_dir", "log.dir"),
    Name("log.explicit_log_dir", "log.dir", "the run's folder is log.dir/log.name", same=False),
    Name("log.name", "log.name"),
    Name("log.ckpt.save_top_k", "checkpoint.keep_best", "the newest are kept too: checkpoint.keep_last"),
    Name("log.ckpt.save_last", "", "the last step is always saved; leave it out"),
    Name("log.ckpt.every_n_train_steps", "checkpoint.every_n_steps"),
    Name("log.ckpt.monitor", "", "checkpoint.keep_best goes by val_loss; leave it out"),
    Name("log.ckpt.filename", "", "a checkpoint is called by its step; leave it out"),
    Name("log.ckpt.dirpath", "log.dir", "checkpoints are in the run's folder", same=False),
    Name("log.ckpt.train_time_interval", "checkpoint.every_n_minutes", "in minutes", same=False),
    Name("log.ckpt.save_optim_on_train_end", "", _ALWAYS),
    Name("log.ckpt.save_on_train_epoch_end", "", "the last step is always saved; leave it out"),
    Name("log.ckpt.always_save_context", "", "a run's folder always has its recipe; leave it out"),
    Name("log.tensorboard", "log.tensorboard", "true or false", same=False),
    Name("log.wandb", "log.wandb", "true or false; also log.wandb_entity, _group, _tags, _notes", same=False),
    Name("log.wandb.project", "log.wandb_project"),
    Name("log.extra_loggers", "log.loggers"),
    Name("log.use_datetime_version", "", "a run without log.name gets date and time in its name; leave it out"),
    # What a run begins with.
    Name("resume.restore_config.path", "model.init_from", "NeMo's by `fiddlehead import nemo`", same=False),
    Name("resume.restore_config", "model.init_from", same=False),
    Name("resume.resume_if_exists", "resume", "'auto' is true, 'never' is false", same=False),
    Name("resume.resume_ignore_no_checkpoint", "", "resume='auto' starts anew without a checkpoint; leave it out"),
    Name("resume.resume_from_path", "resume"),
    Name("resume.resume_from_directory", "resume"),
    # Data.
    Name("data.paths", "data.paths", "also a folder that `fiddlehead tokenize` makes"),
    Name("data.dataset_root", "data.paths", "also files; data.val_paths for validation"),
    Name("data.dataset_kwargs", "data.prompt_template", "conversations have the model's chat template", same=False),
    Name("data.seq_length", "data.seq_length"),
    Name("data.global_batch_size", "data.global_batch_size"),
    Name("data.micro_batch_size", "data.micro_batch_size"),
    Name("data.num_workers", "data.num_workers"),
    Name("data.seed", "data.seed"),
    Name("data.split", "data.split"),
    Name("data.packed_sequence_specs", "data.packed", "true or false; rows are data.seq_length long", same=False),
    Name("data.reset_position_ids", "data.separate_documents"),
    Name("data.reset_attention_mask", "data.separate_documents"),
    Name("data.eod_mask_loss", "data.separate_documents"),
    Name("data.index_mapping_dir", "data.cache_dir"),
    Name("data.pin_memory", "", _ALWAYS),
    Name("data.persistent_workers", "", _ALWAYS),
    Name("data.num_train_samples", "trainer.max_steps", "a run ends by steps", same=False),
    Name("data.num_val_samples", "data.val_samples"),
    Name("data.tokenizer", "data.tokenizer", "a dataset and a model come with theirs", same=False),
    # The model and its adapters.
    Name("model.config.recompute_granularity", "model.activation_checkpointing"),
    Name("model.config.recompute_method", "", "model.activation_checkpointing is all there is; leave it out"),
    Name("model.config.recompute_num_layers", "model.activation_checkpointing", "'full', or 0 to 1", same=False),
    Name("model.config.cpu_offloading", "model.activation_offloading", "with full recomputation"),
    Name("model.config.cpu_offloading_num_layers", "", "model.activation_offloading is for all layers; leave it out"),
    Name("model.config.fp8", "model.fp8", "torchao's recipes of float8", same=False),
    Name(
        "model.config.cp_comm_type",
        f"{_STRATEGY}.context_parallel_method",
        "'ulysses' for a2a, 'ring' for p2p; 'auto' does a2a+p2p where it is needed",
        same=False,
    ),
    Name("model.config.seq_length", "data.seq_length"),
    Name("model.config.apply_rope_fusion", "", "model.compile fuses it; leave it out"),
    Name("model.config.bias_activation_fusion", "", "model.compile fuses it; leave it out"),
    Name("model.config.masked_softmax_fusion", "", "attention is one kernel; leave it out"),
    Name("model.config.make_vocab_size_divisible_by", "", "set model.config.vocab_size itself"),
    Name("model.tokenizer", "data.tokenizer", "a dataset and a model come with theirs", same=False),
    Name("model.optim", "optim", same=False),
    Name("peft.dim", "model.lora.rank"),
    Name("peft.alpha", "model.lora.alpha"),
    Name("peft.dropout", "model.lora.dropout"),
    Name("peft.target_modules", "model.lora.target_modules"),
    Name("peft", "model.lora", "LoRA(rank=16), LoRA(dora=true), or None", same=False),
    # NeMo-Run's executors.
    Name(f"{_EXECUTOR}.container_image", f"{_EXECUTOR}.container", "with docker executor.image"),
    Name(f"{_EXECUTOR}.num_gpus", f"{_EXECUTOR}.gpus"),
    Name(f"{_EXECUTOR}.volumes", f"{_EXECUTOR}.mounts"),
    Name(f"{_EXECUTOR}.retries", f"{_EXECUTOR}.requeues"),
    Name(f"{_EXECUTOR}.tunnel", f"{_EXECUTOR}.host", "and user, identity, remote_dir", same=False),
    Name(f"{_EXECUTOR}.job_dir", f"{_EXECUTOR}.remote_dir", "over SSH; here log.dir", same=False),
    Name(f"{_EXECUTOR}.packager", "", "the working tree travels as it is; leave it out"),
    Name(f"{_EXECUTOR}.launcher", "", "torchrun starts a process for each device; leave it out (Slurm also has srun)"),
    Name(f"{_EXECUTOR}.ntasks_per_node", f"{_EXECUTOR}.ntasks_per_node"),
    Name(f"{_EXECUTOR}.env_vars", f"{_EXECUTOR}.env_vars"),
    Name(f"{_EXECUTOR}.job_name_prefix", f"{_EXECUTOR}.job_name_prefix"),
    Name(f"{_EXECUTOR}.monitor_group_job", "", "`fiddlehead runs` follows each run; leave it out"),
)  # fmt: skip

_OWNERS = {
    "Parallel": "trainer.strategy",
    "Trainer": "trainer",
    "AdamW": "optim",
    "Muon": "optim",
    "CosineAnnealing": "optim.lr_scheduler",
    "WarmupStableDecay": "optim.lr_scheduler",
    "Log": "log",
    "Checkpoint": "log.ckpt",
    "LanguageModel": "model",
    "PreferenceModel": "model",
    "TransformerConfig": "model.config",
    "LoRA": "peft",
    "PreTrainingDataModule": "data",
    "FineTuningDataModule": "data",
    "SlurmExecutor": "executor",
    "DockerExecutor": "executor",
    "LocalExecutor": "executor",
    "pretrain": "",
    "finetune": "",
}
"""Where NeMo's recipes have what a class here configures."""
_SECTIONS = frozenset({"trainer", "optim", "log", "resume", "data", "model"})
"""The parts of a recipe that have the same name in NeMo and here."""


def names_at(path: str) -> list[Name]:
    """The entries that NeMo's `path` may mean: its own entry, or else those of the fields below, or the one above."""
    path = path.removeprefix("recipe.").replace("run.executor.", "executor.")
    others = [name for name in NAMES if name.nemo != name.ours]
    exact = [name for name in others if f".{name.nemo}".endswith(f".{path}")]
    below = [name for name in others if name.nemo.startswith(f"{path}.")]
    above = [name for name in others if path.startswith(f"{name.nemo}.")]
    return exact[:1] or below or above[:1]


def nemo_path(owner: Any, path: str) -> str:
    """The path in NeMo's recipes of the field `path` of `owner`, a class or a function of this package."""
    return ".".join(filter(None, (_OWNERS.get(getattr(owner, "__name__", ""), ""), path)))


def nemo_hint(owner: Any, name: str) -> str:
    """Our name for a field of NeMo's that `owner`, a class or a function, does not have; "" if NeMo has none either."""
    if getattr(owner, "__name__", "") not in _OWNERS:
        return ""
    path = nemo_path(owner, name)
    if path in _SECTIONS:  # a part of ours too, which this recipe does not have
        return ""
    return answer([entry for entry in names_at(path) if f"{entry.nemo}.".startswith(f"{path}.")])


def answer(found: list[Name]) -> str:
    """The part of an error message that gives our names for these entries; "" if there are none."""
    if len(found) < 2:
        return "".join(map(str, found))
    return f"NeMo's names here: {', '.join(f'{name.nemo} is {name.ours}' for name in found if name.ours)}"


def unknown(owner: Any, name: str, known: Any) -> str:
    """The message that `owner` has no field `name`, with our name for NeMo's field, or else the nearest of `known`."""
    if found := nemo_hint(owner, name):
        return f"{owner.__name__} has no {name}; {found}"
    return Problem.unknown("", name, f"parameter of {getattr(owner, '__name__', owner)}", known)


def explain(error: Exception) -> str:
    """The message of an error in a user's code. If it is about a name of NeMo's, our name for it is added."""
    text = f"{type(error).__name__}: {error}"
    named = re.fullmatch(r"AttributeError: '(?:str|bool|int|float|NoneType)' object has no attribute '(\w+)'", text)
    found = answer(names_at(named[1])) if named else ""
    return f"{text}; {found}" if found else text


class Text(str):
    """The text of `resume`, where NeMo has a part with fields: those are answered with ours."""

    def __getattr__(self, name: str) -> Any:
        found = answer(names_at(f"resume.{name}"))
        raise AttributeError(f"'str' object has no attribute {name!r}{found and f'; {found}'}")

    def __setattr__(self, name: str, value: Any) -> None:
        self.__getattr__(name)


def rows() -> Iterator[tuple[str, str, str]]:
    """NeMo's path, ours and the note, for a table; without those that are the same."""
    for name in NAMES:
        if name.nemo != name.ours or name.note:
            yield name.nemo, name.ours, name.note


def explain_in_fiddle() -> None:
    """Makes errors of Fiddle about an unknown field name the nearest field; without this they list all fields."""
    history.add_exclude_location("fiddlehead/recipe/nemo_names.py")  # a value is set where it was written
    if not hasattr(fdl.Buildable.__setattr__, "__wrapped__"):
        for method in ("__setattr__", "__getattr__"):
            setattr(fdl.Buildable, method, _explained(getattr(fdl.Buildable, method)))
        fdl.Buildable.__init__ = _explained_arguments(fdl.Buildable.__init__)


def _explained(method: Any) -> Any:
    @functools.wraps(method)
    def explained(self: fdl.Buildable, name: str, *value: Any) -> Any:
        try:
            return method(self, name, *value)
        except AttributeError:
            owner, known = fdl.get_callable(self), self.__signature_info__.valid_param_names
            if name.startswith("_") or name in known or not (nemo_hint(owner, name) or nearest(name, known)):
                raise
            raise AttributeError(unknown(owner, name, known)) from None

    return explained


def _explained_arguments(method: Any) -> Any:
    @functools.wraps(method)
    def explained(self: fdl.Buildable, function: Any, /, *args: Any, **given: Any) -> None:
        try:
            method(self, function, *args, **given)
        except TypeError:
            try:
                known = list(inspect.signature(function).parameters)
            except (TypeError, ValueError):  # it cannot be called, or does not say with what
                known = list(given)
            others = [name for name in given if name not in known]
            if not any(nemo_hint(function, name) or nearest(name, known) for name in others):
                raise
            raise TypeError("; ".join(unknown(function, name, known) for name in others)) from None

    return explained
