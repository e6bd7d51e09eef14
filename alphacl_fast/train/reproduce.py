"""The paper's comparison of objectives as one table: an ordinary run for every row and seed, resumable run by run.

Nothing here decides how a run trains: recipes are the defaults of :class:`Config`, and all runs of a table share every
setting but objective, its options and the seed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import time
from pathlib import Path

import torch

from . import checkpoint
from .config import Config, Diverged, RunError, flag
from .device import pick_device
from .loop import Outcome, due, rehearse, stop_signals, train, try_out

TABLE, TEXT = "table.json", "table.md"
RESERVE = 0.1  # of a budget, for what a rehearsal of a few steps does not see: checkpoints, other work on the machine
SLOW = 1.5  # times the median of all rows: a row whose steps seem to take longer is rehearsed a second time


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: ``objective`` with ``option``, and what it stands for."""

    objective: str
    option: dict
    note: str


ROWS = {
    "uniform": Row("uniform", {}, "quadratic loss: every negative pair weighs the same"),
    "infonce": Row("infonce", {}, "InfoNCE as in SimCLR (ε = 1)"),
    "alpha_entropy": Row("alpha_entropy", {}, "r_H, the entropy player: a softmax"),
    "alpha_square": Row("alpha_square", {}, "r_s, solved exactly (the authors' code is off by one here)"),
    "alpha_inverse": Row("alpha_inverse", {}, "r_γ as the authors' code has it"),
    "backprop": Row("alpha_entropy", {"detach_alpha": False}, "backprop α(θ) as we read it: alpha_entropy, not detached"),
    "alpha_direct": Row("alpha_direct", {"exponent": 4}, "α-CL-direct, p = 4, rows of α sum to 1"),
    "alpha_direct_raw": Row("alpha_direct", {"exponent": 4, "normalized": False},
                            "the same without normalisation, as in the author's ResNet-50 log"),
    "alpha_gamma": Row("alpha_gamma", {}, "r_γ solved exactly: all but uniform at temperature 0.5"),
}
#: Rows of a table unless others are asked for; of the rest one repeats ``alpha_direct``, the other ``uniform``, nearly.
DEFAULT_ROWS = tuple(name for name in ROWS if name not in ("alpha_direct_raw", "alpha_gamma"))


@dataclasses.dataclass(frozen=True)
class Published:
    """A published accuracy in per cent. ``checked``: read in the author's log; otherwise only recalled from the paper."""

    mean: float
    std: float | None
    checked: bool

    def __str__(self) -> str:
        return f"{_text(self.mean, self.std, 2)} {'[log]' if self.checked else '[recalled]'}"


def _log(dataset: str, *figures: tuple[float, float]) -> dict:
    """Of the author's log: ResNet-50, ``alpha_direct_raw``, at 100, 300 and 500 epochs."""
    return {(dataset, "resnet50", epochs, "alpha_direct_raw"): Published(*figure, checked=True)
            for epochs, figure in zip((100, 300, 500), figures, strict=True)}


#: (data set, encoder of width 64, epochs, row) -> figure, best epoch of training and probe on the test images.
PUBLISHED = {
    **_log("cifar10", (87.91, 0.12), (89.89, 0.18), (91.06, 0.17)),
    **_log("cifar100", (63.47, 0.06), (65.86, 0.24), (66.57, 0.21)),
    **_log("stl10", (83.20, 0.17), (87.36, 0.12), (87.71, 0.14)),
    ("cifar10", "resnet18", 100, "uniform"): Published(63.6, None, checked=False),
    ("cifar10", "resnet18", 100, "infonce"): Published(84.06, 0.30, checked=False),
    ("cifar10", "resnet18", 100, "alpha_entropy"): Published(84.27, None, checked=False),
    ("cifar10", "resnet18", 100, "alpha_square"): Published(84.72, None, checked=False),
    ("cifar10", "resnet18", 100, "alpha_direct"): Published(85.11, 0.19, checked=False),
}
# What makes a run one of the recipe; the other fields change speed, rounding or what is logged.
_RECIPE = ("width", "subset", "image_size", "norm", "temperature", "learn_temperature", "negatives", "batch_size",
           "micro_batch", "optimizer", "lr", "weight_decay", "warmup_epochs")  # fmt: skip
# What differs between the runs of a table, or has no meaning for most rows.
OF_A_ROW = ("objective", "option", "seed", "learn_temperature")


