"""Text towers: the tokenizer and the text half of an open_clip model, which shares memory with the image half."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..engine.cache import cache
from ..engine.device import default_batch
from . import ModelError, open_clip
from .encoders import Encoder, EncoderSpec, load_encoder

if TYPE_CHECKING:
    import torch

#: Limit on the characters of a text. A context holds some 80 tokens (about 300 characters), but tokenizers process the
#: whole text before they cut it, in quadratic time if it has no spaces, and a caption can be a whole book.
MAX_CHARS = 3_000

#: Words that open_clip's tokenizer may cache; its own cache grows without limit.
_MAX_WORDS = 1 << 18


class TextEncoder(Encoder):
    """The text half of a loaded model, an encoder of tokens instead of pixels.

    `logit_scale` is the learnt factor for cosines before the softmax.
    """

    _unit = "text"

    def __init__(self, encoder: Encoder, tokenizer: Callable[[list[str]], torch.Tensor]) -> None:
        import torch

        model = encoder.model
        super().__init__(
            # Text towers find the end of a text on the host, which a CUDA graph cannot record.
            replace(encoder.spec, graphs=False),
            model.encode_text,
            encoder.preprocess,
            encoder.width,
            encoder.device,
            encoder.provenance,
            model,
        )
        self._turn = encoder._turn  # both halves are one model: they take turns
        self._tokenizer, self._words = tokenizer, dict(getattr(tokenizer, "cache", {}))
        self._tokenizer_turn = threading.Lock()
        self.logit_scale = float(model.logit_scale.detach().float().exp().mean())
        with torch.inference_mode():
            tokens = self.tokenize(["a photo"])
            self.width = int(model.encode_text(tokens.to(self.device)).shape[-1])
        self.provenance = {
            **encoder.provenance,
            "tokenizer": type(tokenizer).__name__,
            "context_length": int(tokens.shape[1]),
            "logit_scale": self.logit_scale,
        }

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Split texts into tokens after the model's own cleaning: int64 (n, context length), on the host."""
        with self._tokenizer_turn:  # transformers' tokenizers are not thread-safe
            if len(getattr(self._tokenizer, "cache", ())) > _MAX_WORDS:
                self._tokenizer.cache = dict(self._words)  # type: ignore[attr-defined]
            return self._tokenizer([text[:MAX_CHARS] for text in texts])

    def _prepare(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.to(self.device)

    def encode_texts(self, texts: Sequence[str], batch_size: int | None = None) -> torch.Tensor:
        """Encode texts in batches, as `Encoder.encode` does, each distinct text once."""
        import torch

        if not texts:
            return torch.empty((0, self.width), device=self.device)
        batch_size = batch_size or default_batch(self.device)
        place = {text: i for i, text in enumerate(dict.fromkeys(text[:MAX_CHARS] for text in texts))}
        encoded = self.encode(self.tokenize(list(place)), batch_size)
        if len(place) == len(texts):
            return encoded
        return encoded[torch.tensor([place[text[:MAX_CHARS]] for text in texts], device=self.device)]


def require_text_tower(spec: EncoderSpec, step: str) -> None:
    """Raise `ModelError` for the starter model, on the client and without loading it."""
    if spec.is_starter:
        raise ModelError(
            f"{step} needs a text tower, and the starter model has none: it is an image encoder only. Use one of "
            "open_clip's models, for example model='ViT-B-32', pretrained='openai', and embed the images with it too"
        )


def load_text_encoder(spec: EncoderSpec, device: str = "cpu") -> TextEncoder:
    """Load the text tower of a model; both halves are one model in memory.

    Raises `ModelError` if the model has no text tower, or its weights or tokenizer are unavailable.
    """
    require_text_tower(spec, "this step")
    encoder = load_encoder(spec, device)

    def make() -> TextEncoder:
        if not hasattr(encoder.model, "encode_text"):
            raise ModelError(
                f"{spec.model!r} has no text tower: embed images and captions with one of open_clip's models"
            )
        return TextEncoder(encoder, open_clip.tokenizer(spec.model))

    return cache.get("text tower", encoder, make)
