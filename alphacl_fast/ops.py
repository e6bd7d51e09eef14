"""The two operators `row_sums` and `pair_grad`, the O(n·D) steps around them, and the choice of a
backend.

The schema follows from the bundles (`bundles`), which are flattened here and nowhere else;
docs/design.md says what each operand means.
"""

from __future__ import annotations

import functools
import typing
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .backend import blocked, cpu, cuda, gpu, triton
from .bundles import (
    NormalizedRows,
    PairFunction,
    Pairing,
    Rows,
    RowScalars,
    Term,
    Weight,
    empty_vectors,
)
from .objectives import ROW_STEPS, BoundKind, kind
from .tracing import constant_in_a_graph

#: Sweep backends in the order in which "auto" tries them, but for `FIRST`.
SWEEP_BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "triton": triton,
    "cuda": cuda,
    "blocked": blocked,
}
#: The backend that "auto" tries first for a compute capability and an arithmetic, for calls that
#: wgmma kernels can serve. The choice rests on counted instructions; nothing was measured on a
#: device.
FIRST: dict[tuple[tuple[int, int], str], str] = {
    ((9, 0), "bf16"): "cuda",
    ((9, 0), "fp16"): "cuda",
    ((9, 0), "tf32"): "cuda",
}
#: Every name that ``backend=`` accepts.
BACKEND_NAMES = ("auto", "reference", *SWEEP_BACKENDS)

# --- the schema -----------------------------------------------------------------------------------

_BUNDLES = (Rows, Pairing, PairFunction, RowScalars)
_TYPES = {
    bool: "bool",
    int | None: "int?",
    float | None: "float?",
    list[bool]: "bool[]",
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    str: "str",
    tuple[float, ...]: "float[]",
    tuple[float, float] | None: "float[]?",
}


def schema(bundle: type) -> str:
    """A bundle's fields as arguments of an operator."""
    hints = typing.get_type_hints(bundle)
    return ", ".join(f"{_TYPES[hints[field]]} {field}" for field in bundle._fields)


_OPERANDS = ", ".join(map(schema, _BUNDLES))


_ENDS = list(accumulate(len(bundle._fields) for bundle in _BUNDLES))
_MAKERS = [
    (bundle._make, slice(end - len(bundle._fields), end))
    for bundle, end in zip(_BUNDLES, _ENDS, strict=True)
]


def _unflatten(operands: tuple[Any, ...]) -> tuple[Rows, Pairing, PairFunction, RowScalars]:
    """The bundles of a flat list of operands; the dispatcher turns tuples into lists."""
    operands = [tuple(x) if type(x) is list else x for x in operands]
    return tuple([make(operands[where]) for make, where in _MAKERS])


#: Indexed by value: calling the enum is several times slower.
_TERMS, _WEIGHTS = tuple(Term), tuple(Weight)
_LIBRARY = torch.library.Library("alphacl_fast", "DEF")
#: What the operators do, by their names.
IMPLEMENTATIONS: dict[str, Any] = {}


def _define(schema: str, function: Any, fake: Any) -> Any:
    """Defines an operator; returns its overload, which is what the package calls."""
    name = schema.partition("(")[0]
    IMPLEMENTATIONS[f"alphacl_fast::{name}"] = function
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alphacl_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.alphacl_fast, name).default


def _as_terms(terms: list[int]) -> tuple[Term, ...]:
    return tuple([_TERMS[term] for term in terms])


# --- the sweeps -----------------------------------------------------------------------------------


def _row_sums(*arguments):
    *operands, terms, precision, backend = arguments
    sweep = SWEEP_BACKENDS[backend].row_sums
    return sweep(*_unflatten(operands), _as_terms(terms), precision)


def _row_sums_fake(*arguments):
    *operands, terms, _, _ = arguments
    _, pairing, function, _ = _unflatten(operands)
    return function.tau.new_empty((len(terms), pairing.anchors))


