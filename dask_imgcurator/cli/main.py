"""The command line: flags become the arguments of the public functions."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from . import summary

if TYPE_CHECKING:
    from ..monitor import Monitor

__all__ = ["cli", "main"]

USAGE, FAILED = 2, 1

#: Commands that take over what an earlier run finished.
_RESUMING = ("curate", "score", "write", "demo")


# --- errors ---------------------------------------------------------------------------------------


class _Failure(click.ClickException):
    """An error as the user sees it: what, and what to do; no traceback, no usage text."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        click.echo(f"dask-imgcurator: {self.format_message()}", file=file or sys.stderr, err=file is None)


@contextlib.contextmanager
def _plain_errors(resumes: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn the errors that a user can mend into a line and an exit code.

    `resumes` says whether the command that failed goes on from what is finished when it is given again.
    """
    from ..engine.backend import BackendError
    from ..engine.run import JobError
    from ..models.weights import WeightsError
    from ..storage.tar_copy import WriteError

    def kept(space: str) -> str:
        return f"{space}What is finished is kept: the same command goes on from there." if resumes() else ""

    try:
        yield
    except click.UsageError as err:
        command = err.ctx.command_path if err.ctx else "dask-imgcurator"
        raise _Failure(f"{err.format_message()} (see {command} --help)", USAGE) from None
    except (JobError, WeightsError, WriteError) as err:
        raise _Failure(f"{err}{kept(chr(10))}", FAILED) from None
    except (
        BackendError,
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        ModuleNotFoundError,
        ValueError,
    ) as err:
        raise _Failure(_text(err), USAGE) from None
    except OSError as err:
        raise _Failure(_text(err), FAILED) from None
    except KeyboardInterrupt:
        raise _Failure(f"stopped.{kept(' ')}", FAILED) from None


def _text(err: BaseException) -> str:
    if isinstance(err, OSError) and err.strerror and err.filename:
        return f"{err.strerror}: {err.filename}"
    return str(err) or type(err).__name__


class _Group(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _plain_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        with contextlib.suppress(ValueError):  # Only the main thread may set it.
            signal.signal(signal.SIGTERM, stop)
        with _plain_errors(lambda: ctx.invoked_subcommand in _RESUMING):
            return super().invoke(ctx)


# --- options --------------------------------------------------------------------------------------


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _dtype_option(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help=f"Of the encoder. [default: {default}]",
    )


_encoder_options = _options(
    click.option(
        "--model",
        metavar="NAME",
        help="open_clip's name of a model (ViT-L-14, ViT-B-32 …), or 'starter': a preview that needs no download. "
        "[default: ViT-L-14 of OpenAI; starter where its weights cannot be had]",
    ),
    click.option(
        "--pretrained",
        metavar="TAG|PATH",
        help="open_clip's tag of the weights, or a checkpoint's path; 'random:SEED' for benchmarks.",
    ),
    click.option(
        "--aesthetic-head",
        metavar="NAME",
        default="auto",
        show_default=True,
        help="Head for aesthetic_score, or 'none'; 'auto' takes the one trained on the model.",
    ),
    click.option(
        "--nsfw-head", metavar="NAME", default="auto", show_default=True, help="Head for nsfw_score, or 'none'."
    ),
    click.option(
        "--weights-dir",
        metavar="DIR",
        type=click.Path(),
        help="Folder with the heads' published files, looked at before the cache and the network.",
    ),
    click.option(
        "--column",
        "columns",
        metavar="FIELD",
        multiple=True,
        help="Field of the samples' .json to keep as a column; may be repeated.",
    ),
    click.option(
        "--caption", metavar="FIELD", help="Field of the .json that holds the caption, instead of the .txt member."
    ),
    click.option(
        "--image",
        metavar="EXT",
        multiple=True,
        help="Extension of the image member (jpg, seg.png …), where a sample has several; may be repeated, the "
        "preferred one first.",
    ),
    click.option(
        "--batch-size",
        metavar="N",
        type=click.IntRange(1),
        help="Images a forward pass. [default: 16 on a CPU, 512 on a GPU]",
    ),
)

_model_options = _options(
    _encoder_options,
    _dtype_option("the fastest that the processor has"),
    click.option(
        "--measures/--no-measures",
        default=True,
        show_default=True,
        help="Columns of technical quality (brightness, contrast, blur, entropy, colourfulness) and a perceptual hash.",
    ),
)


class _Json(click.ParamType):
    """A JSON object, or ``@FILE`` with one."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        try:
            text = Path(value[1:]).read_text() if value.startswith("@") else value
            parsed = json.loads(text)
        except (OSError, ValueError) as err:
            self.fail(f"cannot be read as JSON ({err}): write for example '{{\"anon\": true}}', or @FILE", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is no JSON object: write for example '{{\"anon\": true}}'", param, ctx)
        return parsed


_storage_option = click.option(
    "--storage-options",
    metavar="JSON",
    type=_Json(),
    help="For URLs (s3://, gs://, https:// …): options of the fsspec file system, as JSON or @FILE.",
)
_remote_options = _options(
    _storage_option,
    click.option(
        "--out-options",
        metavar="JSON",
        type=_Json(),
        help="The same for the folder that is written (verify: DIR). [default: as --storage-options]",
    ),
)


def _remote(options: dict[str, Any]) -> dict[str, Any]:
    """Fill in the options of the output."""
    return {**options, "out_options": options["out_options"] or options["storage_options"]}


_where_options = _options(
    click.option(
        "--where",
        metavar="EXPR",
        help="Which images to keep: any expression on the columns, such as 'aesthetic_score >= 5 and width >= 512'.",
    ),
    click.option("--min-aesthetic", metavar="X", type=float, help="Short for --where 'aesthetic_score >= X'."),
    click.option("--max-nsfw", metavar="X", type=float, help="Short for --where 'nsfw_score < X'."),
)

_ranking_options = _options(
    click.option(
        "--top",
        metavar="STEP",
        multiple=True,
        help="Of these, the best: '30% by clip_score', '10000 by aesthetic_score'; may be repeated, one after another.",
    ),
    click.option(
        "--sample", metavar="STEP", help="Of what is left, a random part: '10000', '10% seed 1', '20 by cluster'."
    ),
)

_pack_options = _options(
    click.option(
        "--max-count",
        metavar="N",
        type=click.IntRange(1),
        default=10_000,
        show_default=True,
        help="Samples a curated shard, at most.",
    ),
    click.option(
        "--max-size",
        metavar="SIZE",
        default="1GB",
        show_default=True,
        help="Size of a curated shard, at most (500MB, 1GiB).",
    ),
)


def _cluster(workers: str) -> Callable[[Any], Any]:
    """Options that say where a command runs; `workers` is what --n-workers defaults to."""
    return _options(
        click.option(
            "--backend",
            type=click.Choice(["auto", "cudf", "pandas"]),
            help="Where to compute. [default: auto, a GPU where there is one]",
        ),
        click.option(
            "--scheduler",
            metavar="ADDRESS",
            help="Run on a Dask cluster: the address of its scheduler, tcp://host:8786.",
        ),
        click.option(
            "--n-workers",
            metavar="N",
            type=click.IntRange(1),
            help=f"Worker processes on this machine. [default: {workers}]",
        ),
    )


_cluster_options = _cluster("one a GPU; on a CPU one a core with 4 GB")
_light_options = _cluster("none: threads of this process do")

_resume_option = click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Take over what an earlier run with the same settings finished.",
)
_quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress and no summary.")
_shards_argument = click.argument("shards", nargs=-1, required=True, metavar="SHARDS...")
_scores_argument = click.argument("scores", nargs=-1, required=True, metavar="SCORES...")


@click.group(
    "imgcurator", cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="dask-imgcurator")
def cli() -> None:
    """Curate image datasets: score every image once, decide as often as you like.

    \b
    Try it on sample images:     dask-imgcurator demo
    The whole job in one go:     dask-imgcurator curate 'laion/*.tar' --out curated --min-aesthetic 5
    The same, step by step:      dask-imgcurator score 'laion/*.tar' --out run/scores
                                 dask-imgcurator select run/scores --min-aesthetic 5 --out run/selected
                                 dask-imgcurator write run/selected --out run/shards

    SHARDS are webdataset tars: paths, globs, folders, brace notation ({00000..00127}.tar) or URLs.
    """


# --- commands -------------------------------------------------------------------------------------


@cli.command()
@_shards_argument
@click.option("--out", required=True, metavar="DIR", help="Folder for scores/, shards/, report.html and run.json.")
@_where_options
@_model_options
@_pack_options
@_cluster_options
@_remote_options
@_resume_option
@_quiet_option
def curate(shards: tuple[str, ...], out: str, quiet: bool, **options: Any) -> None:
    """Score shards, keep the images that an expression takes, write them as curated shards.

    \b
    dask-imgcurator curate 'laion/{00000..00127}.tar' --out curated \\
        --model ViT-L-14 --pretrained openai --where 'aesthetic_score >= 5 and nsfw_score < 0.5'

    Kept samples keep all their members, byte for byte. Stop it whenever you like: the same command goes on from there.
    """
    from ..jobs.curate import curate as run

    with _display(quiet) as monitor:
        result = run(list(shards), out, monitor=monitor, **_given(_remote(options)))
    if not quiet:
        summary.print_run(result)


@cli.command()
@_shards_argument
@click.option("--out", required=True, metavar="DIR", help="Folder for the score table: one Parquet file a shard.")
@_model_options
@_cluster_options
@_remote_options
@_resume_option
@_quiet_option
def score(shards: tuple[str, ...], out: str, quiet: bool, **options: Any) -> None:
    """Score shards into a table: the expensive half, done once.

    \b
    dask-imgcurator score 'laion/*.tar' --out run/scores --model ViT-B-32 --pretrained openai
    """
    from ..jobs.score import score_shards as run

    with _display(quiet) as monitor:
        result = run(list(shards), out, monitor=monitor, **_given(_remote(options)))
    if not quiet:
        summary.print_run(result)


@cli.command()
@_scores_argument
@click.option("--out", required=True, metavar="DIR", help="Folder for the selected rows, itself a score table.")
@_where_options
@_ranking_options
@_light_options
@_storage_option
@_quiet_option
def select(
    scores: tuple[str, ...],
    out: str,
    quiet: bool,
    where: str | None,
    min_aesthetic: float | None,
    max_nsfw: float | None,
    **options: Any,
) -> None:
    """Keep the rows of a score table that an expression takes; no image is read.

    \b
    dask-imgcurator select run/scores --where 'aesthetic_score >= 5.5 and width >= 512' --out run/selected
    dask-imgcurator select run/scores --min-aesthetic 5 --top '30% by clip_score' --out run/selected

    The expression knows the table's columns, numbers, 'text', + - * / %, comparisons, and, or, not, in (…), is null.
    A row for which it is unknown (a missing score) is not kept.
    """
    from ..jobs.tables import select_rows as run
    from ..select.where import combine

    where = combine(where, min_aesthetic, max_nsfw)
    with _display(quiet) as monitor:
        selection = run(list(scores), out, where, monitor=monitor, **_given(options))
    if not quiet:
        summary.print_selection(selection, out)


@cli.command()
@_scores_argument
@click.option("--out", required=True, metavar="DIR", help="Folder for the curated shards.")
@_where_options
@_pack_options
@_cluster_options
@_remote_options
@_resume_option
@_quiet_option
def write(
    scores: tuple[str, ...],
    out: str,
    quiet: bool,
    where: str | None,
    min_aesthetic: float | None,
    max_nsfw: float | None,
    **options: Any,
) -> None:
    """Write the rows of a score table as curated shards, byte for byte from their sources.

    \b
    dask-imgcurator write run/selected --out run/shards
    dask-imgcurator write run/scores --min-aesthetic 5 --out run/shards
    """
    from ..jobs.curate import write_selection as run
    from ..select.where import combine

    where = combine(where, min_aesthetic, max_nsfw)
    with _display(quiet) as monitor:
        given = _given(options)
        given["source_options"] = options["storage_options"]
        given["storage_options"] = given.pop("out_options", options["storage_options"])
        selection, written = run(list(scores), out, where, monitor=monitor, **given)
    if not quiet:
        summary.print_selection(selection, out)
        summary.stdout().print(summary.written_line(written, out))


@cli.command()
@_scores_argument
@click.option("--out", metavar="DIR", help="Folder for the rows that are left; without it they are only counted.")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    type=click.Choice(["exact", "perceptual", "semantic"]),
    help="Which; may be repeated. [default: all whose column the table has]",
)
@click.option(
    "--eps",
    metavar="X",
    type=float,
    multiple=True,
    default=[0.05],
    show_default=True,
    help="Semantic duplicates have a cosine of at least 1 - X; may be repeated to count.",
)
@click.option(
    "--max-distance", metavar="N", type=int, default=4, show_default=True, help="Bits in which hashes may differ."
)
@click.option(
    "--keep", metavar="COLUMN", help="Of each group, the row with the highest value stays. [default: the first]"
)
@click.option("--lowest", is_flag=True, help="The row with the lowest value stays.")
@click.option(
    "--rule",
    type=click.Choice(["components", "semdedup", "nemo"]),
    default="components",
    show_default=True,
    help="Who goes in the semantic tier.",
)
@click.option(
    "--against", metavar="INDEX", help="Also drop what an index holds: a set that exists, or a benchmark's images."
)
@click.option("--index", metavar="DIR", help="Save an index of what is left, for --against.")
@click.option("--groups", metavar="FILE", help="Write the groups to a Parquet file: who, kept by whom, how similar.")
@_light_options
@_storage_option
@_quiet_option
def dedup(scores: tuple[str, ...], out: str | None, quiet: bool, eps: tuple[float, ...], **options: Any) -> None:
    """Drop the duplicates of a score table: same bytes, same look, same content.

    \b
    dask-imgcurator dedup run/scores --eps 0.02 --eps 0.05 --eps 0.1            how many would go
    dask-imgcurator dedup run/scores --keep aesthetic_score --out run/unique    drop them, the best stays
    dask-imgcurator dedup run/scores --against eval.index --out run/clean       decontaminate
    """
    from ..jobs.tables import drop_duplicates as run

    with _display(quiet) as monitor:
        given = _asked(options)
        found = run(list(scores), out, monitor=monitor, eps=eps[0] if len(eps) == 1 else list(eps), **given)
    if not quiet:
        summary.print_duplicates(found, out)


