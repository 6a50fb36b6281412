"""The self-contained page about a score table: counts, funnel, histograms, image walls, errors, how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..images.thumbnails import Place, make_thumbnails
from ..schema import STATUSES
from ..select import where as filters
from ..select.settle import settled_where
from ..steps.score_table import file_schema
from ..storage import files
from . import histograms
from . import render as page
from .survey import Survey, read_batches, survey

if TYPE_CHECKING:
    from ..results import ConditionCount, RunResult

__all__ = ["Subject", "render_report", "write_run_report"]

_FAILURES = 12  # sets of failed conditions that are shown
_GROUPS, _MEMBERS = 12, 5  # groups of duplicates that are shown, and rows of each


@dataclass
class Subject:
    """What a report is about, besides the rows of its score files.

    Attributes
    ----------
    title : str
        Shown in the heading.
    samples : int
        Rows.
    by_status : mapping
        Rows by ``status``.
    kept : int or None
        Rows that are kept; None where nothing was selected.
    funnel : sequence of ConditionCount
        ``condition``, ``alone``, ``left``, as in `RunResult`.
    work : str
        What a run did, a sentence or two of HTML.
    provenance : mapping
        What the scores depend on.
    notes : list of str
        What stands first.
    """

    title: str
    samples: int
    by_status: Mapping[str, int]
    kept: int | None
    funnel: Sequence[ConditionCount]
    work: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> int:
        """Readable rows."""
        return self.by_status.get("ok", 0) if self.by_status else self.samples


# --- sections -------------------------------------------------------------------------------------


def _counts(subject: Subject) -> str:
    counts = {"samples": subject.samples, "readable": subject.ok}
    if subject.kept is not None:
        counts |= {"kept": subject.kept, "dropped by the conditions": subject.ok - subject.kept}
    counts["failed"] = subject.samples - subject.ok
    items = "".join(
        f"<div><dt>{name}</dt><dd>{n:,} <small>{page.share(n, subject.samples)}</small></dd></div>"
        for name, n in counts.items()
    )
    return f'<dl class="cards">{items}</dl>{subject.work}\n'


def _funnel(subject: Subject) -> str:
    if not subject.funnel:
        return "<p>No condition was set: every readable sample is kept.</p>\n"
    samples, ok = subject.samples, subject.ok

    def share(n: int) -> str:
        return page.share(n, samples) + page.bar(n, samples)

    start = [("all samples", "", f"{samples:,}", "", share(samples))]
    start.append(("readable", "", f"{ok:,}", f"{samples - ok:,}", share(ok)))
    rows, before = [], ok
    for step in subject.funnel:
        removed, before = before - step.left, step.left
        cells = (f"{step.alone:,}", f"{before:,}", f"{removed:,}", share(before))
        rows.append((f"<code>{page.text(step.condition)}</code>", *cells))
    head = ("Condition", "Pass it alone", "Left after it", "Removed by it", "Share of all samples left")
    return page.table("What each condition leaves, in order", head, [*start, *rows])


def _overlap(found: Survey) -> str:
    """Which conditions the dropped images fail together."""
    failed = [(bits, n) for bits, n in found.failed.most_common() if bits]
    if len(found.conditions) < 2 or not failed:
        return ""
    dropped = sum(n for _, n in failed)

    def name(bits: int) -> str:
        texts = [c.text for i, c in enumerate(found.conditions) if bits >> i & 1]
        only = "only " if len(texts) == 1 else ""
        return only + " and ".join(f"<code>{page.text(t)}</code>" for t in texts)

    rows = [(name(b), f"{n:,}", page.share(n, dropped) + page.bar(n, dropped)) for b, n in failed[:_FAILURES]]
    if rest := sum(n for _, n in failed[_FAILURES:]):
        rows.append((f"{len(failed) - _FAILURES} other sets", f"{rest:,}", page.share(rest, dropped)))
    head = ("They fail", "Images", "Share of the dropped")
    return page.table("What the dropped images fail: each is counted once", head, rows)


def _scores(found: Survey, selected: bool) -> str:
    figures = []
    for name, histogram in found.histograms.items():
        marks = [m for m in found.marks if m.column == name]
        figures.append(histograms.figure(name, histogram, marks, selected))
    legend = (
        '<p class="legend"><span class="in"></span> kept <span class="own"></span> dropped by a condition on this '
        'column alone <span class="out"></span> dropped by another</p>\n'
    )
    return f'{legend if selected else ""}<div class="figures">{"".join(figures)}</div>\n'


def _mark(row: Mapping[str, Any], selected: bool) -> str:
    if not selected:
        return ""
    return f'<span class="{"yes" if row["kept"] else "no"}">{"kept" if row["kept"] else "dropped"}</span> '


def _walls(found: Survey, images: Mapping[Place, str], selected: bool) -> str:
    parts = []
    for wall in found.walls.values():
        if not wall.rows or (not selected and "dropped" in wall.title):
            continue
        rows = [(row, _mark(row, selected)) for _, row in wall.rows]
        title = wall.title if selected else wall.title.removesuffix(" kept")
        parts.append(page.wall(rows, images, found.scores, title, wall.note))
    if not parts:
        return "<p>There is no readable image.</p>\n"
    return f"<p>{page.veils_note('nsfw_score' in found.histograms)}</p>\n" + "".join(parts)


def _errors(subject: Subject, examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    bad = {s: n for s, n in subject.by_status.items() if s != "ok"}
    if not bad:
        return "<p>None: every sample was readable.</p>\n"
    rows = [
        (page.text(s), f"{n:,}", page.share(n, subject.samples), page.text(STATUSES.get(s, "").replace("`", "")))
        for s, n in bad.items()
    ]
    out = page.table("Failed samples by status", ("Status", "Samples", "Share", "Meaning"), rows)
    for status, count in bad.items():
        shown = [
            (
                f"<code>{page.text(row.get('key'), 120)}</code>",
                f"<code>{page.url(row.get('shard'))}</code>",
                page.text(row.get("error_message")),
            )
            for row in examples.get(status, ())
        ]
        if shown:
            caption = f"{page.text(status)}: the first {len(shown)} of {count:,}"
            out += page.table(caption, ("Key", "Shard", "Message"), shown)
    return out


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif value is not None and value != {}:
        yield name, value


def _made(subject: Subject) -> str:
    made = subject.provenance
    encoder, decode = made.get("encoder", {}), made.get("decode", {})
    weights = encoder.get("pretrained") or encoder.get("weights_sha256") or encoder.get("starter_sha256") or "unknown"
    rows = []
    if subject.kept is not None:
        kept = " and ".join(str(step.condition) for step in subject.funnel) or "every readable sample"
        rows.append(("Kept where", f"<code>{page.text(kept, 2000)}</code>"))
    if steps := made.get("selected", {}).get("steps"):
        rows.append(("Selected before by", "; ".join(f"<code>{page.text(s)}</code>" for s in steps)))
    rows.append(("Model", f"{page.text(encoder.get('model', 'unknown'))}, weights <code>{page.text(weights)}</code>"))
    heads = made.get("heads", {})
    rows += [(page.text(column), f"head {page.text(head.get('name', head))}") for column, head in heads.items()]
    rows.append(("Decoder", page.text(f"{decode.get('decoder', 'unknown')} on {decode.get('device', 'unknown')}")))
    rows.append(("Versions", page.text(", ".join(f"{n} {v}" for n, v in made.get("versions", {}).items()))))
    everything = [(page.text(n), f"<code>{page.text(v)}</code>") for n, v in _flat(made)]
    return (
        page.table("Settings", ("What", "Value"), rows)
        + f"<details><summary>Everything that the scores depend on</summary>"
        f"{page.table('Provenance', ('What', 'Value'), everything)}</details>\n"
    )


# --- groups of duplicates -------------------------------------------------------------------------


def _chosen_groups(groups: pd.DataFrame) -> pd.DataFrame:
    """Rows of the groups to show: the largest, those least alike, and some at random."""
    dropped = groups[~groups["kept"]]
    size = groups.groupby("group").size().sort_values(ascending=False, kind="stable")
    least = dropped.groupby("group")["similarity"].min().sort_values(kind="stable").dropna()
    drawn = size.sort_index().sample(frac=1, random_state=0)
    names = [*size.index[: _GROUPS // 3], *least.index[: _GROUPS // 3], *drawn.index]
    names = list(dict.fromkeys(names))[:_GROUPS]
    return groups[groups["group"].isin(names)].groupby("group", sort=False).head(_MEMBERS)


def _members(
    chosen: pd.DataFrame, urls: Sequence[str], found: Survey, storage_options: Mapping[str, Any]
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The table's rows of some groups, by shard, key and sample_offset."""
    wanted = set(chosen[["shard", "key", "sample_offset"]].itertuples(index=False, name=None))
    keys = pa.array(sorted({key for _, key, _ in wanted}), pa.string())
    columns = {*page.ROW, "sample_offset", *found.scores}
    rows = {}
    for table in read_batches(urls, columns, storage_options):
        for row in table.filter(pc.is_in(table["key"].cast(pa.string()), keys)).to_pylist():
            name = (row["shard"], row["key"], row.get("sample_offset", 0))
            if name in wanted:
                rows[name] = row
    return rows


