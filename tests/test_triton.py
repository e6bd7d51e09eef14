"""The Triton kernels, interpreted: forms, tiles, splits, wide rows, dtypes.

The other tests are in test_backends.
"""

import copy
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
import triton.language as tl
from conftest import square_tile
from family import (
    MODES,
    gaussian_weight,
    in_turn,
    is_due,
    loss_and_grads,
    member_id,
    pair,
    relative_error,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton import jit
from triton.runtime.interpreter import GridExecutor

from alphacl_fast import FusedAlphaCLLoss, PairLoss, PairWeight, launches, ops
from alphacl_fast.backend import cuda, filling, gpu, triton
from alphacl_fast.bundles import PairFunction, Pairing, Rows, RowScalars, Term, Weight
from alphacl_fast.functional import alpha_cl_loss
from alphacl_fast.kernels import sweeps
from alphacl_fast.kernels.config import Tile
from alphacl_fast.kernels.rows import rounded_rows, rounded_to_tf32

#: Objectives whose second sweep reads every row scalar.
ALIGNED = [
    ("infonce", {}),
    ("alpha_direct", {"detach_alpha": False}),
    ("alpha_square", {"detach_alpha": False}),
    ("alpha_inverse", {"detach_alpha": False}),
]
SOURCE = (Path(__file__).parent.parent / "kernels/sweeps.py").read_text()
FORMS = [  # one objective for each form of a sweep
    ("infonce", {}),  # fixed base; τ learnable or small: running maximum
    ("alpha_direct", {"detach_alpha": False}),  # f and df, and sums for τ in the second sweep
    ("triplet", {}),  # one sweep with sums
    ("alpha_square", {"detach_alpha": False}),  # maximum, offsets, four sums
]


def set_tile(monkeypatch, *shape, symmetric_tiles=False, multiprocessors=3):
    rows, cols, features = shape
    shape = Tile(rows, cols, features, warps=4, stages=1, symmetric=symmetric_tiles)
    monkeypatch.setattr(triton, "tile", lambda sweep, mode, dim, n, device: shape)
    monkeypatch.setattr(gpu, "multiprocessors_of", lambda device: multiprocessors)
    launches.forget()


def assert_equal(z1, z2, member, bound=1e-10, **setting):
    truth = loss_and_grads(z1.double(), z2.double(), *member, backend="reference", **setting)
    ours = loss_and_grads(z1, z2, *member, backend="triton", **setting)
    for name, a, b in zip(("loss", "dz1", "dz2", "dtau"), ours, truth, strict=False):
        assert relative_error(a, b) < bound, (name, relative_error(a, b))


#: (n, negatives, symmetric, member, symmetric tiles): every two values meet; under `make test-all`
#: all do. 7 and 8 pairs make 4 tiles, 3 of one_view: even and odd rings, with a ragged and a full
#: last tile.
CASES = [
    (n, *mode, member, tiles)
    for n, (k, mode), (m, member), tiles in itertools.product(
        (7, 8), enumerate(MODES), enumerate(FORMS), (False, True)
    )
    if is_due(n - 7 + k + tiles, 2) and (k == 0 or is_due(tiles + k // 2 + m, 2))
]


@pytest.mark.parametrize(
    ("n", "negatives", "symmetric", "member", "symmetric_tiles"),
    CASES,
    ids=["-".join(map(str, (*mode, member_id(m), tiles))) for *mode, m, tiles in CASES],
)
def test_forms(n, negatives, symmetric, member, symmetric_tiles, monkeypatch, poisoned):
    set_tile(monkeypatch, 4, 4, 8, symmetric_tiles=symmetric_tiles)
    taus = (0.5, 1e-3) if member[0] == "infonce" else (0.5,)  # fixed and running bases
    for tau in taus:
        assert_equal(
            *pair(n, 6), member, negatives=negatives, symmetric=symmetric, tau=tau, bound=1e-9
        )


@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (2, 16), (16, 2)])
@pytest.mark.parametrize(("negatives", "symmetric"), MODES)
def test_unequal_tiles(shape, negatives, symmetric, monkeypatch, poisoned):
    set_tile(monkeypatch, *shape, 8)
    assert_equal(*pair(11, 7), ("infonce", {}), negatives=negatives, symmetric=symmetric)


@pytest.mark.parametrize("member", FORMS, ids=member_id)
@pytest.mark.parametrize(
    ("negatives", "similarity"), [("two_view", "euclidean"), ("cross_view", "cosine")]
)
def test_programs_share_a_ring(member, negatives, similarity, monkeypatch, poisoned):
    set_tile(monkeypatch, 4, 4, 8, multiprocessors=5)
    assert filling.splits_of(4, 4, 10, 4) == 2
    assert_equal(*pair(7, 6), member, negatives=negatives, similarity=similarity, tau=0.5)


def test_parts_that_do_not_divide_a_ring(monkeypatch, poisoned):
    set_tile(monkeypatch, 4, 4, 8, multiprocessors=5)
    assert filling.splits_of(5, 5, 10, 5) == 2
    assert_equal(*pair(9, 6), ("infonce", {}), tau=0.5)


@pytest.mark.parametrize("member", FORMS, ids=member_id)
@pytest.mark.parametrize(
    ("negatives", "symmetric", "similarity"),
    [
        ("two_view", True, "cosine"), ("one_view", True, "dot"), ("cross_view", True, "euclidean"),
        ("cross_view", False, "cosine"),
    ],
)  # fmt: skip
def test_wide_rows(member, negatives, symmetric, similarity, monkeypatch, poisoned):
    """More features than a tile holds: similarities in chunks, weights for cuBLAS in runs of
    blocks.
    """
    set_tile(monkeypatch, 4, 4, 4, multiprocessors=4)
    monkeypatch.setattr(gpu, "WORKSPACE", 2 * 4 * 14 * 8)  # two row blocks
    setting = {"negatives": negatives, "symmetric": symmetric, "similarity": similarity, "tau": 0.5}
    assert_equal(*pair(7, 7), member, **setting)


@pytest.mark.parametrize("tau", [0.3, 1e-3])
def test_symmetric_tiles_in_runs(tau, monkeypatch):
    """Ring distances in runs, so that the slots of a large n fit into the scratch."""
    set_tile(monkeypatch, 2, 2, 8, symmetric_tiles=True)
    monkeypatch.setattr(gpu, "WORKSPACE", 3 * 18 * 8)
    for negatives, symmetric in MODES:
        setting = {"negatives": negatives, "symmetric": symmetric, "tau": tau, "learn_tau": False}
        assert_equal(*pair(9, 6), ("infonce", {}), bound=1e-9, **setting)


def test_one_view_alone(monkeypatch, poisoned):
    """Only rows whose gradient is wanted are launched; sums of one sweep come from all anchors."""
    set_tile(monkeypatch, 4, 4, 8)
    launched = []
    launch = triton._Sweep.launch

    def spy(self, given):
        launched.append((given.blocks, given.gradient))
        launch(self, given)

    monkeypatch.setattr(triton._Sweep, "launch", spy)
    z1, z2 = pair(8, 6)
    alpha_cl_loss(z1.requires_grad_(), z2, "infonce", temperature=0.3, backend="triton")
    assert launched[1:] == [(2, gpu.Gradient.PRODUCT)]
    launched.clear()
    alpha_cl_loss(z1, z2, "triplet", backend="triton")
    assert launched == [(2, gpu.Gradient.PRODUCT), (2, gpu.Gradient.NONE)]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("features", [16, 8])
@pytest.mark.parametrize("symmetric_tiles", [False, True])
def test_dtypes(dtype, bound, features, symmetric_tiles, monkeypatch):
    """With one of two members, which changes with the setting; under `make test-all` with both."""
    set_tile(monkeypatch, 16, 16, features, symmetric_tiles=symmetric_tiles)
    z1, z2 = pair(20, 16, dtype)
    turn = (dtype == torch.bfloat16) + features // 8 + symmetric_tiles
    for member in in_turn((("infonce", {}), ("alpha_direct", {"detach_alpha": False})), turn):
        assert_equal(z1, z2, member, bound=bound)


def test_equal_weights_stay_equal_in_bfloat16(monkeypatch):
    """Weights are divided by the largest row weight before rounding: constant weights lose
    nothing.
    """
    set_tile(monkeypatch, 16, 16, 16)
    f = torch.nn.functional.normalize(torch.randn(40, 16, dtype=torch.float64), dim=1).bfloat16()
    constant = PairWeight(lambda d: torch.ones_like(d) / 3, normalized=False)
    ours = loss_and_grads(f[:20], f[20:], constant, similarity="dot", backend="triton")
    truth = loss_and_grads(
        f[:20].double(), f[20:].double(), constant, similarity="dot", backend="reference"
    )
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a, b) < 4e-3  # the gradient's own dtype


