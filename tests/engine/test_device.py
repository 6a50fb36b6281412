"""Memory that runs out: batches are halved and the run goes on; settings of the workers' memory."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.engine.device import Graphed, graphs_problem, is_out_of_memory, release, to_device
from dask_imgcurator.images.decoder import Batch, Decoder
from dask_imgcurator.images.preprocess import Preprocess
from dask_imgcurator.models import ModelError
from dask_imgcurator.models.encoders import Encoder, EncoderSpec
from dask_imgcurator.steps.embed import EmbedSpec, embed_partition
from dask_imgcurator.steps.read import ReadSpec, index_partition

PREPROCESS = Preprocess((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),  # cuDF
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        # RMM's, as it comes through torch
        RuntimeError(
            "std::bad_alloc: out_of_memory: RMM failure at:pool_memory_resource.hpp: Maximum pool size exceeded"
        ),
        RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"),  # DALI
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_says_that_memory_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        OSError(28, "No space left on device"),
    ],
    ids=str,
)
def test_what_does_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_what_lies_under_another_error() -> None:
    """As the recording of a CUDA graph leaves it."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as err:
        assert is_out_of_memory(err)


def test_torchs_own_allocator_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


class Small:
    """A forward pass that has memory for so many images; it notes the sizes that it was given."""

    def __init__(self, fits: int) -> None:
        self.fits, self.sizes = fits, list[int]()

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(pixels))
        if len(pixels) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        # The four quarters' sums: another vector for each picture.
        return pixels.unfold(2, 4, 4).unfold(3, 4, 4).sum((1, 4, 5)).flatten(1)


def make_encoder(forward: Callable[[torch.Tensor], torch.Tensor]) -> Encoder:
    return Encoder(EncoderSpec("small", dtype="float32"), forward, PREPROCESS, 4, "cpu", {})


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (
            16,
            {
                1: [1],
                2: [2],
                3: [2, 1],
                5: [4, 1],
                7: [8],
                15: [16],
                16: [16],
                23: [16, 8],
                24: [16, 8],
                37: [16, 16, 4, 1],
            },
        ),
        (512, {600: [512, 64, 16, 8], 448: [512], 447: [256, 128, 64], 1000: [512, 512], 88: [64, 16, 8]}),
        (5, {3: [2, 1], 4: [4], 9: [5, 4], 12: [5, 5, 2]}),
    ],
)
def test_the_rest_of_a_partition_is_encoded_in_powers_of_two(batch_size: int, expected: dict[int, list[int]]) -> None:
    """By hand: at most an eighth of a pass is padding, and each image gets its own embedding."""
    for count, sizes in expected.items():
        forward = Small(batch_size)
        pixels = torch.randn((count, 3, 8, 8), generator=torch.manual_seed(count))
        found = make_encoder(forward).encode(pixels, batch_size)
        assert forward.sizes == sizes, count
        one_by_one = torch.cat([make_encoder(Small(1)).encode(p[None], 1) for p in pixels])
        torch.testing.assert_close(found, one_by_one)


