"""What a run did, and what a selection keeps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Counts", "RunResult", "Selection"]


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
    funnel : list of dict
        For each condition: ``condition``, ``alone`` and ``left`` (rows that pass it alone, and with all before it).
    shards_scored, shards_taken_over : int
        Source shards of this run, and of earlier ones.
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
    funnel: list[dict[str, Any]] = field(default_factory=list)
    shards_scored: int = 0
    shards_taken_over: int = 0
    images_scored: int = 0
    loading_seconds: float = 0.0
    scoring_seconds: float = 0.0
    seconds: float = 0.0
    written: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Counts:
    """How many rows a selection keeps.

    Attributes
    ----------
    rows, kept : int
        Of the table, and of these kept.
    by_status : dict
        Rows by ``status``.
    funnel : list of dict
        As in `RunResult`.
    """

    rows: int
    by_status: dict[str, int]
    kept: int
    funnel: list[dict[str, Any]]


@dataclass
class Selection:
    """Which rows of which score files are kept."""

    urls: list[str]
    where: str | None
    located: list[dict[str, Any]]

    @property
    def kept(self) -> int:
        """Number of kept rows."""
        return sum(len(part["keys"]) for part in self.located)

    @property
    def rows(self) -> int:
        """Number of rows in all."""
        return sum(part["rows"] for part in self.located)

    @property
    def by_status(self) -> dict[str, int]:
        """Rows by ``status``, commonest first."""
        total: Counter[str] = Counter()
        for part in self.located:
            total.update(part["by_status"])
        return dict(total.most_common())

    @property
    def funnel(self) -> list[dict[str, Any]]:
        """Each condition with the rows that pass it alone, and after those before it."""
        out: list[dict[str, Any]] = []
        for part in self.located:
            for i, step in enumerate(part["funnel"]):
                if i == len(out):
                    out.append({"condition": step["condition"], "alone": 0, "left": 0})
                out[i]["alone"] += step["alone"]
                out[i]["left"] += step["left"]
        return out
