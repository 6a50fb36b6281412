"""Heads and encoders of users: their files, their entry points, and the page that shows them."""

from __future__ import annotations

import hashlib
import importlib
import json
import linecache
import re
import sys
import tomllib
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import safetensors.numpy
import torch
from dask.base import tokenize

import dask_imgcurator as dic
from dask_imgcurator import plugins
from dask_imgcurator.engine.backend import get_backend
from dask_imgcurator.engine.cache import cache
from dask_imgcurator.images.preprocess import Preprocess
from dask_imgcurator.models import ModelError
from dask_imgcurator.models.encoders import load_encoder, resolve_encoder
from dask_imgcurator.models.head_files import HeadFile, convert_pth, provenance, read_head, save_head
from dask_imgcurator.models.heads import HeadError
from dask_imgcurator.models.weights import WeightsError
from dask_imgcurator.plugins import PluginError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_heads.md"


def frame_of(values: np.ndarray, missing: tuple[int, ...] = ()) -> pd.DataFrame:
    vectors = [None if i in missing else v.tolist() for i, v in enumerate(values)]
    table = pa.table(
        {"key": [f"{i:02d}" for i in range(len(values))], "embedding": pa.array(vectors, pa.list_(pa.float32()))}
    )
    return get_backend("pandas").from_arrow(table)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def head_at(folder: Path, width: int = 8, **options: Any) -> HeadFile:
    layers = [(random(1, width), random(1, seed=1))]
    return save_head(folder / "h.safetensors", layers, **{"column": "h_score", **options})


# --- scores ---------------------------------------------------------------------------------------


def test_linear_by_hand(tmp_path: Path) -> None:
    x, w, b = random(5, 8), random(1, 8, seed=1), random(1, seed=2)
    save_head(tmp_path / "plain.safetensors", [(w, b)], column="plain_score")
    save_head(tmp_path / "prob.safetensors", [(w, b)], column="prob", output="sigmoid")
    found = dic.score_head(frame_of(x, missing=(3,)), tmp_path / "plain.safetensors")
    found = dic.score_head(found, str(tmp_path / "prob.safetensors"), column="p")
    logits = x.astype(np.float64) @ w[0].astype(np.float64) + float(b[0])
    logits[3] = np.nan
    np.testing.assert_allclose(found["plain_score"], logits, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found["p"], 1 / (1 + np.exp(-logits)), rtol=0, atol=1e-6)
    assert [str(found[c].dtype) for c in ("plain_score", "p")] == ["float32", "float32"]


@pytest.mark.parametrize(
    ("activation", "module"),
    [
        ("none", torch.nn.Identity),
        ("relu", torch.nn.ReLU),
        ("gelu", torch.nn.GELU),
        ("silu", torch.nn.SiLU),
        ("tanh", torch.nn.Tanh),
        ("sigmoid", torch.nn.Sigmoid),
    ],
)
def test_mlp_is_torchs(tmp_path: Path, activation: Any, module: Any) -> None:
    torch.manual_seed(3)
    # Eleven modules: "10" comes after "9" and not after "1".
    sizes = [8, 7, 6, 5, 4, 1]
    layers: list[torch.nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [torch.nn.Linear(a, b, bias=b != 5), module(), torch.nn.Dropout(0.5)]
    net = torch.nn.Sequential(*layers[:-2]).eval()
    assert "12.weight" in net.state_dict()
    torch.save({f"net.{k}": v for k, v in net.state_dict().items()}, tmp_path / "net.pth")
    head = convert_pth(tmp_path / "net.pth", tmp_path / "net.safetensors", activation=activation, column="s")
    assert (head.name, head.width, head.activation) == ("net", 8, activation)
    x = random(9, 8)
    with torch.inference_mode():
        expected = net(torch.from_numpy(x))[:, 0].numpy()
    assert np.ptp(expected) > 1e-5
    np.testing.assert_allclose(dic.score_head(frame_of(x), head)["s"], expected, rtol=0, atol=1e-6)


def test_rows_keep_their_own_score_on_dask(tmp_path: Path) -> None:
    head = head_at(tmp_path)
    frame = frame_of(random(20, 8))
    whole = dic.score_head(frame, head).set_index("key")["h_score"]
    assert whole.nunique() == 20
    df = dic.score_head(dd.from_pandas(frame.sample(frac=1, random_state=0), npartitions=4, sort=False), head)
    assert str(df.dtypes["h_score"]) == "float32"
    with dask.config.set(scheduler="sync"):
        part = df.partitions[[2, 1]].compute().set_index("key")["h_score"]
    assert 0 < len(part) < 20
    pd.testing.assert_series_equal(part, whole.loc[part.index], rtol=0, atol=0)


def test_nothing_to_score(tmp_path: Path) -> None:
    head = head_at(tmp_path)
    for frame in (frame_of(random(2, 8), missing=(0, 1)), frame_of(random(0, 8))):
        found = dic.score_head(frame, head)["h_score"]
        assert found.isna().all()
        assert found.dtype == np.float32


@pytest.mark.gpu
def test_a_card_gives_what_the_cpu_gives(tmp_path: Path) -> None:
    layers = [(random(5, 8), random(5)), (random(1, 5, seed=1), random(1, seed=1))]
    head = save_head(tmp_path / "h.safetensors", layers, column="s", activation="gelu", output="sigmoid")
    frame = frame_of(random(7, 8), missing=(2,))
    host, card = get_backend("pandas"), get_backend("cudf")
    expected = host.to_arrow(dic.score_head(frame, head))["s"].to_pylist()
    found = card.to_arrow(dic.score_head(card.from_arrow(host.to_arrow(frame)), head))["s"].to_pylist()
    assert (found[2], expected[2]) == (None, None)
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), rtol=0, atol=1e-6)


