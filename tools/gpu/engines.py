"""Engines: a backend of the package, and the way it is told to work.

An engine is chosen for a whole process, which a task has to itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from alphacl_fast import ops
from alphacl_fast.backend import cuda, gpu
from alphacl_fast.kernels import config


@dataclass(frozen=True)
class Engine:
    """A backend and a context manager of (features, dtype) in which it is called."""

    backend: str
    within: Callable[[int, torch.dtype], contextlib.AbstractContextManager[Any]]


def _as_it_is(dim: int, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def _large_tiles(dim: int, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """128-row tiles of eight warps, for bfloat16 rows; other dtypes keep their own."""
    if dtype != torch.bfloat16:
        return contextlib.nullcontext()
    features = config.power_of_two(dim)
    sums = config.Tile(128, 128, min(features, 128), 8, 2)
    whole = config.Tile(128, 64, features, 8, 2)
    grad = whole if features <= 128 else config.Tile(128, 128, 64, 8, 2)
    return config.forced(
        row_sums=sums, row_sums_plain=sums, pair_grad=grad, pair_grad_plain=grad
    )  # fmt: skip


ENGINES = {
    "triton": Engine("triton", _as_it_is),
    "triton_128": Engine("triton", _large_tiles),
    "cuda": Engine("cuda", _as_it_is),
    "cuda_hopper": Engine("cuda", lambda dim, dtype: cuda.hopper(1)),
    "cuda_mma": Engine("cuda", lambda dim, dtype: cuda.hopper(0)),
    **{name: Engine(name, _as_it_is) for name in ("cpu", "blocked")},
}


def backend_of(engine: str) -> str:
    """The backend of an engine; a baseline is its own."""
    return ENGINES[engine].backend if engine in ENGINES else engine


@contextlib.contextmanager
def within(engine: str, dim: int, dtype: torch.dtype) -> Iterator[list[str]]:
    """The context in which an engine or a baseline is called.

    It yields a list that gets the name of every Triton kernel that was not in the cache.
    """
    compiled: list[str] = []
    found = ENGINES.get(engine)
    listening = heard(compiled) if backend_of(engine) == "triton" else contextlib.nullcontext()
    with found.within(dim, dtype) if found else contextlib.nullcontext(), listening:
        yield compiled


@contextlib.contextmanager
def heard(compiled: list[str]) -> Iterator[None]:
    """Within the context Triton tells which kernels it compiles."""
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


def refusal(
    engine: str, device: torch.device, dtype: torch.dtype, precision: str | None, kind: str
) -> str | None:
    """Why an engine does not serve a call, or None."""
    return ops.SWEEP_BACKENDS[backend_of(engine)].unsupported(device, dtype, precision, kind)


@contextlib.contextmanager
def splits(wanted: int):
    """Within the context schedules have so many splits, or one per tile; 0 leaves the choice."""
    if not wanted:
        yield
        return
    before = gpu.splits_of, cuda._hopper_splits
    gpu.splits_of = lambda blocks, tiles, device: max(1, min(wanted, tiles))
    cuda._hopper_splits = lambda region, device: max(
        1, min(wanted, -(-region.n_cols // cuda.HOPPER_SIDE))
    )
    try:
        yield
    finally:
        gpu.splits_of, cuda._hopper_splits = before
