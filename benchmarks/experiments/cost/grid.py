"""The rows of each model."""

from __future__ import annotations

from dataclasses import replace

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
from benchmarks.experiments.cost import Config, Work
from benchmarks.experiments.cost.models import MLP, ConvNet, ResNet18, Transformer
from benchmarks.experiments.cost.peers import installed

FEW = 1000  # examples of the structures that look at rows
SAMPLED = Fisher(samples=1, seed=0)
TOP = LowRank(Rank(10))

DIAGONALS = (
    Work("empirical Fisher, diagonal", EmpiricalFisher(), Diagonal()),
    Work("Fisher, diagonal", Fisher(), Diagonal()),
    Work("Fisher of one sample, diagonal", SAMPLED, Diagonal()),
)
FACTORS = (
    Work("empirical Fisher, KFAC", EmpiricalFisher(), Kronecker()),
    Work("Fisher of one sample, KFAC", SAMPLED, Kronecker()),
    Work("Fisher, KFAC (type 2)", Fisher(), Kronecker()),
)
EIGENVALUES = (
    Work("empirical Fisher, EKFAC", EmpiricalFisher(), EKFAC()),
    Work("Fisher of one sample, EKFAC", SAMPLED, EKFAC()),
)
RANKS = (
    Work("empirical Fisher, top 10", EmpiricalFisher(), TOP, FEW),
    Work("empirical Fisher, top 10 flat", EmpiricalFisher(), FlatSpectrum(TOP), FEW),
    Work("empirical Fisher, top 10 of each layer", EmpiricalFisher(), BlockDiagonal(PerLayer(), TOP), FEW),
)
FREE = (
    Work("empirical Fisher, matrix-free on 10 %", EmpiricalFisher(), MatrixFree(fraction=0.1), FEW),
    Work("Fisher, matrix-free on 10 %", Fisher(), MatrixFree(fraction=0.1), FEW),
)
WHOLE = (
    Work("empirical Fisher, dense", EmpiricalFisher(), Dense()),
    Work("Fisher, dense", Fisher(), Dense()),
    Work("Fisher, dense for each parameter", Fisher(), BlockDiagonal()),
)


def grid() -> list[Config]:
    """One configuration for each model."""
    small_mlp, small_conv = MLP(64, 12), ConvNet(8, (4, 8), 32)
    all_works = (*DIAGONALS, *FACTORS, *EIGENVALUES, *RANKS, *FREE)
    peers = installed()
    few = tuple(peer for peer in peers if "empirical" in peer or "Avalanche" in peer or "one sample, KFAC" in peer)
    broad = Config(
        "vision transformer", Transformer(32, 8, 2, 64, 128), Transformer(8, 4, 1, 8, 8),
        (*DIAGONALS, *FACTORS, EIGENVALUES[0], RANKS[0], FREE[0]), few, examples=256, rounds=2, steps=3, pasts=(1,),
    )
    return [
        Config("MLP 784-400-400-10", MLP(784, 400), small_mlp, all_works, peers, rounds=3, cost=4.0),
        Config("MLP 64-12-12-10", small_mlp, small_mlp, (*DIAGONALS[:2], *WHOLE), examples=FEW),
        Config(
            "conv net", ConvNet(28, (32, 64), 480), small_conv, all_works, peers,
            examples=2000, peer_examples=256, rounds=2, cost=3.0,
        ),
        replace(
            broad, label="ResNet-18", model=ResNet18(), small=None, works=(DIAGONALS[0], *FACTORS[:2]),
            examples=128, steps=2, cost=2.0,
        ),
        broad,
    ]
