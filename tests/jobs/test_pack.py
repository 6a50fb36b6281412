"""Pictures as people have them become shards that others read, with the bytes that they had."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from click.testing import CliRunner
from PIL import Image

import dask_imgcurator as dic
from dask_imgcurator.cli.main import cli

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of webdataset


def encoded(format_: str) -> bytes:
    picture = Image.effect_noise((200, 160), 60).convert("RGB")
    data = io.BytesIO()
    picture.save(data, format_)
    return data.getvalue()


def read(shards: list[str]) -> dict[str, dict[str, bytes]]:
    """What webdataset reads: members by key and extension."""
    found: dict[str, dict[str, bytes]] = {}
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        found[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    return found


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, dict[str, dict[str, bytes]]]:
    folder = tmp_path / "photos"
    (folder / "2020" / "trip.one").mkdir(parents=True)
    jpg, png = encoded("JPEG"), encoded("PNG")
    files = {
        "cat.jpg": jpg,
        "cat.txt": b"a cat",
        "cat.json": b'{"license": "cc0"}',
        "IMG.2020.01.JPG": jpg,
        "IMG.2020.01.JPG.txt": "früh".encode(),
        "2020/dog.png": png,
        "2020/trip.one/cat.jpg": jpg,
        "broken.jpg": jpg[:40],
        "notes.md": b"no picture",
        ".hidden.jpg": jpg,
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    expected = {
        "cat": {"jpg": jpg, "txt": b"a cat", "json": b'{"license": "cc0"}'},
        "IMG_2020_01": {"jpg": jpg, "txt": "früh".encode()},
        "2020/dog": {"png": png},
        "2020/trip.one/cat": {"jpg": jpg},
        "broken": {"jpg": jpg[:40]},
    }
    return folder, expected


def test_a_folder_of_pictures(photos: tuple[Path, Any], tmp_path: Path) -> None:
    folder, expected = photos
    done = CliRunner().invoke(cli, ["pack", str(folder), "--out", str(tmp_path / "shards"), "--max-count", "2"])
    assert done.exit_code == 0, done.output
    assert "1 file beside the pictures match no picture" in done.stderr and "notes.md" in done.stderr
    shards = sorted(map(str, (tmp_path / "shards").glob("*.tar")))
    assert len(shards) == 3
    assert read(shards) == expected


def test_it_is_packed_once_and_never_over_something_else(photos: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = photos
    (shard,) = dic.pack(folder, tmp_path / "shards")
    before = Path(shard).stat().st_mtime_ns
    assert dic.pack(folder, tmp_path / "shards") == [shard]
    assert Path(shard).stat().st_mtime_ns == before
    (folder / "cat.txt").write_text("another cat")
    with pytest.raises(FileExistsError, match="holds shards packed from something else"):
        dic.pack(folder, tmp_path / "shards")
    dic.pack(folder, tmp_path / "shards", overwrite=True)
    assert read([shard])["cat"]["txt"] == b"another cat"


def test_curate_takes_a_folder_of_pictures(photos: tuple[Path, Any], tmp_path: Path) -> None:
    folder, expected = photos
    out = tmp_path / "out"
    common = ["--model", "starter", "--n-workers", "1", "--column", "license", "--where", "width > 0"]
    log = tmp_path / "log"
    done = CliRunner().invoke(cli, ["curate", str(folder), "--out", str(out), *common, "--log", str(log)])
    assert done.exit_code == 0, done.output
    assert "packing 1 shard\n" in done.stderr
    packed = (out / "packed" / "00000.tar").stat().st_size
    wrote = [event for event in map(json.loads, log.open()) if event["event"] == "wrote"]
    assert (wrote[0]["shard"], wrote[0]["samples"], wrote[0]["nbytes"]) == ("00000.tar", 5, packed)
    table = pd.read_parquet(out / "scores")
    assert table["status"].value_counts().to_dict() == {"ok": 4, "decode_error": 1}
    assert table.set_index("key")["license"].dropna().to_dict() == {"cat": "cc0"}
    assert read([str(out / "shards" / "00000.tar")])["cat"] == expected["cat"]
    alone = CliRunner().invoke(cli, ["score", str(folder), "--out", str(tmp_path / "s"), "--model", "starter"])
    assert alone.exit_code == 2
    assert f"dask-imgcurator pack {folder} --out SHARDS" in alone.stderr


@pytest.mark.parametrize("layout", ["huggingface", "plain", "two columns"])
def test_tables_of_images(layout: str, tmp_path: Path) -> None:
    pictures = [encoded("JPEG"), encoded("PNG"), None, encoded("AVIF" if layout == "plain" else "WEBP")]
    names = ["a.jpg", "b.png", None, None]
    columns: dict[str, Any] = {"image": pictures, "caption": ["one", None, "three", "four"], "score": [1, 2, None, 4]}
    if layout == "huggingface":
        pairs = [{"bytes": data, "path": name} for data, name in zip(pictures, names, strict=True)]
        columns["image"] = pa.array(pairs, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    if layout == "two columns":
        columns |= {"mask": [b"x"] * 4, "uid": ["k1", "k2", "k3", "k.4"]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet", row_group_size=3)
    if layout == "two columns":
        with pytest.raises(ValueError, match=r"there are image, mask: name one with --image"):
            dic.pack(tmp_path / "train.parquet", tmp_path / "shards")
    image = "image" if layout == "two columns" else None
    shards = dic.pack(tmp_path / "train.parquet", tmp_path / "shards", image=image, max_count=3)
    assert len(shards) == 2
    found = read(shards)
    keys = ["k1", "k2", "k3", "k_4"] if layout == "two columns" else [f"train/{i:09d}" for i in range(4)]
    assert list(found) == keys
    first, second, third, fourth = (found[key] for key in keys)
    assert (first["jpg"], second["png"], fourth["avif" if layout == "plain" else "webp"]) == (
        pictures[0],
        pictures[1],
        pictures[3],
    )
    assert (first["txt"], third["txt"]) == (b"one", b"three")
    assert "txt" not in second and set(third) == {"txt", "json"}
    assert json.loads(fourth["json"])["score"] == 4
    df = dic.read_webdataset(shards, columns=["score"]).compute()
    assert df["status"].tolist() == ["ok", "ok", "no_image", "ok"]
    assert df["caption"].tolist()[0] == "one"


def test_two_samples_of_one_key(tmp_path: Path) -> None:
    (tmp_path / "a.b.jpg").write_bytes(b"x")
    (tmp_path / "a_b.jpg").write_bytes(b"y")
    with pytest.raises(ValueError, match=r"would both have the key 'a_b'"):
        dic.pack(tmp_path, tmp_path / "out")


def test_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no pictures in"):
        dic.pack(tmp_path, tmp_path / "out")


def test_what_else_is_in_the_folder_is_never_removed(photos: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = photos
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(b"somebody's originals")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"00000.tar was not written by pack"):
            dic.pack(folder, tmp_path / "shards", overwrite=overwrite)
    assert (tmp_path / "shards" / "00000.tar").read_bytes() == b"somebody's originals"


def test_a_run_that_was_stopped_goes_on_and_another_cut_is_another(photos: tuple[Path, Any], tmp_path: Path) -> None:
    folder, expected = photos
    shards = dic.pack(folder, tmp_path / "shards", max_count=2)
    whole = [Path(shard).read_bytes() for shard in shards]
    Path(shards[1]).unlink()  # as a run leaves it that was stopped
    kept = Path(shards[0]).stat().st_mtime_ns
    assert dic.pack(folder, tmp_path / "shards", max_count=2) == shards
    assert [Path(shard).read_bytes() for shard in shards] == whole
    assert Path(shards[0]).stat().st_mtime_ns == kept
    with pytest.raises(FileExistsError, match="shards packed from something else"):
        dic.pack(folder, tmp_path / "shards", max_size=sum(map(len, whole)) // 3)
    assert read(dic.pack(folder, tmp_path / "shards", max_count=9, overwrite=True)) == expected


def test_results_may_lie_in_the_folder_of_pictures(photos: tuple[Path, Any]) -> None:
    folder, expected = photos
    (folder / "metadata.parquet").write_bytes(b"of some other tool")  # pictures come first
    out = folder / "out"
    for _ in range(2):  # and the same command resumes
        result = dic.curate(folder, out, model="starter", measures=False, where="width > 0", client=1)
        assert (result.samples, result.kept) == (5, 4)
    assert read(dic.pack(folder, out / "packed")) == expected


def test_no_row_of_a_table_is_lost(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([encoded("PNG"), None], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    found = read(dic.pack(tmp_path / "a.parquet", tmp_path / "a"))
    assert [sorted(sample) for sample in found.values()] == [["png"], ["json"]]
    numbers = table.append_column("id", pa.array([None, 7])).append_column("x", pa.array([float("nan"), 1.5]))
    pq.write_table(numbers, tmp_path / "b.parquet")
    found = read(dic.pack(tmp_path / "b.parquet", tmp_path / "b"))
    assert list(found) == ["b/000000000", "7"]
    assert [json.loads(sample["json"], parse_constant=pytest.fail) for sample in found.values()] == [
        {"x": None},
        {"x": 1.5},
    ]
    pq.write_table(table.append_column("id", pa.array(["a.b", "a_b"])), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"several rows with the key 'a_b'"):
        dic.pack(tmp_path / "c.parquet", tmp_path / "c")
