from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fiddlehead.data.token_writer import encode_documents
from fiddlehead.data.tokenizers import BPETokenizer, ByteTokenizer, JSONTokenizer, Tokenizer, TokenizerFile
from fiddlehead.errors import ConfigError

TEXTS = [f"def f_{i}(x): return x * {i} + len('straße') " * 5 for i in range(50)]
BPE = BPETokenizer(300).train(TEXTS)

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture
def byte_file(tmp_path: Path) -> Path:
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@given(text=unicode_text)
def test_text_survives_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    lengths = tokenizer.token_bytes()
    assert lengths is not None and lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int32
    assert lengths[ids].sum() == len(text.encode())
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_special_tokens_in_text_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a<|endoftext|>b"
    lengths = tokenizer.token_bytes()
    assert lengths is not None and lengths[tokenizer.eos_id] == 0


def test_the_byte_tokenizer_is_a_tokenizer_json(byte_file: Path) -> None:
    text = "héllo\n\t\x00 <|endoftext|>"
    library = LibraryTokenizer.from_file(str(byte_file))
    assert library.encode("héllo").ids == list("héllo".encode())
    loaded = TokenizerFile(byte_file)
    assert loaded.encode(text) == ByteTokenizer().encode(text)
    assert (loaded.vocab_size, loaded.eos_id) == (257, 256)
    assert loaded.fingerprint == ByteTokenizer().fingerprint
    assert np.array_equal(loaded.token_bytes(), ByteTokenizer().token_bytes())  # type: ignore[arg-type]


def test_training_gives_the_size_asked_for_and_is_repeatable() -> None:
    assert BPE.vocab_size == 300 and BPE.eos_id == 0
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    assert BPETokenizer(300).train(TEXTS).fingerprint == BPE.fingerprint
    assert BPETokenizer(301).fingerprint != BPETokenizer(300).fingerprint


def test_too_little_text_or_too_small_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=5000: needs more text .* at most \d+ tokens"):
        BPETokenizer(5000).train(TEXTS)
    with pytest.raises(ConfigError, match="vocab_size=256: must be 257"):
        BPETokenizer(256)


def test_saved_loaded_and_pickled_it_is_the_same(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    loaded = TokenizerFile(tmp_path)
    for copy in (loaded, pickle.loads(pickle.dumps(loaded))):
        assert copy.fingerprint == BPE.fingerprint
        assert copy.encode(TEXTS[3]) == BPE.encode(TEXTS[3])


def changed(path: Path, **changes: Any) -> str:
    return json.dumps(json.loads(path.read_text()) | changes)


def test_the_fingerprint_follows_what_the_tokenizer_does(byte_file: Path) -> None:
    original = TokenizerFile(byte_file).fingerprint
    padded = changed(
        byte_file, truncation={"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    )
    assert JSONTokenizer(padded).fingerprint == original
    assert JSONTokenizer(padded).encode("abcdef") == list(b"abcdef")
    assert JSONTokenizer(changed(byte_file, normalizer={"type": "NFC"})).fingerprint != original
    assert JSONTokenizer(byte_file.read_text(), eos=0).fingerprint != original


def test_the_end_of_document_can_be_named(byte_file: Path) -> None:
    tokens = [{"id": 256, "content": "<end>", "special": True}, {"id": 257, "content": "<pad>", "special": True}]
    text = changed(byte_file, added_tokens=tokens)
    assert JSONTokenizer(text, eos="<end>").eos_id == 256
    assert JSONTokenizer(text, eos=257).eos_id == 257
    with pytest.raises(ConfigError, match=r"eos=None.*candidates: '<end>', '<pad>'"):
        JSONTokenizer(text)
    with pytest.raises(ConfigError, match=r"eos='<edn>': is not a token of .*; did you mean '<end>'"):
        JSONTokenizer(text, eos="<edn>")
    with pytest.raises(ConfigError, match="eos=999: is not a token"):
        JSONTokenizer(text, eos=999)


def test_the_end_of_a_turn_is_the_last_choice(byte_file: Path) -> None:
    tokens = [{"id": 256, "content": "<|im_end|>", "special": True}, {"id": 257, "content": "</s>", "special": True}]
    assert JSONTokenizer(changed(byte_file, added_tokens=tokens)).eos_id == 257
    assert JSONTokenizer(changed(byte_file, added_tokens=tokens[:1])).eos_id == 256


def sentencepiece_like(decoder: dict[str, Any] | None) -> str:
    vocab = {"</s>": 0, "<0x0A>": 1, "\u2581the": 2, "é": 3}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    return json.dumps({"model": model, "added_tokens": [end_of_document(0)], "decoder": decoder})


def end_of_document(number: int) -> dict[str, Any]:
    return {"id": number, "content": "</s>", "special": True}


def test_bytes_of_other_vocabularies() -> None:
    decoder = {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]}
    lengths = JSONTokenizer(sentencepiece_like(decoder)).token_bytes()
    assert lengths is not None and lengths.tolist() == [0, 1, 4, 2]
    assert JSONTokenizer(sentencepiece_like({"type": "WordPiece"})).token_bytes() is None
    assert JSONTokenizer(sentencepiece_like(None)).token_bytes() is None


def test_a_unigram_vocabulary() -> None:
    text = json.dumps(
        {
            "model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.0]]},
            "added_tokens": [end_of_document(1)],
        }
    )
    tokenizer = JSONTokenizer(text)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (3, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "broken JSON: line 1, column 2"),
        ("[]", "not a valid tokenizer.json"),
        ("{}", "not a valid tokenizer.json"),
        ('{"model": {"vocab": {}}}', "vocabulary is empty"),
        ('{"model": {"vocab": {"a": "b"}}}', "has the id 'b'"),
    ],
)
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"broken.json.*{message}"):
        TokenizerFile(path)


