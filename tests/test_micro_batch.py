"""`micro_batched`: the gradient of the whole batch, in the memory of one micro-batch."""

import os
import subprocess
import sys
from collections import UserDict, namedtuple

import pytest
import torch
import torch.distributed as dist
from conftest import WATCHDOG
from family import pair
from torch import nn

from alphacl_fast import FusedAlphaCLLoss, micro_batched

LOSS = FusedAlphaCLLoss(temperature=0.3)


def encoder(dropout=0.0, norm=False, dtype=torch.float64):
    torch.manual_seed(1)
    middle = [nn.BatchNorm1d(8)] if norm else []
    layers = [nn.Linear(6, 8), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5)]
    return nn.Sequential(*layers).to(dtype)


def batch(n=11, dtype=torch.float64):
    return torch.cat(pair(n, 6, dtype))


def step(net, embed, loss=LOSS):
    """Loss and gradients."""
    net.zero_grad()
    torch.manual_seed(2)
    value = loss(*embed(net).chunk(2))
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in net.parameters())]


def assert_same(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance or {"rtol": 1e-11, "atol": 1e-14})


# 22 rows: an even cut, an uneven last one, one row at a time, all at once, more than all
@pytest.mark.parametrize("size", [11, 4, 1, 22, 100])
def test_the_gradient_is_that_of_the_whole_batch(size):
    net, x = encoder(), batch()
    calls = []
    net.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    whole = step(net, lambda net: net(x))
    del calls[:]
    assert_same(step(net, lambda net: micro_batched(net, x, size)), whole)
    rounds = 1 if size >= 22 else 2  # the backward embeds again
    assert sum(calls) == 22 * rounds
    assert max(calls) == min(size, 22)


def test_inputs_receive_their_gradient():
    net, x = encoder(), batch().requires_grad_()
    found = [
        torch.autograd.grad(LOSS(*embed(x).chunk(2)), x)[0]
        for embed in (net, lambda x: micro_batched(net, x, 5))
    ]
    assert_same(found[:1], found[1:])


def test_without_gradients_nothing_is_embedded_twice():
    net, x, calls = encoder(), batch(), []
    net.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    with torch.no_grad():
        z = micro_batched(net, x, 4)
    assert not z.requires_grad
    assert calls == [4, 4, 4, 4, 4, 2]
    torch.testing.assert_close(z, net(x))


def test_dropout_is_replayed():
    """The micro-batches' own masks give the same step as a graph of all of them."""
    net, x = encoder(dropout=0.5), batch()
    plain = step(net, lambda net: torch.cat([net(part) for part in x.split(4)]))
    after = torch.rand(())
    assert_same(step(net, lambda net: micro_batched(net, x, 4)), plain)
    assert torch.rand(()) == after
    with pytest.raises(AssertionError):
        assert_same(step(net.eval(), lambda net: micro_batched(net, x, 4)), plain)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_replayed(inside):
    """Whether the backward is inside of autocast or not."""
    net, x = encoder(dtype=torch.float32), batch(dtype=torch.float32)
    found = []
    for embed in (
        lambda: torch.cat([net(part) for part in x.split(4)]),
        lambda: micro_batched(net, x, 4),
    ):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z = embed()
            assert z.dtype == torch.bfloat16
            value = LOSS(*z.chunk(2))
            if inside:
                value.backward()
        if not inside:
            value.backward()
        found.append([p.grad.clone() for p in net.parameters()])
    # only the order of the sums over micro-batches differs
    assert_same(*found, rtol=2e-2, atol=1e-3)


def test_batch_normalisation_is_updated_once_for_each_micro_batch():
    x, nets = batch(), [encoder(norm=True) for _ in range(2)]
    plain = step(nets[0], lambda net: torch.cat([net(part) for part in x.split(4)]))
    assert_same(step(nets[1], lambda net: micro_batched(net, x, 4)), plain)
    torch.testing.assert_close(nets[1].state_dict(), nets[0].state_dict())
    assert nets[1][1].track_running_stats
    assert nets[1][1].num_batches_tracked == 6


@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.usefixtures("fresh_dynamo")
def test_torch_compile(inside):
    """A step that is compiled, and an encoder that is."""
    x, nets = batch(), [encoder(norm=True) for _ in range(2)]
    expected = step(nets[0], lambda net: micro_batched(net, x, 4))
    if inside:
        whole = torch.compile(
            lambda x: micro_batched(nets[1], x, 4), backend="aot_eager", fullgraph=True
        )
        found = step(nets[1], lambda _: whole(x))
    else:
        compiled = torch.compile(nets[1], backend="aot_eager", fullgraph=True)
        found = step(nets[1], lambda _: micro_batched(compiled, x, 4))
    assert_same(found, expected)
    torch.testing.assert_close(nets[1].state_dict(), nets[0].state_dict())


