"""Models and data as people write them: hooks that look on, tensors kept of a call, padded and shuffled batches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset, default_collate

from avalanche_curv.core import (
    GGN,
    Accumulate,
    AdaptiveRefresh,
    Dense,
    Diagonal,
    Eigenspace,
    EmpiricalFisher,
    EmpiricalRisk,
    Hessian,
    InputSpace,
    LowRank,
    MatrixFree,
    Past,
    ProtectedSpace,
    Rank,
    Refresh,
    estimate,
    landscape,
)
from avalanche_curv.core.fidelity import PastModels

CE = nn.CrossEntropyLoss()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (12,), generator=generator)


def dense(model: nn.Module, batches, kind=GGN()) -> Tensor:  # noqa: B008
    return estimate(kind, Dense(), EmpiricalRisk.snapshot(model, CE, batches)).curvature.dense()


class Keeping(nn.Module):
    """Keeps what it computed, as policies of reinforcement learning keep their distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layer(x)
        self.hidden.append(outputs)
        self.distribution = torch.distributions.Categorical(logits=outputs)
        return outputs


def test_a_model_that_keeps_computed_tensors_is_copied_without_their_graphs(make_model, data) -> None:
    model, plain = make_model(Keeping), make_model(lambda: nn.Linear(4, 3))
    plain.load_state_dict(model.layer.state_dict())
    model(data[0])
    batches = [data]
    torch.testing.assert_close(dense(model, batches), dense(plain, batches))
    assert len(model.hidden) == 1
    past = Refresh(0.5).absorb(Past(), EmpiricalRisk.snapshot(model, CE, batches), GGN(), Diagonal())
    for again in (copy.deepcopy(past), pickle.loads(pickle.dumps(past))):
        assert torch.equal(again.stored[0].anchor, past.stored[0].anchor)
        assert again.stored[0].value() == past.stored[0].value()


def test_hooks_that_look_on_do_not_see_what_derivatives_are_computed_with(make_model, data) -> None:
    model, seen = make_model(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))), []
    expected = dense(model, [data])
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.detach().numpy().sum()))
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].sum().item()))
    model[1].register_full_backward_hook(lambda module, given, got: (2 * given[0],))
    risk = EmpiricalRisk.snapshot(model, CE, [data])
    calls = len(seen)
    for kind in (GGN(), Hessian()):
        for structure in (Dense(), Diagonal(), LowRank(Rank(2)), MatrixFree()):
            estimate(kind, structure, risk)
    assert len(seen) == calls <= 8
    torch.testing.assert_close(dense(model, [data]), expected)
    model(data[0])
    assert len(seen) > calls  # those of the model itself stay


def test_the_batches_of_a_list_are_those_it_held(make_model, data) -> None:
    model, batches = make_model(lambda: nn.Linear(4, 3)), [data]
    risk = EmpiricalRisk.snapshot(model, CE, batches)
    before = risk.value()
    batches.clear()
    batches.append((data[0] + 1, data[1]))
    assert risk.value() == before
    assert risk.examples == 12


class Named(list):
    examples = 5


class Loader:
    """Batches that are loaded at each pass, and say something else by `examples`."""

    examples = ("first", "second")

    def __init__(self, data: tuple[Tensor, Tensor], change=lambda x: x) -> None:
        self.data, self.change = data, change

    def __iter__(self):
        for x, y in zip(self.data[0].split(5), self.data[1].split(5)):
            yield self.change(x), y


def test_an_attribute_called_examples_is_no_number_of_examples(make_model, data) -> None:
    model = make_model(lambda: nn.Linear(4, 3))
    assert EmpiricalRisk.snapshot(model, CE, Named([data])).examples == 12
    assert EmpiricalRisk.snapshot(model, CE, Loader(data)).examples == 12


@pytest.mark.parametrize("own", [False, True])
def test_a_loader_that_shuffles_and_augments_gives_one_result_and_keeps_its_randomness(own, make_model, data) -> None:
    model = make_model(lambda: nn.Linear(4, 3))
    generator = torch.Generator().manual_seed(7) if own else None
    loader = DataLoader(
        TensorDataset(*data), 5, shuffle=True, generator=generator,
        collate_fn=lambda some: (torch.stack([x for x, _ in some]) + torch.rand(1), torch.stack([y for _, y in some])),
    )  # fmt: skip
    states = [torch.get_rng_state(), *([generator.get_state()] if generator else [])]
    risk = EmpiricalRisk.snapshot(model, CE, loader)
    assert risk.value() == risk.value()
    passes = [torch.cat([x for x, _ in risk]) for _ in range(2)]
    assert torch.equal(*passes)
    assert not torch.equal(passes[0], data[0])
    for before, after in zip(states, [torch.get_rng_state(), *([generator.get_state()] if generator else [])]):
        assert torch.equal(before, after)


