"""Two quadratic models of the past along any trajectory: each experience at its own anchor, and all at the newest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.fidelity.examples import ExampleModels, ExpandedModels, OutputModels
from avalanche_curv.core.fidelity.layerwise import LayerwiseModels, layered
from avalanche_curv.core.fidelity.measures import Comparison, Fidelity, concatenated
from avalanche_curv.core.options import check_kind
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.selection import training
from avalanche_curv.core.risk.several import frozen_together, joined_risk


@dataclass(frozen=True)
class PastModels:
    """Two quadratic models of the loss of stored examples of past experiences, in order: `accumulate`, of each
    experience at its own end, and `refresh`, of all of them at the newest end.

    Both are held as the risks of the stored examples, frozen there. Raises TypeError for a curvature without
    per-example form.
    """

    curvature: Curvature
    accumulate: tuple[EmpiricalRisk, ...] = ()
    refresh: tuple[EmpiricalRisk, ...] = ()

    def __post_init__(self) -> None:
        check_kind("curvature", self.curvature, Curvature, "Fisher()")
        self.curvature.check_examples()

    def with_experience(self, stored: EmpiricalRisk) -> PastModels:
        """The quadratic models after one more experience, whose stored examples are frozen at its end; over its own
        parameters and all that are in the space of an earlier one, also where they are frozen now."""
        stored = stored.covering({name for risk in self.accumulate for name in risk.space.names})
        fresh = (*(risk.at(stored) for risk in self.refresh), stored)
        return PastModels(self.curvature, (*self.accumulate, stored), fresh)

    def covering(self, model: nn.Module) -> PastModels:
        """These quadratic models over the parameters, too, that were frozen at the anchors and train in `model`; the
        object itself where there are none. All measurements are taken so: keep what is returned, to save the work."""
        accumulate = tuple(risk.covering(training(risk.frozen, model)) for risk in self.accumulate)
        refresh = tuple(risk.covering(training(risk.frozen, model)) for risk in self.refresh[:1])
        refresh = (*refresh, *(risk.at(refresh[0]) for risk in self.refresh[1:]))
        same = all(map(is_, (*accumulate, *refresh[:1]), (*self.accumulate, *self.refresh[:1])))
        return self if same else PastModels(self.curvature, accumulate, refresh)

    def compare(self, model: nn.Module) -> dict[str, list[Comparison]]:
        """By the names `accumulate` and `refresh`, what `compare_one` returns."""
        own = self.covering(model)
        return {name: own.compare_one(name, model) for name in own._groups}

    @in_own_precision
    def compare_one(self, name: str, model: nn.Module) -> list[Comparison]:
        """The quadratic model of that name, `accumulate` or `refresh`, against the truth at the current parameters of
        `model`: one comparison for each past experience.

        Raises TypeError where torch lacks a derivative of an operation of the model.
        """
        groups = self.covering(model)._groups[name]
        vectors = {space: space.vector(model) for space in {group.models.risk.space for group in groups}}
        return [part for group in groups for part in group.compare(vectors[group.models.risk.space])]

    @in_own_precision
    def measure(self, model: nn.Module) -> dict[str, float]:
        """`name/measure` over all stored examples and `name/measure/experience_t` for each past experience, at the
        current parameters of `model`; empty without a past.

        The name is `accumulate` or `refresh`, with `_linear` where the linear term is kept; the measures are those of
        `Fidelity.means`, and `distance`, which does not depend on the linear term (see `distances`). Raises TypeError
        where torch lacks a derivative of an operation of the model.
        """
        own = self.covering(model)
        values = own.distances(model)
        if not values:
            return values
        for name, comparisons in own.compare(model).items():
            for suffix, parts in (
                ("", [c.quadratic for c in comparisons]),
                ("_linear", [c.linear for c in comparisons]),
            ):
                values |= _named(name + suffix, parts)
        return values

    @in_own_precision
    def growth(self, model: nn.Module) -> dict[str, float]:
        """`name/experience_t`: the loss L_t of the past function as `model` computes it now, less that of the function
        as it was frozen, at the same parameters; `name`, `accumulate` or `refresh`, the mean over experiences. Empty
        without a past.

        It is what new outputs, unmasked units and other buffers change by themselves, which no quadratic model in the
        parameters can foresee.
        """
        own, values = self.covering(model), dict[str, float]()
        for name, risks in (("accumulate", own.accumulate), ("refresh", own.refresh)):
            grown = zip(risks, frozen_together(risks, model))
            jumps = [now.value() - risk.value_at(risk.space.vector(model)) for risk, now in grown]
            values |= {f"{name}/experience_{number}": jump for number, jump in enumerate(jumps)}
            if jumps:
                values[name] = sum(jumps) / len(jumps)
        return values

    @in_own_precision
    def distances(self, model: nn.Module) -> dict[str, float]:
        """`accumulate/distance` and `refresh/distance`: ‖θ − a‖₂ of the parameters θ of `model` in the coordinates of
        the anchor a.

        In `accumulate` every past experience has its own anchor: its distance is `accumulate/distance/experience_t`,
        and `accumulate/distance` the mean of these. In `refresh` there is one anchor, the newest. Empty without a past.
        """
        if not self.accumulate:
            return {}
        past = self.covering(model)
        each = torch.stack([_distance(model, risk) for risk in (*past.accumulate, past.refresh[-1])]).tolist()
        own, newest = each[:-1], each[-1]
        values = {"accumulate/distance": sum(own) / len(own)}
        values |= {f"accumulate/distance/experience_{number}": value for number, value in enumerate(own)}
        return values | {"refresh/distance": newest}

    @cached_property
    def _groups(self) -> dict[str, list[_Group]]:
        functions = {risk.forward for risk in self.refresh}
        refresh = [list(self.refresh)] if len(functions) == 1 else [[risk] for risk in self.refresh]
        return {
            "accumulate": _grouped(self.curvature, [[risk] for risk in self.accumulate]),
            "refresh": _grouped(self.curvature, refresh),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Without the quadratic models, which are computed again when they are needed."""
        return {name: value for name, value in self.__dict__.items() if name != "_groups"}


