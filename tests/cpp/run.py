"""Compiles the tests of C++ code with sanitizers and runs them.

    python tests/cpp/run.py                       AddressSanitizer, UndefinedBehaviorSanitizer
    python tests/cpp/run.py --thread              ThreadSanitizer, fewer cases
    python tests/cpp/run.py --sanitize none       neither: for a debugger, or for timing
    python tests/cpp/run.py --only test_device    one of them

test_kernels tests csrc/cpu, test_driver the pieces of its driver; test_device tests the emulated
GPU of csrc/cuda, whose races must be reported, too; test_sweeps runs the CUDA kernels on it. CXX
is the compiler, as for tools/build_cpu.py, whose instruction sets and flags these are. Objects are
kept in build/test_kernels and compiled again when a source or a flag has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / "test_kernels"
TESTS = Path("tests") / "cpp"
EMULATOR = Path("tests") / "emulator"
CUDA = Path("csrc") / "cuda"
GENERATED = Path("csrc") / "generated"
PROGRAMS = ("test_driver", "test_kernels", "test_device", "test_sweeps")
SANITIZERS = {"address": "address,undefined", "thread": "thread", "none": ""}
#: Checks of UndefinedBehaviorSanitizer that take 40 % of all compilation and add nothing here:
#: AddressSanitizer reports an access through such a pointer, an overflow of an index is reported
#: before it reaches a pointer, and no class has virtual functions.
REDUNDANT = "null,object-size,pointer-overflow,vptr"
#: One test asks for too much memory; threads outnumber cores, so they must not spin.
ENVIRONMENT = {
    "ASAN_OPTIONS": "allocator_may_return_null=1:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "allocator_may_return_null=1:halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_WAIT_POLICY": "passive",
}


def load_builder() -> Any:
    """tools/build_cpu.py, whose flags and instruction sets these are."""
    file = ROOT / "tools" / "build_cpu.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runs_on(processor: str, flags: Sequence[str]) -> bool:
    """Whether a processor has the instructions of these flags; ``processor``: its /proc/cpuinfo."""
    known = processor.replace("_", "").split()
    needed = (flag.removeprefix("-m").replace("-", "") for flag in flags if flag.startswith("-m"))
    return all(name in known for name in needed)


def headers(folder: Path) -> list[Path]:
    """Every header that a source of this folder of ROOT can include."""
    beside = {CUDA: [EMULATOR]}.get(folder, [])
    return sorted(f for part in (folder, *beside, GENERATED) for f in (ROOT / part).glob("*.h"))


def build(sanitize: str, programs: Sequence[str]) -> dict[str, Path]:
    """Compiles what has changed, links, and returns the programs."""
    builder = load_builder()
    compiler = builder.host_compiler()
    OBJECTS.mkdir(parents=True, exist_ok=True)
    # Places of variables would take a fifth of the time; a report needs lines.
    flags = [flag for flag in builder.COMMON if flag != "-O3"]
    flags += ["-O1", "-g1", "-Wall", "-Wextra"]
    # GCC's false alarms about vectors that are set lane by lane
    flags.append("-Wno-maybe-uninitialized")
    flags = [flag for flag in flags if builder.accepts(compiler, [flag], OBJECTS)]
    if SANITIZERS[sanitize]:
        flags += [
            f"-fsanitize={SANITIZERS[sanitize]}",
            "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer",
        ]
        if "undefined" in SANITIZERS[sanitize]:
            flags.append(f"-fno-sanitize={REDUNDANT}")
        if not builder.accepts(compiler, flags, OBJECTS):
            sys.exit(f"{shlex.join(compiler)} does not compile with {shlex.join(flags)}")
    # ThreadSanitizer does not understand OpenMP's barriers; the driver can start its own threads.
    openmp = (
        sanitize != "thread"
        and sys.platform == "linux"
        and builder.accepts(compiler, ["-fopenmp"], OBJECTS)
    )
    threads = ["-fopenmp"] if openmp else ["-pthread"]
    # Lets the test fill the driver's workspace with NaN.
    wrap = ["-Wl,--wrap=posix_memalign", "-Wl,--wrap=free"] if sys.platform == "linux" else []

    sets = builder.supported(compiler, OBJECTS)
    missing = [name for name in builder.INSTRUCTION_SETS if name not in sets]
    if missing:
        print(f"not compiled, the compiler does not know them: {', '.join(missing)}")
    processor = Path("/proc/cpuinfo")
    if processor.exists():
        text = processor.read_text()
        idle = [name for name, own in sets.items() if not runs_on(text, own)]
        sets = {name: own for name, own in sets.items() if name not in idle}
        if idle:
            print(f"not compiled, this processor does not run them: {', '.join(idle)}")
    if sanitize == "thread":
        # Threads meet in the driver: two engines are enough; one of them packs pairs of bfloat16.
        sets = {name: sets[name] for name in ("portable", "avx512_bf16") if name in sets}
    jobs = builder.units(sets)
    # An access calls a function instead of being checked in place: a third less to compile.
    by_call = ["--param", "asan-instrumentation-with-call-threshold=0"]
    if sanitize == "address" and builder.accepts(compiler, [*flags, *by_call], OBJECTS):
        jobs = {name: [*by_call, *job] for name, job in jobs.items()}
    known = [f'-DALPHACL_{name}="test"' for name in ("BUILD", "SOURCES", "RECIPE")]
    jobs["driver"] = [*threads, *known, *jobs["driver"]]
    jobs["test_kernels"] = [
        *threads,
        *(["-DALPHACL_WRAPPED"] if wrap else []),
        "-DALPHACL_SET_NAMES=" + ",".join(f'"{name}"' for name in builder.INSTRUCTION_SETS),
        str(TESTS / "test_kernels.cpp"),
    ]
    alone = ("test_driver", "test_device", "test_sweeps")
    parts = {"test_kernels": list(jobs), **{name: [name] for name in alone}}
    jobs["test_driver"] = ["-pthread", str(TESTS / "test_driver.cpp")]
    # AddressSanitizer's time goes into compilation, ThreadSanitizer's into running.
    quick = ["-O0", "-g1"] if sanitize == "address" else []
    for name in ("test_device", "test_sweeps"):
        jobs[name] = [*quick, "-DALPHACL_EMULATED", str(TESTS / f"{name}.cpp")]
    kernel = ["-DALPHACL_EMULATED", "-Wno-unknown-pragmas", "-g1"]
    for dtype in ("BFLOAT16", "TFLOAT32", "FLOAT64"):  # every arithmetic in one dtype
        parts["test_sweeps"].append(dtype)
        jobs[dtype] = [*kernel, f"-DALPHACL_DTYPE={dtype}", "-x", "c++", str(CUDA / "kernels.cu")]
    version = builder.version(compiler)

    def compile_one(name: str) -> Path:
        command = [*compiler, *flags, *jobs[name], "-c"]
        files = headers(CUDA if "-DALPHACL_EMULATED" in command else builder.SOURCES)
        digest = hashlib.sha256("\0".join([version, *command]).encode())
        for file in (*files, ROOT / jobs[name][-1]):
            digest.update(file.read_bytes())
        target = OBJECTS / f"{sanitize}_{name}_{digest.hexdigest()[:16]}.o"
        if not target.exists():
            for old in OBJECTS.glob(f"{sanitize}_{name}_" + "?" * 16 + ".o"):
                old.unlink()
            partial = target.with_suffix(".partial")
            done = subprocess.run(
                [*command, "-o", str(partial)], cwd=ROOT, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
            print(done.stderr, end="", file=sys.stderr)
            partial.replace(target)
        return target

    wanted = [name for program in programs for name in parts[program]]
    # the longest first
    order = sorted(wanted, key=lambda name: name not in ("portable", "avx2", "avx512"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            objects = dict(zip(order, pool.map(compile_one, order), strict=True))
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"does not compile: {error}")
    linked = {}
    for program in programs:
        linked[program] = OBJECTS / f"{program}_{sanitize}"
        own = wrap if program == "test_kernels" else []
        files = [str(objects[name]) for name in parts[program]]
        command = [
            *compiler,
            *flags,
            *threads,
            "-pthread",
            *own,
            *files,
            "-o",
            str(linked[program]),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"does not link: {shlex.join(command)}\n{done.stderr}")
    return linked


def run(command: list[str]) -> None:
    start = time.monotonic()
    code = subprocess.run(command, env={**ENVIRONMENT, **os.environ}).returncode
    print(f"{Path(command[0]).name} ran for {time.monotonic() - start:.0f} s", flush=True)
    if code:
        sys.exit(
            f"{shlex.join(command)} failed: "
            + (f"signal {-code}" if code < 0 else f"exit status {code}")
        )


def run_races(program: str) -> None:
    """Checks that each race is reported: otherwise no report says nothing about the kernels."""
    for name in subprocess.run(
        [program, "--races"], check=True, capture_output=True, text=True
    ).stdout.split():
        done = subprocess.run(
            [program, "--race", name],
            env={**ENVIRONMENT, **os.environ},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0 or "data race" not in done.stderr:
            sys.exit(f"ThreadSanitizer overlooks the race {name}\n{done.stdout}{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sanitize", choices=SANITIZERS, default="address")
    parser.add_argument(
        "--thread",
        action="store_const",
        const="thread",
        dest="sanitize",
        help="short for --sanitize thread",
    )
    parser.add_argument(
        "--short", action="store_true", help="fewer cases; always so with ThreadSanitizer"
    )
    parser.add_argument("--only", choices=PROGRAMS, help="one of the tests")
    parser.add_argument("--seed", type=int, default=1, help="of the random sample")
    options = parser.parse_args()

    start = time.monotonic()
    programs = build(options.sanitize, [options.only] if options.only else PROGRAMS)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    if "test_driver" in programs:
        run([str(programs["test_driver"])])
    if "test_device" in programs:
        run([str(programs["test_device"])])
        if options.sanitize == "thread":
            run_races(str(programs["test_device"]))
    if "test_sweeps" in programs:
        run([str(programs["test_sweeps"])])
    if "test_kernels" in programs:
        short = ["--short"] if options.short or options.sanitize == "thread" else []
        run([str(programs["test_kernels"]), "--seed", str(options.seed), *short])


if __name__ == "__main__":
    main()
