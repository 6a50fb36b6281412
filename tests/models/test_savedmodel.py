"""The SavedModel reader, on the published files and on files that a small writer here makes."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dask_imgcurator.models import savedmodel
from dask_imgcurator.models.savedmodel import AutoKerasHead, SavedModelError, read_autokeras

PUBLISHED = [
    ("clip_autokeras_binary_nsfw.zip", "laion_nsfw_vit_l_14.npz", [180, 316, 413, 440, 644]),
    ("clip_autokeras_nsfw_b32.zip", "laion_nsfw_vit_b_32.npz", [92, 133, 312]),
]


@pytest.mark.parametrize(("published", "converted", "columns"), PUBLISHED)
def test_equals_the_checked_conversion(shared: Path, published: str, converted: str, columns: list[int]) -> None:
    head = read_autokeras((shared / "weights" / "nsfw" / published).read_bytes())
    with np.load(shared / "weights" / "nsfw" / converted) as expected:
        assert head.mean.dtype == head.variance.dtype == np.float32
        np.testing.assert_array_equal(head.mean, expected["norm_mean"])
        np.testing.assert_array_equal(head.variance, expected["norm_variance"])
        assert len(head.layers) == sum(name.endswith("_kernel") for name in expected.files)
        for number, (kernel, bias) in enumerate(head.layers):
            assert kernel.dtype == bias.dtype == np.float32
            np.testing.assert_array_equal(kernel, expected[f"dense{number}_kernel"])
            np.testing.assert_array_equal(bias, expected[f"dense{number}_bias"])
        assert [v.column for v in head.vocabularies] == expected["int_cols"].tolist() == columns
        for vocabulary in head.vocabularies:
            assert list(vocabulary.texts) == expected[f"vocab_{vocabulary.column}"].tolist()
            np.testing.assert_array_equal(vocabulary.ranks, expected[f"index_{vocabulary.column}"])


# --- a writer, after the formats' own documentation ---------------------------------------------------------


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def shape(array: np.ndarray) -> bytes:
    return b"".join(field(2, field(1, side)) for side in array.shape)


def table(entries: dict[str, bytes], per_block: int) -> bytes:
    """LevelDB's table: data blocks with shared key prefixes, an empty meta index, an index, a footer."""

    def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
        out, last = b"", b""
        for key, value in pairs:
            same = next(
                (i for i, (a, b) in enumerate(zip(key, last, strict=False)) if a != b),
                min(map(len, (key, last))),
            )
            out += varint(same) + varint(len(key) - same) + varint(len(value)) + key[same:] + value
            last = key
        return out + (0).to_bytes(4, "little") + (1).to_bytes(4, "little")

    data, handles = b"", []
    pairs = sorted((k.encode(), v) for k, v in entries.items())
    for start in range(0, len(pairs), per_block):
        chunk = block(pairs[start : start + per_block])
        handles.append((pairs[min(start + per_block, len(pairs)) - 1][0], varint(len(data)) + varint(len(chunk))))
        data += chunk + bytes(5)
    footer = b""
    for chunk in (block([]), block(handles)):
        footer += varint(len(data)) + varint(len(chunk))
        data += chunk + bytes(5)
    return data + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def members(head: AutoKerasHead, per_block: int = 3, packed: bool = True) -> dict[str, bytes]:
    """Write a head as the members of a SavedModel."""
    variables = {"layer_with_weights-1/mean": head.mean, "layer_with_weights-1/variance": head.variance}
    variables["layer_with_weights-1/count"] = np.array(7, np.int64)
    variables["optimizer/iter"] = np.array(7, np.int64)
    # From 2 to 11: sorted as texts, the last layer would come first.
    numbers = [*range(2, 1 + len(head.layers)), 11]
    for number, (kernel, bias) in zip(numbers, head.layers, strict=True):
        variables[f"layer_with_weights-{number}/kernel"] = kernel
        variables[f"layer_with_weights-{number}/bias"] = bias
    index, values = {"": field(1, 1)}, b""
    for name, array in variables.items():
        proto = field(1, 1 if array.dtype == np.float32 else 9) + field(2, shape(array))
        proto += field(4, len(values)) + field(5, array.nbytes) + varint(6 << 3 | 5) + b"\1\2\3\4"
        index[f"{name}/.ATTRIBUTES/VARIABLE_VALUE"] = proto
        values += array.tobytes()

    objects, functions, graph = [], b"", field(1, field(1, "input") + field(2, "Placeholder"))

    def add(children: dict[str, int] | None = None, rest: bytes = b"") -> int:
        links = (field(1, (field(1, n) if n else b"") + field(2, name)) for name, n in (children or {}).items())
        objects.append(b"".join(links) + rest)
        return len(objects) - 1

    def constant(name: str, tensor: bytes) -> int:
        nonlocal graph
        value = field(5, field(1, "value") + field(2, field(8, tensor)))
        graph += field(1, field(1, name) + field(2, "Const") + value)
        return add(rest=field(9, field(1, name)))

    root = add()
    layers: dict[str, int] = {"0": add()}
    for v in head.vocabularies:
        texts = field(1, 7) + field(2, field(2, field(1, len(v.texts)))) + b"".join(field(8, t) for t in v.texts)
        ranks = field(1, 9) + field(2, shape(v.ranks)) + field(4, v.ranks.tobytes())
        handle, keys = add(), constant(f"keys{v.column}", texts)
        captured = [handle, keys, constant(f"ranks{v.column}", ranks)]
        initialize = add(rest=field(6, field(1, f"init{v.column}")))
        lookup = add({"_initialize": initialize})
        layers[str(v.column)] = add({"lookup_table": lookup})
        inputs = field(2, b"".join(map(varint, captured))) if packed else b"".join(field(2, n) for n in captured)
        functions += field(2, field(1, f"init{v.column}") + field(2, inputs))
    encoding = add({"encoding_layers": add(layers)})
    objects[root] = field(1, field(1, encoding) + field(2, "layer_with_weights-0"))
    tree = b"".join(field(1, o) for o in objects) + functions
    return {
        "m/saved_model.pb": field(1, 1) + field(2, field(2, graph) + field(7, tree)),
        "m/variables/variables.index": table(index, per_block),
        "m/variables/variables.data-00000-of-00001": values,
    }


