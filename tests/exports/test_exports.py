"""Exports: read by the projects that they are for where these install, else held against their documented layout."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from dask_imgcurator.cli.main import cli
from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.exports import base, lists
from dask_imgcurator.exports.base import Exported, ExportError, export, formats
from dask_imgcurator.select.selection import apply_steps
from dask_imgcurator.steps.score_table import write_score_file

WIDTH = 16


def to_clip_retrieval(df: Any, out: Any, **options: Any) -> Exported:
    return export(df, out, "clip-retrieval", **options)


def to_datacomp(df: Any, out: Any, **options: Any) -> Exported:
    return export(df, out, "datacomp", **options)


def to_uid_subset(df: Any, out: Any, **options: Any) -> Exported:
    return export(df, out, "datacomp-subset", **options)


def to_laion(df: Any, out: Any, **options: Any) -> Exported:
    return export(df, out, "laion", **options)


def to_list(df: Any, out: Any, column: str = "key", **options: Any) -> Exported:
    return export(df, out, "list", column=column, **options)


@pytest.fixture(autouse=True)
def one_thread_at_a_time() -> Iterator[None]:
    with dask.config.set(scheduler="sync"):
        yield


def table(n: int = 60, seed: int = 0, failed: tuple[int, ...] = (3, 17), width: int = WIDTH) -> pd.DataFrame:
    """A score table in which each row's values tell which row it is."""
    rng = np.random.default_rng(seed)
    vectors = [rng.normal(size=width).astype("f4").tolist() for _ in range(n)]
    bad = set(failed)
    columns = {
        "key": pa.array([f"{i:05d}" for i in range(n)]),
        "shard": pa.array([f"{i // 10}.tar" for i in range(n)]),
        "sample_offset": pa.array(np.arange(n) * 1024),
        "caption": pa.array([None if i == 5 else f"picture {i}" for i in range(n)]),
        "url": pa.array([f"https://example.org/{i}.jpg" for i in range(n)]),
        "uid": pa.array([rng.bytes(16).hex() for _ in range(n)]),
        "status": pa.array(["decode_error" if i in bad else "ok" for i in range(n)]),
        "width": pa.array([None if i in bad else 100 + i for i in range(n)], pa.int32()),
        "height": pa.array([None if i in bad else 200 + i for i in range(n)], pa.int32()),
        "sha256": pa.array([f"{i:064x}" for i in range(n)]),
        "embedding": pa.array([None if i in bad else vectors[i] for i in range(n)], pa.list_(pa.float32())),
        "aesthetic_score": pa.array([None if i in bad else i / 7 for i in range(n)], pa.float32()),
        "nsfw_score": pa.array([None if i in bad else i / n for i in range(n)], pa.float32()),
        "clip_score": pa.array([None if i in bad else 0.2 + i / 1000 for i in range(n)], pa.float32()),
    }
    return get_backend("pandas").from_arrow(pa.table(columns))


def split(frame: pd.DataFrame, size: int = 10) -> dd.DataFrame:
    """Partitions of so many rows, with empty ones between."""
    pieces = [p for i in range(0, max(1, len(frame)), size) for p in (frame.iloc[i : i + size], frame.iloc[:0])]
    return dd.from_map(lambda i: pieces[i], range(len(pieces)), meta=frame.iloc[:0])


def ok(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["status"] == "ok"]


def half(frame: pd.DataFrame) -> np.ndarray:
    return np.array(frame["embedding"].tolist(), "f4").astype("f2")


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- clip-retrieval -------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "numbers"), [(60, ["0"]), (10, list("012345")), (5, [f"{i:02d}" for i in range(12)])])
def test_clip_retrieval_s_folder(tmp_path: Path, size: int, numbers: list[str]) -> None:
    frame = table()
    done = to_clip_retrieval(split(frame, size), tmp_path)
    expected = [f"img_emb/img_emb_{i}.npy" for i in numbers] + [f"metadata/metadata_{i}.parquet" for i in numbers]
    assert names(tmp_path) == expected == sorted(str(Path(f).relative_to(tmp_path)) for f in done.files)
    assert done.rows == 58
    arrays = [np.load(tmp_path / f"img_emb/img_emb_{i}.npy") for i in numbers]
    metadata = [pq.read_table(tmp_path / f"metadata/metadata_{i}.parquet").to_pandas() for i in numbers]
    assert [len(a) for a in arrays] == [len(m) for m in metadata]
    assert all(a.dtype == np.float16 and a.flags.c_contiguous for a in arrays)
    np.testing.assert_array_equal(np.concatenate(arrays), half(ok(frame)))
    together = pd.concat(metadata)
    assert list(together.columns[:2]) == ["image_path", "caption"]
    assert together["image_path"].tolist() == ok(frame)["key"].tolist()
    assert together["url"].tolist() == ok(frame)["url"].tolist()
    assert "embedding" not in together
    assert "key" not in together


