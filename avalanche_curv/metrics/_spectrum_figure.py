"""What is drawn: spectra on a logarithmic axis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.landscape.landscape import Landscape
from avalanche_curv.core.landscape.spectrum import Density

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECADES = 6  # eigenvalues that much smaller than the largest are not drawn: in float32 they are rounding
BINS = 64
VALUES = 3000  # of a histogram, at most


def spectrum_figure(landscape: Landscape, of: str) -> Figure:
    """How many eigenvalues lie where, both on logarithmic axes; negative ones by their magnitude, in a colour of their
    own. The title says what it is the spectrum `of`, the lines below how each quantity was computed.

    Made without pyplot, which would keep it and change global state.
    """
    from matplotlib.figure import Figure

    density = landscape.density
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    top = float(density.nodes.abs().max())
    edges = torch.logspace(math.log10(top) - DECADES, math.log10(top * 1.001), BINS + 1, dtype=torch.float64)
    for sign, label, colour in ((1, "positive", "#0072B2"), (-1, "negative", "#D55E00")):
        nodes = sign * density.nodes
        if (nodes > edges[0]).any():
            axes.hist(nodes.numpy(), bins=edges.tolist(), weights=density.counts.numpy(), label=label, color=colour)
    drawn = float(density.counts[density.nodes.abs() > edges[0]].sum())
    axes.set(xscale="log", yscale="log", xlabel="|λ|", ylabel="eigenvalues per bin")
    axes.set_title(f"Spectrum of {of}", fontsize="medium")
    figure.supxlabel(told(landscape), fontsize="small")
    axes.legend(title=f"{density.size - drawn:,.0f} of {density.size:,.0f} near 0, not drawn", fontsize="small")
    return figure


def told(landscape: Landscape) -> str:
    """How each quantity was computed, those by the same way in one line."""
    lines: dict[str, list[str]] = {}
    for quantity, way in landscape.ways.items():
        lines.setdefault(way, []).append(quantity.replace("_", " "))
    if len(lines) == 1:
        return f"all by {next(iter(lines))}"
    return "\n".join(f"{', '.join(quantities)}: {way}" for way, quantities in lines.items())


def logarithms(density: Density) -> Float[Tensor, "n"]:
    """log10 |λ| of the eigenvalues that are not zero up to rounding, for a histogram: each once where it is known, at
    evenly spaced quantiles of a quadrature.

    >>> logarithms(Density(torch.tensor([0.0, 1.0, 100.0]), torch.tensor([2.0, 1.0, 1.0]))).tolist()
    [0.0, 2.0]
    """
    magnitude = density.nodes.abs()
    kept = magnitude > 10.0**-DECADES * magnitude.max()
    order = magnitude[kept].argsort()
    values, counts = magnitude[kept][order].log10(), density.counts[kept][order]
    if bool((counts == 1).all()):
        return values
    reached = counts.cumsum(0)
    number = max(1, min(VALUES, round(float(reached[-1]))))
    places = (torch.arange(number, dtype=reached.dtype) + 0.5) * reached[-1] / number
    return values[torch.searchsorted(reached, places).clamp_max(len(values) - 1)]
