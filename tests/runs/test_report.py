"""The page of a run."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from fiddlehead import plan
from fiddlehead.errors import format_warning
from fiddlehead.launch import launch
from fiddlehead.recipe import Recipe
from fiddlehead.recipe.edits import apply_overrides
from fiddlehead.recipes.tiny import tiny_test
from fiddlehead.run.directory import RunDirectory
from fiddlehead.run.names import find_run
from fiddlehead.run.status import State
from fiddlehead.runs.curves import short
from fiddlehead.runs.events import read_events
from fiddlehead.runs.page import page, table
from fiddlehead.runs.report import report
from tests.runs.samples import HOSTILE, made

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOG = f"""\
=== started 2026-01-01T10:00:00+0000 on n1 (slurm job 7)
run runs/a: starts anew
WARNING: {HOSTILE}
WARNING: {HOSTILE}
step      1/40 [----]  loss 5.0
step     20  asked 'What?', it answers '{HOSTILE}'
stopped at step 20: SIGTERM
=== started 2026-01-01T11:00:00+0000 on n2 (slurm job 7, restart 1)
run runs/a: continues from runs/a/checkpoints/step-00000020
RuntimeError: {HOSTILE}
"""


class Page(HTMLParser):
    """The elements of a page, and its text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data


def hostile(folder: Path) -> RunDirectory:
    """A run whose every foreign text is hostile."""
    name = HOSTILE.replace("/", "_")
    run = made(folder, name, data=HOSTILE, host=HOSTILE, gpus=[HOSTILE], packages={HOSTILE: HOSTILE})
    git = {"revision": HOSTILE, "patch": f"+{HOSTILE}\n", "untracked": [HOSTILE]}
    run.environment.write_text(json.dumps({**json.loads(run.environment.read_text()), "git": git}))
    run.log.write_text(LOG)
    run.command.write_text(f"fiddlehead {HOSTILE}\n")
    run.sources.write_text(json.dumps({"optim.lr": HOSTILE}))
    (run.path / "plan.json").write_text(json.dumps({"tokens_per_s": 2000.0, "gpu": HOSTILE, "mfu": HOSTILE}))
    served = {
        "layers": [0, 1, 3],
        "during": HOSTILE,
        "backend": HOSTILE,
        "asked": "auto",
        "reasons": {HOSTILE: HOSTILE},
    }
    (run.path / "attention.json").write_text(json.dumps([served]))
    run.metrics.write_text(run.metrics.read_text().replace("memory_gib", '"<script>alert(2)</script>"'))
    status = run.written_status()
    assert status is not None
    run.write_status(replace(status, state=State.FAILED, reason=HOSTILE))
    return run


