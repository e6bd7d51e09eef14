"""Formulas as graphs of named operations, traced from PyTorch functions.

A pair kind's or a row step's function runs once on a few numbers while every operation that reaches
PyTorch's dispatcher is recorded, derivatives by autograd included. The operations that lead from
the arguments to the results form the graph. A `Printer` writes a graph as straight-line code of one
language, from a table of templates: Triton in kernels/trace.py, C++ in cpp_printer.py. Users'
functions and built-in ones take the same path, so no formula is written twice.

* Operations are primitive (`_PRIMITIVES`), are decomposed by `_DECOMPOSITIONS` or PyTorch's own
  table, or are refused by name.
* Constants are folded in float64; a printer evaluates equal operations once and scalars first.
* A formula that asks for the limits of its dtype (``torch.finfo``) has different graphs in float32
  and float64, so every formula is traced in both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map


class UnsupportedFunction(ValueError):
    """A user's function cannot be compiled; the message names the function and the operation."""


# --- nodes ----------------------------------------------------------------------------------------


class Node:
    """An operation ``op`` on ``args``: nodes and numbers. An "argument" has its name as only arg.

    ``dtype`` is "x" (the arguments' dtype), "bool", "float32" or "float64". ``vector`` tells values
    that depend on a vector argument from scalars.
    """

    serials = itertools.count()

    def __init__(self, op: str, *args: Any, dtype: str | None = None, vector: bool = False) -> None:
        self.op, self.args, self.serial = op, args, next(Node.serials)
        dtypes = {n.dtype for n in self.operands()}
        self.vector = vector or any(n.vector for n in self.operands())
        known = (d for d in ("float64", "x", "float32", "bool") if d in dtypes)
        self.dtype = dtype or next(known, "x")

    def operands(self) -> list[Node]:
        return [a for a in self.args if isinstance(a, Node)]


