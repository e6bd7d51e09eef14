"""Check, time and profile the package on a GPU within minutes: `make gpu OUT=dir`.

    python -m tools.gpu --out dir [--minutes 9] [--phases check,headline,...]
    python -m tools.gpu --plots dir

The run is offline and needs only PyTorch and Triton. Checks against float64 and the headline table
come first, so that a run that is cut short has them. Every row is appended to dir/rows.jsonl at
once; summary.txt, profile.txt, tuned.json, sanitize.txt and plots.png are written beside it. Device
work runs in child processes (`tools.subprocess_pool`), so a kernel that hangs or breaks its context
costs one row. Times are for loss + gradient. Fractions are relative to the rate of an 8192³ GEMM
of the same dtype in the same minute, and count 4n²D operations (8N²D in cross_view). The exit
status is 1 if one of the package's backends fails anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alphacl_fast import ops
from alphacl_fast.benchmarks.baselines import PACKAGES, serves
from alphacl_fast.benchmarks.loss import Setting

from .gpu_tasks import DIMS, cases, provenance
from .subprocess_pool import Pool, Row, Task

TASKS = "tools.gpu_tasks"
#: Time limit of each phase in a run of nine minutes, in seconds.
SECONDS = {"check": 150, "headline": 150, "tune": 110, "rivals": 60, "sanitize": 45, "profile": 20, "plots": 15}
#: Seconds reserved for the summary.
RESERVE = 3.0
BAD = ("failed", "error", "crashed", "timeout", "wrong")


@dataclass(frozen=True)
class Sizes:
    """Problem sizes of a run: for a GPU, or tiny ones to test every phase on any machine."""

    pairs: tuple[int, int] = (1000, 1537)
    dims: tuple[int, ...] = DIMS
    gemm_side: int = 8192
    sample: float = 0.02
    budget: float = 3.0
    repeats: tuple[int, int] = (5, 25)
    divisor: int = 1

    def setting(self, n: int, dim: int = 128, dtype: str = "bfloat16", **other: str) -> Setting:
        if self.divisor > 1:
            n, dim = max(16, min(128, n // self.divisor)), max(8, dim // 16)
        return Setting(n, dim, dtype, **other)


TINY = Sizes((20, 33), (16, 24), 64, 1e-4, 0.02, (2, 2), 1024)


class Report:
    """Write rows to a file at once, and lines to the screen and finally to summary.txt."""

    def __init__(self, out: Path, machine: Row, backends: list[str]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.machine, self.backends = out, machine, backends
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.shown = 0
        self.start = time.monotonic()
        self.file = (out / "rows.jsonl").open("a")

    def add(self, row: Row) -> None:
        row = {**self.machine, "at_s": round(time.monotonic() - self.start, 2), **row}
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
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
        failures = [row for row in self.rows if self.failure(row)]
        lines = [f"=== {self.machine['device']}, torch {self.machine['torch']}, commit {self.machine['commit']} ==="]
        lines.append(f"{len(failures)} FAILURES" if failures else "no failures")
        lines += [f"  {one_line(row)}" for row in failures[:20]]
        lines += [f"  ... {len(failures) - 20} more in rows.jsonl"] if len(failures) > 20 else []
        counts = Counter(
            (row["backend"], row["dtype"], row["status"]) for row in self.rows if row["benchmark"] == "check"
        )
        for backend, dtype in dict.fromkeys((b, d) for b, d, _ in counts):
            found = {status: k for (b, d, status), k in counts.items() if (b, d) == (backend, dtype)}
            lines.append(f"check {backend} {dtype}: " + ", ".join(f"{k} {status}" for status, k in sorted(found.items())))
        refused = Counter(f"{row['backend']}: {row['error']}" for row in self.rows if row.get("status") == "refused")
        lines += [f"refused {k} times, {why}"[:160] for why, k in refused.most_common(4)]
        absent = [row["contestant"] for row in self.rows if row.get("status") == "skipped" and "contestant" in row]
        lines += [f"not installed: {', '.join(dict.fromkeys(absent))}"] if absent else []
        lines += [one_line(row) for row in self.rows if self._belongs_in_summary(row)]
        return "\n".join([*lines, *self.notes, *goals(self.rows)])

    def _belongs_in_summary(self, row: Row) -> bool:
        """Whether a row that did not fail adds information to the summary."""
        known = row["benchmark"] in ("check", "phase") or row.get("status") == "skipped" or self.failure(row)
        baseline = row.get("contestant") in ("eager", "compiled") and row.get("status") == "ok"
        return not known and not baseline

    def close(self) -> None:
        text = self.summary()
        (self.out / "summary.txt").write_text(text + "\n")
        print("\n" + text, flush=True)
        self.file.close()


def one_line(row: Row) -> str:
    """Format a row for the terminal."""
    who = row.get("contestant") or row.get("backend") or row.get("phase") or ""
    what = [row["benchmark"]] if row["benchmark"] != "loss+gradient" else []
    what += [who, row.get("objective", ""), row.get("dtype", ""), row.get("negatives", "")]
    what += [f"{short}={row[name]}" for short, name in (("n", "n"), ("D", "dim")) if name in row]
    if row["benchmark"] == "check":
        what += [f"{name}={row[name]}" for name in ("options", "similarity", "symmetric", "reduction", "tau") if name in row]
        what += [name for name in ("learn_tau", "deterministic") if row.get(name)]
    what += ["tuned"] if row.get("tuned") else []
    facts = [] if row.get("status") == "ok" else [f"{row.get('status', '').upper()} {row.get('error') or ''}"[:300]]
    facts += [row["where"]] if row.get("where") else []
    formats = (
        ("fraction_of_gemm_rate", "{:.3f} of GEMM"), ("median_ms", "{:.3f} ms"), ("p20_ms", "p20 {:.3f}"),
        ("p80_ms", "p80 {:.3f}"),
        ("graph_over_launched", "{:.2f} of a launched step"), ("speedup_over_eager", "{:.1f}x eager"),
        ("speedup_over_compiled", "{:.1f}x compiled"), ("speedup_over_rival", "{:.2f}x as fast"),
        ("launches", "{:.1f} launches"), ("microseconds", "{:.0f} µs"), ("errors_found", "{} errors"),
    )  # fmt: skip
    facts += [shape.format(row[name]) for name, shape in formats if row.get(name) is not None]
    if row.get("peak_extra_bytes") is not None:
        facts.append(f"+{row['peak_extra_bytes'] / 1e9:.2f} GB")
    if row.get("gradient_error") is not None and row.get("status") == "ok":
        facts.append(f"err {row['gradient_error']:.0e}")
    return " ".join(str(word) for word in what if word) + ": " + (", ".join(facts) or row.get("status", ""))


#: (text, row filter, column, goal, whether larger is better), for the fastest backend.
GOALS: list[tuple[str, Row, str, float, bool]] = [
    ("n = 65,536", {"n": 65536, "dim": 128, "dtype": "bfloat16"}, "fraction_of_gemm_rate", 0.60, True),
    ("n = 16,384", {"n": 16384, "dim": 128, "dtype": "bfloat16"}, "fraction_of_gemm_rate", 0.50, True),
    ("D = 512", {"n": 32768, "dim": 512, "dtype": "bfloat16"}, "fraction_of_gemm_rate", 0.60, True),
    ("TF32", {"n": 16384, "dtype": "tf32"}, "fraction_of_gemm_rate", 0.50, True),
    ("over eager", {"n": 16384, "dtype": "bfloat16"}, "speedup_over_eager", 10.0, True),
    ("over torch.compile", {"n": 16384, "dtype": "bfloat16"}, "speedup_over_compiled", 6.0, True),
    ("extra bytes at n = 1,048,576", {"n": 1 << 20}, "peak_extra_bytes", 4e9, False),
]


def goals(rows: list[Row]) -> list[str]:
    """Compare goals with measurements of infonce."""
    measured = [
        row for row in rows
        if row["benchmark"] == "loss+gradient" and row.get("status") == "ok" and row["contestant"] in ops.SWEEP_BACKENDS
    ]  # fmt: skip
    lines = []
    for what, selection, name, goal, larger in GOALS:
        wanted = {"objective": "infonce", "negatives": "two_view", **selection}
        values = [row[name] for row in measured if row.get(name) is not None and wanted.items() <= row.items()]
        best = (max if larger else min)(values, default=None)
        verdict = "not measured" if best is None else f"{best:.3g} {'reached' if (best >= goal) == larger else 'missed'}"
        lines.append(f"goal {what}: {name} {'>=' if larger else '<'} {goal:g}: {verdict}")
    for rival in ("inf_cl", "cut_cross_entropy"):
        values = [row["speedup_over_rival"] for row in rows if row.get("rival") == rival and "speedup_over_rival" in row]
        verdict = f"{max(values):.3g} {'reached' if max(values) >= 3 else 'missed'}" if values else "not measured"
        lines.append(f"goal over {rival}: >= 3: {verdict}")
    return lines


class Run:
    """A run's options, clock and child processes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.sizes = args, args.device, TINY if args.tiny else Sizes()
        here = torch.device(args.device)
        serves = {name: module.unsupported(here, torch.bfloat16, None, "exp") for name, module in ops.SWEEP_BACKENDS.items()}
        self.backends = [name for name, reason in serves.items() if reason is None]
        self.compiled = [name for name in self.backends if name != "blocked"]
        self.report = Report(args.out, provenance(here), self.backends)
        self.deadline = self.report.start + 60 * args.minutes
        self.until, self.phase = self.deadline, ""
        for name, reason in serves.items():
            self.report.say(f"backend {name}: {reason or 'will be checked'}", keep=False)
        self._pool: Pool | None = None

    @property
    def log(self) -> str:
        return str(self.args.out / "workers.log")

    def pool(self) -> Pool:
        """Return the single child process for timings, so that nothing else uses the device."""
        if self._pool is None:
            self._pool = Pool(min(1, self.args.workers), self.log)
        return self._pool

    def close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def timed(self, tasks: Iterable[Task], emit: Callable[[Row], None] | None = None) -> None:
        if not self.pool().run(tasks, self.until, emit or self.report.add):
            self.report.say(f"{self.phase}: out of time, the rest was not run")

    def left(self) -> float:
        return self.until - time.monotonic()

    def measurement(self, setting: Setting, contestants: list[str], limit: float = 90.0, **options: Any) -> Task:
        sizes = self.sizes
        arguments = {
            "setting": setting, "contestants": contestants, "device": self.device, "gemm_side": sizes.gemm_side,
            "sample": sizes.sample, "budget": sizes.budget, "repeats": sizes.repeats, **options,
        }  # fmt: skip
        about = {"benchmark": "loss+gradient", "contestant": contestants[0], **asdict(setting), **options.get("label", {})}
        return Task(f"{TASKS}:measure", arguments, about, limit)


