"""A few processes that stay up for all tests and run functions on gloo groups of them."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

#: Ranks of the world that form the group of each size. Within a sub-group no process has its rank
#: of the world.
GROUPS = {1: (2,), 2: (1, 3), 3: (1, 2, 3), 4: (1, 2, 3, 4), 6: (0, 1, 2, 3, 4, 5)}
WORLD = 6


def time_limit():
    """Seconds that any step may take, so that nothing can hang a run."""
    return int(os.environ.get("ALPHACL_RANKS_TIMEOUT", "900"))


class Failed(Exception):
    """A function raised in a process; the text is its traceback."""


def map_large_blocks():
    """Give every block of 64 KiB or more a mapping of its own, which ends when the block is freed.

    In glibc's heap it would leave a hole for later blocks, and a test could not say from the size
    of the process how much memory a call needs.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


def _work(rank, store, pipe, environment):
    os.environ.update(environment)  # the fork server's own may be older
    map_large_blocks()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=time_limit()),
        store=dist.FileStore(store, WORLD),
    )
    groups = {
        size: dist.new_group(members) if size < WORLD else dist.group.WORLD
        for size, members in GROUPS.items()
    }
    pipe.send((True, "ready"))
    while True:
        function, size, arguments = pipe.recv()
        try:
            answer = (True, function(groups[size], **arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


class Ranks:
    """Six processes.

    ``run(size, function, …)`` calls ``function(group, …)`` in those of a group, returns their
    results.
    """

    def __enter__(self):
        self._start()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    def _start(self):
        # from one process that has imported torch, which takes a process longer than its tests
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])
        store = os.path.join(tempfile.mkdtemp(), "store")
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            here, there = context.Pipe()
            arguments = (rank, store, there, dict(os.environ))
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        assert self._answers(self.pipes) == ["ready"] * WORLD

    def run(self, size, function, **arguments):
        members = [self.pipes[rank] for rank in GROUPS[size]]
        for pipe in members:
            pipe.send((function, size, arguments))
        try:
            return self._answers(members)
        except BaseException:  # the others may be waiting for one that has failed
            self.__exit__()
            self._start()
            raise

    @staticmethod
    def _answers(pipes):
        answers, deadline = {}, time.monotonic() + time_limit()
        while len(answers) < len(pipes):
            waiting = [pipe for pipe in pipes if pipe not in answers]
            ready = multiprocessing.connection.wait(waiting, timeout=deadline - time.monotonic())
            if not ready:
                raise TimeoutError(
                    f"{len(waiting)} of {len(pipes)} processes did not answer "
                    f"within {time_limit()} s"
                )
            for pipe in ready:
                good, answers[pipe] = pipe.recv()
                if not good:
                    raise Failed(answers[pipe])
        return [answers[pipe] for pipe in pipes]


def forked(size, function, *arguments):
    """Results of ``function(*arguments)`` in forks of this process, which form a world.

    What this process has imported need not be imported again.
    """
    context = multiprocessing.get_context("fork")
    store = os.path.join(tempfile.mkdtemp(), "store")
    pipes = []
    for rank in range(size):
        here, there = context.Pipe()
        process = context.Process(
            target=_forked, args=(rank, size, store, there, function, arguments), daemon=True
        )
        process.start()
        pipes.append(here)
    try:
        return Ranks._answers(pipes)
    finally:  # nobody leaves before all have answered
        for pipe in pipes:
            pipe.close()


def _forked(rank, size, store, pipe, function, arguments):
    limit = timedelta(seconds=time_limit())
    try:
        dist.init_process_group(
            "gloo", rank=rank, world_size=size, timeout=limit, store=dist.FileStore(store, size)
        )
        pipe.send((True, function(*arguments)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
    pipe.poll(None)
