"""Scores of images against texts that describe what to look for: `score_prompts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyarrow as pa

from ..engine.backend import backend_of
from ..engine.cache import cache
from ..engine.frames import apply_step, refuse_text, require_columns
from ..models.encoders import EncoderSpec
from ..models.text_tower import load_text_encoder
from ..schema import COLUMNS
from .captions import BLOCK, EMBED, check_width, encoder_of

if TYPE_CHECKING:
    import torch

Method = Literal["softmax", "margin"]

#: The default negative set: an image, without saying what it shows.
NEGATIVE = ("a photo", "a picture", "an image")


class PromptError(ValueError):
    """Prompts, or the way to score them, make no sense."""


@dataclass(frozen=True)
class Prompt:
    """One zero-shot score: its name, and the two sets of texts to compare."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    @property
    def column(self) -> str:
        """Column that the score goes to."""
        return f"{self.name}_score"


@dataclass(frozen=True)
class PromptUse:
    """Which prompts to score, by which model and formula; see `score_prompts`."""

    encoder: EncoderSpec
    prompts: tuple[Prompt, ...]
    method: Method = "softmax"
    temperature: float | None = None
    embedding: str = "embedding"

    @property
    def provenance(self) -> dict[str, Any]:
        """What a score table records about the prompts, besides the text tower's provenance."""
        return {
            "method": self.method,
            "temperature": self.temperature,
            "prompts": {prompt.column: asdict(prompt) for prompt in self.prompts},
        }


def parse_prompts(
    prompts: Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]], negative: Sequence[str] = NEGATIVE
) -> tuple[Prompt, ...]:
    """Validate and freeze prompts; `negative` is the default negative set."""
    if not isinstance(prompts, Mapping) or not prompts:
        raise PromptError(f"prompts={prompts!r}: give a mapping, such as {{'watermark': ['a photo with a watermark']}}")
    parsed = []
    for name, value in prompts.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise PromptError(f"prompts: {name!r} makes no column name: use letters, digits and _, as in 'watermark'")
        if f"{name}_score" in COLUMNS:
            raise PromptError(f"prompts: {name + '_score'!r} is a column of this library: choose another name")
        sets: Mapping[str, Any] = value if isinstance(value, Mapping) else {"positive": value}
        unknown = sets.keys() - {"positive", "negative"}
        if unknown or "positive" not in sets:
            raise PromptError(f"prompts[{name!r}] has the keys {list(sets)}: use 'positive' and, if wanted, 'negative'")
        positive = _texts(sets["positive"], f"prompts[{name!r}]")
        parsed.append(Prompt(name, positive, _texts(sets.get("negative", negative), f"the negative set of {name!r}")))
    return tuple(parsed)


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if isinstance(value, str):
        raise PromptError(f"{what} is one string, {value!r}: give a list of prompts")
    texts = tuple(value)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise PromptError(f"{what} is {list(texts)!r}: give at least one prompt, each some text")
    return texts


def check_method(method: str, temperature: float | None) -> Method:
    """Validate the scoring method."""
    if method not in get_args(Method):
        raise PromptError(f"unknown method {method!r}: use softmax or margin")
    if temperature is not None and (method == "margin" or not 0 < temperature < float("inf")):
        what = "the margin has no temperature" if method == "margin" else "it must be positive"
        raise PromptError(f"temperature={temperature}: {what}")
    return method  # type: ignore[return-value]


def prompt_embeddings(encoder: EncoderSpec, prompts: tuple[Prompt, ...], device: str = "cpu") -> torch.Tensor:
    """Class embeddings of prompts, float32 (2, n, width), unit length: positive sets, then negative ones."""
    return cache.get("prompts", (encoder, prompts, device), lambda: _prompt_embeddings(encoder, prompts, device))


