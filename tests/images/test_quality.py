"""Measures against scikit-image, hashes against imagehash; in the decode, by each decoder, on frames."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageFilter

import dask_imgcurator as dic
from dask_imgcurator.images import quality
from dask_imgcurator.images.dali import dali_problem
from dask_imgcurator.images.decoder import Decoder
from dask_imgcurator.images.formats import BadImage
from dask_imgcurator.images.preprocess import Preprocess
from dask_imgcurator.models import starter
from dask_imgcurator.models.encoders import resolve_encoder
from dask_imgcurator.schema import columns_of
from dask_imgcurator.steps.embed import EmbedSpec

imagehash = pytest.importorskip("imagehash")
skimage = pytest.importorskip("skimage")

PREPROCESS = Preprocess.from_open_clip({"fill_color": 0, **starter.PREPROCESS})


def photographs() -> dict[str, Image.Image]:
    names = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "page", "text")
    return {name: Image.fromarray(getattr(skimage.data, name)()) for name in names}


def pictures() -> dict[str, Image.Image]:
    out = photographs()
    cat = out["chelsea"]
    out["blurred"] = cat.filter(ImageFilter.GaussianBlur(4))
    out["gray"] = cat.convert("L")
    out["dark"] = cat.point(lambda v: v // 8)
    out["wide"] = cat.resize((900, 40))
    out["tiny"] = cat.resize((7, 5))
    out["alpha"] = Image.merge("RGBA", (*cat.split(), cat.convert("L")))
    out["palette"] = cat.quantize(31)
    out["flat"] = Image.new("RGB", (64, 48), (90, 120, 30))
    out["black"] = Image.new("RGB", (10, 10))
    out["half"] = Image.fromarray(np.repeat([[0, 200]], 32, 1).repeat(64, 0).astype(np.uint8))
    out["checker"] = Image.fromarray((np.indices((64, 64)).sum(0) // 8 % 2 * 255).astype(np.uint8))
    return out


def small(image: Image.Image) -> np.ndarray:
    rgb = image.convert("RGB").resize((quality.SIDE, quality.SIDE), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


@pytest.mark.parametrize("name", pictures())
def test_measures_are_those_of_scikit_image(name: str) -> None:
    array = small(pictures()[name])
    (got,) = quality.measure(torch.from_numpy(array.transpose(2, 0, 1)[None].copy())).tolist()
    found = dict(zip(quality.MEASURES, got, strict=True))
    gray = skimage.color.rgb2gray(array)
    eight = np.round(gray * 255).astype(np.uint8)
    assert found["brightness"] == pytest.approx(gray.mean(), abs=1e-5)
    # What is_low_contrast compares with its threshold: it must turn from one side to the other there.
    assert skimage.exposure.is_low_contrast(eight, found["contrast"] + 0.005)
    if found["contrast"] > 0.005:
        assert not skimage.exposure.is_low_contrast(eight, found["contrast"] - 0.005)
    low, high = np.percentile(eight, [1, 99])
    assert found["contrast"] == pytest.approx((high - low) / 255, abs=0.005)
    assert found["entropy"] == pytest.approx(skimage.measure.shannon_entropy(eight), abs=0.02)
    # Of a flat image there is no edge to lose: the quotient of two roundings there.
    if gray.std() > 1e-6:
        assert found["blur"] == pytest.approx(skimage.measure.blur_effect(gray), abs=1e-3)
    # Hasler and Süsstrunk's formula, by hand.
    r, g, b = (array[..., i].astype(float) for i in range(3))
    rg, yb = r - g, (r + g) / 2 - b
    by_hand = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
    assert found["colourfulness"] == pytest.approx(by_hand, abs=1e-3)


def test_measures_go_the_documented_way() -> None:
    images = pictures()
    batch = torch.from_numpy(np.stack([small(i).transpose(2, 0, 1) for i in images.values()]))
    found = {
        n: dict(zip(quality.MEASURES, v, strict=True))
        for n, v in zip(images, quality.measure(batch).tolist(), strict=True)
    }
    assert found["blurred"]["blur"] > found["chelsea"]["blur"]
    assert found["dark"]["brightness"] < found["chelsea"]["brightness"] / 4
    assert found["gray"]["colourfulness"] == pytest.approx(0, abs=1e-6)
    assert found["flat"]["entropy"] == found["flat"]["contrast"] == 0
    assert 0 <= min(v["blur"] for v in found.values()) <= max(v["blur"] for v in found.values()) <= 1


@pytest.mark.parametrize("name", pictures())
def test_hash_is_imagehashs(name: str) -> None:
    image = pictures()[name]
    assert quality.phash(quality.views(image)[1][None]) == [str(imagehash.phash(image))]


def test_hash_is_imagehashs_on_the_shared_pictures(shared: Path) -> None:
    paths = sorted(p for p in (shared / "images").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    assert len(paths) >= 200
    for path in paths:
        with Image.open(path) as image:
            assert quality.phash(quality.views(image)[1][None]) == [str(imagehash.phash(image))], path.name


def encoded(image: Image.Image, format_: str = "JPEG") -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **({"quality": 95} if format_ == "JPEG" else {}))
    return out.getvalue()


@pytest.mark.skipif(dali_problem() is not None, reason=str(dali_problem()))
def test_dalis_views_are_close_to_pillows(record_property: Any) -> None:
    blobs = [encoded(i) for i in photographs().values()]
    ours = Decoder(PREPROCESS, 8, dali_device="cpu", views=True)(blobs)
    theirs = Decoder(PREPROCESS, 8, dali_device=None, views=True)(blobs)
    assert ours.small is not None and theirs.small is not None and ours.gray is not None and theirs.gray is not None
    assert {i.decoder for i in ours.infos if not isinstance(i, BadImage)} == {"dali"}
    assert (ours.small.int() - theirs.small.int()).abs().float().mean() < 0.5
    difference = (quality.measure(ours.small) - quality.measure(theirs.small)).abs().max(0).values
    assert (difference < torch.tensor([0.002, 0.01, 0.01, 0.05, 0.5])).all(), difference
    bits = [
        (int(a, 16) ^ int(b, 16)).bit_count()
        for a, b in zip(quality.phash(ours.gray), quality.phash(theirs.gray), strict=True)
    ]
    record_property("bits of the hash that differ", bits)
    assert max(bits) <= 2


def test_columns_belong_to_their_rows(tmp_path: Path) -> None:
    images = pictures()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, image in images.items():
            data = b"broken" if name == "coins" else encoded(image, "PNG")
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    df = dic.read_webdataset(tmp_path / "a.tar", backend="pandas")
    lazy = dic.embed(df, model="starter", batch_size=4, measures=True)
    assert [c for c in lazy.columns if c not in df.columns] == [
        "width", "height", "sha256", "embedding", *(c.name for c in columns_of("measure")),
    ]  # fmt: skip
    table = lazy.compute(scheduler="synchronous")
    assert list(table.columns) == list(lazy.columns)
    shuffled = df.compute(scheduler="synchronous").sample(frac=1, random_state=1)
    again = dic.embed(shuffled, model="starter", batch_size=5, measures=True).set_index("key").loc[table["key"]]
    for row, other in zip(table.itertuples(), again.itertuples(), strict=True):
        if row.key == "coins":
            assert pd.isna(row.phash)
            assert np.isnan(row.brightness)
            continue
        assert row.phash == other.phash == str(imagehash.phash(images[row.key]))
        expected = quality.measure(torch.from_numpy(small(images[row.key]).transpose(2, 0, 1)[None].copy()))[0]
        for name, value in zip(quality.MEASURES, expected.tolist(), strict=True):
            assert getattr(row, name) == pytest.approx(value, rel=1e-5, abs=1e-6)
            assert getattr(other, name) == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_isolated_decoding_measures_too() -> None:
    from dask_imgcurator.images.isolated import IsolatedDecoder

    blobs: list[bytes | BadImage] = [encoded(i) for i in photographs().values()][:3]
    expected = Decoder(PREPROCESS, 4, dali_device=None, views=True)(blobs)
    isolated = IsolatedDecoder(PREPROCESS, 4, dali_device=None, views=True)
    batch = isolated(blobs)
    isolated.close()
    assert batch.small is not None and expected.small is not None and batch.gray is not None
    assert torch.equal(batch.small, expected.small)
    assert expected.gray is not None and torch.equal(batch.gray, expected.gray)


def test_without_measures_there_are_none() -> None:
    spec = EmbedSpec(resolve_encoder("starter"))
    measured = dataclasses.replace(spec, measures=True)
    assert set(measured.schema.names) - set(spec.schema.names) == {c.name for c in columns_of("measure")}
    assert Decoder(PREPROCESS, 4, dali_device=None)([encoded(photographs()["coffee"])]).small is None
