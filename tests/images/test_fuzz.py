"""Damaged files in great number: nothing crashes, every sample is accounted for, and good images keep their scores.

Mutations of real files of every format lie in tars among the files themselves; a child process scores these tars and
others that hold the good files alone. Run as a script, this file is that child.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_formats import FAMILIES, picture

from dask_imgcurator.schema import STATUSES

MODEL = "dic-tiny-fuzz"
MODEL_CONFIG = {
    "embed_dim": 512,  # as wide as the heads want it
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
}
SCORES = ("aesthetic_score", "nsfw_score")
PER_SHARD = 500
SHARED = Path(__file__).resolve().parents[3] / "shared" / "images"

#: What one image within the limit may cost: 179 million pixels in Pillow's four bytes each, twice (alpha is
#: multiplied in a copy), and what a codec holds beside them.
MEMORY = 3_000_000_000


# --- damage -----------------------------------------------------------------------------------------


def truncate(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def truncate_the_end(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: -rng.randint(1, min(40, len(data)))]


def flip_bits(rng: random.Random, data: bytes, _: bytes) -> bytes:
    out = bytearray(data)
    for _i in range(rng.randint(1, 64)):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_header_bits(rng: random.Random, data: bytes, _: bytes) -> bytes:
    out = bytearray(data)
    for _i in range(rng.randint(1, 8)):
        out[rng.randrange(min(200, len(out)))] ^= 1 << rng.randrange(8)
    return bytes(out)


def insert(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 300)) + data[at:]


def delete(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 300) :]


def swap_pieces(rng: random.Random, data: bytes, _: bytes) -> bytes:
    a, b, c, d = sorted(rng.randrange(len(data) + 1) for _i in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def repeat_a_piece(rng: random.Random, data: bytes, _: bytes) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _i in range(2))
    return data[:b] + data[a:b] * rng.randint(1, 3) + data[b:]


def zero_a_range(rng: random.Random, data: bytes, _: bytes) -> bytes:
    a = rng.randrange(len(data))
    b = min(len(data), a + rng.choice([4, 60, 4000]))
    return data[:a] + bytes(b - a) + data[b:]


def change_size(rng: random.Random, data: bytes, _: bytes) -> bytes:
    """Write over every number of the header that may be a side of the picture."""
    from PIL import Image

    out = bytearray(data)
    new = rng.choice([0, 1, 7, 255, 5000, 12_000, 16_383, 65_500, 65_535, 2**31 - 1, 2**32 - 1])
    with Image.open(io.BytesIO(data)) as image:
        sides = image.size
    for side in rng.choice([sides[:1], sides[1:], sides]):
        for code in (">I", "<I", ">H", "<H"):
            old = struct.pack(code, side)
            at = bytes(out[:600]).find(old)
            if at >= 0:
                out[at : at + len(old)] = struct.pack(code, new & (1 << 8 * len(old)) - 1)
                break
    return bytes(out)


def change_a_number(rng: random.Random, data: bytes, _: bytes) -> bytes:
    """Write a number that lengths and counts are afraid of somewhere into the first kilobyte."""
    out = bytearray(data)
    code = rng.choice([">I", "<I", ">H", "<H", "B"])
    number = rng.choice([0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1])
    patch = struct.pack(code, number & (1 << 8 * struct.calcsize(code)) - 1)
    at = rng.randrange(min(len(out), 1000))
    out[at : at + len(patch)] = patch
    return bytes(out)


def append_garbage(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data + rng.randbytes(rng.randint(1, 3000))


def concatenate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randint(1, len(data))] + other


def graft(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The header of one file and the body of another."""
    return data[: rng.randint(4, 40)] + other[rng.randint(4, 40) :]


def noise(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: rng.choice([0, 4, 12, 30])] + rng.randbytes(rng.randint(0, 3000))


