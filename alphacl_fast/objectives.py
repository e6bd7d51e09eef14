"""The α-CL family: its formulas are written here and nowhere else.

A loss is ``L = reduce_i L_i`` over anchors i. With ``t_ij`` the similarity of a pair, ``t⁺_i`` the
positive pair's, ``d²_ij = c − t_ij`` (c = 1 for cosine and dot, 0 for euclidean, where t = −½‖·‖²)
and ``Δ_ij = t_ij − t⁺_i``:

* `PairLoss`    L_i = φ(Σ_j ψ(Δ_ij))                                [arXiv:2201.12680, φ/ψ family]
* `PairWeight`  L_i = Σ_j α_ij Δ_ij,  α_ij = w(d²_ij)/Z_i or w(d²_ij)  [ibid., pair-weighted CL]
* `MinPlayer`   L_i = Σ_j α_ij Δ_ij,  α_i = argmin_{α≥0, Σα=1} Σ_j α_j d²_ij − R(α),
  so α_ij = h(μ_i − d²_ij)
* `ClosedForm`  constant α: sums over pairs collapse to O(n·D)

Two sweeps over the pairs serve every member, `row_sums` and `pair_grad` (docs/design.md). A sweep
sees the objective only as a `PairKind`; the work between the sweeps is O(n) and consists of row
steps (`RowStep`).

A `PairKind` maps a tensor x elementwise, given the temperature τ (a 0-dim tensor):

* linear kinds: ``f(x)``, ``df = ∂f/∂x``, ``dtau = ∂f/∂τ``, x = (t − shift_i) + argument_offset_i;
* log kinds: the same for ``log f`` with x = t. They are summed in the log domain, because exp(Δ/τ)
  overflows float64 at τ = 1e-3 and a normalised weight underflows to 0/0 at τ = 5e-3.

`graph` traces kinds and row steps into kernels, and `cpp_printer` into the headers of
csrc/generated.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import operator
import secrets
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, wraps
from numbers import Real
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from .bundles import MOST_PARAMETERS, Dtype, Form, Gradient, Rows, Term, Weight
from .graph import Branching, UnsupportedFunction, on_cpu
from .reads import Reading, look

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


# --- pair kinds -----------------------------------------------------------------------------------


class BoundKind(NamedTuple):
    """A pair kind with its parameters: pointwise functions ``(x, tau)``."""

    f: Callable[[Tensor, Tensor], Tensor]
    df: Callable[[Tensor, Tensor], Tensor]
    dtau: Callable[[Tensor, Tensor], Tensor] | None


class PairKind(NamedTuple):
    """A pointwise function of a pair and its derivatives, ``f(x, tau, *, parameters)``.

    Attributes:
        f: the function; for ``log`` kinds, its logarithm.
        df: ∂f/∂x.
        dtau: ∂f/∂τ, or None.
        log: f, df and dtau belong to log f.
        linear_in_t: log f(t) = t/τ, whose scale a backend may fold into the matrix product.
        parameters: names of the floats in `PairFunction.params`, in their order.
        code: the kind's number in the compiled backends; -1 if they do not have it.
        common: values of parameters for which the compiled backends have a specialised version.
        about: the formula in words, for the generated headers.
    """

    f: Callable[..., Tensor]
    df: Callable[..., Tensor]
    dtau: Callable[..., Tensor] | None = None
    log: bool = False
    linear_in_t: bool = False
    parameters: tuple[str, ...] = ()
    code: int = -1
    common: Mapping[str, float] = {}
    about: str = ""

    def bind(self, params: tuple[float, ...]) -> BoundKind:
        values = dict(zip(self.parameters, params, strict=True))
        pieces = (self.f, self.df, self.dtau)
        return BoundKind(*(None if piece is None else partial(piece, **values) for piece in pieces))


def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


#: The built-in pair kinds by name.
KINDS: dict[str, PairKind] = {}


def pair_kind(**options: Any) -> Callable[[type], PairKind]:
    """Registers the functions f, df and dtau of a class as a pair kind named after it."""

    def register(cls: type) -> PairKind:
        pieces = {name: piece for name, piece in vars(cls).items() if name in BoundKind._fields}
        named = {"parameters": _keywords(cls.f), "code": len(KINDS), "about": cls.__doc__}
        if len(named["parameters"]) > MOST_PARAMETERS:
            raise ValueError(f"a pair kind must have at most {MOST_PARAMETERS} parameters")
        kind = KINDS[cls.__name__.lower()] = PairKind(**pieces, **named, **options)
        return kind

    return register


#: The parts of pair kinds whose formula depends on a parameter's value.
BRANCHING: list[Branching] = []


def branching(*values: float) -> Callable[[Callable[..., Tensor]], Branching]:
    """Registers a function of x and a parameter whose formula differs at these parameter values."""

    def register(function: Callable[..., Tensor]) -> Branching:
        BRANCHING.append(Branching(function, values))
        return BRANCHING[-1]

    return register


@branching(0.5, 1, 1.5, 2)
def _power(d, q):
    """max(d, 0)^q, with derivative 0 at d ≤ 0 for every q (where autograd may give inf or NaN)."""
    if q == 1:
        return torch.relu(d)
    if q == 2:
        return torch.relu(d).square()
    return torch.where(d > 0, d.clamp(min=torch.finfo(d.dtype).tiny).pow(q), torch.relu(d))


@branching(0.5, 1, 1.5, 2)
def _power_slope(d, q):
    """The derivative of `_power`: q·d^{q−1} for d > 0, else 0."""
    if q == 1:
        return (d > 0).to(d.dtype)  # a log kind multiplies this by f, which brings NaN back
    if q == 2:
        return 2 * torch.relu(d)
    slope = q * d.clamp(min=torch.finfo(d.dtype).tiny).pow(q - 1)
    return torch.where(d > 0, slope, torch.relu(d))


@branching(1, 2)
def _gamma_root(x, gamma):
    return x.pow(1 / gamma)


@pair_kind(log=True, linear_in_t=True)
class Exp:
    """f = exp(t/τ): the other factors of exp(Δ/τ + margin) are constant in a row"""

    def f(t, tau):
        return t / tau

    def df(t, tau):
        return torch.ones_like(t) / tau

    def dtau(t, tau):
        return t / -tau.square()


@pair_kind(log=True)
class Gibbs:
    """f = exp(−d²/τ), d² = c − t of either sign"""

    def f(t, tau, *, c):
        return (t - c) / tau

    def df(t, tau, *, c):
        return torch.ones_like(t) / tau

    def dtau(t, tau, *, c):
        return (c - t) / tau.square()


@pair_kind(log=True, common={"q": 2})
class Power:
    """f = exp(−max(d², 0)^q/τ), d² = c − t"""

    def f(t, tau, *, c, q):
        return _power(c - t, q) / -tau

    def df(t, tau, *, c, q):
        return _power_slope(c - t, q) / tau

    def dtau(t, tau, *, c, q):
        return _power(c - t, q) / tau.square()


@pair_kind(log=True)
class Inverse:
    """f = (max(d², 0)^q + τ)^{−k}, d² = c − t"""

    def f(t, tau, *, c, q, k):
        return (_power(c - t, q) + tau).log() * -k

    def df(t, tau, *, c, q, k):
        return _power_slope(c - t, q) / (_power(c - t, q) + tau) * k

    def dtau(t, tau, *, c, q, k):
        return -k / (_power(c - t, q) + tau)


@pair_kind()
class Hinge:
    """f = max(x + margin, 0); the derivative at the kink is 0, as in relu"""

    def f(x, tau, *, margin):
        return torch.relu(x + margin)

    def df(x, tau, *, margin):
        return (x + margin > 0).to(x.dtype)


@pair_kind()
class Sigmoid:
    """f = sigmoid(scale·x)"""

    def f(x, tau, *, scale):
        return torch.sigmoid(scale * x)

    def df(x, tau, *, scale):
        y = torch.sigmoid(scale * x)
        return scale * y * (1 - y)


@pair_kind()
class Square:
    """h = max(x, 0)/τ"""

    def f(x, tau):
        return torch.relu(x) / tau

    def df(x, tau):
        return torch.where(x > 0, 1 / tau, 0.0)

    def dtau(x, tau):
        return torch.relu(x) / -tau.square()


@pair_kind()
class Gamma:
    """h = (τ/(−x))^{1/γ} for x < 0"""

    def f(x, tau, *, gamma):
        return _gamma_root(tau / -x, gamma)

    def df(x, tau, *, gamma):
        return _gamma_root(tau / -x, gamma) / (-gamma * x)

    def dtau(x, tau, *, gamma):
        return _gamma_root(tau / -x, gamma) / (gamma * tau)


def _exp_of_minus_abs(x):
    return torch.exp(torch.where(x > 0, -x, x))


@pair_kind()
class Logistic:
    """f = log(1 + exp(x)), which neither overflows nor loses digits where it is small"""

    def f(x, tau):
        return torch.relu(x) + torch.log1p(_exp_of_minus_abs(x))

    def df(x, tau):
        e = _exp_of_minus_abs(x)
        return torch.where(x > 0, 1.0, e) / (1 + e)


_CUSTOM: weakref.WeakValueDictionary[str, _CustomFunction] = weakref.WeakValueDictionary()
_IDS = itertools.count()
_OBJECTIVES: weakref.WeakValueDictionary[str, Objective] = weakref.WeakValueDictionary()
#: What the keys of users' objects begin with: no other process takes them for objects of its own.
_OF_THIS_PROCESS = f"object of process {secrets.token_hex(8)}:"


def kind(name: str) -> PairKind:
    """The pair kind of this name: a key of `KINDS`, or the key of a user's function."""
    return KINDS[name] if name in KINDS else _CUSTOM[name].kind


