"""CLIP's two towers with open_clip's loss in a plain loop; the loss is the one line replaced.

Run it with ``python examples/clip_open_clip.py``. Images and captions are random, and the towers
small: put `open_clip.create_model_and_transforms` and your data there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphacl_fast.compat.open_clip import ClipLoss  # was: from open_clip.loss import ClipLoss

STEPS, BATCH = 20, 24


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.GELU(), nn.Linear(32, 16))
        self.words = nn.EmbeddingBag(50, 16)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image_features = F.normalize(self.visual(images), dim=-1)
        text_features = F.normalize(self.words(tokens), dim=-1)
        return image_features, text_features, self.logit_scale.exp()


def train(criterion: nn.Module) -> list[float]:
    """The losses of some steps."""
    torch.manual_seed(0)
    model = TwoTowers().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(STEPS):
        images = torch.rand(BATCH, 3, 8, 8, dtype=torch.float64)
        tokens = torch.randint(50, (BATCH, 6))
        loss = criterion(*model(images, tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as open_clip's training loop does
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train(ClipLoss()))
