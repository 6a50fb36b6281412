"""One partition in, one partition out: embed captions, compare them and prompts with the images' embeddings. No Dask.

Nothing here decodes an image: scores come from the embeddings that a table has already. For a caption *c* and an image
*x*, with unit embeddings t(c) and v(x) of one model:

- ``clip_score`` is their cosine, v(x) · t(c) (DataComp calls it ``clip_l14_similarity_score`` for OpenAI's ViT-L/14).
- A set of prompts has one class embedding: the mean of its prompts' unit embeddings, brought to unit length again
  (prompt ensembling, section 3.1.4 of Radford et al. 2021, arXiv:2103.00020). With p of the positive set, n of the
  negative set and a temperature s:

  - ``softmax``: exp(s v·p) / (exp(s v·p) + exp(s v·n)), from 0 to 1; the zero-shot classifier of two classes. s is the
    model's own logit scale (100 for OpenAI's models) unless another is given.
  - ``margin``: v·p − v·n, from −2 to 2; it has no temperature and does not saturate.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa

from ..engine.backend import Backend, backend_of
from ..models.encoders import EncoderSpec, ModelError
from ..models.text_tower import TextEncoder, load_text_encoder
from ..schema import COLUMNS

if TYPE_CHECKING:
    import torch

__all__ = [
    "NEGATIVE",
    "Prompt",
    "PromptError",
    "PromptUse",
    "TextUse",
    "clip_score_partition",
    "embed_text_partition",
    "parse_prompts",
    "prompt_embeddings",
    "prompts_partition",
    "texts_of",
]

Method = Literal["softmax", "margin"]

#: What a set of prompts is compared with unless a negative set is given: an image, and nothing said of it.
NEGATIVE = ("a photo", "a picture", "an image")

#: Rows compared at a time.
_BLOCK = 65_536


class PromptError(ValueError):
    """Prompts, or the way to score them, make no sense."""


# --- captions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextUse:
    """Which text is embedded by which model, and where the result goes.

    Attributes
    ----------
    encoder : EncoderSpec
        The model; for scores, the one that made the images' embeddings.
    caption : str
        Column with the text.
    embedding : str
        Column with the images' embeddings (not used by `embed_text_partition`).
    column : str
        Column that is added.
    batch_size : int or None
        Texts a forward pass; None: 16 on a CPU, 512 on a GPU.
    """

    encoder: EncoderSpec
    caption: str = "caption"
    embedding: str = "embedding"
    column: str = "clip_score"
    batch_size: int | None = None


def texts_of(backend: Backend, frame: Any, column: str) -> list[str | None]:
    """Texts of a column, in host memory.

    Raises
    ------
    TypeError
        If it holds something else.
    """
    values = backend.to_host(frame, [column])[column]
    type_ = values.type
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
        values = values.cast(type_)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_text(type_) for is_text in texts):
        raise TypeError(f"column {column!r} holds {type_}, not text: name the column with the captions")
    return list(values.to_pylist())


def embed_text_partition(frame: Any, use: TextUse) -> Any:
    """Embed the captions of a partition.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        With a column of text.
    use : TextUse
        The model and the columns.

    Returns
    -------
    frame
        With `use.column`: list of float32, unit length; null where there is no caption. An empty caption is a text
        like any other.

    Raises
    ------
    ModelError
        If the model has no text tower, or its weights or tokenizer cannot be had.
    """
    backend = backend_of(frame)
    texts = texts_of(backend, frame, use.caption)
    rows = np.array([i for i, text in enumerate(texts) if text is not None], np.int64)
    if len(rows):
        encoder = load_text_encoder(use.encoder, backend.device)
        values = encoder.encode_texts([texts[i] or "" for i in rows], use.batch_size)
    else:
        values = _no_vectors(backend)
    return frame.assign(**{use.column: backend.matrix_column(values, rows, frame.index)})


def clip_score_partition(frame: Any, use: TextUse) -> Any:
    """Compare each image of a partition with its own caption.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        With a column of embeddings and one of text.
    use : TextUse
        The model that made the embeddings, and the columns.

    Returns
    -------
    frame
        With `use.column`: float32, the cosine of the caption's and the image's embeddings; null where either is
        missing.

    Raises
    ------
    ModelError
        If the embeddings have another width than the model's.
    """
    backend = backend_of(frame)
    texts = texts_of(backend, frame, use.caption)
    values, rows = backend.matrix(frame[use.embedding])
    kept = [i for i, row in enumerate(rows.tolist()) if texts[row] is not None]
    if kept:
        encoder = load_text_encoder(use.encoder, backend.device)
        _check_width(values, encoder, use.embedding)
        text = encoder.encode_texts([texts[i] or "" for i in rows[kept].tolist()], use.batch_size)
        scores = _cosine(values[kept], text)
    else:
        scores = _no_vectors(backend)[:, 0]
    return frame.assign(**{use.column: backend.float_column(scores, rows[kept], frame.index)})


def _no_vectors(backend: Backend) -> torch.Tensor:
    import torch

    return torch.empty((0, 1), device=backend.device)


def _check_width(values: torch.Tensor, encoder: TextEncoder, column: str) -> None:
    if values.shape[1] != encoder.width:
        raise ModelError(
            f"column {column!r} holds embeddings of width {values.shape[1]}, the text tower of "
            f"{encoder.spec.model!r} gives {encoder.width}: name the model that made them, as model= and pretrained="
        )


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine of each row with its own counterpart."""
    import torch

    pairs = zip(a.split(_BLOCK), b.split(_BLOCK), strict=True)
    return torch.cat([torch.nn.functional.cosine_similarity(x, y, dim=1) for x, y in pairs])


