"""Pack pictures that are not in tars, from folders of files and Parquet with image bytes, into webdataset shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from ..engine.run import Place, place, run, tasks, waves
from ..images.formats import format_of
from ..monitor import Monitor
from ..results import count
from ..steps.read import URLPath
from ..steps.write import own_errors, parse_size
from ..storage import files
from ..storage.samples import IMAGE_EXTENSIONS
from ..storage.urls import fingerprint

#: Record of the sources in a folder of packed shards.
_RECORD = ".packed.json"

#: Names of key columns, and of the members of a Hugging Face image.
_KEYS = ("__key__", "key", "uid", "id")
_BYTES, _PATH = "bytes", "path"

#: Extensions of formats that differ from the format's name.
_EXTENSIONS = {"JPEG": "jpg", "JPEG2000": "jp2"}


@dataclass(frozen=True)
class Part:
    """The input of one shard: samples of a folder, or rows of a Parquet file."""

    url: str  # of the shard
    samples: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()  # a key, its extensions and their files
    table: str = ""
    start: int = 0
    rows: int = 0


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    image: str | None = None,
    max_count: int = 10_000,
    max_size: int | str = "1GB",
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    out_options: Mapping[str, Any] | None = None,
    client: Place = None,
    monitor: Monitor | None = None,
) -> list[str]:
    """Pack pictures into webdataset shards, byte for byte.

    Parameters
    ----------
    source : str or path
        A folder of pictures, including subfolders and companion files with the same name (``cat.jpg``, ``cat.txt``,
        ``cat.json``); or a Parquet file, or a folder of them, with a column of encoded images, like Hugging Face's
        image datasets.
    out : str or path
        Folder for the shards, ``00000.tar`` and so on.
    image : str, optional
        Name of the image column, if a table has several.
    max_count, max_size : int, str
        Maximum samples and bytes per shard; for tables, only samples count.
    overwrite : bool
        Whether shards in `out` packed from something else are replaced.
    storage_options, out_options : mapping, optional
        For the fsspec file systems of the source and of `out`.
    client : distributed.Client, str, or int, optional
        Where to run, as for `select_rows`.
    monitor : Monitor, optional
        Receives progress and notes.

    Returns
    -------
    list of str
        The shards. A sample's key is its path in the folder without extension, with dots replaced by underscores; for a
        row, it is its ``key``, ``uid`` or ``id``, or the file's name and the row's number. Other columns of plain
        values become the sample's ``.json``.

    Raises
    ------
    FileNotFoundError
        If there are no pictures.
    FileExistsError
        If `out` holds shards of something else and `overwrite` is False.
    ValueError
        If two samples would have the same key, or it is unclear which column holds the images.
    """
    monitor = monitor or Monitor()
    folder, reading, writing = files.absolute(out), dict(storage_options or {}), dict(out_options or {})
    root = files.absolute(source)
    found = _listed(root, reading, folder)
    tables = [url for url in found if url.lower().endswith(".parquet")]
    if tables and not any(map(_is_picture, found)):
        parts = _parts_of_tables(tables, folder, image, max_count, reading)
    else:
        samples, ignored = _samples(root, found)
        if ignored:
            monitor.note(f"{count(len(ignored), 'file')} beside the pictures match no picture, such as {ignored[0]}.")
        parts = _parts_of_samples(samples, found, folder, max_count, parse_size(max_size))
    if not parts:
        raise FileNotFoundError(
            f"no pictures in {root}: expected {', '.join(sorted(IMAGE_EXTENSIONS)[:8])} … or Parquet"
        )
    by_url = {part.url: part for part in parts}
    files.make_folder(folder)
    there = _claim(folder, _record(root, parts, image, found), overwrite, writing)
    todo = [url for url in by_url if url not in there]
    if todo:
        monitor.packing(len(todo))

    def build(names: Sequence[str]) -> Any:
        return tasks([by_url[name] for name in names], _pack, image, reading, writing, label="pack")

    with own_errors(), files.no_partial(folder), place(client, "pandas", monitor, light=True) as lent:
        for _, stats in run(lent, waves(todo, build), "packing"):
            monitor.wrote(stats)
    return list(by_url)


def pictures_of(source: URLPath, out: str) -> str | None:
    """The folder, if it holds pictures or tables and no shards; None for anything else."""
    items = [source] if isinstance(source, str | os.PathLike) else list(source)
    if len(items) != 1 or not files.is_local(folder := os.fspath(items[0])) or not files.local_path(folder).is_dir():
        return None
    if any(url.lower().endswith(".tar") for url in files.list_files(folder, "")):
        return None
    found = _listed(files.absolute(folder), {}, files.absolute(out))
    return folder if any(_is_picture(url) or url.lower().endswith(".parquet") for url in found) else None


def _is_picture(url: str) -> bool:
    return url.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _claim(folder: str, record: str, overwrite: bool, options: Mapping[str, Any]) -> set[str]:
    """Claim a folder for packed shards, and return the existing ones, each of which is complete."""
    there = set(files.list_files(folder, ".tar", options))
    known = files.read_text(files.join(folder, _RECORD), options)
    ours = {files.join(folder, f"{i:05d}.tar") for i in range(json.loads(known)["shards"])} if known else set()
    if foreign := sorted(there - ours):
        raise FileExistsError(f"{foreign[0]} was not written by pack: choose another folder, or move it away")
    if known == record:
        return there
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} holds shards packed from something else ({min(there)}): choose another folder, or --overwrite"
        )
    for url in there:
        files.remove(url, options)
    with files.write_whole(files.join(folder, _RECORD), options) as file:
        file.write(record.encode())
    return set()


def _listed(root: str, options: Mapping[str, Any], out: str) -> dict[str, int]:
    """Files below a folder, or the file itself, sorted, with sizes; without hidden files and those in `out`."""
    if files.is_local(root):
        path = files.local_path(root)
        if path.is_file():
            return {str(path): path.stat().st_size}
        found = {str(p): p.stat().st_size for p in path.rglob("*") if p.is_file()}
    else:
        fs, inside = files.file_system(root, options)
        infos = files.persist(root, lambda: fs.find(inside, detail=True))
        found = {fs.unstrip_protocol(name): int(info["size"]) for name, info in infos.items()}
    below, inside = len(root.rstrip("/")) + 1, f"{out.rstrip('/')}/"
    shown = [url for url in sorted(found) if not any(name.startswith(".") for name in url[below:].split("/"))]
    return {url: found[url] for url in shown if not url.startswith(inside)}


def _record(root: str, parts: Sequence[Part], image: str | None, sizes: Mapping[str, int]) -> str:
    """Everything that decides the shards: the files, their versions, and how they are split."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.samples}\0{part.table}\0{part.start}\0{part.rows}\n".encode())
        for url in [url for _, members in part.samples for _, url in members] or [part.table]:
            digest.update(f"{sizes[url]}\0{fingerprint(url) if files.is_local(url) else ''}\n".encode())
    return json.dumps({"source": root, "files": digest.hexdigest(), "image": image, "shards": len(parts)}, indent=1)