Pair = namedtuple("Pair", "ids mask")


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_nested_inputs_and_outputs(kind):
    table, head = nn.Embedding(20, 6).double(), encoder()
    net = nn.ModuleList([table, head])
    ids = torch.randint(20, (22, 7))
    given = kind(
        tokens=Pair(ids, (ids > 5)[..., None]),
        lengths=[ids.sum(1)],
        scale=torch.tensor(2.0),
        task="a",
    )

    def embed(given):
        assert isinstance(given, kind)
        assert given["task"] == "a"
        tokens, mask = given["tokens"].ids, given["tokens"].mask
        pooled = (table(tokens) * mask).sum(1) / (1 + given["lengths"][0][:, None])
        return {"sentence": (head(pooled * given["scale"]), tokens), "prompt": 3}

    whole = step(net, lambda _: embed(given)["sentence"][0])
    assert_same(step(net, lambda _: micro_batched(embed, given, 5)["sentence"][0]), whole)
    output = micro_batched(embed, given, 5)
    assert output["prompt"] == 3
    assert torch.equal(output["sentence"][1], ids)


@pytest.mark.parametrize(
    ("encode", "inputs", "size", "error", "message"),
    [
        (nn.Identity(), torch.ones(4, 2), 0, ValueError, "size must be ≥ 1, got 0"),
        (nn.Identity(), torch.ones(4, 2), 2.0, TypeError, "size must be a number of rows, got 2.0"),
        (nn.Identity(), torch.ones(4, 2), True, TypeError, "size must be a number of rows"),
        (None, torch.ones(4, 2), 2, TypeError, "encoder must be a module or a function, got None"),
        (nn.Identity(), torch.ones(0, 2), 2, ValueError, r"N ≥ 1 of rows, got shapes \(0, 2\)"),
        (nn.Identity(), {"a": 3}, 2, ValueError, "got dict without a tensor that has rows"),
        (nn.Identity(), torch.ones(()), 2, ValueError, "got Tensor without a tensor that has rows"),
        (
            nn.Identity(),
            (torch.ones(4, 2), torch.ones(3)),
            2,
            ValueError,
            r"the same number N ≥ 1 of rows, got shapes \(4, 2\), \(3,\)",
        ),
        (
            lambda x: x.mean(0),
            torch.ones(4, 3),
            2,
            ValueError,
            r"one row for each of the 2 rows that it was given, got \(3,\)",
        ),
        (lambda x: "z", torch.ones(4, 3), 2, ValueError, "that it was given, got str"),
    ],
)
def test_refuses(encode, inputs, size, error, message):
    with pytest.raises(error, match=message):
        micro_batched(encode, inputs, size)


# --- several processes ----------------------------------------------------------------------------


def wrapped_step(group, wrap, steps=2):
    """Steps on two ranks, cut into micro-batches and not: distance of the parameters, and the
    number of all-reduced buckets.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank(group)
    x1, x2 = pair(13, 6)
    rows = (
        slice(0, 6) if rank == 0 else slice(6, 13)
    )  # two micro-batches on one rank, three on the other
    mine = torch.cat([x1[rows], x2[rows]])
    buckets, models = [], []
    loss = FusedAlphaCLLoss(temperature=0.3, process_group=group)
    for size in (100, 6):
        net = encoder()
        if wrap == "fsdp":
            model = fully_shard(net, mesh=DeviceMesh.from_group(group, "cpu"))
        else:
            inner = net if wrap == "ddp" else _Inside(net, size)
            model = nn.parallel.DistributedDataParallel(inner, process_group=group)
            model.register_comm_hook(buckets, _counted(group))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(steps):
            optimizer.zero_grad()
            z = model(mine) if wrap == "inside" else micro_batched(model, mine, size)
            loss(*z.chunk(2)).backward()
            optimizer.step()
        full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
        models.append([p.detach() for p in full])
    distance = max(float((a - b).abs().max()) for a, b in zip(*models, strict=True))
    return distance, len(buckets)


class _Inside(nn.Module):
    """The other way: micro-batches in the forward of what is wrapped."""

    def __init__(self, net, size):
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x):
        return micro_batched(self.net, x, self.size)


def _counted(group):
    def hook(buckets, bucket):
        buckets.append(1)
        work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / dist.get_world_size(group))

    return hook


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("wrap", ["ddp", "inside", "fsdp"])
def test_wrapped_models_of_two_ranks(ranks, wrap):
    """With DDP one all-reduce in each of two times two steps, of the model's only bucket."""
    for distance, buckets in ranks.run(2, wrapped_step, wrap=wrap):
        assert distance < 1e-12
        assert buckets == (0 if wrap == "fsdp" else 4)


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
import torch
from torch import nn
from alphacl_fast import FusedAlphaCLLoss, micro_batched
from alphacl_fast.benchmarks.memory import RESET, process_bytes

torch.set_num_threads(1)
net = nn.Sequential(*(m for _ in range(20) for m in (nn.Linear(64, 64), nn.Tanh())))
def step(n, size):
    z = micro_batched(net, torch.ones(n, 64), size)
    FusedAlphaCLLoss("uniform")(*z.chunk(2)).backward()
step(128, 64)
for size in (512, 16_384):
    before = process_bytes("VmRSS")
    RESET.write_text("5")
    step(16_384, size)
    print((process_bytes("VmHWM") - before) / (16_384 * 64 * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_activations_of_one_micro_batch():
    """In units of the input: 40 layers keep 20 tensors; in micro-batches those of the loss
    stay.
    """
    # every tensor returns to the system when it is freed, so the allocator's gaps do not count
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(
        [sys.executable, "-c", PEAK],
        check=True,
        capture_output=True,
        text=True,
        timeout=WATCHDOG,
        env=environment,
    )
    in_parts, whole = map(float, out.stdout.split())
    assert whole > 20
    assert in_parts < 10
