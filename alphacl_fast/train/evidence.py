"""``alphacl reproduce evidence``: every run of a part of `evidence_table`, a line of JSON for each.

A run that has its line in OUT/PART.jsonl is done, on whatever machine, so the queue goes on where
it was stopped. Until then its folder is OUT/unfinished/PART, an ordinary run that is resumed.

1. Baselines: raw pixels, and the encoder with the initial weights of seed 1.
2. Search: six runs of every contestant (`searched`). They train on all training images, without
   labels. kNN and probe are fitted with the labels of all but a held-out part, which judges.
   Instead, the part "setting" chooses width and epochs of the others with InfoNCE.
3. Seeds: runs with the best scale and learning rate, scored on the test images. Runs of one seed
   share initial weights, the order of the images and their views, so they are compared in pairs.
"""

import contextlib
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from alphacl_fast import journal
from alphacl_fast.journal import Row
from alphacl_fast.suggestions import did_you_mean

from . import checkpoint, evidence_report, storage
from .config import Config, Diverged, RunError
from .data import Data, load
from .device import pick_device, settings
from .evaluation import Split, extract, few_label_draws, raw_pixels, score, splits
from .evidence_table import (
    BATCH_SIZE,
    CONTESTANTS,
    DEVIATION,
    LEARNING_RATES,
    MARGIN,
    PARTS,
    RATES_ALONE,
    SCALES,
    SEARCH_SEED,
)
from .loop import train
from .models import Encoder, build
from .process_context import processes
from .weights import evaluated, of_encoder

FEW, DRAWS = 5, 10  # labels per class, and random choices of them, of the few-label accuracies
FEW_LABEL = ("knn_few", "probe_few")
BASELINES = ("raw pixels", "untrained encoder")
#: What a row says of the machine and the versions.
RECORDED = (
    "alphacl_fast", "commit", "torch", "torchvision", "scikit-learn", "python", "device_name",
    "capability", "cores",
)  # fmt: skip


class Run(NamedTuple):
    """A run of the queue, which its row repeats.

    Attributes:
        part: key of `PARTS`.
        phase: "baseline", "search" or "seed".
        name: contestant, candidate or baseline.
        given: the fields of Config that the part, the contestant and the seed decide.
    """

    part: str
    phase: str
    name: str
    given: dict

    def row(self, found: dict, about: dict) -> Row:
        """Make the run's row of what it is, what it found, and machine and versions."""
        return {**self._key(), **found, **about}

    def row_in(self, rows: list[Row]) -> Row | None:
        """Find the run's row, whatever it has found."""
        mine = self._key()
        for row in rows:
            if all(row.get(name) == value for name, value in mine.items()):
                return row
        return None

    def shown(self) -> str:
        """Describe the run in a line."""
        named = ("option", "temperature", "lr", "batch_size", "seed")
        known = (f"{name} {self.given[name]}" for name in named if self.given.get(name))
        return f"{self.phase}, {self.name}: {', '.join(known)}"

    def _key(self) -> dict:
        return {"part": self.part, "phase": self.phase, "name": self.name, **self.given}


class NotYet(RunError):
    """A part needs the choice of another part, which has not made it yet."""


class Progress(NamedTuple):
    """How :func:`evidence` ended.

    Attributes:
        file: the rows.
        done: runs that have their row.
        total: all runs of the part.
        signal: signal that stopped the queue, if any.
    """

    file: Path
    done: int
    total: int
    signal: int | None = None


