"""A user's own heads, applied: one partition in, one partition out. Their files are `head_files`' business."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..engine.backend import backend_of
from ..models import heads
from ..models.head_files import Activation, HeadFile, Output, parse, read_bytes, read_head
from ..models.heads import HeadError

if TYPE_CHECKING:
    import torch

__all__ = ["OwnHeadUse", "own_head_partition", "resolve_head"]

#: Rows scored at a time, so that double precision costs little memory.
_BLOCK = 16_384


def resolve_head(head: str | os.PathLike[str] | HeadFile) -> HeadFile:
    """Find a head, on the client.

    Parameters
    ----------
    head : HeadFile, path, URL, or str
        A file, or the name under which a package registered one (`plugins.HEADS`): a `HeadFile`, a path, or a function
        without arguments that gives either.

    Raises
    ------
    HeadError
        If there is none, or it is one of the published heads.
    """
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
    """Which head is applied to which column.

    Attributes
    ----------
    head : HeadFile
        The head.
    embedding : str
        Column with the embeddings.
    column : str
        Column that the score goes to.
    """

    head: HeadFile
    embedding: str
    column: str


@lru_cache(maxsize=32)
def _load(head: HeadFile, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    data = read_bytes(head.path)
    found = hashlib.sha256(data).hexdigest()
    if found != head.sha256:
        raise HeadError(
            f"head {head.path} has sha256 {found} on {os.uname().nodename}, {head.sha256} when it was read first: "
            "it was changed, or another file lies there; read it again"
        )
    _, layers = parse(data, head.path)
    return [(torch.from_numpy(w).to(device), torch.from_numpy(b).to(device)) for w, b in layers]


def _function(name: Activation | Output) -> Any:
    import torch

    if name in ("none", "identity"):
        return lambda x: x
    return getattr(torch.nn.functional if name in ("gelu", "silu") else torch, name)


def own_head_partition(frame: Any, use: OwnHeadUse) -> Any:
    """Apply a user's head to the embeddings of a partition.

    Parameters
    ----------
    frame : pandas or cuDF DataFrame
        With an embedding column of any origin. Embeddings are used as they are (those of `embed` have unit length).
    use : OwnHeadUse
        The head and the columns.

    Returns
    -------
    frame
        With the head's column, float32; null where there is no embedding or the result is not a number.

    Raises
    ------
    HeadError
        If the head takes embeddings of another width, or its file is not here or not the same.
    """
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
        layers = _load(use.head, backend.device)
        activation, output = _function(use.head.activation), _function(use.head.output)
        parts = []
        with torch.inference_mode():
            for block in values.split(_BLOCK):
                # In double precision: a row's score then depends neither on the batch it came in nor on TF32.
                x = block.double()
                for i, (weight, bias) in enumerate(layers):
                    x = torch.nn.functional.linear(activation(x) if i else x, weight, bias)
                parts.append(output(x[:, 0]).float())
        scores = torch.cat(parts)
    return frame.assign(**{use.column: backend.float_column(scores, rows, frame.index)})
