"""Text towers: the tokenizer and the text half of a loaded open_clip model, beside its image half."""

from __future__ import annotations

import textwrap
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..engine.device import full_float32
from .encoders import Encoder, EncoderSpec, ModelError, load_encoder

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_CHARS", "TextEncoder", "load_text_encoder", "require_text_tower"]

#: Characters of a text that are read. A context holds some 80 tokens (about 300 characters), but tokenizers go through
#: all of a text before they cut it, in quadratic time where it has no spaces; and a caption can be a whole book.
MAX_CHARS = 3_000

#: Words that open_clip's tokenizer may remember. It forgets none by itself, and shards have new ones without end.
_MAX_WORDS = 1 << 18


class TextEncoder(Encoder):
    """The text half of a loaded model; made by `load_text_encoder`.

    Attributes
    ----------
    spec, width, device, provenance, model
        As of `Encoder`; the provenance also tells the tokenizer, the length of its context and `logit_scale`.
    logit_scale : float
        What the model was trained to multiply cosines with, before the softmax.
    """

    _unit = "text"

    def __init__(self, encoder: Encoder, tokenizer: Callable[[list[str]], torch.Tensor]) -> None:
        import torch

        model = encoder.model
        super().__init__(
            # Text towers look for the end of a text on the host: that cannot be recorded as a CUDA graph.
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
        """Cut texts into tokens, with the model's own cleaning.

        Parameters
        ----------
        texts : sequence of str
            Of which the first `MAX_CHARS` characters are read.

        Returns
        -------
        torch.Tensor
            int64 (n, context length), on the host.
        """
        with self._tokenizer_turn:  # tokenizers of transformers do not serve two threads at a time
            if len(getattr(self._tokenizer, "cache", ())) > _MAX_WORDS:
                self._tokenizer.cache = dict(self._words)  # type: ignore[attr-defined]
            return self._tokenizer([text[:MAX_CHARS] for text in texts])

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode a batch of tokens.

        Parameters
        ----------
        pixels : torch.Tensor
            Tokens: int64 (n, context length), as `tokenize` gives them.

        Returns
        -------
        torch.Tensor
            float32 (n, `width`), L2-normalised, on the device.
        """
        import torch

        exact = self.device != "cpu" and self.spec.dtype == "float32"
        with self._turn, torch.inference_mode(), full_float32(exact):
            features = self._forward(pixels.to(self.device)).float()
            return torch.nn.functional.normalize(features, dim=-1)

    def encode_texts(self, texts: Sequence[str], batch_size: int | None = None) -> torch.Tensor:
        """Encode texts in whole batches; equal texts once.

        Parameters
        ----------
        texts : sequence of str
            Any number.
        batch_size : int, optional
            Texts a forward pass; None: 16 on a CPU, 512 on a GPU.

        Returns
        -------
        torch.Tensor
            float32 (n, `width`), L2-normalised, on the device.
        """
        import torch

        if not texts:
            return torch.empty((0, self.width), device=self.device)
        batch_size = batch_size or (16 if self.device == "cpu" else 512)
        place = {text: i for i, text in enumerate(dict.fromkeys(text[:MAX_CHARS] for text in texts))}
        encoded = self.encode(self.tokenize(list(place)), batch_size)
        if len(place) == len(texts):
            return encoded
        return encoded[torch.tensor([place[text[:MAX_CHARS]] for text in texts], device=self.device)]


_towers: WeakKeyDictionary[Encoder, TextEncoder] = WeakKeyDictionary()
_loading = threading.Lock()


def require_text_tower(spec: EncoderSpec, step: str) -> None:
    """Tell on the client that a model has no text tower, where that is known without loading it.

    Raises
    ------
    ModelError
        For the starter model.
    """
    if spec.is_starter:
        raise ModelError(
            f"{step} needs a text tower, and the starter model has none: it is an image encoder only. Use one of "
            "open_clip's models, for example model='ViT-B-32', pretrained='openai', and embed the images with it too"
        )


def load_text_encoder(spec: EncoderSpec, device: str = "cpu") -> TextEncoder:
    """Load the text tower of a model; of the one in memory where `models.load_encoder` has it there.

    Parameters
    ----------
    spec : EncoderSpec
        As for the images: one spec is one model, in memory once.
    device : str
        torch device.

    Raises
    ------
    ModelError
        If the model has no text tower, its weights cannot be had, or its tokenizer cannot.
    """
    require_text_tower(spec, "this step")
    encoder = load_encoder(spec, device)
    with _loading:
        tower = _towers.get(encoder)
        if tower is None:
            if not hasattr(encoder.model, "encode_text"):
                raise ModelError(
                    f"{spec.model!r} has no text tower: embed images and captions with one of open_clip's models"
                )
            tower = _towers[encoder] = TextEncoder(encoder, _tokenizer(spec.model))
        return tower


def _tokenizer(model: str) -> Any:
    import open_clip

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return open_clip.get_tokenizer(model)
    except ImportError as err:
        raise ModelError(
            f"the tokenizer of {model!r} comes from another package: {err}. pip install transformers sentencepiece"
        ) from err
    # Hubs and tokenizers fail in many ways.
    except Exception as err:
        raise ModelError(
            f"cannot load the tokenizer of {model!r}: {type(err).__name__}: {textwrap.shorten(str(err), 300)}. It is "
            "downloaded from the Hugging Face Hub: let this machine reach it once, copy its cache here, or use a model "
            "with open_clip's own tokenizer, such as ViT-B-32 or ViT-L-14"
        ) from err
