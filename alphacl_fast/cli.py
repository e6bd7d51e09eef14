"""The commands of ``alphacl``, one function each; `alphacl_cli` is the entry point."""

import sys

if __name__ == "__main__":  # before the imports below, in which Ctrl-C would print a traceback
    from alphacl_cli import main

    sys.exit(main())

import argparse
import ast
import dataclasses
import errno
import importlib.util
import math
import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from alphacl_cli import INTERRUPTED, fail, importing, main
from alphacl_fast import flags
from alphacl_fast.suggestions import did_you_mean

__all__ = ["COMMANDS", "Parser", "main"]

#: The claims of ``alphacl theory``, which `alphacl_fast.checks` checks.
CLAIMS = ("pca", "rank", "relu", "gradient")

#: Settings of the run that a command may override.
_OVERRIDES = {
    "--data-root": (str, "folder of the data set (default: the run's)"),
    "--device": (str, "auto, cpu, cuda or cuda:N (default: the run's)"),
    "--workers": (int, "loader processes (default: the run's)"),
}


class Parser(argparse.ArgumentParser):
    """Reports an error in one line on stderr, with the nearest name for a misspelt one."""

    def error(self, message: str) -> NoReturn:
        fail(message)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        given, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = did_you_mean(flag, self._option_string_actions) if flag[:1] == "-" else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        return given

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, action.choices)
            raise


def _parser(command: str, description: str, flags: dict[str, tuple] | None = None, **options):
    """The parser of a command; ``flags``: name → (type, help) or (type, help, metavar)."""
    parser = Parser(
        prog=f"alphacl {command}", description=description, allow_abbrev=False, **options
    )
    for name, (kind, text, *metavar) in (flags or {}).items():
        parser.add_argument(name, type=kind, help=text, metavar=metavar[0] if metavar else None)
    return parser


@contextmanager
def _train_package() -> Iterator[Any]:
    """Yields `alphacl_fast.train`; its RunError inside ends the process with exit code 2."""
    from alphacl_fast import train

    try:
        with importing():
            _ = train.train, train.evaluate, train.inspect
    except (ImportError, RuntimeError) as error:
        # torchvision built for another torch raises RuntimeError
        fail(" ".join(str(error).split()))
    try:
        yield train
    except train.RunError as error:
        if error.shown:
            raise SystemExit(2) from None
        fail(str(error))


def _train(arguments: list[str]) -> int:
    parser = _parser(
        "train",
        "Train an encoder. Defaults depend on the data set and the encoder.",
        {
            "--out": (
                str,
                "run folder, new or empty (default: runs/DATASET-OBJECTIVE-SEED)",
                "RUN",
            )
        },
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        nargs="?",
        help="go on with this run; without a name: with the run in --out, if there is one",
    )
    parser.add_argument(
        "--accept-data-change",
        action="store_true",
        help="go on with a run although images of its data set are missing, or new",
    )
    _add_config(parser)
    given = vars(parser.parse_args(arguments))
    out, resume = given.pop("out", None), "resume" in given
    folder, accept = given.pop("resume", None), given.pop("accept_data_change", False)
    if folder and out and Path(folder) != Path(out):
        fail(f"--resume {folder} and --out {out} name different folders")
    if "option" in given:
        given["option"] = dict(given["option"])
    with _train_package() as train:
        out = folder or out
        if out is None:
            config = train.Config.create(**given)
            out = f"runs/{config.dataset}-{config.objective}-{config.seed}"
        resume = resume and (folder is not None or train.is_run(Path(out)))
        if resume:
            config = dataclasses.replace(train.saved_config(Path(out)), **given)
        else:
            config = train.Config.create(**given)
        outcome = train.train(config, out, resume=resume, accept_data_change=accept)
    if outcome.signal and outcome.leads:
        print(
            f"alphacl: stopped after {outcome.epochs} of {config.epochs} epochs, state saved; "
            f"go on with: alphacl train --resume {shlex.quote(str(outcome.out))}",
            file=sys.stderr,
        )
    elif outcome.leads:
        done = "was already finished" if outcome.already else "finished"
        print(
            f"{outcome.out} {done}: {outcome.epochs} epochs; "
            f"judge it with: alphacl eval {shlex.quote(str(outcome.out))}"
        )
    return 128 + outcome.signal if outcome.signal else 0


