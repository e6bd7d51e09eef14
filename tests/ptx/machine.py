"""Blocks of threads that run a parsed kernel side by side.

Registers are arrays with an element for each thread of the blocks. Threads at the same instruction
execute it together, whichever warps and blocks they belong to; the group at the lowest instruction
goes first and stops where other threads wait, so that branches come together again. An instruction
that needs whole warps waits for its lanes. Whether the order of warps matters is not found by
trying orders, but by vector clocks (memory.py), which see a race on every schedule.
"""

from __future__ import annotations

import bisect
import functools

import numpy as np

from . import bits, cast, control, copies, matrix, movement, products, scalar, synchronise  # noqa: F401
from .clocks import Clocks
from .faults import Fault, Unsupported
from .floats import NAN
from .memory import Global, Shared
from .opcodes import DTYPES, TABLE, WARP, WARPGROUP, Control, Modifiers
from .parse import Immediate, Instruction, Kernel, Register, Special, Symbol

#: Threads that run side by side, if there are so many blocks.
AT_ONCE = 2048
#: Branches and waits that blocks may come to before they are said to loop for ever.
MOST_TURNS = 1_000_000
MOST_HAZARDS = 20


class _Registers:
    """Arrays with an element for each thread, many of them next to each other."""

    AT_ONCE = 64

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.arrays: dict[int, list[np.ndarray]] = {0: [], 2: [], 4: [], 8: []}
        self.free: dict[int, list[np.ndarray]] = {0: [], 2: [], 4: [], 8: []}

    def new(self, size: int) -> np.ndarray:
        """A register of ``size`` bytes; 0: of truth values."""
        if not self.free[size]:
            dtype = np.dtype(f"u{size}" if size else bool)
            made = np.full((self.AT_ONCE, self.threads), NAN.get(size, 0), dtype)
            self.arrays[size].append(made)
            self.free[size] = [*reversed(made)]
        return self.free[size].pop()

    def matrix(self, count: int) -> np.ndarray:
        """``count`` registers of 4 bytes that lie next to each other."""
        self.arrays[4].append(np.full((count, self.threads), NAN[4], np.uint32))
        return self.arrays[4][-1]

    def reset(self) -> None:
        for size, arrays in self.arrays.items():
            for array in arrays:
                array.fill(NAN.get(size, 0))


