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

import ast
import difflib
import math
import operator
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from dask_imgcurator.schema import kind_of

__all__ = ["Where", "WhereError", "combine", "filter_frame", "kinds_of", "parse_where"]

# Bounds. They leave room for a list of a thousand hashes, and keep every recursion far from Python's limit.
_MAX_CHARACTERS = 100_000
_MAX_OPERATORS = 500
_MAX_BRACKETS = 50
_MAX_DEPTH = 60
_MAX_EXPONENT = 8

_SHOWN = 100  # characters of a long expression that an error shows

_STRING = r"""'(?:[^'\\\n\r]|\\.)*'|"(?:[^"\\\n\r]|\\.)*\""""
_QUOTED = r"`[^`\n\r]+`"
_FOLD = re.compile(rf"({_STRING}|{_QUOTED})|\s+")
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_TOKEN = re.compile(
    rf"""(?P<space>\ +)
    |(?P<string>{_STRING})
    |(?P<quoted>{_QUOTED})
    |(?P<number>(?:[0-9]|\.[0-9])(?:[eE][+-](?=[0-9])|[\w.])*)
    |(?P<name>[^\W\d]\w*)
    |(?P<foreign>===|&&|\|\||<>|:=|=>|=<|//|[&|~^≥≤≠]|!(?!=)|(?<![=!<>])=(?!=))
    |(?P<sign>\*\*|[=!<>]=|[-+*/%<>()\[\],])
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = {"and", "or", "not", "in", "is"}
_LITERALS = {"true": True, "false": False, "null": None, "none": None, "nan": None}
_ESCAPES = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "t": "\t"}
_PAIRS = {"(": ")", "[": "]"}

# What other languages write, and what is written here.
_FOREIGN = (
    {"=": "==", "===": "==", ":=": "==", "<>": "!=", "≠": "!=", "=>": ">=", "≥": ">=", "=<": "<=", "≤": "<="}
    | {"&": "and", "&&": "and", "|": "or", "||": "or", "~": "not", "!": "not"}
    | {"^": "**"}
)
_NOT_ALLOWED = {
    ".": "attributes are not allowed (a column with a dot in its name goes in backticks: `a.b`)",
    "'": "this quote is never closed",
    '"': "this quote is never closed",
    "`": "this backtick is never closed",
} | dict.fromkeys("‘’“”„«»", "write text in plain quotes: 'text'")
_NOT_ALLOWED_WORDS = {"lambda", "if", "else", "for", "await", "yield"}

_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul} | {
    "/": operator.truediv,
    "%": operator.mod,
    "**": operator.pow,
}
_ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_COMPARISON = _ORDER | {"==": operator.eq, "!=": operator.ne}
_VALUE_FOLLOWS = {*_WORDS, *_ARITHMETIC, *_COMPARISON, "(", "[", ","}
_SIGNS: Mapping[type[ast.AST], str] = (
    {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Mod: "%", ast.Pow: "**"}
    | {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
    | {ast.UAdd: "+", ast.USub: "-"}
)
_KIND_NAMES = {
    "number": "a number",
    "string": "text",
    "boolean": "true/false",
    "list": "a list",
    "other": "of a type that only `is null` can test",
}


class WhereError(ValueError):
    """A mistake in an expression, shown with a caret under its place.

    Attributes
    ----------
    message : str
        What is wrong and what to do, on one line.
    text : str
        The expression, folded onto one line.
    start, end : int
        The place, as character positions in `text`.
    note : str
        A further line, such as the list of columns; may be empty.
    """

    def __init__(self, message: str, text: str = "", start: int = 0, end: int = 0, note: str = "") -> None:
        # All of it in `args`, so that the error survives the way back from a Dask worker.
        super().__init__(message, text, start, end, note)
        self.message, self.text, self.start, self.end, self.note = message, text, start, end, note

    def __str__(self) -> str:
        lines = [self.message]
        if self.text:
            first = max(0, min(self.start - _SHOWN // 3, len(self.text) - _SHOWN))
            last = first + _SHOWN
            before = ("…" if first else "") + self.text[first : self.start]
            under = self.text[self.start : min(self.end, last)]
            after = self.text[max(self.start, min(self.end, last)) : last] + ("…" if last < len(self.text) else "")
            lines.append("  " + "".join(c if c.isprintable() else "�" for c in before + under + after))
            lines.append("  " + " " * _cells(before) + "^" * max(1, _cells(under)))
        if self.note:
            lines.append("  " + self.note)
        return "\n".join(lines)


def _cells(text: str) -> int:
    """Width in a terminal, where a CJK character takes two cells and a combining mark none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


# --- Text to tokens -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Token:
    sort: str  # "column", "constant", "word" or "sign"
    value: Any
    start: int
    end: int


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        sort, raw, start, end = match.lastgroup, match.group(), match.start(), match.end()
        if sort == "string":
            yield _Token("constant", _unescape(text, start, end), start, end)
        elif sort == "quoted":
            yield _Token("column", raw[1:-1], start, end)
        elif sort == "number":
            yield _Token("constant", _number(text, start, end), start, end)
        elif sort == "name" and raw.lower() in _WORDS:
            yield _Token("word", raw.lower(), start, end)
        elif sort == "name" and raw.lower() in _LITERALS:
            yield _Token("constant", _LITERALS[raw.lower()], start, end)
        elif sort == "name" and raw in _NOT_ALLOWED_WORDS:
            hint = "a column of that name goes in backticks"
            raise WhereError(f"`{raw}` is not allowed in an expression ({hint})", text, start, end)
        elif sort == "name":
            yield _Token("column", raw, start, end)
        elif sort == "sign":
            yield _Token("sign", raw, start, end)
        elif sort == "foreign":
            hint = f"; write `{_FOREIGN[raw]}`" if raw in _FOREIGN else ""
            raise WhereError(f"`{raw}` is not allowed in an expression{hint}", text, start, end)
        elif sort == "other":
            shown = f"`{raw}`" if raw.isprintable() else f"the character U+{ord(raw):04X}"
            raise WhereError(_NOT_ALLOWED.get(raw, f"{shown} is not allowed in an expression"), text, start, end)


def _unescape(text: str, start: int, end: int) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[1] not in _ESCAPES:
            at = start + 1 + match.start()
            raise WhereError(f"unknown escape `{match[0]}`; write a backslash as `\\\\`", text, at, at + 2)
        return _ESCAPES[match[1]]

    inside = text[start + 1 : end - 1]
    broken = re.search("[\ud800-\udfff]", inside)
    if broken:  # bytes of a command line that are not UTF-8 arrive as these, and Arrow cannot hold them
        at = start + 1 + broken.start()
        raise WhereError("this text is not valid UTF-8", text, at, at + 1)
    return re.sub(r"\\(.)", replace, inside)


def _number(text: str, start: int, end: int) -> int | float:
    raw = text[start:end]
    if not _NUMBER.fullmatch(raw):
        raise WhereError(f"`{_clip(raw)}` is not a number; write it like 512, 0.5 or 1e-3", text, start, end)
    # Longer integers would be slow to read and fit no column's type anyway.
    value = int(raw) if raw.isdigit() and len(raw) <= 30 else float(raw)
    if not math.isfinite(value):
        raise WhereError(f"`{_clip(raw)}` is too large a number", text, start, end)
    return value


def _clip(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _check_order(text: str, tokens: list[_Token]) -> None:
    """Check that values and operators take turns and that brackets close.

    Python's parser would find most of it too, but its messages speak of Python, change with its version, and
    take long on some input that is made to hurt.
    """
    brackets: list[tuple[_Token, bool]] = []  # with whether it opens the list after `in`
    previous: _Token | None = None
    operators = 0
    negated_in = False  # after the `not` of `not in`

    def fail(message: str, token: _Token) -> WhereError:
        return WhereError(message, text, token.start, token.end)

    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        value_wanted = previous is None or (previous.sort in ("word", "sign") and previous.value in _VALUE_FOLLOWS)
        shown = f"`{_clip(text[token.start : token.end])}`"
        sign = token.value if token.sort in ("word", "sign") else ""
        after_in = previous is not None and previous.sort == "word" and previous.value == "in"
        if after_in and sign not in _PAIRS:
            raise fail("`in` wants a list of values in brackets, as in `in ('a', 'b')`", token)
        if sign in _PAIRS:
            if not value_wanted and previous is not None:
                if sign == "[":
                    raise fail("subscripts are not allowed", token)
                if previous.sort == "column":
                    name = text[previous.start : previous.end]
                    message = f"calls are not allowed, so `{_clip(name)}(…)` cannot be used"
                    raise WhereError(message, text, previous.start, token.end)
                raise fail(f"expected an operator before {shown}", token)
            if sign == "[" and not after_in:
                raise fail("a list can only stand after `in`", token)
            brackets.append((token, after_in))
            if len(brackets) > _MAX_BRACKETS:
                raise fail(f"brackets are nested more than {_MAX_BRACKETS} deep", token)
        elif sign in (")", "]"):
            if not brackets or _PAIRS[brackets[-1][0].value] != sign:
                raise fail(f"{shown} closes no bracket", token)
            opened, is_list = brackets.pop()
            if previous is opened:
                raise WhereError("there is nothing in these brackets", text, opened.start, token.end)
            if value_wanted and not (is_list and previous is not None and previous.value == ","):
                raise fail(f"expected a value before {shown}", token)
        elif sign == ",":
            if not brackets or not brackets[-1][1]:
                raise fail("a comma can only stand in the list after `in`", token)
            if value_wanted:
                raise fail(f"expected a value before {shown}", token)
        elif sign:
            operators += 1
            if operators > _MAX_OPERATORS:
                raise fail(f"more than {_MAX_OPERATORS} operators in one expression", token)
            if value_wanted and sign not in ("+", "-", "not") and not (negated_in and sign == "in"):
                raise fail(f"expected a value before {shown}", token)
            negated_in = not value_wanted and sign == "not"
            if negated_in and (following is None or following.value != "in"):
                raise fail("expected `in` after this `not`, or `and`/`or` before it", token)
        elif not value_wanted and previous is not None:
            if text[token.start] in "'\"" and previous.sort == "column" and previous.end == token.start:
                name = text[previous.start : previous.end]
                raise WhereError(f"the prefix {name!r} is not allowed before text", text, previous.start, token.end)
            hint = " (a quote inside text is written \\')" if text[token.start] in "'\"" else ""
            raise fail(f"expected an operator before {shown}{hint}", token)
        previous = token

    if brackets:
        raise fail("this bracket is never closed", brackets[-1][0])
    if previous is not None and previous.sort in ("word", "sign") and previous.value in _VALUE_FOLLOWS:
        raise fail(f"expected a value after `{text[previous.start : previous.end]}`", previous)


# --- Tokens to a tree ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Node:
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Column(_Node):
    name: str


@dataclass(frozen=True, slots=True)
class _Constant(_Node):
    value: int | float | str | bool | None


@dataclass(frozen=True, slots=True)
class _Arithmetic(_Node):
    sign: str
    left: _Node
    right: _Node


@dataclass(frozen=True, slots=True)
class _Compare(_Node):
    sign: str
    left: _Node
    right: _Node


@dataclass(frozen=True, slots=True)
class _In(_Node):
    value: _Node
    items: tuple[_Constant, ...]


@dataclass(frozen=True, slots=True)
class _IsNull(_Node):
    value: _Node


@dataclass(frozen=True, slots=True)
class _Not(_Node):
    value: _Node


@dataclass(frozen=True, slots=True)
class _Join(_Node):
    word: str  # "and", "or"; "chain" is the `and` within `1 < a < 5`
    parts: tuple[_Node, ...]


def _fold(text: str) -> str:
    """Put an expression on one line: white space outside quotes becomes one space."""
    return _FOLD.sub(lambda match: match[1] or " ", text).strip()


@lru_cache(maxsize=64)
def _parse(text: str) -> tuple[_Node, tuple[str, ...]]:
    """Return the tree and the columns of a folded expression."""
    if not text:
        raise WhereError("the expression is empty; write a condition such as `aesthetic_score >= 5`")
    tokens = list(_tokens(text))
    _check_order(text, tokens)
    # Python's parser is asked for the tree only. Columns and constants go in as `___` of their own length, so
    # its positions are ours, in characters, and no value, name or escape is ever read by Python's rules.
    source = [" "] * len(text)
    for token in tokens:
        width = token.end - token.start
        source[token.start : token.end] = token.value if token.sort in ("word", "sign") else "_" * width
    operands = {token.start: token for token in tokens if token.sort in ("column", "constant")}
    try:
        tree = ast.parse("".join(source), mode="eval").body
    except SyntaxError as error:
        at = min(max((error.offset or 1) - 1, 0), len(text) - 1)
        message = "this cannot be read as an expression; brackets around the parts may help"
        raise WhereError(message, text, at, at + 1) from None
    except (RecursionError, MemoryError):
        raise WhereError("the expression is nested too deeply", text, 0, len(text)) from None
    columns = dict.fromkeys(token.value for token in tokens if token.sort == "column")
    node = _Builder(text, operands).build(tree)
    if not columns:
        raise WhereError("the expression uses no column, so it says nothing about a row", text, 0, len(text))
    return node, tuple(columns)


@dataclass
class _Builder:
    """Turns Python's tree into ours; a node that is not named here is refused."""

    text: str
    operands: Mapping[int, _Token]
    depth: int = 0

    def fail(self, message: str, at: _Node | ast.expr) -> WhereError:
        start, end = (at.start, at.end) if isinstance(at, _Node) else self.span(at)
        return WhereError(message, self.text, start, end)

    def span(self, node: ast.expr) -> tuple[int, int]:
        return node.col_offset, node.end_col_offset or node.col_offset + 1

    def build(self, node: ast.expr) -> _Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.fail(f"operations are nested more than {_MAX_DEPTH} deep", node)
        built = self._build(node)
        self.depth -= 1
        return built

    def _build(self, node: ast.expr) -> _Node:
        start, end = self.span(node)
        match node:
            case ast.Name():
                token = self.operands[start]
                return (_Column if token.sort == "column" else _Constant)(start, end, token.value)
            case ast.BoolOp():
                word = "and" if isinstance(node.op, ast.And) else "or"
                return _Join(start, end, word, tuple(self.build(part) for part in node.values))
            case ast.UnaryOp(op=ast.Not()):
                return _Not(start, end, self.build(node.operand))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                zero = _Constant(start, start, 0)
                return self._folded(_Arithmetic(start, end, _SIGNS[type(node.op)], zero, self.build(node.operand)))
            case ast.BinOp() if type(node.op) in _SIGNS:
                sign, left, right = _SIGNS[type(node.op)], self.build(node.left), self.build(node.right)
                if sign == "**":
                    self._check_exponent(right)
                return self._folded(_Arithmetic(start, end, sign, left, right))
            case ast.Compare():
                return self._comparison(node)
        raise self.fail("this is not allowed in an expression", node)

    def _check_exponent(self, node: _Node) -> None:
        value = node.value if isinstance(node, _Constant) else None
        if type(value) not in (int, float) or abs(value) > _MAX_EXPONENT:  # type: ignore[arg-type]
            raise self.fail(f"the exponent of `**` must be a number from -{_MAX_EXPONENT} to {_MAX_EXPONENT}", node)

    def _folded(self, node: _Arithmetic) -> _Node:
        """Compute arithmetic on constants, so that `-5` and `512 * 512` are constants too."""
        left, right = node.left, node.right
        if node.sign in "/%" and isinstance(right, _Constant) and right.value == 0 and right.value is not False:
            raise self.fail("division by zero", right)
        if not (isinstance(left, _Constant) and isinstance(right, _Constant)):
            return node
        if not all(type(side.value) in (int, float) for side in (left, right)):
            return node  # a mistake in types, which the check of kinds words
        if node.sign == "-" and left.value == 0 and isinstance(right.value, int):
            return _Constant(node.start, node.end, -right.value)
        with np.errstate(all="ignore"):
            value = _ARITHMETIC[node.sign](np.float64(left.value), np.float64(right.value))
        if not np.isfinite(value):
            raise self.fail("this has no finite value", node)
        return _Constant(node.start, node.end, float(value))

    def _comparison(self, node: ast.Compare) -> _Node:
        start, end = self.span(node)
        signs = [type(op) for op in node.ops]
        if not all(sign in _SIGNS for sign in signs) and len(signs) > 1:
            raise self.fail("`in` and `is null` cannot be part of a chain; put brackets around them", node)
        left = self.build(node.left)
        if signs[0] in (ast.In, ast.NotIn):
            found: _Node = _In(start, end, left, self._items(node.comparators[0]))
            return _Not(start, end, found) if signs[0] is ast.NotIn else found
        if signs[0] in (ast.Is, ast.IsNot):
            right = self.build(node.comparators[0])
            if not isinstance(right, _Constant) or right.value is not None:
                raise self.fail("after `is` comes `null` or `not null`; compare values by `==`", right)
            found = _IsNull(start, end, left)
            return _Not(start, end, found) if signs[0] is ast.IsNot else found
        sides = [left, *(self.build(side) for side in node.comparators)]
        parts = tuple(
            _Compare(start, end, _SIGNS[sign], a, b) for sign, a, b in zip(signs, sides[:-1], sides[1:], strict=True)
        )
        return parts[0] if len(parts) == 1 else _Join(start, end, "chain", parts)

    def _items(self, node: ast.expr) -> tuple[_Constant, ...]:
        # `in ('a')` is no tuple to Python; here the brackets make the list.
        elements = node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
        items = []
        for element in elements:
            item = self.build(element)
            if not isinstance(item, _Constant):
                raise self.fail("the list after `in` can only hold numbers and text", item)
            if item.value is None:
                raise self.fail("null is in no list; add `or … is null`", item)
            items.append(item)
        return tuple(items)


# --- Kinds --------------------------------------------------------------------------------------------------


@dataclass
class _Checker:
    """Finds mistakes of names and types; `kinds` None checks what does not depend on the columns."""

    text: str
    kinds: Mapping[str, str] | None

    def fail(self, message: str, at: _Node, note: str = "") -> WhereError:
        return WhereError(message, self.text, at.start, at.end, note)

    def shown(self, node: _Node) -> str:
        if isinstance(node, _Column):
            return repr(node.name)
        return f"`{_clip(self.text[node.start : node.end])}`"

    def expression(self, node: _Node) -> None:
        kind = self.kind(node)
        if kind not in ("boolean", "unknown"):
            what = f"the expression is {_KIND_NAMES[kind]}"
            raise self.fail(f"{what}, but it must be true or false{self._remedy(node, kind)}", node)
        self.condition(node, "the expression")

    def condition(self, node: _Node, user: str) -> None:
        kind = self.kind(node)
        if kind not in ("boolean", "unknown"):
            what = f"{self.shown(node)} is {_KIND_NAMES[kind]}"
            raise self.fail(f"{user} wants a condition, but {what}{self._remedy(node, kind)}", node)
        if isinstance(node, _Constant):
            raise self.fail(f"{self.shown(node)} alone is no condition; leave it out", node)

    def _remedy(self, node: _Node, kind: str) -> str:
        example = {"number": "> 0", "string": "== 'text'", "list": "is not null", "other": "is not null"}
        subject = self.text[node.start : node.end] if isinstance(node, _Column) else "…"
        return f"; compare it, as in `{subject} {example[kind]}`"

    def kind(self, node: _Node) -> str:
        match node:
            case _Column():
                return self._column(node)
            case _Constant():
                if node.value is None:
                    raise self.fail("null is never equal, less or more; use `is null` or `is not null`", node)
                kinds = {str: "string", bool: "boolean"}
                return kinds.get(type(node.value), "number")
            case _Arithmetic():
                for side in (node.left, node.right):
                    kind = self.kind(side)
                    if kind not in ("number", "unknown"):
                        message = f"`{node.sign}` wants numbers, but {self.shown(side)} is {_KIND_NAMES[kind]}"
                        raise self.fail(message, side)
                return "number"
            case _Compare():
                self._compare(node)
            case _In():
                self._in(node)
            case _IsNull():
                if isinstance(node.value, _Constant):
                    raise self.fail("only a column or what is computed from one can be null", node.value)
                self.kind(node.value)
            case _Not():
                self.condition(node.value, "`not`")
            case _Join():
                for part in node.parts:
                    self.condition(part, f"`{node.word}`")
        return "boolean"

    def _column(self, node: _Column) -> str:
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
            hint = f" (if it is text, put it in quotes: '{_clip(node.name)}')"
        note = "columns: " + ", ".join(names) if names else "there are no columns"
        raise self.fail(f"unknown column {_clip(node.name)!r}{hint}", node, note)

    def _usable(self, node: _Node, user: str) -> str:
        kind = self.kind(node)
        if kind in ("list", "other"):
            end = "; only `is null` can test it" if kind == "list" else ""
            raise self.fail(f"{user} cannot take {self.shown(node)}, which is {_KIND_NAMES[kind]}{end}", node)
        return kind

    def _compare(self, node: _Compare) -> None:
        left, right = (self._usable(side, f"`{node.sign}`") for side in (node.left, node.right))
        if isinstance(node.left, _Constant) and isinstance(node.right, _Constant):
            raise self.fail("this compares two constants; one side must be computed from a column", node)
        if "unknown" in (left, right):
            return
        if left != right:
            sides = [f"{self.shown(s)} is {_KIND_NAMES[k]}" for s, k in ((node.left, left), (node.right, right))]
            raise self.fail(f"`{node.sign}` wants the same kind on both sides, but {' and '.join(sides)}", node)
        if left == "boolean" and node.sign not in ("==", "!="):
            raise self.fail(f"true and false have no order; use `==` or `!=`, not `{node.sign}`", node)

    def _in(self, node: _In) -> None:
        kind = self._usable(node.value, "`in`")
        if kind == "boolean":
            raise self.fail("`in` takes numbers and text; compare true/false by `==`", node.value)
        if isinstance(node.value, _Constant):
            raise self.fail("this looks for a constant; before `in` comes a column", node.value)
        expected = None if kind == "unknown" else kind
        for item in node.items:
            found = self.kind(item)
            if found == "boolean" or expected not in (None, found):
                subject = self.shown(node.value)
                message = f"{self.shown(item)} is {_KIND_NAMES[found]}, but {subject} is not"
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


def _is_dask(frame: Any) -> bool:
    from dask.base import is_dask_collection

    return bool(is_dask_collection(frame))


def _sample(frame: Any) -> Any:
    """Return the empty frame that stands for a Dask frame; any other frame as it is."""
    if not _is_dask(frame):
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

    def truth(self, node: _Node) -> _Truth:
        match node:
            case _Column():
                if self.kind(node) == "unknown":
                    known = self.known(node)
                    return known, known  # all null, so neither
                value, known = self.filled(node, False)
                value = value.astype(bool)
                return value & known, ~value & known
            case _Compare():
                return self._compare(node)
            case _In():
                return self._in(node)
            case _IsNull():
                known = self.known(node.value)
                return ~known, known
            case _Not():
                true, false = self.truth(node.value)
                return false, true
            case _Join():
                true, false = self.truth(node.parts[0])
                for part in node.parts[1:]:
                    also_true, also_false = self.truth(part)
                    if node.word == "or":
                        true, false = true | also_true, false & also_false
                    else:
                        true, false = true & also_true, false | also_false
                return true, false
        raise TypeError(f"not a condition: {node}")

    def kind(self, node: _Node) -> str:
        if isinstance(node, _Column):
            return self.kinds[node.name]
        if isinstance(node, _Constant):
            return {str: "string", bool: "boolean"}.get(type(node.value), "number")
        return "number" if isinstance(node, _Arithmetic) else "boolean"

    def known(self, node: _Node) -> Any:
        """Where a value is not null; True for a constant."""
        if isinstance(node, _Constant):
            return True
        kind = self.kind(node)
        if kind == "number":
            return self.number(node)[1]
        if isinstance(node, _Column):
            return self.frame[node.name].notna().astype(bool)
        true, false = self.truth(node)
        return true | false

    def filled(self, node: _Column, fill: Any) -> tuple[Any, Any]:
        """Return a column without nulls, and where it had none."""
        column = self.frame[node.name]
        return column.fillna(fill), column.notna().astype(bool)

    def text(self, node: _Node) -> tuple[Any, Any]:
        if isinstance(node, _Column):
            return self.filled(node, "")
        assert isinstance(node, _Constant)
        return node.value, True

    def number(self, node: _Node) -> tuple[Any, Any, np.dtype[Any] | None]:
        """Return the value, where it is known, and the type that a constant beside it is rounded to.

        The value is a Python number, an integer Series of the column's own type, or a float64 Series.
        """
        if isinstance(node, _Constant):
            return node.value, True, None
        if isinstance(node, _Column) and self.kind(node) == "unknown":
            known = self.known(node)
            return known.astype("float64"), known, None
        if isinstance(node, _Column):
            value, known = self.filled(node, 0)
            dtype = getattr(value.dtype, "numpy_dtype", value.dtype)
            if not isinstance(dtype, np.dtype) or dtype.kind not in "iuf":
                dtype = None  # decimals, objects
            if dtype is not None and dtype.kind in "iu":
                return value.astype(dtype), known, dtype
            value = value.astype("float64")
            return value, known & (value == value), dtype  # Arrow's columns can hold NaN beside null
        assert isinstance(node, _Arithmetic)
        left, left_known, _ = self.number(node.left)
        right, right_known, _ = self.number(node.right)
        left, right = _as_float(left), _as_float(right)
        value = _ARITHMETIC[node.sign](left, right)
        known = left_known & right_known & (value == value)
        if node.sign in "/%" and not isinstance(right, float):
            known = known & (right != 0)
        if node.sign == "**" and right < 0:
            known = known & (left != 0)
        return value, known, None

    def _compare(self, node: _Compare) -> _Truth:
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
        outcome = _COMPARISON[node.sign](left, right).astype(bool)
        known = left_known & right_known
        return outcome & known, ~outcome & known

    def _same(self, node: _Compare) -> _Truth:
        """Compare two conditions, or a condition with `true` or `false`."""
        left, right = node.left, node.right
        if isinstance(left, _Constant):
            left, right = right, left
        true, false = self.truth(left)
        if isinstance(right, _Constant):
            if not right.value:
                true, false = false, true
        else:
            other_true, other_false = self.truth(right)
            true, false = (
                (true & other_true) | (false & other_false),
                (true & other_false) | (false & other_true),
            )
        return (true, false) if node.sign == "==" else (false, true)

    def _in(self, node: _In) -> _Truth:
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
        if _is_dask(frame):
            self._check(frame)
            part = frame[used]
            # The mask of no rows is the meta: right for pandas and cuDF alike.
            return part.map_partitions(self.mask, meta=self.mask(_sample(part)))
        kinds = self._check(frame)
        return _Evaluator(frame, kinds).truth(_parse(self.text)[0])[0]

    def _check(self, frame: Any) -> Mapping[str, str]:
        node, columns = _parse(self.text)
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
        for node in _split(_parse(self.text)[0]):
            text = self.text[node.start : node.end]
            parts.append(Where(text, _parse(text)[1]))
        return parts


def _split(node: _Node) -> Iterator[_Node]:
    if isinstance(node, _Join) and node.word == "and":
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
        ``"unknown"`` (see :func:`kinds_of`). Without it, columns are checked only when a frame is filtered.

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
    if len(text) > _MAX_CHARACTERS:
        message = f"the expression has {len(text)} characters; at most {_MAX_CHARACTERS} are read"
        raise WhereError(f"{message}. A long list of values is better joined (pandas merge) than written out")
    folded = _fold(text)
    node, columns = _parse(folded)
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
        node = _parse(text)[0]
        alone = min_aesthetic is None and max_nsfw is None
        parts.append(f"({text})" if isinstance(node, _Join) and node.word == "or" and not alone else text)
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
