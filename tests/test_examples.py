"""The notebooks in examples/ run, and are committed with the output of a complete run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import fiddlehead
from tests import warm

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PACKAGE = str(Path(fiddlehead.__file__).parent)
PICTURES = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
RUN = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.enable_gui = lambda *_: None  # for `%matplotlib inline`, as a kernel has it
shell = InteractiveShell.instance()
for source in json.load(open(sys.argv[1])):
    shell.run_cell(source, silent=True).raise_error()
"""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def printed(notebook: nbformat.NotebookNode) -> str:
    """Everything that the cells wrote to either stream."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def warnings_of_ours(text: str) -> list[str]:
    """The lines that warn of our own code: Python's begin with the file at fault, those of a run with WARNING."""
    return [
        line for line in text.splitlines() if line.startswith("WARNING") or (PACKAGE in line and "Warning: " in line)
    ]


def sources(notebook: nbformat.NotebookNode) -> list[str]:
    """The code of each cell, changed as `changes` of its metadata says: old text to new text."""
    found = []
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for old, new in cell.metadata.get("changes", {}).items():
            assert old in cell.source
            cell.source = cell.source.replace(old, new)
        found.append(cell.source)
    return found


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    """With fewer steps. `UPDATE_NOTEBOOKS=1` runs all of them, and saves the notebook with its new output."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):  # nothing of the user's
        monkeypatch.setenv(name, str(tmp_path / "settings"))
    folder = tmp_path / "examples"
    folder.mkdir()
    notebook = nbformat.read(path, as_version=4)
    if os.environ.get("UPDATE_NOTEBOOKS"):
        monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress")  # of tqdm, about a package for widgets
        options = {"timeout": 300, "kernel_name": "python3", "coalesce_streams": True}
        NotebookClient(notebook, resources={"metadata": {"path": folder}}, **options).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # the times
        nbformat.write(notebook, path)
        return
    (tmp_path / "cells.json").write_text(json.dumps(sources(notebook)))
    command = [sys.executable, "-c", RUN, str(tmp_path / "cells.json")]
    ran = warm.run(command, cwd=folder, env=os.environ | PICTURES, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not warnings_of_ours(ran.stdout + ran.stderr)
    assert not list(folder.iterdir())  # a notebook leaves nothing behind


@each_notebook
def test_a_notebook_is_committed_after_a_whole_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "error" not in {output.output_type for cell in cells for output in cell.outputs}
    assert not warnings_of_ours(printed(notebook))
    assert "/tmp" not in json.dumps(notebook)
    for cell in cells:
        drawn = any("image/png" in output.get("data", ()) for output in cell.outputs)
        assert drawn == bool(cell.metadata.get("alt"))  # the description of the picture
    assert path.stat().st_size < 300_000


def test_warnings_of_ours_are_told_from_others():
    ours = [f"{PACKAGE}/job.py:7: UserWarning: this is slow", "WARNING: it starts again from step 0"]
    others = ["/lib/lightning/trainer.py:7: UserWarning: few workers", "no warning", f"file {PACKAGE}/job.py"]
    assert warnings_of_ours("\n".join([*ours, *others])) == ours
