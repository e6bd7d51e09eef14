"""Rows on disk: each is a line of JSON, which is synced before the run goes on.

Whatever happens to the run, the lines written before stay readable: a line that does not fit on the
disk is taken back, and signals wait until a line is whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """Read the rows of a file, none where there is no file; leave out a line that was cut off."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


@contextlib.contextmanager
def handled(handler: Any, *numbers: int) -> Iterator[None]:
    """Handle signals with ``handler`` within the context."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interrupting() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM and SIGINT raise KeyboardInterrupt(number) within the context.

    What Ctrl-C ends in order, such as child processes, then ends in the same way after a SIGTERM.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    return handled(interrupt, signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let SIGTERM and SIGINT wait until the end of the context.

    A signal mask is not enough: another thread would take the signal, and this thread would still
    run its handler.
    """
    arrived: list[int] = []
    try:
        with handled(lambda number, frame: arrived.append(number), signal.SIGTERM, signal.SIGINT):
            yield
    finally:
        for number in arrived:
            signal.raise_signal(number)


def strict(value: Any) -> Any:
    """Replace infinities and NaN, which JSON does not have, by their names."""
    if isinstance(value, dict):
        return {key: strict(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def append(file: Path, row: Row) -> None:
    """Append a row to a file and sync it; after an OSError the file is as it was.

    A pipe or a device, such as /dev/null, cannot be synced.
    """
    data = json.dumps(strict(row)).encode() + b"\n"
    with signals_held():
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            about = os.fstat(descriptor)
            size = about.st_size
            # an earlier run may have been killed within a line
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                if stat.S_ISREG(about.st_mode):
                    os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):  # a device has no size to go back to
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yield a path to write to; its file replaces ``file`` at the end of the context."""
    partial = file.with_suffix(".partial")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


class Journal:
    """The rows of a run, in memory and in a file.

    Attributes:
        rows: the rows of this run.
        earlier: the rows that the file held before.
        lost: a message for each row or file that could not be written.
    """

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        self.file, self.say = file, say
        self.rows: list[Row] = []
        self.earlier = read(file)
        self.lost: list[str] = []

    def add(self, row: Row) -> None:
        """Keep a row; if the disk does not take it, print it."""
        with signals_held():  # a signal's exception would keep a row in one of the two places
            if not self.attempt(self.file.name, lambda: append(self.file, row)):
                self.say(json.dumps(strict(row)))
            self.rows.append(row)

    def attempt(self, what: str, write: Callable[[], Any]) -> bool:
        """Return whether ``write`` succeeds; report and keep an OSError, such as a full disk."""
        try:
            write()
        except OSError as error:
            self.lost.append(f"{what} could not be written: {error.strerror or error}")
            self.say(self.lost[-1])
            return False
        return True