def _prompt_embeddings(encoder: EncoderSpec, prompts: tuple[Prompt, ...], device: str) -> torch.Tensor:
    import torch

    tower = load_text_encoder(encoder, device)
    sets = [p.positive for p in prompts] + [p.negative for p in prompts]
    texts = list(dict.fromkeys(text for one in sets for text in one))
    vectors = dict(zip(texts, tower.encode_texts(texts), strict=True))
    means = torch.stack([torch.stack([vectors[text] for text in one]).mean(0) for one in sets])
    return torch.nn.functional.normalize(means, dim=1).reshape(2, len(prompts), -1)


def prompts_partition(frame: Any, use: PromptUse) -> Any:
    """Score a partition's images against prompts; null without an embedding."""
    import torch

    backend = backend_of(frame)
    values, rows = backend.matrix(frame[use.embedding])
    if len(rows):
        encoder = load_text_encoder(use.encoder, backend.device)
        check_width(values, encoder, use.embedding)
        positive, negative = prompt_embeddings(use.encoder, use.prompts, backend.device).double()
        # In double precision, a row's score depends neither on its batch nor on TF32.
        direction = (positive - negative).T
        margins = torch.cat([torch.nn.functional.normalize(x.double(), dim=1) @ direction for x in values.split(BLOCK)])
        # The softmax of two classes is the logistic function of their difference.
        softmax = use.method == "softmax"
        scores = torch.sigmoid(margins * (use.temperature or encoder.logit_scale)) if softmax else margins
    else:
        scores = torch.empty((0, len(use.prompts)), device=backend.device)
    columns = {p.column: backend.float_column(scores[:, i], rows, frame.index) for i, p in enumerate(use.prompts)}
    return frame.assign(**columns)


def score_prompts(
    df: Any,
    prompts: Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]],
    model: str = "ViT-L-14",
    pretrained: str | None = None,
    *,
    negative: Sequence[str] = NEGATIVE,
    method: str = "softmax",
    temperature: float | None = None,
    embedding: str = "embedding",
    dtype: str | None = None,
) -> Any:
    """Score images against prompts, without training: one column per name.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With embeddings of images.
    prompts : mapping
        From names to prompts: a list of texts that describe what to look for, or a mapping with the keys ``positive``
        and ``negative``. The name ``watermark`` gives the column ``watermark_score``.
    model : str
        The open_clip model that made the embeddings; a frame does not record it, so only the width is checked.
    pretrained : str, optional
        Its weights, as for `embed`.
    negative : sequence of str
        Negative set for names without their own.
    method : {"softmax", "margin"}
        ``softmax``: probability of the positive set, 0 to 1. ``margin``: difference of the two cosines, −2 to 2.
    temperature : float, optional
        Factor for cosines before the softmax; by default the model's own logit scale.
    embedding : str
        Column with the images' embeddings.
    dtype : {"auto", "float32", "bfloat16", "float16"}, optional
        Type of the encoder; each worker resolves ``auto`` for its processor.

    Returns
    -------
    the frame's type
        With a float32 column per name, null without an embedding.

    Raises
    ------
    PromptError
        If prompts, method or temperature are invalid.
    ModelError
        If the model does not exist, has no text tower, cannot be loaded, or has another width than the column.

    Notes
    -----
    The embedding of a set, p (n for the negative one), is the normalised mean of its prompts' unit embeddings. With the
    image's v and the temperature s, ``softmax`` is exp(s v·p) / (exp(s v·p) + exp(s v·n)) and ``margin`` is v·p − v·n.
    Prompts are embedded once per worker process.

    Examples
    --------
    >>> prompts = {"watermark": ["a photo with a watermark", "a stock photo with text across it"]}
    >>> df = score_prompts(df, prompts, "ViT-L-14", "openai")  # doctest: +SKIP
    """
    require_columns(df, [embedding], "score_prompts", EMBED)
    refuse_text(df, embedding)
    checked = check_method(method, temperature)
    parsed = parse_prompts(prompts, negative)
    use = PromptUse(encoder_of(model, pretrained, dtype, "score_prompts"), parsed, checked, temperature, embedding)
    return apply_step(df, prompts_partition, use, pa.schema([(p.column, pa.float32()) for p in parsed]), [embedding])
