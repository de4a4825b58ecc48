"""What each parameter of a network does to its input: multiplies it by a matrix, shifts it, or scales each unit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from avalanche_curv.core.risk.parameters import canonical_name

CONVOLUTIONS_FROM_INPUTS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
EXCEPTED = (nn.Embedding, nn.EmbeddingBag, nn.PReLU)
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
class Multiplies:
    """A weight: `blocks` matrices on top of each other, each of d_out × the rest of its axes; `transposed` where the
    output is the second axis."""

    blocks: int = 1
    transposed: bool = False

    def tensors(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The blocks as views with the output as first axis."""
        turned = parameter.transpose(0, 1) if self.transposed else parameter
        return turned.chunk(self.blocks) if self.blocks > 1 else (turned,)


@dataclass(frozen=True)
class Adds:
    """A bias, a shift of a norm layer, a class token or a positional embedding: `blocks` vectors in a row."""

    blocks: int = 1

    def tensors(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The blocks as views."""
        return parameter.chunk(self.blocks) if self.blocks > 1 else (parameter,)


@dataclass(frozen=True)
class Scales:
    """The scale of a norm layer, one number a unit."""

    def tensors(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The scale itself."""
        return (parameter,)


Role: TypeAlias = Multiplies | Adds | Scales


def roles(model: nn.Module) -> dict[nn.Parameter, Role]:
    """The role of each parameter that has one, each once: a tied one has the first role that it has anywhere.

    Of modules of other types than torch's, names tell biases, tokens and positional embeddings, and other matrices
    count as weights. Without a role are token embeddings, slopes of PReLU, single numbers, vectors that nothing tells
    about, and what a weight is computed from, as by `weight_norm`.
    """
    found: dict[nn.Parameter, Role] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            role = role_of(module, name, parameter)
            if role is not None:
                found.setdefault(parameter, role)
    return found


def role_of(module: nn.Module, name: str, parameter: Tensor) -> Role | None:
    """The role of the parameter that `module` holds under `name`.

    >>> norm = nn.LayerNorm(2)
    >>> role_of(norm, "weight", norm.weight), role_of(norm, "bias", norm.bias)
    (Scales(), Adds(blocks=1))
    >>> attention = nn.MultiheadAttention(4, 2)
    >>> role_of(attention, "in_proj_weight", attention.in_proj_weight)
    Multiplies(blocks=3, transposed=False)
    """
    if parameter.ndim == 0 or isinstance(module, (*EXCEPTED, ParametrizationList)):
        return None
    if isinstance(module, NORMS):
        return Adds() if name == "bias" else Scales()
    blocks = _blocks(module, name)
    if SHIFTS.search(name):
        return Adds(blocks)
    if isinstance(module, KNOWN):
        transposed = isinstance(module, CONVOLUTIONS_FROM_INPUTS)
        return Multiplies(blocks, transposed) if WEIGHTS.match(name) else None
    return None if is_vector(parameter) else Multiplies()


def is_vector(parameter: Tensor) -> bool:
    """Whether all axes but one have length 1."""
    return parameter.numel() == max(parameter.shape, default=1)


def warn_of_unknown(model: nn.Module, parameters: Iterable[str]) -> None:
    """Names trainable parameters to which no rule applies."""
    known, wanted = roles(model), set(parameters)
    unknown = [
        name
        for name, parameter in ((canonical_name(n), p) for n, p in model.named_parameters())
        if name in wanted and parameter not in known and parameter.ndim > 0 and not _excepted(model, name)
    ]
    if unknown:
        warnings.warn(
            f"No rule says whether {', '.join(unknown)} multiply, shift or scale their input, so they are not "
            "regularised. Exclude them to say that this is meant.",
            stacklevel=3,
        )


def matrices(model: nn.Module) -> dict[str, Float[Tensor, "out in"]]:
    """Every weight as matrices, by name, detached; q, k, v and the gates of recurrent layers one by one, and what
    `torch.nn.utils.parametrize` computes from other parameters as it is in eval mode.

    >>> {name: tuple(W.shape) for name, W in matrices(nn.Conv2d(3, 8, 5)).items()}
    {'weight': (8, 75)}
    >>> list(matrices(nn.MultiheadAttention(4, 2)))
    ['in_proj_weight[q]', 'in_proj_weight[k]', 'in_proj_weight[v]', 'out_proj.weight']
    """
    known = roles(model)
    weights = {canonical_name(name): (p, known.get(p)) for name, p in model.named_parameters()} | _computed(model)
    return {
        label: block.detach().flatten(1)
        for name, (weight, role) in weights.items()
        if isinstance(role, Multiplies)
        for label, block in zip(block_names(name, role), role.tensors(weight))
    }


def block_names(name: str, role: Role) -> list[str]:
    """The names of the blocks of a parameter."""
    blocks = 1 if isinstance(role, Scales) else role.blocks
    if blocks == 1:
        return [name]
    return [f"{name}[{which}]" for which in ("qkv" if "in_proj" in name else range(blocks))]


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
    if isinstance(module, nn.MultiheadAttention):
        return 3 if name.startswith("in_proj") else 1
    recurrent = isinstance(module, RECURRENT) and not name.startswith("weight_hr")
    return GATES.get(getattr(module, "mode", type(module).__name__), 1) if recurrent else 1


def _excepted(model: nn.Module, name: str) -> bool:
    """Embeddings and slopes are left out on purpose."""
    modules = {canonical_name(f"{n}.x").removesuffix("x").removesuffix("."): m for n, m in model.named_modules()}
    return isinstance(modules.get(name.rpartition(".")[0]), EXCEPTED)
