"""Score tables: one Parquet file per shard, with its provenance in the footer; `read_scores`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import dask.dataframe as dd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dask.base import tokenize

from ..engine.backend import empty_frame, get_backend
from ..engine.cluster import backend_for
from ..engine.frames import Picked, Reader, RowFilter
from ..schema import METADATA_KEY, conform, kinds_of_schema, unify_schemas
from ..storage import files
from ..storage.urls import fingerprints, first_bytes, what_is
from .read import URLPath

#: Rows of a streamed table in memory at a time; and rows per task that reads only a few columns.
_BATCH, _ROWS_AT_ONCE = 1 << 15, 1 << 20

#: Rows sampled to find out whether a column's text repeats.
_FIRST = 1000

#: Column that `ScoreTable.batches` adds on request: numbers of the file and of the row in it, 32 bits each.
PLACE = " place"

#: Columns with few distinct texts, read as a dictionary, on which conditions are faster.
_REPEATED, _CODED = ("shard", "status"), pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True)
class ScoreFiles(Reader):
    """How score files are read; `filters` drop rows before their other columns are read."""

    backend: str
    schema: pa.Schema
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    filters: tuple[RowFilter, ...] = ()
    versions: str = ""  # of the files, so that persisted rows of an older version have other keys
    at_once: int = 1

    @property
    def meta(self) -> Any:
        """An empty partition."""
        return empty_frame(self.backend, self.schema)

    def keeping(self, rows: RowFilter) -> ScoreFiles:
        """Read fewer rows."""
        return replace(self, filters=(*self.filters, rows))

    def __call__(self, items: Sequence[Any], columns: Sequence[str] | None = None) -> Any:
        """Read files as one partition; Dask's optimizer sets `columns` to those used later."""
        wanted = self.schema if columns is None else _schema_of(self.schema, columns)
        read = [self.rows(item, wanted) for item in items]
        frame = get_backend(self.backend).from_arrow(pa.concat_tables([table for table, _ in read]))
        if any(kept is not None for _, kept in read):  # labels as if all rows had been read
            masks = [np.ones(len(table), bool) if kept is None else kept for table, kept in read]
            frame.index = np.flatnonzero(np.concatenate(masks))
        return frame

    def table(self, items: Sequence[Any], names: Sequence[str]) -> pa.Table:
        """Read columns of some files."""
        wanted = _schema_of(self.schema, names, _REPEATED)
        return pa.concat_tables([self.rows(item, wanted)[0] for item in items])

    def rows(self, item: Any, wanted: pa.Schema) -> tuple[pa.Table, np.ndarray | None]:
        """Read columns of a file's wanted rows, with its metadata; also returns which rows: (n,) bool, None for all."""
        # Text whose wanted type is a dictionary stays encoded, as stored.
        url, picked = (item.item, item.mask) if isinstance(item, Picked) else (item, None)
        if picked is not None and not item.kept:
            return wanted.empty_table(), picked
        coded = [field.name for field in wanted if field.type == _CODED]
        with files.opened_parquet(url, self.storage_options, coded) as parquet:

            def read(schema: pa.Schema) -> pa.Table:
                return conform(files.persist(url, lambda: parquet.read(schema.names, use_threads=False)), schema, url)

            def more(names: Iterable[str]) -> pa.Table:
                return read(_schema_of(self.schema, names, coded))

            if picked is not None and len(picked) != parquet.metadata.num_rows:
                raise ValueError(f"{url} has changed since its rows were selected: select them again")
            if not self.filters:
                table = read(wanted)
                return (table if picked is None else table.filter(pa.array(picked))), picked
            first = dict.fromkeys(n for rows in self.filters for n in rows.first if n in self.schema.names)
            table = more(first)
            masks = [rows.kept(table, more) for rows in self.filters]
            kept: np.ndarray = np.logical_and.reduce(masks if picked is None else [picked, *masks])
            if not kept.any():
                return wanted.empty_table().replace_schema_metadata(table.schema.metadata), kept
            rest = [name for name in wanted.names if name not in first]
            others = more(rest)
        columns = [(table if name in first else others)[name] for name in wanted.names]
        found = pa.Table.from_arrays(columns, schema=wanted.with_metadata(table.schema.metadata))
        return (found if kept.all() else found.filter(pa.array(kept))), kept


