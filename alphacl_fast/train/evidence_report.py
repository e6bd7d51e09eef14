"""Tables of the rows of ``alphacl reproduce evidence``, with paired tests over seeds.

Means are given with the standard error s/√n, where s is the standard deviation (n − 1) over n
seeds. A contestant is compared with the first one of its part by the differences of runs with equal
seeds: Student's paired t-test, whose statistic is the mean difference over its standard error with
n − 1 degrees of freedom, and Wilcoxon's signed-rank test (scipy.stats). Both are two-sided.
"""

import math
import statistics
from typing import NamedTuple

from scipy import stats

from alphacl_fast.journal import Row

from .evidence_table import CONTESTANTS, DEVIATION, MARGIN, PARTS, Part

TITLES = {
    "knn": "kNN",
    "probe": "probe",
    "knn_few": "kNN, 5 labels/class",
    "probe_few": "probe, 5 labels/class",
}


class Paired(NamedTuple):
    """Differences of runs with equal seeds, in points.

    Attributes:
        n: number of pairs.
        mean: mean difference.
        error: its standard error.
        t: p of the paired t-test; None below two pairs or if all differences are equal.
        wilcoxon: p of Wilcoxon's signed-rank test, whose smallest value for n pairs is 2^(1−n).
    """

    n: int
    mean: float
    error: float
    t: float | None
    wilcoxon: float | None


def paired(values: dict[int, float], base: dict[int, float]) -> Paired | None:
    """Compare two contestants.

    Args:
        values: seed → accuracy in per cent.
        base: the same of the contestant to compare with.

    Returns:
        The comparison over the seeds that both have; None if there is no such seed.
    """
    # Rounding errors of the accuracies would make equal differences unequal: Wilcoxon's ranks
    # depend on ties, and a t-test of equal differences has no p.
    differences = [round(values[seed] - base[seed], 9) for seed in values if seed in base]
    if not differences:
        return None
    mean, error = mean_and_error(differences)
    t = wilcoxon = None
    if len(differences) > 1 and error > 0:
        t = float(stats.ttest_1samp(differences, 0.0).pvalue)
        wilcoxon = float(stats.wilcoxon(differences).pvalue)
    return Paired(len(differences), mean, error, t, wilcoxon)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Compute the mean and its standard error, NaN for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread / math.sqrt(len(values))


