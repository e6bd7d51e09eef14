"""Pair kinds and row steps as Triton device functions, from the formulas of `alphacl_fast.objectives`.

The functions f, df and dtau of a kind, or that of a row step, are run once on a few numbers while every operation that
reaches PyTorch's dispatcher is noted, derivatives by autograd included. What led from the arguments to the result is written
out as one straight line of Triton code. A user's function and a built-in one take the same road: no formula is written twice.

* Operations are primitive (`_PRIMITIVES`), or they are decomposed, by `_DECOMPOSITIONS` or PyTorch's own table, or refused.
* Constants are folded in float64; equal operations are computed once; what depends on τ alone comes first, as scalars.
* Both float32 and float64 are traced. They differ where a formula asks for the limits of its dtype (``torch.finfo``); then
  the device function holds both and the dtype of x decides when it is compiled.
* The code, names included, is a function of the formula alone, for Triton's cache on disk goes by the source.
"""

from __future__ import annotations

import hashlib
import itertools
import linecache
import math
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.language.extra import libdevice

from .. import objectives

__all__ = ["Traced", "UnsupportedFunction", "pair_functions", "problem", "row_function"]


class Traced(NamedTuple):
    """Triton functions ``(x, tau) → value`` of a pair kind, to be called in a kernel.

    ``x`` is a tile of any shape or a scalar, float32 or float64; ``tau`` a scalar of its dtype; the value has the shape and
    dtype of ``x``. ``dtau`` is None for kinds without a temperature.
    """

    f: Any
    df: Any
    dtau: Any


class UnsupportedFunction(ValueError):
    """A user's function cannot be compiled; the message names the function and what it does."""


# --- formulas -------------------------------------------------------------------------------------------------------

_SERIAL = itertools.count()


class _Node:
    """A value in a formula: Triton code with places for its operands, which are nodes and numbers.

    ``dtype`` is "x" (that of the argument), "bool", "float32" or "float64".
    """

    def __init__(self, code: str, *args: Any, dtype: str | None = None, tile: bool = False) -> None:
        self.code, self.args, self.serial = code, args, next(_SERIAL)
        nodes = [a for a in args if isinstance(a, _Node)]
        dtypes = {n.dtype for n in nodes}
        self.tile = tile or any(n.tile for n in nodes)
        self.dtype = dtype or next((d for d in ("float64", "x", "float32", "bool") if d in dtypes), "x")


