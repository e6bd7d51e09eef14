"""`backend="triton"` on CPU tensors, with what Triton compiles for a GPU interpreted.

Triton's own launcher compiles every launch for a device that does not exist, up to its PTX. That
stays in build/triton, apart from Triton's own cache, whose users need machine code. Triton does so
in a process without TRITON_INTERPRET alone.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .faults import Unsupported
from .memory import Global
from .parse import entries
from .runner import Runner, poisoned

_CACHE = Path(__file__).parents[2] / "build" / "triton"
_SCALARS = {"fp32": ctypes.c_float, "i32": ctypes.c_int32, "i64": ctypes.c_int64}


class _Device:
    """What Triton asks of its driver before it compiles."""

    def __init__(self, target) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def interpreted(arch: str, runner: Runner) -> Iterator[None]:
    """Within the context CPU tensors are on a device of the architecture 80 or 90."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    device, original = _Device(GPUTarget("cuda", int(arch), 32)), JITFunction.run

    def run(self, *arguments, grid, warmup, **options):
        compiled = original(self, *arguments, grid=grid, warmup=True, **options)
        ptx = compiled.asm["ptx"]
        grid = (*grid, 1)[:2]
        machine = runner.machine(ptx, entries(ptx)[0], max(compiled.metadata.shared, 16), grid)
        named = {**dict(zip(self.arg_names, arguments, strict=False)), **options}
        leaves = [
            leaf
            for name in self.arg_names
            for leaf in _leaves(compiled.src.signature[name], named[name])
            if leaf[0] != "constexpr"
        ]
        machine.memory.clear()
        raw = _parameters(machine, leaves)
        runner.run(machine, raw, grid)
        return compiled

    # `driver.reset_active` would look for a GPU
    with (
        knobs.cache.scope(),
        mock.patch.object(CUDABackend, "make_cubin", return_value=b""),
        mock.patch.object(driver, "_active", device),
        mock.patch.object(JITFunction, "run", run),
        poisoned(),
    ):
        knobs.cache.dir = str(_CACHE)
        yield


def _leaves(signature: Any, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(signature, tuple):
        for part, inner in zip(signature, value, strict=True):
            yield from _leaves(part, inner)
    else:
        yield signature, value


def _parameters(machine, leaves: list[tuple[str, Any]]) -> bytes:
    """The parameters' bytes; two more that Triton adds, for scratch memory, stay null."""
    offsets = list(machine.kernel.parameters.values())
    if len(offsets) != len(leaves) + 2:
        raise Unsupported(f"{len(leaves)} values for {len(offsets)} parameters")
    raw = bytearray(machine.kernel.parameter_bytes)
    known = set()
    for offset, (kind, value) in zip(offsets, leaves, strict=False):
        if kind.startswith("*"):
            _add(machine.memory, value, known)
            data = ctypes.c_uint64(value.data_ptr())
        else:
            data = _SCALARS[kind](value)
        raw[offset : offset + ctypes.sizeof(data)] = bytes(data)
    return bytes(raw)


def _add(memory: Global, tensor: torch.Tensor, known: set) -> None:
    """The bytes from a tensor's first element to its last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps) if tensor.numel() else -1
    size = (last + 1) * tensor.element_size()
    if (tensor.data_ptr(), size) not in known:
        known.add((tensor.data_ptr(), size))
        memory.add(tensor.data_ptr(), size, f"a tensor of shape {tuple(tensor.shape)}")
