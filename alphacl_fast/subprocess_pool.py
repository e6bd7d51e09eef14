"""Run tasks in child processes, so that a crash, a hang or a broken CUDA context costs one item.

A task calls a generator function, named "module:function", for each of its items in turn. The
generator yields rows (dicts), which arrive as they are made. Failures arrive as rows too, with
``status`` "error", "crashed" or "timeout"; a new child goes on with the items after the one that
failed. Children ignore Ctrl-C, which a terminal sends to them too; their parent ends them.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from multiprocessing import connection
from typing import Any

from .journal import Row, handled

#: Seconds that a child may take to begin, which includes the import of torch.
STARTUP = 60.0
#: What a child sends besides rows: it begins; an item is done; its device is broken.
BEGUN, NEXT, BROKEN = "begun", "next", "broken"


@dataclass(frozen=True)
class Task:
    """Calls of a generator function in one process.

    Attributes:
        function: "module:function", called as function(item, **arguments).
        items: the arguments of the calls, one after the other; dataclasses or dicts.
        arguments: keyword arguments; a GPU named "device" is opened before the first item.
        about: columns that the row of a failure gets in addition to the item's own.
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
        """Make a row about the first item."""
        item = self.items[0]
        return {**self.about, **(asdict(item) if is_dataclass(item) else item), **found}

    def first(self) -> Task:
        """Make a task of the first item alone."""
        return replace(self, items=self.items[:1])

    def rest(self) -> Task | None:
        """Make a task of the items after the first, None if there are none."""
        return replace(self, items=self.items[1:]) if len(self.items) > 1 else None


@dataclass
class Lane:
    """A queue of tasks.

    Attributes:
        tasks: the tasks that no child has begun.
        size: how many run side by side.
        reuse: whether a child that is done takes the lane's next task.
        skip: tells whether to leave out a task's first item; it is asked when the task's turn
            comes.
    """

    tasks: deque[Task]
    size: int = 1
    reuse: bool = False
    skip: Callable[[Task], bool] = lambda task: False

    @property
    def seconds(self) -> float:
        """The predicted time of all tasks."""
        each = (task.startup + task.predicted * len(task.items) for task in self.tasks)
        return sum(each) / self.size


def cores() -> int:
    """Count the cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def broken_device(device: str) -> str | None:
    """Return why the task's GPU serves no longer, for instance after an illegal address.

    A task that names no GPU may have used the current one.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize(device if device.startswith("cuda") else None)
    except Exception as error:
        return str(error).partition("\n")[0]
    return None


def open_device(device: str) -> None:
    """Open the GPU, before the watchdog begins: with many processes it takes seconds."""
    if device.startswith("cuda"):
        import torch

        # the first item will report what is wrong
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.zeros(1, device=device)
            torch.cuda.synchronize(device)


