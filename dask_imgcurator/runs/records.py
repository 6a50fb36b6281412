"""The record in a folder of results, and who may write there.

``.table.json`` says which command made the table, from what and with which settings. A job claims its folder before it
writes: another job's result is refused or, with `overwrite`, removed, but never a file that this library did not write.
``.unfinished-*.json`` exist while jobs are active, and after they were stopped. Readers of Parquet folders skip names
that begin with a dot.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from ..monitor import Monitor
from ..results import RunResult, count
from ..steps.read import URLPath
from ..steps.score_table import ScoreFile, look_at, model_name
from ..storage import files
from ..storage.tar_index import explain
from ..storage.urls import find_versions, parent, versions_in
from .manifest import Manifest, read_manifest
from .marks import Mark, alone, encode, marks, read_json, working, write_json
from .plan import ScorePlan, Target, score_files

RECORD = ".table.json"
#: Parts of the provenance common to all files of a score table.
COMMON = ("encoder", "heads", "decode", "read", "versions")

#: Entries that cheap commands add to the provenance of their files.
_LATER = {"deduplicated": "dedup", "selected": "select", "added": "add", "written": "write"}

_REMEDY = "choose another folder, or replace it with --overwrite (overwrite=True)"


@dataclass(frozen=True)
class Made:
    """Everything that decides the rows of a table: command, input folders, settings; `about` is for people."""

    command: str
    inputs: tuple[str, ...]
    settings: Mapping[str, Any]
    about: str

    @property
    def record(self) -> dict[str, Any]:
        """The content of its file."""
        made = {"command": self.command, "inputs": self.inputs, "settings": self.settings, "about": self.about}
        return as_read({"format": 1, **made})


@dataclass(frozen=True)
class Found:
    """The state of a folder of results: its record, and the footer and version of each of its files."""

    folder: str
    options: Mapping[str, Any]
    record: Mapping[str, Any]
    looks: Mapping[str, ScoreFile]
    versions: Mapping[str, str] = field(default_factory=dict)
    manifest: Manifest = field(default_factory=Manifest)

    @property
    def tables(self) -> dict[str, Mapping[str, Any]]:
        """Provenance of each file."""
        return {url: file.provenance for url, file in self.looks.items()}

    @property
    def shards(self) -> dict[str, str]:
        """Score files by the shard they describe."""
        return {str(made["shard"]): url for url, made in self.tables.items() if "shard" in made}

    def counted(self, kind: str, url: str) -> Any:
        """What an earlier run counted in a file, as JSON; None if unknown for its present version."""
        return self.manifest.count(kind, url, self.versions.get(url, ""))

    @property
    def command(self) -> str:
        """The command that made it, as far as its record or files say."""
        later = next((name for made in self.tables.values() for key, name in _LATER.items() if key in made), "score")
        return str(self.record.get("command", later))

    @property
    def refusal(self) -> str:
        """Why another command may not write there."""
        about = f" {self.record['about']}" if self.record.get("about") else ""
        n = len(self.tables)
        return f"{self.folder} holds the result of `{self.command}`{about} ({count(n, 'file')}): {_REMEDY}"


def look(folder: str, storage_options: Mapping[str, Any] | None = None) -> Found:
    """Inspect a folder of results; FileExistsError for Parquet files that this library did not write."""
    options = dict(storage_options or {})
    record = read_json(files.join(folder, RECORD), options)
    versions, manifest = versions_in(folder, ".parquet", options), read_manifest(folder, options)
    looks = {url: manifest.footer(url, version) for url, version in versions.items()}
    unknown = [url for url, file in looks.items() if file is None]
    looks |= zip(unknown, files.at_once(lambda url: _look(url, bool(record), options), unknown), strict=True)
    if foreign := next((url for url, file in looks.items() if file is None), None):
        raise FileExistsError(
            f"{foreign} was not written by this library: choose another folder, or move the file away"
        )
    there = {url: file for url, file in looks.items() if file is not None}
    return Found(folder, options, record, there, versions, manifest)


def _look(url: str, known: bool, options: Mapping[str, Any]) -> ScoreFile | None:
    """Inspect a file; None if it is not this library's. A damaged one is, if the folder is `known` to be."""
    nothing = ScoreFile(url, pa.schema([]), {})
    try:
        file = look_at(url, options)
        return file if file.provenance else None
    except FileNotFoundError:  # removed since it was listed
        return nothing
    except ValueError:
        return nothing if known else None


