"""Jobs that are active in a folder of results, or were stopped there, and their progress: ``.unfinished-*.json``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..storage import files

_UNFINISHED = ".unfinished-"

#: Seconds between progress reports, and seconds of silence after which a job is considered gone.
_EVERY, _SILENT = 15.0, 120.0


class Mark:
    """The file that marks an active job, rewritten regularly while the job runs."""

    def __init__(self, url: str, about: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._url, self._about, self._options = url, dict(about), options
        self._write()

    def tell(self, now: bool = False, **state: Any) -> None:
        """Report the job's progress."""
        self._about |= state
        if now or time.time() - self._about["told"] >= _EVERY:
            with contextlib.suppress(OSError):  # the job itself will report what is wrong
                self._write()

    def _write(self) -> None:
        self._about["told"] = time.time()
        write_json(self._url, self._about, self._options)


@contextmanager
def working(
    folder: str, command: str, job: str, options: Mapping[str, Any], anything: bool = True
) -> Iterator[Mark | None]:
    """Mark a folder until its work is done, if there is `anything` to do; `job` distinguishes marks."""
    url = files.join(folder, f"{_UNFINISHED}{hashlib.sha256(job.encode()).hexdigest()[:12]}.json")
    about = {"command": command, "host": os.uname().nodename, "pid": os.getpid(), "began": time.time()}
    about["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
    yield Mark(url, about, options) if anything else None
    files.remove(url, options)


def marks(folder: str, storage_options: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Marks of jobs that are active in a folder, or were stopped."""
    found = files.list_files(folder, ".json", storage_options, prefix=_UNFINISHED)
    return [mark for mark in (read_json(url, storage_options) for url in found) if mark]


@contextmanager
def alone(folder: str, command: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Work in a folder in which no other process of this machine is active."""
    for mark in marks(folder, options):
        if _lives(mark) and mark["pid"] != os.getpid():
            raise FileExistsError(
                f"{folder} is being written by process {mark['pid']} (`{mark['command']}`, since {mark['since']}): "
                "wait for its end, or choose another folder"
            )
    files.make_folder(folder)
    with working(folder, command, command, options):
        yield


def _lives(mark: Mapping[str, Any]) -> bool:
    """Whether a mark's process is alive on this machine."""
    return mark["host"] == os.uname().nodename and files.is_alive(mark["pid"])


# --- progress of a run ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """What a folder of results holds, and a line about each job that is active there or was stopped."""

    folder: str
    command: str
    files: int
    jobs: tuple[str, ...]


def find_status(folder: str, storage_options: Mapping[str, Any] | None = None) -> list[Status]:
    """The status of the runs in a folder, or in the folders of a run; FileNotFoundError if there is none."""
    found = []
    for place in (folder, files.join(folder, "scores"), files.join(folder, "shards")):
        suffix = ".tar" if place.endswith("/shards") else ".parquet"
        there, jobs = files.list_files(place, suffix, storage_options), marks(place, storage_options)
        command = read_json(files.join(place, ".table.json"), storage_options).get("command")
        if command or jobs or (there and place != folder):
            words = tuple(_describe(job) for job in jobs)
            found.append(Status(files.absolute(place), str(command or "write"), len(there), words))
    if not found:
        raise FileNotFoundError(f"{folder} holds no result of a run: give the --out of a curate, score or write")
    return found


def _describe(mark: Mapping[str, Any]) -> str:
    """A job's command, progress, speed, and whether it is still running."""
    silent = time.time() - mark.get("told", mark.get("began", 0))
    who = f"`{mark['command']}` on {mark['host']} (process {mark['pid']}), since {mark['since']}"
    parts = [who]
    if total := mark.get("shards"):
        done, seconds = mark.get("finished", 0), mark["told"] - mark["began"]
        images, errors = mark.get("images", 0), mark.get("errors", 0)
        parts.append(f"{done:,} of {total:,} shards, {images:,} images, {errors:,} errors")
        if done and seconds > 0:
            left = (total - done) * seconds / done
            parts.append(f"{images / seconds:,.1f} images/s, about {left / 60:,.0f} minutes left")
        if running := mark.get("running"):
            parts.append(f"working on {', '.join(running)}")
    if problem := mark.get("stopped"):
        parts.append(f"stopped: {problem}")
    elif mark["host"] == os.uname().nodename and not _lives(mark):
        parts.append("was stopped: its process is gone")
    elif silent > _SILENT and "told" in mark:
        parts.append(f"no word for {silent / 60:,.0f} minutes")
    return "; ".join(parts)


# --- small files ----------------------------------------------------------------------------------


def read_json(url: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Read a small file with a JSON object; empty if it does not exist."""
    return dict(json.loads(files.read_text(url, options) or "{}"))


def encode(about: Mapping[str, Any]) -> bytes:
    """Encode an object for such a file."""
    return json.dumps(about, indent=1, ensure_ascii=False).encode() + b"\n"


def write_json(url: str, about: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Write such a file."""
    with files.write_whole(url, options) as file:
        file.write(encode(about))
