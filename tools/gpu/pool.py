"""A child process for each task, so that a crash, a hang or a broken CUDA context costs one item.

A task calls a generator function, named "module:function", for each of its items in turn. The
generator yields rows (dicts), which arrive as they are made. Failures arrive as rows too, with
``status`` "error", "crashed" or "timeout"; a new child goes on with the items after the one that
failed. Children are forked from a server that has imported everything and has never seen a device.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from multiprocessing import connection
from typing import Any

from .journal import Row

#: What the server imports before it forks, as far as it is installed.
PRELOADED = [
    "torch",
    "tools.gpu.ahead",
    "tools.gpu.checks",
    "tools.gpu.sweeps",
    "tools.gpu.timings",
    "tools.gpu.tuning",
    "tools.gpu.warm",
]
#: Seconds that a child may take to begin.
STARTUP = 30.0
#: Messages of a child beside rows: it begins; an item is done; the process can do no more.
BEGUN, NEXT, BROKEN = "begun", "next", "broken"


@dataclass(frozen=True)
class Task:
    """Calls of a generator function in one process.

    Attributes:
        function: "module:function", called as function(item, **arguments).
        items: what it is called with in turn; dataclasses or dicts.
        arguments: keyword arguments.
        about: columns of the rows that report a failure, beside those of the item.
        limit: seconds that the child may take from one message to the next.
        startup: predicted seconds until the first item begins.
        predicted: predicted seconds of each item.
        environment: variables that are set in the child.
    """

    function: str
    items: tuple[Any, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    about: Row = field(default_factory=dict)
    limit: float = 15.0
    startup: float = 1.0
    predicted: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)

    def row(self, **found: Any) -> Row:
        """A row about the first item that is left."""
        item = self.items[0]
        return {**self.about, **(asdict(item) if is_dataclass(item) else item), **found}

    def rest(self) -> Task | None:
        """The task after its first item."""
        return replace(self, items=self.items[1:]) if len(self.items) > 1 else None


@dataclass
class Lane:
    """Tasks in their order, and how many of them run side by side."""

    tasks: deque[Task]
    size: int = 1

    @property
    def seconds(self) -> float:
        """Predicted time of all tasks."""
        each = (task.startup + task.predicted * len(task.items) for task in self.tasks)
        return sum(each) / self.size


# --- in the child ---------------------------------------------------------------------------------


def rows_of(task: Task) -> Iterator[Row]:
    """Yield the rows of the first item; an exception becomes the last row."""
    try:
        module, _, function = task.function.partition(":")
        yield from getattr(importlib.import_module(module), function)(
            task.items[0], **task.arguments
        )
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(trace.filename)}:{trace.lineno}"
        text = f"{type(error).__name__}: {str(error)[:600]}"
        yield task.row(status="error", error=text, where=where)


def broken_device() -> str | None:
    """Why the CUDA context serves no longer, for instance after an illegal address."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).partition("\n")[0]
    return None


def open_device(device: str | None) -> None:
    """Open the GPU, which takes seconds where many processes do; the watchdog begins after it."""
    if device == "cuda":
        import torch

        # what is wrong will be told by the first item
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.zeros(1, device=device)
            torch.cuda.synchronize()


def serve(pipe: connection.Connection, task: Task, log: str) -> None:
    """Run a task; end after its last item, or when the device is broken or the parent gone."""
    with contextlib.suppress(OSError):  # without a log, output goes where the parent's goes
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):  # output of compilers and libraries
            os.dup2(descriptor, stream)
    os.environ.update(task.environment)
    open_device(task.arguments.get("device"))
    with contextlib.suppress(EOFError, BrokenPipeError):
        pipe.send(BEGUN)
        while task is not None:
            failed = False
            for row in rows_of(task):
                failed = row.get("status") == "error"
                pipe.send(row)
            if why := broken_device():
                if not failed:
                    why = f"the device is broken after the last row: {why}"
                    pipe.send(task.row(status="error", error=why))
                pipe.send(BROKEN)
                return
            pipe.send(NEXT)
            task = task.rest()


