"""The Triton kernels around the sweeps, interpreted: normalisation and its derivative, against
torch.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

if __name__ != "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

pytest.importorskip("triton")

from family import FULL, is_due

from alphacl_fast import objectives
from alphacl_fast.autograd import Features, positives, through_normalization
from alphacl_fast.kernels import rows, trace

pytestmark = [
    pytest.mark.xdist_group("rows"),  # one worker makes what its tests share
    # numpy's, of inf and NaN in the interpreter
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# D, chunk
SIZES = [
    (1, None),
    (3, None),
    (17, None),
    (96, None),
    (96, 32),
    (128, None),
    (1000, None),
    (1000, 256),
]
EPS = {torch.float32: 6e-8, torch.float64: 2e-14}  # in float64 the oracle's own error is not known


def expected(z1, z2, dtype=torch.float64):
    """f, inv_norm and pos in torch, computed in a dtype; half-precision rows raw."""
    features = Features.make(torch.cat([z1, z2]).to(dtype), "cosine")
    f = torch.cat([z1, z2]) if z1.dtype.itemsize == 2 else features.rows.f
    return f, features.inv_norm, positives(features.wide(), "cosine")


def expected_gradient(d, unit, inv_norm, q):
    d, (d1, d2), (u1, u2) = d.clone(), *(x.chunk(2) for x in (d, unit))
    through_positive = torch.cat([d1 - q.unsqueeze(1) * u2, d2 - q.unsqueeze(1) * u1])
    return through_normalization(through_positive, unit, inv_norm)


def scale_of(scale):
    """As autograd passes it on: None where rows are unit rows."""
    return scale if len(scale) else None


def error(got, want):
    """Largest error relative to the largest element of a row (of the vector)."""
    want = want.double()
    return (
        ((got.double() - want).abs() / want.abs().amax(-1, keepdim=True).clamp(min=1e-300))
        .max()
        .item()
    )


def assert_close(got, want, eager, eps):
    """Within twice the error of the same in torch and the same dtype, and a rounding band."""
    assert got.dtype == eager.dtype
    assert error(got, want) <= 2 * error(eager, want) + 4 * eps


def views(n, dim, dtype):
    return torch.randn(n, dim, dtype=torch.float64).to(dtype), (
        torch.randn(n, dim, dtype=torch.float64) * 3 + 1
    ).to(dtype)


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
    f, scale, inv_norm, pos = rows.unit_rows(z1, z2)
    wide = inv_norm.dtype
    want, eager = expected(z1, z2), expected(z1, z2, wide)
    if dtype.itemsize == 2:
        assert torch.equal(f, torch.cat([z1, z2]))
        assert torch.equal(scale, inv_norm)
    else:
        assert len(scale) == 0
        assert_close(f, want[0], eager[0], EPS[wide])
    assert_close(inv_norm.unsqueeze(1), want[1].unsqueeze(1), eager[1].unsqueeze(1), EPS[wide])
    assert_close(pos, want[2], eager[2], EPS[wide])


@pytest.mark.parametrize(("dim", "chunk"), SIZES, indirect=["chunk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finish_rows(dtype, dim, poisoned, chunk):
    n = 35 if dim < 1000 else 5
    z1, z2 = views(n, dim, dtype)
    f, scale, inv_norm, _ = rows.unit_rows(z1, z2)
    wide = inv_norm.dtype
    d, q = torch.randn(2 * n, dim, dtype=wide), torch.rand(2 * n, dtype=wide)[::2]
    unit = f.to(wide) * inv_norm.unsqueeze(1) if dtype.itemsize == 2 else f
    want = expected_gradient(d.double(), unit.double(), inv_norm.double(), q.double())
    eager = expected_gradient(d, unit, inv_norm, q)
    assert rows.finish_rows(d, f, scale_of(scale), inv_norm, q) is None
    if dim == 1:  # nothing is left but rounding
        assert d.abs().max() <= 8 * EPS[wide] * (inv_norm.max() * 4)
    else:
        assert_close(d, want, eager, EPS[wide])


def test_both_anchors_of_a_pair(poisoned):
    z1, z2 = views(9, 70, torch.float32)
    f, scale, inv_norm, _ = rows.unit_rows(z1, z2)
    d, q = torch.randn(18, 70), torch.rand(18)
    added = d.clone()
    rows.finish_rows(d, f, scale_of(scale), inv_norm, q)
    rows.finish_rows(added, f, scale_of(scale), inv_norm, q[:9] + q[9:])
    assert torch.equal(d, added)


def test_rows_of_any_stride(poisoned):
    wide = torch.randn(2, 11, 40)
    columns = torch.randn(40, 11)
    plain = [z.contiguous() for z in (wide[0, :, 3:20], columns.t()[:, :17])]
    for a, b in zip(
        rows.unit_rows(wide[0, :, 3:20], columns.t()[:, :17]), rows.unit_rows(*plain), strict=True
    ):
        assert torch.equal(a, b)
    once = torch.randn(1, 17)
    for a, b in zip(
        rows.unit_rows(once.expand(11, 17), plain[0]),
        rows.unit_rows(once.repeat(11, 1), plain[0]),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_at_the_ends_of_the_range(dtype, poisoned, chunk):
    """Zero, subnormal, tiny and huge rows: everything finite, and as exact as for others."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    # the interpreter takes a subnormal bfloat16 for zero
    below = 1 if dtype == torch.bfloat16 else 64
    sizes = torch.tensor(
        [0, tiny / below, tiny, tiny * 64, 1, largest / 64, largest, largest], dtype=torch.float64
    )
    z1 = torch.randn(8, 80, dtype=torch.float64)
    z1 = z1 / z1.abs().amax(1, keepdim=True) * sizes.unsqueeze(1)
    z1 = torch.where(z1.abs() < tiny / below, 0, z1).to(dtype)
    z1[7], z2 = largest, z1.flip(0)
    z2[3, 40:] = 0  # a chunk of zeros after others, and before
    z2[4, :40] = 0
    f, scale, inv_norm, pos = rows.unit_rows(z1, z2)
    assert all(x.isfinite().all() for x in (f, inv_norm, pos))
    assert inv_norm[0] == 0
    assert pos[0] == pos[7] == 0
    assert not f[0].any()
    if dtype != torch.float64:
        unit = torch.nn.functional.normalize(
            torch.cat([z1, z2]).double(), dim=1, eps=0
        ).nan_to_num()
        assert dtype != torch.float32 or error(f, unit) < 1e-6
        assert error(pos, (unit[:8] * unit[8:]).sum(1).repeat(2)) < 1e-6
    else:  # no wider dtype to compare with
        assert ((f.norm(dim=1) - 1).abs() < 1e-13).tolist() == [False, *[True] * 14, False]
    eager = Features.make(torch.cat([z1, z2]), "cosine")
    assert ((inv_norm - eager.inv_norm).abs() <= 1e-5 * eager.inv_norm).all()

    d, q = torch.randn(16, 80, dtype=inv_norm.dtype), torch.rand(8, dtype=inv_norm.dtype)
    d *= 1e-6
    rows.finish_rows(d, f, scale_of(scale), inv_norm, q * 1e-6)
    assert not d.isnan().any()
    assert not d[0].any()