def is_compiled(name: str) -> bool:
    """Whether the compiled backends have the pair kind of this name."""
    return name in KINDS and KINDS[name].code >= 0


def codes() -> dict[str, dict[str, int]]:
    """The numbers passed to C++, by the name of their C++ enum."""
    enums = {"Dtype": Dtype, "Term": Term, "WeightCode": Weight, "Form": Form, "Gradient": Gradient}
    kinds = {name.upper(): kind.code for name, kind in KINDS.items() if kind.code >= 0}
    return {
        **{name: {member.name: member.value for member in of} for name, of in enums.items()},
        "KindCode": kinds,
    }


def codes_checksum() -> int:
    """Tells a library compiled with other `codes` apart."""
    return zlib.crc32(repr(codes()).encode()) & 0x7FFFFFFF


def row_codes() -> dict[tuple[str, int], int]:
    """The number of every row step with its count of vectors in the compiled CPU backend."""
    known = [(step.name, count) for step in ROW_STEPS.values() for count in step.counts]
    return {key: code for code, key in enumerate(known)}


def row_codes_checksum() -> int:
    """Tells a library compiled with other `row_codes` or parameters apart."""
    known = [(step.name, step.outputs, step.parameters, step.counts) for step in ROW_STEPS.values()]
    return zlib.crc32(repr(known).encode()) & 0x7FFFFFFF


def custom(key: str) -> _CustomFunction:
    """The user's function whose key this is."""
    return _CUSTOM[key]


def registered(key: str) -> Objective:
    """The objective with this `Objective.key`; a user's object must live in this process.

    Raises:
        KeyError: there is no such objective.
    """
    if key in _OBJECTIVES:
        return _OBJECTIVES[key]
    if key.endswith(_OF_EACH_PAIR):
        return registered(key.removesuffix(_OF_EACH_PAIR)).of_each_pair
    name, _, options = key.partition(" ")
    if name not in _FACTORIES:
        raise KeyError(
            f"the objective must be a named one or an object that lives in this process, got {key}"
        )
    return _kept(key, name, options)


@lru_cache(maxsize=256)
def _kept(key: str, name: str, options: str) -> Objective:
    """A named objective, made from its key."""
    return _FACTORIES[name](**json.loads(options))


def is_of_this_process(key: str) -> bool:
    """Whether a key belongs to a user's object, which no other process can find."""
    return key.startswith(_OF_THIS_PROCESS)


#: Where users' functions are looked at.
_PROBE = torch.linspace(-4.0, 4.0, 65, dtype=torch.float64, device="cpu").view(13, 5)


_Made = TypeVar("_Made")


class Compiled(Generic[_Made]):
    """What a compiler makes of users' pair functions: once for their parameters and values.

    ``make(function, params)`` raises UnsupportedFunction where it cannot; so do later calls.
    """

    def __init__(self, make: Callable[[Any, tuple[float, ...]], _Made]) -> None:
        self._make = make
        # function → params → its values at that time, and the outcome or why there is none
        self._outcomes: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()

    def __call__(self, function: _CustomFunction, params: tuple[float, ...]) -> _Made:
        values, outcomes = function.values(), self._outcomes.setdefault(function, {})
        before, outcome = outcomes.get(params, (None, ""))
        if before != values:  # an attribute that it reads has changed, say
            try:
                outcome = self._make(function, params)
            except UnsupportedFunction as error:
                outcome = str(error)
            outcomes[params] = values, outcome
        if isinstance(outcome, str):
            raise UnsupportedFunction(outcome)
        return outcome


class _CustomFunction:
    """A user's pointwise function as a linear pair kind, differentiated automatically.

    Functions ``of_distance`` are applied to d² = c − x. `key` finds the object and crosses the
    operator schema; the objective that owns the object keeps it alive.
    """

    def __init__(
        self, fn: Callable[[Tensor], Tensor], name: str, of_distance: bool = False
    ) -> None:
        if not callable(fn):
            raise TypeError(f"{name} must be a function of one tensor, got {type(fn).__name__}")
        self.fn, self.name, self.of_distance = fn, name, of_distance
        self.key = f"{_OF_THIS_PROCESS}{next(_IDS)}"
        _CUSTOM[self.key] = self
        if of_distance:
            self.kind = PairKind(
                f=lambda x, tau, *, c: self(c - x),
                df=lambda x, tau, *, c: -self.derivative(c - x),
                parameters=("c",),
            )
        else:
            self.kind = PairKind(f=lambda x, tau: self(x), df=lambda x, tau: self.derivative(x))
        self._checked: bytes | None = None  # its values when it passed its check
        # what it read when its values were last computed, and these values
        self._known: tuple[Reading | None, bytes] = None, b""
        self.check()

    def check(self) -> None:
        """Raises ValueError unless the function is elementwise and differentiable.

        A function that has passed, and reads what it read then, is not executed again.
        """
        reading, values = self._known
        if values == self._checked and reading is not None and reading.unchanged():
            return
        with unset_fake_temporarily():  # the values of the probe count
            self._check()

    def values(self) -> bytes:
        """Its values at many points: they change with anything that the function reads.

        They are computed unless it is known that nothing of it has changed.
        """
        before, values = self._known
        if before is None or not before.unchanged():
            now = look(self.fn)
            # an exported graph records its own operations, not these
            with _disable_current_modes(), torch.enable_grad(), on_cpu():
                values = self(_PROBE.clone()).detach().numpy().tobytes()
            self._known = now, values
        return values

    def _check(self) -> None:
        probe = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64, device="cpu").view(2, 3)
        try:
            with torch.enable_grad():
                whole = self(probe.clone())
            # under a transform, which has no values, the derivative raises
            known = self._checked is not None and not torch._C._are_functorch_transforms_active()
            if known and self.values() == self._checked:
                return
            pieces = [
                torch.cat([self(part.clone()) for part in probe.split(1, dim)], dim)
                for dim in (0, 1)
            ]
            self.derivative(probe)
            values = self.values()
        except RuntimeError as error:
            raise ValueError(
                f"{self.name} must be a differentiable function of a tensor on any device: {error}"
            ) from error
        if not all(torch.allclose(whole, p, 1e-9, 1e-12, equal_nan=True) for p in pieces):
            raise ValueError(
                f"{self.name} must be elementwise, "
                "got one whose values depend on the other elements"
            )
        self._checked = values

    def __call__(self, x: Tensor) -> Tensor:
        y = self.fn(x)
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            got = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{self.name} must map a tensor elementwise to {tuple(x.shape)} {x.dtype}, "
                f"got {got}"
            )
        if y.requires_grad and not x.requires_grad:
            raise ValueError(
                f"{self.name} must be a function of its argument alone, got one that closes over "
                "a tensor which requires grad (that tensor would silently receive no gradient)"
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


# --- row steps ------------------------------------------------------------------------------------


class BatchNumbers(NamedTuple):
    """Numbers that all rows of a batch share; a compiled row step sees 0-dim tensors."""

    tau: Tensor  #: the temperature passed to the pair kind
    n_neg: int | Tensor  #: (anchors,) with ids, in which case no backend compiles the step
    divisor: int | Tensor  #: `Pairs.divisor`


class RowStep(NamedTuple):
    """A pointwise function ``(*vectors, numbers, **parameters)`` of row vectors (anchors,)."""

    name: str  #: crosses the operator schema
    function: Callable[..., tuple[Tensor, ...]]  #: returns one vector for each of ``outputs``
    outputs: tuple[str, ...]  #: fields of `RowSolution`, or variables of the Newton iteration
    parameters: tuple[str, ...]  #: names of the floats, in the order in which they cross the schema
    counts: tuple[int, ...]  #: of vectors that it takes

    def __call__(
        self, vectors: Sequence[Tensor], numbers: BatchNumbers, params: Sequence[float]
    ) -> tuple[Tensor, ...]:
        values = dict(zip(self.parameters, params, strict=True))
        return self.function(*vectors, numbers=numbers, **values)


#: All row steps by name; each is defined beside its objective.
ROW_STEPS: dict[str, RowStep] = {}


def row_step(
    *outputs: str, parameters: tuple[str, ...] = (), counts: tuple[int, ...] = ()
) -> Callable[[Callable[..., tuple[Tensor, ...]]], RowStep]:
    """Registers a function as a row step.

    ``parameters``: the names in its ``**`` argument; ``counts``: of the vectors in its ``*``
    argument.
    """

    def register(function: Callable[..., tuple[Tensor, ...]]) -> RowStep:
        own = [name for name in _keywords(function) if name != "numbers"]
        vectors = inspect.signature(function).parameters.values()
        named = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in vectors)
        names = *own, *parameters
        step = RowStep(function.__name__, function, outputs, names, counts or (named,))
        ROW_STEPS[step.name] = step
        return step

    return register


