"""`fiddlehead import`, `export` and `convert`, as they are typed."""

from __future__ import annotations

import pytest

from fiddlehead.data import ByteTokenizer
from tests.cli.test_command import fiddlehead  # noqa: F401  a fixture
from tests.models.hf_families import random_model


@pytest.fixture
def llama(tmp_path):
    """A folder of Hugging Face's, in the working directory."""
    random_model("llama").save_pretrained(tmp_path / "hf")
    ByteTokenizer().save(tmp_path / "hf" / "tokenizer.json")


def test_there_and_back(fiddlehead, llama):  # noqa: F811
    said = fiddlehead("import", "hf", "hf", "--out", "ours")
    assert "ours: llama, 3 layers, 12 heads in 3 groups" in said and "model.init_from=ours" in said
    assert "back: LlamaForCausalLM" in fiddlehead("export", "hf", "ours", "back", "--dtype", "bfloat16")
    assert "12 heads in 1 group;" in fiddlehead("convert", "gqa", "ours", "-g", "1", "--out", "mqa")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "hf", "nowhere", "--out", "x"], "'nowhere': there is no such folder"),
        (["import", "hf", "hf", "--out", "hf"], "out='hf': is there already"),
        (["export", "hf", "nowhere", "x"], "unknown run 'nowhere'"),
        (["export", "hf", "hf", "x"], "hf: is a Hugging Face checkpoint already"),
        (["export", "peft", "hf", "x"], "hf: has no adapters"),
        (["convert", "gqa", "hf", "-g", "2", "--out", "x"], "the model has 3 key/value heads; allowed: 1"),
        (["convert", "gqa", "hf", "-g", "1", "--out", "x", "--method", "meen"], "did you mean 'mean'?"),
    ],
)
def test_what_cannot_be_is_a_line_and_exit_code_2(fiddlehead, llama, arguments, said):  # noqa: F811
    assert said in fiddlehead(*arguments, rc=2)


def test_an_imported_model_writes_and_is_evaluated(fiddlehead, tmp_path):  # noqa: F811
    import torch

    from tests.models.hf_families import config, transformers

    made = config("LlamaConfig", vocab_size=257, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(made).save_pretrained(tmp_path / "hf")
    ByteTokenizer().save(tmp_path / "hf" / "tokenizer.json")
    fiddlehead("import", "hf", "hf", "--out", "ours")
    assert "ab" in fiddlehead("generate", "ours", "--prompt", "ab", "--max-new-tokens", "5", "--stop", "zz")
    (tmp_path / "text.txt").write_text("ferns " * 30)
    assert "179 tokens: " in fiddlehead("evaluate", "ours", "--file", "text.txt")
    assert "cannot be read" in fiddlehead("evaluate", "ours", "--file", "none.txt", rc=2)
    assert "has no chat template" in fiddlehead("chat", "ours", rc=2)


def test_without_the_harness_the_way_to_it_is_told(fiddlehead, monkeypatch):  # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = fiddlehead("evaluate", "ours", "--tasks", "plants", rc=2)
    assert said == "error: tasks: lm-evaluation-harness is not installed; pip install 'fiddlehead[eval]' brings it\n"
    assert "give one of --file FILE and --tasks A,B" in fiddlehead("evaluate", "ours", rc=2)
