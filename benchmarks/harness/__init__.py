"""What an experiment is written with; the tables and the plots of its report are in `tables` and `plots`."""

from benchmarks.harness.arguments import fraction, one_of, positive
from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import Config, Context, Experiment, Options
from benchmarks.harness.results import Results
from benchmarks.harness.summary import Summary, summarise

__all__ = [
    "Config",
    "Context",
    "Experiment",
    "Options",
    "Results",
    "Summary",
    "UsageError",
    "fraction",
    "one_of",
    "positive",
    "summarise",
]
