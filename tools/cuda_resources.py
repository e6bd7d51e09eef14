"""What the compiler made of the CUDA kernels (csrc/cuda), read without a GPU, and checks of it.

    python setup.py build_cuda              # if need be
    python -m tools.cuda_resources

Prints registers, local and shared memory (from ptxas' log) and instruction counts (from the machine code) of every kernel and
architecture in the library. It fails on a spill, a stack frame, a serialised wgmma, a block that does not fit on a
multiprocessor, or missing matrix instructions (HGMMA in hopper.h, whose kernels are for sm_90a alone; HMMA elsewhere).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from . import build_cuda as build

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)")
_FUNCTION, _ARCHITECTURE = re.compile(r"\s*Function : (\w+)"), re.compile(r"arch = (\w+)")
_TENSOR_CORES = re.compile(r"\b(Half|Tf32)<")
#: Matrix instructions, asynchronous copies, loads of fragments, special functions.
_COUNTED = ("HMMA", "HGMMA", "LDGSTS", "UTMALDG", "LDSM", "MUFU")
#: What ptxas says of a kernel, in numbers; the fields of `Kernel` from `registers` on.
_NUMBERS = (r"Used (\d+) registers", r"(\d+) bytes stack frame", r"(\d+) bytes spill (?:stores|loads)", r"(\d+) bytes smem")


class Kernel(NamedTuple):
    """What ptxas said of a kernel; bytes per thread, `static` per block."""

    dtype: str
    symbol: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    static: int
    serialized: bool


def kernels_of(dtype: str, log: str) -> list[Kernel]:
    """The kernels of one object, in the order of the log."""
    found = []
    pieces = re.split(r"(?=ptxas info\s*: Compiling entry function)", log)
    for piece in pieces[1:]:
        symbol, architecture = _ENTRY.search(piece).groups()
        numbers = [sum(int(x) for x in re.findall(pattern, piece)) for pattern in _NUMBERS]
        serialized = any("serialized" in line and symbol in line for line in log.splitlines())
        found.append(Kernel(dtype, symbol, architecture, *numbers, serialized))
    return found


def short_names(symbols: list[str]) -> list[str]:
    """What `device::entry` is instantiated with, without namespaces."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = [re.search(r"entry<(.*?)\s?>\(", line)[1] for line in text.splitlines()]
    return [re.sub(r"\((?:int|bool)\)|alphacl::", "", name).replace(" >", ">") for name in names]


def launches(names: list[str]) -> dict[str, tuple[int, int]]:
    """Threads and bytes of dynamic shared memory of a block, by a program that has the kernels' own constants printed."""
    includes = re.findall(r'#include "(.*)"', (build.ROOT / build.SOURCES / "kernels.cu").read_text())
    lines = [f'#include "{build.ROOT / build.SOURCES / name}"' for name in ["device.h", *includes]]
    lines += ["#include <cstdio>", "using namespace alphacl;"]
    lines += ["template <class K> auto shared(int) -> decltype(K::SHARED) { return K::SHARED; }"]
    lines += ["template <class K> int shared(...) { return 0; }", "int main() {"]
    lines += [f'  std::printf("%d %d\\n", int({name}::THREADS), int(shared<{name}>(0)));' for name in names]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "launches.cpp", Path(folder) / "launches"
        source.write_text("\n".join([*lines, "}"]))
        flags = ["-std=c++17", "-DALPHACL_EMULATED", "-w", "-pthread"]
        build.run([*build.host_compiler(), *flags, str(source), "-o", str(program)])
        printed = build.run([str(program)]).splitlines()
    return {name: tuple(int(x) for x in line.split()) for name, line in zip(names, printed, strict=True)}


def instructions(file: Path) -> dict[tuple[str, str], Counter[str]]:
    """Machine instructions by name without modifiers, by kernel and architecture; kept beside the object."""
    kept = file.with_suffix(".json")
    if not kept.exists():
        counts: dict[str, Counter[str]] = {}
        architecture, current = "", Counter()
        command = [cuobjdump(), "-sass", str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            for line in run.stdout:  # sixty megabytes
                if found := _OPCODE.match(line):
                    current[found[1]] += 1
                elif found := _FUNCTION.match(line):
                    current = counts.setdefault(f"{found[1]} {architecture}", Counter())
                elif found := _ARCHITECTURE.match(line):
                    architecture = found[1]
            said = run.stderr.read()
        if run.returncode:
            raise RuntimeError(f"cuobjdump failed: {said.strip()}")
        kept.write_text(json.dumps(counts))
    return {tuple(key.split()): Counter(found) for key, found in json.loads(kept.read_text()).items()}


def cuobjdump() -> str:
    """The toolkit's, else the one that triton carries."""
    spec = importlib.util.find_spec("triton")
    folders = [str(Path(build.nvcc()[0]).parent), os.environ["PATH"]]
    folders += [f"{spec.submodule_search_locations[0]}/backends/nvidia/bin"] if spec else []
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if not found:
        raise RuntimeError("cuobjdump is neither in the CUDA toolkit nor in triton's folder")
    return found


def survey() -> list[dict[str, Any]]:
    """A row for each kernel and architecture, from the objects that the library is linked from."""
    from . import resources

    kernels = [kernel for dtype, log in build.logs().items() for kernel in kernels_of(dtype, log.read_text())]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts: dict[tuple[str, str], Counter[str]] = {}
        for found in pool.map(instructions, build.objects().values()):
            counts.update(found)
    names = dict(zip((k.symbol for k in kernels), short_names([k.symbol for k in kernels]), strict=True))
    launch = launches(sorted(set(names.values())))
    rows = []
    for kernel in kernels:
        name = names[kernel.symbol]
        if "hopper" in name.lower() and kernel.architecture != "sm_90a":
            continue  # its body is empty there
        threads, dynamic = launch[name]
        shared = dynamic + kernel.static
        capability = int(re.sub(r"\D", "", kernel.architecture))
        fit = resources.occupancy(
            resources.Resources(name, capability, kernel.registers, 0, 0, shared, threads, False, {}, {}, {})
        )
        count = counts[kernel.symbol, kernel.architecture]
        counted = {opcode: count[opcode] for opcode in _COUNTED}
        problems = []
        if kernel.spilled:
            problems.append(f"spills {kernel.spilled} bytes")
        if kernel.stack:
            problems.append(f"a stack frame of {kernel.stack} bytes")
        if kernel.serialized:
            problems.append("serialised wgmma")
        if not fit:
            problems.append(f"{shared} bytes of shared memory")
        if "hopper" in name.lower():
            if not counted["HGMMA"]:
                problems.append("no HGMMA instruction")
        elif _TENSOR_CORES.search(name) and not counted["HMMA"]:
            problems.append("no HMMA instruction")
        rows.append({
            "kernel": name, "architecture": kernel.architecture, "registers": kernel.registers, "stack": kernel.stack,
            "spilled": kernel.spilled, "shared": shared, "blocks per SM": fit, **counted, "instructions": count.total(),
            "problems": problems,
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["kernel"], row["architecture"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_resources", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    try:
        rows = survey()
    except RuntimeError as error:
        parser.error(str(error))
    failed = []
    for row in rows:
        problems = row.pop("problems")
        line = ", ".join(f"{name} {value}" for name, value in row.items())
        print(line)
        failed += [f"{line}: {', '.join(problems)}"] * bool(problems)
    print(f"{len(rows)} kernels, {len(failed)} with problems")
    print("\n".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
