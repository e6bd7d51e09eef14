"""The two sweeps in CUDA C++ (csrc/cuda): every built-in pair kind, on GPUs from sm_80 on, without Triton.

The library's operators are reached through libtorch's stable ABI, so one binary serves every torch from 2.10 on. The same
kernel sources, compiled for the host, run on CPU tensors where ALPHACL_CUDA_EMULATED names such a library: that is how they
are tested. This file chooses forms, allocates outputs, and reduces what blocks wrote in parts.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..bundles import Form, PairFunction, Pairing, Rows, RowScalars, Term, Weight, summed
from . import forms
from .groups import Group, clear, fitting, groups_of, jobs_of, multiply_weights, row_runs
from .precision import float32_precision

#: The kernels' names of terms, weights and forms.
_TERM_NAMES = dict(zip(Term, ("f", "df", "ft", "dft", "dtau", "base", "max"), strict=True))
_WEIGHT_NAMES = dict(zip(Weight, ("f", "df", "f+df"), strict=True))
_FORM_NAMES = dict(zip(Form, ("fixed", "running", "plain", "max"), strict=True))
#: Optional operands that this backend serves.
OPTIONAL_OPERANDS: set[str] = set()
#: Where `setup.py` puts the library, or the reason why there is none.
LIBRARY = Path(__file__).parent.parent / "_cuda.abi3.so"
FAILURE = LIBRARY.with_name("_cuda_not_built.txt")
#: The first torch whose stable ABI has all that the library uses.
OLDEST = (2, 10)
#: Rows and columns of a tile.
SIDE = 64
#: The longest rows whose gradient the kernels accumulate in registers (launch.h). Of longer ones chunks of features pass by,
#: and for their gradient the kernels write the weights, which a vendor product multiplies with the rows: nothing is
#: computed twice.
LARGEST = {"bf16": 256, "fp16": 256, "tf32": 128, "fp32": 64, "fp64": 32}
#: The same where a block has less shared memory (sm_86, sm_89); float64 is not served there.
LARGEST_OF_SMALL = {"bf16": 128, "fp16": 128, "tf32": 64, "fp32": 64}

#: Bytes of shared memory that all kernels find room in, and those of `LARGEST_OF_SMALL`.
SHARED_MEMORY, SMALL_SHARED_MEMORY = 163 << 10, 99 << 10

_MODES = ("bf16", "fp16", "tf32", "fp32", "fp64")  # as `Dtype` of problem.h
_KINDS = {name: code for code, name in enumerate(("exp", "gibbs", "power", "inverse", "hinge", "sigmoid", "square", "gamma"))}
_AFFINE = (_KINDS["exp"], _KINDS["gibbs"])  # in t, their log f
_TERMS = ("f", "df", "ft", "dft", "dtau")
_WEIGHTS = {"f": 0, "df": 1, "f+df": 2}
_FORMS = {"fixed": 0, "running": 1, "plain": 2, "max": 3}
_GRADS = {"none": 0, "product": 1, "weights": 2}
_EXCLUDE, _TRIANGLE, _BOTH, _ROWS_PAIRED, _COLS_PAIRED, _ROWS_ANCHOR, _COLS_ANCHOR, _IN_CHUNKS = (1 << k for k in range(8))


# --- the library ------------------------------------------------------------------------------------------------------


def emulated() -> bool:
    """Whether the kernels run on the host."""
    return bool(os.environ.get("ALPHACL_CUDA_EMULATED"))


@functools.cache
def _load(path: str, namespace: str) -> tuple[object | None, str | None]:
    """The library's operators, or why there are none."""
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    if version < OLDEST:
        return None, f"needs torch {'.'.join(map(str, OLDEST))}, found {torch.__version__}"
    if not Path(path).exists():
        reason = FAILURE.read_text().strip() if FAILURE.exists() else "no library beside the package"
        return None, f"not compiled: {reason}; reinstall with nvcc on the PATH"
    try:
        torch.ops.load_library(path)
        operators = getattr(torch.ops, namespace)
        operators.sweep.default, operators.rows.default  # noqa: B018 - AttributeError where the library is another's
    except (OSError, RuntimeError, AttributeError) as error:
        return None, f"cannot be loaded: {error}"
    return operators, None


