"""Losses and gradients whose kernels are interpreted, each against float64.

The short list is for every change. The full one takes every objective and size, and executes every
instruction of the kernels but those that `UNREACHED` accounts for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from family import BUILT_IN, loss_and_grads, pair, relative_error

from alphacl_fast.backend import cuda, gpu

from .runner import Runner

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF), 8: (torch.int64, 2**63 - 1)}


@dataclass(frozen=True)
class Case:
    backend: str
    arch: str
    pairs: int
    dim: int
    dtype: torch.dtype
    precision: str | None = None
    objective: str = "infonce"
    options: dict = field(default_factory=dict)
    setting: dict = field(default_factory=dict)
    tau: float = 0.3
    processors: int = 6  # few: schedules have splits where there are many
    symmetric: bool | None = None  # tiles of row_sums of the cuda backend
    nan_row: int | None = None
    short: bool = False
    fails: str = ""  # the defect that makes it fail: it must

    @property
    def name(self) -> str:
        parts = [
            self.backend, f"sm_{self.arch}", str(self.dtype).removeprefix("torch."), self.precision,
            f"n{self.pairs}", f"d{self.dim}", self.objective,
            *(f"{k}={v}" for k, v in {**self.options, **self.setting}.items()),
            f"tau={self.tau}" if self.tau != 0.3 else "",
            f"processors={self.processors}" if self.processors != 6 else "",
            "" if self.symmetric is None else f"symmetric_tiles={self.symmetric}",
            "" if self.nan_row is None else f"nan_row={self.nan_row}",
        ]  # fmt: skip
        return "-".join(part for part in parts if part)

    @property
    def mode(self) -> str:
        """The arithmetic, by which errors are bounded."""
        names = {BF16: "bf16", FP16: "fp16", FP64: "fp64"}
        return names.get(self.dtype) or {"ieee": "fp32"}.get(self.precision, self.precision)


#: Bounds of relative errors: of losses, of gradients. Those of float16 are subnormal in part.
BOUNDS = {
    "bf16": (2e-5, 4e-3), "fp16": (2e-5, 4e-3), "tf32": (3e-4, 2e-3), "bf16x3": (2e-5, 2e-5),
    "fp32": (2e-6, 1e-5), "fp64": (1e-12, 1e-12),
}  # fmt: skip


@dataclass
class Result:
    case: str
    ok: bool
    errors: list[float]
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
    z1, z2 = pair(case.pairs, case.dim, case.dtype)
    if case.nan_row is not None:
        integer, bits = NAN[z1.element_size()]
        z1.view(integer)[case.nan_row] = bits
    setting = {"tau": case.tau, **case.setting}
    member = case.objective, case.options
    errors, problem, ok = [], "", False
    truth = loss_and_grads(z1.double(), z2.double(), *member, backend="reference", **setting)
    try:
        with _device(case):
            ours = loss_and_grads(
                z1, z2, *member, backend=case.backend, precision=case.precision, **setting
            )
        ok = all(map(_same_nan, ours, truth))
        if case.nan_row is None:
            errors = [relative_error(a, b) for a, b in zip(ours, truth, strict=True)]
            loose, tight = BOUNDS[case.mode][1], BOUNDS[case.mode][0]
            ok &= errors[0] < tight and max(errors[1:]) < loose
    except Exception as error:  # a fault comes as what the library's caller raises
        problem = f"{type(error).__name__}: {error}"
    hazards, records = runner.hazards(), runner.records
    return Result(
        case.name, ok and not hazards and not problem, errors, hazards, problem, len(records),
        sum(r.steps for r in records), sum(r.seconds for r in records),
        time.process_time() - begin,
    )  # fmt: skip


@contextlib.contextmanager
def _device(case: Case) -> Iterator[None]:
    before = gpu.pretended
    gpu.pretend_gpu(case.processors // 2)
    try:
        with cuda.symmetric(case.symmetric):
            yield
    finally:
        gpu.pretend_gpu(before)


def _same_nan(ours: torch.Tensor, truth: torch.Tensor) -> bool:
    return torch.equal(ours.isnan(), truth.isnan())


# --- the lists ------------------------------------------------------------------------------------

_SIDES = [{}, {"negatives": "cross_view"}, {"negatives": "one_view"}]
_ONE_SIDED = {"negatives": "cross_view", "symmetric": False}


def cuda_cases(arch: str) -> list[Case]:
    """Every family of csrc/cuda's kernels."""
    return _hopper() if arch == "90a" else _ampere()


