"""Packing, writing and resuming curated shards, compared with tarfile, webdataset, DALI, pandas and DuckDB."""

from __future__ import annotations

import contextlib
import gc
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from threading import Barrier
from typing import Any

import dask
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from trees import contents, tree

import dask_imgcurator as dic
from dask_imgcurator.checks.verify import verify
from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.steps.write import Group, Kept, parse_size, plan_groups
from dask_imgcurator.steps.write import (
    cut as cut_samples,
)
from dask_imgcurator.storage import curated, files, tar_copy
from dask_imgcurator.storage.curated import WriteSpec, remove_surplus, written_shards
from dask_imgcurator.storage.tar_copy import WriteError, sample_sizes

Members = list[tuple[str, bytes]]

LONG = "long/" + "d" * 90 + "/" + "n" * 120


def make_tar(path: Path, members: Members, format_: int = tarfile.PAX_FORMAT) -> Path:
    """Tar as other tools make it: with times, owners and modes, a folder entry and a file without extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format_) as tar:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [*members, ("README", b"no sample")]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode, info.uid, info.gid = len(data), 1_700_000_000.5, 0o600, 501, 20
            info.uname = info.gname = "someone"
            tar.addfile(info, io.BytesIO(data))
    return path


def noise(seed: int, nbytes: int) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


def triple(stem: str, seed: int, nbytes: int = 700) -> Members:
    return [(f"{stem}.jpg", noise(seed, nbytes)), (f"{stem}.txt", stem.encode()), (f"{stem}.json", b'{"n": %d}' % seed)]


def write_shard(number: int, frames: list[pd.DataFrame], spec: WriteSpec, resume: bool = True) -> dict[str, Any]:
    tables = [get_backend("pandas").to_arrow(frame) for frame in frames]
    return curated.write_shard(number, tables, spec, resume)


def members_of(*paths: Path) -> Members:
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                found.append((info.name, file.read()))
    return found


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def read(*paths: Path) -> dd.DataFrame:
    return dic.read_webdataset([str(p) for p in paths], backend="pandas")


@contextlib.contextmanager
def unchanged(folder: Path) -> Any:
    before = tree(folder)
    yield
    assert tree(folder) == before


#: Samples in the order in which they begin, each with its members in the order of the tar.
PLAIN: list[Members] = [triple(f"a{i}", i, 100 + 300 * i) for i in range(7)]
HARD: list[Members] = [
    triple("k1", 20),
    triple("k2", 21),
    triple("sub/k3", 22),
    [("sub/UP.JPG", noise(23, 512)), ("sub/UP.Txt", b"upper"), ("sub/UP.seg.png", noise(24, 513))],
    triple(LONG, 25),
    triple("ünï/çödé ☃".replace(" ", "_"), 26),
    [("only.txt", b"no image")],
    [("empty.jpg", b""), ("empty.txt", b"")],
    [("k1.jpg", noise(27, 900)), ("k1.cls", b"again")],
]


def interleaved(samples: list[Members]) -> Members:
    """First members of the first two samples, then their others, then the rest in order."""
    (first, second), rest = samples[:2], samples[2:]
    return [first[0], second[0], *first[1:], *second[1:], *(m for sample in rest for m in sample)]


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [
        make_tar(tmp_path / "in" / "plain.tar", [m for sample in PLAIN for m in sample], tarfile.USTAR_FORMAT),
        make_tar(tmp_path / "in" / "hard.tar", interleaved(HARD)),
        make_tar(tmp_path / "in" / "gnu.tar", interleaved(HARD), tarfile.GNU_FORMAT),
    ]


ALL = [m for sample in [*PLAIN, *HARD, *HARD] for m in sample]


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "sizes", "max_count", "max_nbytes", "expected"),
    [
        ("", [], 2, 10, []),
        # by count
        ("abcde", [1, 1, 1, 1, 1], 2, 100, ["ab", "cd", "e"]),
        # by size: 4 + 6 fit in 10, 4 + 6 + 1 do not
        ("abc", [4, 6, 1], 9, 10, ["ab", "c"]),
        # larger than the limit: a shard of its own
        ("abc", [1, 99, 1], 9, 10, ["a", "b", "c"]),
        ("a", [99], 9, 10, ["a"]),
        # a key that is there already begins a shard
        ("abac", [1, 1, 1, 1], 9, 10, ["ab", "ac"]),
        ("aa", [1, 1], 9, 10, ["a", "a"]),
    ],
)
def test_cutting_by_hand(keys: str, sizes: list[int], max_count: int, max_nbytes: int, expected: list[str]) -> None:
    assert [keys[c] for c in cut_samples(keys, sizes, WriteSpec("", max_count, max_nbytes))] == expected


def kept_of(keys: str, spec: WriteSpec) -> Kept:
    """What a partition of samples of 10 bytes comes to."""
    if not keys:
        return Kept(0, 0, 0)
    return Kept(len(keys), 10 * len(keys), len(cut_samples(keys, [10] * len(keys), spec)), min(keys), max(keys))


@pytest.mark.parametrize(
    ("partitions", "expected"),
    [
        ([], []),
        (["", ""], []),
        # up to 4 samples: neighbours together, over an empty one, in the order of their keys or not
        (["ab", "", "cd", "e"], [((0, 2), 1), ((3,), 1)]),
        (["cd", "ab"], [((0, 1), 1)]),
        # more than 4: cut alone
        (["a", "bcdefg", "h"], [((0,), 1), ((1,), 2), ((2,), 1)]),
        # a key may be in two of them, or is: to be counted
        (["ad", "bc"], [((0, 1), None)]),
        (["ab", "bc"], [((0, 1), None)]),
        # a key comes twice in one
        (["aa", "b"], [((0,), 2), ((1,), 1)]),
    ],
)
def test_planning_by_hand(partitions: list[str], expected: list[Any]) -> None:
    spec = WriteSpec("", 4, 1000)
    assert plan_groups([kept_of(p, spec) for p in partitions], spec) == [Group(*group) for group in expected]


@given(
    partitions=st.lists(st.text("abcdefgh", max_size=8), max_size=8),
    max_count=st.integers(1, 6),
    max_nbytes=st.integers(1, 100),
)
def test_planned_shards_keep_their_bounds(partitions: list[str], max_count: int, max_nbytes: int) -> None:
    spec = WriteSpec("", max_count, max_nbytes)
    groups = plan_groups([kept_of(p, spec) for p in partitions], spec)
    tars = []
    for group in groups:
        keys = "".join(partitions[i] for i in group.partitions)
        cuts = [keys[c] for c in cut_samples(keys, [10] * len(keys), spec)]
        assert group.tars in (None, len(cuts))
        tars += cuts
    assert "".join(tars) == "".join(partitions)
    assert all(len(t) == 1 or len(set(t)) == len(t) <= min(max_count, max_nbytes // 10) for t in tars)


def test_sizes_of_samples() -> None:
    # a: two that overlap, one that only touches them, one further on; b: three, one of them inside another
    rows = [("a", 0, 100), ("b", 10, 60), ("a", 50, 100), ("a", 150, 7), ("a", 200, 3), ("b", 20, 30), ("b", 60, 30)]
    urls, offsets, extents = zip(*rows, strict=True)
    # 150 bytes by halves; 80 by thirds
    assert sample_sizes(urls, offsets, extents) == [75, 26, 75, 7, 3, 27, 27]
    # a small one in the midst of a large one
    assert sample_sizes(["a", "a"], [0, 50], [1000, 10]) == [990, 10]
    assert sample_sizes([], [], []) == []
    assert sample_sizes(["a", "a", "a"], [0, 0, 5], [5, 5, 0]) == [5, 5, 0]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.integers(0, 40)), unique=True, max_size=12))
def test_sizes_of_samples_come_to_what_they_cover(rows: list[tuple[str, int, int]]) -> None:
    sizes = sample_sizes([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    covered = {(url, byte) for url, offset, nbytes in rows for byte in range(offset, offset + nbytes)}
    assert sum(sizes) == len(covered)
    assert all(size <= nbytes for size, (_, _, nbytes) in zip(sizes, rows, strict=True))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        (250_000, 250_000),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        ("1GiB", 1_073_741_824),
        ("1.5K", 1500),
        ("2Ki", 2048),
        (" 3 B ", 3),
        ("0.5MiB", 524_288),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1", "MB", "1TB", "1 2", "1e9", "0.1", "1GBB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="write for example 500MB"):
        parse_size(text)


# --- what is written ------------------------------------------------------------------------------


def test_members_are_those_of_the_sources_in_order(sources: list[Path], tmp_path: Path) -> None:
    stats = dic.to_webdataset(read(*sources), tmp_path / "out")
    assert members_of(*tars(tmp_path / "out")) == ALL
    # a partition each, since k1, which each copy of HARD begins and ends with, begins a shard when it comes again
    assert [s["count"] for s in stats] == [len(PLAIN), 8, 1, 8, 1]


@pytest.mark.parametrize("name", ["a.jpg", f"{'x' * 96}.jpg", f"{'x' * 97}.jpg", "é.jpg", "a\udce9.jpg", "../f/a.JPG"])
@pytest.mark.parametrize("nbytes", [0, 511, 1024, 8**11 - 1, 8**11])
def test_headers_are_those_of_tarfile(name: str, nbytes: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = nbytes, 0o644
    assert tar_copy.header(name, nbytes) == info.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize("count", [1, 3, 18, 19, 20])
def test_a_tar_is_that_of_tarfile(count: int, tmp_path: Path) -> None:
    """Also where it ends: after 20 blocks, or a multiple of them."""
    files = [(f"{i:03}.jpg", bytes([i]) * (i % 3 * 256)) for i in range(count)]
    source, expected = make_tar(tmp_path / "in.tar", files), io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    dic.to_webdataset(read(source), tmp_path / "out")
    assert (tmp_path / "out" / "00000.tar").read_bytes() == expected.getvalue()


def test_headers_say_nothing_of_the_sources(sources: list[Path], tmp_path: Path) -> None:
    dic.to_webdataset(read(*sources), tmp_path / "out")
    for path in tars(tmp_path / "out"):
        with tarfile.open(path) as tar:
            for info in tar:
                assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
                assert (info.mode, info.isreg()) == (0o644, True)


def test_limits(sources: list[Path], tmp_path: Path) -> None:
    by_count = dic.to_webdataset(read(sources[0]), tmp_path / "count", max_count=3)
    assert [s["count"] for s in by_count] == [3, 3, 1]
    # an image of 100 + 300 i bytes, a caption and a JSON: extents of 2, 2, 3, 3, 4, 5 and 5 blocks more than 4
    by_size = dic.to_webdataset(read(sources[0]), tmp_path / "size", max_size=14 * 512)
    assert [s["count"] for s in by_size] == [2, 2, 1, 1, 1]
    assert members_of(*tars(tmp_path / "size")) == members_of(*tars(tmp_path / "count"))
    with pytest.raises(ValueError, match="max_count=0"):
        dic.to_webdataset(read(sources[0]), tmp_path / "none", max_count=0)
    with pytest.raises(ValueError, match="as a size"):
        dic.to_webdataset(read(sources[0]), tmp_path / "none", max_size="many")
    assert not (tmp_path / "none").exists()


def test_a_worker_with_many_cores_writes_several_at_once(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose worker has one thread and many cores."""
    dic.to_webdataset(read(*sources), tmp_path / "one by one", max_count=7)
    together, count = Barrier(2), itertools.count()
    real = curated.write_tar

    def write_tar(*arguments: Any) -> Any:
        if next(count) < 2:
            together.wait(20)
        return real(*arguments)

    monkeypatch.setattr(curated, "write_tar", write_tar)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster):
        dic.to_webdataset(read(*sources), tmp_path / "out", max_count=7)
    assert contents(tmp_path / "out") == contents(tmp_path / "one by one")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_reads_it(sources: list[Path], tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    dic.to_webdataset(read(*sources), tmp_path / "out")
    found = list(wds.WebDataset([str(p) for p in tars(tmp_path / "out")], shardshuffle=False))
    gc.collect()  # webdataset leaves tars open: let them warn here, where it is allowed
    expected = [
        {name.rpartition("/")[2].partition(".")[2].lower(): data for name, data in sample}
        for sample in [*PLAIN, *HARD, *HARD]
    ]
    assert [{k: v for k, v in sample.items() if not k.startswith("__")} for sample in found] == expected
    assert [sample["__key__"] for sample in found][len(PLAIN) : len(PLAIN) + 3] == ["k1", "k2", "sub/k3"]


@pytest.mark.skipif(find_spec("nvidia") is None or find_spec("nvidia.dali") is None, reason="no DALI")
def test_dali_reads_it_by_our_index(sources: list[Path], tmp_path: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    df = dic.read_webdataset([str(p) for p in sources], columns={"n": "int64"}, backend="pandas")
    df = df[~df.n.isna()]  # those with a JSON have all three
    expected = [s for s in [*PLAIN, *HARD, *HARD] if s[-1][0].endswith(".json")]
    assert len(expected) == len(PLAIN) + 2 * 5
    dic.to_webdataset(df, tmp_path / "out", max_count=4)
    paths = [str(p) for p in tars(tmp_path / "out")]

    @pipeline_def(batch_size=len(expected), num_threads=1, device_id=None)
    def pipeline() -> Any:
        readers = fn.readers.webdataset(
            paths=paths,
            index_paths=[p.removesuffix(".tar") + ".idx" for p in paths],
            ext=["jpg", "txt", "json"],
            missing_component_behavior="error",
        )
        return tuple(readers)

    pipe = pipeline()
    pipe.build()
    outputs = pipe.run()
    for i, sample in enumerate(expected):
        assert [bytes(np.asarray(out.at(i))) for out in outputs] == [data for _, data in sample], sample[0][0]


def test_index_is_that_of_wds2idx(sources: list[Path], tmp_path: Path) -> None:
    tool = Path(sys.executable).with_name("wds2idx")
    if not tool.exists() or shutil.which("tar") is None:
        pytest.skip("no wds2idx")
    # GNU tar, which wds2idx asks, prints names that are not ASCII in another way
    df = read(*sources)
    df = df[~df.key.isin([HARD[5][0][0].partition(".")[0]])]
    dic.to_webdataset(df, tmp_path / "out", max_count=5)
    for tar in tars(tmp_path / "out"):
        made = tmp_path / "theirs.idx"
        subprocess.run([sys.executable, str(tool), str(tar), str(made)], check=True, capture_output=True)
        assert tar.with_suffix(".idx").read_text() == made.read_text()


def test_index_is_left_out_where_a_name_has_spaces(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    dic.to_webdataset(read(sources[0]), out)
    assert (out / "00000.idx").exists()
    spaced = make_tar(tmp_path / "in" / "spaced.tar", triple("a b", 1))
    dic.to_webdataset(read(spaced), out, overwrite=True)
    assert sorted(tree(out)) == ["00000.parquet", "00000.tar", "00000_stats.json", "sizes.json"]
    assert members_of(out / "00000.tar") == triple("a b", 1)


@pytest.fixture
def scored(sources: list[Path]) -> pd.DataFrame:
    """Rows with columns of every kind, as after scoring."""
    frame = read(*sources).compute().reset_index(drop=True)
    n = len(frame)
    vectors = [None if i % 5 == 3 else [float(i), i / 3] for i in range(n)]
    frame["width"] = pd.array([None if i % 4 == 1 else i for i in range(n)], dtype="Int32")
    frame["embedding"] = pd.Series(pd.array(vectors, dtype=pd.ArrowDtype(pa.list_(pa.float32()))))
    frame["aesthetic_score"] = np.array([np.nan if i % 3 == 2 else i for i in range(n)], np.float32)
    frame["license"] = [None if i < 8 else f"cc-{i}" for i in range(n)]
    frame["sure"] = pd.array([None if i % 2 else i % 4 == 0 for i in range(n)], dtype="boolean")
    return frame


def test_rows_stand_beside(scored: pd.DataFrame, tmp_path: Path) -> None:
    stats = dic.to_webdataset(scored, tmp_path / "out", max_count=6)
    tables = [pq.read_table(p) for p in sorted((tmp_path / "out").glob("*.parquet"))]
    assert [len(t) for t in tables] == [s["count"] for s in stats]
    found = pa.concat_tables(tables).to_pylist()
    expected = pa.Table.from_pandas(scored, preserve_index=False).to_pylist()
    expected = [{k: None if v != v else v for k, v in row.items()} for row in expected]
    lie = ["shard", "offset", "nbytes", "sample_offset", "sample_nbytes"]
    came = [f"source_{name}" for name in ("shard", "sample_offset", "sample_nbytes")]
    assert [[row[name] for name in came] for row in found] == [
        [row[name.removeprefix("source_")] for name in came] for row in expected
    ]
    assert [{k: v for k, v in row.items() if k not in lie + came} for row in found] == [
        {k: v for k, v in row.items() if k not in lie} for row in expected
    ]
    in_pandas = pd.read_parquet(tmp_path / "out" / "00000.parquet")
    assert list(in_pandas.columns) == [*scored.columns, *came]
    assert in_pandas["key"].tolist() == scored["key"].tolist()[: len(in_pandas)]


@pytest.mark.parametrize("seen", [[], ["offset", "nbytes"], ["nbytes", "ext"]])
def test_rows_say_where_their_samples_lie_in_the_curated_tar(
    scored: pd.DataFrame, seen: list[str], tmp_path: Path
) -> None:
    """As an index of that tar by `read_webdataset` does; columns that the frame did not have are not added."""
    stats = dic.to_webdataset(scored.drop(columns=seen), tmp_path / "out", max_count=6)
    shards = [str(tmp_path / "out" / s["shard"]) for s in stats]
    table = pa.concat_tables(pq.read_table(s.removesuffix("tar") + "parquet") for s in shards)
    names = ["key", "shard", "sample_offset", "sample_nbytes", "offset", "nbytes", "ext", "caption"]
    names = [name for name in names if name not in seen]
    expected = dic.read_webdataset(shards, backend="pandas").compute()
    assert table.select(names).to_pylist() == get_backend("pandas").to_arrow(expected[names]).to_pylist()
    assert not set(seen) & set(table.column_names)
    assert table["source_shard"].to_pylist() == scored["shard"].tolist()


def test_curated_shards_are_written_again_without_their_sources(sources: list[Path], tmp_path: Path) -> None:
    """From the rows beside them, as any reader of Parquet has them."""
    dic.to_webdataset(read(*sources), tmp_path / "first", max_count=6)
    first = members_of(*tars(tmp_path / "first"))
    shutil.rmtree(sources[0].parent)
    files_ = str(tmp_path / "first" / "*.parquet")
    dic.to_webdataset(dd.read_parquet(files_), tmp_path / "second", max_count=4)
    assert members_of(*tars(tmp_path / "second")) == first
    second = dic.read_scores(tmp_path / "second").compute()
    assert set(second["source_shard"]) == {str(path) for path in tars(tmp_path / "first")}
    assert [problem for _, problem in verify(str(tmp_path / "second"))] == [None] * len(tars(tmp_path / "second"))


def test_duckdb_reads_the_rows(scored: pd.DataFrame, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    dic.to_webdataset(scored, tmp_path / "out", max_count=6)
    with duckdb.connect() as db:
        rows = db.execute(
            "SELECT key, typeof(embedding), embedding, aesthetic_score FROM read_parquet(?) WHERE aesthetic_score >= 4",
            [str(tmp_path / "out" / "*.parquet")],
        ).fetchall()
    kept = scored[scored["aesthetic_score"] >= 4]
    assert [row[0] for row in rows] == kept["key"].tolist()
    assert {row[1] for row in rows} == {"FLOAT[]"}
    vectors = [None if v is pd.NA else list(v) for v in kept["embedding"]]
    assert [row[2] for row in rows] == vectors
    assert [row[3] for row in rows] == kept["aesthetic_score"].tolist()


def test_statistics(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    returned = dic.to_webdataset(read(*sources), out, max_count=10)
    for stats in returned:
        on_disk = json.loads((out / stats["shard"].replace(".tar", "_stats.json")).read_text())
        assert {**on_disk, "resumed": False} == stats
        data = (out / stats["shard"]).read_bytes()
        assert stats["sha256"] == hashlib.sha256(data).hexdigest()
        assert stats["nbytes"] == len(data)
        assert stats["count"] == sum(stats["sources"].values())
    assert returned[0]["sources"] == {str(sources[0]): 7}
    assert written_shards(str(out)) == ["00000", "00001", "00002", "00003", "00004"]


@pytest.mark.parametrize("npartitions", [1, 2, 9])
def test_same_partitions_same_bytes(scored: pd.DataFrame, npartitions: int, tmp_path: Path) -> None:
    """Wherever and however often they are written; and cut otherwise, the same samples in the same order."""
    df = dd.from_pandas(scored, npartitions=npartitions, sort=False)
    dic.to_webdataset(df, tmp_path / "0", max_count=6)
    for name, scheduler in (("1", "threads"), ("2", "synchronous")):
        with dask.config.set(scheduler=scheduler):
            dic.to_webdataset(df, tmp_path / name, max_count=6)
        assert contents(tmp_path / name) == contents(tmp_path / "0")
    dic.to_webdataset(scored, tmp_path / "whole", max_count=6)
    assert members_of(*tars(tmp_path / "0")) == members_of(*tars(tmp_path / "whole"))


def test_neighbouring_partitions_share_a_shard(tmp_path: Path) -> None:
    """Four samples each: two fit into ten. Where a key is in both, there is one shard more."""
    names = [[f"{p}{i}" for i in range(4)] for p in "abcde"]
    names[3] = [names[2][0], *names[3][1:]]
    paths = [
        make_tar(tmp_path / f"{k}.tar", [(f"{name}.txt", name.encode()) for name in part])
        for k, part in enumerate(names)
    ]
    stats = dic.to_webdataset(read(*paths), tmp_path / "out", max_count=10)
    assert [list(s["sources"].values()) for s in stats] == [[4, 4], [4], [4], [4]]
    assert members_of(*tars(tmp_path / "out")) == [(f"{n}.txt", n.encode()) for part in names for n in part]


def test_same_bytes_of_a_table_of_many_pages(tmp_path: Path) -> None:
    """Parquet writers close a page by what they were handed at a time, which must not be a partition."""
    n, width = 3000, 200
    source = make_tar(tmp_path / "in.tar", [(f"{i}.txt", b"") for i in range(n)])
    frame = read(source).compute()
    vectors = np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)
    frame["embedding"] = pd.Series(pd.array(list(vectors), dtype=pd.ArrowDtype(pa.list_(pa.float32()))))
    out, found = tmp_path / "out", []
    out.mkdir()
    for frames in ([frame], [frame.iloc[:1500], frame.iloc[1500:1501], frame.iloc[1501:]]):
        assert not write_shard(0, frames, WriteSpec(str(out)), resume=False)["resumed"]
        found.append(tree(out))
    assert found[0] == found[1]


def test_objects_and_categories_survive(sources: list[Path], tmp_path: Path) -> None:
    """Columns as users make them: arrays as objects, categories, and one that is empty in some partitions."""
    frame = read(sources[0]).compute()
    vectors = [np.array([i, i / 2]) for i in range(len(frame))]
    frame["embedding"] = vectors
    frame["source"] = pd.Categorical(["x", "y", "x", "z", "z", "y", "x"])
    frame["note"] = pd.Series([None] * 5 + ["late", "later"], dtype=object)
    out = tmp_path / "out"
    dic.to_webdataset(frame, out)
    table = pq.read_table(out / "00000.parquet")
    assert table["embedding"].to_pylist() == [v.tolist() for v in vectors]
    assert table["source"].to_pylist() == ["x", "y", "x", "z", "z", "y", "x"]
    assert table["note"].to_pylist() == [None] * 5 + ["late", "later"]
    parts = [frame.iloc[:3].copy(), frame.iloc[3:].copy()]
    for part in parts:
        part["source"] = part["source"].cat.remove_unused_categories()
    spec = WriteSpec(str(tmp_path / "cut"))
    (tmp_path / "cut").mkdir()
    write_shard(0, parts, spec)
    cut = pq.read_table(tmp_path / "cut" / "00000.parquet")
    assert cut.drop_columns("shard").equals(table.drop_columns("shard"))


# --- samples whose members lie apart --------------------------------------------------------------


def scattered(path: Path, samples: list[Members]) -> Path:
    """All first members, then all second ones, and so on."""
    return make_tar(path, [sample[i] for i in range(3) for sample in samples])


@contextlib.contextmanager
def counted_reads() -> Any:
    """Bytes that this process reads from files, as the kernel counts them."""
    io_file = Path("/proc/self/io")
    if not io_file.exists():
        pytest.skip("this system does not count what is read")

    def count() -> int:
        return int(io_file.read_text().split()[1])

    result = [0]
    start = count()
    yield result
    result[0] = count() - start


def test_members_that_lie_apart_are_read_once(tmp_path: Path) -> None:
    samples = [triple(f"s{i:03d}", i, 30_000) for i in range(200)]
    source = scattered(tmp_path / "in.tar", samples)
    frame = read(source).compute(scheduler="synchronous")
    size = source.stat().st_size
    assert frame["sample_nbytes"].sum() > 100 * size
    (tmp_path / "out").mkdir()
    order = np.random.default_rng(0).permutation(200)
    tracemalloc.start()
    with counted_reads() as read_bytes:
        write_shard(0, [frame.iloc[order]], WriteSpec(str(tmp_path / "out")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert members_of(tmp_path / "out" / "00000.tar") == [m for i in order for m in samples[i]]
    assert read_bytes[0] < 3 * size
    assert peak < size


def test_lone_sample_whose_members_lie_far_apart(tmp_path: Path) -> None:
    source = tmp_path / "in.tar"
    sample = triple("a", 1)
    with tarfile.open(source, "w") as tar:
        for name, data in [*sample[:2], ("filler.bin", None), sample[2]]:
            info = tarfile.TarInfo(name)
            info.size = 300 << 20 if data is None else len(data)
            tar.addfile(info, io.BytesIO(data or b"") if data is not None else None)
            if data is None:  # a hole
                tar.fileobj.seek(info.size, io.SEEK_CUR)  # type: ignore[union-attr]
                tar.offset += info.size  # type: ignore[attr-defined]
    frame = read(source).compute(scheduler="synchronous")
    assert frame["sample_nbytes"].tolist()[0] > 300 << 20
    tracemalloc.start()
    dic.to_webdataset(frame[frame.key == "a"], tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert members_of(tmp_path / "out" / "00000.tar") == sample
    assert peak < 32 << 20


def test_scattered_samples_fill_a_shard(tmp_path: Path) -> None:
    """Each one's extent is about the whole tar."""
    samples = [triple(f"s{i}", i) for i in range(20)]
    source = scattered(tmp_path / "in.tar", samples)
    # 512 + 1024 for the image, 1024 for either of the others, and a pax header with the time before each
    stats = dic.to_webdataset(read(source), tmp_path / "out", max_size=5 * (1536 + 2 * 1024 + 3 * 1024))
    assert [s["count"] for s in stats] == [5, 5, 5, 5]
    assert members_of(*tars(tmp_path / "out")) == [m for sample in samples for m in sample]


@pytest.mark.parametrize("change", ["longer", "fewer members", "other bytes", "cut", "garbage", "gone"])
def test_changed_source_of_scattered_samples(tmp_path: Path, change: str) -> None:
    path = scattered(tmp_path / "in.tar", PLAIN)
    frame = read(path).compute(scheduler="synchronous")
    rows = frame.assign(sha256=[hashlib.sha256(sample[0][1]).hexdigest() for sample in PLAIN])
    (tmp_path / "out").mkdir()
    spec = WriteSpec(str(tmp_path / "out"))
    write_shard(0, [rows], spec)
    image = (PLAIN[3][0][0], noise(99, len(PLAIN[3][0][1]) + 600 * (change == "longer")))
    if change in ("longer", "other bytes"):
        scattered(path, [*PLAIN[:3], [image, *PLAIN[3][1:]], *PLAIN[4:]])
    elif change == "fewer members":
        make_tar(path, [sample[i] for i in range(2) for sample in PLAIN])
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-15_000])
    elif change == "garbage":
        path.write_bytes(noise(5, path.stat().st_size))
    else:
        path.unlink()
    message = "cannot read .*in.tar" if change == "gone" else "'a[0-9]' is not as it was .*score it again"
    with unchanged(tmp_path / "out"), pytest.raises(WriteError, match=message):
        write_shard(0, [rows], spec)


# --- which rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pandas", "dask"])
def test_filtered_shuffled_and_sorted_rows(sources: list[Path], tmp_path: Path, kind: str) -> None:
    lazy = read(*sources)
    df: Any = lazy.compute().reset_index(drop=True) if kind == "pandas" else lazy
    samples = [*PLAIN, *HARD, *HARD]

    def check(name: str, chosen: Any, expected: list[Members]) -> None:
        dic.to_webdataset(chosen, tmp_path / name, max_count=4)
        assert members_of(*tars(tmp_path / name)) == [m for sample in expected for m in sample]

    check("filtered", df[df.key.str.startswith("a")], PLAIN)
    check("largest", df[df["nbytes"] > 600], [s for s in samples if len(s[0][1]) > 600])
    check("sorted", df[df.key.str.startswith("a")].sort_values("nbytes", ascending=False), PLAIN[::-1])
    if kind == "pandas":
        order = np.random.default_rng(0).permutation(len(df))
        check("shuffled", df.iloc[order], [samples[i] for i in order])
        check("backwards", df[::-1], samples[::-1])
    else:
        check("dropped", df.partitions[1:], [*HARD, *HARD])
        check("turned", df.partitions[[2, 0]], [*HARD, *PLAIN])


@pytest.mark.parametrize("kind", ["pandas", "dask"])
def test_nothing_selected(sources: list[Path], tmp_path: Path, kind: str) -> None:
    df: Any = read(*sources)
    df = df.compute() if kind == "pandas" else df
    none = df[df.key == "nobody"]
    assert dic.to_webdataset(none, tmp_path / "out") == []
    assert tree(tmp_path / "out") == {}
    dic.to_webdataset(df, tmp_path / "full")
    assert dic.to_webdataset(none, tmp_path / "full", overwrite=True) == []
    assert tree(tmp_path / "full") == {}


def test_damaged_tars_give_what_is_whole(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "in.tar", [m for sample in PLAIN for m in sample])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        path.write_bytes(whole[: tar.getmember("a5.jpg").offset_data + 100])
    df = read(path, tmp_path / "missing.tar")
    assert (df.compute()["status"] == "read_error").sum() == 2
    (stats,) = dic.to_webdataset(df, tmp_path / "out")
    assert stats["count"] == 5
    assert members_of(tmp_path / "out" / "00000.tar") == [m for sample in PLAIN[:5] for m in sample]


def test_lazy(sources: list[Path], tmp_path: Path) -> None:
    later = dic.to_webdataset(read(sources[0]), tmp_path / "out", compute=False)
    assert tree(tmp_path / "out") == {}
    (stats,) = later.compute()
    assert stats["count"] == len(PLAIN)
    assert members_of(tmp_path / "out" / "00000.tar") == [m for sample in PLAIN for m in sample]


def test_columns_that_are_needed(sources: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to_webdataset needs the columns shard, sample_offset"):
        dic.to_webdataset(read(sources[0])[["key", "sample_nbytes"]], tmp_path / "out")
    few = read(sources[0])[["sample_offset", "sample_nbytes", "shard", "key"]]
    dic.to_webdataset(few, tmp_path / "out")
    assert members_of(tmp_path / "out" / "00000.tar") == [m for sample in PLAIN for m in sample]


def recipe(name: str) -> str:
    """Python block of the docs that holds a text."""
    page = Path(__file__).parents[2] / "docs" / "howto" / "own_steps.md"
    (block,) = [b for b in re.findall(r"```py\n(.*?)```", page.read_text(), re.DOTALL) if name in b]
    return str(block)


def test_recipe_of_a_merge_with_keys_that_look_like_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = make_tar(tmp_path / "in" / "0.tar", [m for n in range(3) for m in triple(f"00000000{n}", n)])
    Path("ratings.csv").write_text("key,rating\n000000002,5\n000000000,3\n")
    names = {"pd": pd, "df": dic.read_webdataset(source)}
    exec(recipe("read_csv"), names)
    df = names["df"]
    dic.to_webdataset(df[df["rating"].notnull()], tmp_path / "out")
    assert {name for name, _ in members_of(tmp_path / "out" / "00000.tar")} == {
        f"00000000{n}.{ext}" for n in (0, 2) for ext in ("jpg", "txt", "json")
    }


@pytest.mark.parametrize("kind", ["int64", "float64", "object", "dask", "command"])
def test_keys_that_became_numbers(tmp_path: Path, kind: str) -> None:
    source = make_tar(tmp_path / "in" / "0.tar", triple("000000001", 1))
    df: Any = dic.read_webdataset(source).compute()
    df["key"] = pd.Series([1], dtype=kind if kind in ("float64", "object") else "int64")
    if kind == "dask":
        df = dd.from_pandas(df, npartitions=1)
    with pytest.raises(ValueError, match=r"'key' holds (int64|double), but keys are text .*dtype={\"key\": str}"):
        if kind == "command":
            df.to_parquet(tmp_path / "table.parquet")
            dic.write_selection(tmp_path / "table.parquet", tmp_path / "out")
        else:
            dic.to_webdataset(df, tmp_path / "out")


def test_names_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    names = ["../up.jpg", "../../up.jpg", f"{away}/absolute.jpg", "/etc/dask_imgcurator_test.jpg", "a/../../b.jpg"]
    source = make_tar(tmp_path / "in" / "in.tar", [(name, name.encode()) for name in names])
    out = tmp_path / "x" / "y" / "out"
    before = tree(tmp_path)
    dic.to_webdataset(read(source), out)
    after = {name: data for name, data in tree(tmp_path).items() if not (tmp_path / name).is_relative_to(out)}
    assert after == before
    assert not Path("/etc/dask_imgcurator_test.jpg").exists()
    assert sorted(tree(out)) == ["00000.idx", "00000.parquet", "00000.tar", "00000_stats.json", "sizes.json"]
    assert members_of(out / "00000.tar") == [(name, name.encode()) for name in names]


# --- resuming, failing, overwriting ---------------------------------------------------------------


@pytest.fixture
def frame(sources: list[Path]) -> pd.DataFrame:
    return read(*sources[:2]).compute()


@pytest.fixture
def spec(tmp_path: Path) -> WriteSpec:
    (tmp_path / "out").mkdir()
    return WriteSpec(str(tmp_path / "out"))


def times(folder: str) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in Path(folder).iterdir()}


def test_finished_shard_is_taken_over(frame: pd.DataFrame, spec: WriteSpec) -> None:
    first = write_shard(3, [frame.iloc[:5]], spec)
    before = times(spec.folder)
    assert sorted(before) == ["00003.idx", "00003.parquet", "00003.tar", "00003_stats.json"]
    second = write_shard(3, [frame.iloc[:2], frame.iloc[2:5]], spec)
    assert (first.pop("resumed"), second.pop("resumed")) == (False, True)
    assert first == second
    assert times(spec.folder) == before
    assert write_shard(3, [frame.iloc[:5]], spec, resume=False)["resumed"] is False
    assert set(times(spec.folder).items()).isdisjoint(before.items())


@pytest.mark.parametrize("change", ["fewer", "order", "column", "source", "no tar", "no parquet", "broken statistics"])
def test_what_is_written_anew(frame: pd.DataFrame, spec: WriteSpec, sources: list[Path], change: str) -> None:
    rows = frame.iloc[:5]
    write_shard(0, [rows], spec)
    out = Path(spec.folder)
    if change == "fewer":
        rows = rows.iloc[:4]
    elif change == "order":
        rows = rows[::-1]
    elif change == "column":
        rows = rows.assign(caption="other")
    elif change == "source":
        os.utime(sources[0], ns=(1, 1))
    elif change == "no tar":
        (out / "00000.tar").unlink()
    elif change == "no parquet":
        (out / "00000.parquet").unlink()
    else:
        text = (out / "00000_stats.json").read_text()
        (out / "00000_stats.json").write_text(text.replace('"content": "', '"content": "0'))
    stats = write_shard(0, [rows], spec)
    assert stats["resumed"] is False
    clean = Path(spec.folder).with_name("clean")
    clean.mkdir()
    write_shard(0, [rows], WriteSpec(str(clean)))
    assert contents(out) == contents(clean)


def rewrite(path: Path, samples: list[Members]) -> None:
    make_tar(path, [m for sample in samples for m in sample], tarfile.USTAR_FORMAT)


def longer(path: Path) -> None:
    rewrite(path, [[(PLAIN[0][0][0], noise(0, 5000)), *PLAIN[0][1:]], *PLAIN[1:]])


def shorter(path: Path) -> None:
    rewrite(path, [[(PLAIN[0][0][0], b""), *PLAIN[0][1:]], *PLAIN[1:]])


def fewer_members(path: Path) -> None:
    rewrite(path, [PLAIN[0][:2], *PLAIN[1:]])


def other_order(path: Path) -> None:
    rewrite(path, PLAIN[::-1])


def other_bytes(path: Path) -> None:
    rewrite(path, [[(PLAIN[0][0][0], noise(99, len(PLAIN[0][0][1]))), *PLAIN[0][1:]], *PLAIN[1:]])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1100])


def garbage(path: Path) -> None:
    path.write_bytes(noise(5, path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "change", [longer, shorter, fewer_members, other_order, other_bytes, cut, garbage, empty, Path.unlink]
)
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "over a finished shard"])
def test_changed_source(frame: pd.DataFrame, spec: WriteSpec, sources: list[Path], change: Any, before: bool) -> None:
    """Nothing wrong is written, and nothing half: what was there before stays."""
    images = {s[0][0]: hashlib.sha256(s[0][1]).hexdigest() for s in PLAIN}
    rows = frame.iloc[:7].assign(sha256=[images[f"{key}.jpg"] for key in frame["key"][:7]])
    if before:
        write_shard(0, [frame.iloc[7:9]], spec)
    change(sources[0])
    with unchanged(Path(spec.folder)), pytest.raises(WriteError, match=r"in/plain\.tar") as caught:
        write_shard(0, [rows], spec)
    if change is not Path.unlink:
        assert "'a0'" in str(caught.value)
        assert "score it again" in str(caught.value)


def test_source_that_vanishes_in_the_middle(sources: list[Path], tmp_path: Path) -> None:
    df = read(*sources[:2])
    df = df[df.key != "k1"]  # one shard
    later = dic.to_webdataset(df, tmp_path / "out", compute=False)
    sources[1].unlink()
    with pytest.raises(WriteError, match=r"cannot read .*in/hard\.tar, from which 7 samples are to be copied"):
        later.compute()
    assert tree(tmp_path / "out") == {}


KILLED = """
import os, sys
from pathlib import Path
import dask_imgcurator as dic
from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.storage import tar_copy
from dask_imgcurator.storage.curated import WriteSpec, write_shard

source, base = sys.argv[1:]
frame = dic.read_webdataset(source, backend="pandas").compute(scheduler="synchronous")

def dies_at(owner, name, count):
    real, left = getattr(owner, name), [count]
    def call(*args, **kwargs):
        if left[0] == 0:
            os._exit(9)
        left[0] -= 1
        return real(*args, **kwargs)
    setattr(owner, name, call)

moments = [(tar_copy, "header", 4)]
moments += [(Path, "replace", i) for i in range(4)] + [(Path, "unlink", i) for i in range(5)]
for number, (owner, name, count) in enumerate(moments):
    for old in (False, True):
        folder = Path(base, f"{number}-{old}")
        folder.mkdir()
        if old:
            write_shard(0, [get_backend('pandas').to_arrow(frame.iloc[3:])], WriteSpec(str(folder)))
        if (pid := os.fork()) == 0:
            dies_at(owner, name, count)
            write_shard(0, [get_backend('pandas').to_arrow(frame.iloc[:5])], WriteSpec(str(folder)))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, (name, count)
"""


def test_killed_at_any_moment(sources: list[Path], tmp_path: Path) -> None:
    base = tmp_path / "killed"
    base.mkdir()
    subprocess.run([sys.executable, "-c", KILLED, str(sources[0]), str(base)], check=True)
    frame = read(sources[0]).compute()
    clean, older = tmp_path / "clean", tmp_path / "older"
    for folder, rows in ((clean, frame.iloc[:5]), (older, frame.iloc[3:])):
        folder.mkdir()
        write_shard(0, [rows], WriteSpec(str(folder)))
    folders = sorted(base.iterdir())
    assert len(folders) == 20
    for folder in folders:
        # A tar that can be seen is whole, and the statistics beside it are its own.
        if (folder / "00000.tar").exists():
            assert written_shards(str(folder)) == ["00000"]
            assert (folder / "00000.tar").read_bytes() in [(f / "00000.tar").read_bytes() for f in (clean, older)]
            stats = json.loads((folder / "00000_stats.json").read_text())
            assert stats["sha256"] == hashlib.sha256((folder / "00000.tar").read_bytes()).hexdigest()
        files.remove_partial(str(folder))
        write_shard(0, [frame.iloc[:5]], WriteSpec(str(folder)))
        assert contents(folder) == contents(clean)


def test_existing_folder(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    dic.to_webdataset(read(*sources), out, max_count=3)
    assert len(tars(out)) > 4
    with (
        unchanged(out),
        pytest.raises(FileExistsError, match=r"out already holds .*00000\.idx and .* more.*overwrite=True"),
    ):
        dic.to_webdataset(read(sources[0]), out)
    strangers = {
        "notes.txt": b"notes",
        "mine.tar": b"mine",
        "00001.jpg": b"picture",
        "0.tar": b"few digits",
        # as img2dataset leaves them
        "00090.tar": b"tar",
        "00090.parquet": b"rows",
        "00090_stats.json": b'{"count": 10, "successes": 9, "failed_to_download": 1}',
        "00091_stats.json": b"not JSON",
        "00092.tar": b"without statistics",
    }
    for name, data in strangers.items():
        (out / name).write_bytes(data)
    dic.to_webdataset(read(sources[0]), out, max_count=4, overwrite=True)
    ours = [f"0000{i}{suffix}" for i in range(2) for suffix in (".idx", ".parquet", ".tar", "_stats.json")]
    assert sorted(tree(out)) == sorted([*ours, *strangers, "sizes.json"])
    assert {name: (out / name).read_bytes() for name in strangers} == strangers
    assert members_of(out / "00000.tar", out / "00001.tar") == [m for sample in PLAIN for m in sample]


def test_surplus_of_a_run_that_was_killed(frame: pd.DataFrame, spec: WriteSpec) -> None:
    for number in range(3):
        write_shard(number, [frame.iloc[number : number + 1]], spec)
    (Path(spec.folder) / "00002.tar").unlink()  # statistics come before the tar
    assert written_shards(spec.folder) == ["00000", "00001", "00002"]
    assert remove_surplus(spec.folder, 1) == ["00001", "00002"]
    assert sorted(tree(Path(spec.folder))) == ["00000.idx", "00000.parquet", "00000.tar", "00000_stats.json"]


@pytest.mark.parametrize("name", ["00000.tar", "00000.parquet", "00000.idx", "00000_stats.json"])
def test_files_of_others_are_not_written_over(sources: list[Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b'{"count": 1}')
    with unchanged(out), pytest.raises(FileExistsError, match=f"out already holds .*{name}"):
        dic.to_webdataset(read(sources[0]), out)
    with unchanged(out), pytest.raises(WriteError, match=f"{name} exists and was not written by this library"):
        dic.to_webdataset(read(sources[0]), out, overwrite=True)


@pytest.mark.parametrize("through", ["itself", "link", "dots", "linked source"])
@pytest.mark.parametrize("kind", ["pandas", "dask"])
def test_sources_are_not_written_over(sources: list[Path], tmp_path: Path, through: str, kind: str) -> None:
    out, link = tmp_path / "out", tmp_path / "link"
    dic.to_webdataset(read(*sources), out, max_count=4)
    link.symlink_to(out)
    target = {"link": link, "dots": tmp_path / "in" / ".." / "out"}.get(through, out)
    # The first shard would come from elsewhere: writing it would destroy what the later ones need.
    first = read(sources[0])
    df: Any = dd.concat([first[first.key > "a2"], read(*tars(link if through == "linked source" else out))])
    df = df.compute() if kind == "pandas" else df
    refused = pytest.raises(WriteError, match="is a source shard in the output folder")
    with unchanged(out), dask.config.set(scheduler="synchronous"), refused:
        dic.to_webdataset(df, target, overwrite=True, max_count=4)
    refined = dic.to_webdataset(read(*tars(out)), tmp_path / "out2", max_count=4)
    assert members_of(*tars(tmp_path / "out2")) == ALL
    assert len(refined) == len(tars(out))


# --- other file systems ---------------------------------------------------------------------------


@pytest.fixture
def memory() -> Any:
    """An empty object store: fsspec's, which shows a file when its transaction ends."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_object_store(sources: list[Path], tmp_path: Path, memory: Any) -> None:
    for path in sources:
        memory.pipe_file(f"/in/{path.name}", path.read_bytes())
    df = dic.read_webdataset([f"memory://in/{p.name}" for p in sources], backend="pandas")
    dic.to_webdataset(read(*sources), tmp_path / "out", max_count=2)
    stats = dic.to_webdataset(df, "memory://out", max_count=2)
    for path in [*tars(tmp_path / "out"), *(tmp_path / "out").glob("*.idx")]:
        assert memory.cat(f"/out/{path.name}") == path.read_bytes()
    assert written_shards("memory://out") == [p.stem for p in tars(tmp_path / "out")]
    assert len(stats) == len(tars(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="holds files of curated shards"):
        dic.to_webdataset(df, "memory://out")
    with pytest.raises(WriteError, match="is a source shard in the output folder"):
        dic.to_webdataset(dic.read_webdataset("memory://out/*.tar", backend="pandas"), "memory://out/", overwrite=True)
    dic.to_webdataset(df.partitions[:1], "memory://out", overwrite=True)
    names = [f"00000{suffix}" for suffix in (".idx", ".parquet", ".tar", "_stats.json")]
    assert sorted(memory.ls("/out", detail=False)) == [f"/out/{name}" for name in (*names, "sizes.json")]


@pytest.mark.parametrize("store", ["memory", "local"])
def test_written_whole_or_not_at_all(tmp_path: Path, memory: Any, store: str) -> None:
    folder = "memory://x" if store == "memory" else str(tmp_path)
    url, other = files.join(folder, "a.bin"), files.join(folder, "b.bin")
    with files.write_whole(url) as file:
        file.write(b"half")
        assert not files.exists(url)
        with files.write_whole(other) as inner:  # another writer of the same store comes and goes
            inner.write(b"whole")
        assert files.read_text(other) == "whole"
        assert not files.exists(url)
        assert files.list_files(folder, "") == [files.list_files(folder, "b.bin")[0]]
        file.write(b" and half")
    assert files.read_text(url) == "half and half"
    with pytest.raises(KeyError), files.write_whole(url) as file:
        file.write(b"bad")
        raise KeyError
    assert files.read_text(url) == "half and half"
    new = files.join(folder, "c.bin")
    with pytest.raises(KeyError), files.write_whole(new) as file:
        file.write(b"bad")
        raise KeyError
    assert not files.exists(new)
    assert len(files.list_files(folder, ".bin")) == 2
    if store == "local":
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "b.bin"]
    files.remove(url)
    files.remove(url)
    assert files.read_text(url) is None


def test_leftovers_of_a_killed_process(tmp_path: Path) -> None:
    """Those of a process that lives are left alone."""
    code = f"""
import os, signal
from dask_imgcurator.storage import files, tar_copy
open(files.temporary_name({str(tmp_path / "00000.tar")!r}), "wb").write(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    mine = Path(files.temporary_name(str(tmp_path / "00000.tar")))
    mine.write_bytes(b"half")
    (tmp_path / "kept.tar").write_bytes(b"whole")
    assert files.list_files(str(tmp_path), ".tar") == [str(tmp_path / "kept.tar")]
    assert files.remove_partial(str(tmp_path)) == 1
    assert sorted(tree(tmp_path)) == sorted(["kept.tar", mine.name])
    assert files.remove_partial(str(tmp_path / "nowhere")) == 0


# --- odd tars, from their bytes to what webdataset reads of the curated ones ----------------------


@dataclass
class Odd:
    """A tar, the rows that it should give, and the samples that should be copied."""

    entries: list[Any]
    rows: list[tuple[str | None, str]]
    samples: list[tuple[str, dict[str, bytes]]]
    format_: int = tarfile.PAX_FORMAT
    cut: Any = None  # from the tar's bytes and its last header to what is left of it


def special(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def whole(*keys: str, **fields: Any) -> Odd:
    """Samples of an image and a caption, one after the other."""
    samples = [(key, {"jpg": noise(i, 700 + i), "txt": key.encode()}) for i, key in enumerate(keys)]
    entries = [(f"{key}.{ext}", data) for key, sample in samples for ext, data in sample.items()]
    return Odd(entries, [(key, "ok") for key in keys], samples, **fields)


def folders() -> Odd:
    odd = whole("d/a", "d/v1.5/a", "./b")
    odd.entries[2:2] = [special("d", type=tarfile.DIRTYPE), special("d/v1.5", type=tarfile.DIRTYPE, mode=0o755)]
    return odd


def links() -> Odd:
    entries = [("a.jpg", b"A"), special("a.txt", type=tarfile.SYMTYPE, linkname="/etc/hostname")]
    entries += [special("b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg"), ("b.txt", b"B")]
    entries += [special("c.jpg", type=tarfile.LNKTYPE, linkname="a.jpg"), ("d.jpg", b"D")]
    rows = [("a", "ok"), ("b", "no_image"), ("c", "no_image"), ("d", "ok")]
    return Odd(entries, rows, [("a", {"jpg": b"A"}), ("b", {"txt": b"B"}), ("d", {"jpg": b"D"})])


def holes() -> Odd:
    sparse = {"pax_headers": {"GNU.sparse.size": "6", "GNU.sparse.map": "1,2,4,1"}}
    entries = [("a.jpg", b"A"), special("a.bin", b"xyz", **sparse), special("b.jpg", b"xyz", **sparse), ("b.txt", b"B")]
    data = b"\0xy\0z\0"
    rows = [("a", "ok"), ("b", "read_error")]
    return Odd(entries, rows, [("a", {"jpg": b"A", "bin": data}), ("b", {"jpg": data, "txt": b"B"})])


def apart() -> Odd:
    odd = whole("a", "b", "c")
    odd.entries = [*odd.entries[::2], *odd.entries[1::2]]
    return odd


def extensions() -> Odd:
    members = {"seg.PNG": b"mask", "JPG": b"photo", "png": b"other", "JSON": b"{}"}
    entries = [(f"a.{ext}", data) for ext, data in members.items()]
    return Odd(entries, [("a", "ok")], [("a", {ext.lower(): data for ext, data in members.items()})])


def hidden() -> Odd:
    """In webdataset, too, a name that begins with a dot belongs to no sample."""
    odd = whole("a", "b")
    odd.entries[2:2] = [(".a.jpg", b"hidden"), ("..\\a.jpg", b"hidden, not up"), ("d/.a.jpg", b"hidden"), ("..", b"")]
    return odd


def cut_off(cut: Any, key: str | None, kept: int) -> Odd:
    odd = whole("a", "b", "c", cut=cut)
    odd.rows[kept:] = [(key, "read_error")]
    odd.samples = odd.samples[:kept]
    return odd


def cut_between(last_sample: dict[str, bytes]) -> Odd:
    odd = whole("a", "b", "c", cut=lambda blob, last: blob[: last.offset])
    odd.rows.append(("", "read_error"))
    odd.samples[-1] = ("c", last_sample)
    return odd


GNU, PAX, USTAR = tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT
ODD: dict[str, Odd] = {
    "ustar": whole("a", "b", format_=USTAR),
    "gnu": whole("a", "b", format_=GNU),
    "pax": whole("a", "b"),
    "long names, ustar": whole("f" * 120 + "/" + "n" * 90, "b", format_=USTAR),
    "long names, gnu": whole("n" * 300, "d/" * 200 + "b", format_=GNU),
    "long names, pax": whole("n" * 300, "d/" * 200 + "b"),
    "not ASCII, gnu": whole("żółć/猫", "é" * 200, format_=GNU),
    "not ASCII, pax": whole("żółć/猫", "é" * 200),
    "folders": folders(),
    "links": links(),
    "sparse": holes(),
    "apart": apart(),
    "duplicates": whole("a", "b", "a", "a"),
    "extensions": extensions(),
    "names that lead out": whole("../a", "/etc/a", "a/../../b", "~/c", "C:\\a"),
    "hidden files": hidden(),
    "cut in data": cut_off(lambda blob, last: blob[: last.offset_data + 1], "c", 2),
    "cut in padding": cut_off(lambda blob, last: blob[: last.offset_data + 100], "c", 2),
    "cut in a header": replace(
        cut_between({"jpg": noise(2, 702)}), cut=lambda blob, last: blob[: last.offset_data - 100]
    ),
    "cut between members": cut_between({"jpg": noise(2, 702)}),
    "nothing": Odd([], [], []),
    "0 bytes": Odd([], [("", "read_error")], [], cut=lambda blob, last: b""),
    "gzip": Odd([("a.jpg", b"A")], [("", "read_error")], [], cut=lambda blob, last: gzip.compress(blob)),
}


def pack_odd(odd: Odd, path: Path) -> None:
    with tarfile.open(path, "w", format=odd.format_) as tar:
        for item in odd.entries:
            info, data = item if isinstance(item[0], tarfile.TarInfo) else special(*item)
            tar.addfile(info, io.BytesIO(data))
    if odd.cut is not None:
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1] if odd.entries else None
        path.write_bytes(odd.cut(path.read_bytes(), last))


def in_webdataset(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    import webdataset as wds

    return [
        (sample["__key__"], {ext: data for ext, data in sample.items() if not ext.startswith("__")})
        for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
    ]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_from_an_odd_tar_to_webdataset(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("webdataset")
    odd = ODD[kind]
    (tmp_path / "in").mkdir()
    pack_odd(odd, tmp_path / "in" / "odd.tar")
    frame = read(tmp_path / "in" / "odd.tar").compute(scheduler="synchronous")
    statuses = [(None if pd.isna(key) else key, status) for key, status in zip(frame.key, frame.status, strict=True)]
    assert statuses == odd.rows
    assert frame.error_message.notna().tolist() == [status != "ok" for _, status in odd.rows]
    blob = (tmp_path / "in" / "odd.tar").read_bytes()
    images = [blob[row.offset : row.offset + row.nbytes] for row in frame.itertuples() if row.status == "ok"]
    copied = dict(odd.samples) if len(dict(odd.samples)) == len(odd.samples) else None
    if copied is not None:
        assert images == [copied[key]["jpg"] for key, status in odd.rows if status == "ok"]
    with unchanged(tmp_path / "in"):
        dic.to_webdataset(frame, tmp_path / "out")
    found = [in_webdataset(path) for path in tars(tmp_path / "out")]
    gc.collect()  # webdataset leaves tars open: let them warn here, where it is allowed
    assert [sample for shard in found for sample in shard] == odd.samples
    for shard in found:
        assert len({key for key, _ in shard}) == len(shard)


def picture(seed: int) -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)).save(sink, "JPEG")
    return sink.getvalue()


ODD_FILES = ["a b#c?.tar", "[x].tar", "%41.tar", "{1..3}.tar", "żółć.tar", "-v.tar", "~.tar", "..tar"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_name_leads_out_of_the_folder_of_a_run(tmp_path: Path) -> None:
    """Neither one in a tar nor one of a tar; and the image that is asked for is the one that is scored and verified."""
    pytest.importorskip("webdataset")
    from distributed import Client

    stems = ["../x", "/etc/x", "\\x", str(tmp_path / "away" / "x")]
    samples = {f"{stem}-{n}": {"png": b"no image", "jpg": picture(n)} for n in range(len(ODD_FILES)) for stem in stems}
    for n, name in enumerate(ODD_FILES):
        keys = [f"{stem}-{n}" for stem in stems]
        members = [(f"{key}.{ext}", data) for key in keys for ext, data in samples[key].items()]
        make_tar(tmp_path / "in" / name, [*members, ("..\\x.jpg", b"a hidden file")])
    (tmp_path / "away").mkdir()
    out = tmp_path / "x" / "out"
    before = tree(tmp_path)
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=":0") as client:
        urls = [tmp_path / "in" / name for name in ODD_FILES]
        result = dic.curate(urls, out, model="starter", image="JPG", client=client)
    assert (result.samples, result.kept) == (len(samples),) * 2
    assert result.provenance["read"]["image"] == ["jpg"]
    after = {name: data for name, data in tree(tmp_path).items() if not (tmp_path / name).is_relative_to(out)}
    assert after == before
    assert not list(Path("/etc").glob("x-*"))
    tables = sorted(p.name for p in (out / "scores").glob("*.parquet"))
    assert tables == sorted(name.removesuffix("tar") + "parquet" for name in [*ODD_FILES[:-1], "_..tar"])
    curated = tars(out / "shards")
    found = [sample for path in curated for sample in in_webdataset(path)]
    gc.collect()
    assert len(found) == len(samples)
    assert dict(found) == samples
    assert [problem for _, problem in verify(str(out))] == [None] * (len(curated) + 1)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # open_clip's
def test_open_clip_counts_the_samples_of_a_folder(sources: list[Path], tmp_path: Path) -> None:
    """By ``sizes.json``, and ``--train-num-samples`` need not be given."""
    data = pytest.importorskip("open_clip_train.data")
    df = dic.read_webdataset([str(p) for p in sources])
    written = dic.to_webdataset(df, tmp_path, max_count=7)
    assert len(written) > 2
    last = len(written) - 1
    total, shards = data.get_dataset_size(f"{tmp_path}/{{00000..{last:05d}}}.tar")
    assert (total, shards) == (sum(stats["count"] for stats in written), len(written))
    dic.to_webdataset(df.partitions[:1], tmp_path, overwrite=True)  # fewer now
    assert set(json.loads((tmp_path / "sizes.json").read_text())) == {p.name for p in tmp_path.glob("*.tar")}
