"""Supervised contrastive learning with a miner of pytorch-metric-learning.

Run it with ``python examples/metric_learning_miner.py``. The loss is the one line that is replaced;
the miner chooses the pairs as before. The data are random points around class centres.
"""

import torch
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import nn

# was: from pytorch_metric_learning.losses import SupConLoss
from alphacl_fast.compat.pytorch_metric_learning import SupConLoss

STEPS, BATCH, CLASSES = 20, 32, 6


def train(criterion: nn.Module) -> list[float]:
    """The losses of some steps."""
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, 10, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    miner = MultiSimilarityMiner(epsilon=0.1)
    losses = []
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,))
        embeddings = net(centres[labels] + torch.randn(BATCH, 10, dtype=torch.float64))
        hard_pairs = miner(embeddings, labels)
        loss = criterion(embeddings, labels, hard_pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train(SupConLoss(temperature=0.1)))