class Machine:
    """Decodes a kernel once and runs its blocks, as many side by side as ``blocks`` says."""

    def __init__(self, kernel: Kernel, shared_bytes: int, blocks: int = 1) -> None:
        if kernel.threads % 32:
            raise Unsupported(f"{kernel.threads} threads, not a multiple of 32")
        self.kernel, self.blocks, self.block_warps = kernel, blocks, kernel.threads // 32
        self.threads, self.warps = blocks * kernel.threads, blocks * self.block_warps
        self.live_blocks, self.live = blocks, self.threads  # fewer in the last round
        self.number = np.arange(self.threads)
        self.warp, self.block = self.number // 32, self.number // kernel.threads
        self.registers: dict[Register, np.ndarray] = {}
        self.file = _Registers(self.threads)
        self.constants: dict[tuple[str, str], np.ndarray] = {}
        self.special = self._special()
        self.mask: np.ndarray | None = None  # None: every thread of the block
        self._index: np.ndarray | slice | None = slice(None)
        self._groups: list[int] | None = None
        self.parameters = np.zeros(kernel.parameter_bytes, np.uint8)
        self.memory = Global()
        self.clocks = Clocks(blocks, self.block_warps)
        self._opcodes = {i.opcode: i for i in kernel.instructions}  # one instruction of each
        async_proxy = any(c.startswith(("wgmma", "cp.async.bulk")) for c in self._opcodes)
        self.shared = Shared(self, shared_bytes, async_proxy)
        self.async_state = copies.Copies(self)
        self.sums: dict[tuple, np.ndarray] = {}  # accumulators of products
        self.products = products.Products(self)
        self.barriers = synchronise.Barriers(self)
        self.hazards: dict[str, int] = {}
        self.at = 0  # the instruction that is being executed, for messages
        self.runs: dict[tuple[int, int], int] = {}  # how often [begin, end) was executed
        self.executed = np.zeros(len(kernel.instructions), bool)  # of those with a predicate
        self.steps = 0  # instructions of warps
        self._decode()

    # --- operands ---

    def _special(self) -> dict[str, np.ndarray]:
        names = [f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"]
        special = {name: np.zeros(self.threads, np.uint32) for name in names}
        special["%tid.x"][:] = self.number % self.kernel.threads
        special["%ntid.x"][:] = self.kernel.threads
        special["%ntid.y"][:] = special["%ntid.z"][:] = 1
        special["%laneid"] = (self.number % 32).astype(np.uint32)
        return special

    def register(self, register: Register) -> np.ndarray:
        """The values of a register as unsigned integers, or as truth values."""
        found = self.registers.get(register)
        if found is None:
            found = self.registers[register] = self.file.new(register.bytes)
        return found

    def side_by_side(self, registers: tuple[Register, ...]) -> np.ndarray | None:
        """Registers of 4 bytes as a matrix; None where some of them are parts of another one."""
        if registers not in self.sums and not any(x in self.registers for x in registers):
            self.sums[registers] = self.file.matrix(len(registers))
            self.registers.update(zip(registers, self.sums[registers], strict=True))
        return self.sums.get(registers)

    def value(self, operand, kind: str) -> np.ndarray:
        """An operand for all threads: a view of its register, or constants."""
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            found = self.register(operand)
        elif isinstance(operand, Special) and operand.name in self.special:
            found = self.special[operand.name]
        elif isinstance(operand, (Immediate, Symbol)):
            return self._constant(operand, kind)
        else:
            raise Unsupported(f"operand {operand}")
        if found.itemsize != dtype.itemsize or (found.dtype == bool) != (kind == "pred"):
            raise Unsupported(f"{operand} as {kind}")
        return found.view(dtype)

    def _constant(self, operand: Immediate | Symbol, kind: str) -> np.ndarray:
        dtype, symbol = DTYPES[kind], isinstance(operand, Symbol)
        key = operand.name if symbol else operand.text, kind
        if key not in self.constants:
            if symbol:
                number = self.kernel.parameters.get(operand.name, Shared.BASE)
            else:
                number = literal(operand.text, kind)
            if kind == "pred":
                constant = np.full(self.threads, bool(number))
            else:
                number &= (1 << 8 * dtype.itemsize) - 1
                constant = np.full(self.threads, number, f"u{dtype.itemsize}").view(dtype)
            constant.flags.writeable = False
            self.constants[key] = constant
        return self.constants[key]

    # --- the threads that execute ---

    @property
    def index(self) -> np.ndarray | slice:
        """The executing threads, as an index of arrays with an element for each thread."""
        if self.mask is not None and self._index is None:
            self._index = np.flatnonzero(self.mask)
        return self._index

    @property
    def groups(self) -> list[int]:
        """Numbers of the warpgroups with executing threads."""
        if self._groups is None:
            self._groups = sorted({int(warp) // 4 for warp in self.active_warps()})
        return self._groups

    def set_mask(self, mask: np.ndarray) -> None:
        everyone = mask[: self.live].all()
        self.mask, self._index = (None, slice(0, self.live)) if everyone else (mask, None)
        self._groups = None

    def active(self) -> np.ndarray:
        """Numbers of the executing threads."""
        return self.number[self.index]

    def active_warps(self) -> np.ndarray:
        """Numbers of the warps with executing threads."""
        if self.mask is None:
            return np.arange(self.live // 32)
        return np.flatnonzero(self.mask.reshape(-1, 32).any(1))

    def put(self, destination: np.ndarray, value: np.ndarray) -> None:
        """Gives the executing threads their element of ``value``.

        Where all execute, blocks that there are not in the last round get theirs too.
        """
        if self.mask is None:
            destination[:] = value
        else:
            np.copyto(destination, value, where=self.mask)

    def report(self, hazard: str) -> None:
        text = f"{hazard}: {self.kernel.instructions[self.at].text[:90]}"
        if text in self.hazards or len(self.hazards) < MOST_HAZARDS:
            self.hazards[text] = self.hazards.get(text, 0) + 1

    def fault(self, text: str) -> Fault:
        return Fault(f"{text}: {self.kernel.instructions[self.at].text[:120]}")

    # --- decoding ---

    def _decode(self) -> None:
        """Decodes the first instruction of each form; others wait until they are executed."""
        instructions = self.kernel.instructions
        entries = {i.opcode: TABLE[Modifiers(i).name] for i in self._opcodes.values()}
        self.code = [functools.partial(self._first, at) for at in range(len(instructions))]
        self.together = [entries[i.opcode].together for i in instructions]
        self.controls = [None] * len(instructions)
        for instruction in instructions:
            if instruction.opcode.startswith("wgmma.mma_async"):
                self.side_by_side(instruction.operands[0].parts)
        forms = set()
        for at, instruction in enumerate(instructions):
            form = instruction.form()
            if entries[instruction.opcode].control or form not in forms:
                forms.add(form)
                self._build(at)
        #: by the threads that run together, the next instruction that ends a straight line
        self.stops = [self._next(level) for level in (0, WARP, WARPGROUP)]

    def _build(self, at: int) -> None:
        instruction = self.kernel.instructions[at]
        modifiers = Modifiers(instruction)
        entry = TABLE[modifiers.name]
        self.at = at
        step = entry.build(self, modifiers, instruction)
        modifiers.end()
        if entry.control:
            self.controls[at] = step
        elif instruction.predicate:
            step = self._guarded(step, instruction, at, entry.together)
        watched = self.products.watched(at)
        self.code[at] = self._watched(step, watched) if watched else step

    def _first(self, at: int) -> None:
        """An instruction that is executed for the first time."""
        self._build(at)
        self.code[at]()

    def _guarded(self, step, instruction: Instruction, number: int, together: int):
        predicate, negated = self.value(instruction.predicate, "pred"), instruction.negated

        def run() -> None:
            mask, index = self.mask, self._index
            chosen = ~predicate if negated else predicate
            chosen = chosen & (self.number < self.live if mask is None else mask)
            if chosen.any():
                self.executed[number] = True
                self.set_mask(chosen)
                if together and self.level(chosen) < together:
                    raise self.fault(f"executed by {int(chosen.sum())} lanes only")
                step()
                self.mask, self._index, self._groups = mask, index, None

        return run

    def _watched(self, step, registers: frozenset):
        """The same, of an instruction that touches registers of a wgmma."""

        def run() -> None:
            self.products.touch(registers)
            step()

        return run

    def _next(self, level: int) -> list[int]:
        stops, stop = [0] * len(self.code), len(self.code)
        for at in reversed(range(len(self.code))):
            if self.controls[at] or self.together[at] > level:
                stop = at
            stops[at] = stop
        return stops

    # --- running ---

    def run(self, blocks: list[tuple[int, int]], grid: tuple[int, int]) -> None:
        """Runs blocks from the first instruction until all threads have left."""
        self.live_blocks, self.live = len(blocks), len(blocks) * self.kernel.threads
        for axis, k in (("x", 0), ("y", 1)):
            numbers = np.array([block[k] for block in blocks])
            self.special[f"%ctaid.{axis}"][: self.live] = numbers.repeat(self.kernel.threads)
            self.special[f"%nctaid.{axis}"][:] = grid[k]
        self.special["%nctaid.z"][:] = 1
        self.file.reset()
        self.pc, self.turns = np.zeros(self.threads, np.int64), 0
        self.exited = self.number >= self.live
        for part in (self.clocks, self.shared, self.async_state, self.products, self.barriers):
            part.reset()
        with np.errstate(all="ignore"):
            while not self.exited.all():
                self._turn()
        self.async_state.finish()
        self.products.finish()

    def _turn(self) -> None:
        found = self._pick()
        if found:
            self._execute(*found)
        elif not self.async_state.deliver_one():
            raise self._deadlock()

    def level(self, mask: np.ndarray) -> int:
        """Whether these threads are whole warpgroups, whole warps or neither."""
        warps = mask.reshape(-1, 32)
        some = warps.any(1)
        if not (some == warps.all(1)).all():
            return 0
        if self.block_warps % 4:
            return WARP
        groups = some.reshape(-1, 4)
        return WARPGROUP if (groups.any(1) == groups.all(1)).all() else WARP

    def _pick(self) -> tuple[int, np.ndarray] | None:
        """The lowest instruction that some threads can execute, and those threads."""
        live = ~self.exited
        for at in np.unique(self.pc[live]).tolist():
            mask = live & (self.pc == at)
            if self.together[at]:
                mask = self._complete(mask, at)
            if self.controls[at] and mask.any():
                mask = self.controls[at].ready(mask)
            if mask.any():
                return at, mask
        return None

    def _complete(self, mask: np.ndarray, at: int) -> np.ndarray:
        """Of these threads the whole warps or warpgroups; threads that have left do not count."""
        size = 32 if self.together[at] == WARP else 128
        whole = (mask | self.exited).reshape(-1, size).all(1).repeat(size)
        left = (
            whole
            & self.exited
            & (self.number < self.live)
            & mask.reshape(-1, size).any(1).repeat(size)
        )
        if left.any() and not self.kernel.instructions[at].opcode.startswith("bar"):
            self.at = at
            raise self.fault("lanes have left that this instruction needs")
        return whole & mask

    def _deadlock(self) -> Fault:
        waiting = []
        for at in np.unique(self.pc[~self.exited]).tolist():
            lanes = np.flatnonzero(~self.exited & (self.pc == at))
            warps = ",".join(map(str, np.unique(lanes // 32)))
            text = self.kernel.instructions[at].text[:70]
            waiting.append(f"{len(lanes)} lanes of warps {warps} at {text}")
        return Fault("deadlock: " + "; ".join(waiting))

    def _execute(self, at: int, mask: np.ndarray) -> None:
        """Runs threads that stand at one instruction until they part or meet others."""
        self.set_mask(mask)
        others = np.unique(self.pc[~mask & ~self.exited]).tolist()
        level = self.level(mask)
        warps, stops = len(self.active_warps()), self.stops[level]
        first = True
        while True:
            self.turns += 1
            if self.turns > MOST_TURNS:
                raise Fault("the block does not come to an end")
            stop = stops[at]
            nearest = bisect.bisect_left(others, at if not first else at + 1)
            if nearest < len(others) and others[nearest] < stop:
                stop = others[nearest]
            meets = nearest < len(others) and others[nearest] == stop
            arrived = stop > at or not first
            if stop > at:
                self._straight(at, stop, warps)
            if meets or (arrived and not self._goes_on(stop, level, mask)):
                self.pc[self.index] = stop
                return
            self.at = stop
            self._count(stop, stop + 1, warps)
            at = self.controls[stop].run(stop)
            if at is None:
                return
            first = False

    def _goes_on(self, at: int, level: int, mask: np.ndarray) -> bool:
        """Whether threads that arrive at an instruction can execute it at once."""
        waits: Control | None = self.controls[at]
        return waits and self.together[at] <= level and waits.ready(mask)[mask].all()

    def _count(self, begin: int, end: int, warps: int) -> None:
        self.runs[begin, end] = self.runs.get((begin, end), 0) + 1
        self.steps += warps * (end - begin)

    def _straight(self, begin: int, end: int, warps: int) -> None:
        self._count(begin, end, warps)
        code, products, skip = self.code, self.products, self.products.skip
        for at in range(begin, end):
            self.at = at
            if products.in_flight and not skip[at]:
                products.check(at)
            code[at]()

    def coverage(self) -> np.ndarray:
        """Which instructions have been executed by some thread."""
        done = np.zeros(len(self.code), bool)
        for begin, end in self.runs:
            done[begin:end] = True
        guarded = [bool(i.predicate) and not c for i, c in zip(
            self.kernel.instructions, self.controls, strict=True)]  # fmt: skip
        return np.where(guarded, self.executed, done)


def literal(text: str, kind: str) -> int:
    """The bits of a number; 0f and 0d precede the bits of a float."""
    if text[:2].lower() in ("0f", "0d"):
        if kind not in ("f32", "f64", "b32", "b64"):
            raise Unsupported(f"{text} as {kind}")
        return int(text[2:], 16)
    if kind in ("f32", "f64"):
        raise Unsupported(f"{text} as {kind}")
    return int(text.rstrip("U"), 0)