@cli.command()
@_scores_argument
@click.option("--out", required=True, metavar="DIR", help="Folder for the larger table.")
@click.option("--head", "heads", metavar="FILE|NAME", multiple=True, help="Head of your own; may be repeated.")
@click.option("--clip-score", is_flag=True, help="Cosine of caption and image.")
@click.option(
    "--prompt",
    "prompts",
    metavar="NAME=TEXT",
    multiple=True,
    help="Probability of a text against neutral ones, as NAME_score; the same NAME may be repeated.",
)
@click.option("--caption-stats", is_flag=True, help="Words and characters of the caption.")
@click.option("--language", is_flag=True, help="Language of the caption (needs the extra 'text').")
@click.option("--aesthetic-head", metavar="NAME", help="A published head, where there is no aesthetic_score yet.")
@click.option("--nsfw-head", metavar="NAME", help="A published head, where there is no nsfw_score yet.")
@click.option("--weights-dir", metavar="DIR", help="Folder with the published heads.")
@_cluster("none: threads of this process do; for texts as in score")
@_storage_option
@_quiet_option
def add(scores: tuple[str, ...], out: str, quiet: bool, prompts: tuple[str, ...], **options: Any) -> None:
    """Add columns to a score table from its embeddings and captions; no image is decoded.

    \b
    dask-imgcurator add run/scores --clip-score --out run/more
    dask-imgcurator add run/scores --prompt 'watermark=a photo with a watermark' --head my.safetensors --out run/more
    """
    from ..jobs.tables import add_columns as run

    asked: dict[str, list[str]] = {}
    for prompt in prompts:
        name, equals, text = prompt.partition("=")
        if not equals or not text.strip() or not name.strip():
            raise click.UsageError(
                f"--prompt {prompt!r}: write NAME=TEXT, such as 'watermark=a photo with a watermark'"
            )
        asked.setdefault(name.strip(), []).append(text.strip())
    with _display(quiet) as monitor:
        given = _asked(options)
        added = run(list(scores), out, prompts=asked or None, monitor=monitor, **given)
    if not quiet:
        summary.stdout().print(f"added {', '.join(added)}: {out}", highlight=False, soft_wrap=True)


