"""Rows as they are compared: numbered, with what tells them apart, what decides who stays, hashes, and vectors.

They are in one place: the light columns in memory (about 100 bytes a row), the vectors in files that are mapped.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.backend import Backend, backend_of
from ..engine.run import stream
from ..schema import kind_of
from ..select.ranks import IDENTITY, RandomOrder

if TYPE_CHECKING:
    from .index import Index

#: What is known of every row. `id` hashes what tells rows apart; the higher the `rank`, the rather a row stays.
SCHEMA = pa.schema(
    [
        ("id", pa.uint64()),
        ("shard", pa.large_string()),
        ("key", pa.large_string()),
        ("sample_offset", pa.int64()),
        ("rank", pa.float64()),
        ("phash", pa.uint64()),
        ("sha256_high", pa.uint64()),
        ("sha256_low", pa.uint64()),
        ("file", pa.int32()),
    ]
)

#: Bits that a perceptual hash must have set, and not set, to be compared.
LEAST_BITS = 8

#: A row that is compared with a saved copy of itself is a duplicate of it, and no row twice.
_OF_REFERENCE = np.uint64(0x9E3779B97F4A7C15)


class DedupError(ValueError):
    """The rows cannot be compared as they are."""


@dataclass(frozen=True)
class RowSpec:
    """Which columns rows are made of; None where there is none, or its tier was not asked for."""

    identity: tuple[str, ...]
    status: bool = False
    sha256: str | None = None
    phash: str | None = None
    embedding: str | None = None
    keep: str | None = None
    lowest: bool = False

    @property
    def light(self) -> list[str]:
        """All but the vectors."""
        names = [*self.identity, "status" if self.status else None, self.sha256, self.phash, self.keep]
        return list(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True)
class Source:
    """A frame, how rows are taken from it, and the number of the file that each partition is, where it is one."""

    frame: Any
    spec: RowSpec
    files: Sequence[int] | None = None


@dataclass(frozen=True)
class Taken:
    """Rows of a partition that take part; vector i is that of row `at[i]`."""

    rows: pa.Table
    vectors: np.ndarray
    at: np.ndarray


# --- out of a partition ---------------------------------------------------------------------------


def row_ids(table: pa.Table) -> np.ndarray:
    """Hash ``shard``, ``key`` and ``sample_offset``, what there is of them: (n,) uint64, the same in every process."""
    return RandomOrder(tuple(name for name in IDENTITY if name in table.column_names)).keys(table)[0]


def taking_part(table: pa.Table) -> np.ndarray:
    """Which rows are compared: those that have a key and did not fail."""
    mask = table["key"].is_valid()
    if "status" in table.column_names:
        mask = pc.and_(mask, pc.fill_null(pc.equal(table["status"], "ok"), False))
    return np.asarray(mask.to_numpy(), bool)


def take_rows(frame: Any, spec: RowSpec, only: np.ndarray | None = None) -> Taken:
    """Take the rows out of a partition; `only` are sorted ids of those that are wanted."""
    backend = backend_of(frame)
    table = backend.to_host(frame, spec.light)
    ids, chosen = row_ids(table.select(spec.identity)), taking_part(table)
    if only is not None:
        chosen &= is_in(ids, only)
    n = len(table)
    columns = {
        "id": ids,
        "shard": text(table["shard"]) if "shard" in spec.identity else [""] * n,
        "key": text(table["key"]),
        "sample_offset": table["sample_offset"] if "sample_offset" in spec.identity else np.zeros(n, np.int64),
        "rank": pa.nulls(n) if spec.keep is None else _rank(table[spec.keep], spec.keep, spec.lowest),
        "phash": pa.nulls(n) if spec.phash is None else _hashes(table[spec.phash], spec.phash),
        **dict(zip(("sha256_high", "sha256_low"), _digests(table, spec.sha256), strict=True)),
        "file": pa.nulls(n),
    }
    arrays = [pa.array(c) if not isinstance(c, pa.ChunkedArray) else c for c in columns.values()]
    rows = pa.table([a.cast(f.type) for a, f in zip(arrays, SCHEMA, strict=True)], schema=SCHEMA)
    vectors, at = _vectors(frame, spec.embedding, chosen, backend)
    return Taken(rows.filter(pa.array(chosen)), vectors, at)


def take_file_rows(frame: Any, file: int, spec: RowSpec, only: np.ndarray | None = None) -> Taken:
    """Take the rows out of a partition that is a file of that number."""
    taken = take_rows(frame, spec, only)
    numbers = pa.array(np.full(len(taken.rows), file, np.int32))
    return Taken(taken.rows.set_column(len(SCHEMA) - 1, SCHEMA.field("file"), numbers), taken.vectors, taken.at)


def text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text of a column; of large offsets, as a column of all rows needs them."""
    return column.cast(pa.string()).cast(pa.large_string()).fill_null("")


