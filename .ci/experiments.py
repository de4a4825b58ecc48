"""A smoke run of every experiment, in two processes that load torch and Avalanche once. Status 1 where one fails.

    PYTHONPATH=. python .ci/experiments.py RESULTS [DATASET_ROOT]
"""

import io
import multiprocessing
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

from benchmarks.harness.command import main
from benchmarks.registry import EXPERIMENTS

ALL_ROWS = "compare --stream sine --strategy all"  # the longest, so it starts first
ON_MNIST = [
    "trust_region --stream split_mnist",
    "compare --stream split_mnist --scenario class --strategy Naive --strategy EWC",
]


def ran(words: list[str]) -> tuple[int, float, str]:
    """The exit status of a quick run, its seconds, and what it printed."""
    begin, said = time.perf_counter(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = main(["run", *words, "--quick", "--seeds", "1", "--jobs", "1"])
    return status, time.perf_counter() - begin, f"{' '.join(words)}\n{said.getvalue()}"


if __name__ == "__main__":
    out, *root = sys.argv[1:]
    lines = [[*line.split(), "--out", out] for line in [ALL_ROWS, *EXPERIMENTS]]
    lines += [[*line.split(), "--out", out, "--dataset-root", *root] for line in ON_MNIST if root]
    failed = False
    with multiprocessing.get_context("spawn").Pool(2) as processes:
        for status, seconds, said in processes.imap_unordered(ran, lines):
            print(f"{seconds:5.1f} s  {said if status else said.partition(' --out')[0]}", flush=True)
            failed |= status != 0
    sys.exit(failed)