class _Formats(click.Choice):
    """The export formats, looked up when the command needs them: that imports much."""

    def __init__(self) -> None:
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        from ..exports.base import formats

        return tuple(formats())


@cli.command("export")
@_scores_argument
@click.option("--out", required=True, metavar="PATH", help="Folder; a file for datacomp-subset and list.")
@click.option(
    "--format",
    "format_",
    required=True,
    type=_Formats(),
    help="Whose layout.",
)
@click.option("--where", metavar="EXPR", help="Only the rows that the expression takes.")
@_light_options
@_storage_option
@_quiet_option
def export_(scores: tuple[str, ...], out: str, format_: str, where: str | None, quiet: bool, **options: Any) -> None:
    """Write a score table in the layout of another project.

    \b
    dask-imgcurator export run/scores --format clip-retrieval --out index
    dask-imgcurator export run/selected --format list --out keys.txt
    """
    from ..jobs.tables import export_scores as run

    with _display(quiet) as monitor:
        given = _asked(options)
        written = run(list(scores), out, format_, where, monitor=monitor, **given)
    if not quiet:
        console = summary.stdout()
        console.print(f"{written.rows:,} rows in {len(written.files):,} files: {out}", highlight=False, soft_wrap=True)


@cli.command()
@_scores_argument
@click.option("--text", metavar="TEXT", multiple=True, help="What the images show: 'a red car'; may be repeated.")
@click.option("--image", metavar="FILE", multiple=True, help="Image to find similar ones of; may be repeated.")
@click.option(
    "--like",
    metavar="KEY",
    multiple=True,
    help="Row to find others like; SHARD:KEY where several have the key; may be repeated.",
)
@click.option("-k", "k", metavar="N", type=click.IntRange(1), default=20, show_default=True, help="Rows for each.")
@_where_options
@click.option("--html", metavar="FILE", help="Write a page with the pictures.")
@click.option("--out", metavar="FILE", help="Write the rows, as its name says: .parquet, .csv or .json.")
@click.option("--index", metavar="DIR", help="Search by an index of this table: faster for millions of rows.")
@click.option("--build-index", metavar="DIR", help="Build such an index first, and search by it (needs FAISS).")
@click.option("--model", metavar="NAME", help="Model of the queries. [default: the one that the table names]")
@click.option("--pretrained", metavar="TAG|PATH", help="Its weights; a path where they are a checkpoint of your own.")
@_light_options
@_storage_option
@_quiet_option
def search(
    scores: tuple[str, ...],
    out: str | None,
    build_index: str | None,
    quiet: bool,
    where: str | None,
    min_aesthetic: float | None,
    max_nsfw: float | None,
    **options: Any,
) -> None:
    """Find the images of a score table that are most like a text, an image, or one of its rows.

    \b
    dask-imgcurator search run/scores --text 'a red car' --html cars.html
    dask-imgcurator search run/scores --image photo.jpg --where 'width >= 512' -k 50 --out found.parquet
    dask-imgcurator search run/scores --like 000123456
    dask-imgcurator search run/scores --build-index run/index

    Several queries are answered one after another. A text needs a model with a text tower: not the starter model.
    """
    from ..select.where import combine
    from ..similarity.index import build_search_index
    from ..similarity.search import search as run

    asked = any(options[name] for name in ("text", "image", "like"))
    if not asked and build_index is None:
        raise click.UsageError("there is nothing to search for: give --text, --image or --like")
    if out is not None and Path(out).suffix not in (".parquet", ".csv", ".json"):
        raise click.BadParameter(f"{out!r} must end in .parquet, .csv or .json", param_hint="--out")
    if build_index is not None:
        if options["index"] is not None:
            raise click.UsageError("--index and --build-index: give the one for an index that is there, or the other")
        built = build_search_index(list(scores), build_index, storage_options=options["storage_options"])
        options["index"] = build_index
        if not quiet:
            summary.print_search_index(built)
    if not asked:
        return
    where = combine(where, min_aesthetic, max_nsfw)
    with _display(quiet) as monitor:
        found = run(list(scores), where=where, monitor=monitor, **_given(options))
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


