"""The tutorial's ten cells run as they stand, and end with a trained agent."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def test_the_tutorial_has_ten_cells_and_no_stored_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert len(cells) == 10
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.slow
def test_the_tutorial_runs_and_its_agent_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TMPDIR", "HOME", "IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    programs = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [output for cell in notebook.cells[1:] for output in cell.outputs]
    texts = "".join(output.get("text", "") for output in outputs)
    assert "error:" not in texts, texts
    measured = re.search(r"GoToObj: success ([\d.]+)% of 200 episodes", texts)
    assert measured, texts
    assert float(measured[1]) > 90
    pictures = [output for output in outputs if "data" in output]
    kinds = [kind for output in pictures for kind in output["data"] if kind.startswith("image/")]
    assert kinds == ["image/gif", "image/png", "image/gif"]
