"""Which folders make up the package (`kernels/`, `benchmarks/`: alphacl_fast.kernels, .benchmarks), and the compiled backends.

ALPHACL_CPU=0 leaves the CPU backend out, 1 makes its absence an error; by default it is built where a compiler exists. So does
ALPHACL_CUDA, where nvcc and torch exist (csrc/cuda/build.py).
"""

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc") / "cpu"
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
BF16 = [*AVX512, "-mavx512bf16"]
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*BF16, "-DALPHACL_USE_DOT"],
    "amx": [*BF16, "-mamx-tile", "-mamx-bf16", "-DALPHACL_USE_AMX"],
    "amx_emulated": [*BF16, "-DALPHACL_USE_AMX", "-DALPHACL_AMX_EMULATED"],  # for tests
}


def build_library(output: Path) -> str:
    """Compiles csrc/cpu once per instruction set and links to ``output``, without any header of torch or Python.

    Returns compiler, flags and instruction sets, which the library can tell as well.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [*COMMON, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    with tempfile.TemporaryDirectory() as folder:
        # Without linking OpenMP's library: the symbols are those of the one that torch has loaded.
        threads = "-fopenmp" if gnu_openmp(compiler, folder) else "-pthread"
        sets = {name: extra for name, extra in INSTRUCTION_SETS.items() if accepts(compiler, extra, folder)}
        summary = f"{run([*compiler, '--version']).splitlines()[0]}; {' '.join([*flags, threads])}; {', '.join(sets)}"
        jobs = [(f"kernels_{name}", "kernels.cpp", [*extra, f"-DALPHACL_ISA={name}"]) for name, extra in sets.items()]
        known = ["-DALPHACL_SETS=" + " ".join(f"SET({name})" for name in sets)]
        quoted = summary.replace("\\", "\\\\").replace('"', '\\"')
        known += [f'-DALPHACL_BUILD="{quoted}"', f'-DALPHACL_SOURCES="{fingerprint()}"']
        jobs += [("driver", "driver.cpp", [threads, *known])]

        def compile_one(job: tuple[str, str, list[str]]) -> None:
            run([*compiler, *flags, *job[2], "-c", str(SOURCES / job[1]), "-o", f"{folder}/{job[0]}.o"])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs))
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        partial = output.with_suffix(".partial")
        run([*compiler, "-shared", *undefined, "-pthread", *(f"{folder}/{job[0]}.o" for job in jobs), "-o", str(partial)])
        partial.replace(output)
    return summary


def fingerprint() -> str:
    """Of the sources, so that a library compiled from others can be told apart."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.glob("*.*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def accepts(compiler: list[str], flags: list[str], folder: str) -> bool:
    """Whether the compiler builds for the flags (another architecture's instruction sets it does not)."""
    source = Path(folder) / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [*compiler, *flags, "-Werror", "-c", str(source), "-o", str(Path(folder) / "empty.o")]
    return subprocess.run(command, capture_output=True).returncode == 0


def gnu_openmp(compiler: list[str], folder: str) -> bool:
    """Whether -fopenmp makes calls to the OpenMP library that torch's Linux builds have loaded, GNU's."""
    source, result = Path(folder) / "openmp.cpp", Path(folder) / "openmp.o"
    source.write_text("#include <omp.h>\nvoid f(int* x) {\n#pragma omp parallel\n  x[omp_get_thread_num()] = 1;\n}\n")
    command = [*compiler, "-fopenmp", "-c", str(source), "-o", str(result)]
    return sys.platform == "linux" and subprocess.run(command, capture_output=True).returncode == 0 \
        and b"GOMP_parallel" in result.read_bytes()  # fmt: skip


def build_cuda_library(output: Path) -> str:
    """Compiles csrc/cuda and links to ``output``."""
    return cuda_build().library(output)


def cuda_build() -> Any:
    """The module csrc/cuda/build.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("cuda_build", Path("csrc") / "cuda" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_kernels(name: str, output: Path, in_source: bool) -> None:
    """Builds a backend's library, or leaves the reason beside where it would be; an error only where it is demanded."""
    folders = [output.parent, *([Path("alphacl_fast")] if in_source else [])]
    for folder in folders:
        (folder / f"_{name}_not_built.txt").unlink(missing_ok=True)
    kernels, switch = f"{name.upper()} kernels", f"ALPHACL_{name.upper()}"
    wanted = os.environ.get(switch, "auto")
    try:
        if wanted == "0":
            raise RuntimeError(f"left out ({switch}=0)")
        print(f"alphacl_fast: {kernels} by {LIBRARIES[name](output)}", file=sys.stderr)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        if wanted == "1":
            raise RuntimeError(f"the {kernels} could not be built: {getattr(error, 'stderr', None) or error}") from error
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error" in line), lines[0])
        print(f"alphacl_fast: no compiled {kernels}: {reason}", file=sys.stderr)
        for folder in folders:
            (folder / output.name).unlink(missing_ok=True)
            (folder / f"_{name}_not_built.txt").write_text(reason + "\n")


LIBRARIES = {"cpu": build_library, "cuda": build_cuda_library}


class BuildKernels(build_ext):
    """One library per compiled backend."""

    def run(self) -> None:
        self.in_source = bool(self.inplace)  # setuptools clears it while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        build_kernels(ext.name.split("._")[1], output, self.in_source)


class BuildCuda(Command):
    """The CUDA library beside the sources: pip's isolated environment has no torch to build it with."""

    description = "build the CUDA library in place, or for the host (--emulated)"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [("emulated", None, "for the host; prints where it is")]

    def initialize_options(self) -> None:
        self.emulated = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if self.emulated:
            print(cuda_build().emulated())
        else:
            build_kernels("cuda", Path("alphacl_fast") / "_cuda.abi3.so", True)


setup(
    packages=[
        "alphacl_fast", "alphacl_fast.backend", "alphacl_fast.compat", "alphacl_fast.train", "alphacl_fast.kernels",
        "alphacl_fast.benchmarks",
    ],
    package_dir={"alphacl_fast.kernels": "kernels", "alphacl_fast.benchmarks": "benchmarks"},
    package_data={"alphacl_fast": ["py.typed"], "alphacl_fast.kernels": ["README.md", "tuned/*.json"]},
    ext_modules=[Extension(f"alphacl_fast._{name}", sources=[], py_limited_api=True, optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildKernels, "build_cuda": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