def _add_config(parser: Parser, without: tuple[str, ...] = ()) -> None:
    """A flag for every field of the config."""
    from alphacl_fast.train import config as settings

    for field in dataclasses.fields(settings.Config):
        if field.name in without:
            continue
        options = {"type": type(field.default), "choices": field.metadata.get("choices")}
        if field.name == "option":
            options = {"metavar": "KEY=VALUE", "action": "append", "type": _key_value}
        elif isinstance(field.default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif field.metadata["count"]:
            options = {"type": _count}
        text = f"{field.metadata['help']} (default: {_default(field, settings)})"
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, help=text.replace("%", "%%"), **options)


def _default(field: dataclasses.Field, settings: Any) -> str:
    """The default of a setting in words, for every data set or encoder that it depends on."""
    if field.name in settings.DERIVED:
        return settings.DERIVED[field.name]
    for table in (settings.DATASETS, settings.ENCODERS, settings.RECIPES):
        values = {name: row[field.name] for name, row in table.items() if field.name in row}
        if values:
            others = "" if len(values) == len(table) else f", otherwise {field.default}"
            names: dict[Any, list[str]] = {}
            for name, value in values.items():
                names.setdefault(value, []).append(name)
            found = (f"{value} for {' and '.join(group)}" for value, group in names.items())
            return ", ".join(found) + others
    if field.name == "option":
        return "none"
    return (
        {True: "yes", False: "no"}[field.default]
        if isinstance(field.default, bool)
        else str(field.default)
    )


def _key_value(text: str):
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    try:
        return key, ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError):
        return key, value


def _count(text: str) -> int:
    factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper())
    try:
        value = float(text[:-1] if factor else text) * (factor or 1)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value == round(value)):
        raise argparse.ArgumentTypeError(
            f"expected a whole number such as 65536, 64K (65,536) or 4M, got {text!r}"
        )
    return round(value)


def _eval(arguments: list[str]) -> int:
    parser = _parser(
        "eval",
        "Evaluate a run: kNN and linear probe on raw pixels, untrained and trained encoder.",
        {
            "run": (str, "run folder", "RUN"),
            "--few-label": (int, "labels per class in the few-label columns (default: 5)"),
            "--draws": (int, "random label subsets they are averaged over (default: 10)"),
            **_OVERRIDES,
        },
        argument_default=argparse.SUPPRESS,
    )
    given = vars(parser.parse_args(arguments))
    with _train_package() as train:
        result = train.evaluate(**given)
    from alphacl_fast.train.report import table

    print(
        f"{result['dataset']}, {result['objective']}, "
        f"{result['epochs']} of {result['of_epochs']} epochs, {result['train_images']} training "
        f"and {result['test_images']} test images; accuracy in %\n"
    )
    print(table(result))
    print(
        f"\nwritten: {Path(result['run']) / 'eval.json'}, {Path(result['run']) / 'embedding.png'}"
    )
    return 0


def _inspect(arguments: list[str]) -> int:
    parser = _parser(
        "inspect",
        "Plot pair weights of a run's embeddings over distance, and its hardest pairs.",
        {
            "run": (str, "run folder, or its checkpoint.pt", "CHECKPOINT"),
            "--pairs": (_count, "images to embed, two views each (default: 1024)"),
            "--thumbnails": (int, "nearest pairs to draw (default: 12)"),
            "--out": (str, "for inspect.png and inspect.json (default: RUN)", "FOLDER"),
            **_OVERRIDES,
        },
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--objective",
        dest="objectives",
        action="append",
        metavar="NAME",
        help="compare with the run's own; repeatable "
        "(default: infonce, alpha_direct, alpha_square, uniform)",
    )
    given = vars(parser.parse_args(arguments))
    with _train_package() as train:
        result = train.inspect(**given)
    names = result["objectives"]
    width = max(map(len, names))
    print(
        f"{result['pairs']} pairs of views, temperature {result['temperature']:g}, "
        f"{result['negatives']}; means over anchors\n"
    )
    print(f"{'':{width}}  effective negatives  entropy  hardest α")
    for name, row in names.items():
        print(
            f"{name:{width}}  {row['effective_negatives']:19.1f}  "
            f"{row['alpha_entropy']:7.3f}  {row['hardest_alpha']:9.3g}"
        )
    shown = next(iter(names.values()))
    print(
        f"\npositive similarity {shown['positive_similarity']:.4f}, "
        f"alignment {shown['alignment']:.4f}, uniformity {shown['uniformity']:.4f}\n"
        f"anchors whose nearest negative has their own label: {100 * result['same_label']:.1f} %"
    )
    out = Path(given.get("out", result["run"]))
    print(f"written: {out / 'inspect.png'}, {out / 'inspect.json'}")
    return 0


