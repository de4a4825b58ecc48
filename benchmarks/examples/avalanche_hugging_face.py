"""Avalanche with a model and a collate function of Hugging Face: batches are mappings with `labels`."""

import torch
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute
from avalanche.training import Naive
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, default_data_collator

from avalanche_curv import CurvatureEWCPlugin


class OfMappings(Naive):
    """Calls `model(**batch)`, as in Avalanche's examples with Hugging Face."""

    @property
    def mb_x(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.mbatch["input_ids"]}

    @property
    def mb_y(self) -> torch.Tensor:
        return self.mbatch["labels"]

    def _unpack_minibatch(self) -> None:
        self.mbatch = {name: part.to(self.device) for name, part in self.mbatch.items()}

    def forward(self) -> torch.Tensor:
        return self.model(**self.mb_x).logits


def task(number: int) -> AvalancheDataset:
    """Texts on one of two topics, each with four words of its own. The topics of a task are its own, too."""
    topics = 2 * number + torch.randint(2, (256,))
    examples = [{"input_ids": 4 * topic + torch.randint(4, (8,)), "labels": topic} for topic in topics]
    tasks = DataAttribute(ConstantSequence(0, len(topics)), "targets_task_labels", use_in_getitem=True)
    return AvalancheDataset([examples], data_attributes=[tasks], collate_fn=default_data_collator)


def losses(strength: float) -> list[float]:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=16, num_labels=4, initializer_range=0.3, **size)
    model, tasks = BertForSequenceClassification(config), [task(0), task(1)]
    strategy = OfMappings(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=3e-3), criterion=nn.CrossEntropyLoss(),
        train_mb_size=32, train_epochs=6, plugins=[CurvatureEWCPlugin(strength)], evaluator=None,
    )  # fmt: skip
    for experience in with_task_labels(benchmark_from_datasets(train=tasks)).train_stream:
        strategy.train(experience)
    batches = [default_data_collator(list(data)) for data in tasks]
    model.eval()
    return [nn.functional.cross_entropy(model(b["input_ids"]).logits, b["labels"]).item() for b in batches]


if __name__ == "__main__":
    for strength in 0.0, 10_000.0:
        first, second = losses(strength)
        print(f"strength {strength:g}: loss {first:.3f} on the first task, {second:.3f} on the second")
