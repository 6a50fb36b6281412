from .duplicates.deduplication import dedup, duplicate_groups, find_duplicates
from .duplicates.index import build_index
from .engine.cluster import start_client
from .exports.base import export
from .exports.scores import to_scores
from .jobs.columns import add_columns
from .jobs.curate import curate, write_selection
from .jobs.dedup import drop_duplicates
from .jobs.pack import pack
from .jobs.pages import compare_selections, write_report
from .jobs.score import score_shards
from .jobs.search import search
from .jobs.tables import export_scores, select_rows
from .models.head_files import save_head
from .report.explorer import explore
from .report.gallery import show
from .select.selection import apply_steps, funnel, quantile, sample, top_count, top_fraction
from .select.steps import exclude, only
from .select.where import filter_frame
from .similarity.clusters import assign_clusters
from .similarity.index import build_search_index
from .steps.captions import caption_stats, embed_text, score_clip
from .steps.embed import embed
from .steps.heads import score_aesthetic, score_head, score_nsfw
from .steps.prompts import score_prompts
from .steps.read import read_webdataset
from .steps.score_table import read_scores
from .steps.write import to_webdataset

__all__ = [
    "add_columns",
    "apply_steps",
    "assign_clusters",
    "build_index",
    "build_search_index",
    "caption_stats",
    "compare_selections",
    "curate",
    "dedup",
    "drop_duplicates",
    "duplicate_groups",
    "embed",
    "embed_text",
    "exclude",
    "explore",
    "export",
    "export_scores",
    "filter_frame",
    "find_duplicates",
    "funnel",
    "only",
    "pack",
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
    "search",
    "select_rows",
    "show",
    "start_client",
    "to_scores",
    "to_webdataset",
    "top_count",
    "top_fraction",
    "write_report",
    "write_selection",
]

__version__: str
