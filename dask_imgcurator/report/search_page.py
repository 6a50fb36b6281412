"""What a search found, as a page: each query, and under it the pictures it found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ..engine.backend import get_backend
from ..images.thumbnails import make_thumbnails, thumbnail
from ..similarity.queries import Query
from ..storage import files
from . import render as page

__all__ = ["search_page", "write_search_page"]

_KINDS = {"text": "Text", "image": "Image", "like": "Like the row", "embedding": "Vector"}
_MAX_NBYTES = 64_000_000


def _query_image(query: Query, upright: bool, storage_options: Mapping[str, Any] | None) -> str:
    """Make the thumbnail of a query that is an image file."""
    with files.opened(query.label, storage_options) as file:
        uri = thumbnail(file.read(_MAX_NBYTES), upright=upright)
    return f'<p><img src="{uri}" alt="The query"></p>\n' if uri else ""


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Make a table of all rows, of those too that have no picture."""
    cells = [
        [
            str(row["rank"]),
            page.figure_text(row["similarity"]),
            page.text(row.get("key"), 80),
            page.url(row.get("shard")),
            page.text(row.get("caption")),
        ]
        for row in rows
    ]
    head = ("rank", "similarity", "key", "shard", "caption")
    return f"<details><summary>As a table</summary>{page.table('Rows', head, cells)}</details>\n"


def search_page(
    found: pd.DataFrame,
    queries: Sequence[Query],
    title: str,
    notes: Sequence[str] = (),
    *,
    own: Mapping[int, Mapping[str, Any]] | None = None,
    upright: bool = False,
    source_options: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> str:
    """Make a self-contained page of what was found.

    Parameters
    ----------
    found : pandas.DataFrame
        Of `search`.
    queries : sequence of Query
        In the order of its results.
    title : str
        Of the table that was searched; any text.
    notes : sequence of str
        What a reader must know; any text.
    own : mapping, optional
        Number of a query to the row that it is.
    upright : bool
        Whether thumbnails follow the EXIF orientation.
    source_options, storage_options : mapping, optional
        For the fsspec file systems of the shards, and of the queries' images.

    Returns
    -------
    str
        HTML. Pictures whose ``nsfw_score`` is high or missing are blurred until they are clicked.
    """
    rows = get_backend("pandas").to_arrow(found).to_pylist()
    own = own or {}
    images = make_thumbnails([*rows, *own.values()], upright=upright, storage_options=source_options)
    scores = ["similarity", *(str(name) for name in found.columns if str(name).endswith("_score"))]
    sections = []
    for number, query in enumerate(queries):
        best = [row for row in rows if row["query_number"] == number]
        picture = _query_image(query, upright, storage_options) if query.kind == "image" else ""
        if number in own:
            picture = page.wall([(own[number], "")], images, scores[1:])
        # Of a file its name alone: a page is passed on, and a path may tell who made it.
        name = query.label.partition("?")[0].rpartition("/")[2] if query.kind == "image" else query.label
        label = page.text(name, 1000)
        content = f"<p>{_KINDS[query.kind]}: <strong>{label}</strong></p>\n{picture}"
        if best:
            content += page.wall([(row, f"<strong>{row['rank']}.</strong> ") for row in best], images, scores)
            content += _rows_table(best)
        else:
            content += "<p>Nothing was found: no row that may be compared is left.</p>\n"
        sections.append(page.section(f"Query {number + 1}", content))
    about = (
        f"<p>Similarity is the cosine of the query's and the image's embeddings; the highest come first. "
        f"{page.veils_note('nsfw_score' in found.columns)}</p>\n"
    )
    return page.document("Search", title, notes, [about, *sections])


def write_search_page(path: str | os.PathLike[str], *args: Any, **options: Any) -> None:
    """Write `search_page`, whole or not at all; its storage options also are those of the file."""
    content = search_page(*args, **options)
    with files.write_whole(os.fspath(path), options.get("storage_options")) as file:
        file.write(content.encode())