@pytest.mark.parametrize("dim", [1, 17, 64])
def test_rows_as_tf32_numbers(dim, chunk, poisoned):
    """The nearest ones, the larger of two, of rows of any stride; NaN stays NaN."""
    f = torch.randn(37, dim + 5)[:, :dim]
    f[3].view(torch.int32).fill_(0x7FFFFFFF)
    out = rows.rounded_rows(f)
    spacing = 2.0 ** (f.double().abs().log2().floor() - 10)
    nearest = (f.double().abs() / spacing + 0.5).floor() * spacing * f.sign()
    assert torch.equal(out.nan_to_num(7).double(), nearest.nan_to_num(7))
    assert out[3].isnan().all()
    assert out.stride(0) % 4 == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(dtype, value, chunk):
    """As in torch: the row, its scalars and its gradient become NaN, and no other row does."""
    z1, z2 = views(4, 70, dtype)
    z1[1, 50] = value
    z2[2] = value
    f, scale, inv_norm, pos = rows.unit_rows(z1, z2)
    want = expected(z1, z2, inv_norm.dtype)
    for got, row in zip((f, inv_norm, pos), want, strict=True):
        assert torch.equal(got.isnan(), row.isnan())
    assert pos.isnan().tolist() == [False, True, True, False] * 2
    d, q = torch.ones(8, 70, dtype=inv_norm.dtype), torch.ones(4, dtype=inv_norm.dtype)
    d[3, 7] = value
    rows.finish_rows(d, f, scale_of(scale), inv_norm, q)
    broken = d.isnan().any(1) | d.isinf().any(1)
    # 1 and 6, their partners, and 3
    assert broken.tolist() == [
        False,
        True,
        True,
        True,
        False,
        True,
        True,
        False,
    ]


