"""A GPT that learns languages in turn: the texts, the model, what methods add to the loss, and one quick run."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from avalanche_curv.core import Diagonal, EmpiricalFisher
from benchmarks.experiments.languages import text as texts
from benchmarks.experiments.languages.experiment import (
    AT_ONCE,
    FORKS,
    MERGED,
    NAIVE,
    QUICK,
    SAMPLED,
    LanguagesOptions,
    best_strengths,
    bits,
    experiment,
    summary,
)
from benchmarks.experiments.languages.gpt import GPT, Adapted, Size, merged, with_adapters
from benchmarks.experiments.languages.methods import (
    L2,
    Joint,
    LastByte,
    Merged,
    Naive,
    Quadratic,
    Replay,
    as_forks,
    windows,
)
from benchmarks.experiments.languages.report import report
from benchmarks.experiments.languages.text import LANGUAGES, SHORTEST, language
from benchmarks.harness import Results


def paragraphs(part):
    found = bytes(part.tolist()).decode(errors="replace").split("\n\n")
    return {" ".join(one.split()) for one in found[1:-1]}  # the ends are cut


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_parts_of_a_language_are_the_same_again_and_share_no_paragraph(name):
    found = language(name, 2**17)
    assert [len(found.train), len(found.held_out), len(found.test)] == [2**17, 2**14, 2**14]
    assert language.__wrapped__(name, 2**17).digest == found.digest
    train, held_out, test = map(paragraphs, (found.train, found.held_out, found.test))
    shared = (train & held_out) | (train & test) | (held_out & test)
    assert all(len(paragraph) < SHORTEST for paragraph in shared)


def test_a_text_that_is_shorter_than_asked_for_says_so(monkeypatch):
    monkeypatch.setitem(LANGUAGES, "short", lambda: iter([("a", "some text, and no more of it")]))
    with pytest.raises(ValueError, match=r"Expected 80 bytes of short for training and 10 each .* Ask for fewer"):
        language.__wrapped__("short", 80)


def test_a_document_is_in_one_part_and_a_paragraph_is_kept_once(monkeypatch):
    licence, own = "a licence that every file begins with", "what only document {} says, whatever its part may be"
    monkeypatch.setitem(LANGUAGES, "files", lambda: ((str(i), f"{licence}\n\n{own.format(i)}") for i in range(60)))
    found = language.__wrapped__("files", 80)
    written = b"".join(bytes(part.tolist()) for part in (found.train, found.held_out, found.test)).decode()
    assert written.count("licence") == 1
    assert texts.PARTS.count("train") == 8


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_causal_and_gives_logits_where_cross_entropy_takes_them(tied, adapted):
    torch.manual_seed(0)
    model = GPT(Size(2, 8, 2, 6, tied)).double()
    model = with_adapters(model, 2) if adapted else model
    for parameter in model.parameters():  # adapters that are no zeros
        nn.init.normal_(parameter)
    tokens, other = torch.randint(256, (2, 1, 6))
    changed = torch.cat([tokens[:, :4], other[:, 4:]], dim=1)
    ours, theirs = model.double()(tokens), model(changed)
    assert ours.shape == (1, 256, 6)
    assert torch.equal(ours[:, :, :4], theirs[:, :, :4])
    assert not torch.allclose(ours[:, :, 4:], theirs[:, :, 4:])
    assert (model.head.weight is model.embedding.weight) == tied


def test_an_adapter_begins_as_the_layer_and_alone_is_trained():
    torch.manual_seed(0)
    plain = GPT(Size(1, 8, 2, 6))
    tokens = torch.randint(256, (2, 6))
    before = plain(tokens)
    model = with_adapters(plain, 2)
    assert torch.equal(model(tokens), before)
    count = sum(isinstance(module, Adapted) for module in model.modules())
    assert count == 6
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * count
    assert all(name.endswith(("down.weight", "up.weight")) for name in trained)


def test_a_model_that_knows_nothing_has_eight_bits_per_byte():
    model = GPT(QUICK.size)
    nn.init.zeros_(model.head.weight)
    text = torch.randint(256, (100,), dtype=torch.uint8)
    assert bits(model, {"noise": text}, QUICK)["noise"] == pytest.approx(8)


def test_bits_are_those_of_every_byte_that_has_one_before_it_in_its_window():
    torch.manual_seed(0)
    setting = replace(QUICK, size=Size(1, 8, 2, 4))
    model, text = GPT(setting.size).double(), torch.randint(256, (14,), dtype=torch.uint8)
    expected = []
    for start in (0, 5):
        for place in range(start + 1, start + 5):
            probabilities = model(text[None, start:place].long())[0, :, -1].softmax(0)
            expected.append(-math.log2(float(probabilities[int(text[place])].detach())))
    assert bits(model, {"": text}, setting)[""] == pytest.approx(sum(expected) / len(expected))


def test_windows_are_stretches_of_the_text_and_the_bytes_after():
    inputs, targets = windows(torch.arange(40, dtype=torch.uint8), 50, 6, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (50, 6)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(6))
    assert inputs.min() == 0
    assert targets.max() == 39


def test_replay_divides_its_bytes_among_the_languages():
    model, memory = GPT(Size(1, 8, 2, 4)), Replay(32, 6).memory(0.5)
    generator = torch.Generator().manual_seed(0)
    assert memory.term(model) == 0
    for value in (1, 2):
        memory.keep(model, torch.full((100,), value, dtype=torch.uint8), 4, generator)
        assert memory.nbytes == 32
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(one), one) for one in torch.tensor([[[1] * 4], [[2] * 4]])]
        assert float(memory.term(model)) == pytest.approx(0.5 * float(sum(losses)) / 2)


def test_the_way_since_the_last_language_alone_is_penalised():
    model, memory = GPT(Size(1, 8, 2, 4)), L2((3.0,)).memory(3.0)
    assert float(torch.as_tensor(memory.term(model)).detach()) == 0
    for _ in range(2):
        memory.keep(model, torch.zeros(9, dtype=torch.uint8), 4, torch.Generator())
        assert float(torch.as_tensor(memory.term(model)).detach()) == 0
        with torch.no_grad():
            model.head.weight.add_(2.0)
        assert float(memory.term(model).detach()) == pytest.approx(3.0 / 2 * 2.0**2 * 256 * 8)


@pytest.fixture
def text():
    return torch.randint(256, (300,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def gradients(model, loss):
    """Of the loss, in what is trained, by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))


