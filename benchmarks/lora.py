"""A LoRA step of a Llama 3.2 1B on one GPU: ours beside PEFT with transformers, and our full step.

    python benchmarks/lora.py            # --tiny: on a CPU, to try the script

The weights are bfloat16 and frozen, the adapters (rank 16, on every linear layer) float32 in PEFT and as the run's
precision in ours. Each arm is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from measure import save, table
from train import SHAPE, TINY, Clock, batches

ARMS = ["ours", "ours, full", "peft, eager", "peft, compiled"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Prints the table and writes `results/lora.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = (TINY if given.tiny else SHAPE) | {"B": given.batch, "T": 64 if given.tiny else 4096}
    if given.child:
        print(json.dumps(measure(given.child, shape)))
        return
    figures = {}
    for arm in given.arms:
        command = [sys.executable, "-W", "ignore", __file__, "--child", arm, "--batch", str(given.batch)]
        done = subprocess.run([*command, *(["--tiny"] if given.tiny else [])], capture_output=True, text=True)
        failed = {"failed": done.stderr.strip()[-400:]}
        figures[arm] = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else failed
        print(arm, figures[arm], file=sys.stderr, flush=True)
    rows = [[arm, f"{r['tokens_per_s']:,.0f}", f"{r['gib']:.1f}"] for arm, r in figures.items() if "failed" not in r]
    print(table(["", "tokens/s", "peak GiB"], rows))
    save("lora", figures, ["torch", "transformers", "peft"])


def measure(arm: str, shape: dict[str, int]) -> dict[str, float]:
    """Trains one arm, and returns its figures."""
    torch.manual_seed(0)
    clock = Clock(10)
    (peft if arm.startswith("peft") else ours)(arm, shape, clock)
    on_gpu = torch.cuda.is_available()
    return {
        "tokens_per_s": 10 * shape["B"] * shape["T"] / clock.seconds,
        "gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }


def ours(arm: str, shape: dict[str, int], clock: Clock) -> None:
    """Our Transformer with our adapters, its layers compiled, and our optimizer."""
    from fiddlehead.models import LoRA, Transformer, TransformerConfig
    from fiddlehead.models.speed import compile_transformer
    from fiddlehead.training import AdamW

    config = TransformerConfig(
        num_layers=shape["layers"],
        hidden_size=shape["hidden"],
        ffn_hidden_size=shape["ffn"],
        num_attention_heads=shape["heads"],
        num_query_groups=shape["groups"],
        vocab_size=shape["vocab"],
        seq_length=shape["T"],
        rotary_base=500_000.0,
        share_embeddings_and_output_weights=True,
    )
    with torch.device(_device()):
        model = Transformer(config).bfloat16()
        if arm == "ours":
            LoRA(rank=16).apply(model)
    if torch.cuda.is_available():
        compile_transformer(model, "layers")
    step(model, lambda ids, labels: model(ids, labels=labels) / labels.numel(), AdamW(lr=1e-4), shape, clock)


def peft(arm: str, shape: dict[str, int], clock: Clock) -> None:
    """transformers' Llama with PEFT's adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fiddlehead.training import AdamW

    config = LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        vocab_size=shape["vocab"],
        max_position_embeddings=shape["T"],
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.device(_device()):
        base = LlamaForCausalLM(config).bfloat16()
        model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    run = torch.compile(model) if arm == "peft, compiled" else model

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(_device(), dtype=torch.bfloat16):
            logits = run(input_ids=ids).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    step(model, loss, AdamW(lr=1e-4), shape, clock)


def step(model: Any, loss_of: Any, optim: Any, shape: dict[str, int], clock: Clock) -> None:
    """Trains in a bare loop."""
    optimizer = optim.optimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    source = batches(shape, _device())
    while clock.done < clock.steps:
        loss_of(*next(source)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
