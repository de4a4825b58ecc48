"""Names that have moved."""  # until every experiment is converted: benchmarks.harness.plots

from benchmarks.harness.plots import Points, plot_scatter

__all__ = ["Points", "plot_scatter"]
