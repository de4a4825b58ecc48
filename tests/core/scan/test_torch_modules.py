"""Every kind of module that torch has, in a small model: each curvature, structure and measure is right or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

VECTOR, SEQUENCE, CHANNELS, IMAGE, VOLUME, TOKENS = (4,), (3, 4), (2, 6), (2, 4, 4), (1, 3, 3, 3), 6
CLASSES = 3


class Headed(nn.Module):
    """A body, and a linear head on all that it gives for an example."""

    def __init__(self, *body: nn.Module, shape: tuple[int, ...] | int, head: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(*body).eval()
        example = torch.zeros(2, 5, dtype=torch.long) if isinstance(shape, int) else torch.randn(2, *shape)
        with torch.no_grad():
            width = self.body(example)[0].numel()
        self.head = nn.Linear(width, CLASSES) if head else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).flatten(1))


class Lambda(nn.Module):
    """A function of what a module gives."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(*self.parts, inputs)


@dataclass(frozen=True)
class Case:
    """Layers between the inputs of this shape and the head; `refused` says why the model may be refused, `same` gives
    other layers of the same function and plain derivatives."""

    body: Callable[[], list[nn.Module]]
    shape: tuple[int, ...] | int = VECTOR
    refused: str = ""
    same: Callable[[], list[nn.Module]] | None = None

    def make(self) -> nn.Module:
        return Headed(*self.body(), shape=self.shape)

    def reference(self) -> nn.Module:
        return Headed(*(self.same or self.body)(), shape=self.shape)


def after_linear(module: Callable[[], nn.Module], width: int = 4) -> Case:
    return Case(lambda: [nn.Linear(4, width), module()])


def after_conv(module: Callable[[], nn.Module]) -> Case:
    return Case(lambda: [nn.Conv2d(2, 2, 2, padding=1), module()], IMAGE)


