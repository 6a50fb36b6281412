"""A selection's steps as data, and their text: ``top 30% by clip_score``, ``sample 10000 seed 1``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from .ranks import SelectionError
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
    """A number of rows, or a share of them."""

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
        """The amount, of so many rows."""
        return min(int(self.n), rows) if self.n is not None else math.floor(share(self.fraction) * rows)

    def __str__(self) -> str:
        return str(self.n) if self.n is not None else f"{float(share(self.fraction) * 100):.12g}%"


@dataclass(frozen=True)
class Top:
    """The rows with the largest (or smallest) values of a column; `among` are ranked and kept those it is true for."""

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
        """How many of the rows that have a value."""
        return Amount(self.n, self.fraction)

    @property
    def text(self) -> str:
        """The step as `parse_step` reads it."""
        ties = "" if self.ties == "exact" else f" ties {self.ties}"
        among = f" among {self.among.text}" if isinstance(self.among, Where) else ""
        return f"{'top' if self.largest else 'bottom'} {self.amount} by {_quoted(self.column)}{ties}{among}"


@dataclass(frozen=True)
class RandomSample:
    """Rows at random, without replacement; with `by`, n of each group. Another seed, another sample."""

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
        """How many rows."""
        return Amount(self.n, self.fraction)

    @property
    def text(self) -> str:
        """The step as `parse_step` reads it."""
        by = f" by {_quoted(self.by)}" if self.by is not None else ""
        return f"sample {self.amount} seed {self.seed}{by}"


#: One step of a selection. Where one is wanted, a string is read by `parse_step`.
Step = Where | Top | RandomSample


# --- text to steps --------------------------------------------------------------------------------

# A column called `top` is still one where an operator follows.
_STEP = re.compile(r"(top|bottom|sample)\b(?!\s*(?:[=<>!+*/%)-]|(?:and|or|in|is|not)\b))", re.IGNORECASE)

# What follows the first word, piece by piece, each with what to say where it is missing. Whether an optional piece is
# there is asked by those after it: `(?(ties)…)`.
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
    """Read a step of a selection: an expression (after ``where`` or alone), or what `parse_top`, `parse_sample` read.

    Examples
    --------
    >>> parse_step("top 30% by clip_score among aesthetic_score >= 5").text
    'top 30% by clip_score among aesthetic_score >= 5'
    """
    if not isinstance(text, str):
        raise TypeError(f"a step is text, a Where, a Top or a RandomSample, not {type(text).__name__}: {text!r}")
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
    """Yield all steps, texts parsed, `among` as its own step."""
    for item in [steps] if isinstance(steps, str | Step) else steps:
        step = item if isinstance(item, Step) else parse_step(item)
        if isinstance(step, Top) and isinstance(step.among, Where):
            yield step.among
            step = replace(step, among=None)
        yield step
