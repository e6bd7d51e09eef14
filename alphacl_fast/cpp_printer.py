"""Graphs of formulas as C++: on vectors for the CPU kernels, on scalars for the CUDA kernels.

The templates call hand-written primitives: those in csrc/cpu/vec.h and csrc/cpu/pairs.h, or in
csrc/cuda/pairs.h. Printed code has the accumulation type T as a template parameter.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from .graph import (
    OPERATORS,
    Branching,
    Decisions,
    Node,
    Printer,
    Tracer,
    Value,
    is_number,
    mul,
    neg,
    real,
)
from .objectives import BatchNumbers, BoundKind, PairKind, RowStep

__all__ = [
    "CpuPrinter",
    "CudaPrinter",
    "FunctionPrinter",
    "RowPrinter",
    "branching_function",
    "pair_struct",
    "row_struct",
    "statements",
]

_ARITHMETIC = {"add", "sub", "mul", "div", "exact_div", "neg"}
_COMMON = OPERATORS | {"div": "{} / {}", "neg": "-{}", "where": "{} ? {} : {}"}
_OPERATORS = {*_COMMON.values(), "~{}", "!{}"}
#: Functions of <cmath>, by their number of arguments.
_STANDARD = {
    1: "abs acos acosh asin asinh atan atanh ceil cos cosh erf erfc exp2 expm1 floor log10 "
    "log2 nearbyint sin sinh tan tanh trunc",
    2: "atan2 copysign fmax fmin fmod hypot",
}


class CppPrinter(Printer):
    """C++ expressions for values; a value that is used once is written where it is used."""

    language = "C++"
    flags: str  #: a kind's flags, as members of its struct
    signature: str  #: signature of a static function ``piece`` of ``x`` and the numbers ``n``
    function: str  #: head of a function ``name`` of x and q

    def __init__(self, label: str, dtype: torch.dtype) -> None:
        super().__init__(label)
        self.smallest_normal = torch.finfo(dtype).tiny

    def literal(self, number: float) -> str:
        if number == self.smallest_normal:
            return "SMALLEST_NORMAL<T>"
        if math.isfinite(number):
            return f"T({repr(number).removesuffix('.0')})"
        return (
            'T(__builtin_nan(""))'
            if math.isnan(number)
            else f"T({'-' * (number < 0)}__builtin_inf())"
        )

    def lower(self, node: Node, args: list[Value]) -> Value:
        if node.op == "neg" and getattr(args[0], "op", None) == "mul":
            a, b = args[0].args  # the sign goes to the scalar factor
            if is_number(a) or not a.vector:
                return mul(neg(a), b)
        if node.op == "rsqrt":
            return Node("div", 1.0, Node("sqrt", *args))
        if node.op == "div" and (inverse := _inverse_of_tau(args[1])) is not None:
            return mul(args[0], inverse)
        if node.op == "maximum":
            a, b = args if is_number(args[1]) else args[::-1]
            return Node("at_least" if is_number(b) and b == b else "largest", a, b)
        if node.op == "minimum":
            return neg(self.lower(Node("maximum"), [neg(a) for a in args]))
        return super().lower(node, args)

    def operand(self, node: Node, a: Any, names: Mapping[Node, str]) -> str:
        if isinstance(a, Node):
            return names[a]
        return str(a).lower() if isinstance(a, bool) else self.literal(a)

    def type_of(self, node: Node) -> str:
        raise NotImplementedError

    def template(self, node: Node) -> str:
        if node.op.startswith("call "):  # of a `Branching`
            return f"{node.op[5:]}<T>({{}}, {{}})"
        return super().template(node)

    def code(self, node: Node, names: Mapping[Node, str]) -> str:
        template = self.template(node)
        operands = (self.operand(node, a, names) for a in node.args)
        return template.format(*(operands if template in _OPERATORS else map(_bare, operands)))

    def print(self, values: list[Value]) -> tuple[list[str], list[str]]:
        """Declarations and an expression for every value."""
        values, nodes = self.lowered(values)
        merged: dict[Any, Node] = {}  # equal operations on equal operands are one node
        first: dict[Node, Node] = {}
        uses: dict[Node, int] = {}
        for node in nodes:
            args = tuple(first[a] if isinstance(a, Node) else a for a in node.args)
            first[node] = merged.setdefault((node.op, *map(_key, args)), node)
            if first[node] is node:
                node.args = args
                for a in node.operands():
                    uses[a] = uses.get(a, 0) + 1
        values = [first[v] if isinstance(v, Node) else v for v in values]
        names: dict[Node, str] = {}
        declarations: list[str] = []
        for node in merged.values():
            if node.op == "argument":
                names[node] = node.args[0]
                continue
            code = self.code(node, names)
            if uses.get(node, 0) + values.count(node) == 1:
                names[node] = f"({code})" if self.template(node) in _OPERATORS else code
            else:
                names[node] = f"v{len(declarations)}"
                declarations.append(f"const {self.type_of(node)} {names[node]} = {code};")
        return declarations, [_bare(self.result(v, names)) for v in values]

    def result(self, value: Value, names: Mapping[Node, str]) -> str:
        return names[value] if isinstance(value, Node) else self.literal(value)


def _key(a: Any) -> Any:
    return (type(a), repr(a)) if is_number(a) else a


def _bare(code: str) -> str:
    """An expression without the brackets around all of it."""
    depth = 0
    for k, letter in enumerate(code):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return code[1:-1] if code[0] == "(" and k == len(code) - 1 else code
    return code


def _inverse_of_tau(b: Value) -> Value | None:
    """1/b if b is a product of temperatures, whose inverse a kernel computes once; else None."""
    if not isinstance(b, Node):
        return None
    if b.op == "argument":
        return Node("argument", "n.inv_tau") if b.args[0] == "n.tau" else None
    if b.op not in ("neg", "mul"):
        return None
    inverses = [_inverse_of_tau(a) for a in b.args]
    if None in inverses:
        return None
    return neg(*inverses) if b.op == "neg" else mul(*inverses)


class CpuPrinter(CppPrinter):
    """On vectors: `Vec<T>` values and `Mask<T>` conditions; scalars in arithmetic stay scalars."""

    flags = "static constexpr bool log = {log}, linear_in_t = {linear};"
    signature = "static ALPHACL_INLINE Vec<T> {piece}(Vec<T>{x}, const Numbers<T>&{n})"
    function = "ALPHACL_INLINE Vec<T> {name}(Vec<T> x, T q)"

    table = _COMMON | {
        "not": "~{}", "to_x": "one_where<T>({})", "exp": "vexp<T>({})", "log": "vlog<T>({})",
        "log1p": "vlog1p<T>({})", "log1p_unit": "vlog1p_unit({})", "sqrt": "vsqrt<T>({})",
        "largest": "largest<T>({}, {})",
        "at_least": "at_least<T>({}, {})", "pow": "vpow({}, {})", "to_double": "double({})",
        "to_float32": "lanewise<T>([](T a) {{ return T(float(a)); }}, {})",
        "lanewise_pow": "lanewise<T>([](T a, T b) {{ return std::pow(a, b); }}, {}, {})",
    }  # fmt: skip
    table |= {
        f: f"lanewise<T>([](auto... a) {{{{ return std::{f}(a...); }}}}{', {}' * count})"
        for count, functions in _STANDARD.items()
        for f in functions.split()
    }

    def lower(self, node: Node, args: list[Value]) -> Value:
        if node.op in ("to_x", "to_float32") and (node.op == "to_x" or args[0].dtype == "bool"):
            return real(args[0])
        if node.op == "log1p" and _is_exp_of_minus_abs(args[0]):
            return Node("log1p_unit", *args)
        if node.op == "pow":
            a, q = args
            if is_number(q):
                fast = not math.isinf(q) and q != int(q)
                return Node("pow" if fast else "lanewise_pow", a, q)
            if q.vector:
                return Node("lanewise_pow", a, q)
            return Node("pow", a, _in_double(q), dtype="x")
        return super().lower(node, args)

    def is_vector(self, a: Value) -> bool:
        if not isinstance(a, Node) or a.op == "argument":
            return isinstance(a, Node) and a.vector
        return a.dtype != "float64" and (
            a.op not in _ARITHMETIC or any(map(self.is_vector, a.args))
        )

    def operand(self, node: Node, a: Any, names: Mapping[Node, str]) -> str:
        if node.op.startswith("call ") and a is node.args[1]:
            return names[a]
        # exponents are doubles
        if node.dtype == "float64" or (node.op == "pow" and a is node.args[1]):
            return repr(a).removesuffix(".0") if is_number(a) else names[a]
        if node.op in _ARITHMETIC or self.is_vector(a) or (node.op == "at_least" and is_number(a)):
            return super().operand(node, a, names)
        if isinstance(a, bool):
            return "~Mask<T>{}" if a else "Mask<T>{}"
        if is_number(a) and a == 0:
            return "Vec<T>{}"
        return f"broadcast<T>({_bare(super().operand(node, a, names))})"

    def result(self, value: Value, names: Mapping[Node, str]) -> str:
        code = super().result(value, names)
        return code if self.is_vector(value) else f"broadcast<T>({_bare(code)})"

    def type_of(self, node: Node) -> str:
        if node.dtype == "float64":
            return "double"
        return "Mask<T>" if node.dtype == "bool" else "Vec<T>" if self.is_vector(node) else "T"


def _is_exp_of_minus_abs(a: Value) -> bool:
    """Whether a value is exp(−|x|), written as exp(x > 0 ? −x : x)."""
    choice = a.args[0] if isinstance(a, Node) and a.op == "exp" else None
    if not (isinstance(choice, Node) and choice.op == "where"):
        return False
    condition, below, x = choice.args
    if not all(isinstance(y, Node) for y in choice.args):
        return False
    opposite = any(y.op == "neg" and y.args[0] is z for y, z in ((below, x), (x, below)))
    return condition.op == "gt" and condition.args[0] is x and condition.args[1] == 0 and opposite


class RowPrinter(CpuPrinter):
    """Row steps on vectors: every quotient is rounded once, since their time does not matter."""

    def lower(self, node: Node, args: list[Value]) -> Value:
        return Node("div", *args) if node.op == "div" else super().lower(node, args)


class FunctionPrinter(CpuPrinter):
    """On vectors, with every number of the formula as an argument: k0, k1, … in double precision.

    The code then depends on the formula's form alone, and what was compiled serves all values of
    its constants. Each place has an argument of its own, since two numbers may be equal by chance.
    """

    def __init__(self, label: str, dtype: torch.dtype) -> None:
        super().__init__(label, dtype)
        self.constants: list[float] = []

    def constant(self, number: float) -> str:
        self.constants.append(float(number))
        return f"k{len(self.constants) - 1}"

    def operand(self, node: Node, a: Any, names: Mapping[Node, str]) -> str:
        if isinstance(a, bool) or not is_number(a):
            return super().operand(node, a, names)
        name = self.constant(a)
        if node.dtype == "float64" or (node.op == "pow" and a is node.args[1]):
            return name
        scalar = node.op in _ARITHMETIC or node.op == "at_least"
        return f"T({name})" if scalar else f"broadcast<T>(T({name}))"

    def result(self, value: Value, names: Mapping[Node, str]) -> str:
        return f"broadcast<T>(T({self.constant(value)}))" if is_number(value) else names[value]


def _in_double(a: Value) -> Value:
    """A scalar expression evaluated in double precision on parameters rounded to T."""
    if not isinstance(a, Node):
        return a
    if a.op == "argument":
        return Node("to_double", a, dtype="float64")
    return Node(a.op, *map(_in_double, a.args), dtype="float64")


class CudaPrinter(CppPrinter):
    """On one pair: every value is a T."""

    language = "CUDA"
    flags = "static constexpr bool LOG = {log}, LINEAR = {linear};"
    signature = "static DEVICE T {piece}(T{x}, const Numbers<T>&{n})"
    function = "DEVICE T {name}(T x, T q)"

    table = _COMMON | {
        "not": "!{}", "to_x": "T({})", "exp": "exponential({})", "log": "logarithm({})",
        "log1p": "logarithm_of_1_plus({})", "sqrt": "root({})",
        "at_least": "at_least({}, {})", "pow": "power_of({}, {})",
    }  # fmt: skip

    def type_of(self, node: Node) -> str:
        return "bool" if node.dtype == "bool" else "T"


# --- code -----------------------------------------------------------------------------------------


def statements(
    printer: type[CppPrinter],
    label: str,
    function: Callable[..., Any],
    names: Sequence[Sequence[str]],
    result: str = "return {};",
    path: tuple[bool, ...] | None = None,
) -> list[str]:
    """Statements of a function of ``names``: vectors, scalars and parameters (see `Tracer.trace`).

    They end in ``result``, a template for the values: "return {};", or "a = {}; b = {};".
    ``path``: the truth of the conditions on parameters by which the function may decide.
    """
    printed = []
    for dtype in (torch.float32, torch.float64):
        decide = None if path is None else Decisions(path)
        graph = Tracer(label, dtype, decide).trace(function, *names)
        declarations, values = printer(label, dtype).print(graph)
        printed.append([*declarations, result.format(*values)])
    narrow, wide = printed
    if narrow == wide:
        return narrow
    branches = [*_indented(narrow), "} else {", *_indented(wide)]
    return ["if constexpr (sizeof(T) == 4) {", *branches, "}"]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def branching_function(part: Branching, printer: type[CppPrinter]) -> str:
    """A function of x and a parameter q, with a branch for every value that has its own formula."""
    lines = [f"template <class T> {printer.function.format(name=part.name)} {{"]
    for value in (*part.values, None):
        formula = part.function if value is None else lambda x, q=value: part.function(x, q)
        names = ["x"], ["q"] if value is None else []
        body = statements(printer, part.name, formula, names, path=())
        lines += body if value is None else [f"if (q == T({value:g})) {{", *_indented(body), "}"]
    return "\n".join([lines[0], *_indented(lines[1:]), "}"])


def pair_struct(
    name: str, kind: PairKind, printer: type[CppPrinter], fixed: Collection[str] = ()
) -> str:
    """A pair kind as a struct of static functions of x and `Numbers`.

    A template argument may fix the parameters ``fixed`` to integers; 0 leaves them to run time.
    """
    log, linear = (str(flag).lower() for flag in (kind.log, kind.linear_in_t))
    flags = printer.flags.format(log=log, linear=linear)
    arguments = "".join(f", int {p.upper()} = 0" for p in fixed)
    lines = [*(f"// {line.strip()}" for line in kind.about.splitlines())]
    lines += [f"template <class T{arguments}> struct {name} {{", f"  {flags}"]
    for piece in BoundKind._fields:
        function = getattr(kind, piece) or (lambda x, tau, **params: torch.zeros_like(x))
        names = ["x"], ["n.tau"], kind.parameters
        body = statements(printer, f"the pair kind {name}", function, names)
        used = set(re.findall(r"[a-z_.]+", " ".join(body)))
        values = [
            f"{p} = " + f"{p.upper()} ? T({p.upper()}) : " * (p in fixed) + f"n.params[{k}]"
            for k, p in enumerate(kind.parameters)
            if p in used
        ]
        if values:
            body = [f"const T {', '.join(values)};", *body]
        x = " x" if "x" in used else ""
        n = " n" if values or used & {"n.tau", "n.inv_tau"} else ""
        lines.append(f"  {printer.signature.format(piece=piece, x=x, n=n)} {{")
        lines += _indented(_indented(body))
        lines.append("  }")
    return "\n".join([*lines, "};"])


_FUNCTION = """\
namespace of_{type} {{
using T = {type};
template <bool F, bool DF> void values(const double* k, const T* xs, T* fs, T* dfs, int64_t n) {{
{numbers}  for (int64_t i = 0; i < n; i += LANES<T>) {{
    const Vec<T> x = load(xs + i);
{body}
    if (F) store(fs + i, {f});
    if (DF) store(dfs + i, {df});
  }}
}}
}}  // namespace of_{type}"""
_ENTRY = """\
extern "C" __attribute__((visibility("default"))) void alphacl_{type}(const double* k, const {type}* x, {type}* f, {type}* df, int64_t n) {{
  using namespace of_{type};
  (f ? df ? values<true, true> : values<true, false> : values<false, true>)(k, x, f, df, n);
}}"""  # noqa: E501


