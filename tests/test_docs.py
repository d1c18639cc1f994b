"""The documentation works: its commands and its code run as they are written."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fiddlehead.cli import main
from fiddlehead.errors import ConfigError
from fiddlehead.migrate import migrate
from fiddlehead.run.directory import RunDirectory
from tests import warm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("bash", "sh", "python")
SHOWN = ("text", "yaml", "toml", "json")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    """Of its opening fence, counted from 1."""
    language: str
    code: str
    not_run: str = ""
    """Why it is not run; empty if it is."""


def blocks(page: str) -> Iterator[Block]:
    """Yields the fenced blocks of a Markdown text, changed as the comments right above them say.

    `<!-- not run: reason -->` keeps a block from running, `<!-- changes: s/old/new/ -->` replaces a text in it (any
    sign may stand for the slash). Raises ValueError for a fence without an end, an unknown language, or a change of a
    text that the block does not have.
    """
    lines = iter(enumerate(page.splitlines(), start=1))
    comments: list[tuple[str, str]] = []
    for number, line in lines:
        if comment := re.fullmatch(r"\s*<!-- (not run|changes): (.+) -->\s*", line):
            comments.append((comment[1], comment[2]))
        elif fence := re.fullmatch(r"\s*(```+)\s*(\w*).*", line):
            yield _block(number, fence[2], _until(fence[1], lines, number), comments)
            comments = []
        elif line.strip():
            comments = []


def _until(fence: str, lines: Iterator[tuple[int, str]], start: int) -> str:
    code = []
    for _, line in lines:
        if line.strip() == fence:
            return textwrap.dedent("\n".join(code)) + "\n"
        code.append(line)
    raise ValueError(f"line {start}: the block has no end")


def _block(line: int, language: str, code: str, comments: list[tuple[str, str]]) -> Block:
    if language not in RUN + SHOWN:  # or a block would escape by a spelling such as `console`
        raise ValueError(f"line {line}: ```{language}: allowed: {', '.join(RUN + SHOWN)}")
    reason = ""
    for kind, text in comments:
        if kind == "not run":
            reason = text
            continue
        change = re.fullmatch(r"s(\W)(.+)\1(.*)\1", text)
        if change is None or change[2] not in code:
            raise ValueError(f"line {line}: nothing to change by {text}")
        code = code.replace(change[2], change[3])
    return Block(line, language, code, reason)


def run(block: Block, cwd: Path, output: Path, **variables: str) -> int:
    """Runs a block in a process of its own, its output in a file, and returns the exit code."""
    if block.language == "python":
        command = [sys.executable, "-"]
        script = "\n" * block.line + block.code  # so that a traceback has the page's own line numbers
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.code]  # not from stdin, which a command in it would read
        script = ""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | variables
    with output.open("w") as file:  # not a pipe, which a detached job would hold open
        return subprocess.run(
            command, cwd=cwd, env=environment, input=script, text=True, stdout=file, stderr=subprocess.STDOUT
        ).returncode


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a page has many blocks
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page, working_directory, tmp_path_factory, capsys):
    output = tmp_path_factory.mktemp("output") / "output.txt"
    for block in blocks(page.read_text()):
        place = f"{page.relative_to(ROOT)}:{block.line}"
        if block.not_run:
            with capsys.disabled():
                print(f"\n{place}: not run: {block.not_run}")
        elif block.language in RUN and (code := run(block, working_directory, output, **warm.everywhere())):
            pytest.fail(f"{place}: exit code {code}\n{block.code}\n{output.read_text(errors='replace')}", pytrace=False)


SAMPLE = """\
<!-- not run: CI does it -->
```bash
make demo
```

<!-- changes: s/max_steps=500/max_steps=5/ -->
<!-- changes: s,a/b,c, -->

```sh
run max_steps=500 a/b
```
<!-- not run: forgotten, because a paragraph follows -->
- An item:
  ````python title="here"
  if True:
      print("```")
  ````
