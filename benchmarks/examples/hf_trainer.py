"""Hugging Face's `Trainer` with a LoRA adapter of PEFT, and the past attached by a `TrainerCallback`."""

from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from avalanche_curv.core import CurvatureRegularizer


class KeepThePast(transformers.TrainerCallback):
    """Attaches the regulariser to the optimiser of each `train()`, and absorbs what was trained at its end."""

    def __init__(self, regularizer: CurvatureRegularizer) -> None:
        self.regularizer = regularizer

    def on_train_begin(self, *args: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        self.attached = self.regularizer.attach(optimizer, model)

    def on_train_end(self, *args: Any, model: nn.Module, train_dataloader: Any, **kwargs: Any) -> None:
        self.attached.remove()
        self.regularizer.absorb(model, nn.CrossEntropyLoss(), train_dataloader)  # its batches are mappings with labels


def task(number: int) -> list[dict[str, torch.Tensor]]:
    """Texts on one of two topics, each with four words of its own. The topics of a task are its own, too."""
    topics = 2 * number + torch.randint(2, (256,))
    return [{"input_ids": 4 * topic + torch.randint(4, (8,)), "labels": topic} for topic in topics]


def losses(strength: float) -> list[float]:
    transformers.set_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=16, num_labels=4, initializer_range=0.3, **size)
    bert = transformers.BertForSequenceClassification(config)
    adapter = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = get_peft_model(bert, adapter)
    regularizer = CurvatureRegularizer(strength)  # of the adapter and the head, which alone are trained
    tasks = [task(0), task(1)]
    with TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, num_train_epochs=8, per_device_train_batch_size=32, learning_rate=1e-2, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        for data in tasks:
            trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[KeepThePast(regularizer)])
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return [trainer.evaluate(data)["eval_loss"] for data in tasks]


if __name__ == "__main__":
    for strength in 0.0, 100.0:
        first, second = losses(strength)
        print(f"strength {strength:g}: loss {first:.3f} on the first task, {second:.3f} on the second")
