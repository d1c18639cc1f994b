"""Fine-tuning runs, from a small run of our own to answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fiddlehead import tasks
from fiddlehead.checkpoints.weights import CheckpointWeights, find_weights, load_transformer, open_weights
from fiddlehead.data import FineTuningDataModule
from fiddlehead.errors import ConfigError
from fiddlehead.models import LoRA, Transformer, nf4
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import LanguageModel, Log, Parallel, PreferenceModel
from fiddlehead.training.preference import answer_log_probabilities
from tests.conftest import once
from tests.training.conftest import KillAfter, Killed, Parts, make_parts, rows
from tests.training.ranks import on_ranks
from tests.training.test_bfloat16_gradients import Dtypes, widened
from tests.training.test_language_model import Probe


@pytest.fixture
def base(dataset: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A copy of the run that all tests begin with."""

    def train(runs: Path) -> None:
        tasks.pretrain(**make_parts(dataset, runs, name="base", max_steps=100, val_check_interval=100))

    trained = once(tmp_path_factory, "base-of-tuning", train) / "base"
    return RunDirectory(shutil.copytree(trained, tmp_path / "runs" / "base"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """What a letter is answered with: the next one."""
    path = tmp_path / "questions.jsonl"
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(letters[i % 25], letters[i % 25 + 1]) for i in range(100)]
    path.write_text("".join(json.dumps({"prompt": f"{a}:", "completion": b * 3}) + "\n" for a, b in pairs))
    return path


def tuning(parts: Parts, model: LanguageModel, path: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"preference": True} if isinstance(model, PreferenceModel) else {}
    data = FineTuningDataModule(
        path, seq_length=16, micro_batch_size=4, global_batch_size=4, val_samples=8, **options
    )  # fmt: skip
    return parts(**({"name": "tuned", "max_steps": 12} | changes)) | {"model": model, "data": data}


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
def test_answers_are_learned_and_shown(
    base: RunDirectory, parts: Parts, questions: Path, lora: LoRA | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LanguageModel(init_from=base.path, lora=lora)
    run = tasks.finetune(**tuning(parts, model, questions, lr=2e-2, max_steps=60))
    losses = [float(loss) for (loss,) in rows(run, "loss") if loss]
    assert losses[-1] < 0.8 * losses[0]
    assert "asked 't:', it answers" in capsys.readouterr().out
    assert (run.path / "tokenizer.json").read_bytes() == base.tokenizer.read_bytes()


def test_adapters_alone_are_float32_in_mixed_precision(
    base: RunDirectory, parts: Parts, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {}
    for halved in (True, False):
        model = LanguageModel(init_from=base.path, lora=LoRA(rank=4))
        given = tuning(parts, model, questions, lr=2e-3, precision="bf16-mixed")
        if not halved:  # all float32, and autocast makes it bfloat16 for each product
            monkeypatch.setattr("fiddlehead.training.fit.halve_frozen", lambda model, trainer: None)
        run = tasks.finetune(**given)
        losses[halved] = [float(loss) for (loss,) in rows(run, "loss") if loss]
        run.path.rename(run.path.with_name(f"halved {halved}"))
        kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
        assert kinds == {(True, torch.float32), (False, torch.bfloat16 if halved else torch.float32)}
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
    written = load_transformer(open_weights(run.path.with_name("halved True")))
    assert {p.dtype for p in written.parameters()} == {torch.float32}


def test_longer_sequences_than_were_learned_are_said(
    base: RunDirectory, parts: Parts, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tuning(parts, LanguageModel(init_from=base.path), questions, max_steps=1)
    given["data"] = FineTuningDataModule(questions, seq_length=24, micro_batch_size=4, global_batch_size=4)
    tasks.finetune(**given)
    assert "learned sequences of 16 tokens; data.seq_length=24 is longer" in capsys.readouterr().out


def test_an_interrupted_fine_tuning_run_continues_exactly(base: RunDirectory, parts: Parts, questions: Path) -> None:
    whole = tasks.finetune(**tuning(parts, LanguageModel(init_from=base.path), questions))
    expected = rows(whole, "step", "loss", "grad_norm", "val_loss")
    whole.path.rename(whole.path.with_name("whole"))
    with pytest.raises(Killed):
        tasks.finetune(**tuning(parts, LanguageModel(init_from=base.path), questions, callbacks=[KillAfter(6)]))
    cut = tasks.finetune(**tuning(parts, LanguageModel(init_from=base.path), questions))
    assert rows(cut, "step", "loss", "grad_norm", "val_loss") == expected


def test_a_base_in_4_bits_is_trained_on_as_the_weights_that_it_stands_for_and_merged_into_the_original_ones(
    base: RunDirectory, parts: Parts, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, lora = open_weights(base.path), LoRA(rank=4, dropout=0.2, quantize_base="nf4")

    def tune(name: str, lora: LoRA, *callbacks: Any) -> tuple[LanguageModel, RunDirectory]:
        model = LanguageModel(init_from=base.path, lora=lora)
        made = tuning(parts, model, questions, lr=2e-2, callbacks=[*callbacks])
        made["log"] = Log(name=name, dir=str(base.path.parent))
        return model, tasks.finetune(**made)

    def dequantized(*_: Any, quantize: bool) -> Transformer:
        model = load_transformer(weights)
        for name in [name for name in model.state_dict() if "linear" in name and name.endswith("weight")]:
            full = model.get_parameter(name)
            full.data = nf4.dequantize(nf4.quantize(full), full.shape, full.dtype)
        return model

    model, whole = tune("whole", lora)
    with pytest.raises(Killed):
        tune("cut", lora, KillAfter(6))
    _, cut = tune("cut", lora)
    monkeypatch.setattr("fiddlehead.training.initial.load_transformer", dequantized)
    _, full = tune("full", replace(lora, quantize_base=None))
    found, *others = (rows(run, "step", "loss", "grad_norm", "val_loss") for run in (whole, cut, full))
    assert others == [found, found]
    merged, learned = CheckpointWeights.open(find_weights(whole.path)), dict(model.named_parameters())
    assert {f"transformer.{name}" for name in merged.tensors} == {n for n, p in learned.items() if p.requires_grad}
    name = "layers.0.mlp.linear_fc1"
    a, b = (learned[f"transformer.{name}.{part}"].double() for part in ("lora_a", "lora_b"))
    expected = weights.load(f"{name}.weight").double() + lora.scaling * b @ a
    torch.testing.assert_close(merged.load(f"{name}.weight").double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("lora", "precision"), [(None, "32-true"), (None, "bf16-true"), (LoRA(rank=4), "32-true")])
def test_the_better_answer_becomes_likelier(
    base: RunDirectory, parts: Parts, tmp_path: Path, lora: LoRA | None, precision: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "?", "chosen": "fern", "rejected": "moss"}) + "\n" for _ in range(40))
    )
    model = PreferenceModel(init_from=base.path, lora=lora)
    run = tasks.finetune(**tuning(parts, model, path, lr=2e-2, max_steps=40, precision=precision))
    losses = [float(loss) for (loss,) in rows(run, "loss") if loss]
    assert {p.dtype for each in model._reference for p in each.parameters()} <= {next(model.parameters()).dtype}
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)  # -log sigmoid(0): nothing has changed yet
    assert losses[-1] < 0.5 * losses[0]
    assert float([value for (value,) in rows(run, "val_accuracy") if value][-1]) == 1


def test_preferences_are_learned_in_mixed_precision_with_bfloat16_gradients_bit_for_bit(
    base: RunDirectory, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, found = tmp_path / "pairs.jsonl", []
    pair = {"prompt": "?", "chosen": "fern", "rejected": "moss"}
    path.write_text("".join(json.dumps(pair) + "\n" for _ in range(40)))
    for name in ("bfloat16", "float32"):
        if name == "float32":
            widened(monkeypatch)
        seen, model = Dtypes(), PreferenceModel(init_from=base.path)
        made = tuning(parts, model, path, name=name, max_steps=4, precision="bf16-mixed", callbacks=[seen])
        found.append(rows(tasks.finetune(**made), "loss", "grad_norm", "val_loss"))
        assert bool(seen.bfloat16) == (name == "bfloat16")
    assert found[0] == found[1]


def test_the_loss_of_preferences_is_the_paper_s(base: RunDirectory, parts: Parts, tmp_path: Path) -> None:
    """Equation 7, in plain sums over one pair at a time."""
    model = PreferenceModel(init_from=base.path, beta=0.3)
    model.take_shape()
    model.configure_model()
    before = load_transformer(open_weights(base.path)).eval()
    model._reference = [before]
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    path = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": "a", "chosen": "bcd", "rejected": "x"}, {"prompt": "why", "chosen": "so", "rejected": "no no"}]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = FineTuningDataModule(path, tokenizer=base.path, preference=True, seq_length=32, val_samples=0)
    data.setup()
    batch = data._train.__getitems__([0])  # pyright: ignore[reportOptionalMemberAccess]
    losses, _ = model._preference(batch)

    def log_probability(transformer: Any, prompt: str, answer: str) -> torch.Tensor:
        ids = torch.tensor([[*prompt.encode(), *answer.encode(), 256]])
        all_of_it = transformer(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return all_of_it[len(prompt) - 1 :].sum()

    expected = []
    for pair in pairs:
        now, then = (
            log_probability(m, pair["prompt"], pair["chosen"]) - log_probability(m, pair["prompt"], pair["rejected"])
            for m in (model.transformer, before)
        )
        expected.append(-torch.log(torch.sigmoid(0.3 * (now - then))))
    assert torch.allclose(losses, torch.stack(expected), atol=1e-5)
    assert len(answer_log_probabilities(before, batch)) >= 4


def test_impossible_settings_are_refused(base: RunDirectory, parts: Parts, tmp_path: Path, questions: Path) -> None:
    with pytest.raises(ConfigError, match="init_from=None: name a model that can answer"):
        tasks.finetune(**tuning(parts, PreferenceModel(), questions))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match=r"^/.*bad\.jsonl:1: needs the fields"):
        tasks.finetune(**tuning(parts, LanguageModel(init_from=base.path), bad))
    with pytest.raises(ConfigError, match="paths: is empty"):
        tasks.finetune(**tuning(parts, LanguageModel(init_from=base.path), ()))


# -- what a step's mean is over

LENGTHS = (60, 3, 4, 5, 58, 8, 30, 24)
"""Of prompts, of which some fill a row alone, and up to four share one."""


def uneven(kind: str, folder: Path) -> Path:
    """Examples, or pairs of answers."""
    text = "the better of two answers is the one that is learned from pairs of them"
    records = []
    for number, length in enumerate(LENGTHS):
        answer = "yes"[: 1 + number % 3]
        if kind == "pairs":
            records.append({"prompt": text[: min(length // 2, 28)], "chosen": answer, "rejected": "no"})
        else:
            records.append({"prompt": text[:length], "completion": answer})
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def one_step(
    base: Path, path: Path, runs: Path, *, packed: bool, micro: int, split: dict[str, Any] | None = None
) -> tuple[list[float], torch.Tensor]:
    """What two steps log that have every example once: loss and gradient norm of each, validation loss; and a gradient.

    Args:
        split: those of `Parallel`, on two ranks; None: there is one.
    """
    pairs, probe = path.stem == "pairs", Probe()
    changes = {} if split is None else {"devices": 2, "strategy": Parallel(**split)}
    made = make_parts(
        base, runs, max_steps=2, val_check_interval=2, gradient_clip_val=None, callbacks=[probe], **changes
    )
    made["model"] = PreferenceModel(init_from=base, beta=0.3) if pairs else LanguageModel(init_from=base)
    rows_ = 4 if packed else len(LENGTHS)
    made["data"] = FineTuningDataModule(
        path, path, seq_length=64, micro_batch_size=micro, global_batch_size=rows_, packed=packed, preference=pairs
    )
    run = tasks.finetune(**made)
    assert made["data"]._train is not None and len(made["data"]._train) == rows_
    logged = [float(value) for row in rows(run, "loss", "grad_norm", "val_loss") for value in row if value]
    return logged, torch.empty(0) if split is not None else probe.gradients[0]


def each_alone(base: Path, path: Path) -> tuple[list[float], torch.Tensor]:
    """The same, one text at a time."""
    pairs = path.stem == "pairs"
    now, then = (load_transformer(open_weights(base)) for _ in range(2))
    data = FineTuningDataModule(path, path, tokenizer=base, seq_length=64, packed=False, preference=pairs)
    data.setup()
    losses, balances, count, tokens = [], [], 0, 0
    for texts in data._train.examples:  # pyright: ignore
        gained = []
        for text in texts:
            ids, learned = torch.from_numpy(text.ids).long(), torch.from_numpy(text.learned[1:])
            before, after = (-F.cross_entropy(m(ids[None, :-1])[0], ids[1:], reduction="none") for m in (then, now))
            gained.append(((after - before.detach() * pairs) * learned).sum())
            balances.append(now.aux_loss())
            tokens += len(ids) - 1
            count += int(learned.sum())
        losses.append(-F.logsigmoid(0.3 * (gained[0] - gained[1])) if pairs else -gained[0])
    loss = torch.stack(losses).sum() / (len(losses) if pairs else count)
    balanced = loss + torch.stack(balances).sum() / tokens
    gradients = torch.autograd.grad(balanced, list(now.parameters()), allow_unused=True)
    gradient = torch.cat([x.flatten() for x in gradients if x is not None])
    return [loss.item(), gradient.norm().item()], gradient


@pytest.fixture
def mixture(parts: Parts) -> Path:
    """A mixture of experts, whose balancing loss is as large as the other."""
    shape = {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.5, "ffn_hidden_size": 16, "init_method_std": 0.3}
    return tasks.pretrain(**parts(name="mixture", max_steps=1, val_samples=0, **shape)).path


@pytest.mark.parametrize("kind", ["examples", "pairs"])
def test_a_step_is_the_mean_over_its_examples_however_they_are_cut(mixture: Path, tmp_path: Path, kind: str) -> None:
    """Of labels or pairs, and of tokens for the balancing loss, of which micro-batches have different numbers."""
    path = uneven(kind, tmp_path)
    (loss, norm), expected = each_alone(mixture, path)
    for packed, micro in ((True, 1), (True, 4), (False, 2)):
        logged, gradient = one_step(mixture, path, tmp_path / f"{packed}{micro}", packed=packed, micro=micro)
        assert logged[:2] == pytest.approx([loss, norm], rel=1e-4), (packed, micro)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "split"),
    [("examples", {}), ("examples", {"context_parallel": 2}), ("examples", {"tensor_parallel": 2}), ("pairs", {})],
)
def test_it_is_on_two_ranks_what_it_is_on_one(mixture: Path, tmp_path: Path, kind: str, split: dict[str, int]) -> None:
    path = uneven(kind, tmp_path)
    expected, _ = one_step(mixture, path, tmp_path / "one", packed=True, micro=4)
    for logged, _ in on_ranks(2, one_step, mixture, path, tmp_path / "two", packed=True, micro=1, split=split):
        assert logged == pytest.approx(expected, rel=1e-4)
