"""Execute the notebooks and keep their outputs: ``python tools/run_notebooks.py [NAME.ipynb ...]``, by default all.

Needs the extra `test`. Outputs are kept as a reader of the repository can see them: without
times, widgets, messages on stderr and the name of the temporary folder.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
_WIDGETS = ("application/vnd.jupyter.widget-view+json",)


def source_hash(notebook: Any) -> str:
    """Return the hash of all code, by which a test tells whether outputs are those of the code."""
    code = [str(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def execute(path: Path) -> None:
    """Execute a notebook in place."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="imgcurator-") as folder:
        os.environ["IMGCURATOR_FOLDER"] = f"{folder}/data"
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.metadata.pop("execution", None)
                cell.outputs = [_kept(out, folder) for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["sources_sha256"] = source_hash(notebook)
    nbformat.write(notebook, path)


def _kept(output: Any, folder: str) -> Any:
    if "text" in output:
        output.text = output.text.replace(folder, "")
    for kind, text in list(output.get("data", {}).items()):
        if kind in _WIDGETS:
            del output.data[kind]
        elif isinstance(text, str):
            output.data[kind] = text.replace(folder, "")
    return output


if __name__ == "__main__":
    for chosen in [FOLDER / name for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        execute(chosen)
        print(f"{chosen.name}: {chosen.stat().st_size / 1e3:,.0f} kB")
