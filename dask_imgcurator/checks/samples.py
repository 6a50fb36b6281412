"""Sample shards, made offline: good pictures, poor ones, and broken ones."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pictures import BROKEN_KINDS, KINDS, Maker, SampleImage

_UNUSUAL = tuple(kind for kind in KINDS if kind != "crop")
# One round: every kind once, then more of the most common ones.
_ROUND = (*_UNUSUAL, "near_duplicate", "blurred", "duplicate", "dark", "near_duplicate")
_UNUSUAL_SHARE = 0.28

_MTIME = 1_700_000_000  # any constant will do: the same call must give the same bytes


@dataclass(frozen=True)
class SampleShards:
    """The result of `make_sample_shards`.

    Attributes
    ----------
    folder : pathlib.Path
        Folder of the shards and `manifest.json`.
    shards : tuple of pathlib.Path
        The tars, in order.
    manifest : mapping of str to dict
        As in `manifest.json`: by key, `shard` (file name), `kind`, `of` (key of the crop that it copies, or None),
        `source` (name of a picture, or ``generated``) and `decodable`.
    """

    folder: Path
    shards: tuple[Path, ...]
    manifest: Mapping[str, dict[str, Any]]


def make_sample_shards(out: str | Path, count: int = 320, per_shard: int = 64, seed: int = 0) -> SampleShards:
    """Write webdataset shards of sample pictures, about 28 % of them unusual, poor or broken.

    Parameters
    ----------
    out : str or pathlib.Path
        Folder for ``00000.tar`` ... and ``manifest.json``; created if necessary. Files with these names are replaced.
    count : int, default 320
        Number of samples. From 63 on, every kind occurs.
    per_shard : int, default 64
        Samples per tar, at most 10,000.
    seed : int, default 0
        Seed of the crops. The same arguments give the same bytes with the same versions of Pillow, scikit-image and
        scikit-learn.

    Returns
    -------
    SampleShards
        The shards' paths and the manifest.

    Raises
    ------
    ValueError
        If `count` or `per_shard` is out of range.
    ModuleNotFoundError
        If scikit-image or scikit-learn is not installed.
    FileExistsError
        If `out` holds tars that this call would not replace, because they would be mistaken for samples.
    """
    if count < 1:
        raise ValueError(f"count={count}: give at least 1")
    if not 1 <= per_shard <= 10_000:
        raise ValueError(f"per_shard={per_shard}: give 1 to 10,000 (keys have four digits for the place in the shard)")
    maker = Maker(seed)
    folder = Path(out)
    shards = tuple(folder / f"{number:05d}.tar" for number in range(-(-count // per_shard)))
    strangers = sorted({path.name for path in folder.glob("*.tar")} - {path.name for path in shards})
    if strangers:
        raise FileExistsError(
            f"{folder} holds tars that are not part of these samples ({', '.join(strangers[:3])}): "
            "remove them or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)

    kinds = _plan(count)
    manifest: dict[str, dict[str, Any]] = {}
    for number, path in enumerate(shards):
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, kind in enumerate(kinds[number * per_shard : (number + 1) * per_shard]):
                key = f"{number:05d}{place:04d}"
                sample = maker.make(key, kind)
                _add(tar, key, sample, uid=f"{number * per_shard + place:032x}")
                manifest[key] = {
                    "shard": path.name,
                    "kind": kind,
                    "of": sample.of,
                    "source": sample.picture.name,
                    "decodable": kind not in BROKEN_KINDS,
                }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return SampleShards(folder, shards, manifest)


def _plan(count: int) -> list[str]:
    """Kind of each sample: unusual ones evenly spread, at most every third, each after two crops."""
    unusual = max(round(_UNUSUAL_SHARE * count), min(len(_UNUSUAL), count // 3)) if count >= 3 else 0
    kinds = ["crop"] * count
    for i in range(unusual):
        kinds[(i + 1) * count // unusual - 1] = _ROUND[i % len(_ROUND)]
    return kinds


def _add(tar: tarfile.TarFile, key: str, sample: SampleImage, uid: str) -> None:
    about = {
        "uid": uid,
        "kind": sample.kind,
        "source": sample.picture.name,
        "license": sample.picture.license,
        "credit": sample.picture.credit,
    }
    members = {} if sample.image is None else {sample.ext: sample.image}
    members["txt"] = sample.caption.encode()
    members["json"] = json.dumps(about, ensure_ascii=False).encode()
    for ext, data in members.items():
        info = tarfile.TarInfo(f"{key}.{ext}")
        info.size, info.mtime, info.mode = len(data), _MTIME, 0o644
        tar.addfile(info, io.BytesIO(data))
