"""Rows of all processes, for losses whose anchors are a process's own rows.

`distributed` spreads the pairs of two views so that none is computed twice. Where anchors meet rows
that are given (`loss_against`, `supcon_loss`), each process gathers the rows of all, compares its
own anchors with them, and sends the gradients home: O(n·D) memory, two messages. Each rank
differentiates Σ_r L_r, as everywhere (`distributed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .objectives import Objective
from .process_groups import (
    OwnGroup,
    Peers,
    ProcessGroup,
    Statement,
    brief,
    described,
    exchange,
    values_of,
)


@dataclass(frozen=True)
class Sharing(Peers):
    """The ranks of one call, once they have agreed on it.

    Attributes:
        sizes: for every rank, how many anchors and how many rows of the other kind it has.
        temperatures: for every rank, as it has stated them.
    """

    sizes: tuple[tuple[int, ...], ...]
    temperatures: tuple[tuple[float, ...], ...] = ()

    def counts(self, kind: int) -> list[int]:
        """The numbers of rows of all ranks, of one kind."""
        return [sizes[kind] for sizes in self.sizes]

    def place(self, kind: int) -> slice:
        """The place of this rank's rows of a kind among the rows of all ranks."""
        counts = self.counts(kind)
        start = sum(counts[: self.rank])
        return slice(start, start + counts[self.rank])

    def gather(self, x: Tensor, kind: int) -> Tensor:
        """(n, …) → the rows of all ranks, a constant."""
        counts = self.counts(kind)
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x.detach()
        out = x.new_empty(self.world * len(padded), *x.shape[1:])
        if out.numel():
            out = self.all_gather(padded.view(-1)).view(out.shape)
        return torch.cat([part[:k] for part, k in zip(self._parts(out), counts, strict=True)])

    def send_home(self, x: Tensor, kind: int) -> Tensor:
        """The sum over the ranks of what they have for this rank's rows."""
        counts = self.counts(kind)
        padded = x.new_zeros(self.world * max(counts), *x.shape[1:])
        for part, own in zip(self._parts(padded), x.split(counts), strict=True):
            part[: len(own)] = own
        out = x.new_empty(max(counts), *x.shape[1:])
        if out.numel():
            out = self.reduce_scatter(padded.view(self.world, -1)).view(out.shape)
        return out[: counts[self.rank]]

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(self.world) if len(x) else (x,) * self.world

    def sum(self, x: Tensor) -> Tensor:
        """Σ over the ranks, a constant."""
        return self.all_reduce(x.detach())

    def total(self, x: Tensor) -> Tensor:
        """Σ over the ranks, the same number on all; differentiable."""
        return _Total.apply(x, self)

    def share(self, rows: Tensor, kind: int, *numbers: Tensor) -> tuple[Tensor, ...]:
        """The rows of all ranks, differentiable, and numbers whose gradients are averaged."""
        return _Shared.apply(self, kind, rows, *numbers)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sharing: Sharing) -> Tensor:
        ctx.sharing = sharing
        return sharing.sum(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.sharing.sum(grad), None


class _Shared(torch.autograd.Function):
    """One node for all that crosses between ranks, so that its messages have one order."""

    @staticmethod
    def forward(
        ctx, sharing: Sharing, kind: int, rows: Tensor, *numbers: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sharing, ctx.kind, needed = sharing, kind, ctx.needs_input_grad[2:]
        outputs = sharing.gather(rows, kind), *(x.clone() for x in numbers)
        constant = [x for x, need in zip(outputs, needed, strict=True) if not need]
        ctx.mark_non_differentiable(*constant)
        return outputs

    @staticmethod
    def backward(ctx, d_rows: Tensor, *d_numbers: Tensor) -> tuple[Any, ...]:
        sharing, (need_rows, *needed) = ctx.sharing, ctx.needs_input_grad[2:]
        averages = [
            sharing.sum(x) / sharing.world if need else None
            for x, need in zip(d_numbers, needed, strict=True)
        ]
        home = sharing.send_home(d_rows, ctx.kind) if need_rows else None
        return None, None, home, *averages


@contextmanager
def failing_together(group: ProcessGroup | None) -> Iterator[None]:
    """A bad argument that is found in the body raises on every rank, which waits for this one."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if group is not None:
            agree(group, "", (), error)
        raise


def agree(
    group: ProcessGroup,
    text: str,
    sizes: tuple[int, ...],
    failure: Exception | None,
    rows: Tensor | None = None,
    objective: Objective | None = None,
    temperature: tuple[float, ...] = (),
) -> Sharing:
    """After one small message all ranks go on with the same call, or all raise the same error.

    Args:
        text: describes the call; it must be the same on every rank.
        sizes: the numbers of this rank's rows, of one kind or of two.
        failure: the error of this rank's arguments; the other arguments may then be anything.
        rows: whose device every rank must have.
        objective: whose functions every rank must have.
        temperature: what the caller compares over the ranks itself.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank; names the ranks whose arguments are bad,
            or differ.
    """
    counts, device = (*sizes, 0, 0)[:2], None if failure else getattr(rows, "device", None)

    def state(own: OwnGroup) -> Statement:
        functions = () if objective is None else values_of(objective)
        kind = "" if device is None else device.type
        return Statement(
            None, described(text), device=kind, functions=functions, temperature=temperature
        )

    own, number, counts, statements = exchange(group, counts, state, failure, device)
    for r, other in enumerate(statements):
        if other.text != statements[0].text:
            raise ValueError(
                "every rank must make the same call, "
                f"got {statements[0].text} on rank 0 and {other.text} on rank {r}"
            )
    call = brief(statements[0])
    stated = tuple(each.temperature for each in statements)
    return Sharing(own.handle, own.rank, own.world, tuple(counts), stated, call=call, number=number)