# --- batches and solutions ------------------------------------------------------------------------


class Pairs(Protocol):
    """A batch as objectives see it; all vectors are (anchors,) in the accumulation dtype."""

    pos: Tensor  #: (anchors,) t⁺_i
    tau: Tensor  #: () temperature
    n_neg: int | Tensor  #: |Neg(i)|; with ids (anchors,), at least 1
    most_neg: int  #: |Neg(i)| without ids: an upper bound
    divisor: int  #: L = Σ_i L_i / divisor where the loss is one number, else 1

    def sums(
        self,
        terms: tuple[Term, ...],
        *,
        shift: Tensor | None = None,
        argument_offset: Tensor | None = None,
        moment_origin: Tensor | None = None,
    ) -> Tensor:
        """One `row_sums` sweep, (len(terms), anchors); the default moment origin is t⁺."""
        ...

    def step(self, step: RowStep, *vectors: Tensor, **params: float) -> dict[str, Tensor]:
        """The outputs of a row step by name; vectors are (anchors,) or expanded to it."""
        ...

    def apply(self, function: _CustomFunction, x: Tensor) -> tuple[Tensor, Tensor]:
        """A user's function of a vector (anchors,): its values and derivatives."""
        ...

    def newton(
        self,
        terms: tuple[Term, ...],
        origin: Tensor,
        start: tuple[Tensor, Tensor, Tensor],
        most: int,
        powers: Mapping[str, float],
    ) -> tuple[Tensor, Tensor]:
        """Solves Σ_j h(x_ij) = 1 with x = (t − origin) + y: y (anchors,), and the sums there.

        ``start``: the bracket [low, high] and the first y; ``most``: sweeps; ``powers``: parameters
        of the row step `newton`; the first two of ``terms`` are F and DF.
        """
        ...

    def zeros(self) -> Tensor:
        """(anchors,) zeros."""
        ...

    def stack(self, *vectors: Tensor) -> Tensor:
        """(k, anchors) of k vectors."""
        ...

    def mean_negative(self) -> Tensor:
        """(anchors,) mean of t_ij over the negatives, in O(n·D)."""
        ...

    def moments(self) -> tuple[Tensor, Tensor]:
        """(anchors,) means of t_ij and t_ij², in O(n·D²), as if there were no ids."""
        ...

    def all_done(self, done: Tensor) -> bool:
        """Whether ``done`` (anchors,) holds for all anchors, of all processes of the batch."""
        ...


@dataclass
class RowSolution:
    """Row vectors (anchors,) of a solved objective, from which `pair_grad` follows.

    g_ij = row_weight_i·(f | ∂f/∂x | f + ∂f/∂x·(t_ij − moment_origin_i − baseline_i)), and the
    positive pair weighs mass_i = −∂L/∂t⁺_i. row_weight, mass and dtau are divided by
    `Pairs.divisor`.
    """

    row_weight: Tensor
    shift: Tensor | None = None
    argument_offset: Tensor | None = None
    baseline: Tensor | None = None
    moment_origin: Tensor | None = None  #: None is t⁺
    mass: Tensor | None = None  #: Σ_j α_ij
    loss: Tensor | None = None  #: L_i
    dtau: Tensor | None = None  #: ∂L_i/∂τ


class Objective:
    """Base of the family; use the named functions of this module or `make`.

    Attributes:
        name: as the user gave it, for ``repr`` and checkpoints.
        options: as the user gave them.
        uses_temperature: whether the loss depends on τ.
        tau_gradient: the source of ∂L_i/∂τ: ``"rows"`` (`solve`), ``"pairs"`` (`Term.DTAU` of
            `pair_grad`), or None (there is no gradient).
        one_sweep: no row vector needs a sum over pairs, so `pair_grad` alone gives loss and
            gradient.
        derivative: `pair_grad` weighs pairs by ∂f/∂x instead of f.
        needs_negatives: an anchor without negatives has loss 0.
        counts_negatives: the loss of an anchor depends on |Neg(i)| besides its sums, if only
            because it must be 0 without negatives.
        recordable: `solve`, `start` and `finish` do nothing with row vectors but sums, row steps
            and users' functions, so that `program` can record them.
    """

    name: str
    options: dict[str, Any]
    kind: str = ""
    uses_temperature = False
    tau_gradient: str | None = None
    one_sweep = False
    derivative = False
    needs_negatives = True
    counts_negatives = False
    recordable = False
    #: of a recorded program: the numbers that follow from the temperature, as row steps call them
    numbers: tuple[str, ...] = ()
    terms: tuple[Term, ...] = ()
    parameters: Sequence[float] = ()  # of the pair kind, besides c
    functions: tuple[_CustomFunction, ...] = ()  # the user's
    #: crosses an operator schema and finds the object (`registered`): name and options, or a number
    #: that only this process knows for an object that a user has made
    key: str

    def __init_subclass__(cls) -> None:
        own = [*inspect.signature(cls.__init__).parameters.values()]
        cls.__signature__ = inspect.Signature(own[1:])  # which __new__ hides from help()

    def __new__(cls, *args: Any, **options: Any) -> Objective:
        self = super().__new__(cls)
        self.key = f"{_OF_THIS_PROCESS}{next(_IDS)}"
        _OBJECTIVES[self.key] = self
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self.name, self.options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Objective:
        return self

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={_show(v)}' for k, v in self.options.items())})"

    @property
    def fewest_pairs(self) -> int:
        """The size of the smallest batch: one pair has no negatives."""
        return 2 if self.needs_negatives else 1

    def params(self, c: float) -> tuple[float, ...]:
        """Parameters of the pair kind, given d² = c − t."""
        return tuple(self.parameters)

    def kind_tau(self, tau: Tensor) -> Tensor:
        """The temperature that the pair kind sees."""
        return tau

    def rows_of_sweeps(self, rows: Rows, tau: Tensor) -> Rows:
        """The rows of both views (2N, D) as the sweeps see them."""
        return rows

    def known_numbers(
        self, tau: tuple[float, ...], most_neg: int, dtype: torch.dtype
    ) -> tuple[float, ...]:
        """The values of `numbers`; ``most_neg``: `Pairs.most_neg`, ``dtype``: of the vectors."""
        return ()

    def first_view_factor(self, *tau: float) -> float:
        """The number by which `rows_of_sweeps` multiplies the rows of the first view."""
        return 1.0

    def differentiate_rows(self, df: Tensor, n: int, tau: Tensor) -> None:
        """Converts df (rows, D), in place, from the gradient in `rows_of_sweeps` to the gradient in
        its argument; the first n rows are the first view.
        """

    def terms_of(self, learn_tau: bool) -> tuple[Term, ...]:
        """The terms whose sums `finish` needs; ``learn_tau``: the gradient in τ may be wanted."""
        return self.terms

    def check(self) -> None:
        """Raises ValueError if a user's function no longer passes the constructor's checks."""
        for function in self.functions:
            function.check()

    def look(self) -> tuple[Reading | None, ...]:
        """What each of the users' functions reads."""
        return tuple(look(function.fn) for function in self.functions)

    def solve(self, p: Pairs, learn_tau: bool) -> RowSolution:
        """All sweeps but `pair_grad`."""
        rows = self.start(p)
        sums = p.sums(self.terms_of(learn_tau), shift=rows.shift, moment_origin=rows.moment_origin)
        return self.finish(p, rows, sums)

    def start(self, p: Pairs) -> RowSolution:
        """The row vectors that `pair_grad` needs, for a `one_sweep` objective."""
        raise NotImplementedError

    def finish(self, p: Pairs, rows: RowSolution, sums: Tensor) -> RowSolution:
        """Adds ``mass`` and ``loss`` from the sums over `terms`."""
        raise NotImplementedError

    def uniform_weight(self, p: Pairs) -> Tensor:
        """The row weights if a pair weighs exactly what the pair kind says."""
        return p.step(uniform_rows, p.pos)["row_weight"]


