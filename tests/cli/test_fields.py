"""`fiddlehead help`, completion, and what a help text shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fiddlehead.cli import app, command, completion, main
from fiddlehead.recipe.fields import known_fields


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIDDLEHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        known_fields()
        yield


@pytest.fixture
def fiddlehead(tmp_path, monkeypatch, capsys):
    """Types a command on a terminal of 80 columns; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def typed(*arguments: str, rc: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["fiddlehead", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        assert (exit.value.code or 0) == rc, out + err
        return out + err

    return typed


def offers(*words: str, incomplete: str, factory: str = "") -> list[str]:
    context: Any = SimpleNamespace(params={"words": words, "factory": factory})
    return [word for word, _ in completion.complete_words(context, incomplete)]


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ((), "llama32", ["llama32_1b", "llama32_3b"]),
        (("tiny",), "trainer.max_s", ["trainer.max_steps=", "trainer.max_steps=-1"]),
        (("tiny",), "optim.lr_s", None),
        (("tiny",), "model.compile=", ["model.compile=layers", "model.compile=model", "model.compile=None"]),
        (("tiny",), "model.compile=la", ["model.compile=layers"]),
        (("tiny",), "log.wandb=", ["log.wandb=true", "log.wandb=false", "log.wandb=False"]),
        (("tiny",), "optim=", ["optim=AdamW", "optim=Muon"]),
        (("tiny",), "executor=", ["executor=docker", "executor=local", "executor=slurm"]),
        (("tiny", "executor=slurm"), "executor.gr", ["executor.gres=", "executor.gres=None"]),
        (("tiny", "executor=local"), "executor.gr", []),
        (("tiny",), "nothing", []),
        (("tiny",), "nothing=", []),
        # As bash splits them.
        (("tiny", "model.compile"), "=", ["layers", "model", "None"]),
        (("tiny", "model.compile", "="), "mo", ["model"]),
        (("tiny", "executor", "="), "s", ["slurm"]),
        (("tiny", "executor", "=", "slurm"), "executor.qo", ["executor.qos=", "executor.qos=None"]),
    ],
)
def test_a_shell_is_offered_recipes_paths_and_values(words, incomplete, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = offers(*words, incomplete=incomplete)
    if expected is None:
        assert "optim.lr_scheduler.warmup_steps=" in found
    else:
        assert sorted(found) == sorted(expected)


def test_after_a_recipe_by_option_the_first_word_is_an_edit_and_runs_are_offered(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("{}")
    assert "seed=" in offers(incomplete="se", factory="tiny")
    assert offers("lora", incomplete="model.init_from=mi") == ["model.init_from=mine"]


def test_completion_needs_no_torch_once_the_fields_are_known(tmp_path) -> None:
    code = (
        "import sys; from types import SimpleNamespace as N; "
        "from fiddlehead.cli.completion import complete_words as c; "
        "print(len(c(N(params={'words': ['tiny']}), 'trainer.'))); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    count, torch = result.stdout.split()
    assert int(count) > 30 and torch == "False", result.stderr


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("model.compile", ["layers, model, None", "may change", "What `torch.compile` compiles at once"]),
        ("optim.lr", ["of AdamW", "of Muon", "0.0003", "must stay the same"]),
        ("executor.time", ["of slurm", "01:00:00"]),
        ("executor.python", ["of slurm", "of local", "of docker"]),
        ("num_query_groups", ["model.config.num_query_groups", "int | None"]),
        ("optim", ["AdamW, Muon", "optim.weight_decay", "The peak learning rate"]),
        ("pretrain", ["Usage: fiddlehead pretrain", "--dryrun"]),
    ],
)
def test_help_explains_a_field_or_a_command(fiddlehead, field, expected) -> None:
    output = fiddlehead("help", field)
    assert all(text in output for text in expected), output
    assert max(map(len, output.splitlines())) <= 80


def test_help_explains_a_command_of_a_group_and_all_commands(fiddlehead) -> None:
    assert "Usage: fiddlehead runs show" in fiddlehead("help", "runs", "show")
    assert "pretrain" in fiddlehead("help")


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("optim.lrr", "did you mean optim.lr"),
        ("trainer.max_step", "did you mean trainer.max_steps"),
        ("warmup_step", "optim.lr_scheduler.warmup_steps"),
        ("seq_length", "data.seq_length"),
        ("executor.tme", "did you mean executor.time"),
        ("zzzz", "`fiddlehead help model` lists"),
    ],
)
def test_a_field_that_is_not_there_is_answered_with_the_nearest(fiddlehead, field, near) -> None:
    assert near in fiddlehead("help", field, rc=2)


def test_the_schema_is_printed_as_json(fiddlehead) -> None:
    assert "oneOf" in json.loads(fiddlehead("schema"))


def paths_of(group: Any, *above: str) -> list[tuple[str, ...]]:
    commands = getattr(group, "commands", {})
    return [above, *(path for name, each in commands.items() for path in paths_of(each, *above, name))]


def test_a_help_text_fits_80_columns_and_shows_no_python_types(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    made = command.made_of(app)
    for path in paths_of(made):
        with pytest.raises(SystemExit):
            made([*path, "--help"], prog_name="fiddlehead")
        for line in capsys.readouterr().out.splitlines():
            assert len(line) <= 80 and not re.search(r"<\w+|\[\[|\{\w", line), (path, line)


@pytest.mark.parametrize("name", ["pretrain", "plan", "bench", "show"])
def test_a_recipe_is_named_by_the_first_word_or_by_an_option(fiddlehead, name) -> None:
    refused = [fiddlehead(name, *words, "optim.lr=fast", rc=2) for words in (["tiny"], ["-f", "tiny"])]
    assert refused[0] == refused[1] and "optim.lr" in refused[0]
    assert f"which recipe? fiddlehead {name} RECIPE" in fiddlehead(name, "optim.lr=1", rc=2)