def packed_up(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def made_up(width: int = 6, hidden: int = 4) -> AutoKerasHead:
    rng = np.random.default_rng(0)

    def floats(*sides: int) -> np.ndarray:
        return rng.normal(size=sides).astype(np.float32)

    layers = ((floats(width, hidden), floats(hidden)), (floats(hidden, hidden), floats(hidden)))
    vocabularies = (
        savedmodel.Vocabulary(1, ("-0.500000", "0.250000", "0.125000"), np.array([1, 2, 3])),
        savedmodel.Vocabulary(5, ("0.000000",), np.array([300])),
    )
    last = (floats(hidden, 1), floats(1))
    return AutoKerasHead(floats(width), floats(width) ** 2, (*layers, last), vocabularies)


def same(a: AutoKerasHead, b: AutoKerasHead) -> bool:
    arrays = [[h.mean, h.variance, *(x for layer in h.layers for x in layer)] for h in (a, b)]
    words = [[(v.column, v.texts, v.ranks.tolist()) for v in h.vocabularies] for h in (a, b)]
    return len(arrays[0]) == len(arrays[1]) and all(map(np.array_equal, *arrays)) and words[0] == words[1]


@pytest.mark.parametrize("per_block", [1, 3, 100])
@pytest.mark.parametrize("packed", [True, False])
def test_reads_what_was_written(per_block: int, packed: bool) -> None:
    head = made_up()
    assert same(read_autokeras(packed_up(members(head, per_block, packed), zipfile.ZIP_DEFLATED)), head)


def test_head_without_categories() -> None:
    head = made_up()
    plain = AutoKerasHead(head.mean, head.variance, head.layers, ())
    assert same(read_autokeras(packed_up(members(plain))), plain)


# --- files that are not right -------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x05\x06" + bytes(17), b"PK\x03\x04" + bytes(100)])
def test_no_zip(data: bytes) -> None:
    with pytest.raises(SavedModelError, match="zip"):
        read_autokeras(data)


@pytest.mark.parametrize("name", ["saved_model.pb", "variables.index", "variables.data-00000-of-00001"])
def test_member_missing_or_twice(name: str) -> None:
    files = members(made_up())
    key = next(k for k in files if k.endswith(name))
    with pytest.raises(SavedModelError, match=f"2 members named .*{name}"):
        read_autokeras(packed_up({**files, "other/" + key: files[key]}))
    del files[key]
    with pytest.raises(SavedModelError, match=f"0 members named .*{name}"):
        read_autokeras(packed_up(files))


def test_member_that_unpacks_to_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    files = members(made_up())
    monkeypatch.setattr(savedmodel, "MAX_MEMBER", len(files["m/saved_model.pb"]) - 1)
    with pytest.raises(SavedModelError, match=r"saved_model\.pb is \d+ bytes, more than"):
        read_autokeras(packed_up(files, zipfile.ZIP_DEFLATED))


def test_compression_other_than_deflate() -> None:
    with pytest.raises(SavedModelError, match="compressed by method"):
        read_autokeras(packed_up(members(made_up()), zipfile.ZIP_LZMA))


def test_misfits() -> None:
    head = made_up()
    cases = {
        "normalisation": AutoKerasHead(head.mean[:5], head.variance, head.layers, head.vocabularies),
        "dense layer 2": AutoKerasHead(head.mean[:5], head.variance[:5], head.layers, head.vocabularies),
        "expected one output": AutoKerasHead(head.mean, head.variance, head.layers[:2], head.vocabularies),
        "column 6 of 6": AutoKerasHead(
            head.mean, head.variance, head.layers, (savedmodel.Vocabulary(6, ("0.100000",), np.array([1])),)
        ),
        "some twice": AutoKerasHead(
            head.mean,
            head.variance,
            head.layers,
            (savedmodel.Vocabulary(0, ("0.1", "0.1"), np.array([1, 2])),),
        ),
        "without a rank": AutoKerasHead(
            head.mean, head.variance, head.layers, (savedmodel.Vocabulary(0, ("0.1", "0.2"), np.array([1])),)
        ),
    }
    for says, wrong in cases.items():
        with pytest.raises(SavedModelError, match=says):
            read_autokeras(packed_up(members(wrong)))


def test_every_truncation_is_an_error() -> None:
    """An index or data file cut anywhere is noticed; a graph too, but not at every boundary of fields."""
    files = members(made_up())
    for name, data in files.items():
        for length in range(0, len(data), 7 if name.endswith(".pb") else 1):
            broken = packed_up({**files, name: data[:length]})
            try:
                head = read_autokeras(broken)
            except SavedModelError:
                continue
            assert name.endswith(".pb"), f"{name} cut to {length} of {len(data)} bytes was read"
            assert same(head, made_up())


def test_damage_raises_nothing_else() -> None:
    """Random damage, also to the zip itself, is read or is a SavedModelError: never another exception."""
    rng = np.random.default_rng(1)
    files = members(made_up())
    whole = packed_up(files, zipfile.ZIP_DEFLATED)
    refused = 0
    for round_ in range(1500):
        name = list(files)[round_ % 2]
        data = bytearray(whole if round_ % 3 == 0 else files[name])
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(0, 256)
        try:
            read_autokeras(bytes(data) if round_ % 3 == 0 else packed_up({**files, name: bytes(data)}))
        except SavedModelError:
            refused += 1
    assert 500 < refused < 1500
