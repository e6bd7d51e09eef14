"""Machine code around wgmma: which instructions touch registers of a product under way, and what
a tile costs.

ptxas allocates registers after everything that PTX says, so its result is looked at as well. For
hazards the instructions are read in the order of their addresses, and branches are not followed;
costs are those of the shortest way through the loop over tiles.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(
    r"^ +/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE
)
#: The place of a label, and of an instruction.
_PLACE = re.compile(r"^(?:(\.L\w+):| +/\*([0-9a-f]{4,})\*/)", re.MULTILINE)
#: These read the registers that they name and write none.
_STORES = ("ST", "RED", "SYNCS", "ISETP", "FSETP", "BAR", "R2UR", "UTMA", "HGMMA", "WARPSYNC")


def of_library(library: Path, cuobjdump: str, name: str) -> str:
    """The machine code of a library's kernels for sm_90 that have ``name`` in theirs."""
    folders = os.pathsep.join([str(Path(cuobjdump).parent), os.environ["PATH"]])
    nvdisasm = shutil.which("nvdisasm", path=folders)
    if nvdisasm is None:
        raise RuntimeError(f"no nvdisasm beside {cuobjdump}")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [cuobjdump, "--extract-elf", "all", str(library.resolve())],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        chosen = {
            part: symbols_of_functions(part.read_bytes(), name)
            for part in sorted(Path(folder).glob("*.sm_90*.cubin"))
        }
        return "".join(
            subprocess.run(
                [nvdisasm, "-c", "-ndf", "-novliw", "-fun", ",".join(map(str, symbols)), part],
                check=True, capture_output=True, text=True,
            ).stdout
            for part, symbols in chosen.items()
            if symbols
        )  # fmt: skip


def symbols_of_functions(elf: bytes, name: str) -> list[int]:
    """The numbers of a 64-bit ELF file's symbols of functions that have ``name`` in theirs."""
    (begin,), (size, count) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
    # kind, offset, length and the number of the section with names
    sections = [struct.unpack_from("<4xI16xQQI", elf, begin + k * size) for k in range(count)]
    found = []
    for kind, offset, length, names in sections:
        if kind == 2:  # a table of symbols
            for number, at in enumerate(range(offset, offset + length, 24)):
                place, about = struct.unpack_from("<IB", elf, at)
                first = sections[names][1] + place
                if about & 15 == 2 and name.encode() in elf[first : elf.index(b"\0", first)]:
                    found.append(number)
    return found