def test_custom_functions_are_compiled_or_refused():
    z1, z2 = pair(8, 6)
    assert_equal(z1, z2, (PairWeight(gaussian_weight), {}))
    flipping = PairLoss(None, lambda gap: gap.flip(0).exp().flip(0))
    with pytest.raises(ValueError, match=r"backend 'triton' cannot serve this call: psi .*flip"):
        alpha_cl_loss(z1, z2, flipping, backend="triton")
    assert torch.isfinite(alpha_cl_loss(z1, z2, flipping))  # another backend serves it


def test_a_changed_constant_is_seen():
    class Slope:
        value = 1.0

    slope = Slope()
    loss = FusedAlphaCLLoss(
        PairLoss(None, lambda gap: torch.exp(slope.value * gap)), backend="triton"
    )
    z1, z2 = pair(8, 6)
    first = loss(z1, z2)
    slope.value = 2.0
    assert_equal(z1, z2, (loss.objective, {}))
    assert abs(float(loss(z1, z2) - first)) > 1e-3
    assert float(copy.deepcopy(loss)(z1, z2)) == float(loss(z1, z2))


def test_infinite_similarity_of_an_excluded_pair(monkeypatch):
    set_tile(monkeypatch, 8, 8, 8)
    z1, z2 = (z * 1e25 for z in pair(12, 6, torch.float32))
    z1[5] = 0
    z1[5, 0] = 3e38  # ⟨z, z⟩ overflows, its products with the others do not matter here
    z1[:5, 0] = z1[6:, 0] = z2[:, 0] = 0
    out = loss_and_grads(z1, z2, "triplet", similarity="dot", backend="triton")
    truth = loss_and_grads(
        z1.double(), z2.double(), "triplet", similarity="dot", backend="reference"
    )
    assert relative_error(out[1], truth[1]) < 1e-5


