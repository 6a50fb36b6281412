"""What `dedup` does with one partition: take out what it compares, put rows in buckets, compare a bucket's rows.

Rows travel as pandas frames in host memory, with these columns, whatever frame they came from:

`id` (uint64 hash of shard, key and sample_offset), `ref` (whether of the reference), `shard`, `key`, `sample_offset`,
`rank` (the keep column as float64, higher is better, NaN is missing), `phash` and `hashed` (whether there is one); in
the exact tier `sha256`, in the semantic tier `vector` (the unit vector's float32 bytes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..engine.backend import get_backend
from ..schema import kind_of
from . import neighbours
from .components import order_rows

if TYPE_CHECKING:
    import torch

__all__ = [
    "LEAST_BITS",
    "RECORD",
    "Comparison",
    "DedupError",
    "RowSpec",
    "compare_buckets",
    "exact_pairs",
    "identity_of",
    "is_in",
    "perceptual_pairs",
    "row_ids",
    "same_hash_pairs",
    "signatures",
    "table_copies",
    "unpack",
    "vectors_of",
]

#: What is known of a row wherever it goes.
RECORD = ["id", "ref", "shard", "key", "sample_offset", "rank", "phash", "hashed"]
#: Bits that a perceptual hash must have set, and not set, to be compared.
LEAST_BITS = 8

_VECTOR = pd.ArrowDtype(pa.large_binary())
_STRING = pd.StringDtype("pyarrow")
_OF_REFERENCE = 0x9E3779B97F4A7C15

#: Edges (ids a and b, how near) and the records of the rows in them.
Found = tuple[pd.DataFrame, pd.DataFrame]


class DedupError(ValueError):
    """The rows cannot be compared as they are."""


@dataclass(frozen=True)
class RowSpec:
    """How rows are taken from a partition.

    Attributes
    ----------
    backend : str
        Of the partition.
    identity : tuple of str
        Which of ``shard``, ``key`` and ``sample_offset`` there are.
    status : bool
        Whether there is a status; rows whose status is not ``ok`` are passed over.
    keep : str or None
        Column that decides who stays.
    lowest : bool
        Whether the lowest value stays.
    sha256, phash, embedding : str or None
        Columns; None where the tier is not asked for, or not there.
    ref : bool
        Whether the rows are of the reference.
    cell : bool
        Whether ``cell`` says in which k-means cell a row lives, as in a saved index.
    """

    backend: str
    identity: tuple[str, ...]
    status: bool
    keep: str | None = None
    lowest: bool = False
    sha256: str | None = None
    phash: str | None = None
    embedding: str | None = None
    ref: bool = False
    cell: bool = False


# --- out of a partition ---------------------------------------------------------------------------


def row_ids(frame: pd.DataFrame) -> np.ndarray:
    """Hash ``shard``, ``key`` and ``sample_offset``: (n,) uint64, the same in every process."""
    ids = pd.util.hash_pandas_object(frame[["shard", "key", "sample_offset"]], index=False)
    return ids.to_numpy(np.uint64)


def _identity(table: pa.Table, spec: RowSpec) -> pd.DataFrame:
    n = table.num_rows
    columns = {
        "shard": pd.array(table["shard"] if "shard" in spec.identity else [""] * n, dtype=_STRING),
        "key": pd.array(table["key"].cast(pa.string()), dtype=_STRING),
        "sample_offset": (
            table["sample_offset"].to_numpy().astype(np.int64) if "sample_offset" in spec.identity else np.zeros(n, int)
        ),
    }
    return pd.DataFrame(columns)


def identity_of(frame: Any, spec: RowSpec) -> tuple[pd.DataFrame, np.ndarray]:
    """Return shard, key and sample_offset of a partition's rows, and which of them take part: (n,) bool."""
    table = get_backend(spec.backend).to_host(frame, [*spec.identity, *(["status"] if spec.status else [])])
    taking_part = table["key"].is_valid().to_numpy()
    if spec.status:
        taking_part = taking_part & pc.fill_null(pc.equal(table["status"], "ok"), False).to_numpy()
    return _identity(table, spec), taking_part


