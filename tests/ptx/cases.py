"""Calls whose kernels are interpreted, each compared with float64.

The short list is for every change. The full one takes every objective and size; coverage.py says
how many of the kernels' instructions it has to execute, and which kernels no call launches.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from family import BUILT_IN, CUSTOM, pair, relative_error
from torch import Tensor

from alphacl_fast import objectives
from alphacl_fast.backend import cuda, gpu

from . import calls
from .runner import Runner, fill_with_nan

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    backend: str
    arch: str
    pairs: int
    dim: int
    dtype: torch.dtype
    precision: str | None = None
    objective: Any = "infonce"
    options: dict = field(default_factory=dict)
    setting: dict = field(default_factory=dict)
    tau: float = 0.3
    call: Callable = calls.loss
    ids: int | None = None  # how many there are
    sides: tuple[int, int] | None = None  # rows of a rectangle
    both: bool = True  # they are anchors on both sides of it
    multiprocessors: int = 3  # few: schedules have splits where there are many
    symmetric: bool | None = None  # tiles of row_sums of the cuda backend
    workspace: int | None = None  # bytes, where a sweep takes several launches for lack of it
    nan_row: int | None = None
    bound: float | None = None  # of the errors of gradients, where it is not the arithmetic's
    short: bool = False

    @property
    def name(self) -> str:
        loss = str(self.objective).replace(" ", "")
        if self.call is not calls.loss:
            loss = self.call.__name__ + ("" if self.objective == "infonce" else f"-{loss}")
        parts = [
            self.backend, f"sm_{self.arch}", str(self.dtype).removeprefix("torch."), self.precision,
            f"n{self.pairs}" if self.sides is None else "{}x{}".format(*self.sides),
            f"d{self.dim}", loss,
            *(f"{k}={v}" for k, v in {**self.options, **self.setting}.items()),
            f"tau={self.tau}" if self.tau != 0.3 else "",
            "" if self.ids is None else f"ids={self.ids}",
            "" if self.both else "one_side",
            f"multiprocessors={self.multiprocessors}" if self.multiprocessors != 3 else "",
            "" if self.symmetric is None else f"symmetric_tiles={self.symmetric}",
            "" if self.workspace is None else f"workspace={self.workspace}",
            "" if self.nan_row is None else f"nan_row={self.nan_row}",
        ]  # fmt: skip
        return "-".join(part for part in parts if part)

    @property
    def mode(self) -> str:
        """The arithmetic, by which errors are bounded."""
        names = {BF16: "bf16", FP16: "fp16", FP64: "fp64"}
        return names.get(self.dtype) or {"ieee": "fp32"}.get(self.precision, self.precision)


#: Bounds of relative errors, of losses and sums and of gradients. They are about three times the
#: largest that was met; gradients of bfloat16 and float16 are rounded to their dtype themselves.
BOUNDS = {
    "bf16": (3e-6, 4e-3), "fp16": (2e-6, 4e-3), "tf32": (2e-4, 2e-3), "bf16x3": (4e-7, 5e-6),
    "fp32": (4e-6, 5e-6), "fp64": (1e-14, 1e-14),
}  # fmt: skip


@dataclass
class Result:
    case: str
    ok: bool
    errors: list[float]  # the largest of losses and sums, and of gradients
    hazards: list[str]
    problem: str  # an exception
    launches: int
    steps: int
    seconds: float  # of interpreted kernels
    cpu: float  # in all


def run(case: Case, runner: Runner) -> Result:
    """Within the context of the case's launches."""
    runner.records.clear()
    begin = time.process_time()
    views = pair(case.pairs, case.dim, case.dtype)
    if case.nan_row is not None:
        fill_with_nan(views[0][case.nan_row])
    truth = case.call(case, tuple(z.double() for z in views), "reference", None)
    errors, problem, ok = [], "", False
    try:
        with _device(case):
            ours = case.call(case, views, case.backend, case.precision)
        groups = [[*zip(*lists, strict=True)] for lists in zip(ours, truth, strict=True)]
        values, gradients = groups
        exact = case.mode in ("bf16x3", "fp32", "fp64")
        errors = [
            max(_error(a, b) for a, b in values),
            max((_error(a, b, exact and b.numel() == 1) for a, b in gradients), default=0.0),
        ]
        same = all(torch.equal(a.isnan(), b.isnan()) for group in groups for a, b in group)
        bounds = BOUNDS[case.mode][0], case.bound or BOUNDS[case.mode][1]
        ok = same and all(e < bound for e, bound in zip(errors, bounds, strict=True))
    except Exception as error:  # a fault comes as what the library's caller raises
        problem = f"{type(error).__name__}: {error}"
    hazards, records = runner.hazards(), runner.records
    return Result(
        case.name, ok and not hazards and not problem, errors, hazards, problem, len(records),
        sum(r.steps for r in records), sum(r.seconds for r in records),
        time.process_time() - begin,
    )  # fmt: skip


