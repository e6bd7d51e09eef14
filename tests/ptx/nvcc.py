"""Compiles csrc/cuda to PTX, and to a library whose launches `runtime.cpp` hands over.

One object for each dtype holds both: the host code that chooses kernels, and their PTX as plain
text. ptxas has no part in it. Objects are kept in build/cuda under a hash of what they are made
from, so a second run compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from pathlib import Path

from tools import build_cuda as build

#: Architectures of the PTX in the objects: bfloat16 rows alone have kernels for sm_90a.
ARCHITECTURES = {"BFLOAT16": ("80", "90a")}
RUNTIME = "../../tests/ptx/runtime.cpp"  # beside csrc/cuda


def missing() -> str | None:
    """Why there can be no PTX of csrc/cuda here, or None."""
    try:
        build.version(build.nvcc())
    except RuntimeError as error:
        return str(error)
    if not shutil.which(build.host_compiler()[0]):
        return f"no compiler {build.host_compiler()[0]}"
    return None


def _jobs() -> list[build.Object]:
    compiler, host = build.nvcc(), [f"-Xcompiler={flag}" for flag in build.COMMON[1:]]
    flags = [build.COMMON[0], "-O3", *host, "--no-compress"]
    jobs = []
    for dtype in build.DTYPES:
        codes = [
            flag
            for arch in ARCHITECTURES.get(dtype, ("80",))
            for flag in ("-gencode", f"arch=compute_{arch},code=compute_{arch}")
        ]
        command = (*compiler, *flags, *codes, f"-DALPHACL_DTYPE={dtype}")
        jobs.append(build.Object(f"ptx_{dtype}", command, "kernels.cu"))
    jobs.append(build.driver([*build.COMMON, "-O1"], "PTX", "ptx_"))
    jobs.append(build.Object("ptx_runtime", (*compiler, build.COMMON[0], *host), RUNTIME))
    return jobs


@functools.cache
def objects() -> tuple[Path, dict[str, Path]]:
    """The library, and the objects with the PTX of each dtype."""
    jobs = _jobs()
    link = [*build.host_compiler(), "-shared", "-pthread", "-Wl,-Bsymbolic"]
    text = "\0".join([*map(build.key, jobs), *link])
    output = build.cache() / f"ptx-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    with build.locked("ptx"):
        targets = {job.name: build.target(job) for job in jobs}
        if not output.exists() or not all(file.exists() for file in targets.values()):
            build.assemble(jobs, link, output)
            build.forget(build.cache().glob("ptx-*.so"))
    return output, {d: targets[f"ptx_{d}"] for d in build.DTYPES}


@functools.cache
def texts(dtype: str) -> dict[str, str]:
    """The PTX of a dtype's kernels by architecture, such as 80 or 90a."""
    data = objects()[1][dtype].read_bytes()
    found, at = {}, data.find(b"\n.version ")
    while at >= 0:
        text = data[at : data.index(b"\0", at)].decode()
        found[text.split(".target sm_")[1].split()[0].rstrip(",")] = text
        at = data.find(b"\n.version ", at + len(text))
    return found
