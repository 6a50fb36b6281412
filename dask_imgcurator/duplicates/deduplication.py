"""Find duplicate images in tiers: same bytes, nearly the same hash, nearly the same embedding.

    found = find_duplicates(df, eps=[0.02, 0.05, 0.1], keep="aesthetic_score")
    found.counts()             # how many go, by tier and eps
    found.groups(eps=0.05)     # the groups, side by side
    df = found.drop(df, eps=0.05)

or, where the values are known, ``df = dedup(df, eps=0.05, keep="aesthetic_score")``.

**Tiers.** Each works on what the one before left. *exact*: the same ``sha256``. *perceptual*: ``phash`` within
``max_distance`` bits; identical hashes are one, then no pair is missed (`neighbours.hamming_masks`). Hashes with fewer
than 8 bits set, or not set, are not compared: plain areas of any colour have the same. *semantic*: cosine
of at least 1 - eps. Up to 20,000 rows every pair is compared. Above, rows are compared within k-means cells, and each
row also with those of the ``probe - 1`` next cells in which a neighbour may lie; what may be missed are pairs on the
border of cells, and the fewer the smaller eps is. ``n_cells=1`` compares all pairs, however many.

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
neither partitions, workers nor the order of rows (to the rounding of float32 where a cosine lies on the threshold).

**Memory.** Embeddings are never in one place. A task holds one input partition, or about 25,000 rows of a comparison
(twice that where a cell is split), in a few copies: 25,000 x 512 float32 are 51 MB. Dask's shuffle adds its buffers:
of 100,000 x 512, a worker took 1 GB at its peak over what it took when idle. One task holds the sample for
k-means: 64 rows a cell, at most 500,000. Pairs come to the client, thinned to fewer than one a row and cell that have
duplicates, with their rows' names: some hundred bytes for each row in a group.

**Passes.** The frame is read up to four times (light columns, sample, comparison, similarities). Give it a score table
(`read_scores`) or ``df.persist()``, not a lazy `embed` that would decode the images each time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..engine.backend import backend_of, get_backend, is_dask
from ..schema import kind_of
from . import neighbours
from .components import component_roots, follow, order_rows, strongest
from .graphs import LightPass, Source, cells_of, light_pairs, semantic_pairs
from .index import Index, open_index, source_of
from .result import Duplicates, Level
from .rows import Comparison, DedupError, Found

__all__ = ["RULES", "TIERS", "DedupError", "Duplicates", "dedup", "duplicate_groups", "find_duplicates"]

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
    """What `find_duplicates` was asked for, checked."""

    tiers: tuple[str, ...]
    eps: tuple[float, ...]
    max_distance: int
    keep: str | None
    lowest: bool
    central: str | None
    rule: Rule
    n_cells: int | None
    probe: int
    seed: int
    columns: Mapping[str, str]

    def column(self, tier: str) -> str:
        """Name of the column that a tier compares."""
        return self.columns[_NEEDS[tier][0]]


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
    probe: int = 2,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    embedding: str = "embedding",
    sha256: str = "sha256",
    phash: str = "phash",
    storage_options: Mapping[str, Any] | None = None,
) -> Duplicates:
    """Find the duplicates in a frame, and those of a reference.

    This computes: it reads the frame several times, see the notes of this module, which also say how the
    tiers and rules work.

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
        k-means cells; by default √n above 20,000 rows, else 1. 1 compares all pairs. An index of a like size brings its
        own.
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
    columns = {"sha256": sha256, "phash": phash, "embedding": embedding}
    options = _settle(df, tiers, eps, max_distance, keep, lowest, rule, n_cells, probe, seed, columns)
    use = {_NEEDS[tier][0]: options.column(tier) for tier in options.tiers}
    if "semantic" not in options.tiers and embedding in df.columns:
        use["embedding"] = embedding  # for the similarity in the table of groups
    sources = [source_of(df, use, keep=options.keep, lowest=lowest)]
    index = None
    if against is not None:
        reference, index = _reference(against, use, options, storage_options)
        sources.append(reference)
    light = light_pairs(sources, options.tiers, max_distance)
    width = _width(light, embedding, index, provenance)
    return _decide(sources, light, options, width, index)


