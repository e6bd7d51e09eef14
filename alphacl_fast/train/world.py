"""The processes of a run: this one alone, or those that torchrun started, which share every step's batch."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from .config import RunError

#: Longest wait of one process for another: the first one evaluates and writes while the others wait.
TIMEOUT = datetime.timedelta(minutes=30)

Value = TypeVar("Value")


class World:
    """``rank`` of ``size`` processes. With one process every method does nothing but return what it was given."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, evaluates and talks."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """This process's part of a batch; parts differ by one at most."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def lead(self, function: Callable[[], Value]) -> Value:
        """What ``function`` returns in the first process, or the RunError it raises, in every process."""
        if self.size == 1:
            return function()
        answer: list = [None, None]
        if self.leads:
            try:
                answer[0] = function()
            except RunError as error:
                answer[1] = str(error)
        with peers():
            dist.broadcast_object_list(answer, 0)
        if answer[1] is not None:
            raise RunError(answer[1], shown=not self.leads)
        return answer[0]

    def first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Every tensor as the first process has it."""
        if self.size > 1:
            with peers(), torch.no_grad():
                for tensor in tensors:
                    dense = tensor.contiguous()
                    dist.broadcast(dense, 0)
                    tensor.copy_(dense)

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace every gradient by the processes' mean: one all-reduce."""
        if self.size == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        with peers():
            dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([grad.numel() for grad in grads])
        for parameter, grad, part in zip(parameters, grads, parts, strict=True):
            parameter.grad = grad.copy_(part.view(grad.shape))

    def agreed(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        with peers():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)


@contextmanager
def joined() -> Iterator[World]:
    """The world of this process, as torchrun's environment variables describe it; leaves it at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    started = not dist.is_initialized()
    if started:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def peers():
    """Within it, a failure of the connection to another process is a RunError; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, getattr(dist, "DistError", ())) and "gloo" not in text and "NCCL" not in text:
            raise
        raise RunError(f"another process of this job has ended, or does not answer: {text[:200]}") from error
