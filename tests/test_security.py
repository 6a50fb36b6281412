"""What SECURITY.md states and no other test holds: hostile headers, texts, weights and secrets."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from distributed import Client
from servers import s3_server

import dask_imgcurator as dic
from dask_imgcurator.checks.samples import make_sample_shards
from dask_imgcurator.models import ModelError
from dask_imgcurator.models.encoders import load_encoder, resolve_encoder
from dask_imgcurator.runs.plan import score_files
from dask_imgcurator.storage.tar_index import index_shard

CODE = "from dask_imgcurator.cli.main import main; main()"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-c", CODE, *arguments]
    return subprocess.run(given, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("kind", ["x", "g", "L", "K"])
def test_an_endless_header_is_not_read(kind: str, tmp_path: Path) -> None:
    """Four gigabytes of name, in a file that takes no room."""
    path, size = tmp_path / "0.tar", 4 << 30
    header = tarfile.TarInfo("long")
    header.type, header.size = kind.encode(), size
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(size + 10240)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = index_shard(str(path))
    assert index.samples == []
    assert "extension header of 4,294,967,296 bytes" in str(index.error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_deep_json_costs_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.json", b"[" * 10**6), ("a.jpg", b"x"), ("b.json", b'{"n": 1}'), ("b.jpg", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = dic.read_webdataset(str(path), columns=["n:int64"], backend="pandas").compute()
    assert rows["key"].tolist() == ["a", "b"]
    assert rows["n"].isna().tolist() == [True, False]


def test_nothing_acts_on_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202e"
    folder = tmp_path / f"in{evil}"
    folder.mkdir()
    frame = pd.DataFrame({"key": ["a", evil], "shard": ["s", "s"], "status": ["ok", evil], "width": [1, 2]})
    frame.to_parquet(folder / "0.parquet")
    where, out = f"width > 0 and key != '{evil}'", tmp_path / f"out{evil}"
    done = command("select", str(folder), "--where", where, "--out", str(out))
    assert done.returncode == 0, done.stderr
    failed = command("select", str(folder), "--where", f"nothing > '{evil}'", "--out", str(tmp_path / "x"))
    assert failed.returncode == 2
    checked = command("verify", str(tmp_path / f"none{evil}"))
    for text in (done.stdout, done.stderr, failed.stderr, checked.stdout, checked.stderr):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "owned" in done.stdout


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_checkpoints_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Evil()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(ModelError) as told:
            load_encoder(resolve_encoder("ViT-B-32", str(tmp_path / name), "float32"), "cpu")
        assert "weights_only" not in str(told.value)
    assert not (tmp_path / "ran").exists()


def test_secrets_are_in_no_file(tmp_path: Path, client: Client) -> None:
    """Of storage options, and of a signed address all but the addresses by which samples are found."""
    made = make_sample_shards(tmp_path / "in", count=4, per_shard=4)
    with s3_server() as server:
        fs = server.file_system()
        fs.mkdir("secrets")
        fs.put(str(made.shards[0]), "secrets/0.tar")
        options = {**server.options, "key": "AKIASECRETKEY", "secret": "SECRETSECRET"}
        cheap: dict[str, Any] = {"model": "starter", "measures": False, "client": client}
        dic.curate("s3://secrets/0.tar", tmp_path / "run", storage_options=options, **cheap)
        _no(tmp_path / "run", "AKIASECRETKEY", "SECRETSECRET")
        signed = fs.sign("secrets/0.tar")
        result = dic.curate(signed, tmp_path / "signed", **cheap)
        assert result.samples == 4
        signature = signed.partition("Signature=")[2][:20]
        assert signature
        names = [str(p) for p in (tmp_path / "signed").rglob("*")]
        assert not [name for name in names if signature in name]
        arguments = json.loads((tmp_path / "signed" / "run.json").read_text())["arguments"]
        assert signature not in json.dumps(arguments)
        assert signature not in (tmp_path / "signed" / "report.html").read_text()


def _no(folder: Path, *secrets: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in data], path


def test_score_files_of_signed_addresses_are_named_by_their_paths() -> None:
    names = score_files(["https://h/a/0.tar?X-Amz-Signature=abc", "https://h/b/0.tar?X-Amz-Signature=def"], "/out", {})
    first, second = names.values()
    assert first == "/out/0.parquet"
    assert second.startswith("/out/0-") and "def" not in second
