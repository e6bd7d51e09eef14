"""The Triton kernels around the sweeps: normalisation and its derivative, interpreted, against the same in torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

if __name__ != "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

pytest.importorskip("triton")

from alphacl_fast.kernels import rows

from alphacl_fast.autograd import Features, positives, through_normalization

pytestmark = [
    pytest.mark.xdist_group("rows"),  # one worker makes what its tests share
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of inf and NaN in the interpreter
]

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(1, None), (3, None), (17, None), (96, None), (96, 32), (128, None), (1000, None), (1000, 256)]  # D, chunk
EPS = {torch.float32: 6e-8, torch.float64: 2e-14}  # in float64 the oracle's own error is not known


def expected(z1, z2, dtype=torch.float64):
    """f, inv_norm and pos in torch, computed in a dtype; half-precision rows raw."""
    features = Features.make(torch.cat([z1, z2]).to(dtype), "cosine")
    f = torch.cat([z1, z2]) if z1.dtype.itemsize == 2 else features.f
    return f, features.inv_norm, positives(features.rows(), "cosine")


def expected_gradient(d, unit, inv_norm, q):
    d, (d1, d2), (u1, u2) = d.clone(), *(x.chunk(2) for x in (d, unit))
    through_positive = torch.cat([d1 - q.unsqueeze(1) * u2, d2 - q.unsqueeze(1) * u1])
    return through_normalization(through_positive, unit, inv_norm)


def error(got, want):
    """Largest error relative to the largest element of a row (of the vector)."""
    want = want.double()
    return ((got.double() - want).abs() / want.abs().amax(-1, keepdim=True).clamp(min=1e-300)).max().item()


def assert_close(got, want, eager, eps):
    """Within twice the error of the same in torch and the same dtype, and a rounding band."""
    assert got.dtype == eager.dtype
    assert error(got, want) <= 2 * error(eager, want) + 4 * eps


def views(n, dim, dtype):
    return torch.randn(n, dim, dtype=torch.float64).to(dtype), (torch.randn(n, dim, dtype=torch.float64) * 3 + 1).to(dtype)


@pytest.fixture(params=[None, 32])
def chunk(request, monkeypatch):
    """Rows are read at once, or in chunks of so many features."""
    if request.param:
        monkeypatch.setattr(rows, "MAX_BLOCK_D", request.param)
    return request.param


@pytest.mark.parametrize(("dim", "chunk"), SIZES, indirect=["chunk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_rows(dtype, dim, poisoned, chunk):
    z1, z2 = views(37 if dim < 1000 else 5, dim, dtype)
    f, inv_norm, pos = rows.unit_rows(z1, z2)
    wide = inv_norm.dtype
    want, eager = expected(z1, z2), expected(z1, z2, wide)
    if dtype.itemsize == 2:
        assert torch.equal(f, torch.cat([z1, z2]))
    else:
        assert_close(f, want[0], eager[0], EPS[wide])
    assert_close(inv_norm.unsqueeze(1), want[1].unsqueeze(1), eager[1].unsqueeze(1), EPS[wide])
    assert_close(pos, want[2], eager[2], EPS[wide])


@pytest.mark.parametrize(("dim", "chunk"), SIZES, indirect=["chunk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finish_rows(dtype, dim, poisoned, chunk):
    n = 35 if dim < 1000 else 5
    z1, z2 = views(n, dim, dtype)
    f, inv_norm, _ = rows.unit_rows(z1, z2)
    wide = inv_norm.dtype
    d, q = torch.randn(2 * n, dim, dtype=wide), torch.rand(2 * n, dtype=wide)[::2]
    unit = f.to(wide) * inv_norm.unsqueeze(1) if dtype.itemsize == 2 else f
    want = expected_gradient(d.double(), unit.double(), inv_norm.double(), q.double())
    eager = expected_gradient(d, unit, inv_norm, q)
    assert rows.finish_rows(d, f, inv_norm, q) is None
    if dim == 1:  # nothing is left but rounding
        assert d.abs().max() <= 8 * EPS[wide] * (inv_norm.max() * 4)
    else:
        assert_close(d, want, eager, EPS[wide])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_a_gradient_are_added_in_order(dtype, chunk):
    z1, z2 = views(9, 70, dtype)
    f, inv_norm, _ = rows.unit_rows(z1, z2)
    parts, q = torch.randn(3, 18, 70), torch.rand(9)
    whole, others = (parts[0] + parts[1]) + parts[2], parts[1:].clone()
    rows.finish_rows(parts, f, inv_norm, q)
    rows.finish_rows(whole, f, inv_norm, q)
    assert torch.equal(parts[0], whole)
    assert torch.equal(parts[1:], others)


def test_rows_of_any_stride(poisoned):
    wide = torch.randn(2, 11, 40)
    columns = torch.randn(40, 11)
    plain = [z.contiguous() for z in (wide[0, :, 3:20], columns.t()[:, :17])]
    for a, b in zip(rows.unit_rows(wide[0, :, 3:20], columns.t()[:, :17]), rows.unit_rows(*plain), strict=True):
        assert torch.equal(a, b)
    once = torch.randn(1, 17)
    for a, b in zip(rows.unit_rows(once.expand(11, 17), plain[0]), rows.unit_rows(once.repeat(11, 1), plain[0]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_at_the_ends_of_the_range(dtype, poisoned, chunk):
    """Zero, subnormal, tiny and huge rows: everything finite, and as exact as for others."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    below = 1 if dtype == torch.bfloat16 else 64  # the interpreter takes a subnormal bfloat16 for zero
    sizes = torch.tensor([0, tiny / below, tiny, tiny * 64, 1, largest / 64, largest, largest], dtype=torch.float64)
    z1 = torch.randn(8, 80, dtype=torch.float64)
    z1 = z1 / z1.abs().amax(1, keepdim=True) * sizes.unsqueeze(1)
    z1 = torch.where(z1.abs() < tiny / below, 0, z1).to(dtype)
    z1[7], z2 = largest, z1.flip(0)
    z2[3, 40:] = 0  # a chunk of zeros after others, and before
    z2[4, :40] = 0
    f, inv_norm, pos = rows.unit_rows(z1, z2)
    assert all(x.isfinite().all() for x in (f, inv_norm, pos))
    assert inv_norm[0] == 0
    assert pos[0] == pos[7] == 0
    assert not f[0].any()
    if dtype != torch.float64:
        unit = torch.nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1, eps=0).nan_to_num()
        assert dtype != torch.float32 or error(f, unit) < 1e-6
        assert error(pos, (unit[:8] * unit[8:]).sum(1)) < 1e-6
    else:  # no wider dtype to compare with
        assert ((f.norm(dim=1) - 1).abs() < 1e-13).tolist() == [False, *[True] * 14, False]
    eager = Features.make(torch.cat([z1, z2]), "cosine")
    assert ((inv_norm - eager.inv_norm).abs() <= 1e-5 * eager.inv_norm).all()

    d, q = torch.randn(16, 80, dtype=inv_norm.dtype), torch.rand(8, dtype=inv_norm.dtype)
    d *= 1e-6
    rows.finish_rows(d, f, inv_norm, q * 1e-6)
    assert not d.isnan().any()
    assert not d[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(dtype, value, chunk):
    """As in torch: the row, its scalars and its gradient become NaN, and no other row does."""
    z1, z2 = views(4, 70, dtype)
    z1[1, 50] = value
    z2[2] = value
    f, inv_norm, pos = rows.unit_rows(z1, z2)
    want = expected(z1, z2, inv_norm.dtype)
    for got, row in zip((f, inv_norm, pos), want, strict=True):
        assert torch.equal(got.isnan(), row.isnan())
    assert pos.isnan().tolist() == [False, True, True, False]
    d, q = torch.ones(8, 70, dtype=inv_norm.dtype), torch.ones(4, dtype=inv_norm.dtype)
    d[3, 7] = value
    rows.finish_rows(d, f, inv_norm, q)
    broken = d.isnan().any(1) | d.isinf().any(1)
    assert broken.tolist() == [False, True, True, True, False, True, True, False]  # 1 and 6, their partners, and 3


def test_as_the_cpu_backend_has_it():
    from alphacl_fast.backend import cpu

    if cpu.load_error():
        pytest.skip(cpu.load_error())
    for dtype in DTYPES:
        z1, z2 = views(5, 50, dtype)
        z1[3] = 0
        for a, b in zip(rows.unit_rows(z1, z2), cpu.unit_rows(z1, z2), strict=True):
            torch.testing.assert_close(a, b)


def compile_everything():
    """Resources by kernel, capability, dtype and size; production tiles."""
    from alphacl_fast.kernels.resources import compile_for, occupancy

    cases = [(90, kind, 4096) for kind in ("bf16", "fp32", "fp64")]
    cases += [(90, "fp64", 3), (90, "bf16", 65536), *((capability, "bf16", 128) for capability in (80, 90, 100))]
    found = {}
    for capability, kind, dim in cases:
        config = rows.tile(dim)
        warps, wide = config.pop("num_warps"), "*fp64" if kind == "fp64" else "*fp32"
        z, vectors = f"*{kind}", {"inv_norm_ptr": wide, "n_pairs": "i32"}
        strides = {"stride1": "i32", "stride2": "i32"}
        normalize = {"z1_ptr": z, "z2_ptr": z, "f_ptr": z, "pos_ptr": wide, **vectors, **strides}
        finish = {"d_ptr": wide, "f_ptr": z, "q_ptr": wide, **vectors}
        for fn, signature, fixed, divisible in (
            (rows.unit_rows_kernel, normalize, {}, strides if dim % 16 == 0 else ()),
            (rows.finish_rows_kernel, finish, {"PARTS": 1}, ()),
        ):
            r = compile_for(
                fn, signature, {"DIM": dim, **config, **fixed}, capability, num_warps=warps, divisible=divisible
            )
            found[f"{r.name} {capability} {kind} {dim}"] = {
                "spills": r.spill_bytes, "stack": r.stack, "blocks": occupancy(r), "threads": r.threads,
                "loads": r.count(r"^LDG\..*128"), "stores": r.count(r"^STG\..*128"),
            }  # fmt: skip
    return found


@pytest.fixture(scope="module")
def compiled():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__], env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_compiled_for_each_generation(compiled):
    assert len(compiled) == 16
    for name, found in compiled.items():
        assert found["spills"] == found["stack"] == 0, name
        assert found["blocks"] * found["threads"] >= 256, name
        if not name.endswith(" 3"):
            assert found["loads"] > 0, name
            assert found["stores"] > 0, name


@pytest.mark.parametrize(("kind", "bytes_per_number"), [("bf16", 2), ("fp32", 4), ("fp64", 8)])
def test_a_row_that_fits_is_read_once(compiled, kind, bytes_per_number):
    """At 4096 features a thread of 256 holds 16 numbers of each row: so many loads of 16 bytes, and not one more."""
    loads = 2 * 16 * bytes_per_number // 16
    assert compiled[f"unit_rows_kernel 90 {kind} 4096"]["loads"] == loads
    gradient = 2 * 16 * max(bytes_per_number, 4) // 16
    assert compiled[f"finish_rows_kernel 90 {kind} 4096"]["loads"] == loads + gradient


if __name__ == "__main__":
    print(json.dumps(compile_everything()))
