"""``alphacl check``: compare every usable backend with float64 on the machine at hand.

`accuracy` defines the checks and their tolerances. This module lists the cases, runs them in child
processes and prints a table of the outcome. The parent process never opens a GPU. A case that hangs
or crashes costs its own row and its process; the next case gets a new process.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from . import accuracy, ops
from .accuracy import (
    ARITHMETIC,
    CUSTOM,
    MEMBERS,
    MODES,
    REPRESENTATIVES,
    THROUGH,
    Case,
    has_tau_gradient,
)
from .functional import SIMILARITIES
from .journal import Journal, Row, interrupting
from .subprocess_pool import Lane, Pool, Task, cores

#: Small sizes. The pairs fill no tile, and the features fill no vector.
SMALL_PAIRS, SMALL_DIMS = (67, 33, 150), (20, 65, 130)
#: The large size: its pairs, by kind of device, and its features.
LARGE_PAIRS, LARGE_DIM = {"cpu": 2051, "cuda": 8197}, 128
#: After so many cases of a backend have hung or crashed, its other cases are left out.
MOST_LOST = 3
#: Failures that are printed in full.
MOST_SHOWN = 20
#: Status of a failed case → its name in the table.
BAD = {"failed": "failed", "error": "raised", "crashed": "crashed", "timeout": "timed out"}
NOT_RUN = ("unfinished", "left out")


class Place(NamedTuple):
    """Where cases run, and in which arithmetic."""

    device: str
    backend: str
    dtype: str  # a key of `accuracy.ARITHMETIC`

    @staticmethod
    def of(row: Row) -> Place:
        return Place(row["on"], row["backend"], row["dtype"])


# --- the cases ------------------------------------------------------------------------------------


def members(quick: bool) -> list[tuple[str, dict[str, Any]]]:
    """List one objective for each form of the sweeps if ``quick``.

    Otherwise list every objective, the variants that differentiate through α, and users' functions.
    """
    if quick:
        return REPRESENTATIVES
    chosen = [member for member in MEMBERS if member[1] in ({}, THROUGH)]
    return [*chosen, *((name, {}) for name in CUSTOM)]


def small_case(place: Place, member: int, mode: int, quick: bool) -> Case:
    """Make the case of a member (an index) in a mode; sizes and options take turns."""
    objective, options = members(quick)[member]
    negatives, symmetric = MODES[mode]
    turn = member + mode + list(ARITHMETIC).index(place.dtype)
    case = Case(
        place.backend,
        objective,
        tuple(options.items()),
        place.dtype,
        negatives,
        symmetric,
        similarity=SIMILARITIES[(turn + mode) % 3],
        reduction=("mean", "none")[turn % 2],
        pairs=SMALL_PAIRS[turn % 3],
        dim=SMALL_DIMS[turn % 3],
        learn_tau=turn // 2 % 2 == 1 and has_tau_gradient(objective, tuple(options.items())),
        runs=2,
    )
    assert case.sensible(), case
    return case


def large_case(place: Place, member: int) -> Case:
    """Make the case of a representative at the large size, each in a mode of its own."""
    objective, options = REPRESENTATIVES[member]
    negatives, symmetric = MODES[member % len(MODES)]
    return Case(
        place.backend,
        objective,
        tuple(options.items()),
        place.dtype,
        negatives,
        symmetric,
        pairs=LARGE_PAIRS[torch.device(place.device).type],
        dim=LARGE_DIM,
        runs=2,
        large=True,
    )


def cases(places: list[Place], quick: bool) -> Iterator[tuple[str, Case]]:
    """Yield (device, case), the most important objectives first.

    The large size comes after the representatives. There the backends that share a device and a
    dtype follow each other, so that their float64 results are computed once.
    """
    for member, (objective, options) in enumerate(members(quick)):
        for mode in range(len(MODES)):
            for place in places:
                case = small_case(place, member, mode, quick)
                yield place.device, case
                if not options and objective not in CUSTOM:
                    yield place.device, replace(case, nan=True, runs=1)
        if member == len(REPRESENTATIVES) - 1:
            by_arithmetic = sorted(places, key=lambda place: (place.device, place.dtype))
            for large in range(1 if quick else len(REPRESENTATIVES)):
                for place in by_arithmetic:
                    yield place.device, large_case(place, large)


# --- the outcome ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The outcome of the cases of one place."""

    statuses: Counter[str] = field(default_factory=Counter)
    #: (error, bound) of the result that came closest to its bound, for losses and for gradients.
    loss: tuple[float, float] = (0.0, math.inf)
    gradient: tuple[float, float] = (0.0, math.inf)

    def add(self, row: Row) -> None:
        self.statuses[row["status"]] += 1
        for name, (error, _, bound) in row.get("errors", {}).items():
            kind = "loss" if name == "loss" else "gradient"
            if not closeness(*getattr(self, kind)) > closeness(error, bound):
                setattr(self, kind, (error, bound))

    def verdict(self) -> str:
        parts = [f"{self.statuses[s]} {text}" for s, text in BAD.items() if self.statuses[s]]
        not_run = sum(self.statuses[status] for status in NOT_RUN)
        parts += [f"{not_run} not run"] if not_run else []
        return ", ".join(parts) or "ok"


