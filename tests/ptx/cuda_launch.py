"""`backend="cuda"` on CPU tensors, with its kernels' PTX interpreted.

The library is the real one but for the CUDA runtime (nvcc.py): its own host code checks a call,
chooses the kernel, sizes its shared memory and describes tensors to the TMA unit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from alphacl_fast.backend import cuda
from alphacl_fast.bundles import Dtype

from . import nvcc
from .parse import entries
from .runner import Runner, poisoned

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint,
    ctypes.c_size_t, ctypes.c_void_p,
)  # fmt: skip
#: Numbers of `runtime.cpp`'s devices.
DEVICES = {"80": 0, "90a": 1}


def kernels(arch: str) -> dict[str, str]:
    """The PTX that holds each kernel which a device of this architecture runs."""
    found = {}
    for dtype in Dtype.__members__:
        if dtype in nvcc.build.DTYPES:
            texts = nvcc.texts(dtype)
            text = texts.get(arch, texts["80"])
            for name in entries(text):
                found.setdefault(name, text)
    return found


@contextlib.contextmanager
def interpreted(arch: str, runner: Runner) -> Iterator[None]:
    """Within the context CPU tensors are on a device of the architecture 80 or 90a."""
    path, known = str(nvcc.objects()[0]), kernels(arch)
    before = os.environ.get("ALPHACL_CUDA_EMULATED")
    errors = []  # the library keeps pointers into them

    def launch(name, x, y, threads, shared, argument):
        try:
            machine = runner.machine(known[name.decode()], name.decode(), shared, (x, y))
            if threads != machine.kernel.threads:
                raise ValueError(f"{threads} threads of a kernel of {machine.kernel.threads}")
            raw = ctypes.string_at(argument, machine.kernel.parameter_bytes)
            machine.memory.clear()
            for buffer in _buffers(machine.kernel.name, raw):
                machine.memory.add(*buffer)
            runner.run(machine, raw, (x, y))
        except Exception as error:  # whatever it is, the library's caller has to see it
            text = f"{type(error).__name__}: {error}".encode()
            errors.append(ctypes.create_string_buffer(text))
            return ctypes.addressof(errors[-1])
        return None

    callback = _LAUNCH(launch)
    os.environ["ALPHACL_CUDA_EMULATED"] = path
    library, reason = cuda._library("cpu")
    if reason:
        raise RuntimeError(reason)
    library.ptx_set_launch(callback)
    library.ptx_set_device(DEVICES[arch])
    cuda._has_hopper.cache_clear()
    try:
        with poisoned():
            yield
    finally:
        os.environ.pop("ALPHACL_CUDA_EMULATED")
        if before is not None:
            os.environ["ALPHACL_CUDA_EMULATED"] = before
        cuda._has_hopper.cache_clear()


def _buffers(kernel: str, raw: bytes) -> Iterator[tuple[int, int, str, bool]]:
    """Address, bytes, name and whether a kernel may write, of every buffer of a launch."""
    if "RoundRows" in kernel:
        rounded = cuda._RoundedRows.from_buffer_copy(raw)
        for name, elements in zip(cuda._ROUNDED_BUFFERS, rounded.elements, strict=True):
            yield getattr(rounded, name), 4 * elements, name, name == "rounded"
        return
    if "UnitRows" in kernel or "FinishRows" in kernel:
        struct = cuda._PairRows.from_buffer_copy(raw)
        names, narrow = cuda._ROW_BUFFERS, ("z1", "z2", "f")
        written = ("f", "scale", "inv_norm", "pos") if "UnitRows" in kernel else ("d",)
    else:
        struct = cuda._SweepStruct.from_buffer_copy(raw)
        names, narrow, written = cuda._INPUTS + cuda._OUTPUTS, ("f",), cuda._OUTPUTS
    half = struct.dtype in (Dtype.BFLOAT16, Dtype.FLOAT16)
    wide = 8 if struct.dtype == Dtype.FLOAT64 else 4
    for name, elements in zip(names, struct.elements, strict=True):
        address = getattr(struct, name)
        small = half and (name in narrow or (name == "weights" and struct.dtype == Dtype.BFLOAT16))
        size = 4 if name == "ids" else 2 if small else wide
        if address:
            yield address, elements * size, name, name in written