def test_as_the_cpu_backend_has_it():
    from alphacl_fast.backend import cpu

    if cpu.load_error():
        pytest.skip(cpu.load_error())
    for dtype in DTYPES:
        z1, z2 = views(5, 50, dtype)
        z1[3] = 0
        for a, b in zip(rows.unit_rows(z1, z2), cpu.unit_rows(z1, z2), strict=True):
            torch.testing.assert_close(a, b)


ROW_STEPS = {  # params and vectors
    "exp_rows": [  # params: ε, margin, squared, τ in front
        ((1.0, 0.0, 0.0, 0.0), 3),
        ((0.3, -0.5, 0.0, 1.0), 3),
        ((0.0, 0.0, 0.0, 0.0), 3),
        ((0.0, 1.0, 1.0, 0.0), 3),
    ],
    "exp_rows_with_dtau": [((1.0, 0.0, 0.0, 0.0), 4), ((0.0, 1.0, 1.0, 0.0), 4)],
    "exp_dtau_in_front": [
        ((1.0, 0.5, 0.0, 1.0), 4),
        ((0.0, 0.0, 0.0, 1.0), 4),
        ((0.0, 1.0, 1.0, 1.0), 4),
    ],
    "weight_rows": [((0.0,), 2), ((0.0,), 3), ((0.1,), 2), ((0.1,), 3)],
    "weight_rows_through_alpha": [((0.0,), 3), ((0.1,), 3)],
    "newton": [((-1.0, -0.5), 5), ((2.0, 2.0), 5), ((1.3, 1.3), 5)],
    "min_player_rows": [((), 4)],
    "min_player_rows_through_alpha": [((), 6)],
    "start_at_normal_tail": [((), 5)],
    "start_at_mean": [((), 4)],
    "newton_bracket": [((0.01, 0.7), 1)],
    "low_of_each": [((2.0, 100.0), 1)],
    "means_of_sums": [((), 4)],
    "uniform_rows": [((), 1)],
    "linear_rows": [((), 3)],
    "outer_rows": [((), 3)],
    "unnormalized_rows": [((), 2)],
    "scaled_shift": [((), 1)],
    "pair_dtau_rows": [((), 2)],
    "siglip_start": [((10.0, -3.0, 10.0), 2)],  # params: scale, bias, the scale of the sweeps
    "siglip_rows": [((10.0, -3.0), 2), ((0.0, -10.0), 2)],
    "siglip_slopes": [((10.0, -3.0, 10.0), 3), ((0.0, -10.0, 2.0**-60), 3)],
}


def row_vectors(step, count, n, dtype):
    """Vectors like those of a batch: brackets contain, means are of squares, sums are positive."""
    vectors = list(torch.rand(count, n, dtype=torch.float64) * 1.8 + 0.1)
    if step == "newton":
        vectors[3], vectors[4] = vectors[2] - vectors[3], vectors[2] + vectors[4]
        vectors[0][:2] = 1.0  # done
    if step == "start_at_normal_tail":
        vectors[2] = vectors[1].square() + vectors[2] * 0.1
        vectors[3], vectors[4] = (
            torch.tensor(x, dtype=torch.float64).expand(n) for x in (0.01, 0.3)
        )
    if step.startswith("weight"):
        vectors[-2][3] = 0.0  # no weight at all
    return [v.to(dtype) for v in vectors]


def test_every_row_step_is_listed():
    assert ROW_STEPS.keys() == objectives.ROW_STEPS.keys()


@pytest.mark.parametrize("step", ROW_STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [5, 200])
def test_row_step(step, dtype, n, poisoned):
    """As the plain function: to rounding in float64, and in float32 as well as PyTorch."""
    formula = objectives.ROW_STEPS[step]
    outputs = formula.outputs
    for params, count in ROW_STEPS[step]:
        vectors = row_vectors(step, count, n, dtype)
        tau = torch.tensor(0.3, dtype=dtype)
        got = rows.row_step(
            tuple(vectors), tau, 30, 7, n, trace.row_function(step, params, count), len(outputs)
        )
        assert got.shape == (len(outputs), n)
        exact, eager = (
            formula([v.to(d) for v in vectors], objectives.BatchNumbers(tau.to(d), 30, 7), params)
            for d in (torch.float64, dtype)
        )
        for name, ours, truth, theirs in zip(outputs, got, exact, eager, strict=True):
            if name == "done":
                assert torch.equal(ours, theirs.to(dtype))
                continue
            assert error(ours, truth) <= 2 * error(theirs, truth) + 4 * EPS[dtype], (name, params)


