"""Shards: URLs, the index of a tar (against tarfile, webdataset and DALI's wds2idx), damage."""

from __future__ import annotations

import contextlib
import gc
import gzip
import io
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
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_imgcurator import shards

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


def listed(index: shards.ShardIndex) -> list[tuple[str, list[str]]]:
    return [(s.key, [m.name for m in s.members]) for s in index.samples]


def index_bytes(blob: bytes) -> shards.ShardIndex:
    return shards.index_tar(io.BytesIO(blob))


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
    assert shards.expand(str(folder / "00001.tar")) == here(folder, 1)
    assert shards.expand(folder / "00001.tar") == here(folder, 1)
    assert shards.expand([folder / "00002.tar", str(folder / "00000.tar")]) == here(folder, 2, 0)
    assert shards.expand(f"file://{folder}/00001.tar") == here(folder, 1)


def test_expand_globs_and_folders_are_sorted(folder: Path) -> None:
    assert shards.expand(f"{folder}/*.tar") == here(folder, 0, 1, 2)
    assert shards.expand(f"file://{folder}/0000[12].tar") == here(folder, 1, 2)
    assert shards.expand(folder) == here(folder, 0, 1, 2)
    assert shards.expand(f"{folder}/") == here(folder, 0, 1, 2)
    (folder / "sub/sub").mkdir(parents=True)
    (folder / "sub/sub/00001.tar").touch()
    assert shards.expand(f"{folder}/**/00001.tar") == here(folder, 1) + [str(folder / "sub/sub/00001.tar")]


def test_expand_braces_keep_their_order(folder: Path) -> None:
    assert shards.expand(f"{folder}/{{00000..00002}}.tar") == here(folder, 0, 1, 2)
    assert shards.expand(f"{folder}/0000{{2,0}}.tar") == here(folder, 2, 0)
    assert shards.expand(f"{folder}/{{00002,0000[01]}}.tar") == here(folder, 2, 0, 1)
    assert shards.expand("s3://bucket/{a,b}/{0..1}.tar") == [f"s3://bucket/{x}/{i}.tar" for x in "ab" for i in "01"]


def test_expand_takes_a_shard_once(folder: Path) -> None:
    twice = [folder / "00001.tar", folder, f"file://{folder}/00000.tar", f"{folder}/../{folder.name}/00002.tar"]
    assert shards.expand(twice) == here(folder, 1, 0, 2)


def test_expand_relative_paths_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert shards.expand("00001.tar") == here(folder, 1)
    assert shards.expand("*.tar") == here(folder, 0, 1, 2)
    assert shards.expand(".") == here(folder, 0, 1, 2)


@pytest.mark.parametrize("name", ["a[1].tar", "a{1,2}.tar", "what?.tar", "*.tar", "un{balanced.tar"])
def test_expand_an_existing_name_is_not_a_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "a1.tar").touch()
    assert shards.expand(tmp_path / name) == [str(tmp_path / name)]
    assert shards.expand(f"file://{tmp_path / name}") == [str(tmp_path / name)]


def test_expand_folder_with_braces_in_its_name(tmp_path: Path) -> None:
    odd = tmp_path / "set{1}[x]"
    odd.mkdir()
    (odd / "0.tar").touch()
    assert shards.expand(odd) == [str(odd / "0.tar")]


def test_expand_leaves_hidden_files_of_a_folder_alone(folder: Path) -> None:
    (folder / ".partial-1234-00003.tar").touch()
    (folder / "._00001.tar").touch()
    assert shards.expand(folder) == shards.expand(f"{folder}/*.tar") == here(folder, 0, 1, 2)


def test_expand_one_missing_is_no_error_but_all_are(folder: Path) -> None:
    assert shards.expand(f"{folder}/{{00001..00004}}.tar") == here(folder, 1, 2, 3, 4)
    with pytest.raises(FileNotFoundError, match=rf"{folder}/00007\.tar \(nor any of 2 others\)"):
        shards.expand(f"{folder}/{{00007..00009}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*missing\.tar$"):
        shards.expand(folder / "missing.tar")


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
        shards.expand(f"{folder}/{pattern}")


