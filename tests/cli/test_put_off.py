"""A plan is made without the packages that Lightning imports and a plan does not need; whoever needs them has them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from fiddlehead.attention import attend

PROGRAM = """
import sys
sys.argv = ["fiddlehead", "plan", "llama32_1b", "trainer.devices=1", "--gpu", "h100"]
from fiddlehead.cli import main
try:
    main()
except SystemExit as exit:
    assert not exit.code
NAMES = ("torch._dynamo", "torchmetrics", "transformers", "matplotlib")
print("imported:", [name for name in NAMES if name in sys.modules])

import torch
from lightning.fabric.wrappers import _unwrap_compiled
from lightning.pytorch.core.module import Metric
linear = torch.nn.Linear(1, 1)
assert _unwrap_compiled(linear) == (linear, None)
compiled = torch.compile(linear)
assert _unwrap_compiled(compiled)[0] is linear and torch._dynamo.config
import torchmetrics
assert torchmetrics.Metric is Metric and torchmetrics.utilities.imports and torchmetrics.functional
mean = torchmetrics.MeanMetric()
assert isinstance(mean, Metric)
mean.update(1.0)
assert mean.plot()
"""


def test_a_plan_imports_no_compiler_and_no_metrics_and_both_are_whole_when_they_are_used(tmp_path: Path) -> None:
    """In a new interpreter, without the file of the tests that leaves packages out."""
    src = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": src, "MPLBACKEND": "agg"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert "fits: h100" in run.stdout and run.stdout.endswith("imported: []\n")


def test_the_choice_of_a_kernel_is_marked_as_the_compiler_marks_constants() -> None:
    module = sys.modules[attend.__module__]
    assert torch.compiler.assume_constant_result(lambda: None).__dict__ == module._serving_while_tracing.__dict__
