"""LAION's NSFW heads: AutoKeras models in TensorFlow's SavedModel format, read and computed without TensorFlow.

Reading executes nothing: three byte formats are parsed into arrays and strings.

- ``saved_model.pb`` is a protobuf message: the graph's constants, and a tree of named objects. The tree says
  which constants fill the lookup table of which column.
- ``variables/variables.index`` is an uncompressed table in LevelDB's format, from a variable's path in that
  tree to a ``BundleEntryProto`` (type, shape, and where its bytes are).
- ``variables/variables.data-00000-of-00001`` holds those bytes.

The checksums inside the formats (CRC-32C) are ignored: `dask_imgcurator.models.weights` has verified the sha256 of the
whole file.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

#: Larger members are refused before they are unpacked; the published ones are smaller than 4 MiB.
MAX_MEMBER = 64 << 20

_VARIABLE = re.compile(r"layer_with_weights-([0-9]{1,4})/([a-z_]+)/\.ATTRIBUTES/VARIABLE_VALUE")
_COLUMN = re.compile(r"[0-9]{1,6}")
_TABLE_MAGIC = 0xDB4775248B80FB57
_FLOAT, _STRING, _INT64 = 1, 7, 9  # tensorflow.DataType


class SavedModelError(ValueError):
    """The bytes are not a SavedModel of the supported kind."""


@dataclass(frozen=True)
class Vocabulary:
    """The lookup table of one categorical column: strings as ``"%f"`` prints numbers, and the rank of each, from 1."""

    column: int
    texts: tuple[str, ...]
    ranks: NDArray[np.int64]


@dataclass(frozen=True)
class AutoKerasHead:
    """The numbers of an AutoKeras classifier on structured data, in float32."""

    #: Statistics of the inputs after the lookup, (width,).
    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    #: Kernel (inputs, outputs) and bias (outputs,), in order of use.
    layers: tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]
    #: By ascending column.
    vocabularies: tuple[Vocabulary, ...]


def read_autokeras(data: bytes) -> AutoKerasHead:
    """Read a zipped SavedModel of an AutoKeras structured-data classifier; `SavedModelError` for anything else."""
    model, index, values = _unzip(
        data, "saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"
    )
    variables = _variables(index, values)
    mean, variance = variables.get((1, "mean")), variables.get((1, "variance"))
    if mean is None or variance is None or mean.ndim != 1 or mean.shape != variance.shape:
        raise SavedModelError("no normalisation layer (mean and variance of one width) in variables.index")

    layers = []
    width = mean.shape[0]
    for number in sorted(n for n, name in variables if name == "kernel"):
        kernel, bias = variables[number, "kernel"], variables.get((number, "bias"))
        if bias is None or kernel.ndim != 2 or kernel.shape[0] != width or bias.shape != kernel.shape[1:]:
            raise SavedModelError(f"dense layer {number}: kernel {kernel.shape} or bias misfits its inputs")
        layers.append((kernel, bias))
        width = kernel.shape[1]
    if not layers or width != 1:
        raise SavedModelError(f"{len(layers)} dense layers, {width} outputs; expected one output")

    vocabularies = _vocabularies(model)
    for vocabulary in vocabularies:
        if vocabulary.column >= mean.shape[0]:
            raise SavedModelError(f"lookup table for column {vocabulary.column} of {mean.shape[0]}")
    return AutoKerasHead(mean, variance, tuple(layers), vocabularies)


def _unzip(data: bytes, *names: str) -> list[memoryview]:
    found = []
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in names:
                members = [m for m in archive.infolist() if ("/" + m.filename).endswith("/" + name)]
                if len(members) != 1:
                    raise SavedModelError(f"{len(members)} members named {name} in the zip, expected one")
                if members[0].file_size > MAX_MEMBER:
                    raise SavedModelError(f"{name} is {members[0].file_size} bytes, more than {MAX_MEMBER}")
                if members[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise SavedModelError(f"{name} is compressed by method {members[0].compress_type}")
                found.append(memoryview(archive.read(members[0])))
    except SavedModelError:
        raise
    # zipfile raises many kinds of errors for damaged files.
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError) as e:
        raise SavedModelError(f"not a readable zip file: {e}") from e
    return found


# --- protobuf's wire format ---------------------------------------------------------------------------------


class _Message:
    """The fields of one message by number; the caller knows the schema."""

    def __init__(self, data: memoryview) -> None:
        self._fields: dict[int, list[int | memoryview]] = defaultdict(list)
        at = 0
        while at < len(data):
            tag, at = _varint(data, at)
            number, wire = tag >> 3, tag & 7
            value: int | memoryview
            if wire == 0:
                value, at = _varint(data, at)
            else:
                if wire == 2:
                    length, at = _varint(data, at)
                elif wire in (1, 5):
                    length = 8 if wire == 1 else 4
                else:
                    raise SavedModelError(f"protobuf wire type {wire} at byte {at}")
                value, at = _slice(data, at, length), at + length
            self._fields[number].append(value)

    def blobs(self, number: int) -> list[memoryview]:
        values = self._fields.get(number, [])
        blobs = [v for v in values if isinstance(v, memoryview)]
        if len(blobs) != len(values):
            raise SavedModelError(f"protobuf field {number} holds a number, expected bytes")
        return blobs

    def texts(self, number: int) -> list[str]:
        try:
            return [str(v, "utf-8") for v in self.blobs(number)]
        except UnicodeDecodeError as error:
            raise SavedModelError(f"protobuf field {number} is no UTF-8 text") from error

    def text(self, number: int) -> str:
        return (self.texts(number) or [""])[-1]

    def messages(self, number: int) -> list[_Message]:
        return [_Message(v) for v in self.blobs(number)]

    def message(self, number: int) -> _Message:
        """Return the message in a field; a missing one reads as empty, as in protobuf."""
        return _Message((self.blobs(number) or [memoryview(b"")])[-1])

    def integers(self, number: int) -> list[int]:
        """Integers of a repeated field, packed or not."""
        numbers: list[int] = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                numbers.append(value)
                continue
            at = 0
            while at < len(value):
                one, at = _varint(value, at)
                numbers.append(one)
        return numbers

    def integer(self, number: int) -> int:
        return (self.integers(number) or [0])[-1]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the integer that begins at a byte, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise SavedModelError("data end inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise SavedModelError(f"number of more than 10 bytes before byte {at}")


def _slice(data: memoryview, at: int, length: int) -> memoryview:
    if at + length > len(data):
        raise SavedModelError(f"{length} bytes wanted at byte {at}, but there are {len(data)} in all")
    return data[at : at + length]


# --- variables: a table in LevelDB's format, and the raw tensors --------------------------------------------


def _variables(index: memoryview, values: memoryview) -> dict[tuple[int, str], NDArray[np.float32]]:
    """Float variables by number of their layer and name in it."""
    found = {}
    for key, entry in _table(index):
        match = _VARIABLE.fullmatch(key)
        if match is None:
            continue  # the checkpoint's own bookkeeping, lookup tables, the optimiser's and metrics' state
        proto = _Message(entry)
        if proto.integer(1) != _FLOAT:
            continue  # the count of examples, beside a mean and a variance
        if proto.integer(3):
            raise SavedModelError(f"{key} lies in data file {proto.integer(3)}, there is only 0")
        raw = _slice(values, proto.integer(4), proto.integer(5))
        found[int(match[1]), match[2]] = _array(raw, "<f4", proto.message(2), key).astype(np.float32)
    return found


def _table(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Keys and values of a LevelDB-style table."""
    if len(data) < 48 or int.from_bytes(data[-8:], "little") != _TABLE_MAGIC:
        raise SavedModelError("variables.index does not end as a LevelDB table does")
    footer = data[-48:]
    _, at = _handle(footer, 0)  # the meta index, which TensorFlow leaves empty
    (offset, length), _ = _handle(footer, at)
    for _, handle in _block(data, offset, length):
        yield from ((str(k, "utf-8", "replace"), v) for k, v in _block(data, *_handle(handle, 0)[0]))


