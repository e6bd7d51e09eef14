"""The paper's comparison of objectives as one table: one ordinary run per row and seed, resumable.

This module does not decide how a run trains: recipes are the defaults of :class:`Config`, and all
runs of a table share every setting except objective, its options and seed.
"""

import dataclasses
import re
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from alphacl_fast.suggestions import did_you_mean

from . import checkpoint, storage
from .config import Config, Diverged, RunError, flag
from .device import pick_device
from .loop import Outcome, due, rehearse, stop_signals, train, try_out
from .process_context import processes
from .rows import DEFAULT_ROWS, OF_A_ROW, ROWS

TABLE, TEXT = "table.json", "table.md"
# Share of a budget kept for costs that a rehearsal of a few steps misses: checkpoints, other load.
RESERVE = 0.1
SLOW = 1.5  # a row slower than this multiple of all rows' median step is rehearsed a second time


class Published(NamedTuple):
    """A published accuracy in per cent.

    ``checked`` figures were read in the author's log; the others are recalled from the paper.
    """

    mean: float
    std: float | None = None
    checked: bool = False

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{spread} {'[log]' if self.checked else '[recalled]'}"


#: (data set, encoder of width 64, epochs, row) → accuracy on the test images, best training epoch
#: and best probe epoch. The author's log has ResNet-50 at 100, 300 and 500 epochs.
PUBLISHED = {
    (dataset, "resnet50", epochs, "alpha_direct_raw"): Published(*figure, checked=True)
    for dataset, figures in {
        "cifar10": ((87.91, 0.12), (89.89, 0.18), (91.06, 0.17)),
        "cifar100": ((63.47, 0.06), (65.86, 0.24), (66.57, 0.21)),
        "stl10": ((83.20, 0.17), (87.36, 0.12), (87.71, 0.14)),
    }.items()
    for epochs, figure in zip((100, 300, 500), figures, strict=True)
} | {
    ("cifar10", "resnet18", 100, row): Published(*figure)
    for row, figure in {
        "uniform": (63.6,),
        "infonce": (84.06, 0.30),
        "alpha_entropy": (84.27,),
        "alpha_square": (84.72,),
        "alpha_direct": (85.11, 0.19),
    }.items()
}
# Fields that define the recipe; the others change speed, rounding or logging.
_RECIPE = (
    "width", "subset", "image_size", "norm", "temperature", "learn_temperature", "negatives",
    "batch_size", "micro_batch", "optimizer", "lr", "weight_decay", "warmup_epochs", "recipe",
    "clip", "ema", "weights", "temperature_schedule", "validation",
)  # fmt: skip


def published(config: Config, row: str) -> Published | None:
    """Return the published figure for exactly this setting and row, if there is one."""
    known = PUBLISHED.get((config.dataset, config.encoder, config.epochs, row))
    if known is None:
        return None
    recipe = Config.create(dataset=config.dataset, encoder=config.encoder, epochs=config.epochs)
    return known if all(getattr(config, x) == getattr(recipe, x) for x in _RECIPE) else None


def recipes() -> str:
    """List the commands that repeat the published experiments, with the settings they imply."""
    lines = []
    for dataset in ("cifar10", "cifar100", "stl10"):
        for encoder in ("resnet18", "resnet50"):
            config = Config.create(dataset=dataset, encoder=encoder)
            command = f"alphacl reproduce table --dataset {dataset} --encoder {encoder}"
            command += " --seeds 5 --download"
            if encoder == "resnet50":
                command += f" --rows {','.join([*DEFAULT_ROWS, 'alpha_direct_raw'])}"
            lines += [f"# {_setting(config)}", command]
    return "\n".join(lines)


@dataclasses.dataclass
class Progress:
    """How :func:`table` ended.

    Args:
        out: folder of the table.
        done: runs that are over.
        total: all runs of the table.
        run: name of the run that was stopped in the middle, if any.
        signal: signal that stopped the table, if any.
    """

    out: Path
    done: int
    total: int
    run: str | None = None
    signal: int | None = None


