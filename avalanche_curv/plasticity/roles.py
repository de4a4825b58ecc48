"""The role of each parameter of a network: a weight multiplies its input, a shift is added, a scale rescales each unit.

Mitigators and measures treat parameters by role. Roles are found from the types of torch's modules and, in modules of
other types, from the names of their parameters.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from avalanche_curv.core.arguments import outside
from avalanche_curv.core.risk.parameters import canonical_name
from avalanche_curv.core.risk.selection import in_words

CONVOLUTIONS_FROM_INPUTS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
WITHOUT_ROLE = (nn.Embedding, nn.EmbeddingBag, nn.PReLU)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
KNOWN = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention, *RECURRENT)
GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}
SHIFTS = re.compile(
    r"(^|_)bias(_[kv]|_[ih]h.*|_table)?$|(^|_)(tokens?|emb|embeds?|embeddings?|encodings?|pos|positions?)(_[a-z])?$"
)
# names of additive parameters: in_proj_bias, bias_ih_l0, class_token, pos_embed, relative_position_bias_table
WEIGHTS = re.compile(r"(.*_)?weight$|weight_[ih]h(_l\d+(_reverse)?)?$|weight_hr_l\d+(_reverse)?$")
# names of weights in layers that are known: not the parts that torch.nn.utils makes of them, such as weight_g


@dataclass(frozen=True)
class Role(ABC):
    """What a parameter does to its input, and of how many `blocks` along its first axis it is made.

    Queries, keys and values of attention are three blocks of one parameter, the gates of a recurrent layer three or
    four. `initial` is the mean of the values that torch initialises a parameter of this role with.
    """

    blocks: int = 1
    initial: ClassVar[float] = 0.0

    @abstractmethod
    def tensors(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The blocks of `parameter`, as views."""

    def names(self, name: str) -> list[str]:
        """The names of the blocks of the parameter `name`: "w[0]", "w[1]", and so on, or "w" for a single block.

        >>> WeightRole(blocks=3).names("in_proj_weight")
        ['in_proj_weight[q]', 'in_proj_weight[k]', 'in_proj_weight[v]']
        """
        if self.blocks == 1:
            return [name]
        return [f"{name}[{which}]" for which in ("qkv" if "in_proj" in name else range(self.blocks))]


@dataclass(frozen=True)
class WeightRole(Role):
    """A weight: each block is a matrix of d_out × the product of its other axes. `transposed` where the parameter has
    the output as its second axis; the blocks have it first."""

    transposed: bool = False

    def tensors(self, parameter: Tensor) -> tuple[Tensor, ...]:
        oriented = parameter.transpose(0, 1) if self.transposed else parameter
        return oriented.chunk(self.blocks) if self.blocks > 1 else (oriented,)


@dataclass(frozen=True)
class ShiftRole(Role):
    """An additive parameter: a bias, the shift of a norm layer, a class token or a positional embedding."""

    def tensors(self, parameter: Tensor) -> tuple[Tensor, ...]:
        return parameter.chunk(self.blocks) if self.blocks > 1 else (parameter,)


@dataclass(frozen=True)
class ScaleRole(Role):
    """The scale of a norm layer, one number for each unit."""

    initial: ClassVar[float] = 1.0

    def tensors(self, parameter: Tensor) -> tuple[Tensor, ...]:
        return (parameter,)


def parameter_roles(model: nn.Module) -> dict[nn.Parameter, Role]:
    """The role of each parameter of `model` that has one; a tied parameter has the first role that it has anywhere.

    In modules of other types than torch's, biases, tokens and positional embeddings are recognised by name, and other
    matrices count as weights. Without a role are token embeddings, slopes of PReLU, single numbers, other vectors, and
    the parameters from which a weight is computed, as by `weight_norm`.
    """
    found: dict[nn.Parameter, Role] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = role_of(module, name, parameter)
            if role is not None:
                found.setdefault(parameter, role)
    return found


def role_of(module: nn.Module, name: str, parameter: Tensor) -> Role | None:
    """The role of the parameter that `module` holds under `name`; None where no rule applies.

    >>> norm = nn.LayerNorm(2)
    >>> role_of(norm, "weight", norm.weight), role_of(norm, "bias", norm.bias)
    (ScaleRole(blocks=1), ShiftRole(blocks=1))
    >>> attention = nn.MultiheadAttention(4, 2)
    >>> role_of(attention, "in_proj_weight", attention.in_proj_weight)
    WeightRole(blocks=3, transposed=False)
    """
    if parameter.ndim == 0 or isinstance(module, (*WITHOUT_ROLE, ParametrizationList)):
        return None
    if isinstance(module, NORMS):
        return ShiftRole() if name == "bias" else ScaleRole()
    blocks = _blocks(module, name)
    if SHIFTS.search(name):
        return ShiftRole(blocks)
    if isinstance(module, KNOWN):
        transposed = isinstance(module, CONVOLUTIONS_FROM_INPUTS)
        return WeightRole(blocks, transposed) if WEIGHTS.match(name) else None
    is_vector = parameter.numel() == max(parameter.shape)  # all axes but one have length 1
    return None if is_vector else WeightRole()


