"""PTX text to instructions with resolved registers, labels and functions.

Functions are inlined: their parameters become registers of the caller. Only the kernel that is
asked for is parsed, because a file of nvcc has dozens of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable
from dataclasses import dataclass, field

from .faults import Unsupported

#: Bytes of a type, by the digits of its name.
_WIDTHS = {"pred": 0, "8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True, eq=False)  # one object for a register of a kernel
class Register:
    name: str  # registers of inner scopes carry the scope's number
    bytes: int  # 0 for predicates


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Special:
    name: str  # such as %tid.x


@dataclass(frozen=True)
class Symbol:
    name: str  # shared memory or a parameter of the kernel


@dataclass(frozen=True)
class Vector:
    parts: tuple


@dataclass(frozen=True)
class Pair:
    first: Register | None  # None: `_`
    second: Register | None


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple = ()  # of a tensor copy


@dataclass
class Instruction:
    opcode: str
    operands: tuple
    predicate: Register | None
    negated: bool
    text: str
    origin: int  # the same for all inlined copies of one instruction
    target: int = -1  # of a branch
    targets: tuple[int, ...] = ()  # of an indexed branch

    def written(self) -> set[Register]:
        """The registers that it writes."""
        if self.opcode.startswith(_WRITES_NOTHING) or not self.operands:
            return set()
        return set(_registers_of(self.operands[0]))

    def form(self) -> tuple:
        """The same for all instructions that differ in registers, floats and addresses alone."""
        forms = tuple(map(_form, self.operands)) if self.target < 0 else ()
        return self.opcode, self.predicate is None, forms

    def registers(self) -> set[Register]:
        found = set() if self.predicate is None else {self.predicate}
        for operand in self.operands:
            if isinstance(operand, Register):
                found.add(operand)
            elif isinstance(operand, (Vector, Pair, Address)):
                found.update(_registers_of(operand))
        return found


_WRITES_NOTHING = ("st", "bra", "brx", "ret", "exit", "bar", "cp.", "fence", "setmaxnreg",
                   "mbarrier.init", "mbarrier.arrive", "wgmma.fence", "wgmma.commit")  # fmt: skip


def _form(operand) -> Hashable:
    if isinstance(operand, Register):
        return operand.bytes
    if isinstance(operand, Immediate):
        return "float" if operand.text[:2].lower() in ("0f", "0d") else operand.text
    if isinstance(operand, Vector):
        return tuple(map(_form, operand.parts))
    if isinstance(operand, Pair):
        return operand.first is None, operand.second is None
    if isinstance(operand, Address):
        return type(operand.base), tuple(map(_form, operand.coordinates))
    return operand


def _registers_of(operand):
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Vector):
        for part in operand.parts:
            yield from _registers_of(part)
    elif isinstance(operand, Pair):
        yield from (x for x in (operand.first, operand.second) if x)
    elif isinstance(operand, Address):
        yield from _registers_of(operand.base)
        for part in operand.coordinates:
            yield from _registers_of(part)


@dataclass
class Kernel:
    name: str
    threads: int
    parameters: dict[str, int]  # offsets
    parameter_bytes: int
    instructions: list[Instruction]
    text: str = field(repr=False, default="")


def width_of(kind: str) -> int:
    """Bytes of a type such as f32 or pred."""
    return _WIDTHS["pred" if kind == "pred" else re.sub(r"^\D+", "", kind)]


def entries(ptx: str) -> list[str]:
    """The names of all kernels of a file."""
    return re.findall(r"\.entry\s+([\w$]+)\s*\(", ptx)


@functools.lru_cache(32)
def parse(ptx: str, name: str) -> Kernel:
    """The kernel of that name."""
    head, body = _function(ptx, rf"\.entry\s+{re.escape(name)}\s*\(")
    threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", head)
    if not threads:
        raise Unsupported(f"{name} does not say how many threads it has")
    parameters, at = {}, 0
    for align, kind, parameter, count in re.findall(
        r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)"
        r"(?:\s+\.ptr(?:\s+\.(?!align)\w+)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)(?:\[(\d+)\])?",
        head,
    ):
        size = width_of(kind)
        alignment = int(align or size)
        at = -(-at // alignment) * alignment
        parameters[parameter] = at
        at += size * int(count or 1)
    instructions = _Reader(ptx, parameters).read(body)
    return Kernel(name, int(threads[1]), parameters, at, instructions, ptx)


@functools.lru_cache(256)
def _function(ptx: str, pattern: str) -> tuple[str, str]:
    """The text before a function's braces and the text between them, without comments."""
    found = re.search(pattern, ptx)
    if not found:
        raise Unsupported(f"no function {pattern}")
    depth, begin = 0, ptx.index("{", found.end())
    for brace in re.finditer(r"[{}]", ptx[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            break
    text = ptx[found.start() : begin], ptx[begin + 1 : begin + brace.start()]
    head, body = (re.sub(r"//[^\n]*|/\*.*?\*/", "", x, flags=re.DOTALL) for x in text)
    return head, re.sub(r"(?m)^\s*\.loc[^\n]*$", "", body)


_TOKEN = re.compile(r"\s*(?:([\w$]+):(?!:)|([{}])|([^;]*);)", re.DOTALL)
_GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+(.*)")
_ADDRESS = re.compile(r"([%\w$]+)\s*(?:\+\s*(-?\d+))?$")


class _Scope(dict):
    """Names that a pair of braces declares, with their registers; `number` tells scopes apart.

    Of a declared range such as %r<90> a register is made when its name is first met.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.ranges: dict[str, tuple[int, int]] = {}  # count and width by the names' beginning
        self.operands: dict[str, object] = {}  # texts that have been read in this scope

    def find(self, name: str) -> Register | None:
        """The register of that name, None if it is declared elsewhere."""
        found = self.get(name)
        if found is None and self.ranges:
            digits = len(name) - len(name.rstrip("0123456789"))
            count, width = self.ranges.get(name[: len(name) - digits], (0, 0))
            if digits and int(name[-digits:]) < count:
                found = self[name] = Register(f"{name}@{self.number}", width)
        return found


class _Reader:
    """Reads statements in their order; branches are resolved at the end."""

    def __init__(self, ptx: str, parameters: dict[str, int]) -> None:
        self.ptx, self.parameters = ptx, parameters
        self.instructions: list[Instruction] = []
        self.scopes = [_Scope(0)]
        self.count = 0  # of scopes
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.origins: dict[tuple[str, int], int] = {}
        self.slots: set[Register] = set()  # parameters of calls
        self.returns: list[str] = []  # the label that `ret` of an inlined function goes to

    def read(self, body: str) -> list[Instruction]:
        self._statements(body, "")
        if not self.instructions or self.instructions[-1].opcode != "ret":
            self._add("ret", "", None, False, "ret", ("", -1))
        for instruction in self.instructions:
            if instruction.opcode.startswith("bra"):
                instruction.target = self._label(instruction.operands[0])
            elif instruction.opcode == "brx.idx":
                table = next(x for x in instruction.operands[1] if x in self.tables)
                names = self.tables[table]
                instruction.targets = tuple(map(self._label, names))
        return self.instructions

    def _label(self, names: tuple[str, ...]) -> int:
        """The innermost label of that name, of names that go outwards."""
        for name in names:
            if name in self.labels:
                return self.labels[name]
        raise Unsupported(f"no label {names[0]}")

    def _statements(self, body: str, function: str) -> None:
        at, label, body = 0, "", body.strip()
        while at < len(body):
            token = _TOKEN.match(body, at)
            if not token:
                raise Unsupported(f"cannot read {body[at : at + 60]!r}")
            if token[1]:
                label = self._scoped(token[1])[0]
                self.labels[label] = len(self.instructions)
            elif token[2] == "{":
                self._open()
            elif token[2] == "}":
                self.scopes.pop()
            elif token[3].strip():
                self._statement(" ".join(token[3].split()), label, (function, at))
            at = token.end()

    def _open(self) -> None:
        self.count += 1
        self.scopes.append(_Scope(self.count))

    def _scoped(self, name: str) -> tuple[str, ...]:
        """How a label of that name is called here, then in the scopes around."""
        return tuple(f"{name}@{scope.number}" for scope in reversed(self.scopes))

    def _statement(self, text: str, label: str, origin: tuple[str, int]) -> None:
        if text.startswith((".reg", ".param")):
            _, kind, names = text.split(None, 2)
            for name in names.split(","):
                self._declare(name.strip(), width_of(kind[1:]))
                if text.startswith(".param"):
                    self.slots.add(self._register(name.strip()))
        elif text.startswith(".branchtargets"):
            self.tables[label] = [self._scoped(x.strip()) for x in text[14:].split(",")]
        elif text.startswith(".pragma"):
            pass
        elif text.startswith("."):
            raise Unsupported(text)
        else:
            guard = _GUARD.match(text)
            predicate = self._register(guard[2]) if guard else None
            opcode, _, rest = (guard[3] if guard else text).partition(" ")
            self._add(opcode, rest, predicate, bool(guard and guard[1]), text, origin)

    def _declare(self, name: str, width: int) -> None:
        scope = self.scopes[-1]
        scope.operands.clear()  # the name may have meant a register of an outer scope
        ranged = re.match(r"(%\w+?)<(\d+)>$", name)
        if ranged:
            scope.ranges[ranged[1]] = int(ranged[2]), width
        else:
            scope[name] = Register(f"{name}@{scope.number}", width)

    def _register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            found = scope.find(name)
            if found is not None:
                return found
        return None

    def _add(self, opcode, rest, predicate, negated, text, origin) -> None:
        if opcode in ("call.uni", "call"):
            self._inline(rest)
            return
        if opcode == "ret" and self.returns:
            opcode, rest = "bra", self.returns[-1]
        operands = tuple(map(self.operand, split(rest)))
        if opcode.startswith("bra"):
            operands = (self._scoped(rest.strip()),)
        elif opcode == "brx.idx":
            operands = (operands[0], self._scoped(split(rest)[1]))
        elif opcode.startswith(("ld.param.", "st.param.")) and self._is_local(operands):
            opcode, operands = _move(opcode, operands)
        number = self.origins.setdefault(origin, len(self.origins))
        self.instructions.append(Instruction(opcode, operands, predicate, negated, text, number))

    def _is_local(self, operands: tuple) -> bool:
        """Whether an access to a parameter is to one of a call, which is a register here."""
        addresses = [x for x in operands if isinstance(x, Address)]
        return addresses[0].base in self.slots

    def _inline(self, rest: str) -> None:
        """`(results), name, (arguments)` of a call."""
        results, name, arguments = split(rest)
        signature = rf"\.func\s*(?:\([^)]*\)\s*)?{re.escape(name)}\s*\([^)]*\)(?=\s*\{{)"
        head, body = _function(self.ptx, signature)
        declared = re.findall(r"\.param\s+\.\w+\s+([\w$]+)", head)
        given = [self._register(x.strip()) for x in results[1:-1].split(",")]
        given += [self._register(x.strip()) for x in arguments[1:-1].split(",")]
        self._open()
        self.scopes[-1].update(zip(declared, given, strict=True))
        end = f"$return_{self.count}"
        self.returns.append(end)
        scope = self.scopes[-1].number
        self._statements(body, name)
        self.returns.pop()
        self.labels[f"{end}@{scope}"] = len(self.instructions)
        self.scopes.pop()

    def operand(self, text: str):
        """An operand that stands in the innermost scope."""
        known = self.scopes[-1].operands
        if text not in known:
            known[text] = self._operand(text.strip())
        return known[text]

    def _operand(self, text: str):
        if text.startswith("{"):
            return Vector(tuple(map(self.operand, split(text[1:-1]))))
        if text.startswith("["):
            base, *coordinates = split(text[1:-1])
            found = _ADDRESS.match(base.strip())
            if not found:
                raise Unsupported(f"address {text}")
            boxes = self.operand(coordinates[0]).parts if coordinates else ()
            return Address(self.operand(found[1]), int(found[2] or 0), boxes)
        if "|" in text:
            return Pair(*(None if x == "_" else self.operand(x) for x in text.split("|")))
        register = self._register(text)
        if register or text == "_":
            return register
        if text.startswith("%"):
            return Special(text)
        number = re.match(r"-?\d|0[fdxFDX]", text)
        return Immediate(text) if number else Symbol(text)


def _move(opcode: str, operands: tuple) -> tuple[str, tuple]:
    kind = opcode.rsplit(".", 1)[1]
    values = [x.base if isinstance(x, Address) else x for x in operands]
    if any(isinstance(x, Address) and x.offset for x in operands):
        raise Unsupported("a parameter of a call with parts")
    return f"mov.{kind}", tuple(values)


_BRACKET = re.compile(r"[\[{(]")


def split(text: str) -> list[str]:
    """Operands between commas that no bracket encloses."""
    if not _BRACKET.search(text):
        return [x for x in map(str.strip, text.split(",")) if x]
    parts, depth, begin = [], 0, 0
    for k, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and not depth:
            parts.append(text[begin:k].strip())
            begin = k + 1
    parts.append(text[begin:].strip())
    return [x for x in parts if x]
