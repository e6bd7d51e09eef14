"""Plants one fault after the other (table.py) and runs the test that must find it.

    python tests/mutants/run.py [--jobs N] [--only SUBSTRING …] [--list]

The checkout is copied; nothing is written to it but build/mutants, where compiled objects are kept.
First every test of the table runs without a fault: a test that fails anyway finds nothing. The exit
status is 1 if a fault survives, if its old text is no longer there once (stale), or if it cannot be
tried. Each test has a process of its own, forked from one that has already imported torch.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that a test may take; for the tests without a fault all together this many times their
#: number.
LIMIT = 180
SETUP = [sys.executable, "setup.py", "--quiet"]
#: By folder: how the sources in it are compiled.
BUILDS = {
    "csrc/cpu": [*SETUP, "build_ext", "--inplace"],
    "csrc/cuda": [*SETUP, "build_cuda", "--emulated"],
}
CPU_LIBRARY = "alphacl_fast/_cpu.abi3.so"
#: Variants that only some processors run, and the flag of /proc/cpuinfo that says so.
PROCESSOR_FLAGS = {"avx512_bf16": "avx512_bf16", "amx_emulated": "avx512_bf16"}
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "data", "*.egg-info")


class Mutant(NamedTuple):
    """A fault: in ``file`` the text ``old``, which occurs once, becomes ``new``.

    ``name`` says which formula is broken, and how. ``test`` is the node of pytest that must fail.
    ``variant`` is the CPU's instruction set, or the emulated kernels' dtype, that the test runs and
    the fault is compiled for; without one only what is compiled once for all of them is compiled
    again. A test that does not end counts only with ``timeout_kills``.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    variant: str = ""
    timeout_kills: bool = False

    def planted(self, text: str) -> str | None:
        """The file's text with the fault, or None if the old text is not there exactly once."""
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


#: For every process here. Kernels of Triton are interpreted, which is decided when it is imported.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "ALPHACL_CPU": "1",
    "ALPHACL_CUDA": "0",
}
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = [
    "torch",
    "torch._decomp",
    "torch.distributed",
    "triton.language",
    "pytest",
    "hypothesis",
]


def _pytest(root: str, environment: dict[str, str], log: str, arguments: list[str]) -> None:
    """In a process of its own: runs tests of the checkout at ``root`` and ends with pytest's
    status."""
    os.setsid()  # so that what tests start ends with them
    os.chdir(root)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [root]
    sys.dont_write_bytecode = True
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import pytest

    code = pytest.main(["-p", "no:cacheprovider", *arguments])
    sys.stdout.flush()
    os._exit(int(code))


