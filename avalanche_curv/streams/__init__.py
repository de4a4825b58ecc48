"""Benchmarks for Avalanche that need no download."""

from avalanche_curv.streams.digits import PermutedDigits, RotatedDigits, SplitDigits
from avalanche_curv.streams.sine import SineBoundary

__all__ = ["PermutedDigits", "RotatedDigits", "SineBoundary", "SplitDigits"]
