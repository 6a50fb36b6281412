"""The ``--where`` language as text: an expression becomes a tree of Python's `ast`; mistakes are shown in place.

Only the tree is Python's. Its parser sees columns and constants as placeholders of the same length, so positions in the
tree are positions in the text, Python's rules parse no value, and messages do not change with its version.
"""

from __future__ import annotations

import ast
import math
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

# Limits. They leave room for a list of a thousand hashes, and keep every recursion far from Python's limit.
MAX_CHARACTERS = 100_000
_MAX_OPERATORS = 500
_MAX_BRACKETS = 50
_MAX_DEPTH = 60

_SHOWN = 100  # characters of a long expression that an error shows

_STRING = r"""(?:'(?:[^'\\\n\r]|\\.)*'|"(?:[^"\\\n\r]|\\.)*")"""
_QUOTED = r"`[^`\n\r]+`"
_FOLD = re.compile(rf"({_STRING}|{_QUOTED})|\s+")
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_TOKEN = re.compile(
    rf"""\ +
    |(?P<prefixed>[^\W\d]\w*{_STRING})
    |(?P<joined>(?<=['"`])(?:{_STRING}|{_QUOTED}|\w+)|(?<=\w)(?:{_STRING}|{_QUOTED}))
    |(?P<string>{_STRING})
    |(?P<quoted>{_QUOTED})
    |(?P<number>(?:[0-9]|\.[0-9])(?:[eE][+-](?=[0-9])|[\w.])*)
    |(?P<word>(?ai:not\ in|is\ not|and|or|not|in|is))\b
    |(?P<name>[^\W\d]\w*)
    |(?P<foreign>===|&&|\|\||<>|<<|>>|:=|=>|=<|//|[&|~^≥≤≠]|!(?!=)|(?<![=!<>])=(?!=))
    |(?P<sign>\*\*|[=!<>]=|[-+*/%<>()\[\],])
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_LITERALS = {"true": True, "false": False, "null": None, "none": None, "nan": None}
_ESCAPE = re.compile(r"\\(.)")
_ESCAPES = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "t": "\t"}
_PAIRS = {"(": ")", "[": "]"}
# Operators of other languages, and what to write instead.
_FOREIGN = (
    {"=": "==", "===": "==", ":=": "==", "<>": "!=", "≠": "!=", "=>": ">=", "≥": ">=", "=<": "<=", "≤": "<="}
    | {"&": "and", "&&": "and", "|": "or", "||": "or", "~": "not", "!": "not"}
    | {"^": "**"}
)
_HINTS = {sign: f"; write `{ours}`" for sign, ours in _FOREIGN.items()} | dict.fromkeys(
    ("lambda", "if", "else", "for", "await", "yield"), " (a column of that name goes in backticks)"
)
_NOT_ALLOWED = {
    ".": "attributes are not allowed (a column with a dot in its name goes in backticks: `a.b`)",
    "'": "this quote is never closed",
    '"': "this quote is never closed",
    "`": "this backtick is never closed",
} | dict.fromkeys("‘’“”„«»", "write text in plain quotes: 'text'")

SIGNS: Mapping[type[ast.AST], str] = (
    {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Mod: "%", ast.Pow: "**"}
    | {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
    | {ast.UAdd: "+", ast.USub: "-", ast.And: "and", ast.Or: "or"}
)


class WhereError(ValueError):
    """A mistake in an expression, shown with carets below it.

    `message` says what is wrong and what to do, `note` may list the columns; `text` is the expression on one line,
    `start` and `end` the position in it.
    """

    def __init__(self, message: str, text: str = "", start: int = 0, end: int = 0, note: str = "") -> None:
        # All of it in `args`, so that the error can be pickled on a Dask worker.
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
    """Width in a terminal: a CJK character takes two cells and a combining mark none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def clip(text: str, most: int = 40) -> str:
    """Shorten a piece of an expression for a message."""
    return text if len(text) <= most else text[: most - 1] + "…"


def fold(text: str) -> str:
    """Put an expression on one line, collapsing white space outside quotes."""
    return _FOLD.sub(lambda match: match[1] or " ", text).strip()


class _Token(NamedTuple):
    start: int
    end: int
    text: str
    operand: ast.Name | ast.Constant | None  # for a column or a constant


@lru_cache(maxsize=64)
def parse(text: str) -> tuple[ast.expr, tuple[str, ...]]:
    """Return the tree of a folded expression, with columns as `ast.Name`, and the columns in order of appearance."""
    if not text:
        raise WhereError("the expression is empty; write a condition such as `aesthetic_score >= 5`")
    tokens = _tokens(text)
    operands = {token.start: token.operand for token in tokens if token.operand}
    source = "".join("_" * len(token.text) if token.operand else token.text.lower() for token in tokens)
    try:
        tree = _Fill(operands).visit(ast.parse(source, mode="eval").body)
        if _depth(tree) > _MAX_DEPTH:
            raise WhereError(f"operations are nested more than {_MAX_DEPTH} deep", text, *span(tree))
    except SyntaxError as error:
        raise _misplaced(text, [t for t in tokens if not t.text.isspace()], (error.offset or 1) - 1) from None
    except (RecursionError, MemoryError):
        raise WhereError("the expression is nested too deeply", text, 0, len(text)) from None
    functions = {node.func.col_offset for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = (operand.id for at, operand in operands.items() if isinstance(operand, ast.Name) and at not in functions)
    columns = dict.fromkeys(names)
    if not columns:
        raise WhereError("the expression uses no column, so it says nothing about a row", text, 0, len(text))
    return tree, tuple(columns)


class _Fill(ast.NodeTransformer):
    """Replaces placeholders by columns and constants."""

    def __init__(self, operands: Mapping[int, ast.expr]) -> None:
        self.operands = operands

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.copy_location(self.operands[node.col_offset], node)


def _depth(node: ast.AST) -> int:
    return 1 + max(map(_depth, ast.iter_child_nodes(node)), default=0)


def _tokens(text: str) -> list[_Token]:
    """Tokenize an expression, and check everything that does not depend on the order of the parts."""
    broken = re.search("[\ud800-\udfff]", text)
    if broken:  # invalid UTF-8 on a command line becomes these, which Arrow cannot hold
        raise WhereError("this text is not valid UTF-8", text, *broken.span())
    tokens: list[_Token] = []
    brackets: list[_Token] = []
    for match in _TOKEN.finditer(text):
        token = _Token(*match.span(), match[0], _operand(text, match))
        tokens.append(token)
        if token.text in _PAIRS:
            brackets.append(token)
        elif token.text in (")", "]") and (not brackets or _PAIRS[brackets.pop().text] != token.text):
            raise WhereError(f"`{token.text}` closes no bracket", text, *match.span())
        if len(brackets) > _MAX_BRACKETS:
            raise WhereError(f"brackets are nested more than {_MAX_BRACKETS} deep", text, *match.span())
    if brackets:
        raise WhereError("this bracket is never closed", text, brackets[-1].start, brackets[-1].end)
    signs = [token for token in tokens if token.operand is None and token.text not in " ()[],"]
    for token in signs[_MAX_OPERATORS:]:
        raise WhereError(f"more than {_MAX_OPERATORS} operators in one expression", text, token.start, token.end)
    return tokens


def _operand(text: str, match: re.Match[str]) -> ast.Name | ast.Constant | None:
    """Parse a column or constant; None for operators and brackets, an error for anything else."""
    raw, (start, end) = match[0], match.span()
    hint = _HINTS.get(raw, "")
    shown = f"`{clip(raw)}`" if len(raw) > 1 or raw.isprintable() else f"the character U+{ord(raw):04X}"
    message = _NOT_ALLOWED.get(raw, f"{shown} is not allowed in an expression{hint}")
    match match.lastgroup:
        case None | "word" | "sign":
            return None
        case "quoted":
            return ast.Name(raw[1:-1])
        case "name" if raw.lower() in _LITERALS:
            return ast.Constant(_LITERALS[raw.lower()])
        case "name" if not hint:
            return ast.Name(raw)
        case "number" if _NUMBER.fullmatch(raw):
            # Longer integers would be slow to parse, and fit no column's type anyway.
            value = int(raw) if raw.isdigit() and len(raw) <= 30 else float(raw)
            if math.isfinite(value):
                return ast.Constant(value)
            message = f"{shown} is too large a number"
        case "number":
            message = f"{shown} is not a number; write it like 512, 0.5 or 1e-3"
        case "string":
            wrong = next((escape for escape in _ESCAPE.finditer(text, start, end) if escape[1] not in _ESCAPES), None)
            if wrong is None:
                return ast.Constant(_ESCAPE.sub(lambda escape: _ESCAPES[escape[1]], raw[1:-1]))
            message, (start, end) = f"unknown escape `{wrong[0]}`; write a backslash as `\\\\`", wrong.span()
        case "prefixed":
            message = f"the prefix {raw.partition(raw[-1])[0]!r} is not allowed before text"
        case "joined":
            message = _no_operator(raw) if raw[0] in "'\"`" else f"expected a space before {shown}"
    raise WhereError(message, text, start, end)


def _no_operator(raw: str) -> str:
    if raw.lower() in ("like", "ilike"):
        return f"there is no `{raw.lower()}`; write contains(caption, 'cat'), or matches(caption, '(?i)cats?$')"
    hint = " (a quote inside text is written \\')" if raw[0] in "'\"" else ""
    return f"expected an operator before `{clip(raw)}`{hint}"


def _misplaced(text: str, tokens: list[_Token], offset: int) -> WhereError:
    """Say why Python cannot parse an expression: usually, values and operators do not alternate."""
    previous = ""
    value_wanted = True
    for start, end, raw, operand in tokens:
        sign = "" if operand else raw.lower()
        closes = sign in (")", "]")
        if value_wanted and sign and sign not in ("(", "[", "not", "+", "-") and not (closes and previous == ","):
            return WhereError(f"expected a value before `{sign}`", text, start, end)
        if not value_wanted and sign == "not":
            return WhereError("expected `in` after this `not`, or `and`/`or` before it", text, start, end)
        if not value_wanted and not sign:
            return WhereError(_no_operator(raw), text, start, end)
        value_wanted, previous = bool(sign) and not closes, sign
    if value_wanted:
        return WhereError(f"expected a value after `{previous}`", text, *tokens[-1][:2])
    return WhereError(
        "this cannot be read as an expression; brackets around the parts may help", text, offset, offset + 1
    )


def span(node: ast.expr) -> tuple[int, int]:
    """Position of a part of an expression."""
    return node.col_offset, node.end_col_offset or node.col_offset + 1
