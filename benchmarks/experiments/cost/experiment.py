"""What each curvature costs and how near it comes to the exact one, beside the tools that a user would pick instead."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.cost.report import report
from benchmarks.harness import Experiment, Options
from benchmarks.harness.experiment import Context, Record

if TYPE_CHECKING:
    from avalanche_curv import Curvature, Structure
    from benchmarks.experiments.cost.models import Family
    from benchmarks.harness.results import Results


FEW = 1000  # examples of the structures that look at rows


@dataclass(frozen=True)
class Work:
    """One row: a kind in a structure, built from the first `examples` (None for all)."""

    name: str
    curvature: Curvature
    structure: Structure
    examples: int | None = None


@dataclass(frozen=True)
class Tool:
    """Another tool for a curvature, by its title among the peers, and its installed package."""

    title: str
    package: str
    version: str


@dataclass(frozen=True)
class Config:
    """One model. Times are medians over `rounds`; steps are timed with the past of each number in `pasts`; accuracy is
    that on `small`. `peers` are the installed ones with their versions, so that installing one asks for a new run;
    they see the first `peer_examples`, since many of them are slow."""

    label: str
    model: Family
    small: Family | None
    works: tuple[Work, ...]
    peers: tuple[Tool, ...] = ()
    examples: int = 10_000
    peer_examples: int = 1000
    batch: int = 128
    rounds: int = 5
    steps: int = 12
    pasts: tuple[int, ...] = (1, 5)
    cost: float = 1.0


class Cost(Experiment):
    """Build time in gradient passes, step time in steps of Naive, bytes, and distance from the exact matrix."""

    name = "cost"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(seeds=1, jobs=1)  # each seed repeats the measurement; a second worker would disturb it

    def configs(self, options: Options) -> Sequence[Config]:
        return [_quick(config) for config in grid()] if options.quick else grid()

    def run(self, config: Config, seed: int, context: Context) -> Iterable[Record]:
        from benchmarks.experiments.cost.prices import run

        return run(config)

    def report(self, results: Results, out: Path) -> str:
        return report(results)


def grid() -> list[Config]:
    """One configuration for each model."""
    from avalanche_curv import (
        EKFAC,
        BlockDiagonal,
        Dense,
        Diagonal,
        EmpiricalFisher,
        Fisher,
        FlatSpectrum,
        Kronecker,
        LowRank,
        MatrixFree,
        PerLayer,
        Rank,
    )
    from benchmarks.experiments.cost.models import MLP, ConvNet, ResNet18, Transformer
    from benchmarks.experiments.cost.peers import installed

    sampled, top = Fisher(samples=1, seed=0), LowRank(Rank(10))
    diagonals = (
        Work("empirical Fisher, diagonal", EmpiricalFisher(), Diagonal()),
        Work("Fisher, diagonal", Fisher(), Diagonal()),
        Work("Fisher of one sample, diagonal", sampled, Diagonal()),
    )
    factors = (
        Work("empirical Fisher, KFAC", EmpiricalFisher(), Kronecker()),
        Work("Fisher of one sample, KFAC", sampled, Kronecker()),
        Work("Fisher, KFAC (type 2)", Fisher(), Kronecker()),
    )
    eigenvalues = (
        Work("empirical Fisher, EKFAC", EmpiricalFisher(), EKFAC()),
        Work("Fisher of one sample, EKFAC", sampled, EKFAC()),
    )
    ranks = (
        Work("empirical Fisher, top 10", EmpiricalFisher(), top, FEW),
        Work("empirical Fisher, top 10 flat", EmpiricalFisher(), FlatSpectrum(top), FEW),
        Work("empirical Fisher, top 10 of each layer", EmpiricalFisher(), BlockDiagonal(PerLayer(), top), FEW),
    )
    free = (
        Work("empirical Fisher, matrix-free on 10 %", EmpiricalFisher(), MatrixFree(fraction=0.1), FEW),
        Work("Fisher, matrix-free on 10 %", Fisher(), MatrixFree(fraction=0.1), FEW),
    )
    whole = (
        Work("empirical Fisher, dense", EmpiricalFisher(), Dense()),
        Work("Fisher, dense", Fisher(), Dense()),
        Work("Fisher, dense for each parameter", Fisher(), BlockDiagonal()),
    )
    small_mlp, small_conv = MLP(64, 12), ConvNet(8, (4, 8), 32)
    all_works = (*diagonals, *factors, *eigenvalues, *ranks, *free)
    tools = {peer: Tool(peer.title, peer.package, version) for peer, version in installed().items()}
    peers, few = tuple(tools.values()), tuple(tool for peer, tool in tools.items() if peer.broad)
    broad = Config(
        "vision transformer", Transformer(32, 8, 2, 64, 128), Transformer(8, 4, 1, 8, 8),
        (*diagonals, *factors, eigenvalues[0], ranks[0], free[0]), few, examples=256, rounds=2, steps=3, pasts=(1,),
    )
    return [
        Config("MLP 784-400-400-10", MLP(784, 400), small_mlp, all_works, peers, rounds=3, cost=4.0),
        Config("MLP 64-12-12-10", small_mlp, small_mlp, (*diagonals[:2], *whole), examples=FEW),
        Config(
            "conv net", ConvNet(28, (32, 64), 480), small_conv, all_works, peers,
            examples=2000, peer_examples=256, rounds=2, cost=3.0,
        ),
        replace(
            broad, label="ResNet-18", model=ResNet18(), small=None, works=(diagonals[0], *factors[:2]),
            examples=128, steps=2, cost=2.0,
        ),
        broad,
    ]


def _quick(config: Config) -> Config:
    """Every row on tiny models and few examples."""
    works = tuple(replace(work, examples=work.examples and 32) for work in config.works)
    tiny = replace(config, model=config.model.tiny(), works=works, rounds=1)
    if config.model.large:
        return replace(tiny, examples=16, peer_examples=16, batch=8, steps=2)
    return replace(tiny, examples=256, peer_examples=64, batch=32, steps=3)


experiment = Cost()