def _theory(arguments: list[str]) -> int:
    parser = _parser(
        "theory",
        "Check the theorems of arXiv:2201.12680 numerically; exit code 1 if one fails.",
        {
            "--seeds": (int, "random seeds for data and weights"),
            "--out": (str, "where to write theory.json and plots of the energy over the steps",
                      "FOLDER"),
        },
    )  # fmt: skip
    parser.add_argument(
        "claim",
        choices=(*CLAIMS, "all"),
        help="pca: deep linear networks find the top eigenvector; rank: a condition fails; "
        "relu: ranks with ReLU; gradient: the gradient theorem, and alternating players",
    )
    given = parser.parse_args(arguments)
    if given.seeds is not None and given.seeds < 1:
        fail(f"--seeds must be at least 1, got {given.seeds}")
    if given.out is not None:
        if importlib.util.find_spec("matplotlib") is None:
            fail("--out needs matplotlib: pip install matplotlib")
        _check_files(Path(given.out), given.claim)
    with importing():
        import torch

        from alphacl_fast import checks

    torch.set_num_threads(1)  # networks of a few numbers: a second thread mostly waits
    names = CLAIMS if given.claim == "all" else (given.claim,)
    seeds = {} if given.seeds is None else {"seeds": given.seeds}
    run = {}
    for name in names:
        run[name] = checks.CHECKS[name](**seeds)
        print(("" if name == names[0] else "\n") + checks.table(run[name]), flush=True)
    if given.out is not None:
        from alphacl_fast.train import storage

        try:
            written = checks.write(run, Path(given.out), storage.write)
        except OSError as error:
            fail(f"--out: cannot write to {given.out}: {error.strerror}")
        print(f"\nwritten: {', '.join(map(str, written))}")
    return 0 if all(claim.holds for claim in run.values()) else 1


def _check_files(out: Path, claim: str) -> None:
    """Create the folder of ``--out``, and write to it, before anything is computed for it."""
    from alphacl_fast.train import storage

    names = CLAIMS if claim == "all" else (claim,)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in (out / "theory.json", *(out / f"theory-{name}.png" for name in names)):
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{file.name} is a folder")
        storage.write(trial := out / f".theory-{os.getpid()}", b"")
        trial.unlink()
    except OSError as error:
        fail(f"--out: cannot write to {out}: {error.strerror}")


def _check(arguments: list[str]) -> int:
    parser = _parser(
        "check",
        "Compare loss and gradients of every usable backend with float64 on this machine: "
        "objectives, modes and dtypes at small sizes and at a large one, NaN features, and "
        "whether a second run gives the same bits. Exit code 1 after a mismatch, a crash or a "
        "hang, or if no backend could be checked.",
    )
    flags.add_check_flags(parser)
    given = parser.parse_args(arguments)
    with importing():
        from alphacl_fast import device_check

    return device_check.run(given, fail)


def _bench(arguments: list[str]) -> int:
    parser = _parser(
        "bench",
        "Time losses and measure their peak memory: this package's backends, eager PyTorch, "
        "torch.compile and other packages. A contestant with a wrong gradient is not timed.",
    )
    flags.add_bench_flags(parser)
    given = parser.parse_args(arguments)
    with importing():
        from alphacl_fast.benchmarks import bench

    return bench.run(given, fail, lambda line: print(line, file=sys.stderr, flush=True))


def _tune(arguments: list[str]) -> int:
    parser = _parser(
        "tune", "Time the Triton kernels' tiles on this GPU and write a table of the fastest."
    )
    flags.add_tune_flags(parser)
    given = parser.parse_args(arguments)
    with importing():
        from alphacl_fast import tune

    return tune.run(given, fail)


def _reproduce(arguments: list[str]) -> int:
    again = f"go on with: alphacl reproduce {shlex.join(arguments)}"
    from alphacl_fast.train import evidence_table, rows

    others = ", ".join(row for row in rows.ROWS if row not in rows.DEFAULT_ROWS)
    parser = _parser(
        "reproduce",
        "table: train every row of the paper's comparison with every seed, or continue, and "
        "show mean and standard deviation. recipes: the commands for the published "
        "experiments. speedrun: SimCLR on CIFAR-10 to 90 % kNN. evidence: a searched comparison "
        "over many seeds, one row of JSON per run. The same command goes on.",
        {
            "--out": (str, "folder of the table and its runs, of the speedrun or of the rows "
                      "(default: runs/table-DATASET-ENCODER, runs/speedrun, runs/evidence)", "DIR"),
            "--part": (str, f"evidence: {', '.join(evidence_table.PARTS)}"),
            "--rows": (lambda text: tuple(text.split(",")),
                       f"of {', '.join(rows.ROWS)} (default: all but {others})", "A,B,…"),
            "--seeds": (int, "runs per row, with seeds 1, 2, … (default: 5)"),
            "--budget": (str, "600s, 45m or 2h for everything on this machine; sets the "
                         "number of epochs (default: the recipe's epochs)", "TIME"),
        },
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument("what", choices=("table", "recipes", "speedrun", "evidence"))
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="speedrun: predict its time, try some steps on the CPU, and write nothing; "
        "evidence: print the table of the rows that are there, and train nothing",
    )
    _add_config(parser, without=rows.OF_A_ROW)
    given = vars(parser.parse_args(arguments))
    what = given.pop("what")
    if what in ("table", "recipes"):
        if "dry_run" in given:
            fail(f"--dry-run belongs to speedrun and evidence, not to {what}")
        if "part" in given:
            fail(f"--part belongs to evidence, not to {what}")
    carry_out = {
        "table": _table, "recipes": _recipes, "speedrun": _speedrun, "evidence": _evidence,
    }  # fmt: skip
    try:
        return carry_out[what](given, again)
    except KeyboardInterrupt:
        print(f"alphacl: interrupted; {again}", file=sys.stderr)
        return INTERRUPTED


