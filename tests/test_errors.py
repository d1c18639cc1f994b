"""Errors for people: a problem is a value, and reads as the line that a user sees."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError, Problem, first_of, refuse

HEADS = Problem("num_query_groups", 3, "does not divide num_attention_heads=8", (1, 2, 4, 8))


def test_a_problem_says_where_what_was_given_and_what_is_allowed() -> None:
    assert HEADS == "num_query_groups=3: does not divide num_attention_heads=8; allowed: 1, 2, 4, 8"
    assert Problem("lr", -1.0, "must be above 0") == "lr=-1.0: must be above 0"
    assert Problem("data", message="is missing") == "data: is missing"
    assert Problem("dir", Path("a/b"), "is not a folder") == "dir='a/b': is not a folder"
    assert Problem("", message="nothing to do") == "nothing to do"
    assert Problem("gpu", None, "name one", ()) == "gpu=None: name one; allowed: none"


def test_a_name_that_is_nearly_right_is_offered() -> None:
    assert (
        Problem.unknown("gpu", "h10", "GPU", ["h100", "l40s"]) == "gpu='h10': unknown GPU 'h10'; did you mean 'h100'?"
    )
    assert Problem.unknown("gpu", "x", "GPU", ["h100"]) == "gpu='x': unknown GPU 'x'; allowed: h100"


def test_a_field_gets_the_path_in_front_and_what_is_in_a_file_does_not() -> None:
    there = Problem.in_file("bad.jsonl:2", "is not valid JSON")
    error = ConfigError(Problem("lr", -1, "must be above 0"), there, Problem("", message="nothing fits"))
    expected = ("b.a.lr=-1: must be above 0", "bad.jsonl:2: is not valid JSON", "nothing fits")
    assert error.under("a").under("").under("b").problems == expected
    assert error.problems[1:] == expected[1:] and str(error.under("a").under("b")) == "\n".join(expected)


def test_the_problems_of_a_file_are_those_of_the_field_that_names_it() -> None:
    error = ConfigError(Problem.in_file("a.json", "is missing")).of("init_from", Path("a")).under("model")
    assert error.problems == ("model.init_from='a': a.json: is missing",)


def test_a_problem_is_the_same_value_in_another_process_and_a_text_in_json() -> None:
    again = pickle.loads(pickle.dumps(HEADS.under("model.config")))
    assert again == f"model.config.{HEADS}" and again.under("x") == f"x.model.config.{HEADS}"
    assert (again.path, again.given, again.message, again.allowed) == (
        "model.config.num_query_groups",
        3,
        "does not divide num_attention_heads=8",
        (1, 2, 4, 8),
    )
    assert json.loads(json.dumps([HEADS])) == [str(HEADS)]


def test_problems_are_refused_together_and_none_is_nothing_to_refuse() -> None:
    refuse([])
    with pytest.raises(ConfigError) as error:
        refuse([HEADS, Problem("lr", 0, "must be above 0")], cause=KeyError("x"))
    assert error.value.problems == (HEADS, "lr=0: must be above 0") and isinstance(error.value.__cause__, KeyError)


def test_of_many_problems_the_first_are_told_and_how_many_more_there_are() -> None:
    problems = [Problem(f"p{number}", message="is wrong") for number in range(1022)]
    assert first_of(problems[:20]) == problems[:20]
    assert ConfigError(*first_of(problems)).under("data").problems[-2:] == ("data.p19: is wrong", "and 1,002 more")


def test_a_long_problem_keeps_its_own_place_when_it_is_shortened() -> None:
    error = ConfigError(Problem.in_file("a.jsonl:2", "x" * 10_000), Problem("b", "y" * 10_000, "is long"))
    there, field = error.under("data").problems
    assert there.startswith("a.jsonl:2: ") and field.startswith("data.b=")
    assert all(len(problem) < 2_100 for problem in (there, field))
