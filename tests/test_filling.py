"""The splits of schedules against brute force, at every size that people train with."""

import pytest
import torch

from alphacl_fast.backend import cuda, filling, gpu, triton
from alphacl_fast.bundles import PairFunction, Pairing, Rows, RowScalars, Term, Weight

H200, H100_PCIE, L4 = 132, 114, 58  # multiprocessors


def programs(blocks, tiles, splits):
    """The tiles of every program in the order in which a device starts them."""
    longest = -(-tiles // splits)
    return [
        max(0, min(longest, tiles - split * longest))
        for split in range(splits)
        for _ in range(blocks)
    ]


@pytest.mark.parametrize(("blocks", "tiles", "splits", "slots"), [(5, 7, 3, 4), (9, 4, 2, 6)])
def test_fill_counts_tiles_and_waves(blocks, tiles, splits, slots):
    each = programs(blocks, tiles, splits)
    waves = [each[k : k + slots] for k in range(0, len(each), slots)]
    assert sum(each) == blocks * tiles
    longest = max(map(max, waves))
    assert filling.fill(blocks, tiles, splits, slots) == sum(each) / (slots * len(waves) * longest)


@pytest.mark.parametrize("slots", [H200, 2 * H200, H100_PCIE, 2 * L4])
@pytest.mark.parametrize("side", [64, 128])
def test_within_two_percent_of_the_best(side, slots):
    for n in (*range(1024, 8192, 37), *range(8192, 262145, 1511), 17000, 20000, 24576, 262144):
        blocks = -(-n // side)
        most = max(2, gpu.fitting(n * 128 * 4))
        found = filling.splits_of(blocks, blocks, slots, most)
        fills = [filling.fill(blocks, blocks, k, slots) for k in range(1, min(blocks, most) + 1)]
        assert fills[found - 1] >= 0.98 * max(fills), n
        assert all(fill < 0.98 * max(fills) for fill in fills[: found - 1]), n


@pytest.mark.parametrize("n", [8192, 8200, 17000, 20000, 24576, 34114, 136000, 1 << 18])
@pytest.mark.parametrize("dim", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("weight", [None, Weight.F], ids=["row_sums", "pair_grad"])
@pytest.mark.parametrize(
    ("backend", "capability"),
    [(triton, (9, 0)), (triton, (8, 0)), (cuda, (8, 0))],
    ids=["triton-90", "triton-80", "cuda-80"],
)
def test_every_sweep_fills_the_device(backend, capability, weight, n, dim, monkeypatch):
    pytest.importorskip("triton")
    from alphacl_fast.kernels import config

    monkeypatch.setattr(gpu, "multiprocessors_of", lambda device: H200)
    monkeypatch.setattr(
        triton,
        "tile",
        lambda sweep, mode, dim, n, device: config.default(sweep, mode, dim, capability),
    )
    launches = []
    monkeypatch.setattr(backend._Sweep, "launch", lambda self, launch: launches.append(launch))
    monkeypatch.setattr(backend._Sweep, "reduce", lambda self, workspace, out: None)
    monkeypatch.setattr(backend._Sweep, "scale_weights", lambda self: None)
    monkeypatch.setattr(gpu, "_multiply", lambda *operands: None)
    f = torch.empty(1, dtype=torch.bfloat16, device="meta").expand(n, dim)
    tau, vector = (torch.empty(shape, device="meta") for shape in ((), (n,)))
    function, pairing = PairFunction("exp", (), tau, (-2.0, 2.0)), Pairing(0, n // 2, n)
    scalars = RowScalars(vector, row_weight=vector, shift=vector)
    operands = Rows(f), pairing, function, scalars
    if weight is None:
        backend.row_sums(*operands, (Term.SHIFT, Term.F), "")
    else:
        backend.pair_grad(*operands, weight, (), (0, n), "")
    resident = backend._Sweep(*operands, weight, (Term.SHIFT, Term.F), "").resident
    shares = [filling.fill(x.blocks, x.end - x.begin, x.splits, resident * H200) for x in launches]
    assert max(shares) >= 0.9
    assert sum(shares) / len(shares) >= 0.85, shares
