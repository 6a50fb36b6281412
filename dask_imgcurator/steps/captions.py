"""Length and language of captions: one partition in, one partition out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa

from ..engine.backend import backend_of
from .text import texts_of

__all__ = ["CaptionUse", "caption_stats_partition", "detect_languages", "language_problem"]

#: Characters of a text whose language is detected; more do not change the answer.
_MAX_CHARS = 3_000


@dataclass(frozen=True)
class CaptionUse:
    """What is measured of which text.

    Attributes
    ----------
    caption : str
        Column with the text.
    language : bool
        Whether its language is detected.
    min_confidence : float
        Least probability of a language; below it, it is undetermined.
    """

    caption: str = "caption"
    language: bool = False
    min_confidence: float = 0.2

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the columns that are added."""
        fields = [(f"{self.caption}_words", pa.int32()), (f"{self.caption}_chars", pa.int32())]
        if self.language:
            fields.append((f"{self.caption}_language", pa.string()))
            fields.append((f"{self.caption}_language_confidence", pa.float32()))
        return pa.schema(fields)


def caption_stats_partition(frame: Any, use: CaptionUse) -> Any:
    """Measure the captions of a partition.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        With a column of text.
    use : CaptionUse
        What is measured.

    Returns
    -------
    frame
        With ``caption_words`` (int32: runs of characters between white space, as ``str.split`` sees them, which for
        Chinese or Japanese is a sentence), ``caption_chars`` (int32: Unicode code points, white space included) and,
        if asked for, ``caption_language`` and ``caption_language_confidence`` (see `detect_languages`); all null where
        there is no caption.
    """
    backend = backend_of(frame)
    texts = texts_of(backend, frame, use.caption)
    columns: list[Sequence[Any]] = [
        [None if text is None else len(text.split()) for text in texts],
        [None if text is None else len(text) for text in texts],
    ]
    if use.language:
        found = detect_languages(texts, use.min_confidence)
        columns += [[language for language, _ in found], [confidence for _, confidence in found]]
    schema = use.schema
    table = pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
    added = backend.from_arrow(table)
    added.index = frame.index
    # By place: an index may have one label twice.
    return frame.assign(**{name: added[name] for name in schema.names})


def language_problem() -> str | None:
    """Say why languages cannot be detected here, and what to do; None where they can."""
    from importlib.util import find_spec

    if find_spec("py3langid") is None:
        return 'detecting languages needs py3langid: pip install "dask-imgcurator[text]"'
    return None


def detect_languages(texts: Sequence[str | None], min_confidence: float = 0.2) -> list[tuple[str | None, float | None]]:
    """Detect the language of each text.

    Parameters
    ----------
    texts : sequence of str or None
        Of which the first 3,000 characters are read.
    min_confidence : float
        Least probability, 0 to 1.

    Returns
    -------
    list of (str or None, float or None)
        Code of ISO 639-1 (of 639-3 for the few languages that have no other) and its probability among the 140
        languages that the detector knows. The code is None where it is undetermined: too short or too mixed to tell,
        or no language at all (numbers, file names). Both are None for a text that is missing or blank.

    Raises
    ------
    ImportError
        If the detector is not installed.

    Notes
    -----
    By py3langid, whose model ships in its package (5 MB). A caption of one or two words often has no determined
    language: a filter that shall keep these asks for ``caption_language == "en" or caption_language is null``.
    """
    classify = _classifier()
    found: list[tuple[str | None, float | None]] = []
    for text in texts:
        if text is None or not text.strip():
            found.append((None, None))
            continue
        language, confidence = classify(text[:_MAX_CHARS])
        # "zxx": no linguistic content.
        found.append((language if confidence >= min_confidence and language != "zxx" else None, confidence))
    return found


_loading = threading.Lock()


def _classifier() -> Callable[[str], tuple[str, float]]:
    with _loading:
        return _load_classifier()


@cache
def _load_classifier() -> Callable[[str], tuple[str, float]]:
    problem = language_problem()
    if problem:
        raise ImportError(problem)
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    # An instance of its own: the package's functions share one that any code may restrict to other languages.
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    classify: Callable[[str], tuple[str, float]] = identifier.classify
    return classify
