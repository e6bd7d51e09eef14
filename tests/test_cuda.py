"""The CUDA kernels (csrc/cuda), compiled for the host and run on an emulated GPU,
against the oracle."""

import ctypes
import itertools
import os

import pytest
import torch
from family import (
    BUILT_IN,
    MODES,
    in_turn,
    is_due,
    loss_and_grads,
    member_id,
    pair,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from alphacl_fast import objectives, ops
from alphacl_fast.backend import blocked, cuda, gpu
from alphacl_fast.bundles import Dtype, PairFunction, Pairing, Rows, RowScalars, Term, Weight
from alphacl_fast.functional import REDUCTIONS, SIMILARITIES, alpha_cl_loss

pytestmark = pytest.mark.skipif(
    not cuda.emulated(), reason="no emulated library (tests/conftest.py says why)"
)

#: 140 rows: three tiles, the last one ragged, and a ring in parts.
PAIRS = 70
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
CODES = {
    "bf16": Dtype.BFLOAT16,
    "fp16": Dtype.FLOAT16,
    "tf32": Dtype.TFLOAT32,
    "fp32": Dtype.FLOAT32,
    "fp64": Dtype.FLOAT64,
}


def schedule(seed):
    """How the emulated GPU orders the threads of a block: 0 ascending, 1 descending, else
    random.
    """
    ctypes.CDLL(os.environ["ALPHACL_CUDA_EMULATED"]).alphacl_cuda_schedule(seed)


def iterates(member):
    return objectives.make(*member).kind in ("square", "gamma")


def compared(z1, z2, member, backend="cuda", **setting):
    """Relative errors of [loss, dz1, dz2(, dτ)] against float64 on the same inputs."""
    truth = loss_and_grads(z1.double(), z2.double(), *member, backend="reference", **setting)
    ours = loss_and_grads(z1, z2, *member, backend=backend, **setting)
    return [relative_error(a, b) for a, b in zip(ours, truth, strict=True)]


@pytest.mark.parametrize("member", BUILT_IN, ids=member_id)
@pytest.mark.parametrize(("negatives", "symmetric"), MODES)
def test_float64(member, negatives, symmetric, poisoned):
    """With one width and one reduction for each similarity; under `make test-all` with all."""
    turn = BUILT_IN.index(member) + MODES.index((negatives, symmetric))
    mode = {"negatives": negatives, "symmetric": symmetric}
    for k, similarity in enumerate(SIMILARITIES):
        # Gradients in registers, or weights for a vendor product.
        dims, reductions = in_turn((20, 40), turn + k), in_turn(REDUCTIONS, turn + k)
        for dim, reduction in itertools.product(dims, reductions):
            # of long rows one pair is all
            views = [z if similarity == "cosine" else z / dim**0.5 for z in pair(PAIRS, dim)]
            errors = compared(*views, member, similarity=similarity, reduction=reduction, **mode)
            assert max(errors) < 1e-10, (similarity, dim, reduction, errors)


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("member", BUILT_IN, ids=member_id)
def test_other_dtypes(mode, member, poisoned):
    """Every kind on tensor cores, in rows of every length that has a kernel of its own.

    One mode and one length, so that every two of member, dtype, mode and length meet; all under
    `make test-all`.
    """
    m, k = BUILT_IN.index(member), [*DTYPES].index(mode)
    modes, dims = in_turn(MODES, m + k), in_turn((40, 100, 200, 300), m // 4 + k)
    cases = [(*kind_of_negatives, dim) for kind_of_negatives in modes for dim in dims]
    for negatives, symmetric, dim in cases:
        z1, z2 = pair(PAIRS, dim, DTYPES[mode])
        if member[1].get("exponent", 4) < 2:
            # away from d² = 0, where the slope of (d²)^0.75 has no bound
            z1, z2 = pair(PAIRS, dim, DTYPES[mode], noise=2.0)
        # a mean's leaves float16's range
        setting = {
            "negatives": negatives,
            "symmetric": symmetric,
            "reduction": "sum",
        }
        truth = loss_and_grads(z1.double(), z2.double(), *member, backend="reference", **setting)
        if mode == "tf32":
            setting["precision"] = "tf32"
        ours = loss_and_grads(z1, z2, *member, backend="cuda", **setting)
        # Inputs are exact in half precision, and sums are float32; gradients are of the input's
        # dtype.
        bound = 2e-3 if mode == "tf32" else 2e-5
        assert relative_error(ours[0], truth[0], floor=0.1) < bound, (negatives, dim)
        for o, t in zip(ours[1:3], truth[1:3], strict=True):
            eps = {"bf16": 4e-3, "fp16": 1e-3, "tf32": 2e-3, "fp32": 2e-5}[mode]
            if mode == "tf32" and objectives.make(*member).kind in ("hinge", "square"):
                # Which side of the kink a pair is on; the gradient through α feels it most.
                eps = 2e-2 if member[1].get("detach_alpha", True) else 5e-2
            error = float((o.double() - t).norm() / t.norm().clamp(min=1e-5))
            assert error < eps, (negatives, dim, error)


sizes = {"n": st.integers(2, 150), "d": st.integers(1, 300), "seed": st.integers(0, 2**32)}
modes = st.sampled_from(MODES)
search = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@search
@given(
    member=st.sampled_from(BUILT_IN),
    mode=modes,
    similarity=st.sampled_from(SIMILARITIES),
    reduction=st.sampled_from(REDUCTIONS),
    symmetric_tiles=st.booleans(),
    **sizes,
)
def test_any_shape(n, d, seed, member, mode, similarity, reduction, symmetric_tiles):
    z1, z2 = (z / d**0.5 for z in pair(n, d, seed=seed))
    setting = {"negatives": mode[0], "symmetric": mode[1], "similarity": similarity}
    setting["reduction"] = reduction
    truth = loss_and_grads(z1, z2, *member, backend="reference", **setting)
    with cuda.symmetric(symmetric_tiles):
        ours = loss_and_grads(z1, z2, *member, backend="cuda", **setting)
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a, b, floor=max(1e-3, 1e-3 * float(b.abs().max()))) < 1e-8


@search
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    mode=modes,
    similarity=st.sampled_from(["cosine", "dot"]),
    **sizes,
)
def test_any_shape_in_float32_and_half(n, d, seed, dtype, mode, similarity):
    views = [(z / d**0.5).to(dtype) for z in pair(n, d, seed=seed)]
    setting = {"negatives": mode[0], "symmetric": mode[1], "similarity": similarity}
    setting["reduction"] = "sum"
    truth = loss_and_grads(*(z.double() for z in views), "infonce", backend="reference", **setting)
    ours = loss_and_grads(*views, "infonce", backend="cuda", **setting)
    for a, b in zip(ours, truth, strict=True):
        # Weights are rounded once, and so is a gradient: by half of eps each.
        bound = 2e-5 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
        assert relative_error(a, b, floor=0.1) < bound