def weights_among(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> list[tuple[nn.Parameter, WeightRole]]:
    """Those of the parameters, a selection by name of those of `model`, that are weights, with their roles."""
    chosen = {id(parameter) for parameter in parameters.values()}
    roles = parameter_roles(model).items()
    return [(weight, role) for weight, role in roles if id(weight) in chosen and isinstance(role, WeightRole)]


def check_weights(owner: object, parameters: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Raises ValueError where none of the parameters is a weight, which alone `owner` looks at; warns of those of
    several axes that may be parts of one, as `weight_norm` makes them."""
    if not weights_among(parameters, model):
        raise ValueError(
            f"{type(model).__name__} has no trainable weight matrix among the parameters that are selected, and "
            f"{type(owner).__name__} looks at no others. Let include and exclude leave one."
        )
    warn_of_parameters_without_role(owner, model, (name for name, p in parameters.items() if p.ndim > 1))


def warn_of_parameters_without_role(owner: object, model: nn.Module, names: Iterable[str]) -> None:
    """Warns of the parameters among `names` to which no rule applies, so that `owner` leaves them alone; embeddings,
    slopes of PReLU and single numbers are left out on purpose."""
    roles, wanted = parameter_roles(model), set(names)
    unknown = [
        name
        for name, parameter in ((canonical_name(n), p) for n, p in model.named_parameters())
        if name in wanted and parameter not in roles and parameter.ndim > 0 and not _in_module_without_role(model, name)
    ]
    if unknown:
        warnings.warn(
            f"No rule says whether {in_words(unknown)} multiply, shift or scale their input, so that "
            f"{type(owner).__name__} leaves them alone. Exclude them to say that this is meant.",
            UserWarning,
            stacklevel=outside(),
        )


def weight_matrices(model: nn.Module) -> dict[str, Float[Tensor, "out in"]]:
    """Every weight of `model` as a matrix of d_out × the product of its other axes, by name, detached.

    Queries, keys and values and the gates of recurrent layers are matrices of their own. Weights that
    `torch.nn.utils.parametrize` computes from other parameters are included with their values in eval mode.

    >>> {name: tuple(W.shape) for name, W in weight_matrices(nn.Conv2d(3, 8, 5)).items()}
    {'weight': (8, 75)}
    >>> list(weight_matrices(nn.MultiheadAttention(4, 2)))
    ['in_proj_weight[q]', 'in_proj_weight[k]', 'in_proj_weight[v]', 'out_proj.weight']
    """
    roles = parameter_roles(model)
    weights = {canonical_name(name): (p, roles.get(p)) for name, p in model.named_parameters()} | _computed(model)
    return {
        label: block.detach().flatten(1)
        for name, (weight, role) in weights.items()
        if isinstance(role, WeightRole)
        for label, block in zip(role.names(name), role.tensors(weight))
    }


@torch.no_grad()
def _computed(model: nn.Module) -> dict[str, tuple[Tensor, Role | None]]:
    """Tensors that are computed from parameters, by name, with their roles."""
    found = {}
    for prefix, module in model.named_modules():
        for name, chain in getattr(module, "parametrizations", {}).items():
            training = chain.training
            chain.eval()  # in training, spectral normalisation goes on with each look
            value = getattr(module, name)
            chain.train(training)
            found[canonical_name(f"{prefix}.{name}".removeprefix("."))] = value, role_of(module, name, value)
    return found


def _blocks(module: nn.Module, name: str) -> int:
    """The number of matrices or vectors that a parameter stacks."""
    if isinstance(module, nn.MultiheadAttention):
        return 3 if name.startswith("in_proj") else 1
    recurrent = isinstance(module, RECURRENT) and not name.startswith("weight_hr")
    return GATES.get(getattr(module, "mode", type(module).__name__), 1) if recurrent else 1


def _in_module_without_role(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a module whose parameters have no role, such as an embedding."""
    modules = {canonical_name(f"{n}.x").removesuffix("x").removesuffix("."): m for n, m in model.named_modules()}
    return isinstance(modules.get(name.rpartition(".")[0]), WITHOUT_ROLE)
