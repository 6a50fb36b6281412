"""The result of `find_duplicates`: count, show, mark or drop the duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import backend_of, is_dask
from ..engine.cache import cache
from ..engine.frames import apply_step
from ..engine.pandas import from_arrow
from ..select.ranks import IDENTITY
from ..storage import files
from .cells import CellCheck
from .rows import OF_REFERENCE, Rows, host_rows, is_in, row_ids, text


@dataclass(frozen=True)
class Unique:
    """A selection's condition: the row is not a dropped duplicate. Their ids are in a file, read once per process."""

    text: str
    columns: tuple[str, ...]
    url: str
    sha256: str
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def evaluate(self, table: pa.Table) -> pa.Array:
        """Whether each row of an Arrow table is kept."""
        dropped = cache.get("duplicates", self.sha256, self._read)
        return pa.array(~is_in(row_ids(table.select(list(self.columns))), dropped))

    def _read(self) -> np.ndarray:
        with files.opened(self.url, self.storage_options) as file:
            return np.frombuffer(file.read(), np.uint64)


@dataclass(frozen=True, eq=False)
class Level:
    """The state after a tier: `root[i]` is the record kept for record i, possibly itself."""

    tier: str
    eps: float | None
    root: np.ndarray


class Duplicates:
    """The duplicates of a frame: the groups, and which rows are kept, for each tier and eps.

    Returned by `find_duplicates`.

    Attributes
    ----------
    cells : CellCheck or None
        Quality of the semantic tier's cells; None if all pairs were compared.
    """

    def __init__(
        self,
        identity: tuple[str, ...],
        rows: Rows,
        numbers: np.ndarray,
        levels: list[Level],
        cells: CellCheck | None,
        again: Callable[[np.ndarray], Rows] | None,
    ) -> None:
        self.cells = cells
        self._identity, self._rows, self._numbers, self._levels = identity, rows, numbers, levels
        self._again = again  # rereads rows by id with their vectors, if no tier needed them
        self._ref = numbers >= rows.ours

    @property
    def tiers(self) -> tuple[str, ...]:
        """The applied tiers."""
        return tuple(dict.fromkeys(level.tier for level in self._levels))

    def counts(self) -> pd.DataFrame:
        """Count the rows that each tier and eps drops, including earlier tiers.

        Returns
        -------
        pandas.DataFrame
            ``tier``, ``eps`` (NaN except for the semantic tier), ``groups``, ``dropped``, ``remaining`` (of the
            compared rows).
        """
        lines = []
        for level in self._levels:
            gone = self._gone(level)
            groups = len(np.unique(level.root[gone]))
            lines.append((level.tier, level.eps, groups, int(gone.sum()), self._rows.ours - int(gone.sum())))
        frame = pd.DataFrame(lines, columns=["tier", "eps", "groups", "dropped", "remaining"])
        return frame.astype({"eps": float})

    def groups(self, eps: float | None = None) -> pd.DataFrame:
        """Table of the groups.

        Parameters
        ----------
        eps : float, optional
            One of those tried; by default the largest.

        Returns
        -------
        pandas.DataFrame
            One row per member of a group, the kept one first: ``group`` (0, 1, …), ``key``, ``shard``,
            ``sample_offset``, ``kept``, ``in_reference``, ``tier`` (which dropped it; null for the kept row), ``eps``
            (the smallest tried that drops it), ``kept_key``, ``kept_shard``, ``similarity`` (cosine to the kept row;
            NaN without embeddings) and ``distance`` (number of differing hash bits).
        """
        table = self._table(self._level(eps))
        a, b = self._numbers[table.pop("at")], self._numbers[table.pop("root")]
        out = table.drop(columns="id").rename(columns={"of": "kept_key", "of_shard": "kept_shard"})
        out["similarity"] = self._similarity(a, b)
        hashes = self._rows.table["phash"]
        known = hashes.is_valid().to_numpy()[a] & hashes.is_valid().to_numpy()[b]
        bits = np.bitwise_count(hashes.fill_null(0).to_numpy()[a] ^ hashes.fill_null(0).to_numpy()[b])
        out["distance"] = pd.Series(bits, dtype="Int64").where(known)
        return out

    def mark(self, df: Any, eps: float | None = None) -> Any:
        """Add columns that say which rows are duplicates, and of which.

        Parameters
        ----------
        df : dask, pandas or cuDF DataFrame
            The frame that was searched, or part of it.
        eps : float, optional
            One of those tried; by default the largest.

        Returns
        -------
        the frame's type
            With ``duplicate_tier`` (which drops the row; null if it is kept), ``duplicate_eps`` (the smallest tried eps
            that drops it), ``duplicate_group`` (as in `groups`; null outside any), ``duplicate_of`` and
            ``duplicate_of_shard`` (key and shard of the kept row). A smaller eps keeps, in addition, the rows with
            ``duplicate_tier == "semantic"`` and a larger ``duplicate_eps``.
        """
        return self._map(df, _mark_partition, eps, _MARKS)

    def drop(self, df: Any, eps: float | None = None) -> Any:
        """Drop the duplicates.

        Parameters
        ----------
        df : dask, pandas or cuDF DataFrame
            The frame that was searched, or part of it.
        eps : float, optional
            One of those tried; by default the largest.

        Returns
        -------
        the frame's type
            The kept rows, and those that were not compared (status not ``ok``), unchanged and in order.
        """
        return self._map(df, _drop_partition, eps, pa.schema([]))

    def unique(self, url: str, text: str, storage_options: Mapping[str, Any] | None = None) -> Unique:
        """Save the ids of the dropped rows in a file, and return the condition that drops them."""
        names = self._table(self._level(None))
        ids = np.sort(names.loc[~names["kept"] & ~names["in_reference"], "id"].to_numpy(np.uint64)).tobytes()
        with files.write_whole(url, storage_options) as file:
            file.write(ids)
        return Unique(text, self._identity, url, hashlib.sha256(ids).hexdigest(), storage_options)

    def _map(self, df: Any, function: Any, eps: float | None, added: pa.Schema) -> Any:
        table = self._table(self._level(eps))
        names = table[~table["in_reference"]].sort_values("id", ignore_index=True)
        identity = tuple(n for n in IDENTITY if n in df.columns)
        if identity != self._identity:
            raise ValueError(
                f"rows were identified by {', '.join(self._identity)}, but this frame has "
                f"{', '.join(identity) or 'none of them'}: give the frame that was searched"
            )
        return apply_step(df, function, dask.delayed(names) if is_dask(df) else names, added)

    def _level(self, eps: float | None) -> Level:
        if eps is None:
            return self._levels[-1]
        tried = [level.eps for level in self._levels if level.eps is not None]
        if eps not in tried:
            raise ValueError(f"eps={eps} was not tried: there are {', '.join(map(str, tried)) or 'none'}")
        return next(level for level in self._levels if level.eps == eps)

    def _similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        rows, ids = self._rows, self._rows.ids
        if self._again is not None and len(a):
            own = np.r_[ids[a], ids[b]]
            rows = self._again(np.unique(np.r_[own, own ^ OF_REFERENCE]))
            order = np.argsort(rows.ids)
            a, b = (order[np.searchsorted(rows.ids[order], ids[side])] for side in (a, b))
        return rows.cosines(a, b)

    def _gone(self, level: Level) -> np.ndarray:
        return (level.root != np.arange(len(level.root))) & ~self._ref

    def _table(self, level: Level) -> pd.DataFrame:
        """Rows of the groups, sorted by group, the kept one first; `at` and `root` are records."""
        gone = self._gone(level)
        at = np.flatnonzero(gone | np.isin(np.arange(len(gone)), level.root[gone]))
        root = level.root[at]
        group = np.unique(root, return_inverse=True)[1]
        order = np.lexsort((at, at != root, group))
        at, root = at[order], root[order]
        tier, eps = np.full(len(at), None, object), np.full(len(at), np.nan)
        for earlier in reversed(self._levels[: self._levels.index(level) + 1]):
            new = self._gone(earlier)[at]
            tier[new], eps[new] = earlier.tier, np.nan if earlier.eps is None else earlier.eps
        names = from_arrow(self._rows.table.select(["id", "key", "shard", "sample_offset"]).take(self._numbers[at]))
        kept = from_arrow(self._rows.table.select(["key", "shard"]).take(self._numbers[root]))
        table = pd.concat([pd.DataFrame({"group": group[order]}), names], axis=1)
        table["kept"], table["in_reference"] = at == root, self._ref[at]
        table["tier"], table["eps"] = pd.array(tier, "string"), eps
        return table.assign(of=kept["key"], of_shard=kept["shard"], at=at, root=root)


