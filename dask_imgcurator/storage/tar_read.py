"""Read members of a tar by offset."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import IO, Any

from .files import is_local
from .remote import hold_copy, read_ranges
from .samples import Member, split_name
from .tar_index import ShardError, entries, open_shard

#: Larger text and JSON members (bytes) are left unread: no caption has gigabytes, and no worker has room for them.
TEXT_LIMIT = 64 << 20

#: The UTF-32 marks come first, because one of them begins with a UTF-16 mark.
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_extents(
    url: str,
    extents: Iterable[tuple[int, int]],
    storage_options: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> Iterator[bytes]:
    """Yield pieces of a shard (offset, length) in the order given; short where the file ends early."""
    # Ascending offsets read it once, sequentially. `whole`: stream a remote shard whole, for when most of it is wanted.
    if is_local(url):
        source: Any = contextlib.nullcontext()
    elif whole:
        source = hold_copy(url, storage_options)
    else:
        yield from read_ranges(url, list(extents), storage_options)
        return
    with source, open_shard(url, storage_options) as file:
        for offset, nbytes in extents:
            file.seek(offset)
            yield file.read(nbytes)


def read_text(file: IO[bytes], member: Member) -> str | None:
    """Read a text member as UTF-8, or as its BOM says; invalid bytes become U+FFFD; None if over `TEXT_LIMIT`."""
    if member.nbytes > TEXT_LIMIT:
        return None
    file.seek(member.offset)
    data = member.expand(file.read(member.stored))
    encoding = next((name for bom, name in _BOMS.items() if data.startswith(bom)), "utf-8-sig")
    return data.decode(encoding, errors="replace")


def read_json(file: IO[bytes], member: Member) -> dict[str, Any]:
    """Read a JSON member; an empty dict if it is not a JSON object, or larger than `TEXT_LIMIT`."""
    try:
        value = json.loads(read_text(file, member) or "")
    except (ValueError, RecursionError):  # the latter: thousands of brackets
        return {}
    return value if isinstance(value, dict) else {}


def first_members(
    url: str, count: int, storage_options: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield the extensions of a shard's first members, and the content of JSON; fewer if the shard is damaged."""
    with open_shard(url, storage_options) as file, contextlib.suppress(ShardError):
        for entry in islice(entries(file), count):
            parts = split_name(entry.name)
            if parts is not None and entry.left_out is None:
                member = Member(entry.name, parts[1], entry.offset, entry.nbytes, entry.pieces)
                yield member.ext, read_json(file, member) if member.ext == "json" else None