def empty(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return b""


Mutation = Callable[[random.Random, bytes, bytes], bytes]
MUTATIONS: tuple[Mutation, ...] = (
    truncate,
    truncate_the_end,
    flip_bits,
    flip_header_bits,
    insert,
    delete,
    swap_pieces,
    repeat_a_piece,
    zero_a_range,
    change_size,
    change_a_number,
    append_garbage,
    concatenate,
    graft,
    noise,
)


# --- tars -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A damaged file: what was done to which good one."""

    mutation: str
    source: str


def sources(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Good files by name: every kind of every format in a small size, and small photographs where there are any."""
    monkeypatch.setattr(picture, "__defaults__", (90, 66, 0))
    files = {f"{family}, {name}": data for family, make in FAMILIES.items() for name, data in make()}
    # A large comment says little of a format and takes most of the random places.
    files = {name: data for name, data in files.items() if len(data) < 100_000}
    if SHARED.is_dir():
        photos = sorted(p for p in SHARED.glob("*/*") if p.suffix in (".jpg", ".jpeg", ".png"))
        files |= {p.name: p.read_bytes() for p in photos if p.stat().st_size < 60_000}
    return files


def mutants(files: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[Mutant, bytes]]:
    rng = random.Random(seed)
    names = list(files)
    for number in range(count):
        mutation = empty if number % 100 == 99 else MUTATIONS[number % len(MUTATIONS)]
        # Every format as often as any, whatever the number of its kinds.
        family = rng.choice(list(FAMILIES))
        source = rng.choice([name for name in names if name.startswith(family + ",")] or names)
        if rng.random() < 0.1:
            source = rng.choice(names)
        yield Mutant(mutation.__name__, source), mutation(rng, files[source], files[rng.choice(names)])


def add(tar: tarfile.TarFile, key: str, data: bytes) -> None:
    info = tarfile.TarInfo(f"{key}.jpg")  # whatever it is
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tars(folder: Path, files: dict[str, bytes], count: int, seed: int) -> dict[str, Mutant]:
    """Write tars ``all``, with good files here and there, and ``good``, of these alone; return the mutants by key."""
    known: dict[str, Mutant] = {}
    rng = random.Random(seed + 1)
    names = list(files)
    produced = mutants(files, count, seed)
    good = 0
    for shard in range(-(-count // PER_SHARD)):
        with (
            tarfile.open(folder / f"all-{shard:03}.tar", "w") as mixed,
            tarfile.open(folder / f"good-{shard:03}.tar", "w") as alone,
        ):
            for _ in range(min(PER_SHARD, count - shard * PER_SHARD)):
                mutant, data = next(produced)
                key = f"bad-{len(known):05}"
                known[key] = mutant
                add(mixed, key, data)
                if rng.random() < 0.4:
                    name = names[good % len(names)]
                    for tar in (mixed, alone):
                        add(tar, f"good-{good:05}-{names.index(name):03}", files[name])
                    good += 1
    return known


# --- the child: scores the tars ---------------------------------------------------------------------


def child(folder: Path) -> None:
    import open_clip

    from dask_imgcurator import config
    from dask_imgcurator.models.encoders import resolve_encoder
    from dask_imgcurator.steps.embed import EmbedSpec, embed_partition
    from dask_imgcurator.steps.heads import HeadUse, score_partition
    from dask_imgcurator.steps.read import ReadSpec, index_partition

    (folder / f"{MODEL}.json").write_text(json.dumps(MODEL_CONFIG))
    open_clip.add_model_config(folder / f"{MODEL}.json")
    spec = EmbedSpec(resolve_encoder(MODEL, "random:0", "float32"), batch_size=16, max_pixels=config.get("max-pixels"))
    heads = (HeadUse("aesthetic", "aesthetic-starter"), HeadUse("nsfw", "nsfw-starter"))
    for kind in ("good", "all"):  # the good ones first: what the others do to the process cannot have reached them
        for path in sorted(folder.glob(f"{kind}-*.tar")):
            begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            frame = embed_partition(index_partition([str(path)], ReadSpec()), spec)
            for use in heads:
                frame = score_partition(frame, use)
            frame.to_parquet(path.with_suffix(".parquet"))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps({"tar": path.name, "seconds": time.monotonic() - begin, "before": before, "peak": peak}))


def score(folder: Path, timeout: float) -> list[dict[str, Any]]:
    """Score the tars of a folder in a child; return what it says of time and memory (kB)."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(folder)],
        capture_output=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    noise = run.stderr.decode(errors="replace")[-4000:]  # of libjpeg and libtiff, and at its end the reason
    assert run.returncode == 0, f"the child ended with {run.returncode}: {noise}"
    return [json.loads(line) for line in run.stdout.splitlines()]


# --- the tests --------------------------------------------------------------------------------------


def check(folder: Path, files: dict[str, bytes], known: dict[str, Mutant]) -> pd.DataFrame:
    """Everything that must hold whatever the damage; returns the rows of the mutants."""
    good, mixed = (
        pa.concat_tables([pq.read_table(p) for p in sorted(folder.glob(f"{kind}-*.parquet"))]).to_pandas(
            ignore_metadata=True
        )
        for kind in ("good", "all")
    )
    with_neighbours = mixed[mixed.key.str.startswith("good")].reset_index(drop=True)
    bad = mixed[mixed.key.str.startswith("bad")].reset_index(drop=True)
    # Every sample once, in the tars' order, with a status that there is and its reason.
    assert bad.key.tolist() == sorted(known)
    assert with_neighbours.key.tolist() == good.key.tolist()
    assert len(mixed) == len(bad) + len(good)
    assert set(mixed.status) <= set(STATUSES)
    ok = mixed.status == "ok"
    assert mixed.error_message.isna().equals(ok)
    assert mixed.error_message[~ok].str.len().min() > 0
    for column in ("embedding", *SCORES):
        assert mixed[column].notna().equals(ok), column
    matrix = np.stack(mixed.embedding[ok].tolist())
    assert matrix.shape[1] == 512
    assert np.abs(np.linalg.norm(matrix, axis=1) - 1).max() < 1e-5
    assert np.isfinite(mixed.loc[ok, list(SCORES)].to_numpy(float)).all()
    # Good images: all ok, and the same beside any neighbours, but for what the size of a batch does to the last bits.
    assert set(good.status) == {"ok"}
    for column in ("status", "width", "height", "sha256"):
        assert with_neighbours[column].tolist() == good[column].tolist(), column
    for column in SCORES:
        np.testing.assert_allclose(with_neighbours[column], good[column], rtol=1e-4, err_msg=column)
    np.testing.assert_allclose(np.stack(with_neighbours.embedding), np.stack(good.embedding), rtol=0, atol=1e-6)
    # What is cut is an error, or lacks nothing of its picture.
    names = list(files)
    whole = {names[int(key.rpartition("-")[2])]: one for key, one in zip(good.key, good.embedding, strict=True)}
    bad["mutation"] = [known[key].mutation for key in bad.key]
    bad["source"] = [known[key].source for key in bad.key]
    cut = bad[bad.mutation.str.startswith("truncate") & (bad.status == "ok")]
    for row in cut[cut.source.isin(list(whole))].itertuples():
        np.testing.assert_allclose(
            row.embedding, whole[row.source], rtol=0, atol=1e-6, err_msg=f"{row.key} {row.source}"
        )
    return bad


def fuzz(
    folder: Path,
    count: int,
    seed: int,
    timeout: float,
    monkeypatch: pytest.MonkeyPatch,
    record: Callable[[str, object], None],
) -> pd.DataFrame:
    print(f"seed {seed}, {count} mutations in {folder}")
    files = sources(monkeypatch)
    known = write_tars(folder, files, count, seed)
    reports = score(folder, timeout)
    bad = check(folder, files, known)
    base = max(r["peak"] for r in reports if r["tar"].startswith("good"))
    peak = max(r["peak"] for r in reports)
    seconds = sum(r["seconds"] for r in reports if r["tar"].startswith("all"))
    record("seed", seed)
    record("statuses", json.dumps(Counter(bad.status)))
    record("peak_bytes", 1024 * peak)
    print(f"{dict(Counter(bad.status))}, {seconds:.0f} s, peak {peak >> 10} MB (good files alone: {base >> 10} MB)")
    print(bad.groupby(["mutation", "status"]).size().unstack(fill_value=0))
    assert 1024 * (peak - base) < MEMORY
    return bad


def test_two_hundred_mutations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    bad = fuzz(tmp_path, 200, 20_261_101, 240, monkeypatch, record_property)
    assert len(bad) == 200
    # The damage is of all kinds: some of it is harmless, most of it is not.
    statuses = Counter(bad.status)
    assert statuses["ok"] >= 20
    assert statuses["decode_error"] >= 60
    assert set(bad.status[bad.mutation == "empty"]) == {"decode_error"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_thousands_of_mutations(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    bad = fuzz(tmp_path, 6000, seed, 3000, monkeypatch, record_property)
    assert set(bad.status) == {"ok", "decode_error", "too_large"}


if __name__ == "__main__":
    child(Path(sys.argv[1]))