def note_unfinished(scores: URLPath, storage_options: Mapping[str, Any] | None, monitor: Monitor) -> None:
    """Warn that a table being read may lack rows."""
    for name in (name for name in _names(scores) if not name.endswith(".parquet")):
        for mark in marks(name, storage_options):
            monitor.note(
                f"{name} is not finished: `{mark['command']}` began there at {mark['since']} on {mark['host']} "
                f"(process {mark['pid']}), and has not completed"
            )


# --- tables written by one job --------------------------------------------------------------------


def made_of(command: str, scores: URLPath, settings: Mapping[str, Any], about: str) -> Made:
    """Describe what decides the rows of a result."""
    inputs = tuple(_names(scores))
    return Made(command, inputs, settings, f"of {', '.join(inputs)}: {about}")


def _names(scores: URLPath) -> list[str]:
    items = [scores] if isinstance(scores, str | os.PathLike) else list(scores)
    return [files.absolute(item) for item in items]


@contextmanager
def replacing(
    folder: str, made: Made, targets: Collection[str], overwrite: bool, storage_options: Mapping[str, Any]
) -> Iterator[None]:
    """Claim a folder for a table written by one job; an earlier result of the same command may be replaced."""
    found = look(folder, storage_options)
    same = found.record == made.record
    if (found.record or found.tables) and not (same or overwrite):
        raise FileExistsError(found.refusal)
    with alone(folder, made.command, storage_options):
        write_json(files.join(folder, RECORD), made.record, storage_options)
        _remove([url for url in found.tables if not (same and url in targets)], storage_options)
        yield


# --- score tables, which several jobs may fill ----------------------------------------------------


