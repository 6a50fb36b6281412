"""Commands that score and write: `curate`, `score`, `write`, `demo`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from .live import display, make_console
from .options import (
    TIERS,
    cluster_options,
    given_of,
    light_options,
    limit_option,
    log_option,
    missing_option,
    model_options,
    overwrite_option,
    pack_options,
    quiet_option,
    remote,
    remote_options,
    resume_option,
    scores_argument,
    shards_argument,
    steps_options,
    where_options,
)


@contextlib.contextmanager
def _shown_all_the_same(quiet: bool) -> Iterator[None]:
    """Print the summary even if shards are missing."""
    from ..jobs.score import MissingShardsError
    from . import summary

    try:
        yield
    except MissingShardsError as err:
        if not quiet:
            summary.print_run(err.result)
        raise


@click.command()
@shards_argument
@click.option("--out", required=True, metavar="DIR", help="Folder for scores/, shards/, report.html and run.json.")
@steps_options
@click.option(
    "--dedup",
    metavar="TIER",
    multiple=True,
    type=click.Choice(TIERS),
    help="Drop duplicates among the remaining images: exact (same bytes), perceptual (same look) or semantic (similar "
    "content); repeatable.",
)
@click.option(
    "--keep",
    metavar="COLUMN",
    help="With --dedup: keep the best of each group by this column, as in dedup. [default: the first]",
)
@model_options
@pack_options
@cluster_options
@remote_options
@resume_option
@overwrite_option
@missing_option
@limit_option
@log_option
@quiet_option
def curate(
    shards: tuple[str, ...],
    out: str,
    log: str | None,
    quiet: bool,
    steps: list[Any],
    dedup: tuple[str, ...],
    keep: str | None,
    **options: Any,
) -> None:
    """Score shards, keep the images that match an expression, write them as curated shards.

    \b
    dask-imgcurator curate 'laion/{00000..00127}.tar' --out curated \\
        --model ViT-L-14 --pretrained openai --where 'aesthetic_score >= 5 and nsfw_score < 0.5'

    Kept samples keep all their members, byte for byte. Completed work is saved; rerun the same command to resume.
    """
    if keep and not dedup:
        raise click.UsageError("--keep is for --dedup TIER")

    from ..jobs.curate import curate as run
    from . import summary

    unique = {"tiers": dedup, **({"keep": keep} if keep else {})} if dedup else None
    with _shown_all_the_same(quiet), display(quiet, log) as monitor:
        result = run(list(shards), out, steps=steps, dedup=unique, monitor=monitor, **given_of(remote(options)))
    if not quiet:
        summary.print_run(result)


@click.command()
@shards_argument
@click.option("--out", required=True, metavar="DIR", help="Folder for the score table: one Parquet file per shard.")
@model_options
@cluster_options
@remote_options
@resume_option
@overwrite_option
@missing_option
@limit_option
@log_option
@quiet_option
def score(shards: tuple[str, ...], out: str, log: str | None, quiet: bool, **options: Any) -> None:
    """Score shards into a table: the expensive part, done once.

    \b
    dask-imgcurator score 'laion/*.tar' --out run/scores --model ViT-B-32 --pretrained openai
    """
    from ..jobs.score import score_shards as run
    from . import summary

    with _shown_all_the_same(quiet), display(quiet, log) as monitor:
        result = run(list(shards), out, monitor=monitor, **given_of(remote(options)))
    if not quiet:
        summary.print_run(result)


@click.command()
@click.argument("source")
@click.option("--out", required=True, metavar="DIR", help="Folder for the shards.")
@click.option("--image", metavar="COLUMN", help="Image column, if a table has several columns of binary data.")
@pack_options
@light_options
@remote_options
@overwrite_option
@quiet_option
def pack(source: str, out: str, quiet: bool, **options: Any) -> None:
    """Pack pictures into webdataset shards, from a folder of files or from Parquet with image bytes.

    \b
    dask-imgcurator pack photos --out shards            photos/cat.jpg, photos/cat.txt, photos/2020/dog.png …
    dask-imgcurator pack train.parquet --out shards     an image dataset from Hugging Face

    Files with the same name as a picture belong to its sample. Bytes are not changed.
    """
    from ..jobs.pack import pack as run
    from ..results import count

    with display(quiet) as monitor:
        given = given_of(remote(options))
        given.pop("backend", None)
        written = run(source, out, monitor=monitor, **given)
    if not quiet:
        make_console().print(f"{count(len(written), 'shard')} in {out}")


@click.command()
@scores_argument
@click.option("--out", required=True, metavar="DIR", help="Folder for the curated shards.")
@click.option(
    "--allow-shards",
    metavar="PREFIX",
    multiple=True,
    help="Copy from shards in this folder too; repeatable. [default: the folders of the table's own shards]",
)
@where_options
@pack_options
@cluster_options
@remote_options
@resume_option
@overwrite_option
@log_option
@quiet_option
def write(
    scores: tuple[str, ...],
    out: str,
    log: str | None,
    quiet: bool,
    where: str | None,
    **options: Any,
) -> None:
    """Write the rows of a score table as curated shards, byte for byte from their sources.

    \b
    dask-imgcurator write run/selected --out run/shards
    dask-imgcurator write run/scores --min-aesthetic 5 --out run/shards
    """
    from ..jobs.curate import write_selection as run
    from . import summary

    with display(quiet, log) as monitor:
        given = given_of(options)
        given["source_options"] = options["storage_options"]
        given["storage_options"] = given.pop("out_options", options["storage_options"])
        selection, written = run(list(scores), out, where, monitor=monitor, **given)
    if not quiet:
        summary.print_selection(selection, out)
        make_console().print(summary.written_line(written, out))


@click.command()
@click.option(
    "--out",
    default="imgcurator-demo",
    show_default=True,
    metavar="DIR",
    help="Folder for the sample shards and the result.",
)
@click.option("--count", default=320, show_default=True, type=click.IntRange(64), help="Number of sample images.")
@cluster_options
@quiet_option
def demo(out: str, count: int, quiet: bool, **options: Any) -> None:
    """Run everything on sample images, offline, in about a minute.

    Makes shards of photographs, near-copies, blurred, dark and broken images, scores them with the starter model,
    keeps the good ones and leaves the results for you to inspect.
    """
    from ..checks import samples
    from ..jobs.curate import curate as run
    from . import summary

    console = make_console()
    where = "aesthetic_score >= 5 and width >= 160 and height >= 160"
    made = samples.make_sample_shards(Path(out) / "samples", count=count)
    if not quiet:
        console.print(f"{len(made.manifest)} sample images in {len(made.shards)} shards: {made.folder}")
        console.print(
            f"dask-imgcurator curate {made.folder}/*.tar --out {out} --model starter --column kind --where '{where}'\n",
            style="bold",
        )
    with display(quiet) as monitor:
        result = run(
            [str(p) for p in made.shards],
            out,
            where=where,
            model="starter",
            columns=["kind"],
            overwrite=True,  # replaces an earlier demo with other samples
            monitor=monitor,
            **given_of(options),
        )
    if not quiet:
        summary.print_kinds(result, made.manifest)
        summary.print_run(result)
