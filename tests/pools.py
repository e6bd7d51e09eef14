"""Stand-ins for what a `subprocess_pool.Pool` is given: children, and a clock."""

import functools
import itertools
import multiprocessing
import os
import sys
import time
from multiprocessing import connection
from types import SimpleNamespace

from conftest import WATCHDOG

from alphacl_fast import subprocess_pool


class Inline:
    """A child that is no process: it computes a row when the pool asks for it."""

    def __init__(self, task, log, preload):
        self.connection = self
        self.send(task)
        self.messages = itertools.chain([subprocess_pool.BEGUN], self.messages)

    def send(self, task):
        rows = subprocess_pool.rows_of(task.first())
        self.messages = itertools.chain(rows, [subprocess_pool.NEXT])

    def receive(self):
        return next(self.messages)

    def kill(self):
        self.messages = iter(())


#: A pool without processes.
InlinePool = functools.partial(
    subprocess_pool.Pool, wait=lambda children, timeout: children, start=Inline
)


def patient_pool(hangs):
    """A pool for real children, whose time passes only while one of them hangs.

    A child that hangs creates the file ``hangs`` first. So no limit ends a child that is only slow.
    """
    now = 0.0

    def wait(connections, timeout):
        nonlocal now
        end = time.monotonic() + WATCHDOG
        while time.monotonic() < end:
            hanging = hangs.exists()  # asked first: what the child sent before is ready then
            if ready := connection.wait(connections, 0.01):
                return ready
            if hanging:
                hangs.unlink()
                now += timeout
                return []
        raise TimeoutError(f"no child sent anything or created {hangs}")

    return functools.partial(subprocess_pool.Pool, clock=lambda: now, wait=wait)


def start(function, folder, *arguments):
    """Starts a function in a process that a server forks, which has imported everything already.

    The pools of the process fork their children too. ``folder`` has modules that they import, and
    gets the output of the process in the files stdout and stderr.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.gpu.warm"])
    process = context.Process(target=_forked, args=(function, folder, *arguments))
    process.start()
    return SimpleNamespace(
        poll=lambda: process.exitcode,
        kill=process.kill,
        terminate=process.terminate,
        wait=lambda: process.join(WATCHDOG) or process.exitcode,
        stderr=None,
    )


def _forked(function, folder, *arguments):
    sys.path.insert(0, str(folder))
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda kind: fork
    subprocess_pool.STARTUP = WATCHDOG
    status = function(folder, *arguments)
    sys.stdout.flush()
    sys.exit(status)