def table(
    out: str | Path | None = None,
    *,
    rows: tuple[str, ...] = DEFAULT_ROWS,
    seeds: int = 5,
    budget: float | None = None,
    **given,
) -> Progress:
    """Train every row with every seed, or resume the table in ``out``.

    Seeds are the outer loop, so that a table cut short compares rows with equal numbers of seeds.
    table.json and table.md are rewritten after every run, and the table is printed. A run that
    diverges is recorded as failed.

    Args:
        out: folder of the table and its runs; default: runs/table-DATASET-ENCODER.
        rows: names out of ``ROWS``.
        seeds: number of runs per row, with the seeds 1, 2, ….
        budget: seconds for everything. The number of epochs, equal for all rows, is then chosen by
            rehearsing each row. None keeps the recipe's epochs.
        **given: fields of Config that all runs share.

    Returns:
        How far the table has come.

    Raises:
        RunError: unusable settings, or ``out`` holds something else or a table of other settings
            (nothing is changed then).
    """
    _check(rows, seeds, budget, given)
    config = _config(given)
    out = Path(out or f"runs/table-{config.dataset}-{config.encoder}")
    with ExitStack() as lock:
        if _read(out) is not None:
            lock.enter_context(storage.locked(out))
            state = _read(out)
            config = _config(given, state["plan"] and state["plan"]["epochs"])
            _check_same(out, state, config, rows, seeds, budget)
        else:
            storage.check_writable(out)
            state, config = _planned(config, rows, seeds, budget, given)
            lock.enter_context(storage.locked(out))
            if _read(out) is not None:
                raise RunError(f"another process has begun a table in {out}; nothing was changed")
            _write(out, state)
        return _run_all(out, state, config)


def _planned(
    config: Config, rows: tuple[str, ...], seeds: int, budget: float | None, given: dict
) -> tuple[dict, Config]:
    """Try out the settings of a new table and choose its epochs; (its table.json, settings)."""
    state = {"rows": [*rows], "seeds": seeds, "budget": budget, "plan": None, "runs": {}}
    configs = {row: _of(config, row, 1) for row in rows}
    try_out([*configs.values()])
    if budget is not None:
        found = state["plan"] = plan(configs, seeds, budget, given)
        config = _config(given, found["epochs"])
        steps = found["step_seconds"].values()
        print(
            f"plan: {config.epochs} epochs for each of {len(rows) * seeds} runs, about "
            f"{duration(found['seconds'])} of {duration(budget)}; a step takes "
            f"{1000 * min(steps):.0f} to {1000 * max(steps):.0f} ms here, kNN and probe "
            f"{found['evaluation_seconds']:.1f} s",
            flush=True,
        )
    state["settings"] = _shared(config)
    state["environment"] = checkpoint.environment(pick_device(config.device))
    return state, config


