"""Both pictures of the past along any trajectory: each experience at its own anchor, and all at the newest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.fidelity.examples import ExampleModels, HessianModels, OutputModels, check_per_example
from avalanche_curv.core.fidelity.layerwise import LayerwiseModels
from avalanche_curv.core.fidelity.measures import Comparison, Fidelity, concatenated
from avalanche_curv.core.per_example.layers import linear_layers
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk, frozen_together, joined_risk
from avalanche_curv.core.risk.parameters import ParameterSpace


@dataclass(frozen=True)
class PastModels:
    """The pictures of the stored examples of each past experience, in order.

    `accumulate` holds each experience's risk as frozen at its own end, `refresh` all of them at the newest end.
    """

    curvature: Curvature
    accumulate: tuple[EmpiricalRisk, ...] = ()
    refresh: tuple[EmpiricalRisk, ...] = ()

    def __post_init__(self) -> None:
        check_per_example(self.curvature)

    def with_experience(self, stored: EmpiricalRisk) -> PastModels:
        """The pictures after one more experience, whose stored examples are frozen at its end."""
        fresh = (*(risk.at(stored) for risk in self.refresh), stored)
        return PastModels(self.curvature, (*self.accumulate, stored), fresh)

    def compare(self, model: nn.Module) -> dict[str, list[Comparison]]:
        """For each picture, the comparison of each past experience at the current parameters of `model`."""
        return {name: self.compare_picture(name, model) for name in self._held}

    def compare_picture(self, name: str, model: nn.Module) -> list[Comparison]:
        """The comparison of each past experience in the picture `accumulate` or `refresh`."""
        vectors: dict[ParameterSpace, Tensor] = {}
        for group in self._held[name]:
            space = group.pictures.risk.space
            if space not in vectors:
                vectors[space] = space.vector(model)
        return [part for group in self._held[name] for part in group.compare(vectors[group.pictures.risk.space])]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """`picture/measure` over all stored examples and `picture/measure/experience_t` for each past experience.

        The picture is `accumulate` or `refresh`, with `_linear` where its linear term is kept; the measures are those
        of `Fidelity.means`, and `distance`, which both forms of a picture share (see `distances`).
        """
        values = self.distances(model)
        if not values:
            return values
        for picture, comparisons in self.compare(model).items():
            for suffix, parts in (
                ("", [c.quadratic for c in comparisons]),
                ("_linear", [c.linear for c in comparisons]),
            ):
                values |= _named(picture + suffix, parts)
        return values

    def growth(self, model: nn.Module) -> dict[str, float]:
        """`picture` and `picture/experience_t`: L_t of the past function as `model` computes it now, less that of the
        function as it was frozen, at the same parameters.

        It is what new outputs, unmasked units and other buffers change by themselves; no picture in the parameters can
        foresee it. The former is the mean over experiences. Empty without a past.
        """
        values: dict[str, float] = {}
        for picture, risks in (("accumulate", self.accumulate), ("refresh", self.refresh)):
            grown = zip(risks, frozen_together(risks, model))
            jumps = [now.value() - risk.value_at(risk.space.vector(model)) for risk, now in grown]
            values |= {f"{picture}/experience_{number}": jump for number, jump in enumerate(jumps)}
            if jumps:
                values[picture] = sum(jumps) / len(jumps)
        return values

    def distances(self, model: nn.Module) -> dict[str, float]:
        """`picture/distance`, ‖θ − a‖₂ in the coordinates of the anchor a: how far each picture is asked to reach.

        In `accumulate` every past experience has its own anchor: its distance is `accumulate/distance/experience_t`,
        and `accumulate/distance` is their mean. In `refresh` there is one, the newest. Empty without a past.
        """
        if not self.accumulate:
            return {}
        each = torch.stack([_distance(model, risk) for risk in (*self.accumulate, self.refresh[-1])]).tolist()
        own, newest = each[:-1], each[-1]
        values = {"accumulate/distance": sum(own) / len(own)}
        values |= {f"accumulate/distance/experience_{number}": value for number, value in enumerate(own)}
        return values | {"refresh/distance": newest}

    @cached_property
    def _held(self) -> dict[str, list[_Group]]:
        functions = {risk.adapter for risk in self.refresh}
        refresh = [list(self.refresh)] if len(functions) == 1 else [[risk] for risk in self.refresh]
        return {
            "accumulate": _groups(self.curvature, [[risk] for risk in self.accumulate]),
            "refresh": _groups(self.curvature, refresh),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Without what is computed again when it is needed."""
        return {name: value for name, value in self.__dict__.items() if name != "_held"}


@dataclass(frozen=True)
class _Group:
    """Experiences that are measured at once."""

    pictures: ExampleModels
    sizes: list[int]

    def compare(self, parameters: Tensor) -> list[Comparison]:
        try:
            return self.pictures.compare(parameters).split(self.sizes)
        except NotImplementedError as error:
            raise TypeError(
                f"torch lacks a derivative that fidelity needs of {type(self.pictures.risk.base).__name__}: {error} "
                "Leave the fidelity metrics out for this model, or replace that operation."
            ) from error


def _groups(curvature: Curvature, functions: list[list[EmpiricalRisk]]) -> list[_Group]:
    """All experiences in order; each inner list shares its past function. Neighbours over one parameter space are
    measured at once where all parameters lie in linear layers."""
    groups = []
    for _, run in groupby(functions, key=lambda risks: risks[0].space):
        together = list(run)
        for some in [together] if _are_layered(curvature, together) else [[risks] for risks in together]:
            pictures = example_models(curvature, *(joined_risk(risks) for risks in some))
            groups.append(_Group(pictures, [risk.examples for risks in some for risk in risks]))
    return groups


def _are_layered(curvature: Curvature, functions: list[list[EmpiricalRisk]]) -> bool:
    return isinstance(curvature, OutputCurvature) and all(linear_layers(risks[0]) for risks in functions)


def example_models(curvature: Curvature, *risks: EmpiricalRisk) -> ExampleModels:
    """The fastest way to measure pictures with this curvature of the examples of a risk; of several at once where all
    parameters lie in linear layers.

    Raises TypeError for a kind without a per-example form.
    """
    check_per_example(curvature)
    if not isinstance(curvature, OutputCurvature):
        return HessianModels(*risks)
    layers = [linear_layers(risk) for risk in risks]
    held = [(risk, own) for risk, own in zip(risks, layers) if own is not None]
    return LayerwiseModels(curvature, *held) if len(held) == len(risks) else OutputModels(curvature, *risks)


def _distance(model: nn.Module, risk: EmpiricalRisk) -> Tensor:
    """‖θ − a‖₂ as a 0-d tensor, one parameter tensor at a time, so that no vector of size P is made."""
    pairs = zip(risk.space.tensors(model), risk.parameters)
    parts = [torch.linalg.vector_norm(now.detach() - anchor.detach()) for now, anchor in pairs]
    return torch.linalg.vector_norm(torch.stack(parts))


def _named(picture: str, parts: list[Fidelity]) -> dict[str, float]:
    values = {f"{picture}/{measure}": value for measure, value in concatenated(parts).means().items()}
    for number, part in enumerate(parts):
        values |= {f"{picture}/{measure}/experience_{number}": value for measure, value in part.means().items()}
    return values