def _error(ours: Tensor, truth: Tensor, cancels: bool = False) -> float:
    """The relative error of what is not NaN.

    ``cancels``: of a derivative in τ, which is a sum of terms of order 1. Where they cancel, what
    is left is no measure of their rounding, which is all the error of an exact arithmetic.
    """
    known = ~truth.isnan()
    return relative_error(ours[known], truth[known], floor=0.1 if cancels else 1e-3)


@contextlib.contextmanager
def _device(case: Case) -> Iterator[None]:
    before = gpu.pretended, gpu.pretended_capability, gpu.WORKSPACE
    gpu.pretend_gpu(case.multiprocessors, divmod(int(case.arch.rstrip("a")), 10))
    gpu.WORKSPACE = case.workspace or gpu.WORKSPACE
    try:
        with cuda.symmetric(case.symmetric):
            yield
    finally:
        *device, gpu.WORKSPACE = before
        gpu.pretend_gpu(*device)


# --- the lists ------------------------------------------------------------------------------------

_SIDES = [{}, {"negatives": "cross_view"}, {"negatives": "one_view"}]
#: Members that are no closed form of the mean of all rows, which needs no sweep.
_SWEPT = [member for member in BUILT_IN if objectives.make(*member).kind]
#: Without a gradient in τ the first sweep has one sum, and on sm_90 Triton's symmetric tiles.
_ONE_SUM = {"learn_tau": False}
_ONE_SIDED = {"negatives": "cross_view", "symmetric": False}
#: Calls whose sweeps take several launches where there is little workspace.
_ONE_BY_ONE = (calls.loss, calls.one_sum)
#: A NaN in a row of the first view spoils its own loss and gradient, and those of the second view.
_ROWS = {**_ONE_SIDED, "reduction": "none"}