class _Refused:
    """Stands for a value without a formula; an error only if the result depends on it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


_NOT_ELEMENTWISE = _Refused("which is none of the elementwise operations that can be compiled")
Value = Node | _Refused | float | bool


def is_number(a: Any) -> bool:
    return isinstance(a, (bool, int, float))


def _is_bool(a: Value) -> bool:
    return isinstance(a, bool) or (isinstance(a, Node) and a.dtype == "bool")


def _both_masks(*values: Value) -> bool:
    return all(isinstance(a, Node) and a.dtype == "bool" for a in values)


def real(a: Value) -> Value:
    """a as a summand or factor: a truth value becomes 0 or 1."""
    if is_number(a):
        return float(a)
    return Node("to_x", a, dtype="x") if a.dtype == "bool" else a


def _bool(a: Value) -> Value:
    if is_number(a):
        return bool(a)
    return a if a.dtype == "bool" else Node("ne", a, 0.0, dtype="bool")


def _add(a: Value, b: Value, alpha: float = 1.0) -> Value:
    if _both_masks(a, b):
        return Node("or", a, b)
    return Node("add", real(a), mul(b, alpha))


def _sub(a: Value, b: Value, alpha: float = 1.0) -> Value:
    return Node("sub", real(a), mul(b, alpha))


def mul(a: Value, b: Value) -> Value:
    if _both_masks(a, b):
        return Node("and", a, b)
    a, b = real(a), real(b)
    if is_number(a) and is_number(b):
        return a * b
    if is_number(b):
        a, b = b, a
    if is_number(a) and abs(a) == 1.0:
        return b if a == 1.0 else neg(b)
    return Node("mul", a, b)


def neg(a: Value) -> Value:
    a = real(a)
    if is_number(a):
        return -a
    return a.args[0] if a.op == "neg" else Node("neg", a)


def _div(a: Value, b: Value, rounding_mode: str | None = None) -> Value:
    a, b = real(a), real(b)
    if rounding_mode == "trunc":
        return Node("trunc", Node("exact_div", a, b))
    if is_number(b) and 2.0**-120 < abs(b) < 2.0**120:  # 1/b is a normal number in float32
        return mul(a, 1.0 / b)
    return Node("div", a, b)


def _power(a: Value, q: Value) -> Value:
    a, q = real(a), real(q)
    if not is_number(q):
        if is_number(a) and a > 0:
            return Node("exp2", mul(q, math.log2(a)))
        return Node("pow", a, q)
    if abs(q) <= 16 and 2 * q == int(2 * q):
        if q < 0:
            return Node("rsqrt", a) if q == -0.5 else _div(1.0, _power(a, -q))
        whole = _integer_power(a, int(q))
        return whole if q == int(q) else mul(whole, Node("sqrt", a))
    return Node("pow", a, q)


def _integer_power(a: Value, q: int) -> Value:
    if q < 2:
        return a if q else 1.0
    half = _integer_power(a, q // 2)
    square = mul(half, half)
    return mul(square, a) if q % 2 else square


def _function(op: str, *args: Value) -> Value:
    return Node(op, *map(real, args))


def _compare(op: str, a: Value, b: Value) -> Value:
    return Node(op, real(a), real(b), dtype="bool")


def _logical(op: str, a: Value, b: Value) -> Value:
    return Node(op, _bool(a), _bool(b))


def _bitwise(op: str, a: Value, b: Value) -> Value:
    return _logical(op, a, b) if _is_bool(a) and _is_bool(b) else _Refused("of integers")


def _where(condition: Value, a: Value, b: Value) -> Value:
    if is_number(condition):
        return a if condition else b
    if is_number(a) and is_number(b) and (a == b or (a != a and b != b)):
        return a
    if not (_is_bool(a) and _is_bool(b)):
        a, b = real(a), real(b)
    dtype = "x" if is_number(a) and is_number(b) else (b if is_number(a) else a).dtype
    return Node("where", condition, a, b, dtype=dtype)


def _clamp(a: Value, min: Value | None = None, max: Value | None = None) -> Value:
    a = a if min is None else _function("maximum", a, min)
    return a if max is None else _function("minimum", a, max)


def _sign(a: Value) -> Value:
    return _where(_compare("gt", a, 0.0), 1.0, _where(_compare("lt", a, 0.0), -1.0, 0.0))


def _index_put(a: Value, indices: list[Any], values: Value, accumulate: bool = False) -> Value:
    """``a[mask] = number``."""
    mask = len(indices) == 1 and getattr(indices[0], "dtype", None) == "bool"
    if accumulate or not mask or not is_number(values):
        return _Refused("other than a[mask] = number")
    return _where(indices[0], values, a)


#: aten operation → value. Names that begin a comparison, a mask operation or a function are the
#: graph's.
_PRIMITIVES: dict[str, Callable[..., Value]] = {
    "add": _add, "sub": _sub, "mul": mul, "div": _div, "neg": neg, "pow": _power, "where": _where,
    "sign": _sign, "sgn": _sign, "clamp": _clamp, "clamp_min": partial(_function, "maximum"),
    "clamp_max": partial(_function, "minimum"), "relu": lambda a: _function("maximum", a, 0.0),
    "round": lambda a, decimals=0: (
        _Refused("with decimals") if decimals else _function("nearbyint", a)
    ),
    "reciprocal": lambda a: _div(1.0, a), "square": lambda a: _power(a, 2.0),
    "rsub": lambda a, b, alpha=1.0: _sub(b, a, alpha), "index_put": _index_put,
    "isnan": lambda a: _compare("ne", a, a),
    "isfinite": lambda a: _compare("lt", _function("abs", a), math.inf),
    "logical_not": lambda a: Node("not", _bool(a)),
    "bitwise_not": lambda a: Node("not", a) if _is_bool(a) else _Refused("of integers"),
    "masked_fill": lambda a, mask, value: _where(mask, value, a),
    "copy": lambda a, source, non_blocking=False: source,
    "clone": lambda a, **options: a, "new_full": lambda a, size, value, **options: value,
    # of every derivative; its decomposition would import for seconds
    "sum": lambda a, *args, **options: _NOT_ELEMENTWISE,
}  # fmt: skip
_PRIMITIVES |= {name: partial(_compare, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_PRIMITIVES |= {f"logical_{op}": partial(_logical, op) for op in ("and", "or", "xor")}
_PRIMITIVES |= {f"bitwise_{op}": partial(_bitwise, op) for op in ("and", "or", "xor")}
_PRIMITIVES |= dict.fromkeys(("zero", "zeros_like", "new_zeros"), lambda *args, **options: 0.0)
_PRIMITIVES |= dict.fromkeys(("ones_like", "new_ones"), lambda *args, **options: 1.0)
_PRIMITIVES |= dict.fromkeys(("fill", "full_like"), lambda a, value, **options: value)
_FUNCTIONS = """
    abs acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf erfc erfinv exp exp2
    expm1 floor fmax fmin fmod hypot log log10 log1p log2 maximum minimum rsqrt sin sinh sqrt tan
    tanh trunc