def test_foreign_text_is_text_wherever_it_stands(tmp_path: Path):
    run = hostile(tmp_path)
    text = report(run, run.status(), HOSTILE)
    page = Page(text)
    assert "<script>alert" not in text and page.text.count(HOSTILE) > 15
    assert not [tag for tag, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    scripts = [attributes.get("type") for tag, attributes in page.tags if tag == "script"]
    assert scripts.count(None) == 1 and set(scripts) == {None, "application/json"}
    assert not [1 for _, attributes in page.tags if {"src", "href"} & {*attributes} and "#" not in attributes["href"]]


def test_the_page_has_the_plan_the_kernels_the_events_and_where_values_were_set(tmp_path: Path):
    run = made(tmp_path, "a")
    run.log.write_text(LOG)
    run.sources.write_text(json.dumps({"optim.lr": "command line: optim.lr=0.001"}))
    (run.path / "plan.json").write_text(
        json.dumps({"tokens_per_s": 2000.0, "memory_gib": 2.0, "gpu": "h100", "mfu": None})
    )
    served = {
        "layers": [0, 1, 3],
        "during": "training",
        "backend": "flash3",
        "asked": "auto",
        "reasons": {"cudnn": "no"},
    }
    (run.path / "attention.json").write_text(json.dumps([served]))
    page = Page(report(run, run.status()))
    assert "tokens/s2,0002,560+28.0%" in page.text and "memory (GiB)21.5-25.0%" in page.text
    assert "0-1, 3trainingflash3autocudnn: no" in page.text
    assert "(2 times)" in page.text and "stopped at step 20: SIGTERM" in page.text
    assert "optim.lr0.001command line: optim.lr=0.001" in page.text
    assert "100.0 ms" in page.text and "data 20.0 ms (20%)" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 5


def test_a_long_name_breaks_at_its_dots_and_no_cell_heads_a_column_without_a_title():
    made_table = table(["", "b"], [["model.config.hidden_size", "0.003"], ["data:Fine", 7]])
    assert "model.<wbr>config.<wbr>hidden_<wbr>size" in made_table and "<td>0.003</td>" in made_table
    assert (
        "data:<wbr>Fine" in made_table
        and "<td class=n>7</td>" in made_table
        and "<th scope=col></th>" not in made_table
    )
    text = page("title", "body")
    assert text.count("<main>") == text.count("</main>") == 1 and "<html lang=en>" in text and "<title>title<" in text


@pytest.mark.parametrize(
    "name", ["status", "plan.json", "attention.json", "sources.json", "environment.json", "log.txt"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\0", b'{"a": "\\ud800"}', b"null"])
def test_a_damaged_file_is_a_problem_on_the_page(tmp_path: Path, name: str, content: bytes):
    run = made(tmp_path, "a")
    (run.path / name).write_bytes(content)
    page = Page(report(run, None))
    assert "val_loss" in page.text
    assert name in page.text or name == "log.txt" or b"ud800" in content  # that is an object, though with half a letter


def test_a_run_that_has_only_a_recipe_has_a_page(tmp_path: Path):
    run = RunDirectory(tmp_path / "a")
    run.path.mkdir()
    run.recipe.write_text("")
    shown = report(run, None)
    assert "no metrics yet" in shown and "final, and best" not in shown


def test_enormous_numbers_are_short():
    assert (short(2e29), short(-4.5e15), short(9.9e14)) == ("2e29", "-4.5e15", "990T")


def test_a_warning_is_one_line_and_an_event_of_the_log(tmp_path: Path):
    ours = format_warning(UserWarning("skipped 6 files"), UserWarning, plan.__file__, 47)
    other = format_warning("few workers", FutureWarning, "/a lib/trainer.py", 7, "code")
    assert (ours, other) == ("WARNING: skipped 6 files\n", "/a lib/trainer.py:7: FutureWarning: few workers\n")
    (tmp_path / "log.txt").write_text(ours + other + "no:warning: 1\n")
    events, _ = read_events(tmp_path / "log.txt")
    assert [(event.kind, f"{event.text}\n") for event in events] == [("warning", ours), ("warning", other)]


def test_events_are_found_in_the_log(tmp_path: Path):
    (tmp_path / "log.txt").write_text(LOG)
    events, cut = read_events(tmp_path / "log.txt")
    kinds = ["attempt", "start", "warning", "sample", "stop", "attempt", "start", "error"]
    assert [event.kind for event in events] == kinds and events[2].count == 2 and not cut


def test_a_launch_says_where_each_value_was_set_and_a_rerun_keeps_it(working_directory: Path):
    recipe = apply_overrides(tiny_test(), ["trainer.max_steps=1", "log.name=a"])
    run = launch(recipe)
    sources = json.loads(run.sources.read_text())
    assert sources["trainer.max_steps"] == "command line: trainer.max_steps=1"
    assert "recipes/base.py:" in sources["optim"] and "default" not in sources.values()
    again = Recipe.load(run.recipe)
    again.log.dir = str(run.path.parent)
    launch(again)
    assert json.loads(run.sources.read_text()) == sources
    assert "command line: trainer.max_steps=1" in report(find_run("a"), run.status()).replace("<wbr>", "")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_a_browser_draws_the_page_and_runs_nothing_foreign(tmp_path: Path, width: int, dark: bool):
    run, file, shot = hostile(tmp_path), tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(report(run, run.status()))
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--hide-scrollbars", "--virtual-time-budget=3000", f"--window-size={width},900"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    shown = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    assert shown.stdout.count("<canvas") >= 4 and "alert(1)</script>" not in shown.stdout
    subprocess.run([*command, f"--screenshot={shot}", file.as_uri()], capture_output=True, check=True, timeout=120)
    picture = matplotlib.image.imread(shot)
    assert picture.shape[1] == width
    assert (picture[2, 2, :3].mean() < 0.2) == dark
