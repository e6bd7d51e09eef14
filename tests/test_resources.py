"""What tools/resources.py reports. Kernels are compiled in a process of its own: in this one
triton interprets them.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ != "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

triton = pytest.importorskip("triton")
tl = triton.language

from tools.resources import Resources, compile_for, inspect_ptx, limits, occupancy  # noqa: E402

pytestmark = pytest.mark.xdist_group("resources")  # one worker makes what its tests share

ROOT = Path(__file__).parent.parent


@triton.jit
# c (M, N) = a (M, n) · b (N, n)ᵀ
def product(a_ptr, b_ptr, c_ptr, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for i in range(0, n, K):
        a = tl.load(a_ptr + rows[:, None] * n + i + k[None, :])
        b = tl.load(b_ptr + columns[None, :] * n + i + k[:, None])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], total)


@triton.jit
# exp2(F·Fᵀ)·F, as a sweep has it
def chained(f_ptr, out_ptr, n, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    rows, d = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    mine = tl.load(f_ptr + rows[:, None] * D + d[None, :])
    total = tl.zeros((M, D), tl.float32)
    for j in range(0, n, N):
        other = tl.load(f_ptr + (j + tl.arange(0, N))[:, None] * D + d[None, :])
        weights = tl.exp2(tl.dot(mine, tl.trans(other)))
        total = tl.dot(weights.to(tl.bfloat16), other, total)
    tl.store(out_ptr + rows[:, None] * D + d[None, :], total)


@triton.jit
def halved(x):
    return x * 0.5


@triton.jit
def mapped(x_ptr, n, function: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, function(tl.load(x_ptr + at, mask=at < n)), mask=at < n)


class Vectors(NamedTuple):
    x: Any
    bias: Any
    scale: Any


@triton.jit
def transformed(v, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(v.x + at) * tl.load(v.scale)
    if v.bias is not None:
        y += tl.load(v.bias)
    tl.store(y_ptr + at, y)


def compile_everything():
    """Resources of every case by name, without their texts."""
    inputs = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "n": "i32"}
    sweep = {"f_ptr": "*bf16", "out_ptr": "*fp32", "n": "i32"}
    tile = {"M": 64, "N": 64, "K": 32}
    vector = {"function": halved, "BLOCK": 1024}
    cases = {
        f"product {capability}": compile_for(product, inputs, tile, capability, divisible=("n",))
        for capability in (80, 90, 100)
    }
    cases["unaligned"] = compile_for(product, inputs, tile, 80, attrs={})
    cases["fits"] = compile_for(chained, sweep, {"M": 64, "N": 64, "D": 128}, 90, num_stages=2)
    cases["too large"] = compile_for(
        chained, sweep, {"M": 128, "N": 128, "D": 128}, 90, num_stages=2
    )
    cases["starved"] = compile_for(product, inputs, {"M": 64, "N": 128, "K": 32}, 80, maxnreg=64)
    cases["mapped"] = compile_for(mapped, {"x_ptr": "*fp32", "n": "i32"}, vector, 90)
    vectors = {"v": Vectors("*fp32", None, "*fp32"), "y_ptr": "*fp32"}
    cases["tuple"] = compile_for(transformed, vectors, {"BLOCK": 1024}, 90)
    cases["8 warps"] = compile_for(mapped, {"x_ptr": "*fp32", "n": "i32"}, vector, 90, num_warps=8)
    refused = {}
    for name, call in {
        "missing": lambda: compile_for(mapped, {"x_ptr": "*fp32"}, vector, 90),
        "divisible": lambda: compile_for(
            mapped, {"x_ptr": "*fp32", "n": "i32"}, vector, 90, divisible=("m",)
        ),
        "ptxas": lambda: inspect_ptx(
            cases["mapped"].ptx.replace("st.global", "st.nowhere"), 90, shared=0, threads=128
        ),
    }.items():
        try:
            call()
        except ValueError as error:
            refused[name] = str(error)
    return {
        "cases": {name: asdict(replace(r, ptx="")) for name, r in cases.items()},
        "refused": refused,
    }


@pytest.fixture(scope="module")
def compiled():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    result["cases"] = {name: Resources(**fields) for name, fields in result["cases"].items()}
    return result


@pytest.mark.parametrize(("capability", "opcode", "ptx"), [
    (80, "HMMA", "mma.sync"), (90, "HGMMA", "wgmma.mma_async"), (100, "UTCHMMA", "tcgen05.mma"),
])  # fmt: skip
def test_tensor_cores_of_each_generation(compiled, capability, opcode, ptx):
    found = compiled["cases"][f"product {capability}"]
    assert found.instructions[opcode] > 0
    assert found.ptx_mma.keys() == {ptx}
    assert found.ptx_mma[ptx] > 0
    assert found.spill_bytes == 0
    assert not found.serialized
    assert found.name == "product"
    assert found.threads == 128
    assert 0 < found.shared < limits(capability).shared_per_block
    assert (found.tensor_memory > 0) == (capability == 100)
    assert 0 < occupancy(found) <= 16


def test_alignment_reaches_the_compiler(compiled):
    assert compiled["cases"]["product 80"].count(r"^LDGSTS.*\.128") > 0
    assert compiled["cases"]["unaligned"].count(r"^LD.*\.128") < compiled["cases"][
        "product 80"
    ].count(r"^LD.*\.128")


def test_totals_are_sums(compiled):
    found = compiled["cases"]["fits"]
    assert found.count("") == found.instructions.total() == sum(found.opcodes.values())
    assert found.count(r"^MUFU\.EX2$") == found.instructions["MUFU"] == 64 * 64 // 128


def test_spills_and_serialized_products_are_reported(compiled):
    fits, large, starved = (compiled["cases"][name] for name in ("fits", "too large", "starved"))
    assert (fits.spill_bytes, fits.stack, fits.serialized, list(fits.warnings)) == (0, 0, False, [])
    assert large.serialized
    assert any("serialized" in warning for warning in large.warnings)
    assert starved.registers <= 64
    for spilling in (large, starved):
        assert spilling.spill_bytes > 0
        assert spilling.stack > 0
        assert spilling.count("^(LDL|STL)") > 0


def test_tuples_of_arguments(compiled):
    found = compiled["cases"]["tuple"]
    assert found.count(r"^LDG\..*128") == found.count(r"^STG\..*128") == 2  # members are aligned,
    assert found.count("^LDG") == 3  # and one of them is absent


def test_functions_and_warps(compiled):
    for name, threads in (("mapped", 128), ("8 warps", 256)):
        assert compiled["cases"][name].count("^F(MUL|ADD|FMA)") == 1024 // threads
        assert compiled["cases"][name].threads == threads


def test_refusals(compiled):
    assert (
        "arguments of mapped must be ['BLOCK', 'function', 'n', 'x_ptr'], got"
        in compiled["refused"]["missing"]
    )
    assert "divisible must name arguments of mapped" in compiled["refused"]["divisible"]
    assert "ptxas --gpu-name=sm_90a failed" in compiled["refused"]["ptxas"]
    with pytest.raises(TypeError, match="fn must be a jitted function, got InterpretedFunction"):
        compile_for(mapped, {}, {}, 90)
    with pytest.raises(ValueError, match=r"capability must be one of \[80, .*\], got 70"):
        limits(70)


@pytest.mark.parametrize(("change", "blocks"), [
    ({}, 16),  # threads: 2048/128
    ({"threads": 32}, 32),
    ({"registers": 168}, 3),  # 65536/(168·128)
    ({"registers": 129}, 3),  # a warp's registers come in units of 256: 136 a thread
    ({"registers": 256}, 0),
    ({"shared": 75 * 1024}, 3),  # 228/(75 + 1)
    ({"shared": 76 * 1024}, 2),
    ({"shared": 227 * 1024}, 1),
    ({"shared": 228 * 1024}, 0),
    ({"tensor_memory": 256, "capability": 100}, 2),
])  # fmt: skip
def test_occupancy(change, blocks):
    small = {"capability": 90, "registers": 32, "shared": 0, "threads": 128}
    assert occupancy(Resources(name="kernel", **{**small, **change})) == blocks


if __name__ == "__main__":
    print(json.dumps(compile_everything()))
