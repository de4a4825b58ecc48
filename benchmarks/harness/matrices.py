"""Names that have moved."""  # until every experiment is converted: benchmarks.harness.plots

from benchmarks.harness.plots import accuracy_matrices, accuracy_matrix, plot_matrices

__all__ = ["accuracy_matrices", "accuracy_matrix", "plot_matrices"]
