"""What `find_duplicates` found: count it, show it, mark it, drop it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import backend_of, get_backend, is_dask
from ..engine.frames import meta_of
from ..engine.pandas import from_arrow
from ..select.ranks import IDENTITY
from .cells import CellCheck
from .index import Index
from .neighbours import cosines
from .rows import Rows, Source, gather, row_ids, taking_part, text


@dataclass(frozen=True)
class Level:
    """What stays after a tier: `root[i]` is the record that stays for record i, which may be itself."""

    tier: str
    eps: float | None
    root: np.ndarray


class Duplicates:
    """The duplicates of a frame: who is in a group with whom, and who stays, for each tier and eps.

    Made by `find_duplicates`.

    Attributes
    ----------
    cells : CellCheck or None
        How well the cells of the semantic tier work; None where every pair was compared.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        index: Index | None,
        rows: Rows,
        numbers: np.ndarray,
        levels: list[Level],
        cells: CellCheck | None,
    ) -> None:
        self.cells = cells
        self._sources, self._index, self._rows, self._numbers, self._levels = sources, index, rows, numbers, levels
        #: Rows in any pair, best first.
        self._records = from_arrow(rows.take(numbers))

    def counts(self) -> pd.DataFrame:
        """Count what each tier and eps drops, those before it included.

        Returns
        -------
        pandas.DataFrame
            ``tier``, ``eps`` (NaN but for the semantic tier), ``groups``, ``dropped``, ``remaining`` (of the rows that
            take part).
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
            One line for each row of a group, the one that stays first: ``group`` (0, 1, …), ``key``, ``shard``,
            ``sample_offset``, ``kept``, ``in_reference``, ``tier`` (that dropped it; null for the one that stays),
            ``eps`` (the smallest of those tried that drops it), ``kept_key``, ``kept_shard``, ``similarity`` (cosine to
            the one that stays; NaN without embeddings) and ``distance`` (bits in which the hashes differ).
        """
        table, records = self._table(self._level(eps)), self._records
        members, kept = table["at"].to_numpy(), table["root"].to_numpy()
        names = records[["key", "shard", "sample_offset"]].iloc[members].reset_index(drop=True)
        out = pd.concat([table[["group"]], names], axis=1)
        out["kept"] = members == kept
        out["in_reference"] = self._ref[members]
        out["tier"], out["eps"] = table["tier"], table["eps"]
        out["kept_key"] = records["key"].iloc[kept].array
        out["kept_shard"] = records["shard"].iloc[kept].array
        out["similarity"] = self._similarity(members, kept)
        hashes, hashed = records["phash"].fillna(0).to_numpy(np.uint64), records["phash"].notna().to_numpy()
        bits = pd.Series(np.bitwise_count(hashes[members] ^ hashes[kept]), dtype="Int64")
        out["distance"] = bits.where(hashed[members] & hashed[kept])
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
            With ``duplicate_tier`` (that drops the row; null where it stays), ``duplicate_eps`` (the smallest eps of
            those tried that drops it), ``duplicate_group`` (as in `groups`; null outside any), ``duplicate_of`` and
            ``duplicate_of_shard`` (key and shard of the one that stays). Rows that stay at a smaller eps are
            those with ``duplicate_tier != "semantic"`` or a larger ``duplicate_eps``, and no other tier.
        """
        return self._map(df, _mark_partition, eps, _MARKS)

    def drop(self, df: Any, eps: float | None = None) -> Any:
        """Leave out the duplicates.

        Parameters
        ----------
        df : dask, pandas or cuDF DataFrame
            The frame that was searched, or part of it.
        eps : float, optional
            One of those tried; by default the largest.

        Returns
        -------
        the frame's type
            The rows that stay, and those that did not take part (no status ``ok``), unchanged and in order.
        """
        return self._map(df, _drop_partition, eps, pa.schema([]))

    def _map(self, df: Any, function: Any, eps: float | None, added: pa.Schema) -> Any:
        names = self._names(self._level(eps))
        searched = self._sources[0].spec.identity
        identity = tuple(n for n in IDENTITY if n in df.columns)
        if identity != searched:
            raise ValueError(
                f"the rows were told apart by {', '.join(searched)}, but this frame has "
                f"{', '.join(identity) or 'none of them'}: give the frame that was searched"
            )
        backend = backend_of(df)
        if not is_dask(df):
            return function(df, names, backend.name)
        meta = meta_of(df)
        new = backend.from_arrow(added.empty_table())
        new.index = meta.index
        meta = meta.assign(**{name: new[name] for name in added.names})
        return df.map_partitions(function, dask.delayed(names), backend.name, meta=meta, enforce_metadata=False)

    def _level(self, eps: float | None) -> Level:
        if eps is None:
            return self._levels[-1]
        tried = [level.eps for level in self._levels if level.eps is not None]
        if eps not in tried:
            raise ValueError(f"eps={eps} was not tried: there are {', '.join(map(str, tried)) or 'none'}")
        return next(level for level in self._levels if level.eps == eps)

    @property
    def _ref(self) -> np.ndarray:
        return self._numbers >= self._rows.ours

    def _gone(self, level: Level) -> np.ndarray:
        return (level.root != np.arange(len(level.root))) & ~self._ref

    def _table(self, level: Level) -> pd.DataFrame:
        """Rows of the groups (``at``, ``root``, ``group``, ``tier``, ``eps``), sorted by group, who stays first."""
        gone = np.flatnonzero(self._gone(level))
        root = level.root[gone]
        kept, group = np.unique(root, return_inverse=True)
        tier = np.full(len(gone), None, object)
        eps = np.full(len(gone), np.nan)
        for earlier in self._levels[: self._levels.index(level) + 1]:
            new = self._gone(earlier)[gone] & (tier == None)  # noqa: E711
            tier[new] = earlier.tier
            eps[new] = np.nan if earlier.eps is None else earlier.eps
        dropped = pd.DataFrame({"at": gone, "root": root, "group": group, "tier": tier, "eps": eps})
        staying = pd.DataFrame({"at": kept, "root": kept, "group": np.arange(len(kept)), "tier": None, "eps": np.nan})
        table = pd.concat([staying.astype(dropped.dtypes), dropped], ignore_index=True)
        table["tier"] = table["tier"].astype("string")
        table["gone"] = table["at"] != table["root"]
        return table.sort_values(["group", "gone", "at"], ignore_index=True).drop(columns="gone")

    def _names(self, level: Level) -> pd.DataFrame:
        """What the workers need to mark rows, sorted by id."""
        table, records = self._table(level), self._records
        at, root = table["at"].to_numpy(), table["root"].to_numpy()
        names = pd.DataFrame(
            {
                "id": records["id"].to_numpy(np.uint64)[at],
                "key": records["key"].iloc[at].array,
                "tier": table["tier"],
                "eps": table["eps"].astype("float32"),
                "group": table["group"],
                "of": records["key"].iloc[root].array,
                "of_shard": records["shard"].iloc[root].array,
            }
        )
        names.loc[at == root, ["of", "of_shard"]] = pd.NA
        return names[~self._ref[at]].sort_values("id", ignore_index=True)

    @cached_property
    def _with_vectors(self) -> tuple[Rows, np.ndarray]:
        """Rows with their vectors, and the number that each record has there."""
        if any(level.tier == "semantic" for level in self._levels):
            return self._rows, self._numbers
        ids = self._records["id"].to_numpy(np.uint64)
        own = np.sort(ids[~self._ref])
        rows = gather(self._sources, self._index, only=own)
        order = np.argsort(rows.ids)
        return rows, order[np.minimum(np.searchsorted(rows.ids[order], ids), max(len(order) - 1, 0))]

    def _similarity(self, members: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Cosine of each member and the one that stays; NaN where one of them has no vector."""
        rows, numbers = self._with_vectors
        a, b = numbers[members], numbers[kept]
        out = np.full(len(a), np.nan, np.float32)
        known = (rows.vectors.slots[a] >= 0) & (rows.vectors.slots[b] >= 0)
        out[known] = cosines(a[known], b[known], rows.vectors.take)
        return out


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


