"""The notebooks: they run, and their stored outputs are whole and name no machine."""

import copy
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat of the extra 'dev' is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient of the extra 'dev' is not installed")

EXAMPLES = Path(__file__).parents[1] / "examples"
# In place of the cell tagged "parameters", so that a test takes little more than the kernel's start.
SMALL = {
    "optimizer-update-comparison": """config = SpikeConfig(
    optimizers=("muon", "soap", "soap-published", "soap-guarded"),
    shape=(8, 6), steps=40, spike_at=(10, 20), spike_scale=(10.0, 1000.0),
)""",
    "preconditioner-eigenbasis-spike": """config = EigenbasisConfig(
    shape=(12, 8), steps=12, spike_at=5, offsets=(1, 2), top=3
)""",
}
NOTEBOOKS = sorted(EXAMPLES.rglob("*.ipynb"))


def test_the_notebooks_run_and_their_cells_show_what_is_stored_of_them(tmp_path):
    """Not the same numbers, which take minutes, but the same kinds of things: a picture, a table, a line.

    One after the other in one kernel, whose names are taken away between them: each would import torch anew.
    """
    stored = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    clear = nbformat.v4.new_code_cell("%reset -f")
    for name, notebook in notebooks.items():
        (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
        parameters.source = SMALL[name]
    whole, *others = notebooks.values()
    every = copy.copy(whole)
    every.cells = [*whole.cells, *(cell for other in others for cell in (clear, *other.cells))]
    nbclient.NotebookClient(every, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for name, notebook in notebooks.items():
        assert any("image/png" in output.get("data", ()) for output in outputs(notebook)), name
        assert kinds(notebook) == kinds(stored[name])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_outputs_come_from_one_run_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for output in outputs(notebook))
    texts = [text for output in outputs(notebook) for text in texts_of(output)]
    assert any("|:--" in text for text in texts)
    for text in texts:
        assert not re.search(r"(/[\w.-]+){2,}|[A-Z]:\\", text), f"a path in the output: {text}"
    assert path.stat().st_size < 1_000_000


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def kinds(notebook):
    """For every output of each cell of code its kind, and the kinds of what it holds."""
    return [
        [(output.output_type, sorted(output.get("data", ()))) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def texts_of(output):
    return [output.get("text", ""), *(x for kind, x in output.get("data", {}).items() if kind.startswith("text/"))]
