"""The diagonal curvature of a model that no rank holds in full, layer by layer on the live model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from avalanche_curv.core.curvature.base import NonFiniteCurvatureError, OutputCurvature
from avalanche_curv.core.distributed.estimation import with_draws_after
from avalanche_curv.core.distributed.penalty import ShardedQuadratic, diagonal_columns
from avalanche_curv.core.distributed.risk import borrowed, check_buffers, lent
from avalanche_curv.core.distributed.shares import LocalShards, local_shards, mesh_of
from avalanche_curv.core.losses import ExampleLoss, Factor, example_loss
from avalanche_curv.core.losses.factor import as_factor
from avalanche_curv.core.nested import Nested, examples, index
from avalanche_curv.core.per_example import layer_kinds
from avalanche_curv.core.per_example.layers import Tap, gradients
from avalanche_curv.core.risk.batches import Batches, kept, like
from avalanche_curv.core.risk.few import FEW
from avalanche_curv.core.risk.forward import Forward, as_matrix, convention_of
from avalanche_curv.core.risk.labelled import Labelled, is_labelled, settled
from avalanche_curv.core.risk.parameters import canonical_name


def estimate_fully_sharded(
    curvature: OutputCurvature,
    model: nn.Module,
    criterion: object,
    batches: Batches,
    *,
    forward: Forward | None = None,
) -> ShardedQuadratic:
    """The diagonal of `curvature` for a model sharded by `fully_shard` (FSDP2): each rank gets the part of its rows,
    and no rank holds the curvature or gradients of more than one layer in full.

    For each layer Σ_i Σ_r (∂s_ir/∂W)² follows from what enters it and from its sensitivities, and is added over ranks
    and cut into rows at once. Ranks pass over `batches` of their own, of any number, none included; the mean is over
    the examples of all, whose sequences may have any lengths. Draws are those of `estimate_sharded`. The live model is
    read in eval mode, and flags, gradients and buffers stay as they are. It must be a function of single examples,
    called as by `EmpiricalRisk.snapshot`.

    Raises TypeError for a kind that is no OutputCurvature, a model that is not sharded by rows over one mesh, and for
    trainable parameters outside layers of a known kind that are called once; ValueError where no rank has an example,
    or ranks hold other buffers; NonFiniteCurvatureError for NaN or infinity. What fails on one rank is raised on all,
    but not within the model, whose layers wait for every rank until the process group's timeout.
    """
    if not isinstance(curvature, OutputCurvature):
        raise TypeError(f"{curvature} has no S of each example. Use Fisher(), GGN() or EmpiricalFisher().")
    share, layers, loss = LocalShards.of_model(model), _known_layers(model), example_loss(criterion)
    total = {name: torch.zeros_like(part).detach() for name, part in local_shards(model).items()}
    reader = _Reader(share, batches, next(iter(total.values())), model, forward, loss)
    call = forward or reader.convention
    check_buffers(model, share.ranks)
    shapes, mesh = dict(zip(share.space.names, share.space.shapes)), mesh_of(model)
    factors = _Factors(curvature, loss, reader.before, layers)
    with _evaluating(model), torch.enable_grad():
        for x, y, counts in reader:
            with _tapped(layers) as taps:
                outputs = call(model, x)
            factor = share.ranks.together(partial(factors.of, outputs.detach(), y, taps)).scaled(counts)
            passes = max(share.ranks.gather(factor.count))  # sentences of another length have other numbers of columns
            for name, part in _squares(as_matrix(outputs), factor, taps, layers, passes):
                total[name] += _rows_of_sum(part.view(shapes[name]), mesh)
    values = torch.cat([total[name].reshape(-1) for name in share.space.names]).detach() / reader.examples
    if not all(share.ranks.gather(bool(values.isfinite().all()))):
        raise NonFiniteCurvatureError(f"{curvature} of {reader.examples} examples holds NaN or infinity on some rank.")
    return ShardedQuadratic(share, share.vector(model), diagonal_columns(values), torch.zeros_like(values))


class _Reader:
    """This rank's batches, and after them turns that do not count, as others need: a forward pass takes all ranks."""

    def __init__(
        self, share: LocalShards, batches: Batches, place: Tensor, model: nn.Module, call: Forward | None,
        loss: ExampleLoss,
    ) -> None:  # fmt: skip
        self.ranks, self.place = share.ranks, place
        held = self.ranks.together(lambda: kept(batches))
        one = next(filter(None, self.ranks.gather_of(lambda: _labelled_example(held))), None)  # the same on all ranks
        self.convention = convention_of(model, labelled=one is not None)
        if one is not None:
            with _evaluating(model):
                self.convention = settled(self.convention, model, like(one, place), call, loss)
        self.batches = Labelled(held, self.convention, model)
        self.batch: tuple[Nested, Tensor] | None = None
        _, self.spare = borrowed(self.batches, self.ranks)
        counts = self.ranks.gather_of(lambda: sum(examples(y) for _, y in self._own()))
        self.examples, self.before = sum(counts), sum(counts[: self.ranks.rank])

    def __iter__(self) -> Iterator[tuple[Nested, Tensor, float]]:
        """Inputs, targets, and 1, or 0 where they do not count."""
        iterator = self._own()
        while any(self.ranks.gather_of(lambda: self._reads(iterator))):
            inputs, targets = self.batch or self.spare
            self.spare = self.spare or index((inputs, targets), slice(1))
            yield like(inputs, self.place), like(targets, self.place), float(self.batch is not None)

    def _reads(self, iterator: Iterator[tuple[Nested, Tensor]]) -> bool:
        """Whether there is one more, which is then at hand."""
        self.batch = next(iterator, None)
        return self.batch is not None

    def _own(self) -> Iterator[tuple[Nested, Tensor]]:
        return (batch for batch in self.batches if examples(batch[1]))


