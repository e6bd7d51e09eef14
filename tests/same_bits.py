"""Whether two checkouts give the same losses and gradients, bit for bit.

    python tests/same_bits.py OLD_CHECKOUT [--quick]

On the CPU kernels, for each instruction set that this machine runs: every objective × kind of
negatives × similarity × dtype, with the reductions "mean" and "none"; some of these cases at other
sizes, with ids, with one gradient alone and with a fixed temperature; explicit negatives,
supervised losses and two threads. On the other backends (Triton interpreted, CUDA emulated) every
fifth to nineteenth case of such a table. `--quick` takes a seventh of the CPU's cases and fewer of
the others'.

Each checkout computes them in processes of its own, reached by its public interface alone; both
must be compiled. A difference is an error unless same_bits_allowed.txt gives a reason for it:
lines "pattern of case names | reason".
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = Path(__file__).with_name("same_bits_allowed.txt")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MODES = (("two_view", True), ("one_view", True), ("cross_view", True), ("cross_view", False))
SIMILARITIES = ("cosine", "dot", "euclidean")
#: Every named objective, and what changes the road that it takes.
MEMBERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("infonce", {}),
    ("infonce", {"epsilon": 0.0, "temperature_scaled": True}),
    ("infonce", {"epsilon": 0.3}),
    ("mine", {}),
    ("triplet", {}),
    ("soft_triplet", {}),
    ("soft_triplet", {"margin": -0.5}),
    ("n_plus_1_tuplet", {}),
    ("lifted_structured", {}),
    ("modified_triplet", {"scale": 5.0}),
    ("triplet_contrastive", {}),
    ("uniform", {}),
    ("alpha_direct", {}),
    ("alpha_direct", {"detach_alpha": False}),
    ("alpha_direct", {"normalized": False}),
    ("alpha_direct", {"detach_alpha": False, "normalized": False}),
    ("alpha_direct", {"exponent": 2, "alpha_eps": 0.1, "detach_alpha": False}),
    ("alpha_direct", {"exponent": 3}),
    ("alpha_direct", {"exponent": 1.5, "alpha_eps": 0.1, "detach_alpha": False}),
    ("alpha_entropy", {}),
    ("alpha_entropy", {"detach_alpha": False}),
    ("alpha_entropy", {"alpha_eps": 0.2}),
    ("alpha_inverse", {}),
    ("alpha_inverse", {"detach_alpha": False, "order": 2, "exponent": 3}),
    ("alpha_inverse", {"normalized": False}),
    ("alpha_square", {}),
    ("alpha_square", {"detach_alpha": False}),
    ("alpha_gamma", {}),
    ("alpha_gamma", {"detach_alpha": False, "gamma": 1.5}),
)
FEW = [
    ("infonce", {}),
    ("triplet", {}),
    ("alpha_direct", {"detach_alpha": False}),
    ("alpha_square", {}),
]
#: Objectives through which the temperature receives a gradient.
LEARNABLE = ("infonce", "soft_triplet")

Case = tuple[str, Callable[[], list[Tensor]]]


# --- in a process of one checkout -----------------------------------------------------------------


def rows(n: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of length about 1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, dim, generator=generator, dtype=torch.float64) / dim**0.5).to(dtype)


def views(n: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z1 = rows(n, dim, torch.float64, 1)
    return z1.to(dtype), (z1 + 0.5 * rows(n, dim, torch.float64, 2)).to(dtype)


def differentiated(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [
        loss.detach(),
        *torch.autograd.grad(
            (loss * weights).sum(), leaves, allow_unused=True, materialize_grads=True
        ),
    ]


def two_views(
    member: tuple[str, dict[str, Any]],
    dtype: torch.dtype,
    size: tuple[int, int] = (53, 19),
    wanted: str = "both",
    learn_tau: bool | None = None,
    tau: float = 0.3,
    **setting: Any,
) -> list[Tensor]:
    """Loss and gradients in z1, z2 and the temperature, as far as wanted and there."""
    from alphacl_fast.functional import alpha_cl_loss

    name, options = member
    z = [
        x.requires_grad_(wanted in (which, "both"))
        for x, which in zip(views(*size, dtype), ("z1", "z2"), strict=True)
    ]
    through_alpha = options.get("detach_alpha") is False
    learn_tau = (name in LEARNABLE or through_alpha) if learn_tau is None else learn_tau
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = torch.tensor(tau, dtype=wide, requires_grad=True) if learn_tau else tau
    loss = alpha_cl_loss(*z, name, temperature=temperature, **options, **setting)
    return differentiated(
        loss, [x for x in (*z, temperature) if isinstance(x, Tensor) and x.requires_grad]
    )


def explicit_negatives(
    member: tuple[str, dict[str, Any]], dtype: torch.dtype, m: int, ids: bool, **setting
) -> list[Tensor]:
    from alphacl_fast import loss_against

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z, positive = (
        rows(37, 19, dtype, 3).requires_grad_(),
        rows(37, 1, wide, 5)[:, 0].clone().requires_grad_(),
    )
    negatives = rows(m, 19, dtype, 4).requires_grad_() if m else None
    names = {}
    if ids:
        names = {"ids": torch.arange(37) % 5, "negative_ids": torch.arange(m) % 7 if m else None}
    loss = loss_against(
        z, negatives, positive, member[0], temperature=0.3, **member[1], **names, **setting
    )
    return differentiated(loss, [z, positive] + ([negatives] if m else []))


def supervised(dtype: torch.dtype, reduction: str) -> list[Tensor]:
    from alphacl_fast import supcon_loss

    z = rows(37, 19, dtype, 3).requires_grad_()
    return differentiated(supcon_loss(z, torch.arange(37) % 9, reduction=reduction), [z])


def module(dtype: torch.dtype) -> list[Tensor]:
    """A loss object with a learnable temperature, of a batch that several threads share."""
    from alphacl_fast import FusedAlphaCLLoss

    torch.set_num_threads(2)
    try:
        temperature = torch.nn.Parameter(torch.tensor(0.2))
        loss = FusedAlphaCLLoss("infonce", temperature=temperature, temperature_range=(0.01, 1.0))
        z = [x.requires_grad_() for x in views(601, 40, dtype)]
        return differentiated(loss(*z), [*z, temperature])
    finally:
        torch.set_num_threads(1)


def title(member: tuple[str, dict[str, Any]]) -> str:
    return f"{member[0]}({','.join(f'{k}={v}' for k, v in member[1].items())})"


def table(backend: str, members, dtypes, step: int, turn: int = 0, **extra: Any) -> Iterator[Case]:
    """Every ``step``-th of members × dtypes × modes × similarities × reductions."""
    settings = itertools.product(members, dtypes, MODES, SIMILARITIES, ("mean", "none"))
    for k, (member, dtype, (negatives, symmetric), similarity, reduction) in enumerate(settings):
        # each block of 24 settings begins one later, so that few steps meet all of them
        if (k + k // 24 + turn) % step:
            continue
        setting = {
            "negatives": negatives,
            "symmetric": symmetric,
            "similarity": similarity,
            "reduction": reduction,
            "backend": backend,
            **extra,
        }
        mode = negatives if symmetric else f"{negatives}-one-direction"
        words = [
            str(dtype).removeprefix("torch."),
            mode,
            similarity,
            reduction,
            *(f"{k}" for k in extra),
            title(member),
        ]
        yield (
            "/".join(words),
            lambda member=member, dtype=dtype, setting=setting: two_views(member, dtype, **setting),
        )


def cpu_cases(step: int) -> Iterator[Case]:
    yield from table("cpu", MEMBERS, DTYPES, step)
    yield from table("cpu", MEMBERS, DTYPES, 11 * step, 1, size=(29, 64))
    yield from table("cpu", MEMBERS, DTYPES, 11 * step, 2, size=(150, 70))
    yield from table("cpu", MEMBERS, DTYPES, 11 * step, 3, ids=torch.arange(53) % 10)
    yield from table("cpu", MEMBERS, DTYPES, 11 * step, 4, wanted="z1")
    yield from table("cpu", MEMBERS, DTYPES, 11 * step, 5, wanted="z2")
    yield from table(
        "cpu",
        [m for m in MEMBERS if m[0] in LEARNABLE],
        DTYPES,
        5 * step,
        learn_tau=False,
        tau=0.05,
    )
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for k, (member, m, ids, reduction) in enumerate(
            itertools.product(MEMBERS, (0, 41), (False, True), ("mean", "none"))
        ):
            if (k + k // 8) % (4 * step) == 0:
                words = f"{name}/explicit negatives/{m}/{reduction}{'/ids' * ids}/{title(member)}"
                yield (
                    words,
                    lambda a=(member, dtype, m, ids), r=reduction: explicit_negatives(
                        *a, reduction=r, backend="cpu"
                    ),
                )
        for reduction in ("mean", "none"):
            yield f"{name}/supervised/{reduction}", lambda d=dtype, r=reduction: supervised(d, r)
        yield f"{name}/two threads", lambda d=dtype: module(d)


def cases(backend: str, quick: bool) -> Iterator[Case]:
    if backend == "cpu":
        return cpu_cases(7 if quick else 1)
    if backend == "blocked":
        return itertools.chain(
            table(backend, MEMBERS, DTYPES, 35 if quick else 5, size=(21, 10)),
            table(
                backend,
                MEMBERS,
                DTYPES,
                91 if quick else 13,
                1,
                size=(21, 10),
                ids=torch.arange(21) % 6,
            ),
        )
    if backend == "triton":
        return itertools.chain(
            table(backend, FEW, DTYPES, 19 if quick else 7, size=(11, 10)),
            table(
                backend,
                FEW[:3],
                DTYPES[:1],
                11 if quick else 5,
                1,
                size=(11, 10),
                ids=torch.arange(11) % 4,
            ),
        )
    return table(backend, FEW, DTYPES, 19 if quick else 7, size=(37, 19))


def compute(backend: str, quick: bool, output: str) -> None:
    """Writes {case: tensors, or the error that was raised}."""
    torch.set_num_threads(1)
    results: dict[str, list[Tensor] | str] = {}
    for name, case in cases(backend, quick):
        try:
            results[name] = [x.detach().clone() for x in case()]
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
            if "ALPHACL_CPU_ISA" in results[name]:  # not of this machine
                results = {}
                break
    torch.save(results, output)


# --- both checkouts -------------------------------------------------------------------------------


def emulated(checkout: Path) -> str:
    """The CUDA library of a checkout for the host; compiled if need be, outside the checkout."""
    environment = {
        **os.environ,
        "ALPHACL_CUDA_CACHE": str(ROOT / "build" / "same_bits"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "setup.py", "--quiet", "build_cuda", "--emulated"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the emulated CUDA kernels of {checkout} cannot be compiled:\n{done.stderr}")
    return done.stdout.split()[-1]


def results_of(
    checkout: Path, backend: str, isa: str, quick: bool, library: str
) -> dict[str, list[Tensor] | str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "TRITON_INTERPRET": "1",
        "ALPHACL_CPU_ISA": isa,
        "ALPHACL_CUDA_EMULATED": library,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/results.pt"
        command = [
            sys.executable,
            __file__,
            str(checkout),
            "--compute",
            backend,
            "--output",
            output,
            *["--quick"] * quick,
        ]
        subprocess.run(command, cwd=folder, env=environment, check=True)
        return torch.load(output)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN is itself; 0 and −0 differ."""
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def difference(old: list[Tensor] | str, new: list[Tensor] | str) -> str | None:
    """What differs between two results, or None."""
    if isinstance(old, str) or isinstance(new, str):
        words = [x if isinstance(x, str) else "numbers" for x in (old, new)]
        return None if old == new else " → ".join(words)
    if len(old) != len(new):
        return f"{len(old)} → {len(new)} tensors"
    worst = []
    for k, (a, b) in enumerate(zip(old, new, strict=True)):
        if same_bits(a, b):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            worst.append(f"tensor {k}: {tuple(a.shape)} {a.dtype} → {tuple(b.shape)} {b.dtype}")
            continue
        a, b = a.double(), b.double()
        scale = float(a.abs().nan_to_num(0, 0, 0).max()) or 1.0
        worst.append(
            f"{'loss' if k == 0 else f'gradient {k}'} {float((a - b).abs().max()) / scale:.1e}"
        )
    return ", ".join(worst) or None


