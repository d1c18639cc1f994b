"""Where a run's metrics go: a CSV file always, TensorBoard and W&B on request."""

from __future__ import annotations

import csv
import io
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from fiddlehead.environment import wandb_mode_problems
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.atomic import write_atomically
from fiddlehead.recipe.plain import plain_recipe
from fiddlehead.run.console import is_rank_zero, say
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training.callbacks.profile import parse_steps

MAX_NAME_BYTES = 200
"""The longest name of a run. File names add suffixes to it, and file systems allow at most 255 characters."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """The name and folder of a run, its loggers besides `metrics.csv`, and the steps to profile.

    The same recipe with the same `name` continues the run; without a name, every run gets a new one.
    """

    name: str | None = None
    dir: str = "runs"
    """The folder of runs."""
    tensorboard: bool = False
    """Whether TensorBoard's files are written too."""
    wandb: bool = False
    """Online with an API key (or as WANDB_MODE says); offline without one, and without asking."""
    wandb_project: str = "fiddlehead"
    """The project of W&B."""
    profile: str | None = None
    """Steps to profile, FIRST:LAST; "10:12" is the steps 10, 11 and 12. The run's `profile/` has the results."""
    profile_shapes: bool = False
    """Whether the profile has the shapes of the operations' inputs."""

    def __post_init__(self) -> None:
        problems = []
        try:
            _ = self.profile_steps
        except ConfigError as error:
            problems += error.problems
        if self.name is not None and (self.name in ("", ".", "..") or Path(self.name).name != self.name):
            problems.append(Problem("name", self.name, "must be the name of one folder; log.dir says where"))
        elif self.name is not None and (self.name.startswith(("-", "~")) or not self.name.isprintable()):
            problems.append(
                Problem("name", self.name, "must be printable characters on one line, and not begin with - or ~")
            )
        elif self.name is not None and (size := len(self.name.encode())) > MAX_NAME_BYTES:
            problems.append(Problem("name", self.name, f"has {size} bytes; a name has at most {MAX_NAME_BYTES}"))
        wrong = sorted(set("/\\#?%:") & set(self.wandb_project))
        if wrong or not self.wandb_project or len(self.wandb_project) > 128:
            message = "W&B takes 1 to 128 characters, none of / \\ # ? % :; WANDB_ENTITY names the owner"
            problems.append(Problem("wandb_project", self.wandb_project, message))
        if self.wandb:
            problems += wandb_mode_problems(os.environ.get("WANDB_MODE"))
        if not self.dir:
            problems.append(Problem("dir", "", "must name a folder; '.' is the working directory"))
        refuse(problems)

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """The first and the last step to profile."""
        return None if self.profile is None else parse_steps(self.profile)

    def loggers(self, run: RunDirectory, resumed_step: int) -> list[Logger]:
        """The loggers of a run that starts after `resumed_step`, which is 0 for a new one.

        Raises:
            ConfigError: TensorBoard is selected but not installed.
        """
        loggers: list[Logger] = [MetricsCSV(run.metrics, resumed_step)]
        if self.tensorboard:
            if find_spec("tensorboard") is None:
                message = "needs tensorboard: pip install 'fiddlehead[tensorboard]'"
                raise ConfigError(Problem("log.tensorboard", True, message))
            from lightning.pytorch.loggers import TensorBoardLogger

            # purge_step hides what a killed attempt logged after the step that is resumed from.
            loggers.append(TensorBoardLogger(run.path, name="", version="tensorboard", purge_step=resumed_step + 1))
        if self.wandb:
            loggers.append(self._wandb_logger(run))
        return loggers

    def _wandb_logger(self, run: RunDirectory) -> Logger:
        from lightning.pytorch.loggers import WandbLogger

        class Surviving(WandbLogger):
            """Continues without W&B when its service has ended, for example on a scheduler's SIGTERM."""

            lost = False
            begun = False

            def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
                if self.lost:
                    return
                try:
                    super().log_metrics(metrics, step)
                    if not self.begun and is_rank_zero() and mode == "online":
                        say(f"W&B: {self.experiment.url}")
                    self.begun = True
                except Exception as error:
                    self.lost = True
                    say(f"WARNING: W&B records no more of this attempt ({error!r}); metrics.csv has all")

        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        if mode == "offline":
            say(f"W&B has no API key here: recording offline. Later: fiddlehead runs sync {run.name}")
        import wandb

        logger = Surviving(
            project=self.wandb_project,
            name=run.name,
            id=run.wandb_id if is_rank_zero() else None,  # only the first rank records
            save_dir=run.path,
            mode=mode,  # and not Lightning's `offline`, which sets WANDB_MODE when W&B has read it already
            resume="allow",
            config=plain_recipe(run.recipe),
            settings=wandb.Settings(silent=True),  # what matters of what it would print is said here
        )
        logger._wandb_init.pop("anonymous", None)  # Lightning passes it on, and W&B warns that it has no meaning
        return logger


def has_wandb_key() -> bool:
    """Whether W&B would find an API key: in the environment, or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return (
        logins.authenticators(urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "")
        is not None
    )


class MetricsCSV(Logger):
    """One row for each logged step; a new metric gets a new column.

    It drops rows after `resumed_step`, which a killed attempt may have left, so the file is the same as for an
    uninterrupted run. Floats keep their exact values.
    """

    FIRST_COLUMNS = ("step", "loss", "val_loss", "val_nats_per_byte", "lr", "grad_norm", "tokens", "tokens_per_s")

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns = list(self.FIRST_COLUMNS)
        if is_rank_zero():
            self._rewrite(resumed_step)

    @property
    def name(self) -> str:
        """The folder of the file."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Empty: each run has only one version."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the recipe is in the same folder."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row, in one write."""
        row = {"step": step} | {key: value for key, value in metrics.items() if key != "epoch"}
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            self._rewrite(None)
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerow(row)
        with self.path.open("a") as file:
            file.write(text.getvalue())

    def _rewrite(self, last_step: int | None) -> None:
        """Rewrites the file with the present columns and the rows up to `last_step` (None: all)."""
        rows: list[dict[str, str]] = []
        if self.path.exists():
            text, _, _cut_short = self._text().rpartition("\n")  # by a crash in the middle of a write
            reader = csv.DictReader(io.StringIO(text))
            rows = [row for row in reader if last_step is None or _is_up_to(row, last_step)]
            self._columns += [name for name in reader.fieldnames or () if name not in self._columns]
        table = io.StringIO()
        writer = csv.DictWriter(table, self._columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, table.getvalue())

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            message = f"is not valid UTF-8 at byte {error.start}; repair it, or move it away to begin a new one"
            raise ConfigError(Problem.in_file(self.path, message)) from error


def _is_up_to(row: dict[str, str], last_step: int) -> bool:
    """Whether a row's step is at most `last_step`."""
    return (row.get("step") or "").isdecimal() and int(row["step"]) <= last_step
