"""The notebooks: they run, and their stored outputs are whole and name no machine."""

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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_cells_show_what_is_stored_of_them(path, tmp_path):
    """Not the same numbers, which take minutes, but the same kinds of things: a picture, a table, a line."""
    notebook, stored = (nbformat.read(path, as_version=4) for _ in range(2))
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = SMALL[path.stem]
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any("image/png" in output.get("data", ()) for output in outputs(notebook))
    assert kinds(notebook) == kinds(stored)


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
