"""Check, time and profile the package on a GPU within minutes: `make gpu OUT=dir`.

    python -m tools.gpu --out dir [--minutes 9] [--phases check,headline,...]
    python -m tools.gpu --plots dir

The run is offline and needs only PyTorch and Triton. Checks against float64 and the headline table
come first, so that a run that is cut short has them. Every row is appended to dir/rows.jsonl at
once; summary.txt, profile.txt, tuned.json, sanitize.txt and plots.png are written beside it. Device
work runs in child processes (`alphacl_fast.subprocess_pool`), so a kernel that hangs or breaks its
context costs one row. Times are for loss + gradient. Fractions are relative to the rate of an 8192³
GEMM of the same dtype in the same minute, and count 4n²D operations (8N²D in cross_view). The exit
status is 1 if one of the package's backends fails anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alphacl_fast import accuracy, ops
from alphacl_fast.benchmarks.baselines import PACKAGES, serves
from alphacl_fast.benchmarks.bench import refusals
from alphacl_fast.benchmarks.loss import Effort, Setting
from alphacl_fast.benchmarks.report import append, figure, lines_of, one_line
from alphacl_fast.subprocess_pool import Pool, Row, Task

from .gpu_tasks import DIMS, cases, provenance

TASKS = "tools.gpu_tasks"
#: Time limit of each phase in a run of nine minutes, in seconds.
SECONDS = {
    "check": 150,
    "headline": 150,
    "tune": 110,
    "rivals": 60,
    "sanitize": 45,
    "profile": 20,
    "plots": 15,
}
#: Seconds reserved for the summary.
RESERVE = 3.0
BAD = ("failed", "error", "crashed", "timeout", "wrong")


EFFORT = Effort((5, 25), 3.0, 8192, inputs=3, checked_rows=1 << 16, own_gate=0.25)


@dataclass(frozen=True)
class Sizes:
    """Problem sizes of a run: for a GPU, or tiny ones to test every phase on any machine."""

    dims: tuple[int, ...] = DIMS
    pairs: tuple[int, int] = (1000, 1537)
    divisor: int = 1
    effort: Effort = EFFORT

    def setting(self, n: int, dim: int = 128, dtype: str = "bfloat16", **other: str) -> Setting:
        if self.divisor > 1:
            n, dim = max(16, min(128, n // self.divisor)), max(8, dim // 16)
        return Setting(n, dim, dtype, **other)


TINY = Sizes((16, 24), (20, 33), 1024, replace(EFFORT, repeats=(2, 2), gemm_side=64, sample=1e-4))


def tally(counts: Counter[str]) -> str:
    return ", ".join(f"{k} {status}" for status, k in sorted(counts.items()))


#: (text, row filter, column, goal), for the fastest backend; bytes are to be fewer.
GOALS: list[tuple[str, Row, str, float]] = [
    ("n = 65,536", {"n": 65536, "dim": 128}, "fraction_of_gemm_rate", 0.60),
    ("n = 16,384", {"n": 16384, "dim": 128}, "fraction_of_gemm_rate", 0.50),
    ("D = 512", {"n": 32768, "dim": 512}, "fraction_of_gemm_rate", 0.60),
    ("TF32", {"n": 16384, "dtype": "tf32"}, "fraction_of_gemm_rate", 0.50),
    ("over eager", {"n": 16384}, "speedup_over_eager", 10.0),
    ("over torch.compile", {"n": 16384}, "speedup_over_compiled", 6.0),
    ("extra bytes at n = 1,048,576", {"n": 1 << 20}, "peak_extra_bytes", 4e9),
    *(
        (f"over {rival}", {"rival": rival}, "speedup_over_rival", 3.0)
        for rival in ("inf_cl", "cut_cross_entropy")
    ),
]  # fmt: skip


def goals(rows: list[Row]) -> list[str]:
    """Compare goals with measurements of infonce."""
    common = {"benchmark": "loss+gradient", "objective": "infonce", "negatives": "two_view"}
    common |= {"dtype": "bfloat16", "status": "ok"}
    lines = []
    for what, selection, name, goal in GOALS:
        wanted = selection if "rival" in selection else {**common, **selection}
        values = [
            row[name] for row in rows
            if wanted.items() <= row.items() and row.get(name) is not None
            and row.get("contestant", row.get("backend")) in ops.SWEEP_BACKENDS
        ]  # fmt: skip
        fewer = name == "peak_extra_bytes"
        best = (min if fewer else max)(values, default=None)
        verdict = "not measured"
        if best is not None:
            reached = best < goal if fewer else best >= goal
            verdict = f"{best:.3g} {'reached' if reached else 'missed'}"
        lines.append(f"goal {what}: {name} {'<' if fewer else '>='} {goal:g}: {verdict}")
    return lines


class Run:
    """A run's options, clock, child process for timings, and rows.

    Rows are written to a file at once, lines to the screen and finally to summary.txt.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        self.args, self.device, self.sizes = args, args.device, TINY if args.tiny else Sizes()
        here = torch.device(args.device)
        why_not = refusals(here, torch.bfloat16)
        self.backends = [name for name, reason in why_not.items() if reason is None]
        self.compiled = [name for name in self.backends if name != "blocked"]
        self.ours = self.compiled or self.backends
        self.machine = provenance(here)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.shown = 0
        self.start = time.monotonic()
        self.deadline = self.start + 60 * args.minutes
        self.until, self.phase = self.deadline, ""
        self.log = args.out / "workers.log"
        # A single process, so that nothing else uses the device.
        self.pool = Pool(min(1, args.workers), str(self.log))
        for name, reason in why_not.items():
            self.say(f"backend {name}: {reason or 'will be checked'}", keep=False)

    def add(self, row: Row) -> None:
        row = {**self.machine, "at_s": round(time.monotonic() - self.start, 2), **row}
        self.rows.append(row)
        append(self.args.out / "rows.jsonl", row)
        interesting = row["benchmark"] != "check" and row.get("status") != "unfinished"
        if interesting or (self.failure(row) and self.shown < 12):
            self.shown += self.failure(row)
            print(one_line(row), flush=True)

    def say(self, text: str, keep: bool = True) -> None:
        """Print a line with the time; ``keep`` adds it to the summary."""
        self.notes += [text] if keep else []
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def failure(self, row: Row) -> bool:
        """Whether one of this package's backends failed; baselines do not count."""
        who = row.get("backend", row.get("contestant"))
        return row.get("status") in BAD and (who is None or who in self.backends)

    def summary(self) -> str:
        """Summarise failures first, then counts of checks, timings and goals."""
        machine, failures, counts = self.machine, [], defaultdict(Counter)
        refused: Counter[str] = Counter()
        absent: dict[str, None] = {}
        others = []
        for row in self.rows:
            kind, status = row["benchmark"], row.get("status")
            if kind == "check":
                counts[row["backend"], row["dtype"]][status] += 1
            if status == "refused":
                refused[f"{row['backend']}: {row['error']}"] += 1
            elif status == "skipped":
                absent |= {row["contestant"]: None} if "contestant" in row else {}
            elif self.failure(row):
                failures.append(one_line(row))
            elif kind not in ("check", "phase") and not (
                row.get("contestant") in ("eager", "compiled") and status == "ok"
            ):
                others.append(one_line(row))
        lines = [
            f"=== {machine['device']}, torch {machine['torch']}, commit {machine['commit']} ==="
        ]
        lines.append(f"{len(failures)} FAILURES" if failures else "no failures")
        lines += [f"  {line}" for line in failures[:20]]
        if len(failures) > 20:
            lines.append(f"  ... {len(failures) - 20} more in rows.jsonl")
        lines += [f"check {' '.join(key)}: {tally(found)}" for key, found in counts.items()]
        lines += [f"refused {k} times, {why}"[:160] for why, k in refused.most_common(4)]
        lines += [f"not installed: {', '.join(absent)}"] if absent else []
        return "\n".join([*lines, *others, *self.notes, *goals(self.rows)])

    def close(self) -> None:
        self.pool.close()
        text = self.summary()
        (self.args.out / "summary.txt").write_text(text + "\n")
        print("\n" + text, flush=True)

    def timed(self, tasks: Iterable[Task], emit: Callable[[Row], None] | None = None) -> None:
        if not self.pool.run(tasks, self.until, emit or self.add):
            self.say(f"{self.phase}: out of time, the rest was not run")

    def left(self) -> float:
        return self.until - time.monotonic()

    def task(
        self, function: str, limit: float = 60.0, module: str = TASKS, **arguments: Any
    ) -> Task:
        """Build a task; rows that report its failure say what it was given."""
        given = arguments.get("setting") or arguments.get("case")
        about = {"benchmark": function, **(asdict(given) if given else {})}
        if "backend" in arguments:
            about["backend"] = arguments["backend"]
        return Task(f"{module}:{function}", {**arguments, "device": self.device}, about, limit)

    def measurement(self, setting: Setting, contestants: list[str], **options: Any) -> Task:
        options = {"effort": self.sizes.effort, "contestants": contestants, **options}
        task = self.task("measure", 90.0, setting=setting, **options)
        about = {**task.about, "benchmark": "loss+gradient", "contestant": contestants[0]}
        return replace(task, about=about)


