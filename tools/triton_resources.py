"""Compile every production configuration of the Triton kernels, without a GPU, and check it.

    python -m tools.triton_resources
    python -m tools.triton_resources --in-turn     # what `make test` runs

A configuration is a call of the loss: the package's own launcher chooses kernels, tiles and static
arguments, and instead of launching them this file compiles them for sm_80, sm_90, sm_100 and
sm_120, and prints a line for each. It fails on a spill, a stack frame, a serialised wgmma, a block
that does not fit on a multiprocessor, or missing matrix instructions.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

from alphacl_fast import objectives
from alphacl_fast.functional import alpha_cl_loss

from . import resources

CAPABILITIES = (80, 90, 100, 120)
_TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32",
}  # fmt: skip
#: Matrix instructions; products of IEEE float32 have none.
_MATRIX = {
    80: "^(HMMA|DMMA)", 90: "^(HGMMA|DMMA)", 100: "^(UTC|DMMA)", 120: "^(HMMA|DMMA)",
}  # fmt: skip


class Configuration(NamedTuple):
    """What distinguishes a call; ``dim`` counts features."""

    objective: str
    options: tuple[tuple[str, Any], ...]
    dtype: str
    dim: int
    precision: str | None = None
    negatives: str = "two_view"
    learn_tau: bool = False
    symmetric: bool = False
    ids: bool = False
    max_gap: float | None = None
    capabilities: tuple[int, ...] = CAPABILITIES


def configurations() -> list[Configuration]:
    """InfoNCE in every dtype and width on all architectures; pair kinds and forms on Hopper."""
    plain = [
        Configuration("infonce", (), dtype, dim, precision)
        for dtype, precision, dims in (
            ("bfloat16", None, (64, 96, 128, 256, 512, 1024, 4096)), ("float16", None, (128, 1024)),
            ("float32", "tf32", (64, 128, 256, 1024)), ("float32", "bf16x3", (128,)),
            ("float32", "ieee", (64, 128, 512)), ("float64", None, (64,)),
        )
        for dim in dims
    ]  # fmt: skip
    hopper = {"dtype": "bfloat16", "dim": 128, "capabilities": (90,)}
    through = (("detach_alpha", False),)
    kinds = [
        *((f"alpha_{name}", through) for name in ("direct", "inverse", "square", "gamma")),
        *((name, ()) for name in ("alpha_direct", "alpha_entropy", "triplet", "modified_triplet")),
    ]
    forms = [
        Configuration("infonce", (), learn_tau=True, **hopper),
        Configuration("infonce", (), negatives="cross_view", learn_tau=True, **hopper),
        Configuration("infonce", (), symmetric=True, **hopper),
        Configuration("triplet", (), symmetric=True, **hopper),
        Configuration("infonce", (), ids=True, **hopper),
        Configuration("alpha_direct", through, ids=True, **hopper),
        Configuration("infonce", (), max_gap=0.1, **hopper),
        Configuration("alpha_direct", through, max_gap=0.1, **hopper),
    ]
    return [*plain, *(Configuration(*kind, **hopper) for kind in kinds), *forms]


def in_turn(listed: list[Configuration]) -> list[Configuration]:
    """Keep every second configuration, with one architecture in turn; the first of dim 128 keeps
    all. Every dtype, precision, form and architecture remains.
    """
    default = next(c for c in listed if c.dim == 128)
    return [default] + [
        c._replace(capabilities=(c.capabilities[k % len(c.capabilities)],))
        for k, c in enumerate(listed[1::2])
    ]


def launches(c: Configuration, capability: int) -> Iterator[tuple[Any, tuple, Any]]:
    """(kernel, arguments, options) of every sweep that a loss with its gradient launches."""
    from triton.runtime.jit import JITFunction

    from alphacl_fast.backend import gpu
    from alphacl_fast.kernels import config
    from alphacl_fast.kernels.config import Tile

    gpu.pretend_gpu(132, divmod(capability, 10))
    recorded = []
    JITFunction.run = lambda self, *arguments, grid, warmup, **options: recorded.append(
        (self, arguments, options)
    )
    tiles = {}
    if c.symmetric:
        warps = 4 if c.objective == "infonce" else 8
        tiles = dict.fromkeys(
            ("row_sums", "row_sums_plain"), Tile(64, 64, c.dim, warps, 2, symmetric=True)
        )
    dtype = getattr(torch, c.dtype)
    z1, z2 = (torch.randn(512, c.dim, dtype=dtype).requires_grad_() for _ in range(2))
    tau = torch.tensor(0.5, dtype=torch.promote_types(dtype, torch.float32))
    objective = objectives.make(c.objective, dict(c.options))
    objective.max_sweeps = 1  # a min player would go on: nothing is computed
    with config.forced(**tiles):
        alpha_cl_loss(
            z1, z2, objective, temperature=tau.requires_grad_() if c.learn_tau else 0.5,
            precision=c.precision, negatives=c.negatives, backend="triton",
            ids=torch.arange(len(z1)) // 2 if c.ids else None,
            max_gap=c.max_gap,
        )  # fmt: skip
    seen = set()
    for kernel, arguments, options in recorded:
        if kernel.__name__ not in ("row_sums", "pair_grad"):
            continue  # tests/test_rows.py compiles the kernels of rows
        if (key := (kernel.__name__, arguments[-1].cache_key)) not in seen:
            seen.add(key)
            yield kernel, arguments, options


def _type(x: Any) -> str | None:
    if isinstance(x, torch.Tensor):
        return _TYPES[x.dtype]
    return None if x is None else "fp32" if isinstance(x, float) else "i32"


def survey(c: Configuration) -> list[dict[str, Any]]:
    """A row for each kernel and architecture."""
    os.environ.pop("TRITON_INTERPRET", None)
    rows = []
    for capability in c.capabilities:
        rows += [_row(c, capability, *made) for made in launches(c, capability)]
    return rows


def _row(
    c: Configuration, capability: int, kernel: Any, arguments: tuple, launch: dict[str, Any]
) -> dict[str, Any]:
    signature = {
        name: tree_map(_type, x)
        for name, x in zip(kernel.arg_names, arguments, strict=True)
        if name != "S"
    }
    static = arguments[-1]
    exact = static.PRECISION == "ieee" and c.dtype not in ("bfloat16", "float16")
    tile = static.BLOCK_M, static.BLOCK_N, static.BLOCK_D, *launch.values()
    made = resources.compile_for(
        kernel, signature, {"S": static}, capability, **launch, divisible=("stride",)
    )
    return {
        "kernel": f"{kernel.__name__} {static.FORM} {static.GRADIENT}",
        "call": " ".join(str(x) for x in c[:-1] if x not in ((), None, False)),
        "tile, warps, stages": "×".join(map(str, tile)),
        "architecture": f"sm_{capability}",
        **resources.described(made, _MATRIX[capability], required=not exact),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.triton_resources", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--in-turn", action="store_true", help="every second, on one architecture")
    args = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # it would leave nothing to compile
    rows, failed = [], []
    with ProcessPoolExecutor(args.jobs) as pool:
        chosen = in_turn(configurations()) if args.in_turn else configurations()
        futures = [(c, pool.submit(survey, c)) for c in chosen]
        for c, future in futures:
            try:
                rows += future.result()
            except Exception as error:  # reported after all others have been tried
                failed.append(f"{c}: {type(error).__name__}: {str(error)[-300:]}")
    return resources.report(rows, failed)


if __name__ == "__main__":
    sys.exit(main())
