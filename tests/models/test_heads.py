"""Heads against the published models' outputs, and against plain arithmetic where those are missing."""

from __future__ import annotations

import io
import math
import os
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from dask.base import tokenize

from dask_imgcurator.models import heads
from dask_imgcurator.models.heads import HEADS, HeadError, for_model, load_head, named, provenance, resolve
from dask_imgcurator.models.savedmodel import AutoKerasHead, SavedModelError, Vocabulary, ranks, scorer
from dask_imgcurator.models.weights import WeightsError

STARTER = Path(heads.__file__).parents[1] / "data" / "starter.npz"


def unit(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32))
    return x / x.norm(dim=1, keepdim=True)


# --- published outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "reference"),
    [
        ("aesthetic-v1-b32", "aesthetic_vit_b_32_ratings.npz", "aesthetic_v1"),
        ("aesthetic-v1-l14", "aesthetic_vit_l_14_ratings.npz", "aesthetic_v1"),
        ("aesthetic-v2-l14", "aesthetic_vit_l_14_ratings.npz", "aesthetic_v2"),
    ],
)
def test_aesthetic_ratings(shared: Path, name: str, file: str, reference: str) -> None:
    with np.load(shared / "refs" / file) as refs:
        scores = load_head(HEADS[name], str(shared / "weights"))(torch.from_numpy(refs["x"]))
        assert scores.dtype == torch.float32
        np.testing.assert_allclose(scores.numpy(), refs[reference], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "model"), [("nsfw-l14", "vit_l_14"), ("nsfw-b32", "vit_b_32")])
def test_nsfw_equals_keras(shared: Path, name: str, model: str) -> None:
    with np.load(shared / "refs" / f"nsfw_{model}_keras.npz") as refs:
        scores = load_head(HEADS[name], str(shared / "weights"))(torch.from_numpy(refs["x"]))
        np.testing.assert_allclose(scores.numpy(), refs["nsfw"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["nsfw-l14", "nsfw-b32"])
def test_nsfw_rounds_to_float16_first(shared: Path, name: str) -> None:
    x = unit(500, HEADS[name].width)
    rounding = load_head(HEADS[name], str(shared / "weights"), round_to="float16")(x)
    plain = load_head(HEADS[name], str(shared / "weights"))
    rounded = torch.from_numpy(x.numpy().astype(np.float16).astype(np.float32))
    assert torch.equal(rounding, plain(rounded))
    assert (rounding - plain(x)).abs().max() > 1e-4  # or rounding would not matter, and nothing be shown


def test_v2_is_one_affine_map(shared: Path) -> None:
    path = shared / "weights" / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth"
    weight, bias = heads._collapse(heads.read_pth(path.read_bytes(), path.name))
    assert bias == pytest.approx(5.236646, abs=1e-6)
    assert np.linalg.norm(weight) == pytest.approx(17.99562, abs=1e-5)


def test_v2_layer_by_layer(shared: Path) -> None:
    """The five layers run one after the other, as the authors' code does."""
    path = shared / "weights" / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    x = unit(100, 768)
    y = x
    for n in 0, 2, 4, 6, 7:
        y = torch.nn.functional.linear(y, state[f"layers.{n}.weight"], state[f"layers.{n}.bias"])
    scores = load_head(HEADS["aesthetic-v2-l14"], str(shared / "weights"))(x)
    torch.testing.assert_close(scores, y[:, 0], rtol=0, atol=1e-5)


def test_provenance(shared: Path) -> None:
    sums = dict(reversed(row.split()) for row in (shared / "weights/SHA256SUMS").read_text().splitlines())
    found = provenance(HEADS["nsfw-b32"])
    assert found["name"] == "nsfw-b32"
    assert found["sha256"] == sums["nsfw/clip_autokeras_nsfw_b32.zip"]
    assert found["source"] == "https://github.com/LAION-AI/CLIP-based-NSFW-Detector"


# --- the lookup of categorical columns ----------------------------------------------------------------------


def check_lookup(x: np.ndarray, device: str = "cpu") -> int:
    """Compare with Python's ``%f``: all texts known, every second one, none; return how many texts."""
    printed = [f"{v:f}" for v in x.tolist()]
    texts = sorted({t for t in printed if len(t) <= 19})
    for known in texts, texts[::2], ["123.456789"]:
        values = np.random.default_rng(0).permutation(len(known)) + 1
        table = dict(zip(known, values.tolist(), strict=True))
        found = ranks(known, values, device)(torch.from_numpy(x).to(device)).cpu().tolist()
        assert found == [table.get(t, 0) for t in printed]
    return len(texts)


def all_float16() -> np.ndarray:
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return x[np.isfinite(x)].astype(np.float32)


def test_lookup_of_every_float16() -> None:
    assert check_lookup(all_float16()) > 40_000


def test_lookup_of_float32() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    bits = bits[np.isfinite(bits)]
    near = rng.normal(scale=0.05, size=200_000).astype(np.float32)
    # Odd multiples of 1/128 lie exactly half way between two texts; half a millionth does so nearly.
    odd = np.arange(-2001, 2002, 2, dtype=np.float32)
    halves = np.concatenate([odd / 128, odd / 128 / 15625, odd * np.float32(0.5e-6)])
    steps = np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, np.float32(-np.inf))
    ends = np.array([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 99999997952.0], np.float32)
    check_lookup(np.concatenate([bits, near, halves, *steps, ends]))