def _library(device_type: str) -> tuple[object | None, str | None]:
    if device_type == "cpu":
        return _load(os.environ.get("ALPHACL_CUDA_EMULATED", ""), "alphacl_fast_cuda_emulated")
    return _load(str(LIBRARY), "alphacl_fast_cuda")


def unsupported(device: torch.device, dtype: torch.dtype, precision: str | None, kind: str) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if device.type == "cpu":
        if not emulated():
            return "runs on GPUs, not cpu (except emulated, ALPHACL_CUDA_EMULATED)"
    elif device.type != "cuda" or torch.version.hip is not None:
        return f"runs on NVIDIA GPUs, not {'ROCm' if device.type == 'cuda' else device.type}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, not {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    _, reason = _library(device.type)
    if reason:
        return reason
    least = SHARED_MEMORY if dtype == torch.float64 else SMALL_SHARED_MEMORY
    if device.type == "cuda" and (there := _shared_memory(device)) < least:
        return f"needs {least >> 10} KB of shared memory a block for {str(dtype).removeprefix('torch.')}, got {there >> 10}"
    if kind and kind not in _KINDS:
        return "compiled for the built-in pair functions, not for a user's own"
    if precision == "bf16x3":
        return "multiplies float32 as IEEE or as TF32, not precision='bf16x3'"
    return None


# --- what a call comes to ---------------------------------------------------------------------------------------------

#: Whether `row_sums` takes the form that reads each similarity once, where it is there (bfloat16).
#: None: unless the device has kernels of warpgroups, which are of the row-block form.
_both_sides: bool | None = None


@contextlib.contextmanager
def both_sides(wanted: bool | None) -> Iterator[None]:
    """Within the context `row_sums` takes the both-sides form or the row-block form."""
    global _both_sides
    before, _both_sides = _both_sides, wanted
    try:
        yield
    finally:
        _both_sides = before


@contextlib.contextmanager
def hopper(mode: int) -> Iterator[None]:
    """Whether bfloat16 rows take the kernels of warpgroups (sm_90a), within the context.

    -1: where these serve a call; 0: never; 1: whatever the fast kernels serve by row blocks, which is refused if they cannot.
    """
    libraries = [library for device in ("cuda", "cpu") if (library := _interface(device)) is not None]
    before = [library.alphacl_cuda_hopper(mode) for library in libraries]
    _has_hopper.cache_clear()
    try:
        yield
    finally:
        for library, earlier in zip(libraries, before, strict=True):
            library.alphacl_cuda_hopper(earlier)
        _has_hopper.cache_clear()


def _interface(device_type: str) -> ctypes.CDLL | None:
    """The plain C interface of a library that is loaded; None of one built before there were such kernels."""
    operators, _ = _library(device_type)
    path = os.environ.get("ALPHACL_CUDA_EMULATED", "") if device_type == "cpu" else str(LIBRARY)
    library = ctypes.CDLL(path) if operators is not None else None
    return library if hasattr(library, "alphacl_cuda_hopper") else None


@functools.cache
def _has_hopper(device: torch.device) -> bool:
    """Whether a device takes the kernels of warpgroups, where they serve a call."""
    library = _interface(device.type)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return library is not None and bool(library.alphacl_cuda_has_hopper())


def _mode(dtype: torch.dtype, precision: str, device: torch.device) -> str:
    if dtype in (torch.bfloat16, torch.float16, torch.float64):
        return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
    precision = precision or float32_precision(device)
    return "tf32" if precision in ("tf32", "bf16") else "fp32"