def plan(configs: dict[str, Config], seeds: int, budget: float, given: dict) -> dict:
    """Choose the largest number of epochs with which the whole table fits in the budget.

    Args:
        configs: row → its settings.
        seeds: runs per row.
        budget: seconds.
        given: fields of Config that all runs share.

    Returns:
        "epochs", at most the recipe's; "seconds" that the runs will take; "evaluation_seconds";
        "step_seconds" of every row.

    Raises:
        RunError: not even one epoch (or the given warm-up) fits; the message says what it takes.
    """
    begun = time.monotonic()
    paces = {row: rehearse(config, judged=not i) for i, (row, config) in enumerate(configs.items())}
    judged = next(iter(paces.values()))
    usual = statistics.median(pace["step"] for pace in paces.values())
    for row, pace in paces.items():
        # A slow row may be due to its objective or to momentary load: take the better of two tries.
        if pace["step"] > SLOW * usual:
            pace["step"] = min(pace["step"], rehearse(configs[row], judged=False)["step"])
    left = (1 - RESERVE) * budget - (time.monotonic() - begun)

    def needed(epochs: int) -> float:
        config = _config(given, epochs)
        evaluations = sum(
            due(epoch, config.eval_every, epochs) or due(epoch, config.probe_every, epochs)
            for epoch in range(1, epochs + 1)
        )
        once = evaluations * judged["evaluation"] + judged["end"]
        return seeds * sum(
            once + pace["start"] + epochs * pace["per_epoch"] * pace["step"]
            for pace in paces.values()
        )

    fewest, most = max(1, given.get("warmup_epochs", 1)), Config.create(**given).epochs
    epochs = next((n for n in range(most, fewest - 1, -1) if needed(n) <= left), None)
    if epochs is None:
        least = ((1 - RESERVE) * budget - left + needed(fewest)) / (1 - RESERVE)
        raise RunError(
            f"--budget {duration(budget)} does not hold {fewest} epoch{'s' * (fewest > 1)} of "
            f"{seeds * len(configs)} runs, which takes about {duration(60 * -(-least // 60))}; "
            "fewer --rows or --seeds, a --subset or a smaller --width take less"
        )
    return {
        "epochs": epochs,
        "seconds": needed(epochs),
        "evaluation_seconds": judged["evaluation"],
        "step_seconds": {row: pace["step"] for row, pace in paces.items()},
    }


