"""Engines: a backend of the package, and the way it is told to work.

An engine is chosen for a whole process, because every task has its own process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from alphacl_fast.backend import cuda, filling
from alphacl_fast.kernels import config

#: Engine → its backend.
ENGINES = {
    "triton": "triton", "triton_64": "triton",
    "cuda": "cuda", "cuda_hopper": "cuda", "cuda_mma": "cuda",
    "cpu": "cpu", "blocked": "blocked",
}  # fmt: skip


def backend_of(engine: str) -> str:
    """Return the backend of an engine; a baseline is its own backend."""
    return ENGINES.get(engine, engine)


def within(engine: str, dim: int, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Make the context in which an engine or a baseline is called.

    The tiles of 64 rows are the package's choice for other GPUs than sm_90; other dtypes than
    bfloat16 have them everywhere.
    """
    if engine == "triton_64" and dtype == torch.bfloat16:
        sweeps = ("row_sums", "row_sums_plain", "pair_grad", "pair_grad_plain")
        return config.forced(**{sweep: config.default(sweep, "bf16", dim) for sweep in sweeps})
    if engine in ("cuda_hopper", "cuda_mma"):
        return cuda.hopper(engine == "cuda_hopper")
    return contextlib.nullcontext()


@contextlib.contextmanager
def heard(compiled: list[str]) -> Iterator[None]:
    """Append the name of every kernel that Triton compiles within the context."""
    from triton import knobs

    def listener(*, src: Any, cache_hit: bool, **other: Any) -> None:
        compiled.extend([] if cache_hit else [src.name])
        if before is not None:
            before(src=src, cache_hit=cache_hit, **other)

    before, knobs.compilation.listener = knobs.compilation.listener, listener
    try:
        yield
    finally:
        knobs.compilation.listener = before


@contextlib.contextmanager
def splits(wanted: int):
    """Give schedules ``wanted`` splits within the context, but no more than tiles.

    0 leaves the number to the package.
    """
    if not wanted:
        yield
        return
    before = filling.splits_of
    filling.splits_of = lambda blocks, tiles, slots, most: max(1, min(wanted, tiles))
    try:
        yield
    finally:
        filling.splits_of = before