@functools.cache
def _processors(device: torch.device) -> int:
    """Blocks that a GPU runs side by side, about; emulated, a ring is cut in two, to have it tested."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block can have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _in_chunks(mode: str, dim: int, device: torch.device) -> bool:
    """Whether chunks of features of the rows pass by."""
    small = device.type == "cuda" and _shared_memory(device) < SHARED_MEMORY
    return dim > (LARGEST_OF_SMALL if small else LARGEST)[mode]


def _parts(blocks: int, tiles: int, device: torch.device) -> int:
    """Blocks that share a ring: enough to fill the device, a function of the sizes and the device alone."""
    return max(1, min(_processors(device) // blocks, tiles // 2))


def _hopper_parts(rows: int, cols: int, device: torch.device) -> int:
    """The same for kernels of warpgroups, whose blocks of 128 rows have a multiprocessor each.

    The last wave of blocks leaves processors idle: the number of parts that takes the fewest tiles, a part costing about two.
    """
    blocks, tiles, processors = -(-rows // 128), -(-cols // 128), max(1, _processors(device) // 2)

    def time(parts: int) -> int:
        return -(-blocks * parts // processors) * (-(-tiles // parts) + 2)

    most = max(processors // blocks, min(8, fitting(rows * 1024)))
    return min(range(1, max(1, min(most, tiles)) + 1), key=time)


def _tiles(rows: int) -> int:
    return -(-rows // SIDE)


class _Problem:
    """One call's tensors and what both sweeps tell the kernels."""

    def __init__(self, f: Tensor, tau: Tensor, kind: str, params: tuple[float, ...], precision: str, form: str, **vectors):
        if f.shape[0] >= 2**31 - 2**16:
            raise ValueError(f"the cuda backend takes at most {2**31 - 2**16} rows, got {f.shape[0]}")
        self.f = f if f.stride(1) == 1 or f.shape[1] == 1 else f.contiguous()
        self.n, self.dim = f.shape
        self.tau, self.kind, self.form = tau, _KINDS[kind], form
        self.params = (*params, 0.0, 0.0, 0.0)[:3]
        self.mode = _mode(f.dtype, precision, f.device)
        self.in_chunks = _in_chunks(self.mode, self.dim, f.device)
        self.vectors = [
            None if vectors.get(name) is None else vectors[name].contiguous()
            for name in ("scale", "bias", "center", "gain", "shift", "offset", "level")
        ]
        self.operators, _ = _library(f.device.type)

    def on_hopper(self, terms: tuple[str, ...] = ("f",)) -> bool:
        """Whether a row-block launch of the fixed form goes to the kernels of warpgroups (hopper.h says which)."""
        fast = self.kind in _AFFINE or (self.kind == _KINDS["power"] and self.params[1] == 2)
        fixed = self.form == "fixed" and self.vectors[1] is None and "f" in terms and set(terms) <= {"f", "ft"}
        aligned = self.f.data_ptr() % 16 == 0 and self.f.stride(0) % 8 == 0 and self.f.stride(0) >= self.dim
        return self.mode == "bf16" and fast and fixed and aligned and self.dim <= 256 and _has_hopper(self.f.device)

    def parts(self, groups: list[Group], hopper: bool) -> int:
        """Blocks that share a ring, of row-block launches for these groups."""
        of = _hopper_parts if hopper else lambda rows, cols, device: _parts(_tiles(rows), _tiles(cols), device)
        return min((of(g.n_rows, g.n_cols, self.f.device) for g in groups), default=1)

    def launch(
        self, group: Group, blocks: int, parts: int, anchors: int, terms: tuple[str, ...], *, middle: float = 0.0,
        unit: Tensor | None = None, out: Tensor | None = None, df: Tensor | None = None, w_sums: Tensor | None = None,
        sums: Tensor | None = None, w: Tensor | None = None, begin: int = 0, end: int = 0, col_slot: int = 0,
        both: bool = False, gradient: bool = False, weight: str = "f", grad: str = "none", n_out: int = 0, lo: int = 0,
        first_block: int = 0,
    ) -> None:  # fmt: skip
        flags = (
            _EXCLUDE * group.exclude + _TRIANGLE * group.triangle + _BOTH * both + _ROWS_PAIRED * group.rows_paired
            + _COLS_PAIRED * group.cols_paired + _ROWS_ANCHOR * group.rows_anchor + _COLS_ANCHOR * group.cols_anchor
            + _IN_CHUNKS * self.in_chunks
        )  # fmt: skip
        rows_of_terms = [terms.index(term) if term in terms else -1 for term in _TERMS]
        numbers = [
            gradient, _MODES.index(self.mode), blocks, group.n_rows, group.n_cols, group.row_start, group.col_start,
            self.n // 2, anchors, self.n, n_out, lo, first_block, begin, end, col_slot, parts, self.kind,
            _FORMS[self.form], _WEIGHTS[weight], _GRADS[grad], flags, len(terms), *rows_of_terms,
        ]  # fmt: skip
        self.operators.sweep.default(
            self.f, *self.vectors, self.tau, unit, out, df, w_sums, sums, w, [int(x) for x in numbers], [middle, *self.params]
        )