class _Refused:
    """In place of a value that has no formula; matters only if the result depends on it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


_NOT_ELEMENTWISE = _Refused("which is none of the elementwise operations that can be compiled")
Value = _Node | _Refused | float | bool


def _number(a: Value) -> bool:
    return isinstance(a, (bool, int, float))


def _real(a: Value) -> Value:
    """a as a summand or factor: a truth value becomes 0 or 1."""
    if _number(a):
        return float(a)
    return _Node("{}.to(x.dtype)", a, dtype="x") if a.dtype == "bool" else a


def _bool(a: Value) -> Value:
    if _number(a):
        return bool(a)
    return a if a.dtype == "bool" else _Node("{} != {}", a, 0.0, dtype="bool")


def _add(a: Value, b: Value, alpha: float = 1.0) -> Value:
    if not (_number(a) or _number(b)) and a.dtype == b.dtype == "bool":
        return _Node("{} | {}", a, b)
    return _Node("{} + {}", _real(a), _mul(b, alpha))


def _sub(a: Value, b: Value, alpha: float = 1.0) -> Value:
    return _Node("{} - {}", _real(a), _mul(b, alpha))


def _mul(a: Value, b: Value) -> Value:
    if not (_number(a) or _number(b)) and a.dtype == b.dtype == "bool":
        return _Node("{} & {}", a, b)
    a, b = _real(a), _real(b)
    if _number(a) and _number(b):
        return a * b
    if _number(b):
        a, b = b, a
    if _number(a) and abs(a) == 1.0:
        return b if a == 1.0 else _neg(b)
    return _Node("{} * {}", a, b)


def _neg(a: Value) -> Value:
    a = _real(a)
    if _number(a):
        return -a
    # Triton's -a is 0 − a, which makes the −0 of zero a +0.
    return a.args[1] if a.code == "{} * {}" and a.args[0] == -1.0 else _Node("{} * {}", -1.0, a)


def _div(a: Value, b: Value, rounding_mode: str | None = None) -> Value:
    a, b = _real(a), _real(b)
    if rounding_mode == "trunc":
        return _function("libdevice.trunc({})", _Node("{} / {}", a, b))
    # A division per pair is dear on a GPU, one per kernel is not. The bounds keep 1/b a normal number in float32.
    if _number(b):
        return _mul(a, 1.0 / b) if 2.0**-120 < abs(b) < 2.0**120 else _Node("{} / {}", a, b)
    if b.tile:
        return _Node("{} / {}", a, b)
    return _mul(a, _div(1.0, b)) if isinstance(a, _Node) and a.tile else _Node("quotient({}, {})", a, b)


def _power(a: Value, q: Value) -> Value:
    a, q = _real(a), _real(q)
    if not _number(q):
        if _number(a) and a > 0:
            return _Node("tl.exp2({})", _mul(q, math.log2(a)))
        return _Node("libdevice.pow({}, {})", a, q)
    if abs(q) <= 16 and 2 * q == int(2 * q):
        if q < 0:
            return _function("libdevice.rsqrt({})", a) if q == -0.5 else _div(1.0, _power(a, -q))
        whole = _integer_power(a, int(q))
        return whole if q == int(q) else _mul(whole, _function("tl.sqrt({})", a))
    if math.isinf(q) or q == int(q):
        return _function("libdevice.pow({}, {})", a, q)
    return _Node(f"power({{}}, {_literal(q)})", a)


def _integer_power(a: Value, q: int) -> Value:
    if q < 2:
        return a if q else 1.0
    half = _integer_power(a, q // 2)
    square = _mul(half, half)
    return _mul(square, a) if q % 2 else square


def _function(code: str, *args: Value) -> Value:
    return _Node(code, *map(_real, args))


def _compare(operator: str, a: Value, b: Value) -> Value:
    return _Node(f"{{}} {operator} {{}}", _real(a), _real(b), dtype="bool")


def _logical(operator: str, a: Value, b: Value) -> Value:
    return _Node(f"{{}} {operator} {{}}", _bool(a), _bool(b))


def _bitwise(operator: str, a: Value, b: Value) -> Value:
    if any(v.dtype != "bool" if isinstance(v, _Node) else not isinstance(v, bool) for v in (a, b)):
        return _Refused("of integers")
    return _logical(operator, a, b)


def _where(condition: Value, a: Value, b: Value) -> Value:
    if _number(condition):
        return a if condition else b
    if _number(a) and _number(b) and (a == b or (a != a and b != b)):
        return a
    if not all(isinstance(v, bool) or (isinstance(v, _Node) and v.dtype == "bool") for v in (a, b)):
        a, b = _real(a), _real(b)
    dtype = "x" if _number(a) and _number(b) else None
    return _Node("tl.where({}, {}, {})", condition, a, b, dtype=dtype or (b if _number(a) else a).dtype)


def _maximum(a: Value, b: Value) -> Value:
    return _function("tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)", a, b)


def _minimum(a: Value, b: Value) -> Value:
    return _function("tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)", a, b)


def _clamp(a: Value, min: Value | None = None, max: Value | None = None) -> Value:
    a = a if min is None else _maximum(a, min)
    return a if max is None else _minimum(a, max)


def _sign(a: Value) -> Value:
    return _where(_compare(">", a, 0.0), 1.0, _where(_compare("<", a, 0.0), -1.0, 0.0))


def _index_put(a: Value, indices: list[Any], values: Value, accumulate: bool = False) -> Value:
    """``a[mask] = number``."""
    if accumulate or len(indices) != 1 or not _number(values) or getattr(indices[0], "dtype", None) != "bool":
        return _Refused("other than a[mask] = number")
    return _where(indices[0], values, a)


def _like(number: float, *args: Any, **options: Any) -> Value:
    return number


_PRIMITIVES: dict[str, Callable[..., Value]] = {
    "add": _add, "sub": _sub, "mul": _mul, "div": _div, "neg": _neg, "pow": _power, "where": _where, "sign": _sign,
    "sgn": _sign, "maximum": _maximum, "minimum": _minimum, "clamp": _clamp, "clamp_min": _maximum, "clamp_max": _minimum,
    "round": lambda a, decimals=0: _Refused("with decimals") if decimals else _function("libdevice.nearbyint({})", a),
    "relu": lambda a: _maximum(a, 0.0), "reciprocal": lambda a: _div(1.0, a), "index_put": _index_put,
    "square": lambda a: _power(a, 2.0), "rsub": lambda a, b, alpha=1.0: _sub(b, a, alpha),
    "eq": partial(_compare, "=="), "ne": partial(_compare, "!="), "lt": partial(_compare, "<"),
    "le": partial(_compare, "<="), "gt": partial(_compare, ">"), "ge": partial(_compare, ">="),
    "isnan": lambda a: _compare("!=", a, a), "isfinite": lambda a: _compare("<", _function("tl.abs({})", a), math.inf),
    "logical_and": partial(_logical, "&"), "logical_or": partial(_logical, "|"), "logical_xor": partial(_logical, "^"),
    "bitwise_and": partial(_bitwise, "&"), "bitwise_or": partial(_bitwise, "|"), "bitwise_xor": partial(_bitwise, "^"),
    "logical_not": lambda a: _Node("{} ^ {}", _bool(a), True), "bitwise_not": lambda a: _bitwise("^", a, True),
    "masked_fill": lambda a, mask, value: _where(mask, value, a), "copy": lambda a, source, non_blocking=False: source,
    "fmax": partial(_function, "tl.maximum({}, {})"), "fmin": partial(_function, "tl.minimum({}, {})"),
    "fill": lambda a, value: value, "zero": lambda a: 0.0, "clone": lambda a, **options: a,
    "zeros_like": partial(_like, 0.0), "ones_like": partial(_like, 1.0), "new_zeros": partial(_like, 0.0),
    "new_ones": partial(_like, 1.0), "full_like": lambda a, value, **options: value,
    "new_full": lambda a, size, value, **options: value,
    "sum": lambda a, *args, **options: _NOT_ELEMENTWISE,  # of every derivative; its decomposition would import for seconds
}  # fmt: skip
_PRIMITIVES |= {
    name: partial(_function, f"tl.{name}({{}})")
    for name in ("abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "log", "log2", "sin", "sqrt")
}
_PRIMITIVES |= {
    name: partial(_function, f"libdevice.{name}({{}})")
    for name in (
        "acos", "acosh", "asin", "asinh", "atan", "atanh", "cosh", "erfc", "erfinv", "expm1", "log10", "log1p", "rsqrt",
        "sinh", "tan", "tanh", "trunc",
    )
}  # fmt: skip
_PRIMITIVES |= {name: partial(_function, f"libdevice.{name}({{}}, {{}})") for name in ("atan2", "copysign", "fmod", "hypot")}

#: Do not read the values of their first argument.
_UNREAD = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill", "zero", "copy"}
#: Give their argument another shape, or none.
_ALIASES = {"alias", "as_strided", "conj_physical", "detach", "expand", "squeeze", "unsqueeze", "view", "_unsafe_view"}


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
    return 0.5 * x * torch.erfc(x * -math.sqrt(0.5))


def _gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return decomposition_table[torch.ops.aten.gelu_backward.default](grad, x, approximate=approximate)
    return grad * (0.5 * torch.erfc(x * -math.sqrt(0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))


def _remainder(a: Tensor, b: Tensor | float) -> Tensor:
    r = torch.fmod(a, b)
    return torch.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


#: In torch operations, where PyTorch's own decomposition is missing or (gelu) cancels.
_DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "remainder": _remainder,
    "div": lambda a, b, rounding_mode: torch.floor_divide(a, b),
    "floor_divide": lambda a, b: torch.round((a - torch.remainder(a, b)) / b),
    "hardshrink_backward": lambda grad, x, lambd: torch.where(x.abs() <= lambd, 0.0, grad),
    "softshrink_backward": lambda grad, x, lambd: torch.where(x.abs() <= lambd, 0.0, grad),
}


# --- tracing --------------------------------------------------------------------------------------------------------


class _Tracer(TorchDispatchMode):
    """Notes how tensors came about. Aliases of a tensor share a cell, so that a change in place is seen by all."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its import would take seconds, and nothing is compiled by it here

    def __init__(self, label: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.label, self.dtype = label, dtype
        self.cells: dict[int, tuple[Tensor, list[Value]]] = {}  # by id; the tensor is kept lest its id be given again
        self.within: list[str] = []  # operations that are being decomposed

    def trace(self, function: Callable[..., tuple[Tensor, ...]], tiles: list[str], scalars: list[str]) -> list[Value]:
        """What a function of tiles and scalars (0-dim tensors), all of this dtype, returns; they have these names."""
        with torch.inference_mode(False), torch.enable_grad():
            arguments = [
                torch.tensor([[-0.75, 0.25, 1.5], [0.5, -0.125, 0.875]], dtype=self.dtype, device="cpu") for _ in tiles
            ] + [torch.tensor(0.5, dtype=self.dtype, device="cpu") for _ in scalars]
            for argument, name in zip(arguments, (*tiles, *scalars), strict=True):
                self.define(argument, _Node(name, dtype="x", tile=name in tiles))
            with _on_cpu(), self:
                results = function(*arguments)
        values = [self.value(y) for y in results]
        for value in values:
            if isinstance(value, _Refused):
                raise UnsupportedFunction(f"{self.label} uses {value.reason}")
        return [_real(value) for value in values]

    def value(self, a: Any) -> Any:
        """What stands for a tensor; other arguments of an operation as they are."""
        if not isinstance(a, Tensor):
            return a
        if id(a) not in self.cells:
            raise UnsupportedFunction(
                f"{self.label} closes over a tensor, whose later changes compiled code would miss: use Python numbers"
            )
        return self.cells[id(a)][1][0]

    def define(self, tensor: Tensor, value: Value) -> Tensor:
        self.cells[id(tensor)] = tensor, [value]
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and id(args[0]) not in self.cells:
            return func(*args)  # a number from outside, as a Python attribute would be
        if name in ("lift_fresh", "lift_fresh_copy"):  # a tensor that the function makes of numbers
            out = func(*args)
            return self.define(out, self.explained(_constant(out), func))
        in_place = func._schema.is_mutable and name.endswith("_")
        base = name[:-1] if in_place else name
        leaves = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        inputs = [self.value(a) for a in leaves]
        if base in _ALIASES:
            out = func(*args, **kwargs)
            same = out.stride() == args[0].stride() if base == "as_strided" else out.numel() == args[0].numel()
            if same or _number(inputs[0]) or args[0].numel() == 1:
                self.cells[id(out)] = out, self.cells[id(args[0])][1]
                return out
            return self.define(out, self.explained(_NOT_ELEMENTWISE, func))

        value = next((v for v in inputs[base in _UNREAD :] if isinstance(v, _Refused)), None)
        if value is None:
            value = self.explained(self.operation(func, base, args, kwargs, inputs), func)
        if isinstance(value, _Decomposed):
            if not in_place:
                return value.out
            value = self.value(value.out)
        out = func(*args, **kwargs)
        if in_place:
            self.write(args[0], value, func)
        elif func._schema.is_mutable:
            for tensor in leaves:
                self.cells[id(tensor)][1][0] = value
        elif isinstance(out, (Tensor, tuple, list)):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and id(tensor) not in self.cells:  # not an argument handed back
                    self.define(tensor, value if tensor is out else self.explained(_NOT_ELEMENTWISE, func))
        elif not all(map(_number, inputs)) and name != "is_same_size":
            raise UnsupportedFunction(
                f"{self.label} decides by values of its argument ({func.overloadpacket}): use torch.where"
            )
        return out

    def write(self, target: Tensor, value: Value, func: Any) -> None:
        """A change in place: of all aliases of a tensor, while of its other views nothing is known any more."""
        written, memory = self.cells[id(target)][1], target.untyped_storage().data_ptr()
        for tensor, cell in self.cells.values():
            if cell is not written and tensor.untyped_storage().data_ptr() == memory:
                cell[0] = self.explained(_NOT_ELEMENTWISE, func)
        written[0] = value

    def operation(self, func: Any, base: str, args: Any, kwargs: Any, inputs: list[Value]) -> Any:
        """The value of an operation none of whose operands is refused."""
        in_place = base != func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in func.tags or (func._schema.is_mutable and not in_place):
            return _NOT_ELEMENTWISE
        if not inputs or (torch.Tag.pointwise in func.tags and all(map(_number, inputs))):
            return _constant(func(*tree_map(self.in_float64, args), **tree_map(self.in_float64, kwargs)))
        values, options = tree_map(self.value, (args, kwargs))
        if base in ("_to_copy", "to", "convert_element_type"):
            dtypes = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.dtype)]
            return self.cast(values[0], dtypes[0] if dtypes else self.dtype)
        if base in _PRIMITIVES and options.get("rounding_mode") != "floor":
            return _PRIMITIVES[base](*values, **options)
        functional = getattr(getattr(torch.ops.aten, base, None), func._overloadname, func) if in_place else func
        decomposition = _DECOMPOSITIONS.get(base) or decomposition_table.get(functional, func.decompose)
        self.within.append(str(func.overloadpacket))
        with self:
            out = decomposition(*args, **kwargs)
        self.within.pop()
        return _NOT_ELEMENTWISE if out is NotImplemented else _Decomposed(out)

    def explained(self, value: Any, func: Any) -> Any:
        """A refused value with the name of the operation that the function called."""
        return _Refused(f"{(*self.within, func.overloadpacket)[0]}, {value.reason}") if isinstance(value, _Refused) else value

    def in_float64(self, a: Any) -> Any:
        """A constant operand, or the dtype of a constant to be made, such that nothing is rounded to float32."""
        if isinstance(a, Tensor):
            value = self.value(a)
            return torch.tensor(value, dtype=torch.bool if isinstance(value, bool) else torch.float64, device="cpu")
        return torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a

    def cast(self, a: Value, dtype: torch.dtype) -> Value:
        if dtype == torch.bool:
            return _bool(a)
        if _number(a) or (dtype == self.dtype and a.dtype == "x"):
            return a
        if dtype == self.dtype:
            return _Node("{}.to(x.dtype)", a, dtype="x")
        if dtype in (torch.float32, torch.float64):
            name = str(dtype).removeprefix("torch.")
            return a if a.dtype == name else _Node(f"{{}}.to(tl.{name})", a, dtype=name)
        if dtype in (torch.int32, torch.int64):  # whole numbers are kept as such in floating point
            return _real(a) if a.dtype == "bool" else _function("libdevice.trunc({})", a)
        return _Refused(f"a conversion to {dtype}")