def test_clip_retrieval_s_names_are_those_of_its_writer(tmp_path: Path) -> None:
    # clip_retrieval/clip_inference/writer.py pads to int(log10(partitions)) + 1.
    for count in (1, 9, 10, 11):
        frame = table(count, failed=())
        done = to_clip_retrieval(split(frame, 1), tmp_path / str(count))
        digits = int(math.log10(count)) + 1
        assert Path(done.files[0]).name == f"img_emb_{'0' * digits}.npy"
        assert len(done.files) == 2 * count


def test_embedding_reader_reads_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = pytest.importorskip("embedding_reader", reason="pip install --no-deps embedding-reader")
    frame = table()
    to_clip_retrieval(split(frame, 5), tmp_path)
    found = reader.EmbeddingReader(
        str(tmp_path / "img_emb"),
        file_format="parquet_npy",
        meta_columns=["image_path", "caption"],
        metadata_folder=str(tmp_path / "metadata"),
    )
    assert (found.count, found.dimension) == (58, WIDTH)
    batches = list(found(batch_size=25, show_progress=False))
    capsys.readouterr()
    np.testing.assert_array_equal(np.concatenate([b for b, _ in batches]), half(ok(frame)).astype("f4"))
    assert [k for _, meta in batches for k in meta["image_path"]] == ok(frame)["key"].tolist()
    plain = reader.EmbeddingReader(str(tmp_path / "img_emb"), file_format="npy")
    np.testing.assert_array_equal(next(plain(58, show_progress=False))[0], half(ok(frame)).astype("f4"))