# --- sweep 1 ----------------------------------------------------------------------------------------------------------


def row_sums(
    rows: Rows,
    pairing: Pairing,
    function: PairFunction,
    scalars: RowScalars,
    terms: tuple[Term, ...],
    precision: str,
) -> Tensor:
    """(len(terms), anchors): every term summed over the negatives of every anchor."""
    (f, scale, bias), (split, partner, anchors, _) = rows, pairing
    kind_name, params, tau, _ = function
    center, _, shift, offset, _ = scalars
    form, middle = forms.of_row_sums(function, terms)
    form = _FORM_NAMES[form]
    sums = tuple(_TERM_NAMES[term] for term in summed(terms))
    p = _Problem(f, tau, kind_name, params, precision, form, scale=scale, bias=bias, center=center, shift=shift, offset=offset)
    groups = [g for g in groups_of(p.n, split, partner, anchors) if g.rows_anchor]
    out = tau.new_empty(len(terms), anchors)
    wanted = out
    if form == "fixed":
        out[0].fill_(middle)
        wanted = out[1:]
    on_hopper = p.on_hopper(sums)
    wanted_both = not on_hopper if _both_sides is None else _both_sides
    served = wanted_both and p.mode == "bf16" and form != "running"
    if served and (not split or (anchors > split and p.n == 2 * split)):
        _sums_of_both_sides(p, groups[0], sums, middle, wanted)
        return out
    parts = p.parts(groups, on_hopper)
    slots = wanted.unsqueeze(0) if parts == 1 else tau.new_empty(parts, *wanted.shape)
    for group in groups:
        p.launch(group, _tiles(group.n_rows), parts, anchors, sums, middle=middle, out=slots, end=_tiles(group.n_cols))
    if parts > 1:
        wanted.copy_(_combined(slots, form))
    return out


def _sums_of_both_sides(p: _Problem, group: Group, sums: tuple[str, ...], middle: float, out: Tensor) -> None:
    """Fills out (K, anchors), reading every similarity once. Ring distances go in runs whose slots fit into the scratch."""
    blocks, tiles = _tiles(group.n_rows), _tiles(group.n_cols)
    distances = tiles // 2 + 1 if group.triangle else tiles
    parts = _parts(blocks, distances, p.f.device)
    run = min(distances, max(1, fitting(out.numel() * out.element_size()) - parts))
    slots = out.new_empty(parts + run, *out.shape)
    for begin in range(0, distances, run):
        end = min(begin + run, distances)
        if group.triangle and begin == 0:
            clear(slots[parts], p.form)  # distance 0 is oneself,
        if group.triangle and end == distances and tiles % 2 == 0:
            clear(slots[parts + end - 1 - begin], p.form)  # and half way round an even ring only half of the blocks are met
        p.launch(
            group, blocks, parts, out.shape[1], sums, middle=middle, out=slots, begin=begin, end=end, col_slot=parts - begin,
            both=True,
        )  # fmt: skip
        used = slots[: parts + end - begin]
        if group.triangle:
            new = _combined(used, p.form)
        else:  # the first side's sums are those of rows, the second's those of columns
            n = group.n_rows
            new = torch.cat([_combined(used[:parts, :, :n], p.form), _combined(used[parts:, :, n:], p.form)], 1)
        out.copy_(new if begin == 0 else _combined(torch.stack([out, new]), p.form))


def _combined(slots: Tensor, form: str) -> Tensor:
    """(slots, K, anchors) → (K, anchors): sums of parts, in their order."""
    if form == "max":
        return slots.amax(0)
    if form != "running":
        return slots.sum(0)
    base = slots[:, 0].amax(0)
    factor = (slots[:, 0] - torch.where(base > -torch.inf, base, 0.0)).exp_()
    return torch.cat([base.unsqueeze(0), (slots[:, 1:] * factor.unsqueeze(1)).sum(0)])


# --- sweep 2 ----------------------------------------------------------------------------------------------------------