# --- phases -----------------------------------------------------------------------------------------------------------


def check(run: Run) -> None:
    """Check backends × objectives × dtypes × modes against float64 until time is over; invariants."""
    table = (
        Task(f"{TASKS}:check", {"case": case, "device": run.device}, {"benchmark": "check", **asdict(case)}, 45.0)
        for case in cases(run.backends, run.sizes.dims, run.sizes.pairs)
    )

    def tasks() -> Iterator[Task]:
        yield from itertools.islice(table, 12 * len(run.backends))
        for name, objective in itertools.product(run.compiled, ("infonce", "alpha_direct", "triplet")):
            for benchmark, n in (("no_synchronization", 2048), ("graph_replay", 2046), ("launches", 1024)):
                setting = run.sizes.setting(n, objective=objective)
                about = {"benchmark": benchmark, "backend": name, **asdict(setting)}
                yield Task(f"{TASKS}:{benchmark}", {"setting": setting, "backend": name, "device": run.device}, about)
        yield from table

    pool = Pool(run.args.workers, run.log)
    try:
        finished = pool.run(tasks(), run.until, run.report.add)
    finally:
        pool.close()
    counts = Counter(row["status"] for row in run.report.rows if row["benchmark"] == "check")
    done = ", ".join(f"{k} {status}" for status, k in counts.items())
    not_run = 0 if finished else sum(1 for _ in cases(run.backends, run.sizes.dims, run.sizes.pairs)) - counts.total()
    run.report.say(f"check: {done}; {not_run} cases of the table not run for want of time")