def first(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a recurrent module gives, without its state."""
    return module(inputs)[0].tanh()


def at_once(*modules: nn.Module) -> nn.Module:
    """A mixture of what several modules give."""
    return Lambda(lambda *all: sum((i + 1) * module(all[-1]) for i, module in enumerate(all[:-1])).tanh(), *modules)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.4)


CASES = {
    "Linear": Case(lambda: [nn.Linear(4, 4), nn.Tanh()]),
    "Linear without bias, ReLU": Case(lambda: [nn.Linear(4, 5, bias=False), nn.ReLU()]),
    "Linear on sequences": Case(lambda: [nn.Linear(4, 3), nn.Tanh()], SEQUENCE),
    "Linear on sequences, averaged": Case(lambda: [nn.Linear(4, 3), nn.Tanh(), Lambda(lambda x: x.mean(1))], SEQUENCE),
    "Bilinear": Case(lambda: [Lambda(lambda f, b, x: b(f(x), x), nn.Linear(4, 3), nn.Bilinear(3, 4, 3))]),
    "LazyLinear": Case(lambda: [nn.LazyLinear(4), nn.Tanh()]),
    "LazyConv1d": Case(lambda: [nn.LazyConv1d(2, 3), nn.Tanh()], CHANNELS),
    "Conv1d": Case(lambda: [nn.Conv1d(2, 2, 3, stride=2, padding=1), nn.Tanh()], CHANNELS),
    "Conv1d with groups": Case(lambda: [nn.Conv1d(2, 4, 2, groups=2), nn.Tanh()], CHANNELS),
    "Conv1d, same padding, dilated": Case(lambda: [nn.Conv1d(2, 2, 3, padding="same", dilation=2)], CHANNELS),
    **{
        f"Conv2d, {mode}": Case(lambda m=mode: [nn.Conv2d(2, 2, 3, padding=1, padding_mode=m), nn.Tanh()], IMAGE)
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "Conv2d, depthwise": Case(lambda: [nn.Conv2d(2, 2, 3, groups=2), nn.Tanh(), nn.Conv2d(2, 3, 1)], IMAGE),
    "Conv3d": Case(lambda: [nn.Conv3d(1, 2, 2), nn.Tanh()], VOLUME),
    "ConvTranspose1d": Case(lambda: [nn.ConvTranspose1d(2, 2, 2, stride=2), nn.Tanh()], CHANNELS),
    "ConvTranspose2d with groups": Case(
        lambda: [nn.ConvTranspose2d(2, 2, 2, stride=2, groups=2, output_padding=1), nn.Tanh()], (2, 2, 2)
    ),
    "ConvTranspose3d": Case(lambda: [nn.ConvTranspose3d(1, 1, 2), nn.Tanh()], (1, 2, 2, 2)),
    "BatchNorm1d": Case(lambda: [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()]),
    "BatchNorm1d, not affine": Case(lambda: [nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh()]),
    "BatchNorm2d": Case(lambda: [nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2), nn.Tanh()], IMAGE),
    "BatchNorm3d": Case(lambda: [nn.BatchNorm3d(1), nn.Tanh()], VOLUME),
    "BatchNorm1d without statistics": Case(
        lambda: [nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)], refused="mixes examples"
    ),
    "InstanceNorm1d": Case(lambda: [nn.InstanceNorm1d(2, affine=True), nn.Tanh()], CHANNELS),
    "InstanceNorm2d with statistics": Case(
        lambda: [nn.Conv2d(2, 2, 2), nn.InstanceNorm2d(2, affine=True, track_running_stats=True), nn.Tanh()], IMAGE
    ),
    "LayerNorm": Case(lambda: [nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()]),
    "LayerNorm, not affine": Case(lambda: [nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Tanh()]),
    "LayerNorm on sequences": Case(lambda: [nn.LayerNorm((3, 4)), nn.Tanh()], SEQUENCE),
    "GroupNorm": Case(lambda: [nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh()], IMAGE),
    "GroupNorm, not affine": Case(lambda: [nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4, affine=False), nn.Tanh()], IMAGE),
    "RMSNorm": Case(lambda: [nn.Linear(4, 4), nn.RMSNorm(4), nn.Tanh()]),
    "LocalResponseNorm": Case(lambda: [nn.Conv2d(2, 3, 2), nn.LocalResponseNorm(2, alpha=0.5)], IMAGE),
    "Embedding": Case(lambda: [nn.Embedding(6, 2), nn.Tanh()], TOKENS),
    "Embedding with a padding index": Case(lambda: [nn.Embedding(6, 2, padding_idx=0), nn.Tanh()], TOKENS),
    "Embedding scaled by frequency": Case(
        lambda: [nn.Embedding(6, 2, scale_grad_by_freq=True)], TOKENS, same=lambda: [nn.Embedding(6, 2)]
    ),
    "Embedding of bounded norm": Case(
        lambda: [nn.Embedding(6, 2, max_norm=9.0)], TOKENS, "its weight changes where it is called",
        lambda: [nn.Embedding(6, 2)],
    ),
    "Embedding, sparse": Case(
        lambda: [nn.Embedding(6, 2, sparse=True)], TOKENS, "sparse gradients", lambda: [nn.Embedding(6, 2)]
    ),
    **{f"EmbeddingBag, {m}": Case(lambda m=m: [nn.EmbeddingBag(6, 4, mode=m), nn.Tanh()], TOKENS)
       for m in ("sum", "mean", "max")},
    "RNN": Case(lambda: [Lambda(first, nn.RNN(4, 2, batch_first=True))], SEQUENCE),
    "LSTM": Case(lambda: [Lambda(first, nn.LSTM(4, 2, batch_first=True))], SEQUENCE),
    "LSTM, bidirectional, projected": Case(
        lambda: [Lambda(first, nn.LSTM(4, 2, batch_first=True, bidirectional=True, proj_size=1))], SEQUENCE
    ),
    "GRU": Case(lambda: [Lambda(first, nn.GRU(4, 2, batch_first=True))], SEQUENCE),
    "RNNCell": Case(lambda: [nn.RNNCell(4, 3)]),
    "LSTMCell": Case(lambda: [Lambda(first, nn.LSTMCell(4, 2))]),
    "GRUCell": Case(lambda: [Lambda(lambda c, x: c(x, c(x)), nn.GRUCell(4, 2))]),
    "MultiheadAttention": Case(
        lambda: [Lambda(lambda a, x: a(x, x, x)[0], nn.MultiheadAttention(4, 2, batch_first=True))], SEQUENCE
    ),
    "MultiheadAttention without weights": Case(
        lambda: [Lambda(lambda a, x: a(x, x, x, need_weights=False)[0],
                        nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True))], SEQUENCE
    ),
    "TransformerEncoderLayer": Case(
        lambda: [nn.TransformerEncoderLayer(4, 2, 3, batch_first=True), Lambda(lambda x: x.mean(1))], SEQUENCE
    ),
    "TransformerEncoderLayer, norm first": Case(
        lambda: [nn.TransformerEncoderLayer(4, 1, 3, batch_first=True, norm_first=True, activation="gelu")], SEQUENCE
    ),
    "TransformerDecoderLayer": Case(
        lambda: [Lambda(lambda d, x: d(x, x[:, :2]), nn.TransformerDecoderLayer(4, 2, 2, batch_first=True))], SEQUENCE
    ),
    "PReLU": after_linear(lambda: nn.PReLU(4)),
    "smooth activations": Case(lambda: [nn.Linear(4, 3), at_once(
        nn.CELU(0.5), nn.ELU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.LogSigmoid(), nn.Mish(), nn.SELU(),
        nn.SiLU(), nn.Sigmoid(), nn.Softplus(2), nn.Softsign(), nn.Tanhshrink(), nn.Dropout(), nn.AlphaDropout(),
    )]),
    "activations with kinks": Case(lambda: [nn.Linear(4, 3), at_once(
        nn.Hardshrink(0.1), nn.Hardsigmoid(), nn.Hardswish(), nn.Hardtanh(), nn.LeakyReLU(), nn.ReLU6(), nn.RReLU(),
        nn.Softshrink(0.1), nn.Threshold(0.1, 2.0), nn.FeatureAlphaDropout(),
    )]),
    "GLU": after_linear(nn.GLU),
    "Softmax": after_linear(lambda: nn.Softmax(1)),
    "LogSoftmax": after_linear(lambda: nn.LogSoftmax(1)),
    "Softmin": after_linear(lambda: nn.Softmin(1)),
    "MaxPool1d": Case(lambda: [nn.Conv1d(2, 2, 2), nn.MaxPool1d(2)], CHANNELS),
    "MaxPool2d": after_conv(lambda: nn.MaxPool2d(2)),
    "MaxPool3d": Case(lambda: [nn.Conv3d(1, 2, 2), nn.MaxPool3d(2)], VOLUME),
    "MaxUnpool2d": after_conv(
        lambda: Lambda(lambda p, u, x: u(*p(x[:, :, 1:, 1:])), nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2))
    ),
    "AvgPool1d": Case(lambda: [nn.Conv1d(2, 2, 2), nn.AvgPool1d(2)], CHANNELS),
    "AvgPool2d": after_conv(lambda: nn.Sequential(nn.AvgPool2d(2), nn.Tanh())),
    "AvgPool3d": Case(lambda: [nn.Conv3d(1, 2, 2), nn.AvgPool3d(2), nn.Tanh()], VOLUME),
    "AdaptiveAvgPool2d": after_conv(lambda: nn.Sequential(nn.AdaptiveAvgPool2d((2, 3)), nn.Tanh())),
    "AdaptiveMaxPool1d": Case(lambda: [nn.Conv1d(2, 2, 2), nn.AdaptiveMaxPool1d(2)], CHANNELS),
    "AdaptiveMaxPool2d": after_conv(lambda: nn.AdaptiveMaxPool2d((2, 3))),
    "LPPool1d": Case(lambda: [nn.Conv1d(2, 2, 2), nn.Softplus(), nn.LPPool1d(2, 2)], CHANNELS),
    "LPPool2d": after_conv(lambda: nn.Sequential(nn.Softplus(), nn.LPPool2d(3, 2))),
    "FractionalMaxPool2d": Case(
        lambda: [nn.Conv2d(2, 2, 2), nn.FractionalMaxPool2d(2, output_size=2)], IMAGE, "draws where it pools"
    ),
    "PixelShuffle": Case(lambda: [nn.Conv2d(2, 4, 3), nn.PixelShuffle(2), nn.Tanh()], IMAGE),
    "PixelUnshuffle": Case(lambda: [nn.PixelUnshuffle(2), nn.Conv2d(8, 1, 1), nn.Tanh()], IMAGE),
    "ChannelShuffle": Case(lambda: [nn.Conv2d(2, 4, 3), nn.ChannelShuffle(2), nn.Tanh()], IMAGE),
    "Unfold and Fold": Case(lambda: [
        nn.Unfold(2), Lambda(lambda f, x: f(x.mT).mT, nn.Linear(8, 8)), nn.Fold((4, 4), 2), nn.Tanh()
    ], IMAGE),
    "Upsample": after_conv(lambda: at_once(
        *(nn.Upsample((7, 6), mode=mode) for mode in ("nearest", "nearest-exact", "bilinear", "bicubic"))
    )),
    "padding": after_conv(lambda: at_once(
        nn.ZeroPad2d(1), nn.ConstantPad2d(1, 2.0), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.CircularPad2d(1)
    )),
    "Flatten and Unflatten": Case(lambda: [nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.Linear(2, 2), nn.Flatten()]),
    "CosineSimilarity": Case(
        lambda: [Lambda(lambda c, f, x: c(f(x)[:, None], torch.eye(4).to(x)), nn.CosineSimilarity(2), nn.Linear(4, 4))]
    ),
    "PairwiseDistance": Case(
        lambda: [Lambda(lambda d, f, x: d(f(x)[:, None], torch.eye(4).to(x)), nn.PairwiseDistance(), nn.Linear(4, 4))]
    ),
    "weight_norm": Case(lambda: [parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh()]),
    "weight_norm of Conv1d": Case(lambda: [parametrizations.weight_norm(nn.Conv1d(2, 2, 3)), nn.Tanh()], CHANNELS),
    "spectral_norm": Case(lambda: [parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh()]),
    "orthogonal": Case(lambda: [parametrizations.orthogonal(nn.Linear(4, 3)), nn.Tanh()]),
    "orthogonal, Cayley": Case(lambda: [parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley")]),
    "old weight_norm": Case(lambda: [old_weight_norm(nn.Linear(4, 3)), nn.Tanh()]),
    "old spectral_norm": Case(lambda: [old_spectral_norm(nn.Linear(4, 3)), nn.Tanh()]),
    "pruned Linear": Case(lambda: [pruned(nn.Linear(4, 4)), nn.ReLU()]),
    "pruned Linear, Tanh": Case(lambda: [pruned(nn.Linear(4, 4)), nn.Tanh()]),
    "pruned Conv1d": Case(lambda: [pruned(nn.Conv1d(2, 2, 3)), nn.Tanh()], CHANNELS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_measure_of_a_model_with_this_module_is_right_or_refused(name: str, scan) -> None:
    case = CASES[name]
    report = scan(case.make, case.shape, case.reference)
    assert not report.wrong, "\n".join(["", *report.wrong])
    assert case.refused or not report.refused, "\n".join(["refused:", *report.refused])
