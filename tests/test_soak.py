"""A short run of tests/soak.py, and that it can fail."""

import pytest
import soak
import torch


def test_a_hundred_random_steps():
    served = soak.soak(100, seed=10_000, report=lambda text: None)
    assert sum(served.values()) == 100
    assert {"cpu", "blocked"} <= {*served}


def test_a_wrong_gradient_is_found(monkeypatch):
    original = soak.results

    def results(call, leaves, tau, backend):
        found = original(call, leaves, tau, backend)
        if backend != "reference" and len(found) > 1:
            found[1] = found[1] * 1.1
        return found

    monkeypatch.setattr(soak, "results", results)
    with pytest.raises(soak.Mismatch, match=r"step of seed \d+: .*first is off by"):
        soak.soak(20, seed=0, report=lambda text: None)


def test_growing_memory_is_found(monkeypatch):
    peaks = iter(range(0, 10_000, 100))
    monkeypatch.setattr(soak, "peak", lambda: next(peaks))
    monkeypatch.setattr(soak, "step", lambda seed: "cpu")
    with pytest.raises(soak.Mismatch, match="grew by"):
        soak.soak(4, seed=0, report=lambda text: None)


def test_draws_are_repeatable_and_cover_the_options():
    import random

    calls = [soak.draw(random.Random(seed)) for seed in range(300)]
    again = [soak.draw(random.Random(seed)) for seed in range(300)]
    assert [str(call) for call in calls] == [str(call) for call in again]
    for name, values in (
        ("reduction", {"mean", "sum", "none"}),
        ("strides", {"plain", "columns", "rows"}),
        ("dtype", {*soak.TOLERANCES}),
        ("negatives", {"two_view", "one_view", "cross_view"}),
    ):
        assert {call[name] for call in calls} == values
    assert len({str(call["objective"]) for call in calls}) > 30
    assert soak.TOLERANCES[torch.float64] < 1e-8
