"""The arguments of `generate` and `chat`, and a conversation."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fiddlehead.cli import app, use
from fiddlehead.data import ByteTokenizer
from fiddlehead.errors import ConfigError
from fiddlehead.inference.text import Writer
from fiddlehead.models.int8 import Int8Linear
from tests.data.test_chat_template import CHATML


@pytest.mark.parametrize(
    "stop",
    [
        r"\n\n",
        r"ä\n",
        r"日本\t語",
        r"\x41\u00e9\U0001F600",
        r"a\\n",
        r"\101",
        r"\N{LATIN SMALL LETTER A WITH DIAERESIS}!",
    ],
)
def test_an_escape_in_a_stop_is_what_it_is_in_python(stop: str) -> None:
    assert use._unescaped(stop) == ast.literal_eval(f'"{stop}"')


@pytest.mark.parametrize("stop", ["ä", "\\end", "\\d+", "C:\\", "a\\ b", "\n"])
def test_what_is_not_an_escape_is_left_as_it_is(stop: str) -> None:
    assert use._unescaped(stop) == stop


@pytest.mark.parametrize("stop", [r"\x4", r"\xZZ", r"\u12", r"\N{NO SUCH}", r"\N", r"\ud800", "\udcff", ""])
def test_a_stop_that_cannot_come_is_refused(stop: str) -> None:
    with pytest.raises(ConfigError, match="--stop"):
        use._unescaped(stop)


def test_a_prompt_of_other_bytes_than_utf_8_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--prompt 'a\\udcff': is not valid UTF-8 at character 1"):
        use._typed("a\udcff")
    assert use._typed("日本") == "日本"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a model of bytes, `large`, and one with a single layer, `small`, as Hugging Face's."""
    transformers = pytest.importorskip("transformers")
    for seed, name in enumerate(("large", "small")):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2 - seed, num_attention_heads=2,
            max_position_embeddings=256, initializer_range=0.5,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        ByteTokenizer().save(tmp_path / name / "tokenizer.json")
        (tmp_path / name / "chat_template.jinja").write_text(CHATML)
    return tmp_path


def talk(*arguments: str) -> tuple[str, str]:
    """What `chat` shows on stdout and on stderr in a conversation of two questions."""
    more = ["--temperature", "0", "--max-new-tokens", "12"]
    found = CliRunner().invoke(
        app, ["chat", *arguments, *more], input="hi\nand you\n/reset\nhi\n", catch_exceptions=False
    )
    assert found.exit_code == 0
    return found.stdout, found.stderr


def test_a_chat_with_a_draft_is_the_same_and_says_what_it_saved(models: Path) -> None:
    plain, nothing = talk(str(models / "large"))
    drafted, said = talk(str(models / "large"), "--draft", str(models / "small"))
    assert drafted == plain and "draft:" not in nothing
    assert re.search(r"draft: \d\.\d\d tokens a pass of the model, in \d+ passes", said)
    _, itself = talk(str(models / "large"), "--draft", str(models / "large"))
    assert "draft: 4.00 tokens a pass of the model, in 9 passes" in itself  # 5, 5 and 2 of each answer's 12


def test_a_chat_with_weights_in_8_bits_is_what_they_write(models: Path) -> None:
    shown, _ = talk(str(models / "large"), "--weights", "int8")
    writer, asked = Writer.open(models / "large", weights="int8"), [{"role": "user", "content": "hi"}]
    assert any(isinstance(module, Int8Linear) for module in writer.model.modules())
    assert "".join(writer.answer(asked, 12, temperature=0)) in shown
    with pytest.raises(ConfigError, match="weights='int4': did you mean 'int8'"):
        talk(str(models / "large"), "--weights", "int4")
