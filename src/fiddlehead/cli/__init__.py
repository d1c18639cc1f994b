"""The `fiddlehead` command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import gc
import os
import sys
import textwrap
import warnings

import typer

from fiddlehead import __version__
from fiddlehead.cli import (
    attention,
    bench,
    checkpoints,
    command,
    compare,
    corpus,
    evaluate,
    fields,
    migrate,
    plan,
    put_off,
    recipes,
    report,
    runs,
    runs_files,
    sweep,
    sync,
    train,
    use,
)
from fiddlehead.cli.common import width_of
from fiddlehead.errors import ConfigError, RunError, format_warning, of_the_machine
from fiddlehead.files.paths import working_directory
from fiddlehead.run import workers

app = typer.Typer(
    name="fiddlehead",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # their locals could show secrets
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with:  fiddlehead recipes  ·  fiddlehead pretrain tiny",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)  # noqa: T201
        raise typer.Exit


@app.callback()
def fiddlehead(
    version: bool = typer.Option(
        False, "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Train transformer language models from Python recipes, and launch them anywhere."""


# The first line of each docstring is what `fiddlehead --help` shows, so it must not be cut.
app.command("recipes", rich_help_panel="Recipes")(recipes.recipes)
app.command("show", rich_help_panel="Recipes")(recipes.show)
app.command("diff", rich_help_panel="Recipes")(recipes.diff)
app.command("help", rich_help_panel="Recipes", help=fields.HELP)(fields.help_)
app.command("schema", rich_help_panel="Recipes")(fields.schema)
app.command("migrate", rich_help_panel="Recipes")(migrate.migrate)
app.command("pretrain", rich_help_panel="Train")(train.pretrain)
app.command("finetune", rich_help_panel="Train", help=train.FINETUNE_HELP)(train.pretrain)
app.command("plan", rich_help_panel="Train", help=plan.HELP)(plan.plan)
app.command("bench", rich_help_panel="Train", help=bench.HELP)(bench.bench)
app.command("tokenize", rich_help_panel="Train")(corpus.tokenize)
app.command("generate", rich_help_panel="Use")(use.generate)
app.command("chat", rich_help_panel="Use")(use.chat)
app.command("evaluate", rich_help_panel="Use")(evaluate.evaluate)
app.command("report", rich_help_panel="Use")(report.report)
runs.app.command("sync")(sync.sync)
runs.app.command("logs")(runs_files.logs)
runs.app.command("clean")(runs_files.clean)
runs.app.command("compare")(compare.compare)
runs.app.command("plot")(compare.plot)
runs.app.command("sweep")(sweep.sweep)
runs.app.command("serve")(report.serve)
app.add_typer(runs.app, name="runs", rich_help_panel="Use")
app.add_typer(checkpoints.importing, name="import", rich_help_panel="Checkpoints")
app.add_typer(checkpoints.exporting, name="export", rich_help_panel="Checkpoints")
app.add_typer(checkpoints.converting, name="convert", rich_help_panel="Checkpoints")
app.add_typer(attention.app, name="attention", rich_help_panel="Kernels")
app.command("doctor", rich_help_panel="Kernels")(attention.doctor)


def main() -> None:
    """Runs the command.

    A user's mistake prints a few lines and exits with 2. An error of the machine or its disk prints one line and exits
    with 1. A failed job has its own exit code.
    """
    gc.set_threshold(
        100_000
    )  # else a tenth of the time of importing PyTorch and Lightning goes into garbage collection
    put_off.put_off()
    warnings.formatwarning = format_warning
    # Nothing is imported from the working directory unasked: not here under `python -c`, nor in processes started here.
    sys.path[:] = filter(None, sys.path)
    os.environ["PYTHONSAFEPATH"] = "1"
    for name in workers.around_us():  # Lightning reads some of them when it is imported, and may not understand them
        del os.environ[name]
    try:
        working_directory()
        command.made_of(app)(prog_name="fiddlehead")
    except ConfigError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        sys.exit(2)
    except RunError as error:
        _say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `fiddlehead ... | head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if not (line := of_the_machine(error)):
            raise
        _say(f"error: {line}")
        sys.exit(1)


def _say(text: str) -> None:
    """Prints an error; on a terminal its lines end between words."""
    if sys.stderr.isatty():
        wrapper = textwrap.TextWrapper(width_of(sys.stderr), break_long_words=False, break_on_hyphens=False)
        lines = text.splitlines()
        for number, line in enumerate(lines):
            wrapper.subsequent_indent = "  " + line[: len(line) - len(line.lstrip())]
            lines[number] = wrapper.fill(line)
        text = "\n".join(lines)
    print(text, file=sys.stderr)  # noqa: T201
