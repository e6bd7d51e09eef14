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
        self.mbarriers: dict[tuple[int, int], Mbarrier] = {}  # by block and address
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
        """Lets the warps of a block go on if all have arrived."""
        m, count = self.m, self.counts[number]
        arrived = self.arrived[number].reshape(m.blocks, -1)
        here = arrived.sum(1)
        left = m.exited.reshape(m.blocks, -1, 32).all(2)
        needed = (~left).sum(1) if count is None else np.full(m.blocks, count // 32)
        if (here > needed).any():
            block = int(np.argmax(here > needed))
            raise m.fault(f"{here[block]} warps at a barrier of {needed[block]}")
        full = (here == needed) & (here > 0)
        if not full.any():
            return
        released = (arrived & full[:, None]).ravel()
        whole = np.flatnonzero(full & (here == m.block_warps))
        if len(whole) < m.live_blocks:
            m.shared.before_clocks_move()
        m.clocks.join(released)
        if len(whole):
            m.shared.settle(whole)
        m.pc[released.repeat(32) & ~m.exited] += 1
        arrived[full] = False

    # --- mbarriers ---

    def make(self, place: int, count: int, thread: int) -> None:
        m, warp = self.m, thread // 32
        if place % 8:
            raise m.fault("misaligned mbarrier")
        m.shared.locate(np.array([place]), 8, np.array([thread]))
        maker = warp, int(m.clocks.now(np.array([warp]))[0])
        nothing = np.zeros(m.block_warps, int)
        made = Mbarrier(count, maker, thread, nothing, nothing, pending=count)
        self.mbarriers[warp // m.block_warps, place] = made

    def at(self, place: int, warp: int) -> Mbarrier:
        barrier = self.mbarriers.get((warp // self.m.block_warps, place))
        if barrier is None:
            raise self.m.fault(f"no mbarrier at {place:#x}")
        maker, when = barrier.maker
        known = self.m.clocks.of[warp, maker % self.m.block_warps]
        if maker != warp and known < when:
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

    def bytes_arrive(self, block: int, place: int, count: int, copy: int) -> None:
        barrier = self.mbarriers[block, place]
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

    def phases(self, places: np.ndarray) -> np.ndarray:
        """Of each thread's mbarrier; 0 where there is none."""
        keys = (self.m.block << 32) + places.astype(np.int64)
        known, which = np.unique(keys, return_inverse=True)
        found = [self.mbarriers.get(divmod(key, 1 << 32)) for key in known.tolist()]
        return np.array([b.phase if b else 0 for b in found])[which]


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

    def ready(self, mask: np.ndarray) -> np.ndarray:
        again = self.m.barriers.tried == id(self)
        if not (again & mask).any():
            return mask
        over = self.m.barriers.phases(self.place()) % 2 != self.parity % 2
        return mask & (~again | over)

    def run(self, at: int) -> int:
        m = self.m
        threads = m.active()
        again = m.barriers.tried[threads] == id(self)
        pairs = {*zip(m.warp[threads].tolist(), self.place()[threads].tolist(), strict=True)}
        asked = {*m.warp[threads[again]].tolist()}
        for warp, place in sorted(pairs):
            barrier = m.barriers.at(place, warp)
            if warp in asked:
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