@cli.command("report")
@click.argument("scores", nargs=-1, metavar="[SCORES...]")
@click.option("--out", default="report.html", show_default=True, metavar="FILE", help="The page.")
@_where_options
@_ranking_options
@click.option("--groups", metavar="FILE", help="Duplicates to show side by side: the file that dedup --groups wrote.")
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Instead, show what only one of two selections keeps: folders that select or dedup wrote, or expressions "
    "on SCORES.",
)
@_light_options
@_storage_option
@click.option(
    "--source-options",
    metavar="JSON",
    type=_Json(),
    help="The same for the source shards, from which pictures are made. [default: as --storage-options]",
)
@_quiet_option
def report_(
    scores: tuple[str, ...],
    out: str,
    compare: tuple[str, str] | None,
    quiet: bool,
    min_aesthetic: float | None,
    max_nsfw: float | None,
    **options: Any,
) -> None:
    """Show what a selection keeps and throws away, or two selections side by side: a page that needs nothing else.

    \b
    dask-imgcurator report run/scores --min-aesthetic 5 --top '30% by clip_score' --out look.html
    dask-imgcurator report run/scores --groups groups.parquet
    dask-imgcurator report --compare run/selected run/stricter
    dask-imgcurator report run/scores --compare 'aesthetic_score >= 5' 'aesthetic_score >= 5.5'
    """
    from ..jobs.pages import compare_selections, write_report
    from ..select.where import combine

    where = combine(options.pop("where"), min_aesthetic, max_nsfw)
    groups, top, sample = (options.pop(name) for name in ("groups", "top", "sample"))
    if compare and (where or groups or top or sample):
        raise click.UsageError("--compare takes two selections and nothing else: write conditions into A and B")
    if not compare and not scores:
        raise click.UsageError("name a score table, or two selections with --compare A B")
    with _display(quiet) as monitor:
        given = _asked(options)
        given.pop("backend", None)  # pages are made of a few rows, in pandas
        if compare:
            given.pop("client", None)  # nothing is computed that needs a cluster
            found = compare_selections(*compare, out, list(scores) or None, **given)
            words = f"{found.both:,} in both, {found.only_a:,} only in A, {found.only_b:,} only in B: {out}"
        else:
            write_report(list(scores), out, where, top=top, sample=sample, groups=groups, monitor=monitor, **given)
            words = f"report: {out}"
    if not quiet:
        summary.stdout().print(words, highlight=False, soft_wrap=True)


