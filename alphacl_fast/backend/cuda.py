"""The two sweeps in CUDA C++ (csrc/cuda): every built-in pair kind, from sm_80 on, without Triton.

`gpu` holds the host algorithm; here are the library, its structs and the launches. The library has
a plain C interface and knows neither torch nor Python, so one binary serves every version of both.
Tests run the same kernels on CPU tensors: ALPHACL_CUDA_EMULATED names a library of them that is
compiled for the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import launches
from ..bundles import (
    MOST_PARAMETERS,
    Dtype,
    Form,
    NormalizedRows,
    Term,
    Weight,
    accumulation_dtype,
    rows_of_terms,
)
from ..objectives import KINDS, codes_checksum, is_compiled
from . import forms, gpu

#: Optional operands that this backend serves.
OPTIONAL_OPERANDS = {"ids", "max_gap"}
#: Where `setup.py` puts the library, or the reason why there is none.
LIBRARY = Path(__file__).parent.parent / "_cuda.abi3.so"
FAILURE = LIBRARY.with_name("_cuda_not_built.txt")
#: The first torch whose `mm` multiplies bfloat16 into float32, as the weights of long rows need.
OLDEST = (2, 10)
#: Rows and columns of a tile, and of the blocks of hopper.h.
SIDE, HOPPER_SIDE = 64, 128
#: The arithmetics that hopper.h has kernels for.
HOPPER_MODES = ("bf16", "fp16", "tf32")
#: The longest rows whose gradient the kernels accumulate in registers (launch.h). Longer rows come
#: in chunks of features, and cuBLAS multiplies their weights with the rows: nothing is computed
#: twice.
LARGEST = {"bf16": 256, "fp16": 256, "tf32": 128, "fp32": 64, "fp64": 32}
#: The same where a block has less shared memory (sm_86, sm_89); float64 is not served there.
LARGEST_OF_SMALL = {"bf16": 128, "fp16": 128, "tf32": 64, "fp32": 64}
#: Bytes of shared memory that all kernels fit into, and the kernels of `LARGEST_OF_SMALL`.
SHARED_MEMORY, SMALL_SHARED_MEMORY = 163 << 10, 99 << 10


# --- the structs of problem.h ---------------------------------------------------------------------

_INPUTS = (
    "f",
    "scale",
    "bias",
    "moment_origin",
    "row_weight",
    "shift",
    "argument_offset",
    "baseline",
    "largest_t",
    "ids",
    "tau",
    "unit",
)
_OUTPUTS = ("sums", "df", "weight_sums", "weights")
_ROUNDED_BUFFERS = ("f", "rounded")
_ROW_BUFFERS = ("z1", "z2", "f", "scale", "inv_norm", "pos", "d", "q")


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _SweepStruct(ctypes.Structure):
    """`struct Sweep`."""

    _fields_ = (
        _fields(ctypes.c_void_p, *_INPUTS, *_OUTPUTS)
        + [("elements", ctypes.c_int64 * len(_INPUTS + _OUTPUTS))]
        + _fields(
            ctypes.c_int64,
            "stride",
            "n_rows",
            "n_cols",
            "row_start",
            "col_start",
            "half",
            "anchors",
        )
        + _fields(ctypes.c_int64, "n", "n_out", "lo", "weight_columns")
        + [("constant_shift", ctypes.c_double), ("params", ctypes.c_double * MOST_PARAMETERS)]
        + _fields(
            ctypes.c_int32, "dtype", "dim", "row_blocks", "first_block", "splits", "begin", "end"
        )
        + _fields(
            ctypes.c_int32,
            "column_slice",
            "kind",
            "form",
            "pair_grad",
            "gradient",
            "weight",
            "terms",
        )
        + [("row_of_term", ctypes.c_int32 * Term.SHIFT)]
        + _fields(ctypes.c_int32, "exclude", "triangle", "symmetric", "side")
        + _fields(ctypes.c_int32, "rows_paired", "cols_paired", "rows_anchor", "cols_anchor")
        + _fields(ctypes.c_int32, "in_chunks", "weighted", "aligned")
    )


class _PairRows(ctypes.Structure):
    """`struct PairRows`."""

    _fields_ = (
        _fields(ctypes.c_void_p, *_ROW_BUFFERS)
        + [("elements", ctypes.c_int64 * len(_ROW_BUFFERS))]
        + _fields(ctypes.c_int64, "n_pairs", "stride1", "stride2", "stride")
        + _fields(ctypes.c_int32, "dim", "dtype", "anchors")
    )


class _RoundedRows(ctypes.Structure):
    """`struct RoundedRows`."""

    _fields_ = (
        _fields(ctypes.c_void_p, *_ROUNDED_BUFFERS)
        + [("elements", ctypes.c_int64 * len(_ROUNDED_BUFFERS))]
        + _fields(ctypes.c_int64, "n", "stride", "rounded_stride")
        + _fields(ctypes.c_int32, "dim")
    )


def _address(
    name: str, x: Tensor | None, dtype: torch.dtype, device: torch.device, pitched: bool = False
) -> int | None:
    """The first element of a contiguous tensor, or of a matrix whose rows are contiguous.

    Raises:
        ValueError: wrong dtype, device or strides, which the library cannot see.
    """
    if x is None:
        return None
    if (x.dtype, x.device) != (dtype, device):
        raise ValueError(f"{name} must be {dtype} on {device}, got {x.dtype} on {x.device}")
    if not (x.stride(1) == 1 or x.shape[1] == 1 if pitched else x.is_contiguous()):
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
    return x.data_ptr()


def _elements(x: Tensor | None) -> int:
    """Elements from a tensor's first one to the end of its memory."""
    if x is None:
        return 0
    return x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()