@row_step("row_weight")
def uniform_rows(pos, *, numbers):
    return (torch.ones_like(pos) / numbers.divisor,)


@row_step("dtau")
def pair_dtau_rows(row_weight, total, *, numbers):
    """The gradient in τ from the sum `Term.DTAU` over the pairs."""
    return (row_weight * total,)


def _show(value: Any) -> str:
    return getattr(value, "__name__", repr(value)) if callable(value) else repr(value)


def _safe_inverse(x: Tensor) -> Tensor:
    """1/x, but 0 if x is 0 or so small that 1/x overflows."""
    usable = x >= torch.finfo(x.dtype).tiny
    return torch.where(usable, 1 / torch.where(usable, x, 1.0), 0.0)


# --- (a) φ/ψ losses -------------------------------------------------------------------------------


class PairLoss(Objective):
    """``L_i = φ(Σ_j ψ(Δ_ij))`` from plain Python functions.

    Derivatives come from automatic differentiation.

    Args:
        phi: elementwise function of ξ, (n,) → (n,); None is the identity, which saves one of two
            sweeps.
        psi: elementwise function of Δ, (r, c) → (r, c), any shape.

    Raises:
        TypeError: ``phi`` or ``psi`` is not callable.
        ValueError: one is not elementwise, or closes over a tensor that requires grad.

    Source: arXiv:2201.12680; α_ij = φ′(ξ_i)·ψ′(Δ_ij) is its Theorem 1.
    """

    derivative = recordable = True
    terms = (Term.F, Term.DF)
    _phi: _CustomFunction | None = None

    def __init__(
        self, phi: Callable[[Tensor], Tensor] | None, psi: Callable[[Tensor], Tensor]
    ) -> None:
        self.name, self.options = "PairLoss", {"phi": phi, "psi": psi}
        self._phi = None if phi is None else _CustomFunction(phi, "phi")
        self.functions = (_CustomFunction(psi, "psi"), *([] if phi is None else [self._phi]))
        self.kind = self.functions[0].key
        self.one_sweep, self.counts_negatives = phi is None, phi is not None

    def phi(self, xi: Tensor, tau: Tensor) -> Tensor:
        return xi if self._phi is None else self._phi(xi)

    def start(self, p: Pairs) -> RowSolution:
        return RowSolution(row_weight=self.uniform_weight(p), shift=p.pos)

    def finish(self, p: Pairs, rows: RowSolution, sums: Tensor) -> RowSolution:
        xi, dxi = sums
        if self._phi is None:
            return replace(rows, **p.step(linear_rows, rows.row_weight, xi, dxi))
        return replace(rows, **p.step(outer_rows, *p.apply(self._phi, xi), dxi))


@row_step("mass", "loss")
def linear_rows(row_weight, xi, dxi, *, numbers):
    return row_weight * dxi, xi


@row_step("row_weight", "mass", "loss")
def outer_rows(phi, dphi, dxi, *, numbers):
    weight = dphi / numbers.divisor
    return weight, weight * dxi, phi


class _LinearPairLoss(PairLoss):
    """Built-in linear ψ with one parameter, and φ = identity."""

    one_sweep = True

    def __init__(self, kind: str, parameter: float) -> None:
        self.kind, self.parameters = kind, (parameter,)


def _log(parameter: float | Tensor) -> float | Tensor:
    """The logarithm of a parameter, a tensor where a row step is printed for all of its values."""
    return parameter.log() if isinstance(parameter, Tensor) else math.log(parameter)


class _Outer(NamedTuple):
    """φ of ψ = exp(Δ/τ + margin), as a function of ℓ = log ξ.

    It is log(ε + ξ), or max(log ξ, 0)² if squared.

    The fields are floats because they are row steps' parameters.
    """

    epsilon: float = 0.0
    margin: float = 0.0
    squared: float = 0.0
    tau_in_front: float = 0.0

    def phi(self, ell: Tensor) -> Tensor:
        if self.squared:
            return torch.relu(ell).square()
        if self.epsilon == 0:
            return ell
        # torch's softplus turns linear at 20, an error of 2e-9
        return torch.logaddexp(ell, torch.zeros_like(ell) + _log(self.epsilon))

    def dphi(self, ell: Tensor) -> Tensor:
        if self.squared:
            return 2 * torch.relu(ell)
        if self.epsilon == 0:
            return torch.ones_like(ell)
        return torch.sigmoid(ell - _log(self.epsilon))

    def legendre(self, ell: Tensor) -> Tensor:
        """φ − φ′·ℓ without cancellation."""
        if self.squared:
            return -torch.relu(ell).square()
        if self.epsilon == 0:
            return torch.zeros_like(ell)
        shift = _log(self.epsilon)
        u = (ell - shift).abs()
        tail = torch.log1p((-u).exp()) + u * torch.sigmoid(-u)
        return tail + shift * torch.sigmoid(shift - ell)

    def scaled(self, y: Tensor, tau: Tensor) -> Tensor:
        return y * tau if self.tau_in_front else y

    def ell(self, pos: Tensor, shift: Tensor, total: Tensor, tau: Tensor) -> Tensor:
        """log Σ_j exp(Δ_ij/τ + margin)."""
        return (shift - pos / tau) + total.log() + self.margin


@row_step("row_weight", "mass", "loss", parameters=_Outer._fields)
def exp_rows(pos, shift, total, *, numbers, **fields):
    outer, tau = _Outer(**fields), numbers.tau
    ell = outer.ell(pos, shift, total, tau)
    mass = outer.scaled(outer.dphi(ell), tau) / tau / numbers.divisor
    return mass / total, mass, outer.scaled(outer.phi(ell), tau)


@row_step("row_weight", "mass", "loss", "dtau", parameters=_Outer._fields)
def exp_rows_with_dtau(pos, shift, total, gap_sum, *, numbers, **fields):
    weight, mass, loss = exp_rows.function(pos, shift, total, numbers=numbers, **fields)
    # ∂ℓ/∂τ = −Σ_j p_ij Δ_ij/τ², p = softmax. −½Σ⟨F, dF⟩/τ would do too, but cancels where rows are
    # long.
    return weight, mass, loss, weight * gap_sum / -numbers.tau


@row_step("dtau", parameters=_Outer._fields)
def exp_dtau_in_front(pos, shift, total, moment, *, numbers, **fields):
    # ∂(τφ(ℓ))/∂τ = φ − φ′·ΣpΔ/τ is the difference of two large numbers where |t| ≫ τ. Substituting
    # ΣpΔ/τ = ℓ − margin − log Σ + Σp·log(f/e^shift) gives (φ − φ′ℓ) + φ′·(margin + log Σ −
    # Σp·log(f/e^shift)), whose terms are small.
    outer = _Outer(**fields)
    ell = outer.ell(pos, shift, total, numbers.tau)
    spread = outer.margin + total.log() - moment / (total * numbers.tau)
    return ((outer.legendre(ell) + outer.dphi(ell) * spread) / numbers.divisor,)


@row_step("moment_origin")
def scaled_shift(shift, *, numbers):
    return (shift * numbers.tau,)


