"""Weights that FSDP2 gathers in float8: the same losses and checkpoints as with weights that it gathers whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fiddlehead.training import Muon
from tests.training.distributed.test_parallel import tensors_of
from tests.training.layouts import losses, train

FLOAT8 = {"fp8": "tensorwise", "hidden_size": 32}  # so that all products have sizes in 16s


@pytest.fixture(autouse=True)
def torchao() -> None:
    pytest.importorskip("torchao", reason="an extra")


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("fsdp-2", {}),
        pytest.param("fsdp-2", {"precision": "bf16-true"}, marks=pytest.mark.long),
        pytest.param("fsdp-2", {"optim": Muon, "activation_checkpointing": "full"}, marks=pytest.mark.long),
        pytest.param("fsdp-2", {"state_bits": 8, "hidden_size": 64}, marks=pytest.mark.long),
        pytest.param("fsdp-4", {}, marks=pytest.mark.long),
        pytest.param("hsdp-2x2", {"separate_documents": True}, marks=pytest.mark.long),
        pytest.param("cp-2", {}, marks=pytest.mark.long),
        pytest.param("pp-2-fsdp-2", {"num_layers": 4}, marks=pytest.mark.long),
        pytest.param("ep-2", {"num_moe_experts": 4}, marks=pytest.mark.long),
    ],
)
def test_the_losses_and_checkpoints_are_those_of_whole_weights(
    dataset: Path, tmp_path: Path, layout: str, changes: dict[str, Any]
) -> None:
    """Ranks cast their shards by the largest weight of all of them: to the values of the whole weight, cast."""
    whole = train(layout, dataset, tmp_path / "whole", **(FLOAT8 | changes))
    gathered = train(layout, dataset, tmp_path / "gathered", **(FLOAT8 | changes), fp8_all_gather=True)
    assert torch.equal(losses(gathered), losses(whole))
    for kind in ("model", "optimizer"):
        expected, found = (tensors_of(folder, kind) for folder in (whole, gathered))
        assert found.keys() == expected.keys()
        for name, tensor in (each for each in expected.items() if each[1].shape):
            assert found[name].dtype == tensor.dtype, name
            # The lower bits of weights, which are stored as bfloat16, may be those of no number.
            assert torch.equal(found[name].load().view(torch.uint8), tensor.load().view(torch.uint8)), name


@pytest.mark.slow
def test_in_mixed_precision_they_are_rounded_once_and_a_run_goes_on_with_either(dataset: Path, tmp_path: Path) -> None:
    """Shards are cast from float32, and not from bfloat16. A checkpoint does not depend on what is gathered."""
    settings = FLOAT8 | {"precision": "bf16-mixed"}
    whole = train("fsdp-2", dataset, tmp_path / "whole", **settings)
    run = tmp_path / "gathered"
    train("fsdp-2", dataset, run, **settings, fp8_all_gather=True, killed_after=4)
    gathered = train("fsdp-2", dataset, run, **settings, fp8_all_gather=True)
    torch.testing.assert_close(losses(gathered)[:, 0], losses(whole)[:, 0], rtol=5e-3, atol=0)
    assert not torch.equal(losses(gathered), losses(whole))
    uninterrupted = train("fsdp-2", dataset, tmp_path / "again", **settings, fp8_all_gather=True)
    assert torch.equal(losses(gathered), losses(uninterrupted))


def test_one_device_gathers_nothing(dataset: Path, tmp_path: Path) -> None:
    plain = train("1", dataset, tmp_path / "plain", **FLOAT8)
    other = train("1", dataset, tmp_path / "other", **FLOAT8, fp8_all_gather=True)
    assert torch.equal(losses(plain), losses(other))