def pair_function(
    label: str, function: Callable[..., Any], dtype: torch.dtype
) -> tuple[str, list[float]]:
    """C++ of a function that returns f and ∂f/∂x of vectors x in a dtype, and its constants."""
    printer = FunctionPrinter(label, dtype)
    declarations, (f, df) = printer.print(Tracer(label, dtype).trace(function, ["x"], []))
    name = "float" if dtype == torch.float32 else "double"
    numbers = "".join(f"  const double k{i} = k[{i}];\n" for i in range(len(printer.constants)))
    code = _FUNCTION.format(
        type=name, numbers=numbers, body="\n".join(f"    {line}" for line in declarations),
        f=f, df=df,
    )  # fmt: skip
    return "\n".join([code, _ENTRY.format(type=name)]), printer.constants


# --- row steps ------------------------------------------------------------------------------------


def row_struct(name: str, step: RowStep, count: int) -> str:
    """A row step of ``count`` vectors as a struct whose function serves one vector of rows."""
    vectors, outputs = [f"x{k}" for k in range(count)], range(len(step.outputs))

    def function(*arguments: torch.Tensor, **params: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *rows, n_neg, tau, divisor = arguments
        return step.function(*rows, numbers=BatchNumbers(tau, n_neg, divisor), **params)

    names = [*vectors, "n_neg"], ["n.tau", "n.divisor"], step.parameters
    result = " ".join(f"store(out[{k}] + at, {{}});" for k in outputs)
    body = _by_condition(name, function, names, result)
    used = set(re.findall(r"\w+", " ".join(body)))
    values = [f"{p} = n.params[{k}]" for k, p in enumerate(step.parameters) if p in used]
    loads = [f"{x} = load(in[{k}] + at)" for k, x in enumerate(vectors) if x in used]
    inputs, numbers = " in" * bool(loads), " n" * bool(values or "n" in used)
    loads += ["n_neg = load(n.n_neg + at)"] * ("n_neg" in used)
    head = [
        f"const {kind} {', '.join(list_)};"
        for kind, list_ in (("Vec<T>", loads), ("T", values))
        if list_
    ]
    signature = (
        f"static ALPHACL_INLINE void rows(const T* const*{inputs}, T* const* out, int64_t at, "
        f"const RowNumbers<T>&{numbers})"
    )
    lines = [f"template <class T> struct {name} {{", f"  {signature} {{"]
    return "\n".join([*lines, *_indented(_indented([*head, *body])), "  }", "};"])


def _by_condition(
    label: str,
    function: Callable[..., Any],
    names: Sequence[Sequence[str]],
    result: str,
    path: tuple[bool, ...] = (),
) -> list[str]:
    """`statements` with a branch for each condition on parameters by which a function decides."""
    decisions = Decisions(path)
    Tracer(label, torch.float32, decisions).trace(function, *names)
    if len(decisions.conditions) == len(path):
        return statements(RowPrinter, label, function, names, result, path)
    condition = [*decisions.conditions.values()][len(path)]
    left, right = condition.args if condition.op == "eq" else (condition, None)
    test = f"{left.args[0]} != 0" if right is None else f"{left.args[0]} == {right:g}"
    branches = [_by_condition(label, function, names, result, (*path, x)) for x in (True, False)]
    yes, no = map(_indented, branches)
    return [f"if ({test}) {{", *yes, "} else {", *no, "}"]
