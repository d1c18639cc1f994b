"""Muon against float64 arithmetic and PyTorch's Muon; the parameters that it trains, and the runs that refuse it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fiddlehead import tasks
from fiddlehead.errors import ConfigError
from fiddlehead.models import LoRA, Transformer, TransformerConfig
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import AdamW, CosineAnnealing, LanguageModel, Muon
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.optim.muon import MuonWithAdamW, orthogonalize
from tests.training.conftest import Parts, plan_of, rows

Array = np.ndarray[Any, np.dtype[np.float64]]


def newton_schulz(matrix: Array) -> Array:
    """Five steps of the quintic of Jordan et al., in float64, by the singular values themselves."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ np.diag(s) @ v


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 7), (3, 12, 20), (2, 20, 12)])
def test_matrices_become_orthogonal_as_in_float64(shape: tuple[int, ...]) -> None:
    matrices = draw(*shape)
    found = orthogonalize(matrices)
    expected = [newton_schulz(each) for each in matrices.double().view(-1, *shape[-2:]).numpy()]
    np.testing.assert_allclose(found.view(-1, *shape[-2:]).numpy(), np.stack(expected), atol=2e-5)


def test_singular_values_come_to_about_one_and_nothing_stays_nothing() -> None:
    values = torch.linalg.svdvals(orthogonalize(draw(32, 96)))
    assert values.min() > 0.65 and values.max() < 1.25
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6))


SETTINGS: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.3}


def trained(make: Callable[[nn.Parameter], torch.optim.Optimizer], *shape: int, steps: int = 6) -> torch.Tensor:
    """A matrix after some steps, whose rate is another in each."""
    parameter = nn.Parameter(draw(*shape))
    optimizer = make(parameter)
    for step in range(steps):
        parameter.grad = draw(*shape, seed=step + 1)
        optimizer.param_groups[0]["lr"] = SETTINGS["lr"] * (step + 1)
        optimizer.step()
    return parameter.detach()


def ours(parameter: nn.Parameter) -> torch.optim.Optimizer:
    return MuonWithAdamW([{"params": [parameter], "rows": None, **SETTINGS}])


