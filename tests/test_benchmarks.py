"""The GPU benchmark runs from end to end on a CPU, small, and writes down what fails."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield importlib.import_module("gpu")
    for name in ("gpu", "gpu_smoke", "gpu_speed", "gpu_tests", "made_shards", "common"):
        sys.modules.pop(name, None)


def run(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(json.loads((out / "gpu.json").read_text()))


@pytest.mark.slow
def test_sections_on_a_cpu(tmp_path: Path) -> None:
    result = run(tmp_path, "--sections", "matmul,encoder,end_to_end")
    assert [name for name, found in result.items() if isinstance(found, dict) and "error" in found] == []
    # 224 x 224 through EfficientNet-Lite0: its paper says 0.407 billion multiply-adds.
    assert result["encoder"]["gflop_per_image"] == pytest.approx(2 * 0.407, rel=0.1)
    ceiling = max(result["matmul"]["tflops"].values())
    rate = result["encoder"]["images_per_s"]["plain, batch 4"]
    share = rate * result["encoder"]["gflop_per_image"] / 1000 / ceiling
    assert result["shares"]["encoder, plain, batch 4"] == pytest.approx(share)
    assert set(result["end_to_end"]["images_per_s"]) == {"500x400, plain", "1-2 MP, plain"}
    assert f"{share:.1%}" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_all_sections_on_a_cpu(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert [name for name, found in result.items() if isinstance(found, dict) and "error" in found] == []
    smoke = {name: step for name, step in result["smoke"].items() if isinstance(step, dict)}
    assert [name for name, step in smoke.items() if not step["ok"]] == []
    assert len(smoke) == 8
    (tests,) = (found for name, found in result["tests"].items() if name.startswith("test_"))
    assert tests["collected"] > 20
    assert tests["failed"] == {}
    assert result["cluster"]["workers"] == 1
    assert (tmp_path / "profile.txt").stat().st_size > 100


def test_a_section_that_fails_is_written_down_and_the_others_go_on(tmp_path: Path) -> None:
    result = run(tmp_path, "--sections", "encoder,matmul", "--model", "no-such-model")
    assert "ModelError: unknown model 'no-such-model'" in result["encoder"]["error"]
    assert result["matmul"]["best"] > 0
    assert "no-such-model" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_what_a_section_found_before_its_limit_is_kept(gpu: Any, tmp_path: Path) -> None:
    settings = gpu.Settings("pandas", {}, "starter", None, "float32", [2], [64] * 10_000, 0.1, str(tmp_path))
    found = gpu.run_section("matmul", settings, tmp_path / "found.json", 15)
    assert found["error"] == "stopped after 15 s"
    assert found["tflops"]["64x64x64"] > 0


def test_the_sections_have_their_time(gpu: Any) -> None:
    assert next(iter(gpu.SECTIONS)) == "smoke"
    assert gpu.SECTIONS["smoke"].limit <= 60
    assert sum(section.limit for section in gpu.SECTIONS.values()) < gpu.LIMIT < 600


def test_the_list_of_what_the_machine_needs_names_modules(gpu: Any) -> None:
    needed = gpu.gpu_smoke.needed_modules()
    assert {"cudf", "pylibcudf", "dask_cudf", "dask_cuda", "nvidia.dali", "torch", "pytest"} <= set(needed)
    assert all(part.isidentifier() for name in needed for part in name.split("."))


def test_no_gpu_test_wants_what_the_machine_does_not_have(gpu: Any) -> None:
    """An import at the top of its file that fails would keep a GPU test from running at all."""
    there = {name.partition(".")[0] for name in gpu.gpu_smoke.needed_modules()}
    there |= set(sys.stdlib_module_names) | {path.stem for path in Path(__file__).parent.rglob("*.py")}
    project = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]
    deps = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in project["dependencies"]}
    modules = importlib.metadata.packages_distributions().items()
    brought = {name for name, found in modules if {d.lower().replace("_", "-") for d in found} & deps}
    brought |= {"dask_imgcurator"}
    for path in gpu.gpu_tests.files():
        nodes = ast.parse(path.read_text()).body
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
        assert {name.partition(".")[0] for name in names} <= there | brought, path


def test_a_step_that_fails_is_told_and_the_next_ones_run(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(settings: Any) -> dict[str, Any]:
        raise OSError("no such card")

    monkeypatch.setattr(gpu.gpu_smoke, "STEPS", {"a": broken, "b": lambda settings: {"x": 1}})
    found = list(gpu.gpu_smoke.run_smoke(None))
    assert [name for name, _ in found] == ["running", "a", "running", "b", "running"]
    results = dict(found)
    assert not results["a"]["ok"]
    assert "no such card" in results["a"]["error"]
    assert results["b"]["ok"]
    assert results["b"]["x"] == 1


def test_failing_tests_are_printed_at_once_and_recorded(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import warnings, pytest\n\npytestmark = pytest.mark.gpu\n\n"
        "def test_good():\n    warnings.warn('of RAPIDS', UserWarning)\n\n"
        "def test_bad():\n    assert 1 == 2, 'they differ'\n\n"
        "def test_left_out():\n    pytest.skip('no such library')\n"
    )
    record = tmp_path / "record.json"
    command = [sys.executable, str(SCRIPT.with_name("gpu_tests.py")), str(tmp_path / "test_it.py"), "--record", record]
    env = {**os.environ, "REQUIRE_GPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=SCRIPT.parents[1])
    assert done.returncode == 1
    found = json.loads(record.read_text())
    assert (found["collected"], found["passed"]) == (3, 1)
    assert [(name.rpartition("::")[2], "they differ" in why) for name, why in found["failed"].items()] == [
        ("test_bad", True)
    ]
    assert [name.rpartition("::")[2] for name in found["skipped"]] == ["test_left_out"]
    assert "they differ" in done.stderr


def test_the_host_s_cost_is_measured_by_stage() -> None:
    command = [sys.executable, str(SCRIPT.with_name("host_cost.py")), "--images", "96", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)["us_per_image"]
    stages = list(found)[: list(found).index("held, in all")]
    assert found["held, in all"] == pytest.approx(sum(found[name] for name in stages), abs=0.1)
    assert {"index the tar", "inspect", "columns"} <= set(stages)
    assert 1 < found["inspect"] < 10_000


@pytest.mark.slow
def test_a_card_s_idle_share_is_that_of_the_encoder() -> None:
    options = ["--per-shard", "24", "--shards", "2", "--encode", "5000", "--decode", "100"]
    command = [sys.executable, str(SCRIPT.with_name("idle.py")), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)["shards"]
    assert list(found) == ["24 images a shard, one at a time", "24 images a shard, two"]
    for one in found.values():  # 5 ms an image are 200 a second
        assert one["images_per_s"] == pytest.approx(200 * (1 - one["idle"]), rel=0.02)


@pytest.mark.slow
def test_a_peer_on_the_same_shards(gpu: Any, tmp_path: Path) -> None:
    import made_shards

    shards = made_shards.make_shards(tmp_path, shards=2, per_shard=3, distinct=2)["500x400"]
    command = [sys.executable, str(SCRIPT.parent / "peers" / "compare.py"), *shards]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    found = json.loads(done.stdout)
    assert [(one["of"], one["images"]) for one in found["runs"]] == [("ours", 6), ("plain_loop", 6)] * 2
    assert 0.1 < found["ratios"]["cpu_s"] < 10


def test_the_pictures_are_of_the_sizes_that_they_say(gpu: Any, tmp_path: Path) -> None:
    import common
    import made_shards
    from PIL import Image

    sets = made_shards.make_shards(tmp_path, shards=2, per_shard=5, distinct=3)
    for name, (least, most) in made_shards.SIZES.items():
        assert len(sets[name]) == 2
        images = [Image.open(io.BytesIO(b)) for url in sets[name] for b in common.images_of(url)]
        assert len(images) == 10
        assert all(least * 0.98 <= i.width * i.height <= most for i in images)
