"""The two sweeps in C++ (csrc/cpu): every pair kind, float32, float64, bfloat16 and float16, on any
CPU. Users' functions are compiled when they are first used (`cpu_functions`).

The library has a plain C interface and knows neither torch nor Python, so one binary serves every
version of both; it is loaded with this module. Threads are torch's own OpenMP threads, as many as
`torch.get_num_threads`. Results do not depend on their number, nor on which thread took which tile.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..bundles import (
    MOST_PARAMETERS,
    Dtype,
    Form,
    NormalizedRows,
    PairFunction,
    Pairing,
    Rows,
    RowScalars,
    Term,
    Weight,
    accumulation_dtype,
    rows_of_terms,
)
from ..objectives import KINDS, codes_checksum, is_compiled, row_codes_checksum
from . import cpu_functions, forms

#: Optional operands that this backend serves.
OPTIONAL_OPERANDS = {"ids", "max_gap", "guide"}

#: Instruction sets, the lowest first; the environment variable ALPHACL_CPU_ISA names the highest to
#: use.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")
#: Where `setup.py` puts the library, or the reason why there is none.
LIBRARY = Path(__file__).parent.parent / "_cpu.abi3.so"
FAILURE = LIBRARY.with_name("_cpu_not_built.txt")

_OK, _NO_MEMORY = 0, 1


class _Sweep(ctypes.Structure):
    """`struct Sweep` of csrc/cpu/sweep.h."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in (
                "f",
                "scale",
                "bias",
                "moment_origin",
                "row_weight",
                "shift",
                "argument_offset",
                "baseline",
                "ids",
                "largest_t",
                "guide",
                "largest_guide",
                "df",
                "weight_sums",
                "sums",
                "kept",
                "release_lock",
                "take_lock",
                "check_signals",
                "values",
                "constants",
            )
        ]
        + [
            (name, ctypes.c_int64)
            for name in (
                "n",
                "dim",
                "row_stride",
                "guide_dim",
                "split",
                "partner",
                "anchors",
                "lo",
                "hi",
                "block",
            )
        ]
        + [
            ("tau", ctypes.c_double),
            ("constant_shift", ctypes.c_double),
            ("params", ctypes.c_double * MOST_PARAMETERS),
        ]
        + [
            (name, ctypes.c_int32)
            for name in (
                "dtype",
                "kind",
                "form",
                "gradient",
                "weight",
                "filled",
                "weighted",
                "threads",
                "instruction_set",
            )
        ]
        + [("rows_of_terms", ctypes.c_int32 * len(Term))]
    )


class _PairRows(ctypes.Structure):
    """`struct PairRows` of csrc/cpu/sweep.h."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in (
                *("z1", "z2", "f", "scale", "inv_norm", "mean", "bias", "weight_sums"),
                *("pos", "d", "q"),
            )
        ]
        + [
            (name, ctypes.c_int64)
            for name in ("n_pairs", "dim", "stride1", "stride2", "stride", "lo", "hi", "swept")
        ]
        + [(name, ctypes.c_int32) for name in ("dtype", "threads", "instruction_set", "similarity")]
    )


class _UnitRows(ctypes.Structure):
    """`struct UnitRows` of csrc/cpu/sweep.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("z", "f", "inv_norm", "d", "dz")]
        + [(name, ctypes.c_int64) for name in ("n", "dim", "z_stride", "d_stride")]
        + [(name, ctypes.c_int32) for name in ("dtype", "threads", "instruction_set")]
    )


#: A sweep runs without the interpreter's lock and asks for signals with it.
_HOOKS = {
    name: ctypes.cast(getattr(ctypes.pythonapi, function), ctypes.c_void_p).value
    for name, function in (
        ("release_lock", "PyEval_SaveThread"),
        ("take_lock", "PyEval_RestoreThread"),
        ("check_signals", "PyErr_CheckSignals"),
    )
}


def _hooks() -> dict[str, int | None]:
    if threading.current_thread() is threading.main_thread():
        return _HOOKS
    return {**_HOOKS, "check_signals": None}  # signals are the main thread's


