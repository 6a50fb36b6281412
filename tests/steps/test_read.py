"""Reading: partitions of rows (`index_partition`) and the Dask DataFrame of them (`read_webdataset`)."""

from __future__ import annotations

import gc
import io
import json
import tarfile
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dask
import fsspec
import pandas as pd
import pytest

from dask_imgcurator import read_webdataset
from dask_imgcurator.engine.backend import backend_of
from dask_imgcurator.json_fields import JsonField
from dask_imgcurator.steps.read import ReadSpec, index_partition, peek

OWN = [
    "key",
    "shard",
    "offset",
    "nbytes",
    "sample_offset",
    "sample_nbytes",
    "ext",
    "caption",
    "status",
    "error_message",
]
BACKENDS = ["pandas", pytest.param("cudf", marks=pytest.mark.gpu)]

Sample = Mapping[str, bytes | str | dict[str, Any]]


def write_tar(path: Path, samples: Mapping[str, Sample]) -> str:
    """Write a tar and return its path, as a URL."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for ext, content in members.items():
                if isinstance(content, dict):
                    content = json.dumps(content)
                data = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def rows(frame: Any) -> list[dict[str, Any]]:
    """Rows of a frame of either backend; null is None."""
    return list(backend_of(frame).to_host(frame, list(frame.columns)).to_pylist())


def column(frame: Any, name: str) -> list[Any]:
    return [row[name] for row in rows(frame)]


def read(url: str, **spec: Any) -> list[dict[str, Any]]:
    fields = tuple(JsonField(name, name, type_) for name, type_ in spec.pop("fields", ()))
    return rows(index_partition([url], ReadSpec(fields=fields, **spec)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards of three samples; shard 2 is empty, shard 3 has one sample without an image."""
    for shard in range(5):
        samples = {
            f"{shard}{i}": {
                "jpg": f"picture {shard} {i}" * (i + 1),
                "txt": f"caption {shard} {i}",
                "json": {"uid": f"u{shard}{i}", "rank": shard * 10 + i, "score": shard + i / 8},
            }
            for i in range(3)
        }
        if shard == 2:
            samples = {}
        if shard == 3:
            samples["31"] = {"txt": "words only", "json": {"uid": "u31"}}
        write_tar(tmp_path / f"{shard:05d}.tar", samples)
    return tmp_path


KEYS = ["00", "01", "02", "10", "11", "12", "30", "31", "32", "40", "41", "42"]