def test_text_vectors_and_paths_of_one_s_own(tmp_path: Path) -> None:
    frame = ok(table()).assign(image_path=lambda f: "p/" + f["key"], text_embedding=lambda f: f["embedding"])
    frame = frame.rename(columns={"embedding": "vector"})
    to_clip_retrieval(frame, tmp_path, embedding="vector", text_embedding="text_embedding")
    assert names(tmp_path) == ["img_emb/img_emb_0.npy", "metadata/metadata_0.parquet", "text_emb/text_emb_0.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "text_emb/text_emb_0.npy"), half(ok(table())))
    metadata = pq.read_table(tmp_path / "metadata/metadata_0.parquet").to_pandas()
    assert metadata["image_path"].tolist() == ["p/" + k for k in metadata["key"]]


# --- datacomp -------------------------------------------------------------------------------------

DATACOMP = {
    "uid": pa.string(),
    "url": pa.string(),
    "text": pa.string(),
    "original_width": pa.int64(),
    "original_height": pa.int64(),
    "sha256": pa.string(),
    "clip_l14_similarity_score": pa.float32(),
}


def test_datacomp_s_metadata(tmp_path: Path) -> None:
    frame = table()
    done = to_datacomp(split(frame), tmp_path, arch="l14")
    stems = [f"{i:08d}" for i in range(6)]
    assert names(tmp_path) == sorted(f"{s}.{e}" for s in stems for e in ("npz", "parquet"))
    assert done.rows == 58
    tables = [pq.read_table(tmp_path / f"{s}.parquet") for s in stems]
    assert {f.name: f.type for f in tables[0].schema} == DATACOMP
    found = pa.concat_tables(tables).to_pandas()
    kept = ok(frame)
    for name, source in [("uid", "uid"), ("text", "caption"), ("original_width", "width"), ("sha256", "sha256")]:
        assert found[name].astype(object).where(found[name].notna(), None).tolist() == [
            None if pd.isna(v) else v for v in kept[source]
        ]
    assert found["clip_l14_similarity_score"].tolist() == kept["clip_score"].tolist()
    vectors = []
    for stem in stems:  # as baselines/apply_filter.py and image_based_clustering.py open them
        with fsspec.open(tmp_path / f"{stem}.npz") as file:
            vectors.append(np.load(file)["l14_img"])
    assert [len(v) for v in vectors] == [t.num_rows for t in tables]
    assert vectors[0].dtype == np.float16
    np.testing.assert_array_equal(np.concatenate(vectors), half(kept))


def test_datacomp_takes_what_there_is(tmp_path: Path) -> None:
    frame = ok(table()).drop(columns=["url", "sha256", "clip_score", "embedding", "uid"])
    frame = frame.assign(original_width=1000, clip_b32_similarity_score=0.5, b=0)
    to_datacomp(split(frame, 30), tmp_path)
    assert names(tmp_path) == ["00000000.parquet", "00000001.parquet"]
    found = pq.read_table(tmp_path).to_pandas()
    assert list(found) == ["uid", "text", "original_width", "original_height", "clip_b32_similarity_score"]
    assert found["original_width"].unique() == [1000]
    assert found["uid"].str.fullmatch("[0-9a-f]{32}").all()
    assert found["uid"].is_unique
    again = to_datacomp(frame.sample(frac=1, random_state=0), tmp_path / "again").files[0]
    assert set(pq.read_table(again)["uid"].to_pylist()) == set(found["uid"])


def test_datacomp_with_text_vectors_of_b32(tmp_path: Path) -> None:
    frame = ok(table()).assign(t=lambda f: f["embedding"])
    to_datacomp(frame, tmp_path, arch="b32", text_embedding="t")
    with np.load(tmp_path / "00000000.npz") as found:
        assert sorted(found) == ["b32_img", "b32_txt"]
    assert "clip_b32_similarity_score" in pq.read_schema(tmp_path / "00000000.parquet").names


def documented_subset(uids: list[str]) -> bytes:
    """What DataComp's README tells to do."""
    processed = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))
    processed.sort()
    buffer = io.BytesIO()
    np.save(buffer, processed)
    return buffer.getvalue()


@pytest.mark.parametrize("wave", [1, 256])
def test_the_subset_is_the_documented_one_byte_for_byte(
    tmp_path: Path, wave: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "_WAVE", wave)
    frame = table()
    frame.loc[0, "uid"] = "ff" * 16
    frame.loc[1, "uid"] = "F" * 15 + "E" + "0" * 16
    frame.loc[2, "uid"] = "0" * 31 + "1"
    uids = ok(frame)["uid"].tolist()
    done = to_uid_subset(split(frame), tmp_path / "subset.npy")
    assert (tmp_path / "subset.npy").read_bytes() == documented_subset(uids)
    assert done.rows == len(uids)
    # As resharder.py opens it and looks a sample up.
    subset = np.load(tmp_path / "subset.npy", mmap_mode="r")
    assert subset.dtype == np.dtype("u8,u8")
    for uid, there in [(uids[7], 1), (frame["uid"][3], 0)]:
        key = np.array([divmod(int(uid, 16), 2**64)], np.dtype("u8,u8"))[0]
        assert np.searchsorted(subset, key, "right") - np.searchsorted(subset, key, "left") == there


def test_a_uid_that_is_there_twice_is_written_once(tmp_path: Path) -> None:
    frame = ok(table())
    to_uid_subset(pd.concat([frame, frame.iloc[:5]]), tmp_path / "s.npy")
    assert (tmp_path / "s.npy").read_bytes() == documented_subset(frame["uid"].tolist())
    to_uid_subset(frame.iloc[:0], tmp_path / "none.npy")
    assert np.load(tmp_path / "none.npy").shape == (0,)


