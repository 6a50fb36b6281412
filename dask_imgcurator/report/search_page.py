"""Search results as a page: each query, with the pictures found below it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..engine.backend import get_backend
from ..images.thumbnails import PAGE_SIDE, make_thumbnails, thumbnail
from ..storage import files
from .render import page

if TYPE_CHECKING:
    from ..similarity.queries import Query

_KINDS = {"text": "Text", "image": "Image", "like": "Like the row", "embedding": "Vector"}
_MAX_NBYTES = 64_000_000


@dataclass(frozen=True)
class Answers:
    """Search results per query, in order; `own` has the rows that are themselves queries, by number."""

    found: pd.DataFrame
    queries: Sequence[Query]
    title: str
    notes: Sequence[str] = ()
    own: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    upright: bool = False


@dataclass(frozen=True)
class _Answer:
    """A query, its row or its image's thumbnail, and the rows found, best first."""

    kind: str
    label: str
    row: Mapping[str, Any] | None
    uri: str | None
    best: Sequence[Mapping[str, Any]]


def write_search_page(
    path: str | os.PathLike[str],
    answers: Answers,
    source_options: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Write the page; `source_options` are for the shards, `storage_options` for the page and images of queries."""
    rows = get_backend("pandas").to_arrow(answers.found).to_pylist()
    shown = []
    for number, query in enumerate(answers.queries):
        label, uri = query.label, None
        if query.kind == "image":
            with files.opened(label, storage_options) as file:
                uri = thumbnail(file.read(_MAX_NBYTES), side=PAGE_SIDE, upright=answers.upright)
            # For a file, only its name: pages are shared, and a path may reveal who made them.
            label = label.partition("?")[0].rpartition("/")[2]
        best = [row for row in rows if row["query_number"] == number]
        shown.append(_Answer(_KINDS[query.kind], label, answers.own.get(number), uri, best))
    pictured = [*rows, *answers.own.values()]
    content = page(
        "search.html.j2",
        "Search",
        answers.title,
        answers.notes,
        answers=shown,
        scores=["similarity", *(str(name) for name in answers.found.columns if str(name).endswith("_score"))],
        scored="nsfw_score" in answers.found.columns,
        images=make_thumbnails(pictured, side=PAGE_SIDE, upright=answers.upright, storage_options=source_options),
    )
    with files.write_whole(os.fspath(path), storage_options) as out:
        out.write(content.encode())
