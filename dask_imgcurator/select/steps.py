"""A selection's steps as data, and their text: ``top 30% by clip_score``, ``sample 10000 seed 1``."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..results import count
from ..schema import kind_of, plain_type
from ..storage import files
from .ranks import SelectionError, no_column
from .syntax import WhereError, fold
from .where import Where, parse_where

Ties = Literal["exact", "include", "exclude"]

_TIES = ("exact", "include", "exclude")
_NAME = r"[^\W\d]\w*+"


def share(fraction: Any, name: str = "fraction") -> Fraction:
    """Parse and validate a fraction, as the decimal number written."""
    try:
        share = Fraction(str(fraction))
    except (ValueError, ZeroDivisionError):
        raise SelectionError(f"{name}={fraction!r}: give a number from 0 to 1") from None
    if not 0 <= share <= 1:
        hint = f"; {float(share):g}% is {float(share / 100):g}" if 1 < share <= 100 else ""
        raise SelectionError(f"{name}={fraction!r}: it must be from 0 to 1{hint}")
    return share


def _quoted(column: str) -> str:
    return column if re.fullmatch(_NAME, column) else f"`{column}`"


@dataclass(frozen=True)
class Amount:
    """A number or a share of rows."""

    n: int | None = None
    fraction: Any = None

    def __post_init__(self) -> None:
        if (self.n is None) == (self.fraction is None):
            raise SelectionError(f"n={self.n!r}, fraction={self.fraction!r}: give one of them")
        if self.n is None:
            share(self.fraction)
        elif isinstance(self.n, bool) or not isinstance(self.n, int | np.integer) or self.n < 0:
            raise SelectionError(f"n={self.n!r}: give a whole number of rows, 0 or more")

    def of(self, rows: int) -> int:
        """The number of rows to keep, out of `rows`."""
        return min(int(self.n), rows) if self.n is not None else math.floor(share(self.fraction) * rows)

    def __str__(self) -> str:
        return str(self.n) if self.n is not None else f"{float(share(self.fraction) * 100):.12g}%"


@dataclass(frozen=True)
class Top:
    """The rows with the largest (or smallest) values of a column; with `among`, of the rows for which it is true."""

    column: str
    fraction: Any = None
    n: int | None = None
    largest: bool = True
    ties: Ties = "exact"
    among: Where | str | None = None

    def __post_init__(self) -> None:
        _ = self.amount  # checks it
        if self.ties not in _TIES:
            raise SelectionError(f"ties={self.ties!r}: use {', '.join(_TIES)}")
        if isinstance(self.among, str):
            object.__setattr__(self, "among", parse_where(self.among))

    @property
    def amount(self) -> Amount:
        """How many of the rows with a value to keep."""
        return Amount(self.n, self.fraction)

    @property
    def text(self) -> str:
        """The step as `parse_step` reads it."""
        ties = "" if self.ties == "exact" else f" ties {self.ties}"
        among = f" among {self.among.text}" if isinstance(self.among, Where) else ""
        return f"{'top' if self.largest else 'bottom'} {self.amount} by {_quoted(self.column)}{ties}{among}"


@dataclass(frozen=True)
class RandomSample:
    """Rows at random, without replacement; with `by`, n of each group."""

    n: int | None = None
    fraction: Any = None
    seed: int = 0
    by: str | None = None

    def __post_init__(self) -> None:
        _ = self.amount  # checks it
        if isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer):
            raise SelectionError(f"seed={self.seed!r}: give a whole number")
        if self.by is not None and self.n is None:
            raise SelectionError(f"by={self.by!r} takes n, the rows of each group, not a fraction")

    @property
    def amount(self) -> Amount:
        """How many rows to keep."""
        return Amount(self.n, self.fraction)

    @property
    def text(self) -> str:
        """The step as `parse_step` reads it."""
        by = f" by {_quoted(self.by)}" if self.by is not None else ""
        return f"sample {self.amount} seed {self.seed}{by}"


@dataclass(frozen=True)
class Listed:
    """A condition: a column's value is, or is not, listed in a file. Create it with `only` or `exclude`."""

    column: str
    values: pa.Array = field(repr=False, compare=False)
    keep: bool
    text: str  # with a hash of the values: equal texts mean equal conditions

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it uses."""
        return (self.column,)

    def check(self, names: Any) -> None:
        """Raise `SelectionError` if there is no such column."""
        if self.column not in names:
            raise no_column(self.column, names, f"`{self.text}`: ")

    def evaluate(self, table: pa.Table) -> pa.ChunkedArray:
        """Whether each row of an Arrow table is kept; a row without a value is in no list."""
        column = table[self.column]
        column = column.cast(plain_type(column.type))
        if kind_of(column.type) not in ("string", "number", "unknown"):
            raise SelectionError(f"`{self.text}`: column {self.column!r} holds {column.type}, which no list can name")
        try:
            among = pc.is_in(column, value_set=self.values.cast(column.type), skip_nulls=True)
        except pa.ArrowInvalid as err:
            raise SelectionError(f"`{self.text}`: column {self.column!r} holds {column.type}: {err}") from err
        return among if self.keep else pc.invert(among)


#: One step of a selection. Functions also accept a string, for `parse_step`.
Step = Where | Listed | Top | RandomSample


# --- text to steps --------------------------------------------------------------------------------

# `top` before an operator is a column of that name.
_STEP = re.compile(r"(top|bottom|sample)\b(?!\s*(?:[=<>!+*/%)-]|(?:and|or|in|is|not)\b))", re.IGNORECASE)

# What follows the first word, piece by piece, each with the message if it is missing. Later pieces can depend on an
# optional one: `(?(ties)…)`.
_AMOUNT = (
    r" *(?P<number>[0-9][0-9_]*(?:\.[0-9]+)?)(?P<percent>\s*%)?(?=\s|:|$)",
    "expected a number of rows or a percentage, as in `{example}`",
)
_COLUMN = rf" *(?:(?P<name>{_NAME})|`(?P<quoted>[^`]+)`)"
_NO_COLUMN = "expected a column, as in `{example}` (a name with other characters in backticks)"
_NO_SEED = "after `seed` comes a whole number, as in `{example}`"
_TOP = (
    _AMOUNT,
    (r" *(?::|by\b)", "expected `by` and a column, as in `{example}`"),
    (_COLUMN, _NO_COLUMN),
    (r"(?P<ties> *ties\b)?+", ""),
    (rf"(?(ties) *(?P<rule>{'|'.join(_TIES)})(?!\w))", f"after `ties` comes one of {', '.join(_TIES)}"),
    (r"(?: *among\b(?P<among>.*))?+", ""),
    (r" *$", "this cannot stand here; expected `ties`, `among` or nothing more"),
)
_SAMPLE = (
    _AMOUNT,
    (r"(?P<seed> *seed\b)?+", ""),
    (r"(?(seed) *(?P<number1>-?[0-9]+)(?!\w))", _NO_SEED),
    (r"(?P<by> *(?:by\b|per\b|:))?+", ""),
    (r"(?(by)(?(percent)(?!)))", "of each group a number of rows is taken, not a percentage, as in `{example}`"),
    (rf"(?(by){_COLUMN})", _NO_COLUMN),
    (r"(?P<later> *seed\b)?+", ""),
    (r"(?(later) *(?P<number2>-?[0-9]+)(?!\w))", _NO_SEED),
    (r" *$", "this cannot stand here; expected `seed`, `by` or nothing more"),
)


def parse_step(text: str) -> Step:
    """Parse a step of a selection: an expression (after ``where`` or alone), or text for `parse_top`, `parse_sample`.

    Examples
    --------
    >>> parse_step("top 30% by clip_score among aesthetic_score >= 5").text
    'top 30% by clip_score among aesthetic_score >= 5'
    """
    if not isinstance(text, str):
        raise TypeError(f"a step must be text, a Where, a Top or a RandomSample, not {type(text).__name__}: {text!r}")
    folded = fold(text)
    match = _STEP.match(folded)
    if match is None:
        return parse_where(re.sub(r"^where(\s+|$)", "", folded, flags=re.IGNORECASE))
    word = match[1].lower()
    return parse_sample(folded, match.end()) if word == "sample" else parse_top(folded, word == "top", match.end())


def parse_top(text: str, largest: bool = True, at: int = 0) -> Top:
    """Parse what follows ``top`` (or ``bottom``): ``30% by clip_score ties include among width >= 512``."""
    found = _read(fold(text), at, _TOP, f"{'top' if largest else 'bottom'} 30% by clip_score")
    among = parse_where(found["among"]) if found["among"] is not None else None
    ties: Any = (found["rule"] or "exact").lower()
    return Top(found["name"] or found["quoted"], largest=largest, ties=ties, among=among, **_amount(found))


def parse_sample(text: str, at: int = 0) -> RandomSample:
    """Parse what follows ``sample``: ``10000``, ``1%``, ``10000 seed 1``, ``100 by cluster``."""
    found = _read(fold(text), at, _SAMPLE, "sample 100 by cluster seed 1")
    seed = int(found["number2"] or found["number1"] or 0)
    return RandomSample(seed=seed, by=found["name"] or found["quoted"], **_amount(found))


def _read(text: str, at: int, pieces: Sequence[tuple[str, str]], example: str) -> re.Match[str]:
    pattern, place = "", at
    for piece, message in pieces:
        pattern += piece
        match = re.compile(pattern, re.IGNORECASE).match(text, at)
        if match is None:
            start = len(text) - len(text[place:].lstrip())
            end = start + max(1, len(text[start:].partition(" ")[0]))
            raise WhereError(message.format(example=example), text, start, end)
        place = match.end()
    return match  # type: ignore[return-value]


def _amount(found: re.Match[str]) -> dict[str, Any]:
    number = Fraction(found["number"].replace("_", ""))
    if found["percent"] and number <= 100:
        return {"fraction": number / 100}
    if not found["percent"] and "." not in found["number"]:
        return {"n": int(number)}
    hint = f"; {float(number * 100):g}% is that share" if number <= 1 else ""
    message = f"{found['number']} is not a number of rows{hint}"
    if found["percent"]:
        message = f"{found['number']}% is more than all rows; write 0% to 100%"
    raise WhereError(message, found.string, found.start("number"), max(found.end("number"), found.end("percent")))


def expand_steps(steps: str | Step | Iterable[str | Step]) -> Iterator[Step]:
    """Yield all steps, with texts parsed and `among` as a separate step."""
    for item in [steps] if isinstance(steps, str | Step) else steps:
        step = item if isinstance(item, Step) else parse_step(item)
        if isinstance(step, Top) and isinstance(step.among, Where):
            yield step.among
            step = replace(step, among=None)
        yield step


# --- lists of rows ---------------------------------------------------------------------------------


def only(
    path: str | os.PathLike[str], column: str = "key", *, storage_options: Mapping[str, Any] | None = None
) -> Listed:
    """Keep only the rows listed in a file: a step for `apply_steps` and `funnel`.

    Parameters
    ----------
    path : str or path
        A Parquet file with a column of that name (or with a single column), a ``.npy`` file (text, numbers, or
        DataComp's pairs of uint64, read as hexadecimal uids), or text with one value per line.
    column : str
        The column with the values: ``key``, or one of your own such as ``uid``.
    storage_options : mapping, optional
        For the fsspec file system.

    Returns
    -------
    Listed
        The step.

    Raises
    ------
    SelectionError
        If the file holds no such values.
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> df = apply_steps(df, [only("good.npy", "uid"), "top 30% by clip_score"])  # doctest: +SKIP
    """
    return _listed(path, column, True, storage_options)


def exclude(
    path: str | os.PathLike[str], column: str = "key", *, storage_options: Mapping[str, Any] | None = None
) -> Listed:
    """Drop the rows listed in a file: a step for `apply_steps` and `funnel`.

    Parameters
    ----------
    path, column, storage_options
        As for `only`.

    Returns
    -------
    Listed
        The step. Rows without a value are kept.

    Raises
    ------
    SelectionError, FileNotFoundError
        As `only`.
    """
    return _listed(path, column, False, storage_options)


def parse_listed(text: str, keep: bool, storage_options: Mapping[str, Any] | None = None) -> Listed:
    """Parse ``FILE`` or ``COLUMN=FILE``, the form of the command line."""
    column, sign, path = text.partition("=")
    column, path = (column, path) if sign and column.isidentifier() else ("key", text)
    return _listed(path, column, keep, storage_options)


def _listed(path: str | os.PathLike[str], column: str, keep: bool, options: Mapping[str, Any] | None) -> Listed:
    url = os.fspath(path)
    values = _read_list(url, column, options).drop_null().unique()
    if not len(values):
        raise SelectionError(f"{url} names no value of {column!r}: it is empty")
    digest = hashlib.sha256()
    for value in values.cast(pa.string()).sort().to_pylist():
        digest.update(value.encode() + b"\0")
    about = f"{count(len(values), 'value')} of {url.rpartition('/')[2]}, {digest.hexdigest()[:8]}"
    return Listed(column, values, keep, f"{column} {'in' if keep else 'not in'} ({about})")


def _read_list(url: str, column: str, options: Mapping[str, Any] | None) -> pa.ChunkedArray | pa.Array:
    if url.endswith(".parquet"):
        with files.opened_parquet(url, options) as parquet:
            names = parquet.schema_arrow.names
            name = column if column in names else names[0] if len(names) == 1 else None
            if name is None:
                raise SelectionError(f"{url} has no column {column!r} (available: {', '.join(names)})")
            found = parquet.read([name])[name]
            return found.cast(plain_type(found.type)).combine_chunks()
    with files.opened(url, options) as file:
        if url.endswith(".npy"):
            return _from_numpy(np.load(file, allow_pickle=False), url)
        try:
            lines = file.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as err:
            raise SelectionError(f"{url} is not text ({err}): give a .txt, .parquet or .npy file") from err
    return pa.array([line for line in lines if line], pa.string())


def _from_numpy(values: np.ndarray, url: str) -> pa.Array:
    if values.dtype.names and len(values.dtype.names) == 2 and values.ndim == 1:
        high, low = (values[name].tolist() for name in values.dtype.names)
        return pa.array([f"{a:016x}{b:016x}" for a, b in zip(high, low, strict=True)], pa.string())
    if values.ndim != 1 or values.dtype.kind not in "iuU":
        raise SelectionError(f"{url} holds {values.dtype} of shape {values.shape}: give text, integers or uids")
    return pa.array(values)
