"""The balancing loss of a mixture, against its definition and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fiddlehead.checkpoints.huggingface.convert import export_checkpoint, import_checkpoint
from fiddlehead.checkpoints.weights import load_transformer, open_weights
from fiddlehead.data.documents import borders
from fiddlehead.models import Transformer, TransformerConfig
from fiddlehead.models.moe import MoE
from tests.models.hf_families import FAMILIES, transformers

T, E, K = 12, 5, 2


def mixture() -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, vocab_size=31, seq_length=T, ffn_hidden_size=8,
        num_moe_experts=E, moe_router_topk=K, moe_aux_loss_coeff=0.3, init_method_std=0.5,
    )  # fmt: skip
    return Transformer(config)


def defined(model: Transformer, sequences: list[Tensor]) -> Tensor:
    """Megatron's definition, in float64 and one sequence at a time, weighed by its length."""
    scores: list[Tensor] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        scores.append(output.flatten(0, -2))

    hooks = [module.router.register_forward_hook(note) for module in model.modules() if isinstance(module, MoE)]
    total = torch.zeros((), dtype=torch.float64)
    for ids in sequences:
        scores.clear()
        model(ids[None])
        for logits in scores:
            probability = logits.double().softmax(dim=-1)
            counts = torch.bincount(logits.topk(K).indices.flatten(), minlength=E)
            total = total + len(ids) * 0.3 * E * (counts / (K * len(ids)) * probability.mean(dim=0)).sum()
    for hook in hooks:
        hook.remove()
    return total


def gradients(model: Transformer, loss: Tensor | None) -> Tensor:
    assert loss is not None
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([x.double().flatten() for x in found if x is not None])


@pytest.mark.parametrize("lengths", [[[12], [12]], [[5, 7], [12]], [[5, 4], [1, 6]], [[3], [9]]])
@pytest.mark.parametrize("packed", [True, False])
def test_it_is_that_of_each_sequence_alone_and_padding_is_none(lengths: list[list[int]], packed: bool) -> None:
    """Documents share rows, or each has a row of its own; what is left of a row is padding."""
    model, generator = mixture(), torch.Generator().manual_seed(1)
    documents = [torch.randint(31, (n,), generator=generator) for row in lengths for n in row]
    rows = lengths if packed else [[n] for row in lengths for n in row]
    ids, padding, after, left = torch.zeros(len(rows), T, dtype=torch.int64), [], [], iter(documents)
    for number, row in enumerate(rows):
        padding.append(torch.arange(T) >= sum(row))
        ids[number, : sum(row)] = torch.cat([next(left) for _ in row])
        after += [number * T + end for end in torch.tensor([*row, T - sum(row)]).cumsum(0).tolist()]
    expected = defined(model, documents)
    model(ids, **borders(torch.tensor(after), T), padding=torch.stack(padding))
    found = model.aux_loss()
    assert found is not None and found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected), rtol=1e-3, atol=1e-5)


def test_rows_are_sequences_of_their_own() -> None:
    model = mixture()
    ids = torch.randint(31, (3, T), generator=torch.Generator().manual_seed(1))
    expected = defined(model, list(ids))
    model(ids)
    found = model.aux_loss()
    assert found is not None and found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected), rtol=1e-3, atol=1e-5)


def test_there_is_no_balancing_loss_outside_training() -> None:
    model = mixture()
    ids = torch.zeros(1, T, dtype=torch.int64)
    model(ids)
    assert model.aux_loss() is not None
    model.eval()(ids)
    assert model.aux_loss() is None


def balancing(name: str, layers: int, folder: Path) -> tuple[Any, Transformer]:
    """A random model of transformers with this many layers, and what it is here."""
    settings = FAMILIES[name]()
    settings.num_hidden_layers, settings.router_aux_loss_coef = layers, 0.7
    if layers == 1 and getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[:1]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    theirs.save_pretrained(folder / "hf")
    import_checkpoint(str(folder / "hf"), folder / "ours", progress=False)
    return theirs, load_transformer(open_weights(folder / "ours")).train()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_it_is_transformers_in_a_layer_after_its_weight_is_converted(name: str, tmp_path: Path) -> None:
    theirs, ours = balancing(name, 1, tmp_path)
    ids = torch.randint(1, 61, (1, 13), generator=torch.Generator().manual_seed(1))
    expected = 0.7 * theirs.train()(ids, output_router_logits=True).aux_loss
    ours(ids)
    found = ours.aux_loss()
    assert found is not None
    assert (found / ids.numel()).item() == pytest.approx(expected.item(), rel=1e-5)
    (router,) = [p for n, p in theirs.named_parameters() if n.endswith(("gate.weight", "router.weight"))]
    (gradient,) = torch.autograd.grad(expected, router)
    (own,) = torch.autograd.grad(found / ids.numel(), ours.layers[0].mlp.router.weight)  # type: ignore[union-attr]
    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_it_is_the_mean_over_layers_of_transformers_and_its_weight_comes_back(name: str, tmp_path: Path) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    theirs, ours = balancing(name, FAMILIES[name]().num_hidden_layers, tmp_path)
    ids = torch.randint(1, 61, (1, 13), generator=torch.Generator().manual_seed(1))
    logits = theirs(ids, output_router_logits=True).router_logits
    each: Any = [load_balancing_loss_func((layer.view(13, -1),), 5, 2) for layer in logits]
    ours(ids)
    found = ours.aux_loss()
    assert len(each) > 1 and found is not None
    assert found.item() / 13 == pytest.approx(0.7 * torch.stack(each).mean().item(), rel=1e-5)
    export_checkpoint(tmp_path / "ours", tmp_path / "back", progress=False)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").router_aux_loss_coef == 0.7
