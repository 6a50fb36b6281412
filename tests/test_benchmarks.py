"""The GPU benchmark runs from end to end on a CPU, small, and writes down what fails."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield importlib.import_module("gpu")
    for name in ("gpu", "common"):
        sys.modules.pop(name, None)


def run(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads((out / "gpu.json").read_text()))


@pytest.mark.slow
def test_sections_on_a_cpu(tmp_path: Path) -> None:
    result = run(tmp_path, "--sections", "matmul,encoder,end_to_end")
    assert [name for name, found in result.items() if isinstance(found, dict) and "error" in found] == []
    # 224 x 224 through EfficientNet-Lite0: its paper says 0.407 billion multiply-adds.
    assert result["encoder"]["gflop_per_image"] == pytest.approx(2 * 0.407, rel=0.1)
    ceiling = max(result["matmul"]["tflops"].values())
    rate = result["encoder"]["images_per_s"]["plain"]["4"]
    share = rate * result["encoder"]["gflop_per_image"] / 1000 / ceiling
    assert result["shares"]["encoder, plain, batch 4"] == pytest.approx(share)
    assert {"500x400", "1-2 MP"} < set(result["end_to_end"])
    assert f"{share:.1%}" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_all_sections_on_a_cpu(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert [name for name, found in result.items() if isinstance(found, dict) and "error" in found] == []
    assert result["tests"]["exit_code"] == 0
    assert result["cluster"]["workers"] == 1
    assert (tmp_path / "profile.txt").stat().st_size > 100


def test_a_section_that_fails_is_written_down_and_the_others_go_on(tmp_path: Path) -> None:
    result = run(tmp_path, "--sections", "encoder,matmul", "--model", "no-such-model")
    assert "ModelError: unknown model 'no-such-model'" in result["encoder"]["error"]
    assert result["matmul"]["best"] > 0
    assert "no-such-model" in (tmp_path / "gpu.md").read_text()


def test_what_a_section_found_before_its_limit_is_kept(gpu: Any, tmp_path: Path) -> None:
    settings = gpu.Settings("pandas", {}, "starter", None, "float32", [2], [64] * 10_000, 0.1, str(tmp_path))
    found = gpu.run_section("matmul", settings, tmp_path, 15)
    assert found["error"] == "stopped after 15 s"
    assert found["tflops"]["64x64x64"] > 0


def test_the_pictures_are_of_the_sizes_that_they_say(gpu: Any, tmp_path: Path) -> None:
    import common
    from PIL import Image

    sets = gpu.make_shards(tmp_path, shards=2, per_shard=5, distinct=3)
    for name, (least, most) in gpu.SIZES.items():
        assert len(sets[name]) == 2
        images = [Image.open(io.BytesIO(b)) for url in sets[name] for b in common.images_of(url)]
        assert len(images) == 10
        assert all(least * 0.98 <= i.width * i.height <= most for i in images)
