"""`fiddlehead plan`, as it is typed, on a machine without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fiddlehead.cli import main
from fiddlehead.recipes import llama

Command = Callable[..., tuple[str, str]]
ONE = ("llama32_1b", "trainer.devices=1", "data.micro_batch_size=4", "data.seq_length=4096")


@pytest.fixture
def plan(working_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Types `fiddlehead plan ...` in an empty directory; what it printed on stdout and on stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def command(*arguments: str, rc: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["fiddlehead", "plan", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        assert (exit.value.code or 0) == rc, out + err
        assert not list(working_directory.iterdir())
        return out, err

    return command


def test_a_recipe_for_gpus_is_planned_without_one_and_without_data(plan: Command) -> None:
    out, _ = plan(*ONE, "--usd-per-gpu-hour", "2")
    assert "fits: h100 has" in out and "tokens/s" in out and "cudnn on h100" in out
    assert "planned for" in out and "there is no data" in out and " USD" in out


def test_the_plan_in_json_says_whether_it_fits_and_has_the_figures(plan: Command) -> None:
    found = json.loads(plan(*ONE, "--gpu", "h200", "--usd-per-gpu-hour", "2", "--json")[0])
    assert found["name"] == "llama32_1b" and found["fits"] is True and found["card"]["name"] == "h200"
    seconds = found["speed"]["seconds_per_step"]
    assert found["hours"] == pytest.approx(seconds * found["max_steps"] / 3600)
    assert found["usd"] == pytest.approx(2 * found["gpu_hours"]) and found["gpu_hours"] == found["hours"]
    assert found["memory"]["peak"] < 2**30 * found["card"]["gib"]
    assert json.loads(plan("gemma2_27b", "--gpu", "a100_40", "--json")[0])["fits"] is False


def test_a_card_of_ones_own_is_its_memory_and_its_speeds(plan: Command) -> None:
    assert json.loads(plan(*ONE, "--gpu", "mine=20,362,864", "--json")[0])["fits"] is False
    assert json.loads(plan(*ONE, "--gpu", "mine=96,362,864", "--json")[0])["fits"] is True


def test_fit_shows_the_fastest_layouts(plan: Command) -> None:
    out, _ = plan(*ONE, "--fit")
    assert "layouts that fit, fastest first" in out
    assert "the recipe as it is " in out and "data.micro_batch_size=8 " in out
    layouts = json.loads(plan(*ONE, "--fit", "--json")[0])["layouts"]
    assert 1 < len(layouts) <= 10 and all(each["memory"]["peak"] < 80e9 for each in layouts)
    assert "no layout fits" in plan("llama31_405b", "trainer.num_nodes=1", "data.global_batch_size=8", "--fit", rc=2)[1]


def test_fit_serves_gpus_for_which_the_recipe_s_own_layout_is_none(plan: Command) -> None:
    edits = ("trainer.strategy.tensor_parallel=8", "trainer.devices=4", "data.seq_length=4096")
    assert "tensor_parallel=8" in plan("llama32_1b", *edits, rc=2)[1]
    out, _ = plan("llama32_1b", *edits, "--fit")
    assert "--fit  " in out and "trainer.strategy.tensor_parallel=1" in out and "fits: h100 has" in out


def test_a_plan_that_does_not_fit_says_what_would_make_it_fit(plan: Command) -> None:
    out, _ = plan(*ONE, "--gpu", "a100_40")
    assert "does not fit" in out and "what makes it fit" in out and "data.micro_batch_size=2: " in out
    assert " x the tokens/s" in out
    remedies = json.loads(plan(*ONE, "--gpu", "a100_40", "--json")[0])["remedies"]
    assert all(each["edits"] and each["memory"]["peak"] and each["relative_speed"] for each in remedies)
    assert "what makes it fit" not in plan(*ONE, "--gpu", "h200")[0]


def test_a_recipe_for_a_cpu_has_no_card(plan: Command) -> None:
    found = json.loads(plan("tiny_test", "--json")[0])
    assert found["fits"] is None and found["hours"] is None and found["memory"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which recipe?"),
        (["trainer.max_steps=1"], "which recipe?"),
        (["llama32_1b", "--gpu", ""], "--gpu='': is not a known GPU"),
        (["tiny_test", "--gpu", ""], "--gpu='': is not a known GPU"),
        (["llama32_1b", "--gpu", "h10"], "--gpu='h10': is not a known GPU"),
        (["llama32_1b", "--gpu", "mine=1,2"], "--gpu='mine=1,2': must be NAME=GiB"),
        (["llama32_1b", "data.micro_batch_size=0"], "data.micro_batch_size=0"),
    ],
)
def test_mistakes_are_said(plan: Command, arguments: list[str], said: str) -> None:
    assert said in plan(*arguments, rc=2)[1]


def test_the_list_of_recipes_has_what_each_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for options in (["--json"], ["--long"]):
        monkeypatch.setattr(sys, "argv", ["fiddlehead", "recipes", "llama3*8b*", *options])
        monkeypatch.setenv("COLUMNS", "250")
        with pytest.raises(SystemExit):
            main()
        out = capsys.readouterr().out
        if options == ["--long"]:
            assert "GiB a GPU" in out and "1 x 8 h100" in out
            continue
        of = {each["name"]: each for each in json.loads(out)}
        assert of["llama3_8b"]["fits"] and of["llama3_8b"]["gpus"] == 8 and of["llama3_8b_64k"]["memory_gib"] < 79
        assert of["llama3_8b"]["hours"] > 0 and of["llama3_8b"]["task"] == "pretrain"


def test_a_recipe_plans_itself_and_a_notebook_shows_it() -> None:
    planned = llama.llama32_1b().plan(gpu="h100")
    assert planned.training.fits and "<td>memory</td><td>fits: h100 has" in planned._repr_html_()
    wrong = llama.llama32_1b()
    wrong.data.micro_batch_size = 0
    assert "<td>problem</td><td>data.micro_batch_size=0" in wrong.plan(gpu="h100")._repr_html_()


def test_the_scripts_are_printed_instead_of_the_plan_and_are_in_the_json(plan: Command) -> None:
    arguments = (*ONE, "executor=docker", "executor.image=fiddlehead:1", "log.name=a", "--script")
    out, _ = plan(*arguments)
    assert out.startswith("=== docker\ndocker run ") and "\n=== job.sh\n#!/bin/bash\n" in out and "on h100" not in out
    found = json.loads(plan(*arguments, "--json")[0])
    assert found["scripts"].keys() == {"docker", "job.sh"} and found["fits"] is True
    assert "name an executor" in plan(*ONE, "--script", rc=2)[1]
