"""Turn rows of `benchmarks.bench` into tables and plots, also those of the documents.

python -m benchmarks.report            # print the documents' tables
python -m benchmarks.report --write    # write them, from benchmarks/results
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from alphacl_fast import journal
from alphacl_fast.journal import Row

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.jsonl"
#: Rows of `alphacl reproduce evidence`, a file for each of its parts.
EVIDENCE = RESULTS.parent / "evidence"
#: Rows of `benchmarks.step`.
STEPS = RESULTS.parent / "step.jsonl"
#: Rows of `benchmarks.adapters`.
ADAPTERS = RESULTS.parent / "adapters.jsonl"
#: Rows of `tests/same_speed.py` beside an earlier version.
BEFORE = RESULTS.parent / "before.jsonl"
BEGIN, END = "<!-- from rows: python -m benchmarks.report --write -->", "<!-- end of rows -->"
#: The package's backends; every other implementation is a baseline.
OURS = ("cpu", "triton", "cuda", "blocked", "reference")
PLAIN = ("eager", "compiled")
NEGATIVES = ("two_view", "cross_view", "one_view")
#: Smallest n of the README's table.
HEADLINE_FROM = 256
#: Smallest n that enters the fit of the growth: below it, launches and caches dominate.
FIT_FROM = 2048


def read(file: Path) -> list[Row]:
    """Read the rows of a file; of repeated measurements only the newest."""
    newest: dict[tuple, Row] = {}
    for row in journal.read(file):
        newest[tuple(map(row.get, ("benchmark", "contestant", "n", *SHARED)))] = row
    return list(newest.values())


#: Columns of a row's line, with their formats.
FORMATS = {
    "where": "{}", "median_in_gemms": "{:.4g} GEMMs", "fraction_of_gemm_rate": "{:.3f} of GEMM",
    "median_ms": "{:.3f} ms",
    "p20_ms": "p20 {:.3f}", "p80_ms": "p80 {:.3f}",
    "graph_over_launched": "{:.2f} of a launched step", "speedup_over_eager": "{:.1f}x eager",
    "speedup_over_compiled": "{:.1f}x compiled",
    "launches": "{:.1f} launches", "microseconds": "{:.0f} µs", "errors_found": "{} errors",
    "peak_extra_bytes": "+{:.2e} bytes", "gradient_error": "err {:.0e}",
}  # fmt: skip


def one_line(row: Row) -> str:
    """Format a row for the terminal."""
    who = next(filter(None, map(row.get, ("contestant", "engine", "backend", "phase"))), "")
    what = [row["benchmark"] if row["benchmark"] != "loss+gradient" else "", who]
    what += [row.get(name) for name in ("objective", "dtype", "negatives", "layout", "checker")]
    named = ["n", "dim"]
    if row["benchmark"] == "check":
        named += ["options", "similarity", "symmetric", "reduction", "tau"]
    what += [f"{name}={row[name]}" for name in named if name in row]
    what += [f"splits={row['splits']}"] if row.get("splits") else []
    what += [name for name in ("learn_tau", "nan") if row.get(name)]
    status = row.get("status", "")
    facts = [] if status == "ok" else [f"{status.upper()} {row.get('error') or ''}".strip()[:300]]
    facts += [form.format(row[name]) for name, form in FORMATS.items() if row.get(name) is not None]
    told = ", ".join(filter(None, facts)) or status
    return f"{' '.join(str(word) for word in what if word)}: {told}"


def best(rows: Iterable[Row], field: str) -> Row | None:
    """Find the row with the smallest value of a column."""
    known = (row for row in rows if row.get(field) is not None)
    return min(known, key=lambda row: row[field], default=None)


def fitted_power(points: dict[int, float]) -> float | None:
    """Fit p in time ∝ n^p by least squares on logarithms, n ≥ FIT_FROM; None below two points."""
    logs = [(math.log(n), math.log(t)) for n, t in points.items() if n >= FIT_FROM]
    if len(logs) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


#: The columns whose values all rows of one table share.
SHARED = ("negatives", "objective", "dtype", "dim", "threads", "device", "torch")


def counted(threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"


def groups(
    rows: Iterable[Row], benchmark: str, keys: tuple[str, ...] = SHARED
) -> dict[tuple, list[Row]]:
    """Group one benchmark's rows into tables."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["benchmark"] == benchmark:
            found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def curves(rows: list[Row], field: str) -> dict[str, dict[int, float]]:
    """Collect n → value of every implementation; None values are left out."""
    found: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["n"]):
        if row[field] is not None:
            found.setdefault(row["contestant"], {})[row["n"]] = row[field]
    return found


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Format the lines of a table."""
    header = list(header)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def table(rows: list[Row], field: str, show: Callable[[Row], str]) -> list[str]:
    """Format implementations × n: the package's first, the others by the last column."""
    found = {(row["contestant"], row["n"]): row for row in rows}
    last = {row["contestant"]: row for row in sorted(rows, key=lambda row: row["n"])}

    def order(name: str) -> tuple:
        value = last[name].get(field)
        return name not in OURS, -last[name]["n"], math.inf if value is None else value

    sizes = sorted({row["n"] for row in rows})
    return markdown(
        ["", *(f"n = {n:,}" for n in sizes)],
        (
            [f"`{name}`", *(show(found[name, n]) if (name, n) in found else "" for n in sizes)]
            for name in sorted(dict.fromkeys(row["contestant"] for row in rows), key=order)
        ),
    )


