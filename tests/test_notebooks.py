"""The notebooks: committed with the outputs of their code, and each runs from its first cell to its last."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dask_imgcurator.models.head_files import read_head

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


def ok_rows(scores: Path) -> pd.DataFrame:
    """Rows of a score table that could be scored, without embeddings, read by pyarrow."""
    parts = [pq.read_table(path).drop_columns("embedding") for path in sorted(scores.glob("*.parquet"))]
    table = pa.concat_tables(parts).to_pandas()
    return table[table["status"] == "ok"].reset_index(drop=True)


def keys_of(files: dict[str, bytes]) -> set[str]:
    return {name.removesuffix(".txt") for name in files if name.endswith(".txt")}


def check_quickstart(data: Path) -> None:
    """What is written are the samples above the cut, one of each set of equal bytes, unchanged; a stricter cut keeps
    fewer."""
    source, curated, stricter = (members(data / folder) for folder in ("samples", "curated", "stricter"))
    table = ok_rows(data / "scores")
    kept = table[
        (table["aesthetic_score"] >= 5) & (table["blur"] < 0.7) & (table[["width", "height"]].min(axis=1) >= 160)
    ]
    keys = keys_of(curated)
    assert keys <= set(kept["key"])
    chosen = table[table["key"].isin(keys)]
    assert chosen["sha256"].is_unique
    assert not kept["sha256"].is_unique  # there were copies to drop
    assert COUNT / 8 < len(keys) < COUNT / 1.5
    assert curated.items() < source.items()
    assert stricter.items() < source.items()
    strict = kept[(kept["aesthetic_score"] >= 5.5) & (kept["ext"] != "webp")]
    assert keys_of(stricter) == set(strict["key"])
    assert 0 < len(strict) < len(kept)
    assert len(list((data / "scores").glob("*.parquet"))) == len(list((data / "samples").glob("*.tar")))
    page = (data / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "data:image/webp" in page


def check_gpu_cluster(data: Path) -> None:
    """On this machine it ran on what there is; persisted frame and score files agree on what is kept."""
    table = ok_rows(data / "scores")
    kept = table[(table["aesthetic_score"] >= 5) & (table["width"] >= 160)]
    curated = members(data / "curated")
    assert keys_of(curated) == set(kept["key"])
    assert 0 < len(kept) < COUNT
    assert curated.items() < members(data / "samples").items()


def check_custom_head(data: Path) -> None:
    """What the head puts first was spoilt far more often than chance has it, and its file says whose it is."""
    table = ok_rows(data / "scores_spoilt")
    spoilt = table["kind"].isin(["blurred", "dark", "noise", "flat"])
    first = table.sort_values("spoilt_score", ascending=False).index[: int(spoilt.sum())]
    assert table["spoilt_score"].between(0, 1).all()
    assert spoilt[first].mean() > 0.8  # of those it was fitted to
    assert spoilt.mean() < 0.2
    assert read_head(data / "spoilt.safetensors").embedder == "starter"


CHECKS = {
    "quickstart.ipynb": check_quickstart,
    "gpu_cluster.ipynb": check_gpu_cluster,
    "custom_head.ipynb": check_custom_head,
}
#: Samples, where a notebook needs more than `COUNT` of them.
COUNTS = {"custom_head.ipynb": 240}


def test_every_notebook_has_its_check() -> None:
    assert {path.name for path in NOTEBOOKS} == CHECKS.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_with_the_outputs_of_its_code(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = hashlib.sha256("\0".join("".join(cell["source"]) for cell in code).encode()).hexdigest()
    assert notebook["metadata"].get("sources_sha256") == sources, "run: python tools/run_notebooks.py"
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [out for cell in code for out in cell["outputs"]]
    shown = [out["data"] for out in outputs if "data" in out]
    assert any("data:image/webp" in "".join(data.get("text/html", "")) for data in shown)
    assert not [out for out in outputs if out["output_type"] == "error" or out.get("name") == "stderr"]
    # Neither what needs a kernel, nor what differs at each run or tells whose machine it was.
    assert not [data for data in shown if any("widget" in kind for kind in data)]
    assert not [cell for cell in code if "execution" in cell["metadata"]]
    assert "imgcurator-" not in re.sub(r"data:image/[^\"]*", "", json.dumps(outputs)).replace("dask-imgcurator-", "")
    assert path.stat().st_size < 1_000_000
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize(
    "path",
    # Without a card, the GPU notebook takes the same steps as the others.
    [pytest.param(path, marks=[pytest.mark.slow] * ("gpu" in path.stem), id=path.stem) for path in NOTEBOOKS],
)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nbformat", "nbclient", "ipykernel", "ipywidgets", "webdataset", "skimage", "sklearn"):
        pytest.importorskip(module, reason=f"{module} is not installed (the extras notebook and demo, webdataset)")
    import nbclient
    import nbformat

    data = tmp_path / "data"
    monkeypatch.setenv("IMGCURATOR_COUNT", str(COUNTS.get(path.name, COUNT)))
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