def test_a_loader_with_randomness_of_its_own_is_held_in_memory(make_model, data) -> None:
    noise = torch.Generator().manual_seed(0)
    loader = Loader(data, lambda x: x + torch.rand(1, generator=noise, dtype=x.dtype))
    risk = EmpiricalRisk.snapshot(make_model(lambda: nn.Linear(4, 3)), CE, loader)
    assert risk.value() == risk.value()


class ByEpoch(RandomSampler):
    """Shuffles by the number of passes that were made, as accelerate's `SeedableRandomSampler`."""

    epoch = 0

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.epoch)
        yield from super().__iter__()
        self.epoch += 1


class Streamed(IterableDataset):
    """Shuffles by the number of passes, too."""

    epoch = 0

    def __init__(self, data: tuple[Tensor, Tensor]) -> None:
        self.data = data

    def __iter__(self):
        order = torch.randperm(len(self.data[0]), generator=torch.Generator().manual_seed(self.epoch))
        yield from ((self.data[0][i], self.data[1][i]) for i in order)
        self.epoch += 1


def prepared(data: tuple[Tensor, Tensor]):
    accelerate = pytest.importorskip("accelerate")
    shuffled = accelerate.utils.DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = accelerate.Accelerator(cpu=True, dataloader_config=shuffled)
    return accelerator.prepare(DataLoader(TensorDataset(*data), 5, shuffle=True))


COUNTING = {
    "sampler": lambda data: DataLoader(TensorDataset(*data), 5, sampler=ByEpoch(range(12))),
    "stream": lambda data: DataLoader(Streamed(data), 5),
    "accelerate": prepared,
}


@pytest.mark.parametrize("name", COUNTING)
def test_a_loader_that_shuffles_by_the_number_of_passes_is_held_in_memory(name, make_model, data, close) -> None:
    model, loader = make_model(lambda: nn.Linear(4, 3)), COUNTING[name](data)
    assert not torch.equal(*(torch.cat([y for _, y in loader]) for _ in range(2)))
    risk = EmpiricalRisk.snapshot(model, CE, loader)
    assert risk.value() == risk.value()
    assert torch.equal(*(torch.cat([x for x, _ in risk]) for _ in range(2)))
    past = Accumulate().absorb(Past(), risk, EmpiricalFisher(), Dense())
    close(past.model.curvature.dense(), dense(model, [data], EmpiricalFisher()))


def test_a_plain_loader_is_not_passed_over_to_see_that_it_repeats_itself(make_model, data) -> None:
    seen: list[int] = []
    loader = DataLoader(
        TensorDataset(*data), 5, shuffle=True, collate_fn=lambda some: seen.append(len(some)) or default_collate(some)
    )
    EmpiricalRisk.snapshot(make_model(lambda: nn.Linear(4, 3)), CE, loader)
    assert {*seen} == {5}  # the last batch, of two, was not loaded


def test_data_that_change_later_in_a_pass_are_refused(make_model, data) -> None:
    noise = torch.Generator().manual_seed(0)
    loader = Loader(data, lambda x: x if len(x) == 5 else x + torch.rand(1, generator=noise).to(x))
    risk = EmpiricalRisk.snapshot(make_model(lambda: nn.Linear(4, 3)), CE, loader)
    with pytest.raises(ValueError, match=r"not the same at every pass: batch 2 holds other values.*list of batches"):
        risk.value()


def test_an_empty_batch_in_the_middle_counts_for_nothing(make_model, data) -> None:
    model, (x, y) = make_model(lambda: nn.Linear(4, 3)), data
    parts = [(x[:5], y[:5]), (x[:0], y[:0]), (x[5:], y[5:])]
    for kind in (GGN(), Hessian(), EmpiricalFisher()):
        torch.testing.assert_close(dense(model, parts, kind), dense(model, [data], kind))
    risk = EmpiricalRisk.snapshot(model, CE, parts)
    assert risk.select(torch.arange(4, 7)).examples == 3
    for structure in (Diagonal(), LowRank(Rank(3)), MatrixFree(0.5)):
        estimate(GGN(), structure, risk)


class Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.token, self.head = nn.Embedding(9, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).tanh().mean(1) * self.token)


@pytest.fixture
def padded(make_model) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model of words, and batches of sentences that are padded to the longest of each batch."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(9, (n, length), generator=generator), torch.randint(3, (n,), generator=generator))
        for n, length in ((3, 4), (2, 6), (4, 4))
    ]
    return make_model(Sentences), batches


def losses(model: nn.Module, batches) -> Tensor:
    return torch.cat([F.cross_entropy(model(x), y, reduction="none") for x, y in batches])


def test_padded_batches_are_stored_and_measured_as_any(padded) -> None:
    model, batches = padded
    risk = EmpiricalRisk.snapshot(model, CE, batches)
    every = losses(model, batches).detach()
    chosen = torch.tensor([0, 3, 4, 8])
    assert risk.select(chosen).value() == pytest.approx(float(every[chosen].mean()), rel=1e-12)
    assert risk.subset(0.7, seed=1).examples == 6
    exact = estimate(GGN(), Dense(), risk).curvature
    for structure in (LowRank(Rank(20)), MatrixFree()):
        torch.testing.assert_close(estimate(GGN(), structure, risk).curvature.dense(), exact.dense())
    assert landscape(GGN(), risk).trace == pytest.approx(exact.trace())
    estimate(GGN(), MatrixFree(0.5), risk)


@pytest.mark.parametrize("policy", [Accumulate(0.5), Refresh(0.6), AdaptiveRefresh(fraction=0.6)], ids=str)
def test_policies_store_padded_batches(policy, padded) -> None:
    model, batches = padded
    past = Past()
    for _ in range(2):
        past = policy.absorb(past, EmpiricalRisk.snapshot(model, CE, batches), GGN(), Diagonal())
    assert past.experiences == 2
    assert policy.revise(past, model, 5, GGN(), Diagonal()) is not None


def test_projections_and_fidelity_take_padded_batches(padded) -> None:
    model, batches = padded
    risk = EmpiricalRisk.snapshot(model, CE, batches)
    for protection in (Eigenspace(GGN(), Rank(3)), InputSpace()):
        ProtectedSpace().absorb(risk, protection)
    found = PastModels(GGN()).with_experience(risk).with_experience(risk).measure(model)
    assert found["accumulate/kappa_abs"] == pytest.approx(0, abs=1e-12)


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that depends on how many examples there are."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.count = len(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad / ctx.count


class DividesGradients(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(super().forward(x))


def test_gradients_that_depend_on_the_batch_are_refused(make_model, data) -> None:
    with pytest.raises(ValueError, match=r"gradient that DividesGradients gives of one example in 'weight' depends"):
        EmpiricalRisk.snapshot(make_model(lambda: DividesGradients(4, 3)), CE, [data])


def test_embeddings_give_derivatives_of_the_loss_whatever_their_options(padded, make_model) -> None:
    model, batches = padded
    expected = dense(model, batches)
    model.words.scale_grad_by_freq = model.words.sparse = True
    torch.testing.assert_close(dense(model, batches), expected)
    model.words.max_norm = 1.0
    reduced = copy.deepcopy(model)
    reduced.words.max_norm = None
    with torch.no_grad():
        lengths = reduced.words.weight.norm(dim=1, keepdim=True)
        reduced.words.weight.mul_(lengths.clamp(max=1) / lengths)
    torch.testing.assert_close(dense(model, batches), dense(reduced, batches), rtol=1e-6, atol=1e-9)


def test_the_hessian_is_zero_at_the_padding_which_never_trains(make_model, data) -> None:
    def words() -> nn.Module:
        model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
        nn.init.normal_(model[0].weight)
        return model

    model = make_model(words)
    inputs = torch.randint(5, (12, 4), generator=torch.Generator().manual_seed(0))
    found = dense(model, [(inputs, data[1])], Hessian())
    model[0].padding_idx = None
    expected = dense(model, [(inputs, data[1])], Hessian())
    expected[:3], expected[:, :3] = 0, 0
    torch.testing.assert_close(found, expected)


def test_a_scripted_module_is_refused_by_name(data) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3).double()))
    with pytest.raises(TypeError, match=r"Use the module that a scripted one was made from"):
        EmpiricalRisk.snapshot(scripted, CE, [data])
