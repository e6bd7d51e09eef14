"""Barriers of threads, mbarriers and fences."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .control import whole_warps
from .faults import Unsupported
from .movement import address
from .opcodes import WARP, WARPGROUP, Control, Modifiers, opcode


@dataclass
class Mbarrier:
    count: int  # arrivals that a phase needs
    maker: tuple[int, int]  # the warp that initialised it, and when
    thread: int
    known: np.ndarray  # by those who have arrived, in this phase or before
    told: np.ndarray  # what was known when the last phase ended: who waits for it learns this
    pending: int = 0
    bytes: int = 0  # that tensor copies have still to bring
    phase: int = 0
    fenced: bool = False  # the initialisation is there for the TMA unit
    copies: list[int] = field(default_factory=list)  # the same two of tensor copies
    told_copies: list[int] = field(default_factory=list)


class Barriers:
    def __init__(self, m) -> None:
        self.m = m

    def reset(self) -> None:
        self.arrived: dict[int, np.ndarray] = {}  # warps that wait, by number of the barrier
        self.counts: dict[int, int | None] = {}
        self.mbarriers: dict[int, Mbarrier] = {}
        self.tried = np.full(self.m.threads, -1)

    # --- bar.sync ---

    def waits_at(self, number: int) -> np.ndarray:
        return self.arrived.setdefault(number, np.zeros(self.m.warps, bool))

    def arrive(self, number: int, count: int | None) -> None:
        if self.waits_at(number).any() and self.counts[number] != count:
            raise self.m.fault("warps arrive at one barrier with different counts")
        self.counts[number] = count
        self.waits_at(number)[self.m.active_warps()] = True
        self._release(number)

    def threads_left(self) -> None:
        for number in list(self.arrived):
            if self.arrived[number].any():
                self._release(number)

    def _release(self, number: int) -> None:
        """Lets warps go on if all have arrived."""
        m, arrived = self.m, self.arrived[number]
        left = m.exited.reshape(-1, 32).all(1)
        count = self.counts[number]
        needed = int((~left).sum()) if count is None else count // 32
        if arrived.sum() > needed:
            raise m.fault(f"{arrived.sum()} warps at a barrier of {needed}")
        if arrived.sum() < needed:
            return
        warps = np.flatnonzero(arrived)
        m.shared.before_clocks_move()
        m.clocks.join(warps)
        if len(warps) == m.warps:
            m.shared.settle()
        m.pc[arrived.repeat(32) & ~m.exited] += 1
        arrived[:] = False

    # --- mbarriers ---

    def make(self, place: int, count: int, thread: int) -> None:
        m, warp = self.m, thread // 32
        if place % 8:
            raise m.fault("misaligned mbarrier")
        m.shared.locate(np.array([place]), 8)
        maker = warp, int(m.clocks.of[warp, warp])
        nothing = np.zeros(m.warps, int)
        self.mbarriers[place] = Mbarrier(count, maker, thread, nothing, nothing, pending=count)

    def at(self, place: int, warp: int) -> Mbarrier:
        if place not in self.mbarriers:
            raise self.m.fault(f"no mbarrier at {place:#x}")
        barrier = self.mbarriers[place]
        maker, when = barrier.maker
        if maker != warp and self.m.clocks.of[warp, maker] < when:
            self.m.report("uses an mbarrier whose initialisation it may not see")
        return barrier

    def check_tensor_barrier(self, thread: int, place: int) -> None:
        if not self.at(place, thread // 32).fenced:
            self.m.report("a tensor copy counts on an mbarrier that no fence has shown it")

    def arrive_at(self, place: int, thread: int, expected: int) -> None:
        warp = thread // 32
        barrier = self.at(place, warp)
        if not barrier.pending:
            raise self.m.fault("more arrivals than the mbarrier counts")
        self.m.shared.before_clocks_move()
        known, seen = self.m.clocks.told(warp)
        barrier.known = np.maximum(barrier.known, known)
        barrier.copies += np.flatnonzero(seen).tolist()
        barrier.bytes += expected
        barrier.pending -= 1
        self._turn(barrier)

    def bytes_arrive(self, place: int, count: int, copy: int) -> None:
        barrier = self.mbarriers[place]
        barrier.copies.append(copy)
        barrier.bytes -= count
        self._turn(barrier)

    @staticmethod
    def _turn(barrier: Mbarrier) -> None:
        """Ends a phase that is complete."""
        if not barrier.pending and not barrier.bytes:
            barrier.phase += 1
            barrier.pending = barrier.count
            barrier.told, barrier.told_copies = barrier.known, [*barrier.copies]

    def fence(self, threads: np.ndarray) -> None:
        for barrier in self.mbarriers.values():
            barrier.fenced |= bool((threads == barrier.thread).any())


class _BlockBarrier(Control):
    def __init__(self, m, number, count=None) -> None:
        self.m, self.number = m, _same(m, number)
        self.count = (lambda threads: None) if count is None else _same(m, count)

    def ready(self, mask: np.ndarray) -> np.ndarray:
        if not mask.any():
            return mask
        return mask & ~self.m.barriers.waits_at(self.number(mask)).repeat(32)

    def run(self, at: int) -> None:
        index = self.m.index
        self.m.pc[index] = at
        self.m.barriers.arrive(self.number(index), self.count(index))


def _same(m, operand):
    """A function that reads an operand which must be the same for all threads at it."""
    found = m.value(operand, "u32")

    def read(threads: np.ndarray) -> int:
        values = found[threads]
        if (values != values[0]).any():
            raise m.fault("a barrier's operand that differs between threads")
        return int(values[0])

    return read


@opcode("bar.sync", "barrier.sync", "barrier.cta.sync.aligned", "barrier.sync.aligned",
        together=WARP, control=True)  # fmt: skip
def barrier(m, modifiers: Modifiers, instruction):
    if instruction.predicate:
        raise Unsupported(instruction.text)
    return _BlockBarrier(m, *instruction.operands)


@opcode("bar.warp.sync", together=WARP)
def warp_barrier(m, modifiers: Modifiers, instruction):
    def run() -> None:
        m.clocks.syncs[m.active_warps()] += 1

    return whole_warps(m, instruction.operands[0], run)


@opcode("mbarrier.init.shared::cta.b64")
def make(m, modifiers: Modifiers, instruction):
    place = address(m, instruction.operands[0], "u32")
    count = m.value(instruction.operands[1], "u32")

    def run() -> None:
        for thread in m.active().tolist():
            m.barriers.make(int(place()[thread]), int(count[thread]), thread)

    return run


@opcode("mbarrier.arrive.shared::cta.b64", "mbarrier.arrive.expect_tx.shared::cta.b64")
def arrive(m, modifiers: Modifiers, instruction):
    to, place, *rest = instruction.operands
    if to is not None or len(rest) != ("expect_tx" in modifiers.name):
        raise Unsupported(instruction.text)
    place = address(m, place, "u32")
    expected = m.value(rest[0], "u32") if rest else np.zeros(m.threads, np.uint32)

    def run() -> None:
        for thread in m.active().tolist():
            m.barriers.arrive_at(int(place()[thread]), thread, int(expected[thread]))

    return run


class _Wait(Control):
    """The first try comes back empty-handed, as it may: who does not ask again has not waited."""

    def __init__(self, m, instruction) -> None:
        self.m = m
        out, place, parity = instruction.operands
        if instruction.predicate:
            raise Unsupported(instruction.text)
        self.out, self.parity = m.value(out, "pred"), m.value(parity, "u32")
        self.place, self.at = address(m, place, "u32"), -1

    def _over(self) -> np.ndarray:
        phases = {place: b.phase for place, b in self.m.barriers.mbarriers.items()}
        now = np.array([phases.get(place, 0) for place in self.place().tolist()])
        return now % 2 != self.parity % 2

    def ready(self, mask: np.ndarray) -> np.ndarray:
        return mask & ((self.m.barriers.tried != id(self)) | self._over())

    def run(self, at: int) -> int:
        m = self.m
        places = self.place()
        again = m.barriers.tried[m.index] == id(self)
        threads = m.active()
        for warp in m.active_warps().tolist():
            mine = threads[threads // 32 == warp]
            for place in np.unique(places[mine]).tolist():
                barrier = m.barriers.at(place, warp)
                if m.barriers.tried[mine[0]] == id(self):
                    m.clocks.learn(warp, barrier.told, np.array(barrier.told_copies, int))
        self.out[threads] = again
        m.barriers.tried[threads] = np.where(again, -1, id(self))
        return at + 1


@opcode("mbarrier.try_wait.parity.shared::cta.b64", control=True)
def wait(m, modifiers: Modifiers, instruction):
    return _Wait(m, instruction)


@opcode("fence.proxy.async.shared::cta")
def proxy_fence(m, modifiers: Modifiers, instruction):
    def run() -> None:
        m.shared.fence(m.active())
        m.barriers.fence(m.active())

    return run


@opcode("fence.mbarrier_init.release.cluster")
def init_fence(m, modifiers: Modifiers, instruction):
    return lambda: m.barriers.fence(m.active())


@opcode("setmaxnreg.inc.sync.aligned.u32", "setmaxnreg.dec.sync.aligned.u32", together=WARPGROUP)
def set_registers(m, modifiers: Modifiers, instruction):
    count = int(instruction.operands[0].text, 0)
    if count % 8 or not 24 <= count <= 256:
        raise Unsupported(instruction.text)
    return lambda: None
