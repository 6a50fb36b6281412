"""Tables of columns, statuses, formats and heads."""

from __future__ import annotations

import inspect
import re
from typing import Any

from site_markdown import escaped, table

from dask_imgcurator import schema
from dask_imgcurator.checks import pictures
from dask_imgcurator.exports import base as exports
from dask_imgcurator.images import formats
from dask_imgcurator.models import heads

_STEPS = {
    "read": "`read_webdataset`",
    "embed": "`embed`",
    "measure": "`embed(measures=True)`",
    "note": "`score_shards`, `curate`",
    "aesthetic": "`score_aesthetic`",
    "nsfw": "`score_nsfw`",
    "text": "`score_clip`",
    "write": "`to_webdataset`",
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
    rows = [
        (f"`{name}`", escaped(f.about), "a folder" if f.folder else "a file") for name, f in exports.formats().items()
    ]
    return table(["format", "what is written", "`--out` is"], rows)


def export_details() -> str:
    """Which columns each format has, and its options; each with an anchor ``export-NAME``."""
    parts = []
    for name, format_ in exports.formats().items():
        text = (inspect.getdoc(format_.function) or "").replace("``", "`")
        parts += [f"(export-{name})=\n### {name}", text]
        options = [p for p in inspect.signature(format_.function).parameters.values() if p.default is not p.empty]
        if options:
            parts.append("Options: " + ", ".join(f"`{p.name}` ({p.default!r} by default)" for p in options) + ".")
    return "\n\n".join(parts)


def sample_kinds() -> str:
    """What the demo's sample images are."""
    return table(["kind", "what it is"], [(f"`{kind}`", escaped(text)) for kind, text in pictures.KINDS.items()])


MARKS = {
    "columns": columns,
    "statuses": statuses,
    "image-formats": image_formats,
    "heads": head_table,
    "weight-hashes": weight_hashes,
    "export-formats": export_formats,
    "export-details": export_details,
    "sample-kinds": sample_kinds,
}
