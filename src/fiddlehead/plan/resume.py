"""The checkpoint from which a run starts, and whether it has the same model, data and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fiddlehead.checkpoints.folder import newest_good, read_state, verify
from fiddlehead.checkpoints.weights import CHANGED, find_weights, open_weights, refuse_nemo
from fiddlehead.data import FineTuningDataModule, PreTrainingDataModule
from fiddlehead.data.checksums import Checksums, differences
from fiddlehead.errors import ConfigError, Problem, refuse
from fiddlehead.files.paths import user_path
from fiddlehead.models import TransformerConfig
from fiddlehead.numbers import scientific
from fiddlehead.run.console import say
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import find_run
from fiddlehead.training.optim import Optim, kind_of, of_bfloat16


def resume_point(run: RunDirectory, resume: str | Path) -> Path | None:
    """The checkpoint that a run starts from; None for a fresh start.

    Raises:
        ConfigError: `resume` names no checkpoint, or is "never" and the run has a checkpoint.
        DamagedCheckpointError: `resume` is the path of a damaged checkpoint.
    """
    own = newest_good(run.checkpoints)
    if resume == "auto":
        status = run.written_status()
        if own is None and status is not None and status.attempt > 1:
            say(f"WARNING: {run.path} was started before but has no good checkpoint: it starts again from step 0")
        return own
    if resume == "never":
        if own is not None:
            message = f"{run.path} has {own.name}, which would be lost; choose another log.name, or delete the run"
            raise ConfigError(Problem("resume", "never", message))
        return None
    elsewhere = _checkpoint_at(resume, run.path.parent)
    if own is None:
        return elsewhere
    origin = run.path / "resumed_from"
    if origin.exists() and origin.read_bytes() == str(resume).encode():  # it began there and has progressed since
        return own
    message = f"{run.path} has its own {own.name}; leave resume out to go on from there, or choose another log.name"
    raise ConfigError(Problem("resume", resume, message))


def _checkpoint_at(resume: str | Path, runs: Path) -> Path:
    """The checkpoint named by a path, or by a run's name in the folder `runs`."""
    path = user_path(resume)
    if path.name.startswith("step-") or path.name == "best":
        if not path.is_dir():
            raise ConfigError(Problem("resume", resume, "there is no such checkpoint"))
        verify(path)
        return path
    try:
        refuse_nemo(path)
        checkpoint = newest_good(find_run(str(resume), runs).checkpoints)
    except ConfigError as error:
        raise error.of("resume", resume) from None
    if checkpoint is None:
        raise ConfigError(Problem("resume", resume, "the run has no good checkpoint"))
    return checkpoint


@dataclass(frozen=True)
class Start:
    """The checkpoint from which a run starts, and its `state.json`."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Start:
        """Reads the state of a verified checkpoint; raises DamagedCheckpointError as `read_state` does."""
        return cls(path, read_state(path))

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return int(self.state["step"])

    @property
    def init_from(self) -> str | None:
        """The weights with which its model began."""
        return self.state.get("init_from")

    def base(self, given: str | Path | None) -> str | Path | None:
        """The weights to go on with: those with which its model began, in `given` too if they were moved or copied.

        Raises:
            ConfigError: neither there nor where they were are the weights that the run needs.
        """
        saved = self.state.get("base")
        if saved is None:  # it needs them no more, or an earlier version wrote it
            return self.init_from or given
        there = []
        for path in dict.fromkeys(str(each) for each in (given, self.init_from) if each is not None):
            try:
                there.append(find_weights(path))
            except ConfigError:
                continue
            if open_weights(there[-1]).fingerprint() == saved:
                return there[-1].absolute()
        if there:
            raise ConfigError(Problem("model.init_from", there[-1], f"{CHANGED} ({self.path})"))
        return self.init_from

    def refuse_others(self, config: TransformerConfig, kind: str, precision: str) -> None:
        """Raises ConfigError if the model or the optimizer differs from the saved one.

        Args:
            kind: the optimizer's, `Optim.kind`.
            precision: the trainer's.
        """
        before = asdict(TransformerConfig.from_dict(self.state["config"]))
        refuse(
            Problem(f"model.config.{name}", value, f"it is {before[name]!r} in {self.path}")
            for name, value in asdict(config).items()
            if name not in ("attention_backend", "seq_length") and before[name] != value
        )
        groups = self.state["optimizer_states"][0]["param_groups"]
        saved, advice = kind_of(groups), "or use model.init_from instead"
        if saved != kind:
            message = f"is {kind}, but {self.path} was trained with {saved}; set that, {advice}"
            raise ConfigError(Problem("optim", message=message))
        if kind == "AdamW" and (halves := of_bfloat16(groups)) != (precision == "bf16-true"):
            dtype, others = ("bfloat16", "'bf16-true'") if halves else ("float32", "'bf16-mixed' or '32-true'")
            message = f"{self.path} was trained with {dtype} parameters; set {others}, {advice}"
            raise ConfigError(Problem("trainer.precision", precision, message))

    def warn_of_another_rate(self, optim: Optim, max_steps: int) -> None:
        """Warns if the learning rate jumps, as it does after a change of `max_steps`."""
        left_off = self.state["lr_schedulers"][0]["_last_lr"][0]
        goes_on = optim.lr * optim.lr_scheduler(self.step, max_steps, optim.lr)
        if abs(goes_on - left_off) > 0.01 * optim.lr:
            say(
                f"WARNING: with max_steps={max_steps} the learning rate goes on at {scientific(goes_on)}, not at "
                f"{scientific(left_off)}, where it left off"
            )


def data_checksums(data: PreTrainingDataModule | FineTuningDataModule, start: Start | None) -> Checksums:
    """The data's checksums; raises ConfigError if they differ from those in the checkpoint from which a run starts."""
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
            *(Problem("data", message=f"{each} since {start.path}") for each in changed),
            Problem("data.allow_changed", False, "set True to go on with other data, or use model.init_from instead"),
        )
    return checksums
