"""Files of a user's own heads: layers and a spec; ``docs/own_heads.md`` shows how to make one.

A head is one linear layer or several with an activation between (an MLP), and gives one number per row. Its file is a
safetensors file: tensors ``layers.0.weight`` (out, in), ``layers.0.bias`` (out,), ``layers.1.weight`` and so on, as
``torch.nn.Linear`` has them, and the fields of the spec as JSON under ``imgcurator_head`` in the metadata. Loading one
runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import plugins
from ..schema import COLUMNS
from ..storage import files
from .heads import HeadError, Layers, read_pth

Activation = Literal["none", "relu", "gelu", "silu", "tanh", "sigmoid"]
Output = Literal["identity", "sigmoid"]

#: Entry in the metadata of a head's file.
_KEY = "imgcurator_head"

#: Columns of the table that a head may fill.
_SCORES = {name for name in COLUMNS if name.endswith("_score")}


@dataclass(frozen=True)
class HeadFile:
    """A head in a file: everything that determines its scores.

    Attributes
    ----------
    name : str
        Name for errors and the provenance.
    column : str
        Column that it fills.
    width : int
        Width of its input embeddings.
    activation : {"none", "relu", "gelu", "silu", "tanh", "sigmoid"}
        Activation between layers (``gelu`` is the exact one).
    output : {"identity", "sigmoid"}
        After the last layer.
    embedder : str
        Model whose embeddings it was fitted to, for people to read.
    path : str
        The file: any absolute fsspec URL.
    sha256 : str
        Hash of the file, hexadecimal.
    """

    name: str
    column: str
    width: int
    activation: Activation
    output: Output
    embedder: str
    path: str
    sha256: str


def save_head(
    path: str | os.PathLike[str],
    layers: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    column: str,
    name: str | None = None,
    activation: Activation = "none",
    output: Output = "identity",
    embedder: str = "",
) -> HeadFile:
    """Write a head to a file.

    Parameters
    ----------
    path : path
        Ends in ``.safetensors``; an existing file is replaced.
    layers : sequence of (weight, bias)
        Weight (out, in) and bias (out,) of each layer, first to last, stored as float32; the last one's out is 1.
        scikit-learn's ``coef_`` and ``intercept_`` of a binary or single-output model are such a pair.
    column : str
        Column that it fills, ``my_score`` for example.
    name : str, optional
        Name of the head; by default the file's.
    activation : {"none", "relu", "gelu", "silu", "tanh", "sigmoid"}
        Between layers.
    output : {"identity", "sigmoid"}
        After the last layer; ``sigmoid`` makes a probability of a logit.
    embedder : str
        Model whose embeddings it was fitted to; for information, not checked.

    Returns
    -------
    HeadFile
        As `read_head` returns it.

    Raises
    ------
    HeadError
        If the layers do not fit each other, a number is not finite, or a setting is unknown.
    """
    from safetensors.numpy import save

    file = Path(path)
    if file.suffix != ".safetensors":
        raise HeadError(f"{file}: a head's file ends in .safetensors")
    arrays = [_layer(i, weight, bias) for i, (weight, bias) in enumerate(layers)]
    given = {"name": name or file.stem, "column": column, "width": _width(arrays, str(file))}
    about = _spec({**given, "activation": activation, "output": output, "embedder": embedder}, str(file))
    tensors: dict[str, NDArray[np.float32]] = {}
    for i, (weight, bias) in enumerate(arrays):
        tensors |= {f"layers.{i}.weight": weight.astype(np.float32), f"layers.{i}.bias": bias.astype(np.float32)}
    data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, {_KEY: json.dumps(about)})
    with files.write_whole(str(file)) as sink:
        sink.write(data)
    return read_head(file)


def convert_pth(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    activation: Activation,
    column: str,
    name: str | None = None,
    output: Output = "identity",
    embedder: str = "",
) -> HeadFile:
    """Turn a ``.pth`` file of linear layers into a head's file.

    Parameters
    ----------
    source : path
        State dict of an `torch.nn.Sequential`, or of a module with one, of ``Linear`` layers. It is read with
        ``weights_only=True``, so nothing in it is run.
    path : path
        The new file, ``.safetensors``.
    activation : {"none", "relu", "gelu", "silu", "tanh", "sigmoid"}
        Activation between layers. A state dict does not record it, so there is no default. (Dropout has no effect in
        use.)
    column, name, output, embedder
        As for `save_head`.

    Raises
    ------
    HeadError
        If it holds anything but linear layers that fit each other, such as a normalisation.
    WeightsError
        If it is not a file of plain tensors.
    """
    file = Path(source)
    layers = read_pth(file.read_bytes(), str(file))
    return save_head(
        path, layers, column=column, name=name or file.stem, activation=activation, output=output, embedder=embedder
    )


# --- checks -----------------------------------------------------------------------------------------


def _layer(number: int, weight: ArrayLike, bias: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    w, b = np.asarray(weight, np.float64), np.atleast_1d(np.asarray(bias, np.float64))
    if w.ndim != 2 or b.shape != w.shape[:1]:
        raise HeadError(
            f"layer {number} has a weight of shape {w.shape} and a bias of shape {b.shape}: "
            "they are (out, in) and (out,)"
        )
    if not (np.isfinite(w).all() and np.isfinite(b).all()):
        raise HeadError(f"layer {number} holds numbers that are not finite")
    return w, b


def _width(layers: Layers, where: str) -> int:
    """Width of a head's input embeddings; its layers must fit each other."""
    if not layers:
        raise HeadError(f"{where}: a head has at least one layer")
    width = out = layers[0][0].shape[1]
    for number, (weight, _) in enumerate(layers):
        if weight.shape[1] != out:
            raise HeadError(f"{where}: layer {number} takes {weight.shape[1]} numbers, the one before gives {out}")
        out = weight.shape[0]
    if out != 1:
        raise HeadError(f"{where}: the last layer gives {out} numbers, a head gives one")
    return int(width)


