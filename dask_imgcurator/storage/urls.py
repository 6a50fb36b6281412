"""URLs of shards, what their files contain, and what identifies their versions."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from .files import absolute, at_once, exists, file_system, is_local, list_files, local_path, open_local, persist
from .remote import describe_version, version
from .samples import IMAGE_EXTENSIONS


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
    if is_local(item):
        return _expand_local(local_path(item))
    return [url for name in _braces(item) for url in _expand_remote(name, storage_options)]


def _braces(text: str) -> list[str]:
    try:
        return list(braceexpand(text)) if "{" in text else [text]
    except ValueError:  # braceexpand.UnbalancedBracesError, which its stubs do not export
        raise FileNotFoundError(f"unbalanced braces in {text!r}") from None


def _expand_local(path: Path) -> list[str]:
    # An existing path is not a pattern: names may contain braces and brackets.
    if _exists(path):
        return _expand_folder(str(path)) if path.is_dir() else [str(path)]
    folder, rest = _split(path)
    out: list[str] = []
    for name in _braces(rest):
        whole = folder / name
        if _exists(whole) or not glob.has_magic(name):
            out.extend(_expand_folder(str(whole)) if whole.is_dir() else [str(whole)])
            continue
        inside, pattern = _split(whole)
        matches = sorted(glob.glob(str(Path(glob.escape(str(inside)), pattern)), recursive=True))
        if not matches:
            raise FileNotFoundError(f"no file matches {str(whole)!r}")
        out.extend(matches)
    return out


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # braces can be longer than a name
        return False


def _split(path: Path) -> tuple[Path, str]:
    """Split a pattern into the folder that exists, whatever its name looks like, and the rest."""
    folder = next(parent for parent in path.parents if _exists(parent))
    return folder, str(path.relative_to(folder))


def _expand_remote(name: str, storage_options: dict[str, Any]) -> list[str]:
    fs, path = file_system(name, storage_options)  # raises for a protocol or options that cannot be used here
    if name.endswith("/"):
        return _expand_folder(name, storage_options)
    # The question mark of an http URL begins its query (such as a signature).
    magic = glob.has_magic(name.partition("?")[0] if name.startswith("http") else name)
    if not magic or exists(name, storage_options):
        return [name]
    folder, _, last = path.rpartition("/")
    if glob.has_magic(folder) and persist(name, partial(fs.exists, folder)):
        path = f"{glob.escape(folder)}/{last}"
    matches = sorted(persist(name, partial(fs.glob, path)))
    if not matches:
        raise FileNotFoundError(f"nothing matches {name!r}")
    return [str(fs.unstrip_protocol(match)) for match in matches]


_PACKED = re.compile(r"\.(tar\.\w+|t[gx]z|tbz2?|tzst)$", re.IGNORECASE)


def packed_beside(urls: Sequence[str]) -> list[str]:
    """Compressed tars in the local folders of some shards; without random access, they cannot be shards."""
    folders = dict.fromkeys(str(local_path(url).parent) for url in urls if is_local(url))
    return [f for folder in folders if Path(folder).is_dir() for f in list_files(folder, "") if _PACKED.search(f)]


def _expand_folder(folder: str, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    files = list_files(folder, "", storage_options)
    tars = [f for f in files if f.lower().endswith(".tar")]
    if not tars:
        packed = [f for f in files if _PACKED.search(f)]
        hint = f", only compressed ones: unpack {packed[0]} and its like first" if packed else ""
        if any(f.rpartition(".")[2].lower() in {*IMAGE_EXTENSIONS, "parquet"} for f in files):
            hint = f": dask-imgcurator pack {folder} --out SHARDS makes shards of pictures, and of Parquet with images"
        raise FileNotFoundError(f"no *.tar in the folder {folder}{hint}")
    return tars


# --- what a file is -------------------------------------------------------------------------------

#: How files begin that are mistaken for shards, what they are, and what to do.
_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself: fetch it with git annex get"),
    (b"PAR1", "a Parquet file: shards are tars; a score table is for select, dedup, write and the like"),
    (b"PK\x03\x04", "a ZIP archive: unpack it, and pack its files into a tar"),
    (b"\x89PNG", "an image: pack images into tars, each with what belongs to it under one name"),
    (b"\xff\xd8\xff", "an image: pack images into tars, each with what belongs to it under one name"),
    *(
        (magic, f"compressed with {name}: unpack it first ({tool}), since members are read by their offsets")
        for magic, name, tool in (
            (b"\x1f\x8b", "gzip", "gunzip"),
            (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
            (b"BZh", "bzip2", "bunzip2"),
            (b"\xfd7zXZ\0", "xz", "unxz"),
        )
    ),
)
_PAGES = (
    (rb"(<!--.*?-->\s*)?<(!doctype html|html|head)\b", "a web page, such as a server's error or login"),
    (rb"<\?xml|<error>", "an XML document, such as a store's error"),
    (rb"[{\[]\s*[\"{\[\]}]", "a JSON document, such as a server's error"),
)

#: From this many files of a remote folder on, the folder is listed instead of requesting each.
_MANY = 64

#: Bytes that identify a file's type.
HEAD = 512

#: Shards to check, as long as none is a tar.
_LOOKS = 64


def what_is(head: bytes) -> str | None:
    """Say what a file is, by its first `HEAD` bytes, and what to do; None for tars and anything unknown."""
    with contextlib.suppress(Exception):  # tarfile raises many kinds
        tarfile.TarInfo.frombuf(head[:HEAD], tarfile.ENCODING, "surrogateescape")
        return None
    for magic, words in _BEGINNINGS:
        if head.startswith(magic):
            return words
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    found = next((words for pattern, words in _PAGES if re.match(pattern, text, re.IGNORECASE | re.DOTALL)), None)
    return found and f"{found}: see what it says, and get the file itself"


def first_bytes(url: str, storage_options: Mapping[str, Any] | None = None) -> bytes:
    """Read the first `HEAD` bytes of a file; none if it cannot be read, which others report."""
    try:
        if is_local(url):
            with open_local(url) as file:
                return file.read(HEAD)
        fs, path = file_system(url, storage_options)
        if url.startswith("http"):  # a web server without ranges would send all of it
            with fs.open(path, "rb", block_size=0) as file:
                return bytes(file.read(HEAD))
        return bytes(fs.cat_file(path, start=0, end=HEAD))
    except Exception:  # file systems raise many kinds
        return b""


def check_shards(urls: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> None:
    """Raise ValueError if the first shards are readable but not tars; one among others is reported in its row."""
    wrong = {}
    for url in urls[:_LOOKS]:
        head = first_bytes(url, storage_options)
        words = what_is(head)
        if words is not None:
            wrong[url] = words
        elif head:
            return
    if wrong:
        url, words = next(iter(wrong.items()))
        more = f" (nor is any of {len(wrong) - 1} others)" if len(wrong) > 1 else ""
        raise ValueError(f"{url} is not a tar{more}; it is {words}")


def find_version(url: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """Identify a shard's version without reading it: size, and ETag or modification time; OSError on failure."""
    if is_local(url):
        return _describe_stat(local_path(url).stat())
    return version(url, storage_options)