def test_rows_are_listed_as_often_as_a_column_says(tmp_path: Path) -> None:
    frame = table()
    frame["times"] = pd.array([None if i == 3 else i % 4 for i in range(len(frame))], "Int64")
    kept = ok(frame)
    times = [0 if pd.isna(n) else int(n) for n in kept["times"]]
    assert {0, 1, 2, 3} == set(times)
    uids = [uid for uid, n in zip(kept["uid"], times, strict=True) for _ in range(n)]
    done = export(split(frame), tmp_path / "subset.npy", "datacomp-subset", repeat="times")
    assert (tmp_path / "subset.npy").read_bytes() == documented_subset(uids)
    assert done.rows == len(uids) == sum(times)
    export(split(frame), tmp_path / "keys.txt", "list", repeat="times")
    keys = [key for key, n in zip(kept["key"], times, strict=True) for _ in range(n)]
    assert (tmp_path / "keys.txt").read_text().split() == keys
    for wrong, message in ((0.5, "give a column of whole numbers"), (-1, "holds -1: it must be 0 or more")):
        with pytest.raises(ExportError, match=f"repeat='times' .*{message}"):
            export(split(frame.assign(times=wrong)), tmp_path / "no.txt", "list", repeat="times")
    with pytest.raises(ExportError, match="needs the column 'often'"):
        export(split(frame), tmp_path / "no.txt", "list", repeat="often")


@pytest.mark.parametrize("uid", ["xyz", "0" * 31, "0" * 33, "g" * 32, "", " " * 32])
def test_a_wrong_uid_is_named(tmp_path: Path, uid: str) -> None:
    frame = table()
    frame.loc[7, "uid"] = uid
    with pytest.raises(ExportError, match=f"'uid' holds '{uid}': a uid has 32 hexadecimal digits"):
        to_uid_subset(split(frame), tmp_path / "s.npy")
    assert names(tmp_path) == []


# --- laion ----------------------------------------------------------------------------------------

# The schema of laion/aesthetics_v2_4.75 and ChristophSchuhmann/improved_aesthetics_6.5plus on the Hugging Face hub.
LAION = {
    "URL": pa.string(),
    "TEXT": pa.string(),
    "WIDTH": pa.float64(),
    "HEIGHT": pa.float64(),
    "similarity": pa.float64(),
    "punsafe": pa.float32(),
    "pwatermark": pa.float32(),
    "AESTHETIC_SCORE": pa.float32(),
    "hash": pa.int64(),
}


def test_laion_s_columns(tmp_path: Path) -> None:
    frame = table().assign(watermark_score=0.25, hash=np.arange(60), LICENSE="CC0")
    to_laion(split(frame, 20), tmp_path)
    assert names(tmp_path) == [f"part-{i:05d}.parquet" for i in range(3)]
    found = pq.read_table(tmp_path)
    types = {f.name: f.type for f in found.schema}
    assert types == LAION | {"LICENSE": pa.string()}
    assert list(types)[:9] == list(LAION)
    rows, kept = found.to_pandas(), ok(frame)
    pairs = {"URL": "url", "WIDTH": "width", "punsafe": "nsfw_score", "AESTHETIC_SCORE": "aesthetic_score"}
    for name, source in (pairs | {"similarity": "clip_score", "hash": "hash"}).items():
        assert rows[name].tolist() == kept[source].tolist()


def test_laion_s_columns_come_back_as_they_were(tmp_path: Path) -> None:
    frame = table().rename(columns={"url": "URL", "caption": "TEXT", "aesthetic_score": "AESTHETIC_SCORE"})
    frame = frame.drop(columns=["nsfw_score", "clip_score"]).assign(original_width=5000)
    to_laion(frame, tmp_path)
    found = pq.read_table(tmp_path)
    assert found.column_names == ["URL", "TEXT", "WIDTH", "HEIGHT", "AESTHETIC_SCORE"]
    assert found["WIDTH"].unique().to_pylist() == [5000]


# --- list -----------------------------------------------------------------------------------------


def test_a_list(tmp_path: Path) -> None:
    frame = table()
    frame.loc[8, "key"] = "übung\t1 "
    assert to_list(split(frame), tmp_path / "keys.txt").rows == 58
    assert (tmp_path / "keys.txt").read_bytes() == "".join(f"{k}\n" for k in ok(frame)["key"]).encode()
    to_list(frame, tmp_path / "offsets.txt", "sample_offset")
    assert (tmp_path / "offsets.txt").read_text().splitlines()[:2] == ["0", "1024"]
    to_list(frame, tmp_path / "captions.txt", "caption")
    assert len((tmp_path / "captions.txt").read_text().splitlines()) == 57  # one is null
    to_list(split(frame.iloc[:0]), tmp_path / "none.txt")
    assert (tmp_path / "none.txt").read_bytes() == b""