def test_row_step_reads_expanded_and_strided_vectors():
    step, params = "start_at_mean", ()
    t_max, mean = torch.rand(2, 9), torch.rand(9, 2)
    vectors = (t_max[0], mean[:, 1], torch.tensor(-1.0).expand(9), torch.tensor(2.0).expand(9))
    ours = rows.row_step(
        vectors, torch.tensor(1.0), 3, 1, 9, trace.row_function(step, params, 4), 1
    )
    theirs = objectives.ROW_STEPS[step](
        vectors, objectives.BatchNumbers(torch.tensor(1.0), 3, 1), params
    )
    torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize("form", ["PLAIN", "CONSTANT", "ONLINE", "T_MAX"])
@pytest.mark.parametrize("slices", [1, 2, 37])
def test_reduce_splits(form, slices, poisoned):
    n, sums, largest = 200, 0 if form == "T_MAX" else 2, form in ("ONLINE", "T_MAX")
    x = torch.rand(slices, sums + largest, n + 3, dtype=torch.float64)[:, :, 3:]
    if largest:
        x[:, 0] = x[:, 0] * 1000 - 500
        x[0, :, 0] = 0  # a split that met no pair
        x[0, 0, 0] = -torch.inf
    out = torch.empty(sums + (form != "PLAIN"), 2 * n, dtype=torch.float64)[:, :n]
    rows.reduce_splits(x, out, form, 0.25)
    if form == "PLAIN":
        want = x.sum(0)
    elif form == "CONSTANT":
        want = torch.cat([torch.full((1, n), 0.25), x.sum(0)])
    else:
        top = x[:, :1].amax(0)
        factor = torch.where(top > -torch.inf, (x[:, :1] - top).exp(), 0.0)
        want = torch.cat([top, (x[:, 1:] * factor).sum(0)])
    torch.testing.assert_close(out, want.to(out.dtype), rtol=1e-13, atol=0)


def test_sums_of_many_slices_are_compensated():
    x = torch.rand(1000, 1, 5) + 100
    out = torch.empty(1, 5)
    rows.reduce_splits(x, out, "PLAIN", 0.0)
    assert error(out, x.double().sum(0)) <= 1.2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [300, 5000])
def test_scaled_weights(dtype, n, poisoned):
    weight, shift = torch.randn(n, dtype=dtype), torch.rand(n, dtype=dtype)
    out, largest = rows.scaled_weights(weight, shift, 0.5)
    torch.testing.assert_close(out, weight * (0.5 - shift).exp())
    assert torch.equal(largest, out.abs().amax())
    same, largest = rows.scaled_weights(weight, None, 0.0)
    assert same is weight
    assert torch.equal(largest, weight.abs().amax())


#: Capability and dtype that a kernel for vectors is compiled for: one each in turn; `make test-all`
#: compiles every kernel for all of them.
TARGETS = ((80, "*fp32"), (90, "*fp32"), (90, "*fp64"), (100, "*fp32"))


def compile_everything():
    """Resources by kernel, capability, dtype and size; production tiles."""
    from tools.resources import compile_for, occupancy

    cases = [(90, kind, 4096) for kind in ("bf16", "fp32", "fp64")]
    cases += [
        (90, "fp64", 3),
        (90, "bf16", 65536),
        *((capability, "bf16", 128) for capability in (80, 90, 100)),
    ]
    found = {}
    for capability, kind, dim in cases:
        config = rows.tile(dim)
        warps, wide = config.pop("num_warps"), "*fp64" if kind == "fp64" else "*fp32"
        z, vectors = f"*{kind}", {"inv_norm_ptr": wide, "n_pairs": "i32"}
        strides = dict.fromkeys(("stride1", "stride2", "stride"), "i32")
        f = {"f_ptr": z, "scale_ptr": "*fp32" if kind == "bf16" else None, "stride": "i32"}
        normalize = {"z1_ptr": z, "z2_ptr": z, "pos_ptr": wide, **f, **vectors, **strides}
        finish = {"d_ptr": wide, "q_ptr": wide, **f, **vectors}
        both = ("stride", "out_stride")
        rounding = {"f_ptr": z, "out_ptr": z, "rows": "i32", **dict.fromkeys(both, "i32")}
        kernels = [
            (rows.unit_rows_kernel, normalize, {}, strides),
            (rows.finish_rows_kernel, finish, {"BOTH": True}, ("stride",)),
            (rows.rounded_rows_kernel, rounding, {}, both),
        ]
        for fn, signature, fixed, aligned in kernels if kind == "fp32" else kernels[:2]:
            divisible = aligned if dim % 16 == 0 else ()
            r = compile_for(
                fn,
                signature,
                {"DIM": dim, **config, **fixed},
                capability,
                num_warps=warps,
                divisible=divisible,
            )
            found[f"{r.name} {capability} {kind} {dim}"] = {
                "spills": r.spill_bytes,
                "stack": r.stack,
                "blocks": occupancy(r),
                "threads": r.threads,
                "loads": r.count(r"^LDG\..*128"),
                "stores": r.count(r"^STG\..*128"),
            }
    with mock.patch("tools.resources.inspect_ptx", assembled):
        for turn, (capability, kind) in enumerate(TARGETS):
            for k, (fn, signature, constants) in enumerate(vector_kernels(kind)):
                if is_due(k - turn, len(TARGETS)):
                    r = compile_for(fn, signature, constants, capability, attrs={})
                    found[f"{fn.__name__} {capability} {kind} {len(found)}"] = {
                        "spills": r["spill_bytes"],
                        "stack": r["stack"],
                    }
    return found


