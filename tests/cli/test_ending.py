"""What a command says at the end of a run, and how an error is printed on a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fiddlehead import cli
from fiddlehead.cli.ending import say_ending, say_failure
from fiddlehead.launch import RunFailedError
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.status import State, Status


@pytest.mark.parametrize(
    ("state", "folder", "expected"),
    [
        (State.SUCCEEDED, "runs", ["a succeeded in 3 min 20 s; it is in runs/a", "generate a --prompt", "runs show a"]),
        (State.FAILED, "runs", ["a failed in 3 min 20 s", "runs show a ", "runs rerun a "]),
        (State.CANCELLED, "other", ["it is in other/a", "runs rerun a --dir other"]),
        (State.SUCCEEDED, "other", ["generate other/a --prompt", "runs show a --dir other"]),
    ],
)
def test_a_run_ends_with_where_it_is_how_long_it_took_and_what_to_do_next(
    state: State, folder: str, expected: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    say_ending(RunDirectory(tmp_path / folder / "a"), Status(state, started=100.0, ended=300.0))
    printed = capsys.readouterr().out
    assert all(text in printed for text in expected), printed


def test_a_terminal_has_the_reason_of_a_failure_once(tmp_path: Path, capsys, monkeypatch) -> None:
    run = RunDirectory(tmp_path / "a")
    (run.checkpoints / "step-00000004").mkdir(parents=True)
    failure = RunFailedError(run, Status(State.FAILED, started=100.0, ended=300.0, reason="step 5: not finite"))
    for log, shown in (("step 4\nerror: step 5: not finite. It goes on from step 4\n", False), ("step 4\n", True)):
        run.log.write_text(log)
        say_failure(failure)
        assert "FAILED: step 5: not finite" in capsys.readouterr().err  # a file or a pipe has it anyway
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        say_failure(failure)
        printed = capsys.readouterr()
        assert ("FAILED: step 5: not finite" in printed.err) == shown
        monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
        assert "a failed in 3 min 20 s" in printed.out and "go on from its newest checkpoint" in printed.out
    (run.checkpoints / "step-00000004").rmdir()
    say_failure(failure)
    assert "start it again" in capsys.readouterr().out


def test_an_error_on_a_terminal_ends_its_lines_between_words(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = "error: model.config.num_query_groups=3: does not divide num_attention_heads=4; allowed: 1, 2, 4, None"
    cli._say(text)
    assert capsys.readouterr().err == f"{text}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli._say(text)
    printed = capsys.readouterr().err
    assert max(map(len, printed.splitlines())) <= 40 and " ".join(printed.split()) == text
    assert "model.config.num_query_groups=3:" in printed.split()
    cli._say(f"error: two ways:\n  {text}\nor none")
    first, *way, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("error: two ways:", "or none")
    assert [len(line) - len(line.lstrip()) for line in way] == [2, *[4] * (len(way) - 1)] and len(way) > 1
