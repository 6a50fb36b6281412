"""The registry of export formats, and the writing of their files.

A format is a function decorated by `export_format`, in a module of this folder; nothing else refers to it. For a folder
it is ``(df, **options) -> Layout``, for a single file ``(df, file, **options) -> rows written``.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import os
import pkgutil
import re
import shlex
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..engine.backend import backend_of
from ..engine.run import reduce
from ..schema import COLUMNS
from ..storage import files

T = TypeVar("T")


class ExportError(ValueError):
    """Rows cannot be written in a format."""


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes
    ----------
    files : list of str
        Paths or URLs of the written files.
    rows : int
        Number of exported rows.
    """

    files: list[str]
    rows: int


# --- registry -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportFormat:
    """A format of `export`: a one-line description, its function, and whether it is a folder."""

    about: str
    function: Callable[..., Any]
    folder: bool


_REGISTERED: dict[str, ExportFormat] = {}


def export_format(name: str, about: str, folder: bool = True) -> Callable[[T], T]:
    """Register the function of a format."""

    def register(function: T) -> T:
        _REGISTERED[name] = ExportFormat(about, cast(Any, function), folder)
        return function

    return register


def formats() -> Mapping[str, ExportFormat]:
    """All formats by name, as registered by the modules of this folder."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_REGISTERED.items()))


def export(
    df: Any,
    out: str | os.PathLike[str],
    format: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Write a score table in the layout of another project.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        A score table; rows that are not ``ok`` are left out. The written columns are read once: pass a table
        (`read_scores`), not a lazy `embed`.
    out : str or path
        Folder or file, depending on the format (see ``dask-imgcurator export --help``).
    format : str
        Name of the format, such as ``clip-retrieval``.
    storage_options : mapping, optional
        For the fsspec file system of `out`.
    overwrite : bool
        Whether existing files of the format are replaced.
    **options
        Options of the format, such as ``arch`` for ``datacomp`` and ``column`` for ``list``.

    Returns
    -------
    Exported
        The files, and their rows. In a folder, each partition with rows gets its own files, numbered without gaps, so
        the largest partition bounds memory. If anything fails, no file is left.

    Raises
    ------
    ExportError
        If the format does not exist, a column that it needs is missing, or rows cannot be written in it.
    FileExistsError
        If files of the format exist and `overwrite` is False.
    """
    known = formats()
    if format not in known:
        raise ExportError(f"unknown format {format!r}: use {', '.join(known)}")
    backend_of(df)  # raises for anything but a frame
    chosen, target, storage = known[format], files.absolute(out), dict(storage_options or {})
    if chosen.folder:
        return _write_folder(df, target, chosen.function(df, **options), storage, overwrite)
    if not overwrite and files.exists(target, storage):
        raise FileExistsError(f"{target} already exists: choose another name, or overwrite")
    files.make_folder(target.rpartition("/")[0] or ".")
    with files.write_whole(target, storage) as file:
        return Exported([target], chosen.function(df, file, **options))


# --- columns --------------------------------------------------------------------------------------

#: The function that adds a step's columns, and the command.
_ADDED_BY = {
    "read": ("read_webdataset", "score"),
    "embed": ("embed", "score"),
    "measure": ("embed", "score"),
    "aesthetic": ("score_aesthetic", "add --aesthetic-head NAME"),
    "nsfw": ("score_nsfw", "add --nsfw-head NAME"),
    "text": ("score_clip", "add --clip-score"),
}


@dataclass(frozen=True)
class Field:
    """A column of a layout's Parquet files.

    `sources` are columns of the table to fill it from: the first one that exists, or with `make` all of them. `type`
    None leaves the type unchanged. `needs` is the column to name in the error if no source exists.
    """

    name: str
    sources: tuple[str, ...]
    type: pa.DataType | None = None
    needs: str | None = None
    make: Callable[[pa.Table], pa.Array] | None = None

    def read(self, table: pa.Table) -> Any:
        """Return the column's values."""
        if self.make is not None:
            return self.make(table.select(self.sources))
        (source,) = self.sources
        try:
            return table[source] if self.type is None else table[source].cast(self.type)
        except pa.ArrowInvalid as err:
            raise ExportError(f"column {source!r} cannot be written as {self.name!r} of {self.type}: {err}") from err


