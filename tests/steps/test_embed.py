"""`embed_partition` and `embed`: each row gets its own image's embedding, and a bad image costs itself only."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import open_clip
import pandas as pd
import pyarrow as pa
import pytest
import torch
from distributed import Client, LocalCluster
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import dask_imgcurator as dic
from dask_imgcurator.engine.pandas import PandasBackend
from dask_imgcurator.images.dali import dali_problem
from dask_imgcurator.images.decoder import Decoder
from dask_imgcurator.models.encoders import Encoder, resolve_encoder
from dask_imgcurator.steps.embed import EmbedSpec, embed_partition, embed_spec
from dask_imgcurator.steps.read import ReadSpec, index_partition

TINY = "dic-tiny-embed"
TINY_CONFIG = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
}
TOLERANCE = 1e-5


def encode(seed: int, format_: str = "JPEG") -> bytes:
    """A smooth picture of any shape, of its own colours."""
    rng = np.random.default_rng(seed)
    width, height = rng.integers(30, 200, 2)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * rng.uniform(0, 0.1) + y * rng.uniform(0, 0.1) + rng.uniform(0, 6)) for _ in range(3)]
    buffer = io.BytesIO()
    Image.fromarray((127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8)).save(buffer, format_)
    return buffer.getvalue()


@dataclass
class Shards:
    """Shards with the truth about them: bytes and lone embedding by key, and the status that a row must get."""

    urls: list[str]
    members: dict[str, bytes]
    embeddings: dict[str, np.ndarray]
    status: dict[str, str]


def write_tar(path: Path, samples: dict[str, tuple[str, bytes | None]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, (ext, data) in samples.items():
            for name, content in ((f"{key}.{ext}", data), (f"{key}.txt", f"caption of {key}".encode())):
                if content is not None:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def members_of(url: str) -> list[bytes]:
    with tarfile.open(url) as tar:
        return [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]


def samples_of(shard: int) -> dict[str, tuple[str, bytes | None, str]]:
    """Fourteen samples: nine good ones, and one of each kind of bad."""
    out: dict[str, tuple[str, bytes | None, str]] = {}
    for i in range(9):
        png = i % 4 == 3
        key = f"{shard}-{i:02}"
        out[key] = ("png" if png else "jpg", encode(100 * shard + i, "PNG" if png else "JPEG"), "ok")
    whole = encode(100 * shard + 50)
    wide = io.BytesIO()
    Image.new("RGB", (1200, 1000)).save(wide, "PNG")
    bad: list[tuple[str, bytes | None, str]] = [
        ("jpg", whole[: -len(whole) // 4], "decode_error"),
        ("jpg", b"", "decode_error"),
        ("webp", b"<html>not found</html>", "decode_error"),
        ("png", wide.getvalue(), "too_large"),
        ("jpg", None, "no_image"),
    ]
    for i, (ext, data, status) in enumerate(bad):
        out[f"{shard}-x{i}"] = (ext, data, status)
    keys = sorted(out, key=lambda key: hashlib.md5(key.encode()).hexdigest())  # bad ones among the good ones
    return {key: out[key] for key in keys}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> open_clip.CLIP:
    """The model of ``random:0``, made by open_clip alone."""
    path = tmp_path_factory.mktemp("configs") / f"{TINY}.json"
    path.write_text(json.dumps(TINY_CONFIG))
    open_clip.add_model_config(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(TINY, load_weights=False).eval()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model: open_clip.CLIP) -> Shards:
    folder = tmp_path_factory.mktemp("shards")
    transform = image_transform_v2(PreprocessCfg(size=64), is_train=False)
    shards = Shards([], {}, {}, {})
    for number in range(3):
        samples = samples_of(number)
        path = folder / f"{number:05}.tar"
        write_tar(path, {key: (ext, data) for key, (ext, data, _) in samples.items()})
        shards.urls.append(str(path))
        for key, (_, data, status) in samples.items():
            shards.status[key] = status
            if data is not None:
                shards.members[key] = data
            if status == "ok":
                assert data is not None
                with torch.inference_mode():
                    pixels = transform(Image.open(io.BytesIO(data)))
                    one = tiny_model.encode_image(pixels[None], normalize=True)
                shards.embeddings[key] = one[0].numpy()
    # Different enough that a swapped row would be seen.
    matrix = np.stack(list(shards.embeddings.values()))
    distances = np.linalg.norm(matrix[:, None] - matrix[None], axis=-1) + 9 * np.eye(len(matrix))
    assert distances.min() > 1000 * TOLERANCE
    return shards


@pytest.fixture(scope="session")
def spec(made: Shards) -> EmbedSpec:
    """Pillow decodes, so that pixels are open_clip's to the bit and embeddings can be compared closely."""
    encoder = resolve_encoder(TINY, "random:0", "float32")
    return EmbedSpec(encoder, batch_size=4, decoder="pillow", max_pixels=1_000_000)


