"""The scripts of a run that is not started: what `Plan.submit` would write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fiddlehead.files.atomic import write_atomically
from fiddlehead.files.paths import user_path
from fiddlehead.launch import code, secrets
from fiddlehead.launch.executor import Executor
from fiddlehead.launch.script import job_script
from fiddlehead.recipe import Recipe
from fiddlehead.run import RunDirectory

_HIDDEN = "***"
_SHORTEST = 6
"""The characters of the shortest value that is hidden as a secret: "1" is in every script."""


def scripts(recipe: Recipe, executor: Executor, run: RunDirectory, allow: Sequence[str] = ()) -> dict[str, str]:
    """The texts of the job's script and of what starts it, by name, as they would be submitted; it leaves no file.

    No cluster or engine is asked. The values of secrets are not in them.

    Args:
        executor: completed for the recipe.
        run: where the run will be.
        allow: additional names that the job's recipe may use.

    Raises:
        ConfigError: the working tree cannot be shipped, or a path cannot be used.
    """
    keys = [name for name in dict.fromkeys((*secrets.ALWAYS, *executor.secrets)) if name in os.environ]
    has_secrets = bool(executor.secrets or keys)
    with tempfile.TemporaryDirectory() as folder:
        # The same path below a folder, whose name is then taken out of the texts: quotes are where they would be.
        root = Path(os.path.realpath(folder))
        here = RunDirectory(root / run.path.relative_to("/"))
        here.path.mkdir(parents=True)
        copy = None
        if executor.ships_code:
            copy = code.ship(Path.cwd(), here.code, exclude=[user_path(recipe.log.dir)])
        job = job_script(
            here,
            executor,
            sorted({*recipe.names_to_allow(), *allow}),
            copy=copy,
            secrets_file=executor.secrets_file(here) if has_secrets else "",
            lock=here.launcher_lock if executor.dies_with_launcher else None,
            nsys=recipe.log.nsys,
        )
        job = job.replace(str(root), "").replace(secrets.file(here).name, secrets.file(run).name)
        write_atomically(here.script, job, mode=0o600)
        starters = executor.starters(_Unwritten(run.path, here.script), has_secrets=has_secrets)
        texts = {name: text.replace(str(root), "") for name, text in starters.items()} | {here.script.name: job}
    for key in keys:
        if len(os.environ[key]) >= _SHORTEST:
            texts = {name: text.replace(os.environ[key], _HIDDEN) for name, text in texts.items()}
    return texts


@dataclass(frozen=True)
class _Unwritten(RunDirectory):
    """A run that has no folder; its script is elsewhere."""

    elsewhere: Path

    @property
    def script(self) -> Path:
        return self.elsewhere
