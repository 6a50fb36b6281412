"""Images of rows: read, hashed and decoded ahead of the encoder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..engine.backend import Backend
from ..engine.cache import cache
from ..engine.device import default_batch, is_out_of_memory, release
from ..images.dali import dali_problem
from ..images.decoder import Batch, Decoder
from ..images.formats import BadImage
from ..images.isolated import IsolatedDecoder
from ..images.preprocess import Preprocess
from ..storage.tar_index import explain
from ..storage.tar_read import read_extents

if TYPE_CHECKING:
    from .embed import EmbedSpec

T = TypeVar("T")

#: One core hashes about as many 2-megapixel images as one GPU encodes.
_HASHERS = 4


@dataclass(frozen=True)
class Piece:
    """A batch of images before decoding: row numbers, bytes (or why there are none), sha256."""

    numbers: list[int]
    data: list[bytes | BadImage]
    digests: list[str | None]


@dataclass(frozen=True)
class Decoded:
    """A batch of images ready for the encoder."""

    numbers: list[int]
    digests: list[str | None]
    batch: Batch


def stream_images(
    locators: Mapping[str, list[Any]], todo: list[int], spec: EmbedSpec, preprocess: Preprocess, backend: Backend
) -> Iterator[Decoded]:
    """Yield the images of the rows `todo` in batches, reading and decoding the next ones meanwhile."""
    lend = functools.partial(_lend_decoder, spec, preprocess, backend, batch_size_of(spec, backend))
    pieces = _ahead(_read(locators, todo, batch_size_of(spec, backend), spec))
    if spec.isolate:
        with lend() as decoder:
            yield from _decoded(pieces, lambda: contextlib.nullcontext(decoder), 1, backend.device)
    else:
        yield from _decoded(pieces, lend, backend.decoders, backend.device)


def batch_size_of(spec: EmbedSpec, backend: Backend) -> int:
    """Images per forward pass."""
    return spec.batch_size or default_batch(backend.device)


def _read(locators: Mapping[str, list[Any]], todo: list[int], batch_size: int, spec: EmbedSpec) -> Iterator[Piece]:
    """Read and hash batch by batch."""
    blobs = _blobs(locators, todo, spec)
    with ThreadPoolExecutor(_HASHERS, thread_name_prefix="hash") as pool:
        for start in range(0, len(todo), batch_size):
            numbers = todo[start : start + batch_size]
            data = [next(blobs) for _ in numbers]
            share = -(-len(data) // _HASHERS)  # handing them over one by one costs half as much as hashing
            parts = [data[i : i + share] for i in range(0, len(data), share)]
            yield Piece(numbers, data, [digest for part in pool.map(_digests, parts) for digest in part])


def _digests(data: Sequence[bytes | BadImage]) -> list[str | None]:
    return [_digest(one) for one in data]


def _digest(data: bytes | BadImage) -> str | None:
    return None if isinstance(data, BadImage) else hashlib.sha256(data).hexdigest()


def _blobs(locators: Mapping[str, list[Any]], todo: list[int], spec: EmbedSpec) -> Iterator[bytes | BadImage]:
    """Yield each image's bytes, shard by shard; `BadImage` for those that cannot be read."""
    by_shard: dict[str, list[int]] = {}
    for i in todo:
        by_shard.setdefault(locators["shard"][i], []).append(i)
    for url, numbers in by_shard.items():
        extents = [(locators["offset"][i], locators["nbytes"][i]) for i in numbers]
        done = 0
        pieces = read_extents(url, extents, spec.storage_options, _is_mostly_wanted(extents))
        try:
            for data, (offset, nbytes) in zip(pieces, extents, strict=True):
                done += 1
                if len(data) < nbytes:
                    yield BadImage("read_error", f"{url} ends inside this image (byte {offset + len(data):,})")
                else:
                    yield data
        except OSError as err:
            if spec.strict:
                raise
            for _ in numbers[done:]:
                yield BadImage("read_error", explain(url, err))


