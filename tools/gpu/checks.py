"""The loss and its gradients against float64, as tasks of `pool`.

Tolerances: a float32 result may have twice the error of the dense loss in the same dtype (and the
same GEMM precision) plus a band. The band is four roundings where GEMMs are IEEE, and one rounding
of an operand where they use TF32 or three bfloat16 products. For half-precision input the dense
loss is computed in float32, so the gradient's band is a quarter of the dtype's eps. Scalars (a mean
loss, a temperature's gradient) get four bands, because one of two random errors may be zero by
luck.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alphacl_fast import MinPlayer, PairLoss, PairWeight, objectives
from alphacl_fast.benchmarks import loss as benchmark
from alphacl_fast.functional import SIMILARITIES, alpha_cl_loss

from . import engines
from .journal import Row

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
DIMS = (64, 96, 128, 200, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Case:
    """One check of an engine against float64.

    Attributes:
        engine: of `engines.ENGINES`.
        runs: how often the engine computes, with deterministic algorithms if more than once; every
            run must give the bits of the first.
        nan: a row of the first view is NaN, and the rows of the results that are NaN must be those
            of the reference.
    """

    engine: str
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

    def member(self) -> objectives.Objective:
        if self.objective in CUSTOM:
            return CUSTOM[self.objective]()
        return objectives.make(self.objective, dict(self.options))

    def sensible(self) -> bool:
        """Whether the requested gradients exist and are insensitive to rounding."""
        # For "dot", d² = 1 − t crosses 0, where its lower powers have unbounded slope.
        steep = self.similarity == "dot" and dict(self.options).get("exponent", 4) < 2
        return not steep and (not self.learn_tau or has_tau_gradient(self.objective, self.options))

    @property
    def kinked(self) -> bool:
        """Whether rounding may move single pairs across a kink, which changes their weight."""
        return self.objective in ("triplet", "custom_min_player") or (
            self.objective == "alpha_square" and not dict(self.options).get("detach_alpha", True)
        )


@functools.cache
def has_tau_gradient(objective: str, options: tuple[tuple[str, Any], ...]) -> bool:
    return Case("", objective, options).member().tau_gradient is not None


def grid(**axes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def cases(
    chosen: list[str], dims: tuple[int, ...] = DIMS, pairs: tuple[int, int] = (1000, 1537)
) -> Iterator[Case]:
    """Yield distinct cases: the most important first, then the whole table in random order."""
    picks = random.Random(0)
    compiled = [name for name in chosen if name != "blocked"] or chosen
    every = [*MEMBERS, *((name, {}) for name in CUSTOM)]
    both, reductions, either = ("bfloat16", "float32"), ("mean", "none"), (False, True)
    axes = {"mode": MODES, "similarity": SIMILARITIES}
    table = list(
        grid(member=every, dtype=ARITHMETIC, **axes, reduction=reductions, learn_tau=either)
    )
    picks.shuffle(table)
    careful = {"reduction": "none", "runs": 2, "learn_tau": True}
    seen: set[Case] = set()
    for fields in itertools.chain(
        (
            {**fields, **more}
            for fields in grid(engine=chosen, dtype=ARITHMETIC)
            for more in ({"reduction": "mean", "runs": 1}, careful)
        ),
        grid(dtype=both, engine=compiled, member=every),
        grid(dtype=["bfloat16"], member=REPRESENTATIVES, **axes, engine=compiled),
        grid(dtype=["float32"], member=REPRESENTATIVES, **axes, engine=chosen),
        grid(dtype=(*both, "tf32", "float16"), dim=dims, engine=compiled, member=MEMBERS[:3:2]),
        grid(tau=(0.05, 0.01), dtype=both, engine=compiled, learn_tau=either),
        (
            {**fields, "dim": picks.choice(dims), "engine": name}
            for k, fields in enumerate(table)
            for name in (chosen if k % 10 == 0 else compiled)
        ),
    ):  # fmt: skip
        member, options = fields.pop("member", MEMBERS[0])
        negatives, symmetric = fields.pop("mode", MODES[0])
        drawn = {
            "reduction": picks.choice(reductions), "runs": picks.choice((1, 2)),
            "dim": 128 if 128 in dims else dims[0],
        }  # fmt: skip
        case = Case(
            objective=member, options=tuple(options.items()), negatives=negatives,
            symmetric=symmetric, pairs=0, **drawn | fields,
        )  # fmt: skip
        if case not in seen and case.sensible():
            seen.add(case)
            yield replace(case, pairs=picks.randint(*pairs))


def correlated_views(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw two views whose positives range from unrelated to equal, so no objective is zero.

    Rows that are not normalised have length about 1, so that no single pair dominates a row.
    """
    generator = torch.Generator(device).manual_seed(case.pairs)
    size = 2, case.pairs, case.dim
    z1, other = benchmark.structured_rows(*size, device, torch.float64, generator)
    likeness = torch.rand(case.pairs, 1, generator=generator, device=device, dtype=torch.float64)
    z2 = likeness * z1 + (1 - likeness.square()).sqrt() * other
    scale = 1.0 if case.similarity == "cosine" else case.dim**-0.5
    dtype, _ = ARITHMETIC[case.dtype]
    z1, z2 = (z1 * scale).to(dtype), (z2 * scale).to(dtype)
    if case.nan:
        fill_with_nan(z1[case.pairs // 3])
    return z1, z2


def fill_with_nan(x: Tensor) -> None:
    """Fill x with the NaN that a GPU makes, whose bits are all 1 but the sign."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    x.view(whole).fill_(torch.iinfo(whole).max)


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Use deterministic algorithms, and fill new allocations with NaN."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


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
    case: Case, ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]
) -> dict[str, tuple[float, float, float]]:
    """Compute (our error, the dense loss's, the bound) of every result.

    Errors are relative to the norm of the truth. Gradients of rows also have the error of their
    worst row, relative to the root mean square of the rows: a norm over all rows would hide a
    single wrong one.
    """
    low, high = BANDS[case.dtype]
    kink = case.kinked and case.dtype != "float64"
    found = {}

    for name, exact in truth.items():
        size = exact.norm()
        if name == "dtau":  # terms of order 1 may cancel, so the error is not relative
            size = size.clamp(min=0.1 * case.pairs)
        elif name == "loss":
            size = size.clamp(min=1e-3 * exact.numel() ** 0.5)
        off = [x[name].double() - exact for x in (ours, eager)]
        mine, theirs = (float(x.norm() / size) for x in off)
        band = (high if name.startswith("dz") else low) * (1 if exact.dim() else 4)
        found[name] = mine, theirs, 2 * theirs + max(band, 1e-3 * kink)
        if name.startswith("dz"):
            size = size / exact.shape[0] ** 0.5
            mine, theirs = (float(x.norm(dim=1).max() / size) for x in off)
            found[f"worst row of {name}"] = mine, theirs, 2 * theirs + max(16 * high, 0.1 * kink)
    return found


def check(case: Case, device: str) -> Iterator[Row]:
    """Check loss and gradients against float64, and whether every run gives the same bits."""
    start = time.perf_counter()
    here = torch.device(device)
    dtype, precision = ARITHMETIC[case.dtype]
    row = {"benchmark": "check", **asdict(case), "n": 2 * case.pairs, "options": dict(case.options)}
    with benchmark.matmul_precision(case.dtype):
        reason = engines.refusal(case.engine, here, dtype, precision, case.member().kind)
        if reason:
            yield {**row, "status": "refused", "error": reason}
            return
        z1, z2 = correlated_views(case, here)
        truth = evaluate(case, z1.double(), z2.double(), "reference", None)
        eager = evaluate(case, z1, z2, "reference", None)
        backend = engines.backend_of(case.engine)
        with deterministic(case.runs > 1), engines.within(case.engine, case.dim, dtype) as compiled:
            ours = evaluate(case, z1, z2, backend, precision)
            again = [evaluate(case, z1, z2, backend, precision) for _ in range(case.runs - 1)]
    if case.nan:
        errors, wrong = {}, other_nans(ours, truth)
    else:
        errors = compared(case, ours, eager, truth)
        wrong = [
            f"{name} {mine:.1e} > {bound:.1e}"
            for name, (mine, _, bound) in errors.items()
            if not mine <= bound
        ]
    different = sum(not same_bits(ours.values(), other.values()) for other in again)
    if different:
        wrong.append(f"{different} of {len(again)} further runs gave other bits")
    yield {
        **row, **status("; ".join(wrong)), "errors": errors,
        "repeatable": not different if again else None,
        "compiled": compiled, "seconds": time.perf_counter() - start,
    }  # fmt: skip


def same_bits(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether results are equal; NaN equals NaN."""
    return all(
        torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(one, other, strict=True)
    )


def other_nans(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> list[str]:
    """What is wrong with the rows that hold a NaN: they must be those of the truth."""
    wrong = []
    for name, exact in truth.items():
        mine, theirs = (
            x.isnan().reshape(len(x) if x.dim() else 1, -1).any(1) for x in (ours[name], exact)
        )
        if not torch.equal(mine, theirs):
            wrong.append(f"{int(mine.sum())} rows of {name} are NaN for {int(theirs.sum())}")
    return wrong


def status(error: str) -> Row:
    return {"status": "failed" if error else "ok", "error": error or None}
