"""Ours and a peer on the same shards, by turns: A B A B.

    python benchmarks/peers/compare.py 'shards/*.tar' --model ViT-B-32 --peer plain_loop --python peer/bin/python

The same architecture with random weights, in float32, on this machine's CPU; a peer has an environment of its own (the
head of its script says what it needs). Prints CPU and wall seconds an image of each run, and the ratios of the means.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402


def run(python: str, script: str, shards: list[str], model: str) -> dict[str, Any]:
    """One run, in a process of its own."""
    command = [python, str(HERE / f"{script}.py"), *shards, "--model", model]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or python == sys.executable}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"of": script, **found}


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--peer", default="plain_loop", choices=["plain_loop", "nemo_curator"])
    parser.add_argument("--python", default=sys.executable, help="the peer's interpreter (default: this one)")
    args = parser.parse_args()

    from dask_imgcurator.storage.urls import expand

    shards = expand(args.shards)
    runs = []
    for _ in range(2):
        runs.append(run(sys.executable, "ours", shards, args.model))
        runs.append(run(args.python, args.peer, shards, args.model))
        for one in runs[-2:]:
            print(one, file=sys.stderr, flush=True)

    def each(script: str, figure: str) -> float:
        own = [one for one in runs if one["of"] == script]
        return sum(one[figure] / one["images"] for one in own) / len(own)

    ratios = {figure: round(each("ours", figure) / each(args.peer, figure), 3) for figure in ("cpu_s", "wall_s")}
    result = {"benchmark": "peers", "machine": common.machine(), "versions": common.versions(), "model": args.model}
    rows = [(f"{figure} an image, ours / {args.peer}", str(value)) for figure, value in ratios.items()]
    common.show({**result, "shards": len(shards), "runs": runs, "ratios": ratios}, rows)


if __name__ == "__main__":
    main()
