"""The recipes for Kubernetes and Slurm in the docs make what those systems accept, as far as tests can tell here."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.cli import dask_worker
from jsonschema import Draft7Validator, ValidationError

HOWTO = Path(__file__).parents[2] / "docs" / "howto"


def calls(page: str, name: str) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the calls of a function in a page's Python blocks."""
    for block in re.findall(r"```py(?:thon)?\n(.*?)```", (HOWTO / page).read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name:
                yield {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}


def check_worker(arguments: list[str]) -> None:
    """Parse a worker's command line as `dask worker` does."""
    dask_worker.main.make_context("dask worker", list(arguments), resilient_parsing=False)


def test_kubernetes_accepts_the_cluster() -> None:
    from dask_kubernetes.operator import make_cluster_spec

    (given,) = calls("kubernetes.md", "KubeCluster")
    made = make_cluster_spec(**given)
    files = importlib.metadata.files("dask-kubernetes") or []
    (crd,) = (file for file in files if str(file).endswith("crds/daskcluster.yaml"))
    (version,) = yaml.safe_load(crd.read_text())["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    Draft7Validator(schema).validate(made)
    with pytest.raises(ValidationError):
        Draft7Validator(schema).validate(made | {"spec": {"worker": {"replicas": "many"}}})
    worker = made["spec"]["worker"]["spec"]["containers"][0]
    assert worker["resources"] == given["resources"]
    assert worker["args"][:2] == ["dask", "worker"]
    # The operator puts in the rest: the name and the scheduler's address.
    check_worker([*worker["args"][2:], "tcp://scheduler:8786"])


@pytest.mark.parametrize("number", [0, 1])
def test_slurm_jobs_start_workers(number: int) -> None:
    from dask_jobqueue.slurm import SLURMJob

    given = list(calls("slurm.md", "SLURMCluster"))[number]
    script = SLURMJob("tcp://10.0.0.1:8786", name="worker", **given).job_script()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    directives = dict(re.findall(r"#SBATCH (-\w|--[\w-]+)[ =](\S+)", script))
    assert directives["-p"] == given["queue"]
    assert directives["-t"] == given["walltime"]
    assert directives["--cpus-per-task"] == str(given["job_cpu"])
    if number == 1:
        assert directives["--gres"] == "gpu:1"
    command = next(line for line in script.splitlines() if "tcp://10.0.0.1:8786" in line)
    assert given.get("worker_command", "distributed.cli.dask_worker") in command
    if number == 0:
        check_worker(command.split(" -m distributed.cli.dask_worker ")[1].split())
