"""Paths as users write them: in a recipe, on the command line, in a program or an environment variable."""

from __future__ import annotations

import os
from pathlib import Path

from fiddlehead.errors import ConfigError, Problem


def user_path(written: str | os.PathLike[str]) -> Path:
    """Converts a path that a user wrote: `~` is the user's home, and `~NAME` is another user's home.

    Every path from a user goes through this function, so it means the same everywhere.

    Raises:
        ConfigError: the home is not known, or a path cannot have these characters.
    """
    text = os.fspath(written)
    if "\0" in text:
        raise ConfigError(Problem.in_file(repr(text), "a path cannot have a null character"))
    try:
        return Path(text).expanduser()
    except RuntimeError:
        message = "this machine knows no such home; write the whole path, or set HOME"
        raise ConfigError(Problem.in_file(repr(text), message)) from None


def working_directory() -> Path:
    """The folder that relative paths are in.

    Raises:
        ConfigError: it was deleted.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the working directory was deleted; go to another one") from None


def cache_folder() -> Path:
    """The folder for data that later runs reuse: `$FIDDLEHEAD_CACHE`, or `~/.cache/fiddlehead`."""
    return user_path(os.environ.get("FIDDLEHEAD_CACHE") or "~/.cache/fiddlehead").absolute()