# --- phases ---------------------------------------------------------------------------------------


def check(run: Run) -> None:
    """Check invariants, and backends × objectives × dtypes × modes against float64 in the time."""
    every = run.backends, run.sizes.dims, run.sizes.pairs
    table = (run.task("check", 45.0, accuracy.__name__, case=case) for case in cases(*every))

    def tasks() -> Iterator[Task]:
        yield from itertools.islice(table, 12 * len(run.backends))
        objectives = ("infonce", "alpha_direct", "triplet")
        for name, objective in itertools.product(run.compiled, objectives):
            for test, n in (
                ("no_synchronization", 2048),
                ("graph_replay", 2046),
                ("launches", 1024),
            ):
                yield run.task(
                    test, setting=run.sizes.setting(n, objective=objective), backend=name
                )
        yield from table

    with contextlib.closing(Pool(run.args.workers, str(run.log))) as pool:
        finished = pool.run(tasks(), run.until, run.add)
    counts = Counter(row["status"] for row in run.rows if row["benchmark"] == "check")
    not_run = 0 if finished else sum(1 for _ in cases(*every)) - counts.total()
    run.say(f"check: {tally(counts)}; {not_run} cases of the table not run for want of time")


def headline_tasks(run: Run) -> Iterator[Task]:
    size, ours = run.sizes.setting, run.ours
    everyone = [*ours, "eager"]
    quick = {"effort": replace(run.sizes.effort, repeats=(2, 2))}
    for setting, contestants, options in (
        (size(65536), everyone, {}),
        (size(16384), list(dict.fromkeys([*everyone, *run.backends])), {}),
        *((size(n), everyone, {"graph": True}) for n in (4096, 1024)),
        (size(32768, 512), everyone, {}),
        (size(16384, dtype="tf32"), everyone, {}),
        *((size(32768, dim), everyone, {}) for dim in (256, 64, 1024, 128)),
        (size(32768, negatives="cross_view"), everyone, {}),
        (size(16384, dtype="float32"), everyone, {}),
        *((size(32768, objective=name), ours, {}) for name in ("alpha_direct", "triplet")),
        (size(1 << 20), ours, quick),
        *((size(n), [*ours, "compiled"], {}) for n in (16384, 65536)),
    ):
        yield run.measurement(setting, contestants, **options)


