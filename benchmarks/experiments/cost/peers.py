"""Other tools for the same curvature. Each works on a deep copy of the model, and returns the mean over examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_curv import Curvature, EmpiricalFisher, Fisher

Batches: TypeAlias = Sequence[tuple[Tensor, Tensor]]
Dense: TypeAlias = Callable[[], Tensor]
"""All entries of what was built, not part of its price."""
Ready: TypeAlias = Callable[[], Dense]
"""The work whose time is the price."""


@dataclass(frozen=True)
class Peer:
    """A package, what it is asked for, the curvature that this stands for, and how to get ready for a model.

    Where it `decomposes` matrices, a part of its price is the same for any number of examples: it then sees all. The
    `broad` ones are measured on every model. The `partial` ones leave out the parameters of layers that the package
    does not know, and are measured on language models alone, which it refuses as a whole.
    """

    title: str
    package: str
    exact: Curvature
    ready: Callable[[nn.Module, Batches], Ready]
    decomposes: bool = False
    broad: bool = False
    partial: bool = False


def installed() -> dict[Peer, str]:
    """Each peer that can be imported, with the version of its package."""
    return {peer: found for peer in PEERS if (found := _version(peer.package))}


def absent() -> list[str]:
    """The packages that are not installed."""
    return sorted({peer.package for peer in PEERS if _version(peer.package) is None})


def peer_of(title: str) -> Peer:
    """The peer of a title."""
    return next(peer for peer in PEERS if peer.title == title)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _avalanche(model: nn.Module, batches: Batches) -> Ready:
    from avalanche.training.plugins import EWCPlugin

    from avalanche_curv.streams._benchmark import Examples, benchmark

    own, size = copy.deepcopy(model), len(batches[0][1])
    data = Examples(*(torch.cat(parts) for parts in zip(*batches)))
    dataset = benchmark([(data, data)], [0], 10).train_stream[0].dataset

    def work() -> Dense:
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        found = EWCPlugin(1.0).compute_importances(
            own, nn.CrossEntropyLoss(), optimizer, dataset, torch.device("cpu"), size
        )
        return lambda: torch.cat([found[name].data.reshape(-1) for name, _ in own.named_parameters()]).diag()

    return work


def _parameters(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Parameter]:
    """The trainable parameters of the modules of these kinds, by name."""
    owners = [module for module in model.modules() if isinstance(module, kinds)]
    own = {id(parameter) for module in owners for parameter in module.parameters(recurse=False)}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in own}


def _backpack(
    extension: str, attribute: str, per_example: bool = False, of: tuple[type[nn.Module], ...] = (nn.Module,)
) -> Callable[[nn.Module, Batches], Ready]:
    """BackPACK's quantities are those of a batch's mean loss; `per_example` for squares of its gradients / n."""

    def ready(model: nn.Module, batches: Batches) -> Ready:
        import backpack
        from backpack import extensions

        own = backpack.extend(copy.deepcopy(model).eval())
        loss = backpack.extend(nn.CrossEntropyLoss())
        total = sum(len(y) for _, y in batches)

        def work() -> Dense:
            sums: dict[str, list[Tensor]] = {}
            for x, y in batches:
                own.zero_grad()
                with backpack.backpack(getattr(extensions, extension)()):
                    loss(own(x), y).backward()
                weight = len(y) ** (2 if per_example else 1) / total
                for name, parameter in _parameters(own, of).items():
                    found = getattr(parameter, attribute)
                    delattr(parameter, attribute)
                    parts = [found] if isinstance(found, Tensor) else found
                    if name in sums:
                        for held, part in zip(sums[name], parts):
                            held.add_(part.detach(), alpha=weight)
                    else:
                        sums[name] = [part.detach() * weight for part in parts]
            if attribute in ("kfac", "kflr"):
                return lambda: torch.block_diag(*[_kron(parts) for parts in sums.values()])
            return lambda: torch.cat([parts[0].reshape(-1) for parts in sums.values()]).diag()

        return work

    return ready


def _kron(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.kron(*parts)


class _Loader(DataLoader):
    """A DataLoader that gives the batches as they are, without the cost of collecting examples."""

    def __init__(self, batches: Batches) -> None:
        inputs, targets = (torch.cat(parts) for parts in zip(*batches))
        super().__init__(TensorDataset(inputs, targets), batch_size=len(batches[0][1]))
        self.ready = batches

    def __iter__(self) -> Any:
        return iter(self.ready)


def _laplace(structure: str, backend: str | None) -> Callable[[nn.Module, Batches], Ready]:
    def ready(model: nn.Module, batches: Batches) -> Ready:
        from laplace import Laplace, curvature

        own, loader = copy.deepcopy(model), _Loader(batches)
        options = {} if backend is None else {"backend": getattr(curvature, backend)}

        def work() -> Dense:
            laplace: Any = Laplace(
                own, "classification", subset_of_weights="all", hessian_structure=structure, **options
            )
            laplace.fit(loader)
            count = sum(len(y) for _, y in batches)
            if structure == "diag":
                return lambda: laplace.H.diag() / count
            return lambda: laplace.H_facs.to_matrix() / count

        return work

    return ready


def _nngeometry(representation: str, samples: int | None = None) -> Callable[[nn.Module, Batches], Ready]:
    def ready(model: nn.Module, batches: Batches) -> Ready:
        from nngeometry import metrics, object

        own, loader, form = copy.deepcopy(model).eval(), _Loader(batches), getattr(object, representation)

        def work() -> Dense:
            if samples is None:
                found = metrics.FIM(own, loader, form, variant="classif_logits")
            else:
                found = metrics.FIM_MonteCarlo(own, loader, form, variant="classif_logits", trials=samples)
            if representation == "PMatEKFAC":
                found.update_diag(loader)
            return found.to_torch

        return work

    return ready


def _curvlinops(
    fisher: str, operator: str = "KFACLinearOperator", of: tuple[type[nn.Module], ...] = (nn.Module,)
) -> Callable[[nn.Module, Batches], Ready]:
    def ready(model: nn.Module, batches: Batches) -> Ready:
        import curvlinops

        own = copy.deepcopy(model).eval()
        parameters = [*_parameters(own, of).values()]

        def work() -> Dense:
            found = getattr(curvlinops, operator)(
                own, nn.CrossEntropyLoss(), parameters, list(batches), fisher_type=fisher,
                separate_weight_and_bias=False, check_deterministic=False,
            )
            if operator == "KFACLinearOperator":
                found.compute_kronecker_factors()
            else:
                found @ torch.ones(found.shape[1])  # what is corrected is computed when a product first needs it
            return lambda: found @ torch.eye(found.shape[1])

        return work

    return ready


BACKPACK, LAPLACE = "backpack-for-pytorch", "laplace-torch"
NNGEOMETRY, CURVLINOPS = "nngeometry", "curvlinops-for-pytorch"

PEERS = (
    Peer("Avalanche's EWC importance, not per example", "avalanche-lib", EmpiricalFisher(), _avalanche,
         broad=True),
    Peer("BackPACK, empirical Fisher, diagonal", BACKPACK, EmpiricalFisher(),
         _backpack("SumGradSquared", "sum_grad_squared", per_example=True), broad=True),
    Peer("BackPACK, Fisher, diagonal", BACKPACK, Fisher(), _backpack("DiagGGNExact", "diag_ggn_exact")),
    Peer("laplace-torch, Fisher, diagonal by BackPACK", LAPLACE, Fisher(), _laplace("diag", "BackPackGGN")),
    Peer("nngeometry, Fisher, diagonal", NNGEOMETRY, Fisher(), _nngeometry("PMatDiag")),
    Peer("BackPACK, Fisher of one sample, KFAC", BACKPACK, Fisher(), _backpack("KFAC", "kfac"), broad=True),
    Peer("curvlinops, Fisher of one sample, KFAC", CURVLINOPS, Fisher(), _curvlinops("mc"), broad=True),
    Peer("nngeometry, Fisher of one sample, KFAC", NNGEOMETRY, Fisher(), _nngeometry("PMatKFAC", 1), broad=True),
    Peer("BackPACK, Fisher, KFAC (type 2)", BACKPACK, Fisher(), _backpack("KFLR", "kflr")),
    Peer("curvlinops, Fisher, KFAC (type 2)", CURVLINOPS, Fisher(), _curvlinops("type-2")),
    Peer("laplace-torch, Fisher, KFAC (type 2)", LAPLACE, Fisher(), _laplace("kron", None), decomposes=True),
    Peer("curvlinops, Fisher of one sample, EKFAC", CURVLINOPS, Fisher(),
         _curvlinops("mc", "EKFACLinearOperator"), decomposes=True),
    Peer("nngeometry, Fisher of one sample, EKFAC", NNGEOMETRY, Fisher(),
         _nngeometry("PMatEKFAC", 1), decomposes=True),
    Peer("BackPACK, empirical Fisher, diagonal without norm layers", BACKPACK, EmpiricalFisher(),
         _backpack("SumGradSquared", "sum_grad_squared", per_example=True, of=(nn.Linear, nn.Embedding)), partial=True),
    Peer("curvlinops, Fisher of one sample, KFAC of linear layers alone", CURVLINOPS, Fisher(),
         _curvlinops("mc", of=(nn.Linear,)), partial=True),
    Peer("curvlinops, Fisher of one sample, EKFAC of linear layers alone", CURVLINOPS, Fisher(),
         _curvlinops("mc", "EKFACLinearOperator", of=(nn.Linear,)), partial=True),
)
