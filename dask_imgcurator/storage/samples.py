"""Samples of a tar: runs of members that share a key, as in webdataset.

The key is a member's path up to the first dot of its last component; the rest (lower case) is the extension.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

#: Extensions that mark a member as an image. The content later decides the format.
IMAGE_EXTENSIONS = frozenset("jpg jpeg jpe jfif png webp gif bmp tif tiff avif heic heif jxl jp2 ppm pgm pbm".split())

_NOTES = re.compile(r"__[^/]*__/")

#: What a line of an index for DALI cannot hold.
_NO_WORD = re.compile("[\\s\ud800-\udfff]")


@dataclass(frozen=True)
class Member:
    """One file in a tar and where its data are; `pieces`: offset and length of a sparse file's stored parts."""

    name: str
    ext: str
    offset: int
    nbytes: int
    pieces: tuple[tuple[int, int], ...] | None = None

    @property
    def stored(self) -> int:
        """Bytes that it occupies in the tar, from `offset` on."""
        return self.nbytes if self.pieces is None else sum(nbytes for _, nbytes in self.pieces)

    def expand(self, data: bytes) -> bytes:
        """Content of the file, from the bytes stored in the tar."""
        if self.pieces is None:
            return data
        out, position = bytearray(self.nbytes), 0
        for start, nbytes in self.pieces:
            out[start : start + nbytes] = data[position : position + nbytes]
            position += nbytes
        return bytes(out)


@dataclass(frozen=True)
class LeftOut:
    """Something with a sample's key that cannot be a member, such as a link."""

    ext: str
    reason: str


@dataclass
class Sample:
    """Members that share a key, the extent that holds them all, and what was left out."""

    key: str
    offset: int
    end: int
    members: list[Member] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def get(self, ext: str) -> Member | None:
        """Return the member with this extension."""
        return next((m for m in self.members if m.ext == ext), None)

    def image(self, preferred: Sequence[str] = ()) -> Member | None:
        """Return the image of the sample.

        The first member, in the tar's order, with an image extension; plain ones (``jpg``) come before prefixed ones
        (``seg.png``). With preferred extensions, the member with the first of them that any member has, or none.
        """
        if preferred:
            return next((m for ext in preferred if (m := self.get(ext)) is not None), None)
        plain = [m for m in self.images if "." not in m.ext]
        return next(iter(plain or self.images), None)

    @property
    def images(self) -> list[Member]:
        """Members whose extension is an image's."""
        return [m for m in self.members if _is_image(m.ext)]

    def why_no_image(self, preferred: Sequence[str] = ()) -> str:
        """Say what the sample has instead, if `image` finds none."""
        reasons = [x.reason for x in self.left_out if (x.ext in preferred if preferred else _is_image(x.ext))]
        if reasons:
            return reasons[0]
        wanted = f"the extension {' or '.join(preferred)}" if preferred else "an image extension"
        found = [*(m.ext for m in self.members), *(x.reason for x in self.left_out)]
        return f"no member with {wanted} (found: {', '.join(found)})"


def _is_image(ext: str) -> bool:
    return ext.rpartition(".")[2] in IMAGE_EXTENSIONS


@dataclass
class ShardIndex:
    """Contents of a tar: whole samples, what is wrong with it (or None), and the sample with the damage."""

    samples: list[Sample]
    error: str | None = None
    broken: Sample | None = None


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and lower-case extension, by webdataset's rules; None if it is in no sample."""
    # The key runs to the first dot after the last slash; names without an extension, hidden files and anything below
    # ``__…__/`` (notes on the shard) are left out. Bytes that are not UTF-8 become ``\xe9`` in the key: a string column
    # cannot hold them.
    folder, slash, base = name.rpartition("/")
    stem, dot, ext = base.partition(".")
    if not stem or not dot or _NOTES.match(name):
        return None
    key, ext = folder + slash + stem, ext.lower()
    if not name.isascii():
        key, ext = as_utf8(key), as_utf8(ext)
    return key, ext


def as_utf8(name: str) -> str:
    # tarfile decodes with "surrogateescape", which preserves odd bytes.
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def format_idx(samples: Iterable[Sample]) -> str | None:
    """Write an index in the format of DALI's ``wds2idx`` 1.2; None if it cannot express a name or a sparse member."""
    # A header line, then per sample a line with ``ext offset size name`` for each member. Names must be UTF-8 without
    # white space.
    lines = []
    for sample in samples:
        parts: list[str] = []
        for m in sample.members:
            # DALI expects the extension exactly as in the name.
            ext = m.name.rpartition("/")[2].partition(".")[2]
            parts += [ext, str(m.offset), str(m.nbytes), m.name]
        if not all(parts) or any(map(_NO_WORD.search, parts)):
            return None
        if any(m.pieces is not None for m in sample.members):
            return None
        lines.append(" ".join(parts))
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
