"""What nvcc and Triton make of the kernels, interpreted on a CPU, against float64.

ALPHACL_PTX_FULL=1 (`make ptx`) takes every case and every planted defect.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from ptx import banks, calls, cases, memory, mutants, nvcc, run
from ptx.runner import Runner

from alphacl_fast.backend import triton

FULL = os.environ.get("ALPHACL_PTX_FULL") == "1"
FOLDER = Path(__file__).parent / "ptx"
CUDA, TRITON = ("cuda-90a", "cuda-80"), ("triton-90", "triton-80")

needs_nvcc = pytest.mark.skipif(nvcc.missing() is not None, reason=f"no PTX: {nvcc.missing()}")
needs_triton = pytest.mark.skipif(triton._missing() is not None, reason=str(triton._missing()))


def one_process(name):
    """One process runs all cases of a list, and decodes its kernels once."""
    return pytest.mark.xdist_group(f"ptx-{name}")


@functools.cache
def found(name):
    """The results of a list of cases."""
    return run.run_list(name, FULL)


def listed():
    for name in CUDA:
        for number, case in enumerate(run.of_list(name, FULL)):
            yield pytest.param(name, number, id=case.name, marks=one_process(name))


@needs_nvcc
@pytest.mark.parametrize(("name", "number"), [*listed()])
def test_cuda(name, number):
    result = found(name)["results"][number]
    assert result["ok"], (result["problem"], result["hazards"], result["errors"])


@needs_nvcc
@pytest.mark.parametrize("name", [pytest.param(name, marks=one_process(name)) for name in CUDA])
def test_instructions_of_cuda_are_executed(name):
    assert not run.coverage.missing(name, found(name)["coverage"], FULL)


@functools.cache
def found_in_a_process(names):
    """The results of lists by their names, of a process that interprets one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, FOLDER / "run.py", *names, "--json", file]
        command += ["--full"] if FULL else []
        done = subprocess.run(command, capture_output=True, text=True)
        assert file.exists(), done.stdout + done.stderr
        return {found["list"]: found for found in json.loads(file.read_text())["found"]}


def lists_of_triton():
    """Short lists share a process; full ones, which are long, have one each."""
    for name in [*TRITON, *(run.FULL_ALONE if FULL else ())]:
        yield pytest.param(name, marks=one_process(name if FULL else "triton"))


@needs_triton
@pytest.mark.parametrize("name", [*lists_of_triton()])
def test_triton(name):
    """In a process of its own: in this one Triton's kernels are interpreted as Python."""
    found = found_in_a_process((name,) if FULL else TRITON)[name]
    failures = run.failures(found, FULL)
    assert not failures, "\n".join(failures)
    assert len(found["results"]) == len(run.of_list(name, FULL))


@needs_nvcc
@one_process("cuda-80")
def test_tf32_reads_shared_memory_without_bank_conflicts(monkeypatch):
    """Every load of operands needs as few wavefronts as its bytes do."""
    loads = banks.Loads()
    monkeypatch.setattr(memory.Shared, "load", loads.counting(memory.Shared.load))
    runner = Runner()
    with run.launches("cuda-80", runner):
        one = cases.Case(
            "cuda", "80", 58, 64, cases.FP32, "tf32", call=calls.rectangle, sides=(75, 40)
        )
        assert all(cases.run(replace(one, dim=dim), runner).ok for dim in (64, 128))
    for kernel in ("FastRowSums", "FastPairGrad"):
        found = {name: rows for name, rows in loads.found.items() if kernel in name}
        assert len(found) == 2
        for rows in found.values():
            # the operands of a product of 64 × 64 × 8 are 10 loads of two features, or 16 of one
            assert len(rows) >= 40
            assert not {text for text, (count, least) in rows.items() if count > least}


@needs_nvcc
@one_process("cuda-90a")
def test_columns_are_transposed_without_bank_conflicts(monkeypatch):
    """Every load and store of a lane's feature needs as few wavefronts as its bytes do."""
    counted = banks.Loads()
    monkeypatch.setattr(memory.Shared, "load", counted.counting(memory.Shared.load))
    monkeypatch.setattr(memory.Shared, "store", counted.counting_stores(memory.Shared.store))
    runner, one = Runner(), cases.Case("cuda", "90a", 40, 64, cases.FP32, "tf32")
    with run.launches("cuda-90a", runner):
        assert all(cases.run(replace(one, dim=dim), runner).ok for dim in (64, 128))
    found = [rows for name, rows in counted.found.items() if "hopper8PairGrad" in name]
    assert len(found) == 2
    for rows in found:
        # eight pieces of 16 bytes, of four columns each
        stored = {text: row for text, row in rows.items() if "st.shared.v4" in text}
        loaded = {text: row for text, row in rows.items() if "ld.shared.f32" in text}
        assert (len(stored), len(loaded)) == (8, 32)
        both = {**stored, **loaded}.items()
        assert not {text for text, (count, least) in both if count > least}


def test_bank_conflicts_are_counted():
    lanes = 4 * np.arange(32)
    for places, size, count in (
        (lanes, 4, 1), (2 * lanes, 4, 2), (32 * lanes, 4, 32), (0 * lanes, 4, 1),
        (2 * lanes, 8, 2), (4 * lanes, 8, 4), (4 * lanes, 16, 4), (2 * (lanes // 4), 2, 1),
    ):  # fmt: skip
        assert banks.wavefronts(places, size) == count


# --- planted defects ------------------------------------------------------------------------------


@functools.cache
def attempts(name):
    return {mutant.name: what for mutant, what in mutants.attempts([name], not FULL)}


def planted(lists):
    for mutant in mutants.MUTANTS:
        name = f"{mutant.case.backend}-{mutant.case.arch}"
        if name in lists and (FULL or mutant.short):
            label = mutant.name.replace(" ", "-")
            yield pytest.param(name, mutant.name, id=label, marks=one_process(name))


@needs_nvcc
@pytest.mark.parametrize(("name", "mutant"), [*planted(CUDA)])
def test_planted_defects_are_found(name, mutant):
    assert attempts(name)[mutant] is not None


@needs_triton
@pytest.mark.skipif(not FULL, reason="ALPHACL_PTX_FULL=1 takes them")
@pytest.mark.parametrize("name", TRITON)
def test_planted_defects_of_triton_are_found(name):
    command = [sys.executable, FOLDER / "mutants.py", name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_defects():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 24
    assert 6 <= sum(mutant.short for mutant in mutants.MUTANTS) <= 10


def test_a_case_that_fails_is_told():
    """And so are instructions that no case has executed."""
    good = asdict(cases.Result("right", True, [0.0, 0.0], [], "", 1, 1, 0.1, 0.1))
    rows = [good, {**good, "case": "wrong", "ok": False, "hazards": ["a race"]}]
    covered = {"kernel": {"there": 10, "executed": 9, "missing": {}}}
    found = {"list": "triton-90", "results": rows, "coverage": covered}
    assert run.failures(found, False) == ["wrong: ['a race']"]
    covered["kernel"]["executed"] = 1
    assert "triton-90: 1 of 10 instructions executed" in run.failures(found, False)
