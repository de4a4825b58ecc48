"""Fidelity against distance: how the error of each picture grows as training moves away from its anchors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"accumulate": "#0072B2", "refresh": "#D55E00"}
WIDTHS = {"accumulate": 4.0, "refresh": 1.3}  # where both are the same, as with one past experience, both are seen
NAMES = {"accumulate": "own anchors", "refresh": "newest anchor"}


class DistanceCurves:
    """mean |κ| and mean distance ‖θ − a‖ at each measured iteration of one experience, for each form of a picture."""

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[float, float]]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Take the points of one measurement, named as by `PastPictures.measure`."""
        for picture in COLOURS:
            for form in (picture, f"{picture}_linear"):
                point = values[f"{picture}/distance"], values[f"{form}/kappa_abs"]
                if all(map(math.isfinite, point)):
                    self._points.setdefault(form, []).append(point)

    def figure(self, title: str) -> Figure | None:
        """One line for each form over its distance, in the order of training; None where nothing was measured.

        Both axes are logarithmic, so that a picture that is exact up to second order has slope 3. Points at distance
        zero, where every picture is exact, have no place on them.
        """
        curves = {form: [p for p in points if min(p) > 0] for form, points in self._points.items()}
        curves = {form: points for form, points in curves.items() if points}
        return _drawn(curves, title) if curves else None


def _drawn(curves: Mapping[str, list[tuple[float, float]]], title: str) -> Figure:
    """Made without pyplot, which would keep it and change global state."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for form, points in curves.items():
        picture = form.removesuffix("_linear")
        linear = form != picture
        label = NAMES[picture] + (", with linear term" if linear else "")
        (line,) = axes.plot(*zip(*points), color=COLOURS[picture], linewidth=WIDTHS[picture], label=label)
        line.set(linestyle="--" if linear else "-", marker="s" if linear else "o", markersize=2 + WIDTHS[picture])
    axes.set(xscale="log", yscale="log", title=title, xlabel="mean distance ‖θ − anchor‖", ylabel="mean |κ|")
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.grid(color="#e4e4e4", linewidth=0.7, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
