"""What is meant by arguments and names that do not exist here, but elsewhere: said in the error that they give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_STRENGTH = "The strength of a penalty is `strength`"
_DECAY = "Online EWC is policy=Merge(decay=0.9), EWC with an anchor for each task policy=Accumulate()"
_SCALE = "Avalanche's ewc_lambda is strength / 2 with curvature=BatchedEmpiricalFisher(train_mb_size)"

ARGUMENTS = {  # elsewhere: (here, what it is)
    "ewc_lambda": ("strength", f"{_STRENGTH}: {_SCALE}"),
    "lambda_": ("strength", _STRENGTH),
    "lamda": ("strength", _STRENGTH),
    "lam": ("strength", _STRENGTH),
    "reg_lambda": ("strength", _STRENGTH),
    "importance": ("strength", _STRENGTH),
    "weight": ("strength", _STRENGTH),
    "mode": ("policy", _DECAY),
    "decay_factor": ("policy", _DECAY),
    "gamma": ("policy", _DECAY),
    "online": ("policy", _DECAY),
    "keep_importance_data": ("policy", _DECAY),
    "fisher": ("curvature", "The kind of curvature is `curvature`, as Fisher(), GGN() or EmpiricalFisher()"),
    "kfac": ("structure", "KFAC is structure=Kronecker()"),
    "diagonal": ("structure", "The form of the matrix is `structure`, as Diagonal() or Kronecker()"),
    "rank": ("max_rank", "The most directions of a basis are `max_rank`; those of a task are in `protect`"),
    "threshold": ("protect", "The threshold of gradient projection memory is protect=InputSpace(Energy(0.95))"),
    "memory_size": ("policy", "Stored examples are policy=AdaptiveRefresh(fraction=0.1)"),
    "mem_size": ("policy", "Stored examples are policy=AdaptiveRefresh(fraction=0.1)"),
    "mb_size": ("train_mb_size", "The size of mini-batches is `train_mb_size`"),
    "batch_size": ("train_mb_size", "The size of mini-batches is `train_mb_size`"),
    "epochs": ("train_epochs", "The number of epochs is `train_epochs`"),
    "n_epochs": ("train_epochs", "The number of epochs is `train_epochs`"),
    "lr": ("optimizer", "The learning rate is that of the `optimizer`, as torch.optim.SGD(model.parameters(), lr=0.1)"),
    "loss": ("criterion", "The loss is `criterion`, as nn.CrossEntropyLoss()"),
    "loss_fn": ("criterion", "The loss is `criterion`, as nn.CrossEntropyLoss()"),
}

_EWC = "CurvatureEWC(strength=..., {}), or the plugin CurvatureEWCPlugin with the same arguments"

NAMES = {  # elsewhere, in lower case: what it is here
    "ewc": _EWC.format("curvature=Fisher(), structure=Diagonal()"),
    "ewcplugin": "CurvatureEWCPlugin(strength=...)",
    "onlineewc": _EWC.format("policy=Merge(decay=0.9)"),
    "empiricalfisherewc": _EWC.format("curvature=EmpiricalFisher()"),
    "kfac": "structure=Kronecker(), as in " + _EWC.format("curvature=GGN(), structure=Kronecker()"),
    "kfacewc": _EWC.format("curvature=GGN(), structure=Kronecker()"),
    "ekfacewc": _EWC.format("curvature=GGN(), structure=EKFAC()"),
    "kfaclaplace": _EWC.format("curvature=GGN(), structure=Kronecker(), policy=Merge()"),
    "onlinelaplace": _EWC.format("curvature=GGN(), structure=Kronecker(), policy=Merge()"),
    "diagonalfisher": "curvature=Fisher(), structure=Diagonal()",
    "fisherinformation": "Fisher(), exact, or Fisher(samples=m)",
    "gaussnewton": "GGN()",
    "gpm": "OrthogonalProjection(protect=InputSpace())",
    "gradientprojectionmemory": "OrthogonalProjection(protect=InputSpace())",
    "ogd": "OrthogonalProjection(protect=Eigenspace(OutputGradient(), Rank(200)))",
    "orthogonalgradientdescent": "OrthogonalProjection(protect=Eigenspace(OutputGradient(), Rank(200)))",
    "l2regularization": "L2(strength)",
    "spectralregularization": "SpectralReg(strength=...), or SpectralRegularizer(strength) in a loop of your own",
    "regenerativeregularization": "L2Init(strength)",
    "shrinkperturb": "ShrinkAndPerturb(shrink, noise)",
}  # fmt: skip


def elsewhere(name: str) -> str | None:
    """What a name of another library or paper is here; None for a name that is not known.

    >>> elsewhere("GPM")
    'GPM is OrthogonalProjection(protect=InputSpace()) here.'
    """
    found = NAMES.get(name.replace("_", "").lower())
    return None if found is None else f"{name} is {found} here."


def nearest(name: str, known: Iterable[str]) -> str:
    """A question after the most similar name, for the end of a message; nothing where none is similar.

    >>> nearest("strenght", ["strength", "policy"])
    ' Did you mean strength?'
    """
    similar = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), similar, n=1)
    return f" Did you mean {similar[close[0]]}?" if close else ""


def known_arguments(function: F) -> F:
    """`function`, which now says of a keyword argument that it does not take which one is meant.

    >>> @known_arguments
    ... def train(*, strength): ...
    >>> train(lambda_=2)
    Traceback (most recent call last):
    TypeError: train() takes no argument lambda_. The strength of a penalty is `strength`.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function
    known = {parameter.name for parameter in parameters}
    label, is_constructor = function.__qualname__.rpartition("<locals>.")[2], function.__name__ == "__init__"

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() <= known:
            _refuse(type(args[0]).__name__ if is_constructor else label, kwargs, known)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _refuse(label: str, given: Iterable[str], known: set[str]) -> None:
    name = next(name for name in given if name not in known)
    here, meaning = ARGUMENTS.get(name, ("", ""))
    hint = f" {meaning}." if here in known else nearest(name, known - {"self"})
    hint = hint or f" It takes {', '.join(sorted(known - {'self'}))}."
    raise TypeError(f"{label}() takes no argument {name}.{hint}")


def called(kind: type) -> str:
    """How a value of this type is made: `GGN()`, or `LowRank(...)` where an argument is needed."""
    parameters = inspect.signature(kind).parameters.values()
    needed = any(p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    return f"{kind.__name__}({'...' if needed else ''})"
