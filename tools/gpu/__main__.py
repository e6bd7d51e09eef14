"""Run one of the two calls: `python -m tools.gpu --call 1 --out dir`.

The folder gets rows.jsonl, summary.txt, plots.png, children.log, cache.tar.gz (the compiled
kernels) and tuned.json. The exit status is 1 if one of the package's engines fails anywhere, if no
GPU backend has a right result on a GPU, or if something could not be written; it is 143 after
SIGTERM. Times are for loss + gradient. Fractions are relative to the rate of an 8192³ GEMM of the
same dtype in the same process, and count 4n²D operations (8N²D in cross_view).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import torch

from alphacl_fast.benchmarks.report import one_line
from alphacl_fast.journal import Journal, Row, read
from alphacl_fast.subprocess_pool import Lane, Pool

from . import BEGIN, ahead, calls, schedule, summary
from .calls import CALLS, SECONDS, Session

#: Seconds that plots may take; they can be drawn later with --plots.
PLOTTING = 5
#: Failures that are printed as they happen, before they fill the screen.
MOST_SHOWN = 12


def main(arguments: list[str] | None = None, begin: float | None = None) -> int:
    """Run the command and return its exit status.

    Its time counts from ``begin``, a value of `time.monotonic`; by default, from now.
    """
    begin = time.monotonic() if begin is None else begin
    args = parsed(arguments)
    if args.plots is not None:
        print(summary.draw(args.plots))
        return 0
    with tempfile.TemporaryDirectory(prefix="alphacl-gpu-", ignore_cleanup_errors=True) as cache:
        if args.dry_run:
            return dry_run(args, Path(cache))
        args.out.mkdir(parents=True, exist_ok=True)
        return Run(args, Path(cache), begin).perform()


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    about = "Check, tune and measure on a GPU."
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=about)
    add = parser.add_argument
    add("--call", type=int, choices=CALLS, default=1, help="1: correctness; 2: speed (default: 1)")
    add("--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder of the results")
    add("--cache", type=Path, help="folder of an earlier call: kernels and rows (default: --out)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script out")
    add("--workers", type=int, default=calls.default_workers(), help="processes side by side")
    add("--dry-run", action="store_true", help="print the plan; needs no GPU")
    add("--compile", action="store_true", help="only compile the call's kernels; needs no GPU")
    add("--plots", type=Path, metavar="DIR", help="only draw the plots of an earlier run")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    offline = args.dry_run or args.compile or args.plots is not None
    if args.device == "cuda" and not offline and not torch.cuda.is_available():
        parser.error(
            "--device must be a device that PyTorch sees, got cuda on a machine without a GPU "
            "(or its driver)"
        )
    return args


# --- a run ----------------------------------------------------------------------------------------


class Run:
    """Carries out a call with its session, pool and journal."""

    def __init__(self, args: argparse.Namespace, cache: Path, begin: float) -> None:
        self.args, self.begin = args, begin
        self.notes: list[str] = []
        self.shown = 0
        self.journal = Journal(args.out / "rows.jsonl", self.say)
        given = args.cache or args.out
        self.session = Session(
            args.out, cache, args.device, args.workers,
            read(given / "rows.jsonl"), self.journal.attempt,
        )  # fmt: skip
        self.take_over(given / "cache.tar.gz")
        self.pool = Pool(str(args.out / "children.log"), preload="tools.gpu.warm")

    def take_over(self, archive: Path) -> None:
        """Use the kernels that an earlier call compiled."""
        if not archive.exists():
            return
        try:
            kernels = ahead.unpack(archive, self.session.cache)
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            self.say(f"{archive} cannot be used: {error}", keep=True)
        else:
            self.say(f"{kernels} compiled kernels taken from {archive}", keep=True)

    def seconds(self) -> float:
        """Return the seconds since the call's begin."""
        return time.monotonic() - self.begin

    def say(self, line: str, keep: bool = False) -> None:
        """Print a line with the time; ``keep`` adds it to the summary."""
        self.notes += [line] if keep else []
        print(f"[{self.seconds():5.0f} s] {line}", flush=True)

    def add(self, row: Row) -> None:
        at = {"call": self.args.call, "at_s": round(self.seconds(), 2)}
        self.journal.add({**at, **row})
        failed = summary.failure(row)
        self.shown += failed
        if summary.told(row) or (failed and self.shown <= MOST_SHOWN):
            self.say(one_line(row)[:240])

    def perform(self) -> int:
        """Run the phases; whatever ends them, the summary and the archive are written."""
        stop = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            plan = compiling if self.args.compile else CALLS[self.args.call]
            phases = plan(self.session)
            schedule.perform(phases, self.pool, self.begin, self.add)
            self.judge()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is left takes a second
            self.pool.close()
            self.finish()
            signal.signal(signal.SIGTERM, stop)
        return int(any(map(summary.failure, self.journal.rows)) or bool(self.journal.lost))

    def judge(self) -> None:
        """Add a failure if a GPU was there and none of its backends has a right result."""
        wanted = self.args.device == "cuda" and not self.args.compile
        if wanted and not summary.right_on_gpu(self.journal.rows):
            error = "neither triton nor cuda has a right result"
            self.add({"benchmark": "device", "status": "failed", "error": error})

    def finish(self) -> None:
        """Write the archive, the summary and the plots."""
        self.session.save()
        notes = [*self.notes, *self.journal.lost]
        text = summary.text(self.journal.earlier, self.journal.rows, notes)
        file = self.args.out / "summary.txt"
        self.journal.attempt(file.name, lambda: file.write_text(text + "\n"))
        print("\n" + text, flush=True)
        if not self.args.compile and self.seconds() < SECONDS[self.args.call] - PLOTTING:
            with contextlib.suppress(Exception):  # plots can be drawn later, from the rows
                print(summary.draw(self.args.out))


def compiling(session: Session) -> list[schedule.Phase]:
    """Plan to compile call 1's kernels for the default machine, without a time limit."""
    assume_all(session)
    items = calls.items_of_call_1
    return [schedule.Phase("ahead", 1e6, lambda: calls.ahead(session, items(session)))]


# --- the plan -------------------------------------------------------------------------------------


def assume_all(session: Session) -> None:
    """Plan as if every engine served the device."""
    names = ("cpu", "blocked") if session.device == "cpu" else calls.ORDER
    session.refused = dict.fromkeys(names)


def dry_run(args: argparse.Namespace, cache: Path) -> int:
    """Print the phases of a call with their predicted begins, and their tasks."""
    earlier = read((args.cache or args.out) / "rows.jsonl")
    session = Session(
        args.out, cache, args.device, args.workers, earlier, lambda what, write: True
    )  # fmt: skip
    assume_all(session)
    begin = 0.0
    for phase in CALLS[args.call](session):
        lanes: list[Lane] = phase.plan()
        print("\n".join(schedule.lines(phase.name, lanes, begin, phase.until)))
        # a phase that is done early leaves its time to the next
        begin = min(phase.until, begin + max((lane.seconds for lane in lanes), default=0.0))
    print(f"{begin:5.0f}-{SECONDS[args.call]} s  summary and archive")
    return 0


def command(arguments: list[str] | None = None, begin: float | None = None) -> NoReturn:
    """Run `main` and end the process without destructors.

    A destructor that meets a broken CUDA context may hang.
    """
    try:
        status = main(arguments, begin)
    except SystemExit as stop:  # wrong arguments, or SIGTERM
        status = int(stop.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # the call checks compiled kernels
    command(begin=BEGIN)