@cli.command()
@click.option(
    "--out",
    default="imgcurator-demo",
    show_default=True,
    metavar="DIR",
    help="Folder for the sample shards and the result.",
)
@click.option("--count", default=320, show_default=True, type=click.IntRange(64), help="Number of sample images.")
@_cluster_options
@_quiet_option
def demo(out: str, count: int, quiet: bool, **options: Any) -> None:
    """Everything on sample images, offline, in about a minute.

    Makes shards of photographs, near-copies, blurred, dark and broken images, scores them with the starter model,
    keeps the good ones and leaves the result to look at.
    """
    from ..checks import samples
    from ..jobs.curate import curate as run

    console = summary.stdout()
    where = "aesthetic_score >= 5 and width >= 160 and height >= 160"
    made = samples.make_sample_shards(Path(out) / "samples", count=count)
    if not quiet:
        console.print(
            f"{len(made.manifest)} sample images in {len(made.shards)} shards: {made.folder}", highlight=False
        )
        console.print(
            f"dask-imgcurator curate {made.folder}/*.tar --out {out} --model starter --column kind --where '{where}'\n",
            style="bold",
            highlight=False,
            soft_wrap=True,
        )
    with _display(quiet) as monitor:
        result = run(
            [str(p) for p in made.shards],
            out,
            where=where,
            model="starter",
            columns=["kind"],
            monitor=monitor,
            **_given(options),
        )
    if not quiet:
        summary.print_kinds(result, made.manifest)
        summary.print_run(result)