def test_as_forks_have_it_squares_of_batch_gradients_add_up_around_the_newest_weights(text):
    torch.manual_seed(0)
    model, strength = GPT(Size(1, 4, 2, 4)).double(), 7.0
    memory = as_forks(4, 8, (strength,)).memory(strength)
    importances = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for seed in (3, 4):
        inputs, targets = windows(text, 8, 4, torch.Generator().manual_seed(seed))
        for part in (slice(0, 4), slice(4, 8)):
            loss = nn.functional.cross_entropy(model(inputs[part]), targets[part])
            for name, gradient in gradients(model, loss).items():
                importances[name] += gradient.square() / 2
        memory.keep(model, text, 4, torch.Generator().manual_seed(seed))
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    expected = sum((importances[name] * (p - anchor[name]).square()).sum() for name, p in model.named_parameters())
    assert float(memory.term(model).detach()) == pytest.approx(strength / 2 * float(expected.detach()))


def test_merged_layers_are_the_adapted_ones_and_their_weights_alone_train(text):
    torch.manual_seed(0)
    model = with_adapters(GPT(Size(1, 8, 2, 6)), 2)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    plain, tokens = merged(model), text[:12].view(2, 6).long()
    torch.testing.assert_close(plain(tokens), model(tokens))
    assert not any(isinstance(module, Adapted) for module in plain.modules())
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Adapted)
    }
    assert sum(isinstance(module, Adapted) for module in model.modules()) == 6  # left as it was


def test_the_quadratic_model_of_merged_weights_is_one_of_w_plus_b_a(text):
    torch.manual_seed(0)
    model = with_adapters(GPT(Size(1, 8, 2, 6)).double(), 2)
    memory = Quadratic(EmpiricalFisher(), Diagonal(), 6, (), Merged()).memory(3.0)
    memory.keep(model, text, 6, torch.Generator().manual_seed(5))
    for module in model.modules():
        if isinstance(module, Adapted):
            nn.init.normal_(module.up.weight)
    inputs, targets = windows(text, 6, 6, torch.Generator().manual_seed(5))
    plain = merged(with_adapters_at_zero(model))
    squares = [gradients(plain, nn.functional.cross_entropy(plain(x[None]), y[None])) for x, y in zip(inputs, targets)]
    expected = 0.0
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            moved = module.up.weight @ module.down.weight
            diagonal = sum(found[f"{name}.weight"].square() for found in squares) / len(squares)
            expected = expected + 3.0 / 2 * (diagonal * moved.square()).sum()
    term = memory.term(model)
    assert float(term.detach()) == pytest.approx(float(expected.detach()))
    ours, theirs = gradients(model, term), gradients(model, expected)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])
    assert any(float(gradient.abs().max()) > 0 for name, gradient in ours.items() if "down" in name)


