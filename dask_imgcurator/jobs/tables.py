"""The cheap half as whole jobs on a score table: choose rows, drop duplicates, add columns, write other layouts.

Each takes a score table (a folder of files, one per shard) and writes a result with the same file names, which any of
the others accepts. No image is read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask.dataframe as dd
import numpy as np
import pyarrow as pa
from distributed import Client

from ..engine.cluster import backend_for
from ..engine.frames import More
from ..engine.run import Place, place, results, run, tasks, waves
from ..exports.base import Exported, export, formats
from ..monitor import Monitor
from ..results import Counts
from ..runs.records import made_of, note_unfinished, replacing
from ..select import selection
from ..select.settle import Settled, counts_of
from ..select.steps import Listed, Step, Top, expand_steps
from ..select.where import Where, filter_frame, parse_where
from ..steps.read import URLPath
from ..steps.score_table import (
    ScoreFiles,
    ScoreTable,
    check_makers,
    file_provenance,
    open_scores,
    provenance_of,
    write_score_file,
)
from ..storage import files
from ..storage.curated import same_folder


@dataclass(frozen=True)
class Table:
    """An open score table: its files, how to read them, and a lazy frame with one partition per file."""

    scores: ScoreTable
    backend: str
    df: Any
    client: Client | None

    @property
    def urls(self) -> list[str]:
        """Its files' URLs."""
        return self.scores.urls

    def made(self, *columns: str) -> dict[str, Any]:
        """Provenance of the first file; MixedModelsError if several models made one of the used columns."""
        return check_makers(self.scores, columns)


@contextmanager
def open_table(
    scores: URLPath,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
    light: bool = True,
) -> Iterator[Table]:
    """Open a score table, with a place to compute; `light`: no model will be loaded there."""
    name = backend_for(backend, client, cheap=light)
    table = open_scores(scores, storage_options)
    monitor = monitor or Monitor()
    note_unfinished(scores, storage_options, monitor)
    with place(client, name, monitor, light) as lent:
        yield Table(table, name, table.frame(name), lent)


def targets_of(table: Table, out: str | os.PathLike[str]) -> list[str]:
    """Files of a result, named after the table's; if several folders share a name, the folder's is added."""
    folder = os.fspath(out)
    if any(same_folder(folder, url.rpartition("/")[0]) for url in table.urls):
        raise ValueError(f"{folder} is the score table itself: choose another folder for the result")
    taken: dict[str, str] = {}
    for url in table.urls:
        name = url.rpartition("/")[2]
        if name in taken.values():
            name = f"{name.removesuffix('.parquet')}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"
        taken[url] = name
    return [files.join(folder, name) for name in taken.values()]


def write_table(
    table: Table, targets: Sequence[str], note: Mapping[str, Any], rows: dd.DataFrame | Settled
) -> list[Counts]:
    """Write the remaining rows of each file: the partition's rows, or the selected ones; counts the input, in order."""
    pairs = {str(i): pair for i, pair in enumerate(zip(table.urls, targets, strict=True))}
    read = ScoreFiles(table.backend, table.scores.schema, table.scores.storage_options)

    def build(names: Sequence[str]) -> dd.DataFrame:
        some = [pairs[name] for name in names]
        if isinstance(rows, Settled):
            return tasks(some, _write_selected, read, note, rows, label="select")
        part = rows.partitions[int(names[0]) : int(names[-1]) + 1] if len(names) < len(pairs) else rows
        return results(part, _write_partition, read, note, label="write", each=some)

    found = dict(run(table.client, waves(list(pairs), build), "writing", label=lambda name: pairs[name][1]))
    return [found[name] for name in pairs]


def _write_partition(frame: Any, pair: tuple[str, str], read: ScoreFiles, note: Mapping[str, Any]) -> Counts:
    source, target = pair
    provenance = _noted(file_provenance(source, read.storage_options) or {}, note)
    write_score_file(frame, target, provenance, read.backend, read.storage_options)
    return Counts(len(frame))


def _write_selected(pair: tuple[str, str], read: ScoreFiles, note: Mapping[str, Any], settled: Settled) -> Counts:
    (source, target), counting = pair, _Counting(settled)
    table, _ = read.keeping(counting).rows(source, read.schema)
    write_score_file(table, target, _noted(provenance_of(table.schema), note), read.backend, read.storage_options)
    return counting.counts