def _load() -> tuple[ctypes.PyDLL | None, str | None]:
    """The compiled library, or why there is none."""
    try:
        if not LIBRARY.exists():
            raise OSError(
                FAILURE.read_text().strip() if FAILURE.exists() else "no library beside the package"
            )
        # not CDLL: PyDLL passes on an exception that a signal has raised
        library = ctypes.PyDLL(str(LIBRARY))
        sizes = [
            getattr(library, f"alphacl_cpu_{x}_size")() for x in ("sweep", "rows", "unit_rows")
        ]
        fits = sizes == [ctypes.sizeof(struct) for struct in (_Sweep, _PairRows, _UnitRows)]
        codes = library.alphacl_cpu_codes(), library.alphacl_cpu_row_steps()
        if not fits or codes != (codes_checksum(), row_codes_checksum()):
            raise OSError(f"{LIBRARY.name} does not fit this version of the package")
        library.alphacl_cpu_build.restype = library.alphacl_cpu_sources.restype = ctypes.c_char_p
        library.alphacl_cpu_kernels.restype = library.alphacl_cpu_recipe.restype = ctypes.c_char_p
        library.alphacl_cpu_sweep.argtypes = [ctypes.POINTER(_Sweep)]
        library.alphacl_cpu_normalize.argtypes = library.alphacl_cpu_finish.argtypes = [
            ctypes.POINTER(_PairRows)
        ]
        library.alphacl_cpu_keep.argtypes = [ctypes.c_int64]
        library.alphacl_cpu_keep.restype = ctypes.c_void_p
        library.alphacl_cpu_forget.argtypes = [ctypes.c_void_p]
        library.alphacl_cpu_unit_rows.argtypes = [ctypes.POINTER(_UnitRows)]
        library.alphacl_cpu_number_ids.argtypes = (
            [ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_int32] + [ctypes.c_void_p] * 3
        )
        library.alphacl_cpu_function.argtypes = (
            [ctypes.c_int32] * 3 + [ctypes.c_void_p] * 2 + [ctypes.c_int64]
        )
    except (OSError, AttributeError) as error:
        return None, f"{error}; reinstall with a C++ compiler (GCC or clang)"
    return library, None


_LIBRARY, _LOAD_ERROR = _load()


def _library() -> ctypes.PyDLL:
    if _LIBRARY is None:
        raise OSError(_LOAD_ERROR)
    return _LIBRARY


def load_error() -> str | None:
    """Why the compiled library cannot be used, or None."""
    return _LOAD_ERROR


def build() -> str:
    """Compiler, flags and instruction sets of the library."""
    return _library().alphacl_cpu_build().decode()


def instruction_sets() -> dict[str, bool]:
    """Instruction sets the library was compiled for, and whether this CPU has them."""
    mask = _library().alphacl_cpu_instruction_sets()
    return {
        name: bool(mask >> (16 + k) & 1) for k, name in enumerate(INSTRUCTION_SETS) if mask >> k & 1
    }


_forced: str | None = None


@contextlib.contextmanager
def forced_instruction_set(name: str) -> Iterator[None]:
    """A context in which no instruction beyond the named set is used (ALPHACL_CPU_ISA: for a whole
    process).

    Raises ValueError for an unknown set, or one this CPU or this build does not have.
    """
    global _forced
    before, _forced = _forced, _checked(name, "instruction set")
    try:
        yield
    finally:
        _forced = before


def _checked(name: str, what: str) -> str:
    usable = [other for other, here in instruction_sets().items() if here]
    if name not in usable:
        raise ValueError(f"{what} must be one of {usable} on this machine, got {name!r}")
    return name


@functools.cache
def _default_instruction_set() -> str:
    requested = os.environ.get("ALPHACL_CPU_ISA")
    if requested:
        return _checked(requested, "ALPHACL_CPU_ISA")
    return [name for name, here in instruction_sets().items() if here and name != "amx_emulated"][
        -1
    ]


def instruction_set() -> str:
    """The highest instruction set in use."""
    return _forced or _default_instruction_set()


def kernels_for(dtype: torch.dtype) -> str:
    """The instruction set whose kernels serve inputs of a dtype."""
    return _kernels(INSTRUCTION_SETS.index(instruction_set()), Dtype.of(dtype))[0]


class BlockSizes(NamedTuple):
    """How large the blocks of some kernels are."""

    multiple: int  #: rows to whose multiples blocks are padded
    largest: int  #: the most rows of a block
    fewest: int  #: of the blocks that have more rows than ``multiple``


@functools.cache
def _kernels(isa: int, dtype: int) -> tuple[str, BlockSizes]:
    sizes = [ctypes.c_int32() for _ in BlockSizes._fields]
    name = _library().alphacl_cpu_kernels(isa, dtype, *map(ctypes.byref, sizes))
    return name.decode(), BlockSizes(*(size.value for size in sizes))