@pytest.mark.parametrize("value", ["two\nlines", "carriage\r"])
def test_a_value_of_several_lines_is_named(tmp_path: Path, value: str) -> None:
    frame = table()
    frame.loc[40, "key"] = value
    with pytest.raises(ExportError, match=r"'key' holds '(two\\nlines|carriage\\r)', which is more than one line"):
        to_list(split(frame), tmp_path / "keys.txt")
    assert names(tmp_path) == []


# --- whole or not at all --------------------------------------------------------------------------


def broken(frame: pd.DataFrame) -> pd.DataFrame:
    """A row of the fourth partition is ok and has no vector."""
    at = (frame["key"] == "00034").to_numpy()
    return frame.assign(embedding=frame["embedding"].where(~at))


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_nothing_is_left_where_a_partition_fails(tmp_path: Path, scheduler: str) -> None:
    with dask.config.set(scheduler=scheduler):
        with pytest.raises(ExportError, match=r"1 rows have no vector.*key '00034'.*embedding is not null"):
            to_clip_retrieval(split(broken(table())), tmp_path)
        assert names(tmp_path) == []
        to_clip_retrieval(split(table(seed=1)), tmp_path)
        before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
        with pytest.raises(ExportError):
            to_clip_retrieval(split(broken(table())), tmp_path, overwrite=True)
        assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_vectors_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    one, other = table(failed=()), table(seed=1, failed=())
    other["embedding"] = pd.Series(
        pd.array(pa.array([[1.0] * 8] * 60, pa.list_(pa.float32())), dtype=other["embedding"].dtype)
    )
    pieces = [one, other]
    df = dd.from_map(lambda i: pieces[i], range(2), meta=one.iloc[:0])
    with pytest.raises(ExportError, match="'embedding' holds vectors of 8 numbers and of 16"):
        to_datacomp(df, tmp_path, arch="b32")
    assert names(tmp_path) == []


def test_an_earlier_export_is_replaced_only_if_asked(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "notes.parquet").write_bytes(b"mine")
    to_clip_retrieval(split(table(), 5), tmp_path)
    with pytest.raises(FileExistsError, match=r"img_emb_00.npy and 23 more\): choose another folder, or overwrite"):
        to_clip_retrieval(split(table()), tmp_path)
    done = to_clip_retrieval(split(table(), 30), tmp_path, overwrite=True)
    assert len(done.files) == 4
    assert names(tmp_path) == [
        *("img_emb/img_emb_0.npy", "img_emb/img_emb_1.npy"),
        *("metadata/metadata_0.parquet", "metadata/metadata_1.parquet", "metadata/notes.parquet"),
    ]
    to_list(table(), tmp_path / "keys.txt")
    with pytest.raises(FileExistsError, match=r"keys.txt already exists"):
        to_list(table(), tmp_path / "keys.txt")
    assert to_list(table(), tmp_path / "keys.txt", overwrite=True).rows == 58


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".partial-{os.uname().nodename}-{dead.pid}-0123abcd-export-ffff"
    left.write_bytes(b"half")
    to_clip_retrieval(table(), tmp_path)
    assert names(tmp_path) == ["img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"]


def test_another_file_system() -> None:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    frame = table()
    done = to_datacomp(split(frame, 20), "memory://set/meta", arch="l14")
    assert done.files[0] == "memory://set/meta/00000000.parquet"
    with pytest.raises(FileExistsError):
        to_datacomp(frame, "memory://set/meta", arch="l14")
    to_datacomp(frame, "memory://set/meta", arch="l14", overwrite=True)
    assert sorted(p.rpartition("/")[2] for p in fs.ls("/set/meta", detail=False)) == [
        "00000000.npz",
        "00000000.parquet",
    ]
    with pytest.raises(ExportError):
        to_clip_retrieval(split(broken(frame)), "memory://set/clip")
    assert fs.glob("/set/clip/**/*.*") == []
    to_uid_subset(frame, "memory://set/s.npy")
    assert fs.cat_file("/set/s.npy") == documented_subset(ok(frame)["uid"].tolist())
    fs.store.clear()


