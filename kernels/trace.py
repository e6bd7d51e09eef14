"""Pair kinds and row steps as Triton device functions.

`alphacl_fast.graph` traces the formulas of `alphacl_fast.objectives`, users' functions included;
this module prints their graphs as Triton. Where float32 and float64 have different graphs, the
device function holds both and the dtype of x decides when it is compiled. The source, names
included, is a function of the formula alone, because Triton's cache on disk is keyed by the source.
"""

from __future__ import annotations

import hashlib
import linecache
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.language.extra import libdevice

from .. import objectives
from ..graph import (
    OPERATORS,
    Node,
    Printer,
    Tracer,
    UnsupportedFunction,
    Value,
    is_number,
    mul,
)

__all__ = ["Traced", "UnsupportedFunction", "pair_functions", "problem", "row_function"]


class Traced(NamedTuple):
    """Triton functions ``(x, tau) → value`` of a pair kind, to be called in a kernel.

    ``x`` is a tile of any shape or a scalar, float32 or float64; ``tau`` a scalar of its dtype; the
    value has the shape and dtype of ``x``. ``dtau`` is None for kinds without a temperature.
    """

    f: Any
    df: Any
    dtau: Any


# --- Triton code ----------------------------------------------------------------------------------


@triton.jit
def power(x, q: tl.constexpr):
    """x^q for x ≥ 0, or for q that is no whole number."""
    return (
        libdevice.pow(x, tl.full((), q, x.dtype))
        if x.dtype == tl.float64
        else tl.exp2(q * tl.log2(x))
    )


@triton.jit
def quotient(a, b):
    """a/b of scalars, rounded once: every t/τ would inherit the error of Triton's float32 ``/``."""
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


class _HostLibrary:
    """libdevice for Triton's interpreter, whose tensors are NumPy arrays: PyTorch's functions."""

    def __getattr__(self, name: str) -> Callable[..., tl.tensor]:
        function = getattr(torch, {"nearbyint": "round"}.get(name, name))

        def call(*args: tl.tensor) -> tl.tensor:
            out = function(*(torch.tensor(a.handle.data) for a in args)).numpy()
            like = next((a for a in args if a.type.is_block()), args[0])
            return tl.tensor(type(like.handle)(out, like.handle.dtype), like.type)

        return call


if not isinstance(power, triton.JITFunction):  # TRITON_INTERPRET=1
    libdevice = _HostLibrary()


def _literal(number: float) -> str:
    return repr(float(number)) if math.isfinite(number) else f'float("{number}")'


def _pow(node: Node) -> str:
    q = node.args[1]
    whole = not is_number(q) or math.isinf(q) or q == int(q)
    return "libdevice.pow({}, {})" if whole else f"power({{}}, {_literal(q)})"


_ARITHMETIC = {OPERATORS[op] for op in ("add", "sub", "mul", "exact_div")}
_TABLE: dict[str, str | Callable[[Node], str]] = {
    **OPERATORS, "not": "{} ^ True", "pow": _pow, "where": "tl.where({}, {}, {})",
    "neg": "-1.0 * {}",  # Triton's -a is 0 − a, which turns −0 into +0
    "quotient": "quotient({}, {})", "fmax": "tl.maximum({}, {})", "fmin": "tl.minimum({}, {})",
    "to_x": "{}.to(x.dtype)", "to_float32": "{}.to(tl.float32)", "to_float64": "{}.to(tl.float64)",
    "maximum": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
}  # fmt: skip
_BUILT_IN = "abs ceil cos erf exp exp2 floor log log2 sin sqrt"
_LIBDEVICE = """
    acos acosh asin asinh atan atanh cosh erfc erfinv expm1 log10 log1p nearbyint rsqrt sinh tan
    tanh trunc
"""
_TABLE |= {f: f"tl.{f}({{}})" for f in _BUILT_IN.split()}
_TABLE |= {f: f"libdevice.{f}({{}})" for f in _LIBDEVICE.split()}
_TABLE |= {f: f"libdevice.{f}({{}}, {{}})" for f in ("atan2", "copysign", "fmod", "hypot")}


def _in_float32(number: float) -> bool:
    return torch.tensor(number, dtype=torch.float32, device="cpu").item() == number


class _Triton(Printer):
    language, table = "Triton", _TABLE

    def lower(self, node: Node, args: list[Value]) -> Value:
        if node.op != "div":
            return super().lower(node, args)
        a, b = args
        if is_number(b) or b.vector:
            return Node("exact_div", a, b)
        # A division per pair is expensive on a GPU, one per kernel is not.
        vector = isinstance(a, Node) and a.vector
        return mul(a, Node("quotient", 1.0, b)) if vector else Node("quotient", a, b)

    def operand(self, node: Node, a: Any, names: Mapping[Node, str]) -> str:
        if isinstance(a, Node):
            return names[a]
        if isinstance(a, bool):
            return repr(a)
        # Triton makes a literal float32, unless it stands in arithmetic beside a tensor.
        alone = all(is_number(b) or b.dtype == "bool" for b in node.args)
        arithmetic = self.template(node) in _ARITHMETIC
        exact = arithmetic or all(map(_in_float32, filter(is_number, node.args)))
        return f"tl.full((), {_literal(a)}, x.dtype)" if alone or not exact else _literal(a)

    def body(self, values: list[Value]) -> str:
        """Triton code that returns the values in the shape and dtype of x, several as a tuple."""
        values, nodes = self.lowered(values)
        names: dict[Node, str] = {}
        known: dict[str, str] = {}  # code → variable
        for node in nodes:
            if node.op == "argument":
                names[node] = node.args[0]
            else:
                code = self.code(node, names)
                names[node] = known.setdefault(code, f"v{len(known)}")
        results = []
        for value in values:
            if is_number(value):
                results.append(f"tl.full(x.shape, {_literal(value)}, x.dtype)")
            else:
                scalar = "" if value.vector else "tl.full(x.shape, 0.0, x.dtype) + "
                results.append(scalar + names[value])
        lines = [f"{name} = {code}" for code, name in known.items()]
        return "".join(f"    {line}\n" for line in [*lines, f"return {', '.join(results)}"])