# --- folders --------------------------------------------------------------------------------------


def _samples(root: str, found: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Pictures and companion files by key and extension; and files that match no picture."""
    below = len(root.rstrip("/")) + 1
    pictures: dict[str, str] = {}  # by path without extension, and with it
    samples: dict[str, dict[str, str]] = {}
    others = []
    for url in found:
        path = PurePosixPath(url[below:] or url.rpartition("/")[2])
        extension = path.suffix.lower().removeprefix(".")
        if not _is_picture(url):
            others.append((url, path))
            continue
        stem = str(path.with_suffix(""))
        key = str(path.with_name(path.stem.replace(".", "_")))
        if key in samples and extension in samples[key]:
            raise ValueError(f"{url} and {samples[key][extension]} would both have the key {key!r}: rename one of them")
        samples.setdefault(key, {})[extension] = url
        pictures[stem] = pictures[str(path)] = key
    ignored = []
    for url, path in others:
        owner = pictures.get(str(path.with_suffix("")))
        if owner is None or not path.suffix:
            ignored.append(url)
        else:
            samples[owner].setdefault(path.suffix.lower().removeprefix("."), url)
    return samples, ignored


def _parts_of_samples(
    samples: Mapping[str, Mapping[str, str]], sizes: Mapping[str, int], folder: str, max_count: int, max_size: int
) -> list[Part]:
    parts: list[list[tuple[str, tuple[tuple[str, str], ...]]]] = []
    room = 0
    for key, members in samples.items():
        size = sum(sizes[url] + 1024 for url in members.values())
        if not parts or size > room or len(parts[-1]) == max_count:
            parts.append([])
            room = max_size
        parts[-1].append((key, tuple(members.items())))
        room -= size
    return [Part(files.join(folder, f"{i:05d}.tar"), tuple(part)) for i, part in enumerate(parts)]


# --- tables ---------------------------------------------------------------------------------------


def _parts_of_tables(
    tables: Sequence[str], folder: str, image: str | None, max_count: int, options: Mapping[str, Any]
) -> list[Part]:
    parts: list[Part] = []
    for url in tables:
        with files.opened_parquet(url, options) as parquet:
            _image_column(parquet.schema_arrow, image, url)  # raises
            rows = parquet.metadata.num_rows
        for start in range(0, rows, max_count):
            target = files.join(folder, f"{len(parts):05d}.tar")
            parts.append(Part(target, table=url, start=start, rows=min(max_count, rows - start)))
    return parts


def _rows(part: Part, image: str | None, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples from the rows of a table: a key, and the content of its members."""
    with files.opened_parquet(part.table, options) as parquet:
        column = _image_column(parquet.schema_arrow, image, part.table)
        key = next((name for name in _KEYS if name in parquet.schema_arrow.names), None)
        stem, at = PurePosixPath(part.table).stem.replace(".", "_"), 0
        for batch in parquet.iter_batches(256):
            if at + len(batch) > part.start and at < part.start + part.rows:
                for number, row in enumerate(batch.to_pylist(), at):
                    if part.start <= number < part.start + part.rows:
                        own = row.pop(key) if key is not None else None
                        named = f"{stem}/{number:09d}" if own is None else str(own).replace(".", "_")
                        yield named, _members(row, column)
            at += len(batch)


def _members(row: dict[str, Any], column: str) -> dict[str, bytes]:
    value = row.pop(column)
    data, path = (value.get(_BYTES), value.get(_PATH)) if isinstance(value, dict) else (value, None)
    members: dict[str, bytes] = {}
    if data is not None:
        named = PurePosixPath(path or "").suffix.lower().removeprefix(".")
        known = format_of(data) or "JPEG"  # anything else is reported when decoded
        members[named if named in IMAGE_EXTENSIONS else _EXTENSIONS.get(known, known.lower())] = data
    for name in ("caption", "text"):
        if isinstance(row.get(name), str):
            members["txt"] = row[name].encode()
            break
    rest = {name: value for name, value in row.items() if not isinstance(value, bytes) and not _has_bytes(value)}
    rest = {name: None if value != value else value for name, value in rest.items()}  # NaN is not JSON
    if rest or not members:  # an empty row is a sample too
        members["json"] = json.dumps(rest, ensure_ascii=False, default=str).encode()
    return members


def _has_bytes(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, bytes) for item in value.values())


