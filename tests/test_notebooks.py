"""The notebooks: committed without outputs, and each runs from its first cell to its last."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
COUNT = 96


def members(folder: Path) -> dict[str, bytes]:
    """Names and bytes of all files in a folder's tars."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found[info.name] = file.read()
    return found


def check_quickstart(data: Path) -> None:
    """Both ways keep the same samples, unchanged; the stricter cut keeps fewer."""
    source, by_hand, in_one_call, stricter = (
        members(data / folder) for folder in ("samples", "by_hand", "run/shards", "stricter")
    )
    captions = [name for name in by_hand if name.endswith(".txt")]
    assert COUNT / 4 < len(captions) < COUNT / 1.5
    assert by_hand == in_one_call
    assert by_hand.items() < source.items()
    assert 0 < len(stricter) < len(by_hand)
    assert stricter.items() < source.items()
    assert len(list((data / "run" / "scores").glob("*.parquet"))) == len(list((data / "samples").glob("*.tar")))
    assert json.loads((data / "run" / "run.json").read_text())["kept"] == len(captions)
    assert (data / "run" / "report.html").is_file()


CHECKS = {"quickstart.ipynb": check_quickstart}


def test_every_notebook_has_its_check() -> None:
    assert {path.name for path in NOTEBOOKS} == CHECKS.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    for cell in code:
        assert cell["outputs"] == [], "clear all outputs before committing"
        assert cell["execution_count"] is None, "clear all outputs before committing"
        assert "execution" not in cell["metadata"], "clear the cells' times before committing"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nbformat", "nbclient", "ipykernel", "matplotlib", "webdataset", "skimage", "sklearn"):
        pytest.importorskip(module, reason=f"{module} is not installed (the extras notebook and demo, webdataset)")
    import nbclient
    import nbformat

    data = tmp_path / "data"
    monkeypatch.setenv("IMGCURATOR_COUNT", str(COUNT))
    monkeypatch.setenv("IMGCURATOR_FOLDER", str(data))
    notebook = nbformat.read(path, as_version=4)
    # A cell that raises ends the run with nbclient's CellExecutionError, which shows the cell and its traceback.
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert [p.name for p in tmp_path.iterdir()] == ["data"]  # nothing is left beside it
    CHECKS[path.name](data)
