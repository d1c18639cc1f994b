"""Sample answers of a model during training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fiddlehead.data import FineTuningDataModule, TokenizerFile
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.training.callbacks.samples import SampleAnswer
from tests.data.small_tokenizers import save_gemma


@dataclass
class Validated:
    """As much of a trainer as the callback asks for, after a validation."""

    datamodule: FineTuningDataModule
    sanity_checking: bool = False
    is_global_zero: bool = True
    global_step: int = 7


@dataclass
class Learning:
    """A module that is being trained."""

    transformer: Transformer


@pytest.mark.parametrize("order", ["<end_of_turn>", "<eos>", None])
def test_an_answer_ends_where_the_folder_says_and_has_tokens_only(
    order: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model answers x, then an end or what only pads its vocabulary, and then goes on with d."""
    folder = save_gemma(tmp_path / "gemma")
    tokenizer = TokenizerFile(folder)
    examples = [{"prompt": "a", "completion": "x"}] * 4
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    data = FineTuningDataModule(tmp_path / "a.jsonl", tokenizer=folder, seq_length=16, val_fraction=0.5)
    data.setup()
    size = tokenizer.vocab_size + 8 + tokenizer.vocab_size % 2
    config = TransformerConfig(num_layers=1, hidden_size=size, num_attention_heads=1, vocab_size=size, seq_length=16)
    model: Any = Transformer(config)
    x, d = (tokenizer.encode(letter)[-1] for letter in "xd")
    second = size - 3 if order is None else TokenizerFile(folder, eos=order).eos_id
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.zero_()  # so that a token depends on the one before it alone
        model.embedding.weight.copy_(torch.eye(size))
        model.output_layer.weight.zero_()
        for before, after, how_much in [(data.first_question()[-1], x, 1), (x, second, 2), (x, d, 1), (second, d, 1)]:
            model.output_layer.weight[after, before] = how_much
    trainer: Any = Validated(data)
    SampleAnswer(max_new_tokens=2).on_validation_end(trainer, Learning(model))  # type: ignore[arg-type]
    assert f"it answers {'x' if order else 'xd'!r}\n" in capsys.readouterr().out
