"""Scores from embeddings: `score_aesthetic`, `score_nsfw`, `score_head`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .. import plugins
from ..engine.backend import backend_of
from ..engine.cache import cache
from ..engine.frames import apply_step, refuse_text, require_columns
from ..models import heads, weights
from ..models.head_files import Activation, HeadFile, Output, parse, read_bytes, read_head
from ..models.heads import HeadError
from ..schema import COLUMNS, arrow_schema

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class HeadUse:
    """Which published head to apply to which column; `round_to` as for `models.heads.load_head`."""

    kind: heads.Kind
    head: str = "auto"
    embedding: str = "embedding"
    weights_dir: str | None = None
    round_to: str | None = None

    @property
    def column(self) -> str:
        """Column that the score goes to."""
        return f"{self.kind}_score"


def score_partition(frame: Any, use: HeadUse) -> Any:
    """Apply a published head to a partition's embeddings; null without one."""
    import torch

    backend = backend_of(frame)
    values, rows = backend.matrix(frame[use.embedding])
    if len(rows):
        spec = heads.resolve(use.kind, use.head, values.shape[1])
        scores = heads.load_head(spec, use.weights_dir, backend.device, use.round_to)(values)
    else:
        scores = torch.empty(0, device=backend.device)
    return frame.assign(**{use.column: backend.float_column(scores, rows, frame.index)})


#: Rows scored at a time; limits the memory for double precision.
_BLOCK = 16_384


def resolve_head(head: str | os.PathLike[str] | HeadFile) -> HeadFile:
    """Find a head, on the client: a file, or one that a package registered under a name."""
    if isinstance(head, HeadFile):
        return head
    name = os.fspath(head)
    if name in heads.HEADS:
        step = f"score_{heads.HEADS[name].kind}"
        raise HeadError(f"{name!r} is a published head: use {step}(df, head={name!r})")
    if name not in plugins.registered(plugins.HEADS):
        return read_head(name)
    found = plugins.load(plugins.HEADS, name)
    found = found() if callable(found) else found
    return found if isinstance(found, HeadFile) else read_head(found)


@dataclass(frozen=True)
class OwnHeadUse:
    """Which user head to apply to which column."""

    head: HeadFile
    embedding: str
    column: str