def test_a_tokenizer_that_the_library_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    model = {"type": "Odd", "vocab": {"</s>": 0}}
    path.write_text(json.dumps({"model": model, "added_tokens": [end_of_document(0)]}))
    with pytest.raises(ConfigError, match=r"odd\.json: is not a tokenizer"):
        TokenizerFile(path).encode("a")


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*tokenizer\.json"):
        TokenizerFile(tmp_path)
    with pytest.raises(ConfigError, match="there is no file"):
        TokenizerFile(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        TokenizerFile(tmp_path / "latin.json")


def like_llama3(begin: bool) -> LibraryTokenizer:
    """Byte-level BPE; if asked a token begins every text."""
    made = LibraryTokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    byte_level = processors.ByteLevel(trim_offsets=False)
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))]
    )
    made.post_processor = processors.Sequence([byte_level, template]) if begin else byte_level
    return made


def like_llama2(begin: bool) -> LibraryTokenizer:
    """SentencePiece's BPE: words begin with a mark for the space before, and what has no token is bytes."""
    made = _with_bytes(pre_tokenizers.Metaspace(prepend_scheme="first", split=False), begin)
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def like_gemma(begin: bool) -> LibraryTokenizer:
    """The same with spaces as they are."""
    made = _with_bytes(pre_tokenizers.Split(" ", "merged_with_previous"), begin)
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _with_bytes(pre_tokenizer: Any, begin: bool) -> LibraryTokenizer:
    words = ["\u2581", "\u2581d", "e", "f", "\u2581de", "\u2581def", "r", "t", "u", "n", "\u2581x", "\u2581r", "re"]
    merges = [("\u2581", "d"), ("\u2581d", "e"), ("\u2581de", "f"), ("\u2581", "x"), ("\u2581", "r"), ("r", "e")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "d", "x"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    made = LibraryTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizer
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return made


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("kind", [like_llama3, like_llama2, like_gemma])
def test_a_prompt_is_that_of_transformers(kind: Any, begin: bool, tmp_path: Path) -> None:
    import transformers

    kind(begin).save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"} if kind is like_llama3 else {
        "bos_token": "<s>", "eos_token": "</s>"
    }  # fmt: skip
    # Which transformers passes over where there is a tokenizer.json, and so do we.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), TokenizerFile(tmp_path)
    assert ours.begin_ids == ([theirs.bos_token_id] if begin else [])
    for text in ["def return x", "def f_3(x):\n    return x", "  stra\u00dfe\t\u6f22 ", "\n", "x"]:
        ids = theirs(text.rstrip(" ")).input_ids
        assert ours.encode_prompt(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode_prompt("") == ([theirs.bos_token_id] if begin else [ours.eos_id])
    documents = [*theirs("x").input_ids, ours.eos_id, *theirs("def\n").input_ids, ours.eos_id]
    assert encode_documents(ours, ["x", "def\n"]).tolist() == documents
    assert ours.begin_ids == pickle.loads(pickle.dumps(ours)).begin_ids


def test_the_end_of_a_document_is_not_said_twice(tmp_path: Path) -> None:
    made = like_llama3(False)
    end = made.token_to_id("<|end_of_text|>")
    made.post_processor = processors.TemplateProcessing(
        single="<|end_of_text|> $A", special_tokens=[("<|end_of_text|>", end)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    ours = TokenizerFile(tmp_path)
    assert ours.encode_prompt("x") == [end, *ours.encode("x")]
    assert encode_documents(ours, ["x", "y"]).tolist() == [*ours.encode("x"), end, *ours.encode("y"), end]
