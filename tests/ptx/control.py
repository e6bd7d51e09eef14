"""Branches, and exchanges between the lanes of a warp."""

from __future__ import annotations

import numpy as np

from .faults import Unsupported
from .opcodes import WARP, Control, Modifiers, opcode
from .parse import Immediate, Pair


class _Guarded(Control):
    """A branch or a return, which its predicate keeps some threads from."""

    def __init__(self, m, instruction) -> None:
        self.m, self.target, self.negated = m, instruction.target, instruction.negated
        guard = instruction.predicate
        self.predicate = m.value(guard, "pred") if guard else None

    def taken(self) -> np.ndarray:
        """Which of the executing threads the predicate lets through."""
        return self.predicate[self.m.index] != self.negated


class _Branch(_Guarded):
    def run(self, at: int) -> int | None:
        if self.predicate is None:
            return self.target
        m, taken = self.m, self.taken()
        if taken.all():
            return self.target
        if not taken.any():
            return at + 1
        m.pc[m.index] = np.where(taken, self.target, at + 1)
        return None


@opcode("bra", "bra.uni", control=True)
def branch(m, modifiers: Modifiers, instruction):
    return _Branch(m, instruction)


class _IndexedBranch(Control):
    def __init__(self, m, instruction) -> None:
        if instruction.predicate:
            raise Unsupported(instruction.text)
        self.m, self.targets = m, np.array(instruction.targets)
        self.choice = m.value(instruction.operands[0], "u32")

    def run(self, at: int) -> None:
        m = self.m
        chosen = self.choice[m.index]
        if (chosen >= len(self.targets)).any():
            raise m.fault("index of a branch out of its table")
        m.pc[m.index] = self.targets[chosen]


@opcode("brx.idx", control=True)
def indexed_branch(m, modifiers: Modifiers, instruction):
    return _IndexedBranch(m, instruction)


class _Return(_Guarded):
    def run(self, at: int) -> None:
        m = self.m
        m.pc[m.index] = at + 1
        leaving = m.active() if self.predicate is None else m.active()[self.taken()]
        m.exited[leaving] = True
        m.products.left(leaving)
        m.barriers.threads_left()


@opcode("ret", "exit", control=True)
def leave(m, modifiers: Modifiers, instruction):
    return _Return(m, instruction)


def always(m, operand, value: int, step):
    """``step``, where an operand has the one value that is understood: a fault elsewhere."""
    found, wanted = m.value(operand, "u32"), np.uint32(value)
    if isinstance(operand, Immediate):
        if found[0] != wanted:
            raise Unsupported(f"{operand.text} where {value:#x} is understood")
        return step

    def run() -> None:
        if (found[m.index] != wanted).any():
            raise m.fault(f"an operand that is not {value:#x}")
        step()

    return run


def whole_warps(m, members, step):
    """``step`` where the mask of members names all lanes of a warp."""
    return always(m, members, 0xFFFFFFFF, step)


@opcode("shfl.sync", together=WARP)
def shuffle(m, modifiers: Modifiers, instruction):
    """Of whole warps, in segments of 32 lanes."""
    how = modifiers.need("bfly", "idx")
    kind = modifiers.kind("b32")
    to, value, lane, clamp, members = instruction.operands
    to, inside = (to.first, to.second) if isinstance(to, Pair) else (to, None)
    out, value, lane = m.value(to, kind), m.value(value, kind), m.value(lane, "u32")
    inside = None if inside is None else m.value(inside, "pred")
    lanes, first = (m.number % 32).astype(np.uint32), m.number // 32 * 32

    def run() -> None:
        by = lane & np.uint32(31)
        source = first + (lanes ^ by if how == "bfly" else by)
        m.put(out, value[source])
        if inside is not None:
            m.put(inside, np.ones(m.threads, bool))

    return whole_warps(m, members, always(m, clamp, 31, run))


@opcode("vote.sync", together=WARP)
def vote(m, modifiers: Modifiers, instruction):
    """Whether a predicate holds in some lane of a warp."""
    modifiers.need("any")
    kind = modifiers.kind("pred")
    to, asked, members = instruction.operands
    out, asked = m.value(to, kind), m.value(asked, kind)

    def run() -> None:
        m.put(out, asked.reshape(-1, 32).any(1).repeat(32))

    return whole_warps(m, members, run)


@opcode("elect.sync", together=WARP)
def elect(m, modifiers: Modifiers, instruction):
    """Lane 0 of every warp."""
    to, members = instruction.operands
    chosen = m.value(to.second, "pred")
    leader = None if to.first is None else m.value(to.first, "b32")
    lanes = m.number % 32

    def run() -> None:
        m.put(chosen, lanes == 0)
        if leader is not None:
            m.put(leader, np.zeros(m.threads, np.uint32))

    return whole_warps(m, members, run)