def _schema_of(schema: pa.Schema, names: Iterable[str], coded: Container[str] = ()) -> pa.Schema:
    """Choose columns; text columns in `coded` become dictionaries."""
    fields = [schema.field(name) for name in names]
    return pa.schema([f.with_type(_CODED) if f.name in coded and f.type == pa.string() else f for f in fields])


def write_score_file(
    frame: Any, url: str, provenance: Mapping[str, Any], backend: str, storage_options: Mapping[str, Any]
) -> pa.Schema:
    """Write a partition or an Arrow table as a score file, and return its schema."""
    table = frame if isinstance(frame, pa.Table) else get_backend(backend).to_arrow(frame)
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(provenance, sort_keys=True)})
    # Vectors compress better with their bytes grouped by significance. Dictionaries are for repeating text: otherwise
    # they make files larger and cost a third of the time.
    vectors = [f.name for f in table.schema if f.type == pa.list_(pa.float32())]
    options = {
        "compression": "zstd",
        "use_dictionary": [f.name for f in table.schema if pa.types.is_string(f.type) and _repeats(table[f.name])],
        "use_byte_stream_split": [f"{name}.list.element" for name in vectors],
    }
    with files.write_whole(url, storage_options) as file, pq.ParquetWriter(file, table.schema, **options) as writer:
        if len(table):  # an empty row group is an error to some readers
            writer.write_table(table)
    return table.schema.remove_metadata()


def _repeats(texts: pa.ChunkedArray) -> bool:
    """Whether most of a column's first values repeat."""
    first = texts.slice(0, _FIRST)
    return 2 * len(first.unique()) <= len(first)


# --- files and tables -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreFile:
    """What a score file's footer says; `provenance` is empty for files of other origin."""

    url: str
    schema: pa.Schema
    provenance: Mapping[str, Any]
    rows: int = 0

    @property
    def json_fields(self) -> set[str]:
        """Columns that come from fields of the samples' JSON."""
        return set(self.provenance.get("read", {}).get("fields", {}))


def look_at(url: str, storage_options: Mapping[str, Any] | None = None) -> ScoreFile:
    """Read a score file's footer."""
    try:
        footer, schema = files.parquet_footer(url, storage_options)
    except pa.ArrowException as err:
        words = what_is(first_bytes(url, storage_options))
        raise ValueError(f"{url} is not a readable Parquet file{f'; it is {words}' if words else f': {err}'}") from err
    return ScoreFile(url, schema.remove_metadata(), provenance_of(schema), footer.num_rows)


def provenance_of(schema: pa.Schema) -> dict[str, Any]:
    """Return the provenance in a file's schema; empty for files of other origin."""
    try:
        return dict(json.loads((schema.metadata or {})[METADATA_KEY.encode()]))
    except (KeyError, ValueError):
        return {}


