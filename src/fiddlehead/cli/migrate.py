"""`fiddlehead migrate`: a NeMo 2.0 script as a recipe file and a launch file."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from fiddlehead.cli.common import add_row, show, table
from fiddlehead.errors import ConfigError
from fiddlehead.files.foreign import MAX_TEXT, read_text
from fiddlehead.files.paths import user_path


def migrate(
    script: Path = typer.Argument(metavar="SCRIPT", parser=user_path, help="A Python script that uses NeMo 2.0."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the files if they exist."),
) -> None:
    """Rewrite a NeMo 2.0 script as a recipe and an executor; the script is read and not run.

    Beside the script, recipes/NAME.py and launch/NAME.py are written. The table says what has become of each line.

    Example:  fiddlehead migrate train_llama.py
    """
    from fiddlehead import migrate as migration

    try:
        text = read_text(script, MAX_TEXT)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{script} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    name = re.sub(r"\W", "_", script.stem)
    try:
        migrated = migration.migrate(text, name)
    except ConfigError as error:
        raise ConfigError(*(f"{script}: {problem}" for problem in error.problems)) from error
    files = migration.write(migrated, script.parent, name, overwrite=overwrite)
    made = table("line", "in the script", "here")
    for line, was, done in migrated.lines:
        add_row(made, str(line), was, done)
    show(made)
    print(f"wrote {' and '.join(map(str, files))}; in {script.absolute().parent}:")  # noqa: T201
    for step in migrated.steps:
        print(f"  {step}")  # noqa: T201
