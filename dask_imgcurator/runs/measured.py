"""Counts of each score file: for the user, and for writing the kept samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from .. import __version__
from ..engine.backend import backend_of
from ..engine.frames import to_arrow
from ..monitor import Monitor
from ..results import ConditionCount, Counts, count
from ..schema import kind_of
from ..select.settle import Settled
from ..steps.write import Kept, measure_partition
from ..storage.curated import LOCATORS, WriteSpec
from .plan import ScorePlan


@dataclass(frozen=True)
class Measured:
    """Totals of a score file: counts for the user, and numbers for writing its kept samples."""

    counts: Counts
    kept: Kept | None = None
    notes: Mapping[str, Remark] = field(default_factory=dict)  # by kind of entry in the column ``note``
    empty: frozenset[str] = frozenset()  # requested columns without any value

    @property
    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "empty": sorted(self.empty)}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Measured:
        """The inverse of `record`."""
        counts = record["counts"]
        funnel = [ConditionCount(**step) for step in counts["funnel"]]
        kept = Kept(**record["kept"]) if record["kept"] is not None else None
        notes = {kind: Remark(**remark) for kind, remark in record["notes"].items()}
        return Measured(Counts(**{**counts, "funnel": funnel}), kept, notes, frozenset(record["empty"]))


@dataclass(frozen=True)
class Last:
    """What the last step of a partition counts."""

    settled: Settled
    spec: WriteSpec | None = None
    chosen: tuple[str, ...] = ()  # columns requested by the user

    def measure(self, frame: Any) -> Measured:
        """Count a partition's rows."""
        kept = None if self.spec is None else measure_partition(self.settled.filter(frame), self.spec)
        empty = frozenset(name for name in self.chosen if name in frame.columns and not frame[name].notna().any())
        rows = to_arrow(frame, [name for name in self.settled.columns if name in frame.columns])
        return Measured(self.settled.count(rows), kept, _remarks(frame), empty)

    @property
    def kind(self) -> str:
        """Identifies the kind of counts."""
        spec = self.spec and (self.spec.folder, self.spec.max_count, self.spec.max_nbytes, self.spec.sources)
        conditions = [condition.text for condition in self.settled.conditions]
        return repr([__version__, conditions, str(self.settled.planned), spec, self.chosen])

    @property
    def columns(self) -> list[str]:
        """Columns needed to count."""
        locators = LOCATORS if self.spec is not None else ("key", "shard")
        return list(dict.fromkeys([*self.settled.columns, "status", "note", *locators, *self.chosen]))


@dataclass(frozen=True)
class Remark:
    """How many samples have a kind of note, and the first of them."""

    count: int
    example: str

    def __add__(self, other: Remark) -> Remark:
        return Remark(self.count + other.count, self.example)


def _remarks(frame: Any) -> dict[str, Remark]:
    """Count the notes of a partition by the text before the colon."""
    found: dict[str, Remark] = {}
    if "note" not in frame.columns:
        return found
    table = backend_of(frame).to_host(frame[frame["note"].notna()], ["note", "key", "shard"])
    for row in table.to_pylist():
        for note in row["note"].split("; "):
            kind, _, detail = note.partition(": ")
            example = f"{row['key']} in {row['shard'].rpartition('/')[2]}" + (f": {detail}" if detail else "")
            found[kind] = found[kind] + Remark(1, "") if kind in found else Remark(1, example)
    return found


#: What to do about a kind of note.
_REMEDIES = {
    "several images": "; only one of them is scored (--image EXT names it)",
    "samples of more than 8 bits are clipped at 255": " (imgcurator.scale-high-bit-depth stretches them)",
}


def tell(parts: Sequence[Measured], schema: pa.Schema, plan: ScorePlan, monitor: Monitor) -> None:
    """Tell the user what was not used as is, or was requested and not found."""
    total: dict[str, Remark] = {}
    for part in parts:
        for kind, remark in part.notes.items():
            total[kind] = total[kind] + remark if kind in total else remark
    for kind, remark in total.items():
        monitor.note(f"{count(remark.count, 'sample')}: {kind}{_REMEDIES.get(kind, '')}; for example {remark.example}.")
    for name in sorted(frozenset.intersection(*(part.empty for part in parts)) if parts else ()):
        monitor.note(f"No sample has a value for {name}.")
    for expected in plan.planned:
        type_ = schema.field(expected.name).type
        if kind_of(type_) not in ("unknown", kind_of(expected.type)):
            monitor.note(
                f"The JSON field {expected.name} is {expected.type} in the first samples, but {type_} in the table, "
                "which keeps all of its values. A condition on it treats values of another kind as missing."
            )
