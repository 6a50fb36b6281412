"""Pages about any score table: a report, and a comparison of two selections."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import pyarrow as pa

from ..engine.run import Place
from ..monitor import Monitor
from ..report import comparison, report
from ..report.survey import survey
from ..runs.plan import model_notes
from ..select import selection
from ..select.settle import settled_where
from ..select.steps import Step, expand_steps
from ..select.where import parse_where
from ..steps.read import URLPath
from ..steps.score_table import ScoreTable, check_makers, look_at, open_scores
from ..storage import files
from .tables import open_table

_GROUP_COLUMNS = {
    "group",
    "key",
    "shard",
    "sample_offset",
    "kept",
    "in_reference",
    "tier",
    "similarity",
    "distance",
}


def write_report(
    scores: URLPath,
    out: str | os.PathLike[str],
    steps: str | Step | Iterable[str | Step] = (),
    *,
    groups: str | os.PathLike[str] | pd.DataFrame | None = None,
    source_options: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
) -> str:
    """Write a page that shows what a selection keeps and drops.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        The HTML file.
    steps : str, Step, or iterable of them
        The selection, as for `select_rows`; without steps, the page shows the table.
    groups : path, str, or pandas.DataFrame, optional
        Table of duplicates (`drop_duplicates` with ``groups=``, or `Duplicates.groups`), to show side by side.
    source_options : mapping, optional
        For the fsspec file systems of the source shards, which thumbnails are made from; by default as for the table.
    storage_options, client, monitor
        As for `select_rows`.

    Returns
    -------
    str
        `out`: a self-contained file that loads nothing from outside, of a few MB at most, because it only shows counts,
        histograms, and a few pictures of each kind. Pictures whose shards cannot be read are left out and counted.

    Raises
    ------
    WhereError, SelectionError
        If the selection has a mistake, before anything is done.
    FileNotFoundError
        If the score table or the file of groups does not exist.
    ValueError
        If `groups` is not such a table, or several models made the scores.

    Notes
    -----
    The table is streamed once, without embeddings, after steps that rank have read their column.
    """
    parsed = list(expand_steps(steps))
    target = os.fspath(out)
    _check_target(target)
    options = dict(storage_options or {})
    shown = _read_groups(groups, options)
    # Pages are made from a few rows, in pandas, wherever the selection is computed.
    with open_table(scores, options, "pandas", client, monitor) as table:
        check_makers(table.scores, _shown_of(table.scores.schema))
        settled = selection.settle(table.df, parsed, alone=True).settled
        found = survey(table.scores, settled)
        provenance, notes = _provenance(table.scores)
        counts = found.counts
        kept = counts.kept if settled.conditions else None
        subject = report.Subject(
            _title(scores), counts.rows, counts.by_status, kept, counts.funnel, None, provenance, notes
        )
        html = report.render_report(subject, found, table.scores, _or(source_options, options), shown)
    with files.write_whole(target, options) as file:
        file.write(html.encode())
    return target


def compare_selections(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    out: str | os.PathLike[str],
    scores: URLPath | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
) -> comparison.Compared:
    """Write a page that shows what two selections have in common, and what only one of them keeps.

    Parameters
    ----------
    a, b : str or path
        Score tables (folders written by `select_rows` or `drop_duplicates`), or expressions on `scores`.
    out : str or path
        The HTML file.
    scores : str, path, or sequence of them, optional
        Score table for expressions.
    storage_options : mapping, optional
        For the fsspec file systems of the tables and of `out`.
    source_options : mapping, optional
        For the fsspec file systems of the source shards, which thumbnails are made from; by default as for the tables.

    Returns
    -------
    comparison.Compared
        How many rows are in both, and in only one of them; the page is in `out`.

    Raises
    ------
    WhereError
        If an expression has a mistake.
    FileNotFoundError
        If `a` or `b` is neither a score table nor, with `scores`, an expression.

    Notes
    -----
    Rows are the same if ``shard``, ``key`` and ``sample_offset`` are equal. Each table is streamed twice, without
    embeddings; memory holds 8 bytes per kept row.
    """
    target = os.fspath(out)
    _check_target(target)
    options = dict(storage_options or {})
    (left, said), (right, more) = (_side(item, scores, options) for item in (a, b))
    notes = list(dict.fromkeys([*said, *more]))
    found = comparison.compare_sides(left, right)
    html = comparison.render_comparison(left, right, found, _or(source_options, options), notes)
    with files.write_whole(target, options) as file:
        file.write(html.encode())
    return found


def _shown_of(schema: pa.Schema) -> list[str]:
    """Columns that a page shows."""
    return [name for name in schema.names if name != "embedding"]


def _check_target(target: str) -> None:
    if not target.lower().endswith((".html", ".htm")):
        raise ValueError(f"{target!r} is not an HTML file: use a name, such as 'report.html'")
    folder = files.local_path(target).parent if files.is_local(target) else None
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}: make it, or name another file than {target}")


def _or(given: Mapping[str, Any] | None, otherwise: Mapping[str, Any]) -> Mapping[str, Any]:
    return otherwise if given is None else given


def _title(scores: URLPath) -> str:
    items = [scores] if isinstance(scores, str | os.PathLike) else list(scores)
    names = [os.fspath(item) for item in items]
    names = [str(files.local_path(n).absolute()) if files.is_local(n) else n.rstrip("/") for n in names]
    # Most folders are called 'scores'; the parent's name says more.
    shown = ["/".join(name.partition("?")[0].split("/")[-2:]) for name in names]
    return shown[0] if len(shown) == 1 else f"{shown[0]} and {len(shown) - 1} more"


def _provenance(table: ScoreTable) -> tuple[dict[str, Any], list[str]]:
    """The provenance of a table's scores, and caveats for the reader."""
    made = [file.provenance for file in table.files]
    # Leave out entries that always differ between files.
    provenance = table.shared
    encoder = made[0].get("encoder", {})
    notes = model_notes(encoder.get("model"), encoder.get("pretrained"))
    others = {str(m.get("encoder", {}).get("model")) for m in made} - {str(encoder.get("model"))}
    if others or any(m.get("encoder", {}) != encoder for m in made):
        names = ", ".join(sorted({str(encoder.get("model")), *others}))
        notes.append(f"The files of this table were not all made by the same model and weights ({names}).")
    if not encoder:
        notes.append("The table does not record how its scores were made: this library did not write it.")
    return provenance, notes


