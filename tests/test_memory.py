"""O(n·D) memory: what autograd keeps, the largest tensor that is ever made, and the process's
peak.
"""

import subprocess
import sys

import pytest
import torch
from conftest import WATCHDOG
from family import MEMBERS, Largest, member_id, pair, saved_bytes

from alphacl_fast import FusedAlphaCLLoss, loss_against, objectives
from alphacl_fast.backend import blocked


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("member", MEMBERS, ids=member_id)
def test_saved_bytes_and_largest_tensor(member, reduction, monkeypatch):
    n, d, tile = 256, 8, 64
    monkeypatch.setattr(blocked, "tile_size", lambda rows, device: tile)
    z1, z2 = (z.requires_grad_() for z in pair(n, d, torch.float32))
    with saved_bytes() as saved, Largest() as largest:
        loss = FusedAlphaCLLoss(objectives.make(*member), reduction=reduction)(z1, z2)
        loss.sum().backward()
    rows_bytes = 2 * n * d * 4
    # the closed forms keep a few (2N, D) intermediates
    assert sum(saved.values()) <= 8 * rows_bytes
    assert largest.bytes <= max(tile * tile * 4, 2 * rows_bytes)
    assert largest.bytes < (2 * n) ** 2 * 4 / 16


def test_scalar_loss_saves_only_the_gradients():
    z1, z2 = (z.requires_grad_() for z in pair(300, 8, torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.nbytes) or x, lambda x: x
    ):
        FusedAlphaCLLoss("alpha_direct")(z1, z2)
    assert sum(saved) == 2 * 300 * 8 * 4


@pytest.mark.parametrize("name", ["infonce", "alpha_square", "uniform"])
def test_a_memory_bank_is_kept_once(name):
    """The graph of explicit negatives holds the bank itself and no copy of it; where the bank wants
    a gradient, one native step has made it already.
    """
    z, bank = (torch.randn(n, 16).requires_grad_() for n in (8, 4096))
    for rows, gradients in ((bank.detach(), 0), (bank, 1)):
        with saved_bytes() as saved:
            loss = loss_against(z, rows, torch.randn(8), name)
        saved.pop(bank.untyped_storage().data_ptr(), None)
        assert sum(saved.values()) < (gradients + 1 / 16) * bank.nbytes
        wanted = (z, bank)[: 1 + gradients]
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, wanted))


NAMES = ["infonce", "alpha_direct"]

#: Each loss in a process of its own, whose peak begins at what it has when it is forked.
PEAKS = """
import os, resource, torch
from alphacl_fast import FusedAlphaCLLoss
for name in {names}:
    if not os.fork():
        z = [torch.randn({n}, 16).requires_grad_() for _ in range(2)]
        loss = FusedAlphaCLLoss(name)
        loss(z[0][:1024], z[1][:1024]).backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loss(*z).backward()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(name, (peak - before) / 1024, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def peaks():
    """MiB that each loss needs besides its rows; one (2N, 2N) float32 matrix: 400."""
    out = subprocess.run(
        [sys.executable, "-c", PEAKS.format(n=5_120, names=NAMES)],
        check=True,
        capture_output=True,
        text=True,
        timeout=WATCHDOG,
    )
    return {name: float(peak) for name, peak in map(str.split, out.stdout.splitlines())}


@pytest.mark.xdist_group("peaks")
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux only")
@pytest.mark.parametrize("name", NAMES)
def test_peak_of_the_process(name, peaks):
    assert peaks[name] < 100