def look_at_all(urls: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> list[ScoreFile]:
    """Read the footers of score files."""
    return files.at_once(lambda url: look_at(url, storage_options), urls)


def file_provenance(url: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return a score file's provenance; None if it is missing, damaged or not this library's."""
    try:
        return dict(look_at(url, storage_options).provenance) or None
    except (OSError, ValueError):
        return None


def schema_of(found: Iterable[ScoreFile]) -> pa.Schema:
    """Schema of a table of several files: all their columns."""
    distinct: dict[pa.Schema, ScoreFile] = {}
    last = None
    for file in found:
        if last is None or not file.schema.equals(last):  # hashing a schema takes a hundred times as long
            distinct.setdefault(last := file.schema, file)
    loose = set[str]().union(*(file.json_fields for file in distinct.values()))
    return unify_schemas(((file.url, schema) for schema, file in distinct.items()), loose)


@dataclass(frozen=True)
class ScoreTable:
    """Score files that are one table, ordered by their shards' URLs; files of other origin by their own."""

    files: Sequence[ScoreFile]
    storage_options: Mapping[str, Any]

    @property
    def urls(self) -> list[str]:
        """The files' URLs."""
        return [file.url for file in self.files]

    @cached_property
    def schema(self) -> pa.Schema:
        """All columns of all files."""
        return schema_of(self.files)

    @property
    def shared(self) -> dict[str, Any]:
        """The provenance common to all files."""
        first, *others = (file.provenance for file in self.files)
        return {name: value for name, value in first.items() if all(made.get(name) == value for made in others)}

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of each column, for `parse_where`."""
        return kinds_of_schema(self.schema)

    def batches(self, columns: Container[str], coded: Iterable[str] = ()) -> Iterator[pa.Table]:
        """Stream the given columns, as far as the table has them, some ten thousand rows at a time."""
        coded = {*_REPEATED, *coded}
        schema = _schema_of(self.schema, [name for name in self.schema.names if name in columns], coded)
        some: list[pa.Table] = []
        for number, file in enumerate(self.files):
            names, row = [name for name in schema.names if name in file.schema.names], number << 32
            with files.opened_parquet(file.url, self.storage_options, coded) as parquet:
                for batch in parquet.iter_batches(_BATCH, columns=names):
                    table = conform(pa.Table.from_batches([batch]), schema, file.url)
                    if PLACE in columns:
                        table = table.append_column(PLACE, pa.array(np.arange(row, row + len(batch))))
                        row += len(batch)
                    some.append(table)
                    if sum(map(len, some)) >= _BATCH:
                        yield pa.concat_tables(some)
                        some = []
        if some:
            yield pa.concat_tables(some)

    def fetch(self, places: Iterable[int], columns: Container[str]) -> dict[int, dict[str, Any]]:
        """Read columns of a few rows, given their `PLACE` from `batches`."""
        by_file: dict[int, list[int]] = {}
        for place in sorted(set(places)):
            by_file.setdefault(place >> 32, []).append(place)
        wanted = _schema_of(self.schema, [name for name in self.schema.names if name in columns])
        read, found = ScoreFiles("pandas", self.schema, self.storage_options), dict[int, dict[str, Any]]()
        for number, some in by_file.items():
            table, _ = read.rows(self.files[number].url, wanted)
            rows = table.take([place & 0xFFFFFFFF for place in some]).to_pylist()
            found.update(zip(some, rows, strict=True))
        return found

    def frame(self, backend: str, versions: str = "") -> dd.DataFrame:
        """Make a lazy frame with a partition per file; pass the files' `versions` if users may persist it."""
        rows = max(1, sum(file.rows for file in self.files) // len(self.files))
        at_once = max(1, _ROWS_AT_ONCE // rows)
        read = ScoreFiles(backend, self.schema, self.storage_options, versions=versions, at_once=at_once)
        return scores_from_files(self.urls, read)


# --- who made a column ----------------------------------------------------------------------------

#: Fields that distinguish models.
_MODEL = ("model", "pretrained", "weights_sha256", "backbone_sha256", "starter_sha256")


class MixedModelsError(ValueError):
    """A column of a table was made by several models: its values cannot be compared."""


def model_name(provenance: Mapping[str, Any]) -> str:
    """The readable name of a score file's model."""
    encoder = provenance.get("encoder", {})
    named = " of ".join(str(encoder[name]) for name in ("model", "pretrained") if encoder.get(name))
    return named or "an unknown model"


def check_makers(table: ScoreTable, columns: Iterable[str]) -> dict[str, Any]:
    """Raise `MixedModelsError` if several models made the embeddings or scores in use; returns a provenance."""
    for column in columns:
        first: tuple[str, Mapping[str, Any]] | None = None
        for file in table.files:
            maker = _maker(column, file.provenance)
            if maker is None:
                continue
            if first is None:
                first = file.url, maker
            elif maker != first[1]:
                differs = next(name for name in {**first[1], **maker} if first[1].get(name) != maker.get(name))
                raise MixedModelsError(
                    f"the values of {column!r} in {first[0]} were made with {differs} {first[1].get(differs)!r}, those "
                    f"of {file.url} with {maker.get(differs)!r}: they cannot be compared, give the files of one model"
                )
    return dict(table.files[0].provenance)


def _maker(column: str, provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """The model and head that made a column of a file; None if no model did."""
    encoder = {name: provenance.get("encoder", {}).get(name) for name in _MODEL}
    if column == "embedding":
        return encoder
    made = {**provenance.get("heads", {}), **provenance.get("added", {})}.get(column)
    return {**encoder, "head": made} if made else None


# --- opening them ---------------------------------------------------------------------------------


def open_scores(urlpath: URLPath, storage_options: Mapping[str, Any] | None = None) -> ScoreTable:
    """Find the files of a score table and read their footers; ValueError for tables that do not describe images."""
    table = open_files(urlpath, storage_options)
    # Tables of other origin may lack much, even keys, but they must have samples to write or embeddings to compare.
    if "shard" not in table.kinds and "list" not in table.kinds.values():
        first = table.urls[0]
        raise ValueError(
            f"{first} is not a score table: it has neither a column 'shard' nor embeddings (available: "
            f"{', '.join(table.schema.names)}); if there are shards beside it, as from img2dataset, score those "
            f"first: dask-imgcurator score '{first.rpartition('/')[0]}/*.tar' --out SCORES"
        )
    return table


def open_files(urlpath: URLPath, storage_options: Mapping[str, Any] | None = None) -> ScoreTable:
    """Find Parquet files and read their footers."""
    items = [urlpath] if isinstance(urlpath, str | os.PathLike) else list(urlpath)
    urls: list[str] = []
    for item in [os.fspath(i) for i in items]:
        if item.endswith(".parquet") and (not files.is_local(item) or files.local_path(item).is_file()):
            urls.append(files.absolute(item))
            continue
        found = files.list_files(item, ".parquet", storage_options)
        if not found:
            raise FileNotFoundError(f"no score table at {item!r}: {_instead(item, storage_options)}")
        urls.extend(found)
    looks = look_at_all(list(dict.fromkeys(urls)), storage_options)
    looks.sort(key=lambda file: (str(file.provenance.get("shard", "")), file.url))
    return ScoreTable(looks, dict(storage_options or {}))


def _instead(item: str, storage_options: Mapping[str, Any] | None) -> str:
    """What to give instead of something that is not a score table."""
    inner = files.join(item, "scores")
    if files.list_files(inner, ".parquet", storage_options):
        return f"did you mean {inner}?"
    if re.fullmatch(r"[<>=!]*-?[\d.]+|=|and|or|not", item):
        return "if this is part of an expression, put the expression in quotes: --where 'aesthetic_score >= 5'"
    return "expected a .parquet file or a folder with such files"


def scores_from_files(urls: Iterable[str | Sequence[str]], read: ScoreFiles) -> dd.DataFrame:
    """Read score files as partitions of one or several files, in the order given."""
    groups = [(item,) if isinstance(item, str) else tuple(item) for item in urls]
    return read.frame(groups, "read-scores")


def read_scores(
    urlpath: URLPath, *, storage_options: Mapping[str, Any] | None = None, backend: str | None = None
) -> dd.DataFrame:
    """Read a score table: the Parquet files written by `score`, `select` or `to_webdataset`.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Folder with ``*.parquet``, or the files themselves.
    storage_options : mapping, optional
        For the fsspec file system.
    backend : {"auto", "cudf", "pandas"}, optional
        Type of the partitions.

    Returns
    -------
    dask.dataframe.DataFrame
        One partition per file, with the columns of all files, null where a file lacks one. Files are sorted by the URL
        of their shard, which is the order in which `to_webdataset` writes samples.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a column has types in two files without a common type.
    """
    table = open_files(urlpath, storage_options)
    return table.frame(backend_for(backend), tokenize(fingerprints(table.urls, storage_options)))
