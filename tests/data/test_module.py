from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fiddlehead.data import BPETokenizer, ByteTokenizer, PreTrainingDataModule
from fiddlehead.data.corpus import StandardLibrary
from fiddlehead.data.token_file import TokenFile
from fiddlehead.data.token_writer import TokenDatasetWriter
from fiddlehead.errors import ConfigError

TOKENS = 1003


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens that are their own positions, so that a batch shows where it came from."""

    class Positions(ByteTokenizer):
        vocab_size = 2000

    out = tmp_path_factory.mktemp("data") / "positions"
    with TokenDatasetWriter(out, Positions(), []) as writer:
        writer.add("train", np.arange(TOKENS, dtype=np.uint16), 1, TOKENS)
        writer.add("val", np.arange(TOKENS, dtype=np.uint16), 1, TOKENS)
        writer.finish()
    return out


def module(dataset: Path, **changes: Any) -> PreTrainingDataModule:
    sizes: dict[str, Any] = {"seq_length": 10, "micro_batch_size": 2, "global_batch_size": 4}
    data = PreTrainingDataModule(dataset, **(sizes | changes))
    data.setup()
    return data


class Recorder(pl.LightningModule):
    """Learns nothing and writes down which windows it saw, and in which step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[int]] = {}
        self.validated: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.setdefault(self.trainer.global_step, []).extend(batch["index"].tolist())
        return self.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validated.append(batch["index"].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: PreTrainingDataModule, root: Path, max_steps: int, **options: Any) -> Recorder:
    recorder = Recorder()
    checkpoint = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=data.accumulate_grad_batches(1),
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint],
        num_sanity_val_steps=0,
        val_check_interval=options.pop("val_check_interval", 4),
        check_val_every_n_epoch=None,
    )
    with warnings.catch_warnings():
        # Lightning's own: it imports a deprecated part of torch, and lightly calls a folder of checkpoints not empty.
        warnings.filterwarnings("ignore", message=".*isinstance.*treespec.*|.*exists and is not empty.*")
        trainer.fit(recorder, datamodule=data, **options)
    return recorder


def test_a_batch_is_windows_and_the_tokens_that_follow(dataset: Path) -> None:
    data = module(dataset)
    batch = data._train.__getitems__([0, 7])  # type: ignore[union-attr]
    assert batch["index"].tolist() == [0, 7]
    assert batch["input_ids"].tolist() == [list(range(10)), list(range(70, 80))]
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)
    assert all(values.dtype == torch.int64 and values.is_contiguous() for values in batch.values())


def test_documents_are_kept_apart_when_asked_for(dataset: Path, tmp_path: Path) -> None:
    with TokenDatasetWriter(tmp_path / "bytes", ByteTokenizer(), []) as writer:
        eos = ByteTokenizer().eos_id
        tokens = np.arange(100, dtype=np.uint16)
        tokens[[3, 8, 9]] = eos
        writer.add("train", tokens, 3, 97)
        writer.finish()
    batch = module(tmp_path / "bytes", separate_documents=True, val_samples=0)._train.__getitems__([0, 5])  # type: ignore[union-attr]
    assert batch["input_ids"].shape == (2, 10)
    assert batch["labels"][0].tolist() == [1, 2, eos, -100, 5, 6, 7, eos, -100, -100]
    assert batch["labels"][1].tolist() == list(range(51, 61))
    assert batch["cu_seqlens"].tolist() == [0, 4, 9, 10, 20] and batch["max_seqlen"] == 10
    assert set(module(dataset)._train.__getitems__([0])) == {"input_ids", "labels", "index"}  # type: ignore[union-attr]


def test_every_token_but_the_rest_is_in_a_window(dataset: Path) -> None:
    assert len(module(dataset)._train) == 100  # type: ignore[arg-type]
    assert len(module(dataset, seq_length=TOKENS - 1)._train) == 1  # type: ignore[arg-type]


