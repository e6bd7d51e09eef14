"""Run tasks in subprocesses, so that a crash, a hang or a broken CUDA context costs one task only.

A task is a generator function, named "module:function", that yields rows (dicts). Rows arrive as
they are produced. Failures arrive as rows too, with ``status`` "error", "crashed" or "timeout".
Children ignore Ctrl-C, which a terminal sends to them too: their parent ends them.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A call of a generator function."""

    function: str  # "module:function"
    arguments: dict[str, Any] = field(default_factory=dict)  # keyword arguments
    about: Row = field(default_factory=dict)  # columns of the rows that report a failure
    limit: float = 60.0  # seconds


def rows_of(task: Task) -> Iterator[Row]:
    """Yield the task's rows; an exception becomes the last row."""
    try:
        module, _, function = task.function.partition(":")
        yield from getattr(importlib.import_module(module), function)(**task.arguments)
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:600]}"
        where = f"{os.path.basename(trace.filename)}:{trace.lineno}"
        yield {**task.about, "status": "error", "error": text, "where": where}


def device_is_broken() -> bool:
    """Whether an earlier error, such as an illegal address, has broken the CUDA context."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def serve(connection: Connection, log: str) -> None:
    """Serve tasks in the child process.

    Each task is answered with None once it begins, with its rows, then with whether the process is
    still usable. The process ends if it is not, or when its parent is gone.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):  # output of compilers and libraries goes to the log
        os.dup2(descriptor, stream)
    try:
        while True:
            task = connection.recv()
            connection.send(None)
            for row in rows_of(task):
                connection.send(row)
            usable = not device_is_broken()
            connection.send(usable)
            if not usable:
                return
    except (EOFError, BrokenPipeError):
        return


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process that starts within the context ignores Ctrl-C from its first instruction on."""
    if threading.current_thread() is not threading.main_thread():  # which alone may change signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_of(process: multiprocessing.process.BaseProcess) -> str:
    """How a process ended."""
    code = process.exitcode
    if code is not None and code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    return f"the process ended with {code}"


class _Worker:
    def __init__(self, log: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, log), daemon=True)
        with _interrupts_ignored():
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
    """A pool of ``size`` child processes; 0 runs tasks in this one, unprotected and unlimited."""

    startup = 60.0  # seconds for a new process to import torch, before the limit of its task begins

    def __init__(self, size: int, log: str) -> None:
        self.size, self.log = size, log
        self.workers: list[_Worker] = []

    def run(self, tasks: Iterable[Task], until: float, emit: Callable[[Row], None]) -> bool:
        """Run tasks in order, until a deadline.

        Args:
            tasks: may be a generator; a task is taken once a process is idle, and no earlier.
            until: deadline on the clock `time.monotonic`; running tasks are then killed, and
                reported as "unfinished".
            emit: receives every row.

        Returns:
            Whether all tasks ran to their end.
        """
        if self.size == 0:
            for task in tasks:
                if time.monotonic() >= until:
                    return False
                for row in rows_of(task):
                    emit(row)
            return True
        queue, more = iter(tasks), True
        while True:
            now = time.monotonic()
            if now >= until:
                busy = self._busy()
                for worker in busy:
                    self._fail(worker, emit, "unfinished")
                return not (more or busy)
            while more and len(self._busy()) < self.size:
                task = next(queue, None)
                more = task is not None
                if more:
                    self._start(task, emit)
            busy = self._busy()
            if not busy:
                return True
            first = min([until, *(worker.expires for worker in busy)])
            ready = wait([worker.connection for worker in busy], timeout=max(0.0, first - now))
            for worker in busy:
                if worker.connection in ready:
                    self._receive(worker, emit)
                elif time.monotonic() >= worker.expires:
                    self._fail(
                        worker, emit, "timeout", error=f"not done in {worker.task.limit:.0f} s"
                    )

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.task]

    def _start(self, task: Task, emit: Callable[[Row], None]) -> None:
        """Give a task to a worker without one, which is a new one if all are busy."""
        worker = next((worker for worker in self.workers if worker.task is None), None)
        if worker is None:
            worker = _Worker(self.log)
            self.workers.append(worker)
        try:
            worker.start(task, self.startup)
        except OSError as error:  # the process has ended since its last task
            self._fail(worker, emit, "crashed", error=str(error))

    def _receive(self, worker: _Worker, emit: Callable[[Row], None]) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(10)
            return self._fail(worker, emit, "crashed", error=_end_of(worker.process))
        if message is None:
            worker.expires = time.monotonic() + worker.task.limit
        elif isinstance(message, dict):
            emit(message)
        elif message:
            worker.task = None
        else:
            self._drop(worker)

    def _fail(self, worker: _Worker, emit: Callable[[Row], None], status: str, **why: str) -> None:
        """Report the worker's task as failed, and drop the worker."""
        emit({**worker.task.about, "status": status, **why})
        self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.stop()

    def close(self) -> None:
        for worker in list(self.workers):
            self._drop(worker)
