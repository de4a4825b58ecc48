"""Names that have moved."""  # until every experiment is converted: benchmarks.harness.results

from benchmarks.harness.results import Summary, summarise

__all__ = ["Summary", "summarise"]
