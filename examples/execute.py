"""Executes notebooks in place, in the kernel of this Python: ``python examples/execute.py NOTEBOOK...``."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in map(Path, sys.argv[1:]):
    notebook = nbformat.read(path, as_version=4)
    # The hours of execution would make a change of every run.
    NotebookClient(notebook, timeout=600, record_timing=False).execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    nbformat.write(notebook, path)