def test_refusals(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "runs on GPUs, not cpu" in triton.unsupported(cpu, torch.float32, None, "exp")
    assert "runs on GPUs, not mps" in triton.unsupported(
        torch.device("mps"), torch.float32, None, "exp"
    )
    gpu = torch.device("cuda")
    assert triton.unsupported(gpu, torch.float32, None, "exp") == "needs a GPU, found none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "needs compute capability 8.0, not 7.5" in triton.unsupported(
        torch.device("cuda"), torch.float32, None, "exp"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert triton.unsupported(torch.device("cuda"), torch.float32, "bf16x3", "exp") is None
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert triton._missing.__wrapped__() == "needs triton 3.6, found 3.5.1"
    monkeypatch.setattr(triton, "_missing", lambda: "triton is not installed")
    monkeypatch.setattr(cuda, "_shared_memory", lambda device: 0)
    monkeypatch.setattr(cuda, "_why_not", lambda device: None)
    name, why = ops.choose("auto", torch.device("cuda"), torch.float32, None, "exp")
    assert (name, "triton: triton is not installed" in why) == ("blocked", True)
    with pytest.raises(
        ValueError, match="backend 'triton' cannot serve this call: triton is not installed"
    ):
        ops.choose("triton", torch.device("cuda"), torch.float32, None, "exp")


def test_precision_crosses_the_operators(monkeypatch):
    seen = []
    original = gpu.arithmetic

    def spy(dtype, precision, device):
        seen.append(original(dtype, precision, device))
        return seen[-1]

    monkeypatch.setattr(gpu, "arithmetic", spy)
    z1, z2 = pair(8, 6, torch.float32)
    for precision in ("ieee", "tf32", "bf16x3", None):
        alpha_cl_loss(z1.requires_grad_(), z2, backend="triton", precision=precision)
    assert [a.similarities for a in seen[::2]] == ["ieee", "tf32", "bf16x3", "ieee"]
    assert seen[::2] == seen[1::2]


def test_ranges_and_partners_are_checked():
    with pytest.raises(ValueError, match="partner must be 0 or half of the rows"):
        gpu.regions_of(8, Pairing(0, 3, 8))
    with pytest.raises(ValueError, match="partner must be 0 or split"):
        gpu.regions_of(8, Pairing(4, 3, 8))
    with pytest.raises(ValueError, match="must hold whole views, rows 0 to 4, got 1 to 8"):
        gpu.regions_with_gradient(gpu.regions_of(8, Pairing(0, 4, 8)), 8, (1, 8), False)
    with pytest.raises(ValueError, match="cols must equal rows"):
        Tile(64, 32, 64, 4, 2, symmetric=True)


def test_square_tile_is_what_the_fixtures_mean():
    assert square_tile(8, 6) == Tile(8, 8, 8, 4, 1)


@jit
def _round_to_tf32(x_ptr, out_ptr):
    offs = tl.arange(0, 8)
    tl.store(out_ptr + offs, rounded_to_tf32(tl.load(x_ptr + offs)))


def test_weights_are_rounded_to_tf32():
    x = torch.tensor(
        [1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 3 * 2**-12, 3e38, torch.inf, -0.0]
    )
    out = torch.empty(8)
    _round_to_tf32[(1,)](x, out)
    expected = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-10, 3e38, torch.inf, -0.0])
    assert torch.equal(out[[0, 1, 2, 3, 4, 6, 7]], expected[[0, 1, 2, 3, 4, 6, 7]])
    assert abs(float(out[5]) / 3e38 - 1) <= 2**-11
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1] * 2, dtype=torch.int32)
    _round_to_tf32[(1,)](bits.view(torch.float32), out)
    assert out.isnan().all()
    _round_to_tf32[(1,)](torch.full((8,), torch.finfo(torch.float32).max), out)
    assert (out == torch.inf).all()


