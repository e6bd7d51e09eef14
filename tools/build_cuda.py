"""Compiles csrc/cuda: with nvcc for GPUs, with a C++ compiler for the emulated GPU of the tests.

    python setup.py build_cuda               alphacl_fast/_cuda.abi3.so
    python setup.py build_cuda --emulated    build/cuda/emulated-….so; prints its path

Objects are kept in build/cuda (or ALPHACL_CUDA_CACHE), each with ptxas' log beside it, and compiled
again when a source, a flag or the compiler has changed. setup.py loads this file by path; it
imports the standard library, and tools/build_cpu.py by path.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# By path: in pip's isolated build neither this folder nor the one above is on sys.path.
_spec = importlib.util.spec_from_file_location(
    "build_cpu", Path(__file__).with_name("build_cpu.py")
)
build_cpu = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_cpu)
host_compiler, run = build_cpu.host_compiler, build_cpu.run

ROOT = build_cpu.ROOT
SOURCES = Path("csrc") / "cuda"  # relative to ROOT: objects do not depend on where the tree is
DTYPES = ("BFLOAT16", "FLOAT16", "FLOAT64", "FLOAT32", "TFLOAT32")  # the longest to compile first
#: Machine code for Ampere and Ada, and for Hopper; later GPUs compile the PTX for 8.0 at load time.
ARCHITECTURES = "8.0+PTX;9.0a"
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
#: Versions kept of each object.
KEPT = 4


class Object(NamedTuple):
    name: str
    command: tuple[str, ...]  # without -o
    source: str


def library(output: Path) -> str:
    """Build the library for GPUs; returns compiler and flags, which it can report as well.

    Raises RuntimeError with a reason of one line if something is missing, CalledProcessError if a
    compiler fails.
    """
    compiler = nvcc()
    output = output.absolute()
    jobs, summary = kernel_jobs(compiler)
    jobs.append(driver([*COMMON, "-O2"], summary))
    # The static runtime exports nothing, and torch's own copy of it is not taken in its place.
    closed = ["-Xlinker=-Bsymbolic", "-Xlinker=--exclude-libs=ALL"]
    with locked("library"):
        assemble(jobs, [*compiler, "-shared", "--cudart=static", *closed], output)
    return summary


def emulated() -> Path:
    """The library for CPU tensors, built if it is not there yet."""
    flags = [*COMMON, "-O2", "-ffp-contract=off", "-DALPHACL_EMULATED"]
    jobs = [
        Object(
            f"emulated_{dtype}",
            (*host_compiler(), *flags, f"-DALPHACL_DTYPE={dtype}", "-x", "c++"),
            "kernels.cu",
        )
        for dtype in DTYPES
    ]
    jobs.append(driver(flags, f"{version(host_compiler())}; {shlex.join(flags)}", "emulated_"))
    link = [*host_compiler(), "-shared", "-pthread", "-Wl,-Bsymbolic"]
    text = "\0".join([*map(key, jobs), *link])
    output = cache() / f"emulated-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    with locked("emulated"):
        if not output.exists():
            assemble(jobs, link, output)
            forget(cache().glob("emulated-*.so"))
    return output


def kernel_jobs(compiler: list[str]) -> tuple[list[Object], str]:
    """The kernels for GPUs, an object per dtype, and a line about compiler and flags."""
    listed = architectures()
    host = [f"-Xcompiler={flag}" for flag in COMMON[1:]]
    flags = [
        COMMON[0],
        "-O3",
        *host,
        *(flag for arch in listed for flag in gencode(arch)),
        "-Xptxas=-v",
    ]
    summary = f"{version(compiler)}; {shlex.join(flags)}"
    return [
        Object(d, (*compiler, *flags, f"-DALPHACL_DTYPE={d}"), "kernels.cu") for d in DTYPES
    ], summary


def driver(flags: list[str], summary: str, prefix: str = "") -> Object:
    """The plain C interface."""
    known = build_cpu.reported(summary, SOURCES)
    return Object(f"{prefix}driver", (*host_compiler(), *flags, *known), "driver.cpp")


def logs() -> dict[str, Path]:
    """ptxas' logs by dtype; RuntimeError if the kernels were not compiled from these sources."""
    found = {job.name: target(job).with_suffix(".log") for job in kernel_jobs(nvcc())[0]}
    missing = [name for name, file in found.items() if not file.exists()]
    if missing:
        names = ", ".join(missing)
        raise RuntimeError(f"not compiled from these sources: {names} (python setup.py build_cuda)")
    return found


def objects() -> dict[str, Path]:
    """The compiled kernels by dtype; they exist if their `logs` do."""
    return {name: file.with_suffix(".o") for name, file in logs().items()}