@cli.command()
@_shards_argument
@_where_options
@_encoder_options
@_dtype_option("float32, as open_clip's in the comparison; another one is taken on this library's side only")
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Images to compare, at most; spread over the shards.",
)
@click.option("--json", "record", metavar="FILE", type=click.Path(), help="File for all figures, as JSON.")
@_quiet_option
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

    if record is not None and not Path(record).parent.is_dir():
        raise click.BadParameter(f"there is no folder {Path(record).parent}", param_hint="--json")
    with _display(quiet) as monitor:
        result = compare(list(shards), ParityOptions(**_given(options)), monitor=monitor)
    if record is not None:
        with write_whole(record) as file:
            file.write(json.dumps(result.record(), ensure_ascii=False).encode() + b"\n")
    if not quiet:
        summary.print_parity(result)


@cli.command()
@click.argument("folder", metavar="DIR")
@_remote_options
def verify(folder: str, storage_options: dict[str, Any] | None, out_options: dict[str, Any] | None) -> None:
    """Compare a finished folder with its inputs, byte for byte.

    \b
    dask-imgcurator verify curated

    Reads every curated sample and its source. Exit code 1, with the reasons, where anything differs.
    """
    from ..checks.verify import verify as run

    wrong = 0
    for what, problem in run(folder, storage_options=out_options or storage_options, source_options=storage_options):
        wrong += problem is not None
        click.echo(f"{what}: {problem or 'ok'}")
    if wrong:
        raise _Failure(f"{wrong} of what was looked at differ{'s' * (wrong == 1)} from the inputs", FAILED)