class _PreciseTriton(_Triton):
    """Correctly rounded quotients and an accurate exponential, where time does not matter."""

    table = _TABLE | {"exact_div": "quotient({}, {})", "exp": "libdevice.exp({})"}


@lru_cache(maxsize=512)
def _device_function(piece: str, bodies: tuple[str, str], unpacking: str = "") -> Any:
    """The Triton function with these bodies in float32 and float64 after the ``unpacking``."""
    narrow, wide = bodies
    body = narrow
    if narrow != wide:
        wide, narrow = (text.replace("    ", "        ") for text in (wide, narrow))
        body = f"    if x.dtype == tl.float64:\n{wide}    else:\n{narrow}"
    body = unpacking + body
    # Triton takes two functions of the same name in a kernel for one, so the name depends on the
    # body.
    name = f"{piece}_{hashlib.sha256(body.encode()).hexdigest()[:8]}"
    source = f"def {name}({'v, s' if unpacking else 'x, tau'}):\n{body}"
    filename = f"<{__name__}.{name}>"
    # where Triton looks for the source
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    namespace: dict[str, Any] = {
        "__name__": __name__, "tl": tl, "libdevice": libdevice, "power": power,
        "quotient": quotient,
    }  # fmt: skip
    exec(compile(source, filename, "exec"), namespace)
    return triton.jit(namespace[name])


_DTYPES = (torch.float32, torch.float64)


# --- pair kinds -----------------------------------------------------------------------------------


def _compiled(label: str, kind: objectives.PairKind, params: tuple[float, ...]) -> Traced:
    def piece(name: str, function: Any) -> Any:
        if function is None:
            return None
        traced = [Tracer(label, dtype).trace(function, ["x"], ["tau"]) for dtype in _DTYPES]
        return _device_function(f"pair_{name}", tuple(map(_Triton(label).body, traced)))

    return Traced(*(piece(*item) for item in kind.bind(params)._asdict().items()))


@lru_cache(maxsize=256)
def _built_in(name: str, params: tuple[float, ...]) -> Traced:
    return _compiled(f"the pair kind {name!r}", objectives.KINDS[name], params)


_custom = objectives.Compiled(
    lambda function, params: _compiled(function.name, function.kind, params)
)


def pair_functions(name: str, params: tuple[float, ...]) -> Traced:
    """The pair kind ``name`` of `objectives.kind` with its ``params`` as Triton functions.

    Repeated calls are cheap. Each runs a user's function on a few numbers and compiles it anew if
    its values have changed (because of an attribute that it reads, say).

    Raises:
        KeyError: there is no kind of this name.
        UnsupportedFunction: a user's function cannot be compiled.
    """
    if name in objectives.KINDS:
        return _built_in(name, params)
    return _custom(objectives.custom(name), params)


def problem(name: str) -> str | None:
    """Why the pair kind cannot be compiled, or None."""
    try:
        with _disable_current_modes():  # an exported graph records its own operations, not these
            pair_functions(name, (1.0,) * len(objectives.kind(name).parameters))
    except UnsupportedFunction as error:
        return str(error)
    return None


# --- row steps ------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def row_function(name: str, params: tuple[float, ...], count: int) -> Any:
    """The row step ``name`` as a Triton function ``(v, s) → outputs``.

    ``v`` is a tuple of ``count`` vectors of one shape, float32 or float64; ``s`` holds the numbers
    of `objectives.BatchNumbers` in their dtype; the result is a tuple of vectors (one vector where
    there is one output).
    """
    step = objectives.ROW_STEPS[name]
    vectors = ["x", *(f"x{k}" for k in range(1, count))]
    scalars = [f"s{k}" for k in range(len(objectives.BatchNumbers._fields))]
    label = f"the row step {name!r}"

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        numbers = objectives.BatchNumbers(*arguments[count:])
        return step(arguments[:count], numbers, params)

    graphs = [Tracer(label, dtype).trace(function, vectors, scalars) for dtype in _DTYPES]
    names = {**{x: f"v[{k}]" for k, x in enumerate(vectors)}, **{x: f"s[{x[1:]}]" for x in scalars}}
    unpacking = "".join(f"    {x} = {argument}\n" for x, argument in names.items())
    return _device_function("rows", tuple(map(_PreciseTriton(label).body, graphs)), unpacking)
