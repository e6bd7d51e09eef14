"""The examples run; where they replace a package's loss, its curve is the package's own."""

import contextlib
import importlib.util
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import WATCHDOG

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


def as_torchrun_does(rank, world, port, output):
    """Runs the script's main in this process, whose output goes to a file."""
    given = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()})
    torch.set_num_threads(1)
    with open(output, "w") as file, contextlib.redirect_stdout(file):
        load("torchrun_micro_batched").main()


@pytest.mark.xdist_group("ranks")  # whose processes have the same server
def test_torchrun_micro_batched(tmp_path):
    """Two processes give the curve of one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo"])
    curves = []
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        outputs = [tmp_path / f"{rank}_of_{world}" for rank in range(world)]
        processes = [
            context.Process(target=as_torchrun_does, args=(rank, world, port, output), daemon=True)
            for rank, output in enumerate(outputs)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(WATCHDOG)
            assert process.exitcode == 0
        assert not any(output.read_text() for output in outputs[1:])
        curves.append([float(x.split()[-1]) for x in outputs[0].read_text().splitlines()])
    falls(curves[0], 20)
    assert curves[1] == pytest.approx(curves[0], rel=0, abs=1e-4)