# --- each row its own embedding -------------------------------------------------------------------


def score_folder(folder: Path, files: int = 24) -> Path:
    """Score files of several lengths, some rows failed; of wide vectors, so that Dask fuses files for other columns."""
    folder.mkdir()
    for i in range(files):
        rows = 5 + i % 7
        frame = table(rows, seed=i, failed=(i % rows,), width=256).assign(shard=f"{i}.tar")
        frame["key"] = [f"{i:03d}-{j}" for j in range(rows)]
        write_score_file(frame, str(folder / f"{i:03d}.parquet"), {}, "pandas", {})
    return folder


@pytest.mark.parametrize("form", ["read_parquet", "shuffled"])
@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_each_row_has_its_own_vector(tmp_path: Path, form: str, scheduler: str) -> None:
    folder = score_folder(tmp_path / "scores")
    df = dd.read_parquet(folder, dtype_backend="pyarrow")
    with dask.config.set(scheduler=scheduler):
        # What makes a partition number of one projection that of another's other rows.
        assert len(df[["key"]].map_partitions(len).compute()) < df.npartitions
        if form == "shuffled":
            df = df.shuffle("key", npartitions=5)
        assert to_clip_retrieval(df, tmp_path / "clip").rows == to_datacomp(df, tmp_path / "dc", arch="b32").rows
        to_list(df, tmp_path / "keys.txt")
    source = ok(pd.concat([pd.read_parquet(path) for path in sorted(folder.iterdir())])).set_index("key")
    found: dict[str, np.ndarray] = {}
    keys = []
    for path in sorted((tmp_path / "clip" / "metadata").iterdir()):
        vectors = np.load(
            tmp_path / "clip" / "img_emb" / path.name.replace("metadata", "img_emb").replace("parquet", "npy")
        )
        metadata = pd.read_parquet(path)
        found |= dict(zip(metadata["image_path"], vectors, strict=True))
        keys += metadata["image_path"].tolist()
        assert metadata["uid"].tolist() == source.loc[metadata["image_path"], "uid"].tolist()
    uids: dict[str, np.ndarray] = {}
    for path in sorted((tmp_path / "dc").glob("*.parquet")):
        with np.load(path.with_suffix(".npz")) as arrays:
            uids |= dict(zip(pd.read_parquet(path)["uid"], arrays["b32_img"], strict=True))
    assert len(keys) == len(source) and found.keys() == set(source.index) and uids.keys() == set(source["uid"])
    for key, row in source.iterrows():
        expected = np.asarray(row["embedding"], "f4").astype("f2")
        assert (found[key] == expected).all() and (uids[row["uid"]] == expected).all()
    listed = (tmp_path / "keys.txt").read_text().split()
    assert sorted(listed) == sorted(source.index)
    if form == "read_parquet":
        assert listed == keys == source.index.tolist()


# --- a new format ---------------------------------------------------------------------------------


