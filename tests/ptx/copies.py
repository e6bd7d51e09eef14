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
    at: np.ndarray  # offsets in shared memory
    source: np.ndarray
    count: np.ndarray  # bytes that are read; zeros follow
    size: int


@dataclass
class _TensorCopy:
    at: np.ndarray  # offset in shared memory of each two bytes
    data: np.ndarray
    barrier: int
    bytes: int


class Copies:
    def __init__(self, m) -> None:
        self.m = m
        self.seed = 0

    def reset(self) -> None:
        self.order = random.Random(self.seed)
        self.waiting: list[_Copy] = []
        self.tensors: list[_TensorCopy] = []
        self.committed = np.zeros(self.m.threads, np.int64)

    def any(self) -> bool:
        return bool(self.waiting or self.tensors)

    def finish(self) -> None:
        if self.waiting:
            self.m.report("cp.async under way at the end of the block")
        if self.tensors:
            self.m.report("tensor copies under way at the end of the block")

    # --- cp.async ---

    def start(self, to: np.ndarray, source: np.ndarray, count: np.ndarray, size: int) -> None:
        m = self.m
        threads = m.active()
        at = m.shared.locate(to, size)
        if (count > size).any():
            raise m.fault(f"cp.async of {size} bytes reads {count.max()}")
        if (source & np.uint64(size - 1))[count > 0].any():
            raise m.fault("cp.async from a misaligned address")
        granules = m.shared.granules(at, size)
        m.shared.writing(granules, threads)
        m.shared.await_copy(granules, 1)
        group = self.committed[threads]
        self.waiting.append(_Copy(threads, group, at, source.copy(), count.copy(), size))

    def commit(self) -> None:
        self.committed[self.m.index] += 1

    def wait(self, pending: int) -> None:
        """All but the last ``pending`` groups of the executing threads arrive."""
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
        data = np.zeros((len(copy.at), copy.size), np.uint8)
        for count in np.unique(copy.count).tolist():
            lanes = copy.count == count
            data[lanes, :count] = self._bytes(copy.source[lanes], count)
        granules = shared.granules(copy.at, copy.size)
        shared.await_copy(granules, -1)
        shared.view[2][granules] = data.view(np.uint16)
        shared.wrote(granules, copy.threads)
        shared.unfenced[granules] = -1  # compilers fence what st.shared wrote, not this

    def _bytes(self, source: np.ndarray, count: int) -> np.ndarray:
        """(lanes, count) bytes of global memory."""
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
        begin = int(m.shared.locate(np.array([to]), 16)[0])
        m.shared.locate(np.array([to + rows * line - 16]), 16)
        at = begin + np.arange(0, rows * line, 2)
        absolute = at + m.shared.BASE
        swizzled = absolute ^ ((absolute >> 7 & 7) << 4)
        at = swizzled - m.shared.BASE
        granules = (at >> 1)[:, None]
        m.shared.writing(granules, np.full(len(granules), thread))
        m.shared.await_copy(granules, 1)
        m.barriers.check_tensor_barrier(thread, barrier)
        data = np.ascontiguousarray(box).view(np.uint16).ravel()
        self.tensors.append(_TensorCopy(at, data, barrier, rows * line))

    def deliver_one(self) -> bool:
        """One tensor copy arrives, whichever; False if there is none."""
        if not self.tensors:
            return False
        copy = self.tensors.pop(self.order.randrange(len(self.tensors)))
        shared, clocks = self.m.shared, self.m.clocks
        granules = copy.at >> 1
        shared.await_copy(granules, -1)
        shared.view[2][granules] = copy.data
        shared.state[granules] = 2
        shared.writer[granules] = self.m.warps
        shared.when[granules] = clocks.new_copy()
        shared.unfenced[granules] = -1
        self.m.barriers.bytes_arrive(copy.barrier, copy.bytes, clocks.copies - 1)
        return True


def _chosen(copy: _Copy, lanes: np.ndarray) -> _Copy:
    if lanes.all():
        return copy
    parts = (copy.threads, copy.group, copy.at, copy.source, copy.count)
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
    if high > low:
        for row in range(max(y, 0), min(y + height, rows)):
            line = m.memory.bytes_at(base + row * pitch + 2 * low, 2 * (high - low))
            box[row - y, 2 * (low - x) : 2 * (high - x)] = line
    return box