def _handle(data: memoryview, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    length, at = _varint(data, at)
    return (offset, length), at


def _block(data: memoryview, offset: int, length: int) -> Iterator[tuple[bytes, memoryview]]:
    if _slice(data, offset, length + 1)[length] != 0:
        raise SavedModelError("variables.index is compressed, which TensorFlow never does")
    block = data[offset : offset + length]
    restarts = int.from_bytes(_slice(block, max(length - 4, 0), 4), "little")
    end = length - 4 * (restarts + 1)
    if end < 0:
        raise SavedModelError(f"{restarts} restart points in a block of {length} bytes")
    key, at = b"", 0
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        size, at = _varint(block, at)
        if shared > len(key) or at + fresh + size > end:
            raise SavedModelError(f"damaged entry before byte {at} of a block of {length} bytes")
        key = key[:shared] + bytes(block[at : at + fresh])
        yield key, block[at + fresh : at + fresh + size]
        at += fresh + size


def _array(raw: memoryview, dtype: str, shape: _Message, what: str) -> NDArray[np.generic]:
    sides = [dim.integer(1) for dim in shape.messages(2)]
    if 0 in sides or len(sides) > 8 or prod(sides) * np.dtype(dtype).itemsize != len(raw):
        raise SavedModelError(f"{what}: shape {sides} does not fit {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(sides)


# --- lookup tables: from the object graph to the constants --------------------------------------------------


def _vocabularies(model: memoryview) -> tuple[Vocabulary, ...]:
    """Follow ``encoding_layers/<column>/lookup_table/_initialize`` to the two constants it captures."""
    meta_graphs = _Message(model).messages(2)
    if len(meta_graphs) != 1:
        raise SavedModelError(f"{len(meta_graphs)} meta graphs in saved_model.pb, expected one")
    graph = {node.text(1): node for node in meta_graphs[0].message(2).messages(1)}
    objects = meta_graphs[0].message(7)
    nodes = objects.messages(1)
    functions = {entry.text(1): entry.message(2) for entry in objects.messages(2)}

    def node(number: int) -> _Message:
        if number >= len(nodes):
            raise SavedModelError(f"object {number} of {len(nodes)}")
        return nodes[number]

    def children(of: _Message) -> dict[str, int]:
        return {child.text(2): child.integer(1) for child in of.messages(1)}

    def descend(at: _Message, *path: str) -> _Message:
        for name in path:
            below = children(at)
            if name not in below:
                raise SavedModelError(f"no {'/'.join(path)} among the model's objects")
            at = node(below[name])
        return at

    def constant(number: int) -> _Message:
        name = node(number).message(9).text(1)  # SavedConstant.operation
        attributes = {a.text(1): a.message(2) for a in graph[name].messages(5)} if name in graph else {}
        if "value" not in attributes:
            raise SavedModelError(f"object {number} names {name!r}, which is no constant of the graph")
        return attributes["value"].message(8)  # AttrValue.tensor

    found = []
    layers = descend(node(0), "layer_with_weights-0", "encoding_layers")
    for name, number in children(layers).items():
        below = children(node(number))
        if not _COLUMN.fullmatch(name) or "lookup_table" not in below:
            continue  # numeric columns pass through
        initialize = descend(node(number), "lookup_table", "_initialize").message(6).texts(1)
        captured = functions[initialize[0]].integers(2) if initialize and initialize[0] in functions else []
        if len(captured) != 3:
            raise SavedModelError(f"column {name}: the lookup table is not filled from two constants")
        texts, ranks = constant(captured[1]), constant(captured[2])
        if texts.integer(1) != _STRING or ranks.integer(1) != _INT64:
            raise SavedModelError(f"column {name}: the lookup table is not from texts to 64-bit integers")
        keys = tuple(texts.texts(8))
        raw = (ranks.blobs(4) or [memoryview(b"")])[-1]
        values = _array(raw, "<i8", ranks.message(2), f"ranks of column {name}").astype(np.int64)
        if values.shape != (len(keys),) or len(set(keys)) != len(keys):
            raise SavedModelError(f"column {name}: {len(keys)} texts, some twice or without a rank")
        found.append(Vocabulary(int(name), keys, values))
    return tuple(sorted(found, key=lambda v: v.column))


# --- what a head computes -----------------------------------------------------------------------------------


def scorer(head: AutoKerasHead, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a head as a function from float32 (n, width) to scores (n,)."""
    import torch

    mean = torch.from_numpy(head.mean).to(device)
    scale = torch.from_numpy(head.variance).sqrt().clamp(min=1e-7).to(device)
    layers = [tuple(torch.from_numpy(a).to(device) for a in layer) for layer in head.layers]
    lookups = [(v.column, ranks(v.texts, v.ranks, device)) for v in head.vocabularies]

    def score(x: torch.Tensor) -> torch.Tensor:
        columns = {column: lookup(x[:, column]) for column, lookup in lookups}
        x = x.clone()
        for column, rank in columns.items():
            x[:, column] = rank.float()
        x = (x - mean) / scale
        for kernel, bias in layers[:-1]:
            x = torch.addmm(bias, x, kernel).relu()
        kernel, bias = layers[-1]
        return torch.addmm(bias, x, kernel)[:, 0].sigmoid()

    return score


#: ``"%f"`` of a finite number.
_PRINTED = re.compile(r"-?[0-9]{1,12}\.[0-9]{6}")

#: Integers that represent the text "-0.000000" and numbers too large for any text of a vocabulary.
_MINUS_ZERO, _FAR = -(1 << 62), 1 << 61


def ranks(
    texts: Sequence[str], values: NDArray[np.int64], device: str = "cpu"
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a lookup of float32 numbers in a vocabulary by their printed text; 0 for those that are not in it.

    AutoKeras looks ``"%f" % x`` up in a table of strings. Here each string becomes an integer, in millionths, and so
    does each number, on the device: a float32 has 24 significant bits, and a million is a 14-bit number times a power
    of two, so their product is exact in double precision, and rounding it half to even does what ``"%f"`` does.
    "-0.000000" and "0.000000" differ.
    """
    import torch

    if not texts:
        return lambda x: torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    strange = [t for t in texts if not _PRINTED.fullmatch(t)]
    if strange:
        raise SavedModelError(f"{strange[0]!r} in the vocabulary is no finite number as printed by %f")
    codes = np.array([_MINUS_ZERO if t == "-0.000000" else int(t.replace(".", "")) for t in texts], np.int64)
    order = np.argsort(codes)
    keys = torch.from_numpy(codes[order]).to(device)
    found = torch.from_numpy(np.asarray(values, np.int64)[order]).to(device)

    def lookup(x: torch.Tensor) -> torch.Tensor:
        code = (x.double() * 1e6).round().clamp(-_FAR, _FAR).long()
        code = torch.where((code == 0) & x.signbit(), _MINUS_ZERO, code)
        at = torch.searchsorted(keys, code).clamp(max=len(keys) - 1)
        return torch.where(keys[at] == code, found[at], 0)

    return lookup
