"""The examples run; where they replace a package's loss, its curve is the package's own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WATCHDOG

import alphacl_fast

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.filterwarnings("ignore")]


def load(name, *needed):
    """An example as a module; skips where a package that it needs is missing."""
    for package in needed:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_curves(ours, theirs, steps):
    assert len(ours) == len(theirs) == steps
    assert ours == pytest.approx(theirs, rel=0, abs=1e-9)
    assert len({*ours}) == steps  # something is learnt


def test_every_example_is_short_and_tested():
    here = Path(__file__).read_text()
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) < 80, file.name
        assert file.stem in here, file.name


def test_simclr_lightning():
    example = load("simclr_lightning", "lightly", "pytorch_lightning", "torchvision")
    from lightly.loss import NTXentLoss

    ours = example.train(example.NTXentLoss(temperature=0.5))
    theirs = example.train(NTXentLoss(temperature=0.5), micro_batch=100)
    assert_same_curves(ours, theirs, example.STEPS)


def test_clip_open_clip():
    example = load("clip_open_clip", "open_clip")
    from open_clip.loss import ClipLoss

    assert_same_curves(example.train(example.ClipLoss()), example.train(ClipLoss()), example.STEPS)


def test_sentence_embeddings():
    example = load(
        "sentence_embeddings", "sentence_transformers", "transformers", "datasets", "accelerate"
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    ours = example.train(example.MultipleNegativesRankingLoss)
    theirs = example.train(MultipleNegativesRankingLoss, micro_batch=100)
    assert_same_curves(ours, theirs, example.STEPS)


def test_metric_learning_miner():
    example = load("metric_learning_miner", "pytorch_metric_learning")
    from pytorch_metric_learning.losses import SupConLoss

    ours = example.train(example.SupConLoss(temperature=0.1))
    assert_same_curves(ours, example.train(SupConLoss(temperature=0.1)), example.STEPS)


def falls(losses, steps):
    assert len(losses) == steps
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert sum(losses[-5:]) < sum(losses[:5])


def test_accelerate_loop():
    example = load("accelerate_loop", "accelerate")
    falls(example.train(), example.STEPS)


def test_own_loss():
    example = load("own_loss")
    falls(example.train(), example.STEPS)


def test_torchrun_micro_batched(monkeypatch, capsys):
    """Two processes give the curve of one."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(alphacl_fast.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", EXAMPLES / "torchrun_micro_batched.py"),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=WATCHDOG,
        env=environment,
    )
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "0")  # any that is free
    load("torchrun_micro_batched").main()
    two, one = (
        [float(line.split()[-1]) for line in text.splitlines()]
        for text in (run.stdout, capsys.readouterr().out)
    )
    falls(one, 20)
    assert two == pytest.approx(one, rel=0, abs=1e-4)
