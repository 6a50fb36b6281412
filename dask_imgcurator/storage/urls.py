"""URLs of shards, and what identifies their versions."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from .files import file_system, is_local, list_files, local_path, persist
from .remote import version


def expand(
    urlpath: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    storage_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Expand paths, globs, braces, folders and lists of them to absolute paths or URLs of shards, each once."""
    # Lists and braces keep their order; globs and folders are sorted. FileNotFoundError if a pattern matches nothing,
    # or no local shard exists; a single missing shard among others is reported in its row.
    items = [urlpath] if isinstance(urlpath, str | os.PathLike) else list(urlpath)
    if not items:
        raise FileNotFoundError("no shards were given: name at least one tar, glob or folder")
    found: list[str] = []
    for item in items:
        found.extend(_expand_one(os.fspath(item), dict(storage_options or {})))
    found = list(dict.fromkeys(found))
    local = [u for u in found if is_local(u)]
    if local and len(local) == len(found) and not any(Path(u).exists() for u in local):
        more = f" (nor any of {len(local) - 1} others)" if len(local) > 1 else ""
        raise FileNotFoundError(f"no such shard: {local[0]}{more}")
    return found


def _expand_one(item: str, storage_options: dict[str, Any]) -> list[str]:
    if is_local(item) and local_path(item).exists():
        # An existing file may have braces or brackets in its name.
        return _expand_folder(str(local_path(item))) if local_path(item).is_dir() else [str(local_path(item))]
    try:
        names = list(braceexpand(item)) if "{" in item else [item]
    except ValueError:  # braceexpand.UnbalancedBracesError, which its stubs do not export
        raise FileNotFoundError(f"unbalanced braces in {item!r}") from None
    out: list[str] = []
    for name in names:
        # The question mark of an http address begins its query (a signature, say).
        magic = glob.has_magic(name.partition("?")[0] if name.startswith("http") else name)
        if is_local(name):
            path = str(local_path(name))
            if magic:
                matches = sorted(glob.glob(path, recursive=True))
                if not matches:
                    raise FileNotFoundError(f"no file matches {name!r}")
                out.extend(matches)
            elif Path(path).is_dir():
                out.extend(_expand_folder(path))
            else:
                out.append(path)
        elif magic or name.endswith("/"):
            pattern = name.rstrip("/") + "/*.tar" if name.endswith("/") else name
            fs, path = file_system(pattern, storage_options)
            matches = sorted(persist(pattern, partial(fs.glob, path)))
            if not matches:
                raise FileNotFoundError(f"nothing matches {pattern!r}")
            out.extend(fs.unstrip_protocol(m) for m in matches)
        else:
            file_system(name, storage_options)  # raises for a protocol or options that cannot be used here
            out.append(name)
    return out


def _expand_folder(path: str) -> list[str]:
    tars = list_files(path, ".tar")
    if not tars:
        packed = [f for f in list_files(path, "") if re.search(r"\.(tar\.\w+|t[gx]z|tbz2?|tzst)$", f, re.IGNORECASE)]
        hint = f", only compressed ones: unpack {packed[0]} and its like first" if packed else ""
        raise FileNotFoundError(f"no *.tar in the folder {path}{hint}")
    return tars


def fingerprint(url: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """Identify a shard's version without reading it: size, and ETag or modification time; or ``"unreadable"``."""
    try:
        if is_local(url):
            stat = local_path(url).stat()
            return f"size={stat.st_size} mtime_ns={stat.st_mtime_ns}"
        return version(url, storage_options)
    except OSError:
        return "unreadable"