def holm(values: list[float]) -> list[float]:
    """Correct p-values for their number by Holm's method."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, largest = [0.0] * len(values), 0.0
    for place, k in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[k]))
        corrected[k] = largest
    return corrected


def table(part: str, rows: list[Row], total: int) -> str:
    """Format the tables of a part in Markdown, with what their columns mean.

    Args:
        part: key of `PARTS`.
        rows: the rows of the part's runs.
        total: number of all runs of the part.
    """
    shape = PARTS[part]
    over = f"{len(rows)} of {'at most ' * bool(shape.candidates)}{total:,} runs are over"
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["phase"] == "seed":
            groups.setdefault((row["name"], row["batch_size"]), []).append(row)
    if not groups:
        return f"{over}, none of them one that is compared.\n" if rows else "No run is over yet.\n"
    lines = [["", "runs", "settings", *(TITLES[measure] for measure in shape.measures), "seconds"]]
    for row in rows:
        if row["phase"] == "baseline":
            values = (f"{100 * row[measure]:.1f}" for measure in shape.measures)
            lines.append([row["name"], "", "", *values, ""])
    lines += [_line(shape, name, those) for (name, _), those in groups.items()]
    text = [f"{over}.", "", *_markdown(lines), "", _meaning(shape, groups)]
    if len({name for name, _ in groups}) > 1 and shape.names:
        text += ["", *_comparison(shape, groups)]
    return "\n".join(text) + "\n"


def _line(shape: Part, name: str, rows: list[Row]) -> list[str]:
    """Format a contestant's or candidate's line."""
    means = [_mean([*_by_seed(rows, measure).values()]) for measure in shape.measures]
    used = [row["cpu_seconds"] for row in rows if row["cpu_seconds"] is not None]
    seconds = f"{statistics.median(used):.0f}" if used else "–"
    return [f"`{name}`", _count(rows, shape.seeds), _settings(shape, rows), *means, seconds]


def _comparison(shape: Part, groups: dict[tuple[str, int], list[Row]]) -> list[str]:
    """Format the differences to the first contestant, at the same batch size."""
    first, lines = (
        shape.names[0],
        [["", "measure", "pairs", "difference", "t", "t, Holm", "Wilcoxon"]],
    )
    for measure in shape.measures:
        compared = []
        for (name, size), those in groups.items():
            base = groups.get((first, size), [])
            found = paired(_by_seed(those, measure), _by_seed(base, measure))
            if name != first and found is not None:
                compared.append((name, size, found))
        tested = [found.t for _, _, found in compared if found.t is not None]
        corrected = iter(holm(tested))
        for name, size, found in compared:
            label = f"`{name}`" + f", batch {size:,}" * bool(shape.batch_sizes)
            adjusted = None if found.t is None else next(corrected)
            chances = map(_chance, (found.t, adjusted, found.wilcoxon))
            difference = _with_error(f"{found.mean:+.2f}", found.error)
            lines.append([label, TITLES[measure], str(found.n), difference, *chances])
    about = (
        f"Differences to `{first}` in points, over runs with equal seeds, mean ± standard error; p "
        "of the paired t-test, as it is and after Holm's correction for the number of rows with "
        "the same measure, and of Wilcoxon's signed-rank test:"
    )
    return [about, "", *_markdown(lines)]


def _by_seed(rows: list[Row], measure: str) -> dict[int, float]:
    """Collect seed → accuracy in per cent of the runs that finished."""
    return {row["seed"]: 100 * row[measure] for row in rows if row["status"] == "finished"}


def _mean(values: list[float]) -> str:
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return _with_error(f"{mean:.2f}", error)


def _with_error(mean: str, error: float) -> str:
    return mean if math.isnan(error) else f"{mean} ± {error:.2f}"


def _chance(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _count(rows: list[Row], seeds: int) -> str:
    diverged = sum(row["status"] == "failed" for row in rows)
    return f"{len(rows)} of {seeds}" + f", {diverged} diverged" * bool(diverged)


def _settings(shape: Part, rows: list[Row]) -> str:
    """Name what the search, or the list of candidates, has decided."""
    row = rows[0]
    scale = CONTESTANTS[row["name"]].scale if row["name"] in CONTESTANTS else "temperature"
    words = [] if scale is None else [f"{scale} {row.get(scale, row['option'].get(scale))}"]
    words.append(f"lr {row['lr']:.3g}")
    if shape.batch_sizes:
        words.append(f"batch {row['batch_size']:,}")
    values = [*_by_seed(rows, "knn").values()]
    if shape.candidates and len(values) > 1:
        words.append(f"kNN deviates by {statistics.stdev(values):.2f}")
    return ", ".join(words)


def _meaning(shape: Part, groups: dict[tuple[str, int], list[Row]]) -> str:
    """Say what the columns mean."""
    rows = [row for those in groups.values() for row in those]
    machines = sorted({f"{row['device_name']} with {row['capability']}" for row in rows})
    text = (
        "An accuracy is the percentage of test images that are classified correctly: the mean over "
        "the seeds ± its standard error. The probe is scored after its last epoch. The last column "
        "gives the median time of a run, training and scoring, on one core "
        f"({', '.join(machines)}, shared with other work)."
    )
    if shape.candidates:
        text += (
            " A candidate passes if its kNN accuracy is at least "
            f"{MARGIN:g} points above that of raw pixels with every seed and its standard "
            f"deviation over the seeds is at most {DEVIATION:g} points. The first one that passes "
            "is chosen. If none passes, the one with the smallest deviation is chosen among those "
            "that are far enough above raw pixels. A candidate gets no more seeds after a seed "
            "that is too close to them."
        )
    return text


def _markdown(lines: list[list[str]]) -> list[str]:
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return [rows[0], "|" + "---|" * len(lines[0]), *rows[1:]]
