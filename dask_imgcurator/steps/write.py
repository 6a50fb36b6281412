"""Write kept samples as curated shards: `to_webdataset`.

Samples keep row order. The client plans with a few numbers per partition: neighbouring partitions whose kept samples
fit into one curated shard become one task and one shard; a larger partition becomes a task that splits its samples
over several. A key is unique within a shard (webdataset readers would merge two adjacent samples with the same key),
so a task begins a new shard before a repeated key.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import dask
import dask.dataframe as dd
import pyarrow as pa
from distributed import Client

from ..clusters.faults import JobError
from ..engine.backend import backend_of, is_dask
from ..engine.cluster import share_of_cores, turn
from ..engine.frames import meta_of, objects_stay, require_columns
from ..engine.run import Wave, current_client, results, run, waves
from ..schema import kinds_of_schema
from ..storage import files
from ..storage.curated import (
    LOCATORS,
    WriteSpec,
    check_outside,
    check_sources,
    concat_tables,
    files_there,
    is_allowed,
    overwrites,
    remove_surplus,
    write_shard,
    write_sizes,
)
from ..storage.tar_copy import WriteError, sample_sizes

#: Tasks that write side by side in a worker: hashing and copying run in parallel, a third of the work does not.
_AT_ONCE = 4

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def write_spec(
    folder: str | os.PathLike[str],
    max_count: int,
    max_size: int | str,
    storage_options: Mapping[str, Any] | None,
    source_options: Mapping[str, Any] | None,
    sources: tuple[str, ...] | None = None,
) -> WriteSpec:
    """Validate, on the client, how to write curated shards."""
    if max_count < 1:
        raise ValueError(f"max_count={max_count}: it must be at least 1")
    options = dict(storage_options or {}), dict(source_options or {})
    return WriteSpec(files.absolute(folder), max_count, parse_size(max_size), *options, sources=sources)


def parse_size(text: str | int) -> int:
    """Parse a size in bytes: ``500MB``, ``1GiB``, ``250000``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?)?B?\s*", str(text), re.IGNORECASE)
    nbytes = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if nbytes <= 0:
        raise ValueError(f"cannot read {text!r} as a size: write for example 500MB, 1GiB or a number of bytes")
    return nbytes


# --- plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Totals of a partition's kept rows, and the range of their keys."""

    rows: int
    nbytes: int
    tars: int  # shards, if cut alone
    first: str = ""  # by string order
    last: str = ""
    overwritten: str | None = None  # a source in the output folder
    outside: str | None = None  # a source outside the allowed folders


@dataclass(frozen=True)
class Group:
    """Partitions whose samples one task writes, and the number of curated shards, None if not known yet."""

    partitions: tuple[int, ...]
    tars: int | None = 1


def measure_partition(frame: Any, spec: WriteSpec) -> Kept:
    """Measure a partition's rows, without those that have no sample."""
    rows = _rows(frame)
    if not rows:
        return Kept(0, 0, 0)
    keys = [row["key"] or "" for row in rows]
    sources = {row["shard"] for row in rows}
    clash = next((url for url in sorted(sources) if overwrites(spec.folder, url)), None)
    outside = next((url for url in sorted(sources) if not is_allowed(url, spec)), None)
    return Kept(len(rows), sum(_sizes(rows)), len(_cuts(rows, spec)), min(keys), max(keys), clash, outside)


def plan_groups(kept: Sequence[Kept], spec: WriteSpec) -> list[Group]:
    """Group neighbouring partitions that fit into one curated shard."""
    groups: list[list[int]] = []
    rows = nbytes = 0
    for i, part in enumerate(kept):
        if not part.rows:
            continue
        rows, nbytes = rows + part.rows, nbytes + part.nbytes
        joined = groups and kept[groups[-1][-1]].tars == 1 and part.tars == 1
        if joined and rows <= spec.max_count and nbytes <= spec.max_nbytes:
            groups[-1].append(i)
        else:
            groups.append([i])
            rows, nbytes = part.rows, part.nbytes
    return [Group(tuple(group), _known_tars([kept[i] for i in group])) for group in groups]


def _known_tars(parts: Sequence[Kept]) -> int | None:
    """Number of shards that some partitions make; None if a key may be in two of them."""
    if len(parts) == 1:
        return parts[0].tars
    ranges = sorted((part.first, part.last) for part in parts)
    return 1 if all(before[1] < after[0] for before, after in pairwise(ranges)) else None


def _rows(frame: Any) -> list[dict[str, Any]]:
    """Locators of the rows that have a sample."""
    table = backend_of(frame).to_host(frame, list(LOCATORS))
    check_keys(table.schema)
    rows = [row for row in table.to_pylist() if (row["sample_nbytes"] or 0) > 0]
    if nameless := next((row for row in rows if not row["shard"] or row["sample_offset"] is None), None):
        raise ValueError(f"the row {nameless['key']!r} does not say where its sample is: no shard, or no offset")
    return rows


