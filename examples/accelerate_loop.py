"""A loop with Hugging Face Accelerate, whose batch is larger than what the activations allow.

Run it with ``accelerate launch examples/accelerate_loop.py`` on any number of devices: all
processes share one batch of negatives, and exchange their gradients once in a step.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from alphacl_fast import FusedAlphaCLLoss, micro_batched

STEPS, BATCH, MICRO_BATCH = 20, 32, 6


def train() -> list[float]:
    """The losses of some steps."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 16))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    data = torch.randn(STEPS * BATCH, 20)
    loader = DataLoader(TensorDataset(data, data + 0.1 * torch.randn_like(data)), BATCH)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    group = "world" if accelerator.num_processes > 1 else None
    criterion = FusedAlphaCLLoss(temperature=0.2, process_group=group)
    losses = []
    for x1, x2 in loader:
        # one call for both views: the gradients are exchanged once for each call
        z1, z2 = micro_batched(net, torch.cat([x1, x2]), MICRO_BATCH).chunk(2)
        loss = criterion(z1, z2)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train())
