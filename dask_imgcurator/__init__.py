"""Curate image datasets with Dask: a shard is a partition, an image is a row, curation is a DataFrame query.

Importing this package loads neither torch nor cudf.
"""

from importlib.metadata import version as _version

from . import config as _config  # noqa: F401  (registers the defaults)
from .cluster import start_client
from .collection import embed, read_scores, read_webdataset, score_aesthetic, score_nsfw, to_webdataset
from .deciding import add_columns, drop_duplicates, export_scores, select_rows
from .dedup_index import build_index
from .deduplication import dedup, duplicate_groups, find_duplicates
from .exports import export
from .filters import filter_frame
from .head_files import save_head
from .job import curate, score_shards, write_selection
from .selection import apply_steps, funnel, quantile, sample, top_count, top_fraction
from .text_steps import caption_stats, embed_text, score_clip, score_head, score_prompts

__all__ = [
    "add_columns",
    "apply_steps",
    "build_index",
    "caption_stats",
    "curate",
    "dedup",
    "drop_duplicates",
    "duplicate_groups",
    "embed",
    "embed_text",
    "export",
    "export_scores",
    "filter_frame",
    "find_duplicates",
    "funnel",
    "quantile",
    "read_scores",
    "read_webdataset",
    "sample",
    "save_head",
    "score_aesthetic",
    "score_clip",
    "score_head",
    "score_nsfw",
    "score_prompts",
    "score_shards",
    "select_rows",
    "start_client",
    "to_webdataset",
    "top_count",
    "top_fraction",
    "write_selection",
]

__version__ = _version("dask-imgcurator")
