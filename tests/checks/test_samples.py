from __future__ import annotations

import gc
import hashlib
import io
import json
import sys
import tarfile
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dask_imgcurator.checks.pictures import BROKEN_KINDS, KINDS, PICTURES
from dask_imgcurator.checks.samples import SampleShards, make_sample_shards

pytestmark = pytest.mark.skipif(
    find_spec("skimage") is None or find_spec("sklearn") is None, reason="the demo extra is not installed"
)

COUNT, PER_SHARD = 96, 40


@dataclass
class Members:
    """What a tar holds of one sample, read with tarfile alone."""

    image: bytes | None
    ext: str | None
    caption: str
    about: dict[str, str]

    def open(self) -> Image.Image:
        assert self.image is not None
        return Image.open(io.BytesIO(self.image))

    def gray(self, size: tuple[int, int] | None = None) -> np.ndarray:
        picture = self.open().convert("L")
        return np.asarray(picture if size is None else picture.resize(size), dtype=float)


def read(made: SampleShards) -> dict[str, Members]:
    samples = {}
    for path in made.shards:
        found: dict[str, dict[str, bytes]] = defaultdict(dict)
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, ext = info.name.partition(".")
                member = tar.extractfile(info)
                assert member is not None
                found[key][ext] = member.read()
        for key, members in found.items():
            caption, about = members.pop("txt").decode(), json.loads(members.pop("json"))
            assert len(members) <= 1
            ext = next(iter(members), None)
            samples[key] = Members(members.get(ext) if ext else None, ext, caption, about)
    return samples


