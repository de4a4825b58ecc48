"""ReDO, which reinitialises dormant units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from jaxtyping import Bool, Float
from torch import Tensor

from avalanche_curv.core.options import Setting, check_count, check_number
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.recycler import Recycler, at_all
from avalanche_curv.plasticity.mitigators.unit_graph import HiddenLayer


class ReDO(Recycler):
    """Recycles dormant neurons (Sokar et al. 2023, "The dormant neuron phenomenon", Def. 3.1 and Alg. 1).

    Unit i of a hidden layer is dormant where its share of the activity is at most `threshold`:

        s_i = E_x|h_i(x)| / mean_k E_x|h_k(x)| ≤ threshold,

    with h as it reaches the next layers, behind activation, dropout and pooling, and E over the examples (and
    positions) of the training pass before the step; with several next layers, it is dormant at each. Dormant units are
    recycled after every `every`-th step; what that is, which layers it concerns and `next_layers` says `Recycler`. A
    layer that is dead as a whole is recycled as a whole.

    The source takes a threshold of 0.1 or 0.025 and 1,000 steps, the defaults here; 0 recycles only silent units.

    Raises ValueError for a threshold outside [0, 1), for `every` below 1 and an unusable seed; for models and
    `next_layers` see `Recycler`.
    """

    threshold = Setting(partial(check_number, at_least=0, below=1, hint="It is a share of the mean activity."))
    every = Setting(partial(check_count, hint="The source takes 1,000."))

    def __init__(
        self,
        threshold: float = 0.1,
        *,
        every: int = 1000,
        next_layers: Mapping[str, str | Iterable[str]] | None = None,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(next_layers=next_layers, include=include, exclude=exclude, seed=seed)
        self.threshold, self.every = threshold, every

    def looks_at(self, step: int) -> bool:
        return step % self.every == 0

    def to_recycle(
        self, activities: Mapping[HiddenLayer, list[Float[Tensor, "units"]]]
    ) -> dict[HiddenLayer, Bool[Tensor, "units"]]:
        return {layer: at_all(sums, self._is_dormant) for layer, sums in activities.items()}

    def _is_dormant(self, activity: Float[Tensor, "units"]) -> Bool[Tensor, "units"]:
        return activity <= self.threshold * activity.mean()
