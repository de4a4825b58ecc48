"""The methods that are compared: each builds its strategy, and `STRATEGIES` has them by name."""

from benchmarks.methods.base import Learner, Method
from benchmarks.methods.bounds import AllAtOnce, Joint, Plain
from benchmarks.methods.gradient_memory import AGEM, GEM
from benchmarks.methods.ours import Ours, Projected, Spectral
from benchmarks.methods.path_integral import PathIntegral
from benchmarks.methods.penalties import MAS, SI, AvalancheEWC, FixedSI, LwF, RWalk
from benchmarks.methods.rehearsal import DarkReplay, GDumb, MemoryReplay, NearestMean, Rehearsal
from benchmarks.methods.strategies import STRATEGIES, Named, named, strategies

__all__ = [
    "AGEM",
    "GEM",
    "MAS",
    "SI",
    "STRATEGIES",
    "AllAtOnce",
    "AvalancheEWC",
    "DarkReplay",
    "FixedSI",
    "GDumb",
    "Joint",
    "Learner",
    "LwF",
    "MemoryReplay",
    "Method",
    "Named",
    "NearestMean",
    "Ours",
    "PathIntegral",
    "Plain",
    "Projected",
    "RWalk",
    "Rehearsal",
    "Spectral",
    "named",
    "strategies",
]