def seconds(text: str) -> float:
    """Parse a duration such as 600s, 45m or 1.5h.

    Raises:
        RunError: the text is no positive duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) == 0:
        raise RunError(f"--budget must be a time such as 600s, 45m or 2h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def duration(value: float) -> str:
    """Format seconds, rounded, in the notation that :func:`seconds` reads."""
    for unit, size in (("h", 3600), ("m", 60)):
        if value >= size and value % size == 0:
            return f"{value // size:.0f}{unit}"
    return f"{value / 60:.0f}m" if value >= 600 else f"{value:.0f}s"


def render(state: dict, brief: bool = False) -> str:
    """Format a table.json as an aligned Markdown table.

    Args:
        state: contents of table.json.
        brief: whether to leave out the explanation of the columns.
    """
    config = Config.from_dict(state["settings"], Path(TABLE))
    lines = [("row", "seeds", "probe, last", "probe, best", "kNN", "published")]
    notes, marks = [], set()
    for row in state["rows"]:
        names = (_name(row, seed) for seed in range(1, state["seeds"] + 1))
        runs = {name: state["runs"][name] for name in names if name in state["runs"]}
        good = [run for run in runs.values() if run["status"] == "finished"]
        notes += [
            f"{name} failed: {run['reason']}"
            for name, run in runs.items()
            if run["status"] == "failed"
        ]
        known = published(config, row)
        marks |= {known.checked} if known else set()
        means = (_mean_std([run[key] for run in good]) for key in ("probe", "probe_best", "knn"))
        lines.append((row, f"{len(good)} of {state['seeds']}", *means, str(known or "–")))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    aligned = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    over = sum(run["status"] != "stopped" for run in state["runs"].values())
    text = [f"{_setting(config)}; {over} of {len(state['rows']) * state['seeds']} runs are over"]
    text += ["", *(f"| {' | '.join(cells)} |" for cells in aligned)]
    if not brief:
        every = f"every {config.probe_every} epochs and the last"
        every = "every epoch" if config.probe_every == 1 else every
        every = "the last only" if config.probe_every >= config.epochs else every
        meaning = (
            "Accuracy on the test images in per cent, mean ± standard deviation (n − 1) over the "
            "seeds that are finished. probe, last: linear probe of the last training epoch, last "
            "probe epoch. probe, best: the paper's convention, the largest of all probe epochs on "
            f"the test images, best over the evaluated training epochs ({every}). kNN: last "
            "training epoch."
        )
        if False in marks:
            meaning += " [recalled]: as recalled, not checked against the paper."
        if True in marks:
            meaning += " [log]: the author's published log."
        text += ["", meaning]
    return "\n".join([*text, *notes]) + "\n"


def _check(rows, seeds, budget, given) -> None:
    unknown = [row for row in rows if row not in ROWS]
    if unknown or not rows:
        got = ", ".join(map(repr, unknown)) or "none"
        near = did_you_mean(unknown[0], ROWS) if unknown else ""
        raise RunError(f"--rows must be some of {', '.join(ROWS)}, got {got}{near}")
    if len(set(rows)) < len(rows):
        raise RunError(f"--rows must not name a row twice, got {','.join(rows)}")
    if seeds < 1:
        raise RunError(f"--seeds must be at least 1, got {seeds}")
    if budget is not None and "epochs" in given:
        raise RunError("--budget and --epochs exclude each other: a budget chooses the epochs")
    for name in OF_A_ROW:
        if name in given:
            raise RunError(f"{flag(name)} is not a setting of a table: its rows and seeds say it")
    if given.get("probe_every") == 0:
        raise RunError("--probe-every must be at least 1 in a table, got 0")
    if processes() > 1:
        raise RunError("alphacl reproduce runs in one process, not under torchrun")


def _config(given: dict, epochs: int | None = None) -> Config:
    """Build the settings that all runs share; by default the probe runs whenever kNN does."""
    config = Config.create(**given, **({} if epochs is None else {"epochs": epochs}))
    every = given.get("probe_every") or config.eval_every or max(1, config.epochs // 10)
    return dataclasses.replace(config, probe_every=every)


def _of(config: Config, row: str, seed: int) -> Config:
    return dataclasses.replace(config, **ROWS[row]._asdict(), seed=seed)


def _shared(config: Config) -> dict:
    return {name: x for name, x in dataclasses.asdict(config).items() if name not in OF_A_ROW}


def _name(row: str, seed: int) -> str:
    return f"{row}-seed{seed}"


def _read(out: Path) -> dict | None:
    """Read the table in ``out``; None if there is nothing yet."""
    problems = []
    for path in storage.versions(out / TABLE):
        try:
            state = storage.read_json(path)
        except storage.Damaged as error:
            problems.append(str(error))
            continue
        fields = {"settings", "rows", "seeds", "budget", "plan", "runs"}
        if not fields <= {*state}:
            raise RunError(f"cannot read {path}: it is not a table of alphacl reproduce")
        if problems:  # runs that it does not know are there and finished are read again
            storage.warn(f"{'; '.join(problems)}; using {path.name}")
        return state
    if problems:
        raise RunError(
            f"{'; '.join(problems)}: remove it, and the same command takes over the runs in {out}"
        )
    if out.exists() and not (out.is_dir() and storage.is_empty(out)) and not _runs_in(out):
        raise RunError(
            f"{out} exists, is not an empty folder and holds no {TABLE}: choose another --out; "
            "nothing was changed"
        )
    return None


def _runs_in(out: Path) -> list[str]:
    """List the runs in ``out``, if it holds nothing else: a table that has lost its table.json."""
    known = {_name(row, seed) for row in ROWS for seed in range(1, 1000)}
    ours = {storage.LOCK, TEXT}
    if not out.is_dir():
        return []
    names = [path.name for path in out.iterdir() if path.name not in ours]
    return names if {*names} <= known else []


def _check_same(out: Path, state: dict, config: Config, rows, seeds, budget) -> None:
    """Raise RunError if a saved table has other settings."""
    differing = []
    if (state["budget"] is None) == (budget is None):  # else the epochs differ too, as a result
        saved = Config.from_dict(state["settings"], out / TABLE)
        differing = saved.differences(_shared(config))
    for name, old, new in (
        ("budget", _budget(state["budget"]), _budget(budget)),
        ("rows", ",".join(state["rows"]), ",".join(rows)),
        ("seeds", state["seeds"], seeds),
    ):
        if old != new:
            differing.append(f"--{name}: {old} in the table, {new} given")
    if differing:
        raise RunError(
            f"{out} was started with other settings: {'; '.join(differing)}; nothing was changed"
        )


def _budget(budget: float | None) -> str:
    return "none" if budget is None else duration(budget)


def _run_all(out: Path, state: dict, config: Config) -> Progress:
    names = [(row, seed) for seed in range(1, state["seeds"] + 1) for row in state["rows"]]
    progress = Progress(out, 0, len(names))
    for number, (row, seed) in enumerate(names, 1):
        name = _name(row, seed)
        record = state["runs"].get(name, {"status": "stopped", "seconds": 0.0})
        # A run whose folder was removed by hand is trained again.
        if record["status"] == "stopped" or not (out / name).exists():
            print(f"{name}, run {number} of {len(names)}", flush=True)
            record, stopped_by = _one(out / name, _of(config, row, seed), record)
            with stop_signals() as caught:
                state["runs"][name] = {"row": row, "seed": seed, **record}
                _write(out, state)
                if record["status"] != "stopped" and number < len(names):
                    print(f"\n{render(state, brief=True)}", flush=True)
            progress.signal = stopped_by or next(iter(caught), None)
        progress.done += record["status"] != "stopped"
        if progress.signal:
            progress.run = name if record["status"] == "stopped" else None
            return progress
    _write(out, state)
    print(render(state))
    return progress


def _one(folder: Path, config: Config, before: dict) -> tuple[dict, int | None]:
    """Train or resume one run.

    Returns:
        The run's record for table.json, and the signal after which nothing else may start.
    """
    begun = time.monotonic()
    resume = (folder / checkpoint.CONFIG).exists()
    earlier = before.get("seconds", 0.0) if resume else 0.0
    outcome, record = Outcome(folder, 0), {}
    try:
        outcome = train(config, folder, resume=resume)
        record["status"] = "stopped" if outcome.signal else "finished"
    except Diverged as error:
        record.update(status="failed", reason=str(error))
    record["seconds"] = earlier + time.monotonic() - begun
    if record["status"] == "finished":
        record.update(_accuracies(folder / checkpoint.METRICS, config))
    return record, outcome.signal or outcome.late


def _accuracies(metrics: Path, config: Config) -> dict:
    """Read the figures of a finished run, which has failed if its log has lost any of them."""
    lines = checkpoint.read_metrics(metrics)
    epochs = {line["epoch"]: line for line in lines if line["kind"] == "epoch"}
    last, probed = (
        epochs.get(config.epochs, {}),
        [
            epoch
            for epoch in range(1, config.epochs + 1)
            if due(epoch, config.probe_every, config.epochs)
        ],
    )
    if "probe" not in last or not all("probe_best" in epochs.get(epoch, {}) for epoch in probed):
        return {
            "status": "failed",
            "reason": f"{metrics} is damaged and has lost accuracies; remove {metrics.parent} to "
            "train it again",
        }
    best = max(epochs[epoch]["probe_best"] for epoch in probed)
    return {"probe": last["probe"], "probe_best": best, "knn": last.get("knn")}


def _write(out: Path, state: dict) -> None:
    """Replace table.json, whose version before is kept, and table.md."""
    with storage.writing(out):
        storage.write_json(out / TABLE, state, keep=2)
        storage.write(out / TEXT, render(state).encode())


def _setting(config: Config) -> str:
    images = f"{config.subset:,} training images" if config.subset else "all training images"
    optimizer = "" if config.optimizer == "adam" else f" {config.optimizer},"
    return (
        f"{config.dataset}, {config.encoder} of width {config.width}, {config.epochs} epochs of "
        f"{images}, batch {config.batch_size},{optimizer} lr {config.lr:g}, "
        f"temperature {config.temperature:g}"
    )


def _mean_std(values: list[float | None]) -> str:
    if not values or None in values:
        return "–"
    percent = 100 * torch.tensor(values, dtype=torch.float64)
    return f"{percent.mean():.1f}" + (f" ± {percent.std():.1f}" if len(values) > 1 else "")
