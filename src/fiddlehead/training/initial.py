"""The model with which a run begins: random, or with the weights of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fiddlehead.checkpoints import sharding
from fiddlehead.checkpoints.weights import Weights, find_tokenizer, load_transformer
from fiddlehead.data import TokenizerFile
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.models import LoRA, Transformer, TransformerConfig, nf4
from fiddlehead.models.meta import shapes_only
from fiddlehead.training.distributed.parallel import Parallel


def initial_transformer(
    config: TransformerConfig,
    weights: Weights | None,
    lora: LoRA | None,
    strategy: Any,
    change: Callable[[Transformer], None],
) -> Transformer:
    """A model with these weights, or random ones; this rank's shard if the strategy shards it.

    Args:
        strategy: the trainer's; None without a trainer.
        change: is called with the model before it is sharded, such as to compile its layers.
    """
    quantize = lora is not None and lora.quantize_base is not None
    if not (isinstance(strategy, Parallel) and strategy.world_size > 1):
        if weights is not None:
            transformer = load_transformer(weights, config, quantize=quantize)
        else:
            transformer = Transformer(config)
            if quantize:
                nf4.quantize_layers(transformer)
        if lora is not None:
            lora.apply(transformer)
        change(transformer)
        return transformer
    with shapes_only():
        transformer = Transformer(config)
        names = list(transformer.state_dict())
        if quantize:
            nf4.quantize_layers(transformer)
        if lora is not None:
            lora.apply(transformer)
        strategy.keep_stages(transformer)
    change(transformer)
    layout = strategy.shard(transformer)
    if weights is None:
        sharding.draw(transformer, layout)
    else:
        sharding.load(transformer, names, weights, layout)
    if lora is not None:
        sharding.draw_adapters(transformer, lora, layout)
    return transformer


def refuse_other_tokenizer(tokenizer: Any, weights: Path) -> None:
    """Raises ConfigError if the data's tokenizer is not the one in the folder of the weights; there may be none."""
    folder = find_tokenizer(weights)
    if folder is None:
        return
    learned = TokenizerFile(folder)
    if tokenizer.eos_id in learned.stop_ids:  # any of the ends that the model knows
        learned = TokenizerFile(folder, eos=tokenizer.eos_id)
    if learned.fingerprint != tokenizer.fingerprint:
        ends = [repr(getattr(each, "eos_token", each.eos_id)) for each in (tokenizer, learned)]
        differs = f"documents end in {ends[0]}, there in {ends[1]}" if ends[0] != ends[1] else "other tokens"
        message = (
            f"differs from the one in {folder}, with which the model learned ({differs}); set "
            f"data.tokenizer=TokenizerFile data.tokenizer.path={folder}"
        )
        raise ConfigError(Problem("data.tokenizer", message=message))