def _rectangles(case: Case, dim: int) -> list[Case]:
    """Ragged ones with more or fewer rows than a tile, and whole tiles."""
    return [
        replace(case, call=calls.rectangle, sides=s, both=both, pairs=sum(s) // 2 + 1, dim=dim)
        for s, both in (((75, 208), True), ((3, 3), True), ((64, 128), False))
    ]


def _listed(short: list[Case], full: list[Case]) -> list[Case]:
    """Both lists; what the short one has, the full one need not run again."""
    names = {case.name for case in short}
    return [replace(c, short=True) for c in short] + [c for c in full if c.name not in names]


def cuda_cases(arch: str) -> list[Case]:
    """Every family of csrc/cuda's kernels."""
    return _hopper() if arch == "90a" else _ampere()


def _hopper() -> list[Case]:
    case = Case("cuda", "90a", 75, 64, BF16)
    half, tf32 = replace(case, dtype=FP16), replace(case, dtype=FP32, precision="tf32")
    short = [
        case, replace(case, dim=104, multiprocessors=20, setting={"negatives": "cross_view"}),
        replace(case, dim=200, objective="alpha_direct"),
        replace(case, pairs=330, dim=128, multiprocessors=2),  # more tiles than stages
        *_rectangles(case, 104)[:1],
        replace(half, dim=128, objective="alpha_direct"),
        replace(half, pairs=130, dim=200, setting=_ONE_SUM),
        replace(half, pairs=130, nan_row=3, setting=_ROWS),
        far_apart(half, True),
        in_one_direction(tf32),
        replace(tf32, dim=104, objective="alpha_direct", multiprocessors=20),
        replace(tf32, pairs=200, dim=128, multiprocessors=2, setting=_ONE_SUM),
    ]  # fmt: skip
    many = [
        replace(case, pairs=n, dim=d, objective=o, multiprocessors=p, setting=s)
        for n, d, o, p, s in [
            (150, 128, "infonce", 3, {}), (330, 64, "infonce", 2, {}),
            (330, 256, "infonce", 2, {}), (330, 256, "alpha_direct", 2, {}),
            (330, 128, "alpha_direct", 2, {}), (330, 64, "alpha_direct", 2, {}),
            (150, 256, "alpha_entropy", 20, {}), (65, 24, "alpha_entropy", 20, {}),
            (64, 64, "infonce", 3, {}), (33, 128, "infonce", 3, {}), (2, 64, "infonce", 3, {}),
            (129, 72, "infonce", 20, _SIDES[1]), (97, 136, "infonce", 20, _SIDES[2]),
            (150, 128, "alpha_direct", 20, _ONE_SIDED), (140, 64, "infonce", 3, _SIDES[1]),
            (150, 64, "alpha_direct", 20, _ONE_SIDED), (150, 256, "alpha_direct", 20, _ONE_SIDED),
            (150, 256, "infonce", 20, _ONE_SIDED),
        ]
    ]  # fmt: skip
    # the last of two tiles is nearly full: almost every column of a masked tile counts
    for dim in (64, 128, 256):
        one = replace(case, pairs=126, dim=dim)
        many += [one, replace(one, setting=_ONE_SUM)]
        many += [replace(one, objective="alpha_direct")]
        # tiles without a mask, one after the other
        one = replace(case, pairs=330, dim=dim, multiprocessors=2, call=calls.one_sum)
        many += [
            replace(one, objective=o, symmetric=s)
            for o in ("infonce", "alpha_direct")
            for s in (None, False)
        ]
    # sums of a few ring distances in each launch
    many += [replace(case, pairs=330, call=calls.one_sum, workspace=4 * 660 * 3)]
    for dim in (64, 200):
        many += _alone(replace(case, dim=dim)) + _alone(replace(half, dim=dim))
    # float16 rounds the gradients of so many pairs of the other objective to subnormals
    many += [
        replace(c, dtype=FP16)
        for c in many
        if (c.dtype, c.nan_row) == (BF16, None)
        and c.call in (calls.loss, calls.one_sum)
        and (c.pairs < 330 or c.objective == "infonce" or c.call is calls.one_sum)
    ]
    many += [replace(half, pairs=150, dim=dim, objective="alpha_direct") for dim in (64, 128, 256)]
    many += [
        replace(c, dtype=FP32, precision="tf32")
        for c in many
        if c.dtype == BF16 and c.dim <= 128 and c.call in (calls.loss, calls.one_sum)
    ]
    for dim in (64, 128):
        one = replace(tf32, dim=dim)
        many += [replace(one, nan_row=3, setting=s) for s in ({}, _ROWS)]
        many += [*_rectangles(one, dim - 3), in_one_direction(one)]
    many += [
        replace(far_apart(replace(one, dim=dim), both), tau=tau)
        for one in (case, half) for dim in (64, 128, 256) for both in (True, False)
        for tau in (0.02, 1.0)
    ]  # fmt: skip
    return _listed(short, many)


def in_one_direction(case: Case) -> Case:
    """Operands that a product cuts off, where they should have been rounded, exceed the bound."""
    return replace(case, call=calls.rows_in_one_direction, sides=(75, 210), pairs=143, bound=1.2e-4)


def far_apart(case: Case, both: bool) -> Case:
    """Four tiles of columns, whose weights rise and fall."""
    sides = (75, 390)
    return replace(
        case, call=calls.weights_far_apart, sides=sides, both=both, pairs=sum(sides) // 2 + 1,
        tau=0.02,
    )  # fmt: skip


#: Arithmetics of the cuda backend, each with lengths of rows: every one that a kernel holds whole,
#: and one that comes in chunks.
_LENGTHS = {
    (BF16, None): (64, 128, 256, 264), (FP16, None): (64, 128, 256, 264),
    (FP32, "tf32"): (64, 128, 132), (FP32, "ieee"): (64, 72), (FP64, None): (32, 40),
}  # fmt: skip


def _ampere() -> list[Case]:
    case = Case("cuda", "80", 70, 64, BF16)
    cases = []
    for (dtype, precision), dims in _LENGTHS.items():
        one = replace(case, dtype=dtype, precision=precision)
        for dim in dims:
            cases += _of_length(replace(one, dim=dim))
        cases += [replace(one, dim=24, pairs=n) for n in (2, 32, 129 if dtype == BF16 else 97)]
        cases += _alone(replace(one, dim=32, pairs=40))
        kept = replace(one, dim=32, pairs=40, ids=11)
        # where rounding moves no pair over the limit
        limits = [] if precision == "tf32" else [{"max_gap": -0.8}]
        cases += [kept, *(replace(kept, setting=s, objective="alpha_direct") for s in limits)]
        cases += [replace(kept, ids=None, call=calls.weighted_and_limited) for _ in limits]
        kinds = replace(one, pairs=10, call=calls.every_kind)
        cases += [replace(kinds, dim=dim) for dim in (dims[0], dims[-1])]
    cases += [replace(case, pairs=33, call=calls.every_kind)]  # two tiles: one serves its columns
    for dim in (64, 264):  # several launches
        cases += [replace(case, pairs=129, dim=dim, call=k, workspace=1) for k in _ONE_BY_ONE]
    for dim in (64, 128, 256, 264):
        cases += [replace(case, dim=dim, symmetric=False, setting=s) for s in _SIDES]
        # so many pairs that a symmetric tile needs no mask
        one = replace(case, dim=dim, pairs=129, objective="alpha_direct")
        cases += [one, replace(one, symmetric=False)]
    cases += [replace(case, dtype=FP64, dim=200, pairs=4)]  # several features for each lane
    short = [
        case, replace(case, dim=264, pairs=40),
        replace(case, dtype=FP16, dim=61, multiprocessors=10),
        replace(case, dtype=FP32, precision="tf32", setting=_SIDES[1]),
        replace(case, dtype=FP32, precision="ieee", pairs=40),
        replace(case, dtype=FP64, dim=32, pairs=35), replace(case, tau=0.02, pairs=40),
        replace(case, dim=16, pairs=40, call=calls.weighted_and_limited),
        replace(case, objective="alpha_direct", symmetric=False, setting=_SIDES[2]),
        replace(case, nan_row=3),
        replace(case, dim=16, pairs=40, nan_row=3),
        replace(case, dtype=FP32, precision="ieee", dim=16, pairs=40, nan_row=3),
        replace(case, dtype=FP32, precision="tf32", pairs=40, nan_row=3),
        replace(case, dtype=FP16, dim=16, pairs=40, nan_row=3, setting=_ROWS),
        *_rectangles(case, 64)[:1],
    ]  # fmt: skip
    return _listed(short, cases)


def _of_length(case: Case) -> list[Case]:
    """Every objective and similarity for rows of one length, and rows that no vector load reads."""
    cases = [case, replace(case, objective="alpha_direct", setting=_SIDES[1])]
    cases += [replace(case, tau=0.02), replace(case, dim=case.dim - 3, multiprocessors=10)]
    cases += [
        replace(case, pairs=35, objective=o, options=k, setting=_SIDES[turn % 3])
        for turn, (o, k) in enumerate(_SWEPT)
    ]
    return cases + [replace(case, setting={"similarity": s}, tau=8.0) for s in ("dot", "euclidean")]


def _alone(case: Case) -> list[Case]:
    """What any arithmetic takes once: NaN, rows of any length, SigLIP, rectangles."""
    cases = [replace(case, nan_row=3, setting=s) for s in ({}, _ROWS)]
    if case.dtype != FP16:  # whose range is too small
        cases += [replace(case, call=calls.every_length)]
    return [*cases, replace(case, call=calls.siglip), *_rectangles(case, case.dim)]


def triton_cases(arch: str) -> list[Case]:
    """Every arithmetic of the Triton kernels, with their default tiles."""
    case = Case("triton", arch, 75, 64, BF16)
    if arch == "120":
        return _blackwell(case)
    # so many pairs that a row block meets a whole tile of other rows, which has no mask
    whole = 140 if arch == "90" else 70
    short = [
        case, replace(case, pairs=66, dim=100, multiprocessors=20),
        replace(case, pairs=40, dtype=FP32, precision="tf32"),
        replace(case, pairs=40, dtype=FP16, setting=_SIDES[1]),
        replace(case, pairs=40, dtype=FP32, precision="ieee"),
        replace(case, pairs=40, dim=40, dtype=FP64),
        replace(case, pairs=70, dim=256), replace(case, pairs=66, dim=512, setting=_SIDES[2]),
        replace(case, tau=0.01), replace(case, pairs=whole, objective="triplet"),
        replace(case, pairs=40, objective="alpha_square", setting=_SIDES[1]),
        replace(case, pairs=40, dtype=FP32, precision="bf16x3"), replace(case, nan_row=3),
        replace(case, pairs=200, setting=_ONE_SUM),
    ]  # fmt: skip
    more = [
        replace(case, pairs=n, dim=d, dtype=t, precision=p, setting=s)
        for n, d, t, p, s in [
            (200, 64, BF16, None, {}), (100, 128, BF16, None, {}),
            (66, 512, BF16, None, {}), (97, 128, BF16, None, _SIDES[1]),
            (97, 128, BF16, None, _SIDES[2]), (130, 128, BF16, None, _ONE_SIDED),
            (64, 64, BF16, None, {}), (2, 64, BF16, None, {}), (65, 128, FP32, "ieee", {}),
            (66, 128, FP32, "bf16x3", {}), (66, 64, FP32, "bf16x3", _SIDES[1]),
            (70, 128, FP16, None, {}), (66, 128, FP32, "tf32", _SIDES[2]),
            (70, 256, FP32, "tf32", {}), (66, 264, FP16, None, {}),
            (66, 64, BF16, None, _ONE_SUM), (200, 128, BF16, None, _ONE_SUM),
            (100, 264, BF16, None, _ONE_SUM), (150, 128, BF16, None, {**_ONE_SUM, **_SIDES[1]}),
        ]
    ]  # fmt: skip
    more += [replace(case, pairs=whole, objective=o, options=k) for o, k in _SWEPT]
    more += [replace(case, setting={"similarity": "dot"}, tau=8.0)]
    more += [replace(case, setting={"similarity": "euclidean"}, tau=8.0)]
    for dtype, precision in _LENGTHS:
        pairs = whole if dtype == BF16 else 40
        one = replace(case, pairs=pairs, dim=32, dtype=dtype, precision=precision)
        more += [*_alone(one), replace(one, ids=11)]
    more += [replace(case, pairs=40, ids=1), replace(case, pairs=40, ids=11, setting=_SIDES[1])]
    limited = replace(case, pairs=whole, setting={"max_gap": -0.8})
    more += [replace(limited, objective=o) for o in ("infonce", "alpha_direct", "triplet")]
    more += [replace(limited, dtype=FP32, precision="ieee", pairs=40, ids=11)]
    weighted = replace(case, pairs=40, dim=16, call=calls.weighted_and_limited)
    more += [
        weighted,
        replace(weighted, dtype=FP32, precision="ieee"),
        replace(weighted, dtype=FP64),
    ]
    more += [replace(case, pairs=129, dim=d, workspace=1) for d in (64, 512)]  # several launches
    more += [replace(case, pairs=whole, objective=o, options=k) for o, k in CUSTOM[:5]]
    return _listed(short, more)


def _blackwell(case: Case) -> list[Case]:
    """The arithmetics and lengths whose tiles or instructions sm_120 has for itself."""
    own = [
        (75, 64, BF16, None, "infonce"), (70, 96, BF16, None, "infonce"),
        (70, 96, BF16, None, "alpha_direct"), (70, 128, BF16, None, "infonce"),
        (70, 128, BF16, None, "triplet"), (70, 256, BF16, None, "infonce"),
        (66, 512, BF16, None, "alpha_direct"), (70, 128, FP16, None, "infonce"),
        (40, 64, FP32, "tf32", "infonce"), (70, 256, FP32, "tf32", "infonce"),
        (40, 64, FP32, "ieee", "infonce"), (40, 64, FP32, "bf16x3", "infonce"),
        (40, 40, FP64, None, "infonce"),
    ]  # fmt: skip
    cases = [
        replace(case, pairs=n, dim=d, dtype=t, precision=p, objective=o) for n, d, t, p, o in own
    ]
    cases += [replace(case, nan_row=3), replace(case, ids=11)]
    return [*cases, replace(case, call=calls.every_length)]