def _run(
    function: str,
    device: torch.device,
    struct: ctypes.Structure,
    pointers: dict[str, Tensor | None],
    *before: int,
) -> None:
    """Calls the library on a device's current stream. ``pointers``: what the fields of these names
    point to; ``before``: arguments before the struct.

    Raises:
        RuntimeError: the launch failed or would leave its buffers.
    """
    library, _ = _library(device.type)
    arguments = (*before, ctypes.byref(struct))
    if device.type == "cpu":
        error = getattr(library, function)(*arguments, None)
    else:
        with torch.cuda.device(device):
            error = getattr(library, function)(
                *arguments, torch.cuda.current_stream(device).cuda_stream
            )
    if error:
        raise RuntimeError(f"alphacl_fast: {function}: {error.decode()}")
    if (recorder := launches.recorder()) is not None:
        recorder.native(getattr(library, function), before, struct, pointers)


# --- the library ----------------------------------------------------------------------------------


def emulated() -> bool:
    """Whether the kernels run on the host."""
    return bool(os.environ.get("ALPHACL_CUDA_EMULATED"))


@functools.cache
def _load(path: str) -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if not Path(path).exists():
        reason = (
            FAILURE.read_text().strip() if FAILURE.exists() else "no library beside the package"
        )
        return None, f"not compiled: {reason}; reinstall with nvcc on the PATH"
    try:
        library = ctypes.CDLL(path)
        sizes = [
            getattr(library, f"alphacl_cuda_{name}_size")()
            for name in ("sweep", "rows", "rounded_rows")
        ]
        fits = sizes == [ctypes.sizeof(x) for x in (_SweepStruct, _PairRows, _RoundedRows)]
        fits = fits and library.alphacl_cuda_codes() == codes_checksum()
    except (OSError, AttributeError) as error:
        return None, f"cannot be loaded: {error}"
    if not fits:
        return None, f"cannot be loaded: {Path(path).name} does not fit this version of the package"
    library.alphacl_cuda_sweep.argtypes = [ctypes.POINTER(_SweepStruct), ctypes.c_void_p]
    library.alphacl_cuda_rows.argtypes = [
        ctypes.c_int32,
        ctypes.POINTER(_PairRows),
        ctypes.c_void_p,
    ]
    library.alphacl_cuda_rounded_rows.argtypes = [ctypes.POINTER(_RoundedRows), ctypes.c_void_p]
    for text in ("sweep", "rows", "rounded_rows", "build", "sources", "why_not"):
        getattr(library, f"alphacl_cuda_{text}").restype = ctypes.c_char_p
    return library, None


def _library(device_type: str) -> tuple[ctypes.CDLL | None, str | None]:
    return _load(
        os.environ.get("ALPHACL_CUDA_EMULATED", "") if device_type == "cpu" else str(LIBRARY)
    )


