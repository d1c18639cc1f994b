"""The comparison of measurements."""

from __future__ import annotations

import importlib
import json
import math
import operator
import re
import sys
from pathlib import Path

import pytest

from fiddlehead import environment
from fiddlehead.environment import describe_gpus, describe_machine
from fiddlehead.errors import ConfigError
from fiddlehead.figures import compare, read
from fiddlehead.recipe import catalog
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.training import Parallel

BEFORE = {
    "figures": {"rate": 100, "steps": {"min": 1.0, "median": 2.0, "max": 9.0}, "shapes": [{"ms": 4.0}], "old": 1},
    "where": {"cpu": "A", "gpus": [{"name": "H100", "sm_mhz": 1980.0}], "date": "then", "versions": {"torch": "2.12"}},
}
NOW = {
    "figures": {"rate": 150, "steps": {"min": 1.5, "median": 2.02, "max": 3.0}, "shapes": [{"ms": 3.0}], "new": 1},
    "where": {"cpu": "A", "gpus": [{"name": "H200", "sm_mhz": 1500.0}], "date": "now", "versions": {"torch": "2.13"}},
}


def test_each_figure_is_compared_with_the_same_one_before():
    found = compare(BEFORE, NOW)
    assert {change.name: round(change.relative, 4) for change in found.changes} == {
        "rate": 0.5,
        "steps": 0.01,
        "shapes[0].ms": -0.25,
    }
    assert found.missing == ("old", "new")
    assert found.conditions == (
        "gpus[0].name was H100 and is H200",
        "versions.torch was 2.12 and is 2.13",
    )
    assert list(found.lines())[2:] == [
        "rate: 100 before, 150 now, +50.0%",
        "shapes[0].ms: 4 before, 3 now, -25.0%",
        "1 of 3 figures within 2% of before",
        "in one of the two only: old, new",
    ]
    assert list(compare(NOW, NOW).lines()) == ["4 of 4 figures within 2% of before"]


def test_many_without_a_counterpart_are_counted():
    many = {"figures": {"losses": list(range(1, 31))}}
    *_, last = compare({"figures": {"losses": [1]}}, many).lines()
    assert last.startswith("in one of the two only: losses[1], losses[2],")
    assert last.endswith("losses[20], and 9 more")


def test_a_change_from_zero_is_a_complete_change():
    zero, one = ({"figures": {"errors": count}} for count in (0, 1))
    assert [change.relative for change in compare(zero, one).changes] == [1.0]
    assert [change.relative for change in compare(zero, zero).changes] == [0.0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"figures": 3}', "\x00"])
def test_a_file_without_figures_is_refused(tmp_path: Path, text: str):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/f.json: has no figures")):
        read(tmp_path / "f.json")
    with pytest.raises(ConfigError, match=r"g\.json: cannot be read: No such file or directory"):
        read(tmp_path / "g.json")


def test_benchmarks_print_the_change_since_the_file_they_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    measure = importlib.import_module("measure")
    try:
        measure.save("speed", {"rate": 100, "seconds": measure.Spread(1.0, 2.0, 3.0)}, ["torch"], folder=tmp_path)
        assert capsys.readouterr().out == f"\nwrote {tmp_path}/speed.json\n"
        written = read(tmp_path / "speed.json")
        assert written["figures"] == {"rate": 100, "seconds": {"min": 1.0, "median": 2.0, "max": 3.0}}
        assert {"date", "cpu", "gpus", "versions", "revision"} <= set(written["where"])
        measure.save("speed", {"rate": 80, "seconds": measure.Spread(0.5, 2.0, 9.0)}, ["torch"], folder=tmp_path)
        date = written["where"]["date"]
        assert capsys.readouterr().out.splitlines()[2:] == [
            f"since {date}:",
            "- rate: 100 before, 80 now, -20.0%",
            "- 1 of 2 figures within 2% of before",
        ]
        assert read(tmp_path / "speed.json")["figures"]["rate"] == 80
    finally:
        del sys.modules["measure"]


def test_a_comparison_of_programs_whose_losses_differ_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    arms = importlib.import_module("arms")
    try:
        check = arms.check_losses
        ours = {"a:4": {"losses": [12.0, 19.0, 10.0]}, "b:4": {"losses": [12.001, 11.0, 10.04]}}
        batch = operator.itemgetter(2)
        check(ours | {"b:8": {"losses": [11.0, 9.0]}, "c:4": {"failed": "out of memory"}}, batch)
        for other in ([12.1, 19.0, 10.0], [12.0, 19.0, 10.2], [12.0, 19.0, math.nan]):
            with pytest.raises(SystemExit, match="losses differ by more than"):
                check(ours | {"c:4": {"losses": other}}, batch)
        say = [sys.executable, "-c", "print('noise'); input(); print('{\"a\": 1}')"]
        fails = [sys.executable, "-c", "raise SystemExit('no memory')"]
        assert arms.run_arms({"one": say, "two": fails}, 60) == {"one": {"a": 1}, "two": {"failed": "no memory"}}
    finally:
        del sys.modules["arms"]


def test_the_results_that_are_kept_can_be_compared():
    files = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        results = read(file)
        assert results["where"]["date"], file
        found = compare(results, results)
        assert found.changes and not found.missing and not found.conditions, file


def test_gpus_are_described_as_far_as_they_tell(monkeypatch: pytest.MonkeyPatch):
    row = "NVIDIA H100 80GB HBM3, 570.1, 1755, 1980, 2619, 612.40, 700.00, 61"
    partial = "NVIDIA H100 MIG 1g, 570.1, [N/A], 1980, 2619, [Insufficient Permissions], 700.00, 61"
    monkeypatch.setattr(environment, "_lines", lambda *command: [row, partial] if command[0] == "nvidia-smi" else [])
    whole, part = describe_gpus()
    assert whole["name"] == "NVIDIA H100 80GB HBM3" and whole["sm_mhz"] == 1755 and whole["watts"] == 612.4
    assert "sm_mhz" not in part and "watts" not in part and part["max_sm_mhz"] == 1980
    assert json.loads(json.dumps(describe_machine(["torch", "nosuch"])))["versions"].keys() == {"torch"}


def test_each_case_of_a_benchmark_is_a_run_that_can_be_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    many, plan = (importlib.import_module(name) for name in ("many", "plan"))
    try:
        plan.fill()
        made = {name: (recipe, edits) for name, (recipe, _, edits) in many.timed(8).items()} | plan.CASES
        for recipe, edits in made.values():
            apply_overrides(catalog.find_recipe(recipe)(), edits, find=catalog.find_part)
        for _, sizes in many.LAYOUTS.values():
            Parallel(**sizes)
    finally:
        for name in ("many", "plan", "measure"):
            sys.modules.pop(name, None)
