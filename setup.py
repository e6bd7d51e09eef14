"""Which folders make up the package (`kernels/` at the top is alphacl_fast.kernels), and the compiled CPU backend.

ALPHACL_CPU=0 leaves the CPU backend out, 1 makes its absence an error; by default it is built where a compiler exists.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc") / "cpu"
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FAILURE = "_cpu_not_built.txt"
BF16 = [*AVX512, "-mavx512bf16"]
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*BF16, "-DALPHACL_USE_DOT"],
    "amx": [*BF16, "-mamx-tile", "-mamx-bf16", "-DALPHACL_USE_AMX"],
    "amx_emulated": [*BF16, "-DALPHACL_USE_AMX", "-DALPHACL_AMX_EMULATED"],  # for tests
}


class BuildKernels(build_ext):
    """Compiles csrc/cpu once per instruction set and links one library without any header of torch or Python."""

    def run(self) -> None:
        self.in_source = bool(self.inplace)  # setuptools clears it while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        beside_sources = [Path("alphacl_fast")] if self.in_source else []
        folders = [output.parent, *beside_sources]
        for folder in folders:
            (folder / FAILURE).unlink(missing_ok=True)
        wanted = os.environ.get("ALPHACL_CPU", "auto")
        try:
            if wanted == "0":
                raise RuntimeError("left out (ALPHACL_CPU=0)")
            print(f"alphacl_fast: CPU kernels by {build_library(output)}", file=sys.stderr)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise RuntimeError(f"the CPU kernels could not be built: {getattr(error, 'stderr', None) or error}") from error
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "error" in line), lines[0])
            print(f"alphacl_fast: no compiled CPU kernels: {reason}", file=sys.stderr)
            for folder in folders:
                (folder / output.name).unlink(missing_ok=True)
                (folder / FAILURE).write_text(reason + "\n")


def build_library(output: Path) -> str:
    """Compiles and links to ``output``; returns compiler, flags and instruction sets, which the library can tell as well."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [*COMMON, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    with tempfile.TemporaryDirectory() as folder:
        # Without linking OpenMP's library: the symbols are those of the one that torch has loaded.
        threads = "-fopenmp" if gnu_openmp(compiler, folder) else "-pthread"
        sets = {name: extra for name, extra in INSTRUCTION_SETS.items() if accepts(compiler, extra, folder)}
        summary = f"{run([*compiler, '--version']).splitlines()[0]}; {' '.join([*flags, threads])}; {', '.join(sets)}"
        jobs = [(f"kernels_{name}", "kernels.cpp", [*extra, f"-DALPHACL_ISA={name}"]) for name, extra in sets.items()]
        known = [f"-DALPHACL_WITH_{name.upper()}" for name in sets if name != "portable"]
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


setup(
    packages=["alphacl_fast", "alphacl_fast.backend", "alphacl_fast.train", "alphacl_fast.kernels"],
    package_dir={"alphacl_fast.kernels": "kernels"},
    package_data={"alphacl_fast": ["py.typed"], "alphacl_fast.kernels": ["README.md", "tuned/*.json"]},
    ext_modules=[Extension("alphacl_fast._cpu", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
