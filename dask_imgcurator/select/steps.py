"""The steps of a selection as data, and their text: ``top 30% by clip_score``, ``sample 10000 seed 1``.

What they mean is in `selection`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from .ranks import SelectionError
from .syntax import fold
from .where import Where, WhereError, parse_where

__all__ = [
    "Amount",
    "Sample",
    "Step",
    "Ties",
    "Top",
    "expand_steps",
    "parse_sample",
    "parse_step",
    "parse_top",
    "share",
]

Ties = Literal["exact", "include", "exclude"]

_TIES = ("exact", "include", "exclude")
_NAME = r"[^\W\d]\w*"


def share(fraction: Any, name: str = "fraction") -> Fraction:
    """Read a fraction as the decimal number that is written, and check it."""
    try:
        share = Fraction(str(fraction))
    except (ValueError, ZeroDivisionError):
        raise SelectionError(f"{name}={fraction!r}: give a number from 0 to 1") from None
    if not 0 <= share <= 1:
        hint = f"; {float(share):g}% is {float(share / 100):g}" if 1 < share <= 100 else ""
        raise SelectionError(f"{name}={fraction!r}: it must be from 0 to 1{hint}")
    return share


def _check_amount(n: Any, fraction: Any) -> None:
    if (n is None) == (fraction is None):
        raise SelectionError(f"n={n!r}, fraction={fraction!r}: give one of them")
    if fraction is not None:
        share(fraction)
    elif isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0:
        raise SelectionError(f"n={n!r}: give a whole number of rows, 0 or more")


def _quoted(column: str) -> str:
    return column if re.fullmatch(_NAME, column) else f"`{column}`"


@dataclass(frozen=True)
class Amount:
    """So many rows, or such a share of them."""

    n: int | None = None
    fraction: Any = None

    def __post_init__(self) -> None:
        _check_amount(self.n, self.fraction)

    def of(self, rows: int) -> int:
        """How many of so many rows that is."""
        return min(int(self.n), rows) if self.n is not None else math.floor(share(self.fraction) * rows)

    def __str__(self) -> str:
        return str(self.n) if self.n is not None else f"{float(share(self.fraction) * 100):.12g}%"


@dataclass(frozen=True)
class Top:
    """A step: the rows with the largest, or the smallest, values of a column.

    Attributes
    ----------
    column : str
        A column of numbers.
    fraction : float or Fraction, optional
        Share of the rows that have a value.
    n : int, optional
        How many rows, at most.
    largest : bool
        Whether the largest values are kept.
    ties : {"exact", "include", "exclude"}
        What happens to equal values at the last place, see `dask_imgcurator.select.selection`.
    among : Where or str, optional
        Only rows for which this is true are ranked and kept.
    """

    column: str
    fraction: Any = None
    n: int | None = None
    largest: bool = True
    ties: Ties = "exact"
    among: Where | str | None = None

    def __post_init__(self) -> None:
        _check_amount(self.n, self.fraction)
        if self.ties not in _TIES:
            raise SelectionError(f"ties={self.ties!r}: use {', '.join(_TIES)}")
        if isinstance(self.among, str):
            object.__setattr__(self, "among", parse_where(self.among))

    @property
    def amount(self) -> Amount:
        """How many rows."""
        return Amount(self.n, self.fraction)

    @property
    def text(self) -> str:
        """The step as `parse_step` reads it."""
        ties = "" if self.ties == "exact" else f" ties {self.ties}"
        among = f" among {self.among.text}" if isinstance(self.among, Where) else ""
        return f"{'top' if self.largest else 'bottom'} {self.amount} by {_quoted(self.column)}{ties}{among}"


@dataclass(frozen=True)
class Sample:
    """A step: rows at random, without replacement.

    Attributes
    ----------
    n : int, optional
        How many rows, at most; with `by`, of each group.
    fraction : float or Fraction, optional
        Share of the rows.
    seed : int
        Another seed, another sample.
    by : str, optional
        A column of groups: numbers, text or truth values. Rows without a group are dropped.
    """

    n: int | None = None
    fraction: Any = None
    seed: int = 0
    by: str | None = None

    def __post_init__(self) -> None:
        _check_amount(self.n, self.fraction)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer):
            raise SelectionError(f"seed={self.seed!r}: give a whole number")
        if self.by is not None and self.n is None:
            raise SelectionError(f"by={self.by!r} takes n, the rows of each group, not a fraction")

    @property
    def amount(self) -> Amount:
        """How many rows."""
        return Amount(self.n, self.fraction)

    @property
    def text(self) -> str:
        """The step as `parse_step` reads it."""
        by = f" by {_quoted(self.by)}" if self.by is not None else ""
        return f"sample {self.amount} seed {self.seed}{by}"


#: One step of a selection. Where one is wanted, a string is read by `parse_step`.
Step = Where | Top | Sample


# --- text to steps --------------------------------------------------------------------------------

# A column called `top` is still one where an operator follows.
_STEP = re.compile(r"(top|bottom|sample)\b(?!\s*(?:[=<>!+*/%)-]|(?:and|or|in|is|not)\b))", re.IGNORECASE)
_AMOUNT = r"([0-9][0-9_]*(?:\.[0-9]+)?)(\s*%)?(?=\s|:|$)"
_COLUMN = rf"({_NAME})|`([^`]+)`"
_WORD = re.compile(r"\S+")


@dataclass
class _Reader:
    """Reads a step word by word, and shows where it cannot go on."""

    text: str
    at: int = 0

    def fail(self, message: str) -> WhereError:
        self.skip()
        word = _WORD.match(self.text, self.at)
        return WhereError(message, self.text, self.at, word.end() if word else self.at + 1)

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1

    def take(self, pattern: str) -> re.Match[str] | None:
        self.skip()
        match = re.compile(pattern, re.IGNORECASE).match(self.text, self.at)
        if match:
            self.at = match.end()
        return match

    def amount(self, example: str) -> dict[str, Any]:
        before = self.at
        match = self.take(_AMOUNT)
        if match is None:
            raise self.fail(f"expected a number of rows or a percentage, as in `{example}`")
        number = Fraction(match[1].replace("_", ""))
        if match[2]:
            if number > 100:
                self.at = before
                raise self.fail(f"{match[0]} is more than all rows; write 0% to 100%")
            return {"fraction": number / 100}
        if "." in match[1]:
            self.at = before
            hint = f"; {float(number * 100):g}% is that share" if number <= 1 else ""
            raise self.fail(f"{match[1]} is not a number of rows{hint}")
        return {"n": int(number)}

    def column(self, example: str) -> str:
        match = self.take(_COLUMN)
        if match is None:
            raise self.fail(f"expected a column, as in `{example}` (a name with other characters in backticks)")
        return match[1] or match[2]

    def end(self, what: str) -> None:
        self.skip()
        if self.at < len(self.text):
            raise self.fail(f"this cannot stand here; expected {what} or nothing more")


def parse_step(text: str) -> Step:
    """Read a step of a selection.

    Parameters
    ----------
    text : str
        ``where EXPRESSION``, or the expression alone; ``top 30% by COLUMN`` or ``bottom 1000 by COLUMN``, then perhaps
        ``ties include`` (or ``exclude``) and ``among EXPRESSION``; ``sample 10000``, then perhaps ``seed 1`` and
        ``by COLUMN``.

    Returns
    -------
    Where, Top or Sample

    Raises
    ------
    WhereError
        Where it has a mistake, with its place and the remedy.

    Examples
    --------
    >>> parse_step("top 30% by clip_score among aesthetic_score >= 5").text
    'top 30% by clip_score among aesthetic_score >= 5'
    """
    if not isinstance(text, str):
        raise TypeError(f"a step is text, a Where, a Top or a Sample, not {type(text).__name__}: {text!r}")
    folded = fold(text)
    match = _STEP.match(folded)
    if match is None:
        return parse_where(re.sub(r"^where(\s+|$)", "", folded, flags=re.IGNORECASE))
    word = match[1].lower()
    reader = _Reader(folded, match.end())
    return _read_sample(reader) if word == "sample" else _read_top(reader, word == "top")


def parse_top(text: str, largest: bool = True) -> Top:
    """Read what follows ``top`` (or ``bottom``) in a step: ``30% by clip_score``, or shorter ``30%:clip_score``.

    Parameters
    ----------
    text : str
        See `parse_step`.
    largest : bool
        Whether the largest values are kept.

    Raises
    ------
    WhereError
        Where it has a mistake.
    """
    return _read_top(_Reader(fold(text)), largest)


def parse_sample(text: str) -> Sample:
    """Read what follows ``sample`` in a step: ``10000``, ``1%``, ``10000 seed 1``, ``100 by cluster``.

    Parameters
    ----------
    text : str
        See `parse_step`.

    Raises
    ------
    WhereError
        Where it has a mistake.
    """
    return _read_sample(_Reader(fold(text)))


def _read_top(reader: _Reader, largest: bool) -> Top:
    example = f"{'top' if largest else 'bottom'} 30% by clip_score"
    amount = reader.amount(example)
    if not reader.take(r":|by\b"):
        raise reader.fail(f"expected `by` and a column, as in `{example}`")
    column = reader.column(example)
    options: dict[str, Any] = {}
    if reader.take(r"ties\b"):
        match = reader.take(rf"({'|'.join(_TIES)})(?!\w)")
        if match is None:
            raise reader.fail(f"after `ties` comes one of {', '.join(_TIES)}")
        options["ties"] = match[1].lower()
    if reader.take(r"among\b"):
        options["among"] = parse_where(reader.text[reader.at :])
        reader.at = len(reader.text)
    reader.end("`ties`, `among`")
    return Top(column, largest=largest, **amount, **options)


def _read_sample(reader: _Reader) -> Sample:
    example = "sample 10000 seed 1"
    options = reader.amount(example)
    while match := reader.take(r"(seed|by|per)\b|:"):
        word = (match[1] or "by").lower()
        if word == "seed":
            seed = reader.take(r"-?[0-9]+(?!\w)")
            if seed is None:
                raise reader.fail(f"after `seed` comes a whole number, as in `{example}`")
            options["seed"] = int(seed[0])
        elif "fraction" in options:
            raise reader.fail(
                "of each group a number of rows is taken, not a percentage, as in `sample 100 by cluster`"
            )
        else:
            options["by"] = reader.column("sample 100 by cluster")
    reader.end("`seed`, `by`")
    return Sample(**options)


def expand_steps(steps: str | Step | Iterable[str | Step]) -> Iterator[Step]:
    """Yield all steps, those in text read, `among` as a step of its own."""
    for item in [steps] if isinstance(steps, str | Where | Top | Sample) else steps:
        step = item if isinstance(item, Where | Top | Sample) else parse_step(item)
        if isinstance(step, Top) and isinstance(step.among, Where):
            yield step.among
            step = replace(step, among=None)
        yield step
