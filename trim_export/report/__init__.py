"""What people read: tables in a terminal, the model card, and (`trim_export.report.page`) a page to look at."""

from trim_export.report.card import model_card
from trim_export.report.tables import (
    bench_table,
    block_table,
    choice_sentence,
    choice_table,
    facts,
    module_table,
    recovery_table,
    structured_table,
    summary_table,
    table,
)
from trim_export.report.words import achieved, in_order, megabytes

__all__ = [
    "achieved",
    "bench_table",
    "block_table",
    "choice_sentence",
    "choice_table",
    "facts",
    "in_order",
    "megabytes",
    "model_card",
    "module_table",
    "recovery_table",
    "structured_table",
    "summary_table",
    "table",
]