def evidence(
    out: str | Path = "runs/evidence",
    *,
    part: str,
    data_root: str = "data",
    dry_run: bool = False,
) -> Progress:
    """Train and score the runs of a part that have no row yet, and print its table.

    Args:
        out: folder of the rows, PART.jsonl, and of the run in progress.
        part: key of `PARTS`.
        data_root: the data set, as in :class:`Config`.
        dry_run: whether to print the table of the rows that are there, and to train nothing.

    Returns:
        How far the part has come.

    Raises:
        RunError: an unknown part, an unusable data set or folder, or another process works on the
            same part in ``out``.
    """
    if part not in PARTS:
        raise RunError(
            f"--part must be one of {', '.join(PARTS)}, got {part!r}{did_you_mean(part, PARTS)}"
        )
    if processes() > 1:
        raise RunError("alphacl reproduce runs in one process, not under torchrun")
    out = Path(out)
    file = out / f"{part}.jsonl"
    if dry_run:
        progress = Progress(file, len(rows_of(part, out)), total(part))
    else:
        storage.check_writable(out)
        with storage.locked(out / "unfinished" / f"{part}-queue"):
            progress = _work_off(part, out, data_root)
    if progress.signal is None:
        print(table(part, out), flush=True)
    return progress


def _work_off(part: str, out: Path, data_root: str) -> Progress:
    file, signal, about = out / f"{part}.jsonl", None, _about()
    rows = journal.read(file)
    folder = out / "unfinished" / part
    _check_data(next(runs(part, rows, out)), data_root)
    for number, run in enumerate(runs(part, rows, out), 1):
        if run.row_in(rows) is None:
            print(f"{part}, run {number} of {total(part)}: {run.shown()}", flush=True)
            found, signal = _one(run, folder, data_root)
            if found is not None:
                row = run.row(found, about)
                with storage.writing(file):
                    journal.append(file, row)
                rows.append(row)
                shutil.rmtree(folder, ignore_errors=True)  # only now: a kill costs no training
        if signal is not None:
            break
    return Progress(file, len(rows_of(part, out)), total(part), signal)


def _check_data(run: Run, data_root: str) -> None:
    """Raise RunError unless the data set is there and has the number of classes of the part."""
    expected = PARTS[run.part].classes
    found = len(load(Config.create(**run.given, data_root=data_root)).classes)
    if found != expected:
        raise RunError(
            f"--part {run.part} needs a data set of {expected} classes, got {found} in {data_root}"
        )


def _about() -> dict:
    """Collect machine and versions before the first run: the checkout may change meanwhile."""
    about = checkpoint.environment(pick_device("auto"))
    about["capability"] = torch.backends.cpu.get_cpu_capability()
    return {name: about[name] for name in RECORDED}


def rows_of(part: str, out: str | Path) -> list[Row]:
    """Read the rows of a part's runs with today's settings, in the queue's order.

    Args:
        part: key of `PARTS`.
        out: folder of the rows.
    """
    out, found = Path(out), []
    rows = journal.read(out / f"{part}.jsonl")
    with contextlib.suppress(NotYet):
        for run in runs(part, rows, out):
            found.append(run.row_in(rows))
    return [row for row in found if row is not None]


def table(part: str, out: str | Path) -> str:
    """Format the tables of a part in Markdown.

    Args:
        part: key of `PARTS`.
        out: folder of the rows.
    """
    return evidence_report.table(part, rows_of(part, out), total(part))


# The queue


def total(part: str) -> int:
    """Count the runs of a part, baselines included; of a list of candidates, the most there are."""
    shape = PARTS[part]
    kinds = len(shape.candidates or ()) + len(shape.names) * max(1, len(shape.batch_sizes))
    return (
        len(BASELINES)
        + sum(len(searched(part, {}, name)) for name in shape.names if shape.held_out)
        + kinds * shape.seeds
    )


def runs(part: str, rows: list[Row], out: Path) -> Iterator[Run]:
    """Yield the runs of a part in order.

    Args:
        part: key of `PARTS`.
        rows: its rows. A run that depends on others is left out while they have no row, so the
            caller adds the row of a run before it asks for the next.
        out: folder of the rows of other parts.

    Raises:
        NotYet: the part needs the choice of another part, which has not made it yet.
    """
    shape = PARTS[part]
    fixed = {**shape.setting, **(_setting(out) if shape.uses else {})}
    yield from _baselines(part, fixed)
    if shape.candidates:
        yield from _of_candidates(part, rows)
    for name in shape.names:
        if shape.batch_sizes:
            yield from _of_batch_sizes(part, fixed, name, out)
        else:
            yield from _of_contestant(part, fixed, name, rows)


