"""Duplicates of a score table, as a whole job."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..duplicates import deduplication
from ..duplicates import index as dedup_index
from ..duplicates.cells import CellCheck
from ..duplicates.result import Unique
from ..engine.run import Place
from ..monitor import Monitor
from ..runs.records import made_of, replacing
from ..select.selection import frame_of_kinds
from ..steps.read import URLPath
from ..storage import files
from .tables import open_table, targets_of, write_table

#: Tiers to drop, or a mapping of options of `find_duplicates`.
Dedup: TypeAlias = str | Sequence[str] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Deduplicated:
    """The result of `drop_duplicates`.

    Attributes
    ----------
    rows, kept : int
        Rows of the table, and of the result (without rows that are not ``ok``).
    counts : list of dict
        For each tier and eps: ``tier``, ``eps``, ``groups``, ``dropped``, ``remaining``.
    cells : CellCheck or None
        Quality of the semantic tier's cells; None if all pairs were compared.
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
        Folder for the remaining rows; None only counts them.
    groups : str or path, optional
        Parquet file for the table of groups: their rows, which one is kept, how similar they are.
    index : str or path, optional
        Folder for an index of the remaining rows, to compare later tables with (`against`).
    overwrite : bool
        Whether another result in `out` is replaced completely.
    storage_options, backend, client, monitor
        As for `select_rows`.
    **options
        As for `deduplication.find_duplicates`: ``tiers``, ``eps``, ``max_distance``, ``keep``, ``rule``, ``against`` …

    Returns
    -------
    Deduplicated
        How many rows each tier drops, and how many remain.

    Raises
    ------
    FileExistsError
        As `select_rows`.
    ValueError
        If several `eps` are given with `out` or `index`, if several models made the compared columns, and as
        `deduplication.find_duplicates`.
    """
    monitor = monitor or Monitor()
    eps = options.get("eps", 0.05)
    if not isinstance(eps, int | float) and len(set(eps)) > 1 and (out is not None or index is not None):
        raise ValueError(f"eps={list(eps)}: name one to drop rows; only counting takes several")
    vectors = options.get("embedding", "embedding")
    with open_table(scores, storage_options, backend, client, monitor) as table:
        df = table.df[table.df["status"] == "ok"] if "status" in table.df.columns else table.df
        targets = targets_of(table, out) if out is not None else []
        semantic = "semantic" in (options.get("tiers") or deduplication.TIERS) and vectors in table.scores.schema.names
        used = [vectors] if semantic or index is not None else []
        encoder = table.made(options.get("keep") or "key", *used).get("encoder", {})
        if semantic:
            _warn_of_starter(encoder, monitor)
        made = encoder or None
        found = deduplication.find_duplicates(df, provenance=made, storage_options=storage_options, **options)
        counts = json.loads(found.counts().to_json(orient="records"))
        rows = len(table.df[["key"]])  # not the length of the frame: Dask would read its embeddings
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


def _warn_of_starter(encoder: Mapping[str, Any], monitor: Monitor) -> None:
    if encoder.get("model") == "starter":
        monitor.note(
            "The starter's embeddings lie close together: its semantic duplicates at the usual eps are mostly other "
            "pictures. Look at the groups, or use the tiers exact and perceptual."
        )


# --- as the last step of a run --------------------------------------------------------------------


def dedup_options(dedup: Dedup, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Options of `find_duplicates`, empty for no deduplication; raises for mistakes, given a table's columns."""
    if dedup is None or (not isinstance(dedup, Mapping) and not len(dedup)):
        return {}
    options = dict(dedup) if isinstance(dedup, Mapping) else {"tiers": [dedup] if isinstance(dedup, str) else dedup}
    if not isinstance(options.get("eps", 0.05), int | float):
        raise ValueError(f"dedup: eps={options['eps']}: name one")
    options["tiers"] = deduplication.find_duplicates(frame_of_kinds(kinds), **options).tiers
    return options


def unique_rows(
    df: Any, options: Mapping[str, Any], url: str, provenance: Mapping[str, Any], monitor: Monitor, storage: Any
) -> Unique:
    """Find the duplicates of a frame, and return the condition that drops them; their ids go into a file."""
    encoder = provenance.get("encoder", {})
    if "semantic" in options["tiers"]:
        _warn_of_starter(encoder, monitor)
    found = deduplication.find_duplicates(df, provenance=encoder or None, **options)
    others = "".join(f" {name} {value}" for name, value in options.items() if name != "tiers")
    return found.unique(url, f"dedup {', '.join(options['tiers'])}{others}", storage)