def _rank(values: pa.ChunkedArray, name: str, lowest: bool) -> np.ndarray:
    if kind_of(values.type) not in ("number", "boolean") and not pa.types.is_temporal(values.type):
        raise TypeError(f"keep={name!r} is a column of {values.type}: name one of numbers, truth values or times")
    if pa.types.is_temporal(values.type):
        values = values.cast(pa.int64())
    found = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return -found if lowest else found


def _digests(table: pa.Table, name: str | None) -> list[pa.Array]:
    """Two hashes of ``sha256``, together 128 bits: no two texts of a set share them."""
    if name is None:
        return [pa.nulls(len(table)), pa.nulls(len(table))]
    texts = text(table[name]).to_numpy().astype(object)
    missing = ~table[name].is_valid().to_numpy()
    salts = "dask-imgcurator0", "dask-imgcurator1"
    return [pa.array(pd.util.hash_array(texts, hash_key=salt, categorize=False), mask=missing) for salt in salts]


def _hashes(values: pa.ChunkedArray, name: str) -> pa.Array:
    """Perceptual hashes; null where there is none that tells something."""
    missing = values.is_null().to_numpy()
    out = np.zeros(len(values), np.uint64)
    if pa.types.is_integer(values.type):
        out[~missing] = values.drop_null().to_numpy().astype(np.uint64, casting="unsafe")
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
    # A hash of a plain area is nearly all zeros (or ones), whatever its colour: it is no sign of likeness.
    bits = np.bitwise_count(out)
    return pa.array(out, mask=missing | (np.minimum(bits, 64 - bits) < LEAST_BITS))


