"""Pair kinds as Triton functions: in the interpreter against torch, and compiled ahead of time
for three architectures.
"""

import gc
import inspect
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

if __name__ != "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
tl = triton.language

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from alphacl_fast import objectives  # noqa: E402
from alphacl_fast.kernels import trace  # noqa: E402
from alphacl_fast.objectives import MinPlayer, PairLoss, PairWeight  # noqa: E402
from tools.resources import compile_for  # noqa: E402

ROOT = Path(__file__).parent.parent
#: One process starts the process that compiles.
one_worker = pytest.mark.xdist_group("trace")
EPS = torch.finfo(torch.float32).eps


@triton.jit
def apply_kernel(
    x_ptr, tau_ptr, y_ptr, fn: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    offs = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y = fn(tl.load(x_ptr + offs), tl.load(tau_ptr))  # (ROWS, COLUMNS)
    tl.store(y_ptr + offs, y)


def apply(fn, x, tau=0.3, rows=8):
    """A traced function of a vector, in tiles of `rows` rows."""
    width = -(-x.numel() // rows)
    columns = 1 << max(width - 1, 1).bit_length()
    padded = torch.cat([x, x[:1].expand(rows * columns - x.numel())])
    y = torch.full_like(padded, torch.nan)
    apply_kernel[(1,)](padded, torch.tensor(tau, dtype=x.dtype), y, fn, rows, columns)
    return y[: x.numel()]


@triton.jit
def loop_kernel(
    x_ptr,
    tau_ptr,
    y_ptr,
    n,
    f: tl.constexpr,
    df: tl.constexpr,
    dtau: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tau = tl.load(tau_ptr)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs)
        y = f(x, tau) * df(x, tau)
        if dtau is not None:
            y += dtau(x, tau)
        tl.store(y_ptr + offs, y)


@triton.jit
def all_kernel(x_ptr, tau_ptr, y_ptr, FNS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for i in tl.static_range(len(FNS)):
        tl.store(y_ptr + i * BLOCK + offs, FNS[i](tl.load(x_ptr + offs), tl.load(tau_ptr)))


def source(fn):
    return inspect.getsource(fn.fn)


def check(
    fn,
    reference,
    points,
    tau=0.3,
    limits=(0.0, torch.inf, -torch.inf, torch.nan),
    ulps=4,
    rtol=1e-13,
):
    """``fn`` against ``reference(x, tau)`` of torch, both dtypes, and in float32 at the limits,
    too.
    """
    wide = apply(fn, points, tau)
    expected = reference(points, torch.tensor(tau, dtype=torch.float64))
    torch.testing.assert_close(wide, expected, rtol=rtol, atol=1e-15, equal_nan=True)

    x = torch.cat([points.float(), torch.tensor(limits)])
    narrow_tau = torch.tensor(tau)
    exact = reference(x.double(), narrow_tau.double())
    ours, eager = apply(fn, x, tau).double(), reference(x, narrow_tau).double()
    finite = exact.isfinite() & (exact.abs() < torch.finfo(torch.float32).max)
    ulp = EPS * exact[finite].abs() + torch.finfo(torch.float32).tiny
    error, eager_error = (((y[finite] - exact[finite]).abs() / ulp).max() for y in (ours, eager))
    assert error <= max(ulps, 2 * eager_error), f"{error:.1f} ulp, torch {eager_error:.1f}"
    torch.testing.assert_close(
        ours[~finite].float(), exact[~finite].float(), rtol=0, atol=0, equal_nan=True
    )


KINDS = [
    ("exp", ()),
    ("gibbs", (1.0,)),
    ("gibbs", (0.0,)),
    ("power", (1.0, 0.5)),
    ("power", (1.0, 0.7)),
    ("power", (1.0, 1.0)),
    ("power", (1.0, 1.5)),
    ("power", (0.0, 2.0)),
    ("power", (1.0, 3.0)),
    ("inverse", (1.0, 0.35, 1.0)),
    ("inverse", (0.0, 1.0, 2.0)),
    ("inverse", (1.0, 2.0, 0.5)),
    ("hinge", (0.25,)),
    ("hinge", (-0.1,)),
    ("sigmoid", (1.0,)),
    ("sigmoid", (5.5,)),
    ("square", ()),
    ("gamma", (2.0,)),
    ("gamma", (3.0,)),
    ("gamma", (1.5,)),
    ("logistic", ()),
]


def test_every_built_in_kind_is_listed():
    assert {name for name, _ in KINDS} == set(objectives.KINDS)


@pytest.mark.parametrize(("name", "params"), KINDS, ids=str)
@pytest.mark.parametrize("piece", ["f", "df", "dtau"])
def test_built_in(name, params, piece):
    function = getattr(objectives.kind(name).bind(params), piece)
    fn = getattr(trace.pair_functions(name, params), piece)
    assert (fn is None) == (function is None)
    if fn is None:
        return
    points = torch.cat(
        [
            torch.linspace(-1.1, 1.1, 45, dtype=torch.float64),
            torch.tensor([-1.0, -0.25, 0.1, 1.0]).double(),
        ]
    )
    options = {}
    if name == "gamma":  # of negative numbers
        points, options = points[points < 0], {"limits": (-torch.inf, torch.nan)}
    for tau in (0.07, 1.0):
        check(fn, function, points, tau, **options)


def constants(x):  # made on the way
    return (
        x * torch.tensor(0.5, dtype=x.dtype)
        + torch.ones_like(x)
        - x.new_full((), 0.1)
        + torch.full((), 0.3, dtype=x.dtype)
    )


def in_place(x):
    y = x.exp()
    z = y.detach().clone().view(x.shape)
    z += 1
    z.mul_(x).sigmoid_()
    w = x.detach() * 2
    F.leaky_relu(F.elu(w.floor_divide_(0.7), inplace=True), inplace=True)
    return y * 3 + z + w


def masked(x):
    y = x * x
    y[x < 0.1] = 0.5
    return y.masked_fill(x > 1, 0.25)


def long(x):
    for _ in range(60):
        x = x + 0.001 * torch.sin(x)
    return x


TABLE = {
    "add": lambda x: 1.5 + x + torch.add(x, x, alpha=0.3),
    "sub": lambda x: 0.1 - x.sub(2 * x, alpha=0.3) - 1,
    "mul": lambda x: 0.1 * x * x,
    "div": lambda x: x / 3 + 0.1 / (x + 4),
    "div_floor": lambda x: x * torch.div(x, 0.3, rounding_mode="floor"),
    "floor_divide": lambda x: x * (x.detach() // 0.3),
    "div_trunc": lambda x: x * torch.div(x, 0.3, rounding_mode="trunc"),
    "div_tile": lambda x: x.sin() / x.cosh(),
    "neg": lambda x: -x.neg() - x.neg(),
    "reciprocal": lambda x: (x + 4).reciprocal() + (-x).reciprocal(),
    "abs": torch.abs,
    "sign": lambda x: x * x.sign() + x.sgn(),
    "square": torch.square,
    "pow_0": lambda x: x.pow(0),
    "pow_1": lambda x: x.pow(1),
    "pow_2": lambda x: x**2,
    "pow_3": lambda x: x**3,
    "pow_8": lambda x: x**8,
    "pow_11": lambda x: x**11,
    "pow_12": lambda x: x**12,
    "pow_-1": lambda x: x**-1,
    "pow_-3": lambda x: x**-3,
    "pow_half": lambda x: x.relu() ** 0.5,
    "pow_-half": lambda x: (x + 4) ** -0.5,
    "pow_2.5": lambda x: x.relu().pow(2.5),
    "pow_0.3": lambda x: x.abs().pow(0.3),
    "pow_negative": lambda x: x.pow(1.7),
    "pow_tensor": lambda x: x.exp().pow(x),
    "pow_base": lambda x: 2.5**x + 2**x,
    "pow_1.3": lambda x: (x + 4).pow(1.3).to(x.dtype),
    "sqrt": lambda x: (x * x + 0.1).sqrt(),
    "rsqrt": lambda x: (x + 4).rsqrt(),
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": lambda x: torch.expm1(0.01 * x) + torch.expm1(x),
    "log": lambda x: (x + 4).log(),
    "log2": lambda x: (x + 4).log2(),
    "log10": lambda x: (x + 4).log10(),
    "log1p": lambda x: torch.log1p(x * x * 1e-3),
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": lambda x: torch.tan(x / 3),
    "tanh": torch.tanh,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "asin": lambda x: torch.asin(x / 4),
    "acos": lambda x: torch.acos(x / 4),
    "atan": torch.atan,
    "asinh": torch.asinh,
    "acosh": lambda x: torch.acosh(x + 5),
    "atanh": lambda x: torch.atanh(x / 4),
    "atan2": lambda x: torch.atan2(x, x + 4),
    "hypot": lambda x: torch.hypot(x, x + 4),
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "softplus": lambda x: F.softplus(x) + F.softplus(x, beta=10.0, threshold=15.0),
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "clamp": lambda x: x.clamp(-0.5, 0.7) + x.clamp(max=0.3),
    "clamp_min": lambda x: x.clamp(min=0.1) * x.clamp_max(1.0),
    "clamp_tensor": lambda x: x.clamp(min=0.1 * x, max=x * x),
    "maximum": lambda x: torch.maximum(x, 0.5 * x),
    "minimum": lambda x: torch.minimum(x, x * x),
    "fmax": lambda x: torch.fmax(x, 0.5 * x),
    "where": lambda x: (
        torch.where(x > 0.1, x * x, 0.1) + torch.where(x == 0.1, 1.0, torch.zeros_like(x))
    ),
    "compare": lambda x: (
        x * (x >= 0.1) + x * ((x < -0.3) | (x != 1)) + x * (~(x <= 0.1) & (x > 0)).to(x.dtype)
    ),
    "logical": lambda x: (
        x * torch.logical_and(x, x > 0.1)
        + x * torch.logical_xor(x > 0, x < 1)
        + x * torch.logical_not(x)
    ),
    "masks": lambda x: (
        x * (x > 0).int() + x * ((x > 0).float() * 2).to(x.dtype) + x * (x > 0).bool()
    ),
    "truth_values": lambda x: x * ((x > 0) * (x < 1)) + x * ((x > 0.1) + (x < -0.1)),
    "nonfinite": lambda x: (
        x * torch.isfinite(x)
        + x * (1 - torch.isnan(x).to(x.dtype))
        + torch.nan_to_num(x, 0.0, 3.0, -3.0)
    ),
    "floor": lambda x: x * torch.floor(3 * x),
    "ceil": lambda x: x * torch.ceil(3 * x),
    "round": lambda x: x * torch.round(2 * x),
    "trunc": lambda x: x * torch.trunc(3 * x) + torch.frac(x),
    "int": lambda x: x * (3 * x).int(),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "erfinv": lambda x: torch.erfinv(x / 4),
    "ndtr": torch.special.ndtr,
    "lerp": lambda x: torch.lerp(x, x * x, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.3),
    "addcdiv": lambda x: torch.addcdiv(x, x, x + 4, value=0.3),
    "fmod": lambda x: torch.fmod(x, 0.7),
    "remainder": lambda x: torch.remainder(x, 0.7) + torch.remainder(x, -0.7),
    "copysign": lambda x: torch.copysign(x * x, x),
    "logaddexp": lambda x: torch.logaddexp(x, -2 * x),
    "xlogy": lambda x: torch.xlogy(x + 4, x + 5),
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none"),
    "smooth_l1": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"),
    "limits": lambda x: x.clamp(min=torch.finfo(x.dtype).tiny).log() + torch.finfo(x.dtype).eps,
    "double": lambda x: (x.double() + 1).exp().to(x.dtype),
    "constant": torch.ones_like,
    "identity": lambda x: x,
    "constants": constants,
    "in_place": in_place,
    "views": lambda x: x.flatten().exp().unsqueeze(0).view(x.shape) * x.unsqueeze(0).squeeze(0),
    "masked": masked,
    "long": long,
}


OPTIONS = {
    "hardsigmoid": {"rtol": 1e-7},  # torch takes 1/6 as a float32
    "int": {"limits": ()},  # undefined
    "mish": {"ulps": 40},  # the derivative has a zero
    "pow_-half": {
        "limits": (0.0, torch.inf, torch.nan)
    },  # pow(−inf, ·) of C, where the square root is nan
    "pow_negative": {"limits": (0.0, torch.inf, torch.nan)},
    "pow_1.3": {"limits": (0.0, torch.inf, torch.nan)},
    "smooth_l1": {
        "limits": (0.0, torch.inf, -torch.inf)
    },  # PyTorch's decomposition takes nan for 0
}


@pytest.mark.parametrize("name", TABLE)
def test_operation(name):
    loss = PairLoss(None, TABLE[name])
    kind, fns = objectives.kind(loss.kind).bind(()), trace.pair_functions(loss.kind, ())
    points = torch.tensor([0.1, 0.3, -0.5, 0.25, 0.7, 1.0, 6.5], dtype=torch.float64)
    points = torch.cat([torch.linspace(-3, 3, 49, dtype=torch.float64), points])
    check(fns.f, kind.f, points, **OPTIONS.get(name, {}))
    check(fns.df, kind.df, points, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("shape", ["scalar", (16,), (4, 8), (2, 4, 8)], ids=str)
@pytest.mark.parametrize("name", ["power", "exp"])
def test_any_shape(shape, name):
    params = (1.0, 1.5) if name == "power" else ()
    kind, fns = objectives.KINDS[name].bind(params), trace.pair_functions(name, params)

    @triton.jit
    def kernel(x_ptr, y_ptr, fn: tl.constexpr, SHAPE: tl.constexpr, SIZE: tl.constexpr):
        tau = tl.load(x_ptr)
        if SHAPE == "scalar":
            tl.store(y_ptr, fn(tl.load(x_ptr + 1), tau))
        else:
            offs = tl.reshape(tl.arange(0, SIZE), SHAPE)
            tl.store(y_ptr + offs, fn(tl.load(x_ptr + offs), tau))

    size = 1 if shape == "scalar" else int(torch.tensor(shape).prod())
    x = torch.linspace(0.1, 0.9, max(size, 2), dtype=torch.float64)
    for piece in trace.Traced._fields:
        y = torch.full((size,), torch.nan, dtype=torch.float64)
        kernel[(1,)](x, y, getattr(fns, piece), shape, size)
        expected = getattr(kind, piece)(x[-size:] if size > 1 else x[1:], x[0])
        torch.testing.assert_close(y, expected, rtol=1e-14, atol=0)


class Steep:
    """A function that reads a number of its object."""

    def __init__(self, k):
        self.k = k

    def __call__(self, x):
        return torch.exp(self.k * x)


def test_of_distance():
    weight = PairWeight(lambda d: torch.exp(-3 * d))
    kind, points = objectives.kind(weight.kind), torch.linspace(-1, 1, 33, dtype=torch.float64)
    for c in (1.0, 0.0):
        fns = trace.pair_functions(weight.kind, weight.params(c))
        bound = kind.bind((c,))
        check(fns.f, bound.f, points)
        check(fns.df, bound.df, points)


def test_min_player():
    player = MinPlayer(lambda x: F.relu(x).pow(1.5))
    assert "sqrt" in source(trace.pair_functions(player.kind, player.params(1.0)).f)


def test_changed_attribute_is_compiled_anew():
    fn = Steep(2.0)
    loss = PairLoss(None, fn)
    first = trace.pair_functions(loss.kind, ())
    assert trace.pair_functions(loss.kind, ()) is first
    fn.k = 3.0
    second = trace.pair_functions(loss.kind, ())
    x = torch.linspace(-1, 1, 16, dtype=torch.float64)
    torch.testing.assert_close(apply(second.f, x), torch.exp(3 * x))
    torch.testing.assert_close(apply(second.df, x), 3 * torch.exp(3 * x))
    fn.k = 2.0
    assert trace.pair_functions(loss.kind, ()) == first


def test_number_of_an_outer_tensor_is_read():
    scale = torch.tensor(2.0)
    loss = PairLoss(None, lambda x: x * scale.item())
    assert "2.0 * x" in source(trace.pair_functions(loss.kind, ()).f)
    scale.fill_(4.0)
    assert "4.0 * x" in source(trace.pair_functions(loss.kind, ()).f)


def test_equal_formulas_are_one_function():
    one, other = (PairLoss(None, lambda x: torch.exp(2 * x) + 1) for _ in range(2))
    assert one.kind != other.kind
    assert trace.pair_functions(one.kind, ()) == trace.pair_functions(other.kind, ())
    third = PairLoss(None, lambda x: torch.exp(2 * x) + 2)
    assert trace.pair_functions(third.kind, ()).f is not trace.pair_functions(one.kind, ()).f
    assert trace.pair_functions(third.kind, ()).df is trace.pair_functions(one.kind, ()).df


def test_nothing_is_computed_twice_or_for_nothing():
    loss = PairLoss(None, lambda x: (torch.exp(x) + 1) * torch.exp(x) + 0 * torch.ones_like(x))
    text = source(trace.pair_functions(loss.kind, ()).f)
    assert text.count("tl.exp(") == 1
    text = source(trace.pair_functions("gibbs", (1.0,)).f)
    assert text.count("quotient(") == 1
    assert text.index("quotient") < text.index("x -")
    assert "/" not in text
    assert "tau" not in source(trace.pair_functions("hinge", (1.0,)).df).split("\n", 1)[1]
    text = source(trace.pair_functions(PairLoss(None, lambda x: x / 3 + 1).kind, ()).df)
    assert "0.333" in text
    assert "v0" not in text
    assert "float64" not in source(trace.pair_functions(PairLoss(None, constants).kind, ()).f)


def test_objectives_are_not_kept():
    loss = PairLoss(None, lambda x: x * 7)
    trace.pair_functions(loss.kind, ())
    function = weakref.ref(objectives.custom(loss.kind))
    del loss
    gc.collect()
    assert function() is None


def test_a_repeat_makes_no_new_function():
    loss = PairLoss(None, lambda x: torch.exp(2 * x) + 1)
    first, again = (trace.pair_functions(loss.kind, ()) for _ in range(2))
    assert all(a is b for a, b in zip(first, again, strict=True))
    # not even traced again
    assert trace.pair_functions("gibbs", (1.0,)) is trace.pair_functions("gibbs", (1.0,))


MODES = {
    "inference": torch.inference_mode(),
    "no_grad": torch.no_grad(),
    "meta": torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes_around_the_call_do_not_matter(mode):
    loss = PairLoss(None, lambda x: torch.sinh(x) * torch.tensor(0.5))
    with mode:
        fns = [trace.pair_functions(loss.kind, ()) for _ in range(2)]
    assert "libdevice.cosh" in source(fns[0].df)
    assert fns[0] is fns[1]


OUTSIDE = torch.tensor(2.0)


def other_view(x):
    y = x * 1.5
    y.mT.add_(1) if x.dim() > 1 else y.add_(1)
    return y


REFUSED = {
    "view": (other_view, "psi uses aten.add_, which is none of"),
    "sort": (
        lambda x: x.flatten().sort()[0].view(x.shape) * 0 + x,
        "psi uses aten.sort, which is none of the elementwise",
    ),
    "sum": (lambda x: x + 0 * x.sum(), "psi uses aten.sum, which is none of"),
    "matmul": (lambda x: x + 0 * x.sum() * (x @ x.mT).sum(), "psi uses aten.sum"),
    "random": (lambda x: x + 0 * torch.rand_like(x), "psi uses aten.rand_like, which is none of"),
    "special": (torch.special.i0, "psi uses aten.i0, which is none of"),
    "arange": (
        lambda x: x + 0 * torch.arange(x.shape[-1], dtype=x.dtype),
        "psi uses aten.arange, a tensor of several numbers",
    ),
    "several": (
        lambda x: x + 0 * torch.tensor([[1.0, 2.0]]).sum(),
        "psi uses aten.lift_fresh, a tensor of several numbers",
    ),
    "out": (
        lambda x: torch.exp(x.detach(), out=torch.zeros_like(x)) + x,
        "psi uses aten.exp, which is none of",
    ),
    "half": (
        lambda x: x.half().to(x.dtype),
        "psi uses aten._to_copy, a conversion to torch.float16",
    ),
    "integers": (lambda x: x * ((3 * x).int() & 1), "psi uses aten.bitwise_and, of integers"),
    "tensor": (
        lambda x: OUTSIDE * x,
        "psi closes over a tensor, whose later changes .* use Python numbers",
    ),
    "choice": (
        lambda x: x if x.isnan().any() else 2 * x,
        r"psi decides by values of its argument \(aten._local_scalar_dense\)",
    ),
    "equal": (
        lambda x: x if torch.equal(x, x + 1) else 2 * x,
        r"psi decides by values of its argument \(aten.equal\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, message = REFUSED[name]
    loss = PairLoss(None, function)
    with pytest.raises(trace.UnsupportedFunction, match=message) as error:
        trace.pair_functions(loss.kind, ())
    assert trace.problem(loss.kind) == str(error.value)


def test_problem():
    assert trace.problem("exp") is None
    weight = PairWeight(torch.special.i0)
    assert trace.problem(weight.kind).startswith("weight uses aten.i0")
    with pytest.raises(KeyError):
        trace.problem("custom:none")


AHEAD_OF_TIME = [
    "constants",
    "elu",
    "erfc",
    "gelu",
    "in_place",
    "limits",
    "logsigmoid",
    "mish",
    "pow_0.3",
    "pow_tensor",
    "round",
    "softplus",
]


def loop(ptx):
    """A kernel's outer loop in PTX."""
    label = re.search(r"^(\$\w+):(?=.*\n(?:.*\n)*?.*\bbra\S*\s+\1;)", ptx, re.MULTILINE)
    body = ptx[label.end() :]
    return body[: body.rindex(f"{label[1]};")]


#: A kind whose source another process makes, too.
ELSEWHERE = "inverse", (1.0, 0.7, 2.0)


def compile_ahead_of_time():
    """Spills of all functions in one kernel; divisions in a loop around those of a kind.

    As JSON.
    """
    losses = {name: PairLoss(None, TABLE[name]) for name in AHEAD_OF_TIME}
    kinds = {f"{name} {params}": (name, params) for name, params in KINDS}
    kinds |= {name: (loss.kind, ()) for name, loss in losses.items()}
    traced = {name: trace.pair_functions(*kind) for name, kind in kinds.items()}
    functions = tuple(dict.fromkeys(fn for fns in traced.values() for fn in fns if fn is not None))
    report = {"functions": len(functions)}
    report["source"] = source(trace.pair_functions(*ELSEWHERE).df)
    for dtype, capability in (("fp32", 80), ("fp32", 90), ("fp32", 100), ("fp64", 90)):
        pointers = dict.fromkeys(("x_ptr", "tau_ptr", "y_ptr"), f"*{dtype}")
        result = compile_for(all_kernel, pointers, {"FNS": functions, "BLOCK": 128}, capability)
        report[f"{dtype} {capability}"] = {
            "spill_bytes": result.spill_bytes,
            "total": result.count(""),
        }
    signature = dict.fromkeys(("x_ptr", "tau_ptr", "y_ptr"), "*fp32") | {"n": "i32"}
    signature |= dict.fromkeys(("f", "df", "dtau", "BLOCK"), "constexpr")
    for name in (
        "exp ()",
        "gibbs (1.0,)",
        "power (1.0, 1.5)",
        "hinge (0.25,)",
        "square ()",
        "sigmoid (1.0,)",
        "constants",
    ):
        made = ASTSource(loop_kernel, signature, {**traced[name]._asdict(), "BLOCK": 512})
        kernel = triton.compile(made, target=GPUTarget("cuda", 90, 32))
        text = loop(kernel.asm["ptx"])
        report[name] = len(re.findall(r"\b(?:div|rcp)\.", text))
        if name == "hinge (0.25,)":  # the interpreter's maximum lets nan through in any case
            report["propagates"] = "max.NaN.f32" in text
    print(json.dumps(report))


@pytest.fixture(scope="module")
def ahead_of_time():
    """What a process reports in which Triton is not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@one_worker
def test_source_is_the_same_in_every_process(ahead_of_time):
    assert ahead_of_time["source"] == source(trace.pair_functions(*ELSEWHERE).df)


@one_worker
def test_compiles_ahead_of_time(ahead_of_time):
    report = {name: value for name, value in ahead_of_time.items() if name != "source"}
    assert report.pop("functions") > 60
    assert report.pop("propagates")
    divisions = {name: count for name, count in report.items() if isinstance(count, int)}
    assert divisions.pop("sigmoid (1.0,)") > 0
    assert set(divisions.values()) == {0}
    assert [result["spill_bytes"] for result in report.values() if isinstance(result, dict)] == [
        0
    ] * 4


if __name__ == "__main__":
    compile_ahead_of_time()
