"""What a run did, and what a selection keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

#: Characters that move a terminal's cursor or change the direction of text.
_ACTIVE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
del _ACTIVE[10], _ACTIVE[9]


def visible(text: str) -> str:
    """Text that cannot control a terminal: keys, captions and file names may come from anyone."""
    return text.translate(_ACTIVE)


def count(n: int, noun: str) -> str:
    """A number with its noun: ``1 shard``, ``1,200 shards``."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


@dataclass
class RunResult:
    """What a run did.

    Attributes
    ----------
    out : str
        Its folder.
    samples : int
        Rows of the score table.
    by_status : dict
        Rows by ``status``.
    kept : int or None
        Samples written; None if the run selected nothing.
    funnel : list of ConditionCount
        What each condition keeps.
    shards_scored, shards_taken_over : int
        Source shards scored by this run, and reused from earlier ones.
    shards_missing : list of str
        Source shards that could not be read, or are no longer there. They have no rows, or those of an earlier run.
    images_scored, scoring_seconds : int, float
        This run's, from the start of the first shard to the end of the last.
    loading_seconds : float
        Until the first worker had its model.
    seconds : float
        The whole run, without starting the cluster if the caller passed a client.
    written : list of dict
        ``_stats.json`` of each curated shard.
    provenance : dict
        Model, heads, decoder and versions.
    notes : list of str
        Notes for the user.
    """

    out: str
    samples: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    kept: int | None = None
    funnel: list[ConditionCount] = field(default_factory=list)
    shards_scored: int = 0
    shards_taken_over: int = 0
    shards_missing: list[str] = field(default_factory=list)
    images_scored: int = 0
    loading_seconds: float = 0.0
    scoring_seconds: float = 0.0
    seconds: float = 0.0
    written: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class ConditionCount:
    """How many readable rows a condition keeps.

    Attributes
    ----------
    condition : str
        Its text.
    alone : int
        Rows that pass it alone.
    left : int
        Rows that pass it and all conditions before it.
    """

    condition: str
    alone: int
    left: int


@dataclass
class Counts:
    """How many rows a selection keeps.

    Attributes
    ----------
    rows, readable, kept : int
        Rows of the table, readable ones among them (``status`` is ``ok``), and kept ones among those.
    by_status : dict
        Rows by ``status``, most frequent first.
    funnel : list of ConditionCount
        What each condition keeps.
    """

    rows: int = 0
    readable: int = 0
    kept: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    funnel: list[ConditionCount] = field(default_factory=list)

    @staticmethod
    def sum(parts: Iterable[Counts]) -> Counts:
        """Add up the counts of partitions."""
        total, statuses = Counts(), Counter[str]()
        for part in parts:
            total.rows += part.rows
            total.readable += part.readable
            total.kept += part.kept
            statuses.update(part.by_status)
            if not total.funnel:
                total.funnel = [ConditionCount(step.condition, 0, 0) for step in part.funnel]
            for step, more in zip(total.funnel, part.funnel, strict=False):  # an empty part has none
                step.alone += more.alone
                step.left += more.left
        total.by_status = dict(statuses.most_common())
        return total