def sharpness(gray: np.ndarray) -> float:
    """Mean step between neighbours, as a share of the whole range of tones."""
    return float(np.abs(np.diff(gray)).mean() / (gray.std() + 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SampleShards:
    return make_sample_shards(tmp_path_factory.mktemp("samples"), count=COUNT, per_shard=PER_SHARD, seed=1)


@pytest.fixture(scope="module")
def samples(made: SampleShards) -> dict[str, Members]:
    return read(made)


@pytest.fixture(scope="module")
def by_kind(made: SampleShards) -> dict[str, list[str]]:
    keys = defaultdict(list)
    for key, entry in made.manifest.items():
        keys[entry["kind"]].append(key)
    return keys


def test_manifest_and_shards_agree(made: SampleShards, samples: dict[str, Members]) -> None:
    assert json.loads((made.folder / "manifest.json").read_text(encoding="utf-8")) == made.manifest
    assert [path.name for path in made.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
        "manifest.json",
    ]
    assert Counter(m["shard"] for m in made.manifest.values()) == {
        "00000.tar": 40,
        "00001.tar": 40,
        "00002.tar": 16,
    }
    assert samples.keys() == made.manifest.keys()
    licenses = {picture.name: (picture.license, picture.credit) for picture in PICTURES}
    for key, entry in made.manifest.items():
        about = samples[key].about
        assert (about["kind"], about["source"]) == (entry["kind"], entry["source"])
        if entry["source"] != "generated":
            assert (about["license"], about["credit"]) == licenses[entry["source"]]
        assert samples[key].caption
    assert len({s.about["uid"] for s in samples.values()}) == COUNT


@pytest.mark.parametrize(("count", "share"), [(64, (0.25, 0.34)), (100, (0.25, 0.3)), (320, (0.25, 0.3))])
def test_every_kind_is_there_and_most_samples_are_crops(tmp_path: Path, count: int, share: tuple[float, float]) -> None:
    made = make_sample_shards(tmp_path, count=count)
    kinds = Counter(m["kind"] for m in made.manifest.values())
    assert kinds.keys() == KINDS.keys()
    assert share[0] <= 1 - kinds["crop"] / count <= share[1]
    assert {m["source"] for m in made.manifest.values()} == {p.name for p in PICTURES} | {"generated"}
    assert sum(path.stat().st_size for path in made.shards) < 40e6 * max(count, 100) / 320


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_few_samples(tmp_path: Path, count: int) -> None:
    made = make_sample_shards(tmp_path, count=count, per_shard=2)
    assert len(read(made)) == len(made.manifest) == count
    assert len(made.shards) == (count + 1) // 2


def test_pillow_opens_what_is_called_decodable_and_nothing_else(
    made: SampleShards, samples: dict[str, Members]
) -> None:
    for key, entry in made.manifest.items():
        if entry["decodable"]:
            picture = samples[key].open()
            picture.load()
            assert min(picture.size) >= (1 if entry["kind"] == "tiny" else 90), (key, entry, picture.size)
        elif entry["kind"] == "no_image":
            assert samples[key].image is None
        else:
            with pytest.raises((OSError, Image.DecompressionBombError)):
                samples[key].open().load()
    assert {m["kind"] for m in made.manifest.values() if not m["decodable"]} == BROKEN_KINDS


def test_crops_have_many_sizes_and_formats(samples: dict[str, Members], by_kind: dict[str, list[str]]) -> None:
    pictures = [samples[key].open() for key in by_kind["crop"]]
    sizes = {picture.size for picture in pictures}
    assert len(sizes) > len(pictures) / 2
    assert min(min(size) for size in sizes) < 160
    assert max(max(size) for size in sizes) > 1000
    aspects = [width / height for width, height in sizes]
    assert min(aspects) < 0.8
    assert max(aspects) > 1.4
    assert {picture.format for picture in pictures} == {"JPEG", "PNG", "WEBP"}
    for key in by_kind["crop"]:
        assert samples[key].ext == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[str(samples[key].open().format)]


@pytest.mark.parametrize(
    ("kind", "ext", "format_", "mode"),
    [
        ("gray", "jpg", "JPEG", "L"),
        ("cmyk", "jpg", "JPEG", "CMYK"),
        ("rgba", "png", "PNG", "RGBA"),
        ("palette", "png", "PNG", "P"),
        ("png16", "png", "PNG", "I;16"),
        ("webp", "webp", "WEBP", "RGB"),
        ("exif_rotated", "jpg", "JPEG", "RGB"),
        ("wrong_ext", "jpg", "PNG", "RGB"),
        ("upper_ext", "JPG", "JPEG", "RGB"),
        ("tiny", "png", "PNG", "RGB"),
    ],
)
def test_unusual_formats(
    samples: dict[str, Members], by_kind: dict[str, list[str]], kind: str, ext: str, format_: str, mode: str
) -> None:
    for key in by_kind[kind]:
        picture = samples[key].open()
        assert (samples[key].ext, picture.format, picture.mode) == (ext, format_, mode)


def test_unusual_contents(samples: dict[str, Members], by_kind: dict[str, list[str]]) -> None:
    for key in by_kind["exif_rotated"]:
        assert samples[key].open().getexif()[0x0112] == 6
    for key in by_kind["tiny"]:
        assert samples[key].open().size == (1, 1)
    for key in by_kind["rgba"]:
        lowest, highest = samples[key].open().getchannel("A").getextrema()
        assert lowest < 50 < 200 < highest
    for key in by_kind["png16"]:
        lowest, highest = samples[key].open().getextrema()
        assert lowest < 20_000 < 40_000 < highest <= 65_535
    for key in by_kind["flat"]:
        assert all(high - low <= 2 for low, high in samples[key].open().getextrema())
    for key in by_kind["empty"]:
        assert samples[key].image == b""


def test_poor_pictures(made: SampleShards, samples: dict[str, Members], by_kind: dict[str, list[str]]) -> None:
    for key in by_kind["dark"]:
        assert samples[key].gray().mean() < 30
    for key in by_kind["noise"]:
        assert sharpness(samples[key].gray()) > 0.5
    for key in by_kind["blurred"]:
        peers = [k for k in by_kind["crop"] if made.manifest[k]["source"] == made.manifest[key]["source"]]
        assert sharpness(samples[key].gray()) < 0.6 * np.median([sharpness(samples[k].gray()) for k in peers])


def test_bomb_is_a_small_but_valid_png(samples: dict[str, Members], by_kind: dict[str, list[str]]) -> None:
    data = samples[by_kind["bomb"][0]].image
    assert data is not None
    assert len(data) < 1_000_000
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert (width, height) == (30_000, 30_000)
    # One IDAT chunk follows the signature (8 bytes) and the header (25); a pixel is one bit.
    length = int.from_bytes(data[33:37], "big")
    unpacked = zlib.decompress(data[41 : 41 + length])
    assert len(unpacked) == height * (1 + width // 8)


def test_duplicates_are_the_same_bytes(
    made: SampleShards, samples: dict[str, Members], by_kind: dict[str, list[str]]
) -> None:
    for key in by_kind["duplicate"]:
        first = made.manifest[key]["of"]
        assert first < key
        assert made.manifest[first]["kind"] == "crop"
        assert samples[key].image == samples[first].image
        assert samples[key].caption == samples[first].caption
    # and nothing else is: not even two crops of one picture
    digests = Counter(hashlib.sha256(samples[key].image or b"").digest() for key in by_kind["crop"])
    assert max(digests.values()) == 1


def test_near_duplicates_are_near_and_not_the_same(
    made: SampleShards, samples: dict[str, Members], by_kind: dict[str, list[str]]
) -> None:
    for key in by_kind["near_duplicate"]:
        first = made.manifest[key]["of"]
        assert made.manifest[first]["kind"] == "crop"
        assert samples[key].image != samples[first].image
        before, after = samples[first].open(), samples[key].open()
        assert 0.88 < after.width / before.width < 0.98
        difference = np.abs(samples[key].gray((128, 128)) - samples[first].gray((128, 128))).mean()
        assert difference < 5
        assert difference < 0.5 * min(
            np.abs(samples[key].gray((128, 128)) - samples[other].gray((128, 128))).mean()
            for other in by_kind["crop"]
            if other != first
        )
    assert all((m["of"] is not None) == m["kind"].endswith("duplicate") for m in made.manifest.values())


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_reads_the_shards(made: SampleShards, samples: dict[str, Members]) -> None:
    wds = pytest.importorskip("webdataset")
    read_back = list(wds.WebDataset([str(path) for path in made.shards], shardshuffle=False))
    gc.collect()  # webdataset leaves tars open: let them warn here, where it is allowed
    assert [sample["__key__"] for sample in read_back] == list(made.manifest)
    for sample in read_back:
        expected = samples[sample["__key__"]]
        assert sample["txt"].decode() == expected.caption
        if expected.ext is not None:
            assert sample[expected.ext.lower()] == expected.image


def test_same_arguments_same_bytes(made: SampleShards, tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    make_sample_shards(str(tmp_path / "again"), count=COUNT, per_shard=PER_SHARD, seed=1)
    assert contents(tmp_path / "again") == contents(made.folder)
    make_sample_shards(tmp_path / "again", count=COUNT, per_shard=PER_SHARD, seed=1)  # over its own output
    assert contents(tmp_path / "again") == contents(made.folder)
    other = make_sample_shards(tmp_path / "other", count=COUNT, per_shard=PER_SHARD, seed=2)
    assert contents(other.folder).keys() == contents(made.folder).keys()
    assert contents(other.folder)["00000.tar"] != contents(made.folder)["00000.tar"]


def test_tars_say_nothing_of_this_machine(made: SampleShards) -> None:
    with tarfile.open(made.shards[0]) as tar:
        assert {(i.uid, i.gid, i.uname, i.gname, i.mode) for i in tar} == {(0, 0, "", "", 0o644)}
        assert len({i.mtime for i in tar}) == 1


@pytest.mark.parametrize(("package", "project"), [("skimage", "scikit-image"), ("sklearn", "scikit-learn")])
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, project: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # to Python, a package that cannot be imported
    with pytest.raises(ModuleNotFoundError, match=rf"{project}.*pip install \"dask-imgcurator\[demo\]\""):
        make_sample_shards(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stranger_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.tar").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"mine\.tar.*choose another folder"):
        make_sample_shards(tmp_path, count=3)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tar"]


@pytest.mark.parametrize("arguments", [{"count": 0}, {"per_shard": 0}, {"per_shard": 10_001}])
def test_wrong_numbers(tmp_path: Path, arguments: dict[str, int]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}: give"):
        make_sample_shards(tmp_path, **arguments)
