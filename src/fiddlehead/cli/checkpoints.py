"""`fiddlehead import`, `export` and `convert`: checkpoints from and to other tools, and to other shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
import yaml

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path

importing = typer.Typer(no_args_is_help=True, help="Import checkpoints from other tools.")
exporting = typer.Typer(no_args_is_help=True, help="Export checkpoints to other tools.")
converting = typer.Typer(no_args_is_help=True, help="Change the shape of a model.")

_CHECKPOINT = "A run, a checkpoint of one, or what `fiddlehead import` made."


@importing.command("hf")
def import_hf(
    source: str = typer.Argument(metavar="DIR|NAME", help="A Hugging Face checkpoint's folder, or OWNER/NAME."),
    out: Path = typer.Option(..., "--out", "-o", metavar="OUT", parser=user_path, help="The folder to make."),
) -> None:
    """Import a Hugging Face checkpoint and its tokenizer, to train from it or use it.

    Only safetensors are read, one file at a time. Every tensor must exist and have the shape that config.json says.

    Example:  fiddlehead import hf meta-llama/Llama-3.2-1B --out llama
    """
    from fiddlehead.checkpoints.huggingface.convert import import_checkpoint

    checkpoint = import_checkpoint(source, out)
    config = checkpoint.config
    unread = "".join(f"not read: {name}\n" for name in checkpoint.unread)
    print(  # noqa: T201
        f"{out}: {checkpoint.family.model_type}, {config.num_layers} layers, {config.num_attention_heads} heads in "
        f"{_groups(config.groups)}, {checkpoint.nbytes / 1e9:,.2f} GB\n{unread}"
        f"write with it:  fiddlehead generate {out} --prompt ...\n"
        f"start from it:  model.init_from={out}"
    )


@importing.command("nemo")
def import_nemo(
    source: Path = typer.Argument(metavar="CKPT", parser=user_path, help="A folder with weights/ and context/."),
    out: Path = typer.Option(..., "--out", "-o", metavar="OUT", parser=user_path, help="The folder to make."),
    given: list[str] = typer.Option(
        [],
        "--set",
        metavar="NAME=VALUE",
        help="A field of the model's config that context/ does not say, or says otherwise.",
    ),
    tokenizer: Path = typer.Option(
        None, metavar="DIR", parser=user_path, help="A folder with a tokenizer.json; by default that in context/."
    ),
) -> None:
    """Import a distributed checkpoint of NeMo 2.0, to train from it or use it.

    It is read as data, one parameter at a time; nothing that it names is imported or run.

    Example:  fiddlehead import nemo results/checkpoints/step=1000 --out llama --set vocab_size=128256
    """
    from fiddlehead.checkpoints.nemo.convert import import_nemo

    values = dict(_setting(text) for text in given)
    imported = import_nemo(source, out, given=values, tokenizer=tokenizer)
    config = imported.config
    padding = imported.rows - (config.vocab_size or 0)
    print(  # noqa: T201
        f"{out}: {config.num_layers} layers, {config.num_attention_heads} heads in {_groups(config.groups)}, "
        f"{imported.nbytes / 1e9:,.2f} GB\n"
        f"vocabulary: {config.vocab_size:,} of the {imported.rows:,} rows of the embedding"
        f"{'; is some of it padding? Then --set vocab_size=...' if not padding and imported.tokenizer is None else ''}"
    )
    if imported.tokenizer is None:
        print("tokenizer: none was found; --tokenizer DIR copies one")  # noqa: T201
    else:
        print(f"write with it:  fiddlehead generate {out} --prompt ...")  # noqa: T201
    print(f"start from it:  model.init_from={out}")  # noqa: T201


@exporting.command("hf")
def export_hf(
    source: str = typer.Argument(metavar="RUN|CHECKPOINT", help=_CHECKPOINT),
    out: Path = typer.Argument(metavar="OUT", parser=user_path, help="The folder to make."),
    family: str = typer.Option(None, "--as", metavar="FAMILY", help="The model_type; by default as imported."),
    dtype: str = typer.Option(None, help="float32, bfloat16 or float16; by default as stored."),
) -> None:
    """Export a model as a Hugging Face checkpoint; adapters are merged into it.

    Example:  fiddlehead export hf demo demo-hf --dtype bfloat16
    """
    from fiddlehead.checkpoints.huggingface.convert import export_checkpoint

    chosen = export_checkpoint(source, out, family=family, dtype=dtype)
    print(f"{out}: {chosen.architecture}")  # noqa: T201


@exporting.command("peft")
def export_peft(
    source: str = typer.Argument(metavar="RUN|CHECKPOINT", help="A run with adapters, or one of its checkpoints."),
    out: Path = typer.Argument(metavar="OUT", parser=user_path, help="The folder to make."),
) -> None:
    """Export the adapters of a run for Hugging Face's PEFT, without the base model.

    Example:  fiddlehead export peft tuned tuned-adapters
    """
    from fiddlehead.checkpoints.huggingface.convert import export_adapters

    base = export_adapters(source, out)
    print(f"{out}: adapters for {base}")  # noqa: T201


@converting.command("gqa")
def convert_gqa(
    source: str = typer.Argument(metavar="CHECKPOINT", help=_CHECKPOINT),
    num_query_groups: int = typer.Option(..., "--num-query-groups", "-g", metavar="G", help="Key/value heads."),
    out: Path = typer.Option(..., "--out", "-o", metavar="OUT", parser=user_path, help="The folder to make."),
    method: str = typer.Option("mean", help="How heads become one: their mean, the first, or random."),
) -> None:
    """Merge the key/value heads of a model into fewer ones. Train it a little more afterwards.

    Example:  fiddlehead convert gqa llama2 --num-query-groups 8 --out llama2-gqa
    """
    from fiddlehead.checkpoints.grouped_query import convert_gqa

    config = convert_gqa(source, out, num_query_groups, method)  # pyright: ignore[reportArgumentType]
    print(  # noqa: T201
        f"{out}: {config.num_attention_heads} heads in {_groups(config.groups)}; the cache of keys and values takes "
        f"{config.groups / config.num_attention_heads:.3g} of what it takes with as many as heads\n"
        f"train it a little more:  fiddlehead pretrain RECIPE model.config=None model.init_from={out}"
    )


def _setting(text: str) -> tuple[str, Any]:
    """A field's name and value, written as in YAML."""
    name, equals, value = text.partition("=")
    try:
        return name.strip(), yaml.safe_load(value) if equals else None
    except yaml.YAMLError:
        raise ConfigError(Problem("--set", text, "must be NAME=VALUE")) from None


def _groups(number: int) -> str:
    return f"{number} group{'s' * (number > 1)}"
