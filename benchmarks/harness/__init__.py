"""The building blocks of experiments, which ``python -m benchmarks`` runs, reports, compares and publishes.

How to add an experiment: add the folder ``benchmarks/experiments/NAME`` with

``__init__.py``
    Empty.
``experiment.py``
    Its docstring's first line is what ``list`` shows. It defines a frozen dataclass of one configuration (`Config`),
    the grid and the run (`Experiment`), and the object ``experiment``. It may import torch (within functions, so that
    ``--help`` is immediate), and imports no report::

        @dataclass(frozen=True)
        class Config:
            label: str                                                   # for display, unique in the grid
            method: str                                                  # every other field is a column of the results
            strength: float | None = None


        @dataclass(frozen=True)
        class NameOptions(Options):                                      # where it has options of its own
            stream: Annotated[str, one_of("stream", STREAMS)] = "sine"   # a default: --stream digits
            '''what is learned'''                                        # the help of the option
            steps: Annotated[int | None, positive()] = None              # --steps 100
            method: tuple[str, ...] = ()                                 # --method A --method B


        class Name(Experiment):
            name = "NAME"
            options_type = NameOptions

            def configs(self, options): ...                              # the grid, a small one with options.quick
            def run(self, config, seed, context): ...                    # {"metric": ..., "value": ..., "step": ...}


        experiment = Name()

``report.py``
    It defines ``report(results, out)``, which returns Markdown and draws its figures as PNG files in the folder `out`.
    It selects by columns and shows labels (`Results`), writes tables with `tables`, draws with `plots`, and may import
    names from ``experiment.py``. A terminal shows its first table, in the order that ``GLANCE`` says where that is
    defined (`terminal.Glance`)::

        def report(results: Results, out: Path) -> str:
            rows = [[one.label, one.final("accuracy"), one.first["strength"]] for one in results.each()]
            return "# Title\\n\\n" + table([Column("method"), Column("accuracy", 3, max), Column("λ", 1)], rows)

``README.md``
    The question and its answer, with the tables of published results (`published`) from ``published/`` beside it.
"""

from benchmarks.harness.errors import UsageError
from benchmarks.harness.experiment import Config, Context, Experiment, Record
from benchmarks.harness.options import Options
from benchmarks.harness.results import Results, Summary, summarise

__all__ = [
    "Config",
    "Context",
    "Experiment",
    "Options",
    "Record",
    "Results",
    "Summary",
    "UsageError",
    "summarise",
]