def _hopper() -> list[Case]:
    case = Case("cuda", "90a", 75, 64, BF16)
    short = [
        case, replace(case, dim=104, processors=40, setting={"negatives": "cross_view"}),
        replace(case, dim=200, objective="alpha_direct"),
        replace(case, pairs=330, dim=128, processors=4),  # more tiles than stages
    ]  # fmt: skip
    many = [
        replace(case, pairs=n, dim=d, objective=o, processors=p, setting=s)
        for n, d, o, p, s in [
            (150, 128, "infonce", 6, {}), (330, 64, "infonce", 4, {}),
            (330, 256, "infonce", 4, {}), (330, 256, "alpha_direct", 4, {}),
            (330, 128, "alpha_direct", 4, {}), (330, 64, "alpha_direct", 4, {}),
            (150, 256, "alpha_entropy", 40, {}), (65, 24, "alpha_entropy", 40, {}),
            (64, 64, "infonce", 6, {}), (33, 128, "infonce", 6, {}), (2, 64, "infonce", 6, {}),
            (129, 72, "infonce", 40, _SIDES[1]), (97, 136, "infonce", 40, _SIDES[2]),
            (150, 128, "alpha_direct", 40, _ONE_SIDED), (140, 64, "infonce", 6, _SIDES[1]),
            (150, 256, "infonce", 40, _ONE_SIDED),
        ]
    ]  # fmt: skip
    # the last of two tiles is nearly full: almost every column of a masked tile counts
    for dim in (64, 128, 256):
        one = replace(case, pairs=126, dim=dim)
        many += [one, replace(one, setting={"learn_tau": False})]
        many += [replace(one, objective="alpha_direct")]
    return [replace(c, short=True) for c in short] + many + [replace(case, nan_row=3)]


def _ampere() -> list[Case]:
    case = Case("cuda", "80", 70, 64, BF16)
    # rows of each dtype that a kernel holds whole, and one that comes in chunks
    sizes = {
        (BF16, None): (64, 128, 256, 264), (FP16, None): (64, 128, 256, 264),
        (FP32, "tf32"): (64, 128, 132), (FP32, "ieee"): (64, 72), (FP64, None): (32, 40),
    }  # fmt: skip
    cases = []
    for (dtype, precision), dims in sizes.items():
        for dim in dims:
            one = replace(case, dtype=dtype, precision=precision, dim=dim)
            cases += [one, replace(one, objective="alpha_direct", setting=_SIDES[1])]
            cases += [replace(one, tau=0.02), replace(one, dim=dim - 3, processors=20)]
            cases += [
                replace(one, pairs=35, objective=o, options=k, setting=_SIDES[turn % 3])
                for turn, (o, k) in enumerate(BUILT_IN)
            ]
            similarities = ("dot", "euclidean")
            cases += [replace(one, setting={"similarity": s}, tau=8.0) for s in similarities]
    for dim in (64, 128, 256, 264):
        cases += [replace(case, dim=dim, symmetric=False, setting=s) for s in _SIDES]
    cases += [replace(case, nan_row=3), replace(case, dtype=FP16, nan_row=3)]
    cases += [replace(case, dtype=FP32, precision="ieee", nan_row=3)]
    short = [
        case, replace(case, dim=264, pairs=40), replace(case, dtype=FP16, dim=61, processors=20),
        replace(case, dtype=FP32, precision="tf32", setting=_SIDES[1]),
        replace(case, dtype=FP32, precision="ieee", pairs=40),
        replace(case, dtype=FP64, dim=32, pairs=35), replace(case, tau=0.02, pairs=40),
        replace(case, objective="alpha_direct", symmetric=False, setting=_SIDES[2]),
        replace(case, nan_row=3),
        replace(case, dim=16, pairs=40, nan_row=3),
        replace(
            case, dtype=FP32, precision="ieee", dim=16, pairs=40, nan_row=3,
        ),
        replace(
            case, dtype=FP32, precision="tf32", pairs=40, nan_row=3,
        ),
    ]  # fmt: skip
    names = {c.name for c in short}
    return [replace(c, short=True) for c in short] + [c for c in cases if c.name not in names]


def triton_cases(arch: str) -> list[Case]:
    """Every arithmetic of the Triton kernels, with their default tiles."""
    case = Case("triton", arch, 75, 64, BF16)
    short = [
        case, replace(case, pairs=66, dim=100, processors=40),
        replace(case, pairs=40, dtype=FP32, precision="tf32"),
        replace(case, pairs=40, dtype=FP16, setting=_SIDES[1]),
        replace(case, pairs=40, dtype=FP32, precision="ieee"),
        replace(case, pairs=40, dim=40, dtype=FP64),
        replace(case, pairs=70, dim=256), replace(case, pairs=66, dim=512, setting=_SIDES[2]),
        replace(case, tau=0.01), replace(case, pairs=40, objective="triplet"),
        replace(case, pairs=40, objective="alpha_square", setting=_SIDES[1]),
        replace(case, pairs=40, dtype=FP32, precision="bf16x3"), replace(case, nan_row=3),
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
        ]
    ]  # fmt: skip
    more += [replace(case, pairs=70, objective=o, options=k) for o, k in BUILT_IN]
    more += [replace(case, setting={"similarity": "dot"}, tau=8.0)]
    more += [replace(case, setting={"similarity": "euclidean"}, tau=8.0)]
    more += [replace(case, dtype=FP32, precision="ieee", nan_row=3)]
    return [replace(c, short=True) for c in short] + more
