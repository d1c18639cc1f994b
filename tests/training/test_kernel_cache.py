"""The next run finds the kernels that a run compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.runtime import cache_dir_utils

from fiddlehead.environment import kernel_folders
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training.kernel_cache import keep_compiled_kernels
from fiddlehead.training.optim import AdamW
from tests.training.conftest import KillAfter, Killed

Pretrain = Callable[..., RunDirectory]
COMPILE = """
import json, sys
from pathlib import Path
from torch._dynamo.utils import counters
from fiddlehead import tasks
from tests.training.conftest import make_parts

dataset, runs = map(Path, sys.argv[1:])
tasks.pretrain(**make_parts(dataset, runs, compile="layers", max_steps=1, val_samples=0, num_layers=1))
print(json.dumps(counters))
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_second_process_finds_what_the_first_compiled(dataset: Path, tmp_path: Path) -> None:
    """Also where each has a /tmp of its own."""
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        environment = {name: value for name, value in os.environ.items() if name not in kernel_folders()}
        environment |= {"FIDDLEHEAD_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / name)}
        command = [sys.executable, "-c", COMPILE, str(dataset), str(tmp_path / name / "runs")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = found
    assert first["inductor"]["fxgraph_cache_miss"] >= 2  # forward and backward
    assert second["aot_autograd"]["autograd_cache_hit"] == first["aot_autograd"]["autograd_cache_miss"]
    assert not second["inductor"].get("fxgraph_cache_miss")


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in kernel_folders():
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path / "cache"))


def test_pytorch_s_own_choice_is_replaced(unset: None, tmp_path: Path) -> None:
    """It sets the variable itself, when Lightning imports it."""
    assert cache_dir_utils.cache_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    keep_compiled_kernels()
    assert cache_dir_utils.cache_dir() == str(tmp_path / "cache" / "torchinductor")


def test_a_cache_variable_that_is_set_is_kept(unset: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    keep_compiled_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "torchinductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize(
    ("settings", "kept"), [({}, False), ({"compile": "layers"}, True), ({"precision": "bf16-true"}, False)]
)
def test_only_a_run_that_compiles_sets_it(
    unset: None, pretrain: Pretrain, settings: dict[str, str], kept: bool
) -> None:
    found: dict[str, bool] = {}

    class Look(KillAfter):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found.update({name: name in os.environ for name in kernel_folders()})

    with pytest.raises(Killed):
        pretrain(callbacks=[Look(0)], **settings)
    assert found == dict.fromkeys(kernel_folders(), kept)


@pytest.mark.parametrize(("bits", "device", "kept"), [(32, "cpu", False), (32, "cuda", True), (8, "cpu", True)])
def test_so_does_one_whose_optimizer_has_compiled_kernels(bits: Any, device: str, kept: bool) -> None:
    assert AdamW(state_bits=bits).compiles(torch.device(device)) == kept
