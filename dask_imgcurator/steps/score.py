"""One partition in, one partition out: index shards, embed images, apply heads. No Dask in here.

These are the functions under the public steps; tests and users' own pipelines may call them on any partition.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..engine.backend import backend_of, get_backend
from ..engine.device import is_out_of_memory, release
from ..images import quality
from ..images.decode import BadImage, Batch, Decoder, Preprocess, dali_problem
from ..images.isolated import IsolatedDecoder
from ..models import heads
from ..models.encoders import EncoderSpec, load_encoder
from ..schema import arrow_schema, columns_of
from ..storage import files, shards

__all__ = [
    "EmbedSpec",
    "HeadUse",
    "ReadSpec",
    "embed_partition",
    "index_partition",
    "peek_fields",
    "score_partition",
]

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

#: Arrow types that a user may give to a JSON field.
FIELD_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}

_JSON_TYPES = {int: "int64", float: "float64", bool: "bool"}

#: Shards that are looked at for the types of JSON fields, at most.
_PEEK_SHARDS = 8


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadSpec:
    """How a shard becomes rows.

    Attributes
    ----------
    backend : {"pandas", "cudf"}
        Of the frame.
    caption : str or None
        JSON field of the caption; None: the ``.txt`` member.
    fields : tuple of (str, str)
        Further JSON fields and their types (keys of `FIELD_TYPES`).
    storage_options : mapping
        For fsspec.
    image : tuple of str
        Extensions of the image member, the preferred one first; none: see `shards.Sample.image`.
    """

    backend: str = "pandas"
    caption: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    image: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the rows: chosen fields stand before ``status``."""
        names = [c.name for c in columns_of("read")]
        at = names.index("status")
        names[at:at] = [name for name, _ in self.fields]
        return arrow_schema(names, {name: FIELD_TYPES[type_] for name, type_ in self.fields})


def index_partition(urls: Sequence[str], spec: ReadSpec) -> Any:
    """Index shards into rows.

    Parameters
    ----------
    urls : sequence of str
        Tars, in order.
    spec : ReadSpec
        What to read of each sample.

    Returns
    -------
    frame
        One row a sample, in the tars' order; and one row with ``status = "read_error"`` for a tar that cannot be
        read to its
        end (its key is null where the damage lies in no sample).
    """
    rows: list[dict[str, Any]] = []
    for url in urls:
        rows.extend(_index_rows(url, spec))
    table = pa.Table.from_pylist(rows, schema=spec.schema)
    return get_backend(spec.backend).from_arrow(table)


def _index_rows(url: str, spec: ReadSpec) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(shards.hold_shard(url, spec.storage_options))
        except OSError as err:
            index = shards.ShardIndex([], shards.explain(url, err))
        else:
            index = shards.index_shard(url, spec.storage_options)
        if index.samples:
            file = stack.enter_context(shards.open_shard(url, spec.storage_options))
            for sample in index.samples:
                yield _row(url, sample, file, spec)
    if index.error is not None:
        blank: dict[str, Any] = {
            "shard": url,
            "offset": 0,
            "nbytes": 0,
            "sample_offset": 0,
            "sample_nbytes": 0,
        }
        if index.broken is not None:
            blank |= {"key": index.broken.key, "sample_offset": index.broken.offset}
        yield {**blank, "status": "read_error", "error_message": index.error}


def _row(url: str, sample: shards.Sample, file: IO[bytes], spec: ReadSpec) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": sample.key,
        "shard": url,
        "sample_offset": sample.offset,
        # Links alone are nothing that could be copied.
        "sample_nbytes": sample.end - sample.offset if sample.members else 0,
        "offset": 0,
        "nbytes": 0,
    }
    image = sample.image(spec.image)
    if image is None:
        row |= {"status": "no_image", "error_message": sample.why_no_image(spec.image)}
    elif image.pieces is not None:
        name = shards.as_utf8(image.name)
        problem = f"{name} is a sparse member, whose bytes do not lie in one piece: pack the shard without --sparse"
        row |= {"ext": image.ext, "status": "read_error", "error_message": problem}
    else:
        row |= {"offset": image.offset, "nbytes": image.nbytes, "ext": image.ext, "status": "ok"}
    document: dict[str, Any] = {}
    member = sample.get("json")
    if member is not None and (spec.fields or spec.caption is not None):
        document = shards.read_json(file, member)
    if spec.caption is not None:
        row["caption"] = _as_type(document.get(spec.caption), "string")
    elif (text := sample.get("txt")) is not None:
        row["caption"] = shards.read_text(file, text)
    for name, type_ in spec.fields:
        row[name] = _as_type(document.get(name), type_)
    return row


