"""The flags of ``alphacl check``, ``bench`` and ``tune``, for help that does not wait for torch.

The names that they list are the library's; a test compares them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from .suggestions import did_you_mean

SWEEP_BACKENDS = ("cpu", "triton", "cuda", "blocked")
DTYPES = ("float32", "float64", "bfloat16", "float16")
OBJECTIVES = (
    "infonce", "mine", "triplet", "soft_triplet", "n_plus_1_tuplet", "lifted_structured",
    "modified_triplet", "triplet_contrastive", "alpha_direct", "alpha_entropy", "alpha_inverse",
    "uniform", "alpha_square", "alpha_gamma",
)  # fmt: skip
NEGATIVES = ("two_view", "one_view", "cross_view")
TASKS = ("siglip", "supcon", "dcl", "matryoshka")
MEASURES = ("loss", "backward", "loss+gradient", "memory")
BASELINES = (
    "eager", "compiled", "lightly", "pytorch_metric_learning", "pytorch_metric_learning_ntxent",
    "keops", "inf_cl", "cut_cross_entropy", "liger", "flex_attention", "open_clip", "memeff",
    "memeff_stable", "info_nce", "sentence_transformers", "sentence_transformers_cached",
    "linear_cross_entropy",
)  # fmt: skip
TILE_MODES = ("bf16", "fp16", "tf32", "bf16x3", "fp32", "fp64")


def positive(text: str) -> float:
    """Parse a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def list_of(kind: type, valid: Sequence[str] = ()) -> Callable[[str], list]:
    """Make a parser of values that commas separate; with ``valid``, of those names only."""

    def parse(text: str) -> list:
        values = [kind(part) for part in text.split(",") if part]
        for value in values:
            if valid and value not in valid:
                near = did_you_mean(value, valid)
                raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(valid)}{near}")
        if not values:
            raise argparse.ArgumentTypeError("at least one value is needed")
        return values

    parse.__name__ = f"{kind.__name__} list"  # the name in argparse's messages
    return parse


def add_check_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``alphacl check``."""
    names = ", ".join(SWEEP_BACKENDS)
    parser.add_argument("--backends", metavar="A,B,…", help=f"of {names} (default: all)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: every kind there is)")
    parser.add_argument(
        "--quick", action="store_true", help="check one objective of each form only"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write a line of JSON for each case once it is done; the output of libraries goes to "
        "FILE.log",
    )
    parser.add_argument(
        "--seconds", type=positive, default=math.inf, help="time limit (default: none)"
    )
    parser.add_argument(
        "--limit",
        type=positive,
        default=60.0,
        metavar="SECONDS",
        help="end a case that has not finished after this time; it counts as hanging (default: 60)",
    )


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``alphacl bench``."""
    for flag, parse, default, text in (
        ("n", list_of(int), "1024,4096", "rows 2N; every list is separated by commas"),
        ("dim", list_of(int), "128", "features"),
        ("dtype", list_of(str, DTYPES), "float32", f"out of {', '.join(DTYPES)}"),
        (
            "objective",
            list_of(str, (*OBJECTIVES, *TASKS)),
            "infonce",
            f"names of objectives, or out of {', '.join(TASKS)}; baselines compute infonce and "
            "these",
        ),
        ("negatives", list_of(str, NEGATIVES), "two_view", f"out of {', '.join(NEGATIVES)}"),
        (
            "measure",
            list_of(str, MEASURES),
            "loss+gradient,memory",
            "out of loss, backward, loss+gradient, memory",
        ),
        ("repeats", list_of(int), "5,25", "fewest and most repeats"),
        ("tau", float, 0.5, "temperature"),
        ("budget", float, 20.0, "seconds for the repeats of a table"),
        ("out", Path, "runs/bench", "folder of rows and tables"),
    ):
        parser.add_argument(
            f"--{flag}", type=parse, default=default, help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--contestants",
        type=list_of(str),
        help=f"backends, or {', '.join(BASELINES)} (default: all that run on the device)",
    )
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")


def add_tune_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``alphacl tune``; commas separate the values of a list."""
    for name, kind, default, text in (
        ("--modes", str, "bf16,tf32,fp32", f"of {', '.join(TILE_MODES)}"),
        ("--dims", int, "128,512,256,64", "feature dimensions"),
        ("--rows", int, "65536,16384,1024", "rows 2N"),
    ):
        text += f" (default: {default})"
        parser.add_argument(name, type=list_of(kind), default=default, help=text)
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit (default: 10)")
    parser.add_argument("--out", type=Path, help="default: this device's table in the package")