# --- marking --------------------------------------------------------------------------------------

_MARKS = pa.schema(
    [
        ("duplicate_tier", pa.string()),
        ("duplicate_eps", pa.float32()),
        ("duplicate_group", pa.int64()),
        ("duplicate_of", pa.string()),
        ("duplicate_of_shard", pa.string()),
    ]
)


def _found_in(frame: Any, names: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """For each row of a partition, its position in `names` (sorted by id), and whether it is there."""
    table, taking_part = host_rows(frame)
    if not len(names):
        return np.zeros(len(table), np.int64), np.zeros(len(table), bool)
    ids, those = row_ids(table), names["id"].to_numpy(np.uint64)
    at = np.minimum(np.searchsorted(those, ids), len(those) - 1)
    # The key is compared too: among billions of rows, two may share a hash.
    same = names["key"].iloc[at].to_numpy(object) == text(table["key"]).to_numpy()
    return at, (those[at] == ids) & same & taking_part


def _mark_partition(frame: Any, names: pd.DataFrame) -> Any:
    at, there = _found_in(frame, names)
    names = names.assign(**{name: names[name].where(~names["kept"]) for name in ("of", "of_shard")})
    lines, arrays = pa.array(at, mask=~there), []
    for mark in _MARKS:
        values = pa.array(names[mark.name.removeprefix("duplicate_")], from_pandas=True).cast(mark.type)
        arrays.append(values.take(lines) if len(names) else pa.nulls(len(at), mark.type))
    new = backend_of(frame).from_arrow(pa.Table.from_arrays(arrays, schema=_MARKS))
    new.index = frame.index
    return frame.assign(**{name: new[name] for name in _MARKS.names})


def _drop_partition(frame: Any, names: pd.DataFrame) -> Any:
    return frame[~_found_in(frame, names[~names["kept"]].reset_index(drop=True))[1]]