# --- files ----------------------------------------------------------------------------------------


def test_the_spec_is_frozen_and_knows_its_file(tmp_path: Path) -> None:
    head = head_at(tmp_path, embedder="ViT-B/32", output="sigmoid")
    file = tmp_path / "h.safetensors"
    assert head == read_head(file)
    assert head.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (head.name, head.column, head.width, head.path) == ("h", "h_score", 8, str(file))
    assert provenance(head) == {
        "name": "h",
        "column": "h_score",
        "width": 8,
        "activation": "none",
        "output": "sigmoid",
        "embedder": "ViT-B/32",
        "sha256": head.sha256,
    }
    assert tokenize(head) == tokenize(read_head(file))
    assert tokenize(head) != tokenize(head_at(tmp_path, embedder="ViT-B/16", output="sigmoid"))
    with pytest.raises(AttributeError):
        head.width = 9  # type: ignore[misc]


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    head, frame = head_at(tmp_path), frame_of(random(2, 8))
    head_at(tmp_path, name="another")
    with pytest.raises(HeadError, match=rf"h.safetensors has sha256 .* {head.sha256} when it was read first"):
        dic.score_head(frame, head)
    (tmp_path / "h.safetensors").unlink()
    with pytest.raises(HeadError, match=r"no head file .*put it where every worker can read it"):
        dic.score_head(frame, head)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "at least one layer"),
        ([(random(1, 8), random(2))], r"weight of shape \(1, 8\) and a bias of shape \(2,\)"),
        ([(random(8), random(1))], r"weight of shape \(8,\)"),
        ([(random(4, 8), random(4)), (random(1, 5), random(1))], "layer 1 takes 5 numbers, the one before gives 4"),
        ([(random(2, 8), random(2))], "the last layer gives 2 numbers, a head gives one"),
        ([(random(1, 8) * np.nan, random(1))], "not finite"),
    ],
)
def test_layers_that_do_not_fit(tmp_path: Path, layers: Any, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        save_head(tmp_path / "h.safetensors", layers, column="s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swish"}, "activation='swish', there are none, relu"),
        ({"output": "softmax"}, "output='softmax', there are identity, sigmoid"),
        ({"column": ""}, "column='' is not a name"),
        ({"column": "embedding"}, "column='embedding' is not a name"),
        ({"column": 3}, "column is 3, expected a str"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        head_at(tmp_path, **options)
    with pytest.raises(HeadError, match=r"ends in \.safetensors"):
        save_head(tmp_path / "h.npz", [(random(1, 8), random(1))], column="s")


def test_files_that_are_no_heads(tmp_path: Path) -> None:
    good = head_at(tmp_path)
    about = {k: v for k, v in provenance(good).items() if k != "sha256"}
    tensors = {"layers.0.weight": random(1, 8), "layers.0.bias": random(1)}
    data = (tmp_path / "h.safetensors").read_bytes()
    cases = {
        "text": (b"hello", "is not a head's file"),
        "cut": (data[:-3], "is not a head's file"),
        "bare": (safetensors.numpy.save(tensors), "is not a head's file"),
        "other": (safetensors.numpy.save(tensors, {"imgcurator_head": "[]"}), "is no mapping"),
        "wide": (
            safetensors.numpy.save(tensors, {"imgcurator_head": json.dumps({**about, "width": 9})}),
            "not the layers",
        ),
        "more": (
            safetensors.numpy.save({**tensors, "mean": random(8)}, {"imgcurator_head": json.dumps(about)}),
            "holds layers.0.bias, layers.0.weight, mean, which are not the layers",
        ),
    }
    for name, (content, message) in cases.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        with pytest.raises(HeadError, match=rf"{name}\.safetensors.*{message}"):
            read_head(file)
    with pytest.raises(HeadError, match="no head file"):
        read_head(tmp_path)


def test_pth_files_that_are_no_heads(tmp_path: Path) -> None:
    def convert(state: Any) -> HeadFile:
        torch.save(state, tmp_path / "x.pth")
        return convert_pth(tmp_path / "x.pth", tmp_path / "x.safetensors", activation="relu", column="s")

    with_norm = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    with pytest.raises(HeadError, match="linear layers only"):
        convert(with_norm.state_dict())
    with pytest.raises(HeadError, match="holds nothing"):
        convert({})
    with pytest.raises(HeadError, match=r"holds 0\.bias without 0\.weight"):
        convert({"0.bias": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"x\.pth is not a file of plain tensors"):
        convert(torch.nn.Linear(4, 1))  # a pickled module, which would run code


def test_heads_that_do_not_fit_the_table(tmp_path: Path) -> None:
    head = head_at(tmp_path, embedder="ViT-B/32")
    with pytest.raises(HeadError, match=r"'h' takes embeddings of width 8 \(ViT-B/32\), column 'embedding' has 5"):
        dic.score_head(frame_of(random(2, 5)), head)
    frame = frame_of(random(2, 8))
    with pytest.raises(ValueError, match="score_head needs the column mine"):
        dic.score_head(frame, head, embedding="mine")
    with pytest.raises(ValueError, match="column='key' cannot be used for a score"):
        dic.score_head(frame, head, column="key")
    with pytest.raises(HeadError, match=r"published head: use score_nsfw\(df, head='nsfw-l14'\)"):
        dic.score_head(frame, "nsfw-l14")


# --- entry points ---------------------------------------------------------------------------------


def install(folder: Path, name: str, code: str, groups: dict[str, dict[str, str]]) -> None:
    """What pip leaves of a package of one module."""
    (folder / f"{name}.py").write_text(code)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))
    importlib.invalidate_caches()
    sys.modules.pop(name, None)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that modules and packages are found in."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    cache.clear()
    return folder