class _ExpPairLoss(Objective):
    """Built-in ψ = exp(Δ/τ + margin) (or τ := 1), through ℓ = log ξ: accurate at L = 1e-30."""

    kind, recordable = "exp", True

    def __init__(self, uses_temperature: bool = False, **outer: float) -> None:
        self._outer = _Outer(**outer)
        self.margin, self.uses_temperature = self._outer.margin, uses_temperature
        self.tau_gradient = "rows" if uses_temperature else None

    def kind_tau(self, tau: Tensor) -> Tensor:
        return tau if self.uses_temperature else torch.ones_like(tau)

    def phi(self, ell: Tensor, tau: Tensor) -> Tensor:
        return self._outer.scaled(self._outer.phi(ell), tau)

    def dphi(self, ell: Tensor, tau: Tensor) -> Tensor:
        return self._outer.scaled(self._outer.dphi(ell), tau)

    def times_temperature(self, losses: Tensor, tau: Tensor) -> Tensor:
        """Losses at τ (anchors,), from those at τ = 1 of similarities that τ has divided."""
        return self._outer.scaled(losses, tau)

    def solve(self, p: Pairs, learn_tau: bool) -> RowSolution:
        outer = self._outer._asdict()
        if learn_tau and not self._outer.tau_in_front:
            sums = p.sums((Term.SHIFT, Term.F, Term.F_MOMENT))
            return RowSolution(shift=sums[0], **p.step(exp_rows_with_dtau, p.pos, *sums, **outer))
        shift, total = p.sums((Term.SHIFT, Term.F))
        rows = RowSolution(shift=shift, **p.step(exp_rows, p.pos, shift, total, **outer))
        if learn_tau:  # costs one more sweep
            origin = p.step(scaled_shift, shift)["moment_origin"]
            (moment,) = p.sums((Term.F_MOMENT,), shift=shift, moment_origin=origin)
            rows.dtau = p.step(exp_dtau_in_front, p.pos, shift, total, moment, **outer)["dtau"]
        return rows


# --- (b) α given directly -------------------------------------------------------------------------


@row_step("row_weight", "mass", "loss", counts=(2, 3))
def weight_rows(*sums, numbers, alpha_eps):
    *shift, total, gap_sum = sums
    z = total
    if alpha_eps:
        extra = alpha_eps * numbers.n_neg
        z = total + (extra * (-shift[0]).exp() if shift else extra)
    inv_z = _safe_inverse(z)
    weight, loss = inv_z / numbers.divisor, gap_sum * inv_z
    return weight, total * weight, loss


@row_step("row_weight", "mass", "loss", "baseline", counts=(2, 3))
def weight_rows_through_alpha(*sums, numbers, alpha_eps):
    weight, mass, loss = weight_rows.function(*sums, numbers=numbers, alpha_eps=alpha_eps)
    return weight, mass, loss, loss


@row_step("mass", "loss")
def unnormalized_rows(total, gap_sum, *, numbers):
    return total / numbers.divisor, gap_sum


class PairWeight(Objective):
    """``L_i = Σ_j α_ij Δ_ij`` with α_ij = w(d²_ij)/Z_i from a plain Python function of a tensor.

    Args:
        weight: elementwise, non-negative function of d², (r, c) → (r, c), any shape.
        normalized: Z_i = Σ_j w + alpha_eps·|Neg|, otherwise Z_i = 1. A row of zero weights has α =
            0.
        alpha_eps: ≥ 0; only with ``normalized``.
        detach_alpha: treat α as a constant in the gradient (the paper's setting) instead of
            back-propagating through it.

    Raises:
        TypeError: ``weight`` is not callable, or an option has the wrong type.
        ValueError: ``weight`` is not elementwise or closes over a tensor that requires grad, or
            ``alpha_eps`` is negative or given without ``normalized``.

    Source: arXiv:2201.12680, pair-weighted CL (α-CL-direct).
    """

    terms, recordable = (Term.F, Term.F_MOMENT), True

    def __init__(
        self,
        weight: Callable[[Tensor], Tensor],
        *,
        normalized: bool = True,
        alpha_eps: float = 0.0,
        detach_alpha: bool = True,
    ) -> None:
        options = {
            "normalized": normalized, "alpha_eps": alpha_eps, "detach_alpha": detach_alpha,
        }  # fmt: skip
        self._configure(**_checked("PairWeight", options))
        self.name, self.options = "PairWeight", {"weight": weight, **options}
        self.functions = (_CustomFunction(weight, "weight", of_distance=True),)
        self.kind = self.functions[0].key

    def _configure(self, normalized: bool, alpha_eps: float, detach_alpha: bool) -> None:
        self.normalized, self.alpha_eps, self.detach_alpha = normalized, alpha_eps, detach_alpha
        self.one_sweep, self.counts_negatives = not self.normalized, self.alpha_eps > 0
        if self.uses_temperature and not self.detach_alpha:
            self.tau_gradient = "pairs"

    def params(self, c: float) -> tuple[float, ...]:
        return (c, *self.parameters)

    def solve(self, p: Pairs, learn_tau: bool) -> RowSolution:
        if not self.normalized:
            return super().solve(p, learn_tau)
        log = kind(self.kind).log
        sums = p.sums((Term.SHIFT, *self.terms) if log else self.terms)
        step = weight_rows if self.detach_alpha else weight_rows_through_alpha
        rows = p.step(step, *sums, alpha_eps=self.alpha_eps)
        return RowSolution(shift=sums[0] if log else None, **rows)

    def start(self, p: Pairs) -> RowSolution:
        return RowSolution(
            row_weight=self.uniform_weight(p),
            shift=p.zeros() if kind(self.kind).log else None,
            baseline=None if self.detach_alpha else p.zeros(),
        )

    def finish(self, p: Pairs, rows: RowSolution, sums: Tensor) -> RowSolution:
        return replace(rows, **p.step(unnormalized_rows, *sums[:2]))


class _NamedPairWeight(PairWeight):
    uses_temperature = True

    def __init__(self, kind: str, parameters: Sequence[float], *options: Any) -> None:
        self.kind, self.parameters = kind, parameters
        self._configure(*options)


# --- (c) α as the exact min player ----------------------------------------------------------------


@row_step("low", "high", "y", "done")
def newton(mass, slope, y, low, high, *, numbers, power, far_power):
    """One step towards Σ_j h = 1 from Σh and Σh′ at y; the bracket [low, high] shrinks."""
    eps = torch.finfo(y.dtype).eps
    below = mass < 1
    low, high = torch.where(below, y, low), torch.where(below, high, y)
    far = mass < 0.5
    power = torch.where(far, torch.zeros_like(mass) + far_power, torch.zeros_like(mass) + power)
    new = y + (mass - mass.pow(1 + power)) / (power * slope)
    new = torch.where((new >= low) & (new <= high), new, (low + high) / 2)
    done = ((mass - 1).abs() <= 8 * eps) | ((new - y).abs() <= eps * y.abs())
    return low, high, torch.where(done, y, new), done


@row_step("low", "high")
def newton_bracket(t_max, *, numbers, low, high):
    return torch.zeros_like(t_max) + low, torch.zeros_like(t_max) + high


@row_step("low")
def low_of_each(low, *, numbers, power, most):
    """From inverse(1/most) to inverse(1/|Neg(i)|), where h = (·)^(−1/power)."""
    return (low * (numbers.n_neg / most) ** power,)


@row_step("mean", "mean_square")
def means_of_sums(pos, count, total, squares, *, numbers):
    """Means of t and t² from the sums of t − t⁺ and of its square."""
    gap = total / count
    return pos + gap, squares / count + pos * (gap + gap + pos)


@row_step("row_weight", "mass", "loss")
def min_player_rows(t_max, pos, mass, moment, *, numbers):
    # Σ_j α_ij Δ_ij from the moment about t_max: Δ itself, times h′ = O(1/τ), would leave eps·|Δ|/τ
    # of noise in g.
    loss = moment + mass * (t_max - pos)
    return torch.ones_like(mass) / numbers.divisor, mass / numbers.divisor, loss


@row_step("row_weight", "mass", "loss", "baseline")
def min_player_rows_through_alpha(t_max, pos, mass, moment, slope, slope_moment, *, numbers):
    rows = min_player_rows.function(t_max, pos, mass, moment, numbers=numbers)
    return *rows, slope_moment * _safe_inverse(slope)