def test_expand_nothing_given(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="name at least one"):
        shards.expand([])
    with pytest.raises(FileNotFoundError, match=rf"no \*\.tar in the folder {tmp_path}"):
        shards.expand(tmp_path)


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/shards-test", recursive=True)


def test_expand_on_another_file_system(memory: Any) -> None:
    for name in ("b.tar", "a.tar", "c.txt"):
        memory.pipe(f"/shards-test/{name}", b"x")
    expected = ["memory:///shards-test/a.tar", "memory:///shards-test/b.tar"]
    assert shards.expand("memory://shards-test/*.tar") == expected
    assert shards.expand("memory://shards-test/") == expected
    assert shards.expand(["memory://shards-test/c.txt", "memory://shards-test/?.tar"])[1:] == expected
    with pytest.raises(FileNotFoundError, match=r"memory://shards-test/\*\.zip"):
        shards.expand("memory://shards-test/*.zip")


def test_expand_signed_address_is_not_a_glob() -> None:
    url = "https://host.invalid/00000.tar?signature=a*b[c]"
    assert shards.expand(url) == [url]


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
    assert shards.split_name(name) == expected


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
    index = shards.index_shard(str(path))
    assert (index.error, index.broken, index.source) == (None, None, "tar")
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
        for s in shards.index_shard(str(path)).samples
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
    assert shards.index_shard(str(path)).error is None
    found = [(m.name, m.offset, m.nbytes) for s in shards.index_shard(str(path)).samples for m in s.members]
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


