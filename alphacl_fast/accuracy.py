"""Errors of a backend against float64, and how large they may be.

A float32 result may have twice the error of the dense loss in the same dtype (and the same GEMM
precision) plus a band. The band is four roundings where GEMMs are IEEE, and one rounding of an
operand where they use TF32 or three bfloat16 products. For half-precision input the dense loss is
computed in float32, so the gradient's band is a quarter of the dtype's eps. Scalars (a mean loss, a
temperature's gradient) get four bands, because one of two random errors may be zero by luck. Where
the dense loss does not fit into memory or its error is not finite, three more bands replace twice
its error.

`alphacl check` and `tools.gpu` run the generators `serving` and `check` as tasks of
`subprocess_pool`, in child processes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import objectives, ops
from .functional import alpha_cl_loss
from .journal import Row
from .objectives import MinPlayer, PairLoss, PairWeight

# --- the cases ------------------------------------------------------------------------------------

#: One objective for each form of the sweeps.
REPRESENTATIVES = [("infonce", {}), ("alpha_direct", {}), ("triplet", {}), ("alpha_square", {})]
THROUGH = {"detach_alpha": False}
MEMBERS: list[tuple[str, dict[str, Any]]] = [
    *REPRESENTATIVES,
    *((name, {}) for name in objectives.names() if (name, {}) not in REPRESENTATIVES),
    *((name, THROUGH) for name in ("alpha_direct", "alpha_square", "alpha_entropy")),
    ("alpha_gamma", {**THROUGH, "gamma": 1.5}), ("alpha_direct", {"normalized": False}),
    ("infonce", {"epsilon": 0.0, "temperature_scaled": True}), ("infonce", {"epsilon": 0.3}),
    ("triplet", {"margin": 0.1}), ("soft_triplet", {"margin": -0.5}),
    ("modified_triplet", {"scale": 5.0}), ("alpha_direct", {**THROUGH, "normalized": False}),
    *(("alpha_direct", {**THROUGH, "exponent": q, "alpha_eps": 0.1}) for q in (2, 1.5)),
    ("alpha_direct", {"exponent": 3}), ("alpha_entropy", {"alpha_eps": 0.2}),
    ("alpha_inverse", {**THROUGH, "order": 2, "exponent": 3}),
    ("alpha_inverse", {"normalized": False, "alpha_eps": 0.0}),
    ("alpha_inverse", {"exponent": 1, "alpha_eps": 0.5}),
]  # fmt: skip
#: Users' functions, which a backend must translate.
CUSTOM = {
    "custom_loss": lambda: PairLoss(
        lambda xi: torch.log1p(xi) + xi.square() / 1e6, lambda gap: gap.exp() + gap.sigmoid()
    ),
    "custom_weight": lambda: PairWeight(
        lambda d: 1 / (1 + d.square()), detach_alpha=False, alpha_eps=0.1
    ),
    "custom_min_player": lambda: MinPlayer(
        lambda x: torch.relu(x + 0.2).square(), detach_alpha=False
    ),
}
MODES = [("two_view", True), ("cross_view", True), ("one_view", True), ("cross_view", False)]
#: Name → dtype and GEMM precision.
ARITHMETIC: dict[str, tuple[torch.dtype, str | None]] = {
    "bfloat16": (torch.bfloat16, None), "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16x3": (torch.float32, "bf16x3"), "float16": (torch.float16, None),
    "float64": (torch.float64, None),
}  # fmt: skip
#: Tolerance bands of loss and gradient.
BANDS = {
    "float64": (1e-10, 1e-10), "float32": (2**-21, 2**-21), "bf16x3": (2**-16, 2**-16),
    "tf32": (2**-11, 2**-11),
    "bfloat16": (2**-17, 2**-9), "float16": (2**-17, 2**-12),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One check of a backend against float64.

    Attributes:
        backend: the backend's name.
        runs: the number of runs; if there are several, they use deterministic algorithms and must
            all give the bits of the first.
        nan: whether one feature is NaN, which must reach the loss and every gradient as it does in
            float64.
        large: whether the dense matrices would not fit into memory; then the result is compared
            with another backend's in float64.
    """

    backend: str
    objective: str = "infonce"
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "bfloat16"
    negatives: str = "two_view"
    symmetric: bool = True
    similarity: str = "cosine"
    reduction: str = "mean"
    learn_tau: bool = False
    tau: float = 0.3
    pairs: int = 1283
    dim: int = 128
    runs: int = 1
    nan: bool = False
    large: bool = False

    def member(self) -> objectives.Objective:
        if self.objective in CUSTOM:
            return CUSTOM[self.objective]()
        return objectives.make(self.objective, dict(self.options))

    def sensible(self) -> bool:
        """Return whether the requested gradients exist and are insensitive to rounding."""
        # For "dot", d² = 1 − t crosses 0, where its lower powers have unbounded slope.
        steep = self.similarity == "dot" and dict(self.options).get("exponent", 4) < 2
        return not steep and (not self.learn_tau or has_tau_gradient(self.objective, self.options))

    @property
    def kinked(self) -> bool:
        """Return whether rounding may move a pair across a kink, which changes its weight."""
        return self.objective in ("triplet", "custom_min_player") or (
            self.objective == "alpha_square" and not dict(self.options).get("detach_alpha", True)
        )


