"""The Python reference: public names, and what they return, take and raise."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from site_markdown import table

import dask_imgcurator as dic

#: Sections of the reference: each name of ``dask_imgcurator.__all__`` is in one of them.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Read, score and write": (
        "start_client",
        "read_webdataset",
        "embed",
        "score_aesthetic",
        "score_nsfw",
        "read_scores",
        "to_scores",
        "to_webdataset",
    ),
    "Whole jobs": (
        "curate",
        "score_shards",
        "select_rows",
        "drop_duplicates",
        "pack",
        "add_columns",
        "write_selection",
        "export_scores",
    ),
    "Choose rows": (
        "filter_frame",
        "apply_steps",
        "only",
        "exclude",
        "funnel",
        "quantile",
        "top_fraction",
        "top_count",
        "sample",
    ),
    "Duplicates": ("dedup", "duplicate_groups", "find_duplicates", "build_index"),
    "Captions, prompts and heads of your own": (
        "caption_stats",
        "assign_clusters",
        "embed_text",
        "score_clip",
        "score_prompts",
        "score_head",
        "save_head",
    ),
    "Look, search and export": (
        "write_report",
        "compare_selections",
        "show",
        "explore",
        "search",
        "build_search_index",
        "export",
    ),
}

#: Further names to list, until they are public.
FURTHER: Mapping[str, tuple[str, ...]] = {
    "Results": (
        "RunResult",
        "Counts",
        "ConditionCount",
        "Deduplicated",
        "Duplicates",
        "Index",
        "Exported",
        "Compared",
        "Monitor",
    ),
    "Expressions and steps": ("Where", "parse_where", "Top", "RandomSample", "parse_step"),
    "Heads, encoders, samples": (
        "HeadFile",
        "read_head",
        "convert_pth",
        "Preprocess",
        "make_sample_shards",
        "SampleShards",
    ),
    "Errors": (
        "BackendError",
        "DedupError",
        "ExportError",
        "HeadError",
        "JobError",
        "ModelError",
        "PluginError",
        "PromptError",
        "RemoteError",
        "SearchError",
        "SelectionError",
        "WeightsError",
        "WhereError",
        "WriteError",
    ),
}


def overview() -> str:
    """Every public name with its first line."""
    rows = []
    for name in sorted(dic.__all__):
        first = (inspect.getdoc(getattr(dic, name)) or "").partition("\n")[0]
        rows.append((f"[`{name}`](#dask_imgcurator.{name})", first.replace("``", "`")))
    return table(["name", "what it does"], rows)


def public() -> str:
    """Every public name with its full docstring, in sections."""
    shown = [name for names in SECTIONS.values() for name in names]
    if sorted(shown) != sorted(dic.__all__):
        raise ValueError(f"SECTIONS and dask_imgcurator.__all__ differ by {sorted({*shown} ^ {*dic.__all__})}")
    return _sections({title: [(name, getattr(dic, name)) for name in names] for title, names in SECTIONS.items()})


def further() -> str:
    """Results, steps and errors, each under the shortest path that it can be imported from."""
    return _sections(
        {title: [find(name) for name in names if name not in dic.__all__] for title, names in FURTHER.items()}
    )


def _sections(sections: Mapping[str, list[tuple[str, Any]]]) -> str:
    parts = []
    for title, entries in sections.items():
        if entries:
            parts.append(f"## {title}")
        parts += [_autodoc(f"dask_imgcurator.{path}", thing) for path, thing in entries]
    return "\n\n".join(parts)


def _autodoc(path: str, thing: Any) -> str:
    if not inspect.isclass(thing):
        lines = [f".. autofunction:: {path}"]
    elif issubclass(thing, Exception):
        lines = [f".. autoexception:: {path}"]
    else:
        lines = [f".. autoclass:: {path}", "   :members:"]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def find(name: str) -> tuple[str, Any]:
    """Find what the package calls by a name, as ``Where`` or ``Top``; returns its shortest path too."""
    found = {
        id(thing): thing
        for module in _modules()
        if (thing := vars(module).get(name)) is not None
        and getattr(thing, "__module__", "").startswith(f"{dic.__name__}.")
    }
    if len(found) != 1:
        raise ValueError(f"{len(found)} things of the package have the name {name!r}: {list(found.values())}")
    (thing,) = found.values()
    places = list(_upwards(thing.__module__))
    place = next(p for p in reversed(places) if getattr(importlib.import_module(p), name, None) is thing)
    return f"{place}.{name}".removeprefix(f"{dic.__name__}."), thing


def _upwards(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]


@cache
def _modules() -> list[Any]:
    """All modules of the package, but for the one that only imports beside RAPIDS."""
    names = [info.name for info in pkgutil.walk_packages(dic.__path__, f"{dic.__name__}.")]
    return [importlib.import_module(name) for name in names if not name.endswith(".cudf")]


MARKS = {"python-overview": overview, "python-api": public, "python-further": further}