def _pair_grad(*arguments):
    *operands, weight, terms, low, high, precision, backend = arguments
    sweep = SWEEP_BACKENDS[backend].pair_grad
    return sweep(
        *_unflatten(operands),
        _WEIGHTS[weight],
        _as_terms(terms),
        (low, high),
        precision,
    )


def _pair_grad_fake(*arguments):
    *operands, _, terms, low, high, _, _ = arguments
    rows, pairing, function, _ = _unflatten(operands)
    n, dim = rows.f.shape
    return (
        function.tau.new_empty((high - low, dim)),
        function.tau.new_empty((n if rows.bias is not None else 0,)),
        function.tau.new_empty((len(terms), pairing.anchors if terms else 0)),
    )


ROW_SUMS = _define(
    f"row_sums({_OPERANDS}, int[] terms, str precision, str backend) -> Tensor",
    _row_sums,
    _row_sums_fake,
)
PAIR_GRAD = _define(
    f"pair_grad({_OPERANDS}, int weight, int[] terms, int low, int high, str precision, str "
    "backend)"
    " -> (Tensor, Tensor, Tensor)",
    _pair_grad,
    _pair_grad_fake,
)


def row_sums(
    rows: Rows,
    pairing: Pairing,
    function: PairFunction,
    scalars: RowScalars,
    terms: tuple[Term, ...],
    precision: str,
    backend: str,
) -> Tensor:
    """(len(terms), anchors): every term summed over the negatives of every anchor."""
    return ROW_SUMS(*rows, *pairing, *function, *scalars, terms, precision, backend)


