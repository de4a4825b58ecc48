"""Per-example gradients of single layers, from what enters a layer and the sensitivity of a scalar to what leaves it.

For example n, with inputs a_t and sensitivities b_t = ∂s_n/∂z_t at T positions (one in a multilayer perceptron, tokens
in a transformer, pixels in a convolution), the gradient of a weight is Σ_t b_t a_tᵀ and that of a bias Σ_t b_t
(Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

Rows = dict[str, Tensor]

CACHED = 2**17  # numbers that are worked on at once: with their operands they stay in the cache of a processor


@singledispatch
def prepared(layer: nn.Module, inputs: Tensor, examples: int) -> Tensor | None:
    """What the weight is multiplied with: A [n, in, T] of a linear or convolutional layer, the normalised inputs of a
    norm layer, the indices of an embedding. None for a layer of which no form is known."""
    return _tokens(inputs, examples) if is_transposed(layer) else None


def surely_prepared(layer: nn.Module, inputs: Tensor, examples: int) -> Tensor:
    """What the weight of a layer that explained its gradients is multiplied with: see `prepared`. Raises TypeError
    where no form is known after all."""
    ready = prepared(layer, inputs, examples)
    if ready is None:
        raise _unknown(layer)
    return ready


@singledispatch
def rows(layer: nn.Module, ready: Tensor, sensitivity: Tensor, examples: int) -> Rows:
    """The gradient of each example's scalar in each parameter of `layer`, [n, *shape], from its prepared inputs."""
    if not is_transposed(layer):
        raise _unknown(layer)
    b = _tokens(sensitivity, examples)
    return {"weight": ready @ b.mT, "bias": b.sum(2)}


def is_known(layer: nn.Module) -> bool:
    """Whether there is a form for this kind of layer."""
    return prepared.dispatch(type(layer)) is not prepared.dispatch(nn.Module) or is_transposed(layer)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer is x W + b with W [in, out]: the `Conv1D` of GPT-2, in Hugging Face's library and elsewhere. It
    is known by its name, so that nothing is imported, and tried as all layers are."""
    weight = getattr(layer, "weight", None)
    named = any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)
    return named and isinstance(weight, Tensor) and weight.ndim == 2


def is_outer(layer: nn.Module) -> bool:
    """Whether the gradient of the layer's weight, as a matrix [out, in], is B Aᵀ, with A as prepared and
    B = `positions(sensitivity)`."""
    if isinstance(layer, _ConvNd):
        return layer.groups == 1 and not isinstance(layer, _ConvTransposeNd)
    return takes_tokens(layer)


def takes_tokens(layer: nn.Module) -> bool:
    """Whether the layer is linear in the last axis of its inputs, at each position by itself."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def added_rows(total: Rows, layer: nn.Module, ready: Tensor, sensitivity: Tensor, examples: int) -> Rows:
    """The rows of a layer added to those of another one, in their memory as far as there are any."""
    if isinstance(layer, nn.Embedding) and "weight" in total:
        where, b = _embedded(layer, ready, sensitivity, examples)
        total["weight"].view(-1, layer.embedding_dim).index_add_(0, where, b)
        return total
    found = rows(layer, ready, sensitivity, examples)
    return {name: total[name].add_(part) if name in total else part for name, part in found.items()}


def positions(layer: nn.Module, sensitivity: Tensor, examples: int) -> Float[Tensor, "n out T"]:
    """B of a linear or convolutional layer."""
    return _pixels(sensitivity) if isinstance(layer, _ConvNd) else _tokens(sensitivity, examples)