def test_lookup_tells_the_zeros_apart() -> None:
    lookup = ranks(["-0.000000", "0.000000"], np.array([4, 9]))
    assert lookup(torch.tensor([0.0, -0.0, 1e-7, -1e-7, 1e-6])).tolist() == [9, 4, 9, 4, 0]


@pytest.mark.parametrize("text", ["nan", "[UNK]", "0.5", "1e-3", " 0.500000", "inf", ""])
def test_lookup_refuses_other_texts(text: str) -> None:
    with pytest.raises(SavedModelError, match="no finite number"):
        ranks(["0.100000", text], np.array([1, 2]))


def test_autokeras_by_hand() -> None:
    """Two categorical columns, one variance of zero, one hidden layer: in Python's own numbers."""
    rng = np.random.default_rng(3)
    mean = np.array([0.1, 2.0, -0.2, 5.0], np.float32)
    variance = np.array([0.04, 4.0, 0.0, 9.0], np.float32)
    layers = [
        (rng.normal(size=sides).astype(np.float32), np.full(sides[1], 0.5, np.float32)) for sides in ((4, 3), (3, 1))
    ]
    layers[0][0][2] *= 1e-7  # against the variance of zero
    tables = {1: {"0.250000": 7, "-0.500000": 2}, 3: {"0.500000": 3}}
    vocabularies = tuple(Vocabulary(c, tuple(t), np.array([*t.values()])) for c, t in tables.items())
    x = np.array([[0.5, 0.25, -0.2, 0.5], [0.1, -0.5, -0.2000001, 0.25], [0.3, 0.26, 0.0, -0.5]], np.float32)

    expected = []
    for row in x:
        values = [tables[c].get(f"{v:f}", 0) if c in tables else float(v) for c, v in enumerate(row)]
        z = [(v - float(m)) / max(float(s) ** 0.5, 1e-7) for v, m, s in zip(values, mean, variance, strict=True)]
        hidden = [max(0.0, float(np.dot(z, k)) + float(b)) for k, b in zip(layers[0][0].T, layers[0][1], strict=True)]
        logit = float(np.dot(hidden, layers[1][0][:, 0])) + float(layers[1][1][0])
        expected.append(1 / (1 + math.exp(-logit)))

    given = torch.from_numpy(x.copy())
    scores = scorer(AutoKerasHead(mean, variance, tuple(layers), vocabularies), "cpu")(given)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)
    assert len({round(e, 2) for e in expected}) == 3
    np.testing.assert_array_equal(given.numpy(), x)  # the caller's embeddings are not written to


# --- what a loaded head does with its rows ------------------------------------------------------------------


def affine_head(width: int = 8) -> tuple[heads.Head, np.ndarray]:
    w = np.random.default_rng(5).normal(size=width)
    spec = replace(HEADS["aesthetic-v2-l14"], name="made-up", width=width)
    return heads.Head(spec, "cpu", None, heads._affine(w, 5.0, "cpu")), w


def test_each_row_gets_its_own_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_BLOCK", 7)
    head, w = affine_head()
    x = unit(40, 8)
    scores = head(x)
    np.testing.assert_allclose(scores.numpy(), x.numpy().astype(np.float64) @ w + 5, rtol=1e-6)
    order = torch.from_numpy(np.random.default_rng(0).permutation(40))
    assert torch.equal(head(x[order]), scores[order])
    assert torch.equal(torch.cat([head(row[None]) for row in x]), scores)


def test_no_rows() -> None:
    scores = affine_head()[0](torch.zeros(0, 8))
    assert scores.shape == (0,)
    assert scores.dtype == torch.float32


