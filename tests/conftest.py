import pytest
import torch

# Small tensors run fastest on one thread, and a barrier per operation would make a busy machine's run take hours.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, so an output element that nobody wrote fails the test."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def set_tiles(monkeypatch, rows):
    """Tiles of so many rows in every backend."""
    from alphacl_fast.backend import blocked, cpu

    monkeypatch.setattr(blocked, "tile_size", lambda n, device: min(n, rows))
    monkeypatch.setattr(cpu, "block_rows", lambda n, multiple, largest: min(n, rows))


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 5 rows, so that small batches have full, partial and diagonal tiles."""
    set_tiles(monkeypatch, 5)


@pytest.fixture
def medium_tiles(monkeypatch):
    """Tiles of 16 rows: a few tiles, for tests that measure rounding."""
    set_tiles(monkeypatch, 16)
