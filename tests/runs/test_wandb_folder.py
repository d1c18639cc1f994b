"""Folders of W&B: `offline/run-abc.wandb` was written by Lightning's logger and wandb 0.31 in 30 steps."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from fiddlehead.errors import ConfigError
from fiddlehead.runs import open_record

OFFLINE = Path(__file__).parent / "offline"


def test_an_offline_run_has_its_steps_its_metrics_and_its_configuration():
    record = open_record(str(OFFLINE))
    assert record.name == "of W&B" and record.recipe == {"optim": "m:AdamW", "optim.lr": 0.001} and not record.problems
    assert record.history.points("loss") == (list(range(1, 31)), [3 - step / 20 for step in range(1, 31)])
    assert record.history.points("val_loss") == ([10, 20, 30], [3.5, 3.0, 2.5])
    assert record.history.curve("val_loss", "tokens")[0] == [1000, 2000, 3000]


@pytest.mark.parametrize("size", [10, 5000, 12_000])
def test_what_was_written_before_a_crash_is_read(tmp_path: Path, size: int):
    (tmp_path / "run-abc.wandb").write_bytes((OFFLINE / "run-abc.wandb").read_bytes()[:size])
    steps = list(dict.fromkeys(open_record(str(tmp_path)).history.steps))
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == {10: 0, 5000: 11}.get(size, len(steps))


def test_a_record_may_be_longer_than_a_block(tmp_path: Path):
    message = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
    message.run.display_name = "n" * 100_000
    text, pieces, place = message.SerializeToString(), b":W&B\xe1\xbe\x00", 7
    start = 0
    while start < len(text):
        piece = text[start : start + 32768 - place % 32768 - 7]
        kind = 2 if start == 0 else 4 if start + len(piece) == len(text) else 3
        pieces += struct.pack("<IHB", 0, len(piece), kind) + piece
        start, place = start + len(piece), place + 7 + len(piece)
    (tmp_path / "run-x.wandb").write_bytes(pieces)
    assert open_record(str(tmp_path / "run-x.wandb")).name == "n" * 100_000


@pytest.mark.parametrize(("content", "said"), [(b"", "is not a file of W&B"), (b"step,loss\n", "is not a file of W&B")])
def test_another_file_is_refused(tmp_path: Path, content: bytes, said: str):
    (tmp_path / "run-x.wandb").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        open_record(str(tmp_path))


def test_damage_is_said(tmp_path: Path):
    content = bytearray((OFFLINE / "run-abc.wandb").read_bytes())
    content[6000:6100] = b"\xff" * 100
    shutil.copy(OFFLINE / "run-abc.wandb", tmp_path)
    (tmp_path / "run-abc.wandb").write_bytes(content)
    (problem,) = open_record(str(tmp_path)).problems
    assert "is damaged after" in problem