def _describe_stat(found: os.stat_result) -> str:
    return f"size={found.st_size} mtime_ns={found.st_mtime_ns}"


def find_versions(urls: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> list[str | OSError]:
    """Versions of many files, as from `find_version`, or why one is unknown at present."""
    listed: dict[str, str] = {}
    for folder, n in Counter(parent(url) for url in urls if not is_local(url)).items():
        if n >= _MANY and not folder.startswith("http"):
            listed |= _listed_versions(folder, storage_options)

    def find(url: str) -> str | OSError:
        try:
            return listed.get(url) or find_version(url, storage_options)
        except OSError as err:
            return err

    return at_once(find, urls)


def _listed_versions(folder: str, storage_options: Mapping[str, Any] | None) -> dict[str, str]:
    """Versions of a remote folder's files, from its listing: one request per thousand files."""
    try:
        found = versions_in(folder, "", storage_options)
        # Some stores give less in a listing, or in another form.
        alike = all(find_version(url, storage_options) == found[url] for url in [*found][:1])
    except OSError:
        return {}
    return found if alike else {}


def versions_in(folder: str, suffix: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Versions of the files in a folder with this ending, by name, from the folder's listing."""
    if not is_local(folder):
        fs, path = file_system(folder, storage_options)
        pattern = f"{glob.escape(path.rstrip('/'))}/*{suffix}"
        found = persist(folder, lambda: fs.glob(pattern, detail=True))
        return {str(fs.unstrip_protocol(name)): describe_version(info) for name, info in sorted(found.items())}
    out = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(local_path(folder)) as entries:
        for entry in entries:
            if entry.name.endswith(suffix) and not entry.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    out[entry.path] = _describe_stat(entry.stat())
    return dict(sorted(out.items()))


def marks_changes(version: str) -> bool:
    """Whether a version is known and includes more than the file's size."""
    return version.rpartition("=")[2] != ""


def parent(url: str) -> str:
    """The folder of a file."""
    return url.partition("?")[0].rpartition("/")[0] if "://" in url else url.rpartition("/")[0]


def folders_of(urls: Iterable[str]) -> tuple[str, ...]:
    """Folders of files; if there are very many, their parents."""
    folders = {parent(url) or "/" for url in urls}
    while len(folders) > _MANY:
        folders = {parent(folder) or "/" for folder in folders}
    return tuple(sorted(folders))


def lies_in(url: str, folders: Iterable[str]) -> bool:
    """Whether a file is in or below one of some folders, or is one of them."""
    name = absolute(url)
    if "/../" in name:  # some web servers resolve it
        return False
    return any(name == folder or name.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def fingerprints(urls: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Versions of files, or ``"unreadable"``."""
    return [found if isinstance(found, str) else "unreadable" for found in find_versions(urls, storage_options)]


def fingerprint(url: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """The version of a file, or ``"unreadable"``."""
    try:
        return find_version(url, storage_options)
    except OSError:
        return "unreadable"