ENCODERS = """
import torch
from dask_imgcurator.engine.cache import cache
from dask_imgcurator.images.preprocess import Preprocess

class Grid:
    width = 12
    preprocess = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3)
    def __init__(self, spec, device):
        self.provenance = {"seen": [spec.model, spec.pretrained, spec.dtype, device]}
    def forward(self, pixels):
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)

def fails(spec, device):
    raise RuntimeError("no weights")

class Odd(Grid):
    preprocess = None
"""


def test_an_encoder_by_name(site: Path, tmp_path: Path) -> None:
    points = {"grid": "dic_grid:Grid", "bad": "dic_grid:fails", "odd": "dic_grid:Odd", "gone": "dic_grid:Nothing"}
    install(site, "dic_grid", ENCODERS, {plugins.ENCODERS: points})
    encoder = load_encoder(resolve_encoder("grid", "tag", "float32"))
    assert (encoder.width, encoder.preprocess.size) == (12, (8, 8))
    about = {"model": "grid", "package": "dic-grid 1.0", "pretrained": "tag", "seen": ["grid", "tag", "float32", "cpu"]}
    assert encoder.provenance.items() >= about.items()
    pixels = torch.from_numpy(random(3, 3, 8, 8))
    expected = pixels.reshape(3, 3, 2, 4, 2, 4).mean((3, 5)).flatten(1)
    torch.testing.assert_close(encoder(pixels), expected / expected.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)
    # Weights in a file are known by their hash.
    (tmp_path / "w.bin").write_bytes(b"weights")
    spec = resolve_encoder("grid", str(tmp_path / "w.bin"), "float32")
    assert spec.weights_sha256 == hashlib.sha256(b"weights").hexdigest()
    assert load_encoder(spec).provenance["weights_sha256"] == spec.weights_sha256
    for name, message in (
        ("bad", "cannot load 'bad' of dic-grid 1.0: RuntimeError: no weights"),
        ("odd", "preprocess=None: it must be a Preprocess"),
    ):
        with pytest.raises(ModelError, match=message):
            load_encoder(resolve_encoder(name, None, "float32"))
    with pytest.raises(PluginError, match=r"'gone' \(dic_grid:Nothing of dic-grid 1.0\) cannot be imported"):
        load_encoder(resolve_encoder("gone", None, "float32"))
    with pytest.raises(ModelError, match="'grid' has no text tower"):
        dic.embed_text(pd.DataFrame({"caption": ["a"]}), "grid", "tag", dtype="float32")