def _on_cpu() -> AbstractContextManager[Any]:
    """Where a function makes tensors of its own; entering torch.device for nothing would slow every operation."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


class _Decomposed(NamedTuple):
    """The result of an operation that was replaced by others."""

    out: Any


def _constant(tensor: Tensor) -> Value:
    """The one number of which a tensor consists."""
    numbers = tensor.unique()  # NaNs are all different
    if numbers.numel() == 1 or (tensor.numel() and bool(tensor.isnan().all())):
        return numbers[0].item()
    return _Refused("a tensor of several numbers")


# --- Triton code ----------------------------------------------------------------------------------------------------


@triton.jit
def power(x, q: tl.constexpr):
    """x^q for x ≥ 0, or for q that is no whole number."""
    return libdevice.pow(x, tl.full((), q, x.dtype)) if x.dtype == tl.float64 else tl.exp2(q * tl.log2(x))


@triton.jit
def quotient(a, b):
    """a/b of scalars, rounded once; in float32 Triton's ``/`` is an approximation, which every t/τ would inherit."""
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


class _HostLibrary:
    """Triton's interpreter has no libdevice: the same functions by PyTorch, on its tensors of NumPy arrays."""

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


_ARITHMETIC = {"{} + {}", "{} - {}", "{} * {}", "{} / {}"}