def _load(head: HeadFile, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    data = read_bytes(head.path)
    found = hashlib.sha256(data).hexdigest()
    if found != head.sha256:
        raise HeadError(
            f"head {head.path} has sha256 {found} on {os.uname().nodename}, {head.sha256} when it was read first: "
            "it was changed or replaced; read it again"
        )
    _, layers = parse(data, head.path)
    return [(torch.from_numpy(w).to(device), torch.from_numpy(b).to(device)) for w, b in layers]


def _function(name: Activation | Output) -> Any:
    import torch

    if name in ("none", "identity"):
        return lambda x: x
    return getattr(torch.nn.functional if name in ("gelu", "silu") else torch, name)


def own_head_partition(frame: Any, use: OwnHeadUse) -> Any:
    """Apply a user's head to a partition's raw embeddings; null where the result is NaN."""
    import torch

    backend = backend_of(frame)
    values, rows = backend.matrix(frame[use.embedding])
    if len(rows) and values.shape[1] != use.head.width:
        raise HeadError(
            f"head {use.head.name!r} takes embeddings of width {use.head.width}"
            f"{f' ({use.head.embedder})' if use.head.embedder else ''}, column {use.embedding!r} has {values.shape[1]}"
        )
    scores = torch.empty(0, device=backend.device)
    if len(rows):
        layers = cache.get("head", (use.head, backend.device), lambda: _load(use.head, backend.device))
        activation, output = _function(use.head.activation), _function(use.head.output)
        parts = []
        with torch.inference_mode():
            for block in values.split(_BLOCK):
                # In double precision, a row's score depends neither on its batch nor on TF32.
                x = block.double()
                for i, (weight, bias) in enumerate(layers):
                    x = torch.nn.functional.linear(activation(x) if i else x, weight, bias)
                parts.append(output(x[:, 0]).float())
        scores = torch.cat(parts)
    return frame.assign(**{use.column: backend.float_column(scores, rows, frame.index)})


def _score(df: Any, use: HeadUse) -> Any:
    require_columns(df, [use.embedding], f"score_{use.kind}", "make it with embed, or name yours with embedding=")
    refuse_text(df, use.embedding)
    if use.head != "auto":
        heads.named(use.kind, use.head)  # report a wrong name now, not on a worker
    return apply_step(df, score_partition, use, arrow_schema([use.column]), [use.embedding])


def score_aesthetic(
    df: Any,
    head: str = "auto",
    embedding: str = "embedding",
    weights_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Add ``aesthetic_score`` by one of LAION's aesthetic heads.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With an embedding column of any origin.
    head : str
        ``aesthetic-v2-l14``, ``aesthetic-v1-l14``, ``aesthetic-v1-b32``, ``aesthetic-v1-b16``, ``aesthetic-starter``,
        or ``auto``: by the embedding's width (768: v2-l14; 512: v1-b32).
    embedding : str
        Name of the embedding column.
    weights_dir : path, optional
        Folder with the published files; else Dask config ``imgcurator.weights-dir``, the cache, their published
        address.

    Returns
    -------
    the frame's type
        With ``aesthetic_score`` (float32), null without an embedding.

    Raises
    ------
    HeadError
        If the head is unknown or does not fit the embedding.
    WeightsError
        If its weights cannot be found or are not the published ones.
    """
    return _score(df, HeadUse("aesthetic", head, embedding, weights.resolve_dir(weights_dir)))


def score_nsfw(
    df: Any,
    head: str = "auto",
    embedding: str = "embedding",
    weights_dir: str | os.PathLike[str] | None = None,
    round_to: str | None = "float16",
) -> Any:
    """Add ``nsfw_score`` by one of LAION's NSFW heads: probability, 0 safe to 1 not safe for work.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With an embedding column of any origin.
    head : str
        ``nsfw-l14``, ``nsfw-b32``, ``nsfw-starter``, or ``auto``: by the embedding's width (768: l14; 512: b32).
    embedding : str
        Name of the embedding column.
    weights_dir : path, optional
        Folder with the published files; else Dask config ``imgcurator.weights-dir``, the cache, their published
        address.
    round_to : {"float16", None}
        The heads were trained on float16 embeddings and look some values up in a vocabulary of such values, so
        embeddings are rounded first. None uses them as they are.

    Returns
    -------
    the frame's type
        With ``nsfw_score`` (float32), null without an embedding.

    Raises
    ------
    HeadError
        If the head is unknown or does not fit the embedding.
    WeightsError
        If its weights cannot be found or are not the published ones.
    """
    return _score(df, HeadUse("nsfw", head, embedding, weights.resolve_dir(weights_dir), round_to))


def score_head(
    df: Any,
    head: str | os.PathLike[str] | HeadFile,
    *,
    embedding: str = "embedding",
    column: str | None = None,
) -> Any:
    """Add the score of a head of your own: a linear layer or an MLP on embeddings.

    Parameters
    ----------
    df : dask, pandas or cuDF DataFrame
        With an embedding column of any origin.
    head : path, str, or HeadFile
        A file written by `head_files.save_head` or `head_files.convert_pth`, or the name of a registered head.
    embedding : str
        Column with the embeddings.
    column : str, optional
        Name of the new column; by default the one that the head names.

    Returns
    -------
    the frame's type
        With the head's column (float32), null without an embedding.

    Raises
    ------
    HeadError
        If the head does not exist or does not fit the embeddings, or its file is damaged or has changed.
    """
    require_columns(df, [embedding], "score_head", "make it with embed, or name yours with embedding=")
    refuse_text(df, embedding)
    found = resolve_head(head)
    name = column or found.column
    if name in COLUMNS and COLUMNS[name].type != pa.float32():
        raise ValueError(f"column={name!r} cannot be used for a score: choose another name, such as 'my_score'")
    use = OwnHeadUse(found, embedding, name)
    return apply_step(df, own_head_partition, use, pa.schema([(name, pa.float32())]), [use.embedding])
