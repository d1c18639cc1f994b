"""What is measured of a machine's GPU is what its plans divide by."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fiddlehead.cli import main
from fiddlehead.errors import ConfigError
from fiddlehead.plan import calibration
from fiddlehead.plan.calibration import Work, calibrate, gather_on_rank, here, keep
from fiddlehead.plan.cards import CARDS, Card
from fiddlehead.plan.reached import FILE, REACHED, measured, reached
from fiddlehead.plan.speed import Speed, speed
from tests.plan.test_memory import parts_of
from tests.training.ranks import on_ranks

CPU = torch.device("cpu")
LITTLE = Work(
    seconds=0.01, tokens=32, widths=((16, 32),), vocabulary=17, heads=((4, 2, 8),), length=16, parameters=1024,
    exchanged=4096,
)  # fmt: skip
MINE = Card("mine", 1.0, 1e12, 1e11)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path))
    return tmp_path


def step_of(card: Card) -> Speed:
    config, held, setting, data, _ = parts_of("fsdp 1b b4")
    found = speed(config, held, setting, card, data.seq_length, gpus=2, gpus_per_node=2)
    assert found is not None
    return found


def test_what_is_measured_is_a_part_of_the_peak(monkeypatch: pytest.MonkeyPatch):
    """Each call takes a second, so the parts are the operations, or the bytes, of a call."""
    monkeypatch.setattr(calibration, "_seconds", lambda call, *_: (call(), 1.0)[1])
    found = calibrate(CPU, MINE, LITTLE)
    T, K, N = 32, 16, 32
    assert found["products"] == pytest.approx(3 * 2 * T * K * N / 1e12)
    assert found["odd vocabulary"] == pytest.approx(3 * 2 * T * K * 17 / 1e12)
    # Two sequences of 16: half of the scores, and as many weights times values.
    assert found["attention, forward"] == pytest.approx(2 * 2 * (2 * 16 * 16 * 4 * 8) / 2 / 1e12)
    assert found["optimizer"] == pytest.approx(
        1024 * 40 / 1e11
    )  # bytes of float32: 2 x weights, 4 x gradients, 4 x states
    assert found["memory"] / found["optimizer"] == pytest.approx(REACHED["memory"] / REACHED["optimizer"])
    assert "link" not in found  # there is one GPU


def test_a_calibration_on_a_cpu_has_every_part():
    found = calibrate(CPU, MINE, LITTLE)
    unmeasured = {"fp8", "link", "FlexAttention, forward", "FlexAttention, backward"}  # the last two compile too long
    assert found.keys() == REACHED.keys() - unmeasured
    assert all(value > 0 for value in found.values())


def test_a_backward_pass_that_takes_two_and_a_half_forward_passes_reaches_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibration, "_seconds", lambda call, *_: 3.5 if "both" in call.__name__ else 1.0)
    found = calibrate(CPU, MINE, LITTLE)
    assert found["attention, backward"] == pytest.approx(found["attention, forward"])


def gathered(folder: str, work: Work) -> float:
    """What the first of two ranks measures; the other one measures nothing."""
    import os
    import queue

    answer: queue.Queue[float] = queue.Queue()
    gather_on_rank(int(os.environ["RANK"]), "cpu", 2, f"file://{folder}/meeting", work, answer)
    return answer.get() if answer.qsize() else 0.0


@pytest.mark.slow
def test_the_link_is_measured_between_processes(tmp_path: Path):
    first, second = on_ranks(2, gathered, str(tmp_path), LITTLE)
    assert first > 0 and second == 0


def test_the_plans_of_a_card_use_what_was_measured_of_it(cache: Path):
    card = CARDS["h100"]
    before, other = step_of(card), step_of(CARDS["h200"])
    assert not before.calibrated and measured(card) == {} and reached(card) is REACHED
    device = Card.of_device("NVIDIA H100 80GB HBM3", int(79.2 * 2**30))
    found = {"products": REACHED["products"] / 2, "link": REACHED["link"] * 2, "optimizer": REACHED["optimizer"] / 4}
    assert keep(device, found) == cache / FILE
    for same in (card, device):  # the GPU here, and --gpu h100
        after = step_of(same)
        assert after.products == pytest.approx(2 * before.products)
        assert after.optimizer == pytest.approx(4 * before.optimizer)
        assert after.attention == before.attention and after.communication < before.communication
        assert after.calibrated
    assert step_of(CARDS["h200"]) == other
    keep(device, {"products": REACHED["products"]})  # measured again
    assert step_of(card).products == pytest.approx(before.products)


@pytest.mark.parametrize("content", ["{", "[]", '{"h100": 3}', '{"h100": {"products": "much", "memory": -1, "x": 1}}'])
def test_a_spoiled_file_is_as_none(cache: Path, content: str):
    (cache / FILE).write_text(content)
    assert measured(CARDS["h100"]) == {}


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FIDDLEHEAD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"calibration\.json: cannot be written; name another folder"):
        keep(MINE, {"products": 0.5})


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fiddlehead", "bench", "--calibrate", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0), *capsys.readouterr()


def test_the_command_measures_and_keeps(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Simulates a GPU that computes as this CPU does."""
    monkeypatch.setattr(calibration, "here", lambda: (CPU, MINE))
    monkeypatch.setattr(calibration.Work, "__init__", lambda self: vars(self).update(vars(LITTLE)))
    code, out, _ = typed(monkeypatch, capsys)
    assert code == 0 and "attention, backward" in out and f"kept in {cache / FILE}" in out
    code, out, err = typed(monkeypatch, capsys, "--json")
    assert json.loads(out)["reached"] == measured(MINE) and "measuring mine" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "--calibrate: needs a GPU, and "), (("tiny",), "--calibrate measures this machine, not a recipe")],
)
def test_mistakes_are_said(arguments, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = typed(monkeypatch, capsys, *arguments)
    assert code == 2 and said in err


def test_a_gpu_without_a_data_sheet_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Simulates what CUDA says of a GPU that no table has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Unheard Of")
    monkeypatch.setattr(calibration.Target, "of", lambda device: None)
    with pytest.raises(ConfigError, match="no data sheet of Unheard Of is known"):
        here()
    unknown = replace(MINE, name="Unheard Of", flops=0.0)
    monkeypatch.setattr(calibration.Card, "of", lambda *_: unknown)
    with pytest.raises(ConfigError, match="no data sheet"):
        here()
