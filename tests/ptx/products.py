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
    granules: list[tuple[np.ndarray, np.ndarray]]  # with the warps that read them


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
        if self.operands:
            for at, instruction in enumerate(instructions):
                self.written.append(self.operands & instruction.written())
                self.touched.append(self.operands & instruction.registers())
                self.skip[at] = not self.touched[at] or instruction.opcode.startswith("wgmma")

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
        shared, clocks = self.m.shared, self.m.clocks
        for group in self.m.groups:
            done = [p for p in self.queue[group] if p.group < self.committed[group] - pending]
            self.queue[group] = [p for p in self.queue[group] if p not in done]
            for product in done:
                for granules, warps in product.granules:
                    shared.operand[granules] -= 1
                    shared.reads[warps[:, None], granules] = clocks.now(warps)[:, None]
                    shared.any_reads = True
        self.in_flight = any(self.queue)

    def issue(self, group: int, accumulators: frozenset, a: frozenset, granules: list) -> None:
        if self.unordered[group] & (accumulators | a):
            self.m.report("wgmma without a fence since its registers were used")
        for product in self.queue[group]:
            if product.accumulators != accumulators and product.accumulators & accumulators:
                self.m.report("wgmma on accumulators that overlap others under way")
        self.queue[group].append(_Product(accumulators, a, self.committed[group], granules))
        self.in_flight = True


@functools.lru_cache(4096)
def places(descriptor: int, size: tuple[int, int], transposed: bool, item: int, row: int):
    """Addresses (MN, K) of an operand in shared memory, from row ``row`` on.

    The canonical layouts of the PTX manual: eight rows of a swizzle's width after one another, the
    stride offset from one such group to the next along K (transposed) or MN.
    """
    if descriptor >> 49 & 7:
        raise Unsupported("base offset of a matrix descriptor")
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width, bits = _SWIZZLES[descriptor >> 62]
    mn, k = np.arange(row, row + size[0])[:, None], np.arange(size[1])[None, :]
    if width == 16:
        if transposed:
            raise Unsupported("a transposed operand without swizzle")
        at = mn // 8 * stride + mn % 8 * 16 + k * item // 16 * leading + k * item % 16
    elif not transposed:
        if size[1] * item > width:
            raise Unsupported("a step along K wider than the swizzle")
        at = mn // 8 * stride + mn % 8 * width + k * item
    else:
        per = width // item
        at = mn // per * leading + mn % per * item + k // 8 * stride + k % 8 * width
    at = at + start
    return at ^ ((at >> 7 & bits) << 4)


class _Multiply:
    """One wgmma.mma_async."""

    def __init__(self, m, modifiers: Modifiers, instruction) -> None:
        self.m, self.text = m, instruction.text
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
        granules, warps = [], np.arange(4 * group, 4 * group + 4)
        b, used = self.shared(
            self.uniform(self.b, threads), self.columns, self.b_transposed, 0, warps
        )
        granules.append((used, warps))
        if self.in_registers:
            values = np.array([x[threads] for x in self.a]).reshape(4, 4, 8, 4)
            a = left(elements(values, self.kind), 2).reshape(64, self.depth)
        else:
            descriptor = self.uniform(self.a, threads)
            parts = []
            for k, warp in enumerate(warps):
                part, used = self.shared(
                    descriptor, 16, self.a_transposed, 16 * k, warps[k : k + 1]
                )
                parts.append(part)
                granules.append((used, np.array([warp])))
            a = np.concatenate(parts)
        product = a.astype(np.float64) @ b.astype(np.float64).T  # (64, N)
        split = product.reshape(4, 2, 8, self.columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
        total = split.reshape(self.columns // 2, 128)
        if self.uniform(self.add, threads):
            total = total + np.array([x[threads] for x in self.to])
        total = canonical(total.astype(np.float32))
        for register, values in zip(self.to, total, strict=True):
            register[threads] = values
        self.m.products.issue(group, self.accumulators, self.a_registers, granules)

    def shared(self, descriptor: int, count: int, transposed: bool, row: int, warps: np.ndarray):
        """An operand (count, K) in shared memory and the granules that it is in."""
        shared = self.m.shared
        size = count, self.depth
        at = places(descriptor, size, transposed, self.item, row) - shared.BASE
        if at.min() < 0 or at.max() + self.item > shared.size:
            raise self.m.fault("an operand outside of shared memory")
        granules = (at >> 1).ravel()
        if self.item == 4:
            granules = np.concatenate([granules, granules + 1])
        self.check(granules, warps)
        shared.operand[granules] += 1
        if self.kind == "bf16":
            return from_bf16(shared.view[2][at >> 1]), granules
        if self.kind == "f16":
            return shared.view[2][at >> 1].view(np.float16).astype(np.float32), granules
        return (shared.view[4][at >> 2] & TF32).view(np.float32), granules

    def check(self, granules: np.ndarray, warps: np.ndarray) -> None:
        shared = self.m.shared
        for warp in warps:  # a lane that wrote nothing: its own warp's writes must be fenced too
            shared.reading(granules[None, :], np.array([32 * warp]))
        if (shared.unfenced[granules] >= 0).any():
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
