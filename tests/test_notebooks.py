"""The notebooks: committed without outputs, and each runs from its first cell to its last."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))

#: What each notebook leaves in its folder; a notebook that is not named here has no check of its results yet.
LEAVES = {
    "quickstart.ipynb": [
        "by_hand/00000.tar",
        "run/scores/00000.parquet",
        "run/shards/00000.tar",
        "run/report.html",
        "run/run.json",
        "stricter/00000.tar",
    ]
}


def test_there_are_notebooks_and_each_has_its_checks() -> None:
    assert {path.name for path in NOTEBOOKS} == LEAVES.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    for cell in code:
        assert cell["outputs"] == [], "clear all outputs before committing"
        assert cell["execution_count"] is None, "clear all outputs before committing"
        assert "execution" not in cell["metadata"]  # times of a run
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.fixture
def no_leftover_loop() -> Iterator[None]:
    """Keep nbclient's event loop from being taken for this process's own afterwards."""
    import asyncio

    yield
    asyncio.set_event_loop(None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.usefixtures("no_leftover_loop")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the notebook extra is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    for module in ("matplotlib", "ipykernel", "webdataset", "skimage", "sklearn"):
        pytest.importorskip(module)
    monkeypatch.setenv("IMGCURATOR_COUNT", "96")
    monkeypatch.setenv("IMGCURATOR_FOLDER", str(tmp_path / "data"))
    notebook = nbformat.read(path, as_version=4)
    # A cell that raises ends the run with nbclient's CellExecutionError, which shows the cell and its traceback.
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]

    data = tmp_path / "data"
    assert not [name for name in LEAVES[path.name] if not (data / name).is_file()]
    assert [p.name for p in tmp_path.iterdir()] == ["data"]  # and nothing beside it


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def _placeholder() -> None: ...