def require(df: Any, column: str, format_: str, vector: bool = False) -> None:
    """Raise `ExportError` if a frame lacks a column that a format needs, naming the function that adds it."""
    if column in df.columns:
        return
    command = f"score … --column {shlex.quote(column)}"
    remedy = f"read the shards with read_webdataset(columns=[{column!r}, …])"
    if column in COLUMNS:
        function, command = _ADDED_BY[COLUMNS[column].step]
        remedy = f"{function} adds it"
    elif vector:
        command, remedy = "score", "embed or embed_text adds it, under the name that they are given"
    raise ExportError(
        f"{format_} needs the column {column!r}: {remedy}; on the command line: {command} "
        f"(available: {', '.join(map(str, df.columns))})"
    )


def filled(df: Any, fields: Iterable[Field], format_: str) -> list[Field]:
    """Return the fields that a frame can fill, each with its source column."""
    found = []
    for item in fields:
        if there := [name for name in item.sources if name in df.columns]:
            found.append(replace(item, sources=(there[0],)))
        elif item.needs:
            require(df, item.needs, format_)
    return found


def with_status(df: Any, columns: Iterable[str]) -> Any:
    """Select some columns of a frame, and the one that `only_ok` needs."""
    return df[list(dict.fromkeys([*columns, *(["status"] if "status" in df.columns else [])]))]


def only_ok(frame: Any) -> Any:
    """Leave out the failed rows of a partition."""
    return frame[frame["status"] == "ok"] if "status" in frame.columns else frame


def concatenated(found: Sequence[list[T]]) -> list[T]:
    """Merge lists, for `reduce`."""
    return list(chain.from_iterable(found))