def squares(layer: nn.Module, inputs: Tensor, columns: Sequence[Tensor], examples: int) -> Rows:
    """Σ_r Σ_n (∇s_nr)² in each parameter of `layer`, given its sensitivity to each of several scalars s_r: (ΣB²)ᵀA²
    where there is one position, else rows squared in pieces. A weight may come as its matrix [out, in]."""
    if isinstance(layer, nn.Embedding):
        parts = [_embedding_squares(layer, inputs, b, examples) for b in columns]
        return {"weight": torch.stack(parts).sum(0)}
    if is_outer(layer) and positions(layer, columns[0], examples).shape[2] == 1:
        return _squares_of_one_position(layer, inputs, columns, examples)
    size = max(1, CACHED // sum(p.numel() for p in layer.parameters(recurse=False)))
    total: Rows = {}
    for pieces in zip(*(tensor.unflatten(0, (examples, -1)).split(size) for tensor in (inputs, *columns))):
        count = len(pieces[0])
        here, *sensitivities = (piece.flatten(0, 1) for piece in pieces)
        ready, of_each = surely_prepared(layer, here, count), Rows()
        for sensitivity in sensitivities:
            for name, part in rows(layer, ready, sensitivity, count).items():
                of_each[name] = of_each[name].addcmul_(part, part) if name in of_each else part.square_()
        for name, part in of_each.items():
            total[name] = total[name].add_(part.sum(0)) if name in total else part.sum(0)
    return total


def _squares_of_one_position(layer: nn.Module, inputs: Tensor, columns: Sequence[Tensor], examples: int) -> Rows:
    ready = surely_prepared(layer, inputs, examples)
    first, *others = (positions(layer, column, examples)[:, :, 0] for column in columns)
    total = first.square()
    for b in others:
        total.addcmul_(b, b)
    a = ready[:, :, 0].square()
    return {"weight": a.T @ total if is_transposed(layer) else total.T @ a, "bias": total.sum(0)}


@prepared.register
def _(layer: nn.Linear, inputs: Tensor, examples: int) -> Tensor:
    return _tokens(inputs, examples)


@rows.register
def _(layer: nn.Linear, ready: Tensor, sensitivity: Tensor, examples: int) -> Rows:
    b = _tokens(sensitivity, examples)
    return {"weight": b @ ready.mT, "bias": b.sum(2)}


@prepared.register
def _(layer: _ConvNd, inputs: Tensor, examples: int) -> Tensor | None:
    if isinstance(layer, _ConvTransposeNd) or len(inputs) != examples:
        return None
    return _patches(layer, inputs)


@rows.register
def _(layer: _ConvNd, ready: Tensor, sensitivity: Tensor, examples: int) -> Rows:
    b, groups = _pixels(sensitivity), layer.groups
    weight = b.unflatten(1, (groups, -1)) @ ready.unflatten(1, (groups, -1)).mT
    return {"weight": weight.reshape(examples, *layer.weight.shape), "bias": b.sum(2)}


@prepared.register
def _(layer: _BatchNorm, inputs: Tensor, examples: int) -> Tensor | None:
    if layer.training or layer.running_mean is None or layer.running_var is None or len(inputs) != examples:
        return None
    return F.batch_norm(inputs, layer.running_mean, layer.running_var, eps=layer.eps)


@prepared.register
def _(layer: _InstanceNorm, inputs: Tensor, examples: int) -> Tensor | None:
    unknown = layer.track_running_stats or len(inputs) != examples
    return None if unknown else F.instance_norm(inputs, eps=layer.eps)


@prepared.register
def _(layer: nn.GroupNorm, inputs: Tensor, examples: int) -> Tensor | None:
    return F.group_norm(inputs, layer.num_groups, eps=layer.eps) if len(inputs) == examples else None


@rows.register(_BatchNorm)
@rows.register(_InstanceNorm)
@rows.register(nn.GroupNorm)
def _(layer: nn.Module, ready: Tensor, sensitivity: Tensor, examples: int) -> Rows:
    parts, axes = {"weight": sensitivity * ready, "bias": sensitivity.clone()}, tuple(range(2, ready.ndim))
    return {name: part.sum(axes) for name, part in parts.items()} if axes else parts


@prepared.register
def _(layer: nn.LayerNorm, inputs: Tensor, examples: int) -> Tensor:
    return F.layer_norm(inputs, list(layer.normalized_shape), eps=layer.eps)


@prepared.register
def _(layer: nn.RMSNorm, inputs: Tensor, examples: int) -> Tensor:
    return F.rms_norm(inputs, list(layer.normalized_shape), eps=layer.eps)


@rows.register(nn.LayerNorm)
@rows.register(nn.RMSNorm)
def _(layer: nn.LayerNorm | nn.RMSNorm, ready: Tensor, sensitivity: Tensor, examples: int) -> Rows:
    parts = {"weight": sensitivity * ready, "bias": sensitivity}
    return {name: part.reshape(examples, -1, *layer.normalized_shape).sum(1) for name, part in parts.items()}


@prepared.register
def _(layer: nn.Embedding, inputs: Tensor, examples: int) -> Tensor | None:
    return None if layer.sparse or layer.scale_grad_by_freq or layer.max_norm is not None else inputs


@rows.register
def _(layer: nn.Embedding, ready: Tensor, sensitivity: Tensor, examples: int) -> Rows:
    where, b = _embedded(layer, ready, sensitivity, examples)
    table = b.new_zeros(examples * layer.num_embeddings, layer.embedding_dim).index_add_(0, where, b)
    return {"weight": table.view(examples, layer.num_embeddings, layer.embedding_dim)}


def _unknown(layer: nn.Module) -> TypeError:
    return TypeError(f"No per-example gradient is known for this {type(layer).__name__}. Use MatrixFree() instead.")


def _patches(layer: _ConvNd, inputs: Tensor) -> Float[Tensor, "n in T"]:
    """What each output position of a convolution sees, channels first; in memory one position after the other, as
    products with it want."""
    padding = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, padding, mode) if any(padding) else inputs
    spatial = inputs.ndim - 2
    for axis, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation), start=2):
        padded = padded.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return padded.movedim(1, 1 + spatial).flatten(1 + spatial).flatten(1, spatial).mT


def _pixels(sensitivity: Tensor) -> Float[Tensor, "n out T"]:
    """Sensitivities at the positions of a convolution, as a view where channels are first or last in memory."""
    if sensitivity.is_contiguous():
        return sensitivity.flatten(2)
    return sensitivity.movedim(1, -1).flatten(1, -2).mT


def _tokens(tensor: Tensor, examples: int) -> Float[Tensor, "n features T"]:
    return tensor.reshape(examples, -1, tensor.shape[-1]).mT


def _embedded(layer: nn.Embedding, inputs: Tensor, sensitivity: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """For each position: n · V + its index, and its sensitivity, zero at the padding."""
    index = inputs.reshape(examples, -1)
    b = sensitivity.reshape(-1, layer.embedding_dim)
    if layer.padding_idx is not None:
        b = b.masked_fill((index == layer.padding_idx).view(-1, 1), 0)
    return (index + layer.num_embeddings * torch.arange(examples, device=index.device)[:, None]).reshape(-1), b


def _embedding_squares(layer: nn.Embedding, inputs: Tensor, sensitivity: Tensor, examples: int) -> Tensor:
    """Squares of each example's sum over the positions of one index, without a table for each example."""
    where, b = _embedded(layer, inputs, sensitivity, examples)
    pairs, of_pair = where.unique(return_inverse=True)
    sums = b.new_zeros(len(pairs), layer.embedding_dim).index_add_(0, of_pair, b)
    table = b.new_zeros(layer.num_embeddings, layer.embedding_dim)
    return table.index_add_(0, pairs % layer.num_embeddings, sums.square_())
