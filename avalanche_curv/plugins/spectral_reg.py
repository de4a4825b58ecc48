"""The Avalanche plugin for spectral regularisation."""

from __future__ import annotations

from collections.abc import Iterable

from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.spectral import SpectralRegularizer
from avalanche_curv.plugins.mitigator import MitigatorPlugin


class SpectralRegPlugin(MitigatorPlugin):
    """Pulls the spectral norm of each weight to 1, which keeps a network able to learn (Lewandowski et al. 2024).

    The options and their errors are those of `SpectralRegularizer`, which is the attribute `mitigator`. It composes
    with any other plugin: its gradient is added just before each step. Strength 0 trains exactly as without the plugin.
    """

    def __init__(
        self,
        strength: float,
        *,
        exponent: float = 2,
        every: int = 1,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(
            SpectralRegularizer(
                strength, exponent=exponent, every=every, include=include, exclude=exclude, seed=seed
            )
        )
