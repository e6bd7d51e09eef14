"""The α-CL family: the one place where its formulas live.

A loss is ``L = reduce_i L_i`` over anchors i. With ``t_ij`` the similarity of a pair, ``t⁺_i`` that of the positive pair
and ``d²_ij = c − t_ij`` (c = 1 for cosine and dot, 0 for euclidean, where t = −½‖·‖²), ``Δ_ij = t_ij − t⁺_i`` and

* `PairLoss`    L_i = φ(Σ_j ψ(Δ_ij))                                       [arXiv:2201.12680, the φ/ψ family]
* `PairWeight`  L_i = Σ_j α_ij Δ_ij,  α_ij = w(d²_ij)/Z_i or w(d²_ij)      [ibid., pair-weighted CL]
* `MinPlayer`   L_i = Σ_j α_ij Δ_ij,  α_i = argmin_{α≥0, Σα=1} Σ_j α_j d²_ij − R(α), so α_ij = h(μ_i − d²_ij)
* `ClosedForm`  constant α: sums over pairs collapse to O(n·D)

Every member is served by two sweeps over the pairs, `row_sums` and `pair_grad` (docs/design.md). A sweep knows a pair
function only as a `PairKind`; what comes between the sweeps is O(n): the ``solve`` methods below, made of row steps.

A `PairKind` maps a tensor x elementwise, given the temperature τ (0-dim tensor) and static ``params``:

* linear kinds: ``f(x)``, ``df = ∂f/∂x``, ``dtau = ∂f/∂τ`` with ``x = (t − shift_i) + offset_i``;
* log kinds: the same three of ``log f`` with x = t. They are summed in the log domain, because exp(Δ/τ) overflows
  float64 at τ = 1e-3 and a normalised weight underflows to 0/0 at τ = 5e-3.

A `RowStep` is pointwise over the anchors in the same way, so that a backend may make one launch of it.
"""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .bundles import Term

__all__ = [
    "ClosedForm",
    "MinPlayer",
    "Objective",
    "PairKind",
    "PairLoss",
    "PairWeight",
    "make",
    "names",
]


# --- pair kinds -----------------------------------------------------------------------------------------------------


class PairKind(NamedTuple):
    """A pointwise function of a pair and its derivatives; ``f(x, tau, params)`` etc. map a tensor to one of its shape.

    For ``log`` kinds the three functions are those of log f. ``linear_in_t`` marks log f(t) = t/τ, whose scale a backend
    may fold into the matrix product.
    """

    f: Callable[[Tensor, Tensor, tuple[float, ...]], Tensor]
    df: Callable[[Tensor, Tensor, tuple[float, ...]], Tensor]
    dtau: Callable[[Tensor, Tensor, tuple[float, ...]], Tensor] | None
    log: bool
    linear_in_t: bool = False


def _power(d: Tensor, q: float) -> Tensor:
    """max(d, 0)^q, with derivative 0 at d ≤ 0 for every q (autograd would give inf or NaN there for q < 1)."""
    if q == 1.0:
        return torch.relu(d)
    if q == 2.0:
        return torch.relu(d).square()
    if q > 1.0:
        return torch.relu(d).pow(q)
    return torch.where(d > 0, d.clamp(min=torch.finfo(d.dtype).tiny).pow(q), 0.0)


def _dpower(d: Tensor, q: float) -> Tensor:
    """Derivative of `_power`: q·d^{q−1} for d > 0, else 0."""
    if q == 1.0:
        return (d > 0).to(d.dtype)
    if q == 2.0:
        return 2 * torch.relu(d)
    return torch.where(d > 0, q * d.clamp(min=torch.finfo(d.dtype).tiny).pow(q - 1), 0.0)


def _exp_kind() -> PairKind:  # f = exp(t/τ), of the exponential ψ: the rest of exp(Δ/τ + margin) is constant in a row
    return PairKind(
        f=lambda t, tau, p: t / tau,
        df=lambda t, tau, p: torch.ones_like(t) / tau,
        dtau=lambda t, tau, p: t / -tau.square(),
        log=True,
        linear_in_t=True,
    )


def _gibbs_kind() -> PairKind:  # f = exp(−d²/τ), d² = c − t of either sign, params (c,)
    return PairKind(
        f=lambda t, tau, p: (t - p[0]) / tau,
        df=lambda t, tau, p: torch.ones_like(t) / tau,
        dtau=lambda t, tau, p: (p[0] - t) / tau.square(),
        log=True,
    )


def _power_kind() -> PairKind:  # f = exp(−max(d², 0)^q/τ), d² = c − t, params (c, q)
    return PairKind(
        f=lambda t, tau, p: _power(p[0] - t, p[1]) / -tau,
        df=lambda t, tau, p: _dpower(p[0] - t, p[1]) / tau,
        dtau=lambda t, tau, p: _power(p[0] - t, p[1]) / tau.square(),
        log=True,
    )


def _inverse_kind() -> PairKind:  # f = (max(d², 0)^q + τ)^{−k}, d² = c − t, params (c, q, k)
    return PairKind(
        f=lambda t, tau, p: (_power(p[0] - t, p[1]) + tau).log() * -p[2],
        df=lambda t, tau, p: _dpower(p[0] - t, p[1]) / (_power(p[0] - t, p[1]) + tau) * p[2],
        dtau=lambda t, tau, p: -p[2] / (_power(p[0] - t, p[1]) + tau),
        log=True,
    )


def _hinge_kind() -> PairKind:  # f = max(x + m, 0), params (m,); the kink has derivative 0, as relu
    return PairKind(
        f=lambda x, tau, p: torch.relu(x + p[0]),
        df=lambda x, tau, p: (x + p[0] > 0).to(x.dtype),
        dtau=None,
        log=False,
    )


def _sigmoid_kind() -> PairKind:  # f = sigmoid(s·x), params (s,)
    def df(x: Tensor, tau: Tensor, p: tuple[float, ...]) -> Tensor:
        y = torch.sigmoid(p[0] * x)
        return p[0] * y * (1 - y)

    return PairKind(f=lambda x, tau, p: torch.sigmoid(p[0] * x), df=df, dtau=None, log=False)


