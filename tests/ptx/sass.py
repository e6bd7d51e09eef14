"""Machine code around wgmma: which instructions touch registers of a product under way.

ptxas allocates registers after everything that PTX says, so its result is looked at as well. The
instructions are read in the order of their addresses, branches are not followed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

_LINE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
#: These read the registers that they name and write none.
_STORES = ("ST", "RED", "SYNCS", "ISETP", "FSETP", "BAR", "R2UR", "UTMA", "HGMMA", "WARPSYNC")


def of_library(library: Path, cuobjdump: str, name: str) -> str:
    """The machine code of the one part of a library whose kernels have ``name`` in theirs."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [cuobjdump, "--extract-elf", "all", str(library.resolve())],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        for part in sorted(Path(folder).glob("*.sm_90*.cubin")):
            if name.encode() in part.read_bytes():
                return subprocess.run(
                    [cuobjdump, "-sass", str(part)], check=True, capture_output=True, text=True
                ).stdout
    return ""


def functions(text: str) -> dict[str, str]:
    """The code of each kernel."""
    parts = re.split(r"\n\s*Function : (\w+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


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
        else:
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