def _labelled_example(batches: Batches) -> Nested:
    """The first of batches that are mappings with `labels`; None of any other."""
    first = next((batch for batch in batches if examples(batch)), None)
    return lent(first) if is_labelled(first) else None


class _Factors:
    """S of one batch of this rank after the other, whose draws follow those of the ranks before."""

    def __init__(
        self, curvature: OutputCurvature, loss: ExampleLoss, before: int, layers: dict[nn.Module, str]
    ) -> None:
        self.curvature, self.loss, self.before, self.layers = curvature, loss, before, layers
        self.generator: torch.Generator | None = None

    def of(self, outputs: Float[Tensor, "N *C"], targets: Nested, taps: list[Tap]) -> Factor:
        """Raises TypeError for layers whose squares do not follow from their taps, ValueError for targets that do not
        fit the loss."""
        _check_calls(self.layers, taps, examples(targets))
        self.loss = self.loss.fitted(partial(index, (outputs, targets), slice(FEW)))
        self.loss.check(outputs, targets)
        outputs = as_matrix(outputs)
        if self.generator is None:
            later = with_draws_after(self.curvature, self.before, self.loss, outputs, targets)
            self.generator = later.generator()
        return as_factor(self.curvature.factor(self.loss, outputs, targets, self.generator))


def _known_layers(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that hold trainable parameters, by their names."""
    layers = {
        module: canonical_name(f"{name}.weight").removesuffix("weight")
        for name, module in model.named_modules()
        if layer_kinds.is_known(module) and any(p.requires_grad for p in module.parameters(recurse=False))
    }
    owners = [p for module in model.modules() for p in module.parameters(recurse=False) if p.requires_grad]
    explained = [p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad]
    if len({id(p) for p in owners}) != len(owners) or len(explained) != len(owners):
        known = {id(p) for p in explained}
        names = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
        raise TypeError(
            f"Per-example gradients are known of parameters that one layer of a known kind holds; {names or 'some'} "
            "are outside of these or shared by several. Freeze them, or use estimate_sharded with copies of the model."
        )
    return layers


def _check_calls(layers: dict[nn.Module, str], taps: list[Tap], examples: int) -> None:
    called = [tap.layer for tap in taps]
    for layer, name in layers.items():
        if called.count(layer) != 1:
            raise TypeError(
                f"Layer '{name.removesuffix('.')}' is called {called.count(layer)} times in a forward pass: the "
                "squares of its gradients follow from single calls. Use estimate_sharded with copies of the model."
            )
    for tap in taps:
        if len(tap.inputs) % examples or len(tap.outputs) % examples:
            raise TypeError(f"Layer '{layers[tap.layer]}' does not see every example alike. Put the batch axis first.")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards the flags as they were, and every parameter in shards again."""
    flags = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
            reshard = getattr(module, "reshard", None)  # of the parts that fully_shard was applied to
            if callable(reshard):
                reshard()


@contextmanager
def _tapped(layers: dict[nn.Module, str]) -> Iterator[list[Tap]]:
    taps: list[Tap] = []

    def collect(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        taps.append(Tap(layer, args[0].detach(), output))
        return output.clone()  # what follows may write in place

    handles = [layer.register_forward_hook(collect) for layer in layers]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield taps
    finally:
        for handle in handles:
            handle.remove()


def _squares(
    outputs: Tensor, factor: Factor, taps: list[Tap], layers: dict[nn.Module, str], passes: int
) -> Iterator[tuple[str, Tensor]]:
    """Σ_i Σ_r (∂s_ir/∂·)² of this rank's examples, for each parameter of one layer after the other, in so many backward
    passes: each takes all ranks, and those of a rank with fewer columns end with zeros."""
    ends = [tap.outputs for tap in taps]
    sums = chain((s for some in factor.columns(1) for s in some.unbind(2)), repeat(torch.zeros_like(outputs)))
    columns = [gradients(outputs, ends, s) for s in islice(sums, passes)]
    for tap, of_tap in zip(taps, zip(*columns)):
        own = dict(tap.layer.named_parameters(recurse=False))
        for short, part in sorted(layer_kinds.squares(tap.layer, tap.inputs, of_tap, len(outputs)).items()):
            if short in own and own[short].requires_grad:
                yield layers[tap.layer] + short, part.detach()


def _rows_of_sum(part: Tensor, mesh: Any) -> Tensor:
    """This rank's rows of the sum over ranks."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    summed: Any = DTensor.from_local(part, mesh, [Partial("sum")])
    return summed.redistribute(mesh, [Shard(0)]).to_local()
