"""The gradient of a step: in one pass, or exactly in micro-batches (gradient caching).

The loss depends on the images only through their embeddings z. Gradient caching therefore embeds
all micro-batches without a graph, computes the loss and dL/dz once, then embeds every micro-batch
again with a graph and backpropagates its rows of dL/dz. Activation memory drops to one micro-batch
at the price of a second forward pass, which replays the random numbers of the first.
Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
arXiv:2101.06983.

**Batch normalisation** sees one micro-batch at a time in both passes, so the result differs from
one pass over the whole batch; its gradient is still exact. Running statistics are updated in the
second pass only.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Views = tuple[Tensor, Tensor]
Embed = Callable[[Views], Views]
Loss = Callable[[Tensor, Tensor], Tensor]
Scale = Callable[[Tensor], Tensor]


def _unscaled(value: Tensor) -> Tensor:
    return value


def _nothing() -> None:
    pass


def whole(
    embed: Embed,
    loss: Loss,
    views: Views,
    scale: Scale = _unscaled,
    last: Callable[[], None] = _nothing,
) -> tuple[Tensor, float]:
    """Accumulate the gradient of one batch in one pass.

    Args:
        embed: (x1, x2) → (z1, z2).
        loss: (z1, z2) → ().
        views: (x1, x2).
        scale: loss → what is differentiated, as gradients in float16 need it.
        last: called before the backward that completes the gradients of the network; those of the
            loss's parameters are complete then.

    Returns:
        The detached loss, and host seconds in the loss, its backward included.
    """
    embedded = embed(views)
    # The graph is cut here, so that the time of the loss's backward can be measured.
    z1, z2 = (z.detach().requires_grad_(z.requires_grad) for z in embedded)
    value, in_loss = _backward(loss, z1, z2, scale)
    last()
    _backward_from(embedded, (z1.grad, z2.grad))
    return value, in_loss


def in_parts(
    net: nn.Module,
    embed: Embed,
    loss: Loss,
    parts: Sequence[Views],
    device: torch.device,
    look: Callable[[int], None] = lambda number: None,
    scale: Scale = _unscaled,
    last: Callable[[], None] = _nothing,
) -> tuple[Tensor, float]:
    """Accumulate the gradient of one batch in micro-batches.

    Args:
        net: network inside ``embed``; the first pass freezes its batch normalisation statistics.
        embed: (x1, x2) of a micro-batch → (z1, z2) with rows in the same order; called twice.
        loss: (z1, z2) of the whole batch → (); its own parameters receive their gradient too.
        parts: micro-batches (x1, x2) of any sizes.
        device: device whose random generator ``embed`` draws from, besides the CPU's.
        look: called with the number of each micro-batch, from 0, before it is embedded, except
            before the very first. It may raise to abandon the step; :func:`undone` then takes back
            what the step has done.
        scale, last: as in :func:`whole`.

    Returns:
        The detached loss, and host seconds in the loss, its backward included.
    """
    states, embeddings = [], []
    with torch.no_grad(), _statistics_kept(net):
        for number, part in enumerate(parts):
            if number:
                look(number)
            states.append(_rng_state(device))
            embeddings.append(embed(part))
    z1, z2 = (torch.cat(views).requires_grad_() for views in zip(*embeddings, strict=True))
    sizes = [len(first) for first, _ in embeddings]
    del embeddings
    after = _rng_state(device)
    value, in_loss = _backward(loss, z1, z2, scale)
    gradients = ((torch.zeros_like(z) if z.grad is None else z.grad).split(sizes) for z in (z1, z2))
    for number, (part, state, dz1, dz2) in enumerate(zip(parts, states, *gradients, strict=True)):
        look(number)
        _set_rng_state(state, device)
        embedded = embed(part)
        if number == len(parts) - 1:
            last()
        _backward_from(embedded, (dz1, dz2))
    _set_rng_state(after, device)
    return value, in_loss


def _backward_from(embedded: Views, gradients: Views) -> None:
    """Backpropagate through those embeddings that have a graph; a momentum encoder's have none."""
    pairs = zip(embedded, gradients, strict=True)
    wanted = [(z, grad) for z, grad in pairs if z.requires_grad]
    torch.autograd.backward([z for z, _ in wanted], [grad for _, grad in wanted])


@contextmanager
def undone(net: nn.Module, device: torch.device, error: type[Exception]):
    """Restore the buffers of ``net`` and the random generators if ``error`` is raised inside."""
    buffers = [buffer.clone() for buffer in net.buffers()]
    state = _rng_state(device)
    try:
        yield
    except error:
        with torch.no_grad():
            for buffer, before in zip(net.buffers(), buffers, strict=True):
                buffer.copy_(before)
        _set_rng_state(state, device)
        net.zero_grad(set_to_none=True)
        raise


def _backward(loss: Loss, z1: Tensor, z2: Tensor, scale: Scale) -> tuple[Tensor, float]:
    """Accumulate gradients in z1, z2 and the loss's own parameters; (detached loss, seconds)."""
    start = time.perf_counter()
    value = loss(z1, z2)
    scale(value).backward()
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
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), gpu


def _set_rng_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
