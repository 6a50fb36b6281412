"""Index shards into rows: `read_webdataset`."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any

import dask.dataframe as dd
import pyarrow as pa
from dask.base import tokenize

from ..clusters.faults import worker_fault
from ..engine.backend import empty_frame, get_backend
from ..engine.cluster import backend_for
from ..engine.frames import as_made, from_map
from ..json_fields import FIELD_TYPES, JsonField, as_type, parse_columns, type_of
from ..schema import arrow_schema, columns_of
from ..storage.samples import Sample, ShardIndex, as_utf8
from ..storage.tar_index import explain, hold_shard, index_shard, open_shard
from ..storage.tar_read import first_members, read_json, read_text
from ..storage.urls import expand, fingerprints

URLPath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_EXTENT_COLUMNS = ("offset", "nbytes", "sample_offset", "sample_nbytes")

#: Maximum number of shards, and of members of each, that are inspected for JSON fields and captions.
_PEEK_SHARDS, _PEEK_MEMBERS = 8, 128


@dataclass(frozen=True)
class ReadSpec:
    """How a shard becomes rows; `image` lists preferred extensions."""

    # `strict`: a shard that cannot be opened here is a `WorkerFault`, not a row.
    # With `notes`, the column ``note`` says what was not used as is.
    backend: str = "pandas"
    caption: str | None = None
    fields: tuple[JsonField, ...] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    image: tuple[str, ...] = ()
    notes: bool = False
    strict: bool = False
    versions: str = ""  # of the shards, so that persisted rows of an older version have other keys

    @property
    def names(self) -> list[str]:
        """Names of the columns: chosen fields come before ``status``."""
        names = [c.name for c in columns_of("read")]
        at = names.index("status")
        names[at:at] = [field.column for field in self.fields]
        return [*names, "note"] if self.notes else names

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the rows; fields without a type are null."""
        types = {f.column: FIELD_TYPES[f.type] if f.type else pa.null() for f in self.fields}
        return arrow_schema(self.names, types)


def index_partition(urls: Sequence[str], spec: ReadSpec) -> Any:
    """Index shards into rows, in order; a tar that cannot be read to its end adds a ``read_error`` row."""
    rows: list[dict[str, Any]] = []
    for url in urls:
        rows.extend(_index_rows(url, spec))
    typed = tuple(_convert(item, rows) for item in spec.fields)
    for row in rows:
        row["note"] = "; ".join(row.pop("notes", ())) or None
    table = pa.Table.from_pylist(rows, schema=replace(spec, fields=typed).schema)
    return get_backend(spec.backend).from_arrow(table)


def _convert(item: JsonField, rows: Sequence[dict[str, Any]]) -> JsonField:
    """Convert a field's values to its type, or to one that loses none of them; returns the field with its type."""
    name, values = item.column, [row.get(item.column) for row in rows]
    type_ = item.type or type_of(values) or item.likely
    for row, value in zip(rows, values, strict=True):
        if value is None:
            continue
        row[name] = as_type(value, type_ or "string")
        if row[name] is None and type_of([value]) is not None:
            shown = json.dumps(value, ensure_ascii=False)[:80]
            if item.guessed:
                raise ValueError(
                    f"JSON field {item.name!r} seemed to be {type_} by the first samples, but is {shown} in "
                    f"{row['key']} of {row['shard']}: give its type, such as columns={{{item.name!r}: 'string'}}"
                )
            row["notes"].append(f"{name} is not of type {type_} and so missing: {shown}".replace(";", ","))
        elif item.type is None and type_ == "string" and not isinstance(value, str | list | dict):
            row["notes"].append(f"{name} has values of several types, kept as text")
    return replace(item, type=type_)


def _index_rows(url: str, spec: ReadSpec) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_shard(url, spec.storage_options))
            if spec.strict:
                open_shard(url, spec.storage_options).close()
        except OSError as err:
            if spec.strict:
                raise worker_fault(err) from err
            index = ShardIndex([], explain(url, err))
        else:
            index = index_shard(url, spec.storage_options)
        if index.samples:
            file = stack.enter_context(open_shard(url, spec.storage_options))
            for sample in index.samples:
                yield _row(url, sample, file, spec)
    if index.error is not None:
        # Not null, because Dask's `set_index` rejects nulls.
        blank: dict[str, Any] = {"key": "", "shard": url, **dict.fromkeys(_EXTENT_COLUMNS, 0)}
        if index.broken is not None:
            blank |= {"key": index.broken.key, "sample_offset": index.broken.offset}
        yield {**blank, "status": "read_error", "error_message": index.error}


