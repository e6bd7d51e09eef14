"""The gradient of a step: of the whole batch at once, or in micro-batches with the same result (gradient caching).

The loss of a batch depends on its images only through their embeddings z. So: embed all micro-batches without a graph;
loss and dL/dz once; then embed every micro-batch again, with a graph, and send its rows of dL/dz back through it. The memory
of activations is that of one micro-batch, for one more forward pass. The second pass draws the random numbers of the first.
Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv:2101.06983.

**Batch normalisation** sees one micro-batch at a time, in both passes: the gradient is exact for what was computed, but that
is not what one pass over the whole batch computes. Running statistics are updated in the second pass only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Views = tuple[Tensor, Tensor]


def whole(embed: Callable[[Views], Views], loss: Callable[[Tensor, Tensor], Tensor], views: Views) -> tuple[Tensor, float]:
    """Backward of one batch in one pass: (detached loss, host seconds in the loss, its backward included)."""
    embedded = embed(views)
    z1, z2 = (z.detach().requires_grad_() for z in embedded)  # the loss's own backward ends here, and so does its time
    value, in_loss = _backward(loss, z1, z2)
    torch.autograd.backward(embedded, (z1.grad, z2.grad))
    return value, in_loss


def in_parts(
    net: nn.Module,
    embed: Callable[[Views], Views],
    loss: Callable[[Tensor, Tensor], Tensor],
    parts: Sequence[Views],
    device: torch.device,
) -> tuple[Tensor, float]:
    """Backward of one batch in micro-batches: (detached loss, host seconds in the loss, its backward included).

    Args:
        net: whose batch normalisation keeps its running statistics in the first pass.
        embed: (x1, x2) of a micro-batch → (z1, z2), rows in the same order; called twice with each.
        loss: (z1, z2) of the whole batch → (); its own parameters get their gradient too.
        parts: the micro-batches, of any sizes.
        device: whose random numbers ``embed`` draws, besides the CPU's.
    """
    noise, embeddings = [], []
    with torch.no_grad(), _statistics_kept(net):
        for part in parts:
            noise.append(_rng_state(device))
            embeddings.append(embed(part))
    z1, z2 = (torch.cat(views).requires_grad_() for views in zip(*embeddings, strict=True))
    sizes = [len(first) for first, _ in embeddings]
    del embeddings
    after = _rng_state(device)
    value, in_loss = _backward(loss, z1, z2)
    for part, state, dz1, dz2 in zip(parts, noise, z1.grad.split(sizes), z2.grad.split(sizes), strict=True):
        _set_rng_state(state, device)
        torch.autograd.backward(embed(part), (dz1, dz2))
    _set_rng_state(after, device)
    return value, in_loss


def _backward(loss: Callable[[Tensor, Tensor], Tensor], z1: Tensor, z2: Tensor) -> tuple[Tensor, float]:
    """Gradients into z1, z2 and the loss's own parameters: (detached loss, host seconds)."""
    start = time.perf_counter()
    value = loss(z1, z2)
    value.backward()
    return value.detach(), time.perf_counter() - start


@contextmanager
def _statistics_kept(net: nn.Module):
    layers = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