def allowed() -> list[tuple[str, str]]:
    """(pattern, reason) of the differences that are meant."""
    lines = [line.strip() for line in ALLOWED.read_text().splitlines()]
    pairs = [line.partition("|") for line in lines if line and not line.startswith("#")]
    for pattern, _, reason in pairs:
        if not reason.strip():
            sys.exit(f"{ALLOWED.name}: {pattern.strip()!r} needs a reason behind a '|'")
    return [(pattern.strip(), reason.strip()) for pattern, _, reason in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="the other checkout, compiled")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="every seventh case of the CPU kernels, fewer of the others",
    )
    parser.add_argument("--compute", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compute:
        compute(options.compute, options.quick, options.output)
        return 0
    from alphacl_fast.backend import cpu  # not above: the other checkout's processes run this file

    old = options.old.resolve()
    reasons, unexplained, total = allowed(), 0, 0
    libraries = [emulated(checkout) for checkout in (old, ROOT)]
    groups = [("cpu", isa) for isa in cpu.INSTRUCTION_SETS] + [
        (backend, "") for backend in ("blocked", "triton", "cuda")
    ]
    for backend, isa in groups:
        before, after = (
            results_of(checkout, backend, isa, options.quick, library)
            for checkout, library in zip((old, ROOT), libraries, strict=True)
        )
        if not before and not after:
            print(f"{backend} {isa}: not on this machine")
            continue
        differing = 0
        for name in dict.fromkeys([*before, *after]):
            what = difference(before.get(name, "absent"), after.get(name, "absent"))
            if what is None:
                continue
            full = "/".join(filter(None, (backend, isa, name)))
            reason = next(
                (why for pattern, why in reasons if fnmatch.fnmatchcase(full, pattern)), None
            )
            print(f"{full}: {what}  ({reason or 'NO REASON'})")
            differing, unexplained = differing + 1, unexplained + (reason is None)
        errors = sum(isinstance(result, str) for result in after.values())
        total += len(after)
        print(
            f"{backend} {isa}: {len(after)} cases, {differing} differ; {errors} raise", flush=True
        )
    print(f"{total} cases, {unexplained} differences without a reason")
    return 1 if unexplained or not total else 0


if __name__ == "__main__":
    sys.exit(main())
