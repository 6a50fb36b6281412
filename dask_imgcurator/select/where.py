"""The closed expression language of ``--where``: ``aesthetic_score >= 5 and width >= 512``.

An expression is data, not code: nothing is called or looked up but the columns, and its size is bounded, so
one from an untrusted source can at worst be refused.

==============  ======================================================================================
columns         ``width``; any other name in backticks: ```my column```
literals        ``5``  ``0.5``  ``1e-3``  ``'text'``  ``"text"``  ``true``  ``false``
arithmetic      ``+ - * / %`` and ``**`` with a literal exponent from -8 to 8
comparison      ``== != < <= > >=``, in chains too: ``512 <= width < 4096``
lists           ``status in ('ok', 'no_image')``, ``width not in [512, 1024]``
null tests      ``caption is null``, ``caption is not null``
logic           ``and  or  not``
==============  ======================================================================================

Words may be in upper case, and precedence is Python's. The rules, which are the same on pandas, cuDF and
Dask and for every way that these store a column (NumPy, nullable, Arrow, object):

- **Null is unknown**, as in SQL: whatever is computed from or compared with null is neither true nor false,
  and a row is kept only where the whole expression is true. ``not (nsfw_score > 0.5)`` drops the rows that
  have no score. NaN is null. Division (and ``%``) by zero is null.
- **A constant is rounded to its column's type**: ``aesthetic_score >= 5.1`` is true where a float32 column
  holds what float32 makes of 5.1, although that is below 5.1. NumPy 2 and DuckDB do the same. It holds for a
  column alone against a constant (and in ``in`` lists).
- **Arithmetic is float64**, so ``width * height`` cannot overflow an int32; constants in it are not rounded.
- Integers are compared with integers exactly, also beyond 2**53 (unsigned with signed columns: as float64).
- Text is compared by code points, case and all.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ..engine.backend import is_dask
from ..schema import kind_of
from .syntax import (
    ARITHMETIC,
    COMPARISON,
    KIND_NAMES,
    MAX_CHARACTERS,
    Arithmetic,
    Column,
    Compare,
    Constant,
    In,
    IsNull,
    Join,
    Node,
    Not,
    WhereError,
    clip,
    fold,
    parse,
)

__all__ = ["Where", "WhereError", "combine", "filter_frame", "kinds_of", "parse_where"]


# --- Kinds --------------------------------------------------------------------------------------------------


@dataclass
class _Checker:
    """Finds mistakes of names and types; `kinds` None checks what does not depend on the columns."""

    text: str
    kinds: Mapping[str, str] | None

    def fail(self, message: str, at: Node, note: str = "") -> WhereError:
        return WhereError(message, self.text, at.start, at.end, note)

    def shown(self, node: Node) -> str:
        if isinstance(node, Column):
            return repr(node.name)
        return f"`{clip(self.text[node.start : node.end])}`"

    def expression(self, node: Node) -> None:
        kind = self.kind(node)
        if kind not in ("boolean", "unknown"):
            what = f"the expression is {KIND_NAMES[kind]}"
            raise self.fail(f"{what}, but it must be true or false{self._remedy(node, kind)}", node)
        self.condition(node, "the expression")

    def condition(self, node: Node, user: str) -> None:
        kind = self.kind(node)
        if kind not in ("boolean", "unknown"):
            what = f"{self.shown(node)} is {KIND_NAMES[kind]}"
            raise self.fail(f"{user} wants a condition, but {what}{self._remedy(node, kind)}", node)
        if isinstance(node, Constant):
            raise self.fail(f"{self.shown(node)} alone is no condition; leave it out", node)

    def _remedy(self, node: Node, kind: str) -> str:
        example = {"number": "> 0", "string": "== 'text'", "list": "is not null", "other": "is not null"}
        subject = self.text[node.start : node.end] if isinstance(node, Column) else "…"
        return f"; compare it, as in `{subject} {example[kind]}`"

    def kind(self, node: Node) -> str:
        match node:
            case Column():
                return self._column(node)
            case Constant():
                if node.value is None:
                    raise self.fail("null is never equal, less or more; use `is null` or `is not null`", node)
                kinds = {str: "string", bool: "boolean"}
                return kinds.get(type(node.value), "number")
            case Arithmetic():
                for side in (node.left, node.right):
                    kind = self.kind(side)
                    if kind not in ("number", "unknown"):
                        message = f"`{node.sign}` wants numbers, but {self.shown(side)} is {KIND_NAMES[kind]}"
                        raise self.fail(message, side)
                return "number"
            case Compare():
                self._compare(node)
            case In():
                self._in(node)
            case IsNull():
                if isinstance(node.value, Constant):
                    raise self.fail("only a column or what is computed from one can be null", node.value)
                self.kind(node.value)
            case Not():
                self.condition(node.value, "`not`")
            case Join():
                for part in node.parts:
                    self.condition(part, f"`{node.word}`")
        return "boolean"

    def _column(self, node: Column) -> str:
        if self.kinds is None:
            return "unknown"
        if node.name in self.kinds:
            return self.kinds[node.name]
        names = [name for name in self.kinds if isinstance(name, str)]
        lower = {name.lower(): name for name in names}
        close = difflib.get_close_matches(node.name.lower(), list(lower), n=2)
        if close:
            hint = "; did you mean " + " or ".join(repr(lower[name]) for name in close) + "?"
        else:
            hint = f" (if it is text, put it in quotes: '{clip(node.name)}')"
        note = "columns: " + ", ".join(names) if names else "there are no columns"
        raise self.fail(f"unknown column {clip(node.name)!r}{hint}", node, note)

    def _usable(self, node: Node, user: str) -> str:
        kind = self.kind(node)
        if kind in ("list", "other"):
            end = "; only `is null` can test it" if kind == "list" else ""
            raise self.fail(f"{user} cannot take {self.shown(node)}, which is {KIND_NAMES[kind]}{end}", node)
        return kind

    def _compare(self, node: Compare) -> None:
        left, right = (self._usable(side, f"`{node.sign}`") for side in (node.left, node.right))
        if isinstance(node.left, Constant) and isinstance(node.right, Constant):
            raise self.fail("this compares two constants; one side must be computed from a column", node)
        if "unknown" in (left, right):
            return
        if left != right:
            sides = [f"{self.shown(s)} is {KIND_NAMES[k]}" for s, k in ((node.left, left), (node.right, right))]
            raise self.fail(f"`{node.sign}` wants the same kind on both sides, but {' and '.join(sides)}", node)
        if left == "boolean" and node.sign not in ("==", "!="):
            raise self.fail(f"true and false have no order; use `==` or `!=`, not `{node.sign}`", node)

    def _in(self, node: In) -> None:
        kind = self._usable(node.value, "`in`")
        if kind == "boolean":
            raise self.fail("`in` takes numbers and text; compare true/false by `==`", node.value)
        if isinstance(node.value, Constant):
            raise self.fail("this looks for a constant; before `in` comes a column", node.value)
        expected = None if kind == "unknown" else kind
        for item in node.items:
            found = self.kind(item)
            if found == "boolean" or expected not in (None, found):
                subject = self.shown(node.value)
                message = f"{self.shown(item)} is {KIND_NAMES[found]}, but {subject} is not"
                raise self.fail(message if expected else "the list after `in` takes numbers or text", item)
            if kind == "unknown" and found != self.kind(node.items[0]):
                raise self.fail("the list after `in` mixes numbers and text", item)


def kinds_of(frame: Any) -> dict[str, str]:
    """How each column of a frame behaves in an expression.

    Parameters
    ----------
    frame : pandas, cuDF or Dask DataFrame
        Of a Dask DataFrame only the types are looked at; nothing is computed.

    Returns
    -------
    dict of str to str
        ``"number"``, ``"string"``, ``"boolean"``, ``"list"`` or ``"other"``; and ``"unknown"`` for a column
        without a value to tell by (Arrow's null type, or an object column where all is missing).
    """
    sample = _sample(frame)
    on_gpu = _is_cudf(sample)
    kinds = {}
    for name, dtype in sample.dtypes.items():
        if dtype == object:  # noqa: E721 (a dtype)
            # cuDF stores nothing but text under this dtype; pandas stores anything.
            kinds[name] = "string" if on_gpu else _kind_of_objects(sample[name])
        else:
            kinds[name] = _kind_of_dtype(dtype)
    return kinds


def _kind_of_dtype(dtype: Any) -> str:
    if isinstance(dtype, pd.ArrowDtype):
        return "unknown" if pa.types.is_null(dtype.pyarrow_dtype) else kind_of(dtype.pyarrow_dtype)
    if isinstance(dtype, pd.StringDtype):
        return "string"
    if isinstance(dtype, pd.CategoricalDtype) or getattr(dtype, "name", "") == "category":
        return "other"
    if pd.api.types.is_bool_dtype(dtype):
        return "boolean"
    name = str(dtype)
    if name.startswith("decimal") or (pd.api.types.is_numeric_dtype(dtype) and not name.startswith("complex")):
        return "number"
    return "list" if name.startswith("list") else "other"


def _kind_of_objects(column: Any) -> str:
    inferred = pd.api.types.infer_dtype(column, skipna=True)
    if inferred in ("integer", "floating", "mixed-integer-float", "decimal"):
        return "number"
    if inferred == "mixed":
        values = column.dropna()
        if len(values) and isinstance(values.iloc[0], list | tuple | np.ndarray):
            return "list"
    return {"string": "string", "boolean": "boolean", "empty": "unknown"}.get(inferred, "other")


def _is_cudf(frame: Any) -> bool:
    return type(frame).__module__.partition(".")[0] == "cudf"


def _sample(frame: Any) -> Any:
    """Return the empty frame that stands for a Dask frame; any other frame as it is."""
    if not is_dask(frame):
        return frame
    from dask.dataframe.dispatch import make_meta

    return make_meta(frame)


# --- Tree to mask -------------------------------------------------------------------------------------------

# Where a condition is true and where it is false: two boolean Series without nulls. Neither means unknown.
_Truth = tuple[Any, Any]


@dataclass
class _Evaluator:
    """Evaluates a checked tree on a pandas or cuDF frame, by operations that both have."""

    frame: Any
    kinds: Mapping[str, str]

    def truth(self, node: Node) -> _Truth:
        match node:
            case Column():
                if self.kind(node) == "unknown":
                    known = self.known(node)
                    return known, known  # all null, so neither
                value, known = self.filled(node, False)
                value = value.astype(bool)
                return value & known, ~value & known
            case Compare():
                return self._compare(node)
            case In():
                return self._in(node)
            case IsNull():
                known = self.known(node.value)
                return ~known, known
            case Not():
                true, false = self.truth(node.value)
                return false, true
            case Join():
                true, false = self.truth(node.parts[0])
                for part in node.parts[1:]:
                    also_true, also_false = self.truth(part)
                    if node.word == "or":
                        true, false = true | also_true, false & also_false
                    else:
                        true, false = true & also_true, false | also_false
                return true, false
        raise TypeError(f"not a condition: {node}")

    def kind(self, node: Node) -> str:
        if isinstance(node, Column):
            return self.kinds[node.name]
        if isinstance(node, Constant):
            return {str: "string", bool: "boolean"}.get(type(node.value), "number")
        return "number" if isinstance(node, Arithmetic) else "boolean"

    def known(self, node: Node) -> Any:
        """Where a value is not null; True for a constant."""
        if isinstance(node, Constant):
            return True
        kind = self.kind(node)
        if kind == "number":
            return self.number(node)[1]
        if isinstance(node, Column):
            return self.frame[node.name].notna().astype(bool)
        true, false = self.truth(node)
        return true | false

    def filled(self, node: Column, fill: Any) -> tuple[Any, Any]:
        """Return a column without nulls, and where it had none."""
        column = self.frame[node.name]
        return column.fillna(fill), column.notna().astype(bool)

    def text(self, node: Node) -> tuple[Any, Any]:
        if isinstance(node, Column):
            return self.filled(node, "")
        assert isinstance(node, Constant)
        return node.value, True

    def number(self, node: Node) -> tuple[Any, Any, np.dtype[Any] | None]:
        """Return the value, where it is known, and the type that a constant beside it is rounded to.

        The value is a Python number, an integer Series of the column's own type, or a float64 Series.
        """
        if isinstance(node, Constant):
            return node.value, True, None
        if isinstance(node, Column) and self.kind(node) == "unknown":
            known = self.known(node)
            return known.astype("float64"), known, None
        if isinstance(node, Column):
            value, known = self.filled(node, 0)
            dtype = getattr(value.dtype, "numpy_dtype", value.dtype)
            if not isinstance(dtype, np.dtype) or dtype.kind not in "iuf":
                dtype = None  # decimals, objects
            if dtype is not None and dtype.kind in "iu":
                return value.astype(dtype), known, dtype
            value = value.astype("float64")
            return value, known & (value == value), dtype  # Arrow's columns can hold NaN beside null
        assert isinstance(node, Arithmetic)
        left, left_known, _ = self.number(node.left)
        right, right_known, _ = self.number(node.right)
        left, right = _as_float(left), _as_float(right)
        value = ARITHMETIC[node.sign](left, right)
        known = left_known & right_known & (value == value)
        if node.sign in "/%" and not isinstance(right, float):
            known = known & (right != 0)
        if node.sign == "**" and right < 0:
            known = known & (left != 0)
        return value, known, None

    def _compare(self, node: Compare) -> _Truth:
        kinds = {self.kind(node.left), self.kind(node.right)}
        if "unknown" in kinds:
            known = self.known(node.left) & self.known(node.right)
            return known, known  # one side is all null
        if kinds == {"boolean"}:
            return self._same(node)
        if kinds == {"string"}:
            (left, left_known), (right, right_known) = self.text(node.left), self.text(node.right)
        else:
            left, left_known, left_type = self.number(node.left)
            right, right_known, right_type = self.number(node.right)
            left, right = _fit(left, right_type), _fit(right, left_type)
            series = [side.dtype.kind for side in (left, right) if not isinstance(side, int | float)]
            if isinstance(left, float) or isinstance(right, float) or set(series) not in ({"i"}, {"u"}):
                left, right = _as_float(left), _as_float(right)
        outcome = COMPARISON[node.sign](left, right).astype(bool)
        known = left_known & right_known
        return outcome & known, ~outcome & known

    def _same(self, node: Compare) -> _Truth:
        """Compare two conditions, or a condition with `true` or `false`."""
        left, right = node.left, node.right
        if isinstance(left, Constant):
            left, right = right, left
        true, false = self.truth(left)
        if isinstance(right, Constant):
            if not right.value:
                true, false = false, true
        else:
            other_true, other_false = self.truth(right)
            true, false = (
                (true & other_true) | (false & other_false),
                (true & other_false) | (false & other_true),
            )
        return (true, false) if node.sign == "==" else (false, true)

    def _in(self, node: In) -> _Truth:
        kind = self.kind(node.value)
        items: list[Any] = [item.value for item in node.items]
        if kind == "unknown":
            known = self.known(node.value)
            return known, known
        if kind == "string":
            value, known = self.text(node.value)
            found = value.isin(items)
        else:
            value, known, dtype = self.number(node.value)
            items = [_fit(item, dtype) for item in items]
            if dtype is not None and dtype.kind in "iu":
                items = [item for item in items if isinstance(item, int)]  # no other can be found
                found = value.isin(np.array(items, dtype))
            else:
                found = value.isin(np.array(items, "float64"))
        found = found.astype(bool)
        return found & known, ~found & known


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int | float) else value.astype("float64")


def _fit(value: Any, dtype: np.dtype[Any] | None) -> Any:
    """Round a constant to the type of the column beside it; leave anything else as it is.

    An int comes back only where the type is an integer type that holds it.
    """
    if not isinstance(value, int | float):
        return value
    if dtype is None:
        return float(value)
    if dtype.kind == "f":
        with np.errstate(all="ignore"):
            rounded = float(dtype.type(value))
        return rounded if math.isfinite(rounded) else float(value)
    limits = np.iinfo(dtype)
    if not limits.min <= value <= limits.max:
        return math.copysign(math.inf, value)  # as far away as any: every value of the type lies on one side
    return int(value) if value == int(value) else value


# --- Public -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Where:
    """A parsed expression. Make it by :func:`parse_where`; it can be hashed, pickled and tokenized by Dask.

    Attributes
    ----------
    text : str
        The expression, on one line.
    columns : tuple of str
        The columns that it uses, in order of appearance.
    """

    text: str
    columns: tuple[str, ...]

    def mask(self, frame: Any) -> Any:
        """Tell which rows the expression is true for.

        Parameters
        ----------
        frame : pandas, cuDF or Dask DataFrame
            With at least `columns`.

        Returns
        -------
        Series of bool, shape (rows,)
            Of the same library and index, without nulls; lazy for a Dask DataFrame.

        Raises
        ------
        WhereError
            Where a column is missing or of a kind that does not fit; for Dask already here, not in the
            workers, as far as the types tell.
        """
        used = [name for name in self.columns if name in frame.columns]
        if is_dask(frame):
            self._check(frame)
            part = frame[used]
            # The mask of no rows is the meta: right for pandas and cuDF alike.
            return part.map_partitions(self.mask, meta=self.mask(_sample(part)))
        kinds = self._check(frame)
        return _Evaluator(frame, kinds).truth(parse(self.text)[0])[0]

    def _check(self, frame: Any) -> Mapping[str, str]:
        node, columns = parse(self.text)
        used = [name for name in columns if name in frame.columns]
        kinds = kinds_of(frame[used])
        # Names that are not used matter only to the message about an unknown one.
        everything = kinds if len(used) == len(columns) else dict.fromkeys(frame.columns, "unknown") | kinds
        _Checker(self.text, everything).expression(node)
        return kinds

    def conjuncts(self) -> list[Where]:
        """Split the expression at its top-level `and`, to show what each condition removes.

        Returns
        -------
        list of Where
            A row is kept by the whole where it is kept by every one of these. One item where there is
            no `and`.
        """
        parts = []
        for node in _split(parse(self.text)[0]):
            text = self.text[node.start : node.end]
            parts.append(Where(text, parse(text)[1]))
        return parts


def _split(node: Node) -> Iterator[Node]:
    if isinstance(node, Join) and node.word == "and":
        for part in node.parts:
            yield from _split(part)
    else:
        yield node


def parse_where(text: str, kinds: Mapping[str, str] | None = None) -> Where:
    """Read an expression.

    Parameters
    ----------
    text : str
        The expression; it may go over several lines.
    kinds : mapping of str to str, optional
        The columns there are, each as ``"number"``, ``"string"``, ``"boolean"``, ``"list"``, ``"other"`` or
        ``"unknown"`` (see `kinds_of`). Without it, columns are checked only when a frame is filtered.

    Returns
    -------
    Where

    Raises
    ------
    WhereError
        Where the expression has a mistake, with its place and the remedy.

    Examples
    --------
    >>> where = parse_where("aesthetic_score >= 5 and width >= 512")
    >>> where.columns
    ('aesthetic_score', 'width')
    """
    if not isinstance(text, str):
        raise TypeError(f"an expression is text, not {type(text).__name__}: {text!r}")
    if len(text) > MAX_CHARACTERS:
        message = f"the expression has {len(text)} characters; at most {MAX_CHARACTERS} are read"
        raise WhereError(f"{message}. A long list of values is better joined (pandas merge) than written out")
    folded = fold(text)
    node, columns = parse(folded)
    _Checker(folded, kinds).expression(node)
    return Where(folded, columns)


def combine(where: str | None = None, min_aesthetic: float | None = None, max_nsfw: float | None = None) -> str | None:
    """Join an expression and the two shorthands by `and`.

    Parameters
    ----------
    where : str, optional
        An expression.
    min_aesthetic : float, optional
        Stands for ``aesthetic_score >= min_aesthetic``.
    max_nsfw : float, optional
        Stands for ``nsfw_score < max_nsfw``.

    Returns
    -------
    str or None
        The whole expression; None where nothing is given.

    Raises
    ------
    WhereError
        Where `where` has a mistake.
    ValueError
        Where a threshold is not a finite number.
    """
    parts = []
    if where is not None:
        text = parse_where(where).text
        node = parse(text)[0]
        alone = min_aesthetic is None and max_nsfw is None
        parts.append(f"({text})" if isinstance(node, Join) and node.word == "or" and not alone else text)
    for name, sign, value in (("aesthetic_score", ">=", min_aesthetic), ("nsfw_score", "<", max_nsfw)):
        if value is None:
            continue
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"the threshold for {name} must be a finite number, not {value!r}")
        parts.append(f"{name} {sign} {repr(number).removesuffix('.0')}")
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
        Of the same type, with its columns and index.

    Raises
    ------
    WhereError
        Where the expression has a mistake or does not fit the columns.
    """
    parsed = parse_where(where) if isinstance(where, str) else where
    return frame[parsed.mask(frame)]