def functions(text: str) -> dict[str, str]:
    """The code of each kernel, its labels replaced by addresses."""
    parts = re.split(r"\n\.text\.(\w+):", text)
    return {name: _placed(name, code) for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def _placed(name: str, code: str) -> str:
    waiting, places = [], {name: "0x0"}
    for label, address in _PLACE.findall(code):
        if label:
            waiting.append(label)
        else:
            places.update(dict.fromkeys(waiting, f"0x{address}"))
            waiting.clear()
    return re.sub(r"`\(([.\w]+)\)", lambda named: places.get(named[1], named[0]), code)


def hazards(code: str) -> tuple[int, list[str]]:
    """How many products a kernel has, and what touches them before they are waited for."""
    count, found, groups, open_group = 0, [], [], []
    for opcode, operands in _LINE.findall(code):
        if opcode.startswith("HGMMA"):
            count += 1
            open_group.append(_product(opcode, operands))
            if "gsb0" in operands:
                groups.append(open_group)
                open_group = []
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            pending = int(operands.split(",")[1], 16)
            groups = groups[len(groups) - pending :] if pending else []
        elif groups or open_group:
            read, written = _registers(opcode, operands)
            for accumulators, left in (p for group in [*groups, open_group] for p in group):
                if accumulators & (read | written) or left & written:
                    found.append(f"{opcode} {operands.strip()}")
                    break
    return count, found


def _product(opcode: str, operands: str) -> tuple[set[int], set[int]]:
    """The accumulators of a product and its A registers."""
    first, second = (x.strip() for x in operands.split(",")[:2])
    columns = int(re.search(r"64x(\d+)x", opcode)[1])
    begin = int(first[1:])
    left = re.match(r"R(\d+)$", second)
    used = set(range(int(left[1]), int(left[1]) + 4)) if left else set()
    return set(range(begin, begin + columns // 2)), used


def _registers(opcode: str, operands: str) -> tuple[set[int], set[int]]:
    """The registers that an instruction reads and writes, wide ones in all."""
    named = [int(x) for x in re.findall(r"\bR(\d+)\b", operands)]
    wide = 4 if ".128" in opcode else 2 if ".64" in opcode or "WIDE" in opcode else 1
    first = re.match(r"R(\d+)\b", operands.strip())
    if not first or opcode.startswith(_STORES):
        data = named[-1:] if opcode.startswith("ST") else []
        return {*named, *(x + k for x in data for k in range(wide))}, set()
    return set(named[1:]), {named[0] + k for k in range(wide)}


# --- what a tile costs ----------------------------------------------------------------------------

_PLACED = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


class Instruction(NamedTuple):
    """An instruction of a kernel."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes to."""
        if not self.opcode.startswith("BRA"):
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if found else None

    @property
    def passes(self) -> bool:
        """Whether the next instruction may follow."""
        if self.predicate or self.opcode.split(".")[0] not in ("BRA", "EXIT", "RET"):
            return True
        return "P" in self.operands.split("0x")[0] or "DIV" in self.opcode


class Cost(NamedTuple):
    """What a thread does for one pair in the loop over tiles."""

    flop: float  # of products
    instructions: float
    shuffles: float
    shared: float  # bytes that products read from shared memory, for the threads of a warpgroup


def cost_of_tiles(code: str) -> Cost:
    """The cost of a pair on the shortest way round the innermost loop with products.

    That is the way of tiles without masks and of waits that end at once. Each pair has one
    exponential, by which pairs are counted.
    """
    way = _shortest_way(code)
    products = [x for x in way if x.opcode.startswith("HGMMA")]
    pairs = sum(x.opcode == "MUFU.EX2" for x in way)
    threads = 128 * pairs  # of a warpgroup
    sizes = [tuple(map(int, re.search(r"(\d+)x(\d+)x(\d+)", x.opcode).groups())) for x in products]
    flop = sum(2 * m * n * k for m, n, k in sizes)
    # 32 bytes of each row of the second factor, and of the first one unless it is in registers
    shared = sum(
        32 * (n + m * x.operands.split(",")[1].strip().startswith("gdesc"))
        for x, (m, n, _) in zip(products, sizes, strict=True)
    )
    shuffles = sum(x.opcode.startswith("SHFL") for x in way)
    return Cost(flop / threads, len(way) / pairs, shuffles / pairs, shared / threads)


def length_of_loop(code: str, opcode: str) -> int:
    """The instructions of the shortest loop that holds an opcode."""
    found, number = _instructions(code)
    lengths = []
    for end, x in enumerate(found):
        loop = found[number.get(x.target, end) : end + 1]
        if any(y.opcode == opcode for y in loop[:-1]):
            lengths.append(len(loop))
    return min(lengths)


def _instructions(code: str) -> tuple[list[Instruction], dict[int, int]]:
    """Those of a kernel, and the number of each address."""
    found = [
        Instruction(int(address, 16), predicate, opcode, operands)
        for address, predicate, opcode, operands in _PLACED.findall(code)
    ]
    return found, {x.address: k for k, x in enumerate(found)}


def _shortest_way(code: str) -> list[Instruction]:
    found, number = _instructions(code)
    begin, end = min(_loops(found, number), key=lambda loop: loop[1] - loop[0])
    before, length, ahead = {}, {begin: 0}, [(0, begin)]
    while ahead:
        steps, k = heapq.heappop(ahead)
        nexts = [number[found[k].target]] if found[k].target in number else []
        for following in [*nexts, k + 1] if found[k].passes else nexts:
            if steps + 1 < length.get(following, len(found)) and k != end:
                before[following], length[following] = k, steps + 1
                heapq.heappush(ahead, (steps + 1, following))
    way = [end]
    while way[-1] != begin:
        way.append(before[way[-1]])
    return [found[k] for k in reversed(way)]


def _loops(found: list[Instruction], number: dict[int, int]) -> Iterator[tuple[int, int]]:
    """The first and the last instruction of the loops that hold products of two tiles."""
    for end, x in enumerate(found):
        begin = number.get(x.target, end)
        if sum(y.opcode.startswith("HGMMA") for y in found[begin:end]) >= 8:
            yield begin, end