def headline(run: Run) -> None:
    """Time loss + gradient, with eager PyTorch and torch.compile as baselines."""
    run.timed(headline_tasks(run))


def tune(run: Run) -> None:
    """Tune the Triton kernels' tiles; repeat the headline table with them, without eager."""
    table = run.args.out / "tuned.json"
    seconds = 0.6 * run.left()
    command = [sys.executable, "-m", "alphacl_fast.cli", "tune", "--out", str(table)]
    command += ["--minutes", f"{seconds / 60:.2f}"]
    status, error = logged(command, seconds + 10, run.log)
    run.add({"benchmark": "tune", "backend": "triton", "status": status, "error": error})
    if not table.exists():
        return
    run.pool.close()
    os.environ["ALPHACL_TUNED"] = str(table.resolve())
    try:
        for task in headline_tasks(run):
            given = task.arguments["contestants"]
            ours = [name for name in given if name in run.compiled]
            if ours and "compiled" not in given:
                task = replace(task, arguments={**task.arguments, "contestants": ours})
                run.timed([task], lambda row: run.add({**row, "tuned": True}))
            if run.left() < 1:
                break
    finally:
        run.pool.close()
        del os.environ["ALPHACL_TUNED"]


def logged(command: list[str], limit: float, log: Path, **options: Any) -> tuple[str, str | None]:
    """Run a command, appending its output to a file: ("ok", None), or a status and the error."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        try:
            code = process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            return "timeout", f"not done in {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and its children
            process.wait()
    return ("ok", None) if code == 0 else ("error", f"exit status {code}, see {log.name}")


def rivals(run: Run) -> None:
    """Time other packages in cross_view, each beside our backends at the same precision."""
    ours = run.ours
    timed: dict[str, Row] = {}

    def emit(row: Row) -> None:
        run.add(row)
        rival = row["contestant"]
        if row.get("status") == "ok":
            timed[rival] = row
        if rival in PACKAGES and rival in timed:  # the last of its table
            shared = {k: row[k] for k in ("n", "dim", "dtype", "negatives", "objective", "status")}
            for name in (name for name in ours if name in timed):
                ratio = row["median_in_gemms"] / timed[name]["median_in_gemms"]
                about = {"benchmark": "rival", "rival": rival, "backend": name}
                run.add({**shared, **about, "speedup_over_rival": ratio})
            timed.clear()

    tasks = []
    for name, dtype in [*((name, "bfloat16") for name in PACKAGES), ("inf_cl", "tf32")]:
        if serves(name, "infonce", "cross_view"):
            setting = run.sizes.setting(32768, dtype=dtype, negatives="cross_view")
            tasks.append(run.measurement(setting, [*ours, name], needs=name))
    run.timed(tasks, emit)


def sanitize(run: Run) -> None:
    """Run small ragged shapes under compute-sanitizer: memcheck, racecheck for CUDA kernels."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        run.say("sanitize skipped: compute-sanitizer is not there")
        return
    log = run.args.out / "sanitize.txt"
    watches = [(name, "memcheck") for name in run.compiled] + [("cuda", "racecheck")] * (
        "cuda" in run.compiled
    )
    for k, (name, watch) in enumerate(watches):
        share = run.left() / (len(watches) - k)
        at = log.stat().st_size if log.exists() else 0
        command = [
            tool, "--tool", watch, "--target-processes", "application-only",
            "--report-api-errors", "no", "--print-limit", "10",
            sys.executable, "-m", TASKS, name, run.device, f"{share / 2:.0f}",
        ]  # fmt: skip
        # gives every tensor its own bounds
        environment = {
            **os.environ,
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        }
        status, error = logged(command, share, log, env=environment)
        said = log.read_bytes()[at:].decode(errors="replace")
        found = [int(k) for k in re.findall(r"ERROR SUMMARY: (\d+) error", said)]
        if status == "ok" and (not found or sum(found)):
            status, error = (
                "failed",
                f"{sum(found)} errors, see {log.name}" if found else "no summary",
            )
        run.add({
            "benchmark": "sanitize", "backend": name, "tool": watch, "status": status,
            "error": error, "errors_found": sum(found) if found else None,
        })  # fmt: skip


