"""Lightning: the past attached by a `Callback`."""

from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_curv.core import CurvatureRegularizer, Kronecker


class KeepThePast(lightning.Callback):
    """Attaches the regulariser to the optimisers of each `fit`, and absorbs what was trained at its end."""

    def __init__(self, regularizer: CurvatureRegularizer) -> None:
        self.regularizer = regularizer

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.attached = [self.regularizer.attach(optimizer, pl_module) for optimizer in trainer.optimizers]

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        for attached in self.attached:
            attached.remove()
        self.regularizer.absorb(pl_module, pl_module.criterion, trainer.train_dataloader)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs)

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def accuracies(strength: float) -> list[float]:
    lightning.seed_everything(0)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    tasks, model = [x.float() / 16, x[:, torch.randperm(64)].float() / 16], Classifier()
    past = KeepThePast(CurvatureRegularizer(strength, structure=Kronecker()))
    for pixels in tasks:
        loader = DataLoader(TensorDataset(pixels[:-300], y[:-300]), batch_size=64, shuffle=True)
        quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
        lightning.Trainer(max_epochs=4, accelerator="cpu", callbacks=[past], **quiet).fit(model, loader)
    return [float((model(pixels[-300:]).argmax(1) == y[-300:]).float().mean()) for pixels in tasks]


if __name__ == "__main__":
    for strength in 0.0, 10.0:
        first, second = accuracies(strength)
        print(f"strength {strength:g}: accuracy {first:.3f} on the first task, {second:.3f} on the second")
