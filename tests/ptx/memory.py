"""Global memory with bounds, and shared memory with bounds and a record of who wrote what when.

Accesses to global memory are the tensors' own memory. Shared memory is watched in granules of two
bytes. A granule that was written before the last barrier of its whole block is settled: everyone
may read it, and no more is asked.

An access of several granules is aligned to its size, so it is a row of each record, seen as a
matrix with as many columns as the access has granules.
"""

from __future__ import annotations

import bisect
import ctypes

import numpy as np

from .faults import Fault
from .floats import NAN

NEW, SETTLED, FRESH = 0, 1, 2
#: The states of 1, 2, 4 or 8 granules as one integer.
_WIDE = {g: np.dtype(f"u{g}").type for g in (1, 2, 4, 8)}
_ALL = {state: {g: t(int.from_bytes(bytes([state]) * g, "little")) for g, t in _WIDE.items()}
        for state in (NEW, SETTLED, FRESH)}  # fmt: skip


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
        self.begins, self.ends, _, self.writable = zip(*self.ranges, strict=True)
        self.origin = self.begins[0] // 16 * 16
        span = (max(self.ends) - self.origin + 15) // 16 * 16
        raw = (ctypes.c_uint8 * span).from_address(self.origin)
        self._flat = {size: np.frombuffer(raw, f"u{size}") for size in (1, 2, 4, 8)}

    def places(self, address: np.ndarray, size: int, each: int, writes: bool) -> np.ndarray:
        """Checks accesses of ``size`` bytes; indices of their first elements of ``each`` bytes."""
        if not self._flat:
            self._prepare()
        at = address.astype(np.int64)
        low, high = int(at.min()), int(at.max())
        nearest = bisect.bisect_right(self.begins, low) - 1
        if (
            nearest < 0
            or high + size > self.ends[nearest]
            or (writes and not self.writable[nearest])
        ):
            self._check(at, size, writes)
        if int(np.bitwise_or.reduce(at)) & (size - 1):
            raise Fault(f"global memory misaligned: {size} bytes at {int(at[0]):#x}")
        at -= self.origin
        return at // each

    def _check(self, at: np.ndarray, size: int, writes: bool) -> None:
        """The same bounds for accesses to several ranges."""
        found = np.searchsorted(self.begins, at, "right") - 1
        outside = (found < 0) | (at + size > np.array(self.ends)[found])
        if outside.any():
            lane = int(np.argmax(outside))
            near = self.ranges[max(int(found[lane]), 0)]
            raise Fault(
                f"global memory out of bounds: {size} bytes, {int(at[lane]) - near[0]} bytes from "
                f"the start of {near[2]} ({near[1] - near[0]} bytes), {int(outside.sum())} lanes"
            )
        forbidden = ~np.array(self.writable)[found]
        if writes and forbidden.any():
            raise Fault(f"writes to {self.ranges[int(found[forbidden][0])][2]}")

    def load(self, address: np.ndarray, each: int, count: int) -> np.ndarray:
        """(lanes, count) unsigned integers of ``each`` bytes, next to each other."""
        at = self.places(address, each * count, each * count, False)
        return self._flat[each].reshape(-1, count)[at]

    def store(self, address: np.ndarray, values: np.ndarray) -> None:
        each, count = values.itemsize, values.shape[1]
        at = self.places(address, each * count, each * count, True)
        self._flat[each].reshape(-1, count)[at] = values

    def lines(self, addresses: np.ndarray, count: int) -> np.ndarray:
        """(lines, count) bytes from each of the addresses on."""
        at = self.places(addresses, 1, 1, False)
        self.places(addresses + (count - 1), 1, 1, False)
        return self._flat[1][at[:, None] + np.arange(count)]