@functools.cache
def has_tau_gradient(objective: str, options: tuple[tuple[str, Any], ...]) -> bool:
    return Case("", objective, options).member().tau_gradient is not None


# --- evaluation -----------------------------------------------------------------------------------


def structured_rows(
    views: int,
    rows: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Draw ``views`` random (rows, dim) tensors that share a mean and a few dense directions.

    With unstructured rows the negatives contribute only a few per cent of the gradient, and a check
    in bfloat16 would miss their errors.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    mean, directions = normal(1, dim), normal(6, dim) / 6**0.5
    return [
        0.5 * mean + 0.7 * normal(rows, 6) @ directions + 0.5 * normal(rows, dim)
        for _ in range(views)
    ]


@contextlib.contextmanager
def matmul_precision(dtype: str) -> Iterator[None]:
    """Set torch's float32 GEMM precision: "tf32", or IEEE for every other name."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Use deterministic algorithms and fill new allocations with NaN."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Use one thread on a CPU: small tensors are fastest where no thread waits for another."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def correlated_views(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw two views whose positives range from unrelated to equal, so no objective is zero.

    Rows that are not normalised have length about 1, so that no single pair dominates a row.
    """
    generator = torch.Generator(device).manual_seed(case.pairs)
    size = 2, case.pairs, case.dim
    z1, other = structured_rows(*size, device, torch.float64, generator)
    likeness = torch.rand(case.pairs, 1, generator=generator, device=device, dtype=torch.float64)
    z2 = likeness * z1 + (1 - likeness.square()).sqrt() * other
    scale = 1.0 if case.similarity == "cosine" else case.dim**-0.5
    dtype, _ = ARITHMETIC[case.dtype]
    z1, z2 = (z1 * scale).to(dtype), (z2 * scale).to(dtype)
    if case.nan:
        fill_with_nan(z1[case.pairs // 2, -1:])
    return z1, z2


def fill_with_nan(x: Tensor) -> None:
    """Fill x with the NaN that a GPU makes: every bit is 1 except the sign.

    Code that rounds or compares by adding to the bits may turn this NaN into a number, although it
    keeps every other one.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    x.view(whole).fill_(torch.iinfo(whole).max)


def evaluate(
    case: Case, z1: Tensor, z2: Tensor, backend: str, precision: str | None
) -> dict[str, Tensor]:
    """Compute loss and gradients by name.

    Row losses get fixed weights; a mean is scaled by the number of rows to suit float16.
    """
    z1, z2 = z1.detach().clone().requires_grad_(), z2.detach().clone().requires_grad_()
    wide = torch.promote_types(z1.dtype, torch.float32)
    inputs = {"dz1": z1, "dz2": z2}
    if case.learn_tau:
        tau = torch.tensor(case.tau, dtype=wide, device=z1.device)
        inputs["dtau"] = tau.requires_grad_()
    loss = alpha_cl_loss(
        z1, z2, case.member(), temperature=inputs.get("dtau", case.tau), backend=backend,
        precision=precision, similarity=case.similarity, negatives=case.negatives,
        symmetric=case.symmetric, reduction=case.reduction,
    )  # fmt: skip
    weights = torch.full_like(loss, case.pairs)
    if case.reduction == "none":
        weights = torch.linspace(-0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    grads = torch.autograd.grad(loss, list(inputs.values()), weights)
    return {"loss": loss.detach(), **dict(zip(inputs, grads, strict=True))}


def compared(
    case: Case,
    ours: dict[str, Tensor],
    truth: dict[str, Tensor],
    eager: dict[str, Tensor] | None = None,
) -> dict[str, tuple[float, float | None, float]]:
    """Compute (our error, the dense loss's error, the bound) of every result.

    Errors are relative to the norm of the float64 result, ``truth``. A gradient of the rows also
    has the error of its worst row, relative to the root mean square of the rows, because a norm
    over all rows would hide a single wrong one. The bound is four bands without the dense loss,
    ``eager``, and where its error is not finite: twice infinity would accept anything.
    """
    low, high = BANDS[case.dtype]
    kink = case.kinked and case.dtype != "float64"
    found = {}

    def bounded(off: list[Tensor], band: float, floor: float) -> tuple[float, float | None, float]:
        mine, *dense = (float(x) for x in off)
        reference = dense[0] if dense else None
        if reference is None or not math.isfinite(reference):
            return mine, reference, max(4 * band, floor)
        return mine, reference, 2 * reference + max(band, floor)

    for name, exact in truth.items():
        size = exact.norm()
        if name == "dtau":  # terms of order 1 may cancel, so the error is not relative
            size = size.clamp(min=0.1 * case.pairs)
        elif name == "loss":
            size = size.clamp(min=1e-3 * exact.numel() ** 0.5)
        off = [x[name].double() - exact for x in (ours, eager) if x is not None]
        band = (high if name.startswith("dz") else low) * (1 if exact.dim() else 4)
        found[name] = bounded([x.norm() / size for x in off], band, 1e-3 * kink)
        if name.startswith("dz"):
            size = size / exact.shape[0] ** 0.5
            worst = [x.norm(dim=1).max() / size for x in off]
            found[f"worst row of {name}"] = bounded(worst, 16 * high, 0.1 * kink)
    return found


# --- the checks -----------------------------------------------------------------------------------


def refusal(case: Case, device: torch.device) -> str | None:
    """Return why the case's backend does not serve it, or None."""
    dtype, precision = ARITHMETIC[case.dtype]
    return ops.unsupported(case.backend, device, dtype, precision, case.member().kind)


def status(error: str) -> Row:
    return {"status": "failed" if error else "ok", "error": error or None}


def check(case: Case, device: str) -> Iterator[Row]:
    """Check loss and gradients against float64, and that every run gives the same bits."""
    start = time.perf_counter()
    here = torch.device(device)
    _, precision = ARITHMETIC[case.dtype]
    row = {"benchmark": "check", "on": device, **asdict(case)}
    threads = contextlib.nullcontext() if case.large else one_thread(here)
    with threads, matmul_precision(case.dtype):
        if reason := refusal(case, here):
            yield {**row, "status": "refused", "error": reason}
            return
        oracle = float64_oracle(case, here) if case.large else "reference"
        if oracle is None:
            yield {**row, "status": "skipped", "error": "no other backend has float64 here"}
            return
        truth = in_float64(replace(case, backend=oracle, runs=1), device)
        views = correlated_views(case, here)
        eager = None if case.large else evaluate(case, *views, "reference", None)
        with deterministic(case.runs > 1):
            ours, *again = (
                evaluate(case, *views, case.backend, precision) for _ in range(case.runs)
            )
    errors = {} if case.nan else compared(case, ours, truth, eager)
    wrong = lost_nan(case, ours, truth) if case.nan else too_large(errors)
    different = sum(not same_bits(ours.values(), other.values()) for other in again)
    wrong += other_bits(different, len(again))
    yield {
        **row, **status("; ".join(wrong)), "errors": errors,
        "repeatable": not different if again else None,
        "oracle": oracle, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def float64_oracle(case: Case, device: torch.device) -> str | None:
    """Find a sweep backend that computes the case in float64 and is not itself being checked."""
    wide = replace(case, dtype="float64")
    for name in ("blocked", *ops.SWEEP_BACKENDS):
        same = (name, "float64") == (case.backend, case.dtype)
        if not same and refusal(replace(wide, backend=name), device) is None:
            return name
    return None


@functools.lru_cache(maxsize=1)
def in_float64(case: Case, device: str) -> dict[str, Tensor]:
    """Compute the case in float64; the result is kept for the next backend's check."""
    z1, z2 = (z.double() for z in correlated_views(case, torch.device(device)))
    return evaluate(case, z1, z2, case.backend, None)


def too_large(errors: dict[str, tuple[float, float | None, float]]) -> list[str]:
    """List the errors beyond their bounds."""
    return [
        f"{name} {mine:.1e} > {bound:.1e}"
        for name, (mine, _, bound) in errors.items()
        if not mine <= bound
    ]


def lost_nan(case: Case, ours: dict[str, Tensor], truth: dict[str, Tensor]) -> list[str]:
    """List the results in which a NaN became a number.

    The gradient of z2 is left out for "one_view": there z2 occurs only in the positives, and
    backends differ in whether an unrelated row's NaN loss counts.
    """
    names = [name for name in truth if (name, case.negatives) != ("dz2", "one_view")]
    lost = {name: int((truth[name].isnan() & ~ours[name].isnan()).sum()) for name in names}
    wrong = [
        f"{name}: {count} of {int(truth[name].isnan().sum())} NaN became numbers"
        for name, count in lost.items()
        if count
    ]
    return wrong if ours["loss"].isnan().any() else [*wrong, "the loss is not NaN"]


def same_bits(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Return whether results have the same bytes: −0 is not 0, and NaN have many bit patterns."""

    def as_bytes(x: Tensor) -> Tensor:
        return x.contiguous().reshape(-1).view(torch.uint8)

    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(as_bytes(x), as_bytes(y))
        for x, y in zip(one, other, strict=True)
    )


def other_bits(different: int, further: int) -> list[str]:
    return [f"{different} of {further} further runs gave other bits"] if different else []


def serving(item: Row, device: str) -> Iterator[Row]:
    """Tell for every dtype and GEMM precision whether the item's backend serves it on a device.

    Yields:
        Rows with the status "served", or "refused" with the reason in ``error``.
    """
    here = torch.device(device)
    name = torch.cuda.get_device_name(here) if here.type == "cuda" else platform.machine()
    about = {"benchmark": "serving", "on": device, **item}
    about |= {"device_name": name, "torch": torch.__version__}
    for arithmetic, (dtype, precision) in ARITHMETIC.items():
        with matmul_precision(arithmetic):
            reason = ops.unsupported(item["backend"], here, dtype, precision)
        served = "refused" if reason else "served"
        yield {**about, "dtype": arithmetic, "status": served, "error": reason}