def test_a_run_trains_on_what_batch_indices_says(dataset: Path, tmp_path: Path) -> None:
    data = module(dataset)
    recorder = fit(data, tmp_path, max_steps=30)
    assert recorder.seen == {step: data.batch_indices(step) for step in range(30)}
    assert sorted(i for step in range(25) for i in recorder.seen[step]) == list(range(100))  # an epoch


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_that_continues_sees_the_same(dataset: Path, tmp_path: Path, stop: int) -> None:
    data = module(dataset)
    fit(data, tmp_path, max_steps=8)
    rest = fit(module(dataset), tmp_path, max_steps=8, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert rest.seen == {step: data.batch_indices(step) for step in range(stop, 8)}


def test_a_finished_run_can_be_prolonged(dataset: Path, tmp_path: Path) -> None:
    data = module(dataset)
    fit(data, tmp_path, max_steps=4)
    rest = fit(module(dataset), tmp_path, max_steps=9, ckpt_path=tmp_path / "step=4.ckpt")
    assert rest.seen == {step: data.batch_indices(step) for step in range(4, 9)}


def test_another_micro_batch_size_trains_on_the_same(dataset: Path, tmp_path: Path) -> None:
    whole = fit(module(dataset, micro_batch_size=4), tmp_path, max_steps=3)
    assert whole.seen == fit(module(dataset, micro_batch_size=1), tmp_path, max_steps=3).seen


def test_worker_processes_change_nothing(dataset: Path, tmp_path: Path) -> None:
    data = module(dataset, num_workers=1, val_samples=4)
    recorder = fit(data, tmp_path, max_steps=5, val_check_interval=4)
    assert recorder.seen == {step: data.batch_indices(step) for step in range(5)}
    assert recorder.validated == [[0, 25], [50, 75]] * 2


def pretend_trainer(data: PreTrainingDataModule, rank: int = 0, world_size: int = 1, **changes: Any) -> Any:
    values: dict[str, Any] = {"max_steps": 3, "global_step": 0, "accumulate_grad_batches": 2 // world_size}
    ranks = {"rank": rank, "num_replicas": world_size}
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=ranks, strategy=strategy, **(values | changes))  # type: ignore[assignment]
    return data


def indices(loader: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def test_ranks_share_a_step(dataset: Path) -> None:
    data = module(dataset)
    ranks = [indices(pretend_trainer(data, rank, world_size=2).train_dataloader()) for rank in range(2)]
    for step in range(3):
        assert ranks[0][step] + ranks[1][step] == data.batch_indices(step)


def test_the_start_is_read_when_iteration_begins_and_the_length_is_the_whole_run(dataset: Path) -> None:
    data = pretend_trainer(module(dataset))
    loader = data.train_dataloader()
    data.trainer.global_step = 2
    assert [i for batch in indices(loader) for i in batch] == data.batch_indices(2)
    assert len(loader) == 6


def test_validation_is_fixed_and_spread_evenly(dataset: Path) -> None:
    data = pretend_trainer(module(dataset, val_samples=5))
    assert indices(data.val_dataloader()) == [[0, 20], [40, 60], [80]]
    assert indices(data.val_dataloader()) == indices(data.val_dataloader())
    everything = pretend_trainer(module(dataset, val_samples=1000))
    assert [i for batch in indices(everything.val_dataloader()) for i in batch] == list(range(100))


def test_every_rank_validates_as_many(dataset: Path) -> None:
    data = module(dataset, val_samples=9)
    ranks = [indices(pretend_trainer(data, rank, world_size=2).val_dataloader()) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [2, 2]
    assert sorted(i for rank in ranks for batch in rank for i in batch) == [0, 12, 25, 37, 50, 62, 75, 87]
    with pytest.raises(ConfigError, match="val_samples=1: 1 windows are too few for 2 data-parallel ranks"):
        pretend_trainer(module(dataset, val_samples=1), world_size=2).val_dataloader()


def test_no_validation(dataset: Path, tmp_path: Path) -> None:
    assert fit(module(dataset, val_samples=0), tmp_path, max_steps=2).validated == []


def test_calls_before_setup_are_refused(dataset: Path) -> None:
    with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\) first"):
        PreTrainingDataModule(dataset).batch_indices(0)
    with pytest.raises(RuntimeError, match="for a trainer"):
        module(dataset).train_dataloader()


def test_a_trainer_that_does_not_fit(dataset: Path) -> None:
    data = module(dataset)
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=1: of the trainer, with .*; allowed: 2"):
        pretend_trainer(data, accumulate_grad_batches=1).train_dataloader()
    with pytest.raises(ConfigError, match="max_steps=-1: must be 1 or more"):
        pretend_trainer(data, max_steps=-1).train_dataloader()
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size=2 x 4 data-parallel ranks"):
        data.accumulate_grad_batches(4)


def test_all_wrong_sizes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        PreTrainingDataModule(
            seq_length=0, micro_batch_size=3, global_batch_size=8, val_samples=-1, num_workers=-1, seed=-1
        )
    assert caught.value.problems == (
        "seq_length=0: must be a whole number of 1 or more",
        "val_samples=-1: must be a whole number of 0 or more",
        "num_workers=-1: must be a whole number of 0 or more",
        "seed=-1: must be a whole number of 0 or more",
        "global_batch_size=8: is not a multiple of micro_batch_size=3; allowed: 3, 6, 9, ...",
    )
    with pytest.raises(ConfigError, match="micro_batch_size=0"):
        PreTrainingDataModule(micro_batch_size=0)


def test_too_few_tokens(dataset: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        module(dataset, seq_length=TOKENS)
    training, validation = caught.value.problems
    assert training.startswith(f"seq_length={TOKENS}: needs {TOKENS + 1} tokens, and the training split")
    assert "val_samples=0 trains without validation" in validation


def test_the_tokenizer_comes_with_the_data(tmp_path: Path) -> None:
    with TokenDatasetWriter(tmp_path / "bytes", ByteTokenizer(), []) as writer:
        writer.add("train", np.zeros(100, dtype=np.uint16), 1, 99)
        writer.finish()
    sizes: dict[str, Any] = {"seq_length": 10, "val_samples": 0}
    data = PreTrainingDataModule(tmp_path / "bytes", **sizes)
    assert data.vocab_size == 257  # before anything is set up
    data.prepare_data()
    data.setup()
    assert data.tokenizer.decode([104, 105]) == "hi"
    assert data.token_bytes is not None and data.token_bytes.sum() == 256
    PreTrainingDataModule(tmp_path / "bytes", ByteTokenizer(), **sizes).setup()
    trained = BPETokenizer(260).train(["abcabcabc"] * 10)
    with pytest.raises(ConfigError, match="made with tokenizer"):
        PreTrainingDataModule(tmp_path / "bytes", trained, **sizes).setup()
    with pytest.raises(ConfigError, match="tokenizer: is not trained"):
        PreTrainingDataModule(tmp_path / "bytes", BPETokenizer(260), **sizes)
    with pytest.raises(ConfigError, match="there is no such folder"):
        PreTrainingDataModule(tmp_path / "none", **sizes).setup()


@pytest.mark.parametrize("written", ["now", "before its largest id was kept"])
def test_only_a_token_that_occurs_needs_a_row_in_the_model(dataset: Path, tmp_path: Path, written: str) -> None:
    """The tokenizer has 2000 tokens; those up to 1002 occur, each at the position that is its id."""
    copy = shutil.copytree(dataset, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text())
    assert meta["train"]["max_id"] == meta["val"]["max_id"] == TOKENS - 1
    if written != "now":
        del meta["train"]["max_id"], meta["val"]["max_id"]
        (copy / "meta.json").write_text(json.dumps(meta))
    data = PreTrainingDataModule(copy, seq_length=10)
    data.model_vocab_size = TOKENS
    data.setup()
    assert data.missing_rows(2000) == data.missing_rows(TOKENS) == []
    data = PreTrainingDataModule(copy, seq_length=10)
    data.model_vocab_size = TOKENS - 2
    with pytest.raises(ConfigError) as error:
        data.setup()
    said = "the token (1001), and the model has vocab_size=1001: ids from 0 to 1000"
    assert error.value.problems == tuple(f"{copy}/{split}.bin: at 1,001 is {said}" for split in ("train", "val"))


def test_a_corpus_that_is_not_yet_tokenized_needs_what_ends_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandardLibrary, "identity", "a hash that takes seconds")
    assert PreTrainingDataModule(corpus="stdlib", cache_dir=tmp_path).missing_rows(257) == []
    assert PreTrainingDataModule(corpus="stdlib", cache_dir=tmp_path).missing_rows(256) == [
        "each document has the token (256), and the model has vocab_size=256: ids from 0 to 255"
    ]
    learned = PreTrainingDataModule(tokenizer=BPETokenizer(300), cache_dir=tmp_path)
    assert learned.missing_rows(299) == ["the tokenizer has 300 tokens, and the model has vocab_size=299"]


def test_the_default_corpus_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path / "cache"))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(stdlib / "json")})  # a small one
    data = PreTrainingDataModule(tokenizer=BPETokenizer(300), corpus="stdlib", seq_length=64)
    assert data.vocab_size == 300
    data.prepare_data()
    (made,) = (tmp_path / "cache").iterdir()
    before = (made / "meta.json").stat().st_mtime_ns
    again = PreTrainingDataModule(tokenizer=BPETokenizer(300), corpus="stdlib", seq_length=64, val_samples=0)
    again.prepare_data()
    again.setup()
    assert (made / "meta.json").stat().st_mtime_ns == before
    assert again.tokenizer.vocab_size == 300 and again.tokenizer.decode(again.tokenizer.encode("def")) == "def"
    assert len(TokenFile(made)) > 5_000
    other = PreTrainingDataModule(corpus="stdlib", cache_dir=tmp_path / "elsewhere")
    assert other.vocab_size == 257
    other.prepare_data()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_a_batch_is_read_in_little_time(dataset: Path) -> None:
    windows = module(dataset, seq_length=128, val_samples=0)._train
    assert windows is not None
    times = []
    for _ in range(50):
        start = time.perf_counter()
        windows.__getitems__([0, 3] * 8)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2e-3


def test_names_are_imported_when_used() -> None:
    code = "import sys, fiddlehead.data as d; assert 'torch' not in sys.modules; print(d.TokenFile.__name__, dir(d))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("TokenFile") and "PreTrainingDataModule" in output
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        import fiddlehead.data

        fiddlehead.data.Nothing  # noqa: B018


def test_without_paths_or_a_corpus_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    data = PreTrainingDataModule(cache_dir=tmp_path)
    assert data.vocab_size == 257 and data.missing and not PreTrainingDataModule(corpus="stdlib").missing
    with pytest.raises(ConfigError, match=r"paths=None: there is no data; .* data\.corpus=stdlib"):
        data.prepare_data()
    with pytest.raises(ConfigError, match="corpus='x': allowed: None, stdlib"):
        PreTrainingDataModule(corpus="x")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