class Checkout:
    """A copy of the checkout to plant faults in."""

    def __init__(self, source: Path, root: Path, store: Path) -> None:
        self.root = shutil.copytree(source, root, ignore=LEFT_OUT)
        compiler = root.with_name(f"{root.name}-c++")  # one word, which every build understands
        command = shlex.join([sys.executable, str(Path(__file__).with_name("compiler.py"))])
        compiler.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        compiler.chmod(0o755)
        self.environment = {
            **os.environ,
            "ALPHACL_RANKS_TIMEOUT": "45",
            **ENVIRONMENT,
            "PYTHONPATH": str(root),
            "CXX": str(compiler),
            "ALPHACL_CUDA_EMULATED": "",
            "MUTANTS_STORE": str(store),
            "ALPHACL_CUDA_CACHE": str(root / "build" / "cuda"),
        }
        store.mkdir(parents=True, exist_ok=True)

    def build(self, folder: str, variant: str | None) -> str | None:
        """Compiles the sources of a folder of `BUILDS`; returns what went wrong. Variant None:
        there is no fault."""
        needed = {} if variant is None else {"MUTANTS_VARIANT": variant}
        environment = {**self.environment, **needed}
        done = subprocess.run(
            BUILDS[folder], cwd=self.root, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            return done.stdout + done.stderr
        if folder == "csrc/cuda":
            self.environment["ALPHACL_CUDA_EMULATED"] = done.stdout.split()[-1]
        return None

    def pytest(
        self, arguments: Sequence[str], variant: str, limit: float
    ) -> tuple[int | None, str]:
        """(status, output) of pytest; the status is None if it did not end in time, negative if the
        process died."""
        isa = {"ALPHACL_CPU_ISA": variant} if variant.islower() else {}
        log = self.root.with_name(f"{self.root.name}-{variant}.log")
        process = FORKS.Process(
            target=_pytest,
            args=(str(self.root), {**self.environment, **isa}, str(log), list(arguments)),
        )
        process.start()
        process.join(limit)
        code = process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return code, log.read_text(errors="replace") if log.exists() else ""

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[str | None]:
        """Within the context the fault is there, and compiled; what went wrong, or None."""
        file = self.root / mutant.file
        text = file.read_text() if file.exists() else ""
        broken = mutant.planted(text)
        if broken is None:
            yield f"stale: the old text occurs {text.count(mutant.old)} times in {mutant.file}"
            return
        library, folder = self.root / CPU_LIBRARY, os.path.dirname(mutant.file)
        if folder == "csrc/generated":  # a header of one library
            folder = f"csrc/{Path(mutant.file).name.split('_')[0]}"
        compiled = library.read_bytes() if folder == "csrc/cpu" else None
        emulated = self.environment["ALPHACL_CUDA_EMULATED"]
        file.write_text(broken)
        try:
            failure = self.build(folder, mutant.variant) if folder in BUILDS else None
            yield None if failure is None else "does not compile: " + _first_error(failure)
        finally:
            file.write_text(text)
            if compiled is not None:
                library.unlink(missing_ok=True)
                library.write_bytes(compiled)
            self.environment["ALPHACL_CUDA_EMULATED"] = emulated


def _first_error(output: str) -> str:
    lines = output.strip().splitlines() or ["no output"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])


def outcome(checkout: Checkout, mutant: Mutant) -> str:
    """What the test says of a fault: "killed", or why it is not."""
    with checkout.planted(mutant) as failure:
        if failure is not None:
            return failure
        code, output = checkout.pytest(["-x", mutant.test], mutant.variant, LIMIT)
    if code is None:
        return "killed" if mutant.timeout_kills else f"timed out after {LIMIT} s"
    if code == 1 or code < 0:  # a test failed, or the process died
        return "killed"
    return "SURVIVED" if code == 0 else "cannot be tried: " + _first_error(output)


def failing_anyway(checkouts: list[Checkout], mutants: Sequence[Mutant]) -> set[tuple[str, str]]:
    """(variant, test) of those that do not pass without a fault; as few runs of pytest as there are
    variants."""
    by_variant: dict[str, list[str]] = defaultdict(list)
    for mutant in mutants:
        if mutant.test not in by_variant[mutant.variant]:
            by_variant[mutant.variant].append(mutant.test)

    def failing(variant: str) -> set[tuple[str, str]]:
        checkout, tests, absent = checkouts[0], by_variant[variant], set()
        for _ in range(2):  # one that is not there would keep the others from running
            present = [test for test in tests if test not in absent]
            code, output = checkout.pytest(["-rfEp", *present], variant, LIMIT * len(tests))
            missing = set(re.findall(r"ERROR: not found: (.*)", output)) if code == 4 else set()
            if not missing:
                break
            absent |= {test for test in tests if str(checkout.root / test) in missing}
        lines = re.findall(r"^(PASSED|FAILED|ERROR) (tests/.*?)(?: - .*)?$", output, re.MULTILINE)

        def passes(test: str) -> bool:
            found = [
                status for status, node in lines if node == test or node.startswith(f"{test}[")
            ]
            return bool(found) and set(found) == {"PASSED"}

        return {(variant, test) for test in tests if not passes(test)}

    # Longest first. One checkout does: nothing is planted in it now.
    order = sorted(by_variant, key=lambda variant: -len(by_variant[variant]))
    with ThreadPoolExecutor(len(checkouts)) as pool:
        return set().union(*pool.map(failing, order))


def runs_here(variant: str) -> bool:
    flag, info = PROCESSOR_FLAGS.get(variant), Path("/proc/cpuinfo")
    return flag is None or (info.exists() and flag in info.read_text().split())


