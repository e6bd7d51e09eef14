"""The two operators `row_sums` and `pair_grad`, the O(n·D) steps around them, and the choice of the backend that serves them.

The schema is the contract of every backend; docs/design.md says what each argument means.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from .backend import blocked, cpu, cuda, triton
from .objectives import ROW_STEPS
from .objectives import kind as lookup

#: Sweep backends in the order in which "auto" tries them.
SWEEP_BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "cuda": cuda, "blocked": blocked}
#: Those that do not leave out pairs with equal ids.
WITHOUT_IDS = ("cuda",)
#: Every name that ``backend=`` accepts.
BACKEND_NAMES = ("auto", "reference", *SWEEP_BACKENDS)

_LIBRARY = torch.library.Library("alphacl_fast", "DEF")
_LIBRARY.define(
    "row_sums(Tensor f, Tensor? scale, Tensor? bias, Tensor center, Tensor? shift, Tensor? offset, Tensor tau, "
    "str kind, float[] params, str[] terms, int split, int partner, int anchors, float[] unit_tau, "
    "str precision, str backend, Tensor? ids=None) -> Tensor"
)
_LIBRARY.define(
    "pair_grad(Tensor f, Tensor? scale, Tensor? bias, Tensor center, Tensor gain, Tensor? shift, Tensor? offset, "
    "Tensor? level, Tensor tau, str kind, float[] params, str weight, str[] terms, int split, int partner, int lo, int hi, "
    "float[] unit_tau, str precision, str backend, Tensor? ids=None) -> (Tensor, Tensor, Tensor)"
)
# Only of backends that have them: normalisation before the sweeps and its derivative after them in one pass each,
_LIBRARY.define("unit_rows(Tensor z1, Tensor z2, str backend) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define("finish_rows(Tensor(a!) d, Tensor f, Tensor inv_norm, Tensor q, str backend) -> ()")
# and what is pointwise over the anchors between them.
_LIBRARY.define(
    "row_step(Tensor[] vectors, Tensor tau, int n_neg, int divisor, int anchors, str step, float[] params, str backend) "
    "-> Tensor"
)


def _span(kind: str, params: list[float], unit_tau: list[float]) -> tuple[float, ...]:
    """Range of log f over all t in [−1, 1], where rows are of unit length and τ is known on the host; else empty."""
    return _log_ends(kind, tuple(params), *unit_tau) if unit_tau else ()


@functools.lru_cache(maxsize=1024)
def _log_ends(kind: str, params: tuple[float, ...], tau: float) -> tuple[float, ...]:
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu")
    tau = torch.tensor(tau, dtype=torch.float64, device="cpu")
    return tuple(lookup(kind).f(ends, tau, params).tolist())


def _row_sums(
    f, scale, bias, center, shift, offset, tau, kind, params, terms, split, partner, anchors, unit_tau, precision, backend,
    ids=None,
):
    return SWEEP_BACKENDS[backend].row_sums(
        f, scale, bias, center, shift, offset, tau, kind, tuple(params), tuple(terms), split, partner, anchors,
        _span(kind, params, unit_tau), precision, *(() if ids is None else (ids,)),
    )  # fmt: skip


def _pair_grad(
    f, scale, bias, center, gain, shift, offset, level, tau, kind, params, weight, terms, split, partner, lo, hi, unit_tau,
    precision, backend, ids=None,
):
    return SWEEP_BACKENDS[backend].pair_grad(
        f, scale, bias, center, gain, shift, offset, level, tau, kind, tuple(params), weight, tuple(terms), split, partner, lo,
        hi, _span(kind, params, unit_tau), precision, *(() if ids is None else (ids,)),
    )  # fmt: skip


def _row_sums_fake(
    f, scale, bias, center, shift, offset, tau, kind, params, terms, split, partner, anchors, unit_tau, precision, backend,
    ids=None,
):
    return tau.new_empty((len(terms), anchors))


def _pair_grad_fake(
    f, scale, bias, center, gain, shift, offset, level, tau, kind, params, weight, terms, split, partner, lo, hi, unit_tau,
    precision, backend, ids=None,
):
    return (
        tau.new_empty((hi - lo, f.shape[1])),
        tau.new_empty((f.shape[0] if bias is not None else 0,)),
        tau.new_empty((len(terms), gain.shape[0] if terms else 0)),
    )


def _unit_rows(z1, z2, backend):
    return SWEEP_BACKENDS[backend].unit_rows(z1, z2)


def _unit_rows_fake(z1, z2, backend):
    n, dim = z1.shape
    wide = torch.float64 if z1.dtype == torch.float64 else torch.float32
    return z1.new_empty((2 * n, dim)), *(z1.new_empty((2 * n,), dtype=wide) for _ in range(2))


def _finish_rows(d, f, inv_norm, q, backend):
    SWEEP_BACKENDS[backend].finish_rows(d, f, inv_norm, q)


def _row_step(vectors, tau, n_neg, divisor, anchors, step, params, backend):
    return SWEEP_BACKENDS[backend].row_step(tuple(vectors), tau, n_neg, divisor, anchors, step, tuple(params))


def _row_step_fake(vectors, tau, n_neg, divisor, anchors, step, params, backend):
    return tau.new_empty((len(ROW_STEPS[step].outputs), anchors))


_LIBRARY.impl("unit_rows", _unit_rows, "CompositeExplicitAutograd")
_LIBRARY.impl("finish_rows", _finish_rows, "CompositeExplicitAutograd")
torch.library.register_fake("alphacl_fast::unit_rows", _unit_rows_fake, lib=_LIBRARY)
torch.library.register_fake("alphacl_fast::finish_rows", lambda d, f, inv_norm, q, backend: None, lib=_LIBRARY)
_LIBRARY.impl("row_step", _row_step, "CompositeExplicitAutograd")
torch.library.register_fake("alphacl_fast::row_step", _row_step_fake, lib=_LIBRARY)
_LIBRARY.impl("row_sums", _row_sums, "CompositeExplicitAutograd")
_LIBRARY.impl("pair_grad", _pair_grad, "CompositeExplicitAutograd")
torch.library.register_fake("alphacl_fast::row_sums", _row_sums_fake, lib=_LIBRARY)
torch.library.register_fake("alphacl_fast::pair_grad", _pair_grad_fake, lib=_LIBRARY)

row_sums = torch.ops.alphacl_fast.row_sums.default
pair_grad = torch.ops.alphacl_fast.pair_grad.default
unit_rows = torch.ops.alphacl_fast.unit_rows.default
finish_rows = torch.ops.alphacl_fast.finish_rows.default
row_step = torch.ops.alphacl_fast.row_step.default


def has_unit_rows(backend: str) -> bool:
    """Whether a backend has `unit_rows` and `finish_rows`."""
    return hasattr(SWEEP_BACKENDS[backend], "unit_rows")


def has_row_step(backend: str) -> bool:
    """Whether a backend has `row_step`."""
    return hasattr(SWEEP_BACKENDS[backend], "row_step")


def _unsupported(
    backend: str, device: torch.device, dtype: torch.dtype, precision: str | None, kind: str, ids: bool
) -> str | None:
    """Why a sweep backend cannot serve a call, or None."""
    if ids and backend in WITHOUT_IDS:
        return "ids: not in this backend; use triton or blocked"
    return SWEEP_BACKENDS[backend].unsupported(device, dtype, precision, kind)


@torch.compiler.assume_constant_result  # it looks for packages and devices, and runs a user's function
def choose(
    backend: str, device: torch.device, dtype: torch.dtype, precision: str | None, kind: str = "", ids: bool = False
) -> tuple[str, str]:
    """The backend for a call with a pair kind ("": no pairwise work), with or without ids, and why it was chosen.

    Raises:
        ValueError: no backend (or not the one asked for) can serve the call; the message says why.
    """
    if backend == "reference":
        reason = blocked.unsupported(device, dtype, precision, kind)  # the oracle multiplies through torch as well
        if reason:
            raise ValueError(f"backend 'reference' cannot serve this call: {reason}")
        return "reference", "as asked"
    if backend != "auto":
        reason = _unsupported(backend, device, dtype, precision, kind, ids)
        if reason:
            raise ValueError(f"backend {backend!r} cannot serve this call: {reason}")
        return backend, "as asked"
    reasons = []
    for name in SWEEP_BACKENDS:
        reason = _unsupported(name, device, dtype, precision, kind, ids)
        if reason is None and name in ("triton", "cuda") and device.type == "cpu":
            reason = "only interpreted here, which is slow: to be asked for by name"
        if reason is None:
            skipped = f"; skipped {'; '.join(reasons)}" if reasons else ""
            return name, f"first that serves {str(dtype).removeprefix('torch.')} on {device.type}{skipped}"
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no backend can serve this call: {'; '.join(reasons)}")


def backends() -> dict[str, str | None]:
    """Every backend of this installation: None where it can be used here, else the reason why not."""
    here = (torch.device("cpu"), torch.float32, None, "")
    return {"reference": None, **{name: module.unsupported(*here) for name, module in SWEEP_BACKENDS.items()}}
