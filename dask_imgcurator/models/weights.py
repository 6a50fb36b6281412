"""Find, download and verify the published files of the heads.

A file is trusted for its sha256, never for its location: on every load, the returned bytes themselves are hashed. The
files are small (under 4 MB), so this takes milliseconds.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from .. import config
from ..storage import files

#: Seconds without an answer after which a download is given up.
TIMEOUT = 30.0

#: No published file is larger than this (bytes).
MAX_BYTES = 64 << 20

_REMEDY = (
    "put the file into a folder and name it by --weights-dir (weights_dir=) or by "
    "DASK_IMGCURATOR__WEIGHTS_DIR; for embeddings of the starter model, the heads aesthetic-starter and "
    "nsfw-starter need no file"
)


class WeightsError(RuntimeError):
    """A weights file is missing, is not the published one, or has the wrong content."""


class WrongWeights(WeightsError):
    """A file with the name of a published one has other content."""


@dataclass(frozen=True)
class WeightsFile:
    """One published file; `folder` is its subfolder in a folder of weights, `license` an SPDX identifier."""

    folder: str
    filename: str
    sha256: str
    url: str
    license: str


def resolve_dir(weights_dir: str | os.PathLike[str] | None) -> str | None:
    """Turn an argument or the configuration into an absolute path that can travel to the workers.

    Workers do not see the client's ``dask.config``, so this is called once, on the client. The folder need not exist
    here, only where the weights are read.
    """
    # An empty string (from an empty environment variable) means "not set", not the current folder.
    chosen = weights_dir or config.get("weights-dir")
    return str(Path(chosen).expanduser().absolute()) if chosen else None


def find(file: WeightsFile, weights_dir: str | os.PathLike[str] | None = None, download: bool = True) -> Path:
    """Return the path of a verified copy of a published file.

    Searched in this order: `weights_dir` (for ``<folder>/<filename>``, then ``<filename>``), the folder in Dask's
    ``imgcurator.weights-dir``, the cache, and the address where the file was published. A file with another sha256 is
    an error and ends the search.
    """
    return _locate(file, weights_dir, download)[0]


def read(file: WeightsFile, weights_dir: str | os.PathLike[str] | None = None) -> bytes:
    """Return the verified bytes of a published file; nothing can change between check and use."""
    return _locate(file, weights_dir, download=True)[1]


def _locate(file: WeightsFile, weights_dir: str | os.PathLike[str] | None, download: bool) -> tuple[Path, bytes]:
    looked_at: list[str] = []
    for origin, value in (("weights_dir", weights_dir), ("Dask's imgcurator.weights-dir", config.get("weights-dir"))):
        if not value:
            continue
        folder = Path(value).expanduser().absolute()
        if not folder.is_dir():
            raise WeightsError(
                f"{origin} is {str(value)!r}, but {folder} is not a folder on this machine "
                f"({socket.gethostname()}); name a folder that holds {file.folder}/{file.filename}"
            )
        for candidate in (folder / file.folder / file.filename, folder / file.filename):
            looked_at.append(str(candidate))
            if candidate.is_file():
                return candidate, _read_checked(candidate, file)
    cached = _cache_folder() / "weights" / file.folder / file.filename
    looked_at.append(str(cached))
    if cached.is_file():
        return cached, _read_checked(cached, file)
    if not download:
        raise WeightsError(_missing(file, looked_at, "downloading is turned off"))
    data = _download(file, [*looked_at, file.url])
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with files.write_whole(str(cached)) as sink:
            sink.write(data)
    except OSError as error:
        raise WeightsError(
            f"{cached} cannot be written ({error}); set DASK_IMGCURATOR__CACHE_DIR to a folder that can"
        ) from error
    return cached, data


def _cache_folder() -> Path:
    chosen = config.get("cache-dir")
    if chosen:
        return Path(chosen).expanduser().absolute()
    # The XDG specification says that relative paths are to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "dask_imgcurator"


def _read_checked(path: Path, file: WeightsFile) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error}); make it readable or remove it") from error
    found = hashlib.sha256(data).hexdigest()
    if found != file.sha256:
        raise WrongWeights(
            f"{path} is not the published {file.filename}: sha256 is {found}, expected {file.sha256}; "
            f"remove it, or replace it by the file from {file.url}"
        )
    return data


def _missing(file: WeightsFile, looked_at: list[str], why: str) -> str:
    places = "".join(f"\n  {place}" for place in dict.fromkeys(looked_at))
    return f"no {file.filename} ({why}); looked at:{places}\npublished at {file.url}; {_REMEDY}"


def _download(file: WeightsFile, looked_at: list[str]) -> bytes:
    try:
        with urllib.request.urlopen(file.url, timeout=TIMEOUT) as response:
            data: bytes = response.read(MAX_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the response, and holds the connection
        raise WeightsError(_missing(file, looked_at, f"download failed: {error}")) from error
    found = hashlib.sha256(data).hexdigest()
    if found != file.sha256:
        raise WeightsError(
            f"{file.url} served {len(data)} bytes that are not the published {file.filename}: "
            f"sha256 is {found}, expected {file.sha256}; nothing was kept; {_REMEDY}"
        )
    return data