def _member_mark(member: Any) -> str:
    if member.kept:
        return '<span class="yes">stays</span><br>'
    words = [str(member.tier)]
    if pd.notna(member.similarity):
        words.append(f"cosine {member.similarity:.4f}")
    if pd.notna(member.distance):
        words.append(f"{member.distance} bits apart")
    return f'<span class="no">goes</span> {page.text(", ".join(words))}<br>'


def _groups(
    groups: pd.DataFrame,
    urls: Sequence[str],
    found: Survey,
    upright: bool,
    storage_options: Mapping[str, Any],
    source_options: Mapping[str, Any] | None,
) -> str:
    """Duplicates side by side, the one that stays first."""
    if not len(groups):
        return "<p>There are none.</p>\n"
    chosen = _chosen_groups(groups)
    rows = _members(chosen, urls, found, storage_options)
    images = make_thumbnails(rows.values(), upright=upright, storage_options=source_options)
    sizes = groups.groupby("group").size()
    items, lost = [], 0
    for name, members in chosen.groupby("group", sort=False):
        cards = []
        for member in members.itertuples(index=False):
            row = rows.get((member.shard, member.key, member.sample_offset))
            if row is None:
                lost += 1
            else:
                cards.append((row, _member_mark(member)))
        more = int(sizes[name]) - len(members)
        rest = f"; {more} more are not shown" if more else ""
        if cards:
            items.append(f"<li>{page.wall(cards, images, found.scores, f'{sizes[name]} images{rest}')}</li>")
    gone = int((~groups["kept"] & ~groups["in_reference"]).sum())
    words = f"{page.many(len(sizes), 'group')}, {page.many(gone, 'image')} dropped. Shown are the largest, those least "
    words += "alike, and some at random."
    if lost:
        words += f" {page.many(lost, 'image')} of them are not in this table."
    return f'<p>{words}</p><ul class="groups">{"".join(items)}</ul>\n'