def _vectors(frame: Any, name: str | None, chosen: np.ndarray, backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    """Vectors that have a direction, as they are, and where their rows stand among those that are chosen."""
    import torch

    none = np.empty((0, 0), np.float32), np.empty(0, np.int64)
    if name is None:
        return none
    values, at = backend.matrix(frame[name])
    if not len(at):
        return none
    norms = values.norm(dim=1)
    usable = (torch.isfinite(norms) & (norms > 0)).cpu().numpy() & chosen[at]
    return values.cpu().numpy()[usable], (np.cumsum(chosen) - 1)[at[usable]]


def is_in(ids: np.ndarray, those: np.ndarray) -> np.ndarray:
    """Whether each id is one of sorted ids: (n,) bool."""
    if not len(those):
        return np.zeros(len(ids), bool)
    at = np.minimum(np.searchsorted(those, ids), len(those) - 1)
    return np.asarray(those[at] == ids)


# --- in one place ---------------------------------------------------------------------------------


class Vectors:
    """Vectors of numbered rows, in arrays that are files as a rule.

    `slots` says where the vector of each row lies in `pieces`, counted through them; -1 where it has none.
    """

    def __init__(self, width: int, slots: np.ndarray, pieces: Sequence[np.ndarray]) -> None:
        self.width, self.slots, self.pieces = width, slots, pieces
        self._ends = np.cumsum([len(piece) for piece in pieces])

    def raw(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows, as they are: (m, width) float32."""
        slots = self.slots[rows]
        if len(self.pieces) == 1:
            return self.pieces[0].take(slots, axis=0).astype(np.float32, copy=False)
        out = np.empty((len(slots), self.width), np.float32)
        which = np.searchsorted(self._ends, slots, "right")
        for number, (piece, end) in enumerate(zip(self.pieces, self._ends, strict=True)):
            here = which == number
            out[here] = piece.take(slots[here] - end + len(piece), axis=0)
        return out

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows, of unit length."""
        out = self.raw(rows)
        out /= np.sqrt(np.einsum("ij,ij->i", out, out))[:, None]
        return out


@dataclass(frozen=True)
class Rows:
    """Rows by number: the first `ours` are of the frame, the others of the reference."""

    table: pa.Table
    ours: int
    vectors: Vectors

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def ids(self) -> np.ndarray:
        """(n,) uint64."""
        return self.numbers("id")

    def numbers(self, column: str) -> np.ndarray:
        """A column of numbers; 0 for null."""
        return np.asarray(self.table[column].fill_null(0).to_numpy())

    def take(self, rows: np.ndarray) -> pa.Table:
        """What is known of some rows, and whether they are of the reference (``ref``)."""
        return self.table.take(rows).append_column("ref", pa.array(rows >= self.ours))


def gather(sources: Sequence[Source], index: Index | None = None, only: np.ndarray | None = None) -> Rows:
    """Bring the rows of frames here, in one pass over each, and those of an index.

    All but those of the first source are of the reference. The vectors' file is in Dask's ``temporary-directory``, and
    goes when what is returned is forgotten.
    """
    folder = scratch()
    tables, slots, stored, ours, widths = [SCHEMA.empty_table()], [np.empty(0, np.int64)], 0, 0, []
    with (folder / "vectors").open("wb") as file:
        for number, source in enumerate(sources):
            found: set[int] = set()
            for taken in _partitions(source, only):
                tables.append(_of_reference(taken.rows) if number else taken.rows)
                own = np.full(len(taken.rows), -1, np.int64)
                own[taken.at] = stored + np.arange(len(taken.at))
                slots.append(own)
                if len(taken.at):
                    file.write(np.ascontiguousarray(taken.vectors, np.float32))
                    stored += len(taken.at)
                    found.add(taken.vectors.shape[1])
                ours += 0 if number else len(taken.rows)
            widths.append((source.spec.embedding, sorted(found)))
    width = _one_width(widths)
    if index is not None:
        index.check_width(width)
        width = width or index.about["width"]
    pieces = [np.memmap(folder / "vectors", np.float32, "r", shape=(stored, width))] if stored else []
    for part in index.parts if index is not None else []:
        tables.append(_of_reference(part.rows))
        own = np.arange(stored, stored + len(part.rows))
        own[len(part.vectors) :] = -1
        slots.append(own)
        pieces += [part.vectors] * (len(part.vectors) > 0)
        stored += len(part.vectors)
    pieces = [np.asarray(piece) for piece in pieces] or [np.empty((0, width), np.float32)]
    rows = Rows(pa.concat_tables(tables), ours, Vectors(width, np.concatenate(slots), pieces))
    weakref.finalize(rows, shutil.rmtree, folder, ignore_errors=True)
    _check_unique(rows)
    return rows


def scratch() -> Path:
    """Make a folder for temporary files."""
    return Path(tempfile.mkdtemp(prefix="imgcurator-", dir=dask.config.get("temporary-directory", None)))


def _partitions(source: Source, only: np.ndarray | None) -> Any:
    spec = source.spec
    names = list(dict.fromkeys([*spec.light, *([spec.embedding] if spec.embedding else [])]))
    function: Callable[..., Taken] = take_rows if source.files is None else take_file_rows
    return stream(source.frame[names], function, spec, only, each=source.files)


def _of_reference(table: pa.Table) -> pa.Table:
    ids = pa.array(table["id"].to_numpy() ^ _OF_REFERENCE)
    table = table.set_column(0, "id", ids).set_column(4, "rank", pa.nulls(len(table), pa.float64()))
    return table.select(SCHEMA.names).cast(SCHEMA)


def _one_width(found: Sequence[tuple[str | None, list[int]]]) -> int:
    for name, widths in found:
        if len(widths) > 1:
            raise DedupError(f"column {name!r} holds vectors of different lengths: {widths}")
    ours, theirs = found[0][1], [width for _, widths in found[1:] for width in widths]
    if ours and theirs and ours[0] != theirs[0]:
        raise DedupError(
            f"the embeddings have {ours[0]} numbers, those of the reference (against=) {theirs[0]}: "
            "embed both with the same model"
        )
    return next(iter([*ours, *theirs]), 0)


def _check_unique(rows: Rows) -> None:
    """Complain of rows that cannot be told apart: one would be dropped as the other's duplicate, or both."""
    ids = rows.ids[: rows.ours]
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(ids[order[1:]] == ids[order[:-1]])
    for at in again.tolist():
        # Of billions of rows, two may share a hash.
        one, other = rows.table.select(list(IDENTITY)).take(order[at : at + 2]).to_pylist()
        if one == other:
            raise DedupError(
                f"two rows have shard {one['shard']!r}, key {one['key']!r} and sample_offset {one['sample_offset']}: "
                "a row is known by these. Drop rows that are there twice, or keep the columns shard and sample_offset"
            )
