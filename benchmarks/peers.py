"""The other programs of `train.py`, each trained in its own way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from arms import ADAMW, Arm, batches, keep_garbage, loop


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