def _row(url: str, sample: Sample, file: IO[bytes], spec: ReadSpec) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": sample.key,
        "shard": url,
        "sample_offset": sample.offset,
        # Links alone cannot be copied.
        "sample_nbytes": sample.end - sample.offset if sample.members else 0,
        "offset": 0,
        "nbytes": 0,
    }
    image = sample.image(spec.image)
    if image is None:
        row |= {"status": "no_image", "error_message": sample.why_no_image(spec.image)}
    elif image.pieces is not None:
        name = as_utf8(image.name)
        problem = f"{name} is a sparse member, whose bytes are not contiguous: pack the shard without --sparse"
        row |= {"ext": image.ext, "status": "read_error", "error_message": problem}
    else:
        row |= {"offset": image.offset, "nbytes": image.nbytes, "ext": image.ext, "status": "ok"}
    row["notes"] = notes = []
    if not spec.image and len(images := sample.images) > 1:
        notes.append(f"several images: {', '.join(as_utf8(m.ext) for m in images)}".replace(";", ","))
    document: dict[str, Any] = {}
    member = sample.get("json")
    if member is not None and (spec.fields or spec.caption is not None):
        document = read_json(file, member)
        if not document:
            notes.append("the JSON is empty or not an object")
    row["caption"] = _caption(sample, document, file, spec.caption, notes)
    return row | {item.column: document.get(item.name) for item in spec.fields}


def _caption(
    sample: Sample, document: Mapping[str, Any], file: IO[bytes], name: str | None, notes: list[str]
) -> str | None:
    """Text of the caption: a member ``.txt`` or ``.en.txt``, or a JSON field."""
    if name is None or name.endswith(".txt"):
        member = sample.get(name.lower() if name else "txt")
        return None if member is None else read_text(file, member)
    value = document.get(name)
    if isinstance(value, list):
        notes.append("the caption is a list, and its first text is used")
        value = next((item for item in value if isinstance(item, str)), None)
    text: str | None = as_type(value, "string")
    return text


def peek(urls: Sequence[str], spec: ReadSpec, members: int = _PEEK_MEMBERS) -> dict[str, str | None]:
    """Infer missing types of JSON fields from the first samples; ValueError for a name that none of them has."""
    # None if all values are null. Fields with a given type may appear later.
    values: dict[str, list[Any]] = {item.name: [] for item in spec.fields if item.type is None}
    caption = spec.caption.lower() if spec.caption and spec.caption.endswith(".txt") else spec.caption
    if not values and caption is None:
        return {}
    seen: dict[str, None] = {}  # fields, and extensions of text members
    readable = False
    for url in urls[:_PEEK_SHARDS]:
        with contextlib.suppress(OSError):
            for ext, document in first_members(url, members, spec.storage_options):
                readable = True
                seen |= dict.fromkeys(document or ([ext] if ext.endswith("txt") else []))
                for name in values:
                    values[name].append((document or {}).get(name))
        if all(type_of(found) for found in values.values()) and (caption is None or caption in seen):
            break
    if readable:
        for name in [*values, *([caption] if caption is not None else [])]:
            if name not in seen:
                raise ValueError(_not_found(name, list(seen), name == caption))
    return {name: type_of(found) for name, found in values.items()}


def _not_found(name: str, seen: Sequence[str], is_caption: bool) -> str:
    close = difflib.get_close_matches(name, seen, n=2)
    hint = f" (they have: {', '.join(seen[:30]) or 'neither JSON nor text members'})"
    if close:
        hint = f" (did you mean {' or '.join(map(repr, close))}?)"
    later = "" if is_caption else f". If later ones have it, give its type, such as {name}:string."
    return f"the first samples have no {'caption' if is_caption else 'JSON field'} {name!r}{hint}{later or '.'}"


