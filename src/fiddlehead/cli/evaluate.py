"""`fiddlehead evaluate`: how good a model is, on a text or on tasks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import typer

from fiddlehead.cli.common import add_row, show, table
from fiddlehead.cli.runs import DirOption
from fiddlehead.cli.use import SourceArgument
from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path


def evaluate(
    source: str = SourceArgument,
    file: Path = typer.Option(None, "--file", "-f", metavar="FILE", parser=user_path, help="A text file."),
    stride: int = typer.Option(None, min=1, help="Distance between windows; by default half the model's length."),
    tasks: str = typer.Option(None, metavar="A,B", help="Tasks or groups of lm-evaluation-harness; * stands for any."),
    tasks_dir: Path = typer.Option(
        None, metavar="DIR", parser=user_path, help="Your own tasks: YAML files as the harness reads them."
    ),
    limit: int = typer.Option(None, min=1, help="Use only the first N documents of each task."),
    num_fewshot: int = typer.Option(None, min=0, help="Solved examples before each; by default the task's."),
    batch_size: int = typer.Option(16, min=1, help="Texts in a batch."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    directory: str = DirOption,
) -> None:
    """Measure how well a model predicts a text, or how well it solves tasks.

    For a text it prints nats per token and per byte, and perplexity. Tasks are those of lm-evaluation-harness, which
    the extra `eval` installs.

    Example:  fiddlehead evaluate demo --file notes.txt

    Example:  fiddlehead evaluate demo --tasks hellaswag,arc_easy --limit 100
    """
    if (file is None) == (tasks is None):
        raise ConfigError("give one of --file FILE and --tasks A,B")
    if file is not None:
        _evaluate_text(file, source, directory, stride, as_json)
        return
    _need_harness()
    from fiddlehead.inference.harness import evaluate_tasks, find_tasks
    from fiddlehead.inference.text import Writer

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = find_tasks(names, tasks_dir)  # before the model is read
    writer = Writer.open(source, directory)
    results = evaluate_tasks(writer, found, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    if as_json:
        kept = ("results", "groups", "versions", "n-shot", "n-samples")
        print(json.dumps({name: results[name] for name in kept if name in results}, default=str))  # noqa: T201
        return
    _show_results(results)


def _need_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        said = "lm-evaluation-harness is not installed; pip install 'fiddlehead[eval]' brings it"
        raise ConfigError(Problem("tasks", message=said))


def _show_results(results: dict[str, Any]) -> None:
    made = table("task", "shots", "documents", "metric", "value", "\N{PLUS-MINUS SIGN}")
    for name, values in (results["results"] | results.get("groups", {})).items():
        shots = str(results["n-shot"].get(name, ""))
        documents = str(results["n-samples"].get(name, {}).get("effective", ""))
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, float | int) or metric.endswith("_stderr") or not kind:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            spread = f"{error:.4f}" if isinstance(error, float) else ""
            label = metric if kind == "none" else f"{metric} ({kind})"
            add_row(made, name, shots, documents, label, f"{value:.4f}", spread)
    show(made)


def _evaluate_text(file: Path, source: str, directory: str, stride: int | None, as_json: bool) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from fiddlehead.inference.text import Writer, likelihood

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem("file", file, f"cannot be read: {error}")) from error
    writer = Writer.open(source, directory)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(file.name, total=len(writer.tokenizer.encode(text)))
        found = likelihood(writer, text, stride, lambda tokens: bar.advance(task, tokens))
    values = {
        "tokens": found.tokens,
        "nats_per_token": found.nats / found.tokens,
        "nats_per_byte": found.nats / found.text_bytes,
        "perplexity": found.perplexity,
    }
    if as_json:
        json.dump(values, sys.stdout)
        print()  # noqa: T201
        return
    print(  # noqa: T201
        f"{found.tokens:,} tokens: {values['nats_per_token']:.4f} nats a token, {values['nats_per_byte']:.4f} a byte, "
        f"perplexity {found.perplexity:,.2f}"
    )
