"""What a search found, as a page: each query, and under it the pictures it found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..engine.backend import get_backend
from ..images.thumbnails import make_thumbnails, thumbnail
from ..storage import files
from .render import page

if TYPE_CHECKING:
    from ..similarity.queries import Query

_KINDS = {"text": "Text", "image": "Image", "like": "Like the row", "embedding": "Vector"}
_MAX_NBYTES = 64_000_000


@dataclass(frozen=True)
class Answer:
    """A query, the row that it is or the thumbnail of its image, and the rows that were found, the best first."""

    kind: str
    label: str
    row: Mapping[str, Any] | None
    uri: str | None
    best: Sequence[Mapping[str, Any]]


def _query_image(query: Query, upright: bool, storage_options: Mapping[str, Any] | None) -> str | None:
    with files.opened(query.label, storage_options) as file:
        return thumbnail(file.read(_MAX_NBYTES), upright=upright)


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
    """Make the page of what `search` found for its queries; `own` has the rows that queries are, by their number.

    `source_options` and `storage_options` are for the fsspec file systems of the shards, and of the queries' images.
    """
    rows = get_backend("pandas").to_arrow(found).to_pylist()
    own = own or {}
    answers = []
    for number, query in enumerate(queries):
        image = query.kind == "image"
        # Of a file its name alone: a page is passed on, and a path may tell who made it.
        label = query.label.partition("?")[0].rpartition("/")[2] if image else query.label
        uri = _query_image(query, upright, storage_options) if image else None
        best = [row for row in rows if row["query_number"] == number]
        answers.append(Answer(_KINDS[query.kind], label, own.get(number), uri, best))
    return page(
        "search.html.j2",
        "Search",
        title,
        notes,
        answers=answers,
        scores=["similarity", *(str(name) for name in found.columns if str(name).endswith("_score"))],
        scored="nsfw_score" in found.columns,
        images=make_thumbnails([*rows, *own.values()], upright=upright, storage_options=source_options),
    )


def write_search_page(path: str | os.PathLike[str], *args: Any, **options: Any) -> None:
    """Write `search_page`, whole or not at all; its storage options also are those of the file."""
    content = search_page(*args, **options)
    with files.write_whole(os.fspath(path), options.get("storage_options")) as file:
        file.write(content.encode())