def _in_float32(number: float) -> bool:
    return torch.tensor(number, dtype=torch.float32, device="cpu").item() == number


def _operand(a: Any, names: dict[_Node, str], typed: bool) -> str:
    if isinstance(a, _Node):
        return names[a]
    if isinstance(a, bool):
        return repr(a)
    return f"tl.full((), {_literal(a)}, x.dtype)" if typed else _literal(a)


def _body(values: list[Value], precise: bool = False) -> str:
    """Triton code that returns the values in the shape and dtype of x, a tuple of them where they are several.

    ``precise``: with correctly rounded quotients and an accurate exponential, where the time does not matter.
    """
    nodes, pending = set(), [value for value in values if isinstance(value, _Node)]
    while pending:
        node = pending.pop()
        if node not in nodes:
            nodes.add(node)
            pending += [a for a in node.args if isinstance(a, _Node)]
    names: dict[_Node, str] = {}
    known: dict[str, str] = {}  # code → variable
    for node in sorted(nodes, key=lambda n: (n.tile, n.serial)):
        if not node.args:
            names[node] = node.code
            continue
        # Triton makes a literal float32, unless it stands in arithmetic beside a tensor.
        alone = all(_number(a) or a.dtype == "bool" for a in node.args)
        template = _PRECISE.get(node.code, node.code) if precise else node.code
        exact = template in _ARITHMETIC or all(_in_float32(a) for a in node.args if _number(a))
        code = template.format(*(_operand(a, names, typed=alone or not exact) for a in node.args))
        names[node] = known.setdefault(code, f"v{len(known)}")
    results = []
    for value in values:
        if _number(value):
            results.append(f"tl.full(x.shape, {_literal(value)}, x.dtype)")
        else:
            results.append(names[value] if value.tile else f"tl.full(x.shape, 0.0, x.dtype) + {names[value]}")
    lines = [f"{name} = {code}" for code, name in known.items()]
    return "".join(f"    {line}\n" for line in [*lines, f"return {', '.join(results)}"])


