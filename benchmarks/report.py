"""Turn rows of `benchmarks.bench` into tables and plots, also README.md's and docs/benchmarks.md's.

    python -m benchmarks.report            # print the documents' tables
    python -m benchmarks.report --write    # write them, from benchmarks/results/cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.jsonl"
BEGIN, END = "<!-- from rows: python -m benchmarks.report --write -->", "<!-- end of rows -->"
#: The package's backends; every other implementation is a baseline.
OURS = ("cpu", "triton", "cuda", "blocked", "reference")
#: Smallest n of the README's table.
HEADLINE_FROM = 1024
#: Smallest n that enters the fit of the growth: below it, launches and caches dominate.
FIT_FROM = 2048


def read(file: Path) -> list[Row]:
    """Read the rows of a file; of repeated measurements only the newest."""
    newest: dict[tuple, Row] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        newest[tuple(row.get(key) for key in ("benchmark", "contestant", "n", *SHARED))] = row
    return list(newest.values())


def one_line(row: Row) -> str:
    """Format a row for the terminal."""
    what = f"{row['benchmark']:13} {row['contestant']:28} {row['objective']} {row['negatives']} "
    what += f"n={row['n']} D={row['dim']} {row['dtype']}"
    if row["benchmark"] == "memory":
        peak = row["peak_extra_bytes"]
        return f"{what}: " + (f"{peak / 1e6:,.1f} MB" if peak is not None else row["error"])
    parts = [f"{row['median_in_gemms']:.4g} of a GEMM"]
    parts += [f"{row['median_ms']:.3f} ms"] if row.get("median_ms") else []
    parts += [f"{row['speedup_over_eager']:.2f}x eager"] if row.get("speedup_over_eager") else []
    return f"{what}: {', '.join(parts)}, gradient error {row['gradient_error']:.0e}"


def best(rows: Iterable[Row], field: str) -> Row | None:
    """Find the row with the smallest value of a column."""
    return min((row for row in rows if row.get(field) is not None), key=lambda row: row[field], default=None)


def fitted_power(points: list[tuple[int, float]]) -> float | None:
    """Fit p in time ∝ n^p by least squares on logarithms, n ≥ FIT_FROM; None below two points."""
    logs = [(math.log(n), math.log(t)) for n, t in points if n >= FIT_FROM]
    if len(logs) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


#: The columns whose values all rows of one table share.
SHARED = ("negatives", "objective", "dtype", "dim", "threads", "device", "torch")


def counted(threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"


def groups(rows: list[Row], benchmark: str, keys: tuple[str, ...] = SHARED) -> dict[tuple, list[Row]]:
    """Group one benchmark's rows into tables."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["benchmark"] == benchmark:
            found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def table(rows: list[Row], field: str, show) -> list[str]:
    """Format implementations × n: the package's first, the others by the last column."""
    sizes = sorted({row["n"] for row in rows})
    names: dict[str, dict[int, Row]] = {}
    for row in rows:
        names.setdefault(row["contestant"], {})[row["n"]] = row

    def last(name: str) -> float:
        value = names[name].get(max(names[name]), {}).get(field)
        return math.inf if value is None else value

    order = sorted(names, key=lambda name: (name not in OURS, -max(names[name]), last(name)))
    lines = [f"| | {' | '.join(f'n = {n:,}' for n in sizes)} |", "|---|" + "---|" * len(sizes)]
    for name in order:
        lines.append(f"| `{name}` | " + " | ".join(show(names[name].get(n)) for n in sizes) + " |")
    return lines


def tables(rows: list[Row]) -> str:
    """Markdown: times as multiples of the package's fastest backend, memory in MB, exponents of the growth."""
    out: list[str] = []
    alone, lines = by_objective(rows)
    compared = [row for row in rows if row not in alone]
    for benchmark, what in (("loss+gradient", "Loss and gradient"), ("loss", "Loss alone"), ("backward", "Backward alone")):
        for (negatives, objective, dtype, dim, threads, device, torch), those in groups(compared, benchmark).items():
            ours = {n: best((r for r in those if r["n"] == n and r["contestant"] in OURS), "median_in_gemms")
                    for n in {r["n"] for r in those}}  # fmt: skip

            def show(row: Row | None, ours=ours) -> str:
                if row is None:
                    return ""
                base = ours[row["n"]]
                if base is None:
                    return f"{row['median_in_gemms']:.3g}"
                return f"{row['median_in_gemms'] / base['median_in_gemms']:.3g}"

            unit = "this package's fastest backend" if any(ours.values()) else "a 4096³ GEMM"
            out += [f"**{what}**: {objective}, `{negatives}`, D = {dim}, {dtype}, {counted(threads)}, {device}, "
                    f"torch {torch}; run time relative to {unit}.", ""]  # fmt: skip
            out += [*table(those, "median_in_gemms", show), ""]
    out += lines
    for (negatives, objective, dtype, dim, _, device, torch), those in groups(rows, "memory").items():
        out += [f"**Peak memory** on top of the inputs, in MB: {objective}, `{negatives}`, D = {dim}, {dtype}, {device}, "
                f"torch {torch}.", ""]  # fmt: skip

        def megabytes(row: Row | None) -> str:
            if row is None:
                return ""
            peak = row["peak_extra_bytes"]
            return "did not run" if peak is None else f"{peak / 1e6:,.0f}" if peak >= 1e7 else f"{peak / 1e6:.1f}"

        out += [*table(those, "peak_extra_bytes", megabytes), ""]
    for (negatives, objective, dtype, dim, *_), those in groups(rows, "loss+gradient").items():
        powers = [(name, fitted_power(points)) for name, points in curves(those).items()]
        shown = [f"`{name}` {power:.2f}" for name, power in powers if power is not None]
        if shown:
            out += [f"Run time grows as n^p, with p fitted over n ≥ {FIT_FROM:,} ({objective}, `{negatives}`, D = {dim}, "
                    f"{dtype}): {', '.join(shown)}.", ""]  # fmt: skip
    return "\n".join(out)


