"""Each family trains: a small model of each learns, and learns more with adapters."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest

from fiddlehead import tasks
from fiddlehead.data import FineTuningDataModule
from fiddlehead.models import LongRopeScaling, LoRA, TransformerConfig
from fiddlehead.recipe import catalog
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import LanguageModel
from tests.training.conftest import Parts, rows

# Sizes alone do not make another kind of model.
SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "seq_length", "moe_ffn_hidden_size", "share_embeddings_and_output_weights"),
)


@cache
def kinds() -> dict[str, TransformerConfig]:
    """The shape of the first pretraining recipe of each kind of model, by its name."""
    found: dict[Any, tuple[str, TransformerConfig]] = {}
    for entry in catalog.recipes():
        if entry.task != "pretrain" or entry.module in ("fiddlehead.recipes.base", "fiddlehead.recipes.tiny"):
            continue
        config = fdl.build(entry.load()().model.config)
        traits = (getattr(config, field.name) for field in fields(config) if field.name not in SIZES)
        # Of a number it matters that there is one: another would train just as well.
        kind = (entry.module, *(value if isinstance(value, str | bool) else type(value) for value in traits))
        found.setdefault(kind, (entry.name, config))
    return dict(found.values())


def twin(config: TransformerConfig) -> TransformerConfig:
    """A model of the same kind with a few thousand parameters."""
    layers, skip = 2, config.window_attn_skip_freq
    if isinstance(skip, int):
        layers = skip = max(2, min(skip, 4))
    elif skip is not None:
        skip = skip[:4]
        layers = len(skip)
    ratio = config.num_attention_heads // config.groups
    heads = 4 if ratio == 1 else ratio * (2 if ratio < 4 else 1)
    head_dim = 8 if heads <= 12 else 4
    wide = config.kv_channels is not None
    hidden = 64 if wide else heads * head_dim
    shrunk = hidden / config.hidden_size
    scale = config.softmax_scale and config.softmax_scale * (config.head_dim / head_dim) ** 0.5
    rope = config.rope_scaling
    if isinstance(rope, LongRopeScaling):
        turning = int(head_dim * config.rotary_percent) // 2
        rope = replace(rope, short_factor=rope.short_factor[:turning], long_factor=rope.long_factor[:turning])
    rooted = config.embedding_multiplier == pytest.approx(config.hidden_size**0.5, rel=1e-2)
    return replace(
        config,
        num_layers=layers,
        window_attn_skip_freq=skip,
        window_size=config.window_size and (7, 0),
        num_attention_heads=heads,
        num_query_groups=config.num_query_groups and heads // ratio,
        kv_channels=head_dim if wide else None,
        hidden_size=hidden,
        ffn_hidden_size=config.ffn_hidden_size and max(16, round(config.ffn_hidden_size * shrunk)),
        moe_ffn_hidden_size=config.moe_ffn_hidden_size and max(16, round(config.moe_ffn_hidden_size * shrunk)),
        num_moe_experts=config.num_moe_experts and min(config.num_moe_experts, 8),
        moe_router_topk=min(config.moe_router_topk, 2),
        softmax_scale=scale,
        embedding_multiplier=hidden**0.5 if rooted else config.embedding_multiplier,
        rope_scaling=rope,
        logits_scaling=1 + (config.logits_scaling - 1) * shrunk,
        init_method_std=0.08,  # 0.02 is for thousands of channels: what tens of them add up to would hardly count
        vocab_size=None,  # that of the data
        seq_length=None,
    )


def losses(run: RunDirectory) -> list[float]:
    return [float(loss) for (loss,) in rows(run, "loss") if loss]


@pytest.mark.parametrize("name", sorted(kinds()))
def test_a_small_model_of_the_family_learns_and_is_fine_tuned(name: str, parts: Parts, tmp_path: Path) -> None:
    config = twin(kinds()[name])
    steps = {"val_check_interval": 15, "every_n_steps": 15, "keep_best": False}
    made = parts(name="base", max_steps=15, lr=1e-2, **steps) | {"model": LanguageModel(config)}
    base = tasks.pretrain(**made)
    learned = losses(base)
    assert learned[0] == pytest.approx(5.55, abs=1.5)  # 257 tokens, and nothing known: ln 257
    assert sum(learned[-3:]) / 3 < 0.75 * learned[0]
    if config.num_moe_experts is not None:  # whose experts take no adapters
        return
    path = tmp_path / "answers.jsonl"
    path.write_text(40 * (json.dumps({"prompt": "leaf ", "completion": "moss fern"}) + "\n"))
    data = FineTuningDataModule(path, seq_length=16, micro_batch_size=4, global_batch_size=4, val_samples=4)
    made = parts(name="tuned", max_steps=20, lr=2e-2, **(steps | {"val_check_interval": 20}))
    tuned = losses(
        tasks.finetune(**made | {"model": LanguageModel(init_from=base.path, lora=LoRA(rank=8)), "data": data})
    )
    assert tuned[-1] < 0.8 * tuned[0]
