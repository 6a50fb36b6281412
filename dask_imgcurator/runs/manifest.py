"""A cache of a folder's score files: their footers, and what runs counted in them.

``.files.json`` lists each file with its version; an entry is valid only for that version. It only saves time: if it is
missing or damaged, the files are read.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from ..steps.score_table import ScoreFile
from ..storage import files
from ..storage.urls import marks_changes

NAME = ".files.json"

#: How many kinds of counts (for example, per selection) to cache for each file.
_KINDS = 4

#: Parts of a provenance specific to each file.
_OWN = ("shard", "fingerprint")


@dataclass
class Manifest:
    """Footers of files and counts by name, each with the version of the file."""

    footers: dict[str, tuple[str, ScoreFile]] = field(default_factory=dict)
    counted: dict[str, dict[str, tuple[str, Any]]] = field(default_factory=dict)  # by kind, the latest last

    def footer(self, url: str, version: str) -> ScoreFile | None:
        """The footer of a file, if known for this version."""
        known = self.footers.get(_name(url))
        if known is None or known[0] != version:
            return None
        return replace(known[1], url=url)

    def count(self, kind: str, url: str, version: str) -> Any:
        """What was counted in a file, if known for this version; otherwise None."""
        known = self.counted.get(kind, {}).get(_name(url))
        return known[1] if known is not None and known[0] == version else None

    def learn(self, kind: str, version: str, file: ScoreFile, counted: Any) -> None:
        """Add what is known about a file."""
        if marks_changes(version):
            name = _name(file.url)
            self.footers[name] = version, file
            self.counted.setdefault(kind, {})[name] = version, counted

    def keep(self, kind: str, urls: Iterable[str]) -> None:
        """Forget all files but these, and the oldest kinds."""
        names = {_name(url) for url in urls}
        self.footers = {name: known for name, known in self.footers.items() if name in names}
        self.counted[kind] = self.counted.pop(kind, {})
        kinds = list(self.counted.items())[-_KINDS:]
        self.counted = {k: {name: of[name] for name in of.keys() & names} for k, of in kinds}


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def read_manifest(folder: str, storage_options: Mapping[str, Any]) -> Manifest:
    """Read a folder's manifest; an empty one if there is none that can be read."""
    try:
        found = json.loads(files.read_text(files.join(folder, NAME), storage_options) or "{}")
        schemas = [pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text))) for text in found.get("schemas", ())]
        footers = {
            name: (version, ScoreFile("", schemas[schema], {**found["provenances"][made], **own}, rows))
            for name, (version, schema, made, own, rows) in found.get("footers", {}).items()
        }
        counted = {
            kind: {name: (version, counts) for name, (version, counts) in of.items()}
            for kind, of in found.get("counted", {}).items()
        }
    except (ValueError, TypeError, LookupError, AttributeError, binascii.Error, pa.ArrowException):
        return Manifest()
    return Manifest(footers, counted)


def write_manifest(manifest: Manifest, folder: str, storage_options: Mapping[str, Any]) -> None:
    """Write a folder's manifest."""
    schemas: dict[pa.Schema, int] = {}
    provenances: dict[str, int] = {}
    footers = {}
    for name, (version, file) in manifest.footers.items():
        own = {key: file.provenance[key] for key in _OWN if key in file.provenance}
        shared = json.dumps({k: v for k, v in file.provenance.items() if k not in own}, sort_keys=True)
        places = schemas.setdefault(file.schema, len(schemas)), provenances.setdefault(shared, len(provenances))
        footers[name] = version, *places, own, file.rows
    found = {
        "schemas": [base64.b64encode(schema.serialize()).decode() for schema in schemas],
        "provenances": [json.loads(text) for text in provenances],
        "footers": footers,
        "counted": manifest.counted,
    }
    with files.write_whole(files.join(folder, NAME), storage_options) as out:
        out.write(json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode())