def section(
    what: str, end: str, rows: list[Row], field: str, show: Callable[[Row], str]
) -> list[str]:
    """Format a table with a heading; ``rows`` share their problem and place."""
    row = rows[0]
    about = f"{problem(row)}, {counted(row['threads'])}, {row['device']}, torch {row['torch']}"
    return [f"**{what}{about}{end}.", "", *table(rows, field, show), ""]


def problem(row: Row) -> str:
    return f"{row['objective']}, `{row['negatives']}`, D = {row['dim']}, {row['dtype']}"


def times(row: Row, base: float = 1.0) -> str:
    return f"{row['median_in_gemms'] / base:.3g}"


def megabytes(row: Row) -> str:
    peak = row["peak_extra_bytes"]
    if peak is None:
        return "did not run"
    return f"{peak / 1e6:,.0f}" if peak >= 1e7 else f"{peak / 1e6:.1f}"


def tables(rows: list[Row]) -> str:
    """Format run times relative to the package's fastest backend, memory in MB, and growth."""
    out: list[str] = []
    alone, lines = by_objective(rows)
    compared = [row for row in rows if row not in alone]
    for benchmark, what in (
        ("loss+gradient", "Loss and gradient"),
        ("loss", "Loss alone"),
        ("backward", "Backward alone"),
    ):
        for those in groups(compared, benchmark).values():
            bases: dict[int, float] = {}
            for row in those:
                if row["contestant"] in OURS:
                    n, took = row["n"], row["median_in_gemms"]
                    bases[n] = min(took, bases.get(n, took))
            unit = "this package's fastest backend" if bases else "a 4096³ GEMM"
            out += section(
                f"{what}**: ", f"; run time relative to {unit}", those, "median_in_gemms",
                lambda row, bases=bases: times(row, bases.get(row["n"], 1.0)),
            )  # fmt: skip
    out += lines
    for those in groups(rows, "memory").values():
        what = "Peak memory** on top of the inputs, in MB: "
        out += section(what, "", those, "peak_extra_bytes", megabytes)
    for those in groups(rows, "loss+gradient").values():
        points = curves(those, "median_in_gemms")
        powers = {name: fitted_power(curve) for name, curve in points.items()}
        shown = [f"`{name}` {power:.2f}" for name, power in powers.items() if power is not None]
        if shown:
            fit = f"with p fitted over n ≥ {FIT_FROM:,} ({problem(those[0])})"
            out += [f"Run time grows as n^p, {fit}: {', '.join(shown)}.", ""]
    return "\n".join(out)


