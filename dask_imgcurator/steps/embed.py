"""Decode and embed images: `embed`."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .. import config
from ..clusters.faults import worker_fault
from ..engine.backend import Backend, backend_of, is_dask
from ..engine.cluster import log_event, turn
from ..engine.frames import apply_step, require_columns
from ..images import quality
from ..images.formats import BadImage
from ..images.pillow import is_deep
from ..models.encoders import EncoderSpec, load_encoder, resolve_encoder
from ..schema import MEASURES, arrow_schema, columns_of
from ..storage.files import is_local
from .stream import Decoded, batch_size_of, begun, stream_images

if TYPE_CHECKING:
    import torch

_LOCATORS = ["shard", "offset", "nbytes", "status", "error_message"]

#: Columns whose values stay in rows that are not embedded.
_KEPT = ["width", "height", "sha256", "note"]


@dataclass(frozen=True)
class EmbedSpec:
    """How to embed rows.

    `topic`: where progress events go. `isolate`: decode in another process. `strict`: a shard that cannot be read here
    is a `WorkerFault` instead of a status of its rows.
    """

    encoder: EncoderSpec
    batch_size: int | None = None
    decoder: str = "auto"
    max_pixels: int | None = None
    adjust_orientation: bool = False
    scale_high_bit_depth: bool = False
    column: str = "embedding"
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    measures: bool = False
    isolate: bool = False
    topic: str | None = None
    strict: bool = False

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the added or replaced columns."""
        added = columns_of("embed", "measure") if self.measures else columns_of("embed")
        schema = arrow_schema(["status", "error_message", *(c.name for c in added)])
        at = schema.get_field_index("embedding")
        return schema.set(at, schema.field(at).with_name(self.column))


def embed_partition(frame: Any, spec: EmbedSpec) -> Any:
    """Read, decode and embed the images of a partition's rows, in any order and number."""
    # Each shard is read once, in byte order. Rows that were not ``ok`` are left as they are.
    backend = backend_of(frame)
    kept = [name for name in _KEPT if name in frame.columns]
    host = backend.to_host(frame, [*_LOCATORS, *kept]).to_pydict()
    rows = _Rows(host, "scaled to 8 bits" if spec.scale_high_bit_depth else "clipped at 255")
    n, todo = len(rows.status), rows.todo()
    progress = _progress(spec.topic, host["shard"])
    progress(n - len(todo), n - len(todo))
    embedded = _Embedded(spec, backend)
    if todo:
        encoder = load_encoder(spec.encoder, backend.device)
        batch_size = batch_size_of(spec, backend)
        # While this shard is computed, the next one is prepared: a remote one is streamed, and for a fast encoder it is
        # indexed and its first batches are decoded.
        remote = not all(is_local(url) for url in set(host["shard"]))
        with _telling_where(spec.strict):
            images = begun(stream_images(host, todo, spec, encoder.preprocess, backend))
        with turn(remote or backend.overlaps), _telling_where(spec.strict):
            for decoded in images:
                rows.note(decoded)
                if decoded.batch.good:
                    embedded.add(decoded, encoder.encode(decoded.batch.pixels, batch_size))
                progress(len(decoded.numbers), len(decoded.numbers) - len(decoded.batch.good))
    return frame.assign(**_columns(frame, spec, rows, embedded))


@contextlib.contextmanager
def _telling_where(strict: bool) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise (worker_fault(err) if strict else err) from err


