"""What only a card can show: cuDF in and out, nothing through the host, and the CPU's results.

Collected everywhere, run where there is a card (``REQUIRE_GPU=1`` makes its absence a failure).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pyarrow as pa
import pytest
import torch

import dask_imgcurator as dic
from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.engine.cache import cache
from dask_imgcurator.images.dali import dali_problem
from dask_imgcurator.images.decoder import Decoder
from dask_imgcurator.images.formats import BadImage
from dask_imgcurator.images.pillow import ImageInfo
from dask_imgcurator.images.preprocess import Preprocess
from dask_imgcurator.models.encoders import EncoderSpec, load_encoder, resolve_encoder
from dask_imgcurator.models.heads import HEADS, load_head
from dask_imgcurator.steps.embed import _LOCATORS, EmbedSpec, embed_partition
from dask_imgcurator.steps.heads import HeadUse, score_partition
from dask_imgcurator.steps.read import ReadSpec, index_partition
from dask_imgcurator.steps.stream import _blobs

pytestmark = pytest.mark.gpu

COUNT = 96
STARTER = EncoderSpec("starter", dtype="float32")
PREPROCESS = Preprocess((224, 224), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two shards of sample pictures, bad ones among them."""
    from dask_imgcurator.checks.samples import make_sample_shards

    made = make_sample_shards(tmp_path_factory.mktemp("samples"), count=COUNT, per_shard=COUNT // 2)
    return [str(path) for path in made.shards]


def table(frame: Any) -> pa.Table:
    """A computed frame of either backend."""
    return get_backend(type(frame).__module__.partition(".")[0]).to_arrow(frame)


def scored(urls: list[str], backend: str, dtype: str = "float32") -> pa.Table:
    """Rows of the whole pipeline on one backend, by the partition functions."""
    frame = index_partition(urls, ReadSpec(backend=backend))
    frame = embed_partition(frame, EmbedSpec(EncoderSpec("starter", dtype=dtype), batch_size=16))
    for kind in ("aesthetic", "nsfw"):
        frame = score_partition(frame, HeadUse(kind, f"{kind}-starter"))
    return table(frame)


@pytest.fixture(scope="module")
def both(urls: list[str]) -> tuple[pa.Table, pa.Table]:
    return scored(urls, "pandas"), scored(urls, "cudf")


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.drop_null().to_pylist(), np.float64)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# --- cuDF in, cuDF out ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["asked for", "Dask's own setting", "auto"])
def test_reading_gives_cudf(urls: list[str], how: str) -> None:
    import cudf
    import dask_cudf

    settings = {"dataframe.backend": "cudf"} if how == "Dask's own setting" else {}
    with dask.config.set(settings):
        df = dic.read_webdataset(urls, backend="cudf" if how == "asked for" else None)
    assert isinstance(df, dask_cudf.DataFrame)
    assert isinstance(df._meta, cudf.DataFrame)
    part = df.partitions[1].compute()
    assert isinstance(part, cudf.DataFrame)
    assert list(part.dtypes) == list(df._meta.dtypes)
    assert table(part).equals(table(index_partition([urls[1]], ReadSpec(backend="pandas"))))


def test_every_step_keeps_cudf_and_does_as_the_cpu(urls: list[str], tmp_path: Path) -> None:
    import cudf

    written = {}
    for backend in ("pandas", "cudf"):
        df = dic.read_webdataset(urls, backend=backend)
        df = dic.embed(df, model="starter", batch_size=16)
        df = dic.score_nsfw(dic.score_aesthetic(df, head="aesthetic-starter"), head="nsfw-starter")
        assert type(df._meta).__module__.startswith(backend)
        df = df[(df["width"] >= 200) & (df["status"] == "ok")]
        dic.to_webdataset(df, tmp_path / backend, max_count=20)
        written[backend] = {p.name: p.read_bytes() for p in sorted((tmp_path / backend).glob("*.tar"))}
        part = df.partitions[0].compute()
        assert isinstance(part, cudf.DataFrame) == (backend == "cudf")
    assert len(written["pandas"]) > 1
    assert written["cudf"] == written["pandas"]
    scores = dic.read_scores(tmp_path / "cudf", backend="cudf").compute()
    assert isinstance(scores, cudf.DataFrame)
    assert len(scores) == len(dic.read_scores(tmp_path / "pandas", backend="pandas"))


# --- nothing through the host ---------------------------------------------------------------------