def check_keys(schema: pa.Schema) -> None:
    """Raise ValueError for keys that are not text: numbers have lost their leading zeros."""
    type_ = schema.field("key").type
    if kinds_of_schema(schema)["key"] not in ("string", "unknown"):
        raise ValueError(
            f"the column 'key' holds {type_}, but keys are text ('000012345' and 12345 are two keys): "
            'read them as text, for example with pd.read_csv(…, dtype={"key": str})'
        )


def _sizes(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    columns = ([row[name] for row in rows] for name in ("shard", "sample_offset", "sample_nbytes"))
    return sample_sizes(*columns)


def cut(keys: Sequence[str | None], sizes: Sequence[int], spec: WriteSpec) -> list[slice]:
    """Split samples into curated shards, each as full as possible."""
    cuts, start, nbytes_here = [], 0, 0
    keys_here: set[str | None] = set()
    for i, (key, nbytes) in enumerate(zip(keys, sizes, strict=True)):
        full = len(keys_here) >= spec.max_count or nbytes_here + nbytes > spec.max_nbytes or key in keys_here
        if full and i > start:
            cuts.append(slice(start, i))
            keys_here, nbytes_here, start = set(), 0, i
        keys_here.add(key)
        nbytes_here += nbytes
    return [*cuts, slice(start, len(keys))] if keys else []


def _cuts(rows: Sequence[Mapping[str, Any]], spec: WriteSpec) -> list[slice]:
    return cut([row["key"] for row in rows], _sizes(rows), spec)


def count_tars(frame: Any, spec: WriteSpec) -> int:
    """Count the curated shards of a group's rows."""
    return len(_cuts(_rows(frame), spec))


# --- write ----------------------------------------------------------------------------------------


def write_partition(frame: Any, first: tuple[int, int], spec: WriteSpec, resume: bool) -> list[dict[str, Any]]:
    """Write a group's rows as curated shards; `first`: the number of its first shard, and their count."""
    at_once = min(share_of_cores(), _AT_ONCE)
    with turn(at_once > 1, at_once):
        frame = frame[frame["sample_nbytes"] > 0]
        backend, (number, planned) = backend_of(frame), first
        cuts = _cuts(_rows(frame), spec)
        if len(cuts) != planned:
            tars = f"{len(cuts)} shards, not {planned}"
            raise WriteError(f"the rows of {number:05d}.tar make {tars}: they changed meanwhile")
        tables = ([backend.to_arrow(frame.iloc[rows])] for rows in cuts)
        return [write_shard(number + i, table, spec, resume) for i, table in enumerate(tables)]


# --- the job --------------------------------------------------------------------------------------

#: Makes a lazy frame with one partition per group of partitions, with some columns or all.
Regroup = Callable[[Sequence[Group], Sequence[str] | None], dd.DataFrame]


@dataclass(frozen=True)
class WritePlan:
    """Which task writes which curated shards."""

    groups: Sequence[Group]
    regroup: Regroup
    spec: WriteSpec
    resume: bool

    @property
    def firsts(self) -> list[int]:
        """Number of the first curated shard of each group, then the total number."""
        return list(accumulate((group.tars or 0 for group in self.groups), initial=0))

    def frame(self, numbers: Sequence[int]) -> dd.DataFrame:
        """Make the graph that writes some groups; its results are lists of ``_stats.json``."""
        firsts = self.firsts
        each = [(firsts[i], self.groups[i].tars) for i in numbers]
        frame = self.regroup([self.groups[i] for i in numbers], None)
        return results(frame, write_partition, self.spec, self.resume, label="write-webdataset", each=each)


def plan_write(
    client: Client | None, kept: Sequence[Kept], regroup: Regroup, spec: WriteSpec, resume: bool
) -> WritePlan:
    """Plan the curated shards of measured partitions; locators are reread if a key may repeat."""
    if clash := next((part.overwritten for part in kept if part.overwritten), None):
        check_sources(spec.folder, [clash])
    if outside := next((part.outside for part in kept if part.outside), None):
        check_outside(spec, outside)
    groups = plan_groups(kept, spec)
    unknown = [str(i) for i, group in enumerate(groups) if group.tars is None]

    def build(names: Sequence[str]) -> dd.DataFrame:
        frame = regroup([groups[int(name)] for name in names], LOCATORS)
        return results(frame, count_tars, spec, label="count-shards")

    for name, tars in run(client, waves(unknown, build), "reading"):
        groups[int(name)] = Group(groups[int(name)].partitions, tars)
    return WritePlan(groups, regroup, spec, resume)


def run_write(client: Client | None, plan: WritePlan) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Write, yielding each group's number and its shards' ``_stats.json`` as it finishes."""
    files.make_folder(plan.spec.folder)
    firsts = plan.firsts
    graphs = waves([str(i) for i in range(len(plan.groups))], lambda names: plan.frame([int(name) for name in names]))
    for name, written in run(client, graphs, "writing", label=lambda name: f"{firsts[int(name)]:05d}.tar"):
        yield int(name), written
    remove_surplus(plan.spec.folder, firsts[-1], plan.spec.storage_options)


def to_webdataset(
    df: Any,
    urlpath: str | os.PathLike[str],
    *,
    max_count: int = 10_000,
    max_size: int | str = "1GB",
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    compute: bool = True,
) -> Any:
    """Write the samples of a DataFrame as curated webdataset shards.

    All members of each sample are copied from its source, names and bytes unchanged, in the order of the rows. Rows
    without a sample (``read_webdataset`` adds one for a damaged tar) are left out.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With ``key``, ``shard``, ``sample_offset`` and ``sample_nbytes``. A Dask DataFrame is persisted first, because
        the start of each shard depends on all rows before it.
    urlpath : str or path
        Folder for ``00000.tar``, ``00000.parquet`` (the rows, as a score table of the tar), ``00000.idx`` and
        ``00000_stats.json``.
    max_count : int
        Maximum number of samples per shard.
    max_size : int or str
        Maximum size of a shard: bytes, or for example ``"500MB"``.
    storage_options, source_options : mapping, optional
        For the fsspec file systems of the folder and of the source shards.
    overwrite : bool
        Whether existing curated shards are replaced.
    compute : bool
        If False, return a Dask Delayed that writes.

    Returns
    -------
    list of dict, or dask.delayed.Delayed
        The content of each shard's ``_stats.json``.

    Raises
    ------
    FileExistsError
        If the folder holds curated shards, or files with their names, and `overwrite` is False.
    WriteError
        If a source was changed after it was indexed, if it is in the output folder, or if a file in the way was not
        written by this library.

    Notes
    -----
    Neighbouring partitions share a shard if their samples fit into one; a larger partition is split into several. A key
    is unique within a shard.

    Names are copied as they are, including ones that lead out of a folder (``../x.jpg``): nothing is extracted here,
    but extract tars of unknown origin with care.

    Rows may name shards anywhere, because the frame is yours; `write_selection` accepts only shards in the folders of
    its table's shards. Each image is compared with the scored one; a caption changed since then is copied as it is now,
    unless the sample's length changed.

    Hard and symbolic links in a source are left out, as in webdataset. Sparse members (up to 1 GiB) are written
    expanded.
    """
    require_columns(df, LOCATORS, "to_webdataset", "read the shards with read_webdataset and keep these columns")
    spec = write_spec(urlpath, max_count, max_size, storage_options, source_options)
    present = files_there(spec.folder, storage_options)
    if present and not overwrite:
        raise FileExistsError(
            f"{spec.folder} already holds files of curated shards ({present[0]}"
            f"{f' and {len(present) - 1} more' if len(present) > 1 else ''}): "
            "choose another folder, or pass overwrite=True"
        )
    files.make_folder(spec.folder)
    if not is_dask(df):
        kept = measure_partition(df, spec)
        check_sources(spec.folder, [kept.overwritten] if kept.overwritten else [])
        written = dask.delayed(write_partition)(df, (0, kept.tars), spec, not overwrite)
        later = dask.delayed(_finish)([written], spec)
        return later.compute(scheduler="synchronous") if compute else later
    with own_errors():
        return _write_dask(df, spec, not overwrite, compute)


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise what a partition raised, not the `JobError` around it."""
    try:
        yield
    except JobError as err:
        raise err.__cause__ or err from None


def _write_dask(df: dd.DataFrame, spec: WriteSpec, resume: bool, compute: bool) -> Any:
    client = current_client()
    df = df.persist()
    measured = results(df[list(LOCATORS)], measure_partition, spec, label="measure")
    numbers = [str(i) for i in range(df.npartitions)]
    found = dict(run(client, [Wave(numbers, measured)], "reading"))
    plan = plan_write(client, [found[i] for i in numbers], _regroup(df), spec, resume)
    if not compute:
        frame = plan.frame(range(len(plan.groups)))
        return dask.delayed(_finish_rows)(frame.to_delayed(), spec)
    return _finish([written for _, written in sorted(run_write(client, plan), key=lambda done: done[0])], spec)


def _finish_rows(rows: Sequence[Any], spec: WriteSpec) -> list[dict[str, Any]]:
    return _finish([row["object"].iat[0] for row in rows], spec)


def _finish(groups: Sequence[list[dict[str, Any]]], spec: WriteSpec) -> list[dict[str, Any]]:
    written = [stats for group in groups for stats in group]
    remove_surplus(spec.folder, len(written), spec.storage_options)
    write_sizes(spec, written)
    return written


def _regroup(df: dd.DataFrame) -> Regroup:
    """Bring each group's partitions together."""
    parts, meta = df.to_delayed(), meta_of(df)
    together = dask.delayed(_together, pure=False)

    def regroup(groups: Sequence[Group], columns: Sequence[str] | None) -> dd.DataFrame:
        names = list(columns) if columns is not None else list(meta.columns)
        frames = [together([parts[i] for i in group.partitions], names) for group in groups]
        with objects_stay():
            return dd.from_delayed(frames, meta=meta[names], verify_meta=False, prefix="group")

    return regroup


def _together(frames: Sequence[Any], columns: Sequence[str]) -> Any:
    if len(frames) == 1:
        return frames[0][list(columns)]
    backend = backend_of(frames[0])
    return backend.from_arrow(concat_tables([backend.to_arrow(frame[list(columns)]) for frame in frames]))
