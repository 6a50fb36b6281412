"""The doctor: made-up machines are judged as a person would, and this one is looked at without a fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dask_imgcurator.checks.doctor import Finding, examine, gpu_findings
from dask_imgcurator.checks.gpu import Card, GpuFacts, broken_modules, gpu_facts

GIB = 2**30
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 79 * GIB, True)
T4 = Card("Tesla T4", (7, 5), 15 * GIB, 15 * GIB, False)
P100 = Card("Tesla P100", (6, 0), 16 * GIB, 16 * GIB, False)
CU13 = {
    "cudf-cu13": "26.10.2",
    "dask-cudf-cu13": "26.10.2",
    "rmm-cu13": "26.10.0",
    "cupy-cuda13x": "14.2.0",
    "nvidia-dali-cuda130": "2.4.0",
    "dask-cuda": "26.10.0",
}
WHOLE = GpuFacts("580.95.05", (13, 0), (H100,), "13.0", 1, CU13)


def judge(facts: GpuFacts) -> dict[str, Finding]:
    findings = list(gpu_findings(facts))
    assert len({f.topic for f in findings}) == len(findings)
    assert all(f.remedy for f in findings if f.state != "ok"), findings
    return {f.topic: f for f in findings}


def test_a_machine_that_has_everything() -> None:
    found = judge(WHOLE)
    assert {f.state for f in found.values()} == {"ok"}
    assert found["driver"].value == "580.95.05, runs CUDA up to 13.0"
    assert found["GPU 0"].value == ("NVIDIA H100 80GB HBM3, compute 9.0, 79.0 of 80.0 GiB free, bfloat16, JPEG engine")
    assert found["cudf"].value == "cudf-cu13 26.10.2"


def test_no_card() -> None:
    (found,) = gpu_findings(GpuFacts(torch_cuda="13.0", packages=CU13))
    assert found.state == "ok"
    assert "CPU" in found.value


def test_a_card_without_rapids_says_what_to_install_and_what_happens_meanwhile() -> None:
    found = judge(replace(WHOLE, packages={"nvidia-dali-cuda130": "2.4.0"}))
    for library in ("cudf", "dask-cudf", "rmm", "cupy", "dask-cuda"):
        assert found[library].state == "note"
        assert found[library].remedy == 'without it the CPU is used: pip install "dask-imgcurator[cu13]"'
    assert found["DALI"].state == "ok"


def test_a_driver_that_is_too_old_names_both_ways_out() -> None:
    old = replace(WHOLE, driver="550.54", driver_cuda=(12, 4), torch_sees=0)
    found = judge(old)
    assert found["driver"].state == "problem"
    assert "update the driver to one for CUDA 13" in found["driver"].remedy
    assert "dask-imgcurator[cu12]" in found["driver"].remedy
    assert "torch sees no card" in found["torch's CUDA"].value


def test_libraries_for_two_cudas() -> None:
    packages = {**CU13, "cupy-cuda12x": "14.2.0"}
    del packages["cupy-cuda13x"]
    found = judge(replace(WHOLE, packages=packages))
    assert found["CUDA builds"].state == "problem"
    assert "cupy for CUDA 12" in found["CUDA builds"].value
    assert "torch for CUDA 13" in found["CUDA builds"].value


def test_two_builds_of_one_library() -> None:
    found = judge(replace(WHOLE, packages={**CU13, "cudf-cu12": "26.10.2"}))
    assert found["cudf"].state == "problem"
    assert "cudf-cu12 26.10.2 and cudf-cu13 26.10.2" in found["cudf"].value


def test_two_releases_of_rapids() -> None:
    found = judge(replace(WHOLE, packages={**CU13, "dask-cuda": "26.8.0"}))
    assert found["RAPIDS"].state == "problem"
    assert found["RAPIDS"].value == "releases 26.10 and 26.8"


@pytest.mark.parametrize(("torch_cuda", "visible", "text"), [(None, None, "built for the CPU"), ("13.0", "", "hides")])
def test_why_torch_sees_no_card(torch_cuda: str | None, visible: str | None, text: str) -> None:
    found = judge(replace(WHOLE, torch_cuda=torch_cuda, torch_sees=0, visible=visible))
    assert found["torch's CUDA"].state == "note"
    assert text in found["torch's CUDA"].value


def test_a_library_that_does_not_import() -> None:
    found = judge(replace(WHOLE, broken={"cudf": "AttributeError: module 'numpy' has no attribute 'row_stack'"}))
    assert found["import cudf"].state == "problem"
    assert "row_stack" in found["import cudf"].value


def test_modules_are_imported_to_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_here.py").write_text("import math\nmath.no_such_thing\n")
    (tmp_path / "lacks_another.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = broken_modules(["json", "breaks_here", "lacks_another", "not_installed.at_all"])
    assert list(found) == ["breaks_here", "lacks_another"]
    assert "no_such_thing" in found["breaks_here"]
    assert "no_such_module" in found["lacks_another"]


def test_older_cards() -> None:
    found = judge(replace(WHOLE, cards=(T4, P100), torch_sees=1))
    assert "float16, no JPEG engine" in found["GPU 0"].value
    assert found["GPU 0"].state == "ok"
    assert found["GPU 1"].state == "note"
    assert found["torch's CUDA"].value == "13.0; 1 of 2 cards"


def test_without_nvml_the_driver_is_not_judged() -> None:
    found = judge(replace(WHOLE, driver=None, driver_cuda=None, cards=(replace(H100, jpeg_engine=None),)))
    assert found["driver"].state == "note"
    assert "nvidia-ml-py" in found["driver"].remedy


def test_this_machine() -> None:
    import torch

    facts = gpu_facts()
    assert facts.torch_cuda == torch.version.cuda
    assert facts.torch_sees == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    findings = list(examine())
    assert {f.state for f in findings} <= {"ok", "note", "problem"}
    topics = [f.topic for f in findings]
    assert topics.count("backend") == 1
    assert ("GPU" in topics) != ("GPU 0" in topics)
