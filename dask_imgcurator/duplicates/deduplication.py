"""Find duplicate images in tiers: same bytes, nearly the same hash, nearly the same embedding.

The frame is read once, where its partitions are computed, and its rows are collected in the calling process: about 150
bytes each in memory, and their vectors in a memory-mapped file in Dask's ``temporary-directory`` (2 GB for 10⁶ rows of
512). Cells are compared there, on all threads or on the GPU. Shuffling vectors to a cluster's workers would send each
once per cell, although comparing it takes only microseconds. Sets too large for one disk can be processed in parts,
each against the index of the previous ones. Hashes of shard, key and offset decide which rows are compared, and a total
order decides which is kept: the result does not depend on threads, partitions, workers or the order of rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..engine.backend import Backend, backend_of
from ..engine.frames import meta_of
from ..schema import kind_of
from ..select.ranks import random_order
from ..steps.embed import warn_of_decoding
from . import hashes
from .cells import TOLERANCE, Cells, assign, default_cells, near_pairs, on_threads, train
from .components import Forest, Pairs, component_roots, follow, joined, order_rows, strongest
from .index import Index, open_index
from .result import Duplicates, Level
from .rows import Rows, Source, gather

Rule = Literal["components", "semdedup", "nemo"]

#: In the order of application.
TIERS = ("exact", "perceptual", "semantic")

RULES = ("components", "semdedup", "nemo")

#: The column that each tier compares, and the step that adds it.
_NEEDS = {
    "exact": ("sha256", "embed"),
    "perceptual": ("phash", "embed(measures=True)"),
    "semantic": ("embedding", "embed"),
}


@dataclass(frozen=True)
class Options:
    """Arguments of `find_duplicates`; `central` is the order "hard" or "easy"."""

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
        """Whether each row is compared with those before it."""
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
    """Find the duplicates within a frame, and of a reference.

    This computes: it reads the frame once.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With ``key`` and, if available, ``shard``, ``sample_offset`` (together they must identify rows) and ``status``
        (rows that are not ``ok`` are not compared).
    tiers : sequence of {"exact", "perceptual", "semantic"}, optional
        By default all whose column exists.
    eps : float or sequence of float
        Semantic duplicates have a cosine of at least 1 - eps. Several values take one pass.
    max_distance : int
        Hashes of perceptual duplicates differ in at most this many of 64 bits.
    keep : str, optional
        A column of numbers, booleans or times: the row with the highest value in each group is kept; missing values
        come last. ``"first"``, the default of the rule ``components``: the first by shard, key and offset.
        ``"random"``: one at random, by `seed`. ``"hard"``, the default of the other rules, or ``"easy"``: the row
        least, or most, similar to its cell's centroid (in the semantic tier; in the others, the first).
    lowest : bool
        Whether to keep the lowest value of `keep` instead.
    rule : {"components", "semdedup", "nemo"}
        How to choose which semantic duplicates to drop. ``components``: rows connected by near pairs form one group,
        and the best of it is kept. ``semdedup`` (arXiv:2303.09540): the rows of each cell are sorted, and a row is
        dropped if its highest cosine to an earlier one exceeds 1 - eps, even if that one was dropped itself. ``nemo``:
        the same with "at least", like NVIDIA NeMo Curator.
    against : DataFrame, str, path or Index, optional
        A reference, as a frame or as the folder of `build_index`: an existing dataset, or the images of a benchmark
        that must not be trained on. Rows that duplicate one of its rows are dropped; its own rows are always kept, and
        not compared with each other.
    n_cells : int, optional
        k-means cells; by default 2 √n above 20,000 rows, else 1. 1 compares all pairs. Cells larger than four times the
        mean are split. An index of similar size provides its own.
    probe : int
        Cells in which a row looks for neighbours, including its own. The other rules use 1.
    seed : int
        Seed of k-means, and of ``keep="random"``.
    provenance : mapping, optional
        How the embeddings were made; it must agree with an index that records it.
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
        If a tier, rule or column does not exist, or a value is out of range.
    TypeError
        If `keep` is a column of text or vectors, or a compared column does not hold hashes or vectors.
    DedupError
        If two rows are indistinguishable, or vectors differ in width from each other or from the reference's.
    """
    names = {"sha256": sha256, "phash": phash, "embedding": embedding}
    options = _settle(df, Options(tiers, eps, max_distance, keep, lowest, rule, n_cells, probe, seed, names))
    columns = {column: names[column] for column in (_NEEDS[tier][0] for tier in options.tiers)}
    used = [*columns.values(), *([options.keep] if options.keep else [])]
    warn_of_decoding(df, [name for name in used if name in df.columns], "The search for duplicates")
    by = random_order(df, seed, "keep='random'") if options.keep == "random" else options.keep
    sources, index = [Source(df, columns, by, lowest)], None
    if isinstance(against, str | os.PathLike):
        against = open_index(against, storage_options)
    if isinstance(against, Index):
        index = against
        _tiers(
            index.about["columns"], options.tiers, {name: name for name in names}, " in the reference too (against=)"
        )
    elif against is not None:
        _tiers(against.columns, options.tiers, names, " in the reference too (against=)")
        sources.append(Source(against, columns))

    def gathered(only: np.ndarray | None = None) -> Rows:
        """All rows, or some with their vectors, for the similarity in the table of groups."""
        read = sources
        if only is not None:
            more = [{"embedding": embedding} if embedding in source.frame.columns else {} for source in sources]
            read = [replace(s, columns={**s.columns, **m}) for s, m in zip(sources, more, strict=True)]
        rows = gather(read, only)
        if index is None:
            return rows
        index.check(rows.width, provenance)
        return rows.joined([(part.rows, part.vectors) for part in index.parts], index.about["width"])

    return _decide(gathered, sources[0].identity, options, index, backend_of(df))


def _settle(df: Any, asked: Options) -> Options:
    """Check the options."""
    backend_of(df)  # raises for anything but a frame
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
    tiers = _tiers(df.columns, asked.tiers, asked.columns)
    keep = asked.keep or ("hard" if asked.sequential else "first")
    central = keep if keep in ("hard", "easy") else None
    if central and not asked.sequential:
        raise ValueError(f"keep={keep!r} is an order of the rules semdedup and nemo: name a column, or 'first'")
    if not central and keep not in ("first", "random"):
        if keep not in df.columns:
            there = ", ".join(map(str, df.columns))
            raise ValueError(f"keep={keep!r}: no such column (available: {there}, or 'first', 'random')")
        kind = backend_of(df).to_host(meta_of(df), [keep]).schema.field(keep).type
        if kind_of(kind) in ("string", "list"):
            raise TypeError(f"keep={keep!r} is a column of {kind}: name one of numbers, booleans or times")
    column = None if central or keep == "first" else keep
    return replace(asked, tiers=tiers, eps=tuple(sorted({float(e) for e in values})), keep=column, central=central)


def _tiers(
    columns: Sequence[str], tiers: str | Sequence[str] | None, names: Mapping[str, str], where: str = ""
) -> tuple[str, ...]:
    """The requested tiers, whose columns must exist; by default all whose columns exist."""
    there = ", ".join(map(str, columns))
    if tiers is None:
        return tuple(tier for tier in TIERS if names[_NEEDS[tier][0]] in columns)
    asked = [tiers] if isinstance(tiers, str) else list(tiers)
    unknown = [tier for tier in asked if tier not in TIERS]
    if unknown or not asked:
        raise ValueError(f"unknown tier {unknown[0]!r}: use {', '.join(TIERS)}" if unknown else "tiers is empty")
    for tier in asked:
        column, step = _NEEDS[tier]
        if names[column] not in columns:
            raise ValueError(
                f"the tier {tier} needs the column {names[column]}{where}: {step} adds it (on the command line: "
                f"score), or name yours with {column}=, or leave the tier out (available: {there})"
            )
    return tuple(tier for tier in TIERS if tier in asked)


# --- deciding -------------------------------------------------------------------------------------


def _decide(
    gathered: Callable[..., Rows], identity: tuple[str, ...], options: Options, index: Index | None, backend: Backend
) -> Duplicates:
    """Apply the tiers, each to the rows left by the one before."""
    rows, found = gathered(), dict[str, Pairs]()
    if "exact" in options.tiers:
        found["exact"] = hashes.exact_pairs(rows)
    if "perceptual" in options.tiers:
        found["perceptual"] = hashes.perceptual_pairs(rows, options.max_distance)
    check = None
    if "semantic" in options.tiers:
        stays = np.ones(len(rows), bool)
        if found:
            numbers, levels = _levels(rows, found, options)
            stays[numbers] = (levels[-1].root == np.arange(len(numbers))) | (numbers >= rows.ours)
        there = rows.with_vector[stays[rows.with_vector]]
        cells, device = _cells(rows, there, options, index, backend), backend.device
        found["semantic"] = _semantic(rows, cells, options, device)
        check = cells.check(partial(rows.tensor, device), device, options.eps) if cells.k > 1 else None
    again = None if "semantic" in options.tiers else gathered
    return Duplicates(identity, rows, *_levels(rows, found, options), check, again)


def _cells(rows: Rows, there: np.ndarray, options: Options, index: Index | None, backend: Backend) -> Cells:
    """Assign rows, sorted by id, to cells."""
    home = np.full(len(rows), -1, np.int32)
    # The cells of an index with far fewer rows would be too large.
    if (
        index is not None
        and index.about["width"]
        and not options.n_cells
        and 4 * len(index.centroids) >= default_cells(len(there))
    ):
        centroids, start = index.centroids, len(rows) - sum(len(part.rows) for part in index.parts)
        for part in index.parts:
            home[start : start + len(part.vectors)] = part.cells
            start += len(part.rows)
    else:
        centroids = train(rows, there, backend, options.n_cells, options.seed)
    probe = 1 if options.sequential else min(options.probe, len(centroids))
    cells, central = np.full((len(there), probe), -1, np.int32), np.zeros(len(there), np.float32)
    cells[:, 0] = home[there]
    new = cells[:, 0] < 0
    cells[new], central[new] = assign(rows, there[new], centroids, backend.device, probe)
    return Cells(len(centroids), there, there < rows.ours, cells, central)


def _semantic(rows: Rows, cells: Cells, options: Options, device: str) -> Pairs:
    """Find the pairs of near vectors; with the sequential rules, b precedes a."""
    if options.sequential:
        order = order_rows(rows.records(cells.rows))
        if options.central is not None:
            central = cells.central[order] * (1 if options.central == "hard" else -1)
            order = order[np.argsort(central, kind="stable")]
        cells = Cells(cells.k, cells.rows[order], cells.ours[order], cells.cells[order], cells.central[order])
    how = partial(rows.tensor, device), 1 - max(options.eps) - TOLERANCE, options.sequential
    tasks = (task for cell in cells for task in cell.tasks())
    found = on_threads(lambda task: near_pairs(*task, *how), tasks, device)
    if options.sequential:
        return joined(found)
    forest = Forest(len(rows))
    for pairs in found:
        forest.add(*pairs)
    return forest.pairs()


def _levels(rows: Rows, found: Mapping[str, Pairs], options: Options) -> tuple[np.ndarray, list[Level]]:
    """Number the rows in pairs, best first, and decide which are kept after each tier, and for each eps."""
    numbers = np.unique(
        np.concatenate([np.empty(0, np.int64), *(side for pairs in found.values() for side in pairs[:2])])
    )
    numbers = numbers[order_rows(rows.records(numbers))]
    n, place, levels = len(numbers), np.zeros(len(rows), np.int64), list[Level]()
    place[numbers] = np.arange(n)
    i, j, before = np.empty(0, np.int64), np.empty(0, np.int64), np.arange(n)
    for tier, (a, b, near) in found.items():
        a, b = place[a], place[b]
        if tier != "semantic":
            i, j = np.r_[i, a], np.r_[j, b]
            before = component_roots(i, j, n)
            levels.append(Level(tier, None, before))
            continue
        if options.sequential:
            a, b, near = strongest(a, b, near)
        for eps in options.eps:
            if options.sequential:
                close = near > 1 - eps if options.rule == "semdedup" else near >= 1 - eps
                root = before.copy()
                root[a[close]] = b[close]
                root = follow(root)
            else:
                close = near >= 1 - eps - TOLERANCE
                root = component_roots(np.r_[i, a[close]], np.r_[j, b[close]], n)
            levels.append(Level(tier, eps, root))
    return numbers, levels


def dedup(df: Any, tiers: Sequence[str] | None = None, *, mark: bool = False, **options: Any) -> Any:
    """Drop the duplicates of a frame, or mark them.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        See `find_duplicates`.
    tiers : sequence of {"exact", "perceptual", "semantic"}, optional
        By default all whose column exists.
    mark : bool
        Keep all rows and add the columns of `Duplicates.mark`.
    **options
        As for `find_duplicates`: ``eps``, ``max_distance``, ``keep``, ``rule``, ``against``, …

    Returns
    -------
    the frame's type
        Lazy if `df` is, but the search itself is done when this returns.

    Raises
    ------
    ValueError
        If several `eps` are given without `mark`, and as `find_duplicates`.

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
        See `Duplicates.groups`; for the largest `eps`.
    """
    return find_duplicates(df, tiers, **options).groups()