def assembled(ptx, capability, **launch):
    """What ptxas says of a kernel; its opcodes, which take longest to read, do not matter here."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    from tools.resources import ptxas_log

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        target = f"--gpu-name={sm_arch_from_capability(capability)}"
        command = [get_ptxas(capability).path, "-v", target, source.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True)
    return ptxas_log(log.stderr + log.stdout)


def vector_kernels(kind):
    """(kernel, types, constants) of every form of the kernels for vectors."""
    numbers = dict.fromkeys(("n_neg", "divisor", "anchors", "out_stride"), "i32")
    for step, cases in ROW_STEPS.items():
        for params, count in cases:
            vectors = {f"v{k}_ptr": kind if k < count else None for k in range(rows.MOST_VECTORS)}
            signature = {**vectors, "tau_ptr": kind, "out_ptr": kind, **numbers}
            constants = {
                "FUNCTION": trace.row_function(step, params, count), "STRIDES": (1,) * count,
                "OUTPUTS": len(objectives.ROW_STEPS[step].outputs), "BLOCK": rows.BLOCK,
            }  # fmt: skip
            yield rows.row_step_kernel, signature, constants
    names = ("slices", "anchors", "slice_stride", "slice_row", "out_row")
    numbers = dict.fromkeys(names, "i32") | {"constant_shift": "fp32"}
    for form, sums in (("T_MAX", 0), ("ONLINE", 2), ("CONSTANT", 1), ("PLAIN", 3)):
        constants = {
            "FORM": form,
            "SUMS": sums,
            "BLOCK_SLICES": rows.BLOCK_SLICES,
            "BLOCK": rows.BLOCK,
        }
        yield rows.reduce_splits_kernel, {"slices_ptr": kind, "out_ptr": kind, **numbers}, constants
    for shift in (kind, None):
        signature = {"weight_ptr": kind, "shift_ptr": shift, "out_ptr": kind, "largest_ptr": kind}
        constants = {"ROWS": rows.ROWS_OF_WEIGHTS, "BLOCK": rows.BLOCK_OF_WEIGHTS}
        yield (
            rows.scaled_weights_kernel,
            {**signature, "anchors": "i32", "constant_shift": "fp32"},
            constants,
        )


@pytest.fixture(scope="module")
def compiled():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__],
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_compiled_for_each_generation(compiled):
    assert len(compiled) == 17 + (len(TARGETS) if FULL else 1) * (
        sum(map(len, ROW_STEPS.values())) + 6
    )
    for name, found in compiled.items():
        assert found["spills"] == found["stack"] == 0, name
        if "loads" in found:
            assert found["blocks"] * found["threads"] >= 256, name
            if not name.endswith(" 3"):
                assert found["loads"] > 0, name
                assert found["stores"] > 0, name


@pytest.mark.parametrize(("kind", "bytes_per_number"), [("bf16", 2), ("fp32", 4), ("fp64", 8)])
def test_a_row_that_fits_is_read_once(compiled, kind, bytes_per_number):
    """At 4096 features a thread of 256 holds 16 numbers of each row, in as few loads of 16
    bytes.
    """
    loads = 2 * 16 * bytes_per_number // 16
    assert compiled[f"unit_rows_kernel 90 {kind} 4096"]["loads"] == loads
    gradient = 2 * 16 * max(bytes_per_number, 4) // 16
    assert compiled[f"finish_rows_kernel 90 {kind} 4096"]["loads"] == loads + gradient


if __name__ == "__main__":
    print(json.dumps(compile_everything()))