def test_sparse_member_is_no_image(tmp_path: Path) -> None:
    """Its bytes do not lie in one piece; GNU tar makes such members with --sparse."""
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(b"x" * 4096)
        file.truncate(10_000_000)
    (tmp_path / "a.txt").write_text("caption")
    run = ["tar", "--create", "--sparse", "--format=gnu", "--file=s.tar", "a.jpg", "a.txt"]
    try:
        subprocess.run(run, cwd=tmp_path, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no GNU tar")
    if (tmp_path / "s.tar").stat().st_size > 1_000_000:
        pytest.skip("no sparse files here")
    index = shards.index_shard(str(tmp_path / "s.tar"))
    assert (index.error, listed(index)) == (None, [("a", ["a.txt"])])


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


def test_tar_without_end_blocks() -> None:
    index = index_bytes(pack(THREE)[:-END])
    assert ([s.key for s in index.samples], index.error) == (["a", "b", "c"], None)


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
            # Between two members nothing tells that more should follow.
            assert (index.error, index.broken) == (None, None), cut
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tar that can be read: empty file"),
        (bytes(100), "not a tar that can be read"),
        (b"<html>404 Not Found</html>" * 40, "not a tar that can be read"),
        (gzip.compress(pack(THREE)), r"not a tar.*compressed with gzip: unpack it first"),
    ],
)
def test_not_a_tar(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    index = shards.index_shard(str(path))
    assert index.samples == []
    assert re.search(message, index.error or "")


def test_missing_and_unreadable(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.tar")
    assert shards.index_shard(missing) == shards.ShardIndex([], f"no such file: {missing}")
    folder = shards.index_shard(str(tmp_path))
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
    found = sorted((m.offset, m.name, m.nbytes) for s in index.samples for m in s.members)
    theirs = [(o, n, size) for n, o, size in seen_by_tarfile(bytes(blob)) if shards.split_name(n)]
    if index.broken is None:
        assert found == theirs
    else:
        assert set(found) < set(theirs)
    for sample in index.samples:
        assert 0 <= sample.offset < sample.end <= len(blob)
        for member in sample.members:
            assert sample.offset + 512 <= member.offset
            assert member.offset + member.nbytes <= sample.end


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


def test_wds2idx_is_used_and_agrees(simple: Path) -> None:
    assert shards.index_shard(str(simple)).source == "tar"
    wds2idx(simple)
    index = shards.index_shard(str(simple))
    assert index.source == "idx"
    without = shards.index_shard(str(simple), use_idx=False)
    assert without.source == "tar"
    assert index.samples == without.samples
    assert len(index.samples) == 5


def test_format_idx_is_what_wds2idx_writes(simple: Path) -> None:
    theirs = wds2idx(simple).read_text(encoding="utf-8")
    assert shards.format_idx(shards.index_shard(str(simple), use_idx=False).samples) == theirs


@pytest.mark.parametrize("format_", FORMATS)
def test_wds2idx_of_any_tar(tmp_path: Path, format_: str) -> None:
    """Used or not, an index file does not change the result."""
    path = tmp_path / "a.tar"
    members = [m for m in names_for(format_) if " " not in m[0]]
    path.write_bytes(pack([entry("d", type=tarfile.DIRTYPE), *members, ("README", b"x")], format_))
    wds2idx(path)
    assert shards.index_shard(str(path)).samples == shards.index_shard(str(path), use_idx=False).samples


@pytest.mark.parametrize("name", ["a b.jpg", "a\tb.jpg", "a\u00a0b.jpg", "a\udce9.jpg", "a."])
def test_format_idx_cannot_express_some_names(name: str) -> None:
    index = index_bytes(pack([("z.jpg", b"1"), (name, b"2")]))
    assert len(index.samples) == 2
    assert shards.format_idx(index.samples) is None


def _shift(text: str, by: int) -> str:
    """Move all offsets."""
    head, *lines = text.splitlines()
    moved = []
    for line in lines:
        parts = line.split()
        parts[1::4] = [str(int(offset) + by) for offset in parts[1::4]]
        moved.append(" ".join(parts))
    return "\n".join([head, *moved]) + "\n"


DAMAGED_IDX = {
    "empty": lambda text: "",
    "other version": lambda text: text.replace("v1.2", "v1.1"),
    "cut in a line": lambda text: text[: len(text) * 2 // 3],
    "a line short": lambda text: "".join(text.splitlines(keepends=True)[:-1]),
    "a line short, counted": lambda text: "".join(text.splitlines(keepends=True)[:-1]).replace("v1.2 5", "v1.2 4"),
    "a member short": lambda text: re.sub(r" bin \d+ 512 c\.bin", "", text),
    "shifted by a block": lambda text: _shift(text, 512),
    "shifted by a byte": lambda text: _shift(text, 1),
    "negative": lambda text: _shift(text, -4096),
    "no number": lambda text: text.replace("jpg 512 ", "jpg ²12 "),
    "long number": lambda text: text.replace("jpg 512 ", f"jpg {'9' * 5000} "),
    "wrong length": lambda text: text.replace(" 700 a.jpg", " 701 a.jpg"),
    "negative length": lambda text: text.replace(" 700 a.jpg", " -700 a.jpg"),
    "wrong name": lambda text: text.replace("b.txt", "z.txt"),
    "wrong extension": lambda text: text.replace("txt", "xxx", 1),
    "binary": lambda text: text + "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGED_IDX)
def test_damaged_idx_is_left_aside(simple: Path, damage: str) -> None:
    right = shards.index_shard(str(simple))
    text = shards.format_idx(right.samples)
    assert text is not None
    simple.with_suffix(".idx").write_bytes(text.encode())
    assert shards.index_shard(str(simple)).source == "idx"
    changed = DAMAGED_IDX[damage](text)
    assert changed != text
    simple.with_suffix(".idx").write_bytes(changed.encode(errors="surrogateescape"))
    assert shards.index_shard(str(simple)) == right


@pytest.mark.parametrize(
    "entries",
    [
        [(name.replace("b", "q"), data) for name, data in SIMPLE],
        [(name, data + b"x" * (name == "b.txt")) for name, data in SIMPLE],
        [*SIMPLE[3:], *SIMPLE[:3]],
        SIMPLE[:-1],
        [*SIMPLE, ("f.jpg", b"new")],
        [*SIMPLE, entry("a_directory", type=tarfile.DIRTYPE)],
        [entry(n, d, type=tarfile.SYMTYPE, size=0, linkname="x") if n == "d/v1.5/e.txt" else (n, d) for n, d in SIMPLE],
    ],
    ids=["renamed", "one byte more", "reordered", "one fewer", "one more", "directory at the end", "link for a file"],
)
def test_stale_idx_is_left_aside(simple: Path, entries: list[Any]) -> None:
    text = shards.format_idx(shards.index_shard(str(simple)).samples)
    assert text is not None
    simple.with_suffix(".idx").write_text(text, encoding="utf-8")
    simple.write_bytes(pack(entries, "gnu"))
    index = shards.index_shard(str(simple))
    assert index == shards.index_shard(str(simple), use_idx=False)
    assert (index.source, index.error) == ("tar", None)


@pytest.mark.parametrize("at", ["in data", "in padding", "header", "checksum", "behind the end"])
def test_idx_does_not_hide_damage_of_the_tar(simple: Path, at: str) -> None:
    text = shards.format_idx(shards.index_shard(str(simple)).samples)
    assert text is not None
    simple.with_suffix(".idx").write_text(text, encoding="utf-8")
    blob = simple.read_bytes()
    _, header, data, _, end = next(place for place in layout(blob) if place[0] == "c.jpg")
    simple.write_bytes(
        {
            "in data": blob[: data + 10],
            "in padding": blob[: end - 1],
            "header": blob[:header] + bytes(512) + blob[data:],
            "checksum": blob[: header + 110] + b"7" + blob[header + 111 :],
            "behind the end": blob + b"more",
        }[at]
    )
    index = shards.index_shard(str(simple))
    assert index.error is not None
    assert index == shards.index_shard(str(simple), use_idx=False)


# --- reading --------------------------------------------------------------------------------------


def test_read_extents(simple: Path) -> None:
    blob = simple.read_bytes()
    wanted = [(0, 5), (512, 700), (len(blob) - 3, 10), (len(blob) + 100, 5), (1, 1)]
    got = list(shards.read_extents(str(simple), wanted))
    assert got == [blob[:5], THREE[0][1], blob[-3:], b"", blob[1:2]]
    with pytest.raises(FileNotFoundError):
        list(shards.read_extents(str(simple) + "x", wanted))


def test_index_on_another_file_system(memory: Any, simple: Path) -> None:
    memory.pipe("/shards-test/simple.tar", simple.read_bytes())
    url = "memory://shards-test/simple.tar"
    right = shards.index_shard(str(simple))
    assert shards.index_shard(url) == right
    memory.pipe("/shards-test/simple.idx", (shards.format_idx(right.samples) or "").encode())
    assert shards.index_shard(url) == shards.ShardIndex(right.samples, source="idx")
    assert shards.index_shard("memory://shards-test/no.tar").error == "no such file: memory://shards-test/no.tar"
    assert list(shards.read_extents(url, [(512, 700)])) == [THREE[0][1]]


def test_fingerprint_changes_with_size_and_time(simple: Path) -> None:
    first = shards.fingerprint(str(simple))
    assert shards.fingerprint(f"file://{simple}") == first
    os.utime(simple, ns=(1, 1))
    second = shards.fingerprint(str(simple))
    with simple.open("ab") as file:
        file.write(b"x")
    os.utime(simple, ns=(1, 1))
    third = shards.fingerprint(str(simple))
    assert len({first, second, third}) == 3
    assert shards.fingerprint(str(simple) + "x") == "unreadable"


def test_fingerprint_on_another_file_system(memory: Any) -> None:
    seen = set()
    for content in (b"one", b"two", b"three"):
        memory.pipe("/shards-test/a.tar", content)
        seen.add(shards.fingerprint("memory://shards-test/a.tar"))
    assert len(seen) == 3
    assert shards.fingerprint("memory://shards-test/a.tar") in seen
    assert shards.fingerprint("memory://shards-test/b.tar") == "unreadable"
