"""How wrong a quadratic model of past loss is, example by example, at any parameters."""

from avalanche_curv.core.fidelity.examples import ExampleModels
from avalanche_curv.core.fidelity.measures import Comparison, Fidelity
from avalanche_curv.core.fidelity.monitor import PastModels, example_models

__all__ = ["Comparison", "ExampleModels", "Fidelity", "PastModels", "example_models"]
