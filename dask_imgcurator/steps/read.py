"""Index shards into rows: `read_webdataset`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import dask.dataframe as dd
import pyarrow as pa

from ..engine.backend import get_backend, resolve_name
from ..engine.frames import from_map
from ..schema import COLUMNS, arrow_schema, columns_of
from ..storage.samples import Sample, ShardIndex, as_utf8
from ..storage.tar_index import explain, hold_shard, index_shard, open_shard
from ..storage.tar_read import first_json, read_json, read_text
from ..storage.urls import expand

URLPath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: Arrow types that a user may give to a JSON field.
FIELD_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}

_JSON_TYPES = {int: "int64", float: "float64", bool: "bool"}

_EXTENT_COLUMNS = ("offset", "nbytes", "sample_offset", "sample_nbytes")

#: Maximum number of shards inspected for the types of JSON fields.
_PEEK_SHARDS = 8


@dataclass(frozen=True)
class ReadSpec:
    """How a shard becomes rows; `fields` pairs names with keys of `FIELD_TYPES`, `image` lists preferred extensions."""

    backend: str = "pandas"
    caption: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    image: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the rows: chosen fields come before ``status``."""
        names = [c.name for c in columns_of("read")]
        at = names.index("status")
        names[at:at] = [name for name, _ in self.fields]
        return arrow_schema(names, {name: FIELD_TYPES[type_] for name, type_ in self.fields})


def index_partition(urls: Sequence[str], spec: ReadSpec) -> Any:
    """Index shards into rows, in order; a tar that cannot be read to its end adds a ``read_error`` row."""
    rows: list[dict[str, Any]] = []
    for url in urls:
        rows.extend(_index_rows(url, spec))
    table = pa.Table.from_pylist(rows, schema=spec.schema)
    return get_backend(spec.backend).from_arrow(table)


def _index_rows(url: str, spec: ReadSpec) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold_shard(url, spec.storage_options))
        except OSError as err:
            index = ShardIndex([], explain(url, err))
        else:
            index = index_shard(url, spec.storage_options)
        if index.samples:
            file = stack.enter_context(open_shard(url, spec.storage_options))
            for sample in index.samples:
                yield _row(url, sample, file, spec)
    if index.error is not None:
        blank: dict[str, Any] = {"shard": url, **dict.fromkeys(_EXTENT_COLUMNS, 0)}
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
        problem = f"{name} is a sparse member, whose bytes do not lie in one piece: pack the shard without --sparse"
        row |= {"ext": image.ext, "status": "read_error", "error_message": problem}
    else:
        row |= {"offset": image.offset, "nbytes": image.nbytes, "ext": image.ext, "status": "ok"}
    document: dict[str, Any] = {}
    member = sample.get("json")
    if member is not None and (spec.fields or spec.caption is not None):
        document = read_json(file, member)
    if spec.caption is not None:
        row["caption"] = _as_type(document.get(spec.caption), "string")
    elif (text := sample.get("txt")) is not None:
        row["caption"] = read_text(file, text)
    for name, type_ in spec.fields:
        row[name] = _as_type(document.get(name), type_)
    return row


def _as_type(value: Any, type_: str) -> Any:
    """Convert a JSON value to a column's type; null if it is of another kind."""
    if value is None:
        return None
    if type_ == "string":
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # JSON allows half a surrogate pair ("\ud800"), UTF-8 does not: it becomes U+FFFD.
        return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if type_ == "bool":
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if type_ == "int64":
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
    try:
        return float(value)
    except OverflowError:
        return None


