"""Duplicates of a score table, as a whole job."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..duplicates import deduplication
from ..duplicates import index as dedup_index
from ..duplicates.cells import CellCheck
from ..engine.run import Place
from ..monitor import Monitor
from ..runs.records import made_of, replacing
from ..steps.read import URLPath
from ..storage import files
from .tables import open_table, targets_of, write_table


@dataclass(frozen=True)
class Deduplicated:
    """What `drop_duplicates` found.

    Attributes
    ----------
    rows, kept : int
        Of the table, and of the result (without rows that are not ``ok``).
    counts : list of dict
        For each tier and eps: ``tier``, ``eps``, ``groups``, ``dropped``, ``remaining``.
    cells : CellCheck or None
        How well the cells of the semantic tier work; None where every pair was compared.
    """

    rows: int
    kept: int
    counts: list[dict[str, Any]]
    cells: CellCheck | None = None


def drop_duplicates(
    scores: URLPath,
    out: str | os.PathLike[str] | None = None,
    *,
    groups: str | os.PathLike[str] | None = None,
    index: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
    **options: Any,
) -> Deduplicated:
    """Find the duplicates of a score table and write it without them.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path, optional
        Folder for the rows that are left; None: only count.
    groups : str or path, optional
        Parquet file for the table of groups: which rows, which of them is kept, how similar.
    index : str or path, optional
        Folder for an index of what is left, to compare later tables with (`against`).
    overwrite : bool
        Whether another result in `out` is replaced, whole.
    storage_options, backend, client, monitor
        As for `select_rows`.
    **options
        As for `deduplication.find_duplicates`: ``tiers``, ``eps``, ``max_distance``, ``keep``, ``rule``, ``against`` …

    Returns
    -------
    Deduplicated
        How many rows each tier finds, and how many are left.

    Raises
    ------
    FileExistsError
        As `select_rows`.
    ValueError
        If several `eps` are given with `out` or `index`; if several models made what is compared; and as
        `deduplication.find_duplicates` does.
    """
    monitor = monitor or Monitor()
    eps = options.get("eps", 0.05)
    if not isinstance(eps, int | float) and len(set(eps)) > 1 and (out is not None or index is not None):
        raise ValueError(f"eps={list(eps)}: to drop rows, name one; without a folder to write to, all are counted")
    vectors = options.get("embedding", "embedding")
    with open_table(scores, storage_options, backend, client, monitor) as table:
        df = table.df[table.df["status"] == "ok"] if "status" in table.df.columns else table.df
        targets = targets_of(table, out) if out is not None else []
        semantic = "semantic" in (options.get("tiers") or deduplication.TIERS) and vectors in table.scores.schema.names
        used = [vectors] if semantic or index is not None else []
        encoder = table.made(options.get("keep") or "key", *used).get("encoder", {})
        if encoder.get("model") == "starter" and semantic:
            monitor.note(
                "The starter's embeddings lie close together: its semantic duplicates at the usual eps are mostly "
                "other pictures. Look at the groups, or use the tiers exact and perceptual."
            )
        made = encoder or None
        found = deduplication.find_duplicates(df, provenance=made, storage_options=storage_options, **options)
        counts = json.loads(found.counts().to_json(orient="records"))
        rows = len(table.df[["key"]])  # not of the frame: Dask would read its embeddings
        kept = int(counts[-1]["remaining"]) if counts else rows
        if groups is not None:
            with files.write_whole(os.fspath(groups), storage_options) as file:
                found.groups().to_parquet(file, index=False)
        left = found.drop(df)
        if out is not None:
            note = {k: v for k, v in options.items() if k != "against" or isinstance(v, str)}
            note = json.loads(json.dumps(note, default=str))
            record = made_of("dedup", scores, note, ", ".join(f"{k} {v}" for k, v in note.items()))
            with replacing(os.fspath(out), record, targets, overwrite, table.scores.storage_options):
                kept = sum(counts.rows for counts in write_table(table, targets, {"deduplicated": note}, left))
        if index is not None:
            dedup_index.build_index(left, index, provenance=made, storage_options=storage_options)
    return Deduplicated(rows, kept, counts, found.cells)