def published(config: Config, row: str) -> Published | None:
    """The published figure for ``row``, None where none is known for exactly the setting of ``config``."""
    known = PUBLISHED.get((config.dataset, config.encoder, config.epochs, row))
    if known is None:
        return None
    recipe = Config.create(dataset=config.dataset, encoder=config.encoder, epochs=config.epochs)
    return known if all(getattr(config, name) == getattr(recipe, name) for name in _RECIPE) else None


def recipes() -> str:
    """The commands that repeat the published experiments, one per data set and encoder, with the settings they imply."""
    lines = []
    for dataset in ("cifar10", "cifar100", "stl10"):
        for encoder in ("resnet18", "resnet50"):
            config = Config.create(dataset=dataset, encoder=encoder)
            rows = "" if encoder == "resnet18" else f" --rows {','.join([*DEFAULT_ROWS, 'alpha_direct_raw'])}"
            lines += [f"# {_setting(config)}",
                      f"alphacl reproduce table --dataset {dataset} --encoder {encoder} --seeds 5 --download{rows}"]
    return "\n".join(lines)


@dataclasses.dataclass
class Progress:
    """How :func:`table` ended: ``done`` of ``total`` runs; ``run`` and ``signal``: where and by what it was stopped."""

    out: Path
    done: int
    total: int
    run: str | None = None
    signal: int | None = None


def table(out: str | Path | None = None, *, rows: tuple[str, ...] = DEFAULT_ROWS, seeds: int = 5, budget: float | None = None,
          **given) -> Progress:
    """Train every row with the seeds 1…``seeds``, or go on with it, in the folder ``out``; ``given`` are fields of Config.

    ``budget``: seconds that everything may take; the epochs, the same for all rows, then follow from a rehearsal of each row.
    Seed by seed over all rows, so that a table cut short compares equals. Writes table.json and table.md after every run, and
    prints the table. A run that diverges is recorded as failed. Raises RunError for unusable settings, and for an
    ``out`` that holds something else or a table of other settings; nothing is changed then.
    """
    _check(rows, seeds, budget, given)
    out = Path(out or f"runs/table-{given.get('dataset', 'digits')}-{Config.create(**given).encoder}")
    state = _read(out)
    if state is None:
        state = {"rows": [*rows], "seeds": seeds, "budget": budget, "plan": None, "runs": {}}
        config = _config(given)
        configs = {row: _of(config, row, 1) for row in rows}
        try_out([*configs.values()])
        if budget is not None:
            state["plan"] = plan(configs, seeds, budget, given)
            config = _config(given, state["plan"]["epochs"])
            print(_plan_text(state, config), flush=True)
        state["settings"] = {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_A_ROW}
        state["environment"] = checkpoint.environment(pick_device(config.device))
        _write(out, state)
    else:
        config = _config(given, state["plan"] and state["plan"]["epochs"])
        _check_same(out, state, config, rows, seeds, budget)
    return _run_all(out, state, config)


def plan(configs: dict[str, Config], seeds: int, budget: float, given: dict) -> dict:
    """The largest number of epochs with which all rows × ``seeds`` fit in ``budget`` seconds here, and what it rests on.

    At most the recipe's epochs. Raises RunError, saying what 1 epoch (or a given warm-up) takes, if not even that fits.
    """
    begun = time.monotonic()
    paces = {row: rehearse(config, judged=index == 0) for index, (row, config) in enumerate(configs.items())}
    judged = next(iter(paces.values()))
    usual = statistics.median(pace["step"] for pace in paces.values())
    for row, pace in paces.items():
        if pace["step"] > SLOW * usual:  # its objective, or a moment's other work on the machine? The better of two tries
            pace["step"] = min(pace["step"], rehearse(configs[row], judged=False)["step"])
    left = (1 - RESERVE) * budget - (time.monotonic() - begun)

    def needed(epochs: int) -> float:
        config = _config(given, epochs)
        evaluations = sum(due(epoch, config.eval_every, epochs) or due(epoch, config.probe_every, epochs)
                          for epoch in range(1, epochs + 1))
        once = evaluations * judged["evaluation"] + judged["end"]
        return seeds * sum(once + pace["start"] + epochs * pace["per_epoch"] * pace["step"] for pace in paces.values())

    fewest, most = max(1, given.get("warmup_epochs", 1)), Config.create(**given).epochs
    epochs = next((epochs for epochs in range(most, fewest - 1, -1) if needed(epochs) <= left), None)
    if epochs is None:
        least = ((1 - RESERVE) * budget - left + needed(fewest)) / (1 - RESERVE)
        raise RunError(f"--budget {duration(budget)} does not hold {fewest} epoch{'s' * (fewest > 1)} of "
                       f"{seeds * len(configs)} runs, which takes about {duration(60 * -(-least // 60))}; fewer --rows or "
                       "--seeds, a --subset or a smaller --width take less")
    return {"epochs": epochs, "seconds": needed(epochs), "evaluation_seconds": judged["evaluation"],
            "step_seconds": {row: pace["step"] for row, pace in paces.items()}}


