"""What `find_duplicates` found: count it, show it, mark it, drop it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import backend_of, get_backend, is_dask
from .graphs import Source, pair_cosines
from .rows import RowSpec, identity_of, row_ids

__all__ = ["Duplicates", "Level"]


@dataclass(frozen=True)
class Level:
    """What stays after a tier.

    Attributes
    ----------
    tier : str
        The tier.
    eps : float or None
        Of the semantic tier.
    root : numpy.ndarray
        (n,) int64: for each row in any pair the one that stays for it, which may be itself.
    """

    tier: str
    eps: float | None
    root: np.ndarray


class Duplicates:
    """The duplicates of a frame: who is in a group with whom, and who stays, for each tier and eps.

    Made by `find_duplicates`.
    """

    def __init__(
        self, sources: list[Source], records: pd.DataFrame, levels: list[Level], rows: int, width: int
    ) -> None:
        self._sources = sources
        self._records = records
        self._levels = levels
        self._rows = rows
        self._width = width

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
            lines.append((level.tier, level.eps, groups, int(gone.sum()), self._rows - int(gone.sum())))
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
        table = self._table(self._level(eps))
        records = self._records
        members = table["at"].to_numpy()
        kept = table["root"].to_numpy()
        names = records[["key", "shard", "sample_offset"]].iloc[members].reset_index(drop=True)
        out = pd.concat([table[["group"]], names], axis=1)
        out["kept"] = members == kept
        out["in_reference"] = records["ref"].to_numpy()[members]
        out["tier"], out["eps"] = table["tier"], table["eps"]
        out["kept_key"] = records["key"].iloc[kept].array
        out["kept_shard"] = records["shard"].iloc[kept].array
        out["similarity"] = self._similarity(members, kept)
        hashes, hashed = records["phash"].to_numpy(), records["hashed"].to_numpy()
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
        return self._map(df, _drop_partition, eps, None)

    def _map(self, df: Any, function: Any, eps: float | None, added: pa.Schema | None) -> Any:
        names = self._names(self._level(eps))
        identity = tuple(n for n in ("shard", "key", "sample_offset") if n in df.columns)
        if identity != self._sources[0].spec.identity:
            raise ValueError(
                f"the rows were told apart by {', '.join(self._sources[0].spec.identity)}, but this frame has "
                f"{', '.join(identity) or 'none of them'}: give the frame that was searched"
            )
        backend = backend_of(df)
        spec = replace(self._sources[0].spec, backend=backend.name, status="status" in df.columns)
        if not is_dask(df):
            return function(df, spec, names)
        import dask
        from dask.dataframe.utils import make_meta

        meta = make_meta(df)
        if added is not None:
            new = backend.from_arrow(added.empty_table())
            new.index = meta.index
            meta = meta.assign(**{name: new[name] for name in added.names})
        return df.map_partitions(function, spec, dask.delayed(names), meta=meta, enforce_metadata=False)

    def _level(self, eps: float | None) -> Level:
        if eps is None:
            return self._levels[-1]
        tried = [level.eps for level in self._levels if level.eps is not None]
        if eps not in tried:
            raise ValueError(f"eps={eps} was not tried: there are {', '.join(map(str, tried)) or 'none'}")
        return next(level for level in self._levels if level.eps == eps)

    def _gone(self, level: Level) -> np.ndarray:
        here = np.arange(len(level.root))
        return (level.root != here) & ~self._records["ref"].to_numpy()

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
        table = self._table(level)
        records = self._records
        at, root = table["at"].to_numpy(), table["root"].to_numpy()
        names = pd.DataFrame(
            {
                "id": records["id"].to_numpy()[at],
                "key": records["key"].iloc[at].array,
                "tier": table["tier"],
                "eps": table["eps"].astype("float32"),
                "group": table["group"],
                "of": records["key"].iloc[root].array,
                "of_shard": records["shard"].iloc[root].array,
            }
        )
        names.loc[at == root, ["of", "of_shard"]] = pd.NA
        return names[~records["ref"].to_numpy()[at]].sort_values("id", ignore_index=True)

    @cached_property
    def _cosines(self) -> dict[tuple[int, int], float]:
        return {}

    def _similarity(self, members: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Cosine of each member and the one that stays; computed once a pair."""
        known = self._cosines
        pairs = [pair for pair in zip(members.tolist(), kept.tolist(), strict=True) if pair not in known]
        if pairs:
            ids = self._records["id"].to_numpy()
            left, right = np.array(pairs).T
            values = pair_cosines(self._sources, ids[left], ids[right], self._width)
            known.update(zip(pairs, values.tolist(), strict=True))
        found = [known[pair] for pair in zip(members.tolist(), kept.tolist(), strict=True)]
        return np.array(found, np.float32)


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


def _found_in(frame: Any, spec: RowSpec, names: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Line of `names` for each row of a partition, and whether there is one."""
    rows, taking_part = identity_of(frame, spec)
    if not len(names) or not len(rows):
        return np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    ids, those = row_ids(rows), names["id"].to_numpy()
    at = np.minimum(np.searchsorted(those, ids), len(those) - 1)
    # The key is compared too: of billions of rows, two may share a hash.
    same = names["key"].iloc[at].to_numpy(object) == rows["key"].fillna("").to_numpy(object)
    return at, (those[at] == ids) & same & taking_part


def _mark_partition(frame: Any, spec: RowSpec, names: pd.DataFrame) -> Any:
    at, there = _found_in(frame, spec, names)
    arrays = []
    for field in _MARKS:
        column = names[field.name.removeprefix("duplicate_")]
        values = pa.array(column, from_pandas=True).cast(field.type)
        arrays.append(
            values.take(pa.array(np.where(there, at, 0), mask=~there)) if len(names) else _nulls(there, field)
        )
    arrays = [a.combine_chunks() if isinstance(a, pa.ChunkedArray) else a for a in arrays]
    new = get_backend(spec.backend).from_arrow(pa.Table.from_arrays(arrays, schema=_MARKS))
    new.index = frame.index
    return frame.assign(**{name: new[name] for name in _MARKS.names})


def _nulls(there: np.ndarray, field: pa.Field) -> pa.Array:
    return pa.nulls(len(there), field.type)


def _drop_partition(frame: Any, spec: RowSpec, names: pd.DataFrame) -> Any:
    names = names[names["tier"].notna().to_numpy()].reset_index(drop=True)
    _, there = _found_in(frame, spec, names)
    return frame[~there]
