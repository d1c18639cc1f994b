"""`fiddlehead generate` and `chat`: what a model is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from fiddlehead.cli.runs import DirOption, complete_run
from fiddlehead.errors import ConfigError

SourceArgument = typer.Argument(
    metavar="RUN|CHECKPOINT",
    help="A run, a checkpoint of one, or what `fiddlehead import` made.",
    autocompletion=complete_run,
)
_TEMPERATURE = typer.Option(0.8, min=0.0, help="0 always takes the likeliest token.")
_TOP_K = typer.Option(50, min=0, help="Choose among the k likeliest tokens; 0: all.")
_TOP_P = typer.Option(1.0, min=0.0, max=1.0, help="Choose among the likeliest that have this probability together.")
_SEED = typer.Option(0, help="The same seed writes the same text.")


def generate(
    source: str = SourceArgument,
    prompt: list[str] = typer.Option(..., "--prompt", "-p", help="The text to go on from; may be given several times."),
    max_new_tokens: int = typer.Option(200, min=1, help="How many tokens to write."),
    temperature: float = _TEMPERATURE,
    top_k: int = _TOP_K,
    top_p: float = _TOP_P,
    seed: int = _SEED,
    stop: list[str] = typer.Option(None, "--stop", help="End before this text; may be given several times."),
    checkpoint: Path = typer.Option(None, "--checkpoint", help="A checkpoint other than the run's newest."),
    directory: str = DirOption,
) -> None:
    """Let a model go on from a prompt.

    Example:  fiddlehead generate demo --prompt "def " --stop "\\n\\n"
    """
    from fiddlehead.text import Writer

    if checkpoint is not None and not checkpoint.is_dir():
        raise ConfigError(f"checkpoint={str(checkpoint)!r}: there is no such checkpoint")
    writer = Writer.open(checkpoint or source, directory)
    ends = [text.encode().decode("unicode_escape") if "\\" in text else text for text in stop or ()]
    for text in prompt:
        print(text, end="", flush=True)  # noqa: T201
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        for piece in writer.write(text, max_new_tokens, stop=ends, **options):
            print(piece, end="", flush=True)  # noqa: T201
        print()  # noqa: T201


def chat(
    source: str = SourceArgument,
    system: str = typer.Option("", help="What the assistant is told before all else."),
    max_new_tokens: int = typer.Option(500, min=1, help="The longest answer."),
    temperature: float = _TEMPERATURE,
    top_k: int = _TOP_K,
    top_p: float = _TOP_P,
    seed: int = _SEED,
    directory: str = DirOption,
) -> None:
    """Talk with a model that has a chat template; /reset forgets what was said, /exit or Ctrl-D ends.

    Example:  fiddlehead chat tuned
    """
    from fiddlehead.text import Writer

    writer = Writer.open(source, directory)
    begin: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    if writer.template is None:
        next(writer.answer(begin))  # which says what is missing
    messages = list(begin)
    while True:
        try:
            said = input("> ")
        except EOFError:
            return
        if said == "/exit":
            return
        if said == "/reset":
            messages = list(begin)
            continue
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        answer = ""
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        for piece in writer.answer(messages, max_new_tokens, **options):
            print(piece, end="", flush=True)  # noqa: T201
            answer += piece
        print()  # noqa: T201
        messages.append({"role": "assistant", "content": answer.strip()})
