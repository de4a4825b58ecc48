"""A small GPT over bytes in plain PyTorch, and low-rank adapters on its linear layers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256


@dataclass(frozen=True)
class Size:
    """So many blocks of a width, on windows of `context` bytes; `tied`: the head has the weights of the embedding."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 64
    tied: bool = False


class Attention(nn.Module):
    """Causal self-attention, with linear q, k and v of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Float[Tensor, "N T d"]) -> Float[Tensor, "N T d"]:
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then the same with a perceptron of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "N T d"]) -> Float[Tensor, "N T d"]:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """Logits of the next byte after each of T bytes, T at most the context: [N, T] to [N, 256, T], as
    `nn.CrossEntropyLoss` takes them. Weights are drawn as torch does."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, BYTES, bias=False)
        if size.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Int[Tensor, "N T"]) -> Float[Tensor, "N 256 T"]:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.embedding(tokens) + self.position(places)
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter: W x + b + B A x, with B = 0 at first (Hu et al. 2021)."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """W + B A."""
        return self.layer.weight + self.up.weight @ self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def with_adapters(model: GPT, rank: int) -> GPT:
    """The model, frozen, with an adapter of this rank on each linear layer of its blocks."""
    model.requires_grad_(False)
    for parent in list(model.blocks.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, Adapted(layer, rank))
    return model


def merged(model: nn.Module) -> nn.Module:
    """A copy with plain layers of weight W + B A in place of the adapted ones, in which these weights alone train."""
    plain = deepcopy(model).requires_grad_(False)
    for parent in list(plain.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Adapted):
                module.layer.weight = nn.Parameter(module.weight.detach())
                setattr(parent, name, module.layer)
    return plain
