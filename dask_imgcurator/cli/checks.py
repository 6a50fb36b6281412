"""Commands that check: `parity`, `verify`, `doctor`."""

from __future__ import annotations

import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..results import count
from .errors import FAILED, Failure
from .live import display, make_console
from .options import (
    dtype_option,
    encoder_options,
    given_of,
    quiet_option,
    remote_options,
    shards_argument,
    storage_option,
    threshold_options,
)

_INDENT = 22


@click.command()
@shards_argument
@threshold_options
@encoder_options
@dtype_option("float32, like open_clip's in the comparison; others apply to this library's side only")
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Maximum number of images to compare, spread over the shards.",
)
@click.option("--json", "record", metavar="FILE", type=click.Path(), help="JSON file for all figures.")
@quiet_option
def parity(shards: tuple[str, ...], record: str | None, quiet: bool, **options: Any) -> None:
    """Compare pixels, embeddings, scores and decisions with open_clip's own way, on your images.

    \b
    dask-imgcurator parity 'laion/*.tar' --model ViT-L-14 --pretrained openai
    dask-imgcurator parity 'laion/*.tar' --min-aesthetic 5.5 --max-nsfw 0.3 --limit 5000

    Each image goes both ways on the same weights: through this library's decoder, and through Pillow and open_clip's
    own transform and model. Prints how far they differ, and how many images only one of them would keep at each
    threshold (without any given: aesthetic_score >= 5 and nsfw_score < 0.5). Runs in one process, without a cluster.
    """
    from ..checks.parity import ParityOptions, compare
    from ..storage.files import write_whole
    from . import summary

    if record is not None and not Path(record).parent.is_dir():
        raise click.BadParameter(f"no such folder: {Path(record).parent}", param_hint="--json")
    with display(quiet) as monitor:
        result = compare(list(shards), ParityOptions(**given_of(options)), monitor=monitor)
    if record is not None:
        with write_whole(record) as file:
            file.write(json.dumps(result.record(), ensure_ascii=False).encode() + b"\n")
    if not quiet:
        summary.print_parity(result)


@click.command()
@click.argument("folder", metavar="DIR")
@remote_options
def verify(folder: str, storage_options: dict[str, Any] | None, out_options: dict[str, Any] | None) -> None:
    """Compare a finished folder with its inputs, byte for byte.

    \b
    dask-imgcurator verify curated

    Reads every curated sample and its source. If anything differs, prints the reasons and exits with code 1.
    """
    from ..checks.verify import verify as run

    wrong = 0
    for what, problem in run(folder, storage_options=out_options or storage_options, source_options=storage_options):
        wrong += problem is not None
        click.echo(f"{what}: {problem or 'ok'}")
    if wrong:
        raise Failure(f"{count(wrong, 'check')} found differences from the inputs", FAILED)


@click.command()
@click.argument("out", metavar="OUT")
@storage_option
def status(out: str, storage_options: dict[str, Any] | None) -> None:
    """Show the progress of a run on any machine, from the files of its output folder alone.

    \b
    dask-imgcurator status run/scores

    Lists the files of each result folder, and for each active or interrupted run its progress, its speed, and
    whether it still reports.
    """
    from ..runs.marks import find_status

    console = make_console()
    for found in find_status(out, storage_options):
        console.print(f"{found.folder}: {count(found.files, 'file')} of `{found.command}`")
        for job in found.jobs or ("finished, or not begun: no active run",):
            console.print(f"  {job}")


@click.command()
def doctor() -> None:
    """Report what is installed, what is visible, what would be used, and why not."""
    from ..checks.doctor import examine
    from ..results import count

    console, problems = make_console(), 0
    signs = {"ok": (" ", "green"), "note": ("·", "yellow"), "problem": ("!", "bold red")}
    for finding in examine():
        problems += finding.state == "problem"
        sign, style = signs[finding.state]
        for line in _wrapped(finding.value, console.width) or [""]:
            console.print(f"{sign} {finding.topic:<{_INDENT - 2}}{line}", style=style)
            sign, finding = " ", replace(finding, topic="")
        for line in _wrapped(f"→ {finding.remedy}", console.width) if finding.remedy else []:
            console.print(f"{'':<{_INDENT}}{line}")
    if problems:
        raise Failure(f"{count(problems, 'problem')}: see the lines that begin with !", FAILED)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines beside a column of topics; paths and names are never split."""
    return textwrap.wrap(text, max(20, width - _INDENT), break_long_words=False, break_on_hyphens=False)
