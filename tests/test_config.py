"""Defaults under Dask's configuration, its files and environment variables, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dask
import pytest
import yaml

import dask_imgcurator
from dask_imgcurator import config

DEFAULTS = yaml.safe_load(Path(dask_imgcurator.__file__).with_name("imgcurator.yaml").read_text())["imgcurator"]


def in_a_process(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("DASK_")} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_defaults_are_registered(tmp_path: Path) -> None:
    code = "import dask, dask_imgcurator, json; print(json.dumps(dask.config.get('imgcurator')))"
    found = yaml.safe_load(in_a_process(code, DASK_CONFIG=str(tmp_path)))
    assert found == DEFAULTS
    assert DEFAULTS["backend"] == "auto"
    assert DEFAULTS["weights-dir"] is None
    assert DEFAULTS["max-pixels"] == 2 * 89_478_485  # Pillow's limit, at which it warns


def test_defaults_hold_whichever_is_imported_first(tmp_path: Path) -> None:
    """Also where they are registered within a `dask.config.set`, which takes away what came after it began."""
    code = """
import dask_imgcurator as dic
import dask
with dask.config.set({"imgcurator.max-pixels": 5}):
    dic.read_webdataset
    from dask_imgcurator import config
    print(config.get("max-pixels"), config.get("batch-size"))
print(config.get("max-pixels"), dic.__version__ != "")
"""
    assert in_a_process(code, DASK_CONFIG=str(tmp_path)).splitlines() == ["5 None", "178956970 True"]


def test_who_wins(tmp_path: Path) -> None:
    """An argument goes before `dask.config.set`, that before the environment, that before a file, that before ours."""
    (tmp_path / "mine.yaml").write_text("imgcurator: {batch-size: 3, max-pixels: 5, decoder: pillow}")
    code = """
import dask
from dask_imgcurator import config
names = ["batch-size", "max-pixels", "decoder", "dtype"]
print([config.get(n) for n in names])
with dask.config.set({"imgcurator.batch-size": 7, "imgcurator.dtype": "float32"}):
    print([config.get(n) for n in names], config.get("batch-size", 9))
"""
    out = in_a_process(code, DASK_CONFIG=str(tmp_path), DASK_IMGCURATOR__BATCH_SIZE="4")
    assert out.splitlines() == ["[4, 5, 'pillow', 'auto']", "[7, 5, 'pillow', 'float32'] 9"]


def test_an_argument_may_be_false_or_zero() -> None:
    with dask.config.set({"imgcurator.adjust-orientation": True, "imgcurator.batch-size": 8}):
        assert config.get("adjust-orientation", False) is False
        assert config.get("batch-size", 0) == 0
        assert config.get("batch-size", None) == 8


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(KeyError, match="no-such-setting"):
        config.get("no-such-setting")