def _records(frame: Any, spec: RowSpec) -> tuple[pd.DataFrame, np.ndarray]:
    """Records of all rows of a partition, and which of them take part."""
    rows, taking_part = identity_of(frame, spec)
    # A row that is compared with a saved copy of itself is a duplicate of it, and no row twice.
    rows["id"] = row_ids(rows) ^ np.uint64(_OF_REFERENCE if spec.ref else 0)
    rows["ref"] = spec.ref
    backend = get_backend(spec.backend)
    rows["rank"] = np.nan
    if spec.keep is not None:
        values = backend.to_host(frame, [spec.keep])[spec.keep]
        rows["rank"] = _rank(values, spec.keep) * (-1.0 if spec.lowest else 1.0)
    rows["phash"], rows["hashed"] = np.uint64(0), False
    if spec.phash is not None:
        rows["phash"], rows["hashed"] = _hashes(backend.to_host(frame, [spec.phash])[spec.phash], spec.phash)
    return rows[RECORD], taking_part


def _rank(values: pa.ChunkedArray, name: str) -> np.ndarray:
    if kind_of(values.type) not in ("number", "boolean") and not pa.types.is_temporal(values.type):
        raise TypeError(f"keep={name!r} is a column of {values.type}: name one of numbers, truth values or times")
    if pa.types.is_temporal(values.type):
        values = values.cast(pa.int64())
    return np.array(values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)


def _hashes(values: pa.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Perceptual hashes as (n,) uint64, and where there is one that tells something."""
    there = values.is_valid().to_numpy()
    out = np.zeros(len(values), np.uint64)
    if not there.any():
        return out, there
    if pa.types.is_integer(values.type):
        numbers = values.drop_null().to_numpy()
        out[there] = numbers.astype(np.int64).view(np.uint64) if numbers.dtype.kind == "i" else numbers
    elif kind_of(values.type) == "string":
        texts = values.drop_null().to_pylist()
        wrong = next((t for t in texts if len(t) != 16 or set(t) - set("0123456789abcdefABCDEF")), None)
        if wrong is not None:
            raise DedupError(f"column {name!r} holds {wrong!r}, not a 64-bit hash as 16 hexadecimal digits")
        out[there] = np.array([int(t, 16) for t in texts], np.uint64)
    else:
        raise TypeError(
            f"column {name!r} holds {values.type}: perceptual hashes are 64-bit integers or hexadecimal text"
        )
    # A hash of a plain area is nearly all zeros (or ones), whatever its colour: it is no sign of likeness.
    bits = np.bitwise_count(out)
    return out, there & (np.minimum(bits, 64 - bits) >= LEAST_BITS)


def signatures(frame: Any, spec: RowSpec) -> pd.DataFrame:
    """Take out what the exact and the perceptual tier compare: the records, and ``sha256``.

    ``width`` is that of the row's vector, 0 where there is none that could be compared.
    """
    rows, taking_part = _records(frame, spec)
    texts: Any = [None] * len(rows)
    if spec.sha256 is not None:
        texts = get_backend(spec.backend).to_host(frame, [spec.sha256])[spec.sha256].cast(pa.string())
    rows["sha256"] = pd.array(texts, dtype=_STRING)
    rows["width"] = np.int64(0)
    if spec.embedding is not None:
        vectors, at = _unit_vectors(frame, spec)
        widths = np.zeros(len(rows), np.int64)
        widths[at] = vectors.shape[1]
        rows["width"] = widths
    return rows[taking_part].reset_index(drop=True)


def _unit_vectors(frame: Any, spec: RowSpec) -> tuple[torch.Tensor, np.ndarray]:
    """Unit vectors of a partition, on its device, and their row numbers; zero and not finite ones are left out."""
    import torch

    assert spec.embedding is not None
    values, rows = get_backend(spec.backend).matrix(frame[spec.embedding])
    if not len(rows):
        return values, rows
    norms = values.norm(dim=1)
    usable = torch.isfinite(norms) & (norms > 0)
    return values[usable] / norms[usable, None], rows[usable.cpu().numpy()]


def vectors_of(frame: Any, spec: RowSpec, without: np.ndarray, below: int | None = None) -> pd.DataFrame:
    """Take out the rows that have a vector: the records, and ``vector``.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        A partition.
    spec : RowSpec
        How.
    without : numpy.ndarray
        Sorted uint64 ids of rows that have gone already.
    below : int, optional
        Only rows whose id is below this: a sample that depends on neither partitions nor the order of rows.
    """
    vectors, at = _unit_vectors(frame, spec)
    rows, taking_part = _records(frame, spec)
    cells = get_backend(spec.backend).to_host(frame, ["cell"])["cell"].to_numpy() if spec.cell else -1
    rows["cell"] = np.int64(cells)
    ids = rows["id"].to_numpy()[at]
    use = taking_part[at] & ~is_in(ids, without)
    if below is not None:
        use &= ids < np.uint64(below)
    rows = rows.iloc[at[use]].reset_index(drop=True)
    data = vectors.cpu().numpy()[use] if len(at) else np.empty((0, 0), np.float32)
    rows["vector"] = pd.Series(_pack(data), index=rows.index)
    return rows


def is_in(ids: np.ndarray, those: np.ndarray) -> np.ndarray:
    """Whether each id is one of sorted ids: (n,) bool."""
    if not len(those):
        return np.zeros(len(ids), bool)
    at = np.minimum(np.searchsorted(those, ids), len(those) - 1)
    return np.asarray(those[at] == ids)


def _pack(values: np.ndarray) -> Any:
    """Vectors as binary values: unlike lists of numbers, they pass through each of Dask's shuffles."""
    n, width = values.shape
    offsets = np.arange(n + 1, dtype=np.int64) * width * 4
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values, np.float32))]
    return pd.array(pa.LargeBinaryArray.from_buffers(pa.large_binary(), n, buffers), dtype=_VECTOR)


