"""The closed expression language of ``--where``: ``aesthetic_score >= 5 and width >= 512``.

An expression is data, not code: it can only read columns and call two text functions, and its size is bounded, so an
untrusted one can at worst be rejected. docs/reference/where.md describes the language.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..engine.backend import backend_of, is_dask
from ..engine.frames import meta_of, to_arrow
from .evaluate import KINDS, Evaluator, kind_of_value
from .syntax import MAX_CHARACTERS, WhereError, fold, parse, span


@dataclass(frozen=True)
class Where:
    """A parsed expression, on one line, and its columns in order of appearance. Create it with `parse_where`."""

    text: str
    columns: tuple[str, ...]

    def evaluate(self, table: pa.Table) -> pa.Array | pa.ChunkedArray:
        """Whether the expression is true, false or unknown (null), for each row of an Arrow table."""
        return Evaluator(self.text, table).truth(parse(self.text)[0])

    def check(self, kinds: Mapping[str, str]) -> None:
        """Raise `WhereError` if the expression does not fit columns of these kinds (see `kinds_of`)."""
        fields = {name: KINDS[kind][1] for name, kind in kinds.items() if isinstance(name, str)}
        self.evaluate(pa.schema(fields).empty_table())

    def mask(self, frame: Any) -> Any:
        """The rows for which the expression is true: a boolean Series of the frame's library and index, without nulls.

        Lazy for a Dask frame, whose columns are checked now as far as their types are known.
        """
        if not set(self.columns) <= set(frame.columns):
            self.check(dict.fromkeys(frame.columns, "unknown"))
        if is_dask(frame):
            part = frame[list(self.columns)]
            return part.map_partitions(self.mask, meta=self.mask(meta_of(part)))
        truth = self.evaluate(to_arrow(frame, self.columns))
        truth = pc.and_kleene(truth, pc.is_valid(truth))
        schema = pa.schema([pa.field("_", pa.bool_(), nullable=False)])
        mask = backend_of(frame).from_arrow(pa.Table.from_arrays([truth], schema=schema))["_"]
        mask.index, mask.name = frame.index, None
        return mask

    def conjuncts(self) -> list[Where]:
        """Split the expression at its top-level `and`, to count each condition."""
        texts = [self.text[slice(*span(node))] for node in _split(parse(self.text)[0])]
        return [Where(text, parse(text)[1]) for text in texts]


def _split(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        for part in node.values:
            yield from _split(part)
    else:
        yield node


def parse_where(text: str, kinds: Mapping[str, str] | None = None) -> Where:
    """Parse an expression; with `kinds` (see `kinds_of`), names and types are checked now, not only on a frame.

    Raises `WhereError` for a mistake, with its position and the remedy.

    Examples
    --------
    >>> where = parse_where("aesthetic_score >= 5 and width >= 512")
    >>> where.columns
    ('aesthetic_score', 'width')
    """
    if not isinstance(text, str):
        raise TypeError(f"an expression must be text, not {type(text).__name__}: {text!r}")
    if len(text) > MAX_CHARACTERS:
        message = f"the expression has {len(text)} characters; at most {MAX_CHARACTERS} are read"
        raise WhereError(f"{message}. A long list of values is better joined (pandas merge) than written out")
    folded = fold(text)
    where = Where(folded, parse(folded)[1])
    where.check(dict.fromkeys(where.columns, "unknown") if kinds is None else kinds)
    return where


def combine(where: str | None = None, min_aesthetic: float | None = None, max_nsfw: float | None = None) -> str | None:
    """Join an expression, ``aesthetic_score >= X`` and ``nsfw_score < X`` by `and`; None if all are missing."""
    parts = []
    for condition, value in (("aesthetic_score >=", min_aesthetic), ("nsfw_score <", max_nsfw)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"the threshold for {condition.split()[0]} must be a finite number, not {value!r}")
        if value is not None:
            parts.append(f"{condition} {repr(float(value)).removesuffix('.0')}")
    return conjunction([*([where] if where is not None else []), *parts])


def conjunction(texts: Sequence[str]) -> str | None:
    """Join expressions by `and`; None if there is none."""
    parts = []
    for text in texts:
        whole = parse_where(text).text
        node = parse(whole)[0]
        is_or = isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or)
        parts.append(f"({whole})" if is_or and len(texts) > 1 else whole)
    return " and ".join(parts) or None


def filter_frame(frame: Any, where: str | Where) -> Any:
    """Keep the rows for which an expression is true.

    Parameters
    ----------
    frame : pandas, cuDF or Dask DataFrame
        With the columns that the expression uses.
    where : str or Where
        The expression.

    Returns
    -------
    DataFrame
        Same type, columns and index.

    Raises
    ------
    WhereError
        If the expression has a mistake or does not fit the columns.
    """
    parsed = parse_where(where) if isinstance(where, str) else where
    return frame[parsed.mask(frame)]


def kinds_of(frame: Any) -> dict[str, str]:
    """Kind of each column of a frame in an expression; for a Dask frame, from the dtypes only."""
    # ``"unknown"`` for a column without values (Arrow's null type, or an all-missing object column).
    names = [name for name in frame.columns if isinstance(name, str)]
    kinds = {name: kind_of_value(c) for name, c in zip(names, to_arrow(meta_of(frame), names).columns, strict=True)}
    for name, kind in kinds.items():
        if kind == "unknown" and not is_dask(frame):  # the type of objects depends on their values
            kinds[name] = kind_of_value(to_arrow(frame, [name])[name])
    return kinds