def pair_grad(
    rows: Rows,
    pairing: Pairing,
    function: PairFunction,
    scalars: RowScalars,
    weight: Weight,
    terms: tuple[Term, ...],
    wanted: tuple[int, int],
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_j (g_ij + g_ji)·F_j of the ``wanted`` rows, sums of the weights (with a bias), sums of ``terms``."""
    (f, scale, bias), (split, partner, _, _) = rows, pairing
    kind_name, params, tau, _ = function
    center, gain, shift, offset, level = scalars
    lo, hi = wanted
    form, middle = forms.of_pair_grad(function, scalars, weight, terms)
    form, weight = _FORM_NAMES[form], _WEIGHT_NAMES[weight]
    terms = tuple(_TERM_NAMES[term] for term in terms)
    if form == "fixed":
        gain, shift = (middle - shift).exp_().mul_(gain), None
    p = _Problem(
        f, tau, kind_name, params, precision, form, scale=scale, bias=bias, center=center,
        gain=gain, shift=shift, offset=offset, level=level,
    )  # fmt: skip
    anchors, everything = gain.shape[0], (lo, hi) == (0, p.n)
    groups = groups_of(p.n, split, partner, anchors)
    unit = None if p.mode in ("fp32", "fp64") else gain.abs().amax()  # weights that are rounded are divided by it first
    whole = not p.in_chunks
    jobs = jobs_of(groups, p.n, lo, hi, bool(terms))
    parts = p.parts([group for group, _ in jobs], form == "fixed" and p.on_hopper())
    df = tau.new_empty(parts if whole else 1, hi - lo, p.dim)
    w_sums = (tau.new_empty if everything else tau.new_zeros)(parts, p.n if bias is not None else 0)
    sums = tau.new_empty(parts, len(terms), anchors)
    for group, wants in jobs:
        own_terms = terms if group.rows_anchor else ()
        blocks, tiles = _tiles(group.n_rows), _tiles(group.n_cols)
        common = {
            "middle": middle, "unit": unit, "w_sums": w_sums if bias is not None else None,
            "sums": sums if own_terms else None, "gradient": True, "weight": weight, "n_out": hi - lo, "lo": lo, "end": tiles,
        }  # fmt: skip
        if not wants or whole:
            grad = "product" if wants else "none"
            p.launch(group, blocks, parts, anchors, own_terms, grad=grad, df=df if wants else None, **common)
            continue
        wide = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(p.mode, torch.float32)
        products = "tf32" if p.mode in ("tf32", "fp16") else "ieee"  # float16 rows are exact in TF32
        for first, count in row_runs(blocks, SIDE * group.n_cols * wide.itemsize):
            w = f.new_empty(count * SIDE, group.n_cols, dtype=wide)
            p.launch(group, count, parts, anchors, own_terms, grad="weights", w=w, first_block=first, **common)
            multiply_weights(w, p.f, group, first, SIDE, products, df[0], lo)
    if unit is not None and not whole:
        df *= torch.where(unit > 0, unit, 1.0)
    return tuple(x[0] if x.shape[0] == 1 else x.sum(0) for x in (df, w_sums, sums))


# --- rows -------------------------------------------------------------------------------------------------------------


def unit_rows(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked rows (2N, D) as `autograd.Features` wants them for cosine, 1/‖z‖ and t⁺ (2N,) each, in one launch."""
    z1, z2 = (z if z.stride(1) == 1 else z.contiguous() for z in (z1, z2))
    n, dim = z1.shape
    wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
    f, inv_norm, pos = z1.new_empty(2 * n, dim), z1.new_empty(2 * n, dtype=wide), z1.new_empty(2 * n, dtype=wide)
    _library(z1.device.type)[0].rows.default(False, z1, z2, f, inv_norm, pos, None, None)
    return f, inv_norm, pos


def finish_rows(d: Tensor, f: Tensor, inv_norm: Tensor, q: Tensor) -> None:
    """d (2N, D) ← the gradient in z, from Σ_j (g_ij + g_ji) F_j and the anchors' q, (N,) or (2N,); in place, in one launch."""
    _library(f.device.type)[0].rows.default(True, None, None, f, inv_norm, None, d, q.contiguous())