"""
_PRIMITIVES |= {name: partial(_function, name) for name in _FUNCTIONS.split()}

#: Do not read the values of their first argument.
_UNREAD = {
    "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill", "zero",
    "copy",
}  # fmt: skip
#: Give their argument another shape, or none.
_ALIASES = {
    "alias", "as_strided", "conj_physical", "detach", "expand", "squeeze", "unsqueeze", "view",
    "_unsafe_view",
}  # fmt: skip


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
    return 0.5 * x * torch.erfc(x * -math.sqrt(0.5))


def _gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return decomposition_table[torch.ops.aten.gelu_backward.default](
            grad, x, approximate=approximate
        )
    return grad * (
        0.5 * torch.erfc(x * -math.sqrt(0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    )


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
} | dict.fromkeys(
    ("hardshrink_backward", "softshrink_backward"),
    lambda grad, x, lambd: torch.where(x.abs() <= lambd, 0.0, grad),
)


# --- tracing --------------------------------------------------------------------------------------


class Tracer(TorchDispatchMode):
    """Records how tensors of one dtype arise; an `UnsupportedFunction` names the ``label``.

    Aliases of a tensor share a cell, so all of them see a change in place.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its import would take seconds, and nothing is compiled by it here

    def __init__(
        self, label: str, dtype: torch.dtype, decide: Callable[[Node], bool] | None = None
    ) -> None:
        """``decide`` gives the truth of a condition on scalars by which the function decides."""
        super().__init__()
        self.label, self.dtype, self.decide = label, dtype, decide
        # by id; the tensor is kept so that its id is not given again
        self.cells: dict[int, tuple[Tensor, list[Value]]] = {}
        self.within: list[str] = []  # operations that are being decomposed

    def trace(
        self,
        function: Callable[..., Tensor | Sequence[Tensor]],
        vectors: Sequence[str],
        scalars: Sequence[str],
        parameters: Sequence[str] = (),
    ) -> list[Value]:
        """The results of a function of vectors and scalars (0-dim tensors) with these names.

        ``parameters`` name scalars that the function receives by keyword.
        """
        with torch.inference_mode(False), torch.enable_grad(), on_cpu():
            points = [[-0.75, 0.25, 1.5], [0.5, -0.125, 0.875]]
            arguments = {name: torch.tensor(points, dtype=self.dtype) for name in vectors}
            for name in (*scalars, *parameters):
                arguments[name] = torch.tensor(0.5, dtype=self.dtype)
            for name, argument in arguments.items():
                self.define(argument, Node("argument", name, dtype="x", vector=name in vectors))
            by_name = {name: arguments.pop(name) for name in parameters}
            with self:
                results = function(*arguments.values(), **by_name)
        values = [self.value(y) for y in ([results] if isinstance(results, Tensor) else results)]
        for value in values:
            if isinstance(value, _Refused):
                raise UnsupportedFunction(f"{self.label} uses {value.reason}")
        return [real(value) for value in values]

    def value(self, a: Any) -> Any:
        """The value of a tensor; other arguments of an operation are returned unchanged."""
        if not isinstance(a, Tensor):
            return a
        if id(a) not in self.cells:
            raise UnsupportedFunction(
                f"{self.label} closes over a tensor, whose later changes compiled code would miss: "
                "use Python numbers"
            )
        return self.cells[id(a)][1][0]

    def define(self, tensor: Tensor, value: Value) -> Tensor:
        self.cells[id(tensor)] = tensor, [value]
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            if id(args[0]) not in self.cells:
                return func(*args)  # a number from outside, as a Python attribute would be
            condition = self.value(args[0])
            if self.decide is not None and isinstance(condition, Node) and not condition.vector:
                return self.decide(condition)
        if name in ("lift_fresh", "lift_fresh_copy"):  # a tensor that the function makes of numbers
            out = func(*args)
            return self.define(out, self.explained(_constant(out), func))
        in_place = func._schema.is_mutable and name.endswith("_")
        base = name[:-1] if in_place else name
        leaves = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        inputs = [self.value(a) for a in leaves]
        if base in _ALIASES:
            out = func(*args, **kwargs)
            size = Tensor.stride if base == "as_strided" else Tensor.numel
            if size(out) == size(args[0]) or is_number(inputs[0]) or args[0].numel() == 1:
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
                if isinstance(tensor, Tensor) and id(tensor) not in self.cells:
                    whole = value if tensor is out else self.explained(_NOT_ELEMENTWISE, func)
                    self.define(tensor, whole)
        elif not all(map(is_number, inputs)) and name != "is_same_size":
            raise UnsupportedFunction(
                f"{self.label} decides by values of its argument ({func.overloadpacket}): "
                "use torch.where"
            )
        return out

    def write(self, target: Tensor, value: Value, func: Any) -> None:
        """A change in place: aliases change with the tensor, its other views become unknown."""
        written, memory = self.cells[id(target)][1], target.untyped_storage().data_ptr()
        for tensor, cell in self.cells.values():
            if cell is not written and tensor.untyped_storage().data_ptr() == memory:
                cell[0] = self.explained(_NOT_ELEMENTWISE, func)
        written[0] = value

    def operation(self, func: Any, base: str, args: Any, kwargs: Any, inputs: list[Value]) -> Any:
        """The value of an operation none of whose operands is refused."""
        in_place = base != func.overloadpacket.__name__
        writes_elsewhere = func._schema.is_mutable and not in_place
        if torch.Tag.nondeterministic_seeded in func.tags or writes_elsewhere:
            return _NOT_ELEMENTWISE
        if not inputs or (torch.Tag.pointwise in func.tags and all(map(is_number, inputs))):
            args, kwargs = tree_map(self.in_float64, (args, kwargs))
            return _constant(func(*args, **kwargs))
        values, options = tree_map(self.value, (args, kwargs))
        if base in ("_to_copy", "to", "convert_element_type"):
            dtypes = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.dtype)]
            return self.cast(values[0], dtypes[0] if dtypes else self.dtype)
        if base in _PRIMITIVES and options.get("rounding_mode") != "floor":
            return _PRIMITIVES[base](*values, **options)
        packet = getattr(torch.ops.aten, base, None)
        functional = getattr(packet, func._overloadname, func) if in_place else func
        decomposition = _DECOMPOSITIONS.get(base) or decomposition_table.get(
            functional, func.decompose
        )
        self.within.append(str(func.overloadpacket))
        with self:
            out = decomposition(*args, **kwargs)
        self.within.pop()
        return _NOT_ELEMENTWISE if out is NotImplemented else _Decomposed(out)

    def explained(self, value: Any, func: Any) -> Any:
        """A refused value with the name of the operation that the function called."""
        if not isinstance(value, _Refused):
            return value
        return _Refused(f"{(*self.within, func.overloadpacket)[0]}, {value.reason}")

    def in_float64(self, a: Any) -> Any:
        """A constant operand, or the dtype of a new constant, without rounding to float32."""
        if isinstance(a, Tensor):
            value = self.value(a)
            dtype = torch.bool if isinstance(value, bool) else torch.float64
            return torch.tensor(value, dtype=dtype, device="cpu")
        return torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a

    def cast(self, a: Value, dtype: torch.dtype) -> Value:
        if dtype == torch.bool:
            return _bool(a)
        if is_number(a):
            return a
        if dtype in (torch.float32, torch.float64):
            name = "x" if dtype == self.dtype else str(dtype).removeprefix("torch.")
            return a if a.dtype == name else Node(f"to_{name}", a, dtype=name)
        if dtype in (torch.int32, torch.int64):  # whole numbers stay in floating point
            return real(a) if a.dtype == "bool" else _function("trunc", a)
        return _Refused(f"a conversion to {dtype}")


