"""Summaries that the command line prints at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..checks.parity_record import ALL, Parity
from ..duplicates.index import Index
from ..engine.backend import get_backend
from ..jobs.dedup import Deduplicated
from ..report.render import plain
from ..results import Counts, RunResult, count, visible
from ..schema import STATUSES
from ..select.where import parse_where
from ..steps.score_table import read_scores
from .live import make_console


def make_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column)
    return table


def _numbers(*columns: str) -> Table:
    """Make a table with numbers in all columns but the first."""
    table = make_table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _inside(text: str) -> Padding:
    """A cell indented below the row above, even if it takes several lines."""
    return Padding(Text(visible(text)), (0, 0, 0, 2))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def print_run(result: RunResult) -> None:
    console = make_console()
    table = _numbers("", "images", "share")
    table.add_row("in the score table", f"{result.samples:,}", "")
    for status, n in result.by_status.items():
        meaning = "readable and scored" if status == "ok" else f"{status}: {STATUSES.get(status, '')}"
        table.add_row(_inside(meaning), f"{n:,}", _share(n, result.samples))
    before = result.by_status.get("ok", 0)
    for step in result.funnel:
        table.add_row(
            _inside(f"dropped by {step.condition}"),
            f"{before - step.left:,}",
            _share(before - step.left, result.samples),
        )
        before = step.left
    if result.kept is not None:
        table.add_row("kept", f"{result.kept:,}", _share(result.kept, result.samples), style="bold")
    console.print(table)
    if result.images_scored:
        rate = result.images_scored / result.scoring_seconds
        console.print(
            f"scored {count(result.images_scored, 'image')} of {count(result.shards_scored, 'shard')} "
            f"in {result.scoring_seconds:.1f} s ({rate:.1f} images/s), "
            f"after {result.loading_seconds:.1f} s of loading the model",
        )
    if result.shards_taken_over:
        console.print(f"reused from an earlier run: {count(result.shards_taken_over, 'shard')}")
    if result.shards_missing:
        console.print(f"missing: {count(len(result.shards_missing), 'shard')}")
    if result.kept == 0 and result.samples:
        console.print("Nothing is kept: the report shows what each condition drops.", style="yellow")
    if result.kept is not None:
        console.print(written_line(result.written, f"{result.out.rstrip('/')}/shards"))
        console.print(f"report: {result.out.rstrip('/')}/report.html")
    else:
        console.print(f"score table: {result.out}")


def written_line(written: list[dict[str, Any]], folder: str) -> str:
    samples, nbytes = sum(s["count"] for s in written), sum(s["nbytes"] for s in written)
    return f"{count(len(written), 'curated shard')} with {count(samples, 'sample')}, {nbytes / 1e6:,.1f} MB: {folder}"


def print_selection(selection: Counts, out: str) -> None:
    console = make_console()
    table = _numbers("", "rows", "alone")
    table.add_row("in the score table", f"{selection.rows:,}", "")
    ok = selection.by_status.get("ok", selection.rows)
    if ok != selection.rows:
        table.add_row("readable and scored", f"{ok:,}", "")
    for step in selection.funnel:
        table.add_row(_inside(f"and {step.condition}"), f"{step.left:,}", f"{step.alone:,}")
    table.add_row("kept", f"{selection.kept:,}", _share(selection.kept, selection.rows), style="bold")
    console.print(table)
    if not selection.kept:
        console.print(
            "Nothing is kept: the column 'alone' shows how many rows each condition alone would keep.", style="yellow"
        )
    console.print(f"in {out}")


def print_kinds(result: RunResult, manifest: Mapping[str, Mapping[str, Any]]) -> None:
    """Show, for the demo, how each kind of planted image fared."""
    import pyarrow.parquet as pq

    from ..checks.pictures import KINDS

    kept: set[str] = set()
    for shard in result.written:
        path = Path(result.out) / "shards" / shard["shard"].replace(".tar", ".parquet")
        kept.update(pq.read_table(path, columns=["key"])["key"].to_pylist())
    table = _numbers("what was planted", "images", "kept", "dropped")
    table.add_column("for example, why")
    table.columns[-1].justify = "left"
    reasons = _reasons(result)
    for kind, meaning in KINDS.items():
        keys = [key for key, entry in manifest.items() if entry["kind"] == kind]
        if not keys:
            continue
        n = sum(key in kept for key in keys)
        why = next((reasons[key] for key in keys if key not in kept and reasons.get(key)), "")
        table.add_row(f"{kind}: {meaning}", str(len(keys)), str(n), str(len(keys) - n), why)
    make_console().print(table)


def _reasons(result: RunResult) -> dict[str, str]:
    """Why each demo sample was dropped: its error, or the first condition it fails."""
    record = json.loads((Path(result.out) / "run.json").read_text())
    frame = read_scores(Path(result.out) / "scores", backend="pandas").compute(scheduler="synchronous")
    reasons = dict(zip(frame["key"], frame["error_message"].fillna(""), strict=True))
    left = frame[frame["status"] == "ok"]
    for part in parse_where(record["arguments"]["where"]).conjuncts():
        passed = part.mask(left)
        for row in left[~passed].to_dict("records"):
            column = part.columns[0]
            value = row[column]
            reasons[row["key"]] = f"{column} is {value:.2f}" if isinstance(value, float) else f"{column} is {value}"
        left = left[passed]
    return reasons


def print_parity(result: Parity, console: Console | None = None) -> None:
    """Show how far this library and open_clip differ."""
    console = console or make_console()
    say = console.print
    settings = result.settings
    model = " ".join(filter(None, (settings.model, settings.pretrained)))
    say(f"{model}: {settings.dtype} with {settings.decoder} on {settings.device}; open_clip: float32, Pillow")
    if settings.run_decoder == settings.decoder:
        say(f"Your own run on this machine would decode with {settings.run_decoder} too.")
    else:
        say(
            f"Your own run on this machine would decode with {settings.run_decoder}, not with {settings.decoder}: "
            f"for its figures, set DASK_IMGCURATOR__DECODER={settings.run_decoder}."
        )
    read = "" if result.shards_read == result.shards else f"{result.shards_read:,} of "
    say(f"{result.images:,} of {result.images_there:,} images, in {read}{result.shards:,} shards")
    say("can be decoded by: " + ", ".join(f"{who} {n:,}" for who, n in result.decodable.items()))
    for failed in result.one_sided:
        say(f"  {failed.decodable}: {failed.image}: {failed.reason}")
    if not result.groups["all"].images:
        say("No image could be compared.")
        return
    console.print(_differences(result))
    if result.groups["all"].scores:
        console.print(_drifts(result))
    if result.decisions:
        console.print(_decisions(result))
    for decision in result.decisions:
        for one in decision.examples if decision.where != ALL else []:
            values = ", ".join(f"{column} {_pair(*pair)}" for column, pair in one.scores.items())
            say(f"  {decision.where}: {one.image}: {values}")
    console.print(_worst(result))
    pixels = result.groups["all"]
    say(f"largest difference of an image's mean: {pixels.pixel_mean.max:.3f}, {pixels.pixel_mean.max_image}")
    say(f"largest difference of a single pixel: {pixels.pixel_max.max:.1f}, {pixels.pixel_max.max_image}")
    if result.other_cosine.count:
        say(f"for comparison, cosine of two different images: {result.other_cosine.mean:.4f} in the mean")


def _differences(result: Parity) -> Table:
    table = _numbers("decoded by", "images", "pixels¹: mean", "worst mean", "max", "cosine: mean", "min")
    for name, group in sorted(result.groups.items()):
        table.add_row(
            name,
            f"{group.images:,}",
            f"{group.pixel_mean.mean:.3f}",
            f"{group.pixel_mean.max:.3f}",
            f"{group.pixel_max.max:.1f}",
            f"{group.cosine.mean:.6f}",
            f"{group.cosine.min:.6f}",
        )
    table.caption = "¹ absolute difference; black to white is 255"
    return table


def _drifts(result: Parity) -> Table:
    table = _numbers("score", "mean drift", "max drift", "largest for")
    for column, figure in result.groups["all"].scores.items():
        if figure.count:
            table.add_row(column, f"{figure.mean:.6f}", f"{figure.max:.6f}", figure.max_image)
    return table


def _worst(result: Parity) -> Table:
    table = _numbers("lowest cosine", "cosine", "pixels¹: mean", "max", "decoded by")
    for one in result.worst:
        figures = f"{one.cosine:.6f}", f"{one.pixel_mean:.3f}", f"{one.pixel_max:.1f}"
        table.add_row(one.image, *figures, one.decoder)
    return table


def _decisions(result: Parity) -> Table:
    table = _numbers("decision", "kept here", "by open_clip", "flips")
    for decision in result.decisions:
        table.add_row(decision.where, f"{decision.kept:,}", f"{decision.kept_by_open_clip:,}", f"{decision.flips:,}")
    return table


def _pair(ours: float | None, theirs: float | None) -> str:
    """Both values of a score, with enough digits to tell them apart."""
    if ours is None or theirs is None:
        return f"{ours} here, {theirs} by open_clip"
    digits = next((n for n in range(5, 10) if f"{ours:.{n}g}" != f"{theirs:.{n}g}"), 5)
    return f"{ours:.{digits}g} here, {theirs:.{digits}g} by open_clip"


def print_duplicates(found: Deduplicated, out: str | None) -> None:
    """Show how many duplicates each tier finds."""
    console = make_console()
    table = _numbers("tier", "groups", "dropped", "left")
    for step in found.counts:
        eps = "" if step["eps"] is None else f", cosine >= {1 - step['eps']:g}"
        table.add_row(f"{step['tier']}{eps}", *(f"{step[name]:,}" for name in ("groups", "dropped", "remaining")))
    console.print(table)
    if found.cells is not None:
        cells = found.cells
        known = [f"{a:,} of {b:,} at {1 - eps:g}" for eps, (a, b) in cells.recall.items()]
        words = (
            f"semantic: {cells.cells:,} cells of {cells.median:,} rows (largest: {cells.largest:,}), "
            f"{cells.probe} searched per row; near pairs of 512 rows that were compared: {', '.join(known)}"
        )
        console.print(words)
    where = f": {out}" if out is not None else " would remain (name a folder with --out to write them)"
    console.print(f"{found.kept:,} of {found.rows:,} rows{where}")


def print_search(found: pd.DataFrame, page: str | None, out: str | None) -> None:
    """Show what each query found."""
    console = make_console()
    rows = get_backend("pandas").to_arrow(found).to_pylist()
    for number in dict.fromkeys(row["query_number"] for row in rows):
        own = [row for row in rows if row["query_number"] == number]
        table = make_table("", "similarity", "key", "shard", "caption")
        table.title, table.title_justify = Text(plain(own[0]["query"], 200), style="bold"), "left"
        for row in own:
            cells = (plain(row.get("key"), 60), plain(row.get("shard"), 300).rpartition("/")[2])
            caption = plain(row.get("caption"), 100)
            table.add_row(str(row["rank"]), f"{row['similarity']:.4f}", *map(Text, (*cells, caption)))
        console.print(table)
    if not rows:
        console.print("nothing found: no comparable rows are left")
    for path in filter(None, (page, out)):
        console.print(f"written: {path}")


def print_search_index(index: Index) -> None:
    """Show how good an index is."""
    about = index.about
    words = (
        f"index of {about['vectors']:,} rows: {index.path}\n"
        f"it finds {about['recall']:.1%} of the 20 rows most similar to a row, looking into {about['nprobe']:,} of "
        f"{about['cells']:,} cells"
    )
    make_console().print(words)
