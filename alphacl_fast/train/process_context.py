"""The processes of a run: a single one, or torchrun's ranks, which share each step's batch."""

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from .config import RunError

# Ranks wait for one another at most this long: rank 0 evaluates and writes while the others wait.
TIMEOUT = datetime.timedelta(minutes=30)

Value = TypeVar("Value")


class ProcessContext:
    """This process's ``rank`` among ``size`` ranks; collectives are no-ops in a single process."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes files, evaluates and logs."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """Return this rank's part of a batch; the sizes of the parts differ by at most one."""
        n = len(items)
        return items[n * self.rank // self.size : n * (self.rank + 1) // self.size]

    def on_rank_0(self, function: Callable[[], Value]) -> Value:
        """Call ``function`` on rank 0 and broadcast its result, or the RunError that it raises."""
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

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite every tensor with rank 0's."""
        if self.size > 1:
            with peers(), torch.no_grad():
                for tensor in tensors:
                    dense = tensor.contiguous()
                    dist.broadcast(dense, 0)
                    tensor.copy_(dense)

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Average every gradient over the ranks, in one all-reduce."""
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

    def all_reduce_max(self, number: int) -> int:
        """Return the largest ``number`` of all ranks."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        with peers():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)


@contextmanager
def joined() -> Iterator[ProcessContext]:
    """Join the process group that torchrun's environment variables describe; leave it on exit."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ProcessContext()
        return
    started = not dist.is_initialized()
    if started:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        yield ProcessContext(dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def peers():
    """Turn a lost connection to another process into a RunError; other errors pass through."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        lost = isinstance(error, getattr(dist, "DistError", ())) or "gloo" in text or "NCCL" in text
        if not lost:
            raise
        raise RunError(
            f"another process of this job has ended, or does not answer: {text[:200]}"
        ) from error
