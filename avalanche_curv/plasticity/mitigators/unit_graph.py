"""The hidden layers of a model whose units can be replaced, and the layers that read these units, found by tracing or
named."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.plasticity.roles import NORMS

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
)  # fmt: skip
POOLING = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
ENTRYWISE = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish",
    "softplus", "softsign", "tanh", "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "logsigmoid", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "contiguous",
}  # fmt: skip
POOLED = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for n in (1, 2, 3)}
LAST_AXIS_NORMS = (nn.LayerNorm, nn.RMSNorm)
METADATA = {"size", "dim", "numel", "shape", "ndim", "dtype", "device"}  # of a tensor, not of its values


@dataclass(frozen=True)
class HiddenLayer:
    """A layer by name, the `readers`, which alone take its units as inputs, and the `norms` that its units pass before.

    `batched` is true where one of the norm layers takes the second axis for that of the units, which is right only for
    batches of vectors or of images.
    """

    name: str
    readers: tuple[str, ...]
    norms: tuple[str, ...] = ()
    batched: bool = False


@dataclass(frozen=True)
class UnitGraph:
    """The hidden layers whose readers are known, and the other linear and convolutional layers with reasons."""

    hidden: tuple[HiddenLayer, ...]
    others: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> UnitGraph:
        """Traces a copy of `model` that shares its parameters. Raises ValueError where it cannot be traced.

        From a linear layer or a convolution, units are followed through activations, dropout, normalisation and, of
        convolutions, pooling and flattening, to the linear layers and convolutions that read them. A layer is left
        out where a unit goes elsewhere (into an addition, an attention, the outputs, a module that cannot be traced),
        where a layer that it passes is called several times or shares a parameter, and where the layer has no weights
        or is a transposed convolution. Names are those inside of wrappers such as DataParallel.

        >>> graph = UnitGraph.of(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> graph.hidden
        (HiddenLayer(name='0', readers=('2',), norms=(), batched=False),)
        >>> graph.others
        {'2': 'its units are outputs of the model'}
        """
        model = unwrapped(model)
        graph = _traced(model)
        hidden: list[HiddenLayer] = []
        others: dict[str, str] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Linear, _ConvNd)):
                try:
                    hidden.append(_UnitPath(model, graph, name).hidden_layer())
                except _NotReplaceable as reason:
                    others[name] = str(reason)
        return cls(tuple(hidden), others)

    @classmethod
    def named(cls, model: nn.Module, next_layers: Mapping[str, tuple[str, ...]]) -> UnitGraph:
        """The hidden layers that `next_layers` names, without tracing: for each, in any order, the norm layers that its
        units pass and all linear layers and convolutions that read them. Other layers are left out.

        What lies between is not looked at: units have to stay apart, as through activations, dropout, pooling and
        flattening. Raises ValueError where a name is none, a module is of another type, or widths do not fit.

        >>> UnitGraph.named(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), {"0": ("2",)}).hidden
        (HiddenLayer(name='0', readers=('2',), norms=(), batched=False),)
        """
        model = unwrapped(model)
        hidden = tuple(_named_layer(model, name, following) for name, following in next_layers.items())
        times = Counter(reader for layer in hidden for reader in layer.readers)
        for layer in hidden:
            for reader in (reader for reader in layer.readers if times[reader] > 1):
                raise ValueError(
                    f"next_layers names '{reader}' behind several layers, '{layer.name}' among them, so that it reads "
                    "sums of units, of which none can be replaced alone. Leave these layers out."
                )
        others = {
            name: "next_layers does not name it" for name, layer in model.named_modules()
            if isinstance(layer, (nn.Linear, _ConvNd)) and name not in next_layers
        }  # fmt: skip
        return cls(hidden, others)

    def without(self, layer: HiddenLayer, reason: str) -> UnitGraph:
        """The graph in which the hidden layer `layer` is among the others, with `reason`."""
        return UnitGraph(tuple(one for one in self.hidden if one != layer), {**self.others, layer.name: reason})


class _NotReplaceable(Exception):
    """The units of a layer cannot be replaced; the message says why."""


class _UnitPath:
    """The path of the units of one layer to their readers."""

    def __init__(self, model: nn.Module, graph: fx.Graph | None, name: str) -> None:
        self.model, self.graph, self.name = model, graph, name
        self.layer: Any = model.get_submodule(name)
        self.readers: dict[str, None] = {}
        self.norms: dict[str, None] = {}
        self.batched = False

    @property
    def _nodes(self) -> list[fx.Node]:
        return [] if self.graph is None else [*self.graph.nodes]

    def hidden_layer(self) -> HiddenLayer:
        calls = self._calls(self.name)
        if len(calls) != 1:
            raise _NotReplaceable("it is called several times" if calls else "no step that could be traced calls it")
        self._check_own(self.name)
        if not self.layer.weight.numel():
            raise _NotReplaceable("it has no weights")
        self._follow(calls[0], flat=not isinstance(self.layer, _ConvNd))
        if not self.readers:
            raise _NotReplaceable("nothing reads its units")
        return HiddenLayer(self.name, tuple(self.readers), tuple(self.norms), self.batched)

    def _follow(self, node: fx.Node, flat: bool) -> None:
        """Follows units through the users of `node`. If `flat`, units are the last axis, in blocks of equal length;
        otherwise they are the channels."""
        for user in node.users:
            if _name_of(user) in METADATA:
                continue
            if user.op == "output":
                raise _NotReplaceable("its units are outputs of the model")
            module = self.model.get_submodule(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, (nn.Linear, _ConvNd)):
                self._reads(str(user.target), module, flat)
            else:
                self._follow(user, self._passes(user, module, flat))

    def _reads(self, name: str, reader: nn.Linear | _ConvNd, flat: bool) -> None:
        self._check_own(name)
        if self.graph is not None and len(self._calls(name)) != 1:
            raise _NotReplaceable(f"its reader '{name}' is called several times")
        if isinstance(reader, nn.Linear):
            blocks, rest = divmod(reader.in_features, units(self.layer))
            fits = flat and rest == 0 and (blocks == 1 or isinstance(self.layer, _ConvNd))
        else:
            fits = not flat and reader.in_channels == units(self.layer) and reader.groups == 1
        if not fits:
            raise _NotReplaceable(f"its reader '{name}' mixes or regroups units")
        self.readers[name] = None

    def _passes(self, user: fx.Node, module: nn.Module | None, flat: bool) -> bool:
        """Whether units are flat behind `user`, which is no reader. Raises where they do not pass one by one."""
        images = isinstance(self.layer, _ConvNd)
        called = _name_of(user)
        if isinstance(module, NORMS) and self._normalises(module, flat):
            self._norm(str(user.target), module)
            return flat
        if isinstance(module, ACTIVATIONS) or (module is None and called in ENTRYWISE):
            return flat
        if not flat and (isinstance(module, POOLING) or (module is None and called in POOLED)):
            return flat
        if _flattens(user, module) and images:
            return True
        raise _NotReplaceable(f"its units go into {called!r}")

    def _norm(self, name: str, norm: nn.Module) -> None:
        self._check_own(name)
        if self.graph is not None and len(self._calls(name)) != 1:
            raise _NotReplaceable(f"the norm layer '{name}' on its way is called several times")
        self.norms[name] = None
        self.batched |= not isinstance(norm, LAST_AXIS_NORMS)

    def _normalises(self, norm: nn.Module, flat: bool) -> bool:
        """Whether a norm layer takes each unit for one feature; batch and group norms do in batches."""
        if isinstance(norm, LAST_AXIS_NORMS):
            return flat and tuple(norm.normalized_shape) == (units(self.layer),)
        if flat and isinstance(norm, _InstanceNorm):
            return False  # of [n, units] it takes n for the features
        return getattr(norm, "num_features", getattr(norm, "num_channels", None)) == units(self.layer)

    def reaches(self, name: str) -> None:
        """Notes that units reach the module of this name, as they pass a norm layer or are read."""
        module, images = self.model.get_submodule(name), isinstance(self.layer, _ConvNd)
        if name == self.name:
            raise _NotReplaceable("it reads its own units")
        if isinstance(module, NORMS):
            if not self._normalises(module, flat=not images):
                raise _NotReplaceable(f"the norm layer '{name}' does not take each unit for one feature")
            self._norm(name, module)
        elif isinstance(module, (nn.Linear, _ConvNd)):
            self._reads(name, module, flat=isinstance(module, nn.Linear))
        else:
            raise _NotReplaceable(f"'{name}' is a {type(module).__name__}, no linear layer, convolution or norm layer")

    def named_layer(self) -> HiddenLayer:
        """The layer with what its units reach, where that is complete."""
        if not isinstance(self.layer, (nn.Linear, _ConvNd)):
            raise _NotReplaceable(f"it is a {type(self.layer).__name__}, no linear layer or convolution")
        self._check_own(self.name)
        if not self.readers:
            raise _NotReplaceable("no linear layer or convolution among them reads its units")
        return HiddenLayer(self.name, tuple(self.readers), tuple(self.norms), self.batched)

    def _calls(self, name: str) -> list[fx.Node]:
        return [node for node in self._nodes if node.op == "call_module" and node.target == name]

    def _check_own(self, name: str) -> None:
        """Raises where the weight of a layer is not a parameter of it alone, or has the input as its first axis."""
        layer = self.model.get_submodule(name)
        if isinstance(layer, _ConvTransposeNd):
            raise _NotReplaceable("a transposed convolution is on its way")
        if "weight" not in layer._parameters:
            raise _NotReplaceable("a weight on its way is computed from other parameters")
        holders = Counter(id(p) for module in self.model.modules() for p in module._parameters.values())
        read = {str(node.target).rpartition(".")[0] for node in self._nodes if node.op == "get_attr"}
        if name in read or any(holders[id(p)] > 1 for p in layer._parameters.values() if p is not None):
            raise _NotReplaceable("a weight on its way is shared")


def _named_layer(model: nn.Module, name: str, following: tuple[str, ...]) -> HiddenLayer:
    known = dict(model.named_modules())
    for one in (name, *following):
        if one not in known:
            near = get_close_matches(one, [n for n in known if n], n=3) or [n for n in known if n][:8]
            raise ValueError(
                f"{type(model).__name__} has no module '{one}', which next_layers names. Did you mean one of {near}?"
            )
    path = _UnitPath(model, None, name)
    try:
        if isinstance(path.layer, (nn.Linear, _ConvNd)):
            for one in following:
                path.reaches(one)
        return path.named_layer()
    except _NotReplaceable as reason:
        raise ValueError(
            f"next_layers={{'{name}': {list(following)}}}: units of '{name}' cannot be recycled, since {reason}. Name, "
            "for each hidden linear layer or convolution, the norm layers that its units pass and all layers that read "
            "them one by one."
        ) from None


def units(layer: Any) -> int:
    """The number of output units of a linear layer or a convolution."""
    return int(layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features)


def _name_of(node: fx.Node) -> str:
    """The name of what a node calls: of a function or a method, the path of a module, the attribute that is read."""
    if node.op == "call_function":
        return str(node.args[1]) if node.target is getattr else getattr(node.target, "__name__", str(node.target))
    return str(node.target)


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node makes one axis of all axes but the first."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    if node.op == "call_module":
        return False
    if _name_of(node) == "flatten":
        options = dict(zip(("start_dim", "end_dim"), node.args[1:])) | node.kwargs
        return options in ({"start_dim": 1}, {"start_dim": 1, "end_dim": -1})
    shape: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
    of_two = _name_of(node) in ("view", "reshape") and isinstance(shape, (tuple, list)) and len(shape) == 2
    return of_two and _is_batch_size(shape[0]) and shape[1] == -1


def _is_batch_size(value: Any) -> bool:
    """Whether a value is x.size(0), x.shape[0] or x.size()[0]."""
    if not isinstance(value, fx.Node) or len(value.args) != 2 or value.args[1] != 0:
        return False
    of_shape = isinstance(value.args[0], fx.Node) and _name_of(value.args[0]) in ("shape", "size")
    return _name_of(value) == "size" or (_name_of(value) == "getitem" and of_shape)


class _Tracer(fx.Tracer):
    """A tracer that takes a submodule as one node where its control flow, for example, cannot be traced."""

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed([*self.graph.nodes][before:]):
                self.graph.erase_node(node)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def _traced(model: nn.Module) -> fx.Graph:
    shared = {id(parameter): parameter for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]):
        try:
            return _Tracer().trace(copy.deepcopy(model, shared))  # tracing writes constants into the model
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be traced by torch.fx to see which layers read which units: {error}. "
                "Say it yourself, as by next_layers={'fc1': 'fc2'}. Or move what depends on the values of inputs "
                "into a submodule, which is then taken as a whole."
            ) from error