def closeness(error: float, bound: float) -> float:
    """Divide an error by its bound; a NaN is farther off than any number."""
    return math.inf if math.isnan(error) else error / bound


def table(outcomes: dict[Place, Outcome]) -> Iterator[str]:
    """Yield the lines of a table with a row for each place."""
    heads = "device", "backend", "dtype", "cases", "loss error", "bound", "gradient error", "bound"
    line = "{:8} {:8} {:9} {:>6} {:>11} {:>8} {:>15} {:>8}  {}".format
    yield line(*heads, "verdict")
    for place, outcome in outcomes.items():
        run = sum(outcome.statuses[status] for status in ("ok", *BAD))
        errors = [
            "" if math.isinf(bound) else f"{x:.1e}"
            for error, bound in (outcome.loss, outcome.gradient)
            for x in (error, bound)
        ]
        yield line(*place, run, *errors, outcome.verdict())


def one_line(row: Row) -> str:
    """Describe a failed case in one line."""
    name = row["objective"] + "".join(f" {key}={value}" for key, value in row["options"])
    kind = "NaN" if row["nan"] else "large" if row["large"] else ""
    mode = row["negatives"] + ("" if row["symmetric"] else " one-sided")
    setting = (
        f"{mode}, {row['similarity']}, {row['reduction']}, {row['pairs']} pairs of {row['dim']}"
    )
    where = f"{row['backend']} on {row['on']}, {row['dtype']}"
    what = BAD[row["status"]] + (f" ({kind})" if kind else "")
    return f"{where}: {name} ({setting}): {what}: {row.get('error')}"


# --- a run ----------------------------------------------------------------------------------------