def _as_type(value: Any, type_: str) -> Any:
    """Bring a JSON value to a column's type; null where it is of another kind."""
    if value is None:
        return None
    if type_ == "string":
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # JSON allows half a surrogate pair ("\ud800"), UTF-8 does not: it becomes U+FFFD.
        return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if type_ == "bool":
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if type_ == "int64":
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
    try:
        return float(value)
    except OverflowError:
        return None


def peek_fields(
    urls: Sequence[str], names: Sequence[str], storage_options: Mapping[str, Any] | None = None, samples: int = 32
) -> dict[str, str]:
    """Find the types of JSON fields from the first samples of the first shard that has any of these fields.

    Parameters
    ----------
    urls : sequence of str
        Tars; only the beginning of the first is read, or of the first few where it is missing, damaged or empty.
    names : sequence of str
        Fields.
    storage_options : mapping, optional
        For fsspec.
    samples : int
        How many JSON members are looked at.

    Returns
    -------
    dict of str to str
        Keys of `FIELD_TYPES`: integers that are all whole ``int64``, mixed with fractions ``float64``, true and false
        ``bool``, everything else ``string`` (lists and objects as JSON text).
    """
    seen: dict[str, set[str]] = {name: set() for name in names}
    for url in urls[:_PEEK_SHARDS]:
        with contextlib.suppress(OSError):
            for document in shards.first_json(url, samples, storage_options):
                for name in names:
                    if (value := document.get(name)) is not None:
                        seen[name].add(_JSON_TYPES.get(type(value), "string"))
        if any(seen.values()):
            break
    out = {}
    for name, types in seen.items():
        if types == {"int64", "float64"}:
            types = {"float64"}
        out[name] = types.pop() if len(types) == 1 else "string"
    return out


