"""The methods that are compared: each builds its strategy, and `methods` has them by name."""

from benchmarks.methods.base import AllAtOnce, Joint, Learner, Method, Multitask, Plain
from benchmarks.methods.by_name import methods
from benchmarks.methods.ours import Ours, Projected, Spectral
from benchmarks.methods.penalties import MAS, SI, AvalancheEWC, FixedSI, LwF, PathIntegral, RWalk
from benchmarks.methods.rehearsal import AGEM, GEM, DarkReplay, GDumb, MemoryReplay, NearestMean, Rehearsal

__all__ = [
    "AGEM", "GEM", "MAS", "SI", "AllAtOnce", "AvalancheEWC", "DarkReplay", "FixedSI", "GDumb", "Joint", "Learner",
    "LwF", "MemoryReplay", "Method", "Multitask", "NearestMean", "Ours", "PathIntegral", "Plain", "Projected", "RWalk",
    "Rehearsal", "Spectral", "methods",
]  # fmt: skip