def unsupported(
    device: torch.device, dtype: torch.dtype, precision: str | None, kind: str
) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if device.type != "cpu":
        return f"runs on cpu, not {device.type}"
    if _LOAD_ERROR is not None:
        return f"not compiled: {_LOAD_ERROR}"
    if precision not in (None, "ieee"):
        return f"multiplies float32 as IEEE says, not precision={precision!r}"
    if not kind or is_compiled(kind):
        return None
    if kind in KINDS:
        return "compiled without this registered pair kind"
    return uncompiled(kind)


def uncompiled(function: str) -> str | None:
    """Why a user's function, given by its key, cannot be compiled, or None."""
    return cpu_functions.problem(function, _recipe(), _usable_sets())


@functools.cache
def _recipe() -> cpu_functions.Recipe:
    return cpu_functions.Recipe.of(_library().alphacl_cpu_recipe().decode())


def _usable_sets() -> tuple[str, ...]:
    return INSTRUCTION_SETS[: INSTRUCTION_SETS.index(instruction_set()) + 1]


def users_functions() -> str:
    """How users' functions are compiled here, or why they are not."""
    return cpu_functions.status(_recipe(), _usable_sets())


def function_fields(
    function: PairFunction, dtype: torch.dtype
) -> tuple[dict[str, int], cpu_functions.Function | None]:
    """The fields of a sweep or step that say what the pairs' function is, and what must live as
    long as they do. ``dtype``: of the accumulation.
    """
    if function.kind in KINDS:
        return {"kind": KINDS[function.kind].code}, None
    found = compiled(function.kind, function.params, dtype)
    constants = ctypes.addressof(found.constants)
    return {"kind": -1, "values": found.address, "constants": constants}, found


def compiled(
    function: str, params: tuple[float, ...], dtype: torch.dtype
) -> cpu_functions.Function:
    """A user's function, given by its key, for an accumulation dtype."""
    return cpu_functions.compiled(function, params, dtype, _recipe(), _usable_sets())