_PRECISE = {"{} / {}": "quotient({}, {})", "tl.exp({})": "libdevice.exp({})"}


@lru_cache(maxsize=512)
def _device_function(piece: str, bodies: tuple[str, str], unpacking: str = "") -> Any:
    """The Triton function with these bodies in float32 and float64, and a first line that names its arguments."""
    narrow, wide = bodies
    body = narrow
    if narrow != wide:
        wide, narrow = (text.replace("    ", "        ") for text in (wide, narrow))
        body = f"    if x.dtype == tl.float64:\n{wide}    else:\n{narrow}"
    body = unpacking + body
    # Two functions of one name and two bodies would be taken for each other in a kernel that calls both.
    name = f"{piece}_{hashlib.sha256(body.encode()).hexdigest()[:8]}"
    source, filename = f"def {name}({'v, s' if unpacking else 'x, tau'}):\n{body}", f"<{__name__}.{name}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename  # where Triton looks for it
    namespace: dict[str, Any] = {"__name__": __name__, "tl": tl, "libdevice": libdevice, "power": power, "quotient": quotient}
    exec(compile(source, filename, "exec"), namespace)
    return triton.jit(namespace[name])


# --- pair kinds -----------------------------------------------------------------------------------------------------


def _compiled(label: str, kind: objectives.PairKind, params: tuple[float, ...]) -> Traced:
    def piece(name: str) -> Any:
        function = getattr(kind, name)
        if function is None:
            return None
        bodies = (
            _body(_Tracer(label, dtype).trace(lambda x, tau: (function(x, tau, params),), ["x"], ["tau"])) for dtype in _DTYPES
        )
        return _device_function(f"pair_{name}", tuple(bodies))

    return Traced(*map(piece, Traced._fields))