def on_cpu() -> AbstractContextManager[Any]:
    """Where a function makes tensors; an idle torch.device would slow every operation."""
    try:
        cpu = torch.get_default_device().type == "cpu"
    except (RuntimeError, AssertionError):  # a default device that this machine lacks
        cpu = False
    return nullcontext() if cpu else torch.device("cpu")


class _Decomposed(NamedTuple):
    """The result of an operation that others replaced."""

    out: Any


def _constant(tensor: Tensor) -> Value:
    """The number that every element of a tensor equals."""
    numbers = tensor.unique()  # NaNs are all different
    if numbers.numel() == 1 or (tensor.numel() and bool(tensor.isnan().all())):
        return numbers[0].item()
    return _Refused("a tensor of several numbers")


class Decisions:
    """The truth of the conditions by which a function decides, along one path through it."""

    def __init__(self, path: tuple[bool, ...]) -> None:
        """``path``: of the first conditions; further ones are false."""
        self.path = path
        self.conditions: dict[Any, Node] = {}  # in the order in which the function came to them

    def __call__(self, condition: Node) -> bool:
        names = [a.args[0] if isinstance(a, Node) else a for a in condition.args]
        self.conditions.setdefault((condition.op, *names), condition)
        place = [*self.conditions].index((condition.op, *names))
        return self.path[place] if place < len(self.path) else False


