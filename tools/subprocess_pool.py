"""Runs tasks in child processes, so that a crash, a hang or a broken CUDA context costs one task and not the run.

A task is a generator function, named "module:function", that yields rows (dicts). Rows arrive as they are made; what went
wrong arrives as a row too, with ``status`` "error", "crashed" or "timeout".
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A call of a generator function with keyword arguments; ``about`` goes into the rows that the task cannot write."""

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    about: Row = field(default_factory=dict)
    limit: float = 60.0  # seconds


def rows_of(task: Task) -> Iterator[Row]:
    """The task's rows; an exception becomes the last of them."""
    try:
        module, _, function = task.function.partition(":")
        yield from getattr(importlib.import_module(module), function)(**task.arguments)
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)[-1]
        yield {
            **task.about, "status": "error", "error": f"{type(error).__name__}: {str(error)[:600]}",
            "where": f"{os.path.basename(trace.filename)}:{trace.lineno}",
        }  # fmt: skip


def device_is_broken() -> bool:
    """Whether an earlier error (an illegal address, say) has left this process without a working CUDA context."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def serve(connection: Connection, log: str) -> None:
    """The child: answers each task with its rows, then with whether it can go on; ends if not, or when its parent is gone."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):  # compilers and libraries write there
        os.dup2(descriptor, stream)
    try:
        while True:
            for row in rows_of(connection.recv()):
                connection.send(row)
            usable = not device_is_broken()
            connection.send(usable)
            if not usable:
                return
    except (EOFError, BrokenPipeError):
        return


class _Worker:
    def __init__(self, log: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, log), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.expires = float("inf")
        self.fresh = True

    def start(self, task: Task, startup: float) -> None:
        self.task = task
        self.expires = time.monotonic() + task.limit + (startup if self.fresh else 0.0)
        self.fresh = False
        self.connection.send(task)

    def stop(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.connection.close()


class Pool:
    """``size`` child processes; 0 runs the tasks in this one, without protection or time limits."""

    startup = 60.0  # more seconds for the first task of a process, which imports torch and opens the device

    def __init__(self, size: int, log: str) -> None:
        self.size, self.log = size, log
        self.workers: list[_Worker] = []

    def run(self, tasks: Iterable[Task], until: float, emit: Callable[[Row], None]) -> bool:
        """Runs tasks in their order while ``time.monotonic() < until``, handing every row to ``emit``.

        Tasks under way at ``until`` are ended ("unfinished"). Returns whether all tasks were run to their end.
        """
        if self.size == 0:
            for task in tasks:
                if time.monotonic() >= until:
                    return False
                for row in rows_of(task):
                    emit(row)
            return True
        queue = iter(tasks)
        waiting = next(queue, None)
        while True:
            now = time.monotonic()
            if now >= until:
                busy = [worker for worker in self.workers if worker.task]
                for worker in busy:
                    emit({**worker.task.about, "status": "unfinished"})
                    self._drop(worker)
                return waiting is None and not busy
            while waiting and (worker := self._idle()):
                try:
                    worker.start(waiting, self.startup)
                except OSError as error:  # it has ended since its last task
                    emit({**waiting.about, "status": "crashed", "error": str(error)})
                    self._drop(worker)
                waiting = next(queue, None)
            busy = [worker for worker in self.workers if worker.task]
            if not busy:
                return True
            first = min([until, *(worker.expires for worker in busy)])
            ready = wait([worker.connection for worker in busy], timeout=max(0.0, first - now))
            for worker in busy:
                if worker.connection in ready:
                    self._receive(worker, emit)
                elif time.monotonic() >= worker.expires:
                    emit({**worker.task.about, "status": "timeout", "error": f"not done in {worker.task.limit:.0f} s"})
                    self._drop(worker)

    def _idle(self) -> _Worker | None:
        """A worker without a task; a new one if there are fewer than wanted."""
        for worker in self.workers:
            if worker.task is None:
                return worker
        if len(self.workers) == self.size:
            return None
        self.workers.append(_Worker(self.log))
        return self.workers[-1]

    def _receive(self, worker: _Worker, emit: Callable[[Row], None]) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(10)
            emit({**worker.task.about, "status": "crashed", "error": f"the process ended with {worker.process.exitcode}"})
            self._drop(worker)
            return
        if isinstance(message, dict):
            emit(message)
        elif message:
            worker.task = None
        else:
            self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.stop()

    def close(self) -> None:
        for worker in list(self.workers):
            self._drop(worker)