def _noted(provenance: dict[str, Any], note: Mapping[str, Any]) -> dict[str, Any]:
    """Add an entry to a file's provenance."""
    merged = {k: {**provenance.get(k, {}), **v} if isinstance(v, dict) else v for k, v in note.items()}
    return {**provenance, **merged}


class _Counting:
    """A selection that counts the rows it judges."""

    def __init__(self, settled: Settled) -> None:
        self.settled, self.first, self.counts = settled, settled.first, Counts()

    def kept(self, table: pa.Table, more: More | None = None) -> np.ndarray:
        verdict = self.settled.judge(table, more)
        self.counts = counts_of(self.settled, verdict, table)
        return verdict.kept


# --- selecting ------------------------------------------------------------------------------------


def select_rows(
    scores: URLPath,
    out: str | os.PathLike[str],
    steps: str | Step | Iterable[str | Step] = (),
    *,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
) -> Counts:
    """Copy selected rows of a score table to a new one.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder for the selected rows; files keep their names (if several share a name, a hash is appended).
    steps : str, Step, or iterable of them
        As for `apply_steps`, in order: ``"width >= 512"``, ``"top 30% by clip_score"``, ``"sample 20 by cluster"``,
        ``exclude("seen.txt")``. Rows whose ``status`` is not ``ok`` are never kept.
    overwrite : bool
        Whether another result in `out` is replaced completely; a rerun of the same selection needs no `overwrite`.
    storage_options : mapping, optional
        For the fsspec file systems of both tables.
    backend : {"auto", "cudf", "pandas"}, optional
        Type of the frames; by default pandas, because a GPU would not pay off here.
    client : distributed.Client, str, or int, optional
        Where to run: a client, the address of a scheduler, or a number of new worker processes. By default threads of
        this process, because there is no model to load.
    monitor : Monitor, optional
        Receives progress and notes.

    Returns
    -------
    Counts
        What each condition keeps, alone and in turn.

    Raises
    ------
    WhereError, SelectionError
        If an expression or a step has a mistake, before anything is done.
    FileNotFoundError
        If the score table does not exist.
    FileExistsError
        If `out` holds another result and `overwrite` is False, or files that this library did not write.
    ValueError
        If `out` is the score table itself, or several models made the compared scores.
    """
    parsed = list(expand_steps(steps))  # report mistakes before anything is opened
    with open_table(scores, storage_options, backend, client, monitor) as table:
        table.made(*used_columns(parsed))
        targets = targets_of(table, out)
        settled = selection.settle(table.df, parsed, alone=True).settled
        note = {"steps": [step.text for step in parsed]}
        made = made_of("select", scores, note, ", ".join(note["steps"]) or "all")
        with replacing(os.fspath(out), made, targets, overwrite, table.scores.storage_options):
            return Counts.sum(write_table(table, targets, {"selected": note}, settled))


def used_columns(steps: Iterable[Step]) -> list[str]:
    """Columns that decide a selection."""
    found: list[str] = []
    for step in steps:
        if isinstance(step, Where | Listed):
            found.extend(step.columns)
        elif isinstance(step, Top):
            found.append(step.column)
    return list(dict.fromkeys(found))


# --- other layouts --------------------------------------------------------------------------------


def export_scores(
    scores: URLPath,
    out: str | os.PathLike[str],
    format: str,
    where: str | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
    **options: Any,
) -> Exported:
    """Write a score table in the layout of another project.

    Parameters
    ----------
    scores : str, path, or sequence of them
        Score table, as for `read_scores`.
    out : str or path
        Folder or file, see `export`.
    format : str
        Name of the format, see `export`.
    where : str, optional
        Expression on the columns: export only matching rows.
    storage_options, backend, client, monitor
        As for `select_rows`.
    **options
        Options of the format, and ``overwrite``, as for `export`.

    Returns
    -------
    Exported
        The files, and their rows.

    Raises
    ------
    ExportError, WhereError
        If the format is unknown or cannot hold the rows, or the expression has a mistake.
    ValueError
        If several models made the exported columns.
    """
    with open_table(scores, storage_options, backend, client, monitor) as table:
        df, used = table.df, list[str]()
        if where is not None:
            parsed = parse_where(where, table.scores.kinds)
            df, used = filter_frame(df, parsed), [*parsed.columns]
        if (known := formats().get(format)) is not None and known.folder:
            layout = known.function(df, **{k: v for k, v in options.items() if k != "overwrite"})
            used += [*layout.sources, *layout.vectors.values()]
        table.made(*used)
        return export(df, out, format, storage_options=storage_options, **options)