# --- folders --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The files made from a partition.

    `fields` make the Parquet file. `names` maps each output (``parquet``, ``npz`` for all arrays, or the name of an
    array) to its path in the folder, with ``{}`` for the number, which has `digits` digits (0: as many as the number of
    files). `vectors` maps names of arrays to columns of the table.
    """

    fields: Sequence[Field]
    names: Mapping[str, str]
    digits: int = 0
    vectors: Mapping[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """Columns of the table that fill the Parquet file."""
        return list(dict.fromkeys(chain.from_iterable(item.sources for item in self.fields)))

    def present(self, folder: str, storage_options: Mapping[str, Any]) -> list[str]:
        """Return the files of a folder with names of the layout."""
        found = []
        for path in self.names.values():
            pattern = re.compile(re.escape(Path(path).name).replace(r"\{\}", "[0-9]+"))
            inside = files.join(folder, path).rpartition("/")[0]
            listed = files.list_files(inside, Path(path).suffix, storage_options)
            found += [url for url in listed if pattern.fullmatch(url.rpartition("/")[2])]
        return found


@dataclass(frozen=True)
class _Part:
    """The files written from a partition: URLs, and widths of vectors, by name."""

    rows: int
    urls: Mapping[str, str]
    widths: Mapping[str, int]


@dataclass(frozen=True)
class _Writer:
    """Writes the files of a partition under temporary names with a common prefix.

    Which partitions have rows, and hence their numbers, is known only after writing. Counting first would not help:
    Dask splits a table of Parquet files into different partitions if it reads different columns.
    """

    layout: Layout
    prefix: str
    storage: Mapping[str, Any]

    def __call__(self, frame: Any) -> list[_Part | Exception]:
        # Raising an exception would end the export while other tasks are still writing.
        failed = f"{self.prefix}failed"
        if files.exists(failed, self.storage):
            return []
        try:
            frame = only_ok(frame)
            return [self._write(frame)] if len(frame) else []
        except Exception as err:
            with files.write_whole(failed, self.storage):
                return [err]

    def _write(self, frame: Any) -> _Part:
        host = backend_of(frame).to_host(frame, self.layout.sources)
        table = pa.table({item.name: item.read(host) for item in self.layout.fields})
        arrays = {name: _half(frame, column) for name, column in self.layout.vectors.items()}
        urls = {what: f"{self.prefix}{uuid.uuid4().hex}" for what in self.layout.names}
        for what, url in urls.items():
            with files.write_whole(url, self.storage) as file:
                if what == "parquet":
                    pq.write_table(table, file, compression="snappy")  # every reader supports it
                elif what == "npz":
                    np.savez(file, **arrays)  # type: ignore[arg-type]
                else:
                    np.save(file, arrays[what])
        return _Part(len(frame), urls, {name: array.shape[1] for name, array in arrays.items()})


def _half(frame: Any, column: str) -> np.ndarray:
    """Vectors of all rows of a partition: (n, d) float16."""
    values, rows = backend_of(frame).matrix(frame[column])
    if len(rows) < len(frame):
        missing = np.setdiff1d(np.arange(len(frame)), rows)[0]
        name = "key" if "key" in frame.columns else frame.columns[0]
        row = backend_of(frame).to_host(frame.iloc[missing : missing + 1], [name])[name][0].as_py()
        raise ExportError(
            f"{len(frame) - len(rows)} rows have no vector in column {column!r}, among them that of {name} {row!r}: "
            f"drop them first, with {column} is not null"
        )
    return np.asarray(values.half().cpu().numpy())


def _write_folder(df: Any, folder: str, layout: Layout, storage: Mapping[str, Any], overwrite: bool) -> Exported:
    """Write a frame as the numbered files of a layout, completely or not at all."""
    there = layout.present(folder, storage)
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} already holds such files ({there[0]}{f' and {len(there) - 1} more' if there[1:] else ''}): "
            "choose another folder, or overwrite"
        )
    files.make_folder(folder)
    files.remove_partial(folder)
    prefix = files.join(folder, f".partial-{uuid.uuid4().hex[:8]}/")
    if files.is_local(folder):
        prefix = files.temporary_name(files.join(folder, "export-"))
    writer = _Writer(layout, prefix, storage)
    try:
        found = reduce(with_status(df, [*layout.sources, *layout.vectors.values()]), writer, concatenated)
        parts = _checked(found, layout, folder)
        urls = _name(parts, layout, folder, storage)
    finally:
        _clear(prefix, storage)
        files.remove_partial(folder, own=True)
    new = {url.rpartition("/")[2] for url in urls}  # full URLs may be spelled in several ways
    for url in there:
        if url.rpartition("/")[2] not in new:
            files.remove(url, storage)
    return Exported(urls, sum(part.rows for part in parts))


def _checked(found: Sequence[_Part | Exception], layout: Layout, folder: str) -> list[_Part]:
    """Raise the error of a partition, or for inconsistencies between partitions."""
    parts = []
    for part in found:
        if isinstance(part, Exception):
            raise part
        parts.append(part)
    if not parts:
        raise ExportError(f"nothing to write to {folder}: no row is left, or none is ok")
    for name, column in layout.vectors.items():
        narrow, *wider = sorted({part.widths[name] for part in parts})
        if wider:
            raise ExportError(
                f"column {column!r} holds vectors of {narrow} numbers and of {wider[0]}: export embeddings of one model"
            )
    return parts


def _name(parts: Sequence[_Part], layout: Layout, folder: str, storage: Mapping[str, Any]) -> list[str]:
    """Rename the files of all partitions to their final names, which are returned."""
    digits = layout.digits or len(str(len(parts)))
    old = [part.urls[what] for part in parts for what in layout.names]
    new = [files.join(folder, p.format(str(i).zfill(digits))) for i in range(len(parts)) for p in layout.names.values()]
    for inside in {url.rpartition("/")[0] for url in new}:
        files.make_folder(inside)

    def move(source: str, target: str) -> None:
        if files.is_local(source):
            files.local_path(source).replace(files.local_path(target))
            return
        fs, _ = files.file_system(source, storage)
        try:
            files.persist(target, lambda: fs.copy([source], [target]))  # in lists, names are not patterns
        except NotImplementedError:  # it can only rename, like sftp
            fs.mv(source, target)

    names = dict(zip(old, new, strict=True))
    files.at_once(lambda source: move(source, names[source]), old)
    return new


def _clear(prefix: str, storage: Mapping[str, Any]) -> None:
    """Remove the files that still have temporary names."""
    if files.is_local(prefix):
        start = files.local_path(prefix)
        for left in start.parent.glob(f"{glob.escape(start.name)}*"):
            left.unlink(missing_ok=True)
        return
    for url in files.list_files(prefix.rstrip("/"), "", storage):
        files.remove(url, storage)
    fs, path = files.file_system(prefix.rstrip("/"), storage)
    with contextlib.suppress(Exception):  # object stores have no folders
        fs.rmdir(path)