def _baselines(part: str, fixed: dict) -> list[Run]:
    candidates = PARTS[part].candidates
    first = next(iter(candidates.values())) if candidates else {}
    given = {**fixed, **first, "objective": "infonce", "option": {}, "seed": 1}
    return [Run(part, "baseline", name, given) for name in BASELINES]


def _of_candidates(part: str, rows: list[Row]) -> Iterator[Run]:
    """Yield a candidate's runs until one misses the margin; none after a candidate that passes."""
    for name in PARTS[part].candidates:
        for run in _candidate(part, name):
            yield run
            if not _has_margin(run, rows):
                break
        if _passes(part, name, rows):
            return


def _candidate(part: str, name: str) -> list[Run]:
    shape = PARTS[part]
    given = {**shape.setting, "objective": "infonce", "option": {}, **shape.candidates[name]}
    seeds = range(1, shape.seeds + 1)
    return [Run(part, "seed", name, {**given, "seed": seed}) for seed in seeds]


def _has_margin(run: Run, rows: list[Row]) -> bool:
    """Whether a run of InfoNCE is far enough above raw pixels."""
    raw, row = _baselines(run.part, PARTS[run.part].setting)[0].row_in(rows), run.row_in(rows)
    if row is None or raw is None or row["status"] == "failed":
        return False
    return 100 * (row["knn"] - raw["knn"]) >= MARGIN


def _passes(part: str, name: str, rows: list[Row]) -> bool:
    """Whether a candidate has the margin with every seed, and a small enough deviation."""
    deviation = _deviation(part, name, rows)
    return deviation is not None and deviation <= DEVIATION


def _deviation(part: str, name: str, rows: list[Row]) -> float | None:
    """Compute a candidate's standard deviation over seeds, in points; None without the margin."""
    candidate = _candidate(part, name)
    if not all(_has_margin(run, rows) for run in candidate):
        return None
    return statistics.stdev(100 * run.row_in(rows)["knn"] for run in candidate)


def _setting(out: Path) -> dict:
    """Return the chosen candidate's fields of Config.

    Where all were tried and none passes, it is the one that deviates least of those that have the
    margin.
    """
    file, candidates = out / "setting.jsonl", PARTS["setting"].candidates
    rows = journal.read(file)
    for name, fields in candidates.items():
        if _passes("setting", name, rows):
            return fields
    deviations = {name: _deviation("setting", name, rows) for name in candidates}
    usable = {name: x for name, x in deviations.items() if x is not None}
    over = all(run.row_in(rows) is not None for run in runs("setting", rows, out))
    if over and usable:
        return candidates[min(usable, key=usable.__getitem__)]
    raise NotYet(
        f"{file} has no setting of InfoNCE that is {MARGIN:g} points above raw pixels"
        + (": run --part setting first" if not over else ", and all candidates were tried")
    )


def _of_contestant(part: str, fixed: dict, name: str, rows: list[Row]) -> Iterator[Run]:
    """Yield the search, and then the seeds with its best settings."""
    search = searched(part, fixed, name)
    yield from search
    chosen = choice(search, rows, PARTS[part].judge)
    for seed in range(1, PARTS[part].seeds + 1) if chosen else ():
        yield Run(part, "seed", name, {**chosen, "seed": seed})


def _of_batch_sizes(part: str, fixed: dict, name: str, out: Path) -> Iterator[Run]:
    """Yield every batch size with the choice for CIFAR-10; lr grows with the root of the size."""
    search = searched("cifar10", fixed, name)
    chosen = choice(search, journal.read(out / "cifar10.jsonl"), PARTS["cifar10"].judge)
    if chosen is None:
        raise NotYet(f"the search of {name} is not over: run --part cifar10 first")
    for seed in range(1, PARTS[part].seeds + 1):
        for size in PARTS[part].batch_sizes:
            lr = chosen["lr"] * (size / BATCH_SIZE) ** 0.5
            yield Run(part, "seed", name, {**chosen, "batch_size": size, "lr": lr, "seed": seed})


