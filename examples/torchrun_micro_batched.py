"""Several processes, one batch: every process embeds its pairs in micro-batches.

Run it with ``torchrun --nproc-per-node 2 examples/torchrun_micro_batched.py``. The gradient is that
of the whole batch on one device, and is exchanged once in a step.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from alphacl_fast import FusedAlphaCLLoss, micro_batched

STEPS, PAIRS, MICRO_BATCH = 20, 24, 7


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights everywhere
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 16)).to(device)
    model = DistributedDataParallel(net)
    criterion = FusedAlphaCLLoss(temperature=0.2, process_group="world")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        torch.manual_seed(step)
        first = torch.randn(PAIRS, 20)
        second = first + 0.1 * torch.randn_like(first)
        # this process's pairs, of any number
        views = torch.cat([first[rank::world], second[rank::world]]).to(device)
        z1, z2 = micro_batched(model, views, MICRO_BATCH).chunk(2)
        loss = criterion(z1, z2)  # of the whole batch, on every process
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