class Shared:
    """The shared memory of all blocks, one block's after another's."""

    BASE = 0x400  # address 0 is nobody's; aligned as every kernel wants it

    def __init__(self, machine, size: int, async_proxy: bool) -> None:
        self.m, self.size, self.async_proxy = machine, size, async_proxy
        padded = -(-max(size, 16) // 16) * 16
        self.bases = machine.block * padded  # of each thread
        total = padded * machine.blocks
        self.raw = np.zeros(total, np.uint8)
        #: bytes, and values by their size and number, of accesses of 2 to 16 bytes
        self.bytes = {size: self.raw.reshape(-1, size) for size in (2, 4, 8, 16)}
        self.values = {
            (each, count): self.raw.view(f"u{each}").reshape(-1, count)
            for each in (1, 2, 4, 8) for count in (1, 2, 4, 8) if 2 <= each * count <= 16
        }  # fmt: skip
        self.granules = total // 2
        self.state, states = self._record(np.uint8)
        self.states = {g: states.view(wide) for g, wide in _WIDE.items()}
        self.thread, _ = self._record(np.int16)  # that wrote; the number of threads: a tensor copy
        self.when, _ = self._record(np.int32)
        self.sync, _ = self._record(np.int32)
        self.unfenced, self.all_unfenced = self._record(np.int16)
        self.awaited, self.all_awaited = self._record(np.int16)  # copies that will write here
        self.operand, self.all_operand = self._record(np.int16)  # wgmma under way that read here
        self.was_read, was_read = self._record(np.uint8)
        self.read = {g: was_read.view(wide) for g, wide in _WIDE.items()}
        self.reads, self.all_reads = self._record(np.int32, machine.block_warps)
        self.marks = np.zeros(self.granules, np.int32)

    def _record(self, dtype, *sizes: int) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """What is remembered of each granule: rows by their length, and the whole."""
        whole = np.zeros((*sizes, self.granules), dtype)
        return {g: whole.reshape(*sizes, -1, g) for g in _WIDE}, whole

    def reset(self) -> None:
        self.raw.view(np.uint32)[:] = NAN[4]
        for record in (self.states[1], self.all_awaited, self.all_operand, self.read[1]):
            record[:] = 0
        self.all_unfenced[:] = -1
        #: reads that are not yet in `reads`: threads, rows and their length
        self.log: list[tuple[np.ndarray, np.ndarray, int]] = []
        self.any_reads = False

    # --- accesses of threads ---

    def locate(self, address: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Checks accesses of ``size`` bytes; the rows that they are in the records."""
        at = address.astype(np.int64)
        at -= self.BASE
        low, high = int(at.min()), int(at.max())
        if low < 0 or high + size > self.size:
            raise Fault(
                f"shared memory out of bounds: {size} bytes at {low} to {high} of {self.size}"
            )
        if int(np.bitwise_or.reduce(at)) & (size - 1):
            raise Fault(f"shared memory misaligned: {size} bytes")
        if size < 2:
            raise Fault("writes of single bytes of shared memory are not watched")
        if self.m.blocks > 1:
            at += self.bases[threads]
        return at >> (size.bit_length() - 1)

    def load(self, address: np.ndarray, each: int, count: int) -> np.ndarray:
        """(lanes, count) values of the executing threads."""
        if each * count == 1:  # one of the two bytes of a granule
            pairs = self.load(address & ~address.dtype.type(1), 1, 2)
            return np.where((address & 1)[:, None], pairs[:, 1:], pairs[:, :1])
        threads, g = self.m.active(), each * count // 2
        rows = self.locate(address, each * count, threads)
        self.reading(rows, g, threads)
        self.log.append((threads, rows, g))
        return self.values[each, count][rows]

    def store(self, address: np.ndarray, values: np.ndarray) -> None:
        """The executing threads write (lanes, count) values."""
        each, count = values.itemsize, values.shape[1]
        threads, g = self.m.active(), each * count // 2
        rows = self.locate(address, each * count, threads)
        self.writing(rows, g, threads, values)
        there = self.values[each, count]
        there[rows] = values
        if (there[rows] != values).any():
            self.m.report("lanes write different values to one place")
        self.wrote(rows, g, threads)

    # --- hazards ---

    def settled(self, rows: np.ndarray, g: int) -> bool:
        return bool((self.states[g][rows] == _ALL[SETTLED][g]).all())

    def reading(self, rows: np.ndarray, g: int, threads: np.ndarray) -> None:
        """What threads read has been written, and before."""
        if self.settled(rows, g):
            return
        states = self.state[g][rows]
        new = states == NEW
        if new.any():
            under_way = self.awaited[g][rows][new].any()
            self.m.report(
                "reads what a copy under way will write" if under_way
                else "reads shared memory that nobody wrote"
            )  # fmt: skip
        fresh = states == FRESH
        if fresh.any():
            self._ordered(rows, g, threads, fresh, "reads")

    def reading_operand(self, rows: np.ndarray, warps: np.ndarray) -> None:
        """The same of a product: each of the warps reads all rows of 16 bytes."""
        if self.settled(rows, 8):
            return
        copies = self._copies(rows)
        if copies is not None:
            if not self.m.clocks.seen[warps[:, None], copies].all():
                self.m.report("race: reads a tensor copy whose barrier it has not waited for")
            return
        # lane 0 stands for a lane that wrote nothing: its own warp's writes must be fenced too
        self.reading(np.tile(rows, len(warps)), 8, np.repeat(32 * warps, len(rows)))

    def _copies(self, rows: np.ndarray) -> list[int] | None:
        """The tensor copies that wrote these rows of 16 bytes, if nothing else did."""
        if (self.thread[8][rows] != self.m.threads).any():
            return None
        if (self.states[8][rows] != _ALL[FRESH][8]).any():
            return None
        return sorted(set(self.when[8][rows, 0].tolist()))

    def writing(self, rows: np.ndarray, g: int, threads: np.ndarray, values=None) -> None:
        """Nobody else still reads or writes what threads overwrite."""
        if self.m.async_state.any() and self.awaited[g][rows].any():
            self.m.report("overwrites where a copy under way will write")
        if self.async_proxy and self.operand[g][rows].any():
            self.m.report("overwrites an operand of a wgmma under way")
        if (self.states[g][rows] & _ALL[FRESH][g]).any():
            fresh = self.state[g][rows] == FRESH
            if values is not None:  # copies of one value may meet
                halves = np.ascontiguousarray(values).view(np.uint16)
                fresh &= self.values[2, g][rows] != halves
            if fresh.any():
                self._ordered(rows, g, threads, fresh, "overwrites")
        self._flush()
        if self.any_reads and self.read[g][rows].any():
            mine = self.m.clocks.of[self.m.warp[threads]].T[:, :, None]
            if (self.reads[g][:, rows] > mine).any():
                self.m.report("race: overwrites what another warp reads")

    def _ordered(self, rows, g: int, threads, fresh: np.ndarray, verb: str) -> None:
        clocks, m = self.m.clocks, self.m
        mine = m.warp[threads]
        thread, when = self.thread[g][rows], self.when[g][rows]
        writer = thread >> 5
        copy = fresh & (thread == m.threads)
        if copy.any():
            lanes, _ = copy.nonzero()
            if not clocks.seen[mine[lanes], when[copy]].all():
                m.report(f"race: {verb} a tensor copy whose barrier it has not waited for")
        ours = writer == mine[:, None]
        other = fresh & ~(ours | copy)
        if other.any():
            lanes, _ = other.nonzero()
            known = clocks.of[mine[lanes], writer[other] % m.block_warps]
            if (when[other] > known).any():
                m.report(f"race: {verb} what another warp wrote")
        lane = fresh & ours & (thread != threads[:, None])
        if lane.any() and (lane & (self.sync[g][rows] == clocks.syncs[mine][:, None])).any():
            m.report(f"race in a warp: {verb} what another lane wrote")

    def wrote(self, rows: np.ndarray, g: int, threads: np.ndarray) -> None:
        """Remembers that threads have written."""
        warps, clocks = self.m.warp[threads], self.m.clocks
        self.states[g][rows] = _ALL[FRESH][g]
        self.thread[g][rows] = threads[:, None]
        self.when[g][rows] = clocks.now(warps)[:, None]
        self.sync[g][rows] = clocks.syncs[warps][:, None]
        if self.async_proxy:
            self.unfenced[g][rows] = threads[:, None]

    def await_copy(self, rows: np.ndarray, g: int, count: int) -> None:
        """A copy has been started, or ended (-1), that writes here."""
        self.marks[rows] = numbers = np.arange(len(rows))
        if (self.marks[rows] == numbers).all():  # no two lanes to one place
            self.awaited[g][rows] += count
        else:
            np.add.at(self.awaited[g], rows, count)
        if count > 0:  # neither what was there nor what comes
            self.states[g][rows] = _ALL[NEW][g]
            self.values[2, g][rows] = NAN[2]

    def copied(self, rows: np.ndarray, copy: int) -> None:
        """Remembers that a tensor copy has written rows of 16 bytes."""
        self.states[8][rows] = _ALL[FRESH][8]
        self.thread[8][rows] = self.m.threads
        self.when[8][rows] = copy
        self.unfenced[8][rows] = -1

    def fence(self, threads: np.ndarray) -> None:
        """fence.proxy.async: what these threads wrote is there for wgmma and tensor copies."""
        if self.async_proxy:
            ours = np.zeros(self.m.threads + 1, bool)
            ours[threads] = True
            self.all_unfenced[ours[self.all_unfenced]] = -1

    # --- barriers ---

    def remember(self, warps: np.ndarray, rows: np.ndarray, g: int) -> None:
        """Each warp has read its rows, or each all rows where ``warps`` is a column."""
        now = self.m.clocks.now(warps)
        self.reads[g][warps % self.m.block_warps, rows] = now[..., None]
        self.read[g][rows] = _ALL[SETTLED][g]  # any number but 0
        self.any_reads = True

    def _flush(self) -> None:
        for threads, rows, g in self.log:
            self.remember(self.m.warp[threads], rows, g)
        self.log.clear()

    def before_clocks_move(self) -> None:
        self._flush()

    def settle(self, blocks: np.ndarray) -> None:
        """A barrier of whole blocks: what lies before it is before everything after it.

        Reads before it are known to all by their clocks; of all blocks at once, they are forgotten.
        """
        states = self.states[1].reshape(self.m.blocks, -1)
        if len(blocks) == self.m.live_blocks:
            self.log.clear()
            if self.any_reads:
                self.read[1][:] = 0
                self.any_reads = False
            np.minimum(states, SETTLED, out=states)
        else:
            states[blocks] = np.minimum(states[blocks], SETTLED)