# --- embedding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbedSpec:
    """How rows get their embedding.

    Attributes
    ----------
    encoder : EncoderSpec
        The model.
    batch_size : int or None
        Images a forward pass; None: 16 on a CPU (larger ones leave its caches), 512 on a GPU.
    decoder : {"auto", "dali", "pillow"}
        Who decodes; see `settle_decoder`.
    max_pixels : int or None
        Largest width x height.
    adjust_orientation : bool
        Whether EXIF orientation is applied.
    column : str
        Name of the embedding column.
    storage_options : mapping
        For fsspec.
    isolate : bool
        Whether images are decoded in a process of their own; see `dask_imgcurator.images.isolated`.
    measures : bool
        Whether the columns of `dask_imgcurator.images.quality` are made.
    """

    encoder: EncoderSpec
    batch_size: int | None = None
    decoder: str = "auto"
    max_pixels: int | None = None
    adjust_orientation: bool = False
    column: str = "embedding"
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    isolate: bool = False
    measures: bool = False

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the columns that are added or replaced."""
        added = columns_of("embed", "measure") if self.measures else columns_of("embed")
        schema = arrow_schema(["status", "error_message", *(c.name for c in added)])
        at = schema.get_field_index("embedding")
        return schema.set(at, schema.field(at).with_name(self.column))


#: Called after each batch with the number of rows done and, of these, of images that failed.
Progress = Callable[[int, int], None]

_LOCATORS = ["shard", "offset", "nbytes", "status", "error_message"]


def embed_partition(frame: Any, spec: EmbedSpec, progress: Progress | None = None) -> Any:
    """Read, decode and embed the images of a partition.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        Rows of `index_partition`, in any order and number. Each shard among them is read once, in the order of its
        bytes.
    spec : EmbedSpec
        The model and its settings.
    progress : callable, optional
        See `Progress`.

    Returns
    -------
    frame
        The same rows in the same order, with ``width``, ``height``, ``sha256`` and the embedding; ``status`` and
        ``error_message`` tell of the images that failed. Rows that were not ``ok`` before keep what they had.
    """
    backend = backend_of(frame)
    host = backend.to_host(frame, _LOCATORS).to_pydict()
    n = len(host["shard"])
    status, message = list(host["status"]), list(host["error_message"])
    width: list[int | None] = [None] * n
    height: list[int | None] = [None] * n
    sha256: list[str | None] = [None] * n
    todo = [i for i in range(n) if status[i] == "ok"]
    # In the order of the shards' first appearance, then of the bytes in each: one pass over every file.
    rank = {url: i for i, url in enumerate(dict.fromkeys(host["shard"]))}
    todo.sort(key=lambda i: (rank[host["shard"][i]], host["offset"][i]))
    if progress is not None and len(todo) < n:
        progress(n - len(todo), n - len(todo))

    embeddings: list[torch.Tensor] = []
    measured: list[torch.Tensor] = []
    grays: list[torch.Tensor] = []
    rows: list[int] = []
    failed: list[int] = []
    if todo:
        encoder = load_encoder(spec.encoder, backend.device)
        batch_size = spec.batch_size or (16 if backend.device == "cpu" else 512)
        with contextlib.ExitStack() as stack:
            decoders = [
                stack.enter_context(_borrow_decoder(spec, encoder.preprocess, backend, batch_size))
                for _ in range(1 if spec.isolate else backend.decoders)
            ]
            pieces = _ahead(_read(host, todo, batch_size, spec.storage_options))
            for numbers, digests, batch in _decoded(pieces, decoders, backend.device):
                good = batch.good
                for i, digest, info in zip(numbers, digests, batch.infos, strict=True):
                    sha256[i] = digest
                    width[i], height[i] = info.width, info.height
                    if isinstance(info, BadImage):
                        status[i], message[i] = info.status, str(info)
                if good:
                    embeddings.append(encoder.encode(batch.pixels, batch_size))
                    if batch.small is not None and batch.gray is not None:
                        measured.append(quality.measure(batch.small))
                        grays.append(batch.gray)
                    failed.extend(len(rows) + j for j in sorted(set(range(len(numbers))) - set(good)))
                    rows.extend(numbers)
                if progress is not None:
                    progress(len(numbers), len(numbers) - len(good))
    new = {
        "status": status,
        "error_message": message,
        "width": width,
        "height": height,
        "sha256": sha256,
    }
    import numpy as np

    # What was computed in the place of a failed image is left out here, once for all batches.
    kept = np.delete(np.arange(len(rows)), failed)
    places = np.asarray(rows, np.int64)[kept]
    if spec.measures:
        hashes = quality.phash(_of(grays, kept, backend.device))
        by_row = dict(zip(places.tolist(), hashes, strict=True))
        new["phash"] = [by_row.get(i) for i in range(n)]
    schema = spec.schema
    flat = pa.Table.from_pydict(new, schema=pa.schema([f for f in schema if f.name in new]))
    updates = backend.from_arrow(flat)
    updates.index = frame.index
    columns = {name: updates[name] for name in new}
    if spec.measures:
        values = _of(measured, kept, backend.device, len(quality.MEASURES))
        for k, name in enumerate(quality.MEASURES):
            columns[name] = backend.float_column(values[:, k], places, frame.index)
    columns[spec.column] = backend.matrix_column(_of(embeddings, kept, backend.device), places, frame.index)
    return frame.assign(**{name: columns[name] for name in schema.names})


def _of(batches: list[torch.Tensor], kept: Any, device: str, width: int = 0) -> torch.Tensor:
    """Rows of all batches that are kept."""
    import torch

    if not batches:
        return torch.empty((0, width), device=device)
    values = torch.cat(batches)
    return values if len(kept) == len(values) else values[torch.from_numpy(kept).to(values.device)]


#: Row numbers, bytes (or why there are none) and hashes of a batch.
Piece = tuple[list[int], list[bytes | BadImage], list[str | None]]


def _read(
    host: Mapping[str, list[Any]], todo: list[int], batch_size: int, storage_options: Mapping[str, Any]
) -> Iterator[Piece]:
    """Read and hash a batch at a time."""
    blobs = _blobs(host, todo, storage_options)
    # One core hashes about as many images of 2 megapixels as one card encodes.
    with ThreadPoolExecutor(_HASHERS, thread_name_prefix="hash") as pool:
        for start in range(0, len(todo), batch_size):
            numbers = todo[start : start + batch_size]
            data = [next(blobs) for _ in numbers]
            yield numbers, data, list(pool.map(_digest, data))


_HASHERS = 4


def _digest(data: bytes | BadImage) -> str | None:
    return None if isinstance(data, BadImage) else hashlib.sha256(data).hexdigest()


def _blobs(
    host: Mapping[str, list[Any]], todo: list[int], storage_options: Mapping[str, Any]
) -> Iterator[bytes | BadImage]:
    """Bytes of each image, shard by shard; a piece that cannot be read is a `BadImage` in its place."""
    by_shard: dict[str, list[int]] = {}
    for i in todo:
        by_shard.setdefault(host["shard"][i], []).append(i)
    for url, numbers in by_shard.items():
        extents = [(host["offset"][i], host["nbytes"][i]) for i in numbers]
        done = 0
        # For a part of a shard (a filtered frame), ranges cost less than all of it.
        whole = 2 * sum(nbytes for _, nbytes in extents) >= max(offset + nbytes for offset, nbytes in extents)
        pieces = shards.read_extents(url, extents, storage_options, whole)
        try:
            for data, (offset, nbytes) in zip(pieces, extents, strict=True):
                done += 1
                if len(data) < nbytes:
                    yield BadImage("read_error", f"{url} ends inside this image (byte {offset + len(data):,})")
                else:
                    yield data
        except OSError as err:
            for _ in numbers[done:]:
                yield BadImage("read_error", shards.explain(url, err))


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Make the next item in a second thread while the caller works on this one."""
    done: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        future = pool.submit(next, items, done)
        while (item := future.result()) is not done:
            future = pool.submit(next, items, done)
            yield item


