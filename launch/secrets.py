"""The secrets of a job: they are kept only in a file that only the user can read.

The file is a shell script that the job's script sources. It is outside the run directory, and is removed when the job
has ended for good. Logins in `~/.netrc` are not included: a job with the same home can read them there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from fiddlehead.errors import ConfigError, Problem
from fiddlehead.files.paths import user_path
from fiddlehead.run.directory import RunDirectory

ALWAYS = ("WANDB_API_KEY", "HF_TOKEN")
"""Names of environment variables that every job gets if they are set."""

_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)


def looks_secret(name: str) -> bool:
    """Whether the name of an environment variable looks like that of a secret."""
    return _NAME.search(name) is not None


def collect(names: Iterable[str]) -> dict[str, str]:
    """The current values of `names`, and of the variables in `ALWAYS` that are set.

    Raises:
        ConfigError: one of `names` is not set.
    """
    names = tuple(names)
    missing = [name for name in names if name not in os.environ]
    if missing:
        message = f"{', '.join(missing)} are not set in this process; export them first"
        raise ConfigError(Problem("executor.secrets", message=message))
    return {name: os.environ[name] for name in dict.fromkeys((*ALWAYS, *names)) if name in os.environ}


def folder() -> Path:
    """The folder of secrets: $FIDDLEHEAD_SECRETS, else `~/.config/fiddlehead/secrets`."""
    return user_path(os.environ.get("FIDDLEHEAD_SECRETS") or "~/.config/fiddlehead/secrets").absolute()


def file(run: RunDirectory) -> Path:
    """The file of a run's secrets, if it has any."""
    path = hashlib.sha256(os.fsencode(run.path.absolute())).hexdigest()
    return folder() / f"{run.name}-{path[:12]}.sh"


def text(values: Mapping[str, str]) -> str:
    """Shell lines that export `values`, with any characters."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in values.items())


def write(run: RunDirectory, values: Mapping[str, str]) -> Path:
    """Writes the secrets of a run, replaces earlier ones, and returns the file.

    Raises:
        ConfigError: the folder cannot be written, or belongs to someone else.
    """
    path = file(run)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.parent.stat()
        if found.st_uid != os.getuid():
            raise PermissionError(0, "it belongs to another user", str(path.parent))
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.parent.chmod(0o700)
        # A name that is free and no link, with mode 0600 from the start; a link at the final name is replaced.
        descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(os.fsencode(text(values)))
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except OSError as error:
        message = f"cannot be kept in {path.parent}: {error.strerror}; name a folder in FIDDLEHEAD_SECRETS"
        raise ConfigError(Problem("executor.secrets", message=message)) from error
    return path


def remove(run: RunDirectory) -> None:
    """Removes the secrets of a run; it may have none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        file(run).unlink()