def block_rows(n: int, sizes: BlockSizes) -> int:
    """Rows of a block. Large blocks reuse the caches best, but there must be enough tiles for the
    threads.

    It depends on n and the kernels alone, because the order of all additions, and with it every bit
    of the result, follows from the blocks.
    """
    multiple = sizes.multiple
    return max(multiple, min(sizes.largest, n // sizes.fewest // multiple * multiple))


#: Multiply-adds that justify waking a thread: some 30 µs of work for one core.
WORK_PER_THREAD = 4_000_000


def _threads(n: int, dim: int, split: int, gradient: bool, guide_dim: int = 0) -> int:
    pairs = split * (n - split) if split else n * n // 2
    work = pairs * (dim * (3 if gradient else 1) + guide_dim)
    return max(1, min(torch.get_num_threads(), work // WORK_PER_THREAD))


#: Row vectors and the guide's rows, by the names of `_Sweep`.
_VECTORS = (*Rows._fields[1:], *RowScalars._fields, "ids", "largest_t", "guide", "largest_guide")


class _Kept:
    """Tiles that one sweep keeps for the next over the same pairs."""

    def __init__(self, workspace: int) -> None:
        self.handle = _library().alphacl_cpu_keep(workspace)
        self.key: tuple[object, ...] | None = None
        self.form: tuple[Form, float] | None = None
        self.tensors: tuple[Tensor, ...] = ()

    def fields(
        self, key: tuple[object, ...], form: tuple[Form, float], tensors: tuple[Tensor, ...]
    ) -> dict[str, int]:
        """Those of `_Sweep` for a sweep of this form; ``key``: what its similarities depend on."""
        if self.key is None:
            # the tensors stay: no other one can lie at their address
            self.key, self.form, self.tensors = key, form, tensors
            return {"kept": self.handle}
        factors = self.form[0] == Form.CONSTANT
        usable = self.key == key and (self.form == form or not factors)
        return {"kept": self.handle, "filled": 1} if usable else {}


_local = threading.local()


@contextlib.contextmanager
def keeping_tiles(workspace: int) -> Iterator[None]:
    """A context in which the first sweep of this thread keeps tiles, for later ones over its pairs.

    ``workspace``: bytes for them.
    """
    before, _local.kept = getattr(_local, "kept", None), _Kept(workspace)
    try:
        yield
    finally:
        _library().alphacl_cpu_forget(_local.kept.handle)
        _local.kept = before


def keeps_tiles() -> bool:
    """Whether this thread is in `keeping_tiles`."""
    return getattr(_local, "kept", None) is not None


def _run(
    rows: Rows,
    pairing: Pairing,
    function: PairFunction,
    scalars: RowScalars,
    terms: tuple[Term, ...],
    outputs: dict[str, Tensor],
    **fields: int | float,
) -> None:
    """One sweep: fills ``outputs``; ``fields`` are further fields of `_Sweep`."""
    isa, f = INSTRUCTION_SETS.index(instruction_set()), rows.f
    if f.stride(1) != 1 and f.shape[1] > 1:
        f = f.contiguous()
    _, sizes = _kernels(isa, Dtype.of(f.dtype))
    of_pairs = pairing.ids, pairing.largest_t, pairing.guide, pairing.largest_guide
    vectors = zip(_VECTORS, (*rows[1:], *scalars, *of_pairs), strict=True)
    guide_dim = 0 if pairing.guide is None else pairing.guide.shape[1]
    kept = {name: x.contiguous() for name, x in vectors if x is not None}
    kept.update(f=f)
    of_tiles = {}
    if keeps_tiles():
        tensors = tuple(x for name, x in kept.items() if name not in RowScalars._fields)
        key = (
            *((x.data_ptr(), x.stride(), x._version) for x in tensors), *f.shape, *pairing[:3],
            pairing.weighted, float(function.tau), *function[:2], isa,
        )  # fmt: skip
        form = fields["form"], fields["constant_shift"]
        of_tiles = _local.kept.fields(key, form, tensors)
    kept.update(outputs)
    of_function, _alive = function_fields(function, function.tau.dtype)
    sweep = _Sweep(
        n=f.shape[0],
        dim=f.shape[1],
        row_stride=f.stride(0),
        guide_dim=guide_dim,
        dtype=Dtype.of(f.dtype),
        instruction_set=isa,
        split=pairing.split,
        partner=pairing.partner,
        anchors=pairing.anchors,
        weighted=pairing.weighted,
        block=block_rows(f.shape[0], sizes),
        threads=_threads(*f.shape, pairing.split, "gradient" in fields, guide_dim),
        tau=float(function.tau),
        params=function.padded(),
        rows_of_terms=rows_of_terms(terms),
        **{name: x.data_ptr() for name, x in kept.items()},
        **of_function,
        **fields,
        **of_tiles,
        **_hooks(),
    )
    status = _library().alphacl_cpu_sweep(ctypes.byref(sweep))
    if status != _OK:
        fail(status, *f.shape, f.dtype)


def fail(status: int, rows: int, dim: int, dtype: torch.dtype) -> None:
    """Raises the error of a call that has not returned `_OK`."""
    if status == _NO_MEMORY:
        raise MemoryError(f"not enough memory for the workspace of {rows} rows of {dim} features")
    raise RuntimeError(f"the CPU kernels cannot serve {dtype} with {instruction_set()}")


def row_sums(
    rows: Rows,
    pairing: Pairing,
    function: PairFunction,
    scalars: RowScalars,
    terms: tuple[Term, ...],
    precision: str = "",
) -> Tensor:
    """(len(terms), anchors): every term summed over the negatives of every anchor."""
    sums = function.tau.new_empty((len(terms), pairing.anchors))
    form, shift = forms.of_row_sums(function, terms)
    _run(rows, pairing, function, scalars, terms, {"sums": sums}, form=form, constant_shift=shift)
    return sums


def pair_grad(
    rows: Rows,
    pairing: Pairing,
    function: PairFunction,
    scalars: RowScalars,
    weight: Weight,
    terms: tuple[Term, ...],
    wanted: tuple[int, int],
    precision: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_j (g_ij + g_ji)·F_j of the ``wanted`` rows, sums of the weights (with a bias), sums of
    ``terms``.
    """
    (n, dim), (low, high), tau = rows.f.shape, wanted, function.tau
    df = tau.new_empty((high - low, dim))
    weight_sums = tau.new_empty(n if rows.bias is not None else 0)
    sums = tau.new_empty((len(terms), pairing.anchors if terms else 0))
    form, shift = forms.of_pair_grad(function, scalars, weight, terms)
    outputs = {"df": df, "weight_sums": weight_sums, "sums": sums}
    _run(
        rows, pairing, function, scalars, terms, outputs, form=form, gradient=1, weight=weight,
        constant_shift=shift, lo=low, hi=high,
    )  # fmt: skip
    return df, weight_sums, sums


#: Rows times features that are worth a second thread.
_ELEMENTS_PER_THREAD = 32_768


def _run_rows(function: str, f: Tensor, tensors: dict[str, Tensor], **strides: int) -> None:
    n_pairs, dim = len(f) // 2, f.shape[1]
    threads = max(1, min(torch.get_num_threads(), n_pairs * dim // _ELEMENTS_PER_THREAD))
    rows = _PairRows(
        n_pairs=n_pairs, dim=dim, stride=f.stride(0), hi=len(f), swept=len(f),
        dtype=Dtype.of(f.dtype), threads=threads,
        instruction_set=INSTRUCTION_SETS.index(instruction_set()), f=f.data_ptr(),
        **{name: x.data_ptr() for name, x in tensors.items()}, **strides,
    )  # fmt: skip
    if getattr(_library(), function)(ctypes.byref(rows)) != _OK:
        raise MemoryError(f"not enough memory for {n_pairs} pairs of {dim} features")


def unit_rows(z1: Tensor, z2: Tensor) -> NormalizedRows:
    """The 2N stacked rows of a cosine loss from z1, z2 (N, D), in one pass."""
    z1, z2 = (z if z.stride(1) == 1 else z.contiguous() for z in (z1, z2))
    rows, n = NormalizedRows.empty(z1), len(z1)
    buffers = {"z1": z1, "z2": z2, **rows._asdict()}
    f = buffers.pop("f")
    _run_rows("alphacl_cpu_normalize", f, buffers, stride1=z1.stride(0), stride2=z2.stride(0))
    rows.pos[n:] = rows.pos[:n]
    return rows


def finish_rows(d: Tensor, f: Tensor, scale: Tensor | None, inv_norm: Tensor, q: Tensor) -> None:
    """d (2N, D) ← the gradient in z, from Σ_j (g_ij + g_ji) F_j and the anchors' q, (N,) or (2N,).

    It changes d in place; ``scale`` (2N,) is 1/‖f‖ in half precision, else None.
    """
    n = f.shape[0] // 2
    q = q.contiguous() if q.shape[0] == n else q[:n] + q[n:]  # both anchors of a positive pair
    buffers = {"inv_norm": inv_norm, "d": d, "q": q}
    _run_rows("alphacl_cpu_finish", f, buffers if scale is None else {**buffers, "scale": scale})


def number_ids(
    ids: Tensor, split: int, anchors: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from 0 for ids (rows,), and for every anchor how many of the rows that it meets have
    another id, at least 1 and in ``dtype``, and whether none has.

    Rows [0, split) meet the others; with ``split`` = 0 all rows meet one another.
    """
    ids, n = ids.to(torch.int64).contiguous(), len(ids)
    numbers = ids.new_empty(n, dtype=torch.int32)
    n_neg, empty = (ids.new_empty(anchors, dtype=d) for d in (dtype, torch.bool))
    outputs = (x.data_ptr() for x in (numbers, n_neg, empty))
    sizes = n, split, anchors, Dtype.of(dtype)
    status = _library().alphacl_cpu_number_ids(ids.data_ptr(), *sizes, *outputs)
    if status != _OK:
        raise MemoryError(f"not enough memory to number the ids of {n} rows")
    return numbers, n_neg, empty


def normalized(z: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of z (n, D) in the accumulation dtype, and 1/‖z‖ (n,); 0 for an all-zero row."""
    z, wide = (z if z.stride(1) == 1 else z.contiguous()), accumulation_dtype(z.dtype)
    f, inv_norm = z.new_empty(z.shape, dtype=wide), z.new_empty(len(z), dtype=wide)
    _run_unit_rows(z, f, inv_norm, z=z.data_ptr(), z_stride=z.stride(0))
    return f, inv_norm


def through_normalization(d: Tensor, f: Tensor, inv_norm: Tensor) -> Tensor:
    """The gradient in z (n, D) from the gradient d in its unit rows f; all contiguous but d."""
    d = d if d.stride(1) == 1 else d.contiguous()
    dz = torch.empty_like(f)
    _run_unit_rows(f, f, inv_norm, d=d.data_ptr(), d_stride=d.stride(0), dz=dz.data_ptr())
    return dz


def _run_unit_rows(given: Tensor, f: Tensor, inv_norm: Tensor, **fields: int) -> None:
    n, dim = f.shape
    rows = _UnitRows(
        n=n, dim=dim, dtype=Dtype.of(given.dtype), f=f.data_ptr(), inv_norm=inv_norm.data_ptr(),
        threads=max(1, min(torch.get_num_threads(), n * dim // _ELEMENTS_PER_THREAD)),
        instruction_set=INSTRUCTION_SETS.index(instruction_set()), **fields,
    )  # fmt: skip
    if _library().alphacl_cpu_unit_rows(ctypes.byref(rows)) != _OK:
        fail(-1, n, dim, given.dtype)