def _decoded(
    pieces: Iterator[Piece], decoders: Sequence[Callable[[Sequence[bytes | BadImage]], Batch]], device: str
) -> Iterator[tuple[list[int], list[str | None], Batch]]:
    """Decode ahead of the caller, each decoder in a thread, and yield in the order of the pieces."""
    free: SimpleQueue[Any] = SimpleQueue()
    for decoder in decoders:
        free.put(decoder)

    def decode(piece: Piece) -> tuple[list[int], list[str | None], list[Batch]]:
        numbers, data, digests = piece
        decoder = free.get()
        try:
            return numbers, digests, _decode_in_parts(decoder, data, device)
        finally:
            free.put(decoder)

    with ThreadPoolExecutor(len(decoders), thread_name_prefix="decode") as pool:
        running = deque(pool.submit(decode, piece) for piece in islice(pieces, len(decoders)))
        while running:
            numbers, digests, batches = running.popleft().result()
            running.extend(pool.submit(decode, piece) for piece in islice(pieces, 1))
            start = 0
            for batch in batches:
                end = start + len(batch.infos)
                yield numbers[start:end], digests[start:end], batch
                start = end


def _decode_in_parts(
    decoder: Callable[[Sequence[bytes | BadImage]], Batch], data: Sequence[bytes | BadImage], device: str
) -> list[Batch]:
    """Decode a batch, in halves where memory runs out."""
    try:
        return [decoder(data)]
    except Exception as err:
        if len(data) == 1 or not is_out_of_memory(err):
            raise
    release(device)
    middle = len(data) // 2
    return [batch for half in (data[:middle], data[middle:]) for batch in _decode_in_parts(decoder, half, device)]


_decoders: dict[Any, list[Decoder]] = {}
_decoders_lock = threading.Lock()


