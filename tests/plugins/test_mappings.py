"""Streams whose batches are mappings with `labels`, as Hugging Face's collate functions make them."""

import pytest
import torch
from torch import nn

from avalanche_curv import (
    GGN,
    Accumulate,
    CurvatureEWCPlugin,
    Diagonal,
    EmpiricalRisk,
    OrthogonalProjectionPlugin,
    Past,
    fidelity_metrics,
    landscape_metrics,
    plasticity_metrics,
)


class Outputs(dict):
    @property
    def logits(self):
        return self["logits"]


class Classifier(nn.Module):
    """The mean of the embedded tokens that the mask leaves, called and answering as Hugging Face's models are."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.relu = nn.Embedding(6, 3), nn.Linear(3, 4), nn.ReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask[:, :, None]
        words = (self.table(input_ids) * mask).sum(1) / mask.sum(1)
        logits = self.head(self.relu(self.hidden(words)))
        return Outputs(logits=logits, loss=None if labels is None else nn.functional.cross_entropy(logits, labels))


def padded(examples):
    """Examples of several lengths in one batch, as by `DataCollatorWithPadding`."""
    length = max(len(e["input_ids"]) for e in examples)
    rows = [e["input_ids"] + [0] * (length - len(e["input_ids"])) for e in examples]
    ids = torch.tensor(rows)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return batch | {name: torch.tensor([e[name] for e in examples]) for name in examples[0] if name != "input_ids"}


@pytest.fixture(scope="module")
def strategy_of_mappings():
    from avalanche.training import Naive

    class OfMappings(Naive):
        """As in Avalanche's own examples with Hugging Face."""

        @property
        def mb_x(self):
            return {name: part for name, part in self.mbatch.items() if name in ("input_ids", "attention_mask")}

        @property
        def mb_y(self):
            return self.mbatch["labels"]

        def _unpack_minibatch(self):
            self.mbatch = {name: part.to(self.device) for name, part in self.mbatch.items()}

        def forward(self):
            return self.model(**self.mb_x, labels=self.mb_y).logits

    return OfMappings


@pytest.fixture
def stream():
    from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
    from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute

    generator = torch.Generator().manual_seed(0)
    tasks = []
    for task in range(2):
        lengths = torch.randint(1, 4, (8,), generator=generator).tolist()
        rows = [torch.randint(1, 6, (n,), generator=generator).tolist() for n in lengths]
        examples = [{"input_ids": row, "labels": (row[0] + task) % 2} for row in rows]
        labels = DataAttribute(ConstantSequence(0, 8), "targets_task_labels", use_in_getitem=True)
        tasks.append(AvalancheDataset([examples], data_attributes=[labels], collate_fn=padded))
    return with_task_labels(benchmark_from_datasets(train=tasks)).train_stream  # whose loader asks the data to collate


def test_plugins_and_metrics_take_them(strategy_of_mappings, stream, learner, train, recorder, double):
    torch.manual_seed(0)
    policy = Accumulate()
    ewc = CurvatureEWCPlugin(1.0, curvature=GGN(), structure=Diagonal(), policy=policy, batch_size=3)
    protecting = OrthogonalProjectionPlugin()
    metrics = [
        *fidelity_metrics(curvature=GGN(), fraction=0.5, every=1), *landscape_metrics(fraction=0.5, k=1),
        *plasticity_metrics(),
    ]
    options = {"kind": strategy_of_mappings, "metrics": metrics, "train_mb_size": 4}
    strategy = learner(Classifier(), ewc, protecting, recorder, **options)
    train(strategy, stream)
    past = Past()
    for model, experience in zip(recorder.ends, stream):
        data = [{k: v for k, v in example.items() if k != "targets_task_labels"} for example in experience.dataset]
        risk = EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), [padded(data[i : i + 3]) for i in (0, 3, 6)])
        past = policy.absorb(past, risk, GGN(), Diagonal())
    torch.testing.assert_close(ewc.past.model.curvature.values, past.model.curvature.values)
    found = strategy.evaluator.get_last_metrics()
    assert found["fidelity/accumulate/kappa_abs"] > 0
    assert 0 <= found["accuracy/stored"] <= 1


def test_a_loss_that_is_none_of_outputs_and_labels_is_refused(strategy_of_mappings, stream, learner, train):
    class Weighted(strategy_of_mappings):
        def criterion(self):
            return 2 * super().criterion()

    strategy = learner(Classifier(), CurvatureEWCPlugin(1.0), kind=Weighted, train_mb_size=4)
    with pytest.raises(TypeError, match="trains another loss than would be remembered"):
        train(strategy, stream)
