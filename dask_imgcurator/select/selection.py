"""Choose rows: by an expression, by rank in a column, at random, one step after another.

    df = top_fraction(df, "clip_score", 0.3, where="aesthetic_score >= 5")
    df = sample(df, 100, by="cluster", seed=1)
    df = apply_steps(df, ["where aesthetic_score >= 5", "top 30% by clip_score", "sample 10000 seed 0"])
    funnel(df, ["aesthetic_score >= 5 and width >= 512", "top 30% by clip_score"])

The result depends only on the rows, not on partitions, workers, threads or the order of the rows. The rules:

- **Shares are exact and rounded down.** A fraction is the decimal number as written (0.3 is 3/10) and refers to the
  rows that can be ranked: those for which `where` is true and whose value is neither null nor NaN. The top 0.3 of 10
  rows is 3 rows, of 9 rows 2, of 3 rows none. Infinities count as values; -0.0 equals 0.0.
- **Ties** at the last place: ``ties="exact"`` keeps exactly the requested number, breaking ties by a fixed random order
  (a hash of ``shard`` and ``sample_offset``, so no shard is preferred); ``"include"`` keeps all tied rows,
  ``"exclude"`` none of them, unless all fit.
- **Quantiles are values that occur**: of n values the one of rank max(1, ⌈q n⌉) from below, NumPy's ``inverted_cdf``.
  So the rows above `quantile(df, c, 0.7)` are, except for ties, `top_fraction(df, c, 0.3)`.
- **Samples** are the first rows in a random order given by the seed and the same hash. A larger sample with the same
  seed contains the smaller one, and new shards do not reshuffle the old. The same shards under other URLs give a
  different sample.

Rows with the same ``shard`` and ``sample_offset`` are indistinguishable; a selection that would have to keep one and
drop the other raises `SelectionError`.

Functions here read the columns that they rank by once, when called; the result is lazy if the input is. Pass a score
table (`read_scores`: only those columns are read, and neighbouring partitions with few rows left are joined) or
``df.persist()``, not a lazy `embed`, which would decode the images each time (they warn about it).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.pandas import from_arrow
from ..steps.embed import warn_of_decoding
from .bounds import Settling, begin, keys_of
from .evaluate import KINDS
from .ranks import arrow_type, find_ranks, value_order
from .settle import Condition, Settled
from .steps import RandomSample, Step, Ties, Top, expand_steps, share
from .where import Where, parse_where

Steps = str | Step | Iterable[str | Step]


def check_steps(steps: Iterable[Step], kinds: Mapping[str, str]) -> None:
    """Raise an error for a step that does not fit columns of these kinds."""
    begin(frame_of_kinds(kinds), list(steps), True)


def frame_of_kinds(kinds: Mapping[str, str]) -> pd.DataFrame:
    """An empty frame with columns of these kinds, to check arguments against."""
    return from_arrow(pa.schema({name: KINDS[kind][1] for name, kind in kinds.items()}).empty_table())


def settle(
    df: Any, steps: Steps, *, ok_only: bool = True, alone: bool = False, planned: pa.Schema | None = None
) -> Settling:
    """Find the bounds of a selection on a frame, splitting expressions at ``and``; `alone`: also per step."""
    # With `planned`, expressions have been checked against those types of JSON fields.
    settling = begin(df, _conditions(steps), ok_only, planned)
    if any(condition.order is not None for condition in settling.settled.conditions):
        warn_of_decoding(df, settling.settled.columns, "This selection")
    return settling.run(alone)


def _conditions(steps: Steps) -> list[Step]:
    return [part for step in expand_steps(steps) for part in (step.conjuncts() if isinstance(step, Where) else [step])]


def apply_steps(df: Any, steps: str | Step | Iterable[str | Step], *, ok_only: bool = True) -> Any:
    """Apply the steps of a selection, one after another.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        Columns that steps rank by are read now.
    steps : str, Step, or iterable of them
        Each applies to the rows left by the ones before it: ``"aesthetic_score >= 5"``, ``"top 30% by clip_score"``,
        ``"sample 10000 seed 1"``.
    ok_only : bool
        Whether rows whose ``status`` is not ``ok`` are dropped first, if there is a ``status``.

    Returns
    -------
    the frame's type
        The remaining rows, in their order; lazy if `df` is.

    Raises
    ------
    WhereError
        If a step or an expression has a mistake.
    SelectionError
        If a column is missing or has no order, an amount is out of range, or rows cannot be told apart.

    Examples
    --------
    >>> df = apply_steps(df, ["aesthetic_score >= 5", "top 30% by clip_score", "sample 10000"])  # doctest: +SKIP
    """
    return settle(df, steps, ok_only=ok_only).filter()


def top_fraction(
    df: Any,
    column: str,
    fraction: Any,
    *,
    largest: bool = True,
    where: str | Where | None = None,
    ties: Ties = "exact",
) -> Any:
    """Keep a share of the rows, those with the largest values of a column.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With the column and, to break ties, ``shard``, ``key`` and ``sample_offset``, as far as available.
    column : str
        A column of numbers. Rows where it is null or NaN are never kept.
    fraction : float, Fraction or Decimal
        From 0 to 1; the number of rows is rounded down.
    largest : bool
        If False, keep the smallest values.
    where : str or Where, optional
        Only rows for which this is true are ranked and kept.
    ties : {"exact", "include", "exclude"}
        What to do with equal values at the last place, see `dask_imgcurator.select.selection`.

    Returns
    -------
    the frame's type
        The kept rows, in their order; lazy if `df` is.

    Raises
    ------
    WhereError, SelectionError
        As `apply_steps` does.
    """
    return apply_steps(df, Top(column, fraction, None, largest, ties, where), ok_only=False)


def top_count(
    df: Any, column: str, n: int, *, largest: bool = True, where: str | Where | None = None, ties: Ties = "exact"
) -> Any:
    """Keep the n rows with the largest values of a column, or all rows with a value if there are fewer.

    Parameters
    ----------
    df, column
        As for `top_fraction`.
    n : int
        How many rows.
    largest, where, ties
        As for `top_fraction`.

    Returns
    -------
    the frame's type
        The kept rows, in their order; lazy if `df` is.

    Raises
    ------
    WhereError, SelectionError
        As `apply_steps` does.
    """
    return apply_steps(df, Top(column, None, n, largest, ties, where), ok_only=False)


def sample(
    df: Any,
    n: int | None = None,
    fraction: Any = None,
    *,
    seed: int = 0,
    by: str | None = None,
    where: str | Where | None = None,
) -> Any:
    """Keep rows at random, without replacement.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With ``shard``, ``key`` and ``sample_offset``, as far as available; they are read now.
    n : int, optional
        How many rows; all if there are fewer.
    fraction : float, Fraction or Decimal, optional
        Share of the rows, from 0 to 1; their number is rounded down.
    seed : int
        Seed of the random order.
    by : str, optional
        A column of groups (such as k-means cells), to keep n rows of each. Up to n + 1 rows per group are in memory at
        once, 16 bytes each plus the group's name. Rows without a group are dropped.
    where : str or Where, optional
        Only rows for which this is true.

    Returns
    -------
    the frame's type
        The kept rows, in their order; lazy if `df` is.

    Raises
    ------
    WhereError, SelectionError
        As `apply_steps` does.
    """
    step = RandomSample(n, fraction, seed, by)
    before = [] if where is None else [parse_where(where) if isinstance(where, str) else where]
    return apply_steps(df, [*before, step], ok_only=False)


def quantile(df: Any, column: str, q: float | Sequence[float], *, where: str | Where | None = None) -> Any:
    """Find the values below which given shares of a column lie.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With the column.
    column : str
        A column of numbers; null and NaN are left out.
    q : float, or sequence of float
        From 0 to 1. Several are found in the same passes.
    where : str or Where, optional
        Only rows for which this is true.

    Returns
    -------
    float or int, or a list of them
        Values that occur: of n, the one of rank max(1, ⌈q n⌉) from below (NumPy's ``inverted_cdf``). int for a column
        of integers; None without values.

    Raises
    ------
    WhereError
        If the expression has a mistake.
    SelectionError
        If the column is missing or not numeric, or a q is out of range.

    References
    ----------
    .. [1] Hyndman and Fan, "Sample Quantiles in Statistical Packages", 1996: definition 1.
    """
    several = isinstance(q, Sequence | np.ndarray) and not isinstance(q, str)
    shares = [share(item, "q") for item in (q if several else [q])]  # type: ignore[union-attr]
    before = [] if where is None else [parse_where(where) if isinstance(where, str) else where]
    order = value_order(df, column)
    settling = begin(df, before, ok_only=False)
    at = len(settling.settled.conditions)
    settling.add(Condition(Top(column, 1), order))
    warn_of_decoding(df, settling.settled.columns, "This quantile")

    def rank(share: Fraction, n: int) -> int:
        return max(1, math.ceil(share * n))

    keys = partial(keys_of, before=Settled(settling.settled.conditions[:at], ok_only=False), i=at)
    digests = settling.digest()
    n, found = find_ranks(digests, keys, order.bits, lambda n: sorted({rank(s, n) for s in shares}) if n else [])
    values = [order.value(found[rank(share, n)].key) if n else None for share in shares]
    as_int = pa.types.is_integer(arrow_type(df, column))
    values = [int(v) if as_int and v is not None else v for v in values]
    return values if several else values[0]


def funnel(df: Any, steps: str | Step | Iterable[str | Step], *, ok_only: bool = True) -> pd.DataFrame:
    """Count how many rows each step of a selection keeps and removes, alone and in turn.

    Parameters
    ----------
    df, steps, ok_only
        As for `apply_steps`. An expression is split at its top-level ``and``.

    Returns
    -------
    pandas.DataFrame
        A row for all rows, then one per condition: ``condition`` (its text), ``alone`` (rows that it keeps by itself),
        ``left`` (rows after it and all before it), ``removed_alone`` and ``removed`` (rows that it removes alone and in
        turn). If `ok_only`, alone refers to the rows that are ``ok``.

    Raises
    ------
    WhereError, SelectionError
        As `settle_steps` does.

    Notes
    -----
    Conditions are counted in one pass over their columns; steps that rank read theirs once before that.
    """
    settling = settle(df, steps, ok_only=ok_only, alone=True)
    settled = settling.settled
    if settling.digests is None:  # otherwise it has warned already
        warn_of_decoding(df, [name for name in settled.columns if name in df.columns], "This funnel")
    counts = settling.count()
    ok = [("status == 'ok'", counts.readable, counts.readable)] if settled.ok_only else []
    own = [(step.condition, step.alone, step.left) for step in counts.funnel]
    table = pd.DataFrame([("all rows", counts.rows, counts.rows), *ok, *own], columns=["condition", "alone", "left"])
    before = [counts.rows, *table["left"][:-1]]
    of = [counts.rows] * (1 + len(ok)) + [counts.readable] * len(own)
    return table.assign(removed_alone=of - table["alone"], removed=before - table["left"])
