"""The two sweeps as Triton kernels (kernels/sweeps.py): all pair kinds, users' own too; from sm_80
on.

`gpu` holds the host algorithm; here are the choice of tiles and the launches. Triton is imported
with the first call. With TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly: so they
are tested.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..bundles import Form, NormalizedRows, Term, Weight
from ..objectives import KINDS, ROW_STEPS
from ..objectives import kind as lookup
from . import gpu

#: Optional operands that this backend serves.
OPTIONAL_OPERANDS = {"ids", "max_gap"}
#: The first version of Triton whose functions take and return named tuples as the kernels do.
OLDEST = (3, 6)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _kernels() -> SimpleNamespace:
    """Triton and the kernel modules."""
    import triton.language as tl

    from alphacl_fast.kernels import config, rows, start, sweeps, trace

    return SimpleNamespace(tl=tl, config=config, rows=rows, start=start, sweeps=sweeps, trace=trace)


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton

        if tuple(int(x) for x in re.findall(r"\d+", triton.__version__)[:2]) < OLDEST:
            return f"needs triton {'.'.join(map(str, OLDEST))}, found {triton.__version__}"
        _kernels()
    except Exception as error:  # whatever an optional dependency's import raises
        return f"triton cannot be imported: {error}"
    return None


def unsupported(
    device: torch.device, dtype: torch.dtype, precision: str | None, kind: str
) -> str | None:
    """Why this backend cannot serve a call, or None."""
    if device.type == "cpu":
        if not (interpreted() or gpu.pretended):
            return "runs on GPUs, not cpu (except in the interpreter, TRITON_INTERPRET=1)"
    elif device.type != "cuda":
        return f"runs on GPUs, not {device.type}"
    elif not torch.cuda.is_available():
        return "needs a GPU, found none"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"needs compute capability 8.0, not {capability}"
    users = bool(kind) and kind not in KINDS
    return _missing() or (_kernels().trace.problem(kind) if users else None)


# --- the sweeps -----------------------------------------------------------------------------------


def tile(sweep: str, mode: str, dim: int, rows: int, device: torch.device):
    """`kernels.config.Tile` of a call."""
    return _kernels().config.choose(sweep, mode, dim, rows, device, gpu.capability_of(device))


def configuration(dtype: torch.dtype, dim: int, rows: int, device: torch.device) -> dict[str, dict]:
    """The tiles of both sweeps for a size, for records of measurements."""
    mode = gpu.arithmetic(dtype, "", device).mode
    return {
        sweep: asdict(tile(sweep, mode, dim, rows, device)) for sweep in ("row_sums", "pair_grad")
    }


class _Sweep(gpu.Sweep):
    backend = "triton"

    def __init__(self, *operands: Any) -> None:
        super().__init__(*operands)
        if self.arithmetic.mode == "tf32":
            self.f = _kernels().rows.rounded_rows(self.f)
        self.shift = ctypes.c_float(self.shift).value  # as a kernel receives it
        self.kernel = "row_sums" if self.weight is None else "pair_grad"
        name = f"{self.kernel}_plain" if self.form == Form.PLAIN else self.kernel
        if name == "row_sums" and len(self.terms) > 1:
            name = "row_sums_moments"
        if self.weight is not None and self.pairing.ids is not None:
            name += "_ids"
        self.tile = tile(name, self.arithmetic.mode, self.dim, self.n, self.f.device)
        self.tile_rows, self.tile_cols = self.tile.rows, self.tile.cols
        self.whole, self.symmetric = self.dim <= self.tile.features, self.tile.symmetric
        self.resident = self.tile.resident
        self.traced = _kernels().trace.pair_functions(self.function.kind, self.function.params)

    def scale_weights(self) -> None:
        if self.form == Form.CONSTANT or self.arithmetic.rounds:
            shift = self.scalars.shift if self.form == Form.CONSTANT else None
            weight, largest = _kernels().rows.scaled_weights(
                self.scalars.row_weight, shift, self.shift
            )
            self.unit = largest if self.arithmetic.rounds else None
            if self.form == Form.CONSTANT:
                self.scalars = self.scalars._replace(row_weight=weight, shift=None)

    def reduce(self, workspace: Tensor, out: Tensor) -> None:
        _kernels().rows.reduce_splits(workspace, out, self.form.name, self.shift)

    def launch(self, launch: gpu.Launch) -> None:
        kernels, region = _kernels().sweeps, launch.region
        vectors = kernels.Vectors(*self.vectors(kernels.Vectors._fields))
        sides = region.n_rows, region.n_cols, region.row_start, region.col_start
        place = self.f.stride(0), *sides, self.n // 2, self.pairing.anchors
        if self.weight is None:
            arguments = launch.sums, *place, launch.begin, launch.end, launch.column_slice
        else:
            low, high = launch.wanted
            outputs = kernels.Outputs(launch.df, launch.weight_sums, launch.sums, launch.weights)
            arguments = self.unit, outputs, *place, self.n, high - low, low, launch.first_block
        options = {} if self.tile.max_registers is None else {"maxnreg": self.tile.max_registers}
        _kernels().start.launch(
            getattr(kernels, self.kernel), (launch.blocks, launch.splits), self.f,
            self.f, vectors, self.tau, *arguments, self.shift, self.static(launch),
            num_warps=self.tile.warps, num_stages=self.tile.stages, **options,
        )  # fmt: skip

    def static(self, launch: gpu.Launch):
        """`kernels.sweeps.Static` of a launch; unused derivatives are None."""
        tl, arithmetic, form, region = _kernels().tl, self.arithmetic, self.form, launch.region
        # The interpreter has no TF32, and multiplies every dtype but bfloat16 correctly.
        if interpreted():
            arithmetic = arithmetic._replace(similarities="ieee", products="ieee")
        precise = {
            torch.float32: tl.float32,
            torch.float64: tl.float64,
            torch.bfloat16: tl.bfloat16,
        }
        kind = lookup(self.function.kind)
        terms = set(launch.terms)
        needs_f = (
            kind.log
            or terms & {Term.F, Term.F_MOMENT}
            or self.weight in (Weight.F, Weight.F_PLUS_DF)
        )
        needs_df = terms & {Term.DF, Term.DF_MOMENT} or self.weight in (Weight.DF, Weight.F_PLUS_DF)
        return _kernels().sweeps.Static(
            F=self.traced.f if needs_f and form != Form.T_MAX else None,
            DF=self.traced.df if needs_df and form == Form.PLAIN else None,
            DTAU=self.traced.dtau if Term.DTAU in terms else None,
            LOG=kind.log and form != Form.T_MAX, LINEAR=kind.linear_in_t, FORM=form.name,
            TERMS=tuple(term.name for term in launch.terms), D=self.dim,
            BLOCK_M=self.tile.rows, BLOCK_N=self.tile.cols, BLOCK_D=self.tile.features,
            ACC=precise[self.tau.dtype], PRECISION=arithmetic.similarities,
            UPCAST=interpreted() and self.f.dtype == torch.bfloat16, EXCLUDE=region.exclude,
            TRIANGLE=region.triangle, SYMMETRIC=launch.symmetric, ROWS_PAIRED=region.rows_paired,
            COLS_PAIRED=region.cols_paired, ROWS_ANCHOR=region.rows_anchor,
            COLS_ANCHOR=region.cols_anchor, GRADIENT=launch.gradient.name,
            WEIGHT=self.weight.name if self.weight is not None else "",
            W_TYPE=precise[arithmetic.weights], W_PRECISION=arithmetic.products,
            IDS=self.pairing.ids is not None, LIMITED=self.pairing.largest_t is not None,
            WEIGHTED=self.pairing.largest_t is not None and self.pairing.weighted,
        )  # fmt: skip


#: The two sweeps, with the signatures that every backend has (docs/extending.md).
row_sums = functools.partial(gpu.row_sums, _Sweep)
pair_grad = functools.partial(gpu.pair_grad, _Sweep)


# --- rows -----------------------------------------------------------------------------------------


def unit_rows(z1: Tensor, z2: Tensor) -> NormalizedRows:
    """The stacked rows of a cosine loss, in one launch."""
    return _kernels().rows.unit_rows(z1, z2)


def finish_rows(d: Tensor, f: Tensor, scale: Tensor | None, inv_norm: Tensor, q: Tensor) -> None:
    """d (2N, D) ← the gradient in z, from Σ_j (g_ij + g_ji)·F_j and q (N,) or (2N,)."""
    _kernels().rows.finish_rows(d, f, scale, inv_norm, q)


def row_step(
    vectors: tuple[Tensor, ...],
    tau: Tensor,
    n_neg: int,
    divisor: int,
    anchors: int,
    step: str,
    params: tuple[float, ...],
) -> Tensor:
    """The outputs (K, anchors) of `objectives.ROW_STEPS[step]`, in one launch."""
    function = _kernels().trace.row_function(step, params, len(vectors))
    return _kernels().rows.row_step(
        vectors, tau, n_neg, divisor, anchors, function, len(ROW_STEPS[step].outputs)
    )
