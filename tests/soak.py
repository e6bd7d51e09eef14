"""Random calls of the loss, all backends, each against the oracle, with the process's memory
watched.

    python tests/soak.py --steps 10000 [--seed 0]          (make soak)

Objective, options, mode, similarity, reduction, shapes, strides, dtype, temperature, scale of the
rows, which inputs require a
gradient: all drawn. It ends with exit code 1 at the first mismatch, naming the step's seed, or if
    memory keeps growing.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_CACHE_DIR", str(Path("build") / "triton"))
if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    if "ALPHACL_CUDA_EMULATED" not in os.environ:
        from tools import build_cuda

        os.environ["ALPHACL_CUDA_EMULATED"] = str(build_cuda.emulated())

import torch
from family import MEMBERS, MODES, SIMILARITIES, relative_error

from alphacl_fast import objectives, ops
from alphacl_fast.functional import alpha_cl_loss

#: Steps in a hundred of the backends that run in an interpreter or emulated; the others share the
#: rest.
SLOW = {"triton": 3, "cuda": 3}
#: Largest error of loss and gradients, relative to the oracle in float64 on the same numbers.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 3e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
LARGEST_GROWTH = 64.0  # MiB, of the process's peak over the second half of the steps


class Mismatch(Exception):
    """A step whose result is not the oracle's."""


def draw(rng: random.Random) -> dict:
    """Everything about one call."""
    usable = [
        name for name, reason in ops.backends().items() if reason is None and name != "reference"
    ]
    fast = [name for name in usable if name not in SLOW]
    backend = rng.choices(
        [*SLOW, "fast"], [*(SLOW[name] if name in usable else 0 for name in SLOW), 94]
    )[0]
    backend = rng.choice(fast) if backend == "fast" else backend
    while True:
        objective = objectives.make(*rng.choice(MEMBERS))
        if backend not in ("cpu", "cuda") or not objective.functions:
            break
    negatives, symmetric = rng.choice(MODES)
    dtype = rng.choices([*TOLERANCES], [5, 5, 1, 1])[0]
    small = backend in SLOW
    return {
        "objective": objective,
        "backend": backend,
        "negatives": negatives,
        "symmetric": symmetric,
        "dtype": dtype,
        "similarity": rng.choice(SIMILARITIES),
        "reduction": rng.choice(["mean", "sum", "none"]),
        "n": rng.choice([2, 3, rng.randint(2, 20 if small else 90)]),
        "d": rng.choice([1, rng.randint(1, 24 if small else 200)]),
        "tau": 10 ** rng.uniform(-1 if dtype != torch.float64 else -2, 0.5),
        "strides": rng.choice(["plain", "columns", "rows"]),
        "wanted": rng.choice([(True, True), (True, False), (False, True), (False, False)]),
        "learn": rng.random() < 0.3,
        "noise": 10 ** rng.uniform(-2, 0.5),
    }


def views(call: dict, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(call["n"], call["d"], generator=generator)
    z2 = z1 + call["noise"] * torch.randn(call["n"], call["d"], generator=generator)
    # so that exp(t/τ) has a meaning
    scale = 1.0 if call["similarity"] == "cosine" else call["d"] ** -0.5
    laid_out = []
    for z, wanted in zip((z1, z2), call["wanted"], strict=True):
        z = (z * scale).to(call["dtype"])
        if call["strides"] == "columns":
            z = torch.stack([z, z], 2)[:, :, 0]
        elif call["strides"] == "rows":
            z = z.t().contiguous().t()
        laid_out.append(z.requires_grad_(wanted))
    return laid_out


def results(
    call: dict, leaves: list[torch.Tensor], tau: torch.Tensor, backend: str
) -> list[torch.Tensor]:
    names = ("negatives", "symmetric", "similarity", "reduction")
    value = alpha_cl_loss(
        *leaves, call["objective"], temperature=tau, backend=backend, **{k: call[k] for k in names}
    )
    found = [value.detach()]
    wanted = [x for x in (*leaves, tau) if x.requires_grad]
    if wanted:
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
        found += torch.autograd.grad(
            (value * weights).sum(), wanted, allow_unused=True, materialize_grads=True
        )
    return found


def step(seed: int) -> str:
    """One call against the oracle; the backend that served it. Raises Mismatch."""
    rng = random.Random(seed)
    call = draw(rng)
    leaves = views(call, seed)
    learn = call["learn"] and call["objective"].tau_gradient is not None
    tau = torch.tensor(
        call["tau"], dtype=torch.float64 if call["dtype"] == torch.float64 else torch.float32
    )
    exact = [z.detach().double().requires_grad_(z.requires_grad) for z in leaves]
    reason = f"step of seed {seed}: { {**call, 'objective': str(call['objective'])} }"
    try:
        ours = results(call, leaves, tau.clone().requires_grad_(learn), call["backend"])
        truth = results(call, exact, tau.double().requires_grad_(learn), "reference")
    except ValueError as error:
        if "gamma must be at most" in str(error):  # |Neg|^γ leaves the dtype, which is said
            return call["backend"]
        raise Mismatch(f"{reason}: {error}") from error
    scale = max(1.0, truth[0].abs().max().item())
    # gradients may be zero but for rounding (one feature under cosine): what they are made of is
    # about this large
    shortest = (
        min(z.detach().norm(dim=1).min().item() for z in exact)
        if call["similarity"] == "cosine"
        else 1.0
    )
    made_of = scale / call["tau"] / max(shortest, 1e-6)
    tolerance = TOLERANCES[call["dtype"]]
    # (d²)^½ of equal rows makes 1e-8 of a rounding of 1e-16
    if call["objective"].options.get("exponent", 2) < 2:
        tolerance = max(tolerance, 1e-6)
    for name, a, b in zip(("loss", "first", "second", "third"), ours, truth, strict=False):
        floor = (
            1e-3 * scale
            if name == "loss"
            else max(1e-2 * max(x.norm().item() for x in truth[1:]), 1e-3 * made_of)
        )
        error = relative_error(a, b, floor=floor) if b.numel() else 0.0
        if not error < tolerance:
            raise Mismatch(f"{reason}: {name} is off by {error:.2g}")
    return call["backend"]


def soak(steps: int, seed: int, report=print) -> Counter:
    """So many steps; how many each backend served. Raises Mismatch."""
    served, middle = Counter(), 0.0
    for k in range(steps):
        served[step(seed + k)] += 1
        if k == steps // 2:
            middle = peak()
        if (k + 1) % max(1, steps // 10) == 0:
            report(f"{k + 1} steps, peak {peak():.0f} MiB: {dict(served)}")
    if peak() - middle > LARGEST_GROWTH:
        raise Mismatch(f"the process's peak grew by {peak() - middle:.0f} MiB in the second half")
    return served


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        soak(given.steps, given.seed, lambda text: print(text, flush=True))
    except Mismatch as problem:
        sys.exit(f"soak: {problem}")
