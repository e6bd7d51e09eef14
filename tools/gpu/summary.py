"""Writes summary.txt, which begins with the failures, and plots.png. Both come from rows alone."""

from __future__ import annotations

import importlib.util
import statistics
from collections import Counter, defaultdict
from pathlib import Path

from alphacl_fast.benchmarks.report import figure, one_line
from alphacl_fast.journal import Row, read

from .engines import ENGINES, backend_of

BAD = ("failed", "error", "crashed", "timeout", "wrong", "out of memory")
#: Benchmarks of candidates, which nothing uses unless they are the fastest.
TRIALS = ("tune", "compile tile")
#: Benchmarks that compute nothing on the device.
COMPILING = ("compile", "compile tile")
#: Benchmark → the columns that its rows add to the time of the same step.
ADDED = {
    "graph replay": ("graph_over_launched",),
    "kernels": ("launches", "microseconds", "kernels_us"),
}
#: Columns that rows of one problem share.
PROBLEM = ("n", "dim", "dtype", "objective", "negatives")
#: The most times in the summary.
MOST_TOLD = 40
#: (text, row filter, column, goal) for the fastest engine; bytes must be fewer than the goal.
GOALS: list[tuple[str, Row, str, float]] = [
    ("n = 65,536", {"n": 65536, "dim": 128}, "fraction_of_gemm_rate", 0.60),
    ("n = 16,384", {"n": 16384, "dim": 128}, "fraction_of_gemm_rate", 0.50),
    ("D = 512", {"n": 32768, "dim": 512}, "fraction_of_gemm_rate", 0.60),
    ("TF32", {"n": 16384, "dtype": "tf32"}, "fraction_of_gemm_rate", 0.50),
    ("over eager", {"n": 16384, "dim": 128}, "speedup_over_eager", 10.0),
    ("over torch.compile", {"n": 16384, "dim": 128}, "speedup_over_compiled", 6.0),
    ("extra bytes at n = 1,048,576", {"n": 1 << 20}, "peak_extra_bytes", 4e9),
    *(
        (f"over {rival}", {"negatives": "cross_view"}, f"speedup_over_{rival}", 3.0)
        for rival in ("inf_cl", "cut_cross_entropy")
    ),
]  # fmt: skip


def failure(row: Row) -> bool:
    """Return whether one of this package's engines failed; baselines and trials do not count."""
    who = row.get("contestant")  # only times have baselines beside ours
    ours = who is None or who in ENGINES
    return row.get("status") in BAD and row["benchmark"] not in TRIALS and ours


def right_on_gpu(rows: list[Row]) -> bool:
    """Return whether a GPU backend has a right result."""
    return any(
        row.get("status") == "ok"
        and row["benchmark"] not in COMPILING
        and backend_of(row.get("contestant") or row.get("engine") or row.get("backend"))
        in ("triton", "cuda")
        for row in rows
    )


# --- text -----------------------------------------------------------------------------------------


def text(earlier: list[Row], now: list[Row], notes: list[str]) -> str:
    """Write the summary: failures, counts by phase, the times of this call, goals, ``notes``.

    It is short enough for a screen that shows the last 12,000 characters.
    """
    rows = [*earlier, *now]
    device = next((r for r in reversed(rows) if "torch" in r), {})
    about = ", ".join(f"{name} {device.get(name)}" for name in ("device", "torch", "commit"))
    failed = [one_line(row) for row in rows if failure(row)]
    lines = [f"=== {about} ===", f"{len(failed)} FAILURES" if failed else "no failures"]
    lines += [f"  {line[:240]}" for line in failed[:20]]
    lines += [f"  and {len(failed) - 20} more in rows.jsonl"] if len(failed) > 20 else []
    refused = device.get("refused") or {}
    lines += [f"{name} does not serve: {why}" for name, why in refused.items() if why]
    lines += ["", *by_phase(rows), ""]
    rows = joined(rows)
    lines += [line_of(row) for row in rows[len(earlier) :] if told(row)][-MOST_TOLD:]
    return "\n".join([*lines, "", *goals(rows), *fastest_tiles(rows), *notes])


