"""Greedy decoding on a CPU: ours and transformers', with the same weights, in turns.

    python benchmarks/generate.py        # --batches 1 8, --tokens 64, --rounds 5
    python benchmarks/generate.py --gpu  # --tokens 300: a Llama 3.2 1B, compiled, against the memory's bandwidth

A Llama of 120 M parameters with 12 heads in 4 groups generates text after a prompt of 64 tokens; the script checks that
the texts are the same.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import fiddle as fdl
import torch
import transformers
from decode import copy_bandwidth
from measure import Spread, alternate, ratio, save, table

from fiddlehead.attention import KVCache
from fiddlehead.checkpoints.huggingface.families import FAMILIES
from fiddlehead.checkpoints.huggingface.tensor_map import tensor_map
from fiddlehead.inference.generation import Sampling, sample_batch
from fiddlehead.models import Transformer
from fiddlehead.models.compiled_step import CompiledStep
from fiddlehead.models.int8 import to_int8
from fiddlehead.recipes.llama import LLAMA32_1B

SETTINGS = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
PROMPT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    given = parser.parse_args()
    if given.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is no GPU here")
    torch.manual_seed(0)
    if given.gpu:
        on_gpu(given.tokens, given.rounds)
        return
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SETTINGS)).eval()
    config, state = FAMILIES["llama"].config(theirs.config.to_dict()), theirs.state_dict()
    ours = Transformer(config).eval()
    maps = tensor_map(FAMILIES["llama"], config)
    ours.load_state_dict({each.name: each.to_ours([state[name] for name, _ in each.theirs]) for each in maps})
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    rows, figures = [], {}
    for batch in given.batches:
        prompts = torch.randint(3, 32000, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
        texts: dict[str, list[list[int]]] = {}

        def write_ours(prompts=prompts, texts=texts) -> None:
            texts["ours"] = sample_batch(ours, prompts.tolist(), given.tokens, Sampling(temperature=0))

        def write_theirs(prompts=prompts, texts=texts) -> None:
            out = theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=given.tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            texts["theirs"] = out[:, PROMPT:].tolist()

        write_ours()
        write_theirs()
        assert texts["ours"] == texts["theirs"], "the two write different texts"
        seconds = alternate({"ours": write_ours, "transformers": write_theirs}, given.rounds)
        speed = {name: Spread.of(batch * given.tokens / each for each in times) for name, times in seconds.items()}
        times_as_many = ratio(seconds["transformers"], seconds["ours"])
        rows.append([str(batch), *(f"{each:.1f}" for each in speed.values()), f"{times_as_many:.2f}"])
        figures[f"batch {batch}"] = {"tokens_per_s": speed, "ratio": times_as_many}
    print(table(["batch", "ours, tokens/s", "transformers, tokens/s", "times as many"], rows))
    save("generate", figures, ["torch", "transformers"], {"parameters": parameters, "threads": torch.get_num_threads()})


CASES = {
    "batch 1": {},
    "batch 1, int8": {"int8": True},
    "batch 1, 32k cached": {"cached": 32_768},
    "batch 8": {"batch": 8},
    "batch 32": {"batch": 32},
    "batch 32, 32k cached": {"batch": 32, "cached": 32_768},
}
"""What is decoded on a GPU: the sequences, the tokens in the cache before (128), and whether weights are in 8 bits."""


@torch.no_grad()
def on_gpu(tokens: int, rounds: int) -> None:
    """Llama 3.2 1B in bfloat16. A step reads each weight once, and the cache of each sequence once."""
    config = replace(fdl.build(LLAMA32_1B), vocab_size=128_256, seq_length=65_536)
    with torch.device("cuda"):
        model = Transformer(config).bfloat16().eval()
    bandwidth = copy_bandwidth(torch.device("cuda"), rounds)
    rows, figures = [], {"copying": bandwidth}
    for name, case in sorted(CASES.items(), key=lambda each: "int8" in each[1]):  # which changes the model
        if case.get("int8"):
            to_int8(model)
        seconds, cached = decode(model, tokens, rounds, case.get("batch", 1), case.get("cached", 128))
        size = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        rate = Spread.of(case.get("batch", 1) / each for each in seconds)
        figures[name] = {
            "tokens_per_s": rate,
            "ms": Spread.of(1e3 * each for each in seconds),
            "of_copying": (size + cached) / Spread.of(seconds).median / bandwidth,
        }
        rows.append([name, f"{rate.median:.0f}", f"{figures[name]['ms']:.3f}", f"{figures[name]['of_copying']:.2f}"])
        torch.cuda.empty_cache()
    print(table(["", "tokens/s", "ms a step", "of a copy's bandwidth"], rows))
    save("generate_gpu", figures, ["torch", "triton"])


def decode(model: Transformer, tokens: int, rounds: int, batch: int, cached: int) -> tuple[list[float], float]:
    """The seconds of a step, choosing the likeliest token included, in each round; and the bytes read from the cache.

    The cache is random: its values do not change the time.
    """
    config, room = model.config, cached + tokens * (rounds + 1) + 20
    caches = [
        KVCache.allocate(batch, room, config.groups, config.head_dim, torch.bfloat16, "cuda")
        for _ in range(config.num_layers)
    ]
    for cache in caches:
        cache.k[:, :cached].normal_()
        cache.v[:, :cached].normal_()
        cache.advance(cached, torch.full((batch,), cached, device="cuda"))
    step, greedy, seconds = CompiledStep(model, caches), Sampling(temperature=0), []
    chosen = torch.zeros(batch, dtype=torch.int64, device="cuda")
    for count in (20, *[tokens] * (rounds + 1)):  # the first steps compile and capture
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            chosen = greedy.choose(step(chosen[:, None])[:, 0], [])
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / count)
    average = cached + 20 + tokens * (rounds + 1) / 2
    return seconds[2:], average * sum(cache.nbytes for cache in caches) / room


if __name__ == "__main__":
    main()
