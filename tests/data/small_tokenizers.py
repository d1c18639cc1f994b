"""Small tokenizers of the kinds that published models have, in folders as these models publish them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [f"def f_{i}(x): return x * {i} + len('stra\u00dfe') What is a fern? A plant." for i in range(20)]

QWEN_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
"""As Qwen 3's, it writes an answer otherwise once another message follows."""

LLAMA2_TEMPLATE = """\
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


def save_qwen(folder: Path) -> Path:
    """Byte-level BPE without a token that begins a text; <think> is an ordinary token."""
    made = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>"])
    made.normalizer = normalizers.NFC()
    settings = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "add_bos_token": False}
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": QWEN_TEMPLATE}
    generation = {"eos_token_id": _ids(made, "<|im_end|>", "<|endoftext|>")}
    return _save(folder, made, settings | names, generation | {"pad_token_id": made.token_to_id("<|endoftext|>")})


def save_llama2(folder: Path) -> Path:
    """SentencePiece's BPE as a `tokenizer.json`: a mark for the space before every text, and bytes for what is rare."""
    made = _sentencepiece(["<unk>", "<s>", "</s>"], [])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _begin_with(made, "<s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": LLAMA2_TEMPLATE}
    generation = {"bos_token_id": 1, "eos_token_id": 2}
    return _save(folder, made, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **names}, generation)


def save_llama3(folder: Path) -> Path:
    """Byte-level BPE whose documents and turns end in different tokens."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
    made = _byte_level([*special, "<|eot_id|>"], [])
    _begin_with(made, "<|begin_of_text|>", processors.ByteLevel(trim_offsets=False))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3_TEMPLATE}
    generation = {"eos_token_id": _ids(made, "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")}
    return _save(folder, made, {"tokenizer_class": "PreTrainedTokenizerFast", **names}, generation)


def save_gemma(folder: Path) -> Path:
    """Like `save_llama2` without the first mark; HTML tags such as </s> are ordinary, and an image's token is the last.

    That one has no row in the embedding of a model that only reads text.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    made = _sentencepiece(special, ["<mask>", "\n\n", "</s>", "<s>"])
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<image_soft_token>"])
    _begin_with(made, "<bos>")
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "GemmaTokenizer", "chat_template": GEMMA_TEMPLATE, **names}
    return _save(folder, made, settings, {"bos_token_id": 2, "eos_token_id": _ids(made, "<eos>", "<end_of_turn>")})


KINDS: dict[str, Callable[[Path], Path]] = {
    "qwen": save_qwen,
    "llama2": save_llama2,
    "llama3": save_llama3,
    "gemma": save_gemma,
}
"""Each writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` to a folder, and returns it."""


def change(file: Path, **settings: Any) -> None:
    """Changes settings in a JSON file, which may not be there yet; those that are None are removed."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept = {name: value for name, value in (before | settings).items() if settings.get(name, 0) is not None}
    file.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")


def _byte_level(special: list[str], ordinary: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(special)  # after the others, as in published files
    made.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    return made


def _sentencepiece(special: list[str], ordinary: list[str]) -> Tokenizer:
    merges = [("\u2581", "d"), ("\u2581d", "e"), ("\u2581de", "f"), ("\u2581", "x"), ("\u2581", "f"), ("r", "n")]
    merges += [("\u2581", "\u2581"), ("\u2581f", "e"), ("\u2581fe", "rn"), ("p", "l"), ("pl", "an"), ("a", "n")]
    merges.sort(key=lambda pair: len("".join(pair)))
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzAW?.,:[]/INST", "\u2581"})
    tokens = [*special, *ordinary, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *map("".join, merges)]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens(special)
    made.add_tokens([AddedToken(token, normalized=False) for token in ordinary])
    return made


def _begin_with(made: Tokenizer, token: str, *before: Any) -> None:
    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, made.token_to_id(token))]
    )
    made.post_processor = processors.Sequence([*before, template]) if before else template


def _ids(made: Tokenizer, *tokens: str) -> list[int]:
    return [made.token_to_id(token) for token in tokens]


def _save(folder: Path, made: Tokenizer, settings: dict[str, Any], generation: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    change(folder / "tokenizer_config.json", **settings)
    change(folder / "generation_config.json", **generation)
    return folder