def unpack(column: pd.Series, width: int) -> np.ndarray:
    """Return vectors that were packed as (n, width) float32."""
    array = pa.array(column)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    array = array.cast(pa.large_binary())
    if not len(array):
        return np.empty((0, width), np.float32)
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(array.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    return data.view(np.float32).reshape(len(array), width)


# --- compare --------------------------------------------------------------------------------------


def _edges(a: Any, b: Any, near: Any) -> pd.DataFrame:
    return pd.DataFrame({"a": a, "b": b, "near": np.asarray(near, np.float32)})


def _check_unique(rows: pd.DataFrame) -> None:
    """Complain of rows that cannot be told apart: one would be dropped as the other's duplicate, or both."""
    rows = rows[~rows["ref"].to_numpy()]
    again = rows["id"].duplicated().to_numpy()
    if again.any():
        row = rows[again].iloc[0]
        raise DedupError(
            f"two rows have shard {row['shard']!r}, key {row['key']!r} and sample_offset {row['sample_offset']}: a row "
            "is known by these. Drop rows that are there twice, or keep the columns shard and sample_offset"
        )


def _star(rows: pd.DataFrame, by: str, near: float) -> Found:
    """Connect the rows that agree in a column to one of them, to one of the reference where there is any."""
    rows = rows.sort_values([by, "ref", "id"], ascending=[True, False, True])
    _check_unique(rows)
    size = rows.groupby(by, sort=False)["id"].transform("size").to_numpy()
    rows = rows[size > 1]
    centre = rows.groupby(by, sort=False)["id"].transform("first").to_numpy()
    own = rows["id"].to_numpy()
    edge = (own != centre) & ~rows["ref"].to_numpy()
    edges = _edges(own[edge], centre[edge], np.full(int(edge.sum()), near))
    return edges, rows[is_in(own, np.unique(edges[["a", "b"]].to_numpy()))][RECORD]


def exact_pairs(rows: pd.DataFrame) -> Found:
    """Connect the rows of the same bytes; all rows of one ``sha256`` are in one partition."""
    return _star(rows[rows["sha256"].notna()], "sha256", 1.0)


def same_hash_pairs(rows: pd.DataFrame) -> Found:
    """Connect the rows of the same hash; all rows of one ``phash`` are in one partition."""
    return _star(rows, "phash", 0.0)


def table_copies(rows: pd.DataFrame, masks: tuple[int, ...]) -> pd.DataFrame:
    """Copy one row of each hash into every table, with the bucket where it belongs."""
    rows = rows.sort_values(["phash", "ref", "id"], ascending=[True, False, True]).drop_duplicates("phash")
    copies = pd.concat([rows[RECORD].assign(table=t) for t in range(len(masks))], ignore_index=True)
    copies["bucket"] = copies["phash"].to_numpy() & np.array(masks, np.uint64)[copies["table"].to_numpy()]
    return copies


def perceptual_pairs(rows: pd.DataFrame, masks: tuple[int, ...], distance: int) -> Found:
    """Connect the rows that share a bucket and differ in few bits."""
    rows = rows.sort_values(["id", "table"]).reset_index(drop=True)
    hashes, table, ids = (rows[c].to_numpy() for c in ("phash", "table", "id"))
    i, j, bits = neighbours.hamming_pairs(hashes, table, masks, distance, rows["ref"].to_numpy())
    edges = _edges(ids[i], ids[j], -bits)
    return edges, rows.iloc[np.unique(np.r_[i, j])][RECORD].drop_duplicates("id")


@dataclass(frozen=True)
class Comparison:
    """How buckets are compared.

    Attributes
    ----------
    width : int
        Of the vectors.
    device : str
        torch device that multiplies.
    threshold : float
        Lowest cosine of a pair.
    earlier : bool
        Whether each row is compared with those before it (SemDeDup's way) or pairs are looked for.
    central : {"hard", "easy"} or None
        Order of the rows, see `order_rows`.
    """

    width: int
    device: str
    threshold: float
    earlier: bool
    central: str | None


def compare_buckets(rows: pd.DataFrame, how: Comparison) -> Found:
    """Compare the rows of each bucket of a part.

    Parameters
    ----------
    rows : pandas.DataFrame
        Records with ``vector``, ``bucket``, ``chunk``, ``kind`` and ``central``.
    how : Comparison
        How.

    Returns
    -------
    edges : pandas.DataFrame
        ``a``, ``b`` (ids) and ``near`` (cosine); with `how.earlier`, b is the row before a.
    records : pandas.DataFrame
        Of the rows in them.
    """
    vectors = unpack(rows["vector"], how.width)
    rows = rows.drop(columns="vector").reset_index(drop=True)
    edges = [_edges(np.empty(0, np.uint64), np.empty(0, np.uint64), [])]
    for at in _buckets(rows, how):
        _check_unique(rows.iloc[at])
        i, j, cosine = _compare(vectors[at], rows.iloc[at], how)
        ids = rows["id"].to_numpy()[at]
        edges.append(_edges(ids[i], ids[j], cosine))
    found = pd.concat(edges, ignore_index=True)
    named = is_in(rows["id"].to_numpy(), np.unique(found[["a", "b"]].to_numpy()))
    return found, rows[named][RECORD].drop_duplicates("id")


def _buckets(rows: pd.DataFrame, how: Comparison) -> Iterator[np.ndarray]:
    """Row numbers of each bucket, in the order in which its rows are compared; never in that of arrival."""
    bucket = rows["bucket"].to_numpy()
    if how.earlier:
        position = np.empty(len(rows), np.int64)
        position[order_rows(rows, how.central)] = np.arange(len(rows))
        order = np.lexsort((position, bucket))
    else:
        order = np.lexsort((rows["id"].to_numpy(), rows["kind"].to_numpy(), rows["chunk"].to_numpy(), bucket))
    edges = np.flatnonzero(np.diff(bucket[order])) + 1
    for at in np.split(order, edges):
        if len(at) > 1:
            yield at


def _compare(values: np.ndarray, rows: pd.DataFrame, how: Comparison) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import torch

    vectors = torch.from_numpy(values).to(how.device)
    if how.earlier:
        return neighbours.earlier_maxima(vectors, int(rows["ref"].sum()), how.threshold)
    tiles = neighbours.tiles_of(rows["chunk"].to_numpy(), rows["kind"].to_numpy())
    return neighbours.similar_pairs(vectors, tiles, how.threshold)
