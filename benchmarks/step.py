"""One training step of fiddlehead's Transformer against litgpt's GPT and Hugging Face's Llama, on a CPU.

The three have the same shape, initial weights, loss and fused AdamW, and the script checks that their losses agree.
fiddlehead computes its loss as in a run, the others with PyTorch's cross-entropy. They take turns step by step, in a
process that keeps freed memory: otherwise chance decides which of them has page faults.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import kinds
import torch
import torch.nn.functional as F
from measure import Spread, alternate, keep_freed_memory, ratio, save, table
from torch import nn

from fiddlehead.models import Transformer, TransformerConfig

SHAPES = {
    # Shape, sequences a step, tokens a sequence.
    "small": (
        TransformerConfig(
            num_layers=5,
            hidden_size=384,
            ffn_hidden_size=1024,
            num_attention_heads=6,
            num_query_groups=2,
            vocab_size=4096,
            share_embeddings_and_output_weights=True,
        ),
        4,
        256,
    ),
    # That of the demo recipe.
    "tiny": (
        TransformerConfig(
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=352,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=1024,
            share_embeddings_and_output_weights=True,
        ),
        16,
        128,
    ),
}

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Tokens and the labels at their places, (B, T) each, to the mean cross-entropy."""


def main() -> None:
    """Prints the table, and with --profile where each model's time goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time, with --threads 1")
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead, with --threads 1")
    arguments = parser.parse_args()
    if (arguments.cpu_time or arguments.profile) and arguments.threads != 1:
        parser.error("--cpu-time and --profile need --threads 1: threads that wait for others take CPU time too")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    config, batch_size, seq_length = SHAPES[arguments.shape]
    tokens = torch.randint(config.vocab_size or 0, (batch_size, seq_length + 1))
    ours = Transformer(config)
    models: dict[str, tuple[nn.Module, Loss]] = {
        "fiddlehead": (ours, lambda inputs, labels: ours(inputs, labels=labels) / labels.numel()),
        "litgpt": litgpt_twin(ours, seq_length),
        "transformers": hugging_face_twin(ours, seq_length),
    }
    check_same_loss(models, tokens)
    steps = {name: training_step(model, loss, tokens) for name, (model, loss) in models.items()}
    for step in steps.values():
        step()  # the first step allocates gradients and moments
        step()
    if arguments.profile:
        milliseconds = kinds.measure(steps, arguments.rounds) | kinds.alone(config, batch_size, seq_length)
        rows = [[kind, *(f"{each.get(kind, 0):.1f}" for each in milliseconds.values())] for kind in kinds.KINDS]
        totals = ["together", *(f"{sum(each.values()):.1f}" for each in milliseconds.values())]
        print(table(["ms a step", *milliseconds], [*rows, totals]))
        figures = {"shape": arguments.shape, "rounds": arguments.rounds, "milliseconds": milliseconds}
        save(f"step_kinds_{arguments.shape}", figures, ["torch", "litgpt", "transformers"])
        return

    clock = time.process_time if arguments.cpu_time else time.perf_counter
    seconds = alternate(steps, arguments.rounds, clock)
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    ratios = {name: ratio(seconds["fiddlehead"], values) for name, values in seconds.items()}
    tokens_per_step = batch_size * seq_length
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {batch_size} x {seq_length} tokens, {arguments.rounds} steps each\n")
    rows = [
        [name, f"{spread:.4f}", f"{tokens_per_step / spread.median:,.0f}", f"{ratios[name]:.3f}"]
        for name, spread in spreads.items()
    ]
    print(table(["", "seconds a step", "tokens/s", "fiddlehead's time / this one's"], rows))
    figures = {
        "parameters": parameters,
        "tokens_per_step": tokens_per_step,
        "threads": arguments.threads,
        "clock": clock.__name__,
        "rounds": arguments.rounds,
        "seconds_per_step": spreads,
        "fiddlehead_over": ratios,
    }
    save(
        f"step_{arguments.shape}{'_cpu_time' if arguments.cpu_time else ''}",
        figures,
        ["torch", "litgpt", "transformers"],
    )


def training_step(model: nn.Module, loss: Loss, tokens: torch.Tensor) -> Callable[[], None]:
    """A function that trains `model` for a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        loss(inputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_logits(logits: Callable[[torch.Tensor], torch.Tensor]) -> Loss:
    """The loss of a model by PyTorch's cross-entropy of all its logits."""
    return lambda inputs, labels: F.cross_entropy(logits(inputs).flatten(0, 1), labels.flatten())


def litgpt_twin(ours: Transformer, seq_length: int) -> tuple[nn.Module, Loss]:
    """litgpt's GPT with the same weights."""
    from litgpt.config import Config
    from litgpt.model import GPT

    c = ours.config
    gpt = GPT(
        Config(
            name="twin",
            block_size=seq_length,
            padded_vocab_size=c.vocab_size,
            n_layer=c.num_layers,
            n_head=c.num_attention_heads,
            n_query_groups=c.groups,
            n_embd=c.hidden_size,
            intermediate_size=c.ffn_size,
            rotary_percentage=1.0,
            rope_base=int(c.rotary_base),
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=c.layernorm_epsilon,
            mlp_class_name="LLaMAMLP",
        )
    )
    state = ours.state_dict()
    weights = {
        "lm_head.weight": state["embedding.weight"],
        "transformer.wte.weight": state["embedding.weight"],
        "transformer.ln_f.weight": state["final_layernorm.weight"],
    }
    for i in range(c.num_layers):
        gate, up = state[f"layers.{i}.mlp.linear_fc1.weight"].chunk(2)
        names = {
            "norm_1": state[f"layers.{i}.input_layernorm.weight"],
            "attn.qkv": state[f"layers.{i}.self_attention.linear_qkv.weight"],
            "attn.proj": state[f"layers.{i}.self_attention.linear_proj.weight"],
            "norm_2": state[f"layers.{i}.pre_mlp_layernorm.weight"],
            "mlp.fc_1": gate,
            "mlp.fc_2": up,
            "mlp.proj": state[f"layers.{i}.mlp.linear_fc2.weight"],
        }
        weights |= {f"transformer.h.{i}.{name}.weight": weight for name, weight in names.items()}
    gpt.load_state_dict(weights)
    gpt.lm_head.weight = gpt.get_parameter("transformer.wte.weight")
    return gpt, of_logits(gpt)


def hugging_face_twin(ours: Transformer, seq_length: int) -> tuple[nn.Module, Loss]:
    """Hugging Face's Llama, with its SDPA attention, and the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = ours.config
    assert c.vocab_size is not None
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.ffn_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.groups,
            max_position_embeddings=seq_length,
            rms_norm_eps=c.layernorm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": c.rotary_base},
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    llama.set_attn_implementation("sdpa")
    state = ours.state_dict()
    weights = {
        "lm_head.weight": state["embedding.weight"],
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["final_layernorm.weight"],
    }
    rows = [c.num_attention_heads * c.head_dim, c.groups * c.head_dim, c.groups * c.head_dim]
    for i in range(c.num_layers):
        q, k, v = state[f"layers.{i}.self_attention.linear_qkv.weight"].split(rows)
        gate, up = state[f"layers.{i}.mlp.linear_fc1.weight"].chunk(2)
        names = {
            "input_layernorm": state[f"layers.{i}.input_layernorm.weight"],
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": state[f"layers.{i}.self_attention.linear_proj.weight"],
            "post_attention_layernorm": state[f"layers.{i}.pre_mlp_layernorm.weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": state[f"layers.{i}.mlp.linear_fc2.weight"],
        }
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in names.items()}
    llama.load_state_dict(weights)
    return llama, of_logits(lambda tokens: llama(tokens).logits)


def check_same_loss(models: dict[str, tuple[nn.Module, Loss]], tokens: torch.Tensor) -> None:
    """Ends the benchmark unless the models compute the same: timings of different work compare nothing."""
    with torch.no_grad():
        losses = {name: float(loss(tokens[:, :-1], tokens[:, 1:])) for name, (_, loss) in models.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise SystemExit(f"the models differ: {losses}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