@cli.command()
def doctor() -> None:
    """Say what is installed, what is visible, what would be used, and why not."""
    from rich.text import Text

    from ..checks.doctor import examine

    table = summary.make_table("", "found", "what to do")
    signs = {"ok": ("ok", "green"), "note": ("note", "yellow"), "problem": ("PROBLEM", "bold red")}
    problems = 0
    for finding in examine():
        problems += finding.state == "problem"
        sign, style = signs[finding.state]
        table.add_row(Text(f"{finding.topic}"), Text(finding.value), Text(finding.remedy), Text(sign, style))
    summary.stdout().print(table)
    if problems:
        raise _Failure(f"{problems} problem{'s' * (problems > 1)}: see the table", FAILED)


def main() -> None:
    """Run ``dask-imgcurator``."""
    cli(prog_name="dask-imgcurator")


# --- what is shown --------------------------------------------------------------------------------


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that were given, where to run as one of them; the functions have their own defaults."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    scheduler, n_workers = given.pop("scheduler", None), given.pop("n_workers", None)
    if scheduler is not None and n_workers is not None:
        raise click.UsageError(
            f"--n-workers is for a new cluster; the scheduler at {scheduler} has its own workers: give one of them"
        )
    return given | ({"client": scheduler or n_workers} if scheduler or n_workers else {})


def _asked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same without flags that were not given."""
    return {name: value for name, value in _given(options).items() if value is not False}


@contextlib.contextmanager
def _display(quiet: bool) -> Iterator[Monitor]:
    """Show a run on stderr: a live line on a terminal, plain lines elsewhere, nothing with --quiet."""
    from rich.console import Console

    from .live import make_monitor

    console = Console(stderr=True, quiet=quiet)
    with make_monitor(console) as monitor:
        yield monitor