def headline_tasks(run: Run, label: Row) -> Iterator[Task]:
    size, ours = run.sizes.setting, run.compiled or run.backends
    everyone = [*ours, "eager"]
    for n, contestants in ((65536, everyone), (16384, list(dict.fromkeys([*everyone, *run.backends])))):
        yield run.measurement(size(n), contestants, label=label)
    for n in (4096, 1024):
        yield run.measurement(size(n), everyone, graph=True, label=label)
    yield run.measurement(size(32768, 512), everyone, label=label)
    yield run.measurement(size(16384, dtype="tf32"), everyone, label=label)
    for dim in (256, 64, 1024):
        yield run.measurement(size(32768, dim), everyone, label=label)
    yield run.measurement(size(32768), everyone, label=label)
    yield run.measurement(size(32768, negatives="cross_view"), everyone, label=label)
    yield run.measurement(size(16384, dtype="float32"), everyone, label=label)
    for objective in ("alpha_direct", "triplet"):
        yield run.measurement(size(32768, objective=objective), ours, label=label)
    yield run.measurement(size(1 << 20), ours, repeats=(2, 2), label=label)
    for n in (16384, 65536):
        yield run.measurement(size(n), [*ours, "compiled"], label=label)


def headline(run: Run) -> None:
    """Time loss + gradient, with eager PyTorch and torch.compile as baselines."""
    run.timed(headline_tasks(run, {}))


