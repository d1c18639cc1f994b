"""`fiddlehead runs compare`, `plot` and `show A B`."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from pathlib import Path

import matplotlib.image
import pytest

from fiddlehead.cli import main
from tests.runs.samples import HOSTILE, made


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs the command in this process; returns the exit code, and what it printed on both streams."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fiddlehead", *arguments])
        path = list(sys.path)
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        finally:
            sys.path[:] = path
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return run


def test_two_runs_are_compared_in_the_terminal(tmp_path: Path, command):
    made(tmp_path, "slow", lr=0.001), made(tmp_path, "fast", lr=0.002)
    code, out, _ = command("runs", "compare", "slow", "fast")
    assert code == 0 and re.search(r"optim\.lr +0\.001 +0\.002", out)
    assert "val_loss" in out and "⣀" in out and len(max(out.splitlines(), key=len)) <= 200
    code, shown, _ = command("runs", "show", "slow", "fast")
    assert code == 0 and out.startswith(shown) and "⣀" not in shown


def test_json_has_numbers_and_hyper_parameters(tmp_path: Path, command):
    made(tmp_path, "a", lr=0.001), made(tmp_path, "b", lr=0.002)
    code, out, _ = command("runs", "compare", "a", "b", "--json", "--x", "tokens", "-m", "val_loss")
    values = json.loads(out)
    assert code == 0 and [run["recipe"]["optim.lr"] for run in values["runs"]] == [0.001, 0.002]
    assert values["runs"][0]["curves"]["val_loss"]["x"] == [20 * 256, 40 * 256]
    assert isinstance(values["runs"][0]["metrics"]["loss"]["final"], float)
    assert values["differences"] == [{"section": "recipe", "path": "optim.lr", "values": [0.001, 0.002]}]


def test_csv_has_every_logged_value(tmp_path: Path, command):
    run = made(tmp_path, "a")
    _, out, _ = command("runs", "plot", "a", "--csv", "-", "--x", "hours")
    rows = list(csv.DictReader(io.StringIO(out)))
    logged = list(csv.DictReader(io.StringIO(run.metrics.read_text())))
    assert len(rows) == len(logged) == 42
    for row, was in zip(rows, logged, strict=True):
        assert float(row["hours"]) == pytest.approx(int(row["step"]) * 0.1 / 3600)
        assert row["run"] == "a" and row["val_loss"] == was["val_loss"] and float(row["step"]) == float(was["step"])


def test_files_are_written_where_they_are_asked_for(tmp_path: Path, command):
    made(tmp_path, "a"), made(tmp_path, "b")
    code, out, err = command("runs", "compare", "a", "b", "--png", "x.png", "--html", "x.html")
    assert (code, out) == (0, "") and "wrote x.png" in err and "wrote x.html" in err
    assert matplotlib.image.imread(tmp_path / "x.png").shape[1] == 1200
    page = (tmp_path / "x.html").read_text()
    assert "MIT License" in page and not re.search(r"(src|href)=|@import|url\(", page.replace("src|href", ""))


def test_hostile_names_stay_text(tmp_path: Path, command):
    name = HOSTILE.replace("/", "_")
    made(tmp_path, name), made(tmp_path, "$x^{2")
    assert command("runs", "compare", name, "$x^{2", "--html", "x.html", "--png", "x.png")[0] == 0
    page = (tmp_path / "x.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "\\u003cscript" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "a"], "nothing to compare 'a' with"),
        (["compare", "a", "c"], "unknown run 'c'"),
        (["plot", "a", "--x", "time"], "--x='time': unknown axis 'time'; allowed: step, tokens, hours"),
        (["plot", "a", "--smooth", "1"], "--smooth=1.0: must be at least 0 and below 1"),
        (["plot", "a", "--smooth", "nan"], "--smooth=nan: must be at least 0 and below 1"),
        (["plot", "a", "-m", "los"], "unknown metric 'los'; did you mean 'loss'?"),
        (["plot", "a", "--png", "x.bmpp"], "--png='x.bmpp': cannot be written"),
        (["plot", "a", "--html", "no/x.html"], "--html='no/x.html': cannot be written"),
    ],
)
def test_mistakes_are_said(tmp_path: Path, command, arguments: list[str], said: str):
    made(tmp_path, "a")
    code, _, err = command("runs", *arguments)
    assert code == 2 and said in err and "Traceback" not in err, err


def test_a_sweep_has_its_table_in_files_and_a_picture(tmp_path: Path, command):
    variants = []
    for lr in ("0.001", "0.003", "0.002"):
        made(tmp_path, f"s-lr={lr}", lr=float(lr))
        variants.append({"name": f"s-lr={lr}", "values": {"optim.lr": lr}})
    sweep = {"name": "s", "directory": "runs", "variants": variants}
    (tmp_path / "runs" / "s.sweep.json").write_text(json.dumps(sweep))
    code, out, _ = command("runs", "sweep", "s", "--csv", "-", "--html", "x.html", "--png", "x.png")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and [row["optim.lr"] for row in rows] == ["0.003", "0.002", "0.001"]
    assert matplotlib.image.imread(tmp_path / "x.png").shape[1] == 1200
    page = (tmp_path / "x.html").read_text()
    assert page.count("<polyline") == 6 and "s-lr=0.003" in page
    code, out, _ = command("runs", "sweep", "s", "--json")
    values = json.loads(out)
    assert [run["recipe"]["optim.lr"] for run in values["runs"]] == [0.003, 0.002, 0.001]
    assert isinstance(values["runs"][0]["val_loss"], float)
    assert command("runs", "sweep", "s")[1].index("s-lr=0.003") < command("runs", "sweep", "s")[1].index("s-lr=0.001")


def test_the_best_of_a_rate_is_the_highest(tmp_path: Path, command):
    for name, rate in (("a", 10), ("b", 30), ("c", 20)):
        made(tmp_path, name).metrics.write_text(f"step,tokens_per_s\n1,{rate}\n")
    variants = [{"name": name, "values": {"seed": name}} for name in "abc"]
    (tmp_path / "runs" / "s.sweep.json").write_text(
        json.dumps({"name": "s", "directory": "runs", "variants": variants})
    )
    _, out, _ = command("runs", "sweep", "s", "--metric", "tokens_per_s", "--json")
    assert [run["run"] for run in json.loads(out)["runs"]] == ["b", "c", "a"]


def test_runs_that_have_logged_nothing_are_compared_too(tmp_path: Path, command):
    made(tmp_path, "a").metrics.unlink(), made(tmp_path, "b", lr=0.002, steps=0)
    code, out, _ = command("runs", "compare", "a", "b", "--html", "x.html", "--png", "x.png")
    assert (code, out) == (0, "")
    code, out, _ = command("runs", "compare", "a", "b")
    assert code == 0 and "optim.lr" in out and "no loss was logged yet" in out