def _square_kind() -> PairKind:  # h = max(x, 0)/τ
    return PairKind(
        f=lambda x, tau, p: torch.relu(x) / tau,
        df=lambda x, tau, p: (x > 0).to(x.dtype) / tau,
        dtau=lambda x, tau, p: torch.relu(x) / -tau.square(),
        log=False,
    )


def _gamma_kind() -> PairKind:  # h = (τ/(−x))^{1/γ} for x < 0, params (γ,)
    def h(x: Tensor, tau: Tensor, p: tuple[float, ...]) -> Tensor:
        return (tau / -x).pow(1 / p[0])

    return PairKind(
        f=h,
        df=lambda x, tau, p: h(x, tau, p) / (-p[0] * x),
        dtau=lambda x, tau, p: h(x, tau, p) / (p[0] * tau),
        log=False,
    )


KINDS: dict[str, PairKind] = {
    "exp": _exp_kind(),
    "gibbs": _gibbs_kind(),
    "power": _power_kind(),
    "inverse": _inverse_kind(),
    "hinge": _hinge_kind(),
    "sigmoid": _sigmoid_kind(),
    "square": _square_kind(),
    "gamma": _gamma_kind(),
}
_CUSTOM: weakref.WeakValueDictionary[str, _CustomFunction] = weakref.WeakValueDictionary()
_CUSTOM_IDS = itertools.count()
_OBJECTIVES: weakref.WeakValueDictionary[str, Objective] = weakref.WeakValueDictionary()


def kind(name: str) -> PairKind:
    """The pair kind registered under ``name`` (a key of `KINDS`, or the key of a user's function)."""
    if name in KINDS:
        return KINDS[name]
    return _CUSTOM[name].kind


def registered(key: str) -> Objective:
    """The living objective with this `Objective.key`."""
    return _OBJECTIVES[key]


