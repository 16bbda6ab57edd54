"""The notebook of the first hour: whole, run, and true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "first_hour.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_what_it_shows_is_of_one_run_from_top_to_bottom() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not [output for cell in CODE for output in cell["outputs"] if output["output_type"] == "error"]
    assert NOTEBOOK.stat().st_size < 700_000


def test_the_pages_it_links_to_are_there() -> None:
    links = [link for cell in CELLS if cell["cell_type"] == "markdown" for link in re.findall(r"\]\(([^)#]+)\)", source(cell))]
    assert len(links) >= 4 and [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


def test_a_photograph_becomes_regions_and_arrays(tmp_path: Path) -> None:
    """The cells up to the question, in an interpreter of their own; the rest takes a training (below)."""
    pytest.importorskip("skimage", reason="scikit-image ships the photographs: pip install '.[demo]'")
    pytest.importorskip("detectron2", reason="run `uniter-extract --install-detectron2`")
    question = next(place for place, cell in enumerate(CELLS) if source(cell).startswith("## A question"))
    program = "\n".join(source(cell) for cell in CELLS[:question] if cell["cell_type"] == "code")
    check = "assert regions.features.shape[1] == 512 and 'cat' in {regions.class_names[column] for column in likeliest}"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", f"{program}\n{check}"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some forty seconds of processor time, the starting of a kernel not counted."""
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat nbclient ipykernel (the extra `dev`)")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbformat nbclient ipykernel (the extra `dev`)")
    pytest.importorskip("ipykernel", reason="pip install nbformat nbclient ipykernel (the extra `dev`)")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    answers = re.findall(r"scene_\d+: (\w+) \(\d\.\d+\), it is (\w+)", told)
    right = sum(said == true for said, true in answers)
    assert len(answers) == 16 and right >= 9  # chance is four
