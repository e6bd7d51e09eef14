"""A momentum encoder with a queue of earlier keys as negatives: ``--recipe moco``.

The first view of an image gives a query, the second a key. Keys come from a network whose weights
are a moving average of the query network's, and the negatives of a query are the keys of earlier
batches. Source: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning",
CVPR 2020, arXiv:1911.05722.

Batch normalisation can give a query's own batch of keys away. The paper shuffles the keys among
its GPUs against that; here ``--norm sync`` (as later work does) or ``--norm group`` serves.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alphacl_fast import loss_against

from .models import Net, build
from .process_context import sum_over_ranks
from .recipe import Recipe, temperature_of


class MomentumNet(nn.Module):
    """Map two views to queries (n, 128) and keys (n, 128).

    Args:
        net: network of the queries, whose initial weights the keys' network shares.
        rows: keys in the queue.
        seed: seed of the queue's first rows, which are random.
    """

    def __init__(self, net: Net, rows: int, seed: int):
        super().__init__()
        self.encoder, self.projector = net.encoder, net.projector
        self.keys = copy.deepcopy(net).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        dim = net.projector[-1].out_features
        self.register_buffer("queue", F.normalize(torch.randn(rows, dim, generator=generator)))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))  # of the oldest key

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            keys = self.keys(x2)
        return self.projector(self.encoder(x1)), keys

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the weights of the keys' network towards the queries' network."""
        ours = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_([*self.keys.parameters()], ours, 1 - momentum)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Let unit rows (n, 128) replace the oldest keys; of more than there is room for, the last.

        Nothing is read on the host.
        """
        rows = len(self.queue)
        keys = keys[-rows:]
        places = (self.place + torch.arange(len(keys), device=keys.device)) % rows
        self.queue[places] = keys.to(self.queue.dtype)
        self.place.copy_((self.place + len(keys)) % rows)


class QueueLoss(nn.Module):
    """Sum over the queries of their losses against the queue.

    Args:
        objective: name of the objective.
        temperature: as `FusedAlphaCLLoss` takes it.
        backend: backend of the loss.
        options: options of the objective.
    """

    def __init__(self, objective: str, temperature, backend: str, options: dict):
        super().__init__()
        self.objective, self.backend, self.options = objective, backend, options
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature

    def forward(self, queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
        """Compute the loss () of unit rows (n, 128), (n, 128) and (m, 128)."""
        return loss_against(
            queries,
            queue,
            (queries * keys).sum(1),
            self.objective,
            temperature=self.temperature,
            reduction="sum",
            backend=self.backend,
            **self.options,
        )


class MoCo(Recipe):
    """A momentum encoder with a queue."""

    def build_net(self) -> MomentumNet:
        return MomentumNet(build(self.config), self.config.queue, self.config.seed)

    def build_loss(self) -> nn.Module:
        config = self.config
        temperature = temperature_of(config, self.data.device)

        def make() -> nn.Module:
            return QueueLoss(config.objective, temperature, config.backend, config.option)

        return self.tried(make, lambda z: (*F.normalize(z.float(), dim=2), self.net.queue))

    def embed(self, part: tuple) -> tuple[Tensor, Tensor]:
        x1, x2 = (x.to(self.data.device, non_blocking=True) for x in part)
        return self.forward(x1, x2)

    def value(self, z1: Tensor, z2: Tensor, parts: list[tuple]) -> Tensor:
        queries, self.batch = F.normalize(z1.float()), F.normalize(z2.detach().float())
        total = self.loss(queries, self.batch, self.net.queue)
        return sum_over_ranks(total, self.context) / self.config.batch_size

    def after_step(self) -> None:
        self.net.follow(self.config.momentum)
        self.net.enqueue(self.context.gather(self.batch, self.config.batch_size))
