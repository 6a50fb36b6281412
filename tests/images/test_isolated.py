"""Native decoders that crash: a real segmentation fault, in worker processes and in the child in their place."""

from __future__ import annotations

import io
import os
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import dask_imgcurator as dic
from dask_imgcurator.images.decoder import Decoder
from dask_imgcurator.images.formats import BadImage
from dask_imgcurator.images.isolated import IsolatedDecoder
from dask_imgcurator.images.pillow import ImageInfo
from dask_imgcurator.images.preprocess import Preprocess
from dask_imgcurator.models import starter
from dask_imgcurator.monitor import Monitor

PREPROCESS = Preprocess.from_open_clip({"fill_color": 0, **starter.PREPROCESS})

#: What the processes below import when they start: a GIF decoder that crashes on some files, as native code does.
PLUGIN = """
import ctypes, os, time
from PIL import GifImagePlugin

class Crashing(GifImagePlugin.GifImageFile):
    def _open(self):
        kind = self.fp.read(14)[6:]
        if kind == b"WILLSEGV":
            ctypes.string_at(0)
        if kind == b"WILLEXIT":
            os._exit(7)
        if kind == b"WILLHANG":
            time.sleep(60)
        self.fp.seek(0)
        super()._open()

GifImagePlugin.GifImageFile = Crashing
GifImagePlugin.Image.OPEN["GIF"] = (Crashing, GifImagePlugin._accept)
"""


def fatal(kind: bytes) -> bytes:
    return b"GIF89aWILL" + kind + bytes(100)


@pytest.fixture
def crashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every Python process that is started from here know the crashing format; not this one."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    Image.fromarray(noise).resize((300, 260)).save(out, "JPEG")
    return out.getvalue()


def test_pixels_are_those_of_the_decoder() -> None:
    blobs: list[bytes | BadImage] = [jpeg(0), b"no image", jpeg(1), BadImage("read_error", "gone")]
    expected = Decoder(PREPROCESS, 4)(blobs)
    isolated = IsolatedDecoder(PREPROCESS, 4)
    for _ in range(2):
        batch = isolated(blobs)
        assert torch.equal(batch.pixels, expected.pixels)
        assert [str(i) for i in batch.infos] == [str(i) for i in expected.infos]
    isolated.close()
    assert not [c for c in psutil.Process().children() if "dask_imgcurator.images.isolated" in c.cmdline()]


@pytest.mark.parametrize(
    ("kind", "message"),
    [(b"SEGV", "the decoder crashed (SIGSEGV) on this image"), (b"EXIT", "the decoder ended with exit code 7 on")],
)
def test_the_image_that_crashes_is_set_aside(crashing: None, kind: bytes, message: str) -> None:
    blobs: list[bytes | BadImage] = [jpeg(0), fatal(kind), jpeg(1), fatal(kind)]
    isolated = IsolatedDecoder(PREPROCESS, 4)
    batch = isolated(blobs)
    isolated.close()
    good = Decoder(PREPROCESS, 4)([blobs[0], blobs[2]])
    assert [isinstance(i, ImageInfo) for i in batch.infos] == [True, False, True, False]
    assert torch.equal(batch.pixels[[0, 2]], good.pixels)
    assert not batch.pixels[[1, 3]].any()
    for i in (1, 3):
        info = batch.infos[i]
        assert isinstance(info, BadImage)
        assert info.status == "decode_error"
        assert str(info).startswith(message)


def test_a_decoder_that_never_ends(crashing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask_imgcurator.images.isolated.PATIENCE", 8.0)
    isolated = IsolatedDecoder(PREPROCESS, 4)
    begin = time.monotonic()
    batch = isolated([fatal(b"HANG")])
    isolated.close()
    assert time.monotonic() - begin < 50
    assert "SIGKILL" in str(batch.infos[0])


def test_interrupts_are_for_the_parent() -> None:
    isolated = IsolatedDecoder(PREPROCESS, 4)
    isolated([jpeg(0)])
    (child,) = [c for c in psutil.Process().children() if "dask_imgcurator.images.isolated" in c.cmdline()]
    child.send_signal(signal.SIGINT)
    assert isolated([jpeg(0)]).good == [0]
    isolated.close()


def pack(path: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.slow
def test_a_worker_that_dies_costs_one_image(crashing: None, tmp_path: Path) -> None:
    """The shard with the fatal image is done again, apart; the scores of all others are as without it."""
    good = {f"{i:03d}.jpg": jpeg(i) for i in range(24)}
    names = list(good)
    parts = [{n: good[n] for n in names[k::3]} for k in range(3)]
    for k, part in enumerate(parts):
        pack(tmp_path / f"good-{k}.tar", part)
        worst = {"fatal.img.jpg": fatal(b"SEGV")} if k == 1 else {}
        items = list(part.items())
        pack(tmp_path / f"bad-{k}.tar", dict([*items[:3], *worst.items(), *items[3:]]))
    tables: dict[str, Any] = {}
    for kind in ("good", "bad"):
        monitor = Monitor()
        result = dic.score_shards(
            str(tmp_path / f"{kind}-*.tar"),
            tmp_path / kind,
            model="starter",
            client=1,
            backend="pandas",
            monitor=monitor,
        )
        assert result.shards_scored == 3
        table = dic.read_scores(tmp_path / kind, backend="pandas").compute(scheduler="synchronous")
        tables[kind] = table.set_index("key")
    bad = tables["bad"]
    assert (bad.loc["fatal", "status"], bad.loc["fatal", "error_message"]) == (
        "decode_error",
        "the decoder crashed (SIGSEGV) on this image",
    )
    assert sorted(bad.index.drop("fatal")) == sorted(tables["good"].index)
    for key, row in tables["good"].iterrows():
        # The size of a batch, which is another with one image more, affects the last bits.
        np.testing.assert_allclose(bad.loc[key, "embedding"], row["embedding"], rtol=0, atol=1e-6)
        assert bad.loc[key, "aesthetic_score"] == pytest.approx(row["aesthetic_score"], rel=1e-5)
    assert [n for n in monitor.notes if "bad-1.tar" in n and "separate process" in n]
