"""The table of the strengths that were tried, and the best ones as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.tune_compare.experiment import accuracies, best_strengths
from benchmarks.harness.tables import Column, table
from benchmarks.harness.tuning import FIRST_SEED

if TYPE_CHECKING:
    from benchmarks.harness import Results

TEXT = """# Strengths on {stream}, {scenario}-incremental

Average accuracy after {experiences} experiences of {steps} steps on the {validation:g} % of the training examples \
that were held out, seeds from {first_seed} on, by strength."""


def report(results: Results, out: Path) -> str:
    """Accuracy by strategy and strength; the best strengths also as ``strengths.json`` in the folder `out`."""
    chosen, found, row = best_strengths(results), accuracies(results), results.first
    (out / "strengths.json").write_text(json.dumps(chosen, indent=2) + "\n", encoding="utf-8")
    strengths = sorted({strength for tried in found.values() for strength in tried})
    rows = [[name, *(found[name].get(s) for s in strengths), f"{best:g}"] for name, best in chosen.items()]
    columns = [Column("strategy"), *(Column(f"{s:g}") for s in strengths), Column("chosen")]
    text = TEXT.format_map({**row, "validation": 100 * row["validation"], "first_seed": FIRST_SEED})
    edges = [name for name, best in chosen.items() if best in (min(found[name]), max(found[name]))]
    beyond = f"Chosen at an end of the grid, so perhaps better beyond it: {', '.join(edges)}."
    return "\n\n".join([text, table(columns, rows), *([beyond] if edges else [])])
