"""What a run starts from: which checkpoint, and whether that is of the same model, data and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fiddlehead.checkpoints.folder import newest_good, read_state, verify
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.data.checksums import Checksums, differences
from fiddlehead.errors import ConfigError
from fiddlehead.files.paths import user_path
from fiddlehead.models import TransformerConfig
from fiddlehead.run.console import say
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import find_run
from fiddlehead.training.optim import Optim, kind_of


def resume_point(run: RunDirectory, resume: str | Path) -> Path | None:
    """The checkpoint that a run starts from; None for a fresh start.

    Raises:
        ConfigError: `resume` names nothing that can be resumed, or is "never" and the run has a checkpoint.
        DamagedCheckpointError: `resume` is the path of a checkpoint that is not whole.
    """
    own = newest_good(run.checkpoints)
    if resume == "auto":
        status = run.written_status()
        if own is None and status is not None and status.attempt > 1:
            say(f"WARNING: {run.path} was started before but has no good checkpoint: it starts again from step 0")
        return own
    if resume == "never":
        if own is not None:
            raise ConfigError(
                f"resume='never', but {run.path} has {own.name}, which would be lost; "
                "choose another log.name, or delete the run"
            )
        return None
    elsewhere = _checkpoint_at(resume, run.path.parent)
    if own is None:
        return elsewhere
    origin = run.path / "resumed_from"
    if (
        origin.exists() and origin.read_bytes() == str(resume).encode()
    ):  # it began there, and has its own progress since
        return own
    raise ConfigError(
        f"resume={str(resume)!r}, but {run.path} has {own.name} of its own; leave resume out to go on from there, or "
        "choose another log.name"
    )


def _checkpoint_at(resume: str | Path, runs: Path) -> Path:
    """The checkpoint that a path, or a run's name in the folder `runs`, stands for."""
    path = user_path(resume)
    if path.name.startswith("step-") or path.name == "best":
        if not path.is_dir():
            raise ConfigError(f"resume={str(resume)!r}: there is no such checkpoint")
        verify(path)
        return path
    try:
        checkpoint = newest_good(find_run(str(resume), runs).checkpoints)
    except ConfigError as error:
        raise ConfigError(*(f"resume={str(resume)!r}: {problem}" for problem in error.problems)) from None
    if checkpoint is None:
        raise ConfigError(f"resume={str(resume)!r}: the run has no good checkpoint")
    return checkpoint


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, and what its `state.json` says."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Start:
        """That of a checkpoint that was verified; raises DamagedCheckpointError as `read_state` does."""
        return cls(path, read_state(path))

    @property
    def step(self) -> int:
        """The steps that were done."""
        return int(self.state["step"])

    @property
    def init_from(self) -> str | None:
        """What its model began with."""
        return self.state.get("init_from")

    def refuse_others(self, config: TransformerConfig, optim: Optim) -> None:
        """Raises ConfigError unless the model and the optimizer that are to go on are of the kind that was saved."""
        before = asdict(TransformerConfig.from_dict(self.state["config"]))
        problems = [
            f"model.config.{name}={value!r}, but it is {before[name]!r} in {self.path}"
            for name, value in asdict(config).items()
            if name not in ("attention_backend", "seq_length") and before[name] != value
        ]
        if problems:
            raise ConfigError(*problems)
        saved = kind_of(self.state["optimizer_states"][0]["param_groups"])
        if saved != optim.kind:
            raise ConfigError(
                f"optim is {optim.kind}, but {self.path} was trained with {saved}; set that, or begin a run of its own "
                "with model.init_from"
            )

    def warn_of_another_rate(self, optim: Optim, max_steps: int) -> None:
        """Says so if the schedule goes on elsewhere than it left off, as it does when `max_steps` was changed."""
        left_off = self.state["lr_schedulers"][0]["_last_lr"][0]
        goes_on = optim.lr * optim.lr_scheduler(self.step, max_steps, optim.lr)
        if abs(goes_on - left_off) > 0.01 * optim.lr:
            say(
                f"WARNING: with max_steps={max_steps} the learning rate goes on at {goes_on:.2e}, not at "
                f"{left_off:.2e}, where it left off"
            )


def data_checksums(data: PreTrainingDataModule | FineTuningDataModule, start: Start | None) -> Checksums:
    """The data's checksums; raises ConfigError if they are not those of the checkpoint that a run starts from."""
    try:
        data.prepare_data()
        checksums = data.checksums()
    except ConfigError as error:
        raise error.under("data") from error
    if start is None or data.allow_changed:
        return checksums
    before = start.state.get("data")
    if before is None:
        say(f"WARNING: {start.path} does not say which data it was trained on; it is not compared")
    elif changed := differences(before, checksums):
        raise ConfigError(
            *(f"data: {each} since {start.path}" for each in changed),
            "data.allow_changed=False: set True to go on with other data, or begin a run with model.init_from",
        )
    return checksums
