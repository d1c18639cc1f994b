"""The notebooks in examples/ run, and are committed with the output of a complete run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import fiddlehead

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
PACKAGE = str(Path(fiddlehead.__file__).parent)

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


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):  # no kernel or start-up file of the user's
        monkeypatch.setenv(name, str(tmp_path / "settings"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "settings"))
    folder = tmp_path / "examples"
    folder.mkdir()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    assert not warnings_of_ours(printed(notebook))
    assert not list(folder.iterdir())  # a notebook leaves nothing behind


@each_notebook
def test_a_notebook_is_committed_after_a_whole_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "error" not in {output.output_type for cell in cells for output in cell.outputs}
    assert printed(notebook) and not warnings_of_ours(printed(notebook))
    assert "/tmp" not in printed(notebook)
    assert path.stat().st_size < 300_000


def test_warnings_of_ours_are_told_from_others():
    ours = [f"{PACKAGE}/job.py:7: UserWarning: this is slow", "WARNING: it starts again from step 0"]
    others = ["/lib/lightning/trainer.py:7: UserWarning: few workers", "no warning", f"file {PACKAGE}/job.py"]
    assert warnings_of_ours("\n".join([*ours, *others])) == ours
