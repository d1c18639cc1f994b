"""`fiddlehead import`, `export` and `convert`, as they are typed."""

from __future__ import annotations

import json

import pytest

from fiddlehead.data import ByteTokenizer
from tests.cli.test_command import fiddlehead  # noqa: F401  a fixture
from tests.data.small_tokenizers import change
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
        (["import", "hf", "hf", "--out", "hf"], "out='hf': exists already"),
        (["export", "hf", "nowhere", "x"], "unknown run 'nowhere'"),
        (["export", "hf", "hf", "x"], "hf: is a Hugging Face checkpoint already"),
        (["export", "peft", "hf", "x"], "hf: has no adapters"),
        (["convert", "gqa", "hf", "-g", "2", "--out", "x"], "the model has 3 key/value heads; allowed: 1"),
        (["convert", "gqa", "hf", "-g", "1", "--out", "x", "--method", "meen"], "did you mean 'mean'?"),
    ],
)
def test_an_impossible_value_is_one_line_and_exit_code_2(fiddlehead, llama, arguments, said):  # noqa: F811
    assert said in fiddlehead(*arguments, rc=2)


@pytest.fixture
def ours(fiddlehead, tmp_path):  # noqa: F811
    """A model of bytes, imported into the working directory."""
    import torch

    from tests.models.hf_families import config, transformers

    made = config(
        "LlamaConfig", vocab_size=257, eos_token_id=256, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(made).save_pretrained(tmp_path / "hf")
    ByteTokenizer().save(tmp_path / "hf" / "tokenizer.json")
    fiddlehead("import", "hf", "hf", "--out", "ours")


def test_an_imported_model_writes_and_is_evaluated(fiddlehead, ours, tmp_path):  # noqa: F811
    assert "ab" in fiddlehead("generate", "ours", "--prompt", "ab", "--max-new-tokens", "5", "--stop", "zz")
    (tmp_path / "text.txt").write_text("ferns " * 30)
    assert "179 tokens: " in fiddlehead("evaluate", "ours", "--file", "text.txt")
    assert "cannot be read" in fiddlehead("evaluate", "ours", "--file", "none.txt", rc=2)
    assert "has no chat template" in fiddlehead("chat", "ours", rc=2)
    # With itself as a draft: every drafted token is right, 5 a pass and the rest.
    typed = ["generate", "ours", "--prompt", "ab", "--max-new-tokens", "12", "--temperature", "0"]
    plain, drafted = fiddlehead(*typed), fiddlehead(*typed, "--draft", "ours")
    assert drafted == f"{plain}draft: 4.00 tokens a pass of the model, in 3 passes\n"
    change(tmp_path / "hf" / "tokenizer.json", normalizer={"type": "Lowercase"})
    refused = fiddlehead(*typed, "--draft", "hf", rc=2)
    assert "draft='hf': has another tokenizer than ours" in refused
    assert "unknown run 'nothing'" in fiddlehead(*typed, "--draft", "nothing", rc=2)
    assert "draft: " in fiddlehead(*typed, "--draft", "ours", "--weights", "int8")
    assert "weights='int4': did you mean 'int8'" in fiddlehead(*typed, "--weights", "int4", rc=2)


def test_without_the_harness_the_way_to_it_is_told(fiddlehead, monkeypatch):  # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = fiddlehead("evaluate", "ours", "--tasks", "plants", rc=2)
    assert said == "error: tasks: lm-evaluation-harness is not installed; pip install 'fiddlehead[eval]' brings it\n"
    assert "give one of --file FILE and --tasks A,B" in fiddlehead("evaluate", "ours", rc=2)


def test_prompts_come_from_options_and_files(fiddlehead, ours, tmp_path):  # noqa: F811
    (tmp_path / "some.jsonl").write_text('{"prompt": "moss"}\n\n{"id": 3, "prompt": "a\\nfern, "}\n')
    (tmp_path / "some.txt").write_text("moss\n\na fern, \n")
    typed = ["generate", "ours", "--max-new-tokens", "9", "--seed", "5"]
    alone = {text: fiddlehead(*typed, "-p", text)[: -len("\n")] for text in ("moss", "a\nfern, ", "a fern, ", "ivy")}
    for prompts, arguments in [
        (["ivy", "moss", "a\nfern, "], ["-p", "ivy", "--prompt-file", "some.jsonl"]),
        (["moss", "a fern, "], ["--prompt-file", "some.txt", "--batch-size", "1"]),
        (["moss", "moss"], ["-p", "moss", "-p", "moss"]),
    ]:
        assert fiddlehead(*typed, *arguments) == "".join(alone[text] + "\n" for text in prompts)
        found = [json.loads(line) for line in fiddlehead(*typed, *arguments, "--json").splitlines()]
        assert [each["prompt"] + each["text"] for each in found] == [alone[text] for text in prompts]
        assert {(each["tokens"], each["finish_reason"]) for each in found} == {(9, "length")}
    text, end = next((text, end) for text in alone for end in alone[text][len(text) + 1 :] if end.isascii())
    (stopped,) = map(json.loads, fiddlehead(*typed, "-p", text, "--stop", end, "--json").splitlines())
    assert stopped["text"] == alone[text][len(text) :].partition(end)[0]
    assert stopped["finish_reason"] == "stop" and stopped["tokens"] < 9


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b" \n\n", ["prompt_file='a.txt': has no prompt"]),
        ("a.txt", b"fine\nno \xff\n", ["a.txt:2: is not valid UTF-8: byte 0xff at 3"]),
        ("a.txt", b"moss\n" + b"m" * 200, ["a.txt:2: has 200 tokens; the model sees seq_length=128"]),
        (
            "a.jsonl",
            b'{"prompt": "x"}\n{"prompt": }\n[1]\n{"prompt": 3}\n{"promt": "x"}\n',
            [
                "a.jsonl:2: is not valid JSON: column 12",
                "a.jsonl:3: is a list",
                "a.jsonl:4: needs",
                "a.jsonl:5: needs a text prompt, and has promt",
            ],
        ),
        ("a.JSONL", b'{"prompt": }\n', ["a.JSONL:1: is not valid JSON: column 12"]),
        ("a.json", b'[{"prompt": "x"},\n{"promt": "x"}]', ["a.json:2: needs a text prompt, and has promt"]),
        ("b.txt", b"", ["prompt_file='a.txt': cannot be read: No such file"]),
    ],
)
def test_prompts_that_cannot_be_read_are_told_all_at_once(fiddlehead, ours, tmp_path, name, content, said):  # noqa: F811
    (tmp_path / name).write_bytes(content)
    name = name.replace("b.", "a.")
    errors = fiddlehead("generate", "ours", "--prompt-file", name, "-p", "x", rc=2).splitlines()
    assert len(errors) == len(said) and all(part in line for part, line in zip(said, errors, strict=True)), errors


def test_generate_needs_a_prompt(fiddlehead, ours):  # noqa: F811
    assert "give --prompt TEXT or --prompt-file FILE" in fiddlehead("generate", "ours", rc=2)


@pytest.mark.parametrize("command", [["generate", "--prompt", "ab"], ["chat"]])
def test_compiling_without_a_gpu_is_refused_before_the_weights_are_read(fiddlehead, ours, monkeypatch, command):  # noqa: F811
    monkeypatch.setattr("fiddlehead.inference.text.load_transformer", None)
    said = fiddlehead(*command, "ours", "--compile", rc=2)
    assert said == "error: compile=True: a step is captured on a GPU, and the model is on cpu; leave compile out\n"