def read_webdataset(
    urlpath: URLPath,
    columns: Sequence[str] | Mapping[str, str] = (),
    *,
    caption: str | None = None,
    image: str | Sequence[str] = (),
    shards_per_partition: int = 1,
    storage_options: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> dd.DataFrame:
    """Read webdataset shards as a Dask DataFrame: a shard is a partition, a sample is a row.

    Lazy: each partition's task indexes its tars. Image bytes are not read; rows say where they are.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Shards: a path, a glob, brace notation (``{00000..00127}``), a folder, any fsspec URL.
    columns : sequence of str, or mapping of str to {"string", "int64", "float64", "bool"}
        Fields of the samples' ``.json`` members to read as columns: ``"url"``; with a type, ``"score:float64"``; under
        another name, ``"original_width=width"``. Without a type, the first samples decide it, and a later value that
        does not fit raises an error when read; with a type, a value of another kind becomes null. Lists and objects
        become text, as JSON.
    caption : str, optional
        Source of the caption: a JSON field, or a text member (``"en.txt"``); by default the ``.txt`` member. Of a list,
        the first text is used.
    image : str or sequence of str
        Extension of the member to use as the sample's image, as written after the key's dot (``"jpg"``, ``"seg.png"``;
        in any case), or several in order of preference; a sample without any of them is ``no_image``. By default the
        first member with an image extension, a plain one (``jpg``) before a prefixed one (``seg.png``).
    shards_per_partition : int
        Use more than 1 for many small shards.
    storage_options : mapping, optional
        For the fsspec file system.
    backend : {"auto", "cudf", "pandas"}, optional
        Type of the partitions; by default `imgcurator.backend`. If only the workers of the current client have GPUs,
        request ``cudf``; ``dtypes`` are then those of pandas, and Dask's own shuffles and merges do not work.

    Returns
    -------
    dask.dataframe.DataFrame
        With the columns ``key``, ``shard``, ``offset``, ``nbytes``, ``sample_offset``, ``sample_nbytes``, ``ext``,
        ``caption``, the chosen fields, ``status`` and ``error_message``. A damaged or missing tar adds one row with
        ``status = "read_error"``.

    Raises
    ------
    FileNotFoundError
        If a pattern matches nothing or no local shard exists.
    ValueError
        If the first samples have no such JSON field or caption.
    BackendError
        If ``cudf`` is requested, and neither this process nor the current client's workers can use it.

    Examples
    --------
    >>> df = read_webdataset("laion/{00000..00127}.tar", columns=["url", "license"])  # doctest: +SKIP
    """
    if shards_per_partition < 1:
        raise ValueError(f"shards_per_partition={shards_per_partition}: it must be at least 1")
    urls = expand(urlpath, storage_options)
    spec = read_spec(columns, caption, storage_options, backend_for(backend), image)
    types = peek(urls, spec)
    fields = [f if f.type else replace(f, type=types[f.name] or "string", guessed=True) for f in spec.fields]
    spec = replace(spec, fields=tuple(fields), versions=tokenize(fingerprints(urls, storage_options)))
    groups = [tuple(urls[i : i + shards_per_partition]) for i in range(0, len(urls), shards_per_partition)]
    return read_groups(groups, spec)


def read_groups(groups: Sequence[tuple[str, ...]], spec: ReadSpec) -> dd.DataFrame:
    """Make a lazy frame of shards, one partition per group."""
    with as_made(spec.backend):
        return from_map(index_partition, groups, "read-webdataset", empty_frame(spec.backend, spec.schema), spec=spec)


def read_spec(
    columns: Sequence[str] | Mapping[str, str],
    caption: str | None,
    storage_options: Mapping[str, Any] | None,
    backend: str,
    image: str | Sequence[str] = (),
) -> ReadSpec:
    """Resolve, on the client, how shards become rows."""
    extensions = tuple(ext.lower().removeprefix(".") for ext in ([image] if isinstance(image, str) else image))
    if not all(extensions):
        raise ValueError(f"image={image!r}: give an extension, such as 'jpg', or a list of them")
    fields = parse_columns(columns)
    return ReadSpec(backend, caption, fields, dict(storage_options or {}), extensions)
