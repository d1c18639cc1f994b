"""`fiddlehead tokenize`: text into token files."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path

FORMATS = ("fiddlehead", "megatron")


def tokenize(
    paths: list[Path] = typer.Argument(
        metavar="PATH...", parser=user_path, help="Text, JSONL or Parquet files, or folders of them."
    ),
    tokenizer: str = typer.Option(
        ..., "--tokenizer", "-t", help="bytes, bpe:SIZE (trained on the text), or a tokenizer.json."
    ),
    eos: str = typer.Option(
        None,
        "--eos",
        metavar="TOKEN",
        help="The token that ends a document; by default the one that the tokenizer's folder names.",
    ),
    out: Path = typer.Option(
        ..., "--out", "-o", metavar="DIR", parser=user_path, help="The folder to make; data.paths=DIR trains on it."
    ),
    val_fraction: float = typer.Option(0.01, min=0.0, max=0.5, help="Share of the documents for validation."),
    workers: int = typer.Option(None, min=1, help="Number of processes; by default all cores."),
    text_field: str = typer.Option("text", help="The field of JSONL and Parquet rows that holds the text."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace DIR if it exists."),
    format: str = typer.Option(
        "fiddlehead", "--format", help="fiddlehead, or megatron: DIR/train.idx and val.idx too, for Megatron and NeMo."
    ),
) -> None:
    """Turn text, JSONL and Parquet into memory-mapped token files.

    Example:  fiddlehead tokenize docs/ notes.jsonl --tokenizer bpe:4096 --out tokens
    """
    from fiddlehead.data.tokenize import parse_tokenizer, tokenize

    if format not in FORMATS:
        raise ConfigError(Problem.unknown("--format", format, "format", FORMATS))
    info = tokenize(
        paths,
        parse_tokenizer(tokenizer, eos),
        out,
        val_fraction=val_fraction,
        workers=workers,
        text_field=text_field,
        overwrite=overwrite,
        megatron=format == "megatron",
    )
    without = "" if info.val.documents else " data.val_samples=0"
    documents, tokens = info.train.documents + info.val.documents, info.train.tokens + info.val.tokens
    print(  # noqa: T201
        f"{out}: {tokens:,} tokens of {documents:,} documents ({info.val.documents:,} of them for validation), "
        f"{info.vocab_size:,} kinds of token\n"
        f"train on it with {shlex.quote(f'data.paths={out}')} data.tokenizer=None{without}"
    )
    if format == "megatron":
        print(f"Megatron and NeMo read it by the prefixes {out}/train and {out}/val")  # noqa: T201
    if without and val_fraction:
        print(  # noqa: T201
            f"no document fell into --val-fraction {val_fraction:g} of them; a greater one keeps some for validation"
        )