class Branching:
    """A pointwise function (x, parameter) with another formula at some values of the parameter.

    A language in which the parameter is known at run time prints it as a function with branches.
    """

    def __init__(
        self, function: Callable[[Tensor, Any], Tensor], values: tuple[float, ...]
    ) -> None:
        self.name, self.function, self.values = function.__name__.strip("_"), function, values

    def __call__(self, x: Tensor, parameter: float | Tensor) -> Tensor:
        if not isinstance(parameter, Tensor):
            return self.function(x, parameter)
        tracer = _get_current_dispatch_mode()
        operands = tracer.value(x), tracer.value(parameter)
        return tracer.define(torch.empty_like(x), Node(f"call {self.name}", *operands))


# --- printing -------------------------------------------------------------------------------------


#: Operators that look the same in every language.
OPERATORS = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "exact_div": "{} / {}", "eq": "{} == {}",
    "ne": "{} != {}", "lt": "{} < {}", "le": "{} <= {}", "gt": "{} > {}", "ge": "{} >= {}",
    "and": "{} & {}", "or": "{} | {}", "xor": "{} ^ {}",
}  # fmt: skip


class Printer:
    """Writes values as statements of a language, from a table of templates."""

    language: str
    #: Operation → template with places for its operands, or a function of the node that chooses
    #: one.
    table: Mapping[str, str | Callable[[Node], str]]

    def __init__(self, label: str) -> None:
        self.label = label

    def lower(self, node: Node, args: list[Value]) -> Value:
        """An operation on operands that are lowered already, in operations of the language."""
        return Node(node.op, *args, dtype=node.dtype, vector=node.vector)

    def operand(self, node: Node, a: Value, names: Mapping[Node, str]) -> str:
        """How an operand of an operation is written; nodes have names."""
        raise NotImplementedError

    def lowered(self, values: list[Value]) -> tuple[list[Value], list[Node]]:
        """The values after `lower`, and their nodes: scalars first, in traced order."""
        new: dict[Any, Value] = {}
        for node in _reachable(values):
            args = [new[a] if isinstance(a, Node) else a for a in node.args]
            new[node] = node if node.op == "argument" else self.lower(node, args)
        values = [new[v] if isinstance(v, Node) else v for v in values]
        return values, sorted(_reachable(values), key=lambda n: n.vector)

    def code(self, node: Node, names: Mapping[Node, str]) -> str:
        template = self.template(node)
        return template.format(*(self.operand(node, a, names) for a in node.args))

    def template(self, node: Node) -> str:
        entry = self.table.get(node.op)
        if entry is None:
            operation = node.op.replace("to_", "a conversion to ")
            raise UnsupportedFunction(f"{self.label} uses {operation}: not in {self.language}")
        return entry if isinstance(entry, str) else entry(node)


def _reachable(values: list[Value]) -> list[Node]:
    """All nodes that values depend on, in the order in which they were made."""
    nodes, pending = set(), [value for value in values if isinstance(value, Node)]
    while pending:
        node = pending.pop()
        if node not in nodes:
            nodes.add(node)
            pending += node.operands()
    return sorted(nodes, key=lambda n: n.serial)