@lru_cache(maxsize=256)
def _built_in(name: str, params: tuple[float, ...]) -> Traced:
    return _compiled(f"the pair kind {name!r}", objectives.KINDS[name], params)


_DTYPES = (torch.float32, torch.float64)
_PROBE = torch.linspace(-4.0, 4.0, 65, dtype=torch.float64, device="cpu").view(5, 13)
#: Per function of a user: params → its values at the probe when it was compiled, and the outcome.
_custom: weakref.WeakKeyDictionary[Any, dict[tuple[float, ...], tuple[bytes, Traced | str]]] = weakref.WeakKeyDictionary()


def pair_functions(name: str, params: tuple[float, ...]) -> Traced:
    """The pair kind ``name`` of `objectives.kind` with its ``params`` as Triton functions.

    Cheap when called again. A user's function is run on a few numbers each time, and compiled anew where it has changed
    since (through an attribute that it reads, say).

    Raises:
        KeyError: there is no kind of this name.
        UnsupportedFunction: a user's function does what cannot be compiled.
    """
    if name in objectives.KINDS:
        return _built_in(name, params)
    function = objectives._CUSTOM[name]
    with _on_cpu():
        values = function(_PROBE.clone()).detach().numpy().tobytes()
    outcomes = _custom.setdefault(function, {})
    known, outcome = outcomes.get(params, (None, ""))
    if known != values:
        try:
            outcome = _compiled(function.name, function.kind, params)
        except UnsupportedFunction as error:
            outcome = str(error)
        outcomes[params] = values, outcome
    if isinstance(outcome, str):
        raise UnsupportedFunction(outcome)
    return outcome