def serve(pipe: connection.Connection, task: Task, log: str) -> None:
    """Run one item after the other until the device is broken or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a server may have been started without that
    with contextlib.suppress(OSError):  # without a log, output goes where the parent's goes
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):  # output of compilers and libraries
            os.dup2(descriptor, stream)
    os.environ.update(task.environment)
    open_device(task.arguments.get("device", ""))
    with contextlib.suppress(EOFError, OSError):
        pipe.send(BEGUN)
        while True:
            failed = False
            for row in rows_of(task):
                failed = row.get("status") == "error"
                pipe.send(row)
            if why := broken_device(task.arguments.get("device", "")):
                if not failed:
                    why = f"the device is broken after the last row: {why}"
                    pipe.send(task.row(status="error", error=why))
                pipe.send(BROKEN)
                return
            pipe.send(NEXT)
            task = pipe.recv()


class Child:
    """A process that begins with the first item of a task.

    Args:
        task: its first task.
        log: the file that gets its output.
        preload: a module that a server imports once before it forks every child; None makes a new
            interpreter of each child, and so does a system that has no such server.
    """

    def __init__(self, task: Task, log: str, preload: str | None) -> None:
        served = preload and "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if served else "spawn")
        if served:
            context.set_forkserver_preload([preload])
        self.connection, theirs = context.Pipe()
        arguments = theirs, task.first(), log
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        with handled(signal.SIG_IGN, signal.SIGINT):  # which the child inherits
            self.process.start()
        theirs.close()

    def send(self, task: Task) -> None:
        """Let it go on with the first item of a task."""
        self.connection.send(task.first())

    def receive(self) -> Any:
        """Return the next message; raise EOFError if there will be none."""
        return self.connection.recv()

    def kill(self) -> None:
        self.process.kill()
        self.connection.close()

    def end(self) -> str:
        """Tell how the process ended."""
        self.process.join(2)
        code = self.process.exitcode
        if code is None:
            return "the process closed its connection and did not end"
        if code < 0:
            return f"the process was killed by {signal.Signals(-code).name}"
        return f"the process ended with {code}"


# --- in the parent --------------------------------------------------------------------------------


@dataclass
class _Running:
    child: Any
    task: Task
    lane: Lane
    expires: float
    begun: bool = False

    def ended(self) -> str:
        """Tell how the child ended, and whether it had begun."""
        return self.child.end() + ("" if self.begun else " before it began")

    def overdue(self) -> str:
        """Tell what the child did not do in time."""
        if self.begun:
            return f"no row within {self.task.limit:.0f} s"
        return f"the process did not begin within {STARTUP:.0f} s"


class Pool:
    """Runs lanes of tasks until a given time.

    Args:
        log: the file that gets the output of children.
        preload: the argument of `Child`.
        clock: returns seconds, as `time.monotonic` does.
        wait: waits for connections, as `multiprocessing.connection.wait` does.
        start: starts a child, as `Child` does.
    """

    def __init__(
        self,
        log: str,
        preload: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[..., list] = connection.wait,
        start: Callable[[Task, str, str | None], Any] = Child,
    ) -> None:
        self.log, self.preload = log, preload
        self.clock, self.wait, self.start = clock, wait, start
        self.running: list[_Running] = []

    def run(
        self, lanes: list[Lane], until: float, emit: Callable[[Row], None]
    ) -> list[tuple[Task, str]]:
        """Run the tasks; ``emit`` gets every row.

        Returns:
            The tasks whose items were not begun, with the reason. An item that still runs at the
            time ``until`` gets a row with the status "unfinished".
        """
        self.until, self.emit, self.left = until, emit, []
        while self.clock() < until:
            for lane in lanes:
                self._fill(lane)
            if not self.running:
                return self.left
            first = min([until, *(r.expires for r in self.running)])
            # starting children took time, so the clock is read again
            seconds = max(0.0, first - self.clock())
            ready = self.wait([r.child.connection for r in self.running], seconds)
            for r in list(self.running):
                if r.child.connection in ready:
                    self._receive(r)
                elif self.clock() >= r.expires:
                    self._fail(r, "timeout", r.overdue())
        for r in list(self.running):
            rest = self._end(r)
            emit(r.task.row(status="unfinished", error="its time was up"))
            self.left += [(rest, "the task's time was up")] if rest else []
        for lane in lanes:
            self.left += [(task, "the time was up") for task in lane.tasks]
            lane.tasks.clear()
        return self.left

    def close(self) -> None:
        """Kill what is running."""
        for r in list(self.running):
            self._end(r)

    def _take(self, lane: Lane) -> Task | None:
        """Take the lane's next task that is not to be skipped and fits into the time."""
        while lane.tasks:
            task, time_left = lane.tasks.popleft(), self.until - self.clock()
            needed = task.startup + task.predicted
            if lane.skip(task):
                self.emit(task.row(status="left out"))
                lane.tasks.extendleft(filter(None, [task.rest()]))
            elif needed > time_left:
                why = f"needs about {needed:.1f} s of the {time_left:.1f} s left"
                self.left.append((task, why))
            else:
                return task
        return None

    def _fill(self, lane: Lane) -> None:
        """Start children until as many run side by side as the lane allows."""
        while sum(r.lane is lane for r in self.running) < lane.size and (task := self._take(lane)):
            try:
                child = self.start(task, self.log, self.preload)
            except (OSError, EOFError) as error:
                self.emit(task.row(status="crashed", error=f"no process: {error}"))
                lane.tasks.extendleft(filter(None, [task.rest()]))
            else:
                self.running.append(_Running(child, task, lane, self.clock() + STARTUP))

    def _receive(self, r: _Running) -> None:
        try:
            message = r.child.receive()
            if message == NEXT:
                return self._go_on(r)
        except (EOFError, OSError):
            return self._fail(r, "crashed", r.ended())
        r.begun = True  # every child's first message says so
        r.expires = self.clock() + r.task.limit
        if isinstance(message, dict):
            self.emit(message)
        elif message == BROKEN:
            self._resume(r)
        return None

    def _go_on(self, r: _Running) -> None:
        """Give a child its next item, or end it."""
        task = r.task.rest() or (self._take(r.lane) if r.lane.reuse else None)
        if task is None:
            self._end(r)
            return
        r.task, r.expires = task, self.clock() + task.limit
        r.child.send(task)

    def _fail(self, r: _Running, status: str, error: str) -> None:
        self.emit(r.task.row(status=status, error=error))
        self._resume(r)

    def _resume(self, r: _Running) -> None:
        """End a child; a new one will go on after its item."""
        r.lane.tasks.extendleft(filter(None, [self._end(r)]))

    def _end(self, r: _Running) -> Task | None:
        """Kill a child; return what it has not begun."""
        self.running.remove(r)
        r.child.kill()
        return r.task.rest()
