"""The page about a score table: counts, funnel, histograms, pictures, duplicates, errors, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..images.thumbnails import PAGE_SIDE, make_thumbnails
from ..results import ConditionCount, RunResult
from ..schema import STATUSES
from ..select.settle import Settled
from ..steps.score_table import ScoreTable, look_at_all
from ..storage import files
from .histograms import KEPT, OTHER, OWN, Figure, Kind
from .render import ROW, number, page
from .survey import Survey, survey

_GROUPS, _MEMBERS = 12, 5  # groups of duplicates to show, and rows of each
_IDENTITY = ["shard", "key", "sample_offset"]
_KINDS = (
    Kind("in", KEPT, "kept"),
    Kind("own", OWN, "dropped by a condition on it alone"),
    Kind("out", OTHER, "dropped by another"),
)


@dataclass
class Subject:
    """The subject of a report, besides the rows of its score files."""

    title: str
    samples: int
    by_status: Mapping[str, int]
    kept: int | None  # None if nothing was selected
    funnel: Sequence[ConditionCount]
    run: RunResult | None = None  # the run that made the table
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # shown first

    @property
    def ok(self) -> int:
        """Readable rows."""
        return self.by_status.get("ok", 0) if self.by_status else self.samples


# --- groups of duplicates -------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Duplicates side by side: numbers of groups, dropped rows and rows not found, and the shown groups with titles."""

    count: int
    dropped: int
    lost: int
    shown: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    images: Mapping[tuple[str, int], str]


def _chosen_groups(groups: pd.DataFrame) -> pd.DataFrame:
    """Rows of the groups to show: the largest, the least similar, and some at random."""
    dropped = groups[~groups["kept"]]
    size = groups.groupby("group").size().sort_values(ascending=False, kind="stable")
    least = dropped.groupby("group")["similarity"].min().sort_values(kind="stable").dropna()
    drawn = size.sort_index().sample(frac=1, random_state=0)
    names = [*size.index[: _GROUPS // 3], *least.index[: _GROUPS // 3], *drawn.index]
    names = list(dict.fromkeys(names))[:_GROUPS]
    return groups[groups["group"].isin(names)].groupby("group", sort=False).head(_MEMBERS)


def _members(chosen: pd.DataFrame, table: ScoreTable, found: Survey) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The table's rows of some groups, by shard, key and sample_offset."""
    wanted = set(chosen[_IDENTITY].itertuples(index=False, name=None))
    keys = pa.array(sorted({key for _, key, _ in wanted}), pa.string())
    rows = {}
    for batch in table.batches({*ROW, "sample_offset", *found.scores}):
        for row in batch.filter(pc.is_in(batch["key"].cast(pa.string()), keys)).to_pylist():
            name = (row["shard"], row["key"], row.get("sample_offset", 0))
            if name in wanted:
                rows[name] = row
    return rows


def _groups(
    groups: pd.DataFrame,
    table: ScoreTable,
    found: Survey,
    upright: bool,
    source_options: Mapping[str, Any] | None,
) -> Groups:
    if not len(groups):
        return Groups(0, 0, 0, [], {})
    chosen = _chosen_groups(groups)
    rows = _members(chosen, table, found)
    images = make_thumbnails(rows.values(), side=PAGE_SIDE, upright=upright, storage_options=source_options)
    sizes = groups.groupby("group").size()
    shown, lost = [], 0
    for name, members in chosen.groupby("group", sort=False):
        cards = [
            {**rows[m.shard, m.key, m.sample_offset], "member": m}
            for m in members.itertuples(index=False)
            if (m.shard, m.key, m.sample_offset) in rows
        ]
        lost += len(members) - len(cards)
        more = int(sizes[name]) - len(members)
        if cards:
            shown.append((f"{sizes[name]} images{f'; {more} more are not shown' if more else ''}", cards))
    return Groups(len(sizes), int((~groups["kept"] & ~groups["in_reference"]).sum()), lost, shown, images)


# --- the page -------------------------------------------------------------------------------------


def render_report(
    subject: Subject,
    found: Survey,
    table: ScoreTable,
    source_options: Mapping[str, Any] | None = None,
    groups: pd.DataFrame | None = None,
) -> str:
    """Make the page of a surveyed table, a few MB at most."""
    # The table is reread only for the rows of `groups` (a table like `Duplicates.groups`). Thumbnails are made from the
    # source shards, with `source_options`; the page counts those that fail.
    selected = subject.kept is not None
    upright = bool(subject.provenance.get("decode", {}).get("adjust_orientation"))
    walls = {w.title if selected else w.unselected: w for w in found.walls.values() if w.rows}
    walls.pop(None, None)
    marks = {name: [m for m in found.marks if m.column == name] for name in found.histograms}
    failures = found.failures()
    return page(
        "report.html.j2",
        "Curation report",
        subject.title,
        subject.notes,
        "slider.js",
        subject=subject,
        found=found,
        selected=selected,
        failures=failures if len(found.settled.conditions) > 1 else {},
        figures=[Figure(n, h, marks[n], _KINDS if selected else ()) for n, h in found.histograms.items()],
        walls=walls,
        images=make_thumbnails(
            (row for w in walls.values() for row in w.shown),
            side=PAGE_SIDE,
            upright=upright,
            storage_options=source_options,
        ),
        groups=None if groups is None else _groups(groups, table, found, upright, source_options),
        STATUSES=STATUSES,
    )


def write_run_report(
    folder: str,
    tables: Sequence[str],
    settled: Settled,
    result: RunResult,
    storage_options: Mapping[str, Any],
    source_options: Mapping[str, Any] | None = None,
) -> str:
    """Write a run's ``report.html`` from its score files; returns its URL; `settled` is the run's selection."""
    table = ScoreTable(look_at_all(tables, storage_options), storage_options)
    found = survey(table, settled)
    title = folder.rstrip("/").rpartition("/")[2] or folder
    numbers = (result.samples, result.by_status, result.kept, result.funnel)
    subject = Subject(title, *numbers, result, result.provenance, list(result.notes))
    counts = found.counts
    if counts.rows != result.samples or (result.kept is not None and counts.kept != result.kept):
        subject.notes.append(
            f"The score files now hold {counts.rows:,} samples and would keep {counts.kept:,}; the run counted "
            f"{result.samples:,} and {number(result.kept)}. Histograms and pictures show the files, counts the run."
        )
    target = files.join(folder, "report.html")
    with files.write_whole(target, storage_options) as file:
        file.write(render_report(subject, found, table, source_options).encode())
    return target