def test_rows_are_rounded_to_tf32():
    """In both sweeps, and where TF32 was asked for."""
    f = torch.randn(12, 5)
    tau, weight = torch.tensor(0.5), torch.rand(12)
    scalars = RowScalars(torch.zeros(12), row_weight=weight, shift=torch.zeros(12))
    operands = Pairing(0, 6, 12), PairFunction("exp", (), tau, None), scalars

    def both(rows, precision):
        sums = triton.row_sums(Rows(rows), *operands, (Term.F,), precision)
        df, *_ = triton.pair_grad(Rows(rows), *operands, Weight.F, (), (0, 12), precision)
        return torch.cat([sums, df.t()])

    by_hand = both(rounded_rows(f), "tf32")
    assert torch.equal(both(f, "tf32"), by_hand)
    for precision in ("ieee", "bf16x3"):
        assert (both(f, precision) != by_hand).any(1).all()


def test_nothing_is_compiled_again_for_another_batch_size(monkeypatch):
    """What a kernel is compiled for does not change with n.

    Integers that do are not specialised on.
    """
    from alphacl_fast.kernels import config, sweeps

    monkeypatch.setattr(
        triton, "tile", lambda sweep, mode, dim, n, device: config.default(sweep, mode, dim)
    )
    monkeypatch.setattr(gpu, "multiprocessors_of", lambda device: 132)
    launched = []

    def record(self, launch):
        launched.append((self.kernel, self.static(launch)))

    monkeypatch.setattr(triton._Sweep, "launch", record)
    for n in (40, 100, 257):
        z1, z2 = (z.requires_grad_() for z in pair(n, 16, torch.bfloat16))
        alpha_cl_loss(z1, z2, backend="triton")
    assert launched[:2] == launched[2:4] == launched[4:]
    for kernel in (sweeps.row_sums, sweeps.pair_grad):
        names = inspect.signature(kernel.fn).parameters
        varying = [
            name for name in names if name.startswith(("n", "row_", "col_", "half", "anchors"))
        ]
        frozen = re.search(rf"do_not_specialize=\[([^\]]*)\][^@]*?def {kernel.__name__}\(", SOURCE)[
            1
        ]
        assert varying
        assert all(f'"{name}"' in frozen for name in varying)