def _recipes(given: dict[str, Any], _: str) -> int:
    if given:
        fail(f"recipes takes no flags, got {', '.join(map(_flag, given))}")
    with _train_package():
        from alphacl_fast.train import reproduce

        print(reproduce.recipes())
    return 0


def _table(given: dict[str, Any], again: str) -> int:
    with _train_package():
        from alphacl_fast.train import reproduce

        if "budget" in given:
            given["budget"] = reproduce.seconds(given["budget"])
        progress = reproduce.table(**given)
    if progress.signal:
        where = f" in {progress.run}" if progress.run else ""
        print(
            f"alphacl: stopped{where} with {progress.done} of {progress.total} runs over, "
            f"state saved; {again}",
            file=sys.stderr,
        )
        return 128 + progress.signal
    print(
        f"{progress.out} finished: {progress.total} runs; "
        f"judge one with: alphacl eval {progress.out}/ROW-seedN"
    )
    return 0


def _speedrun(given: dict[str, Any], again: str) -> int:
    of_table = [name for name in ("rows", "seeds", "budget", "part") if name in given]
    if of_table:
        owner = "evidence" if of_table[0] == "part" else "table"
        fail(f"--{of_table[0]} belongs to {owner}, not to speedrun")
    with _train_package():
        from alphacl_fast.train import speedrun

        outcome = speedrun.speedrun(**given)
    if outcome is None or outcome.signal is None:
        return 0
    if outcome.leads:
        print(
            f"alphacl: stopped after {outcome.epochs} epochs, state saved; {again}",
            file=sys.stderr,
        )
    return 128 + outcome.signal


