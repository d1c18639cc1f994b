"""A job says how its GPU differs from that of its plan."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fiddlehead import launch
from fiddlehead.errors import ConfigError
from fiddlehead.plan import verify
from fiddlehead.plan.cards import Card
from fiddlehead.plan.refusals import predict
from fiddlehead.plan.training import TrainingPlan
from fiddlehead.plan.verify import differences
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes.llama import llama32_1b

GPU = torch.device("cuda", 0)
H100, A100 = ("NVIDIA H100 80GB HBM3", 79.2), ("NVIDIA A100-SXM4-80GB", 79.2)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Simulates what CUDA says of a machine: the free memory of its GPUs, and whether they reach each other."""

    def with_facts(*, free: float = 78.0, peers: bool = True) -> None:
        facts = SimpleNamespace(
            mem_get_info=lambda device: (int(free * 2**30), 80 * 2**30),
            device_count=lambda: 2,
            can_device_access_peer=lambda own, other: peers,
        )
        monkeypatch.setattr(verify, "torch", SimpleNamespace(cuda=facts))  # Lightning must not see these GPUs

    with_facts()
    return with_facts


def planned(name: str, gib: float, gpus: int = 1, *edits: str) -> TrainingPlan:
    """The plan of a job whose GPU is such a device."""
    recipe = apply_overrides(llama32_1b(), [f"trainer.devices={gpus}", "trainer.num_nodes=1", *edits])
    return launch.plan(recipe, target=Card.of_device(name, int(gib * 2**30))).training


def test_the_planned_gpu_needs_no_word(machine):
    plan = planned(*H100)
    launched = predict(launch.plan(llama32_1b(), target="h100").training)
    assert differences(replace(launched, gpus=1), plan, GPU) == []
    assert differences(predict(plan), plan, GPU) == []
    assert differences(None, plan, GPU) == []


def test_another_gpu_and_another_number_of_them_are_said(machine):
    found = differences(replace(predict(planned(*A100)), gpus=8), planned(*H100), GPU)
    assert found == [
        "the plan was for NVIDIA A100-SXM4-80GB with 79.2 GiB, and this GPU is NVIDIA H100 80GB HBM3 with 79.2 GiB",
        "the plan was for 8 GPUs, and the run has 1",
    ]


def test_memory_that_others_have_is_said(machine):
    machine(free=12.0)
    (said,) = differences(None, planned(*H100), GPU)
    assert said.startswith("12.0 GiB of the GPU are free, and the run needs ")


def test_too_little_main_memory_is_said(machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "free_main_memory", lambda: 8 * 2**30)
    plans = [planned(*H100, gpus, "optim.state_offloading=true") for gpus in (1, 2)]
    assert differences(None, planned(*H100), GPU) == []
    assert differences(None, plans[0], GPU) == ["8.0 GiB of main memory are free, and 9.2 GiB are needed"]
    assert differences(None, plans[1], GPU) == []  # the other process has a machine of its own
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (said,) = differences(None, plans[1], GPU)
    assert said == "8.0 GiB of main memory are free, and 4.6 GiB are needed by each of 2 processes"


def test_gpus_without_a_link_are_said(machine):
    assert differences(None, planned(*H100, gpus=2), GPU) == []
    machine(peers=False)
    (said,) = differences(None, planned(*H100, gpus=2), GPU)
    assert said.startswith("GPU 0 cannot reach the memory of GPU 1")
    assert differences(None, planned(*H100), GPU) == []  # alone it needs none


def test_a_gpu_that_is_too_small_is_refused_for_a_run_that_was_launched(machine):
    small = planned("NVIDIA L4", 22.0)
    with pytest.raises(ConfigError, match="more than NVIDIA L4 has"):
        differences(predict(planned(*H100)), small, GPU)
    said = differences(replace(predict(planned(*H100)), despite=("memory",)), small, GPU)
    assert "more than NVIDIA L4 has" in said[0] and len(said) == 2
    assert "more than NVIDIA L4 has" in differences(None, small, GPU)[0]  # nobody has launched it