# --- prompts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One zero-shot score.

    Attributes
    ----------
    name : str
        Of what the positive prompts say.
    positive, negative : tuple of str
        The two sets of prompts.
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    @property
    def column(self) -> str:
        """Column that the score goes to."""
        return f"{self.name}_score"


@dataclass(frozen=True)
class PromptUse:
    """Which prompts are scored, by which model and formula; see the module's docstring.

    Attributes
    ----------
    encoder : EncoderSpec
        The model that made the embeddings.
    prompts : tuple of Prompt
        What is scored.
    method : {"softmax", "margin"}
        The formula.
    temperature : float or None
        What cosines are multiplied with before the softmax; None: the model's logit scale.
    embedding : str
        Column with the images' embeddings.
    """

    encoder: EncoderSpec
    prompts: tuple[Prompt, ...]
    method: Method = "softmax"
    temperature: float | None = None
    embedding: str = "embedding"

    @property
    def provenance(self) -> dict[str, Any]:
        """What a score table records of them, beside the text tower's own provenance."""
        return {
            "method": self.method,
            "temperature": self.temperature,
            "prompts": {prompt.column: asdict(prompt) for prompt in self.prompts},
        }


def parse_prompts(
    prompts: Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]], negative: Sequence[str] = NEGATIVE
) -> tuple[Prompt, ...]:
    """Check prompts and fix them as values.

    Parameters
    ----------
    prompts : mapping
        Name of the score to its prompts: a list of positive ones, or a mapping with the keys ``positive`` and
        ``negative``.
    negative : sequence of str
        Negative set of those that name none.

    Raises
    ------
    PromptError
        For a name that makes no column or one of this library's, an empty set, or anything that is not text.
    """
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
    """Check how prompts are scored.

    Raises
    ------
    PromptError
        For an unknown method, or a temperature that does nothing or is not positive.
    """
    if method not in get_args(Method):
        raise PromptError(f"unknown method {method!r}: use softmax or margin")
    if temperature is not None and (method == "margin" or not 0 < temperature < float("inf")):
        what = "the margin has no temperature" if method == "margin" else "it must be positive"
        raise PromptError(f"temperature={temperature}: {what}")
    return method  # type: ignore[return-value]


_embedding = threading.Lock()


def prompt_embeddings(encoder: EncoderSpec, prompts: tuple[Prompt, ...], device: str = "cpu") -> torch.Tensor:
    """Class embeddings of prompts; computed once in each process.

    Parameters
    ----------
    encoder : EncoderSpec
        The model.
    prompts : tuple of Prompt
        n of them.
    device : str
        torch device.

    Returns
    -------
    torch.Tensor
        float32 (2, n, width), unit length: of the positive sets, then of the negative ones.
    """
    with _embedding:
        return _prompt_embeddings(encoder, prompts, device)


@lru_cache(maxsize=16)
def _prompt_embeddings(encoder: EncoderSpec, prompts: tuple[Prompt, ...], device: str) -> torch.Tensor:
    import torch

    tower = load_text_encoder(encoder, device)
    sets = [p.positive for p in prompts] + [p.negative for p in prompts]
    texts = list(dict.fromkeys(text for one in sets for text in one))
    vectors = dict(zip(texts, tower.encode_texts(texts), strict=True))
    means = torch.stack([torch.stack([vectors[text] for text in one]).mean(0) for one in sets])
    return torch.nn.functional.normalize(means, dim=1).reshape(2, len(prompts), -1)


def prompts_partition(frame: Any, use: PromptUse) -> Any:
    """Score the images of a partition against prompts.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        With a column of embeddings.
    use : PromptUse
        The prompts, and the model that made the embeddings.

    Returns
    -------
    frame
        With a float32 column for each prompt, null where there is no embedding.

    Raises
    ------
    ModelError
        If the embeddings have another width than the model's.
    """
    import torch

    backend = backend_of(frame)
    values, rows = backend.matrix(frame[use.embedding])
    if len(rows):
        encoder = load_text_encoder(use.encoder, backend.device)
        _check_width(values, encoder, use.embedding)
        positive, negative = prompt_embeddings(use.encoder, use.prompts, backend.device).double()
        # In double precision: a row's score then depends neither on the batch it came in nor on TF32.
        direction = (positive - negative).T
        margins = torch.cat(
            [torch.nn.functional.normalize(x.double(), dim=1) @ direction for x in values.split(_BLOCK)]
        )
        # A softmax of two classes is the logistic function of their difference.
        softmax = use.method == "softmax"
        scores = torch.sigmoid(margins * (use.temperature or encoder.logit_scale)) if softmax else margins
    else:
        scores = torch.empty((0, len(use.prompts)), device=backend.device)
    columns = {p.column: backend.float_column(scores[:, i], rows, frame.index) for i, p in enumerate(use.prompts)}
    return frame.assign(**columns)
