"""Rows for comparison: numbered, with identity, rank, hashes, and vectors.

They are in one place: the light columns in memory (about 150 bytes per row), the vectors in memory-mapped files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.backend import Backend, backend_of
from ..engine.frames import require_columns
from ..engine.run import stream
from ..schema import kind_of
from ..select.ranks import IDENTITY, RandomOrder

if TYPE_CHECKING:
    import torch

#: Columns of every row. `id` hashes the row's identity; rows with a higher `rank` are kept first; `file` is the number
#: of the partition. Text has 64-bit offsets, because one column holds all rows.
SCHEMA = pa.schema(
    [
        ("id", pa.uint64()),
        ("shard", pa.large_string()),
        ("key", pa.large_string()),
        ("sample_offset", pa.int64()),
        ("rank", pa.float64()),
        ("sha256", pa.large_string()),
        ("phash", pa.uint64()),
        ("file", pa.int32()),
    ]
)

#: Minimum number of set bits, and of unset bits, for a perceptual hash to be compared.
LEAST_BITS = 8

#: A row compared with a saved copy of itself is a duplicate of it, not an error.
OF_REFERENCE = np.uint64(0x9E3779B97F4A7C15)


class DedupError(ValueError):
    """The rows cannot be compared."""


@dataclass(frozen=True)
class Source:
    """A frame and its columns to compare: `sha256`, `phash` and `embedding`, as far as available."""

    frame: Any
    columns: Mapping[str, str]
    keep: str | RandomOrder | None = None
    lowest: bool = False

    def __post_init__(self) -> None:
        require_columns(self.frame, ["key"], "dedup", "it identifies rows")
        if not self.columns:
            raise ValueError(
                "there is no column to find duplicates by: embed adds sha256 and embedding "
                f"(available: {', '.join(map(str, self.frame.columns))})"
            )

    @property
    def identity(self) -> tuple[str, ...]:
        """Columns that identify its rows."""
        return tuple(name for name in IDENTITY if name in self.frame.columns)


# --- out of a partition ---------------------------------------------------------------------------


def row_ids(table: pa.Table) -> np.ndarray:
    """Hash ``shard``, ``key`` and ``sample_offset``, as far as available: (n,) uint64, the same in every process."""
    return RandomOrder(tuple(name for name in IDENTITY if name in table.column_names)).keys(table)[0]


def host_rows(frame: Any, columns: Iterable[str | None] = ()) -> tuple[pa.Table, np.ndarray]:
    """Identity of a partition's rows, with other columns; and which rows have a key and did not fail."""
    names = [*(name for name in (*IDENTITY, "status") if name in frame.columns), *(c for c in columns if c is not None)]
    table = backend_of(frame).to_host(frame, list(dict.fromkeys(names)))
    mask = table["key"].is_valid()
    if "status" in table.column_names:
        mask = pc.and_(mask, pc.fill_null(pc.equal(table["status"], "ok"), False))
    return table, np.asarray(mask.to_numpy(), bool)


def take_rows(
    frame: Any, columns: Mapping[str, str], keep: str | RandomOrder | None, lowest: bool, only: np.ndarray | None
) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Return a partition's rows to compare, their nonzero vectors, and the numbers of the rows with vectors."""
    sha256, phash, embedding = (columns.get(name) for name in ("sha256", "phash", "embedding"))
    table, chosen = host_rows(frame, [sha256, phash, keep if isinstance(keep, str) else None])
    there, n, ids = table.column_names, len(table), row_ids(table)
    chosen &= True if only is None else is_in(ids, only)
    found = [
        ids,
        text(table["shard"]).fill_null("") if "shard" in there else [""] * n,
        text(table["key"]),
        table["sample_offset"] if "sample_offset" in there else np.zeros(n, np.int64),
        pa.nulls(n) if keep is None else _rank(table, keep, lowest),
        pa.nulls(n) if sha256 is None else text(table[sha256]),
        pa.nulls(n) if phash is None else _hashes(table[phash], phash),
        pa.nulls(n),
    ]
    arrays = [
        (c if isinstance(c, pa.ChunkedArray) else pa.array(c)).cast(f.type) for c, f in zip(found, SCHEMA, strict=True)
    ]
    rows = pa.table(arrays, schema=SCHEMA).filter(pa.array(chosen))
    return rows, *_vectors(frame, embedding, chosen, backend_of(frame))