@pytest.fixture
def frame(made: Shards) -> pd.DataFrame:
    return index_partition(made.urls, ReadSpec())


def check(out: pd.DataFrame, source: pd.DataFrame, made: Shards, column: str = "embedding") -> None:
    """Every row: its own embedding or none, its own hash and size, and what it had before."""
    assert out.index.equals(source.index)
    kept = [c for c in source.columns if c not in ("status", "error_message")]
    pd.testing.assert_frame_equal(out[kept], source[kept])
    for key, status, message, width, height, sha256, embedding in zip(
        out["key"],
        out["status"],
        out["error_message"],
        out["width"],
        out["height"],
        out["sha256"],
        out[column],
        strict=True,
    ):
        assert status == made.status[key]
        data = made.members.get(key)
        assert pd.isna(sha256) if data is None else sha256 == hashlib.sha256(data).hexdigest()
        if status == "ok":
            assert pd.isna(message)
            assert (width, height) == Image.open(io.BytesIO(data or b"")).size
            np.testing.assert_allclose(embedding, made.embeddings[key], rtol=0, atol=TOLERANCE)
        else:
            assert isinstance(message, str)
            assert message
            assert embedding is pd.NA or embedding is None
    assert out[column].dtype == pd.ArrowDtype(pa.list_(pa.float32()))


# --- each row its own embedding ---------------------------------------------------------------------

