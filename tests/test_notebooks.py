"""Every notebook runs top to bottom, and is stored with outputs that hold nothing of the machine they were made on."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
MOST_SECONDS = 180  # for one cell; a hang, not a slow machine, is what this ends


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in conftest.py
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=MOST_SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = {output.output_type for output in outputs_of(notebook)}
    assert "error" not in kinds
    assert not any(output.get("name") == "stderr" for output in outputs_of(notebook))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_with_their_outputs(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs_of(notebook))
    texts = [cell.source for cell in notebook.cells]
    for output in outputs_of(notebook):
        texts += [output.get("text", ""), *output.get("traceback", [])]
        texts += [str(data) for kind, data in output.get("data", {}).items() if kind != "image/png"]
    for text in texts:
        assert "site-packages" not in text
        found = re.search(r"(?<![\w.:/<])/\w+/", text)  # a path from the root is one of the machine that ran it
        assert not found, text[found.start() : found.start() + 80]
    assert (FOLDER / name).stat().st_size < 1_000_000
