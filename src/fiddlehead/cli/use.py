"""`fiddlehead generate` and `chat`: generate text with a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fiddlehead.cli.completion import complete_run
from fiddlehead.cli.runs import DirOption
from fiddlehead.errors import ConfigError, Problem, first_of, kind_in_json, refuse
from fiddlehead.files.paths import user_path

if TYPE_CHECKING:
    from fiddlehead.inference.generation import Sampling
    from fiddlehead.inference.text import Completion, Writer

SourceArgument = typer.Argument(
    metavar="RUN|CHECKPOINT", help="A run, one of its checkpoints, or an imported model.", autocompletion=complete_run
)
_TEMPERATURE = typer.Option(0.8, min=0.0, help="0 always takes the most likely token.")
_TOP_K = typer.Option(50, min=0, help="Choose among the k most likely tokens; 0: all.")
_TOP_P = typer.Option(1.0, min=0.0, max=1.0, help="Choose among the most likely tokens with this total probability.")
_COMPILE = typer.Option(
    False,
    "--compile",
    help="On a GPU: run each step as one captured graph. The first tokens take some seconds, in which it compiles, and "
    "again those of a second batch or answer; so it pays for hundreds of tokens.",
)
_DRAFT = typer.Option(
    None,
    "--draft",
    metavar="RUN|CHECKPOINT",
    help="A smaller model with the same tokenizer: it drafts tokens, which the model checks several at a time. What is "
    "written has the same distribution; with --temperature 0 it is the same.",
    autocompletion=complete_run,
)
_WEIGHTS = typer.Option(
    None, "--weights", metavar="int8", help="Store the layers' weights in 8 bits, for a quarter of their memory."
)
_SEED = typer.Option(0, help="The same seed gives the same text.")


def generate(
    source: str = SourceArgument,
    prompt: list[str] = typer.Option(None, "--prompt", "-p", help="The text to continue; may be given several times."),
    prompt_file: Path = typer.Option(
        None,
        "--prompt-file",
        metavar="FILE",
        parser=user_path,
        help='A file with a prompt on each line, or JSON (.jsonl, .json) with objects that have a "prompt".',
    ),
    max_new_tokens: int = typer.Option(200, min=1, help="The most tokens to generate."),
    temperature: float = _TEMPERATURE,
    top_k: int = _TOP_K,
    top_p: float = _TOP_P,
    seed: int = typer.Option(0, help="The same seed gives the same text for a prompt, whatever the other prompts are."),
    stop: list[str] = typer.Option(
        None, "--stop", help="End before this text, in which \\\\n is a line's end; may be given several times."
    ),
    batch_size: int = typer.Option(16, min=1, help="Texts in a batch."),
    compile: bool = _COMPILE,
    draft: str = _DRAFT,
    weights: str = _WEIGHTS,
    as_json: bool = typer.Option(
        False, "--json", help="A JSON object on each line: prompt, text, tokens, finish_reason."
    ),
    checkpoint: Path = typer.Option(
        None, "--checkpoint", metavar="PATH", parser=user_path, help="A checkpoint other than the run's newest."
    ),
    directory: str = DirOption,
) -> None:
    """Generate the text that follows a prompt, or many prompts.

    A single text is shown while it is generated, and may become longer than the model's sequence length. Several texts,
    or texts with --json, may not.

    Example:  fiddlehead generate demo --prompt "def " --stop "\\n\\n"

    Example:  fiddlehead generate demo --prompt-file prompts.jsonl --json
    """
    from fiddlehead.inference.generation import Sampling
    from fiddlehead.inference.text import Writer

    if checkpoint is not None and not checkpoint.is_dir():
        raise ConfigError(Problem("checkpoint", checkpoint, "there is no such checkpoint"))
    prompts = {f"prompt {number}": _typed(text) for number, text in enumerate(prompt or (), start=1)}
    prompts |= _read_prompts(prompt_file) if prompt_file else {}
    if not prompts:
        raise ConfigError("give --prompt TEXT or --prompt-file FILE")
    ends = [_unescaped(text) for text in stop or ()]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling = Sampling(**options)
    writer = Writer.open(checkpoint or source, directory, compile=compile, draft=draft, weights=weights)
    if len(prompts) == 1 and not as_json:
        (text,) = prompts.values()
        print(text, end="", flush=True)  # noqa: T201
        for piece in writer.write(text, max_new_tokens, stop=ends, **options):
            print(piece, end="", flush=True)  # noqa: T201
        print()  # noqa: T201
        _report_draft(writer)
        return
    _refuse_long(prompts, writer)
    for text, written in _write(writer, list(prompts.values()), max_new_tokens, ends, sampling, batch_size):
        values = {"prompt": text, "text": written.text, "tokens": len(written.ids)}
        values["finish_reason"] = written.finish_reason
        print(json.dumps(values, ensure_ascii=False) if as_json else text + written.text, flush=True)  # noqa: T201
    _report_draft(writer)


def chat(
    source: str = SourceArgument,
    system: str = typer.Option("", help="The system message."),
    max_new_tokens: int = typer.Option(500, min=1, help="The most tokens of an answer."),
    temperature: float = _TEMPERATURE,
    top_k: int = _TOP_K,
    top_p: float = _TOP_P,
    seed: int = _SEED,
    compile: bool = _COMPILE,
    draft: str = _DRAFT,
    weights: str = _WEIGHTS,
    directory: str = DirOption,
) -> None:
    """Chat with a model that has a chat template; /reset forgets the conversation, /exit or Ctrl-D ends.

    Example:  fiddlehead chat tuned
    """
    from fiddlehead.inference.text import Writer

    writer = Writer.open(source, directory, compile=compile, draft=draft, weights=weights)
    begin: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    if writer.template is None:
        next(writer.answer(begin))  # which says what is missing
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    _converse(writer, begin, max_new_tokens, options)
    _report_draft(writer)


def _converse(writer: Writer, begin: list[dict[str, Any]], max_new_tokens: int, options: dict[str, Any]) -> None:
    """Answers what is typed until it ends."""
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
        for piece in writer.answer(messages, max_new_tokens, **options):
            print(piece, end="", flush=True)  # noqa: T201
            answer += piece
        print()  # noqa: T201
        messages.append({"role": "assistant", "content": answer.strip()})


def _report_draft(writer: Writer) -> None:
    """Says how many tokens a pass gave, on stderr."""
    draft = writer.draft
    if draft is not None and draft.passes:
        said = f"draft: {draft.tokens_per_pass:.2f} tokens a pass of the model, in {draft.passes} passes"
        typer.echo(said, err=True)


def _typed(prompt: str) -> str:
    """A prompt as typed; ConfigError if it is not valid UTF-8, which Python shows as surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        said = f"is not valid UTF-8 at character {error.start}"
        raise ConfigError(Problem(f"--prompt {prompt!r}", message=said)) from error
    return prompt


