"""What a run did, and what a selection keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

#: Characters that move a terminal's cursor, or turn the direction of what follows.
_ACTIVE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
del _ACTIVE[10], _ACTIVE[9]


def visible(text: str) -> str:
    """Text in which nothing acts on a terminal: keys, captions and file names are anyone's."""
    return text.translate(_ACTIVE)


def count(n: int, noun: str) -> str:
    """Write a number of things: ``1 shard``, ``1,200 shards``."""
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
        Samples written; None where nothing was selected.
    funnel : list of ConditionCount
        What each condition keeps.
    shards_scored, shards_taken_over : int
        Source shards of this run, and of earlier ones.
    shards_missing : list of str
        Source shards that could not be read, or are no longer there. They have no rows, or those of an earlier run.
    images_scored, scoring_seconds : int, float
        Of this run, from the first shard's start to the last one's end.
    loading_seconds : float
        Until the first worker had its model.
    seconds : float
        The whole run, without the start of the cluster's processes where the caller gave a client.
    written : list of dict
        ``_stats.json`` of each curated shard.
    provenance : dict
        Model, heads, decoder and versions.
    notes : list of str
        What the user was told.
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
        Rows that pass it by itself.
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
        Of the table, of these readable (``status`` is ``ok``), and of these kept.
    by_status : dict
        Rows by ``status``, commonest first.
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