def profile(run: Run) -> None:
    """Write the kernels of one step to profile.txt."""
    setting, out = run.sizes.setting(16384), str(run.args.out / "profile.txt")
    run.timed([run.task("profile", setting=setting, backends=run.backends, out=out)])


def plots(run: Run) -> None:
    """Draw plots.png."""
    run.say(draw(run.args.out), keep=False)


def draw(out: Path) -> str:
    """Draw plots.png from rows.jsonl; return a message."""
    if importlib.util.find_spec("matplotlib") is None:
        return "plots skipped: matplotlib is not there"
    shown = {
        "benchmark": "loss+gradient", "status": "ok", "objective": "infonce",
        "negatives": "two_view",
    }  # fmt: skip
    rows = [row for row in lines_of(out / "rows.jsonl") if shown.items() <= row.items()]
    if not rows:
        return "plots skipped: no timings"
    dim = statistics.mode(row["dim"] for row in rows)
    n = statistics.mode([row["n"] for row in rows if row["dim"] != dim] or [None])
    rate, speedup = "fraction_of_gemm_rate", "speedup_over_eager"
    with figure(out / "plots.png", 1, 3, 5, 4.5) as axes:
        for axis, fixed, x, y, label in (
            (axes[0, 0], {"dim": dim}, "n", rate, f"rows n, D = {dim}"),
            (axes[0, 1], {"n": n}, "dim", rate, f"features D, n = {n}"),
            (axes[0, 2], {"dim": dim}, "n", speedup, "rows n"),
        ):
            lines: dict[str, dict[int, float]] = defaultdict(dict)
            for row in rows:  # of repeated points the last counts
                drawn = y != speedup or row["contestant"] != "eager"
                if drawn and fixed.items() <= row.items() and row[y] is not None:
                    name = f"{row['contestant']} {row['dtype']}{' tuned' * row.get('tuned', False)}"
                    lines[name][row[x]] = row[y]
            for name, points in lines.items():
                axis.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=name)
            axis.set(xscale="log", xlabel=label, ylabel=y.replace("_", " "))
            axis.set_ylim(bottom=0)
            if lines:
                axis.legend(fontsize=7)
        where = f"{rows[0]['device']}, torch {rows[0]['torch']}"
        axes[0, 1].set_title(f"InfoNCE, two_view, loss + gradient; {where}")
    return "plots.png drawn"