def searched(part: str, fixed: dict, name: str) -> list[Run]:
    """List the runs of a contestant's search: six for every objective.

    Args:
        part: key of `PARTS`.
        fixed: fields of Config that all runs of the part share.
        name: key of `CONTESTANTS`.
    """
    objective, option, scale = CONTESTANTS[name]
    if scale is None:
        tried = [{"option": option, "lr": lr} for lr in RATES_ALONE]
    else:
        tried = [
            {"option": option, scale: value, "lr": lr}
            if scale == "temperature"
            else {"option": {**option, scale: value}, "lr": lr}
            for value in SCALES[scale]
            for lr in LEARNING_RATES
        ]
    shared = {**fixed, "objective": objective, "seed": SEARCH_SEED}
    return [Run(part, "search", name, {**shared, **values}) for values in tried]


def choice(search: list[Run], rows: list[Row], judge: str) -> dict | None:
    """Pick the fields of Config of the best run of a search, the first of several.

    Args:
        search: the runs.
        rows: the rows of their part.
        judge: the accuracy that decides.

    Returns:
        The run's fields; None if a run has no row yet, or if all of them diverged.
    """
    found = [run.row_in(rows) for run in search]
    if None in found or all(row["status"] == "failed" for row in found):
        return None
    return max(zip(search, found, strict=True), key=lambda pair: pair[1].get(judge, -1.0))[0].given


# One run


def _one(run: Run, folder: Path, data_root: str) -> tuple[dict | None, int | None]:
    """Train, or resume, and score one run.

    Returns:
        What it found, None if it was stopped, and the signal after which nothing else may start.
    """
    config = Config.create(**run.given, data_root=data_root)
    begun, cpu = time.monotonic(), time.process_time()
    resumed, signal = False, None
    if run.phase == "baseline":
        found = _baseline(run.name, config)
    else:
        resumed = _is_of(config, folder)
        if not resumed:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            outcome = train(config, folder, resume=resumed)
            if outcome.signal is not None:
                return None, outcome.signal
            found, signal = _judged(folder, config, run), outcome.late
        except Diverged as error:
            found = {"status": "failed", "reason": str(error)}
    # The first part of a resumed run was not measured.
    wall, used = time.monotonic() - begun, time.process_time() - cpu
    found["wall_seconds"] = None if resumed else round(wall, 1)
    found["cpu_seconds"] = None if resumed else round(used, 1)
    return found, signal


def _is_of(config: Config, folder: Path) -> bool:
    """Whether the run in ``folder`` has these settings and can be resumed."""
    try:
        return not checkpoint.saved_config(folder).differences(vars(config))
    except RunError:
        return False


def _baseline(name: str, config: Config) -> dict:
    """Score raw pixels or the untrained encoder on the test images."""
    with settings(config):
        data = load(config, pick_device(config.device))
        encoder = raw_pixels if name == "raw pixels" else build(config).to(data.device).encoder
        return _scores(splits({"": encoder}, data)[""])


def _judged(folder: Path, config: Config, run: Run) -> dict:
    """Score the encoder of a finished run."""
    _, state = checkpoint.open_run(folder, {})
    with settings(config):
        data = load(config, pick_device(config.device))
        encoder = build(config).to(data.device).encoder
        encoder.load_state_dict(of_encoder(evaluated(state)))
        if run.phase == "search":
            return _scores(_held_out(encoder, data, PARTS[run.part].held_out))
        return _scores(splits({"": encoder}, data)[""])


def _held_out(encoder: Encoder, data: Data, per_class: int) -> Split:
    """Split the training images: score on ``per_class`` of each class, and fit on the others."""
    features, labels = extract(data.train, {"": encoder}, data)
    (held,) = few_label_draws(labels, per_class, 1)
    fitted = torch.ones(len(labels), dtype=torch.bool)
    fitted[held] = False
    x = features[""]
    return Split(x[fitted], labels[fitted], x[held], labels[held], len(data.classes))


def _scores(split: Split) -> dict:
    row = score(split, FEW, DRAWS)
    return {"status": "finished", **row, **{name: row[name]["mean"] for name in FEW_LABEL}}
