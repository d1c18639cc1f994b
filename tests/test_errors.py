"""Errors for people: each problem begins with a field, or says that it is elsewhere."""

from __future__ import annotations

import pickle

from fiddlehead.errors import ConfigError, Elsewhere, first_of


def test_a_field_gets_the_path_in_front_and_what_is_in_a_file_does_not() -> None:
    error = ConfigError("lr=-1: must be above 0", Elsewhere("bad.jsonl:2: is not valid JSON"))
    assert error.under("optim").under("").problems == ("optim.lr=-1: must be above 0", "bad.jsonl:2: is not valid JSON")
    assert error.under("a").under("b").problems == ("b.a.lr=-1: must be above 0", "bad.jsonl:2: is not valid JSON")


def test_what_is_elsewhere_is_so_in_another_process_too() -> None:
    assert isinstance(pickle.loads(pickle.dumps(Elsewhere("a.jsonl:1: x"))), Elsewhere)


def test_of_many_problems_the_first_are_told_and_how_many_more_there_are() -> None:
    problems = [f"p{number}" for number in range(1022)]
    assert first_of(problems[:20]) == problems[:20]
    assert ConfigError(*first_of(problems)).under("data").problems[-2:] == ("data.p19", "and 1,002 more")


def test_a_long_problem_keeps_its_own_place_when_it_is_shortened() -> None:
    error = ConfigError(Elsewhere("a.jsonl:2: " + "x" * 10_000), "b=" + "y" * 10_000)
    there, field = error.under("data").problems
    assert there.startswith("a.jsonl:2: ") and field.startswith("data.b=")
    assert all(len(problem) < 2_100 for problem in (there, field))