@contextlib.contextmanager
def _borrow_decoder(
    spec: EmbedSpec, preprocess: Preprocess, backend: Any, batch_size: int
) -> Iterator[Decoder | IsolatedDecoder]:
    """Lend a decoder of this process: building a pipeline costs more than a small partition does."""
    import torch

    kind = settle_decoder(spec.decoder, backend.decoder_device)
    options: dict[str, Any] = {
        "device": backend.device,
        "dali_device": backend.decoder_device if kind == "dali" else None,
        "threads": torch.get_num_threads(),
        "max_pixels": spec.max_pixels,
        "adjust_orientation": spec.adjust_orientation,
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
    with _decoders_lock:
        free = _decoders.setdefault(key, [])
        decoder = free.pop() if free else None
    if decoder is None:
        decoder = Decoder(preprocess, batch_size, **options)
    try:
        yield decoder
    finally:
        with _decoders_lock:
            _decoders[key].append(decoder)


def settle_decoder(name: str, device: str) -> Literal["dali", "pillow"]:
    """Turn ``auto`` into a decoder: DALI on a card; on a CPU Pillow.

    There, both take the same time (most of it libjpeg's and the resize's), Pillow's pixels are open_clip's to the last
    bit, and no native pipeline can take the process with it.

    Parameters
    ----------
    name : {"auto", "dali", "pillow"}
        What was asked for.
    device : {"cpu", "mixed"}
        The backend's `decoder_device`.

    Raises
    ------
    RuntimeError
        If DALI is asked for and not installed.
    """
    if name not in ("auto", "dali", "pillow"):
        raise ValueError(f"unknown decoder {name!r}: use auto, dali or pillow")
    if name == "pillow" or (name == "auto" and device == "cpu"):
        return "pillow"
    problem = dali_problem()
    if problem and name == "dali":
        raise RuntimeError(problem)
    return "pillow" if problem else "dali"


# --- heads ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadUse:
    """Which head is applied to which column.

    Attributes
    ----------
    kind : {"aesthetic", "nsfw"}
        What it scores.
    head : str
        Its name, or ``auto``.
    embedding : str
        Column with the embeddings.
    weights_dir : str or None
        Where the weights are looked for first.
    round_to : str or None
        Precision to which embeddings are rounded first; see `heads.load_head`.
    """

    kind: Literal["aesthetic", "nsfw"]
    head: str = "auto"
    embedding: str = "embedding"
    weights_dir: str | None = None
    round_to: str | None = None

    @property
    def column(self) -> str:
        """Column that the score goes to."""
        return f"{self.kind}_score"


def score_partition(frame: Any, use: HeadUse) -> Any:
    """Apply a head to the embeddings of a partition.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        With an embedding column of any origin: lists or arrays of one width, unit length.
    use : HeadUse
        The head.

    Returns
    -------
    frame
        With the head's column, float32; null where there is no embedding.

    Raises
    ------
    HeadError
        If the head does not fit the embedding; the heads there are are named.
    """
    import torch

    backend = backend_of(frame)
    values, rows = backend.matrix(frame[use.embedding])
    if len(rows):
        spec = heads.resolve(use.kind, use.head, values.shape[1])
        scores = heads.load_head(spec, use.weights_dir, backend.device, use.round_to)(values)
    else:
        scores = torch.empty(0, device=backend.device)
    return frame.assign(**{use.column: backend.float_column(scores, rows, frame.index)})


# --- score files ----------------------------------------------------------------------------------

#: Key of this library's entry in a Parquet file's metadata.
METADATA_KEY = "imgcurator"


@dataclass(frozen=True)
class ScoreFiles:
    """How score files are read."""

    backend: str
    columns: tuple[str, ...]
    storage_options: Mapping[str, Any] = field(default_factory=dict)


def read_score_file(url: str, spec: ScoreFiles, columns: Sequence[str] | None = None) -> Any:
    """Read one score file as a partition; Dask's optimizer sets `columns` to those that are used later."""
    wanted = spec.columns if columns is None else columns
    return get_backend(spec.backend).read_parquet(url, list(wanted), spec.storage_options)


def file_schema(url: str, storage_options: Mapping[str, Any] | None = None) -> pa.Schema:
    """Arrow schema of a score file, from its footer."""

    def read() -> pa.Schema:
        with files.opened(url, storage_options) as file:
            return pq.read_schema(file)

    return files.persist(url, read)


def file_provenance(url: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return what a score file says of its making; None where it is missing, damaged or not of this library."""
    try:
        metadata = file_schema(url, storage_options).metadata or {}
        return json.loads(metadata[METADATA_KEY.encode()])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None


def in_shard_order(urls: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Sort score files by the URL of the shard that they describe; files of other origin by their own."""

    def order(url: str) -> tuple[str, str]:
        provenance = file_provenance(url, storage_options) or {}
        return str(provenance.get("shard", "")), url

    return sorted(urls, key=order)