def _inside(guess: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A guess, clamped to the bracket of the Newton iteration."""
    return torch.minimum(torch.maximum(torch.where(guess.isfinite(), guess, high), low), high)


@row_step("y")
def start_at_normal_tail(t_max, mean, mean_square, low, high, *, numbers):
    # The root for normally distributed similarities: with y = t_max − mean + σz, Σ_j max(x_ij, 0) =
    # |Neg|·σ·G(z), G(z) = φ(z) + zΦ(z), convex and ≥ z; so Newton from z = r descends to
    # G(z) = r = τ/(|Neg|·σ).
    tiny = torch.finfo(mean.dtype).tiny
    sigma = (mean_square - mean.square()).clamp(min=tiny).sqrt()
    target = numbers.tau / (numbers.n_neg * sigma)
    z = target
    for _ in range(8):
        density = torch.exp(z.square() / -2) / math.sqrt(2 * math.pi)
        below = torch.special.ndtr(z)
        z = z - (density + z * below - target) / below.clamp(min=tiny)
    # The largest of a few values are not a normal tail; from above Newton descends monotonically.
    few = numbers.n_neg * below < 8
    return (_inside(torch.where(few, high, t_max - mean + sigma * z), low, high),)


@row_step("y")
def start_at_mean(t_max, mean, low, high, *, numbers):
    # h is convex in d²: by Jensen the root lies below the root of a row with all distances at their
    # mean.
    return (_inside(low + (t_max - mean), low, high),)


class MinPlayer(Objective):
    """``L_i = Σ_j α_ij Δ_ij`` with the exact min player of a concave R = Σ_j r(α_ij).

    α_i = argmin_{α≥0, Σα=1} Σ_j α_j d²_ij − Σ_j r(α_j) has α_ij = h(μ_i − d²_ij): h(x) solves
    r′(α) = −x (clipped to α ≥ 0), and the scalar μ_i follows from Σ_j α_ij = 1. One safeguarded
    Newton solver, whose sums Σh and Σh′ are fused sweeps, serves every h.

    Args:
        h: non-decreasing elementwise function of x = μ − d², (r, c) → (r, c), that is 0 or positive
            and passes both 1/|Neg| and 1 somewhere. Values may be inf or NaN above its domain.
        detach_alpha: treat α as a constant in the gradient instead of differentiating through the
            exact minimum.

    Raises:
        TypeError: ``h`` is not callable, or ``detach_alpha`` is not a bool.
        ValueError: ``h`` is not elementwise, or does not pass 1/|Neg| and 1.

    Source: arXiv:2201.12680, the min player; α_square is sparsemax (Martins and Astudillo 2016).
    """

    #: Newton's method solves (Σh)^(−power) = 1, which is nearly linear in μ for h = (·)^(−1/power);
    newton_power = -1.0
    #: for small Σh it solves a problem from which a convex Σh overshoots less: by 1 instead of 100
    #: times.
    far_power = -0.5
    max_sweeps = 60
    numbers = ("low", "high", "most")

    def __init__(self, h: Callable[[Tensor], Tensor], *, detach_alpha: bool = True) -> None:
        self.functions = (_CustomFunction(h, "h"),)
        self.kind = self.functions[0].key
        self.name, self.options = "MinPlayer", {"h": h, "detach_alpha": detach_alpha}
        self._configure(**_checked("MinPlayer", {"detach_alpha": detach_alpha}))
        # a subclass may do anything with vectors, and says so itself
        self.recordable = type(self) is MinPlayer
        # the values of h, and x with h(x) = alpha for each alpha that was asked for
        self._inverses: tuple[bytes, dict[float, float]] = b"", {}
        with unset_fake_temporarily():
            self._numeric_inverse(1.0)

    def _configure(self, detach_alpha: bool) -> None:
        self.detach_alpha = detach_alpha
        if self.uses_temperature and not self.detach_alpha:
            self.tau_gradient = "pairs"

    def inverse(self, alpha: float, tau: Tensor) -> Tensor:
        """x with h(x) = alpha."""
        return torch.full_like(tau, self._numeric_inverse(alpha))

    def known_numbers(
        self, tau: tuple[float, ...], most_neg: int, dtype: torch.dtype
    ) -> tuple[float, ...]:
        seen = torch.tensor(tau[0], dtype=dtype, device="cpu")
        return *(self.inverse(a, seen).item() for a in (1 / most_neg, 1.0)), most_neg

    def bracket(self, p: Pairs, t_max: Tensor) -> tuple[Tensor, Tensor]:
        """[low, high] (anchors,), which hold every y_i."""
        if isinstance(p.tau, tuple):  # names, while `program` records
            low, high, _ = p.tau
            return tuple(p.step(newton_bracket, t_max, low=low, high=high).values())
        return tuple(self.inverse(a, p.tau).expand_as(t_max) for a in (1 / p.most_neg, 1.0))

    def start_of_newton(self, p: Pairs, t_max: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The first y_i = μ_i − min_j d²_ij, inside [low, high]; all (anchors,)."""
        high = self.bracket(p, t_max)[1]  # its own vector: the iteration writes to all three
        return high.clone() if isinstance(high, Tensor) else high

    def _numeric_inverse(self, alpha: float) -> float:
        """The search takes milliseconds, so its results are kept as long as h has its values."""
        values = self.functions[0].values()
        if self._inverses[0] != values:
            self._inverses = values, {}
        found = self._inverses[1]
        if alpha not in found:
            found[alpha] = self._searched_inverse(alpha)
        return found[alpha]

    def _searched_inverse(self, alpha: float) -> float:
        (h,) = self.functions
        magnitudes = torch.logspace(-30, 30, 1201, dtype=torch.float64, device="cpu")
        grid = torch.cat([-magnitudes.flip(0), magnitudes.new_zeros(1), magnitudes])
        above = ~(h(grid) < alpha)  # NaN and inf lie above the domain of h
        if above.all() or not above.any():
            side = "larger" if above.all() else "smaller"
            raise ValueError(f"h must pass {alpha:.6g} somewhere, got {side} values only")
        first = int(above.to(torch.uint8).argmax())
        low, high = grid[first - 1 : first].clone(), grid[first : first + 1].clone()
        for _ in range(200):
            middle = (low + high) / 2
            up = ~(h(middle) < alpha)
            low, high = torch.where(up, low, middle), torch.where(up, middle, high)
        return float(low)

    def solve(self, p: Pairs, learn_tau: bool) -> RowSolution:
        # With y = μ − d²_min, x_ij = (t_ij − t_max) + y: differences keep float32 row sums accurate
        # to 1e-7 at τ = 1e-3, where μ − d² itself would lose three digits.
        (t_max,) = p.sums((Term.T_MAX,))
        low, high = self.bracket(p, t_max)
        start = low, high, self.start_of_newton(p, t_max, low, high)
        terms = (Term.F, Term.DF, Term.F_MOMENT)
        if not self.detach_alpha:
            terms = (*terms, Term.DF_MOMENT)
        powers = {"power": self.newton_power, "far_power": self.far_power}
        y, (mass, slope, moment, *slope_moment) = p.newton(
            terms, t_max, start, self.max_sweeps, powers
        )
        rows = (t_max, p.pos, mass, moment)
        if self.detach_alpha:
            solved = p.step(min_player_rows, *rows)
        else:
            solved = p.step(min_player_rows_through_alpha, *rows, slope, *slope_moment)
        return RowSolution(shift=t_max, argument_offset=y, moment_origin=t_max, **solved)


class _AlphaSquare(MinPlayer):
    kind, uses_temperature, recordable = "square", True, True

    def __init__(self, detach_alpha: bool) -> None:
        self._configure(detach_alpha)

    def inverse(self, alpha: float, tau: Tensor) -> Tensor:
        return alpha * tau

    def start_of_newton(self, p: Pairs, t_max: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return p.step(start_at_normal_tail, t_max, *p.moments(), low, high)["y"]


class _AlphaGamma(MinPlayer):
    kind, uses_temperature, recordable = "gamma", True, True

    def __init__(self, gamma: float, detach_alpha: bool) -> None:
        self._configure(detach_alpha)
        self.newton_power = self.far_power = gamma
        self.parameters = (gamma,)

    def inverse(self, alpha: float, tau: Tensor) -> Tensor:
        # (1/α)^γ; half of the dtype's range is left for τ and for differences of the sums
        exponent = -self.newton_power * math.log(alpha)
        limit = math.log(torch.finfo(tau.dtype).max) / 2
        if exponent > limit:
            raise ValueError(
                f"alpha_gamma: gamma must be at most {limit / -math.log(alpha):.3g} with "
                f"{1 / alpha:.0f} negatives in {str(tau.dtype).removeprefix('torch.')} "
                f"(|Neg|^gamma leaves its range), got {self.newton_power:g}"
            )
        return -tau * math.exp(exponent)

    def start_of_newton(self, p: Pairs, t_max: Tensor, low: Tensor, high: Tensor) -> Tensor:
        if not isinstance(p.n_neg, int):
            # every anchor's own inverse(1/|Neg(i)|): from below Newton may take 20 steps more
            low = p.step(low_of_each, low, power=self.newton_power, most=p.most_neg)["low"]
        return p.step(start_at_mean, t_max, p.mean_negative(), low, high)["y"]


# --- constant α -----------------------------------------------------------------------------------


class ClosedForm(Objective):
    """Constant α_ij: ``L_i = weight·(mean_j t_ij − t⁺_i)`` without pairwise work."""

    def __init__(self, per_negative: bool) -> None:
        self.per_negative = per_negative
        self.of_each_pair = ConstantWeight(self)

    def weight(self, n_neg: int | Tensor) -> int | float | Tensor:
        """Σ_j α_ij."""
        return n_neg if self.per_negative else 1.0


#: The key of a `ConstantWeight` is the key of its `ClosedForm` and this.
_OF_EACH_PAIR = " of each pair"
#: exp(t/τ) is 1 at this τ for every similarity that is not beyond 1e22.
INFINITE_TAU = 1e30


class ConstantWeight(PairWeight):
    """A `ClosedForm` by sums over pairs, for batches in which not all negatives count.

    Its weights are exp(t/∞) = 1.
    """

    kind = "exp"

    def __init__(self, closed_form: ClosedForm) -> None:
        self.closed_form = closed_form
        self._configure(not closed_form.per_negative, alpha_eps=0.0, detach_alpha=True)

    @property
    def name(self) -> str:
        return self.closed_form.name

    @property
    def options(self) -> dict[str, Any]:
        return self.closed_form.options

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.attrgetter("of_each_pair"), (self.closed_form,)

    def params(self, c: float) -> tuple[float, ...]:
        return ()

    def kind_tau(self, tau: Tensor) -> Tensor:
        return torch.full_like(tau, INFINITE_TAU)


# --- the positive has its own term ----------------------------------------------------------------


@row_step("row_weight", "shift")
def siglip_start(row_weight, zero, *, numbers, scale, bias, used):
    return row_weight * (scale / used), zero - bias


@row_step("mass", "loss")
def siglip_rows(pos, total, *, numbers, scale, bias):
    logistic, y = KINDS["logistic"], scale * pos + bias
    pull = logistic.df(-y, scale)
    return scale * pull / numbers.divisor, total + logistic.f(-y, scale)


@row_step("of_scale", "of_bias")
def siglip_slopes(pos, slope, moment, *, numbers, scale, bias, used):
    pull = KINDS["logistic"].df(-(scale * pos + bias), scale)
    of_scale, of_bias = moment / used - pull * pos, slope - pull
    return of_scale / numbers.divisor, of_bias / numbers.divisor


class SigLip(Objective):
    """``L_i = log(1 + e^{−y_ii}) + Σ_j log(1 + e^{y_ij})`` with y = scale·t + bias.

    Its temperature is the tensor (2,) of scale and bias. The sweeps multiply the rows of the first
    view by the scale and see x = scale·t + bias. (With scale·(t + bias/scale), the rounding of the
    quotient would shift all logits in one direction.)

    Source: arXiv:2303.15343.
    """

    name, options = "siglip", {}
    kind, uses_temperature, tau_gradient = "logistic", True, "rows"
    one_sweep, derivative, needs_negatives, recordable = True, True, False, True
    numbers = ("scale", "bias", "used")

    #: A smaller scale is replaced, because sums over pairs are divided by it. It leaves y = bias
    #: for similarities far below 2⁶⁰.
    LEAST_SCALE = 2.0**-60

    def __reduce__(self) -> str:
        return "SIGLIP"

    def kind_tau(self, tau: Tensor) -> Tensor:
        return torch.ones_like(tau[0])

    def known_numbers(
        self, tau: tuple[float, ...], most_neg: int, dtype: torch.dtype
    ) -> tuple[float, ...]:
        return *tau, self.first_view_factor(*tau)

    def first_view_factor(self, scale: float, bias: float) -> float:
        return self.LEAST_SCALE if abs(scale) < self.LEAST_SCALE else scale

    def _used(self, tau: Tensor) -> Tensor:
        """() the scale of the sweeps' rows."""
        return torch.where(tau[0].abs() < self.LEAST_SCALE, self.LEAST_SCALE, tau[0])

    def _numbers(self, p: Pairs) -> tuple[Any, ...]:
        """Scale, bias and the scale of the sweeps' rows; their names while `program` records."""
        return p.tau if isinstance(p.tau, tuple) else (*p.tau, self._used(p.tau))

    def rows_of_sweeps(self, rows: Rows, tau: Tensor) -> Rows:
        factor = tau.new_ones(len(rows.f))
        factor[: len(rows.f) // 2] = self._used(tau)
        return rows._replace(scale=factor if rows.scale is None else rows.scale * factor)

    def differentiate_rows(self, df: Tensor, n: int, tau: Tensor) -> None:
        df.view(-1, df.shape[-1])[:n].mul_(self._used(tau))

    def terms_of(self, learn_tau: bool) -> tuple[Term, ...]:
        return (Term.F, Term.DF, Term.DF_MOMENT) if learn_tau else (Term.F,)

    def start(self, p: Pairs) -> RowSolution:
        scale, bias, used = self._numbers(p)
        weight, zero = self.uniform_weight(p), p.zeros()
        rows = p.step(siglip_start, weight, zero, scale=scale, bias=bias, used=used)
        return RowSolution(**rows, moment_origin=zero)

    def finish(self, p: Pairs, rows: RowSolution, sums: Tensor) -> RowSolution:
        total, *slope_and_moment = sums
        scale, bias, used = self._numbers(p)
        rows = replace(rows, **p.step(siglip_rows, p.pos, total, scale=scale, bias=bias))
        if not slope_and_moment:
            return rows
        slopes = p.step(siglip_slopes, p.pos, *slope_and_moment, scale=scale, bias=bias, used=used)
        return replace(rows, dtau=p.stack(slopes["of_scale"], slopes["of_bias"]))


#: The one instance, which a compiled graph finds by its key.
SIGLIP = SigLip()
SIGLIP.key = SIGLIP.name
_OBJECTIVES[SIGLIP.key] = SIGLIP


# --- the named members ----------------------------------------------------------------------------


#: Numeric options: what each must be at least, or above; all other options are flags.
_NUMBERS = {
    "epsilon": "≥ 0", "alpha_eps": "≥ 0", "margin": "", "scale": "> 0", "exponent": "> 0",
    "order": "> 0", "gamma": "> 1",
}  # fmt: skip


def _checked(owner: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with numbers as floats; TypeError or ValueError where one is unusable."""
    checked = {}
    for name, value in options.items():
        if name not in _NUMBERS:
            if not isinstance(value, bool):
                raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")
            checked[name] = value
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
        relation, _, bound = _NUMBERS[name].partition(" ")
        small = bound and (value < float(bound) or (relation == ">" and value == float(bound)))
        if not math.isfinite(value) or small:
            expected = f"a finite number {_NUMBERS[name]}".rstrip()
            raise ValueError(f"{owner}: {name} must be {expected}, got {value}")
        checked[name] = float(value)
    if checked.get("alpha_eps") and not checked.get("normalized", True):
        raise ValueError(
            f"{owner}: alpha_eps must be 0 with normalized=False, got {checked['alpha_eps']}"
        )
    return checked


_Factory = TypeVar("_Factory", bound=Callable[..., Any])
#: The functions that make the named members.
_FACTORIES: dict[str, Callable[..., Objective]] = {}


def _named(function: _Factory) -> _Factory:
    """Registers a function of checked options as the objective of its name."""
    name, signature = function.__name__, inspect.signature(function)

    @wraps(function)
    def factory(*args: Any, **options: Any) -> Objective:
        given = signature.bind(*args, **options)
        given.apply_defaults()
        checked = _checked(name, given.arguments)
        objective = function(**checked)
        objective.name, objective.options = name, checked
        objective.key = f"{name} {json.dumps(checked)}"
        if isinstance(objective, ClosedForm):
            objective.of_each_pair.key = objective.key + _OF_EACH_PAIR
        return objective

    factory.__signature__ = signature  # which `inspect.signature` would make anew at every call
    _FACTORIES[name] = factory
    return factory


@_named
def infonce(epsilon: float = 1.0, temperature_scaled: bool = False) -> Objective:
    """φ = log(ε + x), ψ = exp(x/τ).

    Args:
        epsilon: ε ≥ 0; 1 gives NT-Xent (SimCLR), 0 decoupled contrastive learning.
        temperature_scaled: multiply the loss by τ (the paper's form).

    Source: arXiv:2201.12680; arXiv:2002.05709; arXiv:2110.06848.
    """
    return _ExpPairLoss(
        uses_temperature=True, epsilon=epsilon, tau_in_front=float(temperature_scaled)
    )


@_named
def mine() -> Objective:
    """φ = log x, ψ = exp(x); no temperature. Source: arXiv:2201.12680; arXiv:1801.04062."""
    return _ExpPairLoss()


@_named
def triplet(margin: float = 1.0) -> Objective:
    """φ = x, ψ = max(x + margin, 0), on ½-squared distances; no temperature.

    Args:
        margin: any finite number.

    Source: arXiv:2201.12680; arXiv:1503.03832.
    """
    return _LinearPairLoss("hinge", margin)


@_named
def soft_triplet(margin: float = 1.0) -> Objective:
    """φ = τ·log(1 + x), ψ = exp(x/τ + margin).

    Args:
        margin: any finite number.

    Source: arXiv:2201.12680 (φ/ψ family).
    """
    return _ExpPairLoss(uses_temperature=True, epsilon=1.0, margin=margin, tau_in_front=1.0)


@_named
def n_plus_1_tuplet() -> Objective:
    """φ = log(1 + x), ψ = exp(x); no temperature. Source: arXiv:2201.12680; Sohn, NeurIPS 2016."""
    return _ExpPairLoss(epsilon=1.0)


@_named
def lifted_structured(margin: float = 1.0) -> Objective:
    """φ = max(log x, 0)², ψ = exp(x + margin); no temperature.

    Args:
        margin: any finite number.

    Source: arXiv:2201.12680; arXiv:1511.06452.
    """
    return _ExpPairLoss(margin=margin, squared=1.0)


@_named
def modified_triplet(scale: float = 1.0) -> Objective:
    """φ = x, ψ = sigmoid(scale·x); no temperature.

    Args:
        scale: > 0.

    Source: arXiv:2201.12680 (φ/ψ family).
    """
    return _LinearPairLoss("sigmoid", scale)


@_named
def triplet_contrastive() -> Objective:
    """φ = x, ψ = x: L_i = Σ_j Δ_ij in O(n·D); no temperature. Source: arXiv:2201.12680."""
    return ClosedForm(per_negative=True)


@_named
def alpha_direct(
    exponent: float = 4,
    normalized: bool = True,
    alpha_eps: float = 0.0,
    detach_alpha: bool = True,
) -> Objective:
    """α_ij ∝ exp(−(d²_ij)^{exponent/2}/τ).

    With similarity "dot", d² = 1 − t is negative for pairs more similar than t = 1. Exponent 2
    takes no power, so its weights go on growing there and are `alpha_entropy`'s softmax for every
    similarity. Any other exponent counts such a pair as one at distance 0, with derivative 0:
    exponents near 2 then differ from 2. With "cosine" and "euclidean" d² is never negative.

    Args:
        exponent: the exponent of the distance d, > 0.
        normalized: see `PairWeight`.
        alpha_eps: see `PairWeight`.
        detach_alpha: see `PairWeight`.

    Source: arXiv:2201.12680, α-CL-direct.
    """
    kind, *parameters = ("gibbs",) if exponent == 2 else ("power", exponent / 2)
    return _NamedPairWeight(kind, parameters, normalized, alpha_eps, detach_alpha)


@_named
def alpha_entropy(alpha_eps: float = 0.0, detach_alpha: bool = True) -> Objective:
    """Min player of R = −τ·Σα log α, a softmax: α_ij ∝ exp(−d²_ij/τ).

    Its gradient is τ times InfoNCE's with ε = 0.

    Args:
        alpha_eps: see `PairWeight`.
        detach_alpha: see `PairWeight`.

    Source: arXiv:2201.12680, the entropy regulariser.
    """
    return _NamedPairWeight("gibbs", (), True, alpha_eps, detach_alpha)


@_named
def alpha_inverse(
    exponent: float = 2,
    order: float = 1,
    normalized: bool = True,
    alpha_eps: float = 0.0,
    detach_alpha: bool = True,
) -> Objective:
    """α_ij ∝ (max(d²_ij, 0)^{exponent/2} + τ)^{−order}: the published experiments' form of r_γ.

    Args:
        exponent: > 0, of the distance d.
        order: > 0.
        normalized: see `PairWeight`.
        alpha_eps: see `PairWeight`.
        detach_alpha: see `PairWeight`.

    Source: arXiv:2201.12680, the code of its experiments.
    """
    return _NamedPairWeight("inverse", (exponent / 2, order), normalized, alpha_eps, detach_alpha)


@_named
def uniform() -> Objective:
    """α_ij = 1/|Neg| (the paper's quadratic loss): L_i = mean_j t_ij − t⁺_i, in O(n·D)."""
    return ClosedForm(per_negative=False)


@_named
def alpha_square(detach_alpha: bool = True) -> Objective:
    """Exact min player of R = −(τ/2)·Σα²: α_ij = max(μ_i − d²_ij, 0)/τ (sparsemax).

    Args:
        detach_alpha: see `MinPlayer`.

    Source: arXiv:2201.12680 r_s; arXiv:1602.02068.
    """
    return _AlphaSquare(detach_alpha)


@_named
def alpha_gamma(gamma: float = 2.0, detach_alpha: bool = True) -> Objective:
    """Exact min player of R = τ/(1−γ)·Σα^{1−γ}: α_ij = (τ/(d²_ij − μ_i))^{1/γ}.

    α is nearly uniform unless τ ≲ |Neg|^{−γ}: with γ = 2 and 1,000 negatives that is τ ≲ 1e-6.

    Args:
        gamma: γ > 1.
        detach_alpha: see `MinPlayer`.

    Source: arXiv:2201.12680 r_γ.
    """
    return _AlphaGamma(gamma, detach_alpha)


__all__ += list(_FACTORIES)
#: Every built-in objective with its default options.
DEFAULTS: dict[str, Objective] = {name: factory() for name, factory in _FACTORIES.items()}
#: L_i = log Σ_j exp(Δ_ij/τ), a part of many other losses.
LOG_SUM = infonce(epsilon=0.0)


def _remade(name: str, options: dict[str, Any]) -> Objective:
    """An objective from what `Objective.__reduce__` keeps."""
    by_user = {cls.__name__: cls for cls in (PairLoss, PairWeight, MinPlayer)}
    return {**_FACTORIES, **by_user}[name](**options)


def names() -> tuple[str, ...]:
    """Names of all built-in objectives."""
    return tuple(_FACTORIES)


def is_built_in(objective: Objective) -> bool:
    """Whether an objective is made of this module's functions alone."""
    return type(objective).__module__ == __name__ and not objective.functions


def make(objective: str | Objective, options: Mapping[str, Any] | None = None) -> Objective:
    """An objective from its name and options; an `Objective` passes through.

    Args:
        objective: a name out of `names`, or an `Objective`.
        options: keyword arguments of the objective's function.

    Raises:
        TypeError: ``objective`` is neither a name nor an `Objective`, or options come with an
            object.
        ValueError: unknown name, or an option that this objective does not have.
    """
    options = dict(options or {})
    if isinstance(objective, Objective):
        if options:
            raise TypeError(
                "options must be given to the objective object itself, "
                f"got an object and {', '.join(options)}"
            )
        return objective
    if not isinstance(objective, str):
        raise TypeError(f"objective must be a name or an Objective, got {type(objective).__name__}")
    if objective not in _FACTORIES:
        raise ValueError(f"objective must be one of {', '.join(names())}, got {objective!r}")
    factory = _FACTORIES[objective]
    known = factory.__signature__.parameters
    foreign = [name for name in options if name not in known]
    if foreign:
        expected = f"one of {', '.join(known)}" if known else "none (it has no options)"
        raise ValueError(f"options of {objective} must be {expected}, got {', '.join(foreign)}")
    return factory(**options)