def by_objective(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """Rows of objectives that the package alone computes, and their tables beside InfoNCE."""
    keys = tuple(key for key in SHARED if key != "objective")
    compared = {row["objective"] for row in rows if row["contestant"] not in OURS}
    alone: list[Row] = []
    lines: list[str] = []
    for those in groups(rows, "loss+gradient", ("contestant", *keys)).values():
        others = [row for row in those if row["objective"] not in {"infonce", *compared}]
        sizes = {row["n"] for row in others}
        bases = [row for row in those if row["objective"] == "infonce" and row["n"] in sizes]
        name = those[0]["contestant"]
        if name in OURS and bases:
            alone += others
            what, end = f"loss and gradient with `{name}`", "; run time relative to a 4096³ GEMM"
            shown = [
                {**row, "contestant": row["objective"], "objective": what}
                for row in (*bases, *others)
            ]
            lines += section("Objectives**: ", end, shown, "median_in_gemms", times)
    return alone, lines


@contextlib.contextmanager
def figure(path: Path, rows: int, columns: int, width: float, height: float) -> Iterator[Any]:
    """Give an array of axes, each so many inches large, to draw on, and write the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = width * columns, height * rows
    drawn, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    yield axes
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)


#: The package's own lines; baselines have thinner lines in other colours.
OWN_STYLE = {
    "cpu": {"color": "black", "linewidth": 3.2, "zorder": 3},
    "cuda": {"color": "black", "linewidth": 3.2, "zorder": 3},
    "triton": {"color": "dimgray", "linewidth": 2.6, "zorder": 3},
    "blocked": {"color": "gray", "linewidth": 1.8, "linestyle": "--"},
}


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Choose how the line of each implementation looks."""
    from matplotlib import colormaps

    others = sorted({*names} - {*OWN_STYLE})
    drawn = {
        name: {"color": colormaps["tab10"](k % 10), "linewidth": 1.2}
        for k, name in enumerate(others)
    }
    return {
        name: {"marker": "o", "markersize": 3, **style}
        for name, style in {**drawn, **OWN_STYLE}.items()
    }


def plot(rows: list[Row], path: Path) -> bool:
    """Plot time and peak memory against n, one column per mode; False below two sizes."""
    timed = groups(rows, "loss+gradient")
    timed = {key: those for key, those in timed.items() if len({row["n"] for row in those}) > 1}
    if not timed:
        return False
    remembered = groups(rows, "memory")
    style = styles(row["contestant"] for those in timed.values() for row in those)
    with figure(path, 2, len(timed), 5.2, 3.8) as axes:
        for (time, memory), (key, those) in zip(axes.T, timed.items(), strict=True):
            peaks = curves(remembered.get(key, []), "peak_extra_bytes")
            for name, points in curves(those, "median_in_gemms").items():
                power = fitted_power(points)
                label = f"{name}, n^{power:.2f}" if power is not None else name
                time.loglog(points.keys(), points.values(), label=label, **style[name])
                used = {n: peak / 1e6 for n, peak in peaks.get(name, {}).items() if peak}
                memory.loglog(used.keys(), used.values(), **style[name])
            title, unit = problem(those[0]).replace("`", ""), "relative to a 4096³ GEMM"
            time.set(title=title, ylabel=f"loss + gradient, {unit}")
            memory.set(
                xlabel="n (rows of both views)", ylabel="peak memory on top of the inputs, MB"
            )
            for axis in (time, memory):
                axis.grid(alpha=0.3)
            time.legend(fontsize=7)
    return True


#: What the picture of the README shows, with its labels.
SHOWN = {
    "cpu": "alphacl_fast", "eager": "eager PyTorch", "compiled": "torch.compile",
    "lightly": "lightly", "pytorch_metric_learning": "pytorch-metric-learning",
}  # fmt: skip


def overview(rows: list[Row], path: Path) -> None:
    """Plot run time relative to this package, and peak memory, of two_view InfoNCE against n."""
    fixed = {"dim": 128, "dtype": "float32", "objective": "infonce", "negatives": "two_view"}
    those = [row for row in rows if fixed.items() <= row.items() and row["contestant"] in SHOWN]
    times = curves([row for row in those if row["benchmark"] == "loss+gradient"], "median_in_gemms")
    peaks = curves([row for row in those if row["benchmark"] == "memory"], "peak_extra_bytes")
    style = styles(SHOWN)
    with figure(path, 1, 2, 4.6, 3.4) as axes:
        time, memory = axes[0]
        for name, label in SHOWN.items():
            points = {n: t / times["cpu"][n] for n, t in times.get(name, {}).items()}
            time.loglog(points.keys(), points.values(), label=label, **style[name])
            used = {n: peak / 1e6 for n, peak in peaks.get(name, {}).items() if peak}
            memory.loglog(used.keys(), used.values(), label=label, **style[name])
        time.set(xlabel="n = 2N rows", ylabel="run time / alphacl_fast's")
        memory.set(xlabel="n = 2N rows", ylabel="peak memory, MB")
        ticks = [1, 2, 5, 10, 20, 50]
        time.set_yticks(ticks, map(str, ticks))
        time.set_yticks([], minor=True)
        for axis in (time, memory):
            axis.grid(alpha=0.3)
        lines = time.get_legend_handles_labels()
        time.figure.legend(*lines, loc="outside upper center", ncols=len(SHOWN), fontsize=8)


def write(rows: list[Row], out: Path) -> list[Path]:
    """Write tables.md and, given two sizes and matplotlib, growth.png; return the files."""
    (out / "tables.md").write_text(tables(rows))
    files = [out / "rows.jsonl", out / "tables.md"]
    with contextlib.suppress(ImportError):
        files += [out / "growth.png"] if plot(rows, out / "growth.png") else []
    return files


# --- the documents --------------------------------------------------------------------------------


def newest_machine(rows: list[Row]) -> list[Row]:
    """Select the last measured machine's rows, with the torch version of most of them."""
    machine = ("device", "capability")  # CPUs of one name may have other instructions
    here = [row for row in rows if all(row[key] == rows[-1][key] for key in machine)]
    torch = Counter(row["torch"] for row in here).most_common(1)[0][0]
    return [row for row in here if row["torch"] == torch]


def headline(rows: list[Row]) -> str:
    """Format the README's table: float32 InfoNCE of 128 features, in every mode.

    It compares the fastest backend with eager, torch.compile and the best other package.
    """
    lines = []
    fixed = {"dim": 128, "dtype": "float32", "objective": "infonce"}
    here = [row for row in rows if fixed.items() <= row.items() and row["n"] >= HEADLINE_FROM]
    where = {(row["negatives"], row["n"]): None for row in here}
    for negatives, n in sorted(where, key=lambda key: (NEGATIVES.index(key[0]), key[1])):
        those = [row for row in here if (row["negatives"], row["n"]) == (negatives, n)]
        timed = {row["contestant"]: row for row in those if row["benchmark"] == "loss+gradient"}
        peaks = {row["contestant"]: row for row in those if row["benchmark"] == "memory"}
        ours = best((timed[name] for name in OURS if name in timed), "median_in_gemms")
        if ours is None:
            continue
        others = (row for name, row in timed.items() if name not in (*OURS, *PLAIN))
        compared = [*map(timed.get, PLAIN), best(others, "median_in_gemms")]
        ratios = [
            row and f"{row['median_in_gemms'] / ours['median_in_gemms']:.1f}" for row in compared
        ]
        least = best((row for name, row in peaks.items() if name not in OURS), "peak_extra_bytes")
        bytes_of = [peaks.get(ours["contestant"]), least]
        memory = [row and f"{row['peak_extra_bytes'] / 1e6:,.1f}" for row in bytes_of]
        for cells, row in ((ratios, compared[-1]), (memory, least)):
            cells[-1] = row and f"{cells[-1]} ({row['contestant']})"
        rate = f"{ours['fraction_of_gemm_rate']:.2f}"
        lines.append([negatives, f"{n:,}", rate, *(cell or "" for cell in (*ratios, *memory))])
    header = (
        "mode", "n = 2N", "fraction of GEMM rate", "eager (×)", "torch.compile (×)",
        "fastest other package (×)", "memory (MB)", "best alternative (MB)",
    )  # fmt: skip
    return "\n".join(markdown(header, lines)) + "\n"


def training(rows: list[Row]) -> str:
    """Format the throughput of `alphacl train` by backend, and the loss's share of the step."""
    header = (
        "batch", "n", "backend", "throughput relative to `reference`",
        "share of the step spent in the loss",
    )  # fmt: skip
    lines = []
    for row in (row for row in rows if row["benchmark"] == "training"):
        ratio = f"{row['speedup_over_reference']:.2f}" if row["speedup_over_reference"] else ""
        sizes = [f"{row[key]:,}" for key in ("batch_size", "n")]
        lines.append([*sizes, f"`{row['contestant']}`", ratio, f"{row['loss_share']:.1%}"])
    return "\n".join(markdown(header, lines)) + "\n"


def _table(loss: str) -> str:
    """The name of the table that shows a loss: "supcon, 10 classes" is a row of "supcon"."""
    return loss.partition(",")[0]


def small_batches(rows: list[Row]) -> str:
    """Format the rows of `benchmarks.step`: what others take relative to one native step, and
    fractions of a large product's rate.
    """
    shown = newest(rows, "loss", "negatives", "dim", "dtype", "threads", "pairs")
    parts = [f"{measured(shown)}."]
    for name in dict.fromkeys(_table(row["loss"]) for row in shown):
        found = [row for row in shown if _table(row["loss"]) == name]
        parts.append(rates(found) if name == "rate" else ratios(found))
    return "\n\n".join(parts)


def ratios(found: list[Row]) -> str:
    """Format the rows of a loss: others' time over ours."""
    modes = [*dict.fromkeys(row.get("negatives") for row in found)]
    found.sort(key=lambda row: (modes.index(row.get("negatives")), row["pairs"]))
    others = list(found[0]["over_ours"])
    lines = [
        [
            f"{row['loss']} {row.get('negatives', '')}".strip(), f"{row['pairs']:,}",
            *(f"{row['over_ours'][other]:.2f}" for other in others),
        ]
        for row in found
    ]  # fmt: skip
    return "\n".join(markdown(["loss", "N", *(f"{x} (×)" for x in others)], lines))


#: The first cells of a line → size → text.
Cells = dict[tuple[str, ...], dict[int, str]]


def by_size(header: Iterable[str], size: str, cells: Cells) -> str:
    """Format a table with a column for each size; ``size`` is the sizes' symbol."""
    sizes = sorted({n for line in cells.values() for n in line})
    lines = [[*first, *(line.get(n, "") for n in sizes)] for first, line in cells.items()]
    return "\n".join(markdown([*header, *(f"{size} = {n:,}" for n in sizes)], lines))


def newest(rows: list[Row], *keys: str) -> list[Row]:
    """Return the last of the rows that agree in ``keys``, in the order of the first ones."""
    return list({tuple(row.get(key) for key in keys): row for row in rows}.values())


def measured(shown: list[Row]) -> str:
    """Say on which machines, with how many threads and at which commits a table was measured."""
    parts = (
        [f"{row['device']} ({row['capability']})" for row in shown],
        [counted(row["threads"]) for row in shown],
        [f"torch {row['torch']}" for row in shown],
    )
    where = ", ".join(" and ".join(dict.fromkeys(part)) for part in parts)
    commits = dict.fromkeys(row["commit"] for row in shown)
    return f"Measured on {where}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def rates(found: list[Row]) -> str:
    """Format fractions of a large product's rate: a line per setting, a column per size."""
    cells: Cells = {}
    for row in found:
        where = f"{row['negatives']}, D = {row['dim']}, {row['dtype']}, {counted(row['threads'])}"
        for workspace, fraction in row["fractions"].items():
            cells.setdefault((where, workspace), {})[row["pairs"]] = f"{fraction:.2f}"
    return by_size(("fraction of the product's rate", "workspace"), "N", cells)


def adapters(rows: list[Row]) -> str:
    """Format the rows of `benchmarks.adapters`: our time divided by the replaced class's time."""
    shown, cells = newest(rows, "contestant", "n"), {}
    for row in shown:
        ratio = row["ours_over_theirs"]
        text = "no memory" if ratio is None else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"
        cells.setdefault((f"`{row['contestant']}`",), {})[row["n"]] = text
    return f"{measured(shown)}.\n\n{by_size(('ours over theirs',), 'n', cells)}"


def over_before(rows: list[Row]) -> str:
    """Format the rows of `tests/same_speed.py`: our time divided by an earlier version's time."""
    keys = "capability", "kernels", "loss", "negatives", "dtype", "pairs"
    shown, cells = newest(rows, *keys), {}
    for row in shown:
        loss = f"{row['loss']} {row['negatives']}, {row['dtype']}"
        where = row["capability"], f"`{row['kernels']}`", loss
        cells.setdefault(where, {})[row["pairs"]] = f"{row['over_before']:.2f}"
    table = by_size(("widest instructions", "kernels", "loss"), "N", cells)
    before = " and ".join(dict.fromkeys(row["before"] for row in shown))
    return f"{measured(shown)}, compared with commit {before}.\n\n{table}"


def sections(rows: list[Row]) -> dict[Path, list[str]]:
    """Format the texts between the marks of each document, in order."""
    calls = [row for row in rows if row["benchmark"] != "training"]
    newest = newest_machine(calls)
    ours = next(row for row in reversed(newest) if row["kernels"])
    where = f"{ours['device']}, {counted(ours['threads'])}, kernels `{ours['kernels']}`, torch "
    where += f"{ours['torch']}, Python {ours['python']}, commit {ours['commit']}"
    older = [row for row in calls if row not in newest]
    return {
        ROOT / "README.md": [headline(newest)],
        ROOT / "docs" / "benchmarks.md": [
            f"Measured on {where}.\n\n{tables(newest)}", small_batches(journal.read(STEPS)),
            over_before(journal.read(BEFORE)), training(rows), tables(older),
        ],
        ROOT / "docs" / "compat.md": [adapters(journal.read(ADAPTERS))],
        ROOT / "docs" / "results.md": evidence_tables(),
    }  # fmt: skip


def evidence_tables() -> list[str]:
    """Format the tables of every part of `alphacl reproduce evidence`."""
    from alphacl_fast.train import evidence, evidence_table

    return [evidence.table(part, EVIDENCE) for part in evidence_table.PARTS]


def filled(text: str, parts: list[str], begin: str = BEGIN, end_mark: str = END) -> str:
    """Replace the text between a document's marks by ``parts``."""
    pieces = text.split(begin)
    if len(pieces) != len(parts) + 1:
        raise ValueError(f"{len(parts)} marks are expected, found {len(pieces) - 1}")
    out = pieces[0]
    for piece, part in zip(pieces[1:], parts, strict=True):
        _, end, rest = piece.partition(end_mark)
        if not end:
            raise ValueError(f"a mark is not closed by {end_mark}")
        out += f"{begin}\n\n{part.strip()}\n\n{end_mark}{rest}"
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
        drawn = [row for row in calls if row["dim"] == 128 and row["dtype"] == "float32"]
        plot([row for row in drawn if row["objective"] == "infonce"], ROOT / "docs/benchmarks.png")
        overview(drawn, ROOT / "docs/overview.png")


if __name__ == "__main__":
    main()