def _side(
    item: str | os.PathLike[str], scores: URLPath | None, storage_options: Mapping[str, Any]
) -> tuple[comparison.Side, list[str]]:
    """One of two selections: a score table, or an expression on `scores`."""
    name, where = os.fspath(item), None
    try:
        table = open_scores(name, storage_options)
    except (FileNotFoundError, NotADirectoryError):
        if scores is None:
            raise FileNotFoundError(
                f"no score table at {name!r}; if it is an expression, name the score table for it too"
            ) from None
        table, where = open_scores(scores, storage_options), name
    parsed = None if where is None else parse_where(where, table.kinds)
    check_makers(table, _shown_of(table.schema))
    provenance, notes = _provenance(table)
    steps = provenance.get("selected", {}).get("steps", []) if where is None else []
    return comparison.Side(name, table, settled_where(parsed), steps), notes


def _read_groups(
    groups: str | os.PathLike[str] | pd.DataFrame | None, storage_options: Mapping[str, Any]
) -> pd.DataFrame | None:
    if groups is None:
        return None
    if not isinstance(groups, pd.DataFrame):
        look_at(os.fspath(groups), storage_options)  # says what it is, if not a Parquet file
        with files.opened(os.fspath(groups), storage_options) as file:
            frame = pd.read_parquet(file)
        name = repr(os.fspath(groups))
    else:
        frame, name = groups, "groups"
    if missing := _GROUP_COLUMNS - set(frame.columns):
        raise ValueError(
            f"{name} is not a table of duplicates: it lacks {', '.join(sorted(missing))} (dedup --groups writes one)"
        )
    return frame
