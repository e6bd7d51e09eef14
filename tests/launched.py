"""What Triton's own launchers receive, ordinarily and from a plan, on a machine without a GPU.

A process of its own: kernels are compiled for a GPU that is only named, tensors lie on the CPU, and
a stub of libcuda writes down the launches. ``python launched.py stub.so`` prints JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import torch
import triton
from counting import calls_of, operators_of
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver

from alphacl_fast import FusedAlphaCLLoss, launches
from alphacl_fast.backend import gpu
from alphacl_fast.backend import triton as backend
from alphacl_fast.functional import alpha_cl_loss
from alphacl_fast.kernels import start
from alphacl_fast.kernels.config import Tile

STUB = ctypes.CDLL(sys.argv[1])
STUB.stub_written.restype = ctypes.POINTER(ctypes.c_uint64)
#: Bytes of the parameters that have not eight.
SIZES = {"i32": 4, "fp32": 4, "i1": 1}


class Driver:
    """Of the GPU that is only named; a kernel's handle says how many parameters it has."""

    launcher_cls = CudaLauncher

    def __init__(self) -> None:
        self.utils, self.kernels = self, []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        signature = next(k.src.signature for k in COMPILED if k.kernel is binary)
        types = [kind for kind in flat(signature.values()) if kind != "constexpr"]
        self.kernels.append((name, types))
        return 1, len(self.kernels) << 8 | len(types), 32, 0, 1024


COMPILED = []


def flat(types):
    for kind in types:
        if isinstance(kind, tuple):
            yield from flat(kind)
        else:
            yield kind


def watched():
    """Keeps every compiled kernel, so that the driver finds a binary's signature."""
    made = triton.compiler.CompiledKernel.__init__

    def keep(self, *arguments):
        made(self, *arguments)
        COMPILED.append(self)

    triton.compiler.CompiledKernel.__init__ = keep


def launched(run) -> list[dict]:
    """The launches of ``run()``."""
    STUB.stub_clear()
    run()
    data, at, found = STUB.stub_written(), 0, []
    while at < STUB.stub_count():
        length, handle, *head = data[at : at + 7]
        name, types = DRIVER.kernels[(handle >> 8) - 1]
        values = data[at + 7 : at + length]
        masked = [x & (1 << 8 * SIZES.get(t, 8)) - 1 for x, t in zip(values, types, strict=True)]
        pointers = [x for x, t in zip(masked, types, strict=True) if t[0] == "*"]
        numbers = [x for x, t in zip(masked, types, strict=True) if t[0] != "*"]
        found.append({"name": name, "handle": handle, "head": head, "numbers": numbers,
                      "pointers": pointers})  # fmt: skip
        at += length
    return found


@triton.jit(do_not_specialize=["m"])
def probe(x_ptr, pair, n, m, factor, S: tl.constexpr, absent=None):
    out, there = pair
    if there is None:
        tl.store(out, tl.load(x_ptr) * factor + n + m + S[0])


def of_probe(x: torch.Tensor, n: int) -> dict:
    """A kernel with a nested pointer, None, a specialised and an unspecialised integer."""

    def step(x):
        out = x.new_empty(4)
        start.launch(probe, (3, 2), x, x, (out[1:], None), n, 5, 0.25, S=(7,), num_warps=2)
        return (out,)

    ordinary = launched(lambda: step(x))
    plan = launches.record(step, (x,), {})
    kinds = [type(instruction).__name__ for instruction, _ in plan.instructions]
    context = type("Context", (), {})()
    return {"ordinary": ordinary, "kinds": kinds, "x": x.data_ptr(),
            "replayed": launched(lambda: launches.replay(context, plan, x))}  # fmt: skip


def without_handle(x: torch.Tensor) -> dict:
    """With a launcher that is not understood."""
    through, start.through_handle = start.through_handle, lambda *_: None
    try:
        return of_probe(x, 32)
    finally:
        start.through_handle = through


def of_step(loss, z1: torch.Tensor, z2: torch.Tensor) -> dict:
    """A step of the loss: the first call is ordinary, the second one is recorded."""
    ordinary = launched(lambda: loss(z1, z2).backward())
    loss(z1, z2).backward()
    replayed = launched(lambda: loss(z1, z2).backward())
    return {"ordinary": ordinary, "replayed": replayed, "views": [z1.data_ptr(), z2.data_ptr()],
            "calls": calls_of(lambda: loss(z1, z2).backward()),
            "operators": operators_of(lambda: loss(z1, z2).backward())}  # fmt: skip


def of_hooks(loss, z1: torch.Tensor, z2: torch.Tensor) -> list[str]:
    """The kernels that a hook is told of, once there is a plan."""
    names = []
    hook = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    with contextlib.suppress(KeyError):
        loss(z1, z2)
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    return names


DRIVER = Driver()

if __name__ == "__main__":
    driver.set_active(DRIVER)
    watched()
    gpu.pretend_gpu(2, (9, 0))
    backend.tile = lambda *_: Tile(16, 16, 16, 4, 1)
    x = torch.zeros(32)
    found = {f"probe {n} {k}": of_probe(x[k:], n) for n, k in ((1, 0), (32, 0), (32, 1))}
    found["probe without a handle"] = without_handle(x)
    memory = torch.randn(2, 40 * 16 + 1)
    for k in (0, 1):  # views that begin at a multiple of 16 bytes, and others
        z1, z2 = (row[k : k + 640].view(40, 16).requires_grad_() for row in memory)
        module = FusedAlphaCLLoss(backend="triton")
        found[f"module {k}"] = of_step(module, z1, z2)
    found["function"] = of_step(functools.partial(alpha_cl_loss, backend="triton"), z1, z2)
    found["hooked"] = of_hooks(module, z1, z2)
    print(json.dumps(found))
