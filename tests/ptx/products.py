"""wgmma: products of a warpgroup, under way until they are waited for.

A product is computed when it is issued. Until it is waited for, its accumulators may not be
touched, its A registers not be written, and its operands in shared memory not be overwritten.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np

from .cast import from_bf16
from .faults import Unsupported
from .matrix import TF32, elements, left
from .opcodes import WARPGROUP, Modifiers, opcode
from .parse import Immediate, Vector
from .scalar import canonical

_SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1), 0: (16, 0)}  # width in bytes, bits


@dataclass(eq=False)
class _Product:
    accumulators: frozenset
    left: frozenset
    group: int
    reads: list[tuple[np.ndarray, np.ndarray]]  # warps and rows of 16 bytes, for `Shared.remember`


class Products:
    """What is under way, by warpgroup."""

    def __init__(self, m) -> None:
        self.m, self.groups = m, max(1, m.warps // 4)
        instructions = m.kernel.instructions
        self.operands = set()
        self.skip = [True] * len(instructions)  # those that no product can mind
        self.written, self.touched = [], []
        for instruction in instructions:
            if instruction.opcode.startswith("wgmma.mma_async"):
                for operand in instruction.operands[:2]:
                    self.operands.update(getattr(operand, "parts", ()))
        nothing = frozenset()
        if self.operands:
            for at, instruction in enumerate(instructions):
                touched = self.operands & instruction.registers()
                self.touched.append(touched)
                self.written.append(touched & instruction.written() if touched else nothing)
                self.skip[at] = not touched or instruction.opcode.startswith("wgmma")

    def reset(self) -> None:
        self.queue: list[list[_Product]] = [[] for _ in range(self.groups)]
        self.committed = [0] * self.groups
        self.unordered = [set(self.operands) for _ in range(self.groups)]
        self.in_flight = False

    def watched(self, at: int) -> frozenset:
        """Registers of products that an instruction touches, which a fence must order.

        A move is left out: PTX registers are virtual, and the assembler merges the two.
        """
        if self.skip[at] or self.m.kernel.instructions[at].opcode.startswith("mov."):
            return frozenset()
        return frozenset(self.touched[at])

    def touch(self, registers: frozenset) -> None:
        for group in self.m.groups:
            self.unordered[group] |= registers

    def check(self, at: int) -> None:
        """An instruction leaves the registers of products under way alone."""
        for group in self.m.groups:
            for product in self.queue[group]:
                if not product.accumulators.isdisjoint(self.touched[at]):
                    self.m.report("touches accumulators of a wgmma under way")
                    return
                if not product.left.isdisjoint(self.written[at]):
                    self.m.report("overwrites A registers of a wgmma under way")
                    return

    def left(self, threads: np.ndarray) -> None:
        if self.in_flight and any(self.queue[group] for group in set((threads // 128).tolist())):
            self.m.report("leaves with a wgmma under way")

    def finish(self) -> None:
        if any(self.queue):
            self.m.report("wgmma under way at the end of the block")

    def fence(self) -> None:
        for group in self.m.groups:
            self.unordered[group].clear()

    def commit(self) -> None:
        for group in self.m.groups:
            self.committed[group] += 1

    def wait(self, pending: int) -> None:
        shared = self.m.shared
        for group in self.m.groups:
            done = [p for p in self.queue[group] if p.group < self.committed[group] - pending]
            self.queue[group] = [p for p in self.queue[group] if p not in done]
            for product in done:
                for warps, rows in product.reads:
                    shared.operand[8][rows] -= 1
                    shared.remember(warps, rows, 8)
        self.in_flight = any(self.queue)

    def issue(self, group: int, accumulators: frozenset, a: frozenset, reads: list) -> None:
        if self.unordered[group] & (accumulators | a):
            self.m.report("wgmma without a fence since its registers were used")
        for product in self.queue[group]:
            if product.accumulators != accumulators and product.accumulators & accumulators:
                self.m.report("wgmma on accumulators that overlap others under way")
        self.queue[group].append(_Product(accumulators, a, self.committed[group], reads))
        self.in_flight = True


@functools.lru_cache(4096)
def places(descriptor: int, size: int, transposed: bool, item: int) -> np.ndarray:
    """Addresses of the 16 bytes that an operand of (``size``, K) consists of, where K is 32 bytes.

    (MN, 2) along K, or transposed (K, MN / 8) along MN. The canonical layouts of the PTX manual:
    eight rows of a swizzle's width after one another, the stride offset from one such group to the
    next along K (transposed) or MN.
    """
    if descriptor >> 49 & 7:
        raise Unsupported("base offset of a matrix descriptor")
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width, bits = _SWIZZLES[descriptor >> 62]
    if transposed:
        if width == 16:
            raise Unsupported("a transposed operand without swizzle")
        mn, k, per = np.arange(0, size, 8)[None, :], np.arange(16)[:, None], width // item
        at = mn // per * leading + mn % per * item + k // 8 * stride + k % 8 * width
    else:
        mn, half = np.arange(size)[:, None], np.arange(2)[None, :]
        at = mn // 8 * stride + mn % 8 * width + half * (leading if width == 16 else 16)
    at = at + start
    return at ^ ((at >> 7 & bits) << 4)


class _Multiply:
    """One wgmma.mma_async."""

    def __init__(self, m, modifiers: Modifiers, instruction) -> None:
        self.m = m
        kind = modifiers.left[-1]
        if modifiers.left[-3:] != ["f32", kind, kind] or kind not in ("bf16", "f16", "tf32"):
            raise Unsupported(instruction.text)
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", modifiers.left[0])
        self.columns, self.depth = map(int, shape.groups())
        self.kind, self.item = kind, 4 if kind == "tf32" else 2
        if self.depth * self.item != 32 or self.columns % 8 or len(modifiers.left) != 4:
            raise Unsupported(instruction.text)
        modifiers.left.clear()
        to, a, b, add, *flags = instruction.operands
        flags = [int(x.text, 0) for x in flags]
        self.in_registers = isinstance(a, Vector)
        layouts = 0 if kind == "tf32" else 1 if self.in_registers else 2
        if len(flags) != 2 + layouts or flags[:2] != [1, 1] or len(to.parts) != self.columns // 2:
            raise Unsupported(instruction.text)
        self.a_transposed = bool(flags[2]) if layouts == 2 else False
        self.b_transposed = bool(flags[-1]) if layouts else False
        self.to = [m.value(x, "f32") for x in to.parts]
        sums = m.side_by_side(to.parts)
        self.sums = None if sums is None else sums.view(np.float32)
        self.a = [m.value(x, "b32") for x in a.parts] if self.in_registers else m.value(a, "b64")
        self.b = m.value(b, "b64")
        constant = isinstance(add, Immediate)
        self.add = np.full(m.threads, int(add.text, 0) != 0) if constant else m.value(add, "pred")
        self.accumulators = frozenset(to.parts)
        self.a_registers = frozenset(a.parts) if self.in_registers else frozenset()

    def __call__(self) -> None:
        for group in self.m.groups:
            self.run(group, slice(128 * group, 128 * group + 128))

    def uniform(self, values: np.ndarray, threads: slice) -> int:
        found = values[threads]
        if (found != found[0]).any():
            raise self.m.fault("a descriptor or scale that differs between lanes")
        return int(found[0])

    def run(self, group: int, threads: slice) -> None:
        warps = np.arange(4 * group, 4 * group + 4)
        b, rows = self.shared(group, self.uniform(self.b, threads), self.columns, self.b_transposed)
        self.m.shared.reading_operand(rows.ravel(), warps)
        reads = [(warps[:, None], rows.ravel())]
        if self.in_registers:
            values = np.array([x[threads] for x in self.a]).reshape(4, 4, 8, 4)
            a = left(elements(values, self.kind), 2).reshape(64, self.depth)
        else:
            a, rows = self.shared(group, self.uniform(self.a, threads), 64, self.a_transposed)
            # each warp reads sixteen rows of A
            parts = rows.reshape(16, 4, 2).swapaxes(0, 1) if self.a_transposed else rows
            parts = parts.reshape(4, 32)
            for warp, part in zip(warps, parts, strict=True):
                self.m.shared.reading_operand(part, warps=np.array([warp]))
            reads.append((warps[:, None], parts))
        for _, rows in reads:
            self.check(rows)
        product = a.astype(np.float64) @ b.astype(np.float64).T  # (64, N)
        split = product.reshape(4, 2, 8, self.columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
        total = split.reshape(self.columns // 2, 128)
        if self.uniform(self.add, threads):
            total = total + self.before(threads)
        total = canonical(total.astype(np.float32))
        if self.sums is not None:
            self.sums[:, threads] = total
        else:
            for register, values in zip(self.to, total, strict=True):
                register[threads] = values
        self.m.products.issue(group, self.accumulators, self.a_registers, reads)

    def before(self, threads: slice) -> np.ndarray:
        """What is in the accumulators."""
        if self.sums is not None:
            return self.sums[:, threads]
        return np.array([x[threads] for x in self.to])

    def shared(self, group: int, descriptor: int, count: int, transposed: bool):
        """An operand (count, K) in shared memory, and the rows of 16 bytes that it is in."""
        shared = self.m.shared
        at = places(descriptor, count, transposed, self.item) - shared.BASE
        if at.min() < 0 or at.max() + 16 > shared.size:
            raise self.m.fault("an operand outside of shared memory")
        rows = (at + shared.bases[128 * group]) >> 4
        values = shared.values[self.item, 16 // self.item][rows]
        if transposed:  # (K, MN / 8, 8)
            values = values.reshape(16, count).T
        values = values.reshape(count, self.depth)
        if self.kind == "bf16":
            return from_bf16(values), rows
        if self.kind == "f16":
            return values.view(np.float16).astype(np.float32), rows
        return (values & TF32).view(np.float32), rows

    def check(self, rows: np.ndarray) -> None:
        """Notes that a product reads rows, and that other threads' writes to them are fenced."""
        shared = self.m.shared
        shared.operand[8][rows] += 1
        if (shared.unfenced[8][rows] >= 0).any():
            self.m.report("wgmma reads what threads wrote, with no fence.proxy.async since")


@opcode("wgmma.mma_async.sync.aligned", together=WARPGROUP)
def multiply(m, modifiers: Modifiers, instruction):
    return _Multiply(m, modifiers, instruction)


@opcode("wgmma.fence.sync.aligned", together=WARPGROUP)
def fence(m, modifiers: Modifiers, instruction):
    return m.products.fence


@opcode("wgmma.commit_group.sync.aligned", together=WARPGROUP)
def commit(m, modifiers: Modifiers, instruction):
    return m.products.commit


@opcode("wgmma.wait_group.sync.aligned", together=WARPGROUP)
def wait(m, modifiers: Modifiers, instruction):
    pending = int(instruction.operands[0].text, 0)
    return lambda: m.products.wait(pending)
