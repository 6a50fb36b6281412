"""verify finds what differs between a finished folder and its inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import make_sample_shards
from dask_imgcurator.checks.verify import verify
from dask_imgcurator.cli.main import cli
from dask_imgcurator.storage.tar_index import index_shard


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    make_sample_shards(folder / "samples", count=24, per_shard=12)
    with dic.start_client(n_workers=1, backend="pandas") as client:
        dic.curate(folder / "samples", folder / "run", model="starter", client=client, max_count=8)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Any:
    """A copy of the run; its inputs are put back afterwards."""
    shutil.copytree(finished / "run", tmp_path / "run")
    originals = {p: p.read_bytes() for p in (finished / "samples").glob("*.tar")}
    yield tmp_path / "run"
    for path, data in originals.items():
        path.write_bytes(data)


def problems(folder: Path) -> dict[str, str]:
    return {what: problem for what, problem in verify(str(folder)) if problem is not None}


def test_a_good_run(folder: Path) -> None:
    assert problems(folder) == {}
    assert problems(folder / "shards") == {}
    result = CliRunner().invoke(cli, ["verify", str(folder)])
    assert result.exit_code == 0
    assert "00000.tar: ok" in result.stdout
    assert "run.json: ok" in result.stdout


def test_a_flipped_bit_in_a_curated_shard(folder: Path) -> None:
    path = folder / "shards" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[index_shard(str(path)).samples[0].members[0].offset + 5] ^= 1
    path.write_bytes(data)
    assert "sha256" in problems(folder)["00000.tar"]
    # Not even with a hash that fits.
    import hashlib

    stats = folder / "shards" / "00000_stats.json"
    stats.write_text(json.dumps(json.loads(stats.read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}))
    assert "differs from its source" in problems(folder)["00000.tar"]
    result = CliRunner().invoke(cli, ["verify", str(folder)])
    assert result.exit_code == 1
    assert "differs from its source" in result.stdout


def test_a_changed_source(folder: Path, finished: Path) -> None:
    path = finished / "samples" / "00000.tar"
    data = bytearray(path.read_bytes())
    for sample in index_shard(str(path)).samples:
        data[sample.members[-1].offset] ^= 1
    path.write_bytes(data)
    assert "differs from its source" in problems(folder)["00000.tar"]


def test_a_missing_source(folder: Path, finished: Path) -> None:
    (finished / "samples" / "00001.tar").unlink()
    found = problems(folder)
    assert found
    assert all("00001.tar" in problem for problem in found.values())


def test_missing_scores_and_shards(folder: Path) -> None:
    (folder / "scores" / "00001.parquet").unlink()
    assert "no scores of" in problems(folder)["run.json"]
    for path in (folder / "shards").glob("00001*"):
        path.unlink()
    assert "kept samples" in problems(folder)["run.json"]


def test_no_run_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["verify", str(tmp_path)])
    assert result.exit_code == 2
    assert "neither run.json nor curated shards" in result.stderr