@contextlib.contextmanager
def fork_server() -> Iterator[None]:
    """Within the context `FORKS` has a server of its own, which has imported no package yet.

    The process's fork server may have imported the package that has no fault. It goes on: others
    may have children of it.
    """
    server = forkserver.ForkServer()
    server.set_forkserver_preload(PRELOADED)
    bound = ("ensure_running", "connect_to_new_process", "set_forkserver_preload")
    own = {"_forkserver": server, **{name: getattr(server, name) for name in bound}}
    with mock.patch.multiple(forkserver, **own):
        try:
            with mock.patch.dict(os.environ, ENVIRONMENT):
                server.ensure_running()
            yield
        finally:
            server._stop()


def run(mutants: Sequence[Mutant], jobs: int, source: Path = ROOT, say=print) -> dict[Mutant, str]:
    """What the tests say of each fault."""
    outcomes = {m: f"not here: no {m.variant}" for m in mutants if not runs_here(m.variant)}
    mutants = [m for m in mutants if m not in outcomes]
    with fork_server(), tempfile.TemporaryDirectory() as folder:
        store = source / "build" / "mutants"
        template = Checkout(source, Path(folder) / "0", store)
        for sources in BUILDS:
            needs = any(
                m.file.startswith(sources) or (sources.endswith("cuda") and "test_cuda" in m.test)
                for m in mutants
            )
            if needs and (failure := template.build(sources, None)):
                raise RuntimeError(f"{sources} cannot be compiled without a fault:\n{failure}")
        checkouts = [template] + [
            Checkout(template.root, Path(folder) / str(k), store) for k in range(1, jobs)
        ]
        for checkout in checkouts[1:]:
            checkout.environment["ALPHACL_CUDA_EMULATED"] = template.environment[
                "ALPHACL_CUDA_EMULATED"
            ]
        failing = failing_anyway(checkouts, mutants)
        free: queue.SimpleQueue[Checkout] = queue.SimpleQueue()
        for checkout in checkouts:
            free.put(checkout)

        def judge(mutant: Mutant) -> str:
            if (mutant.variant, mutant.test) in failing:
                return f"cannot be tried: {mutant.test} does not pass without it"
            checkout, start = free.get(), time.monotonic()
            try:
                result = outcome(checkout, mutant)
            finally:
                free.put(checkout)
            say(f"{result:10} {time.monotonic() - start:4.0f} s  {mutant.file}: {mutant.name}")
            return result

        with ThreadPoolExecutor(jobs) as pool:
            outcomes.update(zip(mutants, pool.map(judge, mutants), strict=True))
    return outcomes


def good(result: str) -> bool:
    return result == "killed" or result.startswith("not here")


def report(outcomes: dict[Mutant, str]) -> str:
    """Per file how many were killed; then every fault that was not."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for mutant, result in outcomes.items():
        by_file[mutant.file].append(result)
    lines = [f"{'file':34} faults killed"]
    for file, results in sorted(by_file.items()):
        lines.append(f"{file:34} {len(results):6} {results.count('killed'):6}")
    lines.append(f"{'all':34} {len(outcomes):6} {list(outcomes.values()).count('killed'):6}")
    lines += [
        f"{m.file}: {m.name}: {result}" for m, result in outcomes.items() if result != "killed"
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    from table import MUTANTS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="faults tried at once"
    )
    only = "only faults with one of these texts in their name, file or test"
    parser.add_argument("--only", nargs="+", default=[""], metavar="SUBSTRING", help=only)
    parser.add_argument("--list", action="store_true", help="print the faults and leave")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if any(t in f"{m.file}: {m.name}\n{m.test}" for t in options.only)]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.file}: {mutant.name}\n    {mutant.test}")
        return 0
    start = time.monotonic()
    outcomes = run(chosen, max(1, options.jobs), say=lambda line: print(line, flush=True))
    print(f"\n{report(outcomes)}\n{time.monotonic() - start:.0f} s")
    return 0 if chosen and all(map(good, outcomes.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