@functools.cache
def _why_not(device: torch.device) -> str | None:
    """Why a device cannot run the library, or None."""
    library, _ = _library(device.type)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        reason = library.alphacl_cuda_why_not()
    return None if reason is None else reason.decode()


def unsupported(
    device: torch.device, dtype: torch.dtype, precision: str | None, kind: str
) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if device.type == "cpu":
        if not emulated():
            return "runs on GPUs, not cpu (except emulated, ALPHACL_CUDA_EMULATED)"
    elif device.type != "cuda" or torch.version.hip is not None:
        return f"runs on NVIDIA GPUs, not {'ROCm' if device.type == 'cuda' else device.type}"
    elif not torch.cuda.is_available():
        return "needs a GPU, found none"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"needs compute capability 8.0, not {capability}"
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < OLDEST:
        return f"needs torch {'.'.join(map(str, OLDEST))}, found {torch.__version__}"
    _, reason = _library(device.type)
    if reason or (reason := _why_not(device)):
        return reason
    least = SHARED_MEMORY if dtype == torch.float64 else SMALL_SHARED_MEMORY
    if device.type == "cuda" and (there := _shared_memory(device)) < least:
        name = str(dtype).removeprefix("torch.")
        return f"needs {least >> 10} KB of shared memory a block for {name}, got {there >> 10}"
    if kind and not is_compiled(kind):
        return "compiled for the built-in pair functions, not for a user's own"
    if precision == "bf16x3":
        return "multiplies float32 as IEEE or as TF32, not precision='bf16x3'"
    return None


# --- which kernels are taken ----------------------------------------------------------------------

#: Whether `row_sums` reads each similarity once, where there are such kernels (bfloat16, and on
#: sm_90 whatever hopper.h serves).
#: None: it does, unless the device has the kernels of hopper.h, which do not.
_symmetric: bool | None = None


@contextlib.contextmanager
def symmetric(wanted: bool | None) -> Iterator[None]:
    """Within the context `row_sums` takes symmetric tiles, or does not."""
    global _symmetric
    before, _symmetric = _symmetric, wanted
    launches.forget()
    try:
        yield
    finally:
        _symmetric = before
        launches.forget()


@contextlib.contextmanager
def hopper(wanted: bool | None) -> Iterator[None]:
    """A context that says whether rows take the warpgroup kernels (hopper.h, sm_90a).

    None: where they serve a launch; False: never; True: always, and a launch that they cannot serve
    is refused.
    """
    mode = -1 if wanted is None else int(wanted)
    libraries = [library for kind in ("cuda", "cpu") if (library := _library(kind)[0]) is not None]
    before = [library.alphacl_cuda_hopper(mode) for library in libraries]
    _has_hopper.cache_clear()
    launches.forget()
    try:
        yield
    finally:
        for library, earlier in zip(libraries, before, strict=True):
            library.alphacl_cuda_hopper(earlier)
        _has_hopper.cache_clear()
        launches.forget()


@functools.cache
def _has_hopper(device: torch.device) -> bool:
    """Whether a device takes the kernels of hopper.h, where they serve a launch."""
    library, _ = _library(device.type)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return library is not None and bool(library.alphacl_cuda_has_hopper())


def has_wgmma_kernels(mode: str, kind: str, params: tuple[float, ...], dim: int) -> bool:
    """Whether the kernels of hopper.h know an arithmetic (``mode``), a pair function (`is_fast` in
    sweeps.h) and rows of this length. They also need the constant form.
    """
    if mode not in HOPPER_MODES or dim > LARGEST[mode] or kind not in ("exp", "gibbs", "power"):
        return False
    return kind != "power" or dict(zip(KINDS[kind].parameters, params, strict=True))["q"] == 2


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _in_chunks(mode: str, dim: int, device: torch.device) -> bool:
    """Whether rows pass by in chunks of features."""
    small = device.type == "cuda" and _shared_memory(device) < SHARED_MEMORY
    return dim > (LARGEST_OF_SMALL if small else LARGEST)[mode]


# --- the sweeps -----------------------------------------------------------------------------------


