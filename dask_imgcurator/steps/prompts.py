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

#: What a set of prompts is compared with unless a negative set is given: an image, and nothing said of it.
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
    """Which prompts are scored, by which model and formula; see `score_prompts`."""

    encoder: EncoderSpec
    prompts: tuple[Prompt, ...]
    method: Method = "softmax"
    temperature: float | None = None
    embedding: str = "embedding"

    @property
    def provenance(self) -> dict[str, Any]:
        """What a score table records of them, besides the text tower's provenance."""
        return {
            "method": self.method,
            "temperature": self.temperature,
            "prompts": {prompt.column: asdict(prompt) for prompt in self.prompts},
        }


def parse_prompts(
    prompts: Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]], negative: Sequence[str] = NEGATIVE
) -> tuple[Prompt, ...]:
    """Validate and freeze prompts; `negative` is the set for those that name none."""
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
    """Score a partition's images against prompts; null where there is no embedding."""
    import torch

    backend = backend_of(frame)
    values, rows = backend.matrix(frame[use.embedding])
    if len(rows):
        encoder = load_text_encoder(use.encoder, backend.device)
        check_width(values, encoder, use.embedding)
        positive, negative = prompt_embeddings(use.encoder, use.prompts, backend.device).double()
        # In double precision: a row's score then depends neither on the batch it came in nor on TF32.
        direction = (positive - negative).T
        margins = torch.cat([torch.nn.functional.normalize(x.double(), dim=1) @ direction for x in values.split(BLOCK)])
        # A softmax of two classes is the logistic function of their difference.
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
    """Score images against prompts, without training: one column for each name.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With embeddings of images.
    prompts : mapping
        Name to its prompts: a list of texts that say what the score is for, or a mapping with the keys ``positive``
        and ``negative``. The name ``watermark`` gives the column ``watermark_score``.
    model : str
        The open_clip model that made the embeddings; a frame does not tell it, only the width is checked.
    pretrained : str, optional
        Its weights, as for `embed`.
    negative : sequence of str
        What is compared with, for those names that have no negative set of their own.
    method : {"softmax", "margin"}
        ``softmax``: probability of the positive set, 0 to 1. ``margin``: difference of the two cosines, −2 to 2.
    temperature : float, optional
        What cosines are multiplied with before the softmax; by default the model's own logit scale.
    embedding : str
        Column with the images' embeddings.
    dtype : {"auto", "float32", "bfloat16", "float16"}, optional
        Of the encoder; ``auto`` is settled on the worker, by its processor.

    Returns
    -------
    the frame's type
        With a float32 column for each name, null where there is no embedding.

    Raises
    ------
    PromptError
        For prompts, a method or a temperature that make no sense.
    ModelError
        For a model that does not exist, has no text tower, cannot be loaded, or gives another width than the column's.

    Notes
    -----
    A set's embedding p (or n, of the negative one) is the mean of its prompts' unit embeddings, at unit length again.
    With the image's v and the temperature s, ``softmax`` is exp(s v·p) / (exp(s v·p) + exp(s v·n)) and ``margin`` is
    v·p − v·n. Prompts are embedded once in each worker process.

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
