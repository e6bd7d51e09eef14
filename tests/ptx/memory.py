"""Global memory with bounds, and shared memory with bounds and a record of who wrote what when.

Accesses to global memory are the tensors' own memory. Shared memory is watched in granules of two
bytes. A granule that was written before the last barrier of the whole block is settled: everyone
may read it, and no more is asked.
"""

from __future__ import annotations

import ctypes

import numpy as np

from .faults import Fault
from .floats import NAN

NEW, SETTLED, FRESH = 0, 1, 2


class Global:
    """The memory that a launch may touch: separate ranges of this process's own."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.ranges: list[tuple[int, int, str, bool]] = []
        self._flat = {}

    def add(self, address: int, size: int, name: str, writable: bool = True) -> None:
        if size:
            self.ranges.append((address, address + size, name, writable))
            self.ranges.sort()
            self._flat = {}

    def _prepare(self) -> None:
        begins, ends, _, writable = zip(*self.ranges, strict=True)
        self.begins, self.ends = np.array(begins), np.array(ends)
        self.writable = np.array(writable)
        self.origin = begins[0] // 16 * 16
        span = (max(ends) - self.origin + 15) // 16 * 16
        raw = (ctypes.c_uint8 * span).from_address(self.origin)
        self._flat = {size: np.frombuffer(raw, f"u{size}") for size in (1, 2, 4, 8)}

    def places(self, address: np.ndarray, size: int, each: int, writes: bool) -> np.ndarray:
        """Checks accesses of ``size`` bytes; indices of their first elements of ``each`` bytes."""
        if not self._flat:
            self._prepare()
        at = address.astype(np.int64)
        found = self.begins.searchsorted(at, "right") - 1
        outside = (found < 0) | (at + size > self.ends[found])
        if outside.any():
            lane = int(np.argmax(outside))
            near = self.ranges[max(int(found[lane]), 0)]
            raise Fault(
                f"global memory out of bounds: {size} bytes, {int(at[lane]) - near[0]} bytes from "
                f"the start of {near[2]} ({near[1] - near[0]} bytes), {int(outside.sum())} lanes"
            )
        if writes and not self.writable[found].all():
            raise Fault(f"writes to {self.ranges[int(found[~self.writable[found]][0])][2]}")
        if (at & (size - 1)).any():
            raise Fault(f"global memory misaligned: {size} bytes at {int(at[0]):#x}")
        at -= self.origin
        return at // each

    def load(self, address: np.ndarray, each: int, count: int) -> np.ndarray:
        """(lanes, count) unsigned integers of ``each`` bytes, next to each other."""
        at = self.places(address, each * count, each, False)
        return self._flat[each][at[:, None] + np.arange(count)]

    def store(self, address: np.ndarray, values: np.ndarray) -> None:
        each, count = values.itemsize, values.shape[1]
        at = self.places(address, each * count, each, True)
        self._flat[each][at[:, None] + np.arange(count)] = values

    def bytes_at(self, address: int, count: int) -> np.ndarray:
        at = self.places(np.array([address]), 1, 1, False)
        self.places(np.array([address + count - 1]), 1, 1, False)
        return self._flat[1][int(at[0]) : int(at[0]) + count]


class Shared:
    """A block's shared memory."""

    BASE = 0x400  # address 0 is nobody's; aligned as every kernel wants it

    def __init__(self, machine, size: int, async_proxy: bool) -> None:
        self.m, self.size, self.async_proxy = machine, size, async_proxy
        padded = -(-max(size, 16) // 16) * 16
        self.raw = np.zeros(padded, np.uint8)
        self.view = {n: self.raw.view(f"u{n}") for n in (1, 2, 4, 8)}
        granules = padded // 2
        self.state = np.zeros(granules, np.uint8)
        self.writer = np.zeros(granules, np.int16)  # a warp, or the number of warps: a tensor copy
        self.thread = np.zeros(granules, np.int16)
        self.when = np.zeros(granules, np.int64)
        self.sync = np.zeros(granules, np.int64)
        self.unfenced = np.zeros(granules, np.int16)
        self.awaited = np.zeros(granules, np.int16)  # copies under way that will write here
        self.operand = np.zeros(granules, np.int16)  # wgmma under way that read here
        self.reads = np.zeros((machine.warps, granules), np.int64)
        self.steps = {n: np.arange(n) for n in (1, 2, 4, 8, 16)}

    def reset(self) -> None:
        self.raw.view(np.uint32)[:] = NAN[4]
        for record in (self.state, self.awaited, self.operand, self.reads):
            record[:] = 0
        self.unfenced[:] = -1
        self.log: list[tuple[np.ndarray, np.ndarray]] = []  # reads not yet in `reads`
        self.any_reads = False

    # --- accesses of threads ---

    def locate(self, address: np.ndarray, size: int) -> np.ndarray:
        """Checks accesses of ``size`` bytes; their offsets."""
        at = address.astype(np.int64) - self.BASE
        if at.min() < 0 or at.max() + size > self.size:
            raise Fault(
                f"shared memory out of bounds: {size} bytes at {at.min()} to {at.max()} "
                f"of {self.size}"
            )
        if size & (size - 1) == 0 and (at & (size - 1)).any():
            raise Fault(f"shared memory misaligned: {size} bytes")
        if size < 2:
            raise Fault("single bytes of shared memory are not watched")
        return at

    def granules(self, at: np.ndarray, size: int) -> np.ndarray:
        return (at >> 1)[:, None] + self.steps[size // 2]

    def load(self, address: np.ndarray, each: int, count: int) -> np.ndarray:
        """(lanes, count) values of the executing threads."""
        at = self.locate(address, each * count)
        granules, threads = self.granules(at, each * count), self.m.active()
        self.reading(granules, threads)
        self.log.append((self.m.warp[threads], granules))
        return self.view[each][(at // each)[:, None] + self.steps[count]]

    def store(self, address: np.ndarray, values: np.ndarray) -> None:
        """The executing threads write (lanes, count) values."""
        each, count = values.itemsize, values.shape[1]
        at = self.locate(address, each * count)
        granules, threads = self.granules(at, each * count), self.m.active()
        self.writing(granules, threads, np.ascontiguousarray(values).view(np.uint16))
        places = (at // each)[:, None] + self.steps[count]
        self.view[each][places] = values
        if (self.view[each][places] != values).any():
            self.m.report("lanes write different values to one place")
        self.wrote(granules, threads)

    # --- hazards ---

    def reading(self, granules: np.ndarray, threads: np.ndarray) -> None:
        """Bytes that threads read have been written, and before."""
        states = self.state[granules]
        if states.min() == SETTLED == states.max():
            return
        if (states == NEW).any():
            under_way = self.awaited[granules[states == NEW]].any()
            self.m.report(
                "reads what a copy under way will write" if under_way
                else "reads shared memory that nobody wrote"
            )  # fmt: skip
        fresh = states == FRESH
        if fresh.any():
            self._ordered(granules, threads, fresh, "reads")

    def writing(self, granules: np.ndarray, threads: np.ndarray, values=None) -> None:
        """Nobody else still reads or writes what threads overwrite."""
        if self.async_state_here(granules):
            self.m.report("overwrites where a copy under way will write")
        if self.async_proxy and self.operand[granules].any():
            self.m.report("overwrites an operand of a wgmma under way")
        fresh = self.state[granules] == FRESH
        if values is not None and fresh.any():  # copies of one value may meet
            fresh &= self.view[2][granules] != values
        if fresh.any():
            self._ordered(granules, threads, fresh, "overwrites")
        self._flush()
        if self.any_reads:
            mine = self.m.clocks.of[self.m.warp[threads]].T[:, :, None]
            if (self.reads[:, granules] > mine).any():
                self.m.report("race: overwrites what another warp reads")

    def async_state_here(self, granules: np.ndarray) -> bool:
        return bool(self.m.async_state.any() and self.awaited[granules].any())

    def _ordered(self, granules, threads, fresh, verb: str) -> None:
        clocks, warps = self.m.clocks, self.m.warps
        rows, _ = np.nonzero(fresh)
        granules, threads = granules[fresh], threads[rows]
        mine, writer, when = self.m.warp[threads], self.writer[granules], self.when[granules]
        copy = writer == warps
        if copy.any() and not clocks.seen[mine[copy], when[copy]].all():
            self.m.report(f"race: {verb} a tensor copy whose barrier it has not waited for")
        other = ~copy & (writer != mine)
        if other.any() and (when[other] > clocks.of[mine[other], writer[other]]).any():
            self.m.report(f"race: {verb} what another warp wrote")
        lane = ~copy & (writer == mine) & (self.thread[granules] != threads)
        if (lane & (self.sync[granules] == clocks.syncs[mine])).any():
            self.m.report(f"race in a warp: {verb} what another lane wrote")

    def wrote(self, granules: np.ndarray, threads: np.ndarray) -> None:
        """Remembers that threads have written."""
        warps = self.m.warp[threads][:, None]
        self.state[granules] = FRESH
        self.writer[granules] = warps
        self.thread[granules] = threads[:, None]
        self.when[granules] = self.m.clocks.now(self.m.warp[threads])[:, None]
        self.sync[granules] = self.m.clocks.syncs[warps]
        if self.async_proxy:
            self.unfenced[granules] = threads[:, None]

    def await_copy(self, granules: np.ndarray, count: int) -> None:
        """A copy has been started, or ended (-1), that writes here."""
        np.add.at(self.awaited, granules.ravel(), count)
        if count > 0:  # neither what was there nor what comes
            self.state[granules] = NEW
            self.view[2][granules] = NAN[2]

    def fence(self, threads: np.ndarray) -> None:
        """fence.proxy.async: what these threads wrote is there for wgmma and tensor copies."""
        if self.async_proxy:
            ours = np.zeros(self.m.threads + 1, bool)
            ours[threads] = True
            self.unfenced[ours[self.unfenced]] = -1

    # --- barriers ---

    def _flush(self) -> None:
        for warps, granules in self.log:
            self.reads[warps[:, None], granules] = self.m.clocks.now(warps)[:, None]
            self.any_reads = True
        self.log.clear()

    def before_clocks_move(self) -> None:
        self._flush()

    def settle(self) -> None:
        """A barrier of the whole block: what lies before it is before everything after it."""
        self.log.clear()
        self.any_reads = False
        np.minimum(self.state, SETTLED, out=self.state)