class _Sweep(gpu.Sweep):
    backend = "cuda"
    tile_rows = tile_cols = SIDE

    def __init__(self, *operands: Any) -> None:
        super().__init__(*operands)
        self.in_chunks = _in_chunks(self.arithmetic.mode, self.dim, self.f.device)
        self.whole = not self.in_chunks
        tf32 = self.arithmetic.mode == "tf32"
        self.dtype = Dtype.TFLOAT32 if tf32 else Dtype.of(self.f.dtype)
        hopper, one_sum = self._on_hopper(), self.terms == (Term.F,)
        wanted = not hopper or one_sum if _symmetric is None else _symmetric
        there = self.arithmetic.mode == "bf16" or (hopper and one_sum)
        self.symmetric = wanted and there and self.form != Form.ONLINE
        # the kernels of hopper.h have symmetric tiles for one sum
        if hopper and (self.weight is not None or one_sum or not self.symmetric):
            self.tile_rows = self.tile_cols = HOPPER_SIDE
            self.resident = 1
            if tf32:
                self.f = rounded_rows(self.f)

    def _on_hopper(self) -> bool:
        """Whether the kernels of hopper.h serve the sweep."""
        f, mode, terms = self.f, self.arithmetic.mode, self.terms or (Term.F,)
        fast = has_wgmma_kernels(mode, self.function.kind, self.function.params, self.dim)
        sums = Term.F in terms and set(terms) <= {Term.F, Term.F_MOMENT}
        plain = self.rows.bias is None and self.pairing.ids is None
        plain = plain and self.pairing.largest_t is None
        constant = self.form == Form.CONSTANT and plain and sums
        aligned = f.data_ptr() % 16 == 0 and f.stride(0) % 8 == 0 and f.stride(0) >= self.dim
        aligned = aligned or mode == "tf32"  # whose rounded rows are a copy
        return fast and constant and aligned and not self.in_chunks and _has_hopper(f.device)

    def scale_weights(self) -> None:
        weight, shift = self.scalars.row_weight, self.scalars.shift
        if self.form == Form.CONSTANT:
            weight = (self.shift - shift).exp_().mul_(weight)
            self.scalars = self.scalars._replace(row_weight=weight, shift=None)
        self.unit = weight.abs().amax() if self.arithmetic.rounds else None

    def reduce(self, workspace: Tensor, out: Tensor) -> None:
        if self.form == Form.T_MAX:
            out.copy_(workspace.amax(0))
        elif self.form == Form.ONLINE:
            largest = workspace[:, 0].amax(0)
            factor = (workspace[:, 0] - forms.finite(largest)).exp_()
            out[0] = largest
            out[1:] = (workspace[:, 1:] * factor.unsqueeze(1)).sum(0)
        elif self.form == Form.CONSTANT:
            out[0].fill_(self.shift)
            out[1:] = workspace.sum(0)
        else:
            out.copy_(workspace.sum(0))

    def launch(self, launch: gpu.Launch) -> None:
        region, device, wide, low = launch.region, self.f.device, self.tau.dtype, launch.wanted[0]
        inputs = (None, *self.vectors(_INPUTS[1:-2]), self.tau, self.unit)
        outputs = (launch.sums, launch.df, launch.weight_sums, launch.weights)
        dtypes = {"weights": self.arithmetic.weights, "ids": torch.int32}
        addresses = {
            name: _address(name, x, dtypes.get(name, wide), device)
            for name, x in zip(_INPUTS + _OUTPUTS, inputs + outputs, strict=True)
        }
        elements = [_elements(self.f), *map(_elements, (inputs + outputs)[1:])]
        struct = _SweepStruct(
            **{**addresses, "f": self.f.data_ptr()}, elements=(*elements,), stride=self.f.stride(0),
            half=self.n // 2, anchors=self.pairing.anchors, n=self.n,
            n_out=launch.wanted[1] - low, lo=low,
            weight_columns=0 if launch.weights is None else launch.weights.shape[1],
            constant_shift=self.shift, params=self.function.padded(),
            dtype=self.dtype, dim=self.dim, row_blocks=launch.blocks,
            first_block=launch.first_block, splits=launch.splits, begin=launch.begin,
            end=launch.end,
            column_slice=launch.column_slice, kind=KINDS[self.function.kind].code, form=self.form,
            pair_grad=self.weight is not None, gradient=launch.gradient,
            weight=self.weight or Weight.F,
            terms=len(launch.terms), row_of_term=rows_of_terms(launch.terms)[: Term.SHIFT],
            symmetric=launch.symmetric, side=self.tile_rows, in_chunks=self.in_chunks,
            weighted=self.pairing.weighted, **region._asdict(),
        )  # fmt: skip
        pointers = dict(zip(_INPUTS + _OUTPUTS, (self.f, *(inputs + outputs)[1:]), strict=True))
        _run("alphacl_cuda_sweep", device, struct, pointers)