def _settle(
    df: Any,
    tiers: Sequence[str] | None,
    eps: float | Sequence[float],
    max_distance: int,
    keep: str | None,
    lowest: bool,
    rule: Rule,
    n_cells: int | None,
    probe: int,
    seed: int,
    columns: Mapping[str, str],
) -> Options:
    """Check what was asked for."""
    backend_of(df)  # raises for what is no frame
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: use {', '.join(RULES)}")
    values = (eps,) if isinstance(eps, int | float) else tuple(eps)
    wrong = [e for e in values if not 0 <= e <= 2]
    if wrong or not values:
        raise ValueError(f"eps={wrong[0] if wrong else eps}: 1 - cosine lies between 0 and 2")
    for name, value, low, high in (("max_distance", max_distance, 0, 16), ("probe", probe, 1, 64)):
        if not low <= value <= high:
            raise ValueError(f"{name}={value}: it must be {low} to {high}")
    if n_cells is not None and n_cells < 1:
        raise ValueError(f"n_cells={n_cells}: it must be at least 1")
    chosen = _tiers(df, tiers, columns)
    central = None
    if keep is None:
        keep = "first" if rule == "components" else "hard"
    if keep in ("hard", "easy"):
        if rule == "components":
            raise ValueError(f"keep={keep!r} is an order of the rules semdedup and nemo: name a column, or 'first'")
        central, keep = keep, None
    elif keep == "first":
        keep = None
    else:
        _check_keep(df, keep)
    return Options(
        chosen,
        tuple(sorted({float(e) for e in values})),
        max_distance,
        keep,
        lowest,
        central,
        rule,
        n_cells,
        probe,
        seed,
        columns,
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
    from dask.dataframe.utils import make_meta

    if keep not in df.columns:
        raise ValueError(
            f"keep={keep!r}: there is no such column (there are: {', '.join(map(str, df.columns))}, or 'first')"
        )
    backend = backend_of(df)
    start = make_meta(df) if is_dask(df) else df.iloc[:1]
    kind = backend.to_host(start, [keep]).schema.field(keep).type
    if kind_of(kind) in ("string", "list"):
        raise TypeError(f"keep={keep!r} is a column of {kind}: name one of numbers, truth values or times")


def _reference(
    against: Any, use: Mapping[str, str], options: Options, storage_options: Mapping[str, Any] | None
) -> tuple[Source, Index | None]:
    index = None
    if isinstance(against, str | os.PathLike):
        against = open_index(against, storage_options)
    if isinstance(against, Index):
        index, use = against, {column: column for column in use if column in against.about["columns"]}
        against = index.frame()
    backend_of(against)
    for tier in options.tiers:
        column = _NEEDS[tier][0]
        if column not in use or use[column] not in against.columns:
            raise ValueError(
                f"the tier {tier} needs the column {use.get(column, column)} in the reference too (against=): "
                f"{_NEEDS[tier][1]} adds it, or leave the tier out"
            )
    columns = {column: name for column, name in use.items() if name in against.columns}
    return source_of(against, columns, ref=True), index


def _width(light: LightPass, embedding: str, index: Index | None, provenance: Mapping[str, Any] | None) -> int:
    """Width of the vectors; 0 where there are none."""
    widths = [sorted({width for (ref, width) in light.counts if width and ref == which}) for which in (False, True)]
    if index is not None:
        index.check(widths[0][0] if widths[0] else 0, provenance)
    for found in widths:
        if len(found) > 1:
            raise DedupError(f"column {embedding!r} holds vectors of different lengths: {found}")
    ours, theirs = widths
    if ours and theirs and ours != theirs:
        raise DedupError(
            f"the embeddings have {ours[0]} numbers, those of the reference (against=) {theirs[0]}: "
            "embed both with the same model"
        )
    return next(iter(ours + theirs), 0)


def _decide(sources: list[Source], light: LightPass, options: Options, width: int, index: Index | None) -> Duplicates:
    """Go through the tiers, each on what the one before left."""
    found = dict(light.pairs)
    rows = sum(n for (ref, _), n in light.counts.items() if not ref)
    if "semantic" in options.tiers:
        records, edges = _numbered(found)
        levels = _levels(records, edges, options)
        gone = np.empty(0, np.uint64)
        if levels:
            here = np.arange(len(records))
            gone = np.sort(records["id"].to_numpy()[(levels[-1].root != here) & ~records["ref"].to_numpy()])
        n = max(1, sum(n for (_, w), n in light.counts.items() if w) - len(gone))
        found["semantic"] = _semantic(sources, n, width, options, gone, index)
    records, edges = _numbered(found)
    return Duplicates(sources, records, _levels(records, edges, options), rows, width)


def _semantic(
    sources: list[Source], n: int, width: int, options: Options, gone: np.ndarray, index: Index | None
) -> Found:
    largest = max(options.eps)
    sequential = options.rule != "components"
    centroids = None
    if index is not None and options.n_cells is None and 4 * len(index.centroids) >= neighbours.default_cells(n):
        # Of an index with far fewer rows than there are now, the cells would be too large.
        centroids = index.centroids
        sources = [replace(s, spec=replace(s.spec, cell=s.spec.ref)) for s in sources]
    cells = cells_of(
        sources,
        n,
        width,
        n_cells=options.n_cells,
        probe=1 if sequential else options.probe,
        radius=float(np.sqrt(2 * largest)),
        seed=options.seed,
        without=gone,
        centroids=centroids,
        central=options.central is not None,
    )
    device = get_backend(sources[0].spec.backend).device
    how = Comparison(width, device, 1 - largest - neighbours.TOLERANCE, sequential, options.central)
    return semantic_pairs(sources, cells, how, gone)


def _numbered(found: Mapping[str, Found]) -> tuple[pd.DataFrame, dict[str, tuple[Any, Any, Any]]]:
    """Records of all rows in pairs, best first, and the pairs by their numbers."""
    if not found:
        return pd.DataFrame({"id": np.empty(0, np.uint64), "ref": np.empty(0, bool)}), {}
    records = pd.concat([records for _, records in found.values()], ignore_index=True).drop_duplicates("id")
    records = records.iloc[order_rows(records)].reset_index(drop=True)
    ids = records["id"].to_numpy()
    by_id = np.argsort(ids)

    def number(of: pd.Series) -> np.ndarray:
        return by_id[np.searchsorted(ids, of.to_numpy(np.uint64), sorter=by_id)]

    edges = {
        tier: (number(pairs["a"]), number(pairs["b"]), pairs["near"].to_numpy()) for tier, (pairs, _) in found.items()
    }
    return records, edges


def _levels(records: pd.DataFrame, edges: Mapping[str, tuple[Any, Any, Any]], options: Options) -> list[Level]:
    """Decide who stays after each tier, and in the semantic one for each eps."""
    n = len(records)
    levels: list[Level] = []
    i, j = np.empty(0, np.int64), np.empty(0, np.int64)
    for tier in ("exact", "perceptual"):
        if tier in edges:
            i, j = np.r_[i, edges[tier][0]], np.r_[j, edges[tier][1]]
            levels.append(Level(tier, None, component_roots(i, j, n)))
    if "semantic" not in edges:
        return levels
    a, b, cosine = edges["semantic"]
    before = levels[-1].root if levels else np.arange(n)
    if options.rule != "components":
        a, b, cosine = strongest(a, b, cosine)
    for eps in options.eps:
        if options.rule == "components":
            near = cosine >= 1 - eps - neighbours.TOLERANCE
            root = component_roots(np.r_[i, a[near]], np.r_[j, b[near]], n)
        else:
            near = cosine > 1 - eps if options.rule == "semdedup" else cosine >= 1 - eps
            parent = before.copy()
            parent[a[near]] = b[near]
            root = follow(parent)
        levels.append(Level("semantic", eps, root))
    return levels


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
