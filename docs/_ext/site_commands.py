"""Help texts of the command line, and tables of the benchmarks' records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from site_markdown import table

from dask_imgcurator.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]


def plain_help(app: Any, ctx: Any, lines: list[str]) -> None:
    """Make reStructuredText of a help text: what click must not wrap is code, and nothing else is markup."""
    out: list[str] = []
    for line in lines:
        if not line.startswith("| "):
            out.append(re.sub(r"([*`_|\\])", r"\\\1", line))
        elif out and out[-1].startswith("   "):
            out.append(f"   {line[2:]}")
        else:
            out += ["", ".. code-block:: text", "", f"   {line[2:]}"]
    lines[:] = out


def commands() -> str:
    """Every command with its first line."""
    context = click.Context(cli)
    return table(
        ["command", "what it does"],
        [(f"`{name}`", cli.commands[name].get_short_help_str(200)) for name in cli.list_commands(context)],
    )


# --- benchmarks -----------------------------------------------------------------------------------


def _records() -> list[tuple[str, dict[str, Any]]]:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return [(file.name, json.loads(file.read_text(encoding="utf-8"))) for file in files]


def _machine(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("machine", {})


def benchmark_files() -> str:
    """Every record: when, where, of what."""
    rows = []
    for name, record in _records():
        machine = _machine(record)
        where = f"{machine.get('processor', '?')}, {machine.get('cores', '?')} cores"
        gpu = machine.get("gpu") or "none"
        date = str(machine.get("date", "?"))[:10]
        rows.append((f"`{name}`", date, where, gpu if isinstance(gpu, str) else "yes", machine.get("load_before", "?")))
    return table(["record", "date", "processor", "GPU", "load before"], rows)


def _given(record: Mapping[str, Any]) -> str:
    settings = record.get("settings", {})
    model, pretrained = settings.get("model", "?"), settings.get("pretrained")
    return f"{model}, {pretrained}" if pretrained else str(model)


def benchmark_score() -> str:
    """How fast scoring was."""
    rows = []
    for _, record in _records():
        if record.get("benchmark") != "score":
            continue
        shares, settings = record["shares"], record["settings"]
        rows.append(
            (
                _given(record),
                f"{settings['dtype']}, {settings['decoder']}",
                f"{record['images']:,}",
                f"{record['images_per_s']:.1f}",
                f"{record['decode_only_images_per_s']:.0f}",
                f"{record['encode_only_images_per_s']:.1f}",
                f"{shares['of_one_after_the_other']:.2f}",
                f"{max(p['rss_bytes'] for p in record['peak_memory']) / 1e9:.1f} GB",
            )
        )
    header = ["model, weights", "dtype, decoder", "images", "images/s", "decode only", "encode only"]
    return table([*header, "share of one after the other", "memory of a worker"], rows)


def speed() -> str:
    """The README's few numbers."""
    rows = []
    for _, record in _records():
        if record.get("benchmark") == "score":
            machine = _machine(record)
            where = f"{machine['cores']} cores of an {machine['processor'].replace('(R)', '')} ({machine['date'][:10]})"
            rows.append((_given(record).replace("random:0", "random weights"), where, f"{record['images_per_s']:.0f}"))
    return table(["model", "hardware", "images/s"], [*rows, ("any", "any GPU", "not measured")])


def benchmark_parity() -> str:
    """How far pixels and embeddings were from open_clip's."""
    rows = []
    for _, record in _records():
        if record.get("benchmark") != "parity" or "groups" not in record:
            continue
        for group, found in record["groups"].items():
            rows.append(
                (
                    _given(record),
                    {"all": "all", "dali": "DALI decoded", "pillow": "Pillow decoded"}.get(group, group),
                    f"{found['images']:,}",
                    f"{found['cosine_min']:.5f}",
                    f"{found['cosine_mean']:.5f}",
                    f"{found['cosine_of_other_images_mean']:.2f}",
                    f"{found['pixel_mean']:.2f}",
                    f"{found['pixel_max']:.0f}",
                )
            )
    header = ["model, weights", "images that", "images", "cosine, least", "cosine, mean", "of other images"]
    return table([*header, "pixels, mean", "pixels, most"], rows)


def benchmark_large_shard() -> str:
    """Memory on one large shard."""
    rows = []
    for _, record in _records():
        if record.get("benchmark") == "large_shard":
            rows.append(
                (
                    f"{record['settings']['count']:,} images, {record['shard_nbytes'] / 1e9:.1f} GB",
                    _given(record),
                    f"{record['peak_small_shard'] / 1e9:.2f} GB",
                    f"{record['peak_scoring'] / 1e9:.2f} GB",
                    f"{record['peak_writing'] / 1e9:.2f} GB",
                    f"{record['score_seconds']:,.0f} s",
                    f"{record['write_seconds']:.1f} s for {record['written']:,} samples",
                )
            )
    header = ["shard", "model, weights", "peak on a small shard", "peak while scoring", "peak while writing"]
    return table([*header, "scoring", "writing"], rows)