#: The two sweeps, with the signatures that every backend has (docs/extending.md).
row_sums = functools.partial(gpu.row_sums, _Sweep)
pair_grad = functools.partial(gpu.pair_grad, _Sweep)


# --- rows -----------------------------------------------------------------------------------------


def _run_rows(finish: bool, f: Tensor, buffers: dict[str, Tensor | None], **fields: int) -> None:
    """Runs `unit_rows` or `finish_rows`; ``fields`` are others of `struct PairRows`."""
    wide, buffers = accumulation_dtype(f.dtype), {"f": f, **buffers}
    given = ("z1", "z2", "f")  # in the dtype of the call, with any row stride
    addresses = {
        name: _address(name, x, f.dtype if name in given else wide, f.device, name in given)
        for name, x in buffers.items()
    }
    # a plan calls it again for other views, whose memory may end with their last row
    elements = {name: _elements(x) for name, x in buffers.items()}
    elements |= {
        name: launches.extent(x) // x.itemsize
        for name in ("z1", "z2")
        if (x := buffers.get(name)) is not None
    }
    struct = _PairRows(
        **addresses, elements=tuple(elements.get(name, 0) for name in _ROW_BUFFERS),
        n_pairs=len(f) // 2, dim=f.shape[1], stride=f.stride(0), dtype=Dtype.of(f.dtype), **fields,
    )  # fmt: skip
    _run("alphacl_cuda_rows", f.device, struct, buffers, int(finish))


def unit_rows(z1: Tensor, z2: Tensor) -> NormalizedRows:
    """The stacked rows of a cosine loss, in one launch."""
    if z2.shape != z1.shape:
        raise ValueError(f"z2 must have the shape {tuple(z1.shape)}, got {tuple(z2.shape)}")
    z1, z2 = (z if z.stride(1) == 1 else z.contiguous() for z in (z1, z2))
    rows = NormalizedRows.empty(z1)
    if len(z1):
        buffers = {"z1": z1, "z2": z2, **rows._asdict()}
        _run_rows(False, buffers.pop("f"), buffers, stride1=z1.stride(0), stride2=z2.stride(0))
    return rows


def rounded_rows(f: Tensor) -> Tensor:
    """f (n, D) float32 as TF32 numbers, in one launch; its rows begin at multiples of 16 bytes.

    Tensor cores cut off the bits that TF32 does not have. That makes every similarity too small by
    a part of 2⁻¹⁰ in the mean, where rounding errors have either sign.
    """
    n, dim = f.shape
    rounded = f.new_empty(n, -(-dim // 4) * 4)[:, :dim]
    buffers = {"f": f, "rounded": rounded}
    struct = _RoundedRows(
        **{k: _address(k, x, torch.float32, f.device, pitched=True) for k, x in buffers.items()},
        elements=tuple(map(_elements, buffers.values())),
        n=n, stride=f.stride(0), rounded_stride=rounded.stride(0), dim=dim,
    )  # fmt: skip
    _run("alphacl_cuda_rounded_rows", f.device, struct, buffers)
    return rounded


def finish_rows(d: Tensor, f: Tensor, scale: Tensor | None, inv_norm: Tensor, q: Tensor) -> None:
    """d (2N, D) ← the gradient in z, from Σ_j (g_ij + g_ji)·F_j and q (N,) or (2N,)."""
    if d.shape != f.shape or len(f) % 2:
        raise ValueError(f"d and f must be (2N, D), got {tuple(d.shape)} and {tuple(f.shape)}")
    if len(q) not in (len(f) // 2, len(f)):
        raise ValueError(f"q must have {len(f) // 2} or {len(f)} elements, got {len(q)}")
    if len(f):
        buffers = {"scale": scale, "inv_norm": inv_norm, "d": d, "q": q.contiguous()}
        _run_rows(True, f, buffers, anchors=2 * len(q) // len(f))