def seconds(text: str) -> float:
    """Seconds of a duration such as 600s, 45m or 1.5h. Raises RunError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) == 0:
        raise RunError(f"--budget must be a time such as 600s, 45m or 2h, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def duration(value: float) -> str:
    """``value`` seconds as :func:`seconds` reads them, rounded."""
    for unit, size in (("h", 3600), ("m", 60)):
        if value >= size and value % size == 0:
            return f"{value // size:.0f}{unit}"
    return f"{value / 60:.0f}m" if value >= 600 else f"{value:.0f}s"


def render(state: dict, brief: bool = False) -> str:
    """The table of ``state`` (a table.json) as aligned Markdown, with what its figures mean unless ``brief``."""
    config = _saved(state, TABLE)
    lines = [("row", "seeds", "probe, last", "probe, best", "kNN", "published")]
    notes, marks = [], set()
    for row in state["rows"]:
        runs = {name: run for seed in range(1, state["seeds"] + 1)
                if (run := state["runs"].get(name := _name(row, seed))) and run["status"] != "stopped"}
        good = [run for run in runs.values() if run["status"] == "finished"]
        notes += [f"{name} failed: {run['reason']}" for name, run in runs.items() if run["status"] == "failed"]
        known = published(config, row)
        marks |= {known.checked} if known else set()
        lines.append((row, f"{len(good)} of {state['seeds']}", *(_mean_std([run[key] for run in good]) for key in
                                                                ("probe", "probe_best", "knn")), str(known or "–")))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    total = len(state["rows"]) * state["seeds"]
    over = sum(run["status"] != "stopped" for run in state["runs"].values())
    how = f"{_setting(config)}; {over} of {total} runs are over"
    every = "every epoch" if config.probe_every == 1 else f"every {config.probe_every} epochs and the last"
    every = "the last only" if config.probe_every >= config.epochs else every
    meaning = ["Accuracy on the test images in per cent, mean ± standard deviation (n − 1) over the seeds that are finished. "
               "probe, last: linear probe of the last training epoch, last probe epoch. probe, best: the paper's convention, "
               "the largest of all probe epochs on the test images, best over the evaluated training epochs "
               f"({every}). kNN: last training epoch."]
    if False in marks:
        meaning.append("[recalled]: as recalled, not checked against the paper.")
    if True in marks:
        meaning.append("[log]: the author's published log.")
    return "\n".join([how, "", *text, *([] if brief else ["", " ".join(meaning)]), *notes]) + "\n"


def _check(rows, seeds, budget, given) -> None:
    unknown = [row for row in rows if row not in ROWS]
    if unknown or not rows:
        raise RunError(f"--rows must be some of {', '.join(ROWS)}, got {', '.join(map(repr, unknown)) or 'none'}")
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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("alphacl reproduce runs in one process, not under torchrun")


def _config(given: dict, epochs: int | None = None) -> Config:
    """The settings that the runs of a table share; probed when kNN is taken, unless ``given`` says when."""
    config = Config.create(**given, **({} if epochs is None else {"epochs": epochs}))
    every = given.get("probe_every") or config.eval_every or max(1, config.epochs // 10)
    return dataclasses.replace(config, probe_every=every)


def _of(config: Config, row: str, seed: int) -> Config:
    return dataclasses.replace(config, objective=ROWS[row].objective, option=ROWS[row].option, seed=seed)


def _saved(state: dict, source: Path | str) -> Config:
    return Config.from_dict(state["settings"], Path(source))


def _name(row: str, seed: int) -> str:
    return f"{row}-seed{seed}"


def _read(out: Path) -> dict | None:
    """The table in ``out``, None where there is nothing yet."""
    path = out / TABLE
    try:
        if path.exists():
            state = json.loads(path.read_text())
            if not isinstance(state, dict) or not {"settings", "rows", "seeds", "budget", "plan", "runs"} <= {*state}:
                raise ValueError("it is not a table of alphacl reproduce")
            return state
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise RunError(f"{out} exists, is not an empty folder and holds no {TABLE}: choose another --out; nothing was "
                           "changed")
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    return None


def _check_same(out: Path, state: dict, config: Config, rows, seeds, budget) -> None:
    now = {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_A_ROW}
    differing = [] if (state["budget"] is None) == (budget is None) else [
        f"--budget: {_budget(state['budget'])} in the table, {_budget(budget)} given"]
    if not differing:  # a budget given or not changes the epochs, which would only be said twice
        differing = _saved(state, out / TABLE).differences(now)
        if state["budget"] != budget:
            differing.insert(0, f"--budget: {_budget(state['budget'])} in the table, {_budget(budget)} given")
    if state["rows"] != [*rows]:
        differing.append(f"--rows: {','.join(state['rows'])} in the table, {','.join(rows)} given")
    if state["seeds"] != seeds:
        differing.append(f"--seeds: {state['seeds']} in the table, {seeds} given")
    if differing:
        raise RunError(f"{out} was started with other settings: {'; '.join(differing)}; nothing was changed")


def _budget(budget: float | None) -> str:
    return "none" if budget is None else duration(budget)


def _run_all(out: Path, state: dict, config: Config) -> Progress:
    names = [(row, seed) for seed in range(1, state["seeds"] + 1) for row in state["rows"]]
    progress = Progress(out, 0, len(names))
    for number, (row, seed) in enumerate(names, 1):
        name = _name(row, seed)
        record = state["runs"].get(name, {"status": "stopped", "seconds": 0.0})
        if record["status"] == "stopped" or not (out / name).exists():  # a folder removed by hand is to be trained anew
            print(f"{name}, run {number} of {len(names)}", flush=True)
            record, stopped_by = _one(out / name, _of(config, row, seed), record)
            with stop_signals() as caught:
                state["runs"][name] = {"row": row, "seed": seed, **record}
                _write(out, state)
                if record["status"] != "stopped" and number < len(names):
                    print(f"\n{render(state, brief=True)}", flush=True)
            progress.signal = stopped_by or sum(caught[:1]) or None
        progress.done += record["status"] != "stopped"
        if progress.signal:
            progress.run = name if record["status"] == "stopped" else None
            return progress
    _write(out, state)
    print(render(state))
    return progress


def _one(folder: Path, config: Config, before: dict) -> tuple[dict, int | None]:
    """Train or go on with one run: what table.json keeps of it, and the signal after which nothing else may start."""
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
        lines = [json.loads(line) for line in (folder / checkpoint.METRICS).read_text().splitlines()]
        epochs = [line for line in lines if line["kind"] == "epoch"]
        record.update(probe=epochs[-1]["probe"], probe_best=max(line["probe_best"] for line in epochs if "probe_best" in line),
                      knn=epochs[-1].get("knn"))
    return record, outcome.signal or outcome.late


def _write(out: Path, state: dict) -> None:
    """Replace table.json and table.md, each as a whole."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in ((TABLE, json.dumps(state, indent=2) + "\n"), (TEXT, render(state))):
            temporary = out / f"{name}.tmp"
            temporary.write_text(text)
            os.replace(temporary, out / name)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror}") from error


def _plan_text(state: dict, config: Config) -> str:
    found, steps = state["plan"], state["plan"]["step_seconds"].values()
    return (f"plan: {config.epochs} epochs for each of {len(state['rows']) * state['seeds']} runs, about "
            f"{duration(found['seconds'])} of {_budget(state['budget'])}; a step takes {1000 * min(steps):.0f} to "
            f"{1000 * max(steps):.0f} ms here, kNN and probe {found['evaluation_seconds']:.1f} s")


def _setting(config: Config) -> str:
    images = f"{config.subset:,} training images" if config.subset else "all training images"
    every = "" if config.optimizer == "adam" else f" {config.optimizer},"
    return (f"{config.dataset}, {config.encoder} of width {config.width}, {config.epochs} epochs of {images}, batch "
            f"{config.batch_size},{every} lr {config.lr:g}, temperature {config.temperature:g}")


def _text(mean: float, std: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"


def _mean_std(values: list[float | None]) -> str:
    if not values or None in values:
        return "–"
    percent = 100 * torch.tensor(values, dtype=torch.float64)
    return _text(percent.mean().item(), percent.std().item() if len(values) > 1 else None, 1)
