"""Commands on a score table: `select`, `dedup`, `add`, `export`, `search`, `report`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click

from .live import display, make_console
from .options import (
    TIERS,
    Json,
    asked_of,
    cluster_options_with,
    given_of,
    light_options,
    overwrite_option,
    quiet_option,
    scores_argument,
    steps_options,
    storage_option,
    where_options,
)


@click.command()
@scores_argument
@click.option("--out", required=True, metavar="DIR", help="Folder for the selected rows, itself a score table.")
@steps_options
@light_options
@storage_option
@overwrite_option
@quiet_option
def select(scores: tuple[str, ...], out: str, quiet: bool, steps: list[Any], **options: Any) -> None:
    """Keep the rows of a score table that match an expression; no image is read.

    \b
    dask-imgcurator select run/scores --where 'aesthetic_score >= 5.5 and width >= 512' --out run/selected
    dask-imgcurator select run/scores --min-aesthetic 5 --top '30% by clip_score' --out run/selected
    dask-imgcurator select run/scores --exclude seen.txt --only uid=subset.npy --out run/selected

    Expressions can use the table's columns, numbers, 'text', + - * / %, comparisons, and, or, not, in (…), is null. A
    row with an unknown result (a missing score) is dropped. Steps are applied in the order given: --top before --where
    takes the best of all rows, then those of them that match.
    """
    from ..jobs.tables import select_rows as run
    from . import summary

    with display(quiet) as monitor:
        selection = run(list(scores), out, steps, monitor=monitor, **given_of(options))
    if not quiet:
        summary.print_selection(selection, out)


@click.command()
@scores_argument
@click.option("--out", metavar="DIR", help="Folder for the remaining rows; without it they are only counted.")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    type=click.Choice(TIERS),
    help="Kind of duplicates to drop; repeatable. [default: all whose column exists]",
)
@click.option(
    "--eps",
    metavar="X",
    type=float,
    multiple=True,
    default=[0.05],
    show_default=True,
    help="Semantic duplicates have a cosine of at least 1 - X; repeat to compare counts.",
)
@click.option(
    "--max-distance",
    metavar="N",
    type=int,
    default=4,
    show_default=True,
    help="Maximum number of bits in which hashes differ.",
)
@click.option(
    "--keep",
    metavar="COLUMN",
    help="Keep the row of each group with the highest value; 'random': one at random. [default: the first]",
)
@click.option("--lowest", is_flag=True, help="Keep the row with the lowest value instead.")
@click.option(
    "--rule",
    type=click.Choice(["components", "semdedup", "nemo"]),
    default="components",
    show_default=True,
    help="How to choose which semantic duplicates to drop.",
)
@click.option(
    "--n-cells",
    metavar="N",
    type=click.IntRange(1),
    help="k-means cells of the semantic tier. [default: 2 √rows; 1 up to 20,000 rows]",
)
@click.option("--seed", metavar="N", type=int, help="Seed of the cells and of --keep random. [default: 0]")
@click.option(
    "--against",
    metavar="INDEX",
    help="Also drop duplicates of the rows in an index: an existing dataset, or a benchmark.",
)
@click.option("--index", metavar="DIR", help="Save an index of the remaining rows, for --against.")
@click.option(
    "--groups",
    metavar="FILE",
    help="Write the groups to a Parquet file: their rows, which one is kept, how similar they are.",
)
@light_options
@storage_option
@overwrite_option
@quiet_option
def dedup(scores: tuple[str, ...], out: str | None, quiet: bool, eps: tuple[float, ...], **options: Any) -> None:
    """Drop the duplicates of a score table: same bytes, same look, same content.

    \b
    dask-imgcurator dedup run/scores --eps 0.02 --eps 0.05 --eps 0.1            count only
    dask-imgcurator dedup run/scores --keep aesthetic_score --out run/unique    drop them, keep the best
    dask-imgcurator dedup run/scores --against eval.index --out run/clean       decontaminate
    """
    from ..jobs.dedup import drop_duplicates as run
    from . import summary

    with display(quiet) as monitor:
        given = asked_of(options)
        found = run(list(scores), out, monitor=monitor, eps=eps[0] if len(eps) == 1 else list(eps), **given)
    if not quiet:
        summary.print_duplicates(found, out)


@click.command()
@scores_argument
@click.option("--out", required=True, metavar="DIR", help="Folder for the extended table.")
@click.option("--head", "heads", metavar="FILE|NAME", multiple=True, help="Your own head; repeatable.")
@click.option("--clip-score", is_flag=True, help="Add clip_score: the cosine of caption and image.")
@click.option(
    "--prompt",
    "prompts",
    metavar="NAME=TEXT",
    multiple=True,
    help="Probability of a text against neutral ones, as NAME_score; repeat a NAME to give it several texts.",
)
@click.option("--caption-stats", is_flag=True, help="Add the numbers of words and characters of the caption.")
@click.option("--language", is_flag=True, help="Add the language of the caption (needs the extra 'text').")
@click.option("--aesthetic-head", metavar="NAME", help="Published head for aesthetic_score, if the table lacks it.")
@click.option("--nsfw-head", metavar="NAME", help="Published head for nsfw_score, if the table lacks it.")
@click.option("--clusters", metavar="K", type=click.IntRange(1), help="Add K clusters of the embeddings (needs FAISS).")
@click.option(
    "--reference", metavar="SCORES", help="With --clusters: count the rows of another score table in each cluster."
)
@click.option("--seed", metavar="N", type=int, help="Seed of --clusters. [default: 0]")
@click.option("--weights-dir", metavar="DIR", help="Folder with the published heads.")
@cluster_options_with("none: threads of this process; for texts as in score")
@storage_option
@overwrite_option
@quiet_option
def add(scores: tuple[str, ...], out: str, quiet: bool, prompts: tuple[str, ...], **options: Any) -> None:
    """Add columns to a score table from its embeddings and captions; no image is decoded.

    \b
    dask-imgcurator add run/scores --clip-score --out run/more
    dask-imgcurator add run/scores --clusters 1000 --reference imagenet/scores --out run/more
    dask-imgcurator add run/scores --prompt 'watermark=a photo with a watermark' --head my.safetensors --out run/more
    """
    from ..jobs.columns import add_columns as run

    if options["clusters"] is None and (options["reference"] or options["seed"] is not None):
        raise click.UsageError("--reference and --seed are for --clusters K")
    asked: dict[str, list[str]] = {}
    for prompt in prompts:
        name, equals, text = prompt.partition("=")
        if not equals or not text.strip() or not name.strip():
            raise click.UsageError(
                f"--prompt {prompt!r}: write NAME=TEXT, such as 'watermark=a photo with a watermark'"
            )
        asked.setdefault(name.strip(), []).append(text.strip())
    with display(quiet) as monitor:
        given = asked_of(options)
        added = run(list(scores), out, prompts=asked or None, monitor=monitor, **given)
    if not quiet:
        make_console().print(f"added {', '.join(added)}: {out}")


class _Formats(click.Choice):
    """The export formats, looked up lazily because that imports a lot."""

    def __init__(self) -> None:
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        from ..exports.base import formats

        return tuple(formats())


@click.command("export")
@scores_argument
@click.option("--out", required=True, metavar="PATH", help="Output folder; a file for datacomp-subset and list.")
@click.option(
    "--format",
    "format_",
    required=True,
    type=_Formats(),
    help="Target layout.",
)
@click.option("--where", metavar="EXPR", help="Only rows that match the expression.")
@click.option("--arch", type=click.Choice(["b32", "l14"]), help="For datacomp: CLIP model of scores and embeddings.")
@click.option("--column", metavar="COLUMN", help="For list: the column to list. [default: key]")
@click.option(
    "--repeat",
    metavar="COLUMN",
    help="For datacomp-subset and list: column with the number of times that each row is listed.",
)
@light_options
@storage_option
@overwrite_option
@quiet_option
def export_(scores: tuple[str, ...], out: str, format_: str, where: str | None, quiet: bool, **options: Any) -> None:
    """Write a score table in the layout of another project.

    \b
    dask-imgcurator export run/scores --format clip-retrieval --out index
    dask-imgcurator export run/selected --format list --out keys.txt
    dask-imgcurator export run/selected --format datacomp-subset --repeat times --out subset.npy
    """
    from ..exports.base import formats
    from ..jobs.tables import export_scores as run
    from ..results import count

    takes = {name: inspect.signature(known.function).parameters for name, known in formats().items()}
    for option in ("arch", "column", "repeat"):
        if options[option] is not None and option not in takes[format_]:
            able = " or ".join(name for name, parameters in takes.items() if option in parameters)
            raise click.UsageError(f"--{option} is for the format {able}, not for {format_}")
    with display(quiet) as monitor:
        given = asked_of(options)
        written = run(list(scores), out, format_, where, monitor=monitor, **given)
    if not quiet:
        make_console().print(f"{count(written.rows, 'row')} in {count(len(written.files), 'file')}: {out}")


@click.command()
@scores_argument
@click.option("--text", metavar="TEXT", multiple=True, help="What the images show: 'a red car'; repeatable.")
@click.option("--image", metavar="FILE", multiple=True, help="Find images similar to this one; repeatable.")
@click.option(
    "--like",
    metavar="KEY",
    multiple=True,
    help="Row to find similar ones to; SHARD:KEY if the key is not unique; repeatable.",
)
@click.option("-k", "k", metavar="N", type=click.IntRange(1), default=20, show_default=True, help="Rows per query.")
@where_options
@click.option("--html", metavar="FILE", help="HTML page to write, with the pictures.")
@click.option("--out", metavar="FILE", help="Write the rows, in the format of its extension: .parquet, .csv or .json.")
@click.option("--index", metavar="DIR", help="Search with an index of this table: faster for millions of rows.")
@click.option("--build-index", metavar="DIR", help="Build such an index first, then search with it (needs FAISS).")
@click.option("--model", metavar="NAME", help="Model of the queries. [default: the model recorded in the table]")
@click.option("--pretrained", metavar="TAG|PATH", help="Its weights; a path for your own checkpoint.")
@light_options
@storage_option
@quiet_option
def search(
    scores: tuple[str, ...],
    out: str | None,
    build_index: str | None,
    quiet: bool,
    where: str | None,
    **options: Any,
) -> None:
    """Find the images of a score table most similar to a text, an image, or one of its rows.

    \b
    dask-imgcurator search run/scores --text 'a red car' --html cars.html
    dask-imgcurator search run/scores --image photo.jpg --where 'width >= 512' -k 50 --out found.parquet
    dask-imgcurator search run/scores --like 000123456
    dask-imgcurator search run/scores --build-index run/index

    Several queries give one result each. Text queries need a model with a text tower, which the starter lacks.
    """
    from ..jobs.search import search as run
    from ..similarity.index import build_search_index
    from . import summary

    asked = any(options[name] for name in ("text", "image", "like"))
    if not asked and build_index is None:
        raise click.UsageError("nothing to search for: give --text, --image or --like")
    if out is not None and Path(out).suffix not in (".parquet", ".csv", ".json"):
        raise click.BadParameter(f"{out!r} must end in .parquet, .csv or .json", param_hint="--out")
    if build_index is not None:
        if options["index"] is not None:
            raise click.UsageError("give --index for an existing index or --build-index for a new one, not both")
        built = build_search_index(list(scores), build_index, storage_options=options["storage_options"])
        options["index"] = build_index
        if not quiet:
            summary.print_search_index(built)
    if not asked:
        return
    with display(quiet) as monitor:
        found = run(list(scores), where=where, monitor=monitor, **given_of(options))
    if out is not None:
        _write_rows(found, out, options["storage_options"])
    if not quiet:
        summary.print_search(found, options["html"], out)


def _write_rows(found: Any, out: str, storage_options: dict[str, Any] | None) -> None:
    from ..storage.files import write_whole

    with write_whole(out, storage_options) as file:
        if out.endswith(".parquet"):
            found.to_parquet(file, index=False)
        elif out.endswith(".csv"):
            found.to_csv(file, index=False)
        else:
            found.to_json(file, orient="records", force_ascii=False)


@click.command("report")
@click.argument("scores", nargs=-1, metavar="[SCORES...]")
@click.option("--out", default="report.html", show_default=True, metavar="FILE", help="The page.")
@steps_options
@click.option("--groups", metavar="FILE", help="Duplicates to show side by side: a file written by dedup --groups.")
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Instead, show what only one of two selections keeps: folders written by select or dedup, or expressions "
    "on SCORES.",
)
@light_options
@storage_option
@click.option(
    "--source-options",
    metavar="JSON",
    type=Json(),
    help="The same for the source shards, from which pictures are made. [default: as --storage-options]",
)
@quiet_option
def report_(
    scores: tuple[str, ...],
    out: str,
    compare: tuple[str, str] | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Show what a selection keeps and drops, or two selections side by side, as a self-contained page.

    \b
    dask-imgcurator report run/scores --min-aesthetic 5 --top '30% by clip_score' --out look.html
    dask-imgcurator report run/scores --groups groups.parquet
    dask-imgcurator report --compare run/selected run/stricter
    dask-imgcurator report run/scores --compare 'aesthetic_score >= 5' 'aesthetic_score >= 5.5'
    """
    from ..jobs.pages import compare_selections, write_report

    steps, groups = (options.pop(name) for name in ("steps", "groups"))
    if compare and (steps or groups):
        raise click.UsageError("--compare takes two selections and nothing else: write conditions into A and B")
    if not compare and not scores:
        raise click.UsageError("name a score table, or two selections with --compare A B")
    with display(quiet) as monitor:
        given = asked_of(options)
        given.pop("backend", None)  # pages are made from a few rows, in pandas
        if compare:
            given.pop("client", None)  # nothing here needs a cluster
            found = compare_selections(*compare, out, list(scores) or None, **given)
            words = f"{found.both:,} in both, {found.only_a:,} only in A, {found.only_b:,} only in B: {out}"
        else:
            write_report(list(scores), out, steps, groups=groups, monitor=monitor, **given)
            words = f"report: {out}"
    if not quiet:
        make_console().print(words)
