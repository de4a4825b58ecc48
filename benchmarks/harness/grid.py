"""Names that have moved."""  # until every experiment is converted: benchmarks.harness.experiment

from benchmarks.harness.experiment import Unit, describe, digest, grid

__all__ = ["Unit", "describe", "digest", "grid"]
