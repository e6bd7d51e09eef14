"""FSDP2 shards the network, casts it and averages its gradients; the loss is the whole batch's."""

import copy

import pytest
import torch
import torch.distributed as dist
from family import pair
from torch import nn

from alphacl_fast import FusedAlphaCLLoss
from alphacl_fast.verify import relative_difference

pytestmark = pytest.mark.xdist_group("ranks")  # one worker starts the processes

SIZES = (7, 4)  # pairs of the ranks
#: Relative differences from one process in float64, by the dtype of the sharded parameters.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


def network(dtype):
    torch.manual_seed(1)
    layers = nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)
    return nn.Sequential(*layers).to(dtype)


def images(dtype):
    x1, x2 = pair(sum(SIZES), 24)
    return x1.to(dtype), x2.to(dtype)


def gradients(model, views, **options):
    """Loss and gradients, by name."""
    tau = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    loss = FusedAlphaCLLoss("infonce", temperature=tau, temperature_range=(0.01, 1.0), **options)
    z1, z2 = model(torch.cat(views)).chunk(2)
    value = loss(z1, z2)
    value.backward()
    of = {name: p.grad for name, p in model.named_parameters()}
    full = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in of.items()}
    return {"loss": value.detach(), "temperature": tau.grad, **full}


def differences(found, expected):
    return {
        name: relative_difference(found[name].double(), value.double())
        for name, value in expected.items()
    }


def sharded(group, dtype, reduced, strategy):
    """Differences from one process in float64: those of FSDP2, and of one process in its dtype."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    rank, mesh = dist.get_rank(group), DeviceMesh.from_group(group, "cpu")
    first = sum(SIZES[:rank])
    mine = slice(first, first + SIZES[rank])
    # All start from the same rounded weights and images, so that only the step is compared.
    narrow, wide = torch.bfloat16 if reduced else dtype, torch.float64
    model, views = network(narrow).to(dtype), images(narrow)
    expected = gradients(copy.deepcopy(model).to(wide), [x.to(wide) for x in views])
    alone = gradients(copy.deepcopy(model).to(narrow), views)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    given = {"mesh": mesh, **({"mp_policy": policy} if reduced else {})}
    for layer in (*model[::2], model):
        fully_shard(layer, **given)
    ours = [x[mine].to(dtype) for x in views]
    found = gradients(model, ours, process_group=group, strategy=strategy)
    assert all(p.grad.dtype == dtype for p in model.parameters())
    dist.all_reduce(found["temperature"], group=group)
    found["temperature"] /= len(SIZES)
    return differences(found, expected), differences(alone, expected)


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("dtype", LIMITS)
def test_gradients_are_those_of_one_process(ranks, dtype, strategy):
    for found, _ in ranks.run(2, sharded, dtype=dtype, reduced=False, strategy=strategy):
        assert max(found.values()) < LIMITS[dtype], found


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_gradients_with_mixed_precision_are_those_of_one_process(ranks, strategy):
    """Parameters and activations in bfloat16, sums over ranks in float32.

    One process that computes in bfloat16 has a rounding error too: ours is no more than twice it,
    and one rounding.
    """
    eps = torch.finfo(torch.bfloat16).eps
    for found, alone in ranks.run(2, sharded, dtype=torch.float32, reduced=True, strategy=strategy):
        for name, difference in found.items():
            assert difference <= 2 * alone[name] + eps, (name, found, alone)
            assert difference < 0.05, (name, found)
