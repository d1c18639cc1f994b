"""The other programs of `train.py`, each trained in its own way, and what all arms share: weights, tokens, clock."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
PACKAGES = ["torch", "triton", "lightning", "transformers", "torchtitan", "litgpt", "liger-kernel", "flash-attn"]
TOLERANCES = {"first": 1e-3, "last": 1e-2}
"""How far apart, relatively, the losses of one comparison may be in the first step and in the last."""


class Clock:
    """Times `steps` steps after `warmup` ones, and keeps the first and the last loss: call it after each step."""

    def __init__(self, steps: int, warmup: int = 5) -> None:
        self.steps, self.warmup, self.done = warmup + steps, warmup, 0
        self.first = self.start = self.seconds = 0.0
        self.losses: dict[str, torch.Tensor] = {}

    def __call__(self, loss: torch.Tensor) -> None:
        """One more step is done."""
        self.done += 1
        if self.done in (1, self.warmup, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.done == 1:
                self.first = now
            if self.done == self.warmup:
                self.start = now
            self.seconds = now - self.start
            self.losses["first" if self.done == 1 else "last"] = loss.detach().clone()


@dataclass
class Arm:
    """What one process trains.

    Args:
        shape: the model's sizes, `T` tokens a sequence and `B` sequences a micro-batch.
        weights: a folder in Hugging Face's format.
        accumulate: micro-batches a step.
    """

    shape: dict[str, int]
    weights: Path
    clock: Clock
    precision: str = "bf16-mixed"
    accumulate: int = 1
    options: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The kind of device that all arms train on."""
        return accelerator()

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As `batches`, on the device."""
        for pair in batches(self.shape, self.device == "cuda"):
            yield tuple(tokens.to(self.device, non_blocking=True) for tokens in pair)  # type: ignore[misc]

    def autocast(self) -> Any:
        """Mixed precision as PyTorch has it; with bfloat16 weights nothing."""
        mixed = self.precision == "bf16-mixed"
        return torch.autocast(self.device, dtype=torch.bfloat16) if mixed else nullcontext()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by Hugging Face's names, in the parameters' type, on the device."""
        from safetensors.torch import load_file

        files = sorted(self.weights.glob("*.safetensors"))
        return {
            name: tensor.to(self.dtype)
            for file in files
            for name, tensor in load_file(file, device=self.device).items()
        }


def accelerator() -> str:
    """The kind of device that all arms train on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def batches(shape: dict[str, int], pinned: bool, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random tokens and the next ones, without end; low ids are more frequent, so the loss falls as a model learns."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.rand((shape["B"], shape["T"] + 1), generator=generator).pow_(4).mul_(shape["vocab"]).long()
        pair = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        yield (pair[0].pin_memory(), pair[1].pin_memory()) if pinned else pair


def llama(shape: dict[str, int], **more: Any) -> Any:
    """A shape as transformers' configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        vocab_size=shape["vocab"],
        max_position_embeddings=shape["T"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=shape["layers"] <= 16,
        use_cache=False,
        **more,
    )


def write_weights(shape: dict[str, int], folder: Path) -> None:
    """Writes a Llama with random weights in bfloat16, as transformers does, where every arm begins.

    In a process of its own: this one would keep the memory of the GPU, and the arms would have less.
    """
    process = get_context("spawn").Process(target=_write_weights, args=(shape, folder))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the weights could not be written to {folder}")


def _write_weights(shape: dict[str, int], folder: Path) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(accelerator()):
        LlamaForCausalLM(llama(shape)).bfloat16().save_pretrained(folder)


def on_device(tokens_per_s: float, flops: float) -> dict[str, float]:
    """The rate, what part of this device's peak it takes with so many FLOPs a token, and the peak of memory."""
    on_gpu = torch.cuda.is_available()
    peak = next((p for n, p in PEAK.items() if on_gpu and n in torch.cuda.get_device_name()), float("inf"))
    gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"tokens_per_s": tokens_per_s, "mfu": tokens_per_s * flops / peak, "gib": gib}