class _Rows:
    """Per-row results in host memory."""

    def __init__(self, host: Mapping[str, list[Any]], deep: str) -> None:
        none = [None] * len(host["shard"])
        self._host, self._deep = host, deep
        self.notes = list(host["note"]) if "note" in host else None
        self.status, self.message = list(host["status"]), list(host["error_message"])
        self.width: list[int | None] = list(host.get("width", none))
        self.height: list[int | None] = list(host.get("height", none))
        self.sha256: list[str | None] = list(host.get("sha256", none))

    def todo(self) -> list[int]:
        """Rows to embed: by shard in order of first appearance, then by offset; one pass over each file."""
        rank = {url: i for i, url in enumerate(dict.fromkeys(self._host["shard"]))}
        todo = [i for i, status in enumerate(self.status) if status == "ok"]
        return sorted(todo, key=lambda i: (rank[self._host["shard"][i]], self._host["offset"][i]))

    def note(self, decoded: Decoded) -> None:
        for i, digest, info in zip(decoded.numbers, decoded.digests, decoded.batch.infos, strict=True):
            self.sha256[i] = digest
            self.width[i], self.height[i] = info.width, info.height
            if isinstance(info, BadImage):
                self.status[i], self.message[i] = info.status, str(info)
            elif self.notes is not None and is_deep(info.mode):
                kind = {"I": "integers", "F": "floats"}.get(info.mode, "16 bits")
                note = f"samples of more than 8 bits are {self._deep}: {kind}"
                self.notes[i] = f"{self.notes[i]}; {note}" if self.notes[i] else note


class _Embedded:
    """Embeddings and measures of all batches, on the device."""

    def __init__(self, spec: EmbedSpec, backend: Backend) -> None:
        self._spec, self._device = spec, backend.device
        self._embeddings: list[torch.Tensor] = []
        self._measured: list[torch.Tensor] = []
        self._grays: list[torch.Tensor] = []
        self._rows: list[int] = []
        self._failed: list[int] = []

    def add(self, decoded: Decoded, embeddings: torch.Tensor) -> None:
        batch = decoded.batch
        self._embeddings.append(embeddings)
        if batch.small is not None and batch.gray is not None:
            self._measured.append(quality.measure(batch.small))
            self._grays.append(batch.gray)
        bad = sorted(set(range(len(decoded.numbers))) - set(batch.good))
        self._failed.extend(len(self._rows) + j for j in bad)
        self._rows.extend(decoded.numbers)

    @property
    def _kept(self) -> np.ndarray:
        # Drop the results computed in place of failed images, once for all batches.
        return np.delete(np.arange(len(self._rows)), self._failed)

    @property
    def rows(self) -> np.ndarray:
        """Numbers of the rows with an embedding: (m,) int64."""
        return np.asarray(self._rows, np.int64)[self._kept]

    @property
    def embeddings(self) -> torch.Tensor:
        return self._all(self._embeddings)

    @property
    def measures(self) -> torch.Tensor:
        return self._all(self._measured, len(MEASURES))

    @property
    def hashes(self) -> list[str]:
        return quality.phash(self._all(self._grays))

    def _all(self, batches: list[torch.Tensor], width: int = 0) -> torch.Tensor:
        import torch

        if not batches:
            return torch.empty((0, width), device=self._device)
        values, kept = torch.cat(batches), self._kept
        return values if len(kept) == len(values) else values[torch.from_numpy(kept).to(values.device)]


def _columns(frame: Any, spec: EmbedSpec, rows: _Rows, embedded: _Embedded) -> dict[str, Any]:
    """New and replaced columns, in the order of the spec's schema."""
    backend, places = backend_of(frame), embedded.rows
    found: dict[str, list[Any]] = {
        "status": rows.status,
        "error_message": rows.message,
        "width": rows.width,
        "height": rows.height,
        "sha256": rows.sha256,
    }
    if spec.measures:
        by_row = dict(zip(places.tolist(), embedded.hashes, strict=True))
        found["phash"] = [by_row.get(i) for i in range(len(rows.status))]
    schema = spec.schema
    if rows.notes is not None:
        found["note"], schema = rows.notes, schema.append(pa.field("note", pa.string()))
    updates = backend.from_arrow(pa.Table.from_pydict(found, schema=pa.schema([f for f in schema if f.name in found])))
    updates.index = frame.index
    columns = {name: updates[name] for name in found}
    if spec.measures:
        values = embedded.measures
        for k, name in enumerate(MEASURES):
            columns[name] = backend.float_column(values[:, k], places, frame.index)
    columns[spec.column] = backend.matrix_column(embedded.embeddings, places, frame.index)
    return {name: columns[name] for name in schema.names}