def fingerprint() -> str:
    """A hash of the sources, which tells a library compiled from other sources apart."""
    return build_cpu.fingerprint(SOURCES)


# --- what there is ---


def nvcc() -> list[str]:
    """CUDA_HOME's nvcc, or the one on the PATH; it finds its own headers and libraries."""
    if sys.platform != "linux":
        raise RuntimeError(f"the CUDA kernels are built on Linux only, this is {sys.platform}")
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if not found:
        raise RuntimeError(f"no nvcc in CUDA_HOME ({home})" if home else "no nvcc on the PATH")
    return [found]


def version(compiler: list[str]) -> str:
    """The compiler's version in one line; RuntimeError if it does not start."""
    return _version(tuple(compiler))


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    try:
        lines = run([*compiler, "--version"]).splitlines()
    except OSError as error:
        raise RuntimeError(str(error)) from error
    return next((line for line in lines if "release" in line), lines[0])


def architectures() -> list[str]:
    """The capabilities of TORCH_CUDA_ARCH_LIST (default: `ARCHITECTURES`) from 8.0 on.

    9.0 becomes 9.0a, without which the kernels of hopper.h would be empty.
    """
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    listed = re.split(r"[;,\s]+", text.strip())
    for item in listed:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", item):
            raise RuntimeError(
                "TORCH_CUDA_ARCH_LIST must list capabilities such as 8.0, 9.0a or 8.0+PTX, "
                f"got {item!r}"
            )
    new_enough = [item for item in listed if int(item.split(".")[0]) >= 8]
    if not new_enough:
        raise RuntimeError(f"TORCH_CUDA_ARCH_LIST must list a capability from 8.0 on, got {text!r}")
    return [*dict.fromkeys(re.sub(r"^9\.0(?=\+|$)", "9.0a", item) for item in new_enough)]


def gencode(architecture: str) -> list[str]:
    """nvcc's flags for machine code, with +PTX also for PTX."""
    number, _, ptx = architecture.partition("+")
    number = number.replace(".", "")
    if ptx and number[-1].isalpha():  # PTX of such an architecture serves no later one
        return [*gencode(architecture.partition("+")[0]), "-gencode",
                f"arch=compute_{number[:-1]},code=compute_{number[:-1]}"]  # fmt: skip
    kinds = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
    return ["-gencode", f"arch=compute_{number},code={kinds}"]


# --- objects --------------------------------------------------------------------------------------


def cache() -> Path:
    folder = Path(os.environ.get("ALPHACL_CUDA_CACHE") or ROOT / "build" / "cuda").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Lets one process build at a time; the next one finds everything compiled."""
    import fcntl

    with open(cache() / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def assemble(jobs: list[Object], link: list[str], output: Path) -> None:
    """Compile what has changed, and link."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compiled_object, jobs))
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    run([*link[:1], *map(str, compiled), *link[1:], "-o", str(partial)])
    partial.replace(output)


def compiled_object(job: Object) -> Path:
    result = target(job)
    if result.exists():
        result.touch()  # `forget` keeps the versions used last
        return result
    partial = result.with_suffix(f".{os.getpid()}.partial.o")
    done = subprocess.run(
        [*job.command, "-c", str(SOURCES / job.source), "-o", str(partial)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        partial.unlink(missing_ok=True)
        raise subprocess.CalledProcessError(
            done.returncode, shlex.join(job.command), done.stdout, done.stderr
        )
    result.with_suffix(".log").write_text(done.stdout + done.stderr)
    partial.replace(result)
    forget(cache().glob(f"{job.name}-*.o"))
    return result


def target(job: Object) -> Path:
    return cache() / f"{job.name}-{key(job)}.o"


def key(job: Object) -> str:
    """A hash of everything that an object is made from."""
    text = "\0".join([version(list(job.command[:1])), *job.command, job.source])
    digest = hashlib.sha256(text.encode())
    other = "device_gpu" if "-DALPHACL_EMULATED" in job.command else "device_host"
    for file in closure(ROOT / SOURCES / job.source, other):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def closure(source: Path, other: str) -> list[Path]:
    """A source and the project's headers that it includes, directly or not.

    Headers whose names start with ``other`` belong to the other build.
    """
    include = re.compile(r'^\s*#\s*include "([^"]+)"', re.MULTILINE)
    found, waiting = [], [source]
    while waiting:
        file = waiting.pop()
        if file in found or file.name.startswith(other) or not file.exists():
            continue
        found.append(file)
        waiting += [(file.parent / name).resolve() for name in include.findall(file.read_text())]
    return sorted(found)


def forget(files: Iterator[Path]) -> None:
    """Delete all versions but those used last, with the files beside them."""
    for old in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)[KEPT:]:
        for suffix in (old.suffix, ".log", ".json"):
            old.with_suffix(suffix).unlink(missing_ok=True)