class Run:
    """The options of a run, and what it has found so far."""

    def __init__(self, given: argparse.Namespace, journal: Journal | None, module: str) -> None:
        self.given, self.journal, self.module = given, journal, module
        self.until = time.monotonic() + given.seconds
        self.outcomes: dict[Place, Outcome] = defaultdict(Outcome)
        self.served: list[Place] = []
        #: (backend, device) → reason → the dtypes or objectives that are not served.
        self.refused: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(dict)
        self.skipped: dict[str, None] = {}
        self.failures: list[str] = []
        self.lost: Counter[tuple[str, str]] = Counter()
        self.done = self.total = 0

    def write(self, row: Row) -> None:
        if self.journal is not None:
            self.journal.add(row)

    def serves(self, row: Row) -> None:
        """Take a row of `accuracy.serving`; after a failure the backend is not checked."""
        self.write(row)
        if row["status"] == "served":
            self.served.append(Place.of(row))
        elif row["status"] == "refused":
            self.refuse(row, row["dtype"])
        elif row["status"] in BAD:
            where = f"{row['backend']} on {row['on']}"
            self.failures.append(f"{where}: {BAD[row['status']]}: {row['error']}")

    def add(self, row: Row) -> None:
        """Take the row of a case."""
        self.done += 1  # first, because a signal takes effect once the row is written
        self.write(row)
        self.outcomes[Place.of(row)].add(row)
        if row["status"] in BAD:
            self.failures.append(one_line(row))
        if row["status"] in ("crashed", "timeout"):
            self.lost[row["on"], row["backend"]] += 1
        if row["status"] == "refused":
            self.refuse(row, row["objective"])
        if row["status"] == "skipped":
            where = f"{row['backend']} on {row['on']}, {row['dtype']}"
            self.skipped[f"{where}: the large size is skipped: {row['error']}"] = None
        self.show(f"{self.done} of {self.total} cases, {len(self.failures)} failures")

    def show(self, progress: str) -> None:
        """Replace the line of progress, where stderr is a terminal."""
        if sys.stderr.isatty():
            print(f"\r{progress:60}\r", end="", file=sys.stderr, flush=True)

    def refuse(self, row: Row, what: str) -> None:
        found = self.refused[row["backend"], row["on"]].setdefault(row["error"], [])
        if what not in found:
            found.append(what)

    def task(self, function: str, item: Any, device: str, benchmark: str) -> Task:
        about = {"benchmark": benchmark, "on": device}
        return Task(
            f"{self.module}:{function}", (item,), {"device": device}, about, self.given.limit, 0, 0
        )

    def keeps_failing(self, task: Task) -> bool:
        """Return whether too many cases of the task's backend have hung or crashed."""
        return self.lost[task.arguments["device"], task.items[0].backend] >= MOST_LOST

    def carry_out(self, devices: list[str], backends: list[str]) -> None:
        rows = self.given.json
        # a log can be written beside a regular file, but not beside /dev/stdout or a pipe
        log = f"{rows}.log" if rows and rows.is_file() else os.devnull
        # a run on a GPU spends most of its time compiling Triton's kernels, one core per process
        size = max(1, min(8, cores() // 2)) if devices != ["cpu"] else 1
        serving = deque(
            self.task("serving", {"backend": backend}, device, "serving")
            for device in devices
            for backend in backends
        )
        with contextlib.closing(Pool(log, preload=accuracy.__name__)) as pool:
            pool.run([Lane(serving, size, reuse=True)], self.until, self.serves)
            self.served.sort(key=lambda place: (devices.index(place.device), place.backend))
            listed = cases(self.served, self.given.quick)
            checks = deque(self.task("check", case, device, "check") for device, case in listed)
            self.total = len(checks)
            lane = Lane(checks, size, reuse=True, skip=self.keeps_failing)
            pool.run([lane], self.until, self.add)

    def report(self) -> None:
        """Print the table, the reasons why something was not served, and the failures."""
        self.show("")
        if self.outcomes:
            print("\n".join(table(self.outcomes)) + "\n")
        places = {(place.backend, place.device) for place in self.served}
        for (backend, device), reasons in self.refused.items():
            for reason, what in reasons.items():
                usable = (backend, device) in places
                verb = f"does not serve {', '.join(what)}" if usable else "is not usable"
                print(f"{backend} on {device} {verb}: {' '.join(reason.split())}")
        for line in (*self.skipped, *self.failures[:MOST_SHOWN]):
            print(line)
        if len(self.failures) > MOST_SHOWN:
            print(f"and {len(self.failures) - MOST_SHOWN} more failures")

    def status(self) -> int:
        """Print the verdict; return the exit status."""
        statuses = sum((outcome.statuses for outcome in self.outcomes.values()), Counter())
        run = sum(statuses[status] for status in ("ok", *BAD))
        # cases that no process was given have no row
        not_run = self.total - run - statuses["refused"] - statuses["skipped"]
        if not_run > 0:  # negative if a device breaks after a case, which adds a row
            print(f"{not_run} of {self.total} cases were not run")
        lost = len(self.journal.lost) if self.journal else 0
        if lost:
            print(f"{lost} rows could not be written to {self.given.json}")
        if self.failures:
            print(f"{len(self.failures)} failures in {run} cases")
        elif not run:
            print("no case was run")
        else:
            print(f"no failure in {run} cases")
        return 0 if run and not self.failures and not lost else 1


# --- the command ----------------------------------------------------------------------------------


def chosen_devices(name: str | None, fail: Callable[[str], Any]) -> list[str]:
    """List the devices to check; a name that torch cannot use here ends the command."""
    count = torch.cuda.device_count()
    if name is None:
        return ["cuda", "cpu"] if count else ["cpu"]
    kind, _, index = name.partition(":")
    if name != "cpu" and not (kind == "cuda" and (index.isdecimal() or name == "cuda")):
        fail(f"--device must be cpu, cuda or cuda:N, got {name}")
    if kind == "cuda" and int(index or 0) >= count:
        fail(f"--device {name} needs a CUDA device that torch can use, found {count} of them")
    return [name]


def chosen_backends(text: str | None, fail: Callable[[str], Any]) -> list[str]:
    names = [*ops.SWEEP_BACKENDS] if text is None else text.split(",")
    if unknown := [name for name in names if name not in ops.SWEEP_BACKENDS]:
        fail(f"--backends must be of {', '.join(ops.SWEEP_BACKENDS)}, got {', '.join(unknown)}")
    return list(dict.fromkeys(names))


def run(
    given: argparse.Namespace, fail: Callable[[str], Any], module: str = "alphacl_fast.accuracy"
) -> int:
    """Run the command with parsed flags; return the exit status.

    Args:
        given: the flags of `add_flags`.
        fail: ends the command with a message.
        module: the module whose functions `serving` and `check` run in child processes.
    """
    devices = chosen_devices(given.device, fail)
    backends = chosen_backends(given.backends, fail)
    journal = None
    if given.json is not None:
        try:
            given.json.write_text("")
        except OSError as error:
            fail(f"cannot write to {given.json}: {error.strerror}")
        journal = Journal(given.json, print)
    this = Run(given, journal, module)
    try:
        with interrupting():
            this.carry_out(devices, backends)
    except KeyboardInterrupt as signal:
        this.report()
        kept = f", rows in {given.json}" if journal else ""
        print(f"alphacl: interrupted after {this.done} cases{kept}", file=sys.stderr)
        return 128 + signal.args[0]
    this.report()
    return this.status()