def test_half_precision_embeddings() -> None:
    head, _ = affine_head()
    x = unit(10, 8).half()
    assert torch.equal(head(x), head(x.float()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_row_that_is_not_finite_costs_itself_only(bad: float) -> None:
    head, _ = affine_head()
    x = unit(5, 8)
    expected = head(x)
    x[2, 3] = bad
    scores = head(x)
    assert scores.isnan().tolist() == [False, False, True, False, False]
    kept = [0, 1, 3, 4]
    assert torch.equal(scores[kept], expected[kept])


@pytest.mark.parametrize(("factor", "norm"), [(10.0, "10"), (0.0, "0"), (0.25, "0.25")])
def test_embeddings_that_are_not_normalised(monkeypatch: pytest.MonkeyPatch, factor: float, norm: str) -> None:
    monkeypatch.setattr(heads, "_BLOCK", 2)
    head, _ = affine_head()
    x = torch.eye(8)
    x[3] *= factor
    with pytest.raises(HeadError, match=rf"made-up takes L2-normalised .* row 3 has norm {norm} .*divide each"):
        head(x)
    x[3] = torch.nan
    head(x)  # the others were fine


def test_embeddings_of_another_shape_kind_or_place() -> None:
    head, _ = affine_head()
    for x in torch.zeros(3, 9), torch.zeros(8), torch.zeros(3, 8, dtype=torch.int64):
        with pytest.raises(HeadError, match=r"takes floating embeddings of shape \(rows, 8\)"):
            head(x)
    with pytest.raises(HeadError, match="is on cpu, the embeddings are on meta"):
        head(torch.zeros(3, 8, device="meta"))


def test_layers_collapse_in_order() -> None:
    """Keys as in the v2 file: layer 10 comes after layer 2, and numbers are left out."""
    rng = np.random.default_rng(0)
    sizes = [6, 5, 4, 1]
    layers = [(rng.normal(size=(b, a)), rng.normal(size=b)) for a, b in pairwise(sizes)]
    state = {}
    for number, (w, b) in zip((10, 2, 0), reversed(layers), strict=True):
        state |= {f"layers.{number}.bias": b, f"layers.{number}.weight": w}
    weight, bias = heads._collapse(heads.linear_layers(state, "made here"))
    x = rng.normal(size=6)
    y = x
    for w, b in layers:
        y = w @ y + b
    assert weight @ x + bias == pytest.approx(y[0], rel=1e-12)


# --- loading ------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, how: str) -> None:
    trap = tmp_path / "trap"
    out = io.BytesIO()
    if how == "torch":
        torch.save({"weight": torch.zeros(1, 4), "bias": Malicious(trap)}, out)
    else:
        pickle.dump(Malicious(trap), out)
    with pytest.raises(WeightsError, match=r"evil\.pth is not a file of plain tensors"):
        heads.read_pth(out.getvalue(), "evil.pth")
    assert not trap.exists()

    # Under the name of a published file it does not even get that far.
    name = HEADS["aesthetic-v1-b32"].weights.filename  # type: ignore[union-attr]
    (tmp_path / name).write_bytes(out.getvalue())
    with pytest.raises(WeightsError, match="sha256"):
        load_head(HEADS["aesthetic-v1-b32"], str(tmp_path))
    assert not trap.exists()
    # And a trap it is.
    out.seek(0)
    torch.load(out, weights_only=False) if how == "torch" else pickle.load(out)
    assert trap.is_dir()


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\x03\x04" + bytes(50)])
def test_damaged_tensor_file(data: bytes) -> None:
    with pytest.raises(WeightsError, match="plain tensors"):
        heads.read_pth(data, "x.pth")


def test_loaded_once_for_each_set_of_arguments(shared: Path, tmp_path: Path) -> None:
    folder = str(shared / "weights")
    first = load_head(HEADS["nsfw-b32"], folder, round_to="float16")
    assert load_head(HEADS["nsfw-b32"], folder, "cpu", "float16") is first
    other = load_head(HEADS["nsfw-b32"], folder)
    assert other is not first
    assert (first.round_to, other.round_to) == ("float16", None)
    # A cached head does not hide that a folder is missing, or that a file is another one.
    with pytest.raises(WeightsError, match="is not a folder"):
        load_head(HEADS["nsfw-b32"], str(tmp_path / "nowhere"), round_to="float16")
    file = HEADS["nsfw-b32"].weights
    assert file is not None
    with pytest.raises(WeightsError, match="sha256"):
        load_head(replace(HEADS["nsfw-b32"], weights=replace(file, sha256="0" * 64)), folder)


def test_unknown_rounding() -> None:
    with pytest.raises(HeadError, match="bfloat16"):
        load_head(HEADS["nsfw-b32"], round_to="bfloat16")


# --- choosing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "width", "name"),
    [
        ("aesthetic", 768, "aesthetic-v2-l14"),
        ("aesthetic", 512, "aesthetic-v1-b32"),
        ("nsfw", 768, "nsfw-l14"),
        ("nsfw", 512, "nsfw-b32"),
    ],
)
def test_auto(kind: heads.Kind, width: int, name: str) -> None:
    assert resolve(kind, "auto", width) is HEADS[name]
    assert resolve(kind, name, width) is HEADS[name]


@pytest.mark.parametrize(
    ("kind", "head", "width", "says"),
    [
        (
            "aesthetic",
            "auto",
            1024,
            r"width 1024; there are .*v2-l14 \(768\).*v1-b16 \(512\).*starter \(512\)",
        ),
        ("nsfw", "auto", 640, r"width 640; there are nsfw-l14 \(768\), nsfw-b32 \(512\)"),
        ("aesthetic", "aesthetic-v2-l4", 768, r"did you mean aesthetic-v2-l14.*aesthetic-v1-b32 \(512\)"),
        ("aesthetic", "xyz", 768, r"unknown aesthetic head 'xyz'; there are auto, aesthetic-v2-l14"),
        (
            "aesthetic",
            "nsfw-l14",
            768,
            r"'nsfw-l14' gives nsfw_score; aesthetic heads are auto, aesthetic-v2",
        ),
        ("nsfw", "aesthetic-v2-l14", 768, "gives aesthetic_score"),
        ("nsfw", "nsfw-l14", 512, r"width 768 \(OpenAI CLIP ViT-L/14\), these have 512.*nsfw-b32 \(512\)"),
    ],
)
def test_heads_that_do_not_fit(kind: heads.Kind, head: str, width: int, says: str) -> None:
    with pytest.raises(HeadError, match=says):
        resolve(kind, head, width)


@pytest.mark.parametrize(
    ("model", "aesthetic", "nsfw"),
    [
        ("ViT-L-14", "aesthetic-v2-l14", "nsfw-l14"),
        ("ViT-L-14-quickgelu", "aesthetic-v2-l14", "nsfw-l14"),
        ("ViT-B-32", "aesthetic-v1-b32", "nsfw-b32"),
        ("ViT-B-32-quickgelu", "aesthetic-v1-b32", "nsfw-b32"),
        ("ViT-B-16", "aesthetic-v1-b16", None),
        ("starter", "aesthetic-starter", "nsfw-starter"),
        ("ViT-L-14-336", None, None),
        ("ViT-B-32-256", None, None),
        ("RN50", None, None),
    ],
)
def test_the_head_of_a_model(model: str, aesthetic: str | None, nsfw: str | None) -> None:
    found = [for_model(kind, model) for kind in ("aesthetic", "nsfw")]
    assert [spec and spec.name for spec in found] == [aesthetic, nsfw]


def test_a_head_by_its_name() -> None:
    for name, spec in HEADS.items():
        assert named(spec.kind, name) is spec
        assert spec.column == f"{spec.kind}_score"
    with pytest.raises(HeadError, match="gives nsfw_score"):
        named("aesthetic", "nsfw-l14")


def test_specs_travel() -> None:
    """Dask tokenizes and pickles them."""
    for spec in HEADS.values():
        copy = pickle.loads(pickle.dumps(spec))
        assert copy == spec
        assert tokenize(copy) == tokenize(spec)
    assert len({tokenize(spec) for spec in HEADS.values()}) == len(HEADS) == 8
    error = pickle.loads(pickle.dumps(HeadError("what and why")))
    assert isinstance(error, HeadError)
    assert str(error) == "what and why"


# --- the starter model's heads ------------------------------------------------------------------------------


@pytest.mark.skipif(not STARTER.is_file(), reason="the starter model is not fitted yet")
@pytest.mark.parametrize("kind", ["aesthetic", "nsfw"])
def test_starter(kind: heads.Kind) -> None:
    spec = resolve(kind, f"{kind}-starter", 512)
    assert spec.preview
    with np.load(STARTER) as arrays:
        w, b = arrays[f"{kind}_w"], arrays[f"{kind}_b"]
    assert w.shape == (512,)
    x = unit(50, 512)
    expected = x.numpy().astype(np.float64) @ w + b
    if kind == "nsfw":
        expected = 1 / (1 + np.exp(-expected))
    np.testing.assert_allclose(load_head(spec)(x).numpy(), expected, rtol=1e-6, atol=1e-7)
    assert len(provenance(spec)["sha256"]) == 64


# --- on a card ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_lookup_on_a_card() -> None:
    check_lookup(all_float16(), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, spec in HEADS.items() if spec.weights])
def test_card_and_processor_agree(shared: Path, name: str) -> None:
    spec = HEADS[name]
    x = unit(3000, spec.width)
    on_card = load_head(spec, str(shared / "weights"), "cuda", "float16")
    assert on_card.device == "cuda:0"
    scores = on_card(x.cuda())
    assert scores.is_cuda
    expected = load_head(spec, str(shared / "weights"), "cpu", "float16")(x)
    torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=1e-6)