def problem(name: str, params: tuple[float, ...]) -> str | None:
    """Why the pair kind cannot be compiled, or None."""
    try:
        pair_functions(name, params)
    except UnsupportedFunction as error:
        return str(error)
    return None


# --- row steps ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def row_function(step: str, params: tuple[float, ...], count: int) -> Any:
    """The row step ``step`` of `objectives.ROW_STEPS` as a Triton function ``(v, s) → outputs``.

    ``v`` is a tuple of ``count`` vectors, float32 or float64, all of one shape; ``s`` the three numbers of `BatchNumbers` in
    their dtype; the result a tuple of vectors (one vector where there is one output).
    """
    function = objectives.ROW_STEPS[step].function
    tiles, scalars = ["x", *(f"x{k}" for k in range(1, count))], [f"s{k}" for k in range(len(objectives.BatchNumbers._fields))]

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        return function(arguments[:count], objectives.BatchNumbers(*arguments[count:]), params)

    bodies = (_body(_Tracer(f"the row step {step!r}", dtype).trace(call, tiles, scalars), precise=True) for dtype in _DTYPES)
    lines = [f"{name} = v[{k}]" for k, name in enumerate(tiles)] + [f"{name} = s[{k}]" for k, name in enumerate(scalars)]
    return _device_function("rows", tuple(bodies), "".join(f"    {line}\n" for line in lines))
