"""A loss of one's own: φ and ψ as plain functions of a tensor, in O(N·D) memory.

Run it with ``python examples/own_loss.py``. The loss is L_i = φ(Σ_j ψ(Δ_ij)). Δ_ij is the
similarity of a negative pair minus the similarity of the positive pair. Derivatives are automatic.
"""

import torch
from torch import nn

from alphacl_fast import FusedAlphaCLLoss, PairLoss

STEPS, BATCH = 20, 32


def squared_hinge(gap: torch.Tensor) -> torch.Tensor:
    """Only negatives that come within 0.5 of the positive count."""
    return torch.relu(gap + 0.5).square()


def train() -> list[float]:
    """The losses of some steps."""
    torch.manual_seed(0)
    criterion = FusedAlphaCLLoss(PairLoss(phi=torch.log1p, psi=squared_hinge))
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 16))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, 20)
        loss = criterion(net(x), net(x + 0.1 * torch.randn_like(x)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train())
