"""The model with which a run begins: random, or with the weights of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fiddlehead.checkpoints import sharding
from fiddlehead.checkpoints.weights import (
    CHANGED,
    Weights,
    find_tokenizer,
    find_weights,
    load_transformer,
    open_weights,
    refuse_another_shape,
)
from fiddlehead.data import TokenizerFile
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path
from fiddlehead.models import LoRA, Transformer, TransformerConfig, nf4
from fiddlehead.models.meta import shapes_only
from fiddlehead.training.distributed.parallel import Parallel

UNKNOWN = "name the model to begin with, a run, a checkpoint or its folder; or set config"


class InitialWeights:
    """The weights with which a model begins: those at `source`, or random ones if it is None.

    Args:
        source: `init_from` of `LanguageModel`; `find` makes it the absolute path of what it finds.
        needed: why random weights will not do; "" if they will. A run that needs others needs the same ones when it
            goes on from a checkpoint.
    """

    def __init__(self, source: str | Path | None, needed: str = "") -> None:
        self.source, self.needed = source, needed
        self.base: str | None = None
        """The fingerprint of weights that the run will need again; the task sets it, or else `transformer`."""
        self._found: tuple[Path, Weights] | None = None
        self._not_found: Problem | None = None

    @property
    def missing(self) -> Problem | None:
        """Why training cannot start, though the run can be planned; None if it can."""
        return Problem("init_from", None, self.needed) if self.source is None and self.needed else self._not_found

    def find(self, config: TransformerConfig | None) -> TransformerConfig:
        """The shape of the weights, which is `config` unless that is None.

        If there is nothing at `source`, the shape is `config`; `missing` says what is lacking.

        Raises:
            ConfigError: the shape is not known, or the weights are of another shape than `config`.
        """
        self._not_found = None
        if self.source is None:
            if config is None:
                raise ConfigError(self.missing or Problem("init_from", None, UNKNOWN))
            return config
        try:
            path = find_weights(self.source)
        except ConfigError as error:
            (self._not_found,) = error.of("init_from", self.source).problems
            if config is None:
                raise ConfigError(self._not_found) from None
            return config
        try:
            self._found = path.absolute(), open_weights(path)
        except ConfigError as error:
            raise error.of("init_from", self.source) from None
        self.source, weights = self._found
        if config is None:
            return weights.config
        refuse_another_shape(config, weights, path)
        return config

    def open(self) -> Weights | None:
        """The weights; None if they are random. Those that `find` opened are not checked again, which reads all."""
        if self.source is None:
            return None
        path, weights = self._found or (None, None)
        return weights if path == self.source else open_weights(self.source)

    def fingerprint(self) -> str | None:
        """The fingerprint of the weights; None if the run does not need them again."""
        weights = self.open() if self.needed else None
        return None if weights is None else weights.fingerprint()

    def written(self) -> dict[str, str]:
        """What a checkpoint says of them."""
        source = {} if self.source is None else {"init_from": str(self.source)}
        return source if self.base is None else {**source, "base": self.base}

    def refuse_changed(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises ConfigError if they are not those with which the training of a checkpoint began, and it needs them."""
        if self.needed and checkpoint.get("base") not in (None, self.base):
            raise ConfigError(Problem("model.init_from", self.source, CHANGED))

    def transformer(
        self,
        config: TransformerConfig,
        lora: LoRA | None,
        strategy: Parallel | None,
        change: Callable[[Transformer], object],
    ) -> Transformer:
        """A model with these weights; this rank's shard if the strategy shards it.

        Args:
            change: is called with the model before it is sharded, such as to compile its layers.
        """
        self.base = self.base or self.fingerprint()
        weights, quantize = self.open(), lora is not None and lora.quantize_base is not None
        if strategy is None or strategy.world_size == 1:
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

    def refuse_other_tokenizer(self, tokenizer: Any) -> None:
        """Raises ConfigError if the data's tokenizer is not the one in the folder of the weights; there may be none."""
        folder = None if self.source is None else find_tokenizer(user_path(self.source))
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
