"""Matrix instructions of a warp: ldmatrix, stmatrix and mma.sync.

The PTX manual defines the fragments: lane 4g + t holds rows g (and g + 8) and columns 2t, 2t + 1
(t for elements of 32 or 64 bits). Products are summed in float64 and rounded once; a tensor core
adds in an order of its own and truncates.
"""

from __future__ import annotations

import re

import numpy as np

from .cast import from_bf16
from .faults import Unsupported
from .movement import address
from .opcodes import WARP, Modifiers, opcode
from .scalar import canonical

TF32 = np.uint32(0xFFFFE000)  # the bits that are read


def elements(registers: np.ndarray, kind: str) -> np.ndarray:
    """The numbers in registers of 32 bits: (…, 2) of half precision, (…, 1) of TF32."""
    if kind == "tf32":
        return (registers & TF32).view(np.float32)[..., None]
    halves = np.ascontiguousarray(registers).view(np.uint16).reshape(*registers.shape, 2)
    return from_bf16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)


class _Matrices:
    """What ldmatrix and stmatrix say: 1, 2 or 4 matrices, in a register of each lane and in rows of
    shared memory.

    The first eight lanes give the addresses of the first matrix' rows, and so on.
    """

    def __init__(self, m, modifiers: Modifiers, instruction, held, memory) -> None:
        modifiers.need("m8n8")
        self.m, self.count = m, int(modifiers.need("x1", "x2", "x4")[1:])
        self.transposed = bool(modifiers.one("trans"))
        modifiers.need("shared", "shared::cta")
        modifiers.kind("b16")
        parts = held.parts if hasattr(held, "parts") else (held,)
        if len(parts) != self.count:
            raise Unsupported(instruction.text)
        self.registers = [m.register(part) for part in parts]
        self.where = address(m, memory, "u32")

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The lanes that give addresses, and the row of shared memory that each of them gives."""
        active = self.m.active()
        threads = active if self.count == 4 else active[active % 32 < 8 * self.count]
        return threads, self.m.shared.locate(self.where()[threads], 16, threads)


@opcode("ldmatrix.sync.aligned", together=WARP)
def load_matrices(m, modifiers: Modifiers, instruction):
    form = _Matrices(m, modifiers, instruction, *instruction.operands)

    def run() -> None:
        threads, rows = form.rows()
        m.shared.reading(rows, 8, threads)
        m.shared.log.append((threads, rows, 8))
        values = m.shared.values[2, 8][rows].reshape(-1, form.count, 8, 8)
        values = np.ascontiguousarray(values.swapaxes(2, 3) if form.transposed else values)
        words = values.view(np.uint32).reshape(-1, form.count, 32)
        for k, register in enumerate(form.registers):
            register[m.index] = words[:, k].ravel()

    return run


@opcode("stmatrix.sync.aligned", together=WARP)
def store_matrices(m, modifiers: Modifiers, instruction):
    form = _Matrices(m, modifiers, instruction, *reversed(instruction.operands))

    def run() -> None:
        threads, rows = form.rows()
        words = np.stack([x[m.index].reshape(-1, 32) for x in form.registers], axis=1)
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, form.count, 8, 8)
        values = (halves.swapaxes(2, 3) if form.transposed else halves).reshape(-1, 8)
        m.shared.writing(rows, 8, threads, values)
        m.shared.values[2, 8][rows] = values
        m.shared.wrote(rows, 8, threads)
        # the lane that holds an element has written it, not the one that gives the address
        lanes = np.arange(32).reshape(8, 4).repeat(2, axis=1)
        lanes = lanes.T if form.transposed else lanes
        warps = threads.reshape(-1, form.count, 8) // 32 * 32
        writers = (warps[:, :, :1, None] + lanes).reshape(-1, 8)
        m.shared.thread[8][rows] = writers
        if m.shared.async_proxy:
            m.shared.unfenced[8][rows] = writers

    return run


# --- mma.sync -------------------------------------------------------------------------------------


def left(values: np.ndarray, rows: int) -> np.ndarray:
    """(warps, M, K) from elements (registers, warps, 8, 4, e) of operand A."""
    registers, warps, *_, each = values.shape
    split = values.reshape(registers // rows, rows, warps, 8, 4, each)
    return split.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 8 * rows, -1)


def right(values: np.ndarray) -> np.ndarray:
    """(warps, K, 8) from elements (registers, warps, 8, 4, e) of operand B."""
    return values.transpose(1, 0, 3, 4, 2).reshape(values.shape[1], -1, 8)


def accumulators(values: np.ndarray) -> np.ndarray:
    """(warps, M, 8) from registers (2·M/8, warps, 8, 4)."""
    registers, warps, *_ = values.shape
    split = values.reshape(registers // 2, 2, warps, 8, 4)
    return split.transpose(2, 0, 3, 4, 1).reshape(warps, -1, 8)


def of_accumulators(matrix: np.ndarray) -> np.ndarray:
    """Registers (2·M/8, threads): the other way round."""
    warps, rows, _ = matrix.shape
    split = matrix.reshape(warps, rows // 8, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return split.reshape(rows // 4, -1)


_SHAPES = {
    "bf16": ("m16n8k16",), "f16": ("m16n8k16",), "tf32": ("m16n8k8",),
    "f64": ("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"),
}  # fmt: skip


@opcode("mma.sync.aligned", together=WARP)
def multiply(m, modifiers: Modifiers, instruction):
    wide, kind, other, result = modifiers.left[-4:]
    del modifiers.left[-4:]
    total = "f64" if kind == "f64" else "f32"
    if kind not in _SHAPES or (wide, other, result) != (total, kind, total):
        raise Unsupported(instruction.text)
    rows, columns, depth = map(int, re.findall(r"\d+", modifiers.need(*_SHAPES[kind])))
    modifiers.need("row"), modifiers.need("col")
    bits = "f64" if kind == "f64" else "b32"
    to, a, b, c = (
        [m.value(x, how) for x in (v.parts if hasattr(v, "parts") else (v,))]
        for v, how in zip(instruction.operands, (total, bits, bits, total), strict=True)
    )
    per = 2 if kind in ("bf16", "f16") else 1
    sizes = rows * depth // 32 // per, columns * depth // 32 // per, rows // 4, rows // 4
    if tuple(map(len, (a, b, c, to))) != sizes:
        raise Unsupported(instruction.text)
    warps = m.warps

    def operand(registers) -> np.ndarray:
        values = np.array(registers).reshape(-1, warps, 8, 4)
        values = values[..., None] if kind == "f64" else elements(values, kind)
        return values.astype(np.float64)

    def run() -> None:
        product = left(operand(a), rows // 8) @ right(operand(b))
        before = accumulators(np.array(c).reshape(-1, warps, 8, 4))
        values = of_accumulators(canonical((before + product).astype(before.dtype)))
        for out, value in zip(to, values, strict=True):
            m.put(out, value)

    return run