class _CustomFunction:
    """A user's pointwise function as a linear pair kind; its derivative by automatic differentiation.

    ``of_distance`` functions are applied to d² = params[0] − x. The object registers itself under `key`, which is what
    crosses the operator schema; the objective that owns it keeps it alive.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], name: str, of_distance: bool = False) -> None:
        if not callable(fn):
            raise TypeError(f"{name} must be a function of one tensor, got {type(fn).__name__}")
        self.fn, self.name, self.of_distance = fn, name, of_distance
        self.key = f"custom:{next(_CUSTOM_IDS)}"
        _CUSTOM[self.key] = self
        sign = -1.0 if of_distance else 1.0
        self.kind = PairKind(
            f=lambda x, tau, p: self(p[0] - x if of_distance else x),
            df=lambda x, tau, p: self.derivative(p[0] - x if of_distance else x) * sign,
            dtau=None,
            log=False,
        )
        self.check()

    def check(self) -> None:
        """Raises ValueError unless the function is elementwise, differentiable and closes over no parameter."""
        probe = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).view(2, 3)
        try:
            with torch.enable_grad():
                whole = self(probe.clone())
            parts = [torch.cat([self(part.clone()) for part in probe.split(1, dim)], dim) for dim in (0, 1)]
            self.derivative(probe)
        except RuntimeError as error:
            raise ValueError(f"{self.name} must be a differentiable function of a tensor on any device: {error}") from error
        if not all(torch.allclose(whole, p, rtol=1e-9, atol=1e-12, equal_nan=True) for p in parts):
            raise ValueError(f"{self.name} must be elementwise, got one whose values depend on the other elements")

    def __call__(self, x: Tensor) -> Tensor:
        y = self.fn(x)
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            got = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"{self.name} must map a tensor elementwise to {tuple(x.shape)} {x.dtype}, got {got}")
        if y.requires_grad and not x.requires_grad:
            raise ValueError(
                f"{self.name} must be a function of its argument alone, got one that closes over a tensor which "
                "requires grad (that tensor would silently receive no gradient)"
            )
        return y

    def derivative(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self(x)
            if not y.requires_grad:
                return torch.zeros_like(x)
            (dy,) = torch.autograd.grad(y.sum(), x, allow_unused=True, materialize_grads=True)
        return dy

    def __reduce__(self) -> tuple[Any, ...]:
        return _CustomFunction, (self.fn, self.name, self.of_distance)

    def __deepcopy__(self, memo: dict[int, Any]) -> _CustomFunction:
        return self


# --- what an objective sees of a batch, and what it says of its rows -----------------------------------------------


class Pairs(Protocol):
    """A batch as the objectives see it. Vectors have one entry per anchor, in the accumulation dtype."""

    pos: Tensor  #: (anchors,) t⁺_i
    tau: Tensor  #: () temperature
    n_neg: int | Tensor  #: |Neg(i)|, the same for every anchor, or (anchors,), at least 1, where ids leave out some pairs
    most_neg: int  #: |Neg(i)| where ids leave out nothing, a bound of the others
    divisor: int  #: of the sum of all L_i: the loss, where it is one number

    def sums(
        self,
        terms: tuple[Term, ...],
        *,
        shift: Tensor | None = None,
        argument_offset: Tensor | None = None,
        moment_origin: Tensor | None = None,
    ) -> Tensor:
        """One `row_sums` sweep: (len(terms), anchors); moments are taken of t − moment_origin, by default of Δ."""
        ...

    def step(self, name: str, *vectors: Tensor, params: tuple[float, ...] = ()) -> dict[str, Tensor]:
        """The outputs (anchors,) of `ROW_STEPS[name]`; vectors are (anchors,), or expanded to it."""
        ...

    def mean_negative(self) -> Tensor:
        """(anchors,) mean of t_ij over the negatives, in O(n·D)."""
        ...

    def moments(self) -> tuple[Tensor, Tensor]:
        """(anchors,) means of t_ij and t_ij², in O(n·D²), over the negatives and those that ids leave out."""
        ...

    def all_done(self, done: Tensor) -> bool:
        """Whether ``done`` (anchors,) holds for every anchor of the batch; decides for all processes that share one."""
        ...


@dataclass
class RowSolution:
    """Row scalars: what `pair_grad` needs. ``row_weight``, ``mass`` and ``dtau`` are divided by `Pairs.divisor`.

    g_ij = gain_i·(df | f | f + df·(t_ij − center_i − level_i)),  q_i = mass_i = −∂L/∂t⁺_i.
    """

    row_weight: Tensor
    shift: Tensor | None = None
    argument_offset: Tensor | None = None
    baseline: Tensor | None = None
    moment_origin: Tensor | None = None  #: of the moments; None is t⁺
    mass: Tensor | None = None  #: Σ_j α_ij
    loss: Tensor | None = None  #: L_i
    dtau: Tensor | None = None  #: ∂L_i/∂τ


class Objective:
    """Base of the family; use the named functions of this module or `make`.

    Attributes:
        name: as the user gave it, for ``repr`` and checkpoints.
        options: likewise.
        uses_temperature: whether τ enters the loss value.
        tau_gradient: where ∂L_i/∂τ comes from: ``"rows"`` (`solve`), ``"pairs"`` (the term "dtau" of `pair_grad`) or None
            (there is no gradient).
        one_sweep: row_weight, shift, argument_offset and baseline need no sum over pairs, so `pair_grad` alone serves loss and gradient.
        derivative: `pair_grad` weighs pairs by df instead of f.
    """

    name: str
    options: dict[str, Any]
    kind: str = ""
    uses_temperature = False
    tau_gradient: str | None = None
    tau_in_front = False
    one_sweep = False
    derivative = False
    terms: tuple[Term, ...] = ()
    key: str  # under which `registered` finds this object while it lives; what crosses an operator schema

    def __init_subclass__(cls) -> None:
        own = [*inspect.signature(cls.__init__).parameters.values()]
        cls.__signature__ = inspect.Signature(own[1:])  # which __new__ hides from help()

    def __new__(cls, *args: Any, **options: Any) -> Objective:
        self = super().__new__(cls)
        self.key = f"objective:{next(_CUSTOM_IDS)}"
        _OBJECTIVES[self.key] = self
        return self

    def params(self, c: float) -> tuple[float, ...]:
        """Static parameters of the pair kind, given d² = c − t."""
        return ()

    def kind_tau(self, tau: Tensor) -> Tensor:
        """The temperature that the pair kind sees."""
        return tau

    def check(self) -> None:
        """Raises ValueError on what only a call can show; constructors check the rest."""

    def solve(self, p: Pairs, learn_tau: bool) -> RowSolution:
        """All sweeps but `pair_grad`."""
        rows = self.start(p)
        return self.finish(p, rows, p.sums(self.terms, shift=rows.shift))

    def start(self, p: Pairs) -> RowSolution:
        """Row scalars of a `one_sweep` objective."""
        raise NotImplementedError

    def finish(self, p: Pairs, rows: RowSolution, sums: Tensor) -> RowSolution:
        """Adds ``mass`` and ``loss`` from the sums over `terms`."""
        raise NotImplementedError

    def uniform_weight(self, p: Pairs) -> Tensor:
        """The row_weight of rows whose pairs weigh as the pair kind says."""
        return torch.full_like(p.pos, 1 / p.divisor)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={_show(v)}' for k, v in self.options.items())})"


def _show(value: Any) -> str:
    return getattr(value, "__name__", repr(value)) if callable(value) else repr(value)


class BatchNumbers(NamedTuple):
    """Numbers that all rows share, of `Pairs`; a backend that compiles a row step gives 0-dim tensors for all of them."""

    tau: Tensor  # as the pair kind sees it
    n_neg: int | Tensor  # (anchors,) with ids, which no backend's row step is called with
    divisor: int | Tensor


class RowStep(NamedTuple):
    """A pointwise function of row vectors, ``function(vectors, scalars, params)`` → one vector for each of ``outputs``."""

    function: Callable[[tuple[Tensor, ...], BatchNumbers, tuple[float, ...]], tuple[Tensor, ...]]
    outputs: tuple[str, ...]  # fields of `RowSolution`, or what the iteration of a min player goes by


#: The row steps by the name under which they cross the operator schema; each stands beside the objective that it is of.
ROW_STEPS: dict[str, RowStep] = {}


# --- (a) φ/ψ losses ---------------------------------------------------------------------------------------------------


class PairLoss(Objective):
    """``L_i = φ(Σ_j ψ(Δ_ij))`` from plain Python functions of a tensor; derivatives by automatic differentiation.

    Args:
        phi: elementwise function of ξ, (n,) → (n,); None is the identity, which saves one of the two sweeps.
        psi: elementwise function of Δ, (r, c) → (r, c), any shape.

    Raises:
        TypeError, ValueError: not callable, not elementwise, or closing over a tensor that requires grad.

    Source: arXiv:2201.12680; α_ij = φ′(ξ_i)·ψ′(Δ_ij) is its Theorem 1.
    """

    derivative = True

    def __init__(self, phi: Callable[[Tensor], Tensor] | None, psi: Callable[[Tensor], Tensor]) -> None:
        self.name, self.options = "PairLoss", {"phi": phi, "psi": psi}
        self._phi = None if phi is None else _CustomFunction(phi, "phi")
        self._psi = _CustomFunction(psi, "psi")
        self.kind = self._psi.key
        self.one_sweep = phi is None
        self.terms = (Term.F, Term.DF)

    def check(self) -> None:
        self._psi.check()
        if self._phi is not None:
            self._phi.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> PairLoss:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return PairLoss, (self.options["phi"], self.options["psi"])

    def phi(self, xi: Tensor, tau: Tensor) -> Tensor:
        return xi if self._phi is None else self._phi(xi)

    def dphi(self, xi: Tensor, tau: Tensor) -> Tensor:
        return torch.ones_like(xi) if self._phi is None else self._phi.derivative(xi)

    def start(self, p: Pairs) -> RowSolution:
        return RowSolution(row_weight=self.uniform_weight(p), shift=p.pos)

    def finish(self, p: Pairs, rows: RowSolution, sums: Tensor) -> RowSolution:
        xi, dxi = sums
        row_weight = rows.row_weight if self._phi is None else self.dphi(xi, p.tau) / p.divisor
        return replace(rows, row_weight=row_weight, mass=row_weight * dxi, loss=self.phi(xi, p.tau))


class _LinearPairLoss(PairLoss):
    """Built-in ψ that is summed as it is, with φ = identity."""

    one_sweep = True
    terms = (Term.F, Term.DF)
    _phi = None

    def check(self) -> None:
        pass

    def __init__(self, name: str, options: dict[str, Any], kind: str, parameter: float) -> None:
        self.name, self.options, self.kind, self._parameter = name, options, kind, parameter

    def __reduce__(self) -> tuple[Any, ...]:
        return make, (self.name, self.options)

    def params(self, c: float) -> tuple[float, ...]:
        return (self._parameter,)


@dataclass(frozen=True)
class _Outer:
    """φ of an exponential kind as a function of ℓ = log ξ, its derivative in ℓ, and φ − φ′·ℓ without cancellation."""

    phi: Callable[[Tensor], Tensor]
    dphi: Callable[[Tensor], Tensor]
    legendre: Callable[[Tensor], Tensor]


def _outer_log_plus(epsilon: float) -> _Outer:  # φ = log(ε + x)
    if epsilon == 0.0:
        return _Outer(lambda ell: ell, torch.ones_like, torch.zeros_like)
    shift = math.log(epsilon)

    def legendre(ell: Tensor) -> Tensor:
        u = (ell - shift).abs()
        return torch.log1p((-u).exp()) + u * torch.sigmoid(-u) + shift * torch.sigmoid(shift - ell)

    # torch's softplus would turn linear at 20, an error of 2e-9
    return _Outer(
        lambda ell: torch.logaddexp(ell, torch.full_like(ell, shift)), lambda ell: torch.sigmoid(ell - shift), legendre
    )


_OUTERS: dict[str, Callable[[float], _Outer]] = {
    "log(ε + x)": _outer_log_plus,
    "max(log x, 0)²": lambda epsilon: _Outer(
        lambda ell: torch.relu(ell).square(), lambda ell: 2 * torch.relu(ell), lambda ell: -torch.relu(ell).square()
    ),
}


def _phi(outer: str, ell: Tensor, tau: Tensor, params: tuple[float, ...]) -> Tensor:  # params (ε, margin, τ in front)
    loss = _OUTERS[outer](params[0]).phi(ell)
    return loss * tau if params[2] else loss


def _dphi(outer: str, ell: Tensor, tau: Tensor, params: tuple[float, ...]) -> Tensor:
    slope = _OUTERS[outer](params[0]).dphi(ell)
    return slope * tau if params[2] else slope


def _add_exp_steps(outer: str) -> None:
    def ell_of(pos: Tensor, base: Tensor, total: Tensor, tau: Tensor, margin: float) -> Tensor:
        ell = (base - pos / tau) + total.log()  # log Σ_j exp(Δ_ij/τ + margin)
        return ell + margin if margin else ell

    def rows(v: tuple[Tensor, ...], s: BatchNumbers, p: tuple[float, ...]) -> tuple[Tensor, ...]:
        pos, base, total, *gap_sum = v
        ell = ell_of(pos, base, total, s.tau, p[1])
        mass = _dphi(outer, ell, s.tau, p) / s.tau / s.divisor
        row_weight = mass / total
        # ∂ℓ/∂τ = −Σ_j p_ij Δ_ij/τ², p = softmax. −½Σ⟨F, dF⟩/τ would do too, but cancels where rows are long.
        return row_weight, mass, _phi(outer, ell, s.tau, p), *(row_weight * x / -s.tau for x in gap_sum)

    def dtau_in_front(v: tuple[Tensor, ...], s: BatchNumbers, p: tuple[float, ...]) -> tuple[Tensor, ...]:
        # ∂(τφ(ℓ))/∂τ = φ − φ′·ΣpΔ/τ, two large numbers where |t| ≫ τ. With ΣpΔ/τ = ℓ − margin − log Σ + Σp·log(f/e^base)
        # it is (φ − φ′ℓ) + φ′·(margin + log Σ − Σp·log(f/e^base)), none of which is.
        pos, base, total, moment = v
        ell, phi = ell_of(pos, base, total, s.tau, p[1]), _OUTERS[outer](p[0])
        spread = p[1] + total.log() - moment / (total * s.tau)
        return ((phi.legendre(ell) + phi.dphi(ell) * spread) / s.divisor,)

    ROW_STEPS[f"exp {outer}"] = RowStep(rows, ("row_weight", "mass", "loss"))
    ROW_STEPS[f"exp {outer}, dτ"] = RowStep(rows, ("row_weight", "mass", "loss", "dtau"))
    ROW_STEPS[f"exp {outer}, dτ in front"] = RowStep(dtau_in_front, ("dtau",))


for _outer_name in _OUTERS:
    _add_exp_steps(_outer_name)


class _ExpPairLoss(Objective):
    """Built-in ψ = exp(Δ/τ + margin) (or τ := 1), through ℓ = log ξ: right down to losses of 1e-30."""

    kind = "exp"

    def __init__(
        self,
        name: str,
        options: dict[str, Any],
        outer: str = "log(ε + x)",
        *,
        epsilon: float = 0.0,
        margin: float = 0.0,
        uses_temperature: bool = False,
        tau_in_front: bool = False,
    ) -> None:
        self.name, self.options = name, options
        self._outer, self._row_params = outer, (epsilon, margin, float(tau_in_front))
        self.margin, self.uses_temperature, self.tau_in_front = margin, uses_temperature, tau_in_front
        self.tau_gradient = "rows" if uses_temperature else None

    def __reduce__(self) -> tuple[Any, ...]:
        return make, (self.name, self.options)

    def kind_tau(self, tau: Tensor) -> Tensor:
        return tau if self.uses_temperature else torch.ones_like(tau)

    def phi(self, ell: Tensor, tau: Tensor) -> Tensor:
        return _phi(self._outer, ell, tau, self._row_params)

    def dphi(self, ell: Tensor, tau: Tensor) -> Tensor:
        return _dphi(self._outer, ell, tau, self._row_params)

    def solve(self, p: Pairs, learn_tau: bool) -> RowSolution:
        slope_from_gap = learn_tau and not self.tau_in_front
        base, total, *gap_sum = p.sums(
            (Term.SHIFT, Term.F, Term.F_MOMENT) if slope_from_gap else (Term.SHIFT, Term.F)
        )
        step = f"exp {self._outer}"
        if slope_from_gap:
            return RowSolution(shift=base, **p.step(f"{step}, dτ", p.pos, base, total, *gap_sum, params=self._row_params))
        rows = RowSolution(shift=base, **p.step(step, p.pos, base, total, params=self._row_params))
        if learn_tau:  # costs one more sweep
            (moment,) = p.sums((Term.F_MOMENT,), shift=base, moment_origin=base * p.tau)
            (rows.dtau,) = p.step(f"{step}, dτ in front", p.pos, base, total, moment, params=self._row_params).values()
        return rows


# --- (b) α given directly ---------------------------------------------------------------------------------------------


def _weight_rows(v: tuple[Tensor, ...], s: BatchNumbers, p: tuple[float, ...]) -> tuple[Tensor, ...]:
    *base, total, gap_sum = v  # params (alpha_eps,)
    z = total
    if p[0]:
        extra = p[0] * s.n_neg
        z = total + (extra * (-base[0]).exp() if base else extra)
    inv_z = _safe_inverse(z)
    row_weight, loss = inv_z / s.divisor, gap_sum * inv_z
    return row_weight, total * row_weight, loss, loss


def _safe_inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where x is 0 (or so small that 1/x overflows)."""
    usable = x >= torch.finfo(x.dtype).tiny
    return torch.where(usable, 1 / torch.where(usable, x, 1.0), 0.0)


