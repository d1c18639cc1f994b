"""A LoRA step of Llama 3.2 1B on one GPU: ours beside PEFT with transformers' Trainer, Unsloth and NeMo Automodel.

    python benchmarks/lora.py                                          # all arms
    python benchmarks/lora.py --arms fiddlehead:2:shape=8b,accumulate=2 unsloth:2:shape=8b,accumulate=2
    python benchmarks/lora.py --tiny --arms fiddlehead:2 peft:2        # on a CPU, to try the script

All begin with the same random weights in bfloat16, with adapters of rank 16 on every linear layer. The benchmark fails
unless arms of the same batch have the same losses. Ours is `fiddlehead finetune -f lora model.compile=layers`.
Each arm, NAME:BATCH with options behind, is a separate process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import arms
import torch
from arms import Arm, Clock, loop, on_device
from measure import RESULTS, save, table
from peers import hf_trainer
from train import SHAPE, SHAPE_8B, TINY, adamw, fit

ARMS = ["fiddlehead:4", "peft:4", "unsloth:4", "automodel:4"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}
IMPORTS = {
    "fiddlehead": ["fiddlehead.training", "fiddlehead.checkpoints.weights"],
    "peft": ["transformers.trainer", "peft"],
    "unsloth": ["unsloth"],  # before transformers, which it changes
    "automodel": ["transformers.models.llama.modeling_llama"],
}


def main() -> None:
    """Prints the table and writes `results/NAME.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=ARMS, metavar="NAME:BATCH[:OPTION=VALUE,...]")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each arm")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--name", default="lora", help="of the file of results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.child, given)))
        return
    with tempfile.TemporaryDirectory() as weights:
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", f"{weights}/unsloth")  # it would write into this directory
        commands = {}
        for arm in given.arms:
            shape = shape_of(arm, given.tiny)
            folder = Path(weights) / str(shape["layers"])
            if not folder.exists():
                arms.write_weights(shape, folder)
                write_tokenizer(folder / "tokenizer")
            command = [sys.executable, "-W", "ignore", __file__, "--child", arm, "--weights", str(folder)]
            commands[arm] = [*command, "--steps", str(given.steps), *(["--tiny"] if given.tiny else [])]
        figures = arms.run_arms(commands, given.timeout)
    rows = [
        [arm, f"{r['tokens_per_s']:,.0f}", f"{r['mfu']:.1%}", f"{r['gib']:.1f}", f"{r['losses'][-1]:.3f}"]
        for arm, r in figures.items()
        if "failed" not in r
    ]
    print(table(["", "tokens/s", "MFU", "peak GiB", "last loss"], rows))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    save(given.name, figures, [*arms.PACKAGES, "peft", "unsloth", "nemo-automodel"], {"gpu": gpu}, given.out)
    arms.check_losses(figures, alike)


def alike(arm: str) -> tuple[str, ...]:
    """What arms have in common whose losses are the same."""
    _, batch, *more = arm.split(":")
    options = [option for option in ",".join(more).split(",") if option.split("=")[0] in ("accumulate", "shape")]
    return batch, *options


def shape_of(arm: str, tiny: bool) -> dict[str, int]:
    """The shape of an arm's model and batch."""
    sizes = TINY if tiny else SHAPE_8B if "shape=8b" in arm else SHAPE
    return sizes | {"B": int(arm.split(":")[1]), "T": 64 if tiny else 4096}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of nothing: Unsloth does not load a model without one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm, and returns its figures."""
    program, _, *more = name.split(":")
    options = dict(option.split("=") for option in ",".join(more).split(",") if option)
    options.pop("shape", None)
    accumulate = int(options.pop("accumulate", 1))
    for module in IMPORTS[program]:
        importlib.import_module(module)
    sys.stdin.readline()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    clock = Clock(given.steps)
    arm = Arm(shape_of(name, given.tiny), given.weights, clock, "bf16-mixed", accumulate, options)
    adapters = {"fiddlehead": ours, "peft": peft, "unsloth": unsloth, "automodel": automodel}[program](arm)
    from fiddlehead.checkpoints.weights import open_weights

    tokens_per_s = given.steps * arm.shape["B"] * arm.shape["T"] * accumulate / clock.seconds
    flops = open_weights(arm.weights).config.train_flops_per_token(arm.shape["T"], adapters=adapters)
    return {**on_device(tokens_per_s, flops), "losses": clock.losses, "adapters": adapters}


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of the adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count(model: torch.nn.Module) -> int:
    """How many parameters the adapters have."""
    return sum(parameter.numel() for parameter in trained(model))


def ours(arm: Arm) -> int | None:
    """A run from a recipe, its layers compiled."""
    from fiddlehead.models import LoRA
    from fiddlehead.training import LanguageModel
    from fiddlehead.training.callbacks.metrics import num_adapted

    chosen: dict[str, Any] = {"compile": "layers" if torch.cuda.is_available() else None} | arm.options
    if "activation_checkpointing" in chosen and chosen["activation_checkpointing"][0].isdigit():
        chosen["activation_checkpointing"] = float(chosen["activation_checkpointing"])
    model = LanguageModel(init_from=arm.weights, lora=LoRA(rank=16, alpha=32), optim=adamw(**ADAMW), **chosen)
    model.take_shape()
    fit(arm, model)
    return num_adapted(model)


def peft(arm: Arm) -> int:
    """transformers' Llama with PEFT's adapters under transformers' Trainer, with Liger's kernels on a GPU.

    Options: compile=1 for the Trainer's `torch_compile`; liger=0.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base: Any = LlamaForCausalLM.from_pretrained(arm.weights, dtype=torch.bfloat16, attn_implementation="sdpa")
    model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    liger = arm.device == "cuda" and arm.options.get("liger") != "0"
    hf_trainer(arm, model, **ADAMW, use_liger_kernel=liger, torch_compile=arm.options.get("compile") == "1")
    return count(model)


def unsloth(arm: Arm) -> int:
    """Unsloth's Llama and adapters under transformers' Trainer; checkpointing=unsloth for its own recomputation."""
    from unsloth import FastLanguageModel

    tokenizer = str(arm.weights / "tokenizer")
    settings = {"max_seq_length": arm.shape["T"], "dtype": torch.bfloat16, "load_in_4bit": False}
    base, _ = FastLanguageModel.from_pretrained(str(arm.weights), tokenizer_name=tokenizer, **settings)
    model = FastLanguageModel.get_peft_model(
        base,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing=arm.options.get("checkpointing", False),
    )
    hf_trainer(arm, model, **ADAMW)
    return count(model)


def automodel(arm: Arm) -> int:
    """NeMo Automodel's adapters in transformers' Llama, with Liger's kernels, as its benchmark of Llama 3.1 8B has it.

    Its loop and its FSDP2 need transformers 5.18; the loop here is a bare one. Its adapters are bfloat16.
    Options: triton=1 for its Triton kernels, without its memory-efficient layers.
    """
    from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(arm.weights, dtype=torch.bfloat16, attn_implementation="sdpa")
    if arm.device == "cuda":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    triton = arm.options.get("triton") == "1"
    config = PeftConfig(target_modules=["*_proj"], dim=16, alpha=32, use_triton=triton)
    apply_lora_to_linear_modules(model, config)
    model.to(arm.device).train()
    entropy, tokens = MaskedCrossEntropy(), arm.shape["B"] * arm.shape["T"]

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return entropy(model(input_ids=ids, use_cache=False).logits, labels, num_label_tokens=tokens)

    parameters = trained(model)
    loop(arm, parameters, loss, torch.optim.AdamW(parameters, **ADAMW, fused=True))
    return count(model)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
