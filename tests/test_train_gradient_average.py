"""Gradients are averaged over the ranks, and their messages start while the backward still runs."""

import pytest
import torch
import torch.distributed as dist
from ranks import forked
from torch import nn
from training_runs import state_of, train_on_ranks

from alphacl_fast.train import Config, gradient, gradient_average, train
from alphacl_fast.train.gradient_average import GradientAverage
from alphacl_fast.train.process_context import ProcessContext

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")
SIDE = 8
FIRST, END = "the first layer has its gradient", "the backward has ended"


class Net(nn.Module):
    """Four layers, the first of which has a parameter in another memory format; one is not used."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.second, self.third = nn.Linear(4, SIDE), nn.Linear(SIDE, SIDE)
        self.unused = nn.Parameter(torch.zeros(5))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        return self.third(self.second(self.first(x).mean((2, 3))).relu())


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, z1, z2):
        return (z1 * z2).tanh().sum() / self.temperature


def images(rank, pairs):
    generator = torch.Generator().manual_seed(1 + rank)
    return tuple(torch.randn(2, pairs, 3, 4, 4, generator=generator))


def grads(net, loss, rank, sizes, last):
    """A rank's gradients of one step in micro-batches of these sizes, by name, before averaging."""
    views = images(rank, sum(sizes))
    parts = list(zip(*(x.split(sizes) for x in views), strict=True))

    def embed(part):
        return net(torch.cat(part)).chunk(2)

    net.zero_grad()
    loss.zero_grad()
    if len(parts) == 1:
        gradient.whole(embed, loss, parts[0], last=last)
    else:
        gradient.in_parts(net, embed, loss, parts, CPU, last=last)
    named = [*net.named_parameters(), *loss.named_parameters()]
    return {name: None if p.grad is None else p.grad.clone() for name, p in named}


def averaged(bucket_bytes, sizes):
    """Gradients of this rank before and after averaging, twice; and the order of events."""
    gradient_average.BUCKET_BYTES, rank, events = bucket_bytes, dist.get_rank(), []
    net, loss = Net(), Loss()
    context = ProcessContext(rank, dist.get_world_size())
    mean = GradientAverage([*net.parameters()], [*loss.parameters()], context)
    all_reduce = dist.all_reduce

    def noted(tensor, **given):
        events.append(tensor.numel())
        return all_reduce(tensor, **given)

    dist.all_reduce = noted  # in this process, which is a fork
    net.first.weight.register_hook(lambda _: events.append(FIRST))
    for _ in range(2):  # the second step finds what the first one left
        events.clear()
        own = grads(net, loss, rank, sizes[rank], mean.begin)
        events.append(END)
        mean.finish()
    named = [*net.named_parameters(), *loss.named_parameters()]
    strides = net.first.weight.grad.stride(), net.first.weight.stride()
    return own, {name: p.grad for name, p in named}, events, strides


@pytest.mark.parametrize("sizes", [((3,), (4,)), ((2, 2), (3, 1, 1))], ids=["whole", "parts"])
@pytest.mark.parametrize(("bucket_bytes", "early", "late"), [
    (1, [9, 64, 8, 32], [5]),
    (200, [73], [5]),
    (2**20, [], [230]),
])  # fmt: skip
def test_gradients_are_averaged_while_the_backward_runs(sizes, bucket_bytes, early, late):
    """Buckets are sent before the first layer has its gradient, once for all micro-batches."""
    ranks = forked(2, averaged, bucket_bytes, sizes)
    owns, averages = [own for own, *_ in ranks], [found for _, found, *_ in ranks]
    for name, average in averages[0].items():
        both = [torch.zeros_like(average) if own[name] is None else own[name] for own in owns]
        assert torch.equal(average, (both[0] + both[1]) / 2), name
        assert torch.equal(average, averages[1][name]), name
        assert average.abs().sum() > 0 or name == "unused"
    for (_, _, events, strides), parts in zip(ranks, sizes, strict=True):
        assert events[: len(parts) - 1] == [FIRST] * (len(parts) - 1)
        last, end = events[len(parts) - 1 :], events[len(parts) - 1 :].index(END)
        assert last[: last.index(FIRST)] == early
        assert last[end + 1 :] == late
        assert sum(x for x in last if isinstance(x, int)) == 230
        assert strides[0] == strides[1]


def skipped_on_one_rank():
    """Gradients of two steps in which only rank 0 uses the last layer, before and after."""
    gradient_average.BUCKET_BYTES, rank = 1, dist.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE))
    context = ProcessContext(rank, dist.get_world_size())
    mean = GradientAverage([*net.parameters()], [], context)
    x = torch.randn(3, SIDE, generator=torch.Generator().manual_seed(rank))
    used, found = net[: 2 - rank], []
    for _ in range(2):
        net.zero_grad()
        (own,) = torch.autograd.grad(used(x).square().sum(), [net[0].weight])
        mean.begin()
        used(x).square().sum().backward()
        own_last = torch.zeros(SIDE) if net[1].bias.grad is None else net[1].bias.grad.clone()
        mean.finish()
        found.append((own, own_last, net[0].weight.grad.clone(), net[1].bias.grad.clone()))
    return found


def test_a_parameter_may_be_unused_on_one_rank():
    """The first bucket waits for it, so this rank sends its buckets after its backward."""
    ranks = forked(2, skipped_on_one_rank)
    for (first, last, mean, mean_last), (other, none, *same) in zip(*ranks, strict=True):
        assert not none.any()
        assert torch.equal(mean, (first + other) / 2)
        assert torch.equal(mean_last, last / 2)
        assert last.any()
        assert torch.equal(same[0], mean)
        assert torch.equal(same[1], mean_last)


def test_buckets_follow_from_the_parameters_alone(monkeypatch):
    monkeypatch.setattr(gradient_average, "BUCKET_BYTES", 40)
    a, b, c, d, loss = (nn.Parameter(torch.zeros(n)) for n in (3, 9, 4, 6, 1))
    found = gradient_average.buckets([a, b, c, d], [loss])
    names = {id(p): name for name, p in zip("abcdl", (a, b, c, d, loss), strict=True)}
    assert ["".join(names[id(p)] for p in bucket) for bucket in found] == ["ldc", "ba"]
    assert gradient_average.buckets([], [loss]) == [[loss]]
    assert gradient_average.buckets([], []) == []


def test_a_rank_alone_hooks_nothing():
    net = Net()
    mean = GradientAverage([*net.parameters()], [], ProcessContext())
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    found = grads(net, Loss(), 0, (3,), mean.begin)
    mean.finish()
    assert torch.equal(net.first.weight.grad, found["first.weight"])
    assert net.unused.grad is None


def test_ranks_train_as_one_with_many_buckets(tmp_path, monkeypatch, quick_plots):
    """All that touches gradients together; the checkpoint differs by rounding."""
    monkeypatch.setattr(gradient_average, "BUCKET_BYTES", 1)
    config = Config.create(
        dataset="digits", width=4, norm="sync", batch_size=32, subset=64, epochs=1, workers=0,
        eval_every=0, clip=0.5, ema=0.9, optimizer="sgd", lr=0.01, learn_temperature=True,
    )  # fmt: skip
    train_on_ranks(2, config, tmp_path / "two")
    train(config, tmp_path / "one")
    ours, theirs = (state_of(tmp_path / name) for name in ("two", "one"))
    for part in ("model", "loss", "ema"):
        for name, value in theirs[part].items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-3, atol=1e-5)
