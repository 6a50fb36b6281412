"""Whether embeddings are those of open_clip: `dask-imgcurator parity` on every image, with the machine on record.

    python benchmarks/parity.py SHARDS --model ViT-B-32 --pretrained random:0

Every image that Pillow can decode goes both ways: through this library's decoder and encoder, and through Pillow,
open_clip's own transform and its own model (for the starter, which open_clip does not have: its transform, our model).
By default both are float32, so that what is left is the difference of the pixels. With --dtype only ours changes.
"""

from __future__ import annotations

import argparse
import json
import sys

import common
import dask
from rich.console import Console

from dask_imgcurator.checks.parity import ParityOptions, compare
from dask_imgcurator.checks.parity_record import Parity
from dask_imgcurator.cli.summary import print_parity


def measure(args: argparse.Namespace) -> Parity:
    """Run the comparison."""
    head = "auto" if args.heads else "none"
    options = ParityOptions(
        model=args.model,
        pretrained=args.pretrained,
        dtype=args.dtype,
        batch_size=args.batch_size,
        backend=args.backend,
        limit=args.limit,
        aesthetic_head=head,
        nsfw_head=head,
        weights_dir=args.weights_dir,
    )
    with dask.config.set({"imgcurator.decoder": args.decoder}):
        return compare(args.shards, options)


def main() -> None:
    """Run as a script."""
    parser = common.make_parser(__doc__)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--decoder", default="auto", choices=["auto", "dali", "pillow"], help="on our side")
    parser.add_argument("--limit", type=int, default=sys.maxsize, metavar="N", help="images, at most (default: all)")
    parser.add_argument("--heads", action="store_true", help="compare scores too; needs the heads' published weights")
    parser.add_argument("--weights-dir", metavar="DIR", help="folder with these")
    args = parser.parse_args()
    about = common.machine()
    with common.plain_errors():
        result = measure(args)
    print_parity(result, Console(stderr=True))
    print(json.dumps({"benchmark": "parity", "machine": about, "versions": common.versions(), **result.record()}))


if __name__ == "__main__":
    main()