def tune(run: Run) -> None:
    """Tune the Triton kernels' tiles; repeat the headline table with them, without eager."""
    table = run.args.out / "tuned.json"
    seconds = 0.6 * run.left()
    command = [sys.executable, "-m", "alphacl_fast.cli", "tune", "--out", str(table)]
    command += ["--minutes", f"{seconds / 60:.2f}"]
    status, error = logged(command, seconds + 10, Path(run.log))
    run.report.add({"benchmark": "tune", "backend": "triton", "status": status, "error": error})
    if not table.exists():
        return
    run.close_pool()
    os.environ["ALPHACL_TUNED"] = str(table.resolve())
    try:
        for task in headline_tasks(run, {"tuned": True}):
            ours = [name for name in task.arguments["contestants"] if name in run.compiled]
            if ours and "compiled" not in task.arguments["contestants"]:
                run.timed([replace(task, arguments={**task.arguments, "contestants": ours})])
            if run.left() < 1:
                break
    finally:
        run.close_pool()
        del os.environ["ALPHACL_TUNED"]


def logged(command: list[str], limit: float, log: Path, **options: Any) -> tuple[str, str | None]:
    """Run a command, appending its output to a file: ("ok", None), or a status and the error."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options)
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
    ours = run.compiled or run.backends
    timed: dict[str, Row] = {}

    def emit(row: Row) -> None:
        run.report.add(row)
        if row.get("status") == "ok":
            timed[row["contestant"]] = row
        if row["contestant"] in PACKAGES and row["contestant"] in timed:  # the last of its table
            for name in (name for name in ours if name in timed):
                ratio = timed[row["contestant"]]["median_in_gemms"] / timed[name]["median_in_gemms"]
                run.report.add({
                    **{k: row[k] for k in ("n", "dim", "dtype", "negatives", "objective")}, "benchmark": "rival",
                    "rival": row["contestant"], "backend": name, "status": "ok", "speedup_over_rival": ratio,
                })  # fmt: skip
            timed.clear()

    run.timed(
        (
            run.measurement(run.sizes.setting(32768, dtype=dtype, negatives="cross_view"), [*ours, name], needs=name)
            for name, dtype in [*((name, "bfloat16") for name in PACKAGES), ("inf_cl", "tf32")]
            if serves(name, "infonce", "cross_view")
        ),
        emit,
    )


def sanitize(run: Run) -> None:
    """Run small ragged shapes under compute-sanitizer: memcheck, racecheck for CUDA kernels."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        run.report.say("sanitize skipped: compute-sanitizer is not there")
        return
    log = run.args.out / "sanitize.txt"
    watches = [(name, "memcheck") for name in run.compiled] + [("cuda", "racecheck")] * ("cuda" in run.compiled)
    for k, (name, watch) in enumerate(watches):
        share = run.left() / (len(watches) - k)
        at = log.stat().st_size if log.exists() else 0
        command = [
            tool, "--tool", watch, "--target-processes", "application-only", "--report-api-errors", "no",
            "--print-limit", "10", sys.executable, "-m", TASKS, name, run.device, f"{share / 2:.0f}",
        ]  # fmt: skip
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # gives every tensor its own bounds
        status, error = logged(command, share, log, env=environment)
        found = [int(k) for k in re.findall(r"ERROR SUMMARY: (\d+) error", log.read_bytes()[at:].decode(errors="replace"))]
        if status == "ok" and (not found or sum(found)):
            status, error = "failed", f"{sum(found)} errors, see {log.name}" if found else "no summary"
        run.report.add({
            "benchmark": "sanitize", "backend": name, "tool": watch, "status": status, "error": error,
            "errors_found": sum(found) if found else None,
        })  # fmt: skip


def profile(run: Run) -> None:
    """Write the kernels of one step to profile.txt."""
    arguments = {
        "setting": run.sizes.setting(16384), "backends": run.backends, "device": run.device,
        "out": str(run.args.out / "profile.txt"),
    }  # fmt: skip
    run.timed([Task(f"{TASKS}:profile", arguments, {"benchmark": "profile"}, 60.0)])