@dataclass(frozen=True)
class _Group:
    """Experiences that are measured at once."""

    models: ExampleModels
    sizes: list[int]

    def compare(self, parameters: Tensor) -> list[Comparison]:
        try:
            return self.models.compare(parameters.to(self.models.risk.anchor)).split(self.sizes)
        except NotImplementedError as error:
            raise TypeError(
                f"torch lacks a derivative that fidelity needs of {type(self.models.risk.base).__name__}: {error} "
                "Leave the fidelity metrics out for this model, or replace that operation."
            ) from error


def _grouped(curvature: Curvature, functions: list[list[EmpiricalRisk]]) -> list[_Group]:
    """All experiences in order; each inner list shares its past function. Neighbours of one parameter space and type
    are measured at once where all parameters lie in linear layers."""
    groups = []
    for _, run in groupby(functions, key=lambda risks: (risks[0].space, risks[0].anchor.dtype, risks[0].anchor.device)):
        together = list(run)
        are_layered = all(layered(curvature, risks[0]) is not None for risks in together)
        for some in [together] if are_layered else [[risks] for risks in together]:
            models = example_models(curvature, *(joined_risk(risks) for risks in some))
            groups.append(_Group(models, [risk.examples for risks in some for risk in risks]))
    return groups


def example_models(curvature: Curvature, *risks: EmpiricalRisk) -> ExampleModels:
    """The quadratic models of the single examples of a risk with this curvature, in their fastest form; of several
    risks over one parameter space where all parameters lie in linear layers.

    Raises TypeError for a kind without a per-example form.
    """
    curvature.check_examples()
    if not isinstance(curvature, OutputCurvature):
        return ExpandedModels(curvature, *risks)
    layers = [layered(curvature, risk) for risk in risks]
    pairs = [(risk, own) for risk, own in zip(risks, layers) if own is not None]
    return LayerwiseModels(curvature, *pairs) if len(pairs) == len(risks) else OutputModels(curvature, *risks)


def _distance(model: nn.Module, risk: EmpiricalRisk) -> Tensor:
    """‖θ − a‖₂ as a 0-d tensor, one parameter tensor at a time, so that no vector of size P is made."""
    pairs = zip(risk.space.tensors(model), risk.parameters)
    parts = [torch.linalg.vector_norm(now.detach().to(anchor) - anchor.detach()) for now, anchor in pairs]
    return torch.linalg.vector_norm(torch.stack(parts))


def _named(model: str, parts: list[Fidelity]) -> dict[str, float]:
    values = {f"{model}/{measure}": value for measure, value in concatenated(parts).means().items()}
    for number, part in enumerate(parts):
        values |= {f"{model}/{measure}/experience_{number}": value for measure, value in part.means().items()}
    return values
