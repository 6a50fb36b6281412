"""What the pages say of the code, made from the code: ``<!-- generated: NAME -->`` in a page becomes Markdown.

Each function in `GENERATORS` returns the Markdown of one such mark. Nothing is written into the folder of the sources.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import dask_imgcurator as dic
from dask_imgcurator import schema
from dask_imgcurator.checks import samples
from dask_imgcurator.exports import base as exports
from dask_imgcurator.images import formats
from dask_imgcurator.models import heads

ROOT = Path(__file__).resolve().parents[2]

_MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)

#: Sections of the Python reference, with the modules whose names of ``dask_imgcurator.__all__`` belong there. A module
#: that is not here gets into the last one.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Read, score and write": ("collection", "cluster"),
    "Whole jobs": ("job", "deciding"),
    "Choose rows": ("filters", "selection"),
    "Duplicates": ("deduplication", "dedup_index"),
    "Captions, prompts and heads of your own": ("text_steps", "head_files"),
    "Look, search and export": (
        "report",
        "comparison",
        "searching",
        "showing",
        "gallery",
        "explorer",
        "search_index",
        "exports.base",
    ),
    "More": (),
}

#: Names below the top level that users meet: results, steps, errors.
FURTHER: Mapping[str, tuple[str, ...]] = {
    "Results and records": (
        "results.RunResult",
        "results.Selection",
        "results.Counts",
        "deciding.Deduplicated",
        "duplicates.Duplicates",
        "dedup_index.Index",
        "exports.base.Exported",
        "head_files.HeadFile",
        "comparison.Compared",
        "search_index.SearchIndex",
        "deciding.Place",
        "monitor.Monitor",
    ),
    "Expressions and steps": (
        "filters.Where",
        "filters.parse_where",
        "selection_steps.Top",
        "selection_steps.Sample",
        "selection_steps.parse_step",
        "selection.settle_steps",
        "cuts.Settled",
    ),
    "Duplicates, heads, exports": (
        "deduplication.find_duplicates",
        "head_files.read_head",
        "head_files.convert_pth",
        "exports.clip_retrieval.clip_retrieval",
        "exports.datacomp.datacomp",
        "exports.datacomp.datacomp_subset",
        "exports.laion.laion",
        "exports.lists.list_",
    ),
    "Checks and samples": ("verify.verify", "parity.compare", "samples.make_sample_shards"),
    "Errors": (
        "backend.BackendError",
        "dedup_rows.DedupError",
        "exports.base.ExportError",
        "heads.HeadError",
        "models.ModelError",
        "text.PromptError",
        "plugins.PluginError",
        "ranks.SelectionError",
        "search_rows.SearchError",
        "where_syntax.WhereError",
        "weights.WeightsError",
        "write.WriteError",
        "runner.JobError",
        "files.RemoteError",
    ),
}


# --- Markdown -------------------------------------------------------------------------------------


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Make a table; cells are Markdown."""
    lines = [list(header)]
    lines.append(["---"] * len(lines[0]))
    lines += [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Text of the code as Markdown: code marks are meant, everything else is plain."""
    return re.sub(r"([\\*_<>#\[\]])", r"\\\1", text) if "`" not in text else text


def _autodoc(directive: str, name: str, *options: str) -> str:
    lines = [f".. {directive}:: {name}", *(f"   :{option}:" for option in options)]
    return "\n".join(["```{eval-rst}", *lines, "```"])


# --- the schema -----------------------------------------------------------------------------------

_STEPS = {
    "read": "`read_webdataset`",
    "embed": "`embed`",
    "measure": "`embed(measures=True)`",
    "aesthetic": "`score_aesthetic`",
    "nsfw": "`score_nsfw`",
    "text": "`score_clip`",
}


def _type_name(type_: Any) -> str:
    # Arrow itself says "float", and names the items of a list.
    return re.sub(r"\bfloat\b", "float32", re.sub(r"<\w+: ", "<", str(type_)))


def columns() -> str:
    """All columns, each with an anchor ``column-NAME``."""
    rows = [
        (
            f"`{c.name}`{{#column-{c.name}}}",
            f"`{_type_name(c.type)}`",
            "yes" if c.nullable else "no",
            _STEPS[c.step],
            escaped(c.meaning),
        )
        for c in schema.COLUMNS.values()
    ]
    return table(["column", "type", "may be null", "added by", "meaning"], rows)


def statuses() -> str:
    """All statuses, each with an anchor ``status-NAME``."""
    rows = [(f"`{name}`{{#status-{name}}}", escaped(text)) for name, text in schema.STATUSES.items()]
    return table(["status", "meaning"], rows)


def image_formats() -> str:
    """What is decoded, and by whom."""
    rows = [(title, who, f"`{package}`" if package else "") for title, who, package in formats.format_table()]
    return table(["format", "decoded by (with `decoder: dali`)", "needs"], rows)


def head_table() -> str:
    """The heads that have a name."""
    rows = []
    for spec in heads.HEADS.values():
        source = (
            f"[{spec.source.removeprefix('https://github.com/')}]({spec.source})" if spec.weights else "this project"
        )
        file = f"`{spec.weights.folder}/{spec.weights.filename}`" if spec.weights else "comes with the package"
        license_ = spec.weights.license if spec.weights else "Apache-2.0"
        rows.append((f"`{spec.name}`", f"`{spec.column}`", spec.embedder, spec.width, file, source, license_))
    return table(
        ["head", "column", "fitted on", "width", "file in the weights folder", "published by", "licence"], rows
    )


def weight_hashes() -> str:
    """The published files with their hashes, as ``sha256sum -c`` reads them."""
    files = {spec.weights.filename: spec.weights for spec in heads.HEADS.values() if spec.weights}
    lines = [f"{w.sha256}  {w.folder}/{w.filename}" for w in files.values()]
    return "\n".join(["```text", *lines, "```"])


def export_formats() -> str:
    """What `export` writes."""
    return table(
        ["format", "what is written", "`--out` is"],
        [(f"`{n}`", escaped(f.about), "a folder" if f.folder else "a file") for n, f in exports.formats().items()],
    )


def sample_kinds() -> str:
    """What the demo's sample images are."""
    return table(["kind", "what it is"], [(f"`{kind}`", escaped(text)) for kind, text in samples.KINDS.items()])


# --- Python ---------------------------------------------------------------------------------------


def _section_of(name: str) -> str:
    module = getattr(dic, name).__module__.removeprefix("dask_imgcurator.")
    return next((title for title, modules in SECTIONS.items() if module in modules), list(SECTIONS)[-1])


def python_overview() -> str:
    """Every public name with its first line."""
    rows = []
    for name in sorted(dic.__all__):
        first = (inspect.getdoc(getattr(dic, name)) or "").partition("\n")[0]
        rows.append((f"[`{name}`](#dask_imgcurator.{name})", first.replace("``", "`")))
    return table(["name", "what it does"], rows)


def python_api() -> str:
    """Every name of ``dask_imgcurator.__all__``, in sections."""
    parts = []
    for title in SECTIONS:
        names = [name for name in sorted(dic.__all__) if _section_of(name) == title]
        if names:
            parts.append(f"## {title}")
        for name in names:
            kind = "autoclass" if inspect.isclass(getattr(dic, name)) else "autofunction"
            parts.append(_autodoc(kind, f"dask_imgcurator.{name}"))
    return "\n\n".join(parts)


def python_further() -> str:
    """Results, steps and errors, under the modules that they live in."""
    parts = []
    for title, names in FURTHER.items():
        parts.append(f"## {title}")
        for dotted in names:
            module, _, name = dotted.partition(".")
            thing = getattr(importlib.import_module(f"dask_imgcurator.{module}"), name)
            full = f"dask_imgcurator.{dotted}"
            if not inspect.isclass(thing):
                parts.append(_autodoc("autofunction", full))
            elif issubclass(thing, Exception):
                parts.append(_autodoc("autoexception", full))
            else:
                parts.append(_autodoc("autoclass", full, "members"))
    return "\n\n".join(parts)


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
    "where": "rows that an expression takes",
    "quantile": "an exact quantile",
    "top": "a share by rank",
    "sample": "a random sample",
    "list": "keys of a selection to a file",
}


