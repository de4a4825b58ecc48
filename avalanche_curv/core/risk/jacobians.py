"""Per-example derivatives for any model, a chunk of examples at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from avalanche_curv.core.losses.factor import PerOutput
from avalanche_curv.core.nested import Nested, examples, index, leaves, rebuilt, split
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.trust import directions, nearby, right_way

CHUNK_BYTES = 128 * 2**20
PROBES = 4  # random combinations of outputs, on which a way to J δ is tried

Parameters = dict[str, Tensor]


def outputs_of(risk: EmpiricalRisk) -> Callable[[Parameters, Nested], Float[Tensor, "N C"]]:
    """(parameters, inputs) ↦ outputs, for the frozen past function at any parameters of its shapes."""

    def outputs(parameters: Parameters, inputs: Nested) -> Tensor:
        return risk.outputs_at(list(parameters.values()), inputs)

    return outputs


def parameters_of(risk: EmpiricalRisk, vector: Float[Tensor, "P"] | None = None) -> Parameters:
    """The named parameters to call `outputs_of` with: those at the anchor, or `vector` in their shapes."""
    return dict(zip(risk.space.names, risk.space.split(risk.anchor if vector is None else vector)))


def loss_of_one(risk: EmpiricalRisk) -> Callable[[Parameters, Nested, Nested], Tensor]:
    """(parameters, x, y) ↦ ℓ of one example, for the frozen past function."""
    outputs = outputs_of(risk)
    return lambda parameters, x, y: risk.loss.per_example(outputs(parameters, index(x, None)), index(y, None))[0]


def example_rows(parts: Parameters) -> Float[Tensor, "N P"]:
    """One row for each example, from tensors [N, *shape] by parameter."""
    return torch.cat([part.reshape(len(part), -1) for part in parts.values()], dim=1)


def pulled_back(
    risk: EmpiricalRisk,
    parameters: Parameters,
    inputs: Nested,
    cotangents: Float[Tensor, "N C R"],
    names: Collection[str] | None = None,
) -> Float[Tensor, "N R P"]:
    """J_iᵀ S_i for each example i, with J_i the Jacobian of the outputs in `parameters` and S_i the `cotangents`.

    With `names`, the columns of J_i are those of the parameters of these names only.
    """
    with sdpa_kernel(SDPBackend.MATH):  # `vmap` has no rule for the fused kernels of attention
        method = _all_at_once if can_vmap(risk) else _one_by_one
        return method(risk, parameters, inputs, cotangents, parameters if names is None else names)


def _all_at_once(
    risk: EmpiricalRisk, parameters: Parameters, inputs: Nested, cotangents: Tensor, names: Collection[str]
) -> Tensor:
    outputs = outputs_of(risk)
    moved = {name: parameters[name] for name in names}

    def one(x: Nested, s: Float[Tensor, "C R"]) -> Parameters:
        pull: Any = vjp(lambda p: outputs({**parameters, **p}, index(x, None))[0], moved)[1]
        return vmap(lambda column: pull(column)[0], in_dims=1)(s)

    parts = over_examples(one, inputs, cotangents)
    return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts.values()], dim=2)


def over_examples(function: Callable[[Nested, Nested], Any], inputs: Nested, others: Nested) -> Any:
    """`vmap` of a function of the inputs of one example and of one of the `others`, in any nesting."""
    both = (inputs, others)
    return vmap(lambda *tensors: function(*rebuilt(both, tensors)))(*leaves(both))


@torch.enable_grad()
def _one_by_one(
    risk: EmpiricalRisk, parameters: Parameters, inputs: Nested, cotangents: Tensor, names: Collection[str]
) -> Tensor:
    """For modules that `vmap` has no rule for, such as recurrent ones, or a wrong one, such as distances."""
    of_name = dict(zip(risk.space.names, risk.parameters))
    moved, rows = [of_name[name] for name in names], []
    with risk.holding(list(parameters.values())):
        for x, s in zip(split(inputs, 1), cotangents):
            outputs = risk.outputs(x)[0]
            rows += [torch.cat([p.reshape(-1) for p in gradients(outputs, moved, c)]) for c in s.unbind(1)]
    return torch.stack(rows).view(len(cotangents), cotangents.shape[2], -1)


def gradients(scalar: Tensor, tensors: Sequence[Tensor], weight: Tensor | None = None) -> Sequence[Tensor]:
    """∂(scalar)/∂ each tensor, or of weightᵀ(scalar) for several, zero where it does not depend on one; the graph
    stays."""
    if not tensors or not scalar.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return torch.autograd.grad(
        scalar, tensors, weight, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def can_vmap(risk: EmpiricalRisk) -> bool:
    """Whether `vmap` over examples and over cotangents gives the derivatives of the model."""
    inputs = index(risk.few[0], slice(2))
    parameters = dict(zip(risk.space.names, nearby(risk)))
    cotangents = directions(examples(inputs), risk.one_output.numel(), 2, like=risk.anchor)

    def tried(method: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: risk.space.split(method(risk, parameters, inputs, cotangents, risk.space.names))

    with sdpa_kernel(SDPBackend.MATH):
        return right_way(risk, "rows", {"vmap": tried(_all_at_once)}, tried(_one_by_one), "loop") == "vmap"


def change_of_outputs(
    risk: EmpiricalRisk, parameters: Parameters, inputs: Nested, step: Parameters
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
    """f and J δ for each example, with J the Jacobian at `parameters` and δ the `step`: in forward mode, as the
    derivative of w ↦ Jᵀw where torch has no right forward derivative of the model, or from the rows of J where it has
    no right second one either. Tried on combinations of few outputs: there may be many."""
    direction = torch.cat([part.reshape(-1) for part in step.values()])

    def forward(inputs: Nested) -> tuple[Tensor, Tensor]:
        return jvp(lambda p: outputs_of(risk)(p, inputs), (parameters,), (step,))[:2]

    def by_rows(inputs: Nested) -> tuple[Tensor, Tensor]:
        with risk.holding(list(parameters.values())):
            outputs = risk.outputs(inputs)
        columns = PerOutput(outputs.new_ones(1, 1).expand_as(outputs)).columns(1)
        return outputs, torch.cat([pulled_back(risk, parameters, inputs, e) @ direction for e in columns], dim=1)

    @torch.enable_grad()
    def by_graphs(inputs: Nested) -> tuple[Tensor, Tensor]:
        with risk.holding(list(parameters.values())), sdpa_kernel(SDPBackend.MATH):
            outputs = risk.outputs(inputs)
            weights = torch.zeros_like(outputs, requires_grad=True)
            pullback = torch.autograd.grad(
                outputs, risk.parameters, weights, create_graph=True, allow_unused=True, materialize_grads=True
            )
            reached = [(p, v.contiguous()) for p, v in zip(pullback, step.values()) if p.requires_grad]
            if not reached:
                return outputs.detach(), torch.zeros_like(weights)
            functions, vectors = zip(*reached)
            (change,) = torch.autograd.grad(functions, weights, vectors)
        return outputs.detach(), change.detach()

    few, count = index(risk.few[0], slice(2)), min(2, examples(risk.few[1]))
    mixed = directions(count, risk.output_like(few).numel(), PROBES, like=risk.anchor)

    def probed(way: Callable[[Nested], tuple[Tensor, Tensor]]) -> Callable[[], list[Tensor]]:
        return lambda: [torch.einsum("nk,nkr->nr", way(few)[1], mixed)]

    ways = {"forward": forward, "graphs": by_graphs, "rows": by_rows}
    exact = lambda: [pulled_back(risk, parameters, few, mixed) @ direction]  # noqa: E731
    tried = {name: probed(ways[name]) for name in ("forward", "graphs")}
    return ways[right_way(risk, "change", tried, exact, "rows")](inputs)


def chunk_size(risk: EmpiricalRisk, rows_an_example: int, width: int | None = None) -> int:
    """How many examples fit into 128 MiB with `rows_an_example` vectors of size `width` (P by default) each."""
    return max(1, CHUNK_BYTES // (rows_an_example * (width or risk.space.size) * risk.anchor.element_size()))
