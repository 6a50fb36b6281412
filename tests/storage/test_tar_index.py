"""Shards: URLs, the index of a tar (against tarfile, webdataset and DALI's wds2idx), damage."""

from __future__ import annotations

import bz2
import contextlib
import gc
import gzip
import io
import lzma
import os
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_imgcurator.storage.files import list_files
from dask_imgcurator.storage.samples import ShardIndex, format_idx, split_name
from dask_imgcurator.storage.tar_index import index_shard, index_tar
from dask_imgcurator.storage.tar_read import read_extents, read_text
from dask_imgcurator.storage.urls import check_shards, expand, fingerprint, packed_beside, what_is

FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
    # Its writer gives times as fractions, for which each file gets a pax extension.
    "webdataset": tarfile.PAX_FORMAT,
}
END = 2 * 512  # what closes a tar

Members = Sequence[tuple[str, bytes]]


def entry(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def pack(entries: Sequence[Any], format_: str = "pax") -> bytes:
    """Bytes of a tar, without the zeros that fill its last record."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=FORMATS[format_]) as tar:
        for item in entries:
            info, data = item if isinstance(item[0], tarfile.TarInfo) else entry(*item)
            if format_ == "webdataset":
                info.mtime = 1_795_407_303.25
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    return sink.getvalue()[: end + END]


def layout(blob: bytes) -> list[tuple[str, int, int, int, int]]:
    """For each file in a tar, as tarfile sees it: name, header, data, length, end."""
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        return [
            (i.name, i.offset, i.offset_data, i.size, i.offset_data + -(-i.size // 512) * 512)
            for i in tar.getmembers()
            if i.isreg()
        ]


def listed(index: ShardIndex) -> list[tuple[str, list[str]]]:
    return [(s.key, [m.name for m in s.members]) for s in index.samples]


def index_bytes(blob: bytes) -> ShardIndex:
    return index_tar(io.BytesIO(blob))


def picture(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


#: Real-life names; each sample's members are neighbours.
LONG = "long-" + "x" * 100
PLAIN: Members = [
    ("000.jpg", picture(1, 700)),
    ("000.txt", b"a cat"),
    ("000.json", b"{}"),
    ("001.JPG", picture(2, 512)),
    ("001.cls", b""),
    ("002.seg.png", picture(3, 1)),
    ("002.PNG", picture(4, 1025)),
    ("folder/000.jpg", picture(5, 30)),
    ("folder/v1.5/000.jpg", picture(6, 31)),
    ("../up.jpg", picture(7, 9)),
    ("/etc/root.jpg", picture(8, 10)),
    ("a b.jpg", picture(9, 11)),
    ("żółć/猫.jpg", picture(10, 12)),
    ("żółć/猫.txt", b"kot"),
    ("f" * 120 + "/" + "n" * 90 + ".jpg", picture(13, 40)),
    ("f" * 120 + "/" + "n" * 90 + ".txt", b"caption"),
]
#: USTAR has no room for these.
LONGER: Members = [
    (LONG + ".jpg", picture(14, 41)),
    (LONG + ".txt", b"caption"),
    ("x" * 300 + "/" + "猫" * 90 + ".jpg", picture(15, 42)),
    ("y" * 5000 + ".jpg", picture(16, 43)),
]


def names_for(format_: str) -> Members:
    return PLAIN if format_ == "ustar" else [*PLAIN, *LONGER]


# --- expand ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00002.tar", "00000.tar", "00001.tar", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def here(folder: Path, *numbers: int) -> list[str]:
    return [str(folder / f"{n:05d}.tar") for n in numbers]


def test_expand_paths_and_lists(folder: Path) -> None:
    assert expand(str(folder / "00001.tar")) == here(folder, 1)
    assert expand(folder / "00001.tar") == here(folder, 1)
    assert expand([folder / "00002.tar", str(folder / "00000.tar")]) == here(folder, 2, 0)
    assert expand(f"file://{folder}/00001.tar") == here(folder, 1)


def test_expand_globs_and_folders_are_sorted(folder: Path) -> None:
    assert expand(f"{folder}/*.tar") == here(folder, 0, 1, 2)
    assert expand(f"file://{folder}/0000[12].tar") == here(folder, 1, 2)
    assert expand(folder) == here(folder, 0, 1, 2)
    assert expand(f"{folder}/") == here(folder, 0, 1, 2)
    (folder / "sub/sub").mkdir(parents=True)
    (folder / "sub/sub/00001.tar").touch()
    assert expand(f"{folder}/**/00001.tar") == here(folder, 1) + [str(folder / "sub/sub/00001.tar")]


def test_expand_braces_keep_their_order(folder: Path) -> None:
    assert expand(f"{folder}/{{00000..00002}}.tar") == here(folder, 0, 1, 2)
    assert expand(f"{folder}/0000{{2,0}}.tar") == here(folder, 2, 0)
    assert expand(f"{folder}/{{00002,0000[01]}}.tar") == here(folder, 2, 0, 1)
    assert expand("s3://bucket/{a,b}/{0..1}.tar") == [f"s3://bucket/{x}/{i}.tar" for x in "ab" for i in "01"]


def test_expand_takes_a_shard_once(folder: Path) -> None:
    twice = [folder / "00001.tar", folder, f"file://{folder}/00000.tar", f"{folder}/../{folder.name}/00002.tar"]
    assert expand(twice) == here(folder, 1, 0, 2)


def test_expand_relative_paths_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert expand("00001.tar") == here(folder, 1)
    assert expand("*.tar") == here(folder, 0, 1, 2)
    assert expand(".") == here(folder, 0, 1, 2)


@pytest.mark.parametrize("name", ["a[1].tar", "a{1,2}.tar", "what?.tar", "*.tar", "un{balanced.tar"])
def test_expand_an_existing_name_is_not_a_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "a1.tar").touch()
    assert expand(tmp_path / name) == [str(tmp_path / name)]
    assert expand(f"file://{tmp_path / name}") == [str(tmp_path / name)]


def test_expand_folder_with_braces_in_its_name(tmp_path: Path) -> None:
    odd = tmp_path / "set{1}[x]"
    odd.mkdir()
    (odd / "0.tar").touch()
    assert expand(odd) == [str(odd / "0.tar")]


ODD = [
    ("data [v1]", ["shard 0.tar", "shard 1.tar"]),
    ("b{0}", ["part{1}.tar"]),
    ("b{x,y}", ["0.tar"]),
    ("pct%20", ["a#b?c.tar"]),
    ("star*", ["x.tar"]),
    ("tilde~", ["~a.tar", "~root.tar"]),
    ("UPPER", ["A.TAR"]),
    ("comma,x", ["a,b.tar"]),
]


@pytest.mark.parametrize(("folder", "names"), ODD)
def test_expand_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, names: list[str]) -> None:
    inside = tmp_path / folder
    inside.mkdir()
    paths = [str(inside / name) for name in names]
    for path in paths:
        Path(path).touch()
    monkeypatch.chdir(tmp_path)
    for where in (str(inside), folder):
        assert [expand(f"{where}/{name}") for name in names] == [[path] for path in paths]
        assert expand(where) == expand(f"{where}/*.[tT][aA][rR]") == paths
    monkeypatch.chdir(inside)
    assert [expand(name) for name in names] == [[path] for path in paths]
    assert expand("*.[tT][aA][rR]") == paths


@pytest.mark.parametrize(("folder", "names"), [odd for odd in ODD if "{x,y}" not in odd[0]])
def test_expand_odd_names_on_another_file_system(memory: Any, folder: str, names: list[str]) -> None:
    for name in names:
        memory.pipe(f"/shards-test/{folder}/{name}", b"x")
    given = f"memory://shards-test/{folder}"
    assert [expand(f"{given}/{name}") for name in names] == [[f"{given}/{name}"] for name in names]
    expected = [f"memory:///shards-test/{folder}/{name}" for name in names]
    assert expand(f"{given}/") == expand(f"{given}/*.[tT][aA][rR]") == expected


def test_expand_braces_in_a_folder_with_brackets(tmp_path: Path) -> None:
    for name in ("data [v1]/shard 0.tar", "data [v1]/shard 1.tar", "data v/shard 0.tar", "b{x,y}/0.tar", "bx/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    both = [str(tmp_path / f"data [v1]/shard {i}.tar") for i in (0, 1)]
    assert expand(tmp_path / "data [v1]/shard {0..1}.tar") == both
    assert expand(tmp_path / "data [v1]/shard [01].tar") == both
    assert expand(tmp_path / "*/shard {1,0}.tar") == [both[1], both[0], str(tmp_path / "data v/shard 0.tar")]
    assert expand(tmp_path / "b{x,y}/{0..0}.tar") == [str(tmp_path / "b{x,y}/0.tar")]
    assert expand(str(tmp_path / f"data [v1]/shard {{0,{'1,' * 200}1}}.tar")) == both


def test_score_tables_in_folders_with_odd_names(tmp_path: Path, memory: Any) -> None:
    for folder, _ in ODD:
        path = tmp_path / folder / "a.parquet"
        path.parent.mkdir()
        path.touch()
        assert list_files(str(path.parent), ".parquet") == [str(path)]
        memory.pipe(f"/shards-test/{folder}/a.parquet", b"x")
        (found,) = list_files(f"memory://shards-test/{folder}", ".parquet")
        assert found.endswith(f"/shards-test/{folder}/a.parquet")


def test_home_and_names_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.tar").touch()
    assert expand("~/a.tar") == expand("~/*.tar") == [str(tmp_path / "a.tar")]
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*/~nobody-of-that-name/a\.tar"):
        expand("~nobody-of-that-name/a.tar")


def test_expand_leaves_hidden_files_of_a_folder_alone(folder: Path) -> None:
    (folder / ".partial-1234-00003.tar").touch()
    (folder / "._00001.tar").touch()
    assert expand(folder) == expand(f"{folder}/*.tar") == here(folder, 0, 1, 2)


def test_expand_one_missing_is_no_error_but_all_are(folder: Path) -> None:
    assert expand(f"{folder}/{{00001..00004}}.tar") == here(folder, 1, 2, 3, 4)
    with pytest.raises(FileNotFoundError, match=rf"{folder}/00007\.tar \(nor any of 2 others\)"):
        expand(f"{folder}/{{00007..00009}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*missing\.tar$"):
        expand(folder / "missing.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.zip", r"no file matches '.*\*\.zip'"),
        ("{*.tar,*.tgz}", r"no file matches '.*\*\.tgz'"),
        ("{1..2", r"unbalanced braces in '.*\{1\.\.2'"),
    ],
)
def test_expand_nothing_matches(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        expand(f"{folder}/{pattern}")


def test_expand_nothing_given(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="name at least one"):
        expand([])
    with pytest.raises(FileNotFoundError, match=rf"no \*\.tar in the folder {tmp_path}$"):
        expand(tmp_path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "a.tar.zst", "a.tbz2", "a.tar.xz"])
def test_expand_folder_of_compressed_tars(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "0.txt").touch()
    with pytest.raises(FileNotFoundError, match=rf"only compressed ones: unpack {tmp_path / name} and its like first"):
        expand(tmp_path)
    (tmp_path / "b.tar").touch()
    assert expand(tmp_path) == [str(tmp_path / "b.tar")]


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/shards-test", recursive=True)


def test_expand_on_another_file_system(memory: Any) -> None:
    for name in ("b.tar", "a.tar", "c.txt"):
        memory.pipe(f"/shards-test/{name}", b"x")
    expected = ["memory:///shards-test/a.tar", "memory:///shards-test/b.tar"]
    assert expand("memory://shards-test/*.tar") == expected
    assert expand("memory://shards-test/") == expected
    assert expand(["memory://shards-test/c.txt", "memory://shards-test/?.tar"])[1:] == expected
    with pytest.raises(FileNotFoundError, match=r"memory://shards-test/\*\.zip"):
        expand("memory://shards-test/*.zip")


def test_expand_signed_address_is_not_a_glob() -> None:
    url = "https://host.invalid/00000.tar?signature=a*b[c]"
    assert expand(url) == [url]


# --- index ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("A.JPG", ("A", "jpg")),
        ("a.seg.PNG", ("a", "seg.png")),
        ("d.ir/a.jpg", ("d.ir/a", "jpg")),
        ("./a.jpg", ("./a", "jpg")),
        ("../x.jpg", ("../x", "jpg")),
        ("/etc/x.jpg", ("/etc/x", "jpg")),
        ("README", None),
        ("d.ir/README", None),
        (".hidden.jpg", None),
        ("d/._a.jpg", None),
        ("__notes__/a.jpg", None),
        ("__key.jpg", ("__key", "jpg")),
        ("a\udce9.jp\udcff", ("a\\xe9", "jp\\xff")),
    ],
)
def test_split_name(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize("format_", FORMATS)
def test_index_against_tarfile(tmp_path: Path, format_: str) -> None:
    """Directories, links, names without a key and hidden files are in the tar, too, and belong to no sample."""
    others = [
        entry("folder", type=tarfile.DIRTYPE),
        ("README", b"about"),
        entry("link.jpg", type=tarfile.SYMTYPE, linkname="000.jpg"),
        entry("hard.jpg", type=tarfile.LNKTYPE, linkname="000.jpg"),
        (".hidden.jpg", b"secret"),
        ("__meta__/info.json", b"{}"),
    ]
    members = names_for(format_)
    path = tmp_path / "a.tar"
    path.write_bytes(pack([others[0], *members[:5], *others[1:4], *members[5:], *others[4:]], format_))
    index = index_shard(str(path))
    assert (index.error, index.broken) == (None, None)
    blob = path.read_bytes()
    found = [(m.name, blob[m.offset : m.offset + m.nbytes]) for s in index.samples for m in s.members]
    assert found == list(members)
    where = {name: (data, size) for name, _, data, size, _ in layout(blob)}
    assert {m.name: (m.offset, m.nbytes) for s in index.samples for m in s.members} == {
        name: where[name] for name, _ in members
    }


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_index_against_webdataset(tmp_path: Path, format_: str) -> None:
    wds = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    extra = [("__meta__/info.json", b"{}"), ("README", b""), ("folder/000.txt", b"its neighbours went before")]
    path.write_bytes(pack([*names_for(format_), *extra], format_))
    theirs = [
        (s["__key__"], {ext: data for ext, data in s.items() if not ext.startswith("__")})
        for s in wds.WebDataset(str(path), shardshuffle=False)
        if s["__key__"] != "folder/000"
    ]
    gc.collect()  # webdataset leaves tars open: let them warn here, where it is allowed
    blob = path.read_bytes()
    ours = [
        (s.key, {m.ext: blob[m.offset : m.offset + m.nbytes] for m in s.members})
        for s in index_shard(str(path)).samples
        if s.key != "folder/000"
    ]
    assert ours == theirs
    assert len(ours) > 8


def test_index_of_what_webdataset_writes(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    path = tmp_path / "a.tar"
    with wds.TarWriter(str(path)) as writer:
        for i in range(20):
            writer.write({"__key__": f"{i}", "jpg": picture(i, 100 * i), "txt": f"caption {i}", "json": {"i": i}})
    assert index_shard(str(path)).error is None
    found = [(m.name, m.offset, m.nbytes) for s in index_shard(str(path)).samples for m in s.members]
    assert found == [(name, data, size) for name, _, data, size, _ in layout(path.read_bytes())]
    assert len(found) == 60


@pytest.mark.parametrize("format_", FORMATS)
def test_extent_is_a_tar_of_its_own(format_: str) -> None:
    members = names_for(format_)
    blob = pack(members, format_)
    index = index_bytes(blob)
    position, unpacked = 0, []
    for sample in index.samples:
        assert sample.offset == position  # nothing is lost between two samples
        position = sample.end
        with tarfile.open(fileobj=io.BytesIO(blob[sample.offset : sample.end])) as tar:
            unpacked.append([(i.name, tar.extractfile(i).read()) for i in tar.getmembers()])  # type: ignore[union-attr]
        assert [name for name, _ in unpacked[-1]] == [m.name for m in sample.members]
    assert [m for sample in unpacked for m in sample] == list(members)
    assert blob[position:] == bytes(END)


def test_members_of_a_sample_that_lie_apart() -> None:
    blob = pack([("a.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"3"), ("a.txt", b"4"), ("c.jpg", b"5"), ("b.json", b"6")])
    samples = index_bytes(blob).samples
    assert [(s.key, [m.ext for m in s.members]) for s in samples] == [
        ("a", ["jpg", "txt"]),
        ("b", ["jpg", "txt", "json"]),
        ("c", ["jpg"]),
    ]
    # Each member takes a header and a block.
    assert [(s.offset // 1024, s.end // 1024) for s in samples] == [(0, 4), (1, 6), (4, 5)]


def test_a_repeated_extension_begins_a_new_sample() -> None:
    names = ["a.jpg", "a.txt", "a.jpg", "a.txt", "b.JPG", "b.jpg"]
    assert listed(index_bytes(pack([(n, b"x") for n in names]))) == [
        ("a", ["a.jpg", "a.txt"]),
        ("a", ["a.jpg", "a.txt"]),
        ("b", ["b.JPG"]),
        ("b", ["b.jpg"]),
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.txt", "a.jpg", "a.png"], "a.jpg"),
        (["a.png", "a.jpg"], "a.png"),
        (["a.seg.png", "a.jpg"], "a.jpg"),
        (["a.seg.png", "a.depth.tiff", "a.json"], "a.seg.png"),
        (["a.JPEG"], "a.JPEG"),
        (["a.txt", "a.jpg.json", "a.cls"], None),
    ],
)
def test_image_of_a_sample(names: list[str], expected: str | None) -> None:
    (sample,) = index_bytes(pack([(n, b"x") for n in names])).samples
    image = sample.image()
    assert (image and image.name) == expected


@pytest.mark.parametrize(
    ("preferred", "expected", "why"),
    [
        (["png", "jpg"], "a.png", ""),
        (["webp", "seg.png", "jpg"], "a.seg.png", ""),
        (["bin"], "a.bin", ""),
        (["jpeg"], None, "no member with the extension jpeg (found: jpg, seg.png, png, bin)"),
        (["tif", "x.png"], None, "no member with the extension tif or x.png (found: jpg, seg.png, png, bin)"),
    ],
)
def test_image_of_a_preferred_extension(preferred: list[str], expected: str | None, why: str) -> None:
    (sample,) = index_bytes(pack([(n, b"x") for n in ("a.jpg", "a.seg.PNG", "a.PNG", "a.bin")])).samples
    image = sample.image(preferred)
    assert (image and image.name.lower()) == expected
    if image is None:
        assert sample.why_no_image(preferred) == why


def test_names_that_are_no_utf8() -> None:
    blob = pack([(b"caf\xe9.jpg".decode(errors="surrogateescape"), b"1"), ("caf\udcea.jpg", b"2")], "gnu")
    assert b"caf\xe9.jpg" in blob
    assert [s.key for s in index_bytes(blob).samples] == ["caf\\xe9", "caf\\xea"]


def test_global_pax_header() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", pax_headers={"comment": "made by git archive"}) as tar:
        tar.addfile(*(lambda i, d: (i, io.BytesIO(d)))(*entry("a.jpg", b"abc")))
    blob = sink.getvalue()
    (sample,) = index_bytes(blob).samples
    assert blob[sample.members[0].offset :][:3] == b"abc"
    assert listed(index_bytes(blob[sample.offset :])) == [("a", ["a.jpg"])]


def gnu_tar(folder: Path, *options: str) -> bytes:
    """Pack what is in a folder, in the order of the names."""
    names = sorted(p.name for p in folder.iterdir())
    run = ["tar", "--create", "--file=-", *options, "--", *names]
    try:
        return subprocess.run(run, cwd=folder, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no GNU tar")


SPARSE = {
    "gnu": ["--format=gnu"],
    "pax 0.0": ["--format=pax", "--sparse-version=0.0"],
    "pax 0.1": ["--format=pax", "--sparse-version=0.1"],
    "pax 1.0": ["--format=pax", "--sparse-version=1.0"],
}
HOLES = {
    # More pieces than the first header of the old format has room for.
    "a.bin": b"".join(b"piece %d" % i + bytes(50_000) for i in range(30)) + b"end",
    "a.jpg": b"x" * 4096 + bytes(1_000_000),
    "a.txt": bytes(100_000) + b"caption" + bytes(100_000),
    "b.json": b"{" + b" " * 10 + b'"n": 1}',
}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_members(tmp_path: Path, kind: str) -> None:
    """Their holes are not in the tar; GNU tar makes such members with --sparse."""
    for name, data in HOLES.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(len(data))
            for block in range(0, len(data), 4096):
                if part := data[block : block + 4096].rstrip(b"\0"):
                    file.seek(block)
                    file.write(part)
    blob = gnu_tar(tmp_path, "--sparse", *SPARSE[kind])
    if len(blob) > 1_000_000:
        pytest.skip("no sparse files here")
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        assert {i.name: tar.extractfile(i).read() for i in tar.getmembers()} == HOLES  # type: ignore[union-attr]
        assert sum(i.issparse() for i in tar.getmembers()) == 3
    index = index_bytes(blob)
    assert (index.error, listed(index)) == (None, [("a", ["a.bin", "a.jpg", "a.txt"]), ("b", ["b.json"])])
    members = [m for s in index.samples for m in s.members]
    assert [m.pieces is None for m in members] == [False, False, False, True]
    for m in members:
        assert m.nbytes == len(HOLES[m.name])
        assert m.expand(blob[m.offset : m.offset + m.stored]) == HOLES[m.name]
    assert read_text(io.BytesIO(blob), members[2]) == HOLES["a.txt"].decode()
    assert index.samples[0].end == index.samples[1].offset
    assert format_idx(index.samples) is None
    assert format_idx(index.samples[1:]) is not None


def sparse(name: str, size: int, pieces: str, data: bytes = b"") -> tuple[tarfile.TarInfo, bytes]:
    """Return a sparse member as pax 0.1 puts it."""
    return entry(name, data, pax_headers={"GNU.sparse.size": str(size), "GNU.sparse.map": pieces})


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (sparse("a.jpg", 1 << 60, "0,3", b"abc"), "a.jpg is a sparse member of 1,152,921,504,606,846,976 bytes"),
        (sparse("a.jpg", 100, "0,3,2,3", b"abcdef"), "map is damaged"),
        (sparse("a.jpg", 100, "98,3", b"abc"), "map is damaged"),
        (sparse("a.jpg", 100, "50,-3", b"abc"), "map is damaged"),
        (sparse("a.jpg", 10_000, "0,3,100,8000", b"abc"), "map is damaged"),
    ],
    ids=["enormous", "overlap", "behind the end", "negative", "more than there is"],
)
def test_sparse_members_that_cannot_be(member: Any, reason: str) -> None:
    index = index_bytes(pack([member, ("a.txt", b"caption"), sparse("b.jpg", 5, "1,3", b"abc")]))
    assert (index.error, listed(index)) == (None, [("a", ["a.txt"]), ("b", ["b.jpg"])])
    assert index.samples[0].image() is None
    assert reason in index.samples[0].why_no_image()
    assert index.samples[1].members[0].expand(b"abc") == b"\0abc\0"


def hard(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def symbolic(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


@pytest.mark.parametrize("format_", FORMATS)
def test_links_are_no_members(format_: str) -> None:
    a_link = hard("a.jpg", "b.jpg")
    entries = [
        *[a_link, ("a.txt", b"words")],
        *[("b.jpg", b"1"), symbolic("b.TXT", "../caf\udce9.txt"), symbolic("b.jpg", "x"), ("b.json", b"{}")],
        *[symbolic("only.JPG", "elsewhere/" + "x" * 200), hard("c.cls", "b.json")],
        entry("folder.v1", type=tarfile.DIRTYPE),
    ]
    if format_ == "ustar":
        entries[6] = symbolic("only.JPG", "elsewhere/")
    index = index_bytes(pack(entries, format_))
    assert index.error is None
    assert listed(index) == [("a", ["a.txt"]), ("b", ["b.jpg", "b.json"]), ("only", []), ("c", [])]
    a, b, only, c = index.samples
    assert (a.offset, a.end, b.offset, only.end) == (0, b.offset, a.end, c.offset)
    reason = "a.jpg is a hard link to b.jpg: links are not followed; pack the shard with --hard-dereference"
    assert (a.image(), a.why_no_image()) == (None, reason)
    assert b.image() == b.members[0]
    assert [x.ext for x in b.left_out] == ["txt", "jpg"]
    assert b.left_out[0].reason.startswith("b.TXT is a symbolic link to ../caf\\xe9.txt: links are not followed;")
    assert only.why_no_image().endswith("pack the shard with --dereference")
    assert c.why_no_image().startswith("no member with an image extension (found: c.cls is a hard link to b.json: ")


_part = st.text(st.characters(exclude_characters="\0/.", exclude_categories=["Cs"]), min_size=1, max_size=80)
_key = st.lists(_part, min_size=1, max_size=4).map("/".join).filter(lambda k: not re.match(r"__[^/]*__/", k))
_sample = st.dictionaries(st.sampled_from(["jpg", "PNG", "txt", "json", "seg.png", "webp"]), st.binary(max_size=1100))


@settings(max_examples=100, deadline=None)
@given(
    samples=st.dictionaries(_key, _sample.filter(bool), max_size=8),
    format_=st.sampled_from(["gnu", "pax", "webdataset"]),
    shuffled=st.none() | st.randoms(use_true_random=False),
)
def test_what_was_packed_is_what_is_indexed(
    samples: dict[str, dict[str, bytes]], format_: str, shuffled: random.Random | None
) -> None:
    members = [(f"{key}.{ext}", data) for key, sample in samples.items() for ext, data in sample.items()]
    if shuffled is not None:
        shuffled.shuffle(members)
    blob = pack(members, format_)
    index = index_bytes(blob)
    assert (index.error, index.broken) == (None, None)
    found = {s.key: {m.ext: blob[m.offset : m.offset + m.nbytes] for m in s.members} for s in index.samples}
    assert found == {key: {ext.lower(): data for ext, data in s.items()} for key, s in samples.items()}
    starts = [s.offset for s in index.samples]
    assert starts == sorted(starts)
    if shuffled is None:
        assert list(found) == list(samples)
        assert [s.end for s in index.samples][:-1] == starts[1:]


# --- damage ---------------------------------------------------------------------------------------

SIZES = {"jpg": 700, "txt": 20, "bin": 512}
THREE = [(f"{key}.{ext}", picture(ord(key), size)) for key in "abc" for ext, size in SIZES.items()]


@pytest.mark.parametrize("end_blocks", [True, False])
def test_empty_tar(end_blocks: bool) -> None:
    index = index_bytes(pack([])[: END if end_blocks else 512])
    assert (index.samples, index.error) == ([], None)


def test_tar_without_end_mark() -> None:
    """It may have been cut between two members: they are whole, but nothing tells that more should not follow."""
    blob = pack(THREE)
    index = index_bytes(blob[:-END])
    assert ([s.key for s in index.samples], index.broken) == (["a", "b", "c"], None)
    assert f"no end mark: it may have been cut at byte {len(blob) - END:,}" in (index.error or "")
    assert index_bytes(blob[: 1 - END]).error is None  # no header begins with a zero
    extent = index_tar(io.BytesIO(blob[:-END]), extent=True)
    assert (extent.samples, extent.error) == (index.samples, None)


@pytest.mark.parametrize("long_names", [False, True])
@pytest.mark.parametrize("format_", ["gnu", "pax", "webdataset"])
def test_truncated_anywhere(format_: str, long_names: bool) -> None:
    members = [(("n" * 120 + name) if long_names else name, data) for name, data in THREE]
    blob = pack(members, format_)
    places = layout(blob)
    for cut in sorted({*range(0, len(blob), 100), *(b + d for b in range(0, len(blob), 512) for d in (-1, 0, 1))}):
        if not 0 < cut <= len(blob):
            continue
        index = index_bytes(blob[:cut])
        whole: dict[str, list[str]] = {}
        torn = header = None
        for name, start, data, _, end in places:
            if end <= cut:
                whole.setdefault(name.partition(".")[0], []).append(name)
            elif data <= cut and start < cut:
                torn = name
            elif start < cut:
                header = name
        if torn is not None:
            # A sample of which a member's bytes or padding are cut off is none.
            key = torn.partition(".")[0]
            whole.pop(key, None)
            assert index.error is not None, cut
            assert index.broken is not None, cut
            assert index.broken.key == key, cut
            assert f"ends at byte {cut:,}, inside {torn!r}" in index.error, cut
        elif header is not None:
            assert index.broken is None, cut
            assert index.error is not None, cut
            assert "damaged at byte" in index.error or "not a tar" in index.error, (cut, index.error)
        else:
            assert index.broken is None, cut
            if cut > places[-1][4]:
                assert index.error is None, cut
            else:
                assert index.error is not None, cut
                assert f"no end mark: it may have been cut at byte {cut:,}" in index.error, cut
        assert listed(index) == list(whole.items()), cut


@pytest.mark.parametrize("damage", ["garbage", "one bit", "zeros"])
def test_damaged_header_in_the_middle(damage: str) -> None:
    blob = bytearray(pack(THREE))
    start = next(header for name, header, *_ in layout(bytes(blob)) if name == "b.txt")
    if damage == "garbage":
        blob[start : start + 512] = picture(1, 512)
    elif damage == "zeros":
        blob[start : start + 512] = bytes(512)
    else:
        blob[start + 3] ^= 4
    index = index_bytes(bytes(blob))
    assert listed(index) == [("a", ["a.jpg", "a.txt", "a.bin"]), ("b", ["b.jpg"])]
    assert index.error is not None
    assert f"at byte {start:,}" in index.error


def test_joined_tars_are_reported() -> None:
    first, second = pack(THREE[:3]), pack(THREE[3:])
    index = index_bytes(first + bytes(9 * 512) + second)
    assert [s.key for s in index.samples] == ["a"]
    assert index.error is not None
    assert f"ends at byte {len(first) - END:,}, but more follows at byte {len(first) + 9 * 512:,}" in index.error


@pytest.mark.parametrize("zeros", [0, 512, 10_240, 3 << 20])
def test_any_number_of_zeros_may_end_a_tar(zeros: int) -> None:
    index = index_bytes(pack(THREE) + bytes(zeros))
    assert (len(index.samples), index.error) == (3, None)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"


def parquet_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": ["a"]}), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tar that can be read: empty file"),
        (bytes(100), "not a tar that can be read"),
        (
            b"<html>404 Not Found</html>" * 40,
            "not a tar that can be read: a web page, such as a server's error or login",
        ),
        (b"\n<!DOCTYPE HTML><title>Log in</title>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document, such as a store's error"),
        (b'{"error": "no access"}', "a JSON document"),
        (LFS, "a Git LFS pointer, .* git lfs pull"),
        (parquet_bytes(), "a Parquet file: shards are tars"),
        (b"PK\x03\x04" + bytes(600), "a ZIP archive: unpack it"),
        (gzip.compress(pack(THREE)), r"not a tar that can be read: compressed with gzip: unpack it first \(gunzip\)"),
        (bz2.compress(pack(THREE)), r"compressed with bzip2: unpack it first \(bunzip2\)"),
        (lzma.compress(pack(THREE)), r"compressed with xz: unpack it first \(unxz\)"),
        (pa.compress(pack(THREE), "zstd", asbytes=True), r"compressed with zstd: unpack it first \(unzstd\)"),
    ],
)
def test_not_a_tar(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    index = index_shard(str(path))
    assert index.samples == []
    assert re.search(message, index.error or "")


@pytest.mark.parametrize(
    "name", ["PAR1.jpg", "PK\x03\x04.jpg", "<html>.jpg", "BZh.jpg", '{"a.jpg', "version https://git-lfs"]
)
@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_tars_whose_first_name_looks_like_something_else(name: str, format_: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as tar:
        tar.addfile(tarfile.TarInfo(name))
    assert what_is(buffer.getvalue()[:512]) is None


def test_shards_that_are_no_tars(tmp_path: Path, memory: Any) -> None:
    good, missing = tmp_path / "good.tar", str(tmp_path / "missing.tar")
    good.write_bytes(pack(THREE))
    wrong = [tmp_path / "0.parquet", tmp_path / "1.tar"]
    wrong[0].write_bytes(parquet_bytes())
    wrong[1].write_bytes(LFS)
    (tmp_path / "damaged.tar").write_bytes(bytes(range(256)) * 4)
    for urls in (
        [str(good)],
        [str(wrong[0]), str(good)],
        [missing],
        [missing, str(good)],
        [str(tmp_path / "damaged.tar")],
    ):
        check_shards(urls)
    with pytest.raises(ValueError, match=rf"^{wrong[0]} is not a tar; it is a Parquet file: "):
        check_shards([str(wrong[0])])
    with pytest.raises(
        ValueError, match=rf"^{wrong[1]} is not a tar \(nor is any of 1 others\); it is a Git LFS pointer"
    ):
        check_shards([missing, str(wrong[1]), str(wrong[0])])
    memory.pipe("/shards-test/a.tar", gzip.compress(pack(THREE)))
    with pytest.raises(
        ValueError, match=r"^memory://shards-test/a.tar is not a tar; it is compressed with gzip: unpack it"
    ):
        check_shards(["memory://shards-test/a.tar"])


def test_missing_and_unreadable(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.tar")
    assert index_shard(missing) == ShardIndex([], f"no such file: {missing}")
    folder = index_shard(str(tmp_path))
    assert folder.samples == []
    assert str(tmp_path) in (folder.error or "")


def _header(name: bytes, size: bytes, type_: bytes = b"0") -> bytes:
    """Return a header with a right checksum and whatever is wanted in it."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size
    block[156:157] = type_
    block[257:265] = b"ustar\00000"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def _pax(*records: bytes) -> bytes:
    data = b"".join(records)
    return _header(b"pax", b"%011o\0" % len(data), b"x") + data.ljust(512, b"\0")


HOSTILE = {
    "negative size": _header(b"bad.jpg", b"\xff" * 11 + b"\x00"),  # -256, in base 256
    "back over the members before": _header(b"bad.jpg", b"\xff" * 10 + b"\xf8\x00"),
    "2**88 bytes": _header(b"bad.jpg", b"\x80" + b"\x7f" * 11),
    "8 GB": _header(b"bad.jpg", b"77777777777\0"),
    "2**88 bytes of an unknown type": _header(b"bad.jpg", b"\x80" + b"\x7f" * 11, b"Z"),
    "name of 8 GB": _header(b"././@LongLink", b"77777777777\0", b"L"),
    "negative size by pax": _pax(b"17 size=-9999999\n") + _header(b"bad.jpg", b"00000000000\0"),
    "no sparse map": _pax(b"22 GNU.sparse.major=1\n", b"22 GNU.sparse.minor=0\n"),
    "name of a name of a name": (_header(b"././@LongLink", b"00000000004\0", b"L") + b"abc".ljust(512, b"\0")) * 3000,
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("first", [True, False])
def test_hostile_headers(kind: str, first: bool) -> None:
    before = b"" if first else pack(THREE)[:-END]
    index = index_bytes(before + HOSTILE[kind] + pack([("z.jpg", b"z")]))
    assert [s.key for s in index.samples] == ([] if first else ["a", "b", "c"])
    assert index.error is not None
    if not first:
        assert f"damaged at byte {len(before):,}" in index.error or "bad.jpg" in index.error


def seen_by_tarfile(blob: bytes) -> list[tuple[str, int, int]]:
    """Name, offset and length of each file, so far as tarfile comes."""
    seen, position = [], -1
    with contextlib.suppress(Exception), tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        for info in tar:
            if info.size < 0 or tar.offset <= position:
                break
            position = tar.offset
            if info.isreg() and not info.issparse():
                seen.append((info.name, info.offset_data, info.size))
    return seen


_where = st.integers(0, 511) | st.sampled_from([*range(124, 136), 156, 257, 345])
_changes = st.lists(st.tuples(st.integers(0, 2), _where, st.integers(0, 255)), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=_changes,
    right=st.sampled_from([True, True, True, False]),
    format_=st.sampled_from(["gnu", "webdataset"]),
)
def test_any_header_is_read_as_tarfile_reads_it(changes: list[tuple[int, int, int]], right: bool, format_: str) -> None:
    """Ordinary headers are read without tarfile; none may bring the index down."""
    blob = bytearray(pack(THREE, format_))
    _, start, data, *_ = next(place for place in layout(bytes(blob)) if place[0] == "b.txt")
    headers = range(start, data, 512)
    for block, at, value in changes:
        blob[headers[block % len(headers)] + at] = value
    for header in (headers[0], headers[-1]) if right else ():
        blob[header + 148 : header + 156] = b" " * 8
        blob[header + 148 : header + 156] = b"%06o\0 " % sum(blob[header : header + 512])
    index = index_bytes(bytes(blob))
    assert listed(index)[0] == ("a", ["a.jpg", "a.txt", "a.bin"])
    found = sorted((m.offset, m.name, m.nbytes) for s in index.samples for m in s.members if m.pieces is None)
    theirs = [(o, n, size) for n, o, size in seen_by_tarfile(bytes(blob)) if split_name(n)]
    if index.broken is None:
        assert found == theirs
    else:
        assert set(found) < set(theirs)
    for sample in index.samples:
        assert 0 <= sample.offset < sample.end <= len(blob)
        for member in sample.members:
            assert sample.offset + 512 <= member.offset
            assert member.offset + member.stored <= sample.end


# --- wds2idx --------------------------------------------------------------------------------------


def wds2idx(tar: Path) -> Path:
    """Index a tar by DALI's own command."""
    command = Path(sys.executable).with_name("wds2idx")
    if not command.exists():
        pytest.skip("DALI's wds2idx is not installed")
    idx = tar.with_suffix(".idx")
    # Else GNU tar writes names that are not ASCII with escapes.
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    subprocess.run([sys.executable, str(command), str(tar), str(idx)], check=True, capture_output=True, env=env)
    return idx


SIMPLE = [*THREE, ("c.seg.png", picture(1, 5)), ("d/v1.5/e.JPG", b"e"), ("d/v1.5/e.txt", b""), ("żółć.jpg", b"cat")]


@pytest.fixture
def simple(tmp_path: Path) -> Path:
    path = tmp_path / "simple.tar"
    path.write_bytes(pack(SIMPLE, "gnu"))
    return path


def test_format_idx_is_what_wds2idx_writes(simple: Path) -> None:
    theirs = wds2idx(simple).read_text(encoding="utf-8")
    assert format_idx(index_shard(str(simple)).samples) == theirs


@pytest.mark.parametrize("name", ["a b.jpg", "a\tb.jpg", "a\u00a0b.jpg", "a\udce9.jpg", "a."])
def test_format_idx_cannot_express_some_names(name: str) -> None:
    index = index_bytes(pack([("z.jpg", b"1"), (name, b"2")]))
    assert len(index.samples) == 2
    assert format_idx(index.samples) is None


# --- reading --------------------------------------------------------------------------------------


def test_read_extents(simple: Path) -> None:
    blob = simple.read_bytes()
    wanted = [(0, 5), (512, 700), (len(blob) - 3, 10), (len(blob) + 100, 5), (1, 1)]
    got = list(read_extents(str(simple), wanted))
    assert got == [blob[:5], THREE[0][1], blob[-3:], b"", blob[1:2]]
    with pytest.raises(FileNotFoundError):
        list(read_extents(str(simple) + "x", wanted))


def test_index_on_another_file_system(memory: Any, simple: Path) -> None:
    memory.pipe("/shards-test/simple.tar", simple.read_bytes())
    url = "memory://shards-test/simple.tar"
    right = index_shard(str(simple))
    assert index_shard(url) == right
    assert index_shard("memory://shards-test/no.tar").error == "no such file: memory://shards-test/no.tar"
    assert list(read_extents(url, [(512, 700)])) == [THREE[0][1]]


def test_fingerprint_changes_with_size_and_time(simple: Path) -> None:
    first = fingerprint(str(simple))
    assert fingerprint(f"file://{simple}") == first
    os.utime(simple, ns=(1, 1))
    second = fingerprint(str(simple))
    with simple.open("ab") as file:
        file.write(b"x")
    os.utime(simple, ns=(1, 1))
    third = fingerprint(str(simple))
    assert len({first, second, third}) == 3
    assert fingerprint(str(simple) + "x") == "unreadable"


def test_fingerprint_on_another_file_system(memory: Any) -> None:
    seen = set()
    for content in (b"one", b"two", b"three"):
        memory.pipe("/shards-test/a.tar", content)
        seen.add(fingerprint("memory://shards-test/a.tar"))
    assert len(seen) == 3
    assert fingerprint("memory://shards-test/a.tar") in seen
    assert fingerprint("memory://shards-test/b.tar") == "unreadable"


def test_compressed_tars_beside_the_shards(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tgz", "c.tar.gz", "d.TAR.ZST", "e.txt", "tgz"):
        (tmp_path / name).touch()
    found = packed_beside([str(tmp_path / "a.tar"), f"file://{tmp_path}/a.tar", "s3://bucket/a.tar", "/nowhere/a.tar"])
    assert [Path(f).name for f in found] == ["b.tgz", "c.tar.gz", "d.TAR.ZST"]