@pytest.mark.parametrize("dim", [40, 200])
@pytest.mark.parametrize("member", [m for m in BUILT_IN if objectives.make(*m).kind], ids=member_id)
def test_forms_agree(member, dim):
    """Sums of symmetric tiles and of others are the same but for rounding.

    In every second setting, which changes from member to member; in all under `make test-all`.
    """
    pairs = PAIRS // 2 if iterates(member) else PAIRS
    settings = [(*mode, "cosine") for mode in MODES] + [("two_view", True, "euclidean")]
    turn = BUILT_IN.index(member) + (dim == 200)
    for negatives, symmetric, similarity in (
        s for k, s in enumerate(settings) if is_due(turn + k, 2)
    ):
        z1, z2 = pair(pairs, dim, torch.bfloat16)
        setting = {
            "negatives": negatives,
            "symmetric": symmetric,
            "similarity": similarity,
            "backend": "cuda",
        }
        with cuda.symmetric(False):
            row_block = loss_and_grads(z1, z2, *member, **setting)
        with cuda.symmetric(True):
            both = loss_and_grads(z1, z2, *member, **setting)
        for a, b in zip(both, row_block, strict=True):
            bound = 4e-3 if a.dtype == torch.bfloat16 else 1e-5
            assert relative_error(a, b) < bound, (negatives, similarity)