# --- one partition --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_says_where_its_image_lies(folder: Path, backend: str) -> None:
    urls = [str(folder / f"{i:05d}.tar") for i in range(5)]
    frame = index_partition(urls, ReadSpec(backend=backend))
    assert list(frame.columns) == OWN
    table = rows(frame)
    assert [row["key"] for row in table] == KEYS
    for row in table:
        with tarfile.open(row["shard"]) as tar:
            names = [n for n in tar.getnames() if n.startswith(row["key"])]
            first, last = tar.getmember(names[0]), tar.getmember(names[-1])
            assert row["sample_offset"] == first.offset
            assert row["sample_offset"] + row["sample_nbytes"] == last.offset_data + -(-last.size // 512) * 512
            caption = tar.extractfile(f"{row['key']}.txt")
            assert caption is not None
            assert row["caption"] == caption.read().decode()
            if row["key"] == "31":
                assert (row["offset"], row["nbytes"], row["ext"], row["status"]) == (0, 0, None, "no_image")
                assert row["error_message"] == "no member with an image extension (found: txt, json)"
            else:
                image = tar.getmember(f"{row['key']}.jpg")
                assert (row["offset"], row["nbytes"]) == (image.offset_data, image.size)
                assert (row["ext"], row["status"], row["error_message"]) == ("jpg", "ok", None)


def test_image_of_a_sample_with_several(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", {"a": {"seg.png": b"mask", "txt": "x", "JPG": b"photo", "png": b"other"}})
    (row,) = read(url)
    assert Path(url).read_bytes()[row["offset"] :][: row["nbytes"]] == b"photo"
    assert row["ext"] == "jpg"


@pytest.mark.parametrize(
    ("image", "found"),
    [
        ((), "photo"),
        ("png", "other"),
        (".SEG.png", "mask"),
        (["webp", "png", "jpg"], "other"),
        (("dat",), "raw"),
        ("jpeg", None),
    ],
)
def test_image_that_is_asked_for(tmp_path: Path, image: Any, found: str | None) -> None:
    members: Sample = {"seg.png": b"mask", "txt": "x", "JPG": b"photo", "png": b"other", "dat": b"raw"}
    url = write_tar(tmp_path / "a.tar", {"a": members})
    (row,) = rows(read_webdataset(url, image=image, backend="pandas").compute(scheduler="synchronous"))
    if found is None:
        message = "no member with the extension jpeg (found: seg.png, txt, jpg, png, dat)"
        assert (row["status"], row["error_message"], row["ext"], row["nbytes"]) == ("no_image", message, None, 0)
    else:
        assert Path(url).read_bytes()[row["offset"] :][: row["nbytes"]] == found.encode()
        assert row["status"] == "ok"


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def test_links_and_sparse_members(tmp_path: Path) -> None:
    """What cannot be an image is told in its row; text is read through its holes."""
    holes = {"GNU.sparse.size": "10", "GNU.sparse.map": "2,3,7,1"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "b.jpg", b"picture")
        add(tar, "b.txt", b"catz", pax_headers=holes)
        add(tar, "a.jpg", type=tarfile.LNKTYPE, linkname="b.jpg")
        add(tar, "c.jpg", b"catz", pax_headers=holes)
        add(tar, "c.json", b'{"n": 1}')
        add(tar, "d.jpg", type=tarfile.SYMTYPE, linkname="../b.jpg")
        add(tar, "d.txt", b"words")
    b, a, c, d = read(str(tmp_path / "a.tar"), fields=(("n", "int64"),))
    assert (b["status"], b["caption"]) == ("ok", "\0\0cat\0\0z\0\0")
    link = "a.jpg is a hard link to b.jpg: links are not followed; pack the shard with --hard-dereference"
    # Nothing of the sample is there to be copied.
    assert (a["key"], a["status"], a["error_message"], a["sample_nbytes"]) == ("a", "no_image", link, 0)
    assert (c["status"], c["n"], c["offset"], c["nbytes"]) == ("read_error", 1, 0, 0)
    assert c["error_message"].startswith("c.jpg is a sparse member")
    assert (d["status"], d["caption"]) == ("no_image", "words")
    assert d["error_message"].endswith("pack the shard with --dereference")
    assert d["sample_nbytes"] == 3 * 512


@pytest.mark.parametrize("kind", ["large", "sparse"])
def test_enormous_text_is_not_read(tmp_path: Path, kind: str) -> None:
    """Nor one that only claims to be so large."""
    path, size = tmp_path / "a.tar", 65 << 20
    with tarfile.open(path, "w") as tar:
        add(tar, "a.jpg", b"picture")
        for ext in ("txt", "json"):
            if kind == "large":
                info = tarfile.TarInfo(f"a.{ext}")
                info.size = size
                tar.addfile(info)
                tar.fileobj.seek(size, io.SEEK_CUR)  # type: ignore[union-attr]
                tar.offset += size  # type: ignore[attr-defined]
            else:
                add(tar, f"a.{ext}", b"{}", pax_headers={"GNU.sparse.size": "1000000000", "GNU.sparse.map": "0,2"})
        add(tar, "b.jpg", b"picture")
    tracemalloc.start()
    table = read(str(path), fields=(("n", "int64"),)) + read(str(path), caption="n")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(r["key"], r["status"], r["caption"]) for r in table] == 2 * [("a", "ok", None), ("b", "ok", None)]
    assert peak < 32 << 20
    with pytest.raises(ValueError, match="the first samples have no JSON field 'n'"):
        types([str(path)], ["n"])


@pytest.mark.parametrize("key", ["../x", "/etc/x", "../../żółć/x", "a b", "folder/v1.5/x"])
def test_odd_names_are_keys(tmp_path: Path, key: str) -> None:
    url = write_tar(tmp_path / "a.tar", {key: {"jpg": b"1"}})
    assert [(r["key"], r["status"]) for r in read(url)] == [(key, "ok")]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """A string column cannot hold them; they stay apart from each other."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in (b"caf\xe9.jpg", b"caf\xea.jpg", b"x.tx\xff"):
            tar.addfile(tarfile.TarInfo(name.decode(errors="surrogateescape")))
    table = read(str(tmp_path / "a.tar"))
    assert [r["key"] for r in table] == ["caf\\xe9", "caf\\xea", "x"]
    assert [r["status"] for r in table] == ["ok", "ok", "no_image"]


def test_caption(tmp_path: Path) -> None:
    document = {"text": "from json", "words": ["a", "b"], "n": 3}
    samples: dict[str, Sample] = {
        "both": {"jpg": b"1", "txt": "from txt", "json": document},
        "empty": {"jpg": b"1", "txt": "", "json": {"text": None}},
        "neither": {"jpg": b"1"},
        "utf8": {"jpg": b"1", "txt": "żółć 猫\n", "json": {"text": "żółć"}},
        "latin1": {"jpg": b"1", "txt": b"caf\xe9", "json": b'{"text": "caf\xe9"}'},
        "marked": {"jpg": b"1", "txt": b"\xef\xbb\xbfcat", "json": b'\xef\xbb\xbf{"text": "cat"}'},
        "upper": {"jpg": b"1", "TXT": "capitals", "JSON": {"text": "CAPITALS"}},
    }
    url = write_tar(tmp_path / "a.tar", samples)
    assert [r["caption"] for r in read(url)] == ["from txt", "", None, "żółć 猫\n", "caf\ufffd", "cat", "capitals"]
    by_field = [r["caption"] for r in read(url, caption="text")]
    assert by_field == ["from json", None, None, "żółć", "caf\ufffd", "cat", "CAPITALS"]
    assert [r["caption"] for r in read(url, caption="words")][:2] == ["a", None]
    assert read(url, caption="n")[0]["caption"] == "3"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_texts_in_the_encoding_of_their_mark(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if encoding.endswith("be") else ""
    text, document = "żółć 猫 𝄞\n", json.dumps({"text": "猫"}, ensure_ascii=False)
    cut = (mark + "ab").encode(encoding)[:-1]  # in the middle of the b
    samples: dict[str, Sample] = {
        "a": {"jpg": b"1", "txt": (mark + text).encode(encoding), "json": (mark + document).encode(encoding)},
        "b": {"jpg": b"1", "txt": cut},
    }
    url = write_tar(tmp_path / "a.tar", samples)
    assert [r["caption"] for r in read(url)] == [text, "a" if encoding == "utf-8-sig" else "a\ufffd"]
    assert read(url, caption="text")[0]["caption"] == "猫"


VALUES = {
    "whole": 3,
    "fraction": 2.5,
    "true": True,
    "text": "żółć",
    "list": [1, "ż"],
    "object": {"a": {"b": None}},
    "null": None,
    "large": 2**63,
    "enormous": 10**400,
    "integral": 4.0,
}


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("int64", {"whole": 3}),
        ("float64", {"whole": 3.0, "fraction": 2.5, "large": 2.0**63, "integral": 4.0}),
        ("bool", {"true": True}),
        (
            "string",
            {
                "whole": "3",
                "fraction": "2.5",
                "true": "true",
                "text": "żółć",
                "list": '[1, "ż"]',
                "object": '{"a": {"b": null}}',
                "large": "9223372036854775808",
                "enormous": "1" + "0" * 400,
                "integral": "4.0",
            },
        ),
    ],
)
def test_values_of_another_kind_are_null(tmp_path: Path, type_: str, expected: dict[str, Any]) -> None:
    url = write_tar(tmp_path / "a.tar", {"a": {"jpg": b"1", "json": VALUES}})
    (row,) = read(url, fields=tuple((name, type_) for name in VALUES))
    assert {name: row[name] for name in VALUES} == {**dict.fromkeys(VALUES), **expected}


@pytest.mark.parametrize(
    "document",
    [b"", b"{", b"[1, 2]", b'"text"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"9" * 5000],
    ids=["empty", "cut", "list", "string", "null", "binary", "deep list", "deep object", "NaN", "long number"],
)
def test_json_that_is_no_object_costs_its_fields_only(tmp_path: Path, document: bytes) -> None:
    url = write_tar(tmp_path / "a.tar", {"a": {"jpg": b"1", "json": document}, "b": {"jpg": b"1", "json": {"a": "x"}}})
    table = read(url, fields=(("a", "string"),), caption="a")
    assert [(r["a"], r["caption"], r["status"]) for r in table] == [(None, None, "ok"), ("x", "x", "ok")]


def test_half_a_surrogate_pair_in_json(tmp_path: Path) -> None:
    document = r'{"a": "x\ud83d", "b": ["\udc00"], "c": "\ud83d\ude00"}'
    url = write_tar(tmp_path / "a.tar", {"a": {"jpg": b"1", "json": document}})
    (row,) = read(url, fields=tuple((name, "string") for name in "abc"))
    assert (row["a"], row["b"], row["c"]) == ("x\ufffd", '["\ufffd"]', "😀")


def test_deep_json_as_text(tmp_path: Path) -> None:
    """Near the depth at which Python gives up, reading or writing it may fail, but not end the run."""
    for depth in (100, 400, 700, 900, 950, 990):
        document = '{"a": ' + "[" * depth + "]" * depth + "}"
        url = write_tar(tmp_path / "a.tar", {"a": {"jpg": b"1", "json": document}})
        (row,) = read(url, fields=(("a", "string"),))
        assert row["a"] in (None, "[" * depth + "]" * depth)
        assert row["a"] is not None or depth > 100


def damaged(folder: Path, kind: str) -> str:
    """Shard 0, damaged; its second sample is the last that can be there."""
    path = folder / "00000.tar"
    blob = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmember("02.txt")
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {
                "in data": blob[: last.offset_data + 3],
                "in header": blob[: last.offset + 100],
                "in padding": blob[: last.offset_data + 500],
                "between": blob[: last.offset],
                "garbage": blob[: last.offset] + b"garbage!" * 1000,
                "empty": b"",
                "no tar": b"<html>" * 1000,
                "gzip": b"\x1f\x8b" + blob,
            }[kind]
        )
    return str(path)


@pytest.mark.parametrize(
    ("kind", "keys", "key", "message"),
    [
        ("in data", ["00", "01"], "02", "inside '02.txt'"),
        ("in padding", ["00", "01"], "02", "inside '02.txt'"),
        ("in header", ["00", "01", "02"], "", "damaged at byte"),
        ("between", ["00", "01", "02"], "", "no end mark: it may have been cut at byte"),
        ("garbage", ["00", "01", "02"], "", "damaged at byte"),
        ("empty", [], "", "empty file"),
        ("no tar", [], "", "not a tar"),
        ("gzip", [], "", "unpack it first"),
        ("missing", [], "", "no such file: "),
    ],
)
def test_damage_adds_one_row(folder: Path, kind: str, keys: list[str], key: str, message: str) -> None:
    url = damaged(folder, kind)
    table = rows(
        index_partition([url, str(folder / "00001.tar")], ReadSpec(fields=(JsonField("uid", "uid", "string"),)))
    )
    assert [r["key"] for r in table] == [*keys, key, "10", "11", "12"]
    assert [r["status"] for r in table] == ["ok"] * len(keys) + ["read_error"] + ["ok"] * 3
    bad = table[len(keys)]
    assert message in bad["error_message"]
    assert (bad["shard"], bad["offset"], bad["nbytes"], bad["sample_nbytes"]) == (url, 0, 0, 0)
    assert (bad["ext"], bad["caption"], bad["uid"]) == (None, None, None)


# --- types of JSON fields -------------------------------------------------------------------------


def types(urls: Sequence[str], names: Sequence[str], **options: Any) -> dict[str, str | None]:
    return peek(urls, ReadSpec(fields=tuple(JsonField(name, name) for name in names)), **options)


def test_types_by_the_first_samples(tmp_path: Path) -> None:
    documents: list[dict[str, Any]] = [
        {"i": 1, "f": 1.5, "b": True, "s": "x", "l": [1], "o": {}, "if": 1, "ib": 1, "is": 1, "n": None},
        {"i": 2, "f": 2.5, "b": False, "s": "y", "l": [2], "o": {}, "if": 0.5, "ib": True, "is": "1", "late": 7},
    ]
    url = write_tar(tmp_path / "a.tar", {str(i): {"jpg": b"1", "json": d} for i, d in enumerate(documents)})
    names = [*documents[0], "late"]
    expected = {
        **dict.fromkeys(names, "string"),
        "i": "int64",
        "late": "int64",
        "f": "float64",
        "if": "float64",
        "b": "bool",
        "n": None,
    }
    assert types([url], names) == expected
    assert types([url], ["if", "ib"], members=2) == {"if": "int64", "ib": "int64"}


def test_peek_goes_on_where_the_first_shard_tells_nothing(folder: Path) -> None:
    (folder / "garbage.tar").write_bytes(b"garbage" * 1000)
    write_tar(folder / "pictures.tar", {"a": {"jpg": b"1"}})
    urls = [str(folder / name) for name in ("missing.tar", "garbage.tar", "00002.tar", "pictures.tar", "00001.tar")]
    assert types(urls, ["rank", "score"]) == {"rank": "int64", "score": "float64"}
    assert types(urls[:3], ["rank", "score"]) == {"rank": None, "score": None}  # nothing can be read


def test_peek_reads_the_beginning_of_a_truncated_shard(folder: Path) -> None:
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:4000])
    assert types([str(path)], ["rank"]) == {"rank": "int64"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["licence"]}, r"no JSON field 'licence' .did you mean 'license'"),
        ({"columns": ["x"]}, r"no JSON field 'x' \(they have: license, text, txt\)\. If later ones have it"),
        ({"caption": "texd"}, "no caption 'texd' .did you mean 'text'"),
        ({"caption": "fr.txt"}, "no caption 'fr.txt'"),
        ({"columns": ["width"]}, "another name, as in original_width=width"),
        ({"columns": ["license", "license:string"]}, "two JSON fields give the column 'license'"),
        ({"columns": ["=x"]}, "cannot read '=x' as a column"),
    ],
)
def test_names_that_are_nowhere(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    url = write_tar(tmp_path / "a.tar", {"a": {"jpg": b"1", "json": {"license": "cc0", "text": "A"}, "txt": "B"}})
    with pytest.raises(ValueError, match=message):
        read_webdataset(url, **options, backend="pandas")


def test_columns_under_other_names_and_captions_by_language(tmp_path: Path) -> None:
    document = {"width": 3, "og:title": "T", "score": 1}
    url = write_tar(tmp_path / "a.tar", {"a": {"jpg": b"1", "json": document, "txt": "A", "En.txt": "B"}})
    columns = ["original_width=width", "og:title", "score:float64"]
    frame = read_webdataset(url, columns, caption="en.txt", backend="pandas").compute(scheduler="sync")
    (row,) = rows(frame)
    assert {n: row[n] for n in ("original_width", "og:title", "score", "caption")} == {
        "original_width": 3, "og:title": "T", "score": 1.0, "caption": "B",
    }  # fmt: skip
    assert isinstance(row["score"], float)


def test_a_guess_that_does_not_hold_is_an_error_and_no_null(tmp_path: Path) -> None:
    values: list[Any] = [1] * 200 + [0.5]
    url = write_tar(tmp_path / "a.tar", {f"{i}": {"jpg": b"1", "json": {"s": v}} for i, v in enumerate(values)})
    frame = read_webdataset(url, ["s"], backend="pandas")
    with pytest.raises(
        ValueError, match=r"'s' seemed to be int64 by the first samples, but is 0\.5 in 200 of .*a\.tar"
    ):
        frame.compute(scheduler="sync")
    exact = read_webdataset(url, ["s:float64"], backend="pandas").compute(scheduler="sync")
    assert exact["s"].tolist() == values


def test_what_is_not_taken_as_it_is_is_told_in_the_row(tmp_path: Path) -> None:
    url = write_tar(
        tmp_path / "a.tar",
        {
            "2023": {"01.05.jpg": b"1", "01.06.jpg": b"2", "json": {"n": 1, "c": "x"}},
            "b": {"jpg": b"1", "json": {"n": "a;b", "c": ["first", "second"], "m": 1}},
            "c": {"jpg": b"1", "json": {"n": float("nan"), "c": 2, "m": "x"}},
            "d": {"jpg": b"1", "json": "[]"},
        },
    )
    fields = (JsonField("n", "n", "int64"), JsonField("m", "m"))
    table = rows(index_partition([url], ReadSpec(fields=fields, caption="c", notes=True)))
    assert [(r["n"], r["m"], r["caption"], r["note"]) for r in table] == [
        (1, None, "x", "several images: 01.05.jpg, 01.06.jpg"),
        (None, "1", "first", "the caption is a list, and its first text is used; "
         "n is not of type int64 and so missing: \"a,b\"; m has values of several types, kept as text"),
        (None, "x", "2", None),
        (None, None, None, "the JSON is empty or not an object"),
    ]  # fmt: skip


# --- the Dask DataFrame ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"columns": ["rank", "score", "uid"], "caption": "uid"},
        {"columns": {"rank": "int64", "score": "string", "uid": "float64", "flag": "bool"}},
        {"shards_per_partition": 2},
    ],
    ids=["plain", "columns", "typed columns", "grouped"],
)
def test_every_partition_has_the_types_of_the_meta(folder: Path, backend: str, options: dict[str, Any]) -> None:
    """Also the empty one and that of a damaged shard."""
    (folder / "00005.tar").write_bytes(b"garbage" * 100)
    df = read_webdataset(folder, backend=backend, **options)
    assert list(df.columns) == OWN[:8] + list(options.get("columns", ())) + OWN[8:]
    parts = [df.partitions[i].compute(scheduler="synchronous") for i in range(df.npartitions)]
    for part in [*parts, df.compute(scheduler="synchronous")]:
        pd.testing.assert_series_equal(part.dtypes, df.dtypes)
    assert sum(len(part) for part in parts) == len(KEYS) + 1


def test_types_of_columns(folder: Path) -> None:
    df = read_webdataset(folder, columns=["rank", "score", "uid"], backend="pandas")
    assert {name: str(df.dtypes[name]) for name in OWN[2:6]} == dict.fromkeys(OWN[2:6], "int64")
    assert {str(df.dtypes[name]) for name in ("key", "shard", "ext", "caption", "status", "uid")} == {"string"}
    table = rows(df.compute(scheduler="synchronous"))
    assert [r["rank"] for r in table] == [None if k == "31" else int(k) for k in KEYS]
    assert [r["score"] for r in table] == [None if k == "31" else int(k[0]) + int(k[1]) / 8 for k in KEYS]
    assert [r["uid"] for r in table] == [f"u{k}" for k in KEYS]


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_one_partition_a_shard(folder: Path, scheduler: str) -> None:
    with dask.config.set(scheduler=scheduler):
        df = read_webdataset(f"{folder}/*.tar", backend="pandas")
        assert df.npartitions == 5
        assert column(df.compute(), "key") == KEYS
        assert [len(df.partitions[i]) for i in range(5)] == [3, 3, 0, 3, 3]
        for i in (0, 1, 3, 4):
            assert set(column(df.partitions[i].compute(), "shard")) == {str(folder / f"{i:05d}.tar")}


@pytest.mark.parametrize(("size", "partitions"), [(1, 5), (2, 3), (5, 1), (99, 1)])
def test_shards_per_partition(folder: Path, size: int, partitions: int) -> None:
    df = read_webdataset(folder, shards_per_partition=size, backend="pandas")
    assert df.npartitions == partitions
    assert column(df.compute(scheduler="synchronous"), "key") == KEYS


def test_partitions_that_are_dropped_or_reordered_keep_their_shard(folder: Path) -> None:
    df = read_webdataset([folder / "00004.tar", folder / "00000.tar", folder / "00003.tar"], backend="pandas")
    for part, keys in ((df.partitions[1:], KEYS[:3] + KEYS[6:9]), (df.partitions[[2, 0]], KEYS[6:])):
        table = rows(part.compute(scheduler="synchronous"))
        assert [r["key"] for r in table] == keys
        for row in table:
            assert row["shard"] == str(folder / f"{row['key'][0]:0>5}.tar")
            if row["status"] == "ok":
                data = Path(row["shard"]).read_bytes()[row["offset"] :][: row["nbytes"]]
                assert data.startswith(f"picture {row['key'][0]} {row['key'][1]}".encode())


def test_filter_and_map_are_those_of_dask(folder: Path) -> None:
    df = read_webdataset(folder, columns=["rank"], backend="pandas")
    kept = df[(df["rank"] >= 11) & (df.status == "ok")]
    assert column(kept.compute(scheduler="synchronous"), "key") == ["11", "12", "30", "32", "40", "41", "42"]
    # Pictures of 11, 22 and 33 bytes in each of four shards, less the second one of shard 3.
    assert df["nbytes"].sum().compute(scheduler="threads") == 4 * 66 - 22


def test_nothing_is_indexed_before_compute(tmp_path: Path) -> None:
    """Shards that come, change or go after the call: the rows are those of the time of computing."""
    first = write_tar(tmp_path / "0.tar", {"old": {"jpg": b"1"}})
    df = read_webdataset(f"{tmp_path}/{{0..2}}.tar", backend="pandas")
    write_tar(tmp_path / "0.tar", {"new": {"jpg": b"1"}})
    write_tar(tmp_path / "1.tar", {"late": {"jpg": b"1"}})
    table = rows(df.compute(scheduler="synchronous"))
    assert [(r["key"], r["status"]) for r in table] == [("new", "ok"), ("late", "ok"), ("", "read_error")]
    Path(first).unlink()
    assert column(df.compute(scheduler="synchronous"), "status") == ["read_error", "ok", "read_error"]


def test_only_the_first_shard_is_peeked_at(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a": {"jpg": b"1", "json": {"n": 1}}})
    write_tar(tmp_path / "1.tar", {"b": {"jpg": b"1", "json": {"n": "many"}}})
    df = read_webdataset(tmp_path, columns=["n"], backend="pandas")
    write_tar(tmp_path / "1.tar", {"b": {"jpg": b"1", "json": {"n": 2}}})
    assert column(df.compute(scheduler="synchronous"), "n") == [1, 2]


def test_a_missing_shard_is_a_row(folder: Path) -> None:
    df = read_webdataset(f"{folder}/{{00003..00006}}.tar", backend="pandas")
    table = rows(df.compute(scheduler="synchronous"))
    assert [r["key"] for r in table] == [*KEYS[6:], "", ""]
    assert [r["error_message"] for r in table[-2:]] == [f"no such file: {folder}/0000{i}.tar" for i in (5, 6)]


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        fs.pipe(f"/read-test/{path.name}", path.read_bytes())
    yield "memory://read-test"
    fs.rm("/read-test", recursive=True)


def test_another_file_system(folder: Path, memory: str) -> None:
    ours = read_webdataset(folder, columns=["rank"], backend="pandas").compute(scheduler="synchronous")
    theirs = read_webdataset(f"{memory}/*.tar", columns=["rank"], backend="pandas").compute(scheduler="synchronous")
    assert column(theirs, "shard")[0] == "memory:///read-test/00000.tar"
    pd.testing.assert_frame_equal(ours.drop(columns="shard"), theirs.drop(columns="shard"))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_rows_against_webdataset(folder: Path) -> None:
    wds = pytest.importorskip("webdataset")
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    theirs: Sequence[Any] = list(wds.WebDataset(urls, shardshuffle=False))
    gc.collect()  # webdataset leaves tars open: let them warn here, where it is allowed
    ours = rows(read_webdataset(urls, columns=["uid"], backend="pandas").compute(scheduler="synchronous"))
    assert len(ours) == len(theirs) == len(KEYS)
    for row, sample in zip(ours, theirs, strict=True):
        assert (row["key"], row["shard"]) == (sample["__key__"], sample["__url__"])
        assert row["caption"] == sample["txt"].decode()
        assert row["uid"] == json.loads(sample["json"])["uid"]
        image = Path(row["shard"]).read_bytes()[row["offset"] :][: row["nbytes"]]
        assert image == sample.get("jpg", b"")


# --- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"columns": ["uid", "key"]}, ValueError, "'key' is a column of this library.*original_key=key"),
        ({"columns": {"embedding": "string"}}, ValueError, "'embedding' is a column of this library"),
        ({"columns": {"uid": "int"}}, ValueError, r"'uid': 'int'.*string, int64, float64, bool"),
        ({"columns": "uid"}, TypeError, r"columns=\['uid'\]"),
        ({"shards_per_partition": 0}, ValueError, "shards_per_partition=0"),
        ({"image": ""}, ValueError, "image='': give an extension"),
        ({"image": ["jpg", "."]}, ValueError, r"image=\['jpg', '\.'\]"),
        ({"backend": "polars"}, ValueError, "unknown backend 'polars'"),
    ],
)
def test_wrong_arguments(folder: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_webdataset(folder, **{"backend": "pandas", **options})


def test_nothing_to_read(tmp_path: Path) -> None:
    for urlpath in (tmp_path, tmp_path / "a.tar", f"{tmp_path}/*.tar", f"{tmp_path}/{{0..9}}.tar", []):
        with pytest.raises(FileNotFoundError):
            read_webdataset(urlpath)