PHASES: dict[str, Callable[[Run], None]] = {
    phase.__name__: phase for phase in (check, headline, tune, rivals, sanitize, profile, plots)
}


def perform(run: Run, phases: list[str]) -> None:
    """Run the phases in order, each within its time limit; an error does not stop the next."""
    factor = run.args.minutes / 9
    end = run.deadline - RESERVE * min(1.0, factor)

    def stopped(status: str, verb: str, why: str) -> None:
        run.add({"benchmark": "phase", "phase": run.phase, "status": status, "error": why})
        run.say(f"{run.phase} {verb} {why}")

    for run.phase in phases:
        now, share = time.monotonic(), SECONDS[run.phase] * factor
        run.until = min(now + share, end)
        if run.until - now < 0.15 * share:
            stopped("skipped", "skipped:", f"{max(0.0, end - now):.0f} s left")
            continue
        run.say(f"{run.phase}: at most {run.until - now:.0f} s", keep=False)
        try:
            PHASES[run.phase](run)
        except Exception as error:
            stopped("error", "raised", f"{type(error).__name__}: {str(error)[:400]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder of the results"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run (default: 9)")
    parser.add_argument("--phases", default=",".join(PHASES), type=lambda text: text.split(","))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)),
        help="child processes of the checks; 0 runs all in this process, without time limits",
    )  # fmt: skip
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes, to try the script on any machine"
    )
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="only draw the plots of an earlier run"
    )
    args = parser.parse_args(arguments)
    if args.plots is not None:
        print(draw(args.plots))
        return 0
    unknown = [name for name in args.phases if name not in PHASES]
    if unknown:
        parser.error(f"--phases must be among {','.join(PHASES)}, got {','.join(unknown)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            "--device must be a device that PyTorch sees, got cuda on a machine without a GPU "
            "(or its driver)"
        )
    run = Run(args)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        perform(run, args.phases)
    finally:
        run.close()
        signal.signal(signal.SIGTERM, before)
    return int(any(map(run.failure, run.rows)))


if __name__ == "__main__":
    sys.exit(main())
