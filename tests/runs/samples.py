"""Run directories for the tests of looking at runs, written as a launch and a job would."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status

HOSTILE = "<script>alert(1)</script>\"'&"
"""A text that must not reach a page as it is."""
RECIPE = """\
# fiddlehead recipe, format 1
_target_: fiddlehead.tasks:pretrain
_partial_: true
data: {{paths: {data}, seq_length: 32}}
optim:
  _target_: fiddlehead.training:AdamW
  lr: {lr}
log: {{name: {name}}}
"""
START = 1_790_000_000.0
"""When each run began, in seconds since the epoch."""


def made(folder: Path, name: str, *, lr: float = 0.001, steps: int = 40, **more: Any) -> RunDirectory:
    """A run that has succeeded; `more` are fields of its environment."""
    run = RunDirectory(folder / "runs" / name)
    run.path.mkdir(parents=True)
    run.recipe.write_text(RECIPE.format(lr=lr, name=json.dumps(name), data=json.dumps(more.pop("data", "corpus"))))
    run.command.write_text("fiddlehead pretrain -f tiny\n")
    machine = {"git": {"revision": "a" * 40, "patch": ""}, "packages": {"torch": "2.13.0"}, "host": "n1", "cpus": 8}
    run.environment.write_text(json.dumps({**machine, **more}))
    run.write_status(Status(State.SUCCEEDED, host="n1", started=START, ended=START + 3600, exit_code=0))
    rows = ["step,loss,val_loss,lr,tokens,tokens_per_s,memory_gib,seconds_per_step,seconds_data,seconds_forward"]
    for step in range(1, steps + 1):
        loss = 2 + math.exp(-step * lr * 50)
        rows.append(f"{step},{loss!r},,{lr},{step * 256},2560,1.5,0.1,0.02,0.05")
        if step % 20 == 0:
            rows.append(f"{step},,{loss + 0.5!r},,,,,,,")
    run.metrics.write_text("\n".join(rows) + "\n")
    return run