_ESCAPE = re.compile(r"""\\([\\'"abfnrtv]|[0-7]{1,3}|x.{0,2}|u.{0,4}|U.{0,8}|N(\{[^}]*\}?)?)""", re.DOTALL)
"""Escapes in Python's string literals."""


def _unescaped(stop: str) -> str:
    """The text of `--stop`, with Python's escapes such as `\\n` replaced by their characters.

    Raises:
        ConfigError: an escape is not complete, or the text is empty or not Unicode.
    """
    try:
        text = _ESCAPE.sub(lambda escape: escape[0].encode().decode("unicode_escape"), stop)
        text.encode()
    except UnicodeError as error:
        said = f"is not text: {getattr(error, 'reason', error)}"
        raise ConfigError(Problem(f"--stop {stop!r}", message=said)) from error
    if not text:
        raise ConfigError(Problem("--stop ''", message="is before every text; leave it out, or give one that may come"))
    return text


def _read_prompts(file: Path) -> dict[str, str]:
    """The prompts of a file, by file and line; one ConfigError lists all that is wrong."""
    from fiddlehead.data.readers import LINES_SUFFIXES, known_suffix
    from fiddlehead.data.record_files import read_rows

    found: dict[str, str] = {}
    problems: list[str] = []
    is_json = known_suffix(file) in LINES_SUFFIXES and file.is_file()
    for place, values, problem in read_rows(file) if is_json else _text_rows(file):
        if not problem and not isinstance(values, dict):
            problem = f"is {kind_in_json(values)}, not an object with a prompt"
        elif not problem and not isinstance(values.get("prompt"), str):
            problem = f"needs a text prompt, and has {', '.join(values) or 'nothing'}"
        if problem:
            problems.append(Problem.in_file(place, problem))
        found[place] = "" if problem else values["prompt"]
    refuse(first_of(problems))
    if not found:
        raise ConfigError(Problem("prompt_file", file, "has no prompt"))
    return found


def _text_rows(file: Path) -> Iterator[tuple[str, dict[str, str], str]]:
    """As `read_rows`, of a file whose lines are prompts."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(Problem("prompt_file", file, f"cannot be read: {error.strerror}")) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{file}:{number}", {"prompt": line.decode("utf-8-sig")}, ""
            except UnicodeDecodeError as error:
                yield f"{file}:{number}", {}, f"is not valid UTF-8: byte {line[error.start]:#04x} at {error.start}"


def _refuse_long(prompts: dict[str, str], writer: Writer) -> None:
    limit = writer.model.config.seq_length
    lengths = [len(writer.tokenizer.encode_prompt(prompt)) for prompt in prompts.values()]
    said = f"the model sees seq_length={limit}, those that it writes included"
    refuse(
        Problem.in_file(place, f"has {length} tokens; {said}")
        for place, length in zip(prompts, lengths, strict=True)
        if limit is not None and length >= limit
    )


def _write(
    writer: Writer, prompts: list[str], max_new_tokens: int, stop: list[str], sampling: Sampling, batch_size: int
) -> Iterator[tuple[str, Completion]]:
    """Yields each prompt with its completion, in order."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden = not console.is_terminal or len(prompts) <= batch_size
    with Progress(console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("texts", total=len(prompts))
        some = 16 * batch_size  # enough to batch texts of similar length, and few enough to lose little when stopped
        for start in range(0, len(prompts), some):
            texts = prompts[start : start + some]
            options: dict[str, Any] = {"sampling": sampling, "batch_size": batch_size}
            written = writer.write_all(
                texts, max_new_tokens, stop=stop, advance=lambda count: bar.advance(task, count), **options
            )
            yield from zip(texts, written, strict=True)
