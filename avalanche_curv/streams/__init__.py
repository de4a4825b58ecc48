"""Benchmarks for Avalanche that need no download, and non-stationary streams over any data set."""

from avalanche_curv.streams.changes import GrowingClasses, LabelFlip, PixelPermutation, RandomLabels, ShuffledLabels
from avalanche_curv.streams.digits import PermutedDigits, RotatedDigits, SplitDigits
from avalanche_curv.streams.nonstationary import NonStationary
from avalanche_curv.streams.sine import SineBoundary

__all__ = [
    "GrowingClasses",
    "LabelFlip",
    "NonStationary",
    "PermutedDigits",
    "PixelPermutation",
    "RandomLabels",
    "RotatedDigits",
    "ShuffledLabels",
    "SineBoundary",
    "SplitDigits",
]
