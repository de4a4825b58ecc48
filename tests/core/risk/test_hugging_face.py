"""Batches that are mappings with `labels`, and models whose outputs have `logits`: their loss is the model's own."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_curv import GGN, Dense, Diagonal, EmpiricalFisher, EmpiricalRisk, Past, Refresh, estimate
from avalanche_curv.core.losses import example_loss
from avalanche_curv.core.risk.forward import Logits, convention_of
from avalanche_curv.core.risk.labelled import Labelled

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 6, 0, 0]])
MASK = (IDS > 0).long()
NEXT = IDS.masked_fill(MASK == 0, -100)


def bert(kind):
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=3, **TINY)
    return getattr(transformers, kind)(config)


def gpt2(kind):
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=8, num_labels=3, **tokens
    )
    return getattr(transformers, kind)(config)


def bart(kind="BartForConditionalGeneration", config="BartConfig"):
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 6))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 8}
    config = getattr(transformers, config)(vocab_size=11, d_model=4, init_std=0.5, **sizes, **heads, **tokens)
    return getattr(transformers, kind)(config)


def xlm():
    config = transformers.XLMConfig(vocab_size=11, emb_dim=4, n_layers=1, n_heads=2, max_position_embeddings=8)
    return transformers.XLMWithLMHeadModel(config)


def derived():
    class MyGPT(transformers.GPT2LMHeadModel):
        pass

    return MyGPT(gpt2("GPT2LMHeadModel").config)


class Around(nn.Module):
    """A model in a module, which says nothing of what it is."""

    def __init__(self, inner, more=0.0):
        super().__init__()
        self.inner, self.more = inner, more

    def forward(self, **inputs):
        found = self.inner(**inputs)
        if "labels" in inputs:
            found.loss = found.loss + self.more
        return found


def t5():
    config = transformers.T5Config(
        vocab_size=11, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {
    "causal language model": (lambda: gpt2("GPT2LMHeadModel"), {"labels": NEXT}),
    "masked language model": (lambda: bert("BertForMaskedLM"), {"labels": NEXT}),
    "tagger": (lambda: bert("BertForTokenClassification"), {"labels": NEXT.clamp(max=2)}),
    "classifier": (lambda: bert("BertForSequenceClassification"), {"labels": torch.tensor([2, 0])}),
    "encoder and decoder": (t5, {"labels": NEXT, "decoder_input_ids": IDS}),
}


@pytest.fixture(scope="module")
def made():
    def make(name):
        torch.manual_seed(0)
        model, rest = MODELS[name]
        return model().double().eval(), {"input_ids": IDS, "attention_mask": MASK, **rest}

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_criterion_of_outputs_and_targets_is_the_loss_of_the_model(name, made):
    model, batch = made(name)
    convention = convention_of(model, labelled=True)
    ((inputs, targets),) = Labelled([batch], convention, model)
    assert "labels" not in inputs
    found = F.cross_entropy(convention(model, inputs), targets)
    assert found.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)  # theirs in single precision


LABELS_ALONE = {
    "decoder inputs of labels, BART": bart,
    "decoder inputs of labels, T5": t5,
    "a language model that does not shift": xlm,
    "a class of one's own": derived,
    "a language model in a module": lambda: Around(gpt2("GPT2LMHeadModel")),
    "a tagger in a module": lambda: Around(bert("BertForMaskedLM")),
}


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
@pytest.mark.parametrize("name", LABELS_ALONE)
def test_of_labels_alone_the_past_is_the_loss_that_is_trained(name, criterion, close):
    torch.manual_seed(0)
    model = LABELS_ALONE[name]().double().eval()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": NEXT}
    risk = EmpiricalRisk.snapshot(model, criterion, torch.utils.data.DataLoader(rows(batch), batch_size=2))
    if criterion.label_smoothing:  # the labels belong to the same outputs
        risk = replace(risk, form=example_loss(nn.CrossEntropyLoss()))
    losses = [model(**{key: part[i : i + 1] for key, part in batch.items()}).loss for i in range(2)]
    own = torch.autograd.grad(sum(losses) / 2, [p for p in model.parameters() if p.requires_grad])
    close(risk.value(), sum(losses).item() / 2, tolerance=1e-6)  # theirs in single precision
    close(risk.gradient(), torch.cat([part.reshape(-1) for part in own]), tolerance=1e-6)


def rows(batch):
    return [{key: part[i] for key, part in batch.items()} for i in range(len(batch["labels"]))]


UNSHIFTED = {"forward": lambda model, inputs: model(**inputs).logits.transpose(1, 2)}
SHIFTED = {"forward": lambda model, inputs: model(**inputs).logits[:, :-1].transpose(1, 2)}


@pytest.mark.parametrize("make", [derived, lambda: Around(gpt2("GPT2LMHeadModel"))])
def test_outputs_that_are_not_shifted_are_refused_with_both_losses(make):
    model, batch = make().double().eval(), {"input_ids": IDS, "labels": NEXT}
    own, criterion = model(**batch).loss.item(), nn.CrossEntropyLoss()
    wrong = F.cross_entropy(model(input_ids=IDS).logits.transpose(1, 2), NEXT).item()
    message = rf"returns the loss {own:.6g}, but .* is {wrong:.6g}, .*logits\[:, :-1\]\.transpose\(1, 2\)"
    with pytest.raises(ValueError, match=message):
        EmpiricalRisk.snapshot(model, criterion, [batch], **UNSHIFTED)
    pairs = [({"input_ids": IDS}, NEXT)]
    each = [F.cross_entropy(model(input_ids=IDS[i : i + 1]).logits[0], NEXT[i]).item() for i in range(2)]
    assert EmpiricalRisk.snapshot(model, criterion, pairs, **UNSHIFTED).value() == pytest.approx(sum(each) / 2)
    shifted, plain = (EmpiricalRisk.snapshot(model, criterion, [batch], **how) for how in (SHIFTED, {}))
    assert shifted.value() == plain.value()
    with pytest.raises(ValueError, match=r"where targets are next tokens, take logits\[:, :-1\].*targets\[:, 1:\]"):
        EmpiricalRisk.snapshot(model, criterion, pairs, forward=lambda model, inputs: model(**inputs).logits)


def test_a_loss_with_terms_of_its_own_is_told_from_the_cross_entropy():
    torch.manual_seed(0)
    model, batch = Around(gpt2("GPT2LMHeadModel"), more=0.01), {"input_ids": IDS, "labels": NEXT}
    with pytest.raises(ValueError, match=r"terms of its own, give pairs"):
        EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [batch])


def test_decoder_inputs_that_only_the_model_can_make_are_asked_for():
    torch.manual_seed(0)
    model = bart("BlenderbotForConditionalGeneration", "BlenderbotConfig").double().eval()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": NEXT}
    with pytest.raises(ValueError, match=r"batch\['decoder_input_ids'\] = shift_tokens_right"):
        EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [batch])
    batch["decoder_input_ids"] = torch.cat([torch.full((2, 1), 2), NEXT[:, :-1].clamp(min=0)], dim=1)
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [batch])
    del batch["decoder_input_ids"]
    losses = [model(**{key: part[i : i + 1] for key, part in batch.items()}).loss.item() for i in range(2)]
    assert risk.value() == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_an_adapter_of_peft_keeps_the_convention(made):
    peft = pytest.importorskip("peft")
    for task in (None, "CAUSAL_LM"):
        model, _ = made("causal language model")
        config = peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True, task_type=task)
        expected = convention_of(model, labelled=True)
        assert convention_of(peft.get_peft_model(model, config), labelled=True) == expected


def test_pairs_are_not_shifted(made):
    model, batch = made("causal language model")
    del batch["labels"]
    expected = model(**batch).logits.movedim(-1, 1)
    assert torch.equal(convention_of(model, labelled=False)(model, batch), expected)


def test_a_classifier_needs_nothing_but_its_batches(made, close):
    model, batch = made("classifier")
    encoded = transformers.BatchEncoding(batch)
    risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [encoded], include=["classifier"])
    slopes = []
    for i in range(2):
        loss = model(**{name: part[i : i + 1] for name, part in batch.items()}).loss
        parts = torch.autograd.grad(loss, list(model.classifier.parameters()))
        slopes.append(torch.cat([part.reshape(-1) for part in parts]))
    assert risk.examples == 2
    assert risk.forward == Logits()
    close(risk.gradient(), torch.stack(slopes).mean(0))
    close(estimate(EmpiricalFisher(), Diagonal(), risk).curvature.values, torch.stack(slopes).square().mean(0))
    examples = [{name: part[i] for name, part in batch.items()} for i in range(2)]
    by_loader = EmpiricalRisk.snapshot(
        model, nn.CrossEntropyLoss(), torch.utils.data.DataLoader(examples), include=["classifier"]
    )
    close(by_loader.gradient(), risk.gradient())
    assert by_loader.examples == 2


class Outputs(dict):
    """Outputs with a key and a loss of their own."""


class OfTensors(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return Outputs(loss=x.sum(), logits=self.layer(x))


def test_logits_of_a_model_of_one_tensor_are_taken(close):
    model, x, y = OfTensors().double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    found, expected = (EmpiricalRisk.snapshot(m, nn.CrossEntropyLoss(), [(x, y)]) for m in (model, model.layer))
    close(estimate(GGN(), Dense(), found).curvature.dense(), estimate(GGN(), Dense(), expected).curvature.dense())


def test_a_state_holds_the_convention_and_asks_for_a_function_of_ones_own(made, tmp_path):
    model, batch = made("classifier")
    inputs = {name: part for name, part in batch.items() if name != "labels"}
    given = lambda model, inputs: model(**inputs)[0]  # noqa: E731
    for batches, forward in (([batch], None), ([(inputs, batch["labels"])], given)):
        risk = EmpiricalRisk.snapshot(
            model, nn.CrossEntropyLoss(), batches, forward=forward, include=["classifier"]
        )
        past = Refresh(fraction=1).absorb(Past(), risk, GGN(), Diagonal())
        torch.save(past.state_dict(), tmp_path / "past")
        state = torch.load(tmp_path / "past", weights_only=True)
        options = {"model": model, "criterion": nn.CrossEntropyLoss()}
        if forward is not None:
            with pytest.raises(ValueError, match=r"a function of your own \(.*<lambda>\).*forward=\.\.\."):
                Past.load_state_dict(state, **options)
        loaded = Past.load_state_dict(state, forward=forward, **options)
        assert loaded.stored[0].value() == risk.value()
