"""Compiles the Triton kernels that a task will launch, on CPUs and before a device is needed.

The package's host code runs on CPU tensors, and Triton's own launcher binds, specialises and
compiles each kernel for a GPU that is only named. Therefore the device later finds every key in
Triton's cache. Sizes on which no key depends are made small.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from alphacl_fast import MinPlayer, accuracy, ops, tune
from alphacl_fast.backend import gpu
from alphacl_fast.backend import triton as backend
from alphacl_fast.benchmarks.loss import gradient
from alphacl_fast.journal import Row, replaced
from alphacl_fast.kernels import config

from . import engines, sweeps, timings

#: Stands for any number of rows. It is large enough for splits, whose sums need a kernel.
SMALL = 512


@dataclass(frozen=True)
class Machine:
    """The GPU to compile for.

    Attributes:
        capability: its compute capability; 90 means 9.0.
        multiprocessors: the number of its multiprocessors.
        table: the name of its table of tiles.
    """

    capability: int = 90
    multiprocessors: int = 132
    table: str = "nvidia_h200"


# --- the launches of an item ----------------------------------------------------------------------


def distinct(items: Iterable[Any], machine: Machine) -> list[Any]:
    """Choose one item for each set of kernels, in the order of the items."""
    found: dict[Any, Any] = {}
    for item in items:
        free = {"splits": 0, "nan": False, "runs": 1}
        if not config.table(machine.table):  # which chooses tiles by the number of rows
            free |= {"n": SMALL, "pairs": SMALL // 2}
        known = {f.name for f in fields(item)}
        found.setdefault(replace(item, **{k: v for k, v in free.items() if k in known}), item)
    return list(found.values())


def shrunk(n: int) -> int:
    """Make a small number of rows that is aligned as n is, and its half as n's half."""
    return SMALL + n % 32


def launch(item: Any) -> None:
    """Launch what a `Case`, `Sweep`, `Timing` or `Candidate` launches, on CPU tensors."""
    here = torch.device("cpu")
    if isinstance(item, sweeps.Sweep):
        item = replace(item, n=shrunk(item.n), splits=0)
        dtype, precision = accuracy.ARITHMETIC[item.dtype]
        serving = ops.SWEEP_BACKENDS[engines.backend_of(item.engine)]
        with engines.within(item.engine, item.dim, dtype):
            sweeps.compute(serving, sweeps.rows_of(item, here), item, precision or "")
    elif isinstance(item, accuracy.Case):
        item = replace(item, pairs=shrunk(2 * item.pairs) // 2)
        _, precision = accuracy.ARITHMETIC[item.dtype]
        views = accuracy.correlated_views(item, here)
        accuracy.evaluate(item, *views, item.backend, precision)
    elif isinstance(item, timings.Timing):
        item = replace(item, n=shrunk(item.n))
        with item.within(), accuracy.matmul_precision(item.dtype):
            gradient(item.setting.loss(item.backend), *item.setting.views(here))
    else:
        tune.step(replace(item, rows=shrunk(item.rows)), here)()


def rows_of(item: Any) -> int:
    """Return the number of rows by which the item's tiles are chosen."""
    return getattr(item, "n", None) or getattr(item, "rows", None) or 2 * item.pairs


# --- the launcher of a GPU that is only named -----------------------------------------------------

#: (name of the kernel, key in the cache, function that compiles it) → the result of the launch.
Request = Callable[[str, str, Callable[[], Any]], Any]


def name_gpu(machine: Machine, rows: int, request: Request) -> None:
    """Let Triton compile for the machine, through ``request``, for the rest of this process.

    Args:
        machine: the GPU.
        rows: the number of rows by which tiles are chosen.
        request: is called for every kernel instead of the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Named:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", machine.capability, 32)

    driver.set_active(Named())
    run, compiler, tile = JITFunction.run, triton.compiler.compile, backend.tile

    def warmed_up(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **options)

    def requested(src: Any, target: Any, options: dict[str, Any]) -> Any:
        key = key_of(src, target, options)
        return request(src.name, key, lambda: compiler(src, target=target, options=options))

    JITFunction.run = warmed_up
    triton.compiler.compile = requested
    gpu.pretend_gpu(machine.multiprocessors, divmod(machine.capability, 10))
    precision = gpu.float32_precision
    gpu.float32_precision = lambda device: precision(torch.device("cuda"))
    backend.tile = lambda sweep, mode, dim, n, device: tile(sweep, mode, dim, rows, device)
    config.device_name = lambda device: machine.table
    MinPlayer.max_sweeps = 1  # nothing is computed, so nothing converges


def key_of(src: Any, target: Any, options: dict[str, Any]) -> str:
    """Return the kernel's folder in Triton's cache, as `triton.compile` derives it."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    compiler = make_backend(target)
    parsed = compiler.parse_options({**options, **src.parse_options()})
    key = get_cache_key(src, compiler, parsed, get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def compile_item(
    item: Any, machine: Machine, claims: str, benchmark: str = "compile"
) -> Iterator[Row]:
    """Compile the kernels that the item launches, unless another process has begun to.

    Args:
        item: the argument of `launch`.
        machine: the GPU to compile for.
        claims: a folder with an empty file for every key that a process compiles.
        benchmark: the benchmark that the row names.
    """
    compiled, failed = [], {}

    def claimed(name: str, key: str, compiler: Callable[[], Any]) -> Any:
        try:
            os.close(os.open(Path(claims) / key, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return None
        try:
            compiler()
        except Exception as error:  # the item's other kernels may still compile
            failed[name] = f"{type(error).__name__}: {str(error)[-300:]}"
        else:
            compiled.append(name)
        return None

    name_gpu(machine, rows_of(item), claimed)
    launch(item)
    yield {
        "benchmark": benchmark, **asdict(item), "status": "failed" if failed else "ok",
        "error": "; ".join(f"{name}: {why}" for name, why in failed.items()) or None,
        "compiled": compiled,
    }  # fmt: skip


# --- the cache as one file ------------------------------------------------------------------------


def pack(folder: Path, archive: Path) -> None:
    """Write the files that a launch reads from a cache, machine code and JSON, to a .tar.gz."""
    with replaced(archive) as partial, tarfile.open(partial, "w:gz", compresslevel=6) as out:
        for file in sorted(folder.glob("*/*")):
            if file.suffix in (".cubin", ".json"):
                out.add(file, f"{file.parent.name}/{file.name}")


def unpack(archive: Path, folder: Path) -> int:
    """Write an archive's files to a cache, and return how many kernels it has.

    Triton's lists of a kernel's files hold absolute paths, which are rewritten to the folder.
    """
    kernels = 0
    with tarfile.open(archive) as source:
        for member in source:
            at = Path(member.name)
            if not member.isfile() or at.is_absolute() or ".." in at.parts:
                raise ValueError(f"{archive.name} must hold plain files, got {member.name}")
            data, to = source.extractfile(member).read(), folder / at
            if at.name.startswith("__grp__"):
                kernels += 1
                data = _moved(data, to.parent)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(data)
    return kernels


def _moved(group: bytes, folder: Path) -> bytes:
    names = json.load(io.BytesIO(group))["child_paths"]
    return json.dumps({"child_paths": {name: str(folder / name) for name in names}}).encode()