def test_heads_by_name(site: Path, tmp_path: Path) -> None:
    head = head_at(tmp_path)
    code = "from dask_imgcurator.models.head_files import read_head\n"
    code += f"PATH = {head.path!r}\nlazy = lambda: read_head(PATH)\n"
    install(site, "dic_heads", code, {plugins.HEADS: {"as-path": "dic_heads:PATH", "as-call": "dic_heads:lazy"}})
    frame = frame_of(random(3, 8))
    expected = dic.score_head(frame, head)
    for name in ("as-path", "as-call"):
        pd.testing.assert_frame_equal(dic.score_head(frame, name), expected)
    with pytest.raises(HeadError, match=r"no head file .*as-pth.*registered heads: as-path, as-call"):
        dic.score_head(frame, "as-pth")
    with pytest.raises(PluginError, match=r"nothing is registered as 'as-pth' .*did you mean 'as-path'"):
        plugins.load(plugins.HEADS, "as-pth")


def test_a_name_that_two_packages_take(site: Path) -> None:
    for name in ("dic_one", "dic_two"):
        install(site, name, "x = 'x'", {plugins.HEADS: {"same": f"{name}:x"}})
    with pytest.raises(PluginError, match=r"'same' is registered twice .*dic-one 1.0.*dic-two 1.0|.*dic-two.*dic-one"):
        plugins.registered(plugins.HEADS)


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("skimage") is None or find_spec("sklearn") is None, reason="the demo extra is missing")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_page_runs(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ``python`` block of the page, one after the other, in an empty folder."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    python = [code for language, code in blocks if language == "python"]
    (project,) = [tomllib.loads(code) for language, code in blocks if language == "toml"]
    modules = [code for code in python if code.startswith("# my_curation.py")]
    assert len(python) >= 7
    assert len(modules) == 1
    monkeypatch.chdir(tmp_path)
    install(site, "my_curation", modules[0], project["project"]["entry-points"])
    namespace: dict[str, Any] = {"__name__": "page"}
    with dask.config.set({"scheduler": "sync", "imgcurator.decoder": "pillow"}):
        for number, code in enumerate(python):
            if code is modules[0]:
                (site / "colourful.safetensors").write_bytes((tmp_path / "colourful.safetensors").read_bytes())
                continue
            name = f"{PAGE.name}, python block {number}"
            linecache.cache[name] = (len(code), None, code.splitlines(True), name)
            exec(compile(code, name, "exec"), namespace)
    # What the page says is there, is there; and the head learnt something of pictures that it saw.
    table, result = namespace["table"], namespace["result"]
    assert len(result) > 60
    assert np.corrcoef(table["saturation"], result["colourful_score"])[0, 1] > 0.5
    assert isinstance(namespace["head"], HeadFile)
    assert Preprocess((32, 32), (0.5,) * 3, (0.25,) * 3) == load_encoder(resolve_encoder("thumbnail")).preprocess


def test_the_page_compiles_what_it_does_not_run() -> None:
    blocks = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    for code in blocks:
        compile(code, PAGE.name, "exec")
        assert all(hasattr(dic, name) for name in re.findall(r"\bdic\.(\w+)", code))