def _progress(topic: str | None, urls: list[str]) -> Callable[[int, int], None]:
    """Return a function that reports finished and failed rows to the client."""
    if topic is None or not urls:
        return lambda done, errors: None
    counts: dict[str, Any] = {"shard": urls[0], "rows": len(urls), "done": 0, "errors": 0}

    def tell(done: int, errors: int) -> None:
        counts["done"] += done
        counts["errors"] += errors
        log_event(topic, counts)

    return tell


def warn_of_decoding(df: Any, columns: Iterable[str], who: str) -> None:
    """Warn the library's caller if columns read now, of a lazy frame, are computed from its images."""
    names = list(columns)
    if not is_dask(df) or not _decodes(df[names]):
        return
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(f"{__package__.partition('.')[0]}."):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{who} decodes and embeds the images to read {', '.join(names)}, and computing its result does so again: "
        "take df.persist(), or a score table of it (to_scores, read_scores)",
        stacklevel=level,
    )


def _decodes(df: Any) -> bool:
    nodes = df.simplify().expr.walk()
    return any(operand is embed_partition for node in nodes for operand in node.operands)


def embed_spec(
    model: str,
    pretrained: str | None = None,
    *,
    batch_size: int | None = None,
    dtype: str | None = None,
    column: str = "embedding",
    measures: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> EmbedSpec:
    """Resolve, on the client, how to embed rows."""
    batch_size = config.get("batch-size", batch_size)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it must be at least 1")
    return EmbedSpec(
        resolve_encoder(model, pretrained, dtype),
        batch_size,
        config.get("decoder"),
        config.get("max-pixels"),
        bool(config.get("adjust-orientation")),
        bool(config.get("scale-high-bit-depth")),
        column,
        dict(storage_options or {}),
        measures,
    )


def embed(
    df: Any,
    model: str = "ViT-L-14",
    pretrained: str | None = None,
    *,
    batch_size: int | None = None,
    dtype: str | None = None,
    column: str = "embedding",
    measures: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Decode and embed the images of a DataFrame.

    Each partition reads its shards once, in order, and decodes a batch while the encoder works on the previous one.
    A bad image never affects the others: its embedding is null, and ``status`` and ``error_message`` say why.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        From `read_webdataset`; may be filtered, shuffled or repartitioned.
    model : str
        Name of an open_clip model, or ``starter`` (a preview that needs no download).
    pretrained : str, optional
        open_clip's tag, a checkpoint's path, or ``random:SEED``.
    batch_size : int, optional
        Images per forward pass; by default 16 on a CPU and 512 on a GPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}, optional
        Type of the encoder; each worker resolves ``auto`` for its processor.
    column : str
        Name of the new column.
    measures : bool
        Also measure each image, in the same decode: ``brightness``, ``contrast``, ``blur``, ``entropy``,
        ``colourfulness`` and ``phash``; see `dask_imgcurator.images.quality`.
    storage_options : mapping, optional
        For the fsspec file system of the shards.

    Returns
    -------
    the frame's type
        With ``width``, ``height``, ``sha256`` and `column` (list of float32, unit length).

    Raises
    ------
    ModelError
        If the model or tag does not exist, or its weights cannot be loaded.

    Notes
    -----
    Pixels equal those of open_clip's own transform, see `docs/exactness.md`.
    """
    require_columns(df, _LOCATORS, "embed", "read the shards with read_webdataset")
    spec = embed_spec(
        model,
        pretrained,
        batch_size=batch_size,
        dtype=dtype,
        column=column,
        measures=measures,
        storage_options=storage_options,
    )
    kept = [name for name in _KEPT if name in df.columns]
    added = spec.schema.append(pa.field("note", pa.string())) if "note" in kept else spec.schema
    return apply_step(df, embed_partition, spec, added, [*_LOCATORS, *kept])
