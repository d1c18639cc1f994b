"""AdamW with 8-bit moments: close to AdamW, saved and resumed bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fiddlehead import tasks
from fiddlehead.errors import ConfigError
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import AdamW
from tests.training.conftest import KillAfter, Killed, Parts, parameters, plan_of, rows
from tests.training.layouts import TRAINED, losses, train_here
from tests.training.ranks import on_ranks

Pretrain = Callable[..., RunDirectory]
LARGE: dict[str, Any] = {"hidden_size": 64, "vocab_size": 320, "state_bits": 8}
"""A model most of whose matrices are large enough to be 8 bits."""


@pytest.fixture
def eager() -> Iterator[None]:
    """Steps that are not compiled, which takes a minute on a CPU."""
    pytest.importorskip("torchao", reason="an extra")
    with torch.compiler.set_stance("force_eager"):
        yield


def test_a_moment_differs_by_at_most_what_its_codes_leave_out(eager: None) -> None:
    """A code has a sign and 7 bits of a dynamic exponent and fraction: half of the widest gap is 0.7 % of the scale."""
    gradients = [torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    made = {}
    for bits in (8, 32):
        parameter = nn.Parameter(torch.zeros(64, 64))
        optimizer = AdamW(lr=1e-3, state_bits=bits).optimizer([("weight", parameter)])
        for gradient in gradients:
            parameter.grad = gradient
            optimizer.step()
        made[bits] = optimizer.state[parameter]["exp_avg"]
    exact = made[32].view(-1, 256)
    found = made[8].dequantize().view(-1, 256)
    # Each of the 8 steps rounds once, and what was rounded before is multiplied with beta1.
    bound = 0.007 * exact.abs().amax(-1, keepdim=True) * sum(0.9**n for n in range(8))
    assert ((found - exact).abs() <= bound).all()
    assert not torch.equal(found, exact)


def test_the_losses_are_those_of_adamw_within_a_five_hundredth(eager: None, pretrain: Pretrain) -> None:
    losses = {}
    for bits in (8, 32):
        run = pretrain(name=str(bits), max_steps=30, lr=3e-3, **LARGE | {"state_bits": bits})
        losses[bits] = torch.tensor([float(loss) for (loss,) in rows(run, "loss") if loss])
    assert losses[8][-1] < losses[8][0] - 1
    torch.testing.assert_close(losses[8], losses[32], rtol=0.002, atol=0)
    assert not torch.equal(losses[8], losses[32])


def test_a_killed_run_goes_on_exactly(eager: None, pretrain: Pretrain) -> None:
    whole = pretrain(name="whole", **LARGE)
    with pytest.raises(Killed):
        pretrain(callbacks=[KillAfter(6)], **LARGE)
    resumed = pretrain(**LARGE)
    columns = ("step", "loss", "val_loss", "lr", "grad_norm")
    assert rows(resumed, *columns) == rows(whole, *columns)
    expected = parameters(whole, 12)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(resumed, 12).items())


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_was_saved_in_float32_gets_its_codes_again(eager: None, name: str) -> None:
    parameter = nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamW(state_bits=8).optimizer([("weight", parameter)])
    for seed in range(3):
        parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    moment = optimizer.state[parameter][name]
    saved = optimizer.state_dict()
    saved["state"][0] |= {name: moment.dequantize()}
    optimizer.load_state_dict(saved)
    again = optimizer.state[parameter][name]
    assert torch.equal(again.codes, moment.codes)
    torch.testing.assert_close(again.scale, moment.scale, rtol=1e-6, atol=0)


def train_eagerly(*arguments: Any, **changes: Any) -> None:
    with torch.compiler.set_stance("force_eager"):
        train_here(*arguments, **changes)


def test_ranks_go_on_from_what_one_process_saved_and_it_goes_on_from_theirs(
    eager: None, dataset: Path, tmp_path: Path
) -> None:
    changes = TRAINED | LARGE | {"max_steps": 8, "every_n_steps": 2, "val_check_interval": 4, "attention_sinks": True}
    train_here({}, dataset, tmp_path / "one", devices=1, **changes)
    train_here({}, dataset, tmp_path / "many", killed_after=3, devices=1, **changes)
    on_ranks(2, train_eagerly, {}, dataset, tmp_path / "many", killed_after=5, devices=2, **changes)
    train_here({}, dataset, tmp_path / "many", devices=1, **changes)
    found, expected = (losses(tmp_path / name / "run") for name in ("many", "one"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # shards begin where blocks do


def test_ranks_that_share_layers_save_whole_moments(eager: None, dataset: Path, tmp_path: Path) -> None:
    changes = TRAINED | LARGE | {"max_steps": 8, "every_n_steps": 2, "val_check_interval": 4}
    split = {"tensor_parallel": 2}
    on_ranks(2, train_eagerly, split, dataset, tmp_path / "whole", devices=2, **changes)
    train_here({}, dataset, tmp_path / "many", killed_after=3, devices=1, **changes)
    on_ranks(2, train_eagerly, split, dataset, tmp_path / "many", killed_after=5, devices=2, **changes)
    train_here({}, dataset, tmp_path / "many", devices=1, **changes)
    found, expected = (losses(tmp_path / name / "run") for name in ("many", "whole"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)  # other values share scales


def test_the_rate_that_is_logged_is_that_of_the_step(eager: None, pretrain: Pretrain) -> None:
    columns = ("step", "lr")
    assert rows(pretrain(name="8", **LARGE), *columns) == rows(pretrain(name="32", hidden_size=64), *columns)


def test_the_plan_counts_the_optimizer_state(eager: None, parts: Parts) -> None:
    made = parts(**LARGE)
    plan = plan_of(made)
    tasks.pretrain(**made)
    states = made["trainer"].optimizers[0].state_dict()["state"].values()
    moments = [value for state in states for name, value in state.items() if name != "step"]
    kept = [tensor for moment in moments for tensor in (moment.values() if isinstance(moment, dict) else [moment])]
    counted = sum(tensor.nbytes for tensor in kept if isinstance(tensor, torch.Tensor))
    assert plan.state_gib * 2**30 == counted + 8 * plan.parameters
    assert counted < 0.4 * 8 * plan.parameters


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:OptimState8bit does not implement:UserWarning"
)  # torchao's, for the compiler's cache
def test_a_compiled_step_is_the_same() -> None:
    pytest.importorskip("torchao", reason="an extra")
    made = []
    for stance in ("default", "force_eager"):
        parameter = nn.Parameter(torch.ones(64, 64))
        optimizer = AdamW(lr=1e-2, state_bits=8).optimizer([("weight", parameter)])
        with torch.compiler.set_stance(stance):
            for seed in range(3):
                parameter.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
                optimizer.step()
        made.append(parameter.detach())
    torch.testing.assert_close(*made, rtol=0, atol=1e-4)


def test_a_run_does_not_go_on_with_other_bits(pretrain: Pretrain, eager: None) -> None:
    pretrain(max_steps=2, **LARGE)
    with pytest.raises(ConfigError, match=r"^optim: is AdamW, but .* was trained with AdamW\(state_bits=8\); set that"):
        pretrain(max_steps=4, **LARGE | {"state_bits": 32})


def test_without_torchao_it_says_what_to_install(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.delitem(sys.modules, "fiddlehead.training.optim.adamw_8bit", raising=False)
    with pytest.raises(ConfigError, match=r"^optim\.state_bits=8: needs torchao: pip install 'fiddlehead\[torchao\]'"):
        pretrain(state_bits=8)


def test_runs_that_it_would_spoil_are_refused(parts: Parts) -> None:
    made = parts(state_bits=8, precision="bf16-true")
    with pytest.raises(ConfigError, match=r"^optim\.state_bits=8: trainer\.precision='bf16-true' would round"):
        plan_of(made)
    with pytest.raises(ConfigError, match=r"^state_bits=4: allowed: 8, 32"):
        AdamW(state_bits=4)  # type: ignore[arg-type]
