"""`fiddlehead bench`, as it is typed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fiddlehead.bench import as_benchmark
from fiddlehead.cli import main
from fiddlehead.errors import ConfigError
from fiddlehead.recipes import finetune, tiny
from fiddlehead.run.prediction import Prediction
from tests import warm

Command = Callable[..., tuple[str, str]]

FIGURES = {
    "tokens_per_s",
    "tokens_per_s_per_device",
    "tflops_per_s",
    "seconds_per_step",
    "seconds_data",
    "seconds_forward",
    "seconds_backward",
    "seconds_optimizer",
    "memory_gib",
    "seconds_to_first_step",
}


@pytest.fixture
def bench(working_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Types `fiddlehead bench ...` in an empty directory; what it printed on stdout and on stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    for name, value in warm.everywhere().items():
        monkeypatch.setenv(name, value)

    def command(*arguments: str, rc: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["fiddlehead", "bench", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        assert (exit.value.code or 0) == rc, out + err
        assert list(working_directory.glob("runs/*")) == list(working_directory.glob("runs/.*")) == []
        return out, err

    return command


def test_the_figures_agree_with_each_other_and_nothing_is_kept(bench: Command, working_directory: Path):
    out, err = bench("tiny_test", "optim.lr=1e-3", "--steps", "4", "--warmup", "2", "--direct", "--json")
    results = json.loads(out)
    figures, what = results["figures"], results["what"]
    assert set(figures) == FIGURES  # a CPU has no peak, so there is no MFU
    assert not (working_directory / "runs").exists()
    spread = figures["seconds_per_step"]
    assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    mean = what["tokens_per_step"] / figures["tokens_per_s"]
    assert what["tokens_per_step"] == 8 * 32 and spread["min"] <= mean <= spread["max"]
    phases = sum(figures[f"seconds_{name}"] for name in ("data", "forward", "backward", "optimizer"))
    assert 0.5 * mean < phases <= mean
    assert figures["seconds_to_first_step"] > spread["min"]
    assert what["edits"] == ["optim.lr=1e-3"] and what["recipe"] == "tiny_test" and what["devices"] == 1
    assert "step      6/6 " in err and "validation" not in err
    assert {"torch", "lightning"} <= set(results["where"]["versions"]) and results["where"]["cpu"]
    Path("before.json").write_text(out)

    out, _ = bench("-f", "tiny_test", "--steps", "3", "--direct", "--against", "before.json")
    assert re.search(r"^tokens/s +[\d,]+ +[\d,]+ +[+-][\d.]+%$", out.replace(" \n", "\n"), re.MULTILINE), out
    assert re.search(r"^backward +[\d.]+ ms +\d+% +#+", out, re.MULTILINE)
    assert "measured differently: steps was 4 and is 3" in out
    assert "measured differently: edits was ['optim.lr=1e-3'] and is nothing" in out
    out, _ = bench("tiny_test", "--steps", "3", "--direct", "--random-tokens", "--against", "before.json", "--json")
    results = json.loads(out)
    assert results["what"]["data"] == "RandomTokens"
    change = results["figures"]["tokens_per_s"] / figures["tokens_per_s"] - 1
    assert results["changes"]["tokens_per_s"] == pytest.approx(change)


def test_what_was_planned_stands_beside_what_was_measured(bench: Command, monkeypatch: pytest.MonkeyPatch):
    """Simulates that the plan knows the device that trains, which is the CPU."""
    known = {"tokens_per_s": 1e6, "mfu": 0.5, "seconds_per_step": 256e-6, "memory_gib": 100.0}
    monkeypatch.setattr("fiddlehead.tasks.predict", lambda *_: Prediction(1, 5, 256, "h100", **known))
    arguments = ["tiny_test", "--steps", "9", "--warmup", "2", "--direct"]
    out, err = bench(*arguments, "--json")
    assert "plan at step" not in err  # which would wait for the device
    results = json.loads(out)
    assert results["plan"] == {"tokens_per_s_per_device": 1e6, **known}
    Path("before.json").write_text(out)
    out, _ = bench(*arguments, "--against", "before.json")
    assert re.search(r"plan +difference +before +change", out)
    rate = re.search(r"^tokens/s +([\d,]+) +1,000,000 +(-[\d.]+)% +[\d,]+ +[+-]", out, re.MULTILINE)
    assert rate is not None
    assert float(rate[2]) == pytest.approx(int(rate[1].replace(",", "")) / 1e4 - 100, abs=0.1)
    assert re.search(r"^a step +[\d.]+ ms \(.*\) +0.3 ms +\+[\d.]+% ", out, re.MULTILINE)
    assert re.search(r"^memory, at most +[\d.]+ GiB +100.00 GiB +-\d\d\.\d% ", out, re.MULTILINE)


def test_a_run_that_fails_says_why_and_leaves_nothing(bench: Command):
    _, err = bench("tiny_test", "optim.lr=1e30", "trainer.gradient_clip_val=None", "--steps", "9", "--direct", rc=1)
    assert "the loss or the gradient is not finite" in err


@pytest.mark.slow
def test_two_devices_are_timed_together(bench: Command):
    out, _ = bench("tiny_test", "trainer.devices=2", "--steps", "4", "--warmup", "2", "--json")
    results = json.loads(out)
    assert set(results["figures"]) == FIGURES | {"seconds_communication"}
    assert results["what"]["devices"] == 2
    whole, each = (results["figures"][name] for name in ("tokens_per_s", "tokens_per_s_per_device"))
    assert each == pytest.approx(whole / 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which recipe? fiddlehead bench RECIPE"),
        (["optim.lr=1"], "which recipe? fiddlehead bench RECIPE"),
        (["tiny_tset"], "did you mean 'tiny_test'?"),
        (["tiny_test", "trainer.max_steps=3"], "trainer.max_steps=3: --steps and --warmup say how many"),
        (["tiny_test", "checkpoint.keep_last=3"], "checkpoint.keep_last=3: nothing is saved"),
        (["tiny_test", "log.profile=1:2"], "log.profile='1:2': a benchmark keeps no files"),
        (["tiny_test", "log.nsys=1:2"], "log.nsys='1:2': a benchmark keeps no files"),
        (["tiny_test", "--against", "nosuch.json"], "nosuch.json: cannot be read"),
        (["tiny_test", "--direct", "executor=local"], "--direct runs without an executor"),
        (["tiny_test", "data.separate_documents=true", "--random-tokens"], "data.separate_documents=True"),
        (["tiny_test", "optim.lr=-1", "--direct"], "optim.lr=-1.0: must be a finite number above 0"),
        (["lora", "--random-tokens"], "fine-tuning is timed on its own examples"),
    ],
)
def test_mistakes_are_said(bench: Command, arguments: list[str], said: str):
    _, err = bench(*arguments, rc=2)
    assert said in err and err.startswith("error: ")


def test_help_teaches(bench: Command):
    out, _ = bench("--help")
    words = " ".join(out.split())
    for text in ("--against before.json", "full attention", "data.num_workers", "[default: 20]"):
        assert text in words


def test_a_benchmark_is_the_recipe_with_nothing_around_it():
    recipe = tiny.tiny()
    timed = as_benchmark(recipe, steps=7, warmup=2)
    changed = {difference.path.split(".")[0] for difference in timed.diff(recipe)}
    assert changed <= {"", "trainer", "checkpoint", "data", "log", "steps"}
    assert timed.trainer.max_steps == 9 and recipe.trainer.max_steps == 400
    with pytest.raises(ConfigError, match="configures builtins:dict, not a training"):
        as_benchmark(type(recipe)(dict), steps=1, warmup=1)
    tuned = finetune.lora()
    tuned.model.init_from = "model"
    assert as_benchmark(tuned, steps=1, warmup=1).model.init_from == "model"