def _spec(about: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the fields of a spec."""
    kinds = {"name": str, "column": str, "width": int, "activation": str, "output": str, "embedder": str}
    wrong = [key for key, kind in kinds.items() if not isinstance(about.get(key), kind)]
    if wrong:
        raise HeadError(f"{where}: {wrong[0]} is {about.get(wrong[0])!r}, expected a {kinds[wrong[0]].__name__}")
    for key, known in (("activation", get_args(Activation)), ("output", get_args(Output))):
        if about[key] not in known:
            raise HeadError(f"{where}: {key}={about[key]!r}, there are {', '.join(known)}")
    column = about["column"]
    if not column or (column in COLUMNS and column not in _SCORES):
        raise HeadError(f"{where}: column={column!r} is not a name for a score: choose another, such as 'my_score'")
    return {key: about[key] for key in kinds}


# --- reading ----------------------------------------------------------------------------------------


def read_head(path: str | os.PathLike[str]) -> HeadFile:
    """Read the spec of a head's file, and check its layers.

    Parameters
    ----------
    path : path or URL
        As written by `save_head`. Workers read it too, so put it where all of them can see it.

    Raises
    ------
    HeadError
        If there is no such file, or it is not a head's.
    """
    url = files.absolute(path)
    data = read_bytes(url)
    about, _ = parse(data, url)
    return HeadFile(**about, path=url, sha256=hashlib.sha256(data).hexdigest())


def read_bytes(url: str) -> bytes:
    """Read a head's file; if there is none, the error names the heads that packages registered."""
    try:
        with files.opened(url) as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError) as err:
        known = ", ".join(plugins.registered(plugins.HEADS)) or "none"
        raise HeadError(
            f"no head file {url} on {os.uname().nodename}: put it where every worker can read it "
            f"(registered heads: {known})"
        ) from err


def parse(data: bytes, where: str) -> tuple[dict[str, Any], Layers]:
    """Split a head's file into the fields of its spec and its layers."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
        # The header's length, then the header: https://huggingface.co/docs/safetensors (Format).
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"][_KEY])
    except (SafetensorError, KeyError, ValueError) as err:
        raise HeadError(
            f"{where} is not a head's file: write one with save_head ({type(err).__name__}: {err})"
        ) from err
    if not isinstance(about, dict):
        raise HeadError(f"{where}: {_KEY} in its metadata is no mapping")
    about = _spec(about, where)
    layers: Layers = []
    while f"layers.{len(layers)}.weight" in tensors:
        n = len(layers)
        layers.append(_layer(n, tensors[f"layers.{n}.weight"], tensors.get(f"layers.{n}.bias", np.empty(0))))
    if 2 * len(layers) != len(tensors) or _width(layers, where) != about["width"]:
        raise HeadError(f"{where} holds {', '.join(sorted(tensors))}, which are not the layers of its spec {about}")
    return about, layers


def provenance(head: HeadFile) -> dict[str, Any]:
    """Return what identifies a head's output: its spec and the sha256 of its file, but not the file's location."""
    return {key: value for key, value in asdict(head).items() if key != "path"}