def _found_in(frame: Any, names: pd.DataFrame, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """Line of `names` for each row of a partition, and whether there is one."""
    columns = [name for name in (*IDENTITY, "status") if name in frame.columns]
    table = get_backend(backend).to_host(frame, columns)
    if not len(names) or not len(table):
        return np.zeros(len(table), np.int64), np.zeros(len(table), bool)
    ids, those = row_ids(table), names["id"].to_numpy()
    at = np.minimum(np.searchsorted(those, ids), len(those) - 1)
    # The key is compared too: of billions of rows, two may share a hash.
    same = names["key"].iloc[at].to_numpy(object) == text(table["key"]).to_numpy()
    return at, (those[at] == ids) & same & taking_part(table)


def _mark_partition(frame: Any, names: pd.DataFrame, backend: str) -> Any:
    at, there = _found_in(frame, names, backend)
    arrays = []
    for field in _MARKS:
        values = pa.array(names[field.name.removeprefix("duplicate_")], from_pandas=True)
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        lines = pa.array(at, mask=~there) if len(names) else pa.nulls(len(there), pa.int64())
        arrays.append(values.cast(field.type).take(lines))
    new = get_backend(backend).from_arrow(pa.Table.from_arrays(arrays, schema=_MARKS))
    new.index = frame.index
    return frame.assign(**{name: new[name] for name in _MARKS.names})


def _drop_partition(frame: Any, names: pd.DataFrame, backend: str) -> Any:
    _, there = _found_in(frame, names[names["tier"].notna().to_numpy()].reset_index(drop=True), backend)
    return frame[~there]
