"""Asynchronous copies into shared memory: cp.async, and boxes of a tensor map by the TMA unit.

The bytes arrive as late as they may: of cp.async when its group is waited for, of a tensor copy
when no thread can go on without it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from .faults import Unsupported
from .movement import address
from .opcodes import PARAMETERS, Modifiers, opcode
from .parse import Address


@dataclass
class _Copy:
    threads: np.ndarray
    group: np.ndarray  # of each thread
    rows: np.ndarray  # of shared memory, as `Shared.locate` counts them
    source: np.ndarray
    count: np.ndarray  # bytes that are read; zeros follow
    size: int


@dataclass
class _TensorCopy:
    rows: np.ndarray  # of 16 bytes of shared memory
    data: np.ndarray
    barrier: int


class Copies:
    def __init__(self, m) -> None:
        self.m = m
        self.seeds = [0] * m.blocks

    def reset(self) -> None:
        self.order = [random.Random(seed) for seed in self.seeds]
        self.waiting: list[_Copy] = []
        self.tensors: list[list[_TensorCopy]] = [[] for _ in self.seeds]  # of each block
        self.committed = np.zeros(self.m.threads, np.int64)

    def any(self) -> bool:
        return bool(self.waiting) or any(self.tensors)

    def finish(self) -> None:
        if self.waiting:
            self.m.report("cp.async under way at the end of the block")
        if any(self.tensors):
            self.m.report("tensor copies under way at the end of the block")

    # --- cp.async ---

    def start(self, to: np.ndarray, source: np.ndarray, count: np.ndarray, size: int) -> None:
        m = self.m
        threads = m.active()
        rows = m.shared.locate(to, size, threads)
        if (count > size).any():
            raise m.fault(f"cp.async of {size} bytes reads {count.max()}")
        if (source & np.uint64(size - 1))[count > 0].any():
            raise m.fault("cp.async from a misaligned address")
        m.shared.writing(rows, size // 2, threads)
        m.shared.await_copy(rows, size // 2, 1)
        group = self.committed[threads]
        self.waiting.append(_Copy(threads, group, rows, source.copy(), count.copy(), size))

    def commit(self) -> None:
        self.committed[self.m.index] += 1

    def wait(self, pending: int) -> None:
        """All but the last ``pending`` groups of the executing threads arrive."""
        if not self.waiting:
            return
        waits = np.zeros(self.m.threads, bool)
        waits[self.m.index] = True
        left = []
        for copy in self.waiting:
            done = waits[copy.threads] & (copy.group < self.committed[copy.threads] - pending)
            if done.any():
                self._arrive(_chosen(copy, done))
            if not done.all():
                left.append(_chosen(copy, ~done))
        self.waiting = left

    def _arrive(self, copy: _Copy) -> None:
        shared = self.m.shared
        data = np.zeros((len(copy.rows), copy.size), np.uint8)
        for count in {*copy.count.tolist()}:
            lanes = copy.count == count
            data[lanes, :count] = self._bytes(copy.source[lanes], count)
        g = copy.size // 2
        shared.await_copy(copy.rows, g, -1)
        shared.bytes[copy.size][copy.rows] = data
        shared.wrote(copy.rows, g, copy.threads)
        shared.unfenced[g][copy.rows] = -1  # compilers fence what st.shared wrote, not this

    def _bytes(self, source: np.ndarray, count: int) -> np.ndarray:
        """(lanes, count) bytes of global memory."""
        if count in (8, 16):
            return self.m.memory.load(source, 8, count // 8).view(np.uint8)
        each = min(count & -count, 8)  # the largest power of two that divides the count
        parts = [
            self.m.memory.load(source + np.uint64(k), each, 1) for k in range(0, count, each or 1)
        ]
        words = np.concatenate(parts, axis=1) if parts else np.zeros((len(source), 0), np.uint8)
        return np.ascontiguousarray(words).view(np.uint8)

    # --- tensor copies ---

    def start_tensor(self, thread: int, to: int, box: np.ndarray, barrier: int) -> None:
        """One thread starts the copy of a box (rows, bytes of a row)."""
        m = self.m
        rows, line = box.shape
        if to % 128 or line != 128:
            raise m.fault("a tensor copy needs aligned lines of 128 bytes")
        at = to + np.arange(0, rows * line, 16)
        threads = np.full(len(at), thread)
        swizzled = m.shared.locate(at ^ ((at >> 7 & 7) << 4), 16, threads)
        m.shared.writing(swizzled, 8, threads)
        m.shared.await_copy(swizzled, 8, 1)
        m.barriers.check_tensor_barrier(thread, barrier)
        copy = _TensorCopy(swizzled, box.reshape(-1, 16), barrier)
        self.tensors[m.block[thread]].append(copy)

    def deliver_one(self) -> bool:
        """One tensor copy of each block arrives, whichever; False if there is none."""
        if not any(self.tensors):
            return False
        for block, (tensors, order) in enumerate(zip(self.tensors, self.order, strict=True)):
            if tensors:
                self._deliver(block, tensors.pop(order.randrange(len(tensors))))
        return True

    def _deliver(self, block: int, copy: _TensorCopy) -> None:
        shared, number = self.m.shared, self.m.clocks.new_copy(block)
        shared.await_copy(copy.rows, 8, -1)
        shared.bytes[16][copy.rows] = copy.data
        shared.copied(copy.rows, number)
        self.m.barriers.bytes_arrive(block, copy.barrier, copy.data.size, number)


def _chosen(copy: _Copy, lanes: np.ndarray) -> _Copy:
    if lanes.all():
        return copy
    parts = (copy.threads, copy.group, copy.rows, copy.source, copy.count)
    return _Copy(*(part[lanes] for part in parts), copy.size)


@opcode("cp.async.ca.shared.global", "cp.async.cg.shared.global")
def copy_async(m, modifiers: Modifiers, instruction):
    modifiers.one("L2::128B", "L2::64B", "L2::256B")
    to, source, size, *rest = instruction.operands
    size = int(size.text, 0)
    if size not in ((16,) if ".cg." in modifiers.name else (4, 8, 16)) or len(rest) > 1:
        raise Unsupported(instruction.text)
    to, source = address(m, to, "u32"), address(m, source, "u64")
    count = m.value(rest[0], "u32") if rest else np.full(m.threads, size, np.uint32)

    def run() -> None:
        index = m.index
        m.async_state.start(to()[index], source()[index], count[index], size)

    return run


@opcode("cp.async.commit_group")
def commit(m, modifiers: Modifiers, instruction):
    return m.async_state.commit


@opcode("cp.async.wait_group")
def wait(m, modifiers: Modifiers, instruction):
    pending = int(instruction.operands[0].text, 0)
    return lambda: m.async_state.wait(pending)


@opcode("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes")
def copy_tensor(m, modifiers: Modifiers, instruction):
    """The tensor map is as runtime.cpp encodes it: base, columns, rows, pitch, box's rows."""
    to, source, barrier = instruction.operands
    x, y = (m.value(part, "s32") for part in source.coordinates)
    descriptor = address(m, Address(source.base, source.offset), "u64")
    to, barrier = address(m, to, "u32"), address(m, barrier, "u32")

    def run() -> None:
        for thread in m.active():
            at = int(descriptor()[thread]) - PARAMETERS
            if at % 64 or not 0 <= at <= len(m.parameters) - 128:
                raise m.fault("no tensor map")
            base, columns, rows, pitch, height = m.parameters[at : at + 40].view(np.uint64).tolist()
            box = _box(m, (base, columns, rows, pitch), int(x[thread]), int(y[thread]), height)
            m.async_state.start_tensor(thread, int(to()[thread]), box, int(barrier()[thread]))

    return run


def _box(m, tensor: tuple, x: int, y: int, height: int) -> np.ndarray:
    """A box of 64 columns of two bytes; zeros outside of the tensor."""
    base, columns, rows, pitch = tensor
    box = np.zeros((height, 128), np.uint8)
    low, high = max(x, 0), min(x + 64, columns)
    first, last = max(y, 0), min(y + height, rows)
    if high > low and last > first:
        lines = base + np.arange(first, last) * pitch + 2 * low
        there = m.memory.lines(lines, 2 * (high - low))
        box[first - y : last - y, 2 * (low - x) : 2 * (high - x)] = there
    return box