def _is_mostly_wanted(extents: Sequence[tuple[int, int]]) -> bool:
    # For part of a shard (a filtered frame), ranges are cheaper than the whole.
    return 2 * sum(nbytes for _, nbytes in extents) >= max(offset + nbytes for offset, nbytes in extents)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Produce the next item in a second thread while the caller works on this one."""
    done: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        future = pool.submit(next, items, done)
        while (item := future.result()) is not done:
            future = pool.submit(next, items, done)
            yield item


def begun(items: Iterator[T]) -> Iterator[T]:
    """Make the first item now."""
    return chain(list(islice(items, 1)), items)


def _decoded(
    pieces: Iterator[Piece], lend: Callable[[], AbstractContextManager[Any]], threads: int, device: str
) -> Iterator[Decoded]:
    """Decode ahead of the caller, in some threads, and yield in order."""

    def decode(piece: Piece) -> tuple[Piece, list[Batch]]:
        with lend() as decoder:
            return piece, _decode_in_parts(decoder, piece.data, device)

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        running = deque(pool.submit(decode, piece) for piece in islice(pieces, threads))
        while running:
            piece, batches = running.popleft().result()
            running.extend(pool.submit(decode, piece) for piece in islice(pieces, 1))
            start = 0
            for batch in batches:
                end = start + len(batch.infos)
                yield Decoded(piece.numbers[start:end], piece.digests[start:end], batch)
                start = end


def _decode_in_parts(decoder: Any, data: Sequence[bytes | BadImage], device: str) -> list[Batch]:
    """Decode a batch, in halves if memory runs out."""
    try:
        return [decoder(data)]
    except Exception as err:
        if len(data) == 1 or not is_out_of_memory(err):
            raise
    release(device)
    middle = len(data) // 2
    return [batch for half in (data[:middle], data[middle:]) for batch in _decode_in_parts(decoder, half, device)]


@contextlib.contextmanager
def _lend_decoder(
    spec: EmbedSpec, preprocess: Preprocess, backend: Backend, batch_size: int
) -> Iterator[Decoder | IsolatedDecoder]:
    """Lend one of this process's decoders: building a pipeline takes longer than a small partition."""
    import torch

    kind = settle_decoder(spec.decoder, backend.decoder_device)
    options: dict[str, Any] = {
        "device": backend.device,
        "dali_device": backend.decoder_device if kind == "dali" else None,
        "threads": torch.get_num_threads(),
        "max_pixels": spec.max_pixels,
        "adjust_orientation": spec.adjust_orientation,
        "scale_high_bit_depth": spec.scale_high_bit_depth,
        "views": spec.measures,
    }
    if spec.isolate:
        isolated = IsolatedDecoder(preprocess, batch_size, **options)
        try:
            yield isolated
        finally:
            isolated.close()
        return
    key = (preprocess, batch_size, *options.values())
    # The partitions of a GPU share its decoders, each of which takes much memory there.
    free: Any = contextlib.nullcontext()
    if backend.overlaps:
        free = cache.get("turn", "decoders", lambda: BoundedSemaphore(backend.decoders))
    with free, cache.lend("decoder", key, lambda: Decoder(preprocess, batch_size, **options)) as decoder:
        yield decoder


def settle_decoder(name: str, device: str) -> Literal["dali", "pillow"]:
    """Resolve ``auto``: DALI on a GPU, Pillow on a CPU; `device` is the backend's `decoder_device`."""
    # On a CPU both take equally long (mostly libjpeg and resizing); Pillow's pixels are bit-identical to open_clip's,
    # and no native pipeline can crash the process.
    if name not in ("auto", "dali", "pillow"):
        raise ValueError(f"unknown decoder {name!r}: use auto, dali or pillow")
    if name == "pillow" or (name == "auto" and device == "cpu"):
        return "pillow"
    problem = dali_problem()
    if problem and name == "dali":
        raise RuntimeError(problem)
    return "pillow" if problem else "dali"
