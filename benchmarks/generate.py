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

from fiddlehead.checkpoints.huggingface.families import FAMILIES
from fiddlehead.checkpoints.huggingface.tensor_map import tensor_map
from fiddlehead.inference.generation import Sampling, sample, sample_batch
from fiddlehead.models import Transformer
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


@torch.no_grad()
def on_gpu(tokens: int, rounds: int) -> None:
    """One sequence of a 1B in bfloat16, whose every weight is read once for each token."""
    config = replace(fdl.build(LLAMA32_1B), vocab_size=128_256, seq_length=4096)
    with torch.device("cuda"):
        model = Transformer(config).bfloat16().eval()
    bytes_of_weights = sum(parameter.nbytes for parameter in model.parameters())
    prompt = torch.randint(config.vocab_size or 0, (128,)).tolist()
    rates = []
    for _ in range(rounds + 1):
        times = [time.perf_counter() for _ in sample(model, prompt, tokens, temperature=0, compile=True)]
        rates.append((len(times) - 21) / (times[-1] - times[20]))  # the first steps compile and capture
    rate = Spread.of(rates[1:])
    bandwidth = copy_bandwidth(torch.device("cuda"), rounds)
    figures = {"tokens_per_s": rate, "of_copying": rate.median * bytes_of_weights / bandwidth, "copying": bandwidth}
    print(table(["", "tokens/s", "of copying's bandwidth"], [["1B", f"{rate:.0f}", f"{figures['of_copying']:.2f}"]]))
    save("generate_gpu", figures, ["torch"])


if __name__ == "__main__":
    main()
