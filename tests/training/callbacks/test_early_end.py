"""Lightning's EarlyStopping ends a run at the same step, also one that was interrupted, on one rank or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer

from fiddlehead import job, tasks
from fiddlehead.errors import ConfigError
from fiddlehead.plan.callbacks import monitor_problems
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State
from fiddlehead.training import Parallel
from tests.training.conftest import KillAfter, Killed, make_parts, rows
from tests.training.ranks import on_ranks

Pretrain = Callable[..., RunDirectory]
SETTINGS: dict[str, Any] = {"val_check_interval": 1, "every_n_steps": 2, "lr": 0.2, "max_steps": 40, "keep_best": False}


def expected_end(losses: list[float], patience: int, min_delta: float) -> int:
    """The step of the validation after which nothing has improved for `patience` of them, counted from 1."""
    best, since = float("inf"), 0
    for step, loss in enumerate(losses, 1):
        best, since = (loss, 0) if loss < best - min_delta else (best, since + 1)
        if since == patience:
            return step
    return len(losses)


def losses(run: RunDirectory) -> list[float]:
    return [float(value) for _, value in rows(run, "step", "val_loss") if value]


def stopping(patience: int = 2) -> EarlyStopping:
    return EarlyStopping("val_loss", patience=patience, min_delta=0.01)


def test_a_run_ends_when_it_no_longer_improves_and_stays_ended(pretrain: Pretrain) -> None:
    run = pretrain(**SETTINGS, callbacks=[stopping()])
    found = losses(run)
    assert len(found) == expected_end(found, 2, 0.01) < 40
    said = f"ended early, at step {len(found)} of 40: Monitored metric val_loss did not improve in the last 2 records"
    assert run.early_end.startswith(said)
    assert (run.checkpoints / f"step-{len(found):08d}").exists()
    pretrain(**SETTINGS, callbacks=[stopping()])
    assert losses(run) == found and run.early_end.startswith(said)


@pytest.mark.parametrize("killed_after", range(1, 3))
def test_an_interrupted_run_ends_at_the_same_step(pretrain: Pretrain, killed_after: int) -> None:
    whole = pretrain(**SETTINGS, callbacks=[stopping()], name="whole")
    with pytest.raises(Killed):
        pretrain(**SETTINGS, callbacks=[stopping(), KillAfter(len(losses(whole)) - killed_after)])
    assert losses(pretrain(**SETTINGS, callbacks=[stopping()])) == losses(whole)


def stop_on_two(dataset: Path, runs: Path, killed_after: int) -> None:
    """On the ranks that call this; the run is killed, and goes on."""
    settings = SETTINGS | {"devices": 2, "global_batch_size": 8}
    for callbacks in ([KillAfter(killed_after)], []):
        parts = make_parts(dataset, runs, **settings, strategy=Parallel(), callbacks=[stopping(), *callbacks])
        if callbacks:
            with pytest.raises(Killed):
                tasks.pretrain(**parts)
        else:
            tasks.pretrain(**parts)


@pytest.mark.slow
def test_two_ranks_end_at_the_same_step(dataset: Path, tmp_path: Path) -> None:
    on_ranks(2, stop_on_two, dataset, tmp_path, 2)
    found = losses(RunDirectory(tmp_path / "run"))
    assert len(found) == expected_end(found, 2, 0.01) < 40


class Odd(Callback):
    """Its state is not plain."""

    def state_dict(self) -> dict[str, Any]:
        return {"file": Path("x")}


def test_the_state_of_a_callback_that_no_checkpoint_can_keep_is_said(
    pretrain: Pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(max_steps=8, callbacks=[Odd()])
    assert capsys.readouterr().out.count("WARNING: checkpoints do not keep the state of Odd") == 1


def test_the_status_says_why_a_run_ended_early(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert job.execute(run, lambda: run.write_early_end("ended early, at step 3")) == 0
    status = run.written_status()
    assert status is not None and (status.state, status.reason) == (State.SUCCEEDED, "ended early, at step 3")
    assert job.execute(run, lambda: None) == 0
    status = run.written_status()
    assert status is not None and status.reason == ""


@pytest.mark.parametrize(
    ("callbacks", "edits", "said"),
    [
        ([EarlyStopping("val_los")], {}, r"callbacks\[0\].monitor='val_los': is not .*; did you mean 'val_loss'\?"),
        (
            [Timer(), EarlyStopping("mine")],
            {},
            r"callbacks\[1\].monitor='mine': .* allowed: val_loss, val_nats_per_byte",
        ),
        ([stopping()], {"val_samples": 0}, r"callbacks\[0\].monitor='val_loss': is never logged, because data.val_sam"),
        ([EarlyStopping("mine", strict=False)], {}, ""),
        ([EarlyStopping("mine"), KillAfter(1)], {}, ""),
        ([EarlyStopping("val_nats_per_byte")], {}, ""),
    ],
)
def test_a_metric_that_is_never_logged_is_refused_before_training(
    parts: Callable[..., dict[str, Any]], callbacks: list[Callback], edits: dict[str, Any], said: str
) -> None:
    made = parts(**edits, callbacks=callbacks)
    problems = monitor_problems(made["trainer"], made["model"], made["data"])
    if said:
        with pytest.raises(ConfigError, match=said):
            tasks.pretrain(**made)
    else:
        assert not problems