def _evidence(given: dict[str, Any], again: str) -> int:
    usable = ("part", "out", "data_root", "dry_run")
    if foreign := [name for name in given if name not in usable]:
        fail(
            f"evidence does not take {_flag(foreign[0])}: it takes "
            f"{', '.join(map(_flag, usable))}; train/evidence_table.py sets everything else"
        )
    if "part" not in given:
        from alphacl_fast.train.evidence_table import PARTS

        fail(f"evidence needs --part, one of {', '.join(PARTS)}")
    with _train_package():
        from alphacl_fast.train import evidence

        progress = evidence.evidence(**given)
    state = f"{progress.done} of {progress.total} runs have their row in {progress.file}"
    if progress.signal is not None:
        print(f"alphacl: stopped; {state}; {again}", file=sys.stderr)
        return 128 + progress.signal
    print(state)
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plan(arguments: list[str]) -> int:
    parser = _parser(
        "plan",
        "Predict memory, work, messages and time of one InfoNCE step (loss and gradient).",
        {
            "--rate": (float, "per device, counting 8·DIM per pair of rows "
                       "(default: measured here in 2 s)", "TFLOPS"),
            "--bandwidth": (float, "per device and direction (default: 50, a 400 Gb/s port)",
                            "GB/S"),
            "--latency": (float, "per message (default: 20)", "US"),
            "--memory": (float, "per device, for the loss (default: no limit)", "GB"),
            "--ranks-per-node": (int, "devices of a node, for the two-level ring (default: 8 where "
                                 "they divide more than 8 GPUS)", "N"),
            "--node-bandwidth": (float, "per device within a node (default: 300)", "GB/S"),
            "--host": (float, "the host's time for one step of a ring (default: 750, see "
                       "docs/scaling.md)", "US"),
        },
    )  # fmt: skip
    parser.set_defaults(bandwidth=50.0, latency=20.0, node_bandwidth=300.0, host=750.0)
    for name, (kind, text, metavar) in {
        "--batch": (_count, "over all devices: 65536, 64K, 4M", "PAIRS"),
        "--dim": (int, "features", None),
        "--gpus": (int, "devices", None),
    }.items():
        parser.add_argument(name, type=kind, help=text, metavar=metavar, required=True)
    for name, choices in (
        ("--dtype", ("bfloat16", "float16", "float32", "float64")),
        ("--negatives", ("two_view", "one_view", "cross_view")),
    ):
        text = "(default: %(default)s)"
        parser.add_argument(name, choices=choices, default=choices[0], help=text)
    given = parser.parse_args(arguments)
    with importing():
        import torch

        from alphacl_fast import plan
        from alphacl_fast.distributed import auto_strategy
        from alphacl_fast.rate import measured_rate

    dtype = getattr(torch, given.dtype)
    rate, origin = given.rate, "as given"
    if rate is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        rate = measured_rate(given.dim, dtype, device) / 1e12
        origin = f"measured here, on {device.type}"
    per_node = given.ranks_per_node
    if per_node is None and given.gpus > 8 and given.gpus % 8 == 0:
        per_node = 8
    try:
        plans = plan.plan(
            given.batch,
            given.dim,
            given.gpus,
            rate=rate * 1e12,
            bandwidth=given.bandwidth * 1e9,
            latency=given.latency * 1e-6,
            dtype=dtype,
            negatives=given.negatives,
            ranks_per_node=per_node,
            node_bandwidth=given.node_bandwidth * 1e9,
            host=given.host * 1e-6,
            device="cuda",
        )
    except ValueError as error:
        fail(str(error))
    print(
        f"{given.batch:,} pairs of {given.dim} features, {given.dtype}, {given.negatives}, "
        f"on {given.gpus:,} devices of {rate:.4g} TFLOP/s ({origin}), {given.bandwidth:g} GB/s, "
        f"{given.latency:g} us\n"
    )
    heads = f"{'memory':>10} {'work':>17} {'messages':>10} {'step':>10} {'waiting':>8}"
    print(f"{'per device':10} {heads}")
    for p in plans:
        print(
            f"{p.strategy:10} {p.memory / 1e9:>7.2f} GB {p.flops / 1e12:>10,.1f} TFLOP "
            f"{p.sent / 1e9:>7.2f} GB {p.seconds:>8.3g} s {100 * p.exposed:>6.1f} %"
        )
    automatic = auto_strategy(
        given.batch, given.dim, dtype, given.negatives, ranks=given.gpus, ranks_per_node=per_node
    )
    memory = None if given.memory is None else given.memory * 1e9
    print(
        f"\nfaster{' and within the memory' if memory else ''}: "
        f'{plan.recommended(plans, memory)}; strategy="auto" takes {automatic}'
    )
    return 0


def _info(arguments: list[str]) -> int:
    _parser("info", "Show versions, backends and devices.").parse_args(arguments)
    with importing():
        import torch

        import alphacl_fast

    rows = [("alphacl_fast", alphacl_fast.__version__), ("python", platform.python_version())]
    rows += [(name, _version(name)) for name in ("torch", "triton", "torchvision", "scikit-learn")]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    processor = (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    rows += [("cpu", processor), ("cuda device", cuda)]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = {device: alphacl_fast.backends(device) for device in devices}
    for name in found["cpu"]:
        usable = [device for device in devices if found[device][name] is None]
        why = ((device, reason) for device in devices if (reason := found[device][name]))
        reasons = "; ".join(f"{device}: {' '.join(reason.split())}" for device, reason in why)
        text = f"usable on {' and '.join(usable)}" if usable else f"not usable: {reasons}"
        rows.append((f"backend {name}", text))
    from alphacl_fast.backend import cpu

    if cpu.load_error() is None:
        dtypes = ("float32", "float64", "bfloat16", "float16")
        served = ", ".join(f"{name} by {cpu.kernels_for(getattr(torch, name))}" for name in dtypes)
        sets = ", ".join(
            name if here else f"({name})" for name, here in cpu.instruction_sets().items()
        )
        rows += [("cpu kernels", cpu.build()), ("cpu kernels use", f"{served}; compiled: {sets}")]
        rows.append(("users' functions", cpu.users_functions()))
    rows.append(("objectives", ", ".join(alphacl_fast.objectives.names())))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows))
    return 0


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


COMMANDS = {
    "train": _train,
    "eval": _eval,
    "reproduce": _reproduce,
    "inspect": _inspect,
    "theory": _theory,
    "check": _check,
    "bench": _bench,
    "tune": _tune,
    "plan": _plan,
    "info": _info,
}