class Child:
    """The process of a task."""

    def __init__(self, task: Task, log: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, task, log), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """The next message; EOFError if there will be none."""
        return self.connection.recv()

    def kill(self) -> None:
        self.process.kill()
        self.connection.close()

    def ended_with(self) -> int | None:
        self.process.join(2)
        return self.process.exitcode


# --- in the parent --------------------------------------------------------------------------------


@dataclass
class _Running:
    child: Any
    task: Task
    lane: Lane
    expires: float


class Pool:
    """Runs lanes of tasks until a time.

    Args:
        log: file to which children print.
        clock: seconds, as `time.monotonic`.
        wait: as `multiprocessing.connection.wait`.
        start: starts the child of a task, as `Child`.
    """

    def __init__(
        self,
        log: str,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[..., list] = connection.wait,
        start: Callable[[Task, str], Any] = Child,
    ) -> None:
        self.log, self.clock, self.wait, self.start = log, clock, wait, start
        self.running: list[_Running] = []

    def run(
        self, lanes: list[Lane], until: float, emit: Callable[[Row], None]
    ) -> list[tuple[Task, str]]:
        """Run the tasks; ``emit`` gets every row.

        Returns:
            The tasks whose items were not begun, with the reason. A running item is "unfinished"
            at the time ``until``.
        """
        self.emit, left = emit, []
        while (now := self.clock()) < until:
            for lane in lanes:
                self._fill(lane, until, left)
            if not self.running:
                return left
            first = min([until, *(r.expires for r in self.running)])
            ready = self.wait([r.child.connection for r in self.running], max(0.0, first - now))
            for r in list(self.running):
                if r.child.connection in ready:
                    self._receive(r)
                elif self.clock() >= r.expires:
                    self._fail(r, "timeout", f"no row within {r.task.limit:.0f} s")
        for r in list(self.running):
            rest = self._end(r)
            emit(r.task.row(status="unfinished", error="its time was up"))
            left += [(rest, "the task's time was up")] if rest else []
        for lane in lanes:
            left += [(task, "the phase's time was up") for task in lane.tasks]
            lane.tasks.clear()
        return left

    def close(self) -> None:
        """Kill what is running."""
        for r in list(self.running):
            self._end(r)

    def _fill(self, lane: Lane, until: float, left: list[tuple[Task, str]]) -> None:
        """Start what fits into the time and the lane."""
        while lane.tasks and sum(r.lane is lane for r in self.running) < lane.size:
            task, time_left = lane.tasks.popleft(), until - self.clock()
            needed = task.startup + task.predicted
            if needed > time_left:
                left.append((task, f"needs about {needed:.1f} s of the {time_left:.1f} s left"))
                continue
            try:
                child = self.start(task, self.log)
            except (OSError, EOFError) as error:
                self.emit(task.row(status="crashed", error=f"no process: {error}"))
                if rest := task.rest():
                    lane.tasks.appendleft(rest)
                continue
            self.running.append(_Running(child, task, lane, self.clock() + STARTUP))

    def _receive(self, r: _Running) -> None:
        try:
            message = r.child.receive()
        except (EOFError, OSError):
            return self._fail(r, "crashed", f"the process ended with {r.child.ended_with()}")
        r.expires = self.clock() + r.task.limit
        if isinstance(message, dict):
            self.emit(message)
        elif message == BROKEN:
            self._resume(r)
        elif message == NEXT:
            rest = r.task.rest()
            if rest is None:
                self._end(r)
            else:
                r.task = rest
        return None

    def _fail(self, r: _Running, status: str, error: str) -> None:
        self.emit(r.task.row(status=status, error=error))
        self._resume(r)

    def _resume(self, r: _Running) -> None:
        """End a child; a new one will go on after its item."""
        if rest := self._end(r):
            r.lane.tasks.appendleft(rest)

    def _end(self, r: _Running) -> Task | None:
        """Kill a child; return what it has not begun."""
        self.running.remove(r)
        r.child.kill()
        return r.task.rest()
