"""The steps of one task, corrected one after another in memory that is made once."""

from __future__ import annotations

from array import array
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from avalanche_curv.core.loops.compiled import is_plain
from avalanche_curv.core.projection.blocks import Parts, ProtectedBlock
from avalanche_curv.core.projection.packed import PackedRows, library, usable
from avalanche_curv.core.projection.protected import ProtectedSpace
from avalanche_curv.core.risk.parameters import NamedParameters


class BlockSteps:
    """The steps Δ = θ' − θ of one block of parameters: θ' ← θ + `rest` + the part of Δ outside of the subspace, with
    what is lost in rounding in `rest` [r, d], to be made up for at the next step (Kahan 1965).

    Where compiled loops are at hand (`packed.usable`) that takes three passes over the parameters beside the products
    with the basis; elsewhere torch makes nine, and results differ by rounding.
    """

    def __init__(self, block: ProtectedBlock, rest: Float[Tensor, "r d"] | None = None) -> None:
        self.block = block
        rows, layout = block.subspace.rows, block.layout
        self.rest = rows.new_zeros(layout.height, block.subspace.dimension) if rest is None else rest
        self._start, self._widths = torch.empty_like(self.rest), array("l", layout.columns.sizes)
        self._packed = None if layout.stacked or block.subspace.is_whole else PackedRows.of(rows)
        self._step: Tensor | None = None

    def begin(self, values: Parts) -> None:
        """Keeps the parameters as they are before a step."""
        pointers = self._pointers(values)
        if pointers is not None:
            library().begin(len(self.rest), *self._where(pointers), self._start.data_ptr())
            return
        kinds = (values[name].dtype for name in self.block.layout.space.names)
        self._start = self._start.to(reduce(torch.promote_types, kinds, self._start.dtype))
        for name, start in self.block.layout.parts(self._start).items():
            start.copy_(values[name])

    def finish(self, values: Parts, *, by_task: bool = False) -> None:
        """Corrects the step that was made since `begin`, in place; to the bit θ where nothing is free. With `by_task`,
        the complement of one task's share after another is taken (see `Subspace.withdraw`)."""
        pointers = self._pointers(values)
        if self.block.subspace.is_whole and not by_task:
            for name, start in self.block.layout.parts(self._start).items():
                values[name].copy_(start)
        elif pointers is None:
            self._in_torch(values, by_task)
        else:
            self._in_loops(pointers, by_task)
            increment_version([values[name] for name in self.block.layout.space.names])

    def _in_torch(self, values: Parts, by_task: bool) -> None:
        layout, starts = self.block.layout, self.block.layout.parts(self._start)
        step = layout.difference(values, starts, self.rest)
        self.block.subspace.withdraw(self.rest.add_(step), step, by_task=by_task)
        for name, part in layout.parts(self.rest).items():
            torch.add(starts[name], part, out=values[name])
            part.sub_(torch.sub(values[name], starts[name], out=starts[name]))

    def _in_loops(self, pointers: array[int], by_task: bool) -> None:
        where = self._where(pointers)
        if self._packed is not None and not by_task:
            self._packed.correct(*where, self._start, self.rest)
            return
        step = torch.empty_like(self.rest) if self._step is None else self._step
        start, kept, rest = (tensor.data_ptr() for tensor in (self._start, step, self.rest))
        library().apart(len(step), *where, start, kept)
        self.block.subspace.withdraw(step, step, by_task=by_task)
        library().settle(len(step), *where, start, kept, rest)
        self._step = step

    def _where(self, pointers: array[int]) -> tuple[int, int, int]:
        """How many parameters there are, and where their widths and they themselves lie in memory."""
        return len(pointers), self._widths.buffer_info()[0], pointers.buffer_info()[0]

    def _pointers(self, values: Parts) -> array[int] | None:
        """Where the parameters lie in memory; None where compiled loops cannot go over them."""
        layout, kind = self.block.layout, self._start.dtype
        if layout.transposed or kind is not torch.float32 or not usable(self.block.subspace.rows):
            return None
        tensors = [values[name] for name in layout.space.names]
        if not all(is_plain(tensor, shape, self._start) for tensor, shape in zip(tensors, layout.space.shapes)):
            return None
        return array("Q", map(Tensor.data_ptr, tensors))


class StepMemory:
    """The steps of a task by block, and the parameters that hold still as they were before the last, in `held`."""

    def __init__(self, space: ProtectedSpace, rest: Parts | None = None) -> None:
        """`rest` holds by block what was lost in rounding at earlier steps."""
        found = {key: block for key, block in space.blocks.items() if block.subspace.rank}
        self.blocks = {key: BlockSteps(block, (rest or {}).get(key)) for key, block in found.items()}
        self.held: dict[str, Tensor] = dict.fromkeys(space.held.names, torch.empty(0))
        self._space, self._named = space.space, NamedParameters(nn.Module())

    def begin(self, model: nn.Module) -> None:
        """Keeps the parameters of `model` as they are before a step."""
        values = self._values(model)
        for steps in self.blocks.values():
            steps.begin(values)
        for name, start in self.held.items():
            value = values[name]
            self.held[name] = start.copy_(value) if start.shape == value.shape else value.clone()

    def finish(self, model: nn.Module, *, by_task: bool = False) -> None:
        """Projects the step that was made since `begin`, in place (`BlockSteps.finish`)."""
        values = self._values(model)
        for steps in self.blocks.values():
            steps.finish(values, by_task=by_task)
        for name, start in self.held.items():
            values[name].copy_(start)

    def _values(self, model: nn.Module) -> dict[str, Tensor]:
        if self._named.model is not model:
            self._named = NamedParameters(model)
        return dict(zip(self._space.names, (tensor.detach() for tensor in self._space.cut(self._named()))))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no model."""
        return {**self.__dict__, "_named": NamedParameters(nn.Module())}