def by_phase(rows: list[Row]) -> list[str]:
    """Count the rows of each phase by status, in a line that says why some were not run."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, str] = {}
    for row in rows:
        phase = f"{row.get('call', '?')} {row.get('phase', '?')}"
        counts[phase][row.get("status", "?")] += row.get("count", 1)
        if row.get("status") == "not run":
            reasons.setdefault(phase, row["error"])
    return [
        f"{phase:18} "
        + ", ".join(f"{number} {status}" for status, number in sorted(found.items()))
        + (f" (the first: {reasons[phase]})" if phase in reasons else "")
        for phase, found in counts.items()
    ]


def told(row: Row) -> bool:
    """Return whether a row has a line of its own: a time, or what the sanitizer says."""
    tells = row["benchmark"] in ("loss+gradient", "sanitize") and row["status"] != "not run"
    return tells and not failure(row)


def line_of(row: Row) -> str:
    """Describe a row in one line, with its two slowest kernels if they are known."""
    slowest = sorted(row.get("kernels_us", {}).items(), key=lambda kernel: -kernel[1][0])[:2]
    kernels = ", ".join(f"{name[:24]} {took:.0f} µs" for name, (took, _) in slowest)
    return one_line(row)[:200] + (f" [{kernels}]" if kernels else "")


def joined(rows: list[Row]) -> list[Row]:
    """Add columns of other rows to the times of our engines.

    The columns are the speed-up over every baseline of the same problem, the time of a replayed
    CUDA graph, and the kernels of a step.
    """
    baselines: dict[tuple, dict[str, float]] = defaultdict(dict)
    added: dict[tuple, Row] = defaultdict(dict)
    for row in rows:
        columns = ADDED.get(row["benchmark"], ())
        added[step_of(row)] |= {name: row[name] for name in columns if name in row}
        if timed(row) and row["contestant"] not in ENGINES:
            baselines[problem_of(row)][row["contestant"]] = row["median_in_gemms"]
    found = []
    for row in rows:
        if timed(row) and row["contestant"] in ENGINES:
            known = baselines[problem_of(row)].items()
            faster = {f"speedup_over_{name}": took / row["median_in_gemms"] for name, took in known}
            row = {**row, **faster, **added[step_of(row)]}
        found.append(row)
    return found


def problem_of(row: Row) -> tuple:
    return tuple(row.get(name) for name in PROBLEM)


def step_of(row: Row) -> tuple:
    return problem_of(row), row.get("contestant"), row.get("phase")


def timed(row: Row) -> bool:
    return row["benchmark"] == "loss+gradient" and row["status"] == "ok"


def goals(rows: list[Row]) -> list[str]:
    """Compare the goals with measurements of InfoNCE."""
    common = {"benchmark": "loss+gradient", "objective": "infonce", "status": "ok"}
    lines = []
    for what, selection, name, goal in GOALS:
        wanted = {**common, "dtype": "bfloat16", "negatives": "two_view", **selection}
        values = [
            row[name]
            for row in rows
            if wanted.items() <= row.items()
            and row.get(name) is not None
            and row["contestant"] in ENGINES
        ]
        fewer = name == "peak_extra_bytes"
        best = (min if fewer else max)(values, default=None)
        verdict = "not measured"
        if best is not None:
            reached = best < goal if fewer else best >= goal
            verdict = f"{best:.3g} {'reached' if reached else 'missed'}"
        lines.append(f"goal {what}: {name} {'<' if fewer else '>='} {goal:g}: {verdict}")
    return lines


def fastest_tiles(rows: list[Row]) -> list[str]:
    """Name the fastest tile of each tuned size."""
    best: dict[tuple, Row] = {}
    for row in rows:
        if row["benchmark"] == "tune" and row["status"] == "ok":
            place = row["sweep"], row["mode"], row["dim"], row["rows"]
            best[place] = min(best.get(place, row), row, key=lambda r: r["median_ms"])
    return [
        f"tile {' '.join(map(str, place))}: {row['median_ms']:.3f} ms with "
        + "×".join(str(x) for x in row["tile"].values() if x)
        for place, row in best.items()
    ]


# --- plots ----------------------------------------------------------------------------------------


def draw(out: Path) -> str:
    """Draw plots.png from rows.jsonl; return a message."""
    if importlib.util.find_spec("matplotlib") is None:
        return "plots skipped: matplotlib is not there"
    shown = {
        "benchmark": "loss+gradient", "status": "ok", "objective": "infonce",
        "negatives": "two_view",
    }  # fmt: skip
    rows = [r for r in joined(read(out / "rows.jsonl")) if shown.items() <= r.items()]
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
            for name, points in _lines(rows, fixed, x, y).items():
                axis.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=name)
            axis.set(xscale="log", xlabel=label, ylabel=y.replace("_", " "))
            axis.set_ylim(bottom=0)
            if axis.lines:
                axis.legend(fontsize=7)
        axes[0, 1].set_title("InfoNCE, two_view, loss + gradient")
    return "plots.png drawn"


def _lines(rows: list[Row], fixed: Row, x: str, y: str) -> dict[str, dict[int, float]]:
    """Collect label → points of a line; the last of repeated points counts."""
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if fixed.items() <= row.items() and row.get(y) is not None:
            tuned = " tuned" if row.get("phase") == "tuned headline" else ""
            lines[f"{row['contestant']} {row['dtype']}{tuned}"][row[x]] = row[y]
    return lines