def common(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a provenance that all files of a score table share."""
    shared = {name: provenance[name] for name in COMMON if name in provenance}
    if "read" in shared:  # types of fields are specific to each file
        shared["read"] = {**shared["read"], "fields": sorted(shared["read"].get("fields", {}))}
    return as_read(shared)


def check_dataset(found: Found, urls: Sequence[str]) -> None:
    """Refuse to score into another command's table, or into a table of other shards."""
    # The jobs of an array fill one folder with parts of a dataset. Shards of other folders are another dataset, or the
    # same one moved, whose rows would count twice.
    # Columns added without a record come from an older version, which wrote them into the score files themselves.
    if found.command != "score" and (found.record or found.command != "add"):
        raise FileExistsError(found.refusal)
    before = {*found.record.get("inputs", ()), *map(parent, found.shards)}
    if before and not before & set(map(parent, urls)) and not found.shards.keys() & set(urls):
        there = min(found.shards, default=files.join(min(before), "…"))
        raise FileExistsError(
            f"{found.folder} holds the scores of other shards ({there}), to which those of {urls[0]} would be added: "
            "choose another folder (commands on score tables take several), or replace them with --overwrite "
            "(overwrite=True). If these are the same shards, moved: move them back, or link the old name to the new one"
        )


def admitted(
    found: Found, urls: Sequence[str], provenance: Mapping[str, Any], overwrite: bool
) -> dict[str, Mapping[str, Any]]:
    """Score files that stay in the table; without `overwrite`, refused if another model or setting made some."""
    shared, mine = common(provenance), {*urls, None}
    distinct: dict[str, bool] = {}  # among thousands of files, nearly all are equal

    def is_alike(made: Mapping[str, Any]) -> bool:
        key = repr([made.get(name) for name in COMMON])
        if key not in distinct:
            distinct[key] = not difference(common(made), shared)
        return distinct[key]

    alike = {url: made for url, made in found.tables.items() if not made or is_alike(made)}
    if overwrite:
        return {url: made for url, made in alike.items() if made.get("shard") in mine}
    for url in found.tables.keys() - alike.keys():
        _refuse(url, common(found.tables[url]), provenance)
    return alike


@contextmanager
def filling(
    found: Found, urls: Sequence[str], provenance: Mapping[str, Any], overwrite: bool, anything: bool
) -> Iterator[Mark | None]:
    """Claim a folder for the score files of some shards, if there is `anything` to write."""
    kept = admitted(found, urls, provenance, overwrite)
    made = Made("score", tuple(sorted(set(map(parent, urls)))), common(provenance), f"by {model_name(provenance)}")
    record = files.join(found.folder, RECORD)
    files.make_folder(found.folder)
    if overwrite or not files.write_new(record, encode(made.record), found.options):
        there = read_json(record, found.options)  # perhaps from a run that began at the same time
        if not overwrite:
            _refuse(found.folder, there["settings"], provenance)
            made = replace(made, inputs=tuple(sorted({*there["inputs"], *made.inputs})))
        if there != made.record:
            write_json(record, made.record, found.options)
    with working(found.folder, made.command, "\n".join(urls), found.options, anything) as mark:
        _remove(found.tables.keys() - kept.keys(), found.options)
        yield mark


def _refuse(where: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to continue if a score file or a record was made differently."""
    if found := difference(there, common(here)):
        raise FileExistsError(
            f"{where} holds scores by {model_name(there)}, this run would add some by {model_name(here)}: {found}; "
            f"{_REMEDY}"
        )


def difference(there: Any, here: Any, name: str = "") -> str:
    """The first difference between two provenances, in words; empty if equal."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        found = (difference(there.get(k), here.get(k), f"{name}.{k}" if name else k) for k in sorted({*there, *here}))
        return next(filter(None, found), "")
    return "" if there == here else f"{name} is {there!r} there and {here!r} here"


def _gone(shards: Iterable[str], storage_options: Mapping[str, Any] | None) -> list[str]:
    """The shards that are no longer in their folders; none on web servers, which have no listings."""
    listed: dict[str, set[str]] = {}
    out = []
    for shard in shards:
        folder = parent(shard)
        if shard.startswith("http"):
            continue
        if folder not in listed:
            listed[folder] = set(files.list_files(folder, "", storage_options))
        if shard not in listed[folder]:
            out.append(shard)
    return out


# --- remaining work -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Settings of a run: whether it resumes or replaces another result, its monitor, and its notes."""

    resume: bool
    overwrite: bool
    monitor: Monitor
    result: RunResult


@dataclass(frozen=True)
class Work:
    """Existing and future score files by shard, those to be made, and why shards cannot be read."""

    targets: dict[str, Target]
    todo: dict[str, Target]
    missing: dict[str, str]


def settle_work(found: Found, urls: Sequence[str], plan: ScorePlan, run_of: Run) -> Work:
    """Find out which shards to score, by a settled plan."""
    there, options = admitted(found, urls, plan.provenance, run_of.overwrite), plan.read.storage_options
    shards = {str(made["shard"]): url for url, made in there.items() if "shard" in made}
    names = score_files(urls, found.folder, shards)
    versions = dict(zip(names, find_versions(list(names), options), strict=True))
    work = Work({}, {}, {})
    for url, version in versions.items():
        target = Target(url, names[url], version if isinstance(version, str) else "")
        before = {k: v for k, v in there.get(names[url], {}).items() if k != "added"}  # columns added later
        if isinstance(version, OSError):
            work.missing[url] = explain(url, version)
        elif not (run_of.resume and before == plan.provenance_of(target)):
            work.todo[url] = target
        if url not in work.missing or url in shards:  # finished scores are kept, even if their shard is gone
            work.targets[url] = target
    others = [shard for shard in shards if shard not in versions]
    lost = _gone(others, options)
    marks = {there[shards[shard]].get("fingerprint"): shard for shard in lost}
    for url in work.todo.keys() - shards.keys():
        if versions[url] in marks:
            raise FileExistsError(
                f"{url} looks like {marks[versions[url]]}, renamed, whose scores {found.folder} holds: both would "
                "count. Give it its old name, choose another folder, or replace them with --overwrite (overwrite=True)"
            )
    if more := len(others) - len(lost):
        run_of.monitor.note(
            f"{found.folder} holds scores of {count(more, 'more shard')} from other runs: all form one table."
        )
    work.missing.update({shard: f"no such file: {shard}" for shard in lost})
    return work


# --- small files ----------------------------------------------------------------------------------


def as_read(value: Any) -> dict[str, Any]:
    """A value after a round trip through JSON."""
    return dict(json.loads(json.dumps(value, default=str)))


def _remove(urls: Collection[str], options: Mapping[str, Any]) -> None:
    files.at_once(lambda url: files.remove(url, options), urls)
