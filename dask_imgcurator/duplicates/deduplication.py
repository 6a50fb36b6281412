"""Find duplicate images in tiers: same bytes, nearly the same hash, nearly the same embedding.

    found = find_duplicates(df, eps=[0.02, 0.05, 0.1], keep="aesthetic_score")
    found.counts()             # how many go, by tier and eps
    found.groups(eps=0.05)     # the groups, side by side
    df = found.drop(df, eps=0.05)

or, where the values are known, ``df = dedup(df, eps=0.05, keep="aesthetic_score")``.

**Tiers.** Each works on what the one before left. *exact*: the same ``sha256``. *perceptual*: ``phash`` within
``max_distance`` bits; identical hashes are one, then no pair is missed (`hashes.hamming_masks`). Hashes with fewer
than 8 bits set, or not set, are not compared: plain areas of any colour have the same. *semantic*: cosine
of at least 1 - eps. Up to 20,000 rows every pair is compared. Above, k-means makes 2 √n cells, and a row is compared
with those that live in its ``probe`` nearest; what may be missed are pairs on the border of cells, and the fewer the
smaller eps is. `Duplicates.cells` tells how many, by comparing 512 rows with all. ``n_cells=1`` compares all pairs,
however many.

**Who stays.** Three rules. Take a ~ b ~ c, where a and c are not near each other:

- ``components``: whoever is connected is one group, and the best of it stays. One of the three stays, whatever the
  order. It drops most, and a long chain may join what looks different (the group table shows each row's similarity to
  the one that stays).
- ``semdedup`` (Abbas et al. 2023, arXiv:2303.09540): in each cell, rows are sorted, and a row goes if its highest
  similarity to one before it exceeds 1 - eps, **also if that one has gone itself**. Sorted a, b, c: b and c go. Sorted
  b, a, c: a and c go. Sorted a, c, b: only b goes. Rows of different cells are not compared. By default
  ``keep="hard"``, the authors' order: the lowest cosine to the cell's centroid first, so that outliers stay.
- ``nemo``: NVIDIA NeMo Curator's rule is SemDeDup's with "at least" instead of "exceeds"
  (``cosine_sim_score >= 1 - eps``). Its order may be by any column, as here. Not taken over: ties by descending id.

With ``keep=COLUMN`` the highest value is the best, missing ones last; ties go by ``shard``, ``key`` and
``sample_offset``. That order is total, and which rows meet follows from hashes of these three: the result depends on
neither threads, partitions, workers nor the order of rows.

**Where, and in how much memory.** The frame is read once, wherever its partitions are computed; its rows come to the
process that asks. There they take about 100 bytes each in memory, and their vectors a file in Dask's
``temporary-directory`` (2 GB for 10⁶ rows of 512), which is mapped: 2 GB count as this process's memory but are the
system's to take back. Cells are then compared here, on all threads or on the card. Vectors could be shuffled to the
workers of a cluster instead; but they would be sent and stored there as often as a row has cells, while to compare
them takes this machine some microseconds a row. Sets too large for one disk go in parts, each against the index of
those before (``against``, ``append``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..engine.backend import Backend, backend_of, local_backend
from ..engine.frames import meta_of
from ..schema import kind_of
from . import hashes
from .cells import Cells, assign, default_cells, train
from .components import NO_PAIRS, Forest, Pairs, component_roots, follow, order_rows, strongest
from .index import Index, by_id, open_index, source_of
from .neighbours import TOLERANCE, compare_cells, earlier_pairs, near_pairs
from .result import Duplicates, Level
from .rows import Rows, Source, gather

Rule = Literal["components", "semdedup", "nemo"]

#: In the order in which they work.
TIERS = ("exact", "perceptual", "semantic")

RULES = ("components", "semdedup", "nemo")

#: Column that each tier compares, and the step that adds it.
_NEEDS = {
    "exact": ("sha256", "embed"),
    "perceptual": ("phash", "embed(measures=True)"),
    "semantic": ("embedding", "embed"),
}


@dataclass(frozen=True)
class Options:
    """What `find_duplicates` was asked for; `central` is the order "hard" or "easy"."""

    tiers: Any
    eps: Any
    max_distance: int
    keep: str | None
    lowest: bool
    rule: Rule
    n_cells: int | None
    probe: int
    seed: int
    columns: Mapping[str, str]
    central: str | None = None

    @property
    def sequential(self) -> bool:
        """Whether rows go one after another, by those before them."""
        return self.rule != "components"


def find_duplicates(
    df: Any,
    tiers: Sequence[str] | None = None,
    *,
    eps: float | Sequence[float] = 0.05,
    max_distance: int = 4,
    keep: str | None = None,
    lowest: bool = False,
    rule: Rule = "components",
    against: Any = None,
    n_cells: int | None = None,
    probe: int = 3,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    embedding: str = "embedding",
    sha256: str = "sha256",
    phash: str = "phash",
    storage_options: Mapping[str, Any] | None = None,
) -> Duplicates:
    """Find the duplicates in a frame, and those of a reference.

    This computes: it reads the frame once. The notes of this module say how the tiers and rules work.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With ``key``, and what there is of ``shard``, ``sample_offset`` (together they must tell rows apart) and
        ``status`` (rows that are not ``ok`` take no part).
    tiers : sequence of {"exact", "perceptual", "semantic"}, optional
        By default those whose column there is.
    eps : float or sequence of float
        Semantic duplicates have a cosine of at least 1 - eps. Several are answered in one pass.
    max_distance : int
        Perceptual duplicates' hashes differ in at most so many of 64 bits.
    keep : str, optional
        A column of numbers, truth values or times: of a group, the row with the highest value stays, missing ones last.
        ``"first"``: by shard, key and offset, the default of the rule ``components``. ``"hard"``, the default of the
        other two, or ``"easy"``: the row least, or most, similar to the centroid of its cell (in the semantic tier; in
        the others, the first).
    lowest : bool
        Whether the lowest value of `keep` stays.
    rule : {"components", "semdedup", "nemo"}
        Who goes in the semantic tier.
    against : DataFrame, str, path or Index, optional
        A reference, as a frame or as the folder of `build_index`: what is in a set already, or the images of a
        benchmark that must not be trained on. Rows that duplicate one of its rows go; its rows always stay, and are not
        compared with each other.
    n_cells : int, optional
        k-means cells; by default 2 √n above 20,000 rows, else 1. 1 compares all pairs. An index of a like size brings
        its own.
    probe : int
        Cells in which a row looks for neighbours, its own included. The other two rules use 1.
    seed : int
        Of k-means.
    provenance : mapping, optional
        How the embeddings were made; where an index says so too, they must agree.
    embedding, sha256, phash : str
        Names of the columns. Perceptual hashes are 64-bit integers or 16 hexadecimal digits.
    storage_options : mapping, optional
        For the fsspec file system of an index.

    Returns
    -------
    Duplicates
        With `Duplicates.counts`, `Duplicates.groups`, `Duplicates.mark` and `Duplicates.drop`.

    Raises
    ------
    ValueError
        For a tier, rule or column that there is not, or values out of range.
    TypeError
        If `keep` is a column of text or vectors, or a column is not of hashes or vectors.
    DedupError
        If two rows cannot be told apart, or vectors differ in width, from each other or from the reference's.
    """
    asked = Options(
        tiers, eps, max_distance, keep, lowest, rule, n_cells, probe, seed,
        {"sha256": sha256, "phash": phash, "embedding": embedding},
    )  # fmt: skip
    options = _settle(df, asked)
    use = {_NEEDS[tier][0]: options.columns[_NEEDS[tier][0]] for tier in options.tiers}
    if embedding in df.columns:
        use["embedding"] = embedding  # for the similarity in the table of groups
    sources = [source_of(df, use, options.keep, lowest)]
    index = None
    if isinstance(against, str | os.PathLike):
        index = open_index(against, storage_options)
    elif isinstance(against, Index):
        index = against
    if against is not None:
        _check_reference(index.about["columns"] if index is not None else list(against.columns), index, use, options)
    if against is not None and index is None:
        sources.append(source_of(against, {c: name for c, name in use.items() if name in against.columns}))
    read = sources
    if "semantic" not in options.tiers:
        read = [replace(s, spec=replace(s.spec, embedding=None)) for s in sources]
    if index is not None:
        index.check_origin(provenance)
    return _decide(sources, gather(read, index), options, index, local_backend(backend_of(df)))


def _settle(df: Any, asked: Options) -> Options:
    """Check what was asked for."""
    backend_of(df)  # raises for what is no frame
    if asked.rule not in RULES:
        raise ValueError(f"unknown rule {asked.rule!r}: use {', '.join(RULES)}")
    values = (asked.eps,) if isinstance(asked.eps, int | float) else tuple(asked.eps)
    wrong = [e for e in values if not 0 <= e <= 2]
    if wrong or not values:
        raise ValueError(f"eps={wrong[0] if wrong else asked.eps}: 1 - cosine lies between 0 and 2")
    for name, value, low, high in (("max_distance", asked.max_distance, 0, 16), ("probe", asked.probe, 1, 64)):
        if not low <= value <= high:
            raise ValueError(f"{name}={value}: it must be {low} to {high}")
    if asked.n_cells is not None and asked.n_cells < 1:
        raise ValueError(f"n_cells={asked.n_cells}: it must be at least 1")
    keep, central = asked.keep or ("hard" if asked.sequential else "first"), None
    if keep in ("hard", "easy"):
        if not asked.sequential:
            raise ValueError(f"keep={keep!r} is an order of the rules semdedup and nemo: name a column, or 'first'")
        central = keep
    elif keep != "first":
        _check_keep(df, keep)
    return replace(
        asked,
        tiers=_tiers(df, asked.tiers, asked.columns),
        eps=tuple(sorted({float(e) for e in values})),
        keep=None if central or keep == "first" else keep,
        central=central,
    )


def _tiers(df: Any, tiers: Sequence[str] | None, columns: Mapping[str, str]) -> tuple[str, ...]:
    there = ", ".join(map(str, df.columns))
    if isinstance(tiers, str):
        tiers = [tiers]
    if tiers is None:
        chosen = tuple(tier for tier in TIERS if columns[_NEEDS[tier][0]] in df.columns)
        if not chosen:
            raise ValueError(
                f"there is no column to find duplicates by: embed adds sha256 and embedding (there are: {there})"
            )
        return chosen
    unknown = [tier for tier in tiers if tier not in TIERS]
    if unknown or not tiers:
        raise ValueError(f"unknown tier {unknown[0]!r}: use {', '.join(TIERS)}" if unknown else "tiers is empty")
    for tier in tiers:
        column, step = _NEEDS[tier]
        if columns[column] not in df.columns:
            raise ValueError(
                f"the tier {tier} needs the column {columns[column]}: {step} adds it, or name yours with {column}= "
                f"(there are: {there})"
            )
    return tuple(tier for tier in TIERS if tier in tiers)


def _check_keep(df: Any, keep: str) -> None:
    if keep not in df.columns:
        raise ValueError(
            f"keep={keep!r}: there is no such column (there are: {', '.join(map(str, df.columns))}, or 'first')"
        )
    kind = backend_of(df).to_host(meta_of(df), [keep]).schema.field(keep).type
    if kind_of(kind) in ("string", "list"):
        raise TypeError(f"keep={keep!r} is a column of {kind}: name one of numbers, truth values or times")


def _check_reference(there: Sequence[str], index: Index | None, use: Mapping[str, str], options: Options) -> None:
    """Check that a reference has the columns that are compared; those of an index have names of their own."""
    for tier in options.tiers:
        column, step = _NEEDS[tier]
        name = use[column] if index is None else column
        if name not in there:
            raise ValueError(
                f"the tier {tier} needs the column {name} in the reference too (against=): {step} adds it, or leave "
                "the tier out"
            )


# --- deciding -------------------------------------------------------------------------------------


def _decide(
    sources: Sequence[Source], rows: Rows, options: Options, index: Index | None, backend: Backend
) -> Duplicates:
    """Go through the tiers, each on what the one before left."""
    found: dict[str, Pairs] = {}
    if "exact" in options.tiers:
        found["exact"] = hashes.exact_pairs(rows)
    if "perceptual" in options.tiers:
        found["perceptual"] = hashes.perceptual_pairs(rows, options.max_distance)
    check = None
    if "semantic" in options.tiers:
        numbers, levels = _levels(rows, found, options)
        gone = np.zeros(len(rows), bool)
        if levels:
            gone[numbers[levels[-1].root != np.arange(len(numbers))]] = True
            gone[rows.ours :] = False
        there = by_id(rows)
        cells = _cells(rows, there[~gone[there]], options, index, backend)
        found["semantic"] = _semantic(rows, cells, options, backend.device)
        if cells.k > 1:
            check = cells.check(rows.vectors, options.eps, backend.device)
    return Duplicates(sources, index, rows, *_levels(rows, found, options), check)


def _cells(rows: Rows, there: np.ndarray, options: Options, index: Index | None, backend: Backend) -> Cells:
    """Put rows, sorted by id, in cells."""
    n, ours = len(there), there < rows.ours
    home = np.full(len(rows), -1, np.int32)
    k = options.n_cells or default_cells(n)
    # Of an index with far fewer rows than there are now, the cells would be too large.
    if index is not None and index.about["width"] and options.n_cells is None and 4 * len(index.centroids) >= k:
        centroids = index.centroids
        homes = [np.repeat(np.arange(len(centroids)), np.diff(part.starts)) for part in index.parts]
        start = len(rows) - sum(len(part.rows) for part in index.parts)
        for part, known in zip(index.parts, homes, strict=True):
            home[start : start + len(known)] = known
            start += len(part.rows)
    elif min(k, n) <= 1 and options.central is None:
        return Cells(1, there, ours, np.zeros((n, 1), np.int32), np.zeros(n, np.float32))
    else:
        centroids = train(there, rows.vectors, backend, min(k, n), options.seed) if n else np.zeros((1, 0), np.float32)
    probe = 1 if options.sequential else min(options.probe, len(centroids))
    cells, central = np.full((n, probe), -1, np.int32), np.zeros(n, np.float32)
    cells[:, 0] = home[there]
    new = cells[:, 0] < 0
    cells[new], central[new] = assign(there[new], rows.vectors, centroids, backend.device, probe)
    return Cells(len(centroids), there, ours, cells, central)


def _semantic(rows: Rows, cells: Cells, options: Options, device: str) -> Pairs:
    """Find the pairs of near vectors; with the sequential rules, b is the row before a."""
    threshold = 1 - max(options.eps) - TOLERANCE
    if options.sequential:
        position = np.zeros(len(rows), np.int64)
        position[cells.rows[order_rows(rows.take(cells.rows))]] = np.arange(len(cells.rows))
        cells = cells.sorted_by(position, options.central)
        found = [NO_PAIRS, *compare_cells(cells, earlier_pairs, rows.vectors.take, device, threshold)]
        a, b, near = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return a, b, near
    forest = Forest(len(rows))
    for pairs in compare_cells(cells, near_pairs, rows.vectors.take, device, threshold):
        forest.add(*pairs)
    return forest.pairs()


def _levels(rows: Rows, found: Mapping[str, Pairs], options: Options) -> tuple[np.ndarray, list[Level]]:
    """Number the rows in pairs, best first, and decide who stays after each tier; in the semantic one for each eps."""
    numbers = np.unique(np.concatenate([NO_PAIRS[0], *(side for pairs in found.values() for side in pairs[:2])]))
    numbers = numbers[order_rows(rows.take(numbers))]
    n, place = len(numbers), np.zeros(len(rows), np.int64)
    place[numbers] = np.arange(n)
    levels: list[Level] = []
    i, j = np.empty(0, np.int64), np.empty(0, np.int64)
    for tier in ("exact", "perceptual"):
        if tier in found:
            i, j = np.r_[i, place[found[tier][0]]], np.r_[j, place[found[tier][1]]]
            levels.append(Level(tier, None, component_roots(i, j, n)))
    if "semantic" not in found:
        return numbers, levels
    a, b, cosine = place[found["semantic"][0]], place[found["semantic"][1]], found["semantic"][2]
    before = levels[-1].root if levels else np.arange(n)
    if options.sequential:
        a, b, cosine = strongest(a, b, cosine)
    for eps in options.eps:
        if not options.sequential:
            near = cosine >= 1 - eps - TOLERANCE
            root = component_roots(np.r_[i, a[near]], np.r_[j, b[near]], n)
        else:
            near = cosine > 1 - eps if options.rule == "semdedup" else cosine >= 1 - eps
            parent = before.copy()
            parent[a[near]] = b[near]
            root = follow(parent)
        levels.append(Level("semantic", eps, root))
    return numbers, levels


def dedup(df: Any, tiers: Sequence[str] | None = None, *, mark: bool = False, **options: Any) -> Any:
    """Drop the duplicates of a frame, or mark them.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        See `find_duplicates`.
    tiers : sequence of {"exact", "perceptual", "semantic"}, optional
        By default those whose column there is.
    mark : bool
        Keep all rows, and add the columns of `Duplicates.mark`.
    **options
        As for `find_duplicates`: ``eps``, ``max_distance``, ``keep``, ``rule``, ``against``, …

    Returns
    -------
    the frame's type
        Lazy, if `df` is; the search itself is done when this returns.

    Raises
    ------
    ValueError
        For several `eps` without `mark`: which of them should drop rows? And as `find_duplicates` does.

    Examples
    --------
    >>> df = dedup(df, eps=0.05, keep="aesthetic_score")  # doctest: +SKIP
    >>> df = dedup(df, against="my-set.index")  # doctest: +SKIP
    """
    eps = options.get("eps", 0.05)
    if not mark and not isinstance(eps, int | float) and len(set(eps)) > 1:
        raise ValueError(f"eps={list(eps)}: name one, or mark=True; find_duplicates tries several")
    found = find_duplicates(df, tiers, **options)
    return found.mark(df) if mark else found.drop(df)


def duplicate_groups(df: Any, tiers: Sequence[str] | None = None, **options: Any) -> pd.DataFrame:
    """Table of the groups of duplicates in a frame.

    Parameters
    ----------
    df, tiers, **options
        As for `find_duplicates`.

    Returns
    -------
    pandas.DataFrame
        See `Duplicates.groups`; of several `eps`, for the largest.
    """
    return find_duplicates(df, tiers, **options).groups()