def plots(run: Run) -> None:
    """Draw plots.png."""
    run.report.say(draw(run.args.out), keep=False)


def draw(out: Path) -> str:
    """Draw plots.png from rows.jsonl; return a message."""
    if importlib.util.find_spec("matplotlib") is None:
        return "plots skipped: matplotlib is not there"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["benchmark"] == "loss+gradient" and row.get("status") == "ok" and not row.get("rival")]
    rows = [row for row in rows if (row["objective"], row["negatives"]) == ("infonce", "two_view")]
    if not rows:
        return "plots skipped: no timings"
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    common_dim = Counter(row["dim"] for row in rows).most_common(1)[0][0]
    common_n = Counter(row["n"] for row in rows if row["dim"] != common_dim).most_common(1)
    by_n = [row for row in rows if row["dim"] == common_dim]
    by_dim = [row for row in rows if common_n and row["n"] == common_n[0][0]]
    _lines(axes[0], by_n, "n", "fraction_of_gemm_rate", f"rows n, D = {common_dim}")
    _lines(axes[1], by_dim, "dim", "fraction_of_gemm_rate", f"features D, n = {common_n[0][0] if common_n else 'none'}")
    _lines(axes[2], [row for row in by_n if row["contestant"] != "eager"], "n", "speedup_over_eager", "rows n")
    axes[2].axhline(1.0, color="grey", linewidth=0.8)
    figure.suptitle(f"InfoNCE, two_view, loss + gradient; {rows[0]['device']}, torch {rows[0]['torch']}")
    figure.tight_layout()
    figure.savefig(out / "plots.png", dpi=110)
    plt.close(figure)
    return "plots.png drawn"


def _lines(axis: Any, rows: list[Row], x: str, y: str, label: str) -> None:
    """Draw a line per implementation, dtype and tile table; repeated points keep the last."""
    keys = dict.fromkeys((row["contestant"], row["dtype"], bool(row.get("tuned"))) for row in rows)
    for contestant, dtype, tuned in keys:
        points = {
            row[x]: row[y] for row in rows
            if (row["contestant"], row["dtype"], bool(row.get("tuned"))) == (contestant, dtype, tuned) and row[y] is not None
        }  # fmt: skip
        if points:
            name = f"{contestant} {dtype}{' tuned' if tuned else ''}"
            axis.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=name)
    axis.set(xscale="log", xlabel=label, ylabel=y.replace("_", " "))
    axis.set_ylim(bottom=0)
    if axis.lines:
        axis.legend(fontsize=7)


PHASES: dict[str, Callable[[Run], None]] = {
    "check": check, "headline": headline, "tune": tune, "rivals": rivals, "sanitize": sanitize, "profile": profile,
    "plots": plots,
}  # fmt: skip


def perform(run: Run, phases: list[str]) -> None:
    """Run the phases in order, each within its time limit; an error does not stop the next."""
    factor = run.args.minutes / 9
    for name in phases:
        now, end = time.monotonic(), run.deadline - RESERVE * min(1.0, factor)
        run.phase, run.until = name, min(now + SECONDS[name] * factor, end)
        if run.until - now < 0.15 * SECONDS[name] * factor:
            why = f"{max(0.0, end - now):.0f} s left"
            run.report.add({"benchmark": "phase", "phase": name, "status": "skipped", "error": why})
            run.report.say(f"{name} skipped: {why}")
            continue
        run.report.say(f"{name}: at most {run.until - now:.0f} s", keep=False)
        try:
            PHASES[name](run)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:400]}"
            run.report.add({"benchmark": "phase", "phase": name, "status": "error", "error": why})
            run.report.say(f"{name} raised {why}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run (default: 9)")
    parser.add_argument("--phases", default=",".join(PHASES), type=lambda text: text.split(","))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)),
        help="child processes of the checks; 0 runs everything in this process, without time limits",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script on any machine")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="only draw the plots of an earlier run")
    args = parser.parse_args(arguments)
    if args.plots is not None:
        print(draw(args.plots))
        return 0
    unknown = [name for name in args.phases if name not in PHASES]
    if unknown:
        parser.error(f"--phases must be among {','.join(PHASES)}, got {','.join(unknown)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device must be a device that PyTorch sees, got cuda on a machine without a GPU (or its driver)")
    run = Run(args)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        perform(run, args.phases)
    finally:
        run.close_pool()
        run.report.close()
        signal.signal(signal.SIGTERM, before)
    return int(any(run.report.failure(row) for row in run.report.rows))


if __name__ == "__main__":
    sys.exit(main())
