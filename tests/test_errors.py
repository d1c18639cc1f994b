"""Errors for people: a problem is a value, and reads as the line that a user sees."""

from __future__ import annotations

import ast
import json
import pickle
import re
from collections.abc import Iterator
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


def test_of_many_problems_the_first_and_the_number_of_others_are_printed() -> None:
    problems = [Problem(f"p{number}", message="is wrong") for number in range(1022)]
    assert first_of(problems[:20]) == problems[:20]
    assert ConfigError(*first_of(problems)).under("data").problems[-2:] == ("data.p19: is wrong", "and 1,002 more")


def test_a_long_problem_keeps_its_own_place_when_it_is_shortened() -> None:
    error = ConfigError(Problem.in_file("a.jsonl:2", "x" * 10_000), Problem("b", "y" * 10_000, "is long"))
    there, field = error.under("data").problems
    assert there.startswith("a.jsonl:2: ") and field.startswith("data.b=")
    assert all(len(problem) < 2_100 for problem in (there, field))


ROOT = Path(__file__).parents[1]
LISTS = ("problems", "found", "wrong")
FIELD = re.compile(r"[A-Za-z_]([\w.]|\{[^}]*\})*(=|: )")


def test_no_text_spells_a_field_where_a_problem_has_a_path() -> None:
    files = (file for folder in ("src", "launch", "recipes") for file in sorted((ROOT / folder).rglob("*.py")))
    names = ((file, file.relative_to(ROOT).as_posix()) for file in files)
    assert [found for file, name in names for found in spelled(file, name)] == []


@pytest.mark.parametrize(
    "line",
    [
        'raise ConfigError("data: is missing")',
        'raise ConfigError(*(f"lr={lr}: too low" for lr in rates))',
        'problems.append(f"lr={lr}: too low")',
        'problems = [] if lr else ["lr=0: too low"]',
        'found += [f"model.{name}: is missing" for name in names]',
    ],
)
def test_a_spelled_field_is_found(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(line)
    assert len(list(spelled(tmp_path / "a.py", "a.py"))) == 1
    (tmp_path / "a.py").write_text('raise ConfigError("there is no run", Problem("lr", 0, f"lr={lr}: too low"))')
    assert not list(spelled(tmp_path / "a.py", "a.py"))


def spelled(file: Path, name: str) -> Iterator[str]:
    """The texts of a file that are given to ConfigError, or added to a list of problems, and begin with a field."""
    for node in ast.walk(ast.parse(file.read_text())):
        given: list[ast.expr] = []
        match node:
            case ast.Call(func=ast.Name(id="ConfigError" | "refuse"), args=args):
                given = args
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr="append"), args=args) if owner in LISTS:
                given = args
            case ast.Assign(targets=[ast.Name(id=owner)], value=value) if owner in LISTS:
                given = [value]
            case ast.AugAssign(target=ast.Name(id=owner), value=value) if owner in LISTS:
                given = [value]
        for text in (text for each in given for text in texts(each)):
            if FIELD.match(text):
                yield f"{name}: {text}"


def texts(node: ast.expr) -> Iterator[str]:
    """The texts that an expression gives as they are, or as members; the arguments of calls are not among them."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr():
            yield ast.unparse(node)[2:-1]
        case ast.Starred(value=inner) | ast.GeneratorExp(elt=inner) | ast.ListComp(elt=inner):
            yield from texts(inner)
        case ast.List(elts=members) | ast.Tuple(elts=members):
            for member in members:
                yield from texts(member)
        case ast.BoolOp(values=operands):
            for operand in operands:
                yield from texts(operand)
        case ast.IfExp(body=body, orelse=orelse):
            yield from texts(body)
            yield from texts(orelse)
        case ast.BinOp(left=left, right=right):
            yield from texts(left)
            yield from texts(right)
