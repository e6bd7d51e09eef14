"""What a user's pointwise function reads beside its argument, where that can be told.

A function whose code, constants, defaults, closure and globals are the same immutable objects as
before, and which calls nothing but pointwise mathematics, has the same values as before. So its
values need not be computed again (`objectives`). Of other functions (methods, objects with
``__call__``, closures over tensors, lists or objects, operations that are not listed here) nothing
is known.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

#: Where operations are looked up: their names' values there must not have changed either.
_MODULES = (torch, torch.nn, torch.nn.functional, torch.special, math)
_SCOPES = (vars(torch.Tensor), *map(vars, _MODULES))
#: Names of pure pointwise operations, as functions of these modules or as methods of a tensor.
_OPERATIONS = frozenset(
    """
    abs absolute acos acosh add asin asinh atan atan2 atanh ceil celu clamp clamp_max
    clamp_min clip copysign cos cosh div divide elu erf erfc erfinv exp exp2 expm1 floor fmax
    fmin frac gelu hardsigmoid hardswish hardtanh huber_loss hypot leaky_relu lerp lgamma log
    log10 log1p log2 logaddexp logit logsigmoid maximum minimum mish mul multiply neg negative
    pow reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin sinh softplus softsign
    sqrt square sub subtract tan tanh tanhshrink true_divide trunc where xlogy zeros_like
    ones_like full_like expit e inf pi functional nn special
    """.split()  # noqa: SIM905
)
#: By their ids, which stay theirs.
_FUNCTIONS = {
    id(x): x
    for scope in _SCOPES
    for name, x in scope.items()
    if name in _OPERATIONS and callable(x)
}
_BUILTINS = frozenset({"abs", "float", "int", "max", "min", "pow", "round"})
_IMMUTABLE = frozenset({bool, complex, float, int, str, type(None)})
#: The instructions with a name or a variable of the closure that only read.
_GLOBAL, _ATTRIBUTE = "LOAD_GLOBAL", ("LOAD_ATTR", "LOAD_METHOD")
_CLOSURE = ("COPY_FREE_VARS", "LOAD_DEREF")
#: Stands for a name that is not there.
_NOTHING = object()
#: How deep functions that call functions are followed.
_DEEPEST = 8


class Reading:
    """What determines the values of a function: where it was found, and which objects these were.

    Equal objects do not suffice: 0.0 equals −0.0, and 1 equals True.
    """

    def __init__(self) -> None:
        self.functions: list[tuple[types.FunctionType, types.CodeType, Any, Any]] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        self.names: list[tuple[Mapping[str, Any], str, Any]] = []

    def unchanged(self) -> bool:
        """Whether the function would read the same objects now."""
        if torch._C._len_torch_function_stack():  # a mode may replace any operation
            return False
        for function, code, defaults, named in self.functions:
            if (
                function.__code__ is not code
                or function.__defaults__ is not defaults
                or function.__kwdefaults__ is not named
            ):
                return False
        for cell, value in self.cells:
            try:
                if cell.cell_contents is not value:
                    return False
            except ValueError:  # it is empty
                return False
        return all(scope.get(name, _NOTHING) is value for scope, name, value in self.names)


def look(function: Any) -> Reading | None:
    """What a function reads, or None where that cannot be told.

    Args:
        function: any object; only plain Python functions and listed operations are known.
    """
    reading = Reading()
    if torch._C._len_torch_function_stack():
        return None
    known = id(function) in _FUNCTIONS or _add_function(reading, function, 0)
    return reading if known else None


def all_unchanged(readings: Iterable[Reading | None]) -> bool:
    """Whether all functions are known to read what they read before."""
    return all(reading is not None and reading.unchanged() for reading in readings)


def _add_function(reading: Reading, function: Any, depth: int) -> bool:
    """Whether a function is known; then ``reading`` contains what it reads."""
    if type(function) is not types.FunctionType or depth > _DEEPEST:
        return False
    code, scope, named = function.__code__, function.__globals__, function.__kwdefaults__
    names = _names(code)
    if names is None:
        return False
    reading.functions.append((function, code, function.__defaults__, named))
    values = [*(function.__defaults__ or ())]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # it is empty
            return False
        reading.cells.append((cell, values[-1]))
    for name in names.globals:
        value = scope.get(name, _NOTHING)
        reading.names.append((scope, name, value))
        if value is _NOTHING:
            if name not in _BUILTINS:
                return False
            reading.names.append((function.__builtins__, name, getattr(builtins, name)))
        else:
            values.append(value)
    for name, value in (named or {}).items():
        reading.names.append((named, name, value))
        values.append(value)
    for name in names.operations:
        reading.names += [(scope, name, scope.get(name, _NOTHING)) for scope in _SCOPES]
    return all(_add_value(reading, value, depth) for value in values)


def _add_value(reading: Reading, value: Any, depth: int) -> bool:
    """As `_add_function`, for a value of a closure, a default or a global."""
    if type(value) is tuple:
        return all(_add_value(reading, x, depth) for x in value)
    if type(value) in _IMMUTABLE or id(value) in _FUNCTIONS:
        return True
    return any(value is x for x in _MODULES) or _add_function(reading, value, depth + 1)


class _Names(NamedTuple):
    """What the code of a function looks up by name."""

    globals: tuple[str, ...]
    operations: tuple[str, ...]


@functools.lru_cache(maxsize=256)
def _names(code: types.CodeType) -> _Names | None:
    """None if the code does more than to read and to call listed operations."""
    if any(isinstance(x, types.CodeType) for x in code.co_consts):
        return None
    globals_, operations = [], []
    for instruction in dis.get_instructions(code):
        if instruction.opcode in dis.hasfree and instruction.opname not in _CLOSURE:
            return None
        if instruction.opcode not in dis.hasname:
            continue
        if instruction.opname == _GLOBAL:
            globals_.append(instruction.argval)
        elif instruction.opname in _ATTRIBUTE and instruction.argval in _OPERATIONS:
            operations.append(instruction.argval)
        else:
            return None
    return _Names(tuple(dict.fromkeys(globals_)), tuple(dict.fromkeys(operations)))
