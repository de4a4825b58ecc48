"""Inputs and targets that are tuples, lists, mappings and nestings of these: every quantity is that of the same model
and examples with all inputs, or targets, in one tensor."""

from collections import UserDict
from dataclasses import replace

import pytest
import torch
from curvlinops import GGNLinearOperator
from torch import nn
from torch.nn import functional as F

from avalanche_curv import (
    EKFAC,
    GGN,
    BatchedEmpiricalFisher,
    BlockDiagonal,
    Dense,
    Diagonal,
    Eigenspace,
    EmpiricalFisher,
    EmpiricalRisk,
    Fisher,
    FromLinearOperator,
    Hessian,
    InputSpace,
    Kronecker,
    LossFunction,
    LowRank,
    MatrixFree,
    OutputGradient,
    ProtectedSpace,
    Rank,
    estimate,
    hidden_activations,
    landscape,
)
from avalanche_curv.core.fidelity.monitor import PastModels
from avalanche_curv.core.nested import described, index, mapped
from avalanche_curv.core.risk.batches import like

EXAMPLES, TOKENS = 7, 3


class TwoInputs(nn.Module):
    """Token ids with a mask, and numbers; all in one tensor, by place, by name or in nestings."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(5, 2), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, ids, numbers=None, mask=None, more=None):
        if more is not None:
            (numbers,), mask = more["numbers"], more["mask"]
        elif numbers is None:
            ids, mask, numbers = ids[:, :TOKENS].long(), ids[:, TOKENS : 2 * TOKENS], ids[:, 2 * TOKENS :]
        words = (self.table(ids) * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(self.hidden(torch.cat([words, numbers], dim=1)).tanh())


class Batch(UserDict):
    """A mapping that is no dict, as those of tokenizers."""


NESTINGS = {
    "tuple": lambda ids, mask, numbers: (ids, numbers, mask),
    "list": lambda ids, mask, numbers: [ids, numbers, mask, None],
    "dict": lambda ids, mask, numbers: {"ids": ids, "mask": mask, "numbers": numbers, "more": None},
    "mapping": lambda ids, mask, numbers: Batch(mask=mask, ids=ids, numbers=numbers),
    "nested": lambda ids, mask, numbers: {"ids": ids, "more": {"mask": mask, "numbers": [numbers]}},
}


def product(matrix):
    return matrix.product(torch.linspace(-1, 1, matrix.size, dtype=torch.float64))


def faithful(curvature):
    def measured(risk):
        model = type(risk.base)().double()
        model.load_state_dict({name: 1.1 * value for name, value in risk.base.state_dict().items()})
        past = PastModels(curvature).with_experience(risk)
        return torch.tensor([*past.measure(model).values()], dtype=torch.float64)

    return measured


def protected(protection):
    def outside(risk):
        space = ProtectedSpace().absorb(risk, protection)
        vector = torch.linspace(-1, 1, risk.space.size, dtype=torch.float64)
        free = space.outside(dict(zip(risk.space.names, risk.space.split(vector))))
        return torch.cat([part.reshape(-1) for part in free.values()])

    return outside


def activations(risk):
    (inputs, _), *_ = risk
    return torch.cat([layer.reshape(-1) for layer in hidden_activations(risk.base, inputs).values()])


KINDS = {
    "dense GGN": lambda risk: estimate(GGN(), Dense(), risk).curvature.dense(),
    "dense Hessian": lambda risk: estimate(Hessian(), Dense(), risk, gradient=True).curvature.dense(),
    "diagonal": lambda risk: estimate(EmpiricalFisher(), Diagonal(), risk).curvature.values,
    "diagonal of the Hessian": lambda risk: estimate(Hessian(), Diagonal(), risk).curvature.values,
    "blocks": lambda risk: product(estimate(GGN(), BlockDiagonal(), risk).curvature),
    "sampled Kronecker": lambda risk: product(estimate(Fisher(samples=2), Kronecker(), risk).curvature),
    "EKFAC": lambda risk: product(estimate(GGN(), EKFAC(), risk).curvature),
    "low rank": lambda risk: product(estimate(EmpiricalFisher(), LowRank(Rank(2)), risk).curvature),
    "matrix-free": lambda risk: product(estimate(GGN(), MatrixFree(), risk).curvature),
    "batched": lambda risk: estimate(BatchedEmpiricalFisher(3), Diagonal(), risk).curvature.values,
    "curvlinops": lambda risk: product(estimate(FromLinearOperator(GGNLinearOperator), Dense(), risk).curvature),
    "gradient": lambda risk: risk.gradient(),
    "part": lambda risk: risk.subset(0.5, seed=1).gradient(),
    "rebatched": lambda risk: torch.tensor([risk.rebatched(2).value(), len([*risk.rebatched(2)])]),
    "fidelity": faithful(GGN()),
    "fidelity of the Hessian": faithful(Hessian()),
    "landscape": lambda risk: landscape(GGN(), risk, k=2).top[0],
    "input space": protected(InputSpace()),
    "eigenspace": protected(Eigenspace(GGN(), Rank(2))),
    "output gradients": protected(Eigenspace(OutputGradient(), Rank(2))),
    "activations": activations,
}


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (EXAMPLES, TOKENS), generator=generator)
    mask = (torch.arange(TOKENS) <= torch.randint(TOKENS, (EXAMPLES, 1), generator=generator)).long()
    numbers = torch.randn(EXAMPLES, 2, generator=generator)
    return ids, mask, numbers, torch.randint(2, (EXAMPLES,), generator=generator)


@pytest.fixture(scope="module")
def risks(examples):
    """The risk with all inputs in one tensor, and those with the same inputs in nestings."""
    torch.manual_seed(0)
    model, (ids, mask, numbers, targets) = TwoInputs().double(), examples

    def of(inputs):
        batches = [(index(inputs, part), targets[part]) for part in (slice(4), slice(4, None))]
        return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches)

    found = {name: of(nest(ids, mask, numbers)) for name, nest in NESTINGS.items()}
    return {"tensor": of(torch.cat([ids.double(), mask.double(), numbers.double()], dim=1)), **found}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantity_is_that_of_inputs_in_one_tensor(kind, risks, close):
    expected = KINDS[kind](risks["tensor"])
    for nesting in NESTINGS if kind in ("gradient", "part", "dense GGN") else ("tuple", "nested"):
        close(KINDS[kind](risks[nesting]), expected)


class Boxes(nn.Sequential):
    """A class of two and a box of two numbers, of three numbers."""

    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4))


def joined(f, y):
    return F.cross_entropy(f[:, :2], y[:, 0].long()) + (y[:, 3] * (f[:, 2:] - y[:, 1:3]).square().sum(1)).mean()


def drawn(f, uniform):
    """Not its likelihood, but the same targets for all nestings."""
    return torch.cat([(uniform[:, :1] > 0.5).to(f), f[:, 2:] + uniform[:, 2:], uniform[:, :1].ceil()], dim=1)


TARGETS = {
    "dict": lambda y: {"class": y[:, 0].long(), "box": (y[:, 1:3], [y[:, 3]]), "more": None},
    "tuple": lambda y: (y[:, 0].long(), Batch(box=y[:, 1:3], counts=y[:, 3])),
}


def of_nesting(name):
    def apart(f, y):
        (label, box, counts) = (
            (y["class"], y["box"][0], y["box"][1][0]) if name == "dict" else (y[0], y[1]["box"], y[1]["counts"])
        )
        return F.cross_entropy(f[:, :2], label) + (counts * (f[:, 2:] - box).square().sum(1)).mean()

    return LossFunction(apart, sample=lambda f, uniform: TARGETS[name](drawn(f, uniform)))


@pytest.fixture(scope="module")
def boxes():
    """The risk with all targets in one tensor, and those with the same targets in nestings."""
    torch.manual_seed(0)
    model, x = Boxes().double(), torch.randn(EXAMPLES, 3).double()
    y = torch.cat([torch.randint(2, (EXAMPLES, 1)), torch.randn(EXAMPLES, 2), torch.rand(EXAMPLES, 1)], 1).double()

    def of(criterion, nest):
        batches = [(x[part], nest(y[part])) for part in (slice(4), slice(4, None))]
        return EmpiricalRisk.snapshot(model, criterion, batches)

    found = {name: of(of_nesting(name), nest) for name, nest in TARGETS.items()}
    return {"tensor": of(LossFunction(joined, sample=drawn), lambda y: y), **found}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("output gradients", "curvlinops")])
def test_a_quantity_is_that_of_targets_in_one_tensor(kind, boxes, close):
    expected = KINDS[kind](boxes["tensor"])
    for nesting in TARGETS:
        close(KINDS[kind](boxes[nesting]), expected)


def test_what_takes_no_nested_targets_says_so(boxes):
    with pytest.raises(TypeError, match=r"one class for each example.* got targets of \{'class': int64 \(2,\), 'box'"):
        KINDS["output gradients"](boxes["dict"])
    with pytest.raises(TypeError, match=r"one tensor of targets; got \{'class': .* Use GGN\(\), Hessian\(\) or Emp"):
        KINDS["curvlinops"](boxes["dict"])


@pytest.mark.parametrize("nesting", NESTINGS)
def test_inputs_keep_their_containers_and_integers_stay_integers(nesting, risks, examples):
    (inputs, _), *_ = risks[nesting].rebatched(5)
    ids, mask, numbers, _ = examples
    expected = mapped(lambda t: t[:5], NESTINGS[nesting](ids, mask, numbers.double()))
    assert type(inputs) is type(expected)
    assert described(inputs) == described(expected)


def test_the_gradient_is_that_of_a_loop_over_sequences_of_several_lengths(close):
    torch.manual_seed(0)
    model, criterion = TwoInputs().double(), nn.CrossEntropyLoss()

    def batch(n, length):
        inputs = {"ids": torch.randint(5, (n, length)), "mask": torch.ones(n, length), "numbers": torch.randn(n, 2)}
        return inputs, torch.randint(2, (n,))

    ragged = [batch(2, 3), batch(3, 5), batch(1, 5), batch(2, 4)]
    risk = EmpiricalRisk.snapshot(model, criterion, ragged)
    total = 0
    for x, y in ragged:
        for i in range(len(y)):
            one = like(index(x, slice(i, i + 1)), torch.zeros(1, dtype=torch.float64))
            total = total + criterion(model(**one), y[i : i + 1]) / 8
    parts = torch.autograd.grad(total, list(model.parameters()))
    close(risk.gradient(), torch.cat([part.reshape(-1) for part in parts]))
    assert [len(y) for _, y in risk.rebatched(4)] == [2, 4, 2]
    assert len(risk.subset(1.0, seed=0).batches) == 3
    whole = estimate(GGN(), Diagonal(), risk).curvature.values
    close(whole, estimate(GGN(), Diagonal(), replace(risk.subset(1.0, seed=0), verdicts={})).curvature.values)


REFUSED = {
    "of another length": (lambda x: {**x, "mask": x["mask"][:2]}, r"must be as many; got \{'ids': int64 \(7, 3\), "),
    "text": (lambda x: {**x, "text": ["a"] * 7}, r"got .*'text': .* Make a tensor of 'text' in the collate function"),
    "a name that it does not take": (lambda x: {**x, "idx": x["ids"]}, "unexpected keyword argument 'idx'.*forward="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_that_do_not_fit_are_refused_with_what_came(name, examples):
    ids, mask, numbers, targets = examples
    change, message = REFUSED[name]
    inputs = change({"ids": ids, "mask": mask, "numbers": numbers})
    with pytest.raises(ValueError, match=message):
        EmpiricalRisk.snapshot(TwoInputs(), nn.CrossEntropyLoss(), [(inputs, targets)])


def test_longer_tuples_are_answered_with_how_to_nest_them(examples):
    ids, mask, numbers, targets = examples
    with pytest.raises(ValueError, match=r"Put all inputs in one tuple, for model\(x, mask\)"):
        EmpiricalRisk.snapshot(TwoInputs(), nn.CrossEntropyLoss(), [(ids, numbers, mask, targets)])


def boxes_of(counts):
    return [{"boxes": torch.zeros(n, 4), "labels": torch.zeros(n)} for n in counts]


TARGETS_REFUSED = {
    "of another length": (lambda y: {"class": y, "box": y[:2]}, r"must be as many; got .* Put examples first"),
    "one mapping an example": (lambda y: boxes_of([1, 2, 0]), r"must be as many.*pad them .*pad_sequence\(.*a mask of"),
    "names": (lambda y: (y, ["a"] * 7), r"Targets must be a tensor, or .*; got \(int64 .*Make a tensor of str"),
    "none": (lambda y: {"class": None}, r"the targets a tensor or a nesting of tensors; got \['Tensor', 'dict'\]"),
    "two for one": (lambda y: (y, y), r"Cross-entropy takes one tensor of targets; got \(int64 \(4,\), "),
}


@pytest.mark.parametrize("name", TARGETS_REFUSED)
def test_targets_that_do_not_fit_are_refused_with_what_came(name, examples):
    _, _, numbers, targets = examples
    change, message = TARGETS_REFUSED[name]
    with pytest.raises(ValueError, match=message):
        EmpiricalRisk.snapshot(nn.Linear(2, 2), nn.CrossEntropyLoss(), [(numbers, change(targets))])