# --- the page -------------------------------------------------------------------------------------


def render_report(
    subject: Subject,
    found: Survey,
    urls: Sequence[str],
    storage_options: Mapping[str, Any],
    source_options: Mapping[str, Any] | None = None,
    groups: pd.DataFrame | None = None,
) -> str:
    """Make the page.

    Parameters
    ----------
    subject : Subject
        What it is about.
    found : Survey
        Of the table.
    urls : sequence of str
        Files of the table; read again for the rows of `groups` only.
    storage_options : mapping
        For the fsspec file system of the table.
    source_options : mapping, optional
        For the one of the source shards, from which thumbnails are made.
    groups : pandas.DataFrame, optional
        Table of duplicates, as `Duplicates.groups` makes it.

    Returns
    -------
    str
        HTML: one file that loads nothing from outside, of a few MB at most, however many rows there are.

    Raises
    ------
    OSError, pyarrow.ArrowException
        If a score file cannot be read. A shard that cannot be read costs its thumbnails only; the page counts them.
    """
    selected = subject.kept is not None
    upright = bool(subject.provenance.get("decode", {}).get("adjust_orientation"))
    rows = (row for wall in found.walls.values() for _, row in wall.rows)
    images = make_thumbnails(rows, upright=upright, storage_options=source_options)
    duplicates = ""
    if groups is not None:
        content = _groups(groups, urls, found, upright, storage_options, source_options)
        duplicates = page.section("Duplicates", content)
    return page.document(
        "Curation report",
        subject.title,
        subject.notes,
        [
            page.section("Counts", _counts(subject)),
            page.section("Selection", _funnel(subject) + _overlap(found)) if selected else "",
            page.section("Scores", _scores(found, selected)),
            page.section("Pictures", _walls(found, images, selected)),
            duplicates,
            page.section("Errors", _errors(subject, found.examples)),
            page.section("What was run", _made(subject)),
        ],
        histograms.SCRIPT,
    )


