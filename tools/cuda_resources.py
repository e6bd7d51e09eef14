"""Check what the compiler made of the CUDA kernels (csrc/cuda), without a GPU.

    python setup.py build_cuda              # if need be
    python -m tools.cuda_resources

prints registers and shared memory (from ptxas' log) and instruction counts (from the machine code)
of every kernel and architecture in the library. It fails on a spill, a stack frame, a serialised
wgmma, a block that does not fit on a multiprocessor, or missing matrix instructions (HGMMA in
hopper.h, whose kernels are for sm_90a alone; HMMA elsewhere).
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
from typing import Any

from . import build_cuda as build
from . import resources

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_FUNCTION, _ARCHITECTURE = re.compile(r"\s*Function : (\w+)"), re.compile(r"arch = (\w+)")
_TENSOR_CORES = re.compile(r"\b(Half|Tf32)<")


def kernels_of(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """What ptxas said of the kernels of one object, by symbol and architecture."""
    slow = [line for line in log.splitlines() if "serialized" in line]
    found = {}
    for piece in re.split(r"(?=ptxas info\s*: Compiling entry function)", log)[1:]:
        symbol, architecture = _ENTRY.search(piece).groups()
        serialized = any(symbol in line for line in slow)
        found[symbol, architecture] = {**resources.ptxas_log(piece), "serialized": serialized}
    return found


def short_names(symbols: list[str]) -> dict[str, str]:
    """What `device::entry` is instantiated with in each symbol, without namespaces."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout
    names = [re.search(r"entry<(.*?)\s?>\(", line)[1] for line in text.splitlines()]
    short = (re.sub(r"\((?:int|bool)\)|alphacl::", "", x).replace(" >", ">") for x in names)
    return dict(zip(symbols, short, strict=True))


def launches(names: list[str]) -> dict[str, tuple[int, int]]:
    """Ask a program that prints the kernels' constants for threads and dynamic shared memory."""
    includes = re.findall(
        r'#include "(.*)"', (build.ROOT / build.SOURCES / "kernels.cu").read_text()
    )
    lines = [f'#include "{build.ROOT / build.SOURCES / name}"' for name in ["device.h", *includes]]
    lines += ["#include <cstdio>", "using namespace alphacl;"]
    lines += ["template <class K> auto shared(int) -> decltype(K::SHARED) { return K::SHARED; }"]
    lines += ["template <class K> int shared(...) { return 0; }", "int main() {"]
    lines += [
        f'  std::printf("%d %d\\n", int({name}::THREADS), int(shared<{name}>(0)));'
        for name in names
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "launches.cpp", Path(folder) / "launches"
        source.write_text("\n".join([*lines, "}"]))
        flags = ["-std=c++17", "-DALPHACL_EMULATED", "-w", "-pthread"]
        build.run([*build.host_compiler(), *flags, str(source), "-o", str(program)])
        printed = build.run([str(program)]).splitlines()
    return {
        name: tuple(int(x) for x in line.split()) for name, line in zip(names, printed, strict=True)
    }


def instructions(file: Path) -> dict[tuple[str, str], Counter[str]]:
    """Count machine instructions by kernel and architecture; the counts stay beside the object."""
    kept = file.with_suffix(".json")
    if not kept.exists():
        counts: dict[str, Counter[str]] = {}
        architecture, current = "", Counter()
        command = [cuobjdump(), "-sass", str(file)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run:
            for line in run.stdout:  # sixty megabytes
                if found := resources._OPCODE.match(line):
                    current[found[1].split(".")[0]] += 1
                elif found := _FUNCTION.match(line):
                    current = counts.setdefault(f"{found[1]} {architecture}", Counter())
                elif found := _ARCHITECTURE.match(line):
                    architecture = found[1]
            said = run.stderr.read()
        if run.returncode:
            raise RuntimeError(f"cuobjdump failed: {said.strip()}")
        kept.write_text(json.dumps(counts))
    return {
        tuple(key.split()): Counter(found) for key, found in json.loads(kept.read_text()).items()
    }


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
    kernels: dict[tuple[str, str], dict[str, int]] = {}
    for log in build.logs().values():
        kernels |= kernels_of(log.read_text())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts: dict[tuple[str, str], Counter[str]] = {}
        for found in pool.map(instructions, build.objects().values()):
            counts |= found
    names = short_names([symbol for symbol, _ in kernels])
    launch = launches(sorted(set(names.values())))
    rows = []
    for (symbol, architecture), said in kernels.items():
        name = names[symbol]
        hopper = "hopper" in name.lower()
        if hopper and architecture != "sm_90a":
            continue  # its body is empty there
        threads, dynamic = launch[name]
        shared, capability = dynamic + said.pop("static"), int(re.sub(r"\D", "", architecture))
        opcodes = dict(counts[symbol, architecture])
        made = resources.Resources(name, capability, shared, threads, **said, opcodes=opcodes)
        required = hopper or bool(_TENSOR_CORES.search(name))
        found = resources.described(made, "HGMMA" if hopper else "HMMA", required)
        rows.append({"kernel": name, "architecture": architecture, **found})
    return sorted(rows, key=lambda row: (row["kernel"], row["architecture"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.cuda_resources", description=__doc__.splitlines()[0]
    )
    parser.parse_args(arguments)
    try:
        return resources.report(survey())
    except RuntimeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