def text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as text; categories by their values."""
    return column.cast(pa.string()).cast(pa.large_string())


def _rank(table: pa.Table, name: str | RandomOrder, lowest: bool) -> np.ndarray:
    if isinstance(name, RandomOrder):  # the first of a random order, as `sample` takes them
        return -(name.keys(table)[0] >> np.uint64(11)).astype(np.float64)
    values = table[name]
    if kind_of(values.type) not in ("number", "boolean") and not pa.types.is_temporal(values.type):
        raise TypeError(f"keep={name!r} is a column of {values.type}: name one of numbers, booleans or times")
    if pa.types.is_temporal(values.type):
        values = values.cast(pa.int64())
    found = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return -found if lowest else found


def _hashes(values: pa.ChunkedArray, name: str) -> pa.Array:
    """Perceptual hashes; null where missing or uninformative."""
    missing = values.is_null().to_numpy()
    out = np.zeros(len(values), np.uint64)
    if pa.types.is_integer(values.type):
        out[~missing] = values.drop_null().to_numpy().astype(np.uint64)
    elif kind_of(values.type) == "string":
        texts = values.drop_null().to_pylist()
        wrong = next((t for t in texts if len(t) != 16 or set(t) - set("0123456789abcdefABCDEF")), None)
        if wrong is not None:
            raise DedupError(f"column {name!r} holds {wrong!r}, not a 64-bit hash as 16 hexadecimal digits")
        out[~missing] = np.array([int(t, 16) for t in texts], np.uint64)
    elif not missing.all():
        raise TypeError(
            f"column {name!r} holds {values.type}: perceptual hashes are 64-bit integers or hexadecimal text"
        )
    # The hash of a plain area is nearly all zeros (or ones), whatever its colour: it says nothing about similarity.
    bits = np.bitwise_count(out)
    return pa.array(out, mask=missing | (np.minimum(bits, 64 - bits) < LEAST_BITS))


def _vectors(frame: Any, name: str | None, chosen: np.ndarray, backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    import torch

    values, at = (torch.empty((0, 0)), np.empty(0, np.int64)) if name is None else backend.matrix(frame[name])
    norms = values.norm(dim=1)
    usable = (torch.isfinite(norms) & (norms > 0)).cpu().numpy() & chosen[at]
    return values.cpu().numpy()[usable], (np.cumsum(chosen) - 1)[at[usable]]


def is_in(ids: np.ndarray, those: np.ndarray) -> np.ndarray:
    """Whether each id is among sorted ids: (n,) bool."""
    if not len(those):
        return np.zeros(len(ids), bool)
    return np.asarray(those[np.minimum(np.searchsorted(those, ids), len(those) - 1)] == ids)


# --- in one place ---------------------------------------------------------------------------------


class Rows:
    """Rows by number: the first `ours` belong to the frame, the others to the reference.

    `slots` is the position of each row's vector in `pieces`, counted through them, or -1 without a vector.
    """

    def __init__(self, table: pa.Table, ours: int, width: int, slots: np.ndarray, pieces: Sequence[np.ndarray]) -> None:
        self.table, self.ours, self.width, self.slots, self.pieces = table, ours, width, slots, pieces
        self._ends = np.cumsum([len(piece) for piece in pieces])

    def __len__(self) -> int:
        return len(self.slots)

    @cached_property
    def ids(self) -> np.ndarray:
        """(n,) uint64."""
        return np.asarray(self.table["id"].to_numpy())

    @cached_property
    def with_vector(self) -> np.ndarray:
        """Numbers of the rows with a vector, sorted by id: any range of them is a random sample."""
        there = np.flatnonzero(self.slots >= 0)
        return there[np.argsort(self.ids[there], kind="stable")]

    def records(self, rows: np.ndarray) -> pa.Table:
        """Columns of some rows, and whether they belong to the reference (``ref``)."""
        return self.table.take(rows).append_column("ref", pa.array(rows >= self.ours))

    def raw(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows, not normalised: (m, width) float32."""
        slots, out = self.slots[rows], np.empty((len(rows), self.width), np.float32)
        which = np.searchsorted(self._ends, slots, "right")
        for number, (piece, end) in enumerate(zip(self.pieces, self._ends, strict=True)):
            here = slice(None) if len(self.pieces) == 1 else which == number
            out[here] = piece.take(slots[here] - end + len(piece), axis=0)
        return out

    def unit(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows, at unit length."""
        out = self.raw(rows)
        out /= np.sqrt(np.einsum("ij,ij->i", out, out))[:, None]
        return out

    def tensor(self, device: str, rows: np.ndarray) -> torch.Tensor:
        """Unit vectors on a device."""
        import torch

        return torch.from_numpy(self.unit(rows)).to(device)

    def cosines(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine of row a[i] and row b[i], (m,) float32; NaN if one of them has no vector."""
        out = np.full(len(a), np.nan, np.float32)
        known = np.flatnonzero((self.slots[a] >= 0) & (self.slots[b] >= 0))
        for some in np.array_split(known, 1 + len(known) // 4096):
            out[some] = np.einsum("ij,ij->i", self.unit(a[some]), self.unit(b[some]))
        return out

    def joined(self, parts: Sequence[tuple[pa.Table, np.ndarray]], width: int) -> Rows:
        """Add rows of the reference; those with vectors come first."""
        tables, slots, stored = [self.table], [self.slots], sum(len(piece) for piece in self.pieces)
        for table, vectors in parts:
            tables.append(of_reference(table))
            slots.append(np.where(np.arange(len(table)) < len(vectors), np.arange(len(table)) + stored, -1))
            stored += len(vectors)
        pieces = [*self.pieces, *(vectors for _, vectors in parts)]
        return Rows(pa.concat_tables(tables), self.ours, self.width or width, np.concatenate(slots), pieces)


def gather(sources: Sequence[Source], only: np.ndarray | None = None) -> Rows:
    """Collect the rows of frames in one pass over each; all but the first frame belong to the reference.

    `only` are the sorted ids of wanted rows. Vectors are in an unnamed file in Dask's ``temporary-directory``, which
    disappears with them.
    """
    tables, slots, ours, stored, widths = [SCHEMA.empty_table()], [np.empty(0, np.int64)], 0, 0, []
    with tempfile.TemporaryFile(prefix="imgcurator-", dir=dask.config.get("temporary-directory", None)) as file:
        for source in sources:
            found: set[int] = set()
            names = [*source.identity, "status", source.keep, *source.columns.values()]
            frame = source.frame[[name for name in source.frame.columns if name in names]]
            partitions = stream(frame, take_rows, source.columns, source.keep, source.lowest, only)
            for number, (rows, vectors, at) in enumerate(partitions):
                rows = rows.set_column(
                    len(SCHEMA) - 1, SCHEMA.field("file"), pa.array([number] * len(rows), pa.int32())
                )
                tables.append(rows if source is sources[0] else of_reference(rows))
                own = np.full(len(rows), -1, np.int64)
                own[at] = stored + np.arange(len(at))
                slots.append(own)
                file.write(np.ascontiguousarray(vectors, np.float32).data)
                found |= {vectors.shape[1]} if len(at) else set()
                stored += len(at)
                ours += len(rows) if source is sources[0] else 0
            if len(found) > 1:
                raise DedupError(
                    f"column {source.columns['embedding']!r} holds vectors of different lengths: {sorted(found)}"
                )
            widths.append(next(iter(found), 0))
        if len(set(widths) - {0}) > 1:
            raise DedupError(
                f"the embeddings have {widths[0]} numbers, those of the reference (against=) {widths[1]}: "
                "embed both with the same model"
            )
        file.flush()
        shape = stored, max(widths)
        vectors = np.memmap(file, np.float32, "r", shape=shape) if stored else np.empty(shape, np.float32)
    pa.default_memory_pool().release_unused()  # memory used for reading
    rows = Rows(pa.concat_tables(tables), ours, max(widths), np.concatenate(slots), [np.asarray(vectors)])
    _check_unique(rows)
    return rows


def of_reference(table: pa.Table) -> pa.Table:
    """Rows as those of a reference: without partition, and with equal rank."""
    ids = pa.array(table["id"].to_numpy() ^ OF_REFERENCE)
    return table.set_column(0, "id", ids).set_column(4, "rank", pa.nulls(len(table), pa.float64())).cast(SCHEMA)


def _check_unique(rows: Rows) -> None:
    """Raise DedupError for indistinguishable rows: one or both would be dropped as the other's duplicate."""
    ids = rows.ids[: rows.ours]
    order = np.argsort(ids, kind="stable")
    for at in np.flatnonzero(ids[order[1:]] == ids[order[:-1]]).tolist():
        one, other = rows.table.select(list(IDENTITY)).take(order[at : at + 2]).to_pylist()
        if one == other:  # among billions of rows, two may share a hash
            raise DedupError(
                f"two rows have shard {one['shard']!r}, key {one['key']!r} and sample_offset {one['sample_offset']}: "
                "these must identify a row. Drop repeated rows, or keep the columns shard and sample_offset"
            )
