"""What enters and leaves a layer in one forward pass: of one call, or of several calls whose gradients add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.per_example import layer_kinds

Places = dict[str, str]
"""The names of a layer's trainable parameters in the model, by their names in the layer, such as "weight"."""


@dataclass(eq=False)
class Tap:
    """One layer in one forward pass: its inputs A and outputs Z, [N, in] and [N, out] in a multilayer perceptron."""

    layer: nn.Module
    inputs: Tensor
    outputs: Tensor

    @property
    def ends(self) -> tuple[Tensor, ...]:
        """What the sensitivities of this tap are derivatives in."""
        return (self.outputs,)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many rows enter and leave the layer."""
        return len(self.inputs), len(self.outputs)

    def among(self, derivatives: Iterator[Tensor]) -> Any:
        """The next derivatives, as many as this tap has ends: the sensitivity that `rows` and `squares` take."""
        return next(derivatives)

    def rows(self, sensitivity: Any, examples: int) -> dict[str, Tensor]:
        """Per-example gradients [N, *shape] by the parameters' names in the layer; empty where no form is known."""
        ready = layer_kinds.prepared(self.layer, self.inputs, examples)
        return {} if ready is None else layer_kinds.rows(self.layer, ready, sensitivity, examples)

    def squares(self, columns: Sequence[Any], examples: int) -> dict[str, Tensor]:
        """Σ_r Σ_i (∇s_ir)² by the parameters' names in the layer, from the sensitivity to each s_r."""
        return layer_kinds.squares(self.layer, self.inputs, columns, examples)


class Tied(nn.Module):
    """Calls whose gradients add up, taken for one layer: of layers that share parameters, such as words in and words
    out, or of one layer several times. Its parameters have the names that they have in the model.

    `calls` are the layers in the order of their calls, `places` has their parameters.
    """

    def __init__(self, calls: Sequence[nn.Module], places: dict[nn.Module, Places]) -> None:
        super().__init__()
        self.calls = tuple(calls)  # not registered: they belong to the model
        self.places = {layer: places[layer] for layer in self.calls}


@dataclass(eq=False)
class TiedTap(Tap):
    """The calls of a `Tied` in one forward pass. Its sensitivities are tuples, one derivative for each call."""

    layer: Tied
    taps: list[Tap]

    @classmethod
    def of(cls, layer: Tied, taps: list[Tap]) -> TiedTap:
        """The tap of some calls; its inputs and outputs are those of the first."""
        return cls(layer, taps[0].inputs, taps[0].outputs, taps)

    @property
    def ends(self) -> tuple[Tensor, ...]:
        return tuple(tap.outputs for tap in self.taps)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many rows enter and leave each call; nothing where these are not the calls that are known."""
        known = tuple(tap.layer for tap in self.taps) == self.layer.calls
        return tuple(length for tap in self.taps for length in tap.lengths) if known else ()

    def among(self, derivatives: Iterator[Tensor]) -> Any:
        return tuple(islice(derivatives, len(self.taps)))

    def rows(self, sensitivity: Any, examples: int) -> dict[str, Tensor]:
        """The sum of the rows of all calls, the last first: a head's rows are full, an embedding's few are added."""
        total: dict[str, Tensor] = {}
        joined, (found,) = self._joined([sensitivity], examples)
        for tap, b in reversed([*zip(joined.taps, found)]):
            places = self.layer.places[tap.layer]
            ready = layer_kinds.prepared(tap.layer, tap.inputs, examples)
            if ready is None:
                return {}
            known = {short: total[name] for short, name in places.items() if name in total}
            rows = layer_kinds.added_rows(known, tap.layer, ready, b, examples)
            total |= {name: rows[short] for short, name in places.items()}
        return total

    def squares(self, columns: Sequence[Any], examples: int) -> dict[str, Tensor]:
        """Rows are summed over calls before they are squared, a piece of the examples at a time."""
        parameters = {name: p for tap in self.taps for name, p in self._parameters(tap)}
        size = max(1, layer_kinds.CACHED // sum(p.numel() for p in parameters.values()))
        total: dict[str, Tensor] = {}
        joined, columns = self._joined(columns, examples)
        for start in range(0, examples, size):
            part, count = slice(start, start + size), min(size, examples - start)
            here = TiedTap.of(self.layer, [
                Tap(tap.layer, _of_examples(tap.inputs, examples, part), tap.outputs) for tap in joined.taps
            ])  # fmt: skip
            for column in columns:
                for name, rows in here.rows([_of_examples(b, examples, part) for b in column], count).items():
                    square = rows.square_().sum(0)
                    total[name] = total[name].add_(square) if name in total else square
        return total

    def _joined(self, columns: Sequence[Any], examples: int) -> tuple[TiedTap, Sequence[Any]]:
        """The same tap and sensitivities with one call of each linear layer, at the positions of all of its calls."""
        calls: dict[nn.Module, list[int]] = {}
        for place, tap in enumerate(self.taps):
            calls.setdefault(tap.layer, []).append(place)
        groups: list[list[int]] = []
        for layer, places in calls.items():
            groups += [places] if layer_kinds.takes_tokens(layer) else [[place] for place in places]
        if len(groups) == len(self.taps):
            return self, columns
        taps = [
            Tap(self.taps[group[0]].layer, _together([self.taps[i].inputs for i in group], examples), self.outputs)
            for group in groups
        ]
        return TiedTap.of(self.layer, taps), [
            [_together([column[i] for i in group], examples) for group in groups] for column in columns
        ]

    def _parameters(self, tap: Tap) -> Iterator[tuple[str, Tensor]]:
        own = dict(tap.layer.named_parameters(recurse=False))
        return ((name, own[short]) for short, name in self.layer.places[tap.layer].items())


def _of_examples(tensor: Tensor, examples: int, part: slice) -> Tensor:
    return tensor.unflatten(0, (examples, -1))[part].flatten(0, 1)


def _together(tensors: Sequence[Tensor], examples: int) -> Tensor:
    """The positions of several tensors, one after the other: [examples, T, features]; one tensor as it is."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([tensor.reshape(examples, -1, tensor.shape[-1]) for tensor in tensors], dim=1)
