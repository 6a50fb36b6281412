"""The ``--where`` language: from text to a tree of its own, with every mistake shown where it stands.

Python's `ast` gives the tree; a scanner in front of it finds nearly all mistakes, so that positions are in characters
and messages do not depend on the version of Python. What the tree means is in `filters`.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = [
    "ARITHMETIC",
    "COMPARISON",
    "KIND_NAMES",
    "MAX_CHARACTERS",
    "Arithmetic",
    "Column",
    "Compare",
    "Constant",
    "In",
    "IsNull",
    "Join",
    "Node",
    "Not",
    "WhereError",
    "clip",
    "fold",
    "parse",
]

# Bounds. They leave room for a list of a thousand hashes, and keep every recursion far from Python's limit.
MAX_CHARACTERS = 100_000
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

ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul} | {
    "/": operator.truediv,
    "%": operator.mod,
    "**": operator.pow,
}
_ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
COMPARISON = _ORDER | {"==": operator.eq, "!=": operator.ne}
_VALUE_FOLLOWS = {*_WORDS, *ARITHMETIC, *COMPARISON, "(", "[", ","}
_SIGNS: Mapping[type[ast.AST], str] = (
    {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Mod: "%", ast.Pow: "**"}
    | {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
    | {ast.UAdd: "+", ast.USub: "-"}
)
KIND_NAMES = {
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
        raise WhereError(f"`{clip(raw)}` is not a number; write it like 512, 0.5 or 1e-3", text, start, end)
    # Longer integers would be slow to read and fit no column's type anyway.
    value = int(raw) if raw.isdigit() and len(raw) <= 30 else float(raw)
    if not math.isfinite(value):
        raise WhereError(f"`{clip(raw)}` is too large a number", text, start, end)
    return value


def clip(text: str, most: int = 40) -> str:
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
        shown = f"`{clip(text[token.start : token.end])}`"
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
                    message = f"calls are not allowed, so `{clip(name)}(…)` cannot be used"
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
class Node:
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Column(Node):
    name: str


@dataclass(frozen=True, slots=True)
class Constant(Node):
    value: int | float | str | bool | None


@dataclass(frozen=True, slots=True)
class Arithmetic(Node):
    sign: str
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class Compare(Node):
    sign: str
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class In(Node):
    value: Node
    items: tuple[Constant, ...]


@dataclass(frozen=True, slots=True)
class IsNull(Node):
    value: Node


@dataclass(frozen=True, slots=True)
class Not(Node):
    value: Node


@dataclass(frozen=True, slots=True)
class Join(Node):
    word: str  # "and", "or"; "chain" is the `and` within `1 < a < 5`
    parts: tuple[Node, ...]


def fold(text: str) -> str:
    """Put an expression on one line: white space outside quotes becomes one space."""
    return _FOLD.sub(lambda match: match[1] or " ", text).strip()


@lru_cache(maxsize=64)
def parse(text: str) -> tuple[Node, tuple[str, ...]]:
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

    def fail(self, message: str, at: Node | ast.expr) -> WhereError:
        start, end = (at.start, at.end) if isinstance(at, Node) else self.span(at)
        return WhereError(message, self.text, start, end)

    def span(self, node: ast.expr) -> tuple[int, int]:
        return node.col_offset, node.end_col_offset or node.col_offset + 1

    def build(self, node: ast.expr) -> Node:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self.fail(f"operations are nested more than {_MAX_DEPTH} deep", node)
        built = self._build(node)
        self.depth -= 1
        return built

    def _build(self, node: ast.expr) -> Node:
        start, end = self.span(node)
        match node:
            case ast.Name():
                token = self.operands[start]
                return (Column if token.sort == "column" else Constant)(start, end, token.value)
            case ast.BoolOp():
                word = "and" if isinstance(node.op, ast.And) else "or"
                return Join(start, end, word, tuple(self.build(part) for part in node.values))
            case ast.UnaryOp(op=ast.Not()):
                return Not(start, end, self.build(node.operand))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                zero = Constant(start, start, 0)
                return self._folded(Arithmetic(start, end, _SIGNS[type(node.op)], zero, self.build(node.operand)))
            case ast.BinOp() if type(node.op) in _SIGNS:
                sign, left, right = _SIGNS[type(node.op)], self.build(node.left), self.build(node.right)
                if sign == "**":
                    self._check_exponent(right)
                return self._folded(Arithmetic(start, end, sign, left, right))
            case ast.Compare():
                return self._comparison(node)
        raise self.fail("this is not allowed in an expression", node)

    def _check_exponent(self, node: Node) -> None:
        value = node.value if isinstance(node, Constant) else None
        if type(value) not in (int, float) or abs(value) > _MAX_EXPONENT:  # type: ignore[arg-type]
            raise self.fail(f"the exponent of `**` must be a number from -{_MAX_EXPONENT} to {_MAX_EXPONENT}", node)

    def _folded(self, node: Arithmetic) -> Node:
        """Compute arithmetic on constants, so that `-5` and `512 * 512` are constants too."""
        left, right = node.left, node.right
        if node.sign in "/%" and isinstance(right, Constant) and right.value == 0 and right.value is not False:
            raise self.fail("division by zero", right)
        if not (isinstance(left, Constant) and isinstance(right, Constant)):
            return node
        if not all(type(side.value) in (int, float) for side in (left, right)):
            return node  # a mistake in types, which the check of kinds words
        if node.sign == "-" and left.value == 0 and isinstance(right.value, int):
            return Constant(node.start, node.end, -right.value)
        with np.errstate(all="ignore"):
            value = ARITHMETIC[node.sign](np.float64(left.value), np.float64(right.value))
        if not np.isfinite(value):
            raise self.fail("this has no finite value", node)
        return Constant(node.start, node.end, float(value))

    def _comparison(self, node: ast.Compare) -> Node:
        start, end = self.span(node)
        signs = [type(op) for op in node.ops]
        if not all(sign in _SIGNS for sign in signs) and len(signs) > 1:
            raise self.fail("`in` and `is null` cannot be part of a chain; put brackets around them", node)
        left = self.build(node.left)
        if signs[0] in (ast.In, ast.NotIn):
            found: Node = In(start, end, left, self._items(node.comparators[0]))
            return Not(start, end, found) if signs[0] is ast.NotIn else found
        if signs[0] in (ast.Is, ast.IsNot):
            right = self.build(node.comparators[0])
            if not isinstance(right, Constant) or right.value is not None:
                raise self.fail("after `is` comes `null` or `not null`; compare values by `==`", right)
            found = IsNull(start, end, left)
            return Not(start, end, found) if signs[0] is ast.IsNot else found
        sides = [left, *(self.build(side) for side in node.comparators)]
        parts = tuple(
            Compare(start, end, _SIGNS[sign], a, b) for sign, a, b in zip(signs, sides[:-1], sides[1:], strict=True)
        )
        return parts[0] if len(parts) == 1 else Join(start, end, "chain", parts)

    def _items(self, node: ast.expr) -> tuple[Constant, ...]:
        # `in ('a')` is no tuple to Python; here the brackets make the list.
        elements = node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
        items = []
        for element in elements:
            item = self.build(element)
            if not isinstance(item, Constant):
                raise self.fail("the list after `in` can only hold numbers and text", item)
            if item.value is None:
                raise self.fail("null is in no list; add `or … is null`", item)
            items.append(item)
        return tuple(items)
