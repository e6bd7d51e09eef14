"""The benchmark command runs, gates on correctness and writes rows with their provenance."""

import json

import pytest
import torch

from benchmarks import contestants, loss


@pytest.mark.parametrize("negatives", ["two_view", "cross_view"])
def test_rows(tmp_path, negatives, monkeypatch, capsys):
    monkeypatch.setattr(loss, "GEMM", 64)
    out = tmp_path / "rows.jsonl"
    arguments = ["--n", "64", "--dim", "8", "--repeats", "2", "--device", "cpu", "--out", str(out)]
    assert loss.main([*arguments, "--negatives", negatives]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["contestant"] for row in rows] == ["eager", "blocked", "cpu"]
    for row in rows:
        assert row["fraction_of_gemm_rate"] > 0
        assert row["median_ms"] is None  # absolute times only from a GPU
        assert row["torch"] == torch.__version__
        assert 0 < row["gradient_error"] < 1e-5
    assert "x eager" in capsys.readouterr().out


def test_wrong_gradient_is_not_timed(monkeypatch):
    monkeypatch.setattr(loss, "make", lambda *args: lambda z1, z2: (z1 * z2).sum())
    with pytest.raises(SystemExit, match="not timed"):
        loss.main(["--n", "64", "--dim", "8", "--device", "cpu"])


def test_eager_refuses_what_it_is_not():
    with pytest.raises(ValueError, match="eager must be asked for infonce"):
        contestants.make("eager", "triplet", "two_view", 0.5)
    with pytest.raises(SystemExit):
        loss.main(["--objective", "triplet"])
