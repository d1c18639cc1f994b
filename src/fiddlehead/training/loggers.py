"""Where a run's metrics go: a CSV file always; TensorBoard, W&B, MLflow and any Lightning logger on request."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger

from fiddlehead.environment import wandb_mode_problems
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.recipe.plain import flat, plain_recipe
from fiddlehead.run.console import is_rank_zero, say
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training.callbacks.profile import parse_steps
from fiddlehead.training.metrics_csv import MetricsCSV
from fiddlehead.training.mlflow_logger import mlflow_logger, tracking_uri

_OPTIONAL = {"tensorboard": "tensorboard", "mlflow": "MLflow"}
"""The fields of `Log` whose tracker is a package that not everybody has, of the same name, and what it is called."""
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
    wandb_entity: str | None = None
    """The user or team that owns the project; None is WANDB_ENTITY, or the default of the account."""
    wandb_group: str | None = None
    """The group of the run in W&B."""
    wandb_tags: Sequence[str] = ()
    """The tags of the run in W&B."""
    wandb_notes: str | None = None
    """What W&B shows as the description of the run."""
    mlflow: bool = False
    """Whether MLflow records the run too; attempts of one run stay one run there."""
    mlflow_uri: str | None = None
    """MLflow's tracking server, such as http://tracker:5000; None is MLFLOW_TRACKING_URI."""
    mlflow_experiment: str = "fiddlehead"
    """The experiment of MLflow."""
    loggers: Sequence[Logger] = ()
    """More loggers of Lightning, such as `CometLogger`, used as they are."""
    profile: str | None = None
    """Steps to profile, FIRST:LAST; "10:12" is the steps 10, 11 and 12. The run's `profile/` has the results."""
    profile_shapes: bool = False
    """Whether the profile has the shapes of the operations' inputs."""
    nsys: str | None = None
    """Steps, as of `profile`, that NVIDIA Nsight Systems profiles: the job runs under `nsys`, on GPUs."""

    def __post_init__(self) -> None:
        problems = []
        for name, value in (("profile", self.profile), ("nsys", self.nsys)):
            try:
                _ = _steps(value, name)
            except ConfigError as error:
                problems += error.problems
        if None not in (self.profile, self.nsys):
            message = "a GPU has one profiler at a time; leave log.profile or log.nsys out"
            problems.append(Problem("nsys", self.nsys, message))
        if self.name is not None and (self.name in ("", ".", "..") or Path(self.name).name != self.name):
            problems.append(Problem("name", self.name, "must be the name of one folder; log.dir says where"))
        elif self.name is not None and (self.name.startswith(("-", "~")) or not self.name.isprintable()):
            problems.append(
                Problem("name", self.name, "must be printable characters on one line, and not begin with - or ~")
            )
        elif self.name is not None and (size := len(self.name.encode())) > MAX_NAME_BYTES:
            problems.append(Problem("name", self.name, f"has {size} bytes; a name has at most {MAX_NAME_BYTES}"))
        problems += self._wandb_problems() + self._mlflow_problems()
        for number, logger in enumerate(self.loggers):
            if not isinstance(logger, Logger):
                message = "is not a Lightning logger, such as lightning.pytorch.loggers:CometLogger"
                problems.append(Problem(f"loggers[{number}]", type(logger).__name__, message))
        if self.wandb:
            problems += wandb_mode_problems(os.environ.get("WANDB_MODE"))
        if not self.dir:
            problems.append(Problem("dir", "", "must name a folder; '.' is the working directory"))
        refuse(problems)

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """The first and the last step to profile."""
        return _steps(self.profile, "profile")

    @property
    def nsys_steps(self) -> tuple[int, int] | None:
        """The first and the last step that Nsight Systems profiles."""
        return _steps(self.nsys, "nsys")

    def _wandb_problems(self) -> list[Problem]:
        problems = []
        wrong = sorted(set("/\\#?%:") & set(self.wandb_project))
        if wrong or not self.wandb_project or len(self.wandb_project) > 128:
            message = "W&B takes 1 to 128 characters, none of / \\ # ? % :; wandb_entity names the owner"
            problems.append(Problem("wandb_project", self.wandb_project, message))
        if isinstance(self.wandb_tags, str):
            problems.append(Problem("wandb_tags", self.wandb_tags, "must be a list, such as ['a']"))
        elif wrong := [tag for tag in self.wandb_tags if not 1 <= len(tag) <= 64]:
            problems.append(Problem("wandb_tags", wrong[0], "W&B takes tags of 1 to 64 characters"))
        if self.wandb_group is not None and not 1 <= len(self.wandb_group) <= 128:
            problems.append(Problem("wandb_group", self.wandb_group, "W&B takes 1 to 128 characters"))
        if self.wandb_entity is not None and (not self.wandb_entity or "/" in self.wandb_entity):
            problems.append(Problem("wandb_entity", self.wandb_entity, "must be the name of a user or a team"))
        return problems

    def _mlflow_problems(self) -> list[Problem]:
        problems = []
        uri = tracking_uri(self.mlflow_uri)
        if self.mlflow and not uri:
            message = "name the tracking server, such as http://tracker:5000, or set MLFLOW_TRACKING_URI"
            problems.append(Problem("mlflow_uri", self.mlflow_uri, message))
        if self.mlflow_uri is not None and "@" in urlsplit(self.mlflow_uri).netloc:
            message = "has a user or a password, which files would show; set MLFLOW_TRACKING_USERNAME and _PASSWORD"
            problems.append(Problem("mlflow_uri", message=message))
        if not self.mlflow_experiment:
            problems.append(Problem("mlflow_experiment", "", "must name an experiment"))
        return problems

    def open(self, run: RunDirectory, resumed_step: int) -> list[Logger]:
        """The loggers of a run that starts after `resumed_step`, which is 0 for a new one.

        Raises:
            ConfigError: TensorBoard or MLflow is selected but not installed.
        """
        refuse(lacking(self))
        loggers: list[Logger] = [MetricsCSV(run.metrics, resumed_step)]
        if self.tensorboard:
            loggers.append(_tensorboard_logger(run, resumed_step))
        if self.wandb:
            loggers.append(self._wandb_logger(run))
        if self.mlflow:
            loggers.append(mlflow_logger(run, tracking_uri(self.mlflow_uri), self.mlflow_experiment))
        for logger in self.loggers:
            logger.log_hyperparams(plain_recipe(run.recipe))
        return [*loggers, *self.loggers]

    def _wandb_logger(self, run: RunDirectory) -> Logger:
        from lightning.pytorch.loggers import WandbLogger

        class Surviving(WandbLogger):
            """Continues without W&B when its service has ended, for example on a scheduler's SIGTERM.

            Its run in W&B ends with the training: the next one in this process would be written into it.
            """

            lost = False
            begun = False

            def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
                if self.lost:
                    return
                try:
                    super().log_metrics(metrics, step)
                    if not self.begun and is_rank_zero() and mode == "online":
                        say(f"W&B: {self.experiment.url}")
                        run.write_wandb_url(str(self.experiment.url))
                    self.begun = True
                except Exception as error:
                    self.lost = True
                    say(f"WARNING: W&B records no more of this attempt ({error!r}); metrics.csv has all")

            def finalize(self, status: str) -> None:
                super().finalize(status)
                if self._experiment is not None and not self.lost:
                    try:
                        self.experiment.finish(exit_code=0 if status == "success" else 1)
                    except Exception as error:
                        say(f"WARNING: W&B did not end its run ({error!r}); metrics.csv has all")

        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        if mode == "offline":
            say(f"W&B has no API key here: recording offline. Later: fiddlehead runs sync {run.name}")
        import wandb

        if wandb.run is not None and is_rank_zero():
            message = (
                "a W&B run is in progress in this process and would get the metrics; end it with wandb.finish(), or to "
                "write into it set log.wandb=False, log.loggers=[fdl.Config(lightning.pytorch.loggers.WandbLogger)]"
            )
            raise ConfigError(Problem("log.wandb", True, message))
        logger = Surviving(
            project=self.wandb_project,
            entity=self.wandb_entity,
            group=self.wandb_group,
            tags=list(self.wandb_tags) or None,  # None leaves WANDB_TAGS as they are
            notes=self.wandb_notes,
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


def lacking(log: Any) -> list[Problem]:
    """A problem for each tracker that a `Log`, or its configuration, selects and that is not installed here."""
    return [
        Problem(f"log.{field}", True, f"needs {name}: pip install 'fiddlehead[{field}]'")
        for field, name in _OPTIONAL.items()
        if getattr(log, field) and find_spec(field) is None
    ]


def _steps(text: str | None, field: str) -> tuple[int, int] | None:
    return None if text is None else parse_steps(text, field)


def _tensorboard_logger(run: RunDirectory, resumed_step: int) -> Logger:
    from lightning.pytorch.loggers import TensorBoardLogger

    class WithHyperParameters(TensorBoardLogger):
        """Lists the recipe among TensorBoard's hyper-parameters, with the newest losses."""

        begun = False

        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            if not self.begun and is_rank_zero():
                self._list_hyper_parameters()
            self.begun = True
            super().log_metrics(metrics, step)  # type: ignore[arg-type]

        def _list_hyper_parameters(self) -> None:
            from torch.utils.tensorboard.summary import hparams

            # Lightning's `log_hyperparams` would also write a point for each metric, which the run does not have.
            for summary in hparams(_scalars(plain_recipe(run.recipe)), dict.fromkeys(RESULTS, 0.0)):
                self.experiment._get_file_writer().add_summary(summary)

    # purge_step hides what a killed attempt logged after the step that is resumed from.
    return WithHyperParameters(run.path, name="", version="tensorboard", purge_step=resumed_step + 1)


RESULTS = ("train/loss", "val/loss")
"""The metrics by which TensorBoard compares the hyper-parameters of runs."""


def _scalars(recipe: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A recipe's values by their paths; lists and None become their text, because TensorBoard takes no others."""
    return {
        path: value if isinstance(value, bool | int | float | str) else str(value)
        for path, value in flat(recipe).items()
    }


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