@pytest.mark.parametrize("backend", [triton, cuda], ids=["triton", "cuda"])
@pytest.mark.parametrize("n", [1 << 16, 1 << 20])
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.bfloat16, 512), (torch.float32, 256), (torch.float64, 64)], ids=str
)
def test_launches_that_write_weights_fill_the_device(backend, n, dtype, dim, monkeypatch):
    """However few row blocks' weights fit into the workspace at once."""
    from alphacl_fast.kernels import config

    monkeypatch.setattr(
        triton, "tile", lambda sweep, mode, dim, n, device: config.default(sweep, mode, dim)
    )
    monkeypatch.setattr(gpu, "multiprocessors_of", lambda device: 132)
    f = torch.empty(1, dtype=dtype, device="meta").expand(n, dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tau, vector = (torch.empty(shape, dtype=wide, device="meta") for shape in ((), (n,)))
    pairing, function = Pairing(0, n // 2, n), PairFunction("exp", (), tau, (-2.0, 2.0))
    scalars = RowScalars(vector, row_weight=vector, shift=vector)
    sweep = backend._Sweep(Rows(f), pairing, function, scalars, Weight.F, (), "ieee")
    assert not sweep.whole
    (region,) = gpu.regions_of(n, pairing)
    splits, tiles = sweep.splits(region), sweep.blocks(region)[1]
    assert filling.fill(sweep.run(region), tiles, splits, 132 * sweep.resident) >= 0.9


@pytest.mark.parametrize("member", ALIGNED, ids=member_id)
def test_alignment_does_not_change_with_the_batch_size(member, monkeypatch):
    """Triton compiles a kernel again for a row scalar that begins elsewhere than at a multiple of
    16 bytes: every one must, for every number of anchors.
    """
    launch, seen = triton._Sweep.launch, set()

    def record(self, given):
        vectors = sweeps.Vectors(*self.vectors(sweeps.Vectors._fields))
        seen.update(
            (name, x.data_ptr() % 16) for name, x in vectors._asdict().items() if x is not None
        )
        launch(self, given)

    monkeypatch.setattr(triton._Sweep, "launch", record)
    for n, mode in ((9, "two_view"), (9, "cross_view"), (7, "one_view")):
        z1, z2 = (z.requires_grad_() for z in pair(n, 5, torch.float32))
        alpha_cl_loss(z1, z2, *member[:1], backend="triton", negatives=mode, **member[1]).backward()
    assert {name for name, _ in seen} >= {"moment_origin", "row_weight"}
    assert {offset for _, offset in seen} == {0}


class _Launches(TorchDispatchMode):
    """Names of what launches on a GPU: kernels, and PyTorch's operations inside and outside of
    ours.
    """

    NONE = (
        "view",
        "detach",
        "split",
        "select",
        "slice",
        "expand",
        "unsqueeze",
        "t",
        "transpose",
        "alias",
        "empty",
        "new_empty",
        "unbind",
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        launch = GridExecutor.__call__

        def record(executor, *args, **kwargs):
            self.names.append(executor.fn.__name__)
            with _disable_current_modes():  # the interpreter's own
                return launch(executor, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", record)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "alphacl_fast":
            with self:
                if name in ("row_sums", "pair_grad"):
                    return getattr(ops, f"_{name}")(*args)
                arguments = (tuple(x) if isinstance(x, list) else x for x in args[:-1])
                return getattr(triton, name)(*arguments)
        out = func(*args, **(kwargs or {}))
        tensor = isinstance(out, torch.Tensor)
        host = tensor and out.dtype == torch.float64  # the range of log f, on the CPU everywhere
        if name not in self.NONE and not host and not (tensor and out.numel() == 0):
            self.names.append(name)
        return out


BEFORE_THE_GRADIENT = [
    "unit_rows_kernel",
    "row_sums",
    "reduce_splits_kernel",
    "row_step_kernel",
    "scaled_weights_kernel",
]
#: Launches of a step with its backward, where programs share a ring (as at n = 1,024) and where
#: each has one of its own.
LAUNCHES = [
    ("infonce", {}, 12, 11),
    ("infonce", {"temperature_scaled": True}, 12, 11),
    ("infonce", {"negatives": "cross_view"}, 14, 13),
    ("alpha_direct", {}, 12, 11),
    ("alpha_inverse", {"detach_alpha": False, "alpha_eps": 0.1}, 11, 10),
    ("triplet", {}, 11, 9),
]


@pytest.mark.parametrize(("name", "options", "shared", "own"), LAUNCHES, ids=str)
def test_launches_of_a_step(name, options, shared, own, monkeypatch):
    """A CUDA graph makes one launch of them: nothing reads a number of the batch."""
    loss = FusedAlphaCLLoss(name, backend="triton", **options)
    set_tile(monkeypatch, 8, 2, 8)
    for splits, most in ((4, shared), (1, own)):
        monkeypatch.setattr(filling, "splits_of", lambda *sizes, splits=splits: splits)
        launches.forget()
        z1, z2 = (z.requires_grad_() for z in pair(8, 8, torch.float32))
        loss(z1, z2).backward()
        z1.grad = z2.grad = None
        with monkeypatch.context() as patch, _Launches(patch) as seen:
            loss(z1, z2).backward()
        if (name, options, splits) == ("infonce", {}, 4):
            after = ["pair_grad", "sum", "finish_rows_kernel", "mean", "ones_like", "mul"]
            assert seen.names == ["full", *BEFORE_THE_GRADIENT, *after]
        assert "_local_scalar_dense" not in seen.names
        assert len(seen.names) == most, seen.names


@pytest.mark.parametrize(("multiprocessors", "each"), [(1, 4), (2, 5)])
def test_launches_of_a_min_player(multiprocessors, each, monkeypatch):
    """Pointwise work is one launch: an iteration has four or five, two of them to see its end."""
    set_tile(monkeypatch, 32, 16, 16, multiprocessors=multiprocessors)
    names = {}
    for most in (2, 3, 4):  # the first one compiles
        monkeypatch.setattr("alphacl_fast.objectives.MinPlayer.max_sweeps", most)
        z1, z2 = (z.requires_grad_() for z in pair(32, 16, torch.float32))
        with monkeypatch.context() as patch, _Launches(patch) as seen:
            FusedAlphaCLLoss("alpha_gamma", temperature=1e-4, backend="triton")(z1, z2).backward()
        names[most] = seen.names
    assert [len(names[4]) - len(names[3]), names[4].count("row_step_kernel")] == [each, 6]
