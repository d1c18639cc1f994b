"""A LoRA step of Llama 3.2 1B on one GPU: ours against PEFT with transformers, and our step with all weights.

    python benchmarks/lora.py            # --tiny: on a CPU, to try the script

Both start from the same random weights in bfloat16, with float32 adapters of rank 16 on every linear layer. Ours is
`fiddlehead finetune -f lora model.compile=layers`, with Lightning; PEFT runs in a bare loop with autocast. Each arm is
a separate process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import save, table
from train import SHAPE, TINY, Clock, accelerator, batches, fit, llama, on_device, run_arm

ARMS = ["ours", "ours, full", "peft, eager", "peft, compiled"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Prints the table and writes `results/lora.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    shape = (TINY if given.tiny else SHAPE) | {"B": given.batch, "T": 64 if given.tiny else 4096}
    if given.child:
        print(json.dumps(measure(given.child, shape, given.weights)))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as weights:
        write_weights(shape, Path(weights))
        for arm in given.arms:
            command = [sys.executable, "-W", "ignore", __file__, "--child", arm, "--weights", weights]
            command += ["--batch", str(given.batch), *(["--tiny"] if given.tiny else [])]
            figures[arm] = run_arm(arm, command)
    rows = [
        [arm, f"{r['tokens_per_s']:,.0f}", f"{r['mfu']:.1%}", f"{r['gib']:.1f}", f"{r['loss']:.3f}"]
        for arm, r in figures.items()
        if "failed" not in r
    ]
    print(table(["", "tokens/s", "MFU", "peak GiB", "loss"], rows))
    if not given.tiny:
        save("lora", figures, ["torch", "lightning", "transformers", "peft"])


def write_weights(shape: dict[str, int], folder: Path) -> None:
    """A Llama as transformers writes it, with random weights."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(accelerator()):
        LlamaForCausalLM(llama(shape)).bfloat16().save_pretrained(folder)


def measure(arm: str, shape: dict[str, int], weights: Path) -> dict[str, float]:
    """Trains one arm, and returns its figures."""
    from fiddlehead.checkpoints.weights import open_weights

    torch.manual_seed(0)
    clock = Clock(10)
    loss, adapters = (peft if arm.startswith("peft") else ours)(arm, shape, weights, clock)
    tokens_per_s = 10 * shape["B"] * shape["T"] / clock.seconds
    flops = open_weights(weights).config.train_flops_per_token(shape["T"], adapters=adapters)
    return {**on_device(tokens_per_s, flops), "loss": loss}


def ours(arm: str, shape: dict[str, int], weights: Path, clock: Clock) -> tuple[float, int | None]:
    """A run from a recipe, its layers compiled; the full step has bfloat16 parameters."""
    from fiddlehead.models import LoRA
    from fiddlehead.training import LanguageModel
    from fiddlehead.training.callbacks.metrics import num_adapted

    adapted = arm == "ours"
    compile = "layers" if torch.cuda.is_available() else None
    model = LanguageModel(init_from=weights, lora=LoRA(rank=16, alpha=32) if adapted else None, compile=compile)
    model.take_shape()
    loss = fit(model, 1e-4, shape, "bf16-mixed" if adapted else "bf16-true", clock)
    return loss, num_adapted(model)


def peft(arm: str, shape: dict[str, int], weights: Path, clock: Clock) -> tuple[float, int | None]:
    """transformers' Llama with PEFT's adapters, in a bare loop."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from fiddlehead.training import AdamW

    base: Any = LlamaForCausalLM.from_pretrained(weights, dtype=torch.bfloat16, attn_implementation="sdpa")
    model: Any = get_peft_model(base.to(accelerator()), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    model.train()
    run = torch.compile(model) if arm == "peft, compiled" else model
    adapters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = AdamW(lr=1e-4).optimizer(adapters)
    loss = torch.zeros(())
    source = batches(shape, "cpu", 0)
    while clock.done < clock.steps:
        ids, labels = (tokens.to(accelerator()) for tokens in next(source))
        with torch.autocast(accelerator(), dtype=torch.bfloat16):
            logits = run(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock()
    return float(loss), sum(parameter.numel() for _, parameter in adapters)


if __name__ == "__main__":
    main()