@pytest.mark.parametrize("member", BUILT_IN, ids=member_id)
def test_ids_and_gaps_over_several_tiles(member, poisoned):
    """In float64 with both, and symmetric tiles of bfloat16 against others; settings in turn."""
    turn = BUILT_IN.index(member)
    pairs = PAIRS // 2 if iterates(member) else PAIRS
    ids = torch.arange(pairs) * 7 % 12
    (dim,), (mode,) = in_turn((20, 40), turn)[:1], in_turn(MODES, turn // 2)[:1]
    (similarity,) = in_turn(SIMILARITIES, turn)[:1]
    views = [z if similarity == "cosine" else z / dim**0.5 for z in pair(pairs, dim)]
    setting = {"negatives": mode[0], "symmetric": mode[1], "similarity": similarity}
    for left_out in in_turn(({"ids": ids}, {"max_gap": -0.9}), turn) + [
        {"ids": ids, "max_gap": -0.9}
    ]:
        assert max(compared(*views, member, **setting, **left_out)) < 1e-10, left_out
    narrow = [z.bfloat16() for z in views]
    setting |= {"ids": ids, "max_gap": -0.9, "backend": "cuda"}
    with cuda.symmetric(False):
        row_block = loss_and_grads(*narrow, *member, **setting)
    with cuda.symmetric(True):
        both = loss_and_grads(*narrow, *member, **setting)
    for a, b in zip(both, row_block, strict=True):
        assert relative_error(a, b) < (4e-3 if a.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("dim", [40, 100, 300])
def test_ids_in_other_dtypes(mode, dim, poisoned):
    """The general kernels serve what fast ones would without ids.

    One of two members, which changes with mode and dim; both under `make test-all`.
    """
    z1, z2 = pair(PAIRS, dim, DTYPES[mode])
    setting = {"ids": torch.arange(PAIRS) % 9, "reduction": "sum"}
    turn = [*DTYPES].index(mode) + dim // 100
    for member in in_turn((("infonce", {}), ("alpha_direct", {})), turn):
        wide = z1.double(), z2.double()
        truth = loss_and_grads(*wide, *member, backend="reference", **setting)
        precision = {"precision": "tf32"} if mode == "tf32" else {}
        ours = loss_and_grads(z1, z2, *member, backend="cuda", **setting, **precision)
        assert relative_error(ours[0], truth[0], floor=0.1) < (2e-3 if mode == "tf32" else 2e-5)
        for o, t in zip(ours[1:3], truth[1:3], strict=True):
            eps = {"bf16": 4e-3, "fp16": 1e-3, "tf32": 2e-3, "fp32": 2e-5}[mode]
            assert relative_error(o.double(), t) < eps


def test_which_kernels_serve_ids():
    """A call of the fast kernels goes to the general ones, and to no kernel of hopper.h."""
    z = torch.randn(128, 64, dtype=torch.bfloat16)
    tau = torch.tensor(0.5)
    function = PairFunction("exp", (), tau, (-2.0, 2.0))
    scalars = RowScalars(torch.zeros(128))
    plain = Rows(z), Pairing(0, 0, 128), function, scalars, None, (Term.SHIFT, Term.F), ""
    with cuda.hopper(True):
        hopper = cuda._Sweep(*plain).tile_rows
        for left_out in (
            {"ids": torch.zeros(128, dtype=torch.int32)},
            {"largest_t": torch.zeros(128)},
        ):
            pairing = plain[1]._replace(**left_out)
            assert cuda._Sweep(plain[0], pairing, *plain[2:]).tile_rows == 64
    assert hopper == 128


@pytest.mark.parametrize("negatives", ["two_view", "one_view", "cross_view"])
def test_slices_come_in_runs(negatives, monkeypatch):
    """Partial sums, and weights of wide rows, that do not fit into the workspace at once."""
    z1, z2 = pair(200, 300, torch.bfloat16)
    whole = loss_and_grads(z1, z2, "infonce", backend="cuda", negatives=negatives)
    monkeypatch.setattr(gpu, "WORKSPACE", 1)
    parts = loss_and_grads(z1, z2, "infonce", backend="cuda", negatives=negatives)
    for a, b in zip(parts, whole, strict=True):
        assert relative_error(a, b) < (4e-3 if a.dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("mode", ["bf16", "tf32", "fp64"])
@pytest.mark.parametrize(
    "member", [("infonce", {}), ("triplet", {}), ("alpha_square", {})], ids=member_id
)
def test_results_do_not_depend_on_the_order_of_threads(mode, member, poisoned):
    """Bit for bit: what one thread leaves in shared memory another reads only behind a barrier."""
    dtype = {"fp64": torch.float64, **DTYPES}[mode]
    z1, z2 = pair(PAIRS, 24, dtype)
    precision = {"precision": "tf32"} if mode == "tf32" else {}
    results = []
    try:
        for seed in (0, 1, 7):
            schedule(seed)
            results.append(loss_and_grads(z1, z2, *member, backend="cuda", **precision))
    finally:
        schedule(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "layout",
    ["odd row length", "odd offset", "columns of a wider matrix", "transposed", "expanded"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_in_memory(layout, dtype):
    """Rows that no 16-byte copy can read, and rows that are not next to each other."""

    def laid_out(z):
        if layout == "odd row length":
            return torch.cat([z, z[:, :1]], 1)[:, :-1]
        if layout == "odd offset":
            return torch.cat([z.new_zeros(1), z.flatten()])[1:].view(z.shape)
        if layout == "columns of a wider matrix":
            return torch.cat([z, z], 1)[:, : z.shape[1]]
        return z.t().contiguous().t() if layout == "transposed" else z[:1].expand(len(z), -1)

    z1, z2 = (laid_out(z) for z in pair(20, 17, dtype))
    for similarity in ("cosine", "dot"):
        errors = compared(z1, z2, ("infonce", {}), similarity=similarity)
        assert (
            max(errors) < {torch.bfloat16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
        ), similarity


@pytest.mark.parametrize("mode", DTYPES)
def test_small_shared_memory(mode, monkeypatch):
    """Rows that other GPUs hold whole come in chunks where there is less shared memory."""
    library = ctypes.CDLL(os.environ["ALPHACL_CUDA_EMULATED"])
    assert {
        name: library.alphacl_cuda_largest_features(code) for name, code in CODES.items()
    } == cuda.LARGEST
    monkeypatch.setattr(
        cuda, "_in_chunks", lambda mode, dim, device: dim > cuda.LARGEST_OF_SMALL[mode]
    )
    for dim in (cuda.LARGEST_OF_SMALL[mode], cuda.LARGEST_OF_SMALL[mode] + 9):
        setting = {"precision": "tf32"} if mode == "tf32" else {}
        z1, z2 = pair(PAIRS, dim, DTYPES[mode])
        truth = loss_and_grads(
            z1.double(), z2.double(), "infonce", backend="reference", reduction="sum"
        )
        ours = loss_and_grads(z1, z2, "infonce", backend="cuda", reduction="sum", **setting)
        for o, t in zip(ours, truth, strict=True):
            assert (
                relative_error(o, t)
                < {"bf16": 4e-3, "fp16": 1e-3, "tf32": 2e-3, "fp32": 2e-5}[mode]
            )


def test_one_sided_gradients(poisoned):
    for negatives, symmetric in MODES:
        for dtype, bound in ((torch.float64, 1e-10), (torch.bfloat16, 4e-3)):
            views = pair(PAIRS, 24, dtype)
            for side in (0, 1):
                grads = []
                for backend, wide in (("reference", True), ("cuda", False)):
                    inputs = [z.double() if wide else z.clone() for z in views]
                    inputs[side].requires_grad_()
                    loss = alpha_cl_loss(
                        *inputs,
                        "alpha_direct",
                        temperature=0.3,
                        negatives=negatives,
                        symmetric=symmetric,
                        backend=backend,
                    )
                    grads += torch.autograd.grad(loss, inputs[side])
                assert float((grads[1].double() - grads[0]).norm() / grads[0].norm()) < bound


def test_rows_steps():
    """Normalisation and its derivative, of rows from denormal ones to 3e38 and an all-zero one."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        z1, z2 = pair(9, 37, dtype)
        z1[3] = 0
        if dtype != torch.float16:
            z1[4] *= 1e37
            z2[5] *= 1e-37
            z1[6] = z1[6].sign() * 3e38
            z2[7] = z2[7].sign() * 5e-39
        f, scale, inv_norm, pos = cuda.unit_rows(z1, z2)
        rows = torch.nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1, eps=0)
        rows = rows.nan_to_num(0.0)
        ours = f.double() if not len(scale) else f.double() * scale.double().unsqueeze(1)
        bound = 1e-13 if dtype == torch.float64 else 1e-6
        assert relative_error(ours, rows) < bound
        assert relative_error(pos, (rows[:9] * rows[9:]).sum(1).repeat(2)) < bound
        assert inv_norm[3] == 0
        assert torch.isfinite(inv_norm).all()
        d, q = torch.randn(18, 37, dtype=inv_norm.dtype), torch.rand(9, dtype=inv_norm.dtype)
        expected = d.double() - torch.cat([q, q]).double().unsqueeze(1) * rows.roll(9, 0)
        expected = (
            expected - rows * (rows * expected).sum(1, keepdim=True)
        ) * inv_norm.double().unsqueeze(1)
        both_anchors = torch.cat([q / 4, q - q / 4])
        other = d.clone()
        cuda.finish_rows(other, f, scale if len(scale) else None, inv_norm, both_anchors)
        cuda.finish_rows(d, f, scale if len(scale) else None, inv_norm, q)
        assert relative_error(other, d) < bound
        for a, b in zip(d, expected, strict=True):
            assert relative_error(a, b, floor=1e-30) < bound


def test_sweeps_alone_agree_with_blocked():
    """Terms and outputs that no objective asks for in this combination."""
    f, n = torch.randn(150, 20, dtype=torch.float64) / 3, 150
    tau = torch.tensor(0.4, dtype=torch.float64)
    scalars = RowScalars(*torch.rand(5, n, dtype=torch.float64))
    bias = -torch.rand(n, dtype=torch.float64)
    scale = torch.rand(n, dtype=torch.float64) + 0.5
    kinds = {
        "square": (),
        "sigmoid": (2.0,),
        "gibbs": (1.0,),
        "hinge": (0.3,),
        "logistic": (),
        "inverse": (4.0, 2.0, 1.0),
    }
    ids = torch.arange(n, dtype=torch.int32) % 11
    limits = torch.linspace(-0.9, 0.3, n, dtype=torch.float64).roll(40)
    layouts = (0, 75, n), (0, 0, n), (75, 75, n), (75, 0, 75), (60, 0, n)
    for (split, partner, anchors), left_out in itertools.product(layouts, (False, True)):
        pairing = Pairing(split, partner, anchors)
        if left_out:
            pairing = pairing._replace(ids=ids, largest_t=limits[:anchors])
        own = RowScalars(*(x[:anchors] for x in scalars))
        for kind, params in kinds.items():
            terms = (Term.DTAU, Term.DF_MOMENT, Term.F, Term.F_MOMENT, Term.DF)[
                kind in ("sigmoid", "hinge", "logistic") :
            ]
            operands = Rows(f, scale, bias), pairing, PairFunction(kind, params, tau), own
            outs = [b.row_sums(*operands, terms, "") for b in (blocked, cuda)]
            assert relative_error(outs[1], outs[0]) < 1e-12, (kind, split)
            outs = [
                b.pair_grad(*operands, Weight.F_PLUS_DF, terms, (0, n), "") for b in (blocked, cuda)
            ]
            for a, b in zip(outs[1], outs[0], strict=True):
                assert relative_error(a, b) < 1e-12, (kind, split)


def test_refusals(monkeypatch, tmp_path):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert "user's own" in cuda.unsupported(cpu, torch.float32, None, "custom:0")
    assert "bf16x3" in cuda.unsupported(cpu, torch.float32, "bf16x3", "exp")
    assert cuda.unsupported(gpu, torch.float32, None, "exp") == "needs a GPU, found none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "needs compute capability 8.0, not 7.5" in cuda.unsupported(
        gpu, torch.float32, None, "exp"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(cuda, "_load", lambda path: (None, None))
    monkeypatch.setattr(cuda, "_why_not", lambda device: "cannot run on this device: no code")
    assert cuda.unsupported(gpu, torch.float32, None, "exp").startswith("cannot run on this")
    monkeypatch.setattr(cuda, "_why_not", lambda device: None)
    monkeypatch.setattr(cuda, "_shared_memory", lambda device: 99 << 10)
    assert cuda.unsupported(gpu, torch.float32, None, "exp") is None
    assert (
        cuda.unsupported(gpu, torch.float64, None, "exp")
        == "needs 163 KB of shared memory a block for float64, got 99"
    )
    monkeypatch.setattr(cuda, "_shared_memory", lambda device: 64 << 10)
    assert "needs 99 KB of shared memory" in cuda.unsupported(gpu, torch.bfloat16, None, "exp")
    monkeypatch.undo()
    monkeypatch.setenv("ALPHACL_CUDA_EMULATED", "")
    assert "runs on GPUs, not cpu" in cuda.unsupported(cpu, torch.float32, None, "exp")
    assert "not mps" in cuda.unsupported(torch.device("mps"), torch.float32, None, "exp")
    load = cuda._load.__wrapped__
    monkeypatch.setattr(cuda, "FAILURE", tmp_path / "reason.txt")
    assert load("/nowhere/_cuda.abi3.so")[1].startswith(
        "not compiled: no library beside the package"
    )
    cuda.FAILURE.write_text("no nvcc")
    assert (
        load("/nowhere/_cuda.abi3.so")[1]
        == "not compiled: no nvcc; reinstall with nvcc on the PATH"
    )
    (tmp_path / "no.so").write_text("nothing")
    assert load(str(tmp_path / "no.so"))[1].startswith("cannot be loaded: ")
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setenv("ALPHACL_CUDA_EMULATED", "/nowhere/other.so")
    assert cuda.unsupported(cpu, torch.float32, None, "exp") == "needs torch 2.10, found 2.9.1"
    monkeypatch.undo()
    monkeypatch.setenv("ALPHACL_CUDA_EMULATED", "")
    with pytest.raises(
        ValueError, match="backend 'cuda' cannot serve this call: runs on GPUs, not cpu"
    ):
        ops.choose("cuda", cpu, torch.float32, None, "exp")
    rows, one = Rows(torch.empty(1).expand(2**31, 1)), torch.ones(())
    operands = rows, Pairing(0, 0, 1), PairFunction("exp", (), one), RowScalars(one)
    with pytest.raises(ValueError, match="the cuda backend takes at most 2147418111 rows"):
        cuda.row_sums(*operands, (Term.SHIFT, Term.F), "")
