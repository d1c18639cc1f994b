"""Which runs take quack's feed-forward, and that they learn the same. Its kernels are stand-ins: their definitions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fiddlehead import tasks
from fiddlehead.attention import Package, Target
from fiddlehead.errors import ConfigError
from fiddlehead.models import LoRA, TransformerConfig, adapted_mlp, gated_mlp, mlp_choice, speed
from fiddlehead.training import LanguageModel, Parallel, PreferenceModel
from fiddlehead.training.distributed.sizes import Sizes
from fiddlehead.training.feed_forward import choose_mlp
from tests.models.test_gated_mlp import CONFIG, defined_gradient, defined_product
from tests.training.conftest import Parts, make_parts
from tests.training.layouts import losses
from tests.training.ranks import on_ranks
from tests.training.test_finetune import tuning

FOUND = Package(gated_mlp.OLDEST)
WITHOUT_KERNELS = "aot_eager_decomp_partition"
"""The compiler's first half, which takes seconds."""
HOPPER = Target.gpu("h100")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """quack is installed."""
    monkeypatch.setattr(gated_mlp, "installed", lambda: FOUND)


def stand_in(patch: pytest.MonkeyPatch) -> list[int]:
    """Puts definitions in the place of quack on this CPU; the list has the rows of each call."""
    rows: list[int] = []

    def product(x: torch.Tensor, w1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows.append(len(x))
        return defined_product(x, w1)

    patch.setattr(gated_mlp, "_product", product)
    patch.setattr(gated_mlp, "_gradient", defined_gradient)
    patch.setattr(gated_mlp, "installed", lambda: FOUND)
    patch.setattr(gated_mlp, "tried", lambda: (FOUND, 0.0))
    patch.setattr(mlp_choice, "why_not_there", lambda target: None)
    return rows


def trained(dataset: Path, runs: Path, **changes: Any) -> list[int]:
    """Trains with the stand-ins; the rows of each call of the product."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rows = stand_in(patch)
        patch.setattr(torch, "compile", partial(torch.compile, backend=WITHOUT_KERNELS))
        tasks.pretrain(**make_parts(dataset, runs, precision="bf16-mixed", **changes))
        return rows


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": "full"},
        {"compile": "layers"},
        {"compile": "layers", "activation_checkpointing": "full"},
        {"compile": "model"},
    ],
    ids=str,
)
def test_the_losses_are_pytorch_s(
    dataset: Path, tmp_path: Path, of_pytorch: torch.Tensor, changes: dict[str, Any]
) -> None:
    assert set(trained(dataset, tmp_path, **changes)) == {64}
    found = losses(tmp_path / "run")
    assert not torch.equal(found, of_pytorch), "the same rounding, so perhaps the same kernels"
    torch.testing.assert_close(found[:, 0], of_pytorch[:, 0], rtol=2e-3, atol=0)


@pytest.fixture(scope="module")
def of_pytorch(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The losses with PyTorch's feed-forward, in layers that are neither compiled nor computed again."""
    folder = tmp_path_factory.mktemp("torch")
    assert trained(dataset, folder, mlp_backend="torch") == []
    return losses(folder / "run")


@pytest.mark.parametrize(
    ("sizes", "changes", "tokens"),
    [
        ({}, {}, 32),
        ({"tensor_parallel": 2}, {}, 32),
        pytest.param({"tensor_parallel": 2}, {"compile": "layers"}, 32, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_ranks_learn_what_one_process_does(
    dataset: Path, tmp_path: Path, sizes: dict[str, int], changes: dict[str, Any], tokens: int
) -> None:
    batch: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2}
    strategy = Parallel(**sizes)
    rows = on_ranks(2, trained, dataset, tmp_path / "two", devices=2, strategy=strategy, **batch, **changes)
    assert [set(each) for each in rows] == [{tokens}, {tokens}]
    trained(dataset, tmp_path / "one", **batch)
    found, expected = losses(tmp_path / "two" / "run"), losses(tmp_path / "one" / "run")
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("settings", "sizes", "words"),
    [
        ({"fp8": "tensorwise"}, Sizes(1, 1), "fp8='tensorwise'"),
        ({"tiled_mlp": 64, "compile": "layers"}, Sizes(1, 1), "tiled_mlp"),
        ({"activation_checkpointing": "selective"}, Sizes(1, 1), "activation_checkpointing='selective'"),
        ({"activation_checkpointing": 0.5, "compile": "layers"}, Sizes(1, 1), "activation_checkpointing=0.5"),
        ({}, Sizes(7, 1, tensor=7), "ffn_hidden_size=256 over tensor_parallel=7"),
        ({}, Sizes(2, 1, pipeline=2), "pipeline_parallel"),
    ],
)
def test_settings_that_change_the_products_keep_pytorch_s(
    found: None, settings: dict[str, Any], sizes: Sizes, words: str
) -> None:
    config = TransformerConfig(**CONFIG)
    model = LanguageModel(config, **settings)
    choice = choose_mlp(model, "bf16-mixed", sizes, HOPPER)
    assert choice.backend == "torch"
    assert choice.why_not.startswith(words)
    assert not [each for each in model.problems("bf16-mixed", sizes) if each.path == "model.mlp_backend"]
    asked = LanguageModel(config, mlp_backend="quack", **settings)
    (problem,) = (each for each in asked.problems("bf16-mixed", sizes) if each.path == "model.mlp_backend")
    assert words in str(problem)


ADAPTED: dict[str, Any] = {"lora": LoRA(), "init_from": "x"}


@pytest.mark.parametrize(
    ("settings", "sizes", "words"),
    [
        ({"mlp_backend": "quack", **ADAPTED}, Sizes(1, 1), "lora: adapters change its products; 'triton' has kernels"),
        ({"mlp_backend": "triton"}, Sizes(1, 1), "lora=None: its kernels are for adapters; 'quack' is for models with"),
        ({**ADAPTED, "lora": LoRA(dropout=0.1)}, Sizes(1, 1), "lora.dropout=0.1: only 0"),
        ({**ADAPTED, "tiled_mlp": 64, "compile": "layers"}, Sizes(1, 1), "tiled_mlp"),
        ({**ADAPTED, "activation_checkpointing": "selective"}, Sizes(1, 1), "activation_checkpointing='selective'"),
        (ADAPTED, Sizes(2, 1, tensor=2), "tensor_parallel=2"),
        (ADAPTED, Sizes(2, 1, pipeline=2), "pipeline_parallel"),
    ],
)
def test_adapters_have_kernels_of_their_own(
    found: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], sizes: Sizes, words: str
) -> None:
    monkeypatch.setattr(adapted_mlp, "installed", lambda: Package("3.6.0"))
    config = TransformerConfig(**CONFIG)
    for recompute in (None, "full"):
        model = LanguageModel(config, activation_checkpointing=recompute, **ADAPTED)
        assert str(choose_mlp(model, "bf16-mixed", Sizes(4, 1), HOPPER)) == "triton"
    asked = LanguageModel(config, **{"mlp_backend": "triton", **settings})
    choice = choose_mlp(asked, "bf16-mixed", sizes, HOPPER)
    assert choice.backend == "torch"
    assert choice.why_not.startswith(words)
    (problem,) = (each for each in asked.problems("bf16-mixed", sizes) if each.path == "model.mlp_backend")
    assert words in str(problem)


def test_a_run_with_adapters_learns_the_same_with_their_kernels(
    pretrain: Callable[..., Any], parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pretrain(max_steps=2)
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": "fern moss"}) + "\n" for n in range(19)))
    monkeypatch.setattr(adapted_mlp, "installed", lambda: Package("3.6.0"))
    monkeypatch.setattr(adapted_mlp, "tried", lambda: (Package("3.6.0"), 0.0))
    monkeypatch.setattr(mlp_choice, "why_not_there", lambda target: None)
    calls: list[int] = []
    compute = adapted_mlp.adapted_mlp
    monkeypatch.setattr(speed, "adapted_mlp", lambda x, *rest: calls.append(x.shape[0]) or compute(x, *rest))
    found = []
    for backend in ("torch", "auto"):
        model = LanguageModel(init_from=base.path, lora=LoRA(rank=3), mlp_backend=backend)
        run = tasks.finetune(**tuning(parts, model, path, max_steps=6, precision="bf16-mixed", name=backend))
        assert bool(calls) == (backend == "auto")
        found.append(losses(run.path)[:, 0])
    torch.testing.assert_close(*found, rtol=2e-3, atol=0)


@pytest.mark.parametrize("sizes", [Sizes(1, 1), Sizes(8, 8), Sizes(4, 1, context=2), Sizes(4, 2, tensor=2)])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_others_take_quack_s(found: None, sizes: Sizes, precision: str, recompute: Any) -> None:
    config = TransformerConfig(**CONFIG)
    model = LanguageModel(config, activation_checkpointing=recompute)
    assert str(choose_mlp(model, precision, sizes, HOPPER)) == "quack"
    torch_s = LanguageModel(config, activation_checkpointing=recompute, mlp_backend="torch")
    assert str(choose_mlp(torch_s, precision, sizes, HOPPER)) == "torch"


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mlp_backend='quak'.*'quack'"):
        LanguageModel(TransformerConfig(**CONFIG), mlp_backend="quak")  # type: ignore[arg-type]


def test_a_run_that_cannot_have_what_it_names_is_refused(parts: Parts) -> None:
    with pytest.raises(ConfigError, match=r"model\.mlp_backend='quack': cannot compute this .*: needs a Hopper"):
        tasks.pretrain(**parts(mlp_backend="quack", precision="bf16-mixed"))


@pytest.mark.parametrize(
    ("changes", "precision"),
    [({"activation": "geglu"}, "bf16-mixed"), ({"add_bias_linear": True}, "bf16-mixed"), ({}, "32-true")],
)
def test_what_no_gpu_can_is_refused_also_where_the_gpu_is_not_known(changes: dict[str, Any], precision: str) -> None:
    model = LanguageModel(TransformerConfig(**(CONFIG | changes)), mlp_backend="quack")
    assert [each.path for each in model.problems(precision, Sizes(1, 1))] == ["model.mlp_backend"]


def test_a_reference_rounds_as_the_model_does(
    pretrain: Callable[..., Any], parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pretrain(max_steps=4, num_layers=6)
    rows = stand_in(monkeypatch)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": "?", "chosen": "fern", "rejected": "moss"}) + "\n" for _ in range(9)))
    model = PreferenceModel(init_from=base.path)
    run = tasks.finetune(**tuning(parts, model, path, max_steps=1, precision="bf16-true"))
    assert rows
    assert float(losses(run.path)[0, 0]) == pytest.approx(0.693147, abs=1e-5)  # -log sigmoid(0)


def test_a_run_says_that_a_broken_package_is_not_used(
    pretrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    monkeypatch.setattr(gated_mlp, "tried", lambda: (Package(gated_mlp.OLDEST, "its products fail: TypeError"), None))
    with pytest.warns(UserWarning, match="PyTorch computes the feed-forward: quack-kernels .* its products fail"):
        pretrain(precision="bf16-mixed", max_steps=1)