@pytest.mark.parametrize("count", [9, 16, 21])
def test_batches_are_halved_until_they_fit_and_stay_so(count: int) -> None:
    forward = Small(3)
    encoder = make_encoder(forward)
    pixels = torch.randn((count, 3, 8, 8), generator=torch.manual_seed(count))
    with pytest.warns(UserWarning, match="out of memory") as said:
        found = encoder.encode(pixels, 16)
    first = 8 if count == 9 else 16
    tried = [size for size in (16, 8, 4) if size <= first]
    assert [str(w.message).rpartition(" ")[2] for w in said] == [str(size // 2) for size in tried]
    whole = make_encoder(Small(16)).encode(pixels, 16)
    torch.testing.assert_close(found, whole)
    assert forward.sizes == tried + [2] * (count // 2) + [1] * (count % 2)
    # The next batch begins with the size that was found.
    forward.sizes.clear()
    encoder.encode(pixels[:3], 16)
    assert forward.sizes == [2, 1]


def test_a_size_below_what_fits_is_kept() -> None:
    forward = Small(3)
    encoder = make_encoder(forward)
    with pytest.warns(UserWarning, match="out of memory"):
        encoder.encode(torch.ones((4, 3, 8, 8)), 4)
    forward.sizes.clear()
    encoder.encode(torch.ones((1, 3, 8, 8)), 1)
    assert forward.sizes == [1]


def test_not_even_one_image() -> None:
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(ModelError, match="not even with one image"):
        make_encoder(Small(0)).encode(torch.ones((2, 3, 8, 8)), 2)


def test_other_errors_are_not_taken_for_it() -> None:
    def broken(pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        make_encoder(broken).encode(torch.ones((2, 3, 8, 8)), 2)


def test_nothing_to_encode() -> None:
    assert make_encoder(Small(1)).encode(torch.empty((0, 3, 8, 8)), 4).shape == (0, 4)


# --- a whole partition ----------------------------------------------------------------------------


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """Eleven pictures, the fourth of which is damaged."""
    path = tmp_path / "00000.tar"
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(11):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(buffer, "PNG")
            data = b"no picture" if i == 3 else buffer.getvalue()
            info = tarfile.TarInfo(f"{i:03}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


class Narrow:
    """A decoder with memory for so many images at a time."""

    def __init__(self, fits: int) -> None:
        self.fits, self.inner = fits, Decoder(PREPROCESS, 8, dali_device=None)
        self.sizes: list[int] = []

    def __call__(self, blobs: Any) -> Batch:
        self.sizes.append(len(blobs))
        if len(blobs) > self.fits:
            raise RuntimeError("CUDA out of memory")
        return self.inner(blobs)


def embed(
    monkeypatch: pytest.MonkeyPatch, shard: str, forward: Small, decoders: list[Any] | None = None
) -> list[list[float] | None]:
    encoder = make_encoder(forward)
    monkeypatch.setattr("dask_imgcurator.steps.embed.load_encoder", lambda *_: encoder)
    if decoders is not None:
        free: SimpleQueue[Any] = SimpleQueue()
        deque(map(free.put, decoders), maxlen=0)

        @contextlib.contextmanager
        def lend(*_: Any) -> Iterator[Any]:
            decoder = free.get()
            yield decoder
            free.put(decoder)

        monkeypatch.setattr("dask_imgcurator.steps.stream._lend_decoder", lend)
        monkeypatch.setattr("dask_imgcurator.engine.pandas.PandasBackend.decoders", len(decoders))
    spec = EmbedSpec(EncoderSpec("small", dtype="float32"), batch_size=8, decoder="pillow")
    out = embed_partition(index_partition([shard], ReadSpec()), spec)
    assert (out["status"] == "ok").tolist() == [i != 3 for i in range(11)]
    return list(get_backend("pandas").to_arrow(out)["embedding"].to_pylist())


def check_same(found: list[list[float] | None], expected: list[list[float] | None]) -> None:
    assert [f is None for f in found] == [i == 3 for i in range(11)]
    assert len({tuple(e) for e in expected if e is not None}) == 10  # a swapped row would be seen
    for f, e in zip(found, expected, strict=True):
        if e is not None:
            np.testing.assert_allclose(f, e, atol=1e-6)


def test_a_partition_goes_on_where_the_encoder_runs_out(monkeypatch: pytest.MonkeyPatch, shard: str) -> None:
    expected = embed(monkeypatch, shard, Small(8))
    with pytest.warns(UserWarning, match="continuing with 4"):
        found = embed(monkeypatch, shard, Small(5))
    check_same(found, expected)


@pytest.mark.parametrize("fits", [8, 3, 1])
@pytest.mark.parametrize("count", [1, 3])
def test_a_partition_goes_on_where_the_decoder_runs_out(
    monkeypatch: pytest.MonkeyPatch, shard: str, fits: int, count: int
) -> None:
    """And with several decoders at work, every row still gets its own embedding."""
    expected = embed(monkeypatch, shard, Small(8))
    decoders = [Narrow(fits) for _ in range(count)]
    check_same(embed(monkeypatch, shard, Small(8), decoders), expected)
    tried = [size for decoder in decoders for size in decoder.sizes]
    assert (max(tried) > fits) == (fits < 8)
    assert sum(size for size in tried if size <= fits) == 11


# --- without a card -------------------------------------------------------------------------------


def test_a_cpu_has_no_graphs_and_copies_nothing() -> None:
    assert "no CUDA graphs" in str(graphs_problem("cpu"))
    tensor = torch.ones(3)
    assert to_device(tensor, "cpu") is tensor
    release("cpu")


# --- on a card ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_graph_gives_what_the_model_gives() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten(), torch.nn.Linear(32, 4)).cuda().eval()
    graphed = Graphed(model)
    with torch.inference_mode():
        for count in (2, 4, 4, 2, 1, 4, 8, 4):
            pixels = torch.randn((count, 3, 8, 8), device="cuda")
            torch.testing.assert_close(graphed(pixels), model(pixels))


@pytest.mark.gpu
def test_a_real_limit_of_memory_is_met_by_smaller_batches() -> None:
    """torch may take a small part of the card: one batch does not fit, halves of it do."""
    layer = torch.nn.Linear(3 * 8 * 8, 4).cuda().eval()

    def hungry(pixels: torch.Tensor) -> torch.Tensor:
        torch.empty((len(pixels), 32 << 20), dtype=torch.uint8, device="cuda")  # 32 MiB an image
        return layer(pixels.flatten(1))

    encoder = Encoder(EncoderSpec("hungry", dtype="float32"), hungry, PREPROCESS, 4, "cuda", {})
    pixels = torch.randn((64, 3, 8, 8), device="cuda")
    expected = torch.nn.functional.normalize(layer(pixels.flatten(1)), dim=-1).detach()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (1 << 30)) / total)
    try:
        with pytest.warns(UserWarning, match="out of memory"):
            found = encoder.encode(pixels, 64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found, expected)