def pytorchs(parameter: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.Muon([parameter], adjust_lr_fn="match_rms_adamw", **SETTINGS)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_steps_are_those_of_pytorch_s_muon(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To its own precision, which is bfloat16's; and to float32's where its products are exact."""
    found, start = trained(ours, *shape), draw(*shape)
    assert (found - trained(pytorchs, *shape)).norm() < 0.03 * (found - start).norm()

    def exact(gradient: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.from_numpy(newton_schulz(gradient.double().numpy())).float()

    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", exact)
    torch.testing.assert_close(found, trained(pytorchs, *shape), atol=1e-5, rtol=0)


CONFIGS = {
    "dense": {},
    "experts": {"num_moe_experts": 3, "add_bias_linear": True, "attention_sinks": True},
    "plain": {"activation": "gelu", "normalization": "LayerNorm", "position_embedding_type": "learned_absolute"},
}


def model(name: str) -> Transformer:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2}
    return Transformer(TransformerConfig(**shape, vocab_size=11, seq_length=8, ffn_hidden_size=24, **CONFIGS[name]))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_matrix_of_the_layers_is_made_orthogonal_by_itself_and_adamw_does_the_rest(name: str) -> None:
    transformer = model(name)
    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    theirs = copy.deepcopy(transformer)
    ids = torch.arange(16).view(2, 8) % 11
    for each in (transformer, theirs):
        each(ids, labels=ids).backward()
    optim = Muon(lr=0.02, weight_decay=0.5, adamw_lr=0.01)
    optim.optimizer(list(transformer.named_parameters()), transformer.fused_rows()).step()
    AdamW(lr=0.01, weight_decay=0.5).optimizer(list(theirs.named_parameters())).step()
    expected = dict(theirs.named_parameters())
    muon = 0
    for path, parameter in transformer.named_parameters():
        parts = path.split(".")
        if parts[0] != "layers" or parts[-1] != "weight" or "norm" in path:
            assert torch.equal(parameter, expected[path]), path
            continue
        muon += 1
        matrices = {"linear_qkv": [16, 8, 8], "linear_fc1": [24, 24]}.get(parts[-2], [parameter.shape[-2]])
        if name == "plain" and parts[-2] == "linear_fc1":
            matrices = [24]
        gradient, start = parameter.grad, before[path] * (1 - 0.02 * 0.5)
        assert gradient is not None
        for own, g, w in zip(*(t.split(matrices, dim=-2) for t in (parameter, gradient, start)), strict=True):
            flat = [t.detach().double().reshape(-1, *own.shape[-2:]) for t in (own, g, w)]
            for new, grad, old in zip(*flat, strict=True):
                step = 0.02 * 0.2 * max(new.shape) ** 0.5 * newton_schulz(grad.numpy())
                np.testing.assert_allclose(new.numpy(), old.numpy() - step, atol=1e-5, err_msg=path)
    assert muon == (10 if name == "experts" else 8)


def test_an_expert_without_tokens_only_decays() -> None:
    parameter = nn.Parameter(draw(2, 4, 6))
    before = parameter.detach().clone()
    parameter.grad = torch.cat([draw(1, 4, 6), torch.zeros(1, 4, 6)])
    ours(parameter).step()
    assert torch.equal(parameter[1], before[1] * (1 - 0.01 * 0.3)) and parameter.isfinite().all()


def test_one_schedule_is_a_factor_on_both_rates() -> None:
    optim = Muon(lr=0.4, adamw_lr=0.1, lr_scheduler=CosineAnnealing(warmup_steps=4))
    built = optim.build(model("dense").named_parameters(), 10)
    for _ in range(2):
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
    groups = built["optimizer"].param_groups
    assert ["momentum" in group for group in groups] == [True, False, False]
    assert [group["lr"] for group in groups] == pytest.approx([0.3, 0.075, 0.075])


def test_the_loss_falls_faster_than_without(pretrain: Callable[..., RunDirectory]) -> None:
    """With the rate of AdamW, as its updates have the same size."""
    losses = {}
    for optim in (AdamW, Muon):
        run = pretrain(name=optim.__name__, optim=optim, max_steps=40)
        losses[optim.__name__] = float(rows(run, "val_loss")[-1][0])
    assert losses["Muon"] < losses["AdamW"] < 4


def test_the_plan_counts_the_optimizer_state(parts: Parts) -> None:
    made = parts(optim=Muon)
    plan = plan_of(made)
    tasks.pretrain(**made)
    kept = made["trainer"].optimizers[0].state_dict()["state"].values()
    counted = sum(t.nbytes for state in kept for name, t in state.items() if name != "step")
    assert plan.state_gib * 2**30 == counted + 8 * plan.parameters


def problems(made: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        plan_of(made)
    return error.value.problems


def test_runs_that_it_would_spoil_are_refused(parts: Parts, pretrain: Callable[..., RunDirectory]) -> None:
    (problem,) = problems(parts(optim=Muon, precision="bf16-true"))
    assert problem.startswith(
        "optim='Muon': trainer.precision='bf16-true' would round small steps away; set 'bf16-mixed' "
    )
    start = pretrain(name="start")
    made = parts(optim=Muon)
    made["model"] = LanguageModel(init_from=start.path, lora=LoRA())
    (problem,) = problems(made)
    assert problem.startswith("optim='Muon': adapters are factors of a change")
    assert not Muon().problems("bf16-mixed", Sizes(data=2, replicate=1, tensor=2, pipeline=2), adapters=False)


def test_a_run_does_not_go_on_with_another_optimizer(pretrain: Callable[..., RunDirectory]) -> None:
    for before, after in ((AdamW, Muon), (Muon, AdamW)):
        names = before.__name__, after.__name__
        pretrain(name=names[0], optim=before, max_steps=2)
        with pytest.raises(
            ConfigError, match=f"^optim: is {names[1]}, but .*step-00000002 was trained with {names[0]};"
        ):
            pretrain(name=names[0], optim=after, max_steps=4)


def test_values_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        Muon(lr=-1.0, momentum=1.0, adamw_lr=0.0)
    assert [problem.split("=")[0] for problem in error.value.problems] == ["lr", "momentum", "adamw_lr"]