def benchmark_selection() -> str:
    """Deciding, beside DuckDB on the same files."""
    rows = []
    for _, record in _records():
        for found in record.get("tables", []):
            for name, title in _QUESTIONS.items():
                if name in found:
                    ours, theirs = found[name]["ours"], found[name]["duckdb"]
                    rows.append(
                        (
                            f"{found['rows']:,}{' with embeddings' if found['embeddings'] else ''}",
                            title,
                            f"{ours['seconds']:.1f} s",
                            f"{theirs['seconds']:.1f} s",
                            f"{ours['peak_mb'] - ours['idle_mb']:.0f} MB",
                            f"{theirs['peak_mb'] - theirs['idle_mb']:.0f} MB",
                            "yes" if found[name]["same"] else "no",
                        )
                    )
    header = ["rows", "question", "here", "DuckDB", "memory here", "memory DuckDB", "same answer"]
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
                if not isinstance(run, dict) or "eps" not in run:
                    continue
                memory = found["worker_rss_bytes"]
                for eps, counts in run["eps"].items():
                    rows.append(
                        (
                            f"{found['rows']:,} × {found['width']}, {variant.replace('_', ' ')}",
                            eps,
                            f"{counts['dropped']:,}",
                            f"{counts['planted_recall']:.1%} of {counts['planted_pairs']:,}",
                            f"{counts['sampled_recall']:.1%} of {counts['sampled_pairs']:,}",
                            f"{run['seconds']:,.0f} s",
                            f"{memory['before'] / 1e9:.1f} → {memory['after'] / 1e9:.1f} GB",
                        )
                    )
    header = ["rows × width", "eps", "dropped", "planted pairs found", "sampled pairs found", "time, all eps"]
    return table([*header, "memory of the workers"], rows)


GENERATORS: Mapping[str, Callable[[], str]] = {
    "columns": columns,
    "statuses": statuses,
    "image-formats": image_formats,
    "heads": head_table,
    "weight-hashes": weight_hashes,
    "export-formats": export_formats,
    "sample-kinds": sample_kinds,
    "python-overview": python_overview,
    "python-api": python_api,
    "python-further": python_further,
    "benchmark-files": benchmark_files,
    "benchmark-score": benchmark_score,
    "benchmark-parity": benchmark_parity,
    "benchmark-large-shard": benchmark_large_shard,
    "benchmark-selection": benchmark_selection,
    "benchmark-dedup": benchmark_dedup,
    "benchmark-report": benchmark_report,
    "benchmark-search": benchmark_search,
}


# --- help texts -----------------------------------------------------------------------------------


def _plain_help(app: Any, ctx: Any, lines: list[str]) -> None:
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


# --- Sphinx ---------------------------------------------------------------------------------------


def _fill_in(app: Any, docname: str, source: list[str]) -> None:
    source[0] = _MARK.sub(lambda match: GENERATORS[match[1]](), source[0])


def setup(app: Any) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("source-read", _fill_in)
    app.connect("sphinx-click-process-description", _plain_help)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