def test_a_format_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTERED", dict(base._REGISTERED))

    @base.export_format("scores-only", "score-*.parquet with keys and scores")
    def scores_only(df: Any, column: str = "aesthetic_score") -> base.Layout:
        fields = [base.Field("key", ("key",), needs="key"), base.Field("score", (column,), pa.float32(), needs=column)]
        return base.Layout(base.filled(df, fields, "scores-only"), {"parquet": "score-{}.parquet"}, 3)

    frame = table()
    assert export(split(frame, 30), tmp_path, "scores-only", column="nsfw_score").rows == 58
    assert names(tmp_path) == ["score-000.parquet", "score-001.parquet"]
    found = pq.read_table(tmp_path).to_pandas()
    assert found["score"].tolist() == ok(frame)["nsfw_score"].tolist()
    with pytest.raises(ExportError, match="scores-only needs the column 'beauty'"):
        export(frame, tmp_path, "scores-only", column="beauty", overwrite=True)
    help_ = CliRunner().invoke(cli, ["export", "--help"]).output
    assert all(name in help_ for name in ("scores-only", "clip-retrieval", "datacomp-subset", "laion", "list"))


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format_", "without", "message"),
    [
        ("clip-retrieval", "embedding", "clip-retrieval needs the column 'embedding': embed adds it"),
        ("clip-retrieval", "key", "needs the column 'key': read_webdataset adds it"),
        ("datacomp", "width", "datacomp needs the column 'width': embed adds it"),
        ("datacomp", "caption", "'caption': read_webdataset adds it; on the command line: score "),
        ("datacomp-subset", "uid", r"'uid': read the shards with read_webdataset\(columns=\['uid', …\]\)"),
        (
            "laion",
            "url",
            r"read_webdataset\(columns=\['url', …\]\); on the command line: score … --column url ",
        ),
        ("list", "key", "list needs the column 'key'"),
    ],
)
def test_a_missing_column_names_the_step_that_adds_it(tmp_path: Path, format_: str, without: str, message: str) -> None:
    options = {"arch": "l14"} if format_ == "datacomp" else {}
    with pytest.raises(ExportError, match=message) as caught:
        export(split(table().drop(columns=without)), tmp_path / "out", format_, **options)
    assert "(available: " in str(caught.value)
    assert names(tmp_path) == []


def test_other_mistakes(tmp_path: Path) -> None:
    frame = table()
    with pytest.raises(ExportError, match="unknown format 'csv': use clip-retrieval, datacomp, datacomp-subset"):
        export(frame, tmp_path, "csv")
    with pytest.raises(ExportError, match=r"arch=None: name the CLIP model.*'b32' or 'l14'"):
        to_datacomp(frame, tmp_path)
    with pytest.raises(ExportError, match="needs the column 'vector': embed or embed_text adds it"):
        to_clip_retrieval(frame, tmp_path, embedding="vector")
    with pytest.raises(ExportError, match="arch='h14'"):
        to_datacomp(frame, tmp_path, arch="h14")
    with pytest.raises(ExportError, match=r"nothing to write to .*: no row is left, or none is ok"):
        to_laion(split(frame[frame["status"] != "ok"]), tmp_path)
    with pytest.raises(ExportError, match=r"'embedding' holds list.*: a list must hold text or integers"):
        to_list(frame, tmp_path / "x", "embedding")
    with pytest.raises(ExportError, match=r"'hash' cannot be written as 'hash' of int64"):
        to_laion(frame.assign(hash="abc"), tmp_path)
    with pytest.raises(TypeError, match="expected a Dask, pandas or cuDF frame"):
        to_list([1], tmp_path / "x")
    assert names(tmp_path) == []


def test_export_after_a_selection(tmp_path: Path) -> None:
    df = apply_steps(split(table()), ["top 50% by aesthetic_score", "sample 10"])
    expected = df.compute()["key"].tolist()
    for format_, about in formats().items():
        options = {"arch": "b32"} if format_ == "datacomp" else {}
        assert export(df, tmp_path / format_ / "x", format_, **options).rows == 10
        assert about.folder == (tmp_path / format_ / "x").is_dir()
    assert (tmp_path / "list" / "x").read_text().split() == expected
    metadata = [
        pq.read_table(p)["image_path"].to_pylist() for p in sorted((tmp_path / "clip-retrieval/x").rglob("*.parquet"))
    ]
    assert [key for keys in metadata for key in keys] == expected


def test_only_what_is_written_is_read() -> None:
    frame = table()
    calls: list[tuple[str, ...]] = []

    def load(i: int, columns: Any = None) -> pd.DataFrame:
        calls.append(tuple(columns or frame.columns))
        return frame[list(columns)] if columns else frame

    df = dd.from_map(load, range(2), meta=frame.iloc[:0])
    to_list(df, "memory://only/keys.txt", overwrite=True)
    to_laion(df, "memory://only/laion", overwrite=True)
    assert len(calls) == 2 + 2
    assert not any("embedding" in columns for columns in calls)
    assert all(set(columns) == {"key", "status"} for columns in calls[:2])
    fsspec.filesystem("memory").store.clear()
