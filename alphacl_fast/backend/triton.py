"""The two sweeps as Triton kernels (kernels/sweeps.py): every pair kind, a user's own included, on GPUs from sm_80 on.

This file chooses forms and tiles, allocates outputs, launches, and reduces what programs wrote in parts. Triton is imported
with the first call. With TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly: that is how they are tested.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
from dataclasses import asdict
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..bundles import Form, PairFunction, Pairing, Rows, RowScalars, Term, Weight, summed
from ..objectives import ROW_STEPS
from ..objectives import kind as lookup
from . import forms
from .groups import Group, clear, fitting, groups_of, jobs_of, multiply_weights, row_runs
from .precision import float32_precision

#: The kernels' names of terms, weights and forms.
_TERM_NAMES = dict(zip(Term, ("f", "df", "ft", "dft", "dtau", "base", "max"), strict=True))
_WEIGHT_NAMES = dict(zip(Weight, ("f", "df", "f+df"), strict=True))
_FORM_NAMES = dict(zip(Form, ("fixed", "running", "plain", "max"), strict=True))
#: Optional operands that this backend serves.
OPTIONAL_OPERANDS = {"ids"}
#: The first version of Triton whose functions take and return named tuples as the kernels do.
OLDEST = (3, 6)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _kernels() -> SimpleNamespace:
    """Triton and the kernel modules."""
    import triton.language as tl

    from alphacl_fast.kernels import config, rows, sweeps, trace

    return SimpleNamespace(tl=tl, config=config, rows=rows, sweeps=sweeps, trace=trace)


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton

        if tuple(int(x) for x in re.findall(r"\d+", triton.__version__)[:2]) < OLDEST:
            return f"needs triton {'.'.join(map(str, OLDEST))}, found {triton.__version__}"
        _kernels()
    except Exception as error:  # any failure of an optional dependency's import is a reason not to use it, and is told
        return f"triton cannot be imported: {error}"
    return None


def unsupported(device: torch.device, dtype: torch.dtype, precision: str | None, kind: str) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if device.type == "cpu":
        if not (interpreted() or _stand_in):
            return "runs on GPUs, not cpu (except in the interpreter, TRITON_INTERPRET=1)"
    elif device.type != "cuda":
        return f"runs on GPUs, not {device.type}"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, not {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    return _missing() or (_kernels().trace.problem(kind) if kind.startswith("custom") else None)


# --- what a call comes to ---------------------------------------------------------------------------------------------


class _Arithmetic(NamedTuple):
    mode: str  # of the tuned tables
    similarities: str  # input_precision of the first product
    weights: torch.dtype  # to which weights are rounded for the second
    products: str  # its input_precision


def _arithmetic(dtype: torch.dtype, precision: str, device: torch.device) -> _Arithmetic:
    if dtype == torch.bfloat16:
        return _Arithmetic("bf16", "ieee", torch.bfloat16, "ieee")
    if dtype == torch.float16:  # weights may leave its range, so the second product is TF32, in which float16 rows are exact
        return _Arithmetic("fp16", "ieee", torch.float32, "tf32")
    if dtype == torch.float64:
        return _Arithmetic("fp64", "ieee", torch.float64, "ieee")
    precision = precision or {"bf16": "tf32"}.get(float32_precision(device), float32_precision(device))
    return _Arithmetic("fp32" if precision == "ieee" else precision, precision, torch.float32, precision)


@functools.cache
def _processors(device: torch.device) -> int:
    """Programs that a GPU runs side by side, about; in the interpreter a ring is cut in two, to have it tested."""
    if device.type == "cuda":
        return 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return 2 * (_stand_in or 3)


_stand_in = 0


def pretend_gpu(multiprocessors: int) -> None:
    """For the rest of this process, CPU tensors get the launches of a GPU, to compile or count them without one."""
    global _stand_in
    _stand_in = multiprocessors
    _processors.cache_clear()


def parts_of(blocks: int, tiles: int, device: torch.device) -> int:
    """Programs that share a ring: enough to fill the device, a function of the sizes and the device alone."""
    return max(1, min(_processors(device) // blocks, tiles // 2))


def tile(sweep: str, mode: str, dim: int, rows: int, device: torch.device):
    """`kernels.config.Tile` of a call."""
    return _kernels().config.choose(sweep, mode, dim, rows, device)


class _Problem:
    """One call's tensors and the static choices that both sweeps share."""

    def __init__(self, f: Tensor, tau: Tensor, kind_name: str, params: tuple[float, ...], precision: str, sweep: str, **v):
        if f.shape[0] >= 2**31 - 2**16:
            raise ValueError(f"the triton backend takes at most {2**31 - 2**16} rows, got {f.shape[0]}")
        self.f = f if f.stride(1) == 1 or f.shape[1] == 1 else f.contiguous()
        self.tau, self.kind = tau, lookup(kind_name)
        self.n, self.dim = f.shape
        self.arithmetic = _arithmetic(f.dtype, precision, f.device)
        self.tile = tile(sweep, self.arithmetic.mode, self.dim, self.n, f.device)
        absent = dict.fromkeys(_kernels().sweeps.Vectors._fields)
        self.vectors = _kernels().sweeps.Vectors(
            **{**absent, **{name: None if x is None else x.contiguous() for name, x in v.items()}}
        )
        self.traced = _kernels().trace.pair_functions(kind_name, params)

    def static(self, group: Group, form: str, terms: tuple[str, ...], both: bool, weight: str = "", grad: str = "none"):
        """`kernels.sweeps.Static` of a launch; the derivatives that nobody asks for are left out."""
        tl, arithmetic = _kernels().tl, self.arithmetic
        if interpreted():  # which multiplies all but bfloat16 as it should, and knows no shorter float32
            arithmetic = arithmetic._replace(similarities="ieee", products="ieee")
        names = {*terms, *weight.split("+")}
        precise = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16}
        needs_f = self.kind.log or not names.isdisjoint(("f", "ft"))
        return _kernels().sweeps.Static(
            F=self.traced.f if needs_f and form != "max" else None,
            DF=self.traced.df if form == "plain" and not names.isdisjoint(("df", "dft")) else None,
            DTAU=self.traced.dtau if "dtau" in names else None,
            LOG=self.kind.log and form != "max", LINEAR=self.kind.linear_in_t, FORM=form, TERMS=terms, D=self.dim,
            BLOCK_M=self.tile.rows, BLOCK_N=self.tile.cols, BLOCK_D=self.tile.features,
            ACC=precise[self.tau.dtype], PRECISION=arithmetic.similarities,
            UPCAST=interpreted() and self.f.dtype == torch.bfloat16, EXCLUDE=group.exclude, TRIANGLE=group.triangle, BOTH=both,
            ROWS_PAIRED=group.rows_paired, COLS_PAIRED=group.cols_paired, ROWS_ANCHOR=group.rows_anchor,
            COLS_ANCHOR=group.cols_anchor, WEIGHT=weight, GRAD=grad, W_TYPE=precise[arithmetic.weights],
            W_PRECISION=arithmetic.products, IDS=self.vectors.ids is not None,
        )  # fmt: skip

    def blocks(self, group: Group) -> tuple[int, int]:
        """Row blocks and column tiles."""
        return -(-group.n_rows // self.tile.rows), -(-group.n_cols // self.tile.cols)

    def parts(self, groups: list[Group]) -> int:
        """Parts of a ring, the same for all groups of a call, so that they share one buffer."""
        return min(parts_of(*self.blocks(group), self.f.device) for group in groups)

    def launch(self, kernel, grid: tuple[int, int], *arguments) -> None:
        """A launch of a grid (row blocks, parts of a ring)."""
        options = {} if self.tile.max_registers is None else {"maxnreg": self.tile.max_registers}
        with torch.cuda.device_of(self.f):
            kernel[grid](*arguments, num_warps=self.tile.warps, num_stages=self.tile.stages, **options)


def configuration(dtype: torch.dtype, dim: int, rows: int, device: torch.device) -> dict[str, dict]:
    """The tiles of both sweeps for a size, for records of measurements."""
    mode = _arithmetic(dtype, "", device).mode
    return {sweep: asdict(tile(sweep, mode, dim, rows, device)) for sweep in ("row_sums", "pair_grad")}


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
    (f, scale, bias), (split, partner, anchors, ids) = rows, pairing
    kind_name, params, tau, _ = function
    center, _, shift, offset, _ = scalars
    form, middle = forms.of_row_sums(function, terms)
    form = _FORM_NAMES[form]
    sums = tuple(_TERM_NAMES[term] for term in summed(terms))
    p = _Problem(
        f, tau, kind_name, params, precision, "row_sums_plain" if form == "plain" else "row_sums", scale=scale, bias=bias,
        center=center, shift=shift, offset=offset, ids=ids,
    )  # fmt: skip
    groups = [g for g in groups_of(p.n, split, partner, anchors) if g.rows_anchor]
    out = tau.new_empty(len(terms), anchors)
    middle = _float32(middle)
    if p.tile.both_sides and (not split or (anchors > split and p.n == 2 * split)):
        _both_sides(p, groups[0], form, sums, middle, out)
        return out
    parts = p.parts(groups)
    slots = out.unsqueeze(0) if parts == 1 else tau.new_empty(parts, *out.shape)
    for group in groups:
        blocks, tiles = p.blocks(group)
        p.launch(
            _kernels().sweeps.row_sums, (blocks, parts), p.f, p.vectors, tau, slots, p.f.stride(0), group.n_rows, group.n_cols,
            group.row_start, group.col_start, partner, anchors, 0, tiles, 0, middle,
            p.static(group, form, sums, False),
        )  # fmt: skip
    if parts > 1:
        _kernels().rows.combine(slots[:, form == "fixed" :], out, form, middle)
    return out


def _both_sides(p: _Problem, group: Group, form: str, sums: tuple[str, ...], middle: float, out: Tensor) -> None:
    """Fills out (K, anchors), reading every similarity once. Ring distances go in runs whose slots fit into the scratch."""
    blocks, tiles = p.blocks(group)
    distances = tiles // 2 + 1 if group.triangle else tiles
    parts, rows = parts_of(blocks, distances, p.f.device), out.shape[0] - (form == "fixed")
    run = min(distances, max(1, fitting(rows * out.shape[1] * out.element_size()) - parts))
    carried = int(run < distances)  # a slot for the sums of the runs before
    slots = out.new_empty(parts + carried + run, rows, out.shape[1])
    if carried:
        clear(slots[parts], form)
    static = p.static(group, form, sums, True)
    for begin in range(0, distances, run):
        end = min(begin + run, distances)
        of_columns = parts + carried - begin
        if group.triangle and begin == 0:
            clear(slots[of_columns], form)  # distance 0 is oneself,
        if group.triangle and end == distances and tiles % 2 == 0:
            clear(slots[of_columns + end - 1], form)  # and half way round an even ring only half of the blocks are met
        p.launch(
            _kernels().sweeps.row_sums, (blocks, parts), p.f, p.vectors, p.tau, slots, p.f.stride(0), group.n_rows,
            group.n_cols, group.row_start, group.col_start, p.n // 2, out.shape[1], begin, end, of_columns, middle,
            static,
        )  # fmt: skip
        used, n = slots[: of_columns + end], group.n_rows
        if group.triangle:
            _kernels().rows.combine(used, out, form, middle)
        else:  # the first side's sums are those of rows, the second's those of columns
            _kernels().rows.combine(used[: parts + carried, :, :n], out[:, :n], form, middle)
            _kernels().rows.combine(used[parts:, :, n:], out[:, n:], form, middle)
        if end < distances:
            slots[parts].copy_(out[-rows:])


def _float32(x: float) -> float:
    """What a kernel receives as a float argument."""
    return ctypes.c_float(x).value


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
    (f, scale, bias), (split, partner, _, ids) = rows, pairing
    kind_name, params, tau, _ = function
    center, gain, shift, offset, level = scalars
    lo, hi = wanted
    form, middle = forms.of_pair_grad(function, scalars, weight, terms)
    form, weight = _FORM_NAMES[form], _WEIGHT_NAMES[weight]
    terms = tuple(_TERM_NAMES[term] for term in terms)
    middle = _float32(middle)
    p = _Problem(
        f, tau, kind_name, params, precision, "pair_grad_plain" if form == "plain" else "pair_grad", scale=scale, bias=bias,
        center=center, gain=gain, shift=shift, offset=offset, level=level, ids=ids,
    )  # fmt: skip
    unit = None
    exact = p.arithmetic.weights in (torch.float32, torch.float64) and p.arithmetic.products == "ieee"
    if form == "fixed":
        gain, unit = _kernels().rows.gains(p.vectors.gain, p.vectors.shift, middle)
        p.vectors = p.vectors._replace(gain=gain, shift=None)
    elif not exact:
        _, unit = _kernels().rows.gains(p.vectors.gain, None, 0.0)
    if exact:
        unit = None
    anchors = gain.shape[0]
    everything = (lo, hi) == (0, p.n)
    groups = groups_of(p.n, split, partner, anchors)
    jobs = jobs_of(groups, p.n, lo, hi, bool(terms))
    parts = p.parts([group for group, _ in jobs]) if jobs else 1
    df = tau.new_empty(parts if p.dim <= p.tile.features else 1, hi - lo, p.dim)
    w_sums = (tau.new_empty if everything else tau.new_zeros)(parts, p.n if bias is not None else 0)
    sums = tau.new_empty(parts, len(terms), anchors)
    for group, wants in jobs:
        outputs = _kernels().sweeps.Outputs(
            df=df if wants and p.dim <= p.tile.features else None, w_sums=w_sums if bias is not None else None,
            sums=sums if terms and group.rows_anchor else None, w=None,
        )  # fmt: skip
        grad = "none" if not wants else "product" if p.dim <= p.tile.features else "weights"
        own_terms = terms if group.rows_anchor else ()
        static = p.static(group, form, own_terms, False, weight, grad)
        blocks, _ = p.blocks(group)
        bytes_of_block = p.tile.rows * group.n_cols * p.arithmetic.weights.itemsize
        for first, count in row_runs(blocks, bytes_of_block) if grad == "weights" else [(0, blocks)]:
            if grad == "weights":
                outputs = outputs._replace(w=p.f.new_empty(count * p.tile.rows, group.n_cols, dtype=p.arithmetic.weights))
            p.launch(
                _kernels().sweeps.pair_grad, (count, parts), p.f, p.vectors, tau, unit, outputs, p.f.stride(0),
                group.n_rows, group.n_cols, group.row_start, group.col_start, p.n // 2, anchors, p.n, hi - lo, lo, first,
                middle, static,
            )  # fmt: skip
            if grad == "weights":
                multiply_weights(outputs.w, p.f, group, first, p.tile.rows, p.arithmetic.products, df[0], lo)
    if unit is not None and p.dim > p.tile.features:
        df *= torch.where(unit > 0, unit, 1.0)
    return tuple(x[0] if x.shape[0] == 1 else x.sum(0) for x in (df, w_sums, sums))


# --- rows -------------------------------------------------------------------------------------------------------------


def unit_rows(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked rows (2N, D) as `autograd.Features` wants them for cosine, 1/‖z‖ and t⁺ (2N,) each, in one launch."""
    return _kernels().rows.unit_rows(z1, z2)


def finish_rows(d: Tensor, f: Tensor, inv_norm: Tensor, q: Tensor) -> None:
    """d (2N, D) ← the gradient in z, from Σ_j (g_ij + g_ji) F_j and the anchors' q, (N,) or (2N,); in place, in one launch."""
    _kernels().rows.finish_rows(d, f, inv_norm, q)


def row_step(
    vectors: tuple[Tensor, ...], tau: Tensor, n_neg: int, divisor: int, anchors: int, step: str, params: tuple[float, ...]
) -> Tensor:
    """The outputs (K, anchors) of `objectives.ROW_STEPS[step]`, in one launch."""
    function = _kernels().trace.row_function(step, params, len(vectors))
    return _kernels().rows.row_step(vectors, tau, n_neg, divisor, anchors, function, len(ROW_STEPS[step].outputs))