REARRANGED: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "as read": lambda f: f,
    "shuffled": lambda f: f.sample(frac=1, random_state=1),
    "backwards": lambda f: f.iloc[::-1],
    "every third": lambda f: f.iloc[1::3],
    "only the good": lambda f: f[f["ext"].isin(["jpg"]) & (f["nbytes"] > 1500)],
    "one row": lambda f: f.iloc[[7]],
    "repeated rows": lambda f: pd.concat([f, f.iloc[::2], f.iloc[:3]]).sample(frac=1, random_state=2),
    "duplicate labels": lambda f: f.sample(frac=1, random_state=3).set_axis([0, 1] * (len(f) // 2)),
    "labels from 1000": lambda f: f.set_axis(range(1000, 1000 + len(f))),
    "labels that are text": lambda f: f.set_axis(list(f["key"])).sample(frac=1, random_state=4),
}


@pytest.mark.parametrize("how", REARRANGED)
def test_each_row_gets_its_own_embedding(how: str, frame: pd.DataFrame, spec: EmbedSpec, made: Shards) -> None:
    source = REARRANGED[how](frame)
    assert len(source)
    before = source.copy()
    out = embed_partition(source, spec)
    check(out, source, made)
    pd.testing.assert_frame_equal(source, before)  # the caller's frame is not touched


@pytest.mark.parametrize("batch_size", [1, 3, 64, None])
def test_the_batch_size_changes_nothing(
    batch_size: int | None, frame: pd.DataFrame, spec: EmbedSpec, made: Shards
) -> None:
    source = frame.sample(frac=1, random_state=5)
    check(embed_partition(source, replace(spec, batch_size=batch_size)), source, made)


@pytest.mark.skipif(dali_problem() is not None, reason=str(dali_problem()))
def test_by_dali_each_row_is_nearest_to_its_own_image(frame: pd.DataFrame, spec: EmbedSpec, made: Shards) -> None:
    source = frame.sample(frac=1, random_state=6)
    out = embed_partition(source, replace(spec, decoder="dali"))
    assert [made.status[key] for key in out["key"]] == list(out["status"])
    good = out[out["status"] == "ok"]
    got = np.stack(list(good["embedding"]))
    keys = list(made.embeddings)
    cosine = got @ np.stack([made.embeddings[key] for key in keys]).T
    assert [keys[i] for i in cosine.argmax(1)] == list(good["key"])
    assert cosine.max(1).min() > 0.9999


@pytest.mark.parametrize("scale", [False, True])
def test_deep_images_say_what_became_of_them(spec: EmbedSpec, tmp_path: Path, scale: bool) -> None:
    x = np.mgrid[0:80, 0:90][1]
    deep = [Image.fromarray((300 + 500 * values).astype(np.uint16)) for values in (x, x[:, ::-1], x % 7)]
    files: dict[str, tuple[str, bytes | None]] = {"plain": ("png", encode(1, "PNG"))}
    for i, image in enumerate(deep):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files[f"deep{i}"] = ("png", buffer.getvalue())
    write_tar(tmp_path / "a.tar", files)
    with dask.config.set({"imgcurator.scale-high-bit-depth": scale}):
        settled = embed_spec(TINY, "random:0").scale_high_bit_depth
    frame = index_partition([str(tmp_path / "a.tar")], ReadSpec())
    frame["note"] = pd.array([None, None, "several images: png, jpg", None], dtype=frame["key"].dtype)
    done = embed_partition(frame, replace(spec, scale_high_bit_depth=settled))
    assert list(done["status"]) == ["ok"] * 4
    note = f"samples of more than 8 bits are {'scaled to 8 bits' if scale else 'clipped at 255'}: 16 bits"
    assert [None if pd.isna(n) else n for n in done["note"]] == [None, note, f"several images: png, jpg; {note}", note]
    assert len({tuple(vector) for vector in done["embedding"][1:]}) == (3 if scale else 1)


def test_a_column_of_another_name(frame: pd.DataFrame, spec: EmbedSpec, made: Shards) -> None:
    out = embed_partition(frame, replace(spec, column="clip"))
    assert "embedding" not in out.columns
    check(out, frame, made, "clip")


def test_embedding_twice_replaces(frame: pd.DataFrame, spec: EmbedSpec, made: Shards) -> None:
    once = embed_partition(frame, spec)
    twice = embed_partition(once, spec)
    assert list(twice.columns) == list(once.columns)
    good = once["status"] == "ok"
    check(twice[good], frame[good.to_numpy()], made)
    # What is not ok is not tried again, and keeps its reason.
    assert list(twice["error_message"]) == list(once["error_message"])


@pytest.mark.parametrize("how", ["pandas", "dask"])
def test_a_second_embedding_keeps_what_the_first_found_of_failed_rows(
    how: str, frame: pd.DataFrame, settings_of_spec: dask.config.set
) -> None:
    source = frame.assign(note=pd.array([f"row {i}" for i in range(len(frame))], dtype=frame["key"].dtype))
    with settings_of_spec:
        df = dd.from_pandas(source, npartitions=2, sort=False) if how == "dask" else source
        once = dic.embed(df, TINY, "random:0", dtype="float32")
        twice = dic.embed(once, TINY, "random:1", dtype="float32", column="other")
    once, twice = dask.compute(once, twice, scheduler="synchronous")
    failed = once["status"] != "ok"
    assert once.loc[failed, "sha256"].notna().any() and once.loc[failed, "width"].notna().any()
    for column in ("status", "error_message", "width", "height", "sha256", "note"):
        assert twice[column].equals(once[column]), column


def test_notes_come_through_dask(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.mgrid[0:80, 0:90][1].astype(np.uint16)).save(buffer, "PNG")
    write_tar(tmp_path / "a.tar", {"deep": ("png", buffer.getvalue())})
    df = dic.read_webdataset(str(tmp_path / "a.tar"), backend="pandas")
    df = df.assign(note="mine")
    (note,) = dic.embed(df, TINY, "random:0")["note"].compute(scheduler="synchronous")
    assert note.startswith("mine; samples of more than 8 bits are ")


# --- rows that fail ---------------------------------------------------------------------------------


def test_bad_rows_say_what_is_wrong_with_them(frame: pd.DataFrame, spec: EmbedSpec) -> None:
    out = embed_partition(frame, spec).set_index("key")
    rows = {name: out.loc[f"1-x{i}"] for i, name in enumerate(["cut", "empty", "html", "large", "none"])}
    assert "truncated JPEG" in rows["cut"].error_message
    assert rows["cut"].width > 0
    assert rows["empty"].error_message == "the file is empty (0 bytes)"
    assert rows["empty"].sha256 == hashlib.sha256(b"").hexdigest()
    assert "3c 68 74 6d 6c" in rows["html"].error_message
    assert pd.isna(rows["html"].width)
    assert (rows["large"].width, rows["large"].height) == (1200, 1000)
    assert "limit of 1,000,000" in rows["large"].error_message
    assert rows["none"].error_message == "no member with an image extension (found: txt)"


def test_rows_that_were_not_ok_keep_what_they_had(frame: pd.DataFrame, spec: EmbedSpec) -> None:
    source = frame.copy()
    given = {"no_image": "as I said", "read_error": "the disk", "my own status": "not mine to judge"}
    at = list(source.index[source["status"] == "ok"][: len(given)])
    for label, (status, message) in zip(at, given.items(), strict=True):
        source.loc[label, ["status", "error_message"]] = [status, message]
    out = embed_partition(source, spec).loc[at]
    assert dict(zip(out["status"], out["error_message"], strict=True)) == given
    assert out[["width", "height", "sha256", "embedding"]].isna().all(axis=None)


def copies(made: Shards, folder: Path) -> tuple[list[str], pd.DataFrame]:
    urls = []
    for url in made.urls:
        copy = folder / Path(url).name
        copy.write_bytes(Path(url).read_bytes())
        urls.append(str(copy))
    return urls, index_partition(urls, ReadSpec())


def test_a_shard_that_vanishes_after_it_was_indexed(made: Shards, spec: EmbedSpec, tmp_path: Path) -> None:
    urls, source = copies(made, tmp_path)
    Path(urls[1]).unlink()
    source = source.sample(frac=1, random_state=7)
    out = embed_partition(source, spec)
    lost = (out["shard"] == urls[1]).to_numpy()
    check(out[~lost], source[~lost], made)
    images = lost & (source["status"] == "ok").to_numpy()
    assert images.sum() > 9
    assert set(out[images]["status"]) == {"read_error"}
    assert out[images]["error_message"].str.contains("00001.tar", regex=False).all()
    assert out[images][["width", "height", "sha256", "embedding"]].isna().all(axis=None)
    assert set(out[lost & ~images]["status"]) == {"no_image"}


def test_a_shard_that_is_cut_after_it_was_indexed(made: Shards, spec: EmbedSpec, tmp_path: Path) -> None:
    urls, source = copies(made, tmp_path)
    end = (source["offset"] + source["nbytes"]).where(source["shard"] == urls[0])
    whole = source[(source["shard"] == urls[0]) & (source["nbytes"] > 1000)].sort_values("offset")
    middle = whole.iloc[len(whole) // 2]
    cut = int(middle["offset"]) + 100
    os.truncate(urls[0], cut)
    source = source.sample(frac=1, random_state=8)
    out = embed_partition(source, spec)
    lost = (end.loc[source.index] > cut).to_numpy() & (source["nbytes"] > 0).to_numpy()
    assert 3 < lost.sum() < 14
    assert set(out[lost]["status"]) == {"read_error"}
    assert out[lost]["error_message"].str.contains("ends inside this image", regex=False).all()
    assert out[lost][["width", "sha256", "embedding"]].isna().all(axis=None)
    behind = source["key"].isin(["0-x1", "0-x4"]).to_numpy()  # an empty member and none at all lie nowhere
    check(out[~lost & ~behind], source[~lost & ~behind], made)


def test_a_partition_of_nothing_but_bad_rows(frame: pd.DataFrame, spec: EmbedSpec, made: Shards) -> None:
    source = frame[[made.status[key] != "ok" for key in frame["key"]]]
    assert len(source) == 15
    check(embed_partition(source, spec), source, made)
    none = frame[frame["status"] == "no_image"]
    check(embed_partition(none, spec), none, made)


def test_an_empty_partition_has_the_same_columns(frame: pd.DataFrame, spec: EmbedSpec) -> None:
    full = embed_partition(frame, spec)
    empty = embed_partition(frame.iloc[:0], spec)
    assert len(empty) == 0
    pd.testing.assert_series_equal(empty.dtypes, full.dtypes)


def test_progress_counts_every_row_once(
    frame: pd.DataFrame, spec: EmbedSpec, made: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        "dask_imgcurator.steps.embed.log_event",
        lambda topic, counts: events.append((counts["rows"], counts["done"], counts["errors"])),
    )
    spec = replace(spec, topic="progress")
    embed_partition(frame, spec)
    assert events[-1] == (42, 42, sum(status != "ok" for status in made.status.values())) == (42, 42, 15)
    # The rows without an image at once, then batches of four.
    assert [done for _, done, _ in events] == [3, *(3 + 4 * i for i in range(1, 10)), 42]
    events.clear()
    embed_partition(frame.iloc[:0], spec)
    assert events == []


def test_an_interrupted_partition_leaves_the_next_one_whole(
    frame: pd.DataFrame, spec: EmbedSpec, made: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dask_imgcurator.steps.embed.log_event", stop)
        with pytest.raises(KeyboardInterrupt):
            embed_partition(frame, replace(spec, topic="progress"))
    check(embed_partition(frame, spec), frame, made)


# --- through Dask -----------------------------------------------------------------------------------


@pytest.fixture
def settings_of_spec() -> dask.config.set:
    return dask.config.set({"imgcurator.decoder": "pillow", "imgcurator.max-pixels": 1_000_000})


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_through_dask(scheduler: str, made: Shards, settings_of_spec: dask.config.set) -> None:
    with settings_of_spec:
        read = dic.read_webdataset(made.urls, backend="pandas")
        lazy = dic.embed(read, TINY, "random:0", dtype="float32", batch_size=3)
    # The configuration was taken when the graph was built: here it is another one again.
    out, source = dask.compute(lazy, read, scheduler=scheduler)
    check(out, source, made)
    assert list(lazy.columns) == list(out.columns)
    pd.testing.assert_series_equal(lazy.dtypes, out.dtypes)
    for part in lazy.partitions:
        pd.testing.assert_series_equal(part.compute(scheduler=scheduler).dtypes, lazy.dtypes)


@contextlib.contextmanager
def one_thread() -> Iterator[Client]:
    """A worker in this process, as a GPU has it."""
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def test_the_next_shard_is_decoded_while_one_is_in_the_encoder(
    made: Shards, settings_of_spec: dask.config.set, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card, in a worker of one thread: two shards at a time, and no more decoders for it."""
    owners = [(data, url) for url in made.urls for data in set(members_of(url))]
    times = Counter(data for data, _ in owners)
    shard_of = {data: url for data, url in owners if times[data] == 1}
    decoded: set[str] = set()
    at_work: list[int] = []
    second, during = Event(), []
    decode, encode = Decoder.__call__, Encoder.encode

    def decoding(self: Decoder, blobs: Any) -> Any:
        at_work.append(1)
        try:
            assert len(at_work) == 1, "two decoders"
            decoded.update(shard_of[blob] for blob in blobs if blob in shard_of)
            if len(decoded) > 1:
                second.set()
            return decode(self, blobs)
        finally:
            at_work.pop()

    def encoding(self: Encoder, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
        if not during:
            during.append(second.wait(20))
            time.sleep(0.3)  # in which a third could begin
            during.append(len(decoded) == 2)
        return encode(self, pixels, batch_size)

    monkeypatch.setattr(PandasBackend, "overlaps", True)
    monkeypatch.setattr(Decoder, "__call__", decoding)
    monkeypatch.setattr(Encoder, "encode", encoding)
    with settings_of_spec:
        read = dic.read_webdataset(made.urls, backend="pandas")
        lazy = dic.embed(read, TINY, "random:0", dtype="float32", batch_size=3)
    with one_thread() as client:
        out, source = client.compute([lazy, read], sync=True)
    assert during == [True, True]
    check(out, source, made)


def test_two_models_on_the_worker_of_a_gpu(
    made: Shards, settings_of_spec: dask.config.set, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task takes turns twice."""
    monkeypatch.setattr(PandasBackend, "overlaps", True)
    with settings_of_spec:
        read = dic.read_webdataset(made.urls, backend="pandas")
        both = dic.embed(dic.embed(read, "starter", column="other"), TINY, "random:0", dtype="float32")
    with one_thread() as client:
        out = client.compute(both.optimize(), sync=True)  # which fuses them
    pd.testing.assert_frame_equal(out, both.compute(scheduler="synchronous"))


def test_partitions_dropped_filtered_and_merged(made: Shards, settings_of_spec: dask.config.set) -> None:
    with settings_of_spec, dask.config.set(scheduler="synchronous"):
        read = dic.read_webdataset(made.urls, backend="pandas")
        for rearranged in (
            read.partitions[1:],
            read.partitions[[2, 0]],
            read[read["nbytes"] > 1000],
            read.repartition(npartitions=1),
            read.partitions[2].repartition(npartitions=1),
        ):
            source = rearranged.compute()
            assert len(source)
            out = dic.embed(rearranged, TINY, "random:0", dtype="float32", column="clip").compute()
            check(out, source, made, "clip")
        embedded = dic.embed(read, TINY, "random:0", dtype="float32")
        check(embedded.partitions[1:].compute(), read.partitions[1:].compute(), made)


def test_a_pandas_frame_goes_through_at_once(
    frame: pd.DataFrame, made: Shards, settings_of_spec: dask.config.set
) -> None:
    with settings_of_spec:
        out = dic.embed(frame, TINY, "random:0", dtype="float32")
    assert isinstance(out, pd.DataFrame)
    check(out, frame, made)


def test_building_the_graph_loads_no_model(made: Shards) -> None:
    code = f"""
    import resource, sys
    import dask_imgcurator as dic

    read = dic.read_webdataset({made.urls!r}, backend="pandas")
    started = dic.embed(read, "starter")
    assert "torch" not in sys.modules, "the starter's graph needs no torch"

    import open_clip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    large = dic.embed(read, "ViT-L-14", "random:0")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    from dask_imgcurator.engine.cache import cache
    assert not cache._kept["encoder"]
    assert large.npartitions == 3
    assert grown < 100_000, f"{{grown}} kB; the model has 1,700,000"
    print("done")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "done", "")


def test_a_frame_without_locators_is_told_what_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"embed needs the columns offset, nbytes.*read_webdataset"):
        dic.embed(pd.DataFrame({"shard": ["a"], "status": ["ok"], "error_message": [None]}), "starter")