def run_arms(commands: Mapping[str, Sequence[str]], timeout: float) -> dict[str, dict[str, Any]]:
    """The figures that each command prints last, or why it `failed`; one at a time measures.

    The next one is started early: it imports what it needs, then waits for a line on its standard input.
    """

    def start(name: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(commands[name], stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    names, figures = list(commands), {}
    waiting = start(names[0])
    for i, name in enumerate(names):
        child = waiting
        if i + 1 < len(names):
            waiting = start(names[i + 1])
        try:
            out, err = child.communicate("\n", timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            err += f"\nnot done after {timeout:g} s"
        lines = out.strip().splitlines()
        figures[name] = json.loads(lines[-1]) if child.returncode == 0 else {"failed": err.strip()[-500:]}
        print(name, figures[name], file=sys.stderr, flush=True)
    return figures


def check_losses(figures: Mapping[str, Mapping[str, Any]], alike: Callable[[str], object]) -> None:
    """Ends the benchmark unless arms that are `alike` had the same losses: timings of other work compare nothing."""
    groups: dict[object, dict[str, Mapping[str, Any]]] = {}
    for name, figure in figures.items():
        if "failed" not in figure:
            groups.setdefault(alike(name), {})[name] = figure["losses"]
    for losses in groups.values():
        for step, tolerance in TOLERANCES.items():
            values = [each[step] for each in losses.values()]
            if not all(value - min(values) <= tolerance * min(values) for value in values):  # so NaN does not pass
                raise SystemExit(f"the {step} losses differ by more than {tolerance:g}: {losses}")


def keep_garbage() -> None:
    """Switches Python's garbage collector off, as torchtitan's trainer and ours do."""
    gc.collect()
    gc.freeze()
    gc.disable()


def loop(
    arm: Arm,
    parameters: Iterable[torch.nn.Parameter],
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    clip: Callable[..., Any] = torch.nn.utils.clip_grad_norm_,
) -> None:
    """Trains in a bare loop; `loss_of` takes tokens and the next ones."""
    parameters = list(parameters)
    optimizer = optimizer or torch.optim.AdamW(parameters, **ADAMW, fused=True)
    source = arm.batches()
    keep_garbage()
    while arm.clock.done < arm.clock.steps:
        total = torch.zeros((), device=arm.device)
        for _ in range(arm.accumulate):
            loss = loss_of(*next(source)) / arm.accumulate
            loss.backward()
            total += loss.detach()
        clip(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        arm.clock(total)


def torchtitan(arm: Arm) -> None:
    """torchtitan 0.3's Llama 3: its blocks and loss compiled, its loss in chunks, its clipping and optimizer.

    Mixed precision is autocast: under PyTorch 2.11 its FSDP2 cannot train tied embeddings with a loss in chunks. Its
    attention is its call of PyTorch's, with cuDNN first. Options: attention=flex, which is its default; graphs=1 for
    its CUDA graphs; chunks=1 for the loss of all tokens at once.
    """
    import torch.distributed.fsdp as fsdp

    if not hasattr(fsdp, "DataParallelMeshDims"):  # imported for layouts of several GPUs
        fsdp.DataParallelMeshDims = object  # type: ignore[attr-defined]
    from torchtitan.tools import utils

    utils.device_type = arm.device  # it takes a GPU for granted
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.config import CompileConfig
    from torchtitan.distributed.cudagraph import wrap_with_cuda_graph
    from torchtitan.distributed.utils import clip_grad_norm_
    from torchtitan.models.common.attention import (
        ScaledDotProductAttention,
        create_attention_mask,
        get_causal_mask_mod,
    )
    from torchtitan.models.llama3 import Llama3StateDictAdapter

    config = torchtitan_config(arm.shape)
    if arm.options.get("attention") != "flex":
        for layer in config.layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    with torch.device(arm.device), torch.no_grad():
        model = config.build().to(arm.dtype)
        model.init_weights()
    model.load_state_dict(Llama3StateDictAdapter(config, None).from_hf(arm.tensors()))
    compiled = CompileConfig(enable=arm.device == "cuda")
    if compiled.enable:
        for block in model.layers.values():
            block.compile(fullgraph=True)
    entropy = CrossEntropyLoss.Config(global_vocab_size=arm.shape["vocab"])
    chunks = int(arm.options.get("chunks", 8))
    loss_fn = ChunkedLossWrapper.Config(loss_fn=entropy, num_chunks=chunks).build(compile_config=compiled)
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    optimizers = default_adamw(**ADAMW).build(model_parts=[model])
    more: dict[str, Any] = {"positions": torch.arange(arm.shape["T"], device=arm.device).repeat(arm.shape["B"], 1)}
    if arm.options.get("attention") == "flex":  # torchtitan's own call has an argument that PyTorch 2.11 does not know
        lengths = arm.shape["T"], arm.shape["T"]
        masks = create_attention_mask(get_causal_mask_mod(), None, None, *lengths, device=arm.device)
        more["attention_masks"] = masks
    count = torch.tensor(arm.shape["B"] * arm.shape["T"] * arm.accumulate, device=arm.device)

    def step(ids: torch.Tensor, labels: torch.Tensor, count: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
        with arm.autocast():
            loss, _ = loss_fn(model(ids, **more), labels, count)
        loss.backward()
        return loss

    graphs = arm.options.get("graphs") == "1"
    step = wrap_with_cuda_graph(step) if graphs else step
    source = arm.batches()
    keep_garbage()
    while arm.clock.done < arm.clock.steps:
        optimizers.zero_grad(set_to_none=not graphs)
        total = torch.zeros((), device=arm.device)
        for _ in range(arm.accumulate):
            total += step(*next(source), count, more).detach()
        clip_grad_norm_(list(model.parameters()), 1.0, foreach=True)
        optimizers.step()
        arm.clock(total)


def torchtitan_config(shape: dict[str, int]) -> Any:
    """A shape as torchtitan's Llama 3."""
    from torchtitan.models import llama3

    return llama3.Llama3Model.Config(
        dim=shape["hidden"],
        vocab_size=shape["vocab"],
        enable_weight_tying=shape["layers"] <= 16,
        tok_embeddings=llama3.Embedding.Config(
            num_embeddings=shape["vocab"], embedding_dim=shape["hidden"], param_init=llama3._EMBEDDING_SKIP_INIT
        ),
        norm=llama3.RMSNorm.Config(normalized_shape=shape["hidden"], param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(
            in_features=shape["hidden"],
            out_features=shape["vocab"],
            param_init=llama3._output_linear_init(shape["hidden"]),
        ),
        layers=llama3._build_llama3_layers(
            n_layers=shape["layers"],
            dim=shape["hidden"],
            n_heads=shape["heads"],
            n_kv_heads=shape["groups"],
            hidden_dim=shape["ffn"],
            rope=llama3.ComplexRoPE.Config(
                dim=shape["hidden"] // shape["heads"], max_seq_len=shape["T"], theta=500_000
            ),
            attn_backend="flex",
        ),
    )


def litgpt(arm: Arm) -> None:
    """litgpt's GPT, compiled whole, with its loss, in its loop."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    settings = Config(
        name="twin",
        block_size=arm.shape["T"],
        padded_vocab_size=arm.shape["vocab"],
        n_layer=arm.shape["layers"],
        n_head=arm.shape["heads"],
        n_query_groups=arm.shape["groups"],
        n_embd=arm.shape["hidden"],
        intermediate_size=arm.shape["ffn"],
        rotary_percentage=1.0,
        rope_base=500_000,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
    )
    with torch.device(arm.device):
        model = GPT(settings).to(arm.dtype)
    given: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(settings, {}, given, arm.tensors())
    model.load_state_dict(given)
    if arm.shape["layers"] <= 16:
        model.lm_head.weight = model.transformer.wte.weight
    compiled = torch.compile(model) if arm.device == "cuda" else model

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with arm.autocast():
            logits = compiled(ids).float()  # as Fabric does with what a model returns, under which litgpt trains
            return chunked_cross_entropy(logits, labels, chunk_size=0)

    loop(arm, model.parameters(), loss)


def huggingface(arm: Arm) -> None:
    """transformers' own Trainer and Llama, with Liger's kernels on a GPU.

    Options: attention=flash_attention_2 instead of sdpa; compile=1 for the Trainer's `torch_compile`; liger=0.
    """
    from transformers import LlamaForCausalLM

    liger = arm.device == "cuda" and arm.options.get("liger") != "0"
    attention = arm.options.get("attention", "sdpa")
    model = LlamaForCausalLM.from_pretrained(arm.weights, dtype=arm.dtype, attn_implementation=attention)
    hf_trainer(arm, model, **ADAMW, use_liger_kernel=liger, torch_compile=arm.options.get("compile") == "1")


def hf_trainer(arm: Arm, model: Any, lr: float, betas: tuple[float, float], weight_decay: float, **more: Any) -> None:
    """Trains a model with transformers' Trainer."""
    import tempfile

    from torch.utils.data import IterableDataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Sequences(IterableDataset[dict[str, torch.Tensor]]):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for ids, labels in batches(arm.shape, pinned=False):
                for row, following in zip(ids, labels, strict=True):
                    yield {"input_ids": row, "labels": following, "shift_labels": following}

    class Timed(Trainer):
        total, micro = torch.zeros(()), 0

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs).detach()
            self.total = loss + (self.total if self.micro % arm.accumulate else 0)
            self.micro += 1
            return loss

    class Ticks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            arm.clock(trainer.total)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=arm.shape["B"],
            gradient_accumulation_steps=arm.accumulate,
            max_steps=arm.clock.steps,
            bf16=arm.precision == "bf16-mixed",
            tf32=arm.device == "cuda" or None,
            optim="adamw_torch_fused" if arm.device == "cuda" else "adamw_torch",
            learning_rate=lr,
            adam_beta1=betas[0],
            adam_beta2=betas[1],
            weight_decay=weight_decay,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=arm.device == "cpu",
            **more,
        )
        trainer = Timed(model=model, args=settings, train_dataset=Sequences(), callbacks=[Ticks()])
        trainer.train()
