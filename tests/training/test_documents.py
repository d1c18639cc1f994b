"""Training with document packing: each document counts as if it were alone, and all labels have equal weight."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fiddlehead import tasks
from fiddlehead.data import ByteTokenizer
from fiddlehead.run.directory import RunDirectory
from fiddlehead.training import LanguageModel
from tests import warm
from tests.training.conftest import Parts, parameters, rows
from tests.training.test_language_model import Probe

Pretrain = Callable[..., RunDirectory]
APART: dict[str, Any] = {"separate_documents": True, "seq_length": 48, "gradient_clip_val": None}
"""A document has about 110 tokens, so that some micro-batches have several ends of them and some have none."""
EOS = ByteTokenizer().eos_id


def documents(data: Any, windows: Any, indices: Iterable[int]) -> list[torch.Tensor]:
    """The documents in these windows and the tokens that follow the windows, each alone."""
    found: list[torch.Tensor] = []
    for index in indices:
        tokens = torch.from_numpy(windows.datasets[0].windows([index * data.seq_length], data.seq_length + 1)[0])
        begins = [0, *(t + 1 for t, token in enumerate(tokens[:-1].tolist()) if token == EOS), len(tokens)]
        found += [tokens[begin:end] for begin, end in pairwise(begins)]
    return found


def each_alone(model: LanguageModel, alone: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The sum of the cross-entropy of documents, and the number of tokens that they predict."""
    nats = [
        F.cross_entropy(model(document[None, :-1])[0], document[1:], reduction="sum")
        for document in alone
        if len(document) > 1
    ]
    return torch.stack(nats).sum(), sum(len(document) - 1 for document in alone)


@pytest.mark.parametrize("backend", ["sdpa_flash", "reference"])
def test_a_step_is_the_mean_over_documents_that_were_each_alone(parts: Parts, backend: str) -> None:
    probe = Probe()
    made = parts(
        **APART, attention_backend=backend, max_steps=2, micro_batch_size=2, global_batch_size=6, callbacks=[probe]
    )
    run = tasks.pretrain(**made)
    model, data = made["model"], made["data"]
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len({int((batch["labels"] < 0).sum()) for batch in probe.batches}) > 1, "micro-batches would weigh the same"

    model.load_state_dict(probe.before[0])
    nats, count = each_alone(model, documents(data, data._train, data.batch_indices(0)))
    gradients = torch.autograd.grad(nats / count, list(model.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(probe.gradients[0], expected, rtol=1e-4, atol=1e-6)
    logged = [float(value) for value in rows(run, "loss", "grad_norm")[0]]
    assert logged == pytest.approx([nats.item() / count, expected.norm().item()], rel=1e-5)

    model.load_state_dict(after)
    validation = [index for batch in data.val_dataloader() for index in batch["index"].tolist()]
    alone = documents(data, data._val, validation)
    nats, count = each_alone(model, alone)
    text_bytes = sum(int(data.token_bytes[document[1:]].sum()) for document in alone)
    (found,) = [row for row in rows(run, "val_loss", "val_nats_per_byte") if row[0]]
    assert [float(value) for value in found] == pytest.approx([nats.item() / count, nats.item() / text_bytes], rel=1e-5)


def test_accumulating_micro_batches_is_one_larger_batch(pretrain: Pretrain) -> None:
    names = ("loss", "grad_norm", "val_loss")
    large = pretrain(name="large", micro_batch_size=12, global_batch_size=12, max_steps=4, **APART)
    small = pretrain(name="small", micro_batch_size=1, global_batch_size=12, max_steps=4, **APART)
    for a, b in zip(rows(small, *names), rows(large, *names), strict=True):
        assert [float(x or 0) for x in a] == pytest.approx([float(x or 0) for x in b], rel=1e-5)
    for name, tensor in parameters(large, 4).items():
        torch.testing.assert_close(parameters(small, 4)[name], tensor, rtol=0, atol=1e-4)


def test_a_micro_batch_without_a_label_is_counted_as_none(pretrain: Pretrain) -> None:
    """The only token of a window may be a document's end."""
    run = pretrain(separate_documents=True, seq_length=1, micro_batch_size=1, global_batch_size=256, max_steps=2)
    assert all(float(value) < 7 for row in rows(run, "loss", "grad_norm") for value in row if value)


@pytest.mark.slow
def test_two_processes_are_the_same_run(dataset: Path, tmp_path: Path) -> None:
    settings = ["trainer.max_steps=5", "data.separate_documents=true", "data.seq_length=48", "data.micro_batch_size=2"]
    settings += [f"data.paths={dataset}", "data.tokenizer=None", "log.tensorboard=false", "--yes"]
    start = [sys.executable, "-c", "from fiddlehead.cli import main; main()", "pretrain", "--factory", "tiny_test"]
    found = []
    for processes, executor in ((1, ["--direct"]), (2, ["executor=local", "executor.ntasks_per_node=2"])):
        own = [f"log.name=on-{processes}", *executor]
        result = warm.run(
            [*start, *settings, *own],
            env={**os.environ, **warm.everywhere()}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        run = RunDirectory(tmp_path / "runs" / f"on-{processes}")
        found.append([float(value) for row in rows(run, "loss", "grad_norm", "val_loss") for value in row if value])
    assert len(found[0]) == 11 and found[1] == pytest.approx(found[0], rel=1e-4)