def pair_grad(
    rows: Rows,
    pairing: Pairing,
    function: PairFunction,
    scalars: RowScalars,
    weight: Weight,
    terms: tuple[Term, ...],
    wanted: tuple[int, int],
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient sweep.

    Returns:
        df (high − low, D), Σ_j (g_ij + g_ji)·F_j of the rows ``wanted`` = (low, high); (n,) sums
        of the weights g_ij + g_ji where rows have a bias, else (0,); (len(terms), anchors) sums as
        of `row_sums`.
    """
    return PAIR_GRAD(
        *rows, *pairing, *function, *scalars, weight, terms, *wanted, precision, backend
    )


# --- O(n·D) steps, for backends that have them ----------------------------------------------------


#: z1, z2 (N, D) → `bundles.NormalizedRows` of the stacked views.
unit_rows = _define(
    "unit_rows(Tensor z1, Tensor z2, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda z1, z2, backend: tuple(SWEEP_BACKENDS[backend].unit_rows(z1, z2)),
    lambda z1, z2, backend: tuple(NormalizedRows.empty(z1)),
)
#: d (2N, D) ← the gradient in z: adds the positives' part, q (anchors,), and differentiates the
#: normalisation.
finish_rows = _define(
    "finish_rows(Tensor(a!) d, Tensor f, Tensor? scale, Tensor inv_norm, Tensor q, str backend) "
    "-> ()",
    lambda d, f, scale, inv_norm, q, backend: SWEEP_BACKENDS[backend].finish_rows(
        d, f, scale, inv_norm, q
    ),
    lambda d, f, scale, inv_norm, q, backend: None,
)
#: The outputs (K, anchors) of a row step of `objectives`, for vectors (anchors,).
row_step = _define(
    "row_step(Tensor[] vectors, Tensor tau, int n_neg, int divisor, int anchors, str step, "
    "float[] params, "
    "str backend) -> Tensor",
    lambda vectors, tau, n_neg, divisor, anchors, step, params, backend: SWEEP_BACKENDS[
        backend
    ].row_step(tuple(vectors), tau, n_neg, divisor, anchors, step, tuple(params)),
    lambda vectors, tau, n_neg, divisor, anchors, step, params, backend: empty_vectors(
        tau, len(ROW_STEPS[step].outputs), anchors
    ),
)


def has(backend: str, step: str) -> bool:
    """Whether a backend has one of the steps unit_rows (with finish_rows) and row_step."""
    return hasattr(SWEEP_BACKENDS[backend], step)


# --- operands -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def log_range(name: str, params: tuple[float, ...], temperature: float) -> tuple[float, float]:
    """The bounds of log f over t in [−1, 1], where every similarity of unit rows lies."""
    tau = torch.tensor(temperature, dtype=torch.float64, device="cpu")
    return range_at(kind(name).bind(params), tau)


def range_at(bound: BoundKind, tau: Tensor) -> tuple[float, float]:
    """As `log_range`; ``tau`` () is in float64, on the CPU."""
    low, high = bound.f(_ENDS, tau).tolist()
    return low, high


_ENDS = torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu")


# --- the choice of a backend ----------------------------------------------------------------------


def unsupported(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    precision: str | None,
    pair_kind: str = "",
    operands: tuple[str, ...] = (),
) -> str | None:
    """Why a sweep backend cannot serve a call, or None. ``operands``: the optional ones that the
    call has.
    """
    module = SWEEP_BACKENDS[backend]
    missing = set(operands) - module.OPTIONAL_OPERANDS
    if missing:
        able = [
            name
            for name, other in SWEEP_BACKENDS.items()
            if other.OPTIONAL_OPERANDS.issuperset(operands)
        ]
        return f"{', '.join(sorted(missing))}: not in this backend; use {' or '.join(able)}"
    return module.unsupported(device, dtype, precision, pair_kind)


# it reads torch's setting, which a compiled graph keeps
@constant_in_a_graph
def mode_of(dtype: torch.dtype, precision: str | None, device: torch.device) -> str:
    """The arithmetic in which a GPU backend serves a call: `gpu.Arithmetic.mode`."""
    return gpu.arithmetic(dtype, precision or "", device).mode


def order(device: torch.device, mode: str) -> tuple[str, ...]:
    """The sweep backends in the order in which "auto" tries them for a call of wgmma kernels, whose
    arithmetic is ``mode``.
    """
    first = None
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        first = FIRST.get((torch.cuda.get_device_capability(device), mode))
    return tuple(sorted(SWEEP_BACKENDS, key=lambda name: name != first))


# it looks for packages and devices, and runs a user's function
@constant_in_a_graph
def choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    precision: str | None,
    pair_kind: str = "",
    operands: tuple[str, ...] = (),
    wgmma: bool = False,
) -> tuple[str, str]:
    """The backend for a call with a pair kind ("": no pairwise work) and optional operands, and why
    it was chosen. ``wgmma``: the kernels of Hopper's warpgroups can serve the call.

    Raises:
        ValueError: no backend (or not the one asked for) can serve the call; the message says why.
    """
    if backend == "reference":
        # the oracle multiplies through torch as well
        reason = blocked.unsupported(device, dtype, precision, pair_kind)
        if reason:
            raise ValueError(f"backend 'reference' cannot serve this call: {reason}")
        return "reference", "as asked"
    if backend != "auto":
        reason = unsupported(backend, device, dtype, precision, pair_kind, operands)
        if reason:
            raise ValueError(f"backend {backend!r} cannot serve this call: {reason}")
        return backend, "as asked"
    reasons = []
    ordered = order(device, mode_of(dtype, precision, device)) if wgmma else SWEEP_BACKENDS
    for name in ordered:
        reason = unsupported(name, device, dtype, precision, pair_kind, operands)
        if reason is None and name in ("triton", "cuda") and device.type == "cpu":
            reason = "only interpreted here, which is slow: to be asked for by name"
        if reason is None:
            skipped = f"; skipped {'; '.join(reasons)}" if reasons else ""
            return (
                name,
                f"first that serves {str(dtype).removeprefix('torch.')} on {device.type}{skipped}",
            )
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no backend can serve this call: {'; '.join(reasons)}")


def backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend: None if it can be used on a device, else the reason why not."""
    here = (torch.device(device), torch.float32, None, "")
    return {
        "reference": None,
        **{name: module.unsupported(*here) for name, module in SWEEP_BACKENDS.items()},
    }
