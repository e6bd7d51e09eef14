"""SimCLR with Lightning and lightly's transforms; the loss is the one line that is replaced.

Run it with ``python examples/simclr_lightning.py``. The images are random: put your data set there.
"""

import pytorch_lightning as pl
import torch
import torchvision
from lightly.transforms import SimCLRTransform
from torch import nn
from torch.utils.data import DataLoader, Dataset

from alphacl_fast import micro_batched
from alphacl_fast.compat.lightly import NTXentLoss  # was: from lightly.loss import NTXentLoss

STEPS, BATCH = 20, 16


class Images(Dataset):
    """Two augmented views of every image."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(4 * BATCH, 3, 12, 12, generator=generator)
        self.images = [torchvision.transforms.functional.to_pil_image(x) for x in pixels]
        self.transform = SimCLRTransform(input_size=8, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return [view.double() for view in self.transform(self.images[index])]


class SimCLR(pl.LightningModule):
    def __init__(self, criterion: nn.Module, micro_batch: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16)
        )
        self.criterion, self.micro_batch = criterion, micro_batch
        self.losses: list[float] = []

    def training_step(self, views: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        # activations of `micro_batch` images at a time; the loss sees the whole batch
        z0, z1 = (micro_batched(self.net, view, self.micro_batch) for view in views)
        loss = self.criterion(z0, z1)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(criterion: nn.Module, micro_batch: int = 5) -> list[float]:
    """The losses of some steps."""
    pl.seed_everything(0, verbose=False)
    model = SimCLR(criterion, micro_batch)
    trainer = pl.Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, precision="64-true", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(Images(), batch_size=BATCH, shuffle=True))
    return model.losses


if __name__ == "__main__":
    print(train(NTXentLoss(temperature=0.5)))