def _work(result: RunResult) -> str:
    """What a run did."""
    rate = result.images_scored / result.scoring_seconds if result.scoring_seconds else 0
    words = [f"Scored in this run: {page.many(result.shards_scored, 'shard')} with"]
    words[0] += f" {page.many(result.images_scored, 'image')}"
    if result.images_scored:
        words[0] += f" ({rate:,.1f} images/s)"
    words.append(f"taken over from an earlier one: {page.many(result.shards_taken_over, 'shard')}")
    if result.kept is not None:
        size = sum(shard.get("nbytes", 0) for shard in result.written)
        words.append(f"written: {page.many(len(result.written), 'curated shard')} ({size / 1e6:,.1f} MB)")
    return f"<p>{'; '.join(words)}. {result.seconds:,.0f} s in all.</p>"


def write_run_report(
    folder: str,
    tables: Sequence[str],
    where: str | None,
    result: RunResult,
    storage_options: Mapping[str, Any],
    source_options: Mapping[str, Any] | None = None,
) -> str:
    """Write the page of a run.

    Parameters
    ----------
    folder : str
        URL of the run's folder.
    tables : sequence of str
        URLs of its score files. They are read once, in batches, without the embeddings (unless `where` uses them).
    where : str or None
        The expression that rows were kept by, besides ``status == 'ok'``.
    result : RunResult
        Counts, provenance and notes.
    storage_options : mapping
        For the fsspec file system of `folder` and `tables`.
    source_options : mapping, optional
        For the one of the source shards, from which thumbnails are made.

    Returns
    -------
    str
        URL of ``report.html``, see `render_report`.

    Raises
    ------
    OSError, pyarrow.ArrowException
        If a score file cannot be read, or the page not be written.
    """
    schema = file_schema(tables[0], storage_options) if tables else pa.schema([])
    settled = settled_where(filters.parse_where(where) if where else None)
    found = survey(tables, schema, settled, storage_options)
    title = folder.rstrip("/").rpartition("/")[2] or folder
    subject = Subject(
        title,
        result.samples,
        result.by_status,
        result.kept,
        result.funnel,
        _work(result),
        result.provenance,
        list(result.notes),
    )
    if found.counts.rows != result.samples or (result.kept is not None and found.counts.kept != result.kept):
        subject.notes.append(
            f"The score files now hold {found.counts.rows:,} samples and would keep {found.counts.kept:,}; the run counted "
            f"{result.samples:,} and {page.number(result.kept)}. Histograms and pictures show the files, counts the "
            "run."
        )
    target = files.join(folder, "report.html")
    with files.write_whole(target, storage_options) as file:
        file.write(render_report(subject, found, tables, storage_options, source_options).encode())
    return target
