"""Compiles csrc/cpu once per instruction set into one library, without torch's or Python's headers.

setup.py, tools/build_cuda.py and tests/cpp/run.py load this file by path; it imports the standard
library alone.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = Path("csrc") / "cpu"  # relative to ROOT, where compilers run
GENERATED = Path("csrc") / "generated"
COMMON = [
    *("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    "-fvisibility=hidden",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
BF16 = [*AVX512, "-mavx512bf16"]
#: The vectors and functions that printed formulas use, in the order in which they are included.
VECTOR_HEADERS = ("vec.h", "functions.h")
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*BF16, "-DALPHACL_USE_DOT"],
    "amx": [*BF16, "-mamx-tile", "-mamx-bf16", "-DALPHACL_USE_AMX"],
    "amx_emulated": [*BF16, "-DALPHACL_USE_AMX", "-DALPHACL_AMX_EMULATED"],  # for tests
}


def library(output: Path) -> str:
    """Build the library; returns compiler, flags and instruction sets, which it can report as well.

    Raises CalledProcessError or OSError where it cannot be built.
    """
    compiler = host_compiler()
    flags = [*COMMON, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    with tempfile.TemporaryDirectory() as folder:
        # OpenMP's own library is not linked: its symbols come from the one that torch has loaded.
        threads = "-fopenmp" if gnu_openmp(compiler, folder) else "-pthread"
        sets = supported(compiler, folder)
        summary = "; ".join([version(compiler), shlex.join([*flags, threads]), ", ".join(sets)])
        jobs = units(sets)
        jobs["driver"] += [threads, *reported(summary, SOURCES), recipe(sets)]

        def compiled(name: str) -> str:
            target = f"{folder}/{name}.o"
            run([*compiler, *flags, *jobs[name], "-c", "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, jobs))
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        partial = output.absolute().with_suffix(".partial")
        run([*compiler, "-shared", *undefined, "-pthread", *objects, "-o", str(partial)])
        partial.replace(output)
    return summary


def units(sets: dict[str, list[str]]) -> dict[str, list[str]]:
    """Source and own flags of every object: the kernels of each instruction set, and the driver."""
    kernels, driver = str(SOURCES / "kernels.cpp"), str(SOURCES / "driver.cpp")
    jobs = {name: [*flags, f"-DALPHACL_ISA={name}", kernels] for name, flags in sets.items()}
    known = "-DALPHACL_SETS=" + " ".join(f"SET({name})" for name in sets)
    return {**jobs, "driver": [known, driver]}


def supported(compiler: list[str], folder: str) -> dict[str, list[str]]:
    """The instruction sets that the compiler knows; another architecture's it does not."""
    return {name: f for name, f in INSTRUCTION_SETS.items() if accepts(compiler, f, folder)}


def reported(summary: str, sources: Path) -> list[str]:
    """Flags of a driver, for what its library says of itself: how and from which sources it was
    compiled.
    """
    return [f"-DALPHACL_BUILD={quoted(summary)}", f'-DALPHACL_SOURCES="{fingerprint(sources)}"']


def recipe(sets: dict[str, list[str]]) -> str:
    """A flag of the driver: what users' functions are compiled with
    (alphacl_fast/backend/cpu_functions.py), so that an installation needs no file of csrc.

    Sets that differ in their matrix products alone share the vectors of the set before them.
    """
    files = [(ROOT / SOURCES / name).read_text(encoding="utf-8") for name in VECTOR_HEADERS]
    lines = [line for text in files for line in text.splitlines()]
    code = [x for x in lines if x != "#pragma once" and not x.startswith('#include "')]
    own = {name: f for name, f in sets.items() if not any(x.startswith("-D") for x in f)}
    content = {"flags": COMMON, "sets": own, "source": "\n".join(code)}
    return f"-DALPHACL_RECIPE={quoted(json.dumps(content, ensure_ascii=False))}"


def quoted(text: str) -> str:
    """A string literal of C++."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def fingerprint(sources: Path = SOURCES) -> str:
    """A hash of a library's sources, which tells one compiled from other sources apart."""
    files = [file for folder in (sources, GENERATED) for file in (ROOT / folder).glob("*.*")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def host_compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def version(compiler: list[str]) -> str:
    return run([*compiler, "--version"]).splitlines()[0]


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def accepts(compiler: list[str], flags: list[str], folder: str) -> bool:
    """Whether the compiler builds with these flags."""
    source = Path(folder) / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [*compiler, *flags, "-Werror", "-c", str(source), "-o", str(source.with_suffix(".o"))]
    return subprocess.run(command, capture_output=True).returncode == 0


def gnu_openmp(compiler: list[str], folder: str) -> bool:
    """Whether -fopenmp calls GNU's OpenMP library, the one that torch's Linux builds load."""
    source, result = Path(folder) / "openmp.cpp", Path(folder) / "openmp.o"
    source.write_text(
        "#include <omp.h>\n"
        "void f(int* x) {\n#pragma omp parallel\n  x[omp_get_thread_num()] = 1;\n}\n"
    )
    command = [*compiler, "-fopenmp", "-c", str(source), "-o", str(result)]
    compiles = subprocess.run(command, capture_output=True).returncode == 0
    return sys.platform == "linux" and compiles and b"GOMP_parallel" in result.read_bytes()