def with_adapters_at_zero(model):
    """A copy as after the first language."""
    copied = deepcopy(model)
    for module in copied.modules():
        if isinstance(module, Adapted):
            nn.init.zeros_(module.up.weight)
    return copied


def test_where_only_the_last_byte_counts_its_loss_is_that_of_the_window(text):
    torch.manual_seed(0)
    model = GPT(Size(1, 8, 2, 6)).double()
    inputs, targets = windows(text, 4, 6, torch.Generator().manual_seed(0))
    risk = LastByte().risk(model, [(inputs, targets)])
    expected = nn.functional.cross_entropy(model(inputs)[:, :, -1], targets[:, -1])
    assert float(risk.value()) == pytest.approx(float(expected.detach()))


def test_all_languages_at_once_are_one_stage_of_as_many_steps():
    assert Naive().stages("a", "bc") == [("b",), ("c",)]
    assert Joint().stages("a", "bc") == [("a", "b", "c")]
    assert summary([[2.0, 8.0, 8.0], [4.0, 3.0, 2.0]]) == {"mean_bits": 3.0, "learned": 3.0, "forgetting": 0.0}


def test_the_best_strength_has_the_fewest_bits_and_is_the_smallest_of_equal_ones():
    tried = {1.0: 3.0, 10.0: 2.5, 100.0: 2.5, 1000.0: float("nan")}
    rows = tuple(
        {"metric": "mean_bits", "step": None, "value": value, "label": f"at {strength:g}", "seed": 0}
        for strength, value in tried.items()
    )
    headers = tuple(
        {"label": f"at {strength:g}", "seed": 0, "config": {"part": "LoRA", "row": "L2", "strength": strength}}
        for strength in tried
    )
    assert best_strengths(Results(tuple(row["label"] for row in rows), rows, headers)) == {"LoRA, L2": 10.0}


def test_a_size_and_a_tied_head_have_folders_of_their_own_and_tuning_tries_every_strength():
    assert experiment.variant(LanguagesOptions(size="large", tied=True, tuning=True)) == "large-tied-tuning"
    assert experiment.variant(LanguagesOptions()) == ""
    tried = experiment.configs(LanguagesOptions(tuning=True))
    assert {config.setting.held_out for config in tried} == {True}
    label = f"LoRA, {FORKS}"
    assert len({config.strength for config in tried if config.label.startswith(label)}) == 5
    configs = experiment.configs(LanguagesOptions(strengths=((label, 30.0),), size="medium"))
    assert next(config for config in configs if config.label == label).strength == 30.0
    assert {config.setting.size.layers for config in configs} == {4}


@pytest.fixture(scope="module")
def measured(results_of):
    full = {f"all weights, {row}" for row in (NAIVE, AT_ONCE, FORKS, SAMPLED[1])}
    rows = full | {f"LoRA, {row}" for row in (NAIVE, SAMPLED[0], MERGED[1])}
    configs = experiment.configs(LanguagesOptions(quick=True))
    return results_of(experiment, [config for config in configs if config.label in rows])


def test_the_report_shows_each_row_and_the_bits_after_each_language(measured, tmp_path):
    written = report(measured, tmp_path)
    assert "## All weights" in written
    assert "## LoRA" in written
    assert f"| {MERGED[1]} " in written
    beyond = written.partition("### All weights: what is beyond noise")[2].partition("##")[0]
    assert [line.partition("|")[2].partition("|")[0].strip() for line in beyond.splitlines() if line[:3] == "| F"] == [
        SAMPLED[1]
    ]
    assert "too few seeds" in beyond
    assert all(f"| {row} " in written for row in (NAIVE, AT_ONCE, FORKS, *SAMPLED[:2]))
    assert "| Naive, after YAML " in written
    assert (tmp_path / "languages.png").exists()
    label = f"all weights, {NAIVE}"
    assert [row["step"] for row in measured.select("bits/YAML", label)] == [1, 2, 3, 4]
    seen = measured.select("bits/seen", label, step=2)[0]["value"]
    first, second = (measured.select(f"bits/{name}", label, step=2)[0]["value"] for name in ("English", "Python"))
    assert seen == pytest.approx((first + second) / 2)


def test_all_methods_go_on_from_the_same_model(measured):
    begun = {row["value"] for row in measured.select("bits/English", step=1) if not row["label"].startswith("LoRA")}
    assert len(begun) == 1