ROW_STEPS["weight"] = RowStep(lambda v, s, p: _weight_rows(v, s, p)[:3], ("row_weight", "mass", "loss"))
ROW_STEPS["weight, through α"] = RowStep(_weight_rows, ("row_weight", "mass", "loss", "baseline"))


class PairWeight(Objective):
    """``L_i = Σ_j α_ij Δ_ij`` with α_ij = w(d²_ij)/Z_i from a plain Python function of a tensor.

    Args:
        weight: elementwise, non-negative function of d², (r, c) → (r, c), any shape.
        normalized: Z_i = Σ_j w + alpha_eps·|Neg|; otherwise Z_i = 1. A row whose weights are all 0 has α = 0.
        alpha_eps: ≥ 0; only with ``normalized``.
        detach_alpha: treat α as a constant in the gradient (the paper's setting); otherwise back-propagate through it.

    Raises:
        TypeError, ValueError: not callable, not elementwise, or closing over a tensor that requires grad.

    Source: arXiv:2201.12680, pair-weighted CL (α-CL-direct).
    """

    _custom: _CustomFunction | None = None

    def __init__(
        self,
        weight: Callable[[Tensor], Tensor],
        *,
        normalized: bool = True,
        alpha_eps: float = 0.0,
        detach_alpha: bool = True,
    ) -> None:
        self._custom = _CustomFunction(weight, "weight", of_distance=True)
        self.kind = self._custom.key
        self._configure(
            "PairWeight",
            {"weight": weight, "normalized": normalized, "alpha_eps": alpha_eps, "detach_alpha": detach_alpha},
        )

    def _configure(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options = name, options
        self.normalized = _flag(name, "normalized", options.get("normalized", True))
        self.alpha_eps = _number(name, "alpha_eps", options["alpha_eps"], minimum=0.0)
        self.detach_alpha = _flag(name, "detach_alpha", options["detach_alpha"])
        if self.alpha_eps and not self.normalized:
            raise ValueError(f"{name}: alpha_eps must be 0 with normalized=False, got {self.alpha_eps}")
        self.one_sweep = not self.normalized
        self.terms = (Term.F, Term.F_MOMENT)
        if self.uses_temperature and not self.detach_alpha:
            self.tau_gradient = "pairs"

    def check(self) -> None:
        if self._custom is not None:
            self._custom.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> PairWeight:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_pair_weight, (self.options,)

    def params(self, c: float) -> tuple[float, ...]:
        return (c,)

    def solve(self, p: Pairs, learn_tau: bool) -> RowSolution:
        if not self.normalized:
            return super().solve(p, learn_tau)
        log = kind(self.kind).log
        sums = p.sums((Term.SHIFT, *self.terms) if log else self.terms)
        step = "weight" if self.detach_alpha else "weight, through α"
        return RowSolution(shift=sums[0] if log else None, **p.step(step, *sums, params=(self.alpha_eps,)))

    def start(self, p: Pairs) -> RowSolution:
        return RowSolution(
            row_weight=self.uniform_weight(p),
            shift=torch.zeros_like(p.pos) if kind(self.kind).log else None,
            baseline=None if self.detach_alpha else torch.zeros_like(p.pos),
        )

    def finish(self, p: Pairs, rows: RowSolution, sums: Tensor) -> RowSolution:
        return replace(rows, mass=sums[0] / p.divisor, loss=sums[1])


def _rebuild_pair_weight(options: dict[str, Any]) -> PairWeight:
    return PairWeight(**options)


class _NamedPairWeight(PairWeight):
    uses_temperature = True

    def __init__(self, name: str, options: dict[str, Any], kind: str, *parameters: float) -> None:
        self.kind, self._parameters = kind, parameters
        self._configure(name, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return make, (self.name, self.options)

    def params(self, c: float) -> tuple[float, ...]:
        return (c, *self._parameters)


# --- (c) α as the exact min player ------------------------------------------------------------------------------------


def _newton(v: tuple[Tensor, ...], s: BatchNumbers, p: tuple[float, ...]) -> tuple[Tensor, ...]:
    """One step for y with Σ_j h = 1, from Σh and Σh′ at y; the bracket [low, high] shrinks. params (power, far power)."""
    mass, slope, y, low, high = v
    eps = torch.finfo(y.dtype).eps
    below = mass < 1
    low, high = torch.where(below, y, low), torch.where(below, high, y)
    power = torch.where(mass < 0.5, torch.full_like(mass, p[1]), p[0])
    new = y + (mass - mass.pow(1 + power)) / (power * slope)
    new = torch.where((new >= low) & (new <= high), new, (low + high) / 2)
    done = ((mass - 1).abs() <= 8 * eps) | ((new - y).abs() <= eps * y.abs())
    return low, high, torch.where(done, y, new), done


def _min_player_rows(v: tuple[Tensor, ...], s: BatchNumbers, p: tuple[float, ...]) -> tuple[Tensor, ...]:
    t_max, pos, mass, moment, *slopes = v
    # Σ_j α_ij Δ_ij from the moment about t_max: Δ itself, times h′ = O(1/τ), would leave eps·|Δ|/τ of noise in g.
    loss = moment + mass * (t_max - pos)
    baseline = (slopes[1] * _safe_inverse(slopes[0]),) if slopes else ()
    return torch.ones_like(mass) / s.divisor, mass / s.divisor, loss, *baseline


def _inside(guess: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A guess as the start of the Newton iteration."""
    return torch.minimum(torch.maximum(torch.where(guess.isfinite(), guess, high), low), high)


def _start_at_normal_tail(v: tuple[Tensor, ...], s: BatchNumbers, p: tuple[float, ...]) -> tuple[Tensor, ...]:
    # The root for normally distributed similarities: with y = t_max − mean + σz, Σ_j max(x_ij, 0) = |Neg|·σ·G(z),
    # G(z) = φ(z) + zΦ(z), convex and ≥ z; so Newton from z = r descends to G(z) = r = τ/(|Neg|·σ).
    t_max, mean, mean_square, low, high = v
    tiny = torch.finfo(mean.dtype).tiny
    sigma = (mean_square - mean.square()).clamp(min=tiny).sqrt()
    target = s.tau / (s.n_neg * sigma)
    z = target
    for _ in range(8):
        density = torch.exp(z.square() / -2) / math.sqrt(2 * math.pi)
        below = torch.special.ndtr(z)
        z = z - (density + z * below - target) / below.clamp(min=tiny)
    few = s.n_neg * below < 8  # the largest of few are no normal tail; from above Newton descends monotonically
    return (_inside(torch.where(few, high, t_max - mean + sigma * z), low, high),)


def _start_at_mean(v: tuple[Tensor, ...], s: BatchNumbers, p: tuple[float, ...]) -> tuple[Tensor, ...]:
    # h is convex in d², so by Jensen the root lies below that of a row with all distances at their mean.
    t_max, mean, low, high = v
    return (_inside(low + (t_max - mean), low, high),)


ROW_STEPS["newton"] = RowStep(_newton, ("low", "high", "y", "done"))
ROW_STEPS["min player"] = RowStep(_min_player_rows, ("row_weight", "mass", "loss"))
ROW_STEPS["min player, through α"] = RowStep(_min_player_rows, ("row_weight", "mass", "loss", "baseline"))
ROW_STEPS["start at the normal tail"] = RowStep(_start_at_normal_tail, ("y",))
ROW_STEPS["start at the mean"] = RowStep(_start_at_mean, ("y",))


class MinPlayer(Objective):
    """``L_i = Σ_j α_ij Δ_ij`` with the exact min player of a separable concave regulariser R = Σ_j r(α_ij).

    α_i = argmin_{α≥0, Σα=1} Σ_j α_j d²_ij − Σ_j r(α_j) has α_ij = h(μ_i − d²_ij): h(x) solves r′(α) = −x (clipped to
    α ≥ 0), and the scalar μ_i follows from Σ_j α_ij = 1. One safeguarded Newton solver, whose sums Σh and Σh′ are
    fused sweeps, serves every h.

    Args:
        h: non-decreasing elementwise function of x = μ − d², (r, c) → (r, c), that is 0 or positive and passes both
            1/|Neg| and 1 somewhere. Values may be inf or NaN above the interval where it is defined.
        detach_alpha: treat α as a constant in the gradient; otherwise differentiate through the exact minimum.

    Raises:
        TypeError, ValueError: not callable, not elementwise, or h does not pass 1/|Neg| and 1.

    Source: arXiv:2201.12680, the min player; α_square is sparsemax (Martins and Astudillo 2016).
    """

    _custom: _CustomFunction | None = None
    newton_power = -1.0  # Newton on (Σh)^(−power) − 1, which is nearly linear in μ for h = (·)^(−1/power)
    far_power = -0.5  # where Σh is small: on Σh itself, which is convex, a step from there overshoots a hundredfold
    max_sweeps = 60

    def __init__(self, h: Callable[[Tensor], Tensor], *, detach_alpha: bool = True) -> None:
        self._custom = _CustomFunction(h, "h")
        self.kind = self._custom.key
        self._configure("MinPlayer", {"h": h, "detach_alpha": detach_alpha})
        self._numeric_inverse(1.0)

    def _configure(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options = name, options
        self.detach_alpha = _flag(name, "detach_alpha", options.get("detach_alpha", True))
        if self.uses_temperature and not self.detach_alpha:
            self.tau_gradient = "pairs"

    def check(self) -> None:
        if self._custom is not None:
            self._custom.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> MinPlayer:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_min_player, (self.options,)

    def inverse(self, alpha: float, tau: Tensor) -> Tensor:
        """x with h(x) = alpha."""
        return torch.full_like(tau, self._numeric_inverse(alpha))

    def start_of_newton(self, p: Pairs, t_max: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """First y_i = μ_i − min_j d²_ij of the iteration, inside [low, high]; all (anchors,)."""
        return high.clone()

    def _numeric_inverse(self, alpha: float) -> float:
        magnitudes = torch.logspace(-30, 30, 1201, dtype=torch.float64)
        grid = torch.cat([-magnitudes.flip(0), magnitudes.new_zeros(1), magnitudes])
        above = ~(self._custom(grid) < alpha)  # NaN or inf: beyond the interval where h is defined
        if above.all() or not above.any():
            raise ValueError(f"h must pass {alpha:.6g} somewhere, got {'larger' if above.all() else 'smaller'} values only")
        first = int(above.to(torch.uint8).argmax())
        low, high = grid[first - 1 : first].clone(), grid[first : first + 1].clone()
        for _ in range(200):
            middle = (low + high) / 2
            up = ~(self._custom(middle) < alpha)
            low, high = torch.where(up, low, middle), torch.where(up, middle, high)
        return float(low)

    def solve(self, p: Pairs, learn_tau: bool) -> RowSolution:
        # y = μ − d²_min and x_ij = (t_ij − t_max) + y: differences keep float32 row sums right to 1e-7 at τ = 1e-3,
        # where μ − d² itself would lose three digits.
        (t_max,) = p.sums((Term.T_MAX,))
        low, high = (self.inverse(alpha, p.tau).expand_as(t_max) for alpha in (1 / p.most_neg, 1.0))
        y = self.start_of_newton(p, t_max, low, high)
        terms = (Term.F, Term.DF, Term.F_MOMENT)
        if not self.detach_alpha:
            terms = (*terms, Term.DF_MOMENT)
        for _ in range(self.max_sweeps):
            mass, slope, moment, *slope_moment = p.sums(terms, shift=t_max, argument_offset=y, moment_origin=t_max)
            low, high, new, done = p.step(
                "newton", mass, slope, y, low, high, params=(self.newton_power, self.far_power)
            ).values()
            if p.all_done(done):  # reads a flag on the host once per sweep
                break
            y = new
        if self.detach_alpha:
            scalars = p.step("min player", t_max, p.pos, mass, moment)
        else:
            scalars = p.step("min player, through α", t_max, p.pos, mass, moment, slope, *slope_moment)
        return RowSolution(shift=t_max, argument_offset=y, moment_origin=t_max, **scalars)


def _rebuild_min_player(options: dict[str, Any]) -> MinPlayer:
    return MinPlayer(**options)


class _AlphaSquare(MinPlayer):
    kind, uses_temperature = "square", True

    def __init__(self, options: dict[str, Any]) -> None:
        self._configure("alpha_square", options)

    def __reduce__(self) -> tuple[Any, ...]:
        return make, (self.name, self.options)

    def inverse(self, alpha: float, tau: Tensor) -> Tensor:
        return alpha * tau

    def start_of_newton(self, p: Pairs, t_max: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return p.step("start at the normal tail", t_max, *p.moments(), low, high)["y"]


class _AlphaGamma(MinPlayer):
    kind, uses_temperature = "gamma", True

    def __init__(self, options: dict[str, Any]) -> None:
        self._configure("alpha_gamma", options)
        self.newton_power = self.far_power = _number("alpha_gamma", "gamma", options["gamma"], above=1.0)

    def __reduce__(self) -> tuple[Any, ...]:
        return make, (self.name, self.options)

    def params(self, c: float) -> tuple[float, ...]:
        return (self.newton_power,)

    def inverse(self, alpha: float, tau: Tensor) -> Tensor:
        exponent, limit = -self.newton_power * math.log(alpha), math.log(torch.finfo(tau.dtype).max) / 2
        if exponent > limit:  # (1/α)^γ; half the range is left for τ and for sums of what is subtracted from it
            raise ValueError(
                f"alpha_gamma: gamma must be at most {limit / -math.log(alpha):.3g} with {1 / alpha:.0f} negatives in "
                f"{str(tau.dtype).removeprefix('torch.')} (|Neg|^gamma leaves its range), got {self.newton_power:g}"
            )
        return -tau * math.exp(exponent)

    def start_of_newton(self, p: Pairs, t_max: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if isinstance(p.n_neg, Tensor):  # every anchor's own inverse(1/|Neg(i)|): from below Newton may take 20 steps more
            low = low * (p.n_neg / p.most_neg) ** self.newton_power
        return p.step("start at the mean", t_max, p.mean_negative(), low, high)["y"]


# --- constant α -------------------------------------------------------------------------------------------------------


class ClosedForm(Objective):
    """α_ij = const: ``L_i = weight·(mean_j t_ij − t⁺_i)``, no pairwise work at all."""

    def __init__(self, name: str, per_negative: bool) -> None:
        self.name, self.options, self._per_negative = name, {}, per_negative

    def __reduce__(self) -> tuple[Any, ...]:
        return make, (self.name, self.options)

    def weight(self, n_neg: int | Tensor) -> int | float | Tensor:
        """Σ_j α_ij."""
        return n_neg if self._per_negative else 1.0


# --- the named members ------------------------------------------------------------------------------------------------


def _number(
    owner: str, name: str, value: Any, *, minimum: float | None = None, above: float | None = None
) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    bound = f" ≥ {minimum:g}" if minimum is not None else f" > {above:g}" if above is not None else ""
    if not math.isfinite(value) or (minimum is not None and value < minimum) or (above is not None and value <= above):
        raise ValueError(f"{owner}: {name} must be a finite number{bound}, got {value}")
    return float(value)


def _flag(owner: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")
    return value


def infonce(epsilon: float = 1.0, temperature_scaled: bool = False) -> Objective:
    """φ = log(ε + x), ψ = exp(x/τ): NT-Xent / SimCLR with ε = 1, decoupled contrastive learning with ε = 0.

    ``temperature_scaled`` puts τ in front (the paper's form). arXiv:2201.12680; arXiv:2002.05709; arXiv:2110.06848.
    """
    epsilon = _number("infonce", "epsilon", epsilon, minimum=0.0)
    scaled = _flag("infonce", "temperature_scaled", temperature_scaled)
    options = {"epsilon": epsilon, "temperature_scaled": scaled}
    return _ExpPairLoss("infonce", options, epsilon=epsilon, uses_temperature=True, tau_in_front=scaled)


def mine() -> Objective:
    """φ = log x, ψ = exp(x); no temperature. arXiv:2201.12680 (φ/ψ family); arXiv:1801.04062."""
    return _ExpPairLoss("mine", {})


def triplet(margin: float = 1.0) -> Objective:
    """φ = x, ψ = max(x + margin, 0), on ½-squared distances; no temperature. arXiv:2201.12680; arXiv:1503.03832."""
    margin = _number("triplet", "margin", margin)
    return _LinearPairLoss("triplet", {"margin": margin}, "hinge", margin)


def soft_triplet(margin: float = 1.0) -> Objective:
    """φ = τ·log(1 + x), ψ = exp(x/τ + margin). arXiv:2201.12680 (φ/ψ family)."""
    margin = _number("soft_triplet", "margin", margin)
    return _ExpPairLoss(
        "soft_triplet", {"margin": margin}, epsilon=1.0, margin=margin, uses_temperature=True, tau_in_front=True
    )


def n_plus_1_tuplet() -> Objective:
    """φ = log(1 + x), ψ = exp(x); no temperature. arXiv:2201.12680 (φ/ψ family); Sohn, NeurIPS 2016."""
    return _ExpPairLoss("n_plus_1_tuplet", {}, epsilon=1.0)


def lifted_structured(margin: float = 1.0) -> Objective:
    """φ = max(log x, 0)², ψ = exp(x + margin); no temperature. arXiv:2201.12680 (φ/ψ family); arXiv:1511.06452."""
    margin = _number("lifted_structured", "margin", margin)
    return _ExpPairLoss("lifted_structured", {"margin": margin}, "max(log x, 0)²", margin=margin)


def modified_triplet(scale: float = 1.0) -> Objective:
    """φ = x, ψ = sigmoid(scale·x); no temperature. arXiv:2201.12680 (φ/ψ family)."""
    scale = _number("modified_triplet", "scale", scale, above=0.0)
    return _LinearPairLoss("modified_triplet", {"scale": scale}, "sigmoid", scale)


def triplet_contrastive() -> Objective:
    """φ = x, ψ = x: L_i = Σ_j Δ_ij in O(n·D); no temperature. arXiv:2201.12680 (φ/ψ family)."""
    return ClosedForm("triplet_contrastive", per_negative=True)


def uniform() -> Objective:
    """α_ij = 1/|Neg| (the paper's quadratic loss): L = mean(negative t) − mean(positive t), in O(n·D)."""
    return ClosedForm("uniform", per_negative=False)


def alpha_direct(
    exponent: float = 4, normalized: bool = True, alpha_eps: float = 0.0, detach_alpha: bool = True
) -> Objective:
    """α_ij ∝ exp(−(d²_ij)^{exponent/2}/τ), d² clamped at 0 unless exponent = 2. arXiv:2201.12680, α-CL-direct."""
    exponent = _number("alpha_direct", "exponent", exponent, above=0.0)
    options = {
        "exponent": exponent, "normalized": normalized, "alpha_eps": alpha_eps, "detach_alpha": detach_alpha,
    }  # fmt: skip
    if exponent == 2.0:
        return _NamedPairWeight("alpha_direct", options, "gibbs")
    return _NamedPairWeight("alpha_direct", options, "power", exponent / 2)


def alpha_entropy(alpha_eps: float = 0.0, detach_alpha: bool = True) -> Objective:
    """Min player of R = −τ·Σα log α, a softmax: α_ij ∝ exp(−d²_ij/τ); gradient = τ·(that of InfoNCE with ε = 0)."""
    return _NamedPairWeight("alpha_entropy", {"alpha_eps": alpha_eps, "detach_alpha": detach_alpha}, "gibbs")


def alpha_inverse(
    exponent: float = 2, order: float = 1, normalized: bool = True, alpha_eps: float = 0.0, detach_alpha: bool = True
) -> Objective:
    """α_ij ∝ (max(d²_ij, 0)^{exponent/2} + τ)^{−order}: the published experiments' form of r_γ."""
    exponent = _number("alpha_inverse", "exponent", exponent, above=0.0)
    order = _number("alpha_inverse", "order", order, above=0.0)
    options = {
        "exponent": exponent, "order": order, "normalized": normalized, "alpha_eps": alpha_eps,
        "detach_alpha": detach_alpha,
    }  # fmt: skip
    return _NamedPairWeight("alpha_inverse", options, "inverse", exponent / 2, order)


def alpha_square(detach_alpha: bool = True) -> Objective:
    """Exact min player of R = −(τ/2)·Σα²: α_ij = max(μ_i − d²_ij, 0)/τ (sparsemax). arXiv:2201.12680 r_s; arXiv:1602.02068."""
    return _AlphaSquare({"detach_alpha": detach_alpha})


def alpha_gamma(gamma: float = 2.0, detach_alpha: bool = True) -> Objective:
    """Exact min player of R = τ/(1−γ)·Σα^{1−γ}, γ > 1: α_ij = (τ/(d²_ij − μ_i))^{1/γ}. arXiv:2201.12680 r_γ.

    α is all but uniform unless τ ≲ |Neg|^{−γ}: with γ = 2 and 1,000 negatives that is τ ≲ 1e-6.
    """
    gamma = _number("alpha_gamma", "gamma", gamma, above=1.0)
    return _AlphaGamma({"gamma": gamma, "detach_alpha": detach_alpha})


_FACTORIES: dict[str, Callable[..., Objective]] = {
    f.__name__: f
    for f in (
        infonce, mine, triplet, soft_triplet, n_plus_1_tuplet, lifted_structured, modified_triplet,
        triplet_contrastive, alpha_direct, alpha_entropy, alpha_inverse, uniform, alpha_square, alpha_gamma,
    )
}  # fmt: skip
__all__ += list(_FACTORIES)
#: Every built-in objective with its default options.
DEFAULTS: dict[str, Objective] = {name: factory() for name, factory in _FACTORIES.items()}


def names() -> tuple[str, ...]:
    """Names of all built-in objectives."""
    return tuple(_FACTORIES)


def make(objective: str | Objective, options: Mapping[str, Any] | None = None) -> Objective:
    """An objective from its name and options; an `Objective` passes through.

    Raises:
        TypeError: ``objective`` is neither a name nor an `Objective`, or options come with an object.
        ValueError: unknown name, or an option that this objective does not have.
    """
    options = dict(options or {})
    if isinstance(objective, Objective):
        if options:
            raise TypeError(f"options must be given to the objective object itself, got {', '.join(options)} beside it")
        return objective
    if not isinstance(objective, str):
        raise TypeError(f"objective must be a name or an Objective, got {type(objective).__name__}")
    if objective not in _FACTORIES:
        raise ValueError(f"objective must be one of {', '.join(names())}, got {objective!r}")
    factory = _FACTORIES[objective]
    known = inspect.signature(factory).parameters
    foreign = [name for name in options if name not in known]
    if foreign:
        expected = f"one of {', '.join(known)}" if known else "none (it has no options)"
        raise ValueError(f"options of {objective} must be {expected}, got {', '.join(foreign)}")
    return factory(**options)