def by_objective(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """Rows of the package alone, of objectives that it alone computes, and lines of tables of them with InfoNCE's beside."""
    keys = tuple(key for key in SHARED if key != "objective")
    alone: list[Row] = []
    lines: list[str] = []
    for values, those in groups(rows, "loss+gradient", ("contestant", *keys)).items():
        contestant, negatives, dtype, dim, threads, device, torch = values
        others = [row for row in those if row["objective"] != "infonce"]
        sizes = {row["n"] for row in others}
        bases = [row for row in those if row["objective"] == "infonce" and row["n"] in sizes]
        if contestant in OURS and bases:
            alone += others
            shown = [{**row, "contestant": row["objective"]} for row in (*bases, *others)]
            lines += [f"**Objectives**: loss and gradient with `{contestant}`, `{negatives}`, D = {dim}, {dtype}, "
                      f"{counted(threads)}, {device}, torch {torch}; run time relative to a 4096³ GEMM.", ""]  # fmt: skip
            lines += [*table(shown, "median_in_gemms", lambda row: f"{row['median_in_gemms']:.3g}" if row else ""), ""]
    return alone, lines


def curves(rows: list[Row]) -> dict[str, list[tuple[int, float]]]:
    """Collect (n, time in GEMMs) of every implementation."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row["n"]):
        found.setdefault(row["contestant"], []).append((row["n"], row["median_in_gemms"]))
    return found


def plot(rows: list[Row], path: Path) -> bool:
    """Plot time and peak memory against n, one column per mode; False below two sizes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = {k: v for k, v in groups(rows, "loss+gradient").items() if len({r["n"] for r in v}) > 1}
    if not timed:
        return False
    remembered = groups(rows, "memory")
    figure, axes = pyplot.subplots(2, len(timed), figsize=(5.2 * len(timed), 7.6), layout="constrained", squeeze=False)
    names = sorted({row["contestant"] for those in timed.values() for row in those}, key=lambda name: (name not in OURS, name))
    colors = {name: pyplot.get_cmap("tab20")(k % 20) for k, name in enumerate(names)}
    for column, (key, those) in enumerate(timed.items()):
        negatives, objective, dtype, dim, *_ = key
        time, memory = axes[:, column]
        for name, points in curves(those).items():
            power = fitted_power(points)
            label = f"{name}, n^{power:.2f}" if power is not None else name
            style = {"color": colors[name], "linewidth": 2.2 if name in OURS else 1, "marker": "o", "markersize": 3}
            time.loglog(*zip(*points, strict=True), label=label, **style)
            peaks = [(r["n"], r["peak_extra_bytes"] / 1e6) for r in sorted(remembered.get(key, []), key=lambda r: r["n"])
                     if r["contestant"] == name and r["peak_extra_bytes"]]  # fmt: skip
            if peaks:
                memory.loglog(*zip(*peaks, strict=True), **style)
        time.set(title=f"{objective}, {negatives}, D = {dim}, {dtype}", ylabel="loss + gradient, relative to a 4096³ GEMM")
        memory.set(xlabel="n (rows of both views)", ylabel="peak memory on top of the inputs, MB")
        for axis in (time, memory):
            axis.grid(alpha=0.3)
        time.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def write(rows: list[Row], out: Path) -> list[Path]:
    """Write tables.md and, given two sizes and matplotlib, growth.png; return the files."""
    (out / "tables.md").write_text(tables(rows))
    try:
        drawn = plot(rows, out / "growth.png")
    except ImportError:
        drawn = False
    return [out / "rows.jsonl", out / "tables.md", *([out / "growth.png"] if drawn else [])]


# --- the documents --------------------------------------------------------------------------------


def newest_machine(rows: list[Row]) -> list[Row]:
    """Select the last measured device's rows, with the torch version of most of them."""
    here = [row for row in rows if row["device"] == rows[-1]["device"]]
    torch = Counter(row["torch"] for row in here).most_common(1)[0][0]
    return [row for row in here if row["torch"] == torch]


def headline(rows: list[Row], dim: int = 128, dtype: str = "float32", objective: str = "infonce") -> str:
    """The README's table: the fastest backend beside eager, torch.compile and the best other package, in every mode."""
    lines = [
        "| mode | n = 2N | fraction of GEMM rate | eager (×) | torch.compile (×) | fastest other package (×) "
        "| memory (MB) | best alternative (MB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    fixed = {"dim": dim, "dtype": dtype, "objective": objective}
    here = [row for row in rows if fixed.items() <= row.items() and row["n"] >= HEADLINE_FROM]
    for negatives in ("two_view", "cross_view"):
        for n in sorted({row["n"] for row in here if row["negatives"] == negatives}):
            those = [row for row in here if (row["negatives"], row["n"]) == (negatives, n)]
            timed = [row for row in those if row["benchmark"] == "loss+gradient"]
            ours = best((row for row in timed if row["contestant"] in OURS), "median_in_gemms")
            if ours is None:
                continue

            def over(row: Row | None, name: bool = False, ours: Row = ours) -> str:
                if row is None:
                    return ""
                text = f"{row['median_in_gemms'] / ours['median_in_gemms']:.1f}"
                return f"{text} ({row['contestant']})" if name else text

            others = [row for row in timed if row["contestant"] not in (*OURS, "eager", "compiled")]
            named = {row["contestant"]: row for row in timed}
            peaks = [row for row in those if row["benchmark"] == "memory"]
            mine = next((row for row in peaks if row["contestant"] == ours["contestant"]), None)
            least = best((row for row in peaks if row["contestant"] not in OURS), "peak_extra_bytes")
            cells = (
                negatives, f"{n:,}", f"{ours['fraction_of_gemm_rate']:.2f}", over(named.get("eager")),
                over(named.get("compiled")), over(best(others, "median_in_gemms"), True),
                f"{mine['peak_extra_bytes'] / 1e6:,.1f}" if mine else "",
                f"{least['peak_extra_bytes'] / 1e6:,.1f} ({least['contestant']})" if least else "",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def machine(row: Row) -> str:
    return (f"{row['device']}, {counted(row['threads'])}, kernels `{row['kernels']}`, torch {row['torch']}, "
            f"Python {row['python']}, commit {row['commit']}")  # fmt: skip


def training(rows: list[Row]) -> str:
    """Throughput of `alphacl train` by backend, and the loss's share of the step."""
    lines = [
        "| batch | n | backend | throughput relative to `reference` | share of the step spent in the loss |",
        "|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["benchmark"] == "training"):
        ratio = f"{row['speedup_over_reference']:.2f}" if row["speedup_over_reference"] else ""
        cells = f"{row['batch_size']:,}", f"{row['n']:,}", f"`{row['contestant']}`", ratio, f"{row['loss_share']:.1%}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sections(rows: list[Row]) -> dict[Path, list[str]]:
    """Format the texts between the marks of each document, in order."""
    calls = [row for row in rows if row["benchmark"] != "training"]
    newest = newest_machine(calls)
    ours = next(row for row in reversed(newest) if row["kernels"])
    where = f"Measured on {machine(ours)}.\n"
    older = [row for row in calls if row not in newest]
    return {
        ROOT / "README.md": [headline(newest)],
        ROOT / "docs" / "benchmarks.md": [
            f"{where}\n{tables(newest)}", training(rows), f"{tables(older)}" if older else "",
        ],
    }  # fmt: skip


def filled(text: str, parts: list[str]) -> str:
    """Replace the text between a document's marks by ``parts``."""
    pieces = text.split(BEGIN)
    if len(pieces) != len(parts) + 1:
        raise ValueError(f"{len(parts)} marks are expected, found {len(pieces) - 1}")
    out = pieces[0]
    for piece, part in zip(pieces[1:], parts, strict=True):
        _, end, rest = piece.partition(END)
        if not end:
            raise ValueError(f"a mark is not closed by {END}")
        out += f"{BEGIN}\n\n{part.strip()}\n\n{END}{rest}"
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    rows = read(RESULTS)
    for file, parts in sections(rows).items():
        if given.write:
            file.write_text(filled(file.read_text(), parts))
        else:
            print(f"--- {file.name}\n" + "\n".join(parts))
    if given.write:
        calls = newest_machine([row for row in rows if row["benchmark"] != "training"])
        plot([row for row in calls if row["dim"] == 128 and row["dtype"] == "float32"], ROOT / "docs" / "benchmarks.png")


if __name__ == "__main__":
    main()
