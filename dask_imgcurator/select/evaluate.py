"""Evaluate ``--where`` expressions on Arrow tables, hence alike for every library."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from functools import cache, partial, reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..schema import kind_of, suggest
from .syntax import SIGNS, WhereError, clip, span

_MAX_EXPONENT = 8


# The name of each kind of column in errors, and a type that represents the kind.
KINDS = {
    "number": ("a number", pa.float64()),
    "string": ("text", pa.string()),
    "boolean": ("true/false", pa.bool_()),
    "list": ("a list", pa.list_(pa.float32())),
    "other": ("of a type that only `is null` can test", pa.binary()),
    "unknown": ("null", pa.null()),
}


def _numpy(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """Compute operations that Arrow lacks (an exact remainder with the divisor's sign) or computes less exactly."""
    left, right = (np.float64(v) if isinstance(v, float) else v.to_numpy(zero_copy_only=False) for v in (left, right))
    with np.errstate(all="ignore"):
        result = operation(left, right)
    missing = np.isnan(left) | np.isnan(right) | np.isnan(result)  # nan ** 0 is 1
    return pa.array(result, mask=missing) if result.ndim else pa.scalar(result)


_FUNCTIONS = (
    {"==": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}
    | {"+": pc.add, "-": pc.subtract, "*": pc.multiply, "/": pc.divide}
    | {"%": partial(_numpy, operator.mod), "**": partial(_numpy, operator.pow)}
)


# Arrow's regular expressions are RE2's, whose time is linear in the text, whatever the pattern.
_TEXT_TESTS = {"contains": pc.match_substring, "matches": pc.match_substring_regex}


def kind_of_value(value: Any) -> str:
    """Kind of a column or constant."""
    if _is_constant(value):
        return {str: "string", bool: "boolean"}.get(type(value), "number")
    return kind_of(value.type)


def _is_constant(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _plain(type_: pa.DataType) -> pa.DataType:
    """A type without its dictionary encoding."""
    return type_.value_type if pa.types.is_dictionary(type_) else type_


class Evaluator:
    """Evaluates a tree on a table; to find mistakes, it needs no rows."""

    # A value is an Arrow array with NaN made null, or for a constant the number, text or truth value itself.

    def __init__(self, text: str, table: pa.Table) -> None:
        self.text, self.table, self.names = text, table, set(table.column_names)
        self.column = cache(partial(_column, table))

    def fail(self, message: str, at: ast.expr, sign: str = "", note: str = "") -> WhereError:
        """Create an error at a part, or at an operator after it."""
        start, end = span(at)
        start = self.text.index(sign, end) if sign else start
        return WhereError(message, self.text, start, start + 1 if sign else end, note)

    def source(self, node: ast.expr) -> str:
        return self.text[slice(*span(node))]

    def shown(self, node: ast.expr) -> str:
        return repr(node.id) if isinstance(node, ast.Name) else f"`{clip(self.source(node))}`"

    def described(self, node: ast.expr, kind: str) -> str:
        return f"{self.shown(node)} is {KINDS[kind][0]}"

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name() if node.id in self.names:
                return self.column(node.id)
            case ast.Constant() if node.value is not None:
                return node.value
            case ast.BoolOp():
                join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
                return reduce(join, [self.truth(part, f"`{SIGNS[type(node.op)]}`") for part in node.values])
            case ast.UnaryOp(op=ast.Not()):
                return pc.invert(self.truth(node.operand, "`not`"))
            case ast.UnaryOp(op=ast.UAdd() | ast.USub() as op):
                value = self.number(node.operand, SIGNS[type(op)])
                if isinstance(op, ast.UAdd):
                    return value
                return -value if _is_constant(value) else pc.negate(value)
            case ast.BinOp():
                return self.arithmetic(node)
            case ast.Compare(ops=[ast.In() | ast.NotIn() as op], comparators=[listed]):
                found = self.found(node.left, listed)
                return found if isinstance(op, ast.In) else pc.invert(found)
            case ast.Compare(ops=[ast.Is() | ast.IsNot() as op], comparators=[right]):
                if not isinstance(right, ast.Constant) or right.value is not None:
                    raise self.fail("after `is` comes `null` or `not null`; compare values by `==`", right)
                value = self.value(node.left)
                if _is_constant(value):
                    raise self.fail("only a column or what is computed from one can be null", node.left)
                return pc.is_null(value) if isinstance(op, ast.Is) else pc.is_valid(value)
            case ast.Call(func=ast.Name(id=name)) if name.lower() in _TEXT_TESTS:
                return self.text_test(node, name.lower())
            case ast.Compare() if all(type(op) in SIGNS for op in node.ops):
                sides = pairwise([node.left, *node.comparators])
                return reduce(pc.and_kleene, map(partial(self.comparison, node), node.ops, sides))
        raise self.refused(node)

    def refused(self, node: ast.expr) -> WhereError:
        match node:
            case ast.Name():
                return self.unknown(node)
            case ast.Constant():
                return self.fail("null is never equal, less or more; use `is null` or `is not null`", node)
            case ast.Compare():
                return self.fail("`in` and `is null` cannot be part of a chain; put brackets around them", node)
            case ast.Call():
                name = clip(self.source(node.func))
                end = self.text.index("(", span(node.func)[1]) + 1
                hint = (
                    "; the length of a caption is the column `caption_chars`" if name.lower().startswith("len") else ""
                )
                message = f"there is no function `{name}(…)`: there are contains(…) and matches(…), for text{hint}"
                return WhereError(message, self.text, node.col_offset, end)
            case ast.Subscript():
                return self.fail("subscripts are not allowed", node.value, "[")
            case ast.Tuple(elts=[first, *_]):
                return self.fail("a comma can only stand in the list after `in`", first, ",")
            case ast.List(elts=[_, *_]):
                return self.fail("a list can only stand after `in`", node)
            case ast.Tuple() | ast.List():
                return self.fail("there is nothing in these brackets", node)
        return self.fail("this is not allowed in an expression", node)

    def text_test(self, node: ast.Call, name: str) -> Any:
        """Whether text contains other text, or matches a regular expression anywhere."""
        match node.args:
            case [column, ast.Constant(value=str(pattern))] if not node.keywords:
                value, kind = self.wanted(column, "string", f"`{name}(…)` wants text, but {{}} is {{}}")
            case _:
                example = f"{name}(caption, '{'cat' if name == 'contains' else r'cats?'}')"
                raise self.fail(f"`{name}` needs a column and text in quotes, as in `{example}`", node)
        if _is_constant(value):
            raise self.fail(f"`{name}(…)` looks into a column, not into a constant", column)
        try:
            _TEXT_TESTS[name](pa.array([""]), pattern)  # finds mistakes even without rows
        except pa.ArrowInvalid as err:
            raise self.fail(f"this is not a valid RE2 regular expression: {err}", node.args[1]) from None
        return value.cast(pa.bool_()) if kind == "unknown" else _TEXT_TESTS[name](value, pattern)

    def unknown(self, node: ast.Name) -> WhereError:
        names = self.table.column_names
        hint = suggest(node.id, names) or f" (if it is text, put it in quotes: '{clip(node.id)}')"
        note = "columns: " + ", ".join(names) if names else "there are no columns"
        return self.fail(f"unknown column {clip(node.id)!r}{hint}", node, note=note)

    def wanted(self, node: ast.expr, kinds: str, message: str) -> tuple[Any, str]:
        """Evaluate a part that must be of one of the given kinds, if its kind is known."""
        value = self.value(node)
        kind = kind_of_value(value)
        if kind == "unknown" or kind in kinds.split():
            return value, kind
        end = "; only `is null` can test it" if kind == "list" else ""
        if kinds == "boolean" and kind in ("number", "string"):
            subject = self.source(node) if isinstance(node, ast.Name) else "…"
            test = "> 0" if kind == "number" else "== 'text'"
            end = f"; compare it, as in `{subject} {test}`"
        raise self.fail(message.format(self.shown(node), KINDS[kind][0]) + end, node)

    def truth(self, node: ast.expr, user: str = "") -> Any:
        """Evaluate a part that `user`, or the whole expression, needs as a condition."""
        whole = "the expression is {1}, but it must be true or false"
        value, kind = self.wanted(node, "boolean", f"{user} wants a condition, but {{}} is {{}}" if user else whole)
        if _is_constant(value):
            raise self.fail(f"`{self.source(node)}` alone is no condition; leave it out", node)
        return value if kind == "boolean" else value.cast(pa.bool_())

    def number(self, node: ast.expr, sign: str) -> Any:
        """Evaluate a part that arithmetic needs as a number; a column becomes float64."""
        value = self.wanted(node, "number", f"`{sign}` wants numbers, but {{}} is {{}}")[0]
        return value if _is_constant(value) else _float64(value)

    def comparable(self, node: ast.expr, user: str) -> tuple[Any, str]:
        """Evaluate a part that `user` compares."""
        return self.wanted(node, "number string boolean", f"{user} cannot take {{}}, which is {{}}")

    def arithmetic(self, node: ast.BinOp) -> Any:
        sign = SIGNS[type(node.op)]
        left, right = (self.number(side, sign) for side in (node.left, node.right))
        if sign == "**" and not (_is_constant(right) and abs(right) <= _MAX_EXPONENT):
            message = f"the exponent of `**` must be a number from -{_MAX_EXPONENT} to {_MAX_EXPONENT}"
            raise self.fail(message, node.right)
        if sign == "**" and right < 0 and not _is_constant(left):
            left = _null_where(pc.equal(left, 0.0), left)
        if sign in ("/", "%") and not _is_constant(right):
            right = _null_where(pc.equal(right, 0.0), right)
        elif sign in ("/", "%") and right == 0:
            raise self.fail("division by zero", node.right)
        result = _FUNCTIONS[sign](*(float(side) if _is_constant(side) else side for side in (left, right)))
        if not isinstance(result, pa.Scalar):
            return _without_nan(result)
        if not math.isfinite(result.as_py()):
            raise self.fail("this has no finite value", node)
        return result.as_py()

    def comparison(self, node: ast.Compare, op: ast.cmpop, sides: tuple[ast.expr, ast.expr]) -> Any:
        sign = SIGNS[type(op)]
        (left, kind), (right, other) = (self.comparable(side, f"`{sign}`") for side in sides)
        if _is_constant(left) and _is_constant(right):
            raise self.fail("this compares two constants; one side must be computed from a column", node)
        if "unknown" in (kind, other):
            return (left if kind == "unknown" else right).cast(pa.bool_())
        if kind != other:
            described = f"{self.described(sides[0], kind)} and {self.described(sides[1], other)}"
            raise self.fail(f"`{sign}` needs the same type on both sides, but {described}", node)
        if kind == "boolean" and sign not in ("==", "!="):
            raise self.fail(f"true and false have no order; use `==` or `!=`, not `{sign}`", node)
        if kind == "number":
            left, right = self.rounded(left, sides[1]), self.rounded(right, sides[0])
            alike = (pa.types.is_signed_integer, pa.types.is_unsigned_integer, pa.types.is_floating)
            if not any(test(left.type) and test(right.type) for test in alike):
                left, right = _float64(left), _float64(right)
        return _FUNCTIONS[sign](left, right)

    def found(self, node: ast.expr, listed: ast.expr) -> Any:
        """Whether a value is in a list."""
        elements = listed.elts if isinstance(listed, ast.Tuple | ast.List) else [listed]
        if not elements:
            raise self.refused(listed)
        # To Python, `in ('a')` has no tuple; here the brackets make the list.
        if elements[0] is listed and not self.text[span(node)[1] : span(listed)[0]].endswith(("(", "( ")):
            raise self.fail("`in` needs a list of values in brackets, as in `in ('a', 'b')`", listed)
        value, kind = self.comparable(node, "`in`")
        if kind == "boolean":
            raise self.fail("`in` takes numbers and text; compare true/false by `==`", node)
        if _is_constant(value):
            raise self.fail("this looks for a constant; before `in` comes a column", node)
        items: list[Any] = []
        for element in elements:
            if isinstance(element, ast.Constant) and element.value is None:
                raise self.fail("`in` never matches null; add `or … is null`", element)
            items.append(self.value(element))
            found = kind_of_value(items[-1])
            if not _is_constant(items[-1]) or found == "boolean":
                raise self.fail("the list after `in` can only hold numbers and text", element)
            if found != (kind_of_value(items[0]) if kind == "unknown" else kind):
                subject = f"{self.shown(elements[0] if kind == 'unknown' else node)} is not"
                raise self.fail(f"{self.described(element, found)}, but {subject}", element)
        if kind == "unknown":
            return value.cast(pa.bool_())
        if kind == "number":
            scalars = [self.rounded(item, node) for item in items]
            items = [scalar.as_py() for scalar in scalars if scalar.type == value.type]  # no other can be equal
            items += [-item for item in items if item == 0]  # Arrow does not find -0.0 by 0.0
        among = pc.is_in(value, value_set=pa.array(items, value.type))
        return _null_where(pc.is_null(value), among)

    def rounded(self, value: Any, beside: ast.expr) -> Any:
        """Round a number to the type of the column beside it if it is in range; else make it float64."""
        if not _is_constant(value):
            return value
        type_ = _plain(self.table.schema.field(beside.id).type) if isinstance(beside, ast.Name) else pa.float64()
        if pa.types.is_floating(type_):
            with np.errstate(all="ignore"):
                rounded = float(type_.to_pandas_dtype()(value))
            if math.isfinite(rounded):
                return pa.scalar(rounded, pa.float32() if pa.types.is_float16(type_) else type_)
        elif pa.types.is_integer(type_):
            limits = np.iinfo(type_.to_pandas_dtype())
            if not limits.min <= value <= limits.max:
                value = math.copysign(math.inf, value)  # infinity works too: every value of the type is on one side
            elif value == int(value):
                return pa.scalar(int(value), type_)
        return pa.scalar(float(value), pa.float64())


def _column(table: pa.Table, name: str) -> Any:
    column = table[name]
    type_ = _plain(column.type)
    if type_ != column.type:
        column = column.cast(type_)
    # Arrow can neither compare the first two of these nor find the third in a list.
    if pa.types.is_float16(type_):
        column = column.cast(pa.float32())
    elif pa.types.is_decimal(type_):
        column = column.cast(pa.float64())
    elif pa.types.is_string_view(type_):
        column = column.cast(pa.large_string())
    return _without_nan(column) if pa.types.is_floating(column.type) else column


def _float64(value: Any) -> Any:
    return value if value.type == pa.float64() else pc.cast(value, pa.float64(), safe=False)


def _null_where(condition: Any, values: Any) -> Any:
    # The question costs little, the answer is mostly no.
    return pc.if_else(condition, pa.scalar(None, values.type), values) if pc.any(condition).as_py() else values


def _without_nan(values: Any) -> Any:
    """Replace NaN with null."""
    dtype = np.dtype(values.type.to_pandas_dtype())
    for chunk in values.chunks if isinstance(values, pa.ChunkedArray) else [values]:
        # Checking the bare numbers takes a fifth of Arrow's time to find NaN, and NaN is rare.
        offset = chunk.offset * dtype.itemsize
        if len(chunk) and np.isnan(np.frombuffer(chunk.buffers()[1], dtype, len(chunk), offset)).any():
            return _null_where(pc.is_nan(values), values)
    return values
