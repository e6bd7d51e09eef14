"""The processes of a run: a single one, or ranks, which share each step's batch."""

import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch
import torch.distributed as dist

from .config import RunError

# Ranks wait for one another at most this long: rank 0 evaluates and writes while the others wait.
TIMEOUT = datetime.timedelta(minutes=30)
ANNOUNCED_AFTER = 5.0  # seconds that a process waits for the others before it says so
#: What torchrun gives to every process.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Value = TypeVar("Value")


class ProcessContext:
    """This process's ``rank`` among ``size`` ranks; collectives are no-ops in a single process.

    Args:
        rank: this process.
        size: number of processes.
        local_rank: index of this process on its machine.
        on_cpu: process group for tensors on the CPU; None for the default group, which serves
            tensors on any other device.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, on_cpu=None):
        self.rank, self.size, self.local_rank, self.on_cpu = rank, size, local_rank, on_cpu

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes files, evaluates and logs."""
        return self.rank == 0

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process, and passes on the signals that it gets itself.

        Each process then gets the signals to a whole job twice.
        """
        return self.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ

    def group_of(self, tensor: torch.Tensor):
        """Return the process group that serves the device of ``tensor``."""
        return self.on_cpu if tensor.device.type == "cpu" else None

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
            dist.broadcast_object_list(answer, 0, self.on_cpu)
        if answer[1] is not None:
            raise RunError(answer[1], shown=not self.leads)
        return answer[0]

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite every tensor with rank 0's."""
        if self.size > 1:
            with peers(), torch.no_grad():
                for tensor in tensors:
                    dense = tensor.contiguous()
                    dist.broadcast(dense, 0, self.group_of(dense))
                    tensor.copy_(dense)

    def gather(self, rows: torch.Tensor, total: int) -> torch.Tensor:
        """Join the ranks' shares (n_r, …) of ``total`` rows, in the order of the ranks."""
        if self.size == 1:
            return rows
        group = self.group_of(rows)
        bounds = [total * rank // self.size for rank in range(self.size + 1)]
        sizes = [stop - start for start, stop in pairwise(bounds)]
        with peers():
            padded = rows.new_zeros(max(sizes), *rows.shape[1:])
            padded[: len(rows)] = rows
            parts = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def sum(self, number: int) -> int:
        """Return the sum of all ranks' ``number``."""
        if self.size == 1:
            return number
        total = torch.tensor(number, device="cpu")
        with peers():
            dist.all_reduce(total, group=self.on_cpu)
        return int(total)

    def all_reduce_max(self, number: int) -> int:
        """Return the largest ``number`` of all ranks."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, device="cpu")
        with peers():
            dist.all_reduce(largest, dist.ReduceOp.MAX, self.on_cpu)
        return int(largest)


def sum_over_ranks(x: torch.Tensor, context: ProcessContext) -> torch.Tensor:
    """Sum a tensor over the ranks, differentiably.

    Every rank differentiates the sum of all ranks' losses with respect to its own ``x``. If all
    ranks have the same loss, averaging their gradients therefore gives the gradient of that loss.
    """
    if context.size == 1:
        return x
    from torch.distributed.nn.functional import all_reduce  # not in a torch without processes

    return all_reduce(x, group=context.group_of(x))


@contextmanager
def joined() -> Iterator[ProcessContext]:
    """Join the other processes of the job; leave them on exit.

    A process group that the caller has initialised is used as it is. Otherwise torchrun's
    environment variables say which processes there are.

    Raises:
        RunError: the variables are incomplete or contradict each other, or the other processes do
            not come.
    """
    if dist.is_available() and dist.is_initialized():
        size = dist.get_world_size()
        # The caller's group may serve CUDA tensors only.
        on_cpu = dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 else None
        yield ProcessContext(dist.get_rank(), size, _local_rank(dist.get_rank()), on_cpu)
        return
    rank, size = _rank_and_size()
    if size == 1:
        yield ProcessContext()
        return
    _initialise(rank, size)
    try:
        yield ProcessContext(rank, size, _local_rank(rank))
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """Return the number of processes of this job; raises RunError as :func:`joined`."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return _rank_and_size()[1]


def _rank_and_size() -> tuple[int, int]:
    """Read this process's rank and the number of processes from torchrun's variables."""
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given.get("WORLD_SIZE", "1") == "1" and given.get("RANK", "0") == "0":
        return 0, 1
    hint = "start the processes with torchrun, or unset these variables to train in one process"
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    if missing := [name for name in VARIABLES if name not in given]:
        raise RunError(
            f"the environment describes one process of several ({shown}) but lacks "
            f"{', '.join(missing)}: {hint}"
        )
    numbers = [given[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if not all(number.isdecimal() for number in numbers) or int(numbers[0]) >= int(numbers[1]):
        raise RunError(
            "RANK, WORLD_SIZE and MASTER_PORT must be numbers with RANK below WORLD_SIZE, got "
            f"{shown}: {hint}"
        )
    return int(numbers[0]), int(numbers[1])


def _local_rank(rank: int) -> int:
    """Return this process's index on its machine, by the variables of torchrun or Slurm."""
    given = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or ""
    return int(given) if given.isdecimal() else rank % max(1, torch.cuda.device_count())


def _initialise(rank: int, size: int) -> None:
    """Initialise the default process group; say so if the other processes let this one wait.

    A thread of its own waits for them, so that Ctrl-C ends the process meanwhile.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    errors: list[Exception] = []

    def initialise():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=TIMEOUT, rank=rank, world_size=size)
        except Exception as error:  # DistStoreError, DistNetworkError, RuntimeError, ValueError
            errors.append(error)

    thread = threading.Thread(target=initialise, daemon=True)
    thread.start()
    began, announced = time.monotonic(), 0.0
    while thread.is_alive():
        thread.join(0.1)
        waited = time.monotonic() - began
        # After 5 s, 10 s, 20 s, …
        if waited >= ANNOUNCED_AFTER and waited >= 2 * announced and thread.is_alive():
            announced = waited
            print(
                f"alphacl: process {rank} of {size} has waited {waited:.0f} s at {address} for the "
                f"other processes to start; it gives up after {TIMEOUT.seconds // 60} min",
                file=sys.stderr,
                flush=True,
            )
    if errors:
        text = " ".join(str(errors[0]).split())
        raise RunError(
            f"process {rank} of {size} did not reach the other processes at {address}: {text[:200]}"
        ) from errors[0]


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