```text
$ output
```
"""


def test_blocks_are_found_and_changed():
    assert list(blocks(SAMPLE)) == [
        Block(2, "bash", "make demo\n", "CI does it"),
        Block(9, "sh", "run max_steps=5 c\n"),
        Block(14, "python", 'if True:\n    print("```")\n'),
        Block(18, "text", "$ output\n"),
    ]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("text\n```bash\nls\n", "line 2: the block has no end"),
        ("```console\n$ ls\n```\n", "line 1: ```console: allowed: bash"),
        ("```\nls\n```\n", "line 1: ```: allowed: bash"),
        ("<!-- changes: s/500/5/ -->\n```bash\nls\n```\n", "line 2: nothing to change by s/500/5/"),
        ("<!-- changes: 500 to 5 -->\n```bash\n500\n```\n", "line 2: nothing to change by 500 to 5"),
    ],
)
def test_a_page_that_would_not_be_tested_is_refused(page, message):
    with pytest.raises(ValueError) as error:
        list(blocks(page))
    assert message in str(error.value)


def test_a_block_runs_as_it_would_for_a_reader(tmp_path):
    output = tmp_path / "output.txt"
    assert run(Block(1, "bash", "command -v fiddlehead python; cat\n"), tmp_path, output) == 0
    bin_directory = Path(sys.executable).parent
    assert output.read_text() == f"{bin_directory}/fiddlehead\n{bin_directory}/python\n"
    assert run(Block(1, "sh", "false | cat\necho not reached\n"), tmp_path, output) == 1
    assert output.read_text() == ""
    assert run(Block(41, "python", "print(__name__)\nraise ValueError\n"), tmp_path, output) == 1
    assert "__main__" in output.read_text() and "line 43" in output.read_text()


def test_the_loss_curve_shows_what_was_logged(tmp_path):
    draw = runpy.run_path(str(ROOT / "docs" / "loss_curve.py"))["draw"]
    demo = RunDirectory(tmp_path)
    with pytest.raises(ConfigError, match="has no loss"):
        draw(demo)
    rows = "1,7.0,, 10,5.0,, 10,,6.0,2.0 20,4.0,, 20,,3.0,1.0"
    demo.metrics.write_text("\n".join(["step,loss,val_loss,val_nats_per_byte", *rows.split(), ""]))
    (axes,) = (figure := draw(demo)).axes
    training, validation = (line.get_xydata().tolist() for line in axes.lines)
    assert training == [[1, 7], [10, 5], [20, 4]]
    assert validation == [[10, 6], [20, 3]]
    figure.savefig(tmp_path / "loss.png")
    (right,) = axes.child_axes
    assert right.get_ylabel() == "nats per byte"
    assert right.get_ylim() == pytest.approx([limit / 3 for limit in axes.get_ylim()])


def test_the_tables_of_the_attention_page_say_what_the_backends_say():
    script = runpy.run_path(str(ROOT / "docs" / "attention_tables.py"))
    page = (ROOT / "docs" / "attention.md").read_text()
    assert script["filled"](page) == page, "run: python docs/attention_tables.py"
    with pytest.raises(ValueError, match="has 0 places for the table features"):
        script["filled"](page.replace("<!-- end features -->", ""))


def test_the_table_of_nemo_s_names_is_that_of_the_errors():
    script = runpy.run_path(str(ROOT / "docs" / "nemo_tables.py"))
    page = (ROOT / "docs" / "nemo.md").read_text()
    assert script["filled"](page) == page, "run: python docs/nemo_tables.py"


def test_the_page_for_nemo_shows_what_its_script_becomes():
    page = [block.code for block in blocks((ROOT / "docs" / "nemo.md").read_text())]
    python, *_, recipe = [code for code in page if "def recipe_of" in code]
    *_, executor = [code for code in page if "def cluster" in code]
    text = re.findall(r"[\"']{3}\\\n(.*)[\"']{3}", python, re.DOTALL)[0]
    made = migrate(text, "train_llama")
    assert made.recipe.endswith(recipe) and made.launch.endswith(executor)
    assert "\n".join([*made.steps, ""]) in page


def sessions(page: Path) -> list[tuple[list[str], list[str]]]:
    """The commands of a page that are shown with what they print, and that."""
    found: list[tuple[list[str], list[str]]] = []
    for block in blocks(page.read_text()):
        if block.language == "text" and block.code.startswith("$ fiddlehead "):
            for line in block.code.splitlines():
                if line.startswith("$ fiddlehead "):
                    found.append((shlex.split(line)[2:], []))
                else:
                    found[-1][1].append(line)
    return found


SESSIONS = [each for page in ("README.md", "docs/nemo.md") for each in sessions(ROOT / page)]


@pytest.mark.parametrize(("arguments", "printed"), SESSIONS, ids=lambda value: value[-1])
def test_the_errors_that_pages_show_are_those_that_are_printed(
    arguments: list[str], printed: list[str], working_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["fiddlehead", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert (left.value.code, capsys.readouterr().err.splitlines()) == (2, printed)


def test_every_path_in_the_glossary_exists():
    page = (ROOT / "docs" / "glossary.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| `([^`]+)` \|$", page, re.MULTILINE)
    assert len(rows) > 40 and len(rows) == len(re.findall(r"^\| (?!word)", page, re.MULTILINE))
    assert [(word, path) for word, path in rows if not (ROOT / path).exists()] == []