_QUESTIONS = {
    "where": "count the rows that an expression takes",
    "select": "write them as a table",
    "quantile": "an exact quantile",
    "top": "count the best 30% of some",
    "best": "keys and scores of the 10,000 best",
    "sample": "keys of 10,000 rows at random, the same each time",
    "funnel": "five conditions, alone and in turn",
    "exclude": "count all but 100,000 listed keys",
    "aggregates": "the report's pass (DuckDB: five histograms)",
}
_ENGINES = ("duckdb", "polars", "pyarrow", "dask")


def benchmark_selection() -> str:
    """Deciding, beside what one would pick instead, on the same files."""
    rows = []
    for _, record in _records():
        for found in record.get("tables", []):
            for name, title in _QUESTIONS.items():
                if name in found:
                    told = found[name]
                    ours = told["ours"]["cpu_seconds"]
                    ratios = [f"{ours / told[e]['cpu_seconds']:.1f}" if e in told else "" for e in _ENGINES]
                    memory = [f"{told[e]['peak_mb'] - told[e]['idle_mb']:.0f} MB" for e in ("ours", "duckdb")]
                    size = f"{found['rows']:,}{' with embeddings' if found['embeddings'] else ''}"
                    rows.append((size, title, f"{ours:.1f}", *ratios, *memory))
    engines = ["DuckDB", "polars", "pyarrow", "plain Dask"]
    header = ["rows", "question", "CPU s", *(f"÷ {e}" for e in engines), "memory", "memory of DuckDB"]
    return table(header, rows)


def benchmark_report() -> str:
    """Pages about tables of several sizes."""
    rows = []
    for _, record in _records():
        for found in record.get("sizes", []):
            for page in ("report", "comparison"):
                if page in found:
                    one = found[page]
                    figures = f"{one['seconds']:.1f} s", f"{one['peak_mb']:,.0f} MB (idle {one['idle_mb']:,.0f})"
                    size = f"{one['bytes'] / 1e3:,.0f} kB"
                    rows.append((f"{found['rows']:,}", page, *figures, size, one["pictures"]))
    return table(["rows", "page", "time", "memory", "size of the page", "pictures in it"], rows)


def benchmark_search() -> str:
    """Searches of one table, in three ways."""
    rows = []
    for _, record in _records():
        for found in (t for t in record.get("tables", []) if "exact" in t):
            asked = f"{found['rows']:,} × 512, {found['queries']} × {found['k']} rows"
            for way in ("exact", "numpy", "index", "build"):
                one, note = found[way], ""
                if way == "numpy":
                    note = f"{one['reading_seconds']:.1f} s of it reading; same rows: {found['same_as_numpy']}"
                elif way == "index":
                    note = f"recall {found['recall']:.1%}, {found['index_bytes'] / 1e6:,.0f} MB"
                rows.append((asked, way, f"{one['seconds']:.1f} s", f"{one['peak_mb']:,.0f} MB", note))
    return table(["table, queries", "way", "time", "memory", ""], rows)


def benchmark_dedup() -> str:
    """Semantic duplicates above 20,000 rows: how many pairs the cells let through."""
    rows = []
    for _, record in _records():
        for found in record.get("sizes", []):
            for variant, run in found.items():
                if not isinstance(run, dict) or "cells" not in run:  # of an earlier algorithm
                    continue
                cells = run["cells"] or {"median": found["rows"], "largest": found["rows"]}
                for eps, counts in run["eps"].items():
                    rows.append(
                        (
                            f"{found['rows']:,} × {found['width']}, {variant.replace('_', ' ')}",
                            eps,
                            f"{counts['dropped']:,}",
                            f"{counts['planted_recall']:.1%} of {counts['planted_pairs']:,}",
                            f"{counts['sampled_recall']:.1%} of {counts['sampled_pairs']:,}",
                            f"{run['cpu_seconds']:,.0f} CPU s",
                            f"{run['peak_mb'] / 1e3:.1f} GB",
                            f"{cells['median']:,} ({cells['largest']:,})",
                        )
                    )
    header = ["rows × width", "eps", "dropped", "planted pairs found", "sampled pairs found", "time, all eps"]
    return table([*header, "peak memory", "rows a cell (largest)"], rows)


def benchmark_dedup_parts() -> str:
    """What the parts of a search for duplicates cost, of sizes that do not fit too."""
    rows = []
    for _, record in _records():
        for found in record.get("parts", []):
            parts = [f"{found[name]:,.0f}" for name in ("gather", "train", "assign", "compare", "sum")]
            rows.append((f"{found['rows']:,}", f"{found['rows_measured']:,}", f"{found['cells']:,}", *parts))
    return table(["rows", "measured on", "cells", "read", "k-means", "assign", "compare", "sum, CPU s"], rows)


MARKS = {
    "commands": commands,
    "benchmark-files": benchmark_files,
    "benchmark-score": benchmark_score,
    "speed": speed,
    "benchmark-parity": benchmark_parity,
    "benchmark-large-shard": benchmark_large_shard,
    "benchmark-selection": benchmark_selection,
    "benchmark-dedup": benchmark_dedup,
    "benchmark-dedup-parts": benchmark_dedup_parts,
    "benchmark-report": benchmark_report,
    "benchmark-search": benchmark_search,
}