def _image_column(schema: pa.Schema, image: str | None, url: str) -> str:
    """The column that holds encoded images: binary, or Hugging Face's pair of bytes and path."""

    def holds(type_: pa.DataType) -> bool:
        if pa.types.is_struct(type_):
            return type_.get_field_index(_BYTES) >= 0 and holds(type_.field(_BYTES).type)
        return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))

    found = [field.name for field in schema if holds(field.type)]
    if image is not None and image not in found:
        raise ValueError(f"{url} has no column {image!r} of images (available: {', '.join(found) or 'none'})")
    if image is None and len(found) != 1:
        these = f"there are {', '.join(found)}: name one with --image" if found else "none holds binary data"
        raise ValueError(f"{url}: it is unclear which column holds the images; {these}")
    return image or found[0]


# --- writing --------------------------------------------------------------------------------------


def _pack(part: Part, image: str | None, reading: Mapping[str, Any], writing: Mapping[str, Any]) -> dict[str, Any]:
    """Write one shard; returns its name, samples and bytes."""
    with files.write_whole(part.url, writing) as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            if part.table:
                _pack_rows(tar, part, image, reading)
            for key, sources in part.samples:
                for extension, url in sources:
                    with files.opened(url, reading) as source:
                        size = source.seek(0, os.SEEK_END)
                        source.seek(0)
                        _add(tar, f"{key}.{extension}", source, size)
        nbytes = file.tell()
    return {"shard": part.url.rpartition("/")[2], "count": part.rows or len(part.samples), "nbytes": nbytes}


def _pack_rows(tar: tarfile.TarFile, part: Part, image: str | None, reading: Mapping[str, Any]) -> None:
    keys = set()
    for key, members in _rows(part, image, reading):
        if key in keys:
            raise ValueError(f"{part.table} has several rows with the key {key!r}: they would be one sample")
        keys.add(key)
        for extension, data in members.items():
            _add(tar, f"{key}.{extension}", io.BytesIO(data), len(data))


def _add(tar: tarfile.TarFile, name: str, source: Any, size: int) -> None:
    info = tarfile.TarInfo(name)  # no owner or time: the same files make the same shards
    info.size = size
    tar.addfile(info, source)
