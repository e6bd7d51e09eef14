"""Gradient caching: the gradient is exact, and activation memory is a micro-batch's."""

import sys

import pytest
import torch
from training_runs import state_of

from alphacl_fast import FusedAlphaCLLoss
from alphacl_fast.train import (
    Config,
    RunError,
    gradient,
    models,
    process_context,
    recipe,
    train,
)

CPU = torch.device("cpu")
TINY = {
    "dataset": "digits",
    "width": 8,
    "batch_size": 64,
    "subset": 256,
    "epochs": 1,
    "workers": 0,
    "log_every": 1,
}


def network(**given):
    return models.build(Config.create(**{**TINY, **given})).double().train()


def images(pairs):
    views = torch.randint(
        0, 256, (2, pairs, 1, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8
    )
    return views[0], views[1]


def embed_with(net):
    return lambda views: net(torch.cat(views)).chunk(2)


def split(views, sizes):
    return list(zip(*(x.split(sizes) for x in views), strict=True))


def gradients(net, loss):
    return [p.grad.clone() for p in [*net.parameters(), *loss.parameters()]]


def learnable_loss(objective="infonce"):
    return FusedAlphaCLLoss(
        objective, temperature=torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    )


@pytest.mark.parametrize("sizes", [(10, 10, 10), (7, 1, 13, 9), (30,)])
def test_equal_to_the_step_that_is_not_cached(sizes):
    """In float64, without batch statistics, micro-batches of any sizes equal one pass."""
    net, views = network(norm="group"), images(30)
    results = []
    for parts in (None, split(views, sizes)):
        net.zero_grad()
        loss = learnable_loss()
        if parts is None:
            value, _ = gradient.whole(embed_with(net), loss, views)
        else:
            value, _ = gradient.in_parts(net, embed_with(net), loss, parts, CPU)
        results.append((value, gradients(net, loss)))
    (value, whole), (cached_value, cached) = results
    assert abs(value - cached_value) < 1e-12
    assert (
        max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(whole, cached, strict=True))
        < 1e-10
    )


class Noisy(torch.nn.Module):
    """The network with batch normalisation and dropout."""

    def __init__(self):
        super().__init__()
        self.net = network(norm="batch")
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, x):
        return self.dropout(self.net(x))


def test_noise_and_batch_statistics_are_those_of_one_pass_over_each_part():
    """Gradient, statistics and generator equal autograd's through the same micro-batches."""
    views, sizes = images(24), (9, 5, 10)
    results = []
    for cached in (False, True):
        torch.manual_seed(5)
        net, loss = Noisy(), learnable_loss()
        torch.manual_seed(6)
        parts = split(views, sizes)
        if cached:
            gradient.in_parts(net, embed_with(net), loss, parts, CPU)
        else:
            z = [embed_with(net)(part) for part in parts]
            loss(*(torch.cat(rows) for rows in zip(*z, strict=True))).backward()
        results.append((gradients(net, loss), net.state_dict(), torch.rand(3)))
    (grads, state, noise), (cached_grads, cached_state, cached_noise) = results
    assert (
        max(
            float((a - b).abs().max() / a.abs().max())
            for a, b in zip(grads, cached_grads, strict=True)
        )
        < 1e-10
    )
    assert all(torch.equal(state[name], cached_state[name]) for name in state)
    assert torch.equal(noise, cached_noise)


class Live:
    """Track the peak of the bytes that autograd keeps."""

    def __init__(self):
        self.now = self.most = 0

    def hooks(self):
        live = self

        class Kept:
            def __init__(self, x):
                self.x, self.bytes = x, x.nbytes
                live.now += self.bytes
                live.most = max(live.most, live.now)

            def __del__(self):
                live.now -= self.bytes

        return torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x)


def kept(net, views, size):
    live = Live()
    with live.hooks():
        if size:
            gradient.in_parts(net, embed_with(net), FusedAlphaCLLoss(), split(views, size), CPU)
        else:
            gradient.whole(embed_with(net), FusedAlphaCLLoss(), views)
    return live.most


def test_memory_of_activations_is_that_of_a_micro_batch():
    net = network(norm="group")
    one, eight = kept(net, images(32), 16), kept(net, images(256), 16)
    assert eight < 1.01 * one + 2 * 2 * 256 * 128 * 8  # besides the embeddings and their gradient
    assert kept(net, images(256), 0) > 6 * eight


def test_a_run_in_micro_batches_ends_with_the_same_weights(tmp_path):
    states = []
    for micro in (0, 24):
        config = Config.create(
            **TINY, norm="group", optimizer="sgd", lr=0.01, micro_batch=micro, eval_every=0
        )
        train(config, tmp_path / str(micro))
        states.append(state_of(tmp_path / str(micro))["model"])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
def test_optimizers_for_large_batches(tmp_path, optimizer):
    pytest.importorskip("pytorch_optimizer")
    config = Config.create(
        **{**TINY, "epochs": 2}, optimizer=optimizer, lr={"lars": 1.0, "lamb": 0.01}[optimizer]
    )
    train(config, tmp_path / "run")
    state = state_of(tmp_path / "run")
    before = models.build(config).state_dict()
    weights = [name for name in before if name.endswith("weight") and before[name].dim() > 1]
    assert all(
        (state["model"][name] - before[name]).norm() > 1e-3 * before[name].norm()
        for name in weights
    )
    assert train(config, tmp_path / "run", resume=True).already


def test_a_missing_optimizer_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(
        RunError, match=r"--optimizer lars needs pytorch_optimizer .*: pip install pytorch_opt"
    ):
        train(Config.create(**TINY, optimizer="lars"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_trial_of_the_loss_is_small(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        FusedAlphaCLLoss,
        "forward",
        lambda self, z1, z2: sizes.append(len(z1)) or z1.sum() + z2.sum(),
    )
    recipe.build_loss(Config.create(batch_size=65_536), CPU, process_context.ProcessContext())
    assert sizes == [recipe.TRIAL_PAIRS]