def copied_to_host(work: Callable[[], Any], folder: Path) -> int:
    """Bytes that the card's driver copied to the host meanwhile, whichever library asked for it (by CUPTI)."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    path = folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and "DtoH" in e["name"]]
    return sum(int(e["args"]["bytes"]) for e in copies)


def test_the_counter_counts(tmp_path: Path) -> None:
    import cudf

    tensor = torch.ones(1 << 20, device="cuda")
    assert 4 << 20 <= copied_to_host(tensor.cpu, tmp_path) < 5 << 20
    column = cudf.Series(range(1 << 18))
    assert 2 << 20 <= copied_to_host(column.to_arrow, tmp_path) < 3 << 20


def test_pixels_embeddings_and_scores_stay_on_the_card(urls: list[str], tmp_path: Path) -> None:
    frame = index_partition(urls, ReadSpec(backend="cudf"))
    spec = EmbedSpec(STARTER, batch_size=16)
    embed_partition(frame, spec)  # loads the model and builds the pipelines

    def work() -> None:
        embedded = embed_partition(frame, spec)
        score_partition(
            score_partition(embedded, HeadUse("aesthetic", "aesthetic-starter")), HeadUse("nsfw", "nsfw-starter")
        )

    # Where the images lie is asked of the card before anything is decoded.
    locators = copied_to_host(lambda: get_backend("cudf").to_host(frame, _LOCATORS), tmp_path)
    copied = copied_to_host(work, tmp_path) - locators
    embeddings, pixels = COUNT * 512 * 4, COUNT * 3 * 224 * 224 * 4
    # Row numbers and counts are left: tens of bytes a row, where its embedding alone has 2,048.
    assert copied < 64 * COUNT + 8192 < embeddings / 8 < pixels / 8


# --- decoding -------------------------------------------------------------------------------------


def jpegs(urls: list[str]) -> list[bytes]:
    rows = index_partition(urls, ReadSpec(backend="pandas"))
    host = {name: rows[name].tolist() for name in ("shard", "offset", "nbytes", "status")}
    return [b for b in _blobs(host, [i for i, s in enumerate(host["status"]) if s == "ok"], {}) if isinstance(b, bytes)]


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("upright", [False, True])
def test_pixels_are_pillows(urls: list[str], mode: str, upright: bool, record_property: Any) -> None:
    """An image that is off by one pixel differs by 3.5 of 255 in the mean; other roundings of a JPEG by 0.2."""
    assert dali_problem() is None
    blobs = jpegs(urls)
    preprocess = Preprocess((224, 224), PREPROCESS.mean, PREPROCESS.std, resize_mode=mode)
    options: dict[str, Any] = {"max_pixels": 10**8, "adjust_orientation": upright}
    card = Decoder(preprocess, len(blobs), "cuda", "mixed", 4, **options)(blobs)
    pillow = Decoder(preprocess, len(blobs), "cpu", None, 4, **options)(blobs)
    assert card.pixels.device.type == "cuda"
    assert card.good == pillow.good
    assert sum(isinstance(i, ImageInfo) and i.decoder == "dali" for i in card.infos) > len(blobs) / 2
    std = torch.tensor(preprocess.std).view(3, 1, 1)
    difference = ((card.pixels.cpu() - pillow.pixels) * std * 255).abs()
    record_property("largest", float(difference.max()))
    record_property("mean", float(difference.mean()))
    assert float(difference.mean((1, 2, 3)).max()) < 1.5
    assert float(difference.mean()) < 0.5


def test_bad_images_are_those_of_the_cpu(urls: list[str], both: tuple[pa.Table, pa.Table]) -> None:
    cpu, gpu = both
    assert set(cpu["status"].to_pylist()) > {"ok"}
    for name in ("key", "shard", "status", "error_message", "width", "height", "sha256", "offset"):
        assert gpu[name].to_pylist() == cpu[name].to_pylist(), name
    for name in ("embedding", "aesthetic_score", "nsfw_score"):
        assert gpu[name].is_null().to_pylist() == cpu[name].is_null().to_pylist()


def test_an_image_that_nvjpeg_refuses_costs_itself_only(urls: list[str]) -> None:
    good = [b for b in jpegs(urls) if b[:2] == b"\xff\xd8"][:7]
    # Its header is whole and its end is there, so that only a decoder finds out: a Huffman table of nothing.
    broken = bytearray(good[3])
    at = broken.find(b"\xff\xc4")
    broken[at + 5 : at + 21] = b"\xff" * 16
    batch = Decoder(PREPROCESS, 8, "cuda", "mixed", 2)([*good[:4], bytes(broken), *good[4:]])
    alone = [Decoder(PREPROCESS, 8, "cuda", "mixed", 2)([b]) for b in good]
    assert isinstance(batch.infos[4], BadImage)
    assert batch.good == [0, 1, 2, 3, 5, 6, 7]
    for place, one in zip(batch.good, alone, strict=True):
        torch.testing.assert_close(batch.pixels[place], one.pixels[0])


def test_batches_in_flight_do_not_write_over_each_other(urls: list[str]) -> None:
    """The decoder does not wait for the card: the pixels of each batch must be its own all the same."""
    good = [b for b in jpegs(urls) if b[:2] == b"\xff\xd8"]
    decoder = Decoder(PREPROCESS, 8, "cuda", "mixed", 2)
    chunks = [good[i : i + 8] for i in range(0, len(good), 8)] * 3
    ballast = torch.randn((4096, 4096), device="cuda")
    batches = []
    for chunk in chunks:
        for _ in range(4):  # keeps the stream busy, so that copies wait in the queue
            ballast = torch.tanh(ballast @ ballast)
        batches.append(decoder(chunk))
    for chunk, batch in zip(chunks, batches, strict=True):
        torch.testing.assert_close(batch.pixels, Decoder(PREPROCESS, 8, "cuda", "mixed", 2)(chunk).pixels)


def test_pipelines_are_kept_for_the_next_partition(urls: list[str]) -> None:
    frame = index_partition(urls, ReadSpec(backend="cudf"))
    spec = EmbedSpec(STARTER, batch_size=24)

    def lent() -> set[int]:
        return {id(d) for key, free in cache.kept("decoder").items() if key[1] == 24 for d in free}

    embed_partition(frame, spec)
    first = lent()
    embed_partition(frame.iloc[::2], spec)
    assert 1 <= len(first) <= get_backend("cudf").decoders
    assert lent() == first


# --- the CPU's results ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99999), ("bfloat16", 0.9995), ("float16", 0.9995)])
@pytest.mark.parametrize("model", ["ViT-B-32", "starter"])
def test_embeddings_of_the_same_pixels(model: str, dtype: str, least: float, record_property: Any) -> None:
    """float32 on the CPU is the reference."""
    pretrained = None if model == "starter" else "random:0"
    reference = load_encoder(resolve_encoder(model, pretrained, "float32"), "cpu")
    encoder = load_encoder(resolve_encoder(model, pretrained, dtype), "cuda")
    pixels = torch.rand((8, 3, 1, 1), generator=torch.manual_seed(0)) + torch.randn((8, 3, 224, 224)) / 2
    found = encoder(pixels).cpu().double()
    expected = reference(pixels).double()
    cosine = torch.nn.functional.cosine_similarity(found, expected)
    record_property("least cosine", float(cosine.min()))
    assert float(cosine.min()) >= least


def test_whole_pipeline_agrees(both: tuple[pa.Table, pa.Table], record_property: Any) -> None:
    cpu, gpu = both
    cosine = cosines(matrix(cpu["embedding"]), matrix(gpu["embedding"]))
    record_property("least cosine", float(cosine.min()))
    assert cosine.min() >= 0.9995
    # The default thresholds: whoever changes sides stands at the edge.
    for name, threshold in (("aesthetic_score", 5.0), ("nsfw_score", 0.5)):
        a, b = (np.array(t[name].drop_null().to_pylist()) for t in both)
        changed = (a >= threshold) != (b >= threshold)
        record_property(f"{name} changed", int(changed.sum()))
        assert np.abs(a[changed] - threshold).max(initial=0) < 0.02
        assert changed.sum() <= 2
        assert len(set(a >= threshold)) == 2 or name == "nsfw_score"


@pytest.mark.parametrize("name", ["aesthetic-starter", "nsfw-starter"])
def test_heads_agree(name: str) -> None:
    check_head(name, None)


@pytest.mark.parametrize("name", ["aesthetic-v2-l14", "aesthetic-v1-b32", "nsfw-l14", "nsfw-b32"])
def test_published_heads_agree(shared: Path, name: str) -> None:
    check_head(name, str(shared / "weights"))


def check_head(name: str, folder: str | None) -> None:
    x = torch.randn((1000, HEADS[name].width), generator=torch.manual_seed(0))
    x /= x.norm(dim=1, keepdim=True)
    for round_to in ("float16", None):
        cpu = load_head(HEADS[name], folder, "cpu", round_to)(x)
        gpu = load_head(HEADS[name], folder, "cuda", round_to)(x.cuda())
        assert gpu.device.type == "cuda"
        np.testing.assert_allclose(gpu.cpu().numpy(), cpu.numpy(), rtol=0, atol=1e-6)


# --- workers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with dic.start_client(backend="cudf") as client:
        yield client


def about_the_worker() -> dict[str, Any]:
    import cudf
    import rmm

    torch.empty(1, device="cuda")
    return {
        "pool": type(rmm.mr.get_current_device_resource()).__name__,
        "torch": torch.cuda.memory.get_allocator_backend(),
        "spill": cudf.get_option("spill"),
        "threads": torch.get_num_threads(),
        "cards": torch.cuda.device_count(),
    }


def test_a_worker_a_card_with_the_driver_s_pool(client: Any) -> None:
    from dask.system import CPU_COUNT

    found = list(client.run(about_the_worker).values())
    assert len(found) == torch.cuda.device_count()
    for one in found:
        assert one["pool"] == "CudaAsyncMemoryResource"
        assert one["torch"] == "native"
        assert one["spill"] is False
        assert one["threads"] == max(1, CPU_COUNT // len(found))
    assert list(client.nthreads().values()) == [1] * len(found)


def test_a_job_on_workers(client: Any, urls: list[str], tmp_path: Path, both: tuple[pa.Table, pa.Table]) -> None:
    result = dic.curate(urls, tmp_path / "run", model="starter", backend="cudf", client=client)
    assert result.samples == COUNT
    scores = dic.read_scores(tmp_path / "run" / "scores", backend="pandas").compute()
    keys = dict(zip(both[1]["key"].to_pylist(), both[1]["aesthetic_score"].to_pylist(), strict=True))
    for key, found in zip(scores["key"], scores["aesthetic_score"], strict=True):
        expected = keys[key]
        assert (expected is None) == (found is None or np.isnan(found))
        if expected is not None:
            assert found == pytest.approx(expected, abs=1e-3)
