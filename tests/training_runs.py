"""Training runs in tests: what they wrote, and runs in forks of this process, also as ranks."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback

import torch
from conftest import watchdog
from ranks import forked

from alphacl_fast.train import train


def rows(out):
    """The rows of a run's log."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def state_of(out):
    """A run's checkpoint."""
    return torch.load(out / "checkpoint.pt", weights_only=True)


def train_on_ranks(count, config, out):
    """Trains in forks of this process, which form a group."""
    forked(count, _train, config, out)


def _train(config, out):
    train(config, out)  # its outcome stays in the process


class Fork:
    """A fork of this process, in a session of its own, that exits with what ``command()`` returns.

    What this process has imported need not be imported again. It has the signal handlers that a
    new process has, and its standard error is kept.
    """

    def __init__(self, command):
        self.stderr, self.code = tempfile.TemporaryFile("w+"), None  # noqa: SIM115 - as Popen's
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            os.dup2(self.stderr.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            code = command()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def poll(self):
        """The exit code, negative for a signal; None while the fork runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def ended(self):
        """Wait for its end, and return what it wrote to standard error."""
        with watchdog(self):
            while self.poll() is None:
                time.sleep(0.005)
        self.stderr.seek(0)
        return self.stderr.read()

    def kill(self):
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
