"""Compiles csrc/cuda to PTX, and to a library whose launches `runtime.cpp` hands over.

The objects of the library for GPUs hold both where they have been compiled: the host code that
chooses kernels, and PTX for sm_80, which cuobjdump prints. Where they have not, an object for each
dtype is compiled without ptxas. PTX for sm_90a is in no library, so it is compiled in any case.
What is compiled here is kept in build/cuda under a hash of what it is made from, so a second run
compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
from pathlib import Path

from tools import build_cuda as build
from tools import cuda_resources

#: The dtypes whose rows have kernels for sm_90a.
HOPPER = ("BFLOAT16", "FLOAT16", "TFLOAT32")
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


def _of_library() -> dict[str, Path]:
    """Objects of the library for GPUs that are there and hold PTX for sm_80, by dtype."""
    try:
        cuda_resources.cuobjdump()
    except RuntimeError:
        return {}
    jobs = build.kernel_jobs(build.nvcc())[0]
    holding = [
        job for job in jobs if any(re.search(r"code=.*compute_80\b", x) for x in job.command)
    ]
    return {job.name: build.target(job) for job in holding if build.target(job).exists()}


def _host_flags() -> list[str]:
    return [f"-Xcompiler={flag}" for flag in build.COMMON[1:]]


def _with_text(dtype: str, arch: str, host: bool) -> build.Object:
    """A file that holds PTX as plain text: an object with ``host`` code, or nothing else."""
    flags = [build.COMMON[0], "-O3", *_host_flags(), "--no-compress" if host else "-ptx"]
    code = ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    command = (*build.nvcc(), *flags, *code, f"-DALPHACL_DTYPE={dtype}")
    return build.Object(f"ptx_{dtype}_{arch}", command, "kernels.cu")


@functools.cache
def objects() -> tuple[Path, dict[tuple[str, str], Path]]:
    """The library, and the objects with PTX by dtype and architecture, such as 80 or 90a."""
    there = _of_library()
    own = {
        (dtype, "80"): _with_text(dtype, "80", True) for dtype in build.DTYPES if dtype not in there
    }
    # their host code is in other objects
    hopper = {(dtype, "90a"): _with_text(dtype, "90a", False) for dtype in HOPPER}
    runtime = (*build.nvcc(), build.COMMON[0], *_host_flags())
    jobs = [
        *own.values(),
        build.driver([*build.COMMON, "-O1"], "PTX", "ptx_"),
        build.Object("ptx_runtime", runtime, RUNTIME),
    ]
    link = [*build.host_compiler(), *map(str, there.values()), "-shared", "-pthread"]
    link.append("-Wl,-Bsymbolic")
    text = "\0".join([*map(build.key, jobs), *link])
    output = build.cache() / f"ptx-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    with build.locked("ptx"):
        if not output.exists() or not all(build.target(job).exists() for job in jobs):
            build.assemble(jobs, link, output)
            build.forget(build.cache().glob("ptx-*.so"))
        for job in hopper.values():
            build.compiled_object(job)
    files = {(dtype, "80"): file for dtype, file in there.items()}
    files |= {known: build.target(job) for known, job in {**own, **hopper}.items()}
    return output, files


@functools.cache
def texts(dtype: str) -> dict[str, str]:
    """The PTX of a dtype's kernels by architecture, such as 80 or 90a."""
    files = {arch: file for (name, arch), file in objects()[1].items() if name == dtype}
    return {arch: _printed(file) if file in _of_library().values() else _plain(file)
            for arch, file in files.items()}  # fmt: skip


def _plain(file: Path) -> str:
    """The PTX that a file holds, without comments and with single blanks, as objects have it."""
    data = file.read_bytes()
    text = data[data.index(b"\n.version ") :].partition(b"\0")[0].decode()
    return "\n".join(" ".join(line.partition("//")[0].split()) for line in text.split("\n"))


def _printed(file: Path) -> str:
    """The PTX for sm_80 of an object that holds it compressed, beside machine code."""
    parts = build.run([cuda_resources.cuobjdump(), "-ptx", str(file)]).split("\nFatbin ")
    return next(part[part.index("\n.version ") :] for part in parts if "\n.target sm_80" in part)
