"""What runs differ in, as they have recorded it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fiddlehead.errors import ConfigError
from fiddlehead.recipe.plain import flat
from fiddlehead.run.directory import RunDirectory
from fiddlehead.runs import open_record
from fiddlehead.runs.compare import MISSING, differences, results, show_value
from fiddlehead.runs.curves import charts, short, ticks, unique_names
from tests.runs.samples import made


def found(*runs: RunDirectory) -> list[tuple[str, str, tuple]]:
    records = [open_record(str(run.path)) for run in runs]
    return [(each.section, each.path, each.values) for each in differences(records)]


def test_runs_that_differ_in_their_names_only_do_not_differ(tmp_path: Path):
    assert not found(made(tmp_path, "a"), made(tmp_path, "b"))


def test_a_difference_is_said_of_recipe_code_data_and_machine(tmp_path: Path):
    a = made(tmp_path, "a", lr=0.001)
    git = {"revision": "b" * 40, "patch": "+1\n-2\n"}
    b = made(tmp_path, "b", lr=0.002, data="other", git=git, packages={"torch": "2.12.0"}, host="n2", gpus=["H100"])
    for run, sha256 in ((a, "1" * 64), (b, "2" * 64)):
        for step, data in ((10, "0" * 64), (20, sha256)):  # the newest counts
            state = run.checkpoints / f"step-{step:08}" / "state.json"
            state.parent.mkdir(parents=True)
            state.write_text(json.dumps({"data": {"train": [["train.bin", data]]}}))
    differing = found(a, b)
    assert ("recipe", "optim.lr", (0.001, 0.002)) in differing
    assert ("recipe", "data.paths", ("corpus", "other")) in differing
    assert ("code", "revision", ("a" * 40, "b" * 40)) in differing
    assert any(path == "uncommitted changes" and values[0] == MISSING for _, path, values in differing)
    assert ("data", "train: train.bin", ("1" * 64, "2" * 64)) in differing
    assert ("machine", "host", ("n1", "n2")) in differing and ("machine", "gpus", (MISSING, ["H100"])) in differing
    assert ("packages", "torch", ("2.13.0", "2.12.0")) in differing
    assert len(differing) == 8


def test_shipped_copies_are_compared_file_by_file(tmp_path: Path):
    runs = [made(tmp_path, name) for name in "abc"]
    for number, run in enumerate(runs):
        (run.code / "recipes").mkdir(parents=True)
        (run.code / "recipes" / "mine.py").write_text(f"lr = {number // 2}\n")
        (run.code / "same.py").write_text("pass\n")
        os.symlink("/etc/passwd", run.code / "link")
    (runs[2].code / "new.py").write_text("")
    assert not found(*runs[:2])
    assert {path for _, path, _ in found(*runs)} == {"recipes/mine.py", "new.py"}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("environment.json", "{"),
        ("environment.json", '{"git": 3, "packages": []}'),
        ("code.json", "[]"),
        ("recipe.yaml", "a: [\n"),
        ("recipe.yaml", "- 1\n"),
        ("recipe.yaml", "a: &a [*a]\n"),
        ("recipe.yaml", "a: &a [1,1,1,1,1,1,1,1,1,[]]\n" + "".join(
            f"{chr(97 + n)}: &{chr(97 + n)} [{','.join(['*' + chr(96 + n)] * 9)}]\n" for n in range(1, 9))),
        ("metrics.csv", "step,loss\n1,what\n"),
        ("checkpoints/step-00000001/state.json", '{"data": {"train": 3}}'),
    ],
)  # fmt: skip
def test_a_damaged_file_keeps_the_rest_from_nobody(tmp_path: Path, file: str, content: str):
    a, b = made(tmp_path, "a"), made(tmp_path, "b")
    (a.path / file).parent.mkdir(parents=True, exist_ok=True)
    (a.path / file).write_text(content)
    records = [open_record(str(run.path)) for run in (a, b)]
    assert len(differences(records)) < 20 and results([record.history for record in records])
    assert content.startswith('{"git": 3') or any(file in problem for problem in records[0].problems)


def test_the_results_are_the_final_and_the_best_values(tmp_path: Path):
    run = made(tmp_path, "a")
    run.metrics.write_text("step,loss,lr\n1,3,1\n2,1,2\n3,2,3\n")
    other = made(tmp_path, "b")
    other.metrics.write_text("step,val_loss\n1,nan\n")
    records = results([open_record(str(each.path)).history for each in (run, other)])
    assert [(each.final, each.best, each.best_step) for each in records["loss"]] == [(2, 1, 2), (None, None, None)]
    assert records["lr"][0].best is None and records["val_loss"][1].best is None


def test_a_run_that_is_not_there_is_said_with_its_neighbours(tmp_path: Path):
    made(tmp_path, "first")
    with pytest.raises(ConfigError, match=r"unknown run 'frist'.*did you mean 'first'"):
        open_record("frist", tmp_path / "runs")


def test_a_copied_run_of_the_same_name_is_told_apart_by_its_folder(tmp_path: Path):
    runs = made(tmp_path, "a"), made(tmp_path / "copied", "a")
    names = unique_names([open_record(str(run.path)) for run in runs])
    assert names == [str(run.path) for run in runs]


def test_a_metric_or_an_axis_that_no_run_has_is_refused(tmp_path: Path):
    record = open_record(str(made(tmp_path, "a").path))
    with pytest.raises(ConfigError, match=r"unknown metric 'vla_loss'.*did you mean 'val_loss'"):
        charts([record], ["vla_loss"])
    with pytest.raises(ConfigError, match=r"--smooth=1.0: must be at least 0 and below 1"):
        charts([record], smooth=1.0)


def test_leaves_have_paths_as_edits_have(tmp_path: Path):
    value = {"_target_": "m:f", "a": {"_target_": "m:A", "b": [1, 2]}, "c": [{"d": 1}, 2], "e": {}}
    assert flat(value) == {"task": "m:f", "a": "m:A", "a.b": [1, 2], "c[0].d": 1, "c[1]": 2, "e": {}}


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.31, 2.35), (-5, 1e9), (1e-9, 3e-9), (0, 7)])
def test_ticks_are_round_and_inside(low: float, high: float):
    found, margin = ticks(low, high), 1e-6 * (high - low)
    assert 2 <= len(found) <= 6 and all(low - margin <= tick <= high + margin for tick in found)
    assert len({short(tick) for tick in found}) == len(found)


def test_what_a_run_says_cannot_steer_the_terminal():
    assert show_value("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"