def peek_fields(
    urls: Sequence[str], names: Sequence[str], storage_options: Mapping[str, Any] | None = None, samples: int = 32
) -> dict[str, str]:
    """Infer types of JSON fields from the first samples of the first shard that has any of them."""
    # Whole numbers are ``int64``, mixed with fractions ``float64``, true and false ``bool``, everything else ``string``
    # (lists and objects as JSON text).
    seen: dict[str, set[str]] = {name: set() for name in names}
    for url in urls[:_PEEK_SHARDS]:
        with contextlib.suppress(OSError):
            for document in first_json(url, samples, storage_options):
                for name in names:
                    if (value := document.get(name)) is not None:
                        seen[name].add(_JSON_TYPES.get(type(value), "string"))
        if any(seen.values()):
            break
    out = {}
    for name, types in seen.items():
        if types == {"int64", "float64"}:
            types = {"float64"}
        out[name] = types.pop() if len(types) == 1 else "string"
    return out


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

    Lazy: each tar is indexed by the task of its own partition. Image bytes are not read; rows say where they lie.

    Parameters
    ----------
    urlpath : str, path, or sequence of them
        Shards: a path, a glob, brace notation (``{00000..00127}``), a folder, any fsspec URL.
    columns : sequence of str, or mapping of str to {"string", "int64", "float64", "bool"}
        Fields of the samples' ``.json`` members to read as columns. The types of a plain list are found from the
        first samples of the first shard that can be read; a value of another kind becomes null.
    caption : str, optional
        JSON field that holds the caption; by default it is the ``.txt`` member.
    image : str or sequence of str
        Extension of the member that is "the" image of a sample, as it stands after the key's dot (``"jpg"``,
        ``"seg.png"``; in any case), or several, the preferred one first; a sample without any of them is
        ``no_image``. By default the first member with an image's extension, a plain one (``jpg``) before one with a
        prefix (``seg.png``).
    shards_per_partition : int
        More than 1 for many small shards.
    storage_options : mapping, optional
        For the fsspec file system.
    backend : {"auto", "cudf", "pandas"}, optional
        Of the partitions; by default `imgcurator.backend`.

    Returns
    -------
    dask.dataframe.DataFrame
        With the columns ``key``, ``shard``, ``offset``, ``nbytes``, ``sample_offset``, ``sample_nbytes``, ``ext``,
        ``caption``, the chosen fields, ``status`` and ``error_message``. A tar that is damaged or missing
        adds one row with
        ``status = "read_error"``.

    Raises
    ------
    FileNotFoundError
        If a pattern matches nothing or no local shard exists.
    BackendError
        If cudf is asked for and cannot work here.

    Examples
    --------
    >>> df = read_webdataset("laion/{00000..00127}.tar", columns=["url", "license"])  # doctest: +SKIP
    """
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is a string: give a list, columns=[{columns!r}]")
    if shards_per_partition < 1:
        raise ValueError(f"shards_per_partition={shards_per_partition}: it must be at least 1")
    urls = expand(urlpath, storage_options)
    spec = read_spec(urls, columns, caption, storage_options, backend, image)
    groups = [tuple(urls[i : i + shards_per_partition]) for i in range(0, len(urls), shards_per_partition)]
    return read_groups(groups, spec)


def read_groups(groups: Sequence[tuple[str, ...]], spec: ReadSpec) -> dd.DataFrame:
    """Make a lazy frame of shards, one partition per group."""
    meta = get_backend(spec.backend).from_arrow(spec.schema.empty_table())
    return from_map(index_partition, groups, "read-webdataset", meta, spec=spec)


def read_spec(
    urls: Sequence[str],
    columns: Sequence[str] | Mapping[str, str],
    caption: str | None,
    storage_options: Mapping[str, Any] | None,
    backend: str | None,
    image: str | Sequence[str] = (),
) -> ReadSpec:
    """Resolve, on the client, how shards become rows."""
    taken = [name for name in columns if name in COLUMNS]
    if taken:
        raise ValueError(
            f"columns={taken}: these names belong to columns of this library; rename the JSON fields or leave them out"
        )
    if isinstance(columns, Mapping):
        wrong = {n: t for n, t in columns.items() if t not in FIELD_TYPES}
        if wrong:
            raise ValueError(f"unknown types of columns {wrong}: use {', '.join(FIELD_TYPES)}")
        fields = dict(columns)
    else:
        fields = peek_fields(urls, list(columns), storage_options) if columns else {}
    extensions = tuple(ext.lower().removeprefix(".") for ext in ([image] if isinstance(image, str) else image))
    if not all(extensions):
        raise ValueError(f"image={image!r}: give an extension, such as 'jpg', or a list of them")
    return ReadSpec(resolve_name(backend), caption, tuple(fields.items()), dict(storage_options or {}), extensions)
