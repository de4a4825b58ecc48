"""Names that have moved."""  # until every experiment is converted: benchmarks.harness.plots

from benchmarks.harness.plots import COLOURS, MARKERS, MUTED, styles

__all__ = ["COLOURS", "MARKERS", "MUTED", "styles"]
