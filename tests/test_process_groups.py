"""A loss's own group of processes, what ranks must agree on, and errors that name the ranks."""

import functools
import gc
import pickle
import re
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from family import pair

from alphacl_fast import (
    FusedAlphaCLLoss,
    MinPlayer,
    PairLoss,
    PairWeight,
    distributed,
    loss_against,
    process_groups,
    siglip_loss,
    supcon_loss,
)
from alphacl_fast.functional import alpha_cl_loss, make_call
from alphacl_fast.verify import verify_distributed

pytestmark = pytest.mark.xdist_group("ranks")  # one worker starts the processes


def raised(function, *arguments, **options):
    """The value, or what was raised."""
    try:
        return float(function(*arguments, **options))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# --- the own group ---


def beside_users_messages(group, strategy, early):
    """The loss while a message between users waits in their group; the message arrives."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    to, source = (dist.get_global_rank(group, (rank + k) % world) for k in (-1, 1))
    options = {"process_group": group, **strategy}
    expected = float(alpha_cl_loss(*pair(3, 4), **options))
    sent, box = torch.full((4000,), 5.0 + rank), torch.zeros(4000)
    if early == "isend":
        work = dist.isend(sent, to, group=group)
        found = float(alpha_cl_loss(*pair(3, 4), **options))
        dist.recv(box, source, group=group)
    else:
        work = dist.irecv(box, source, group=group)
        found = float(alpha_cl_loss(*pair(3, 4), **options))
        dist.send(sent, to, group=group)
    work.wait()
    return found == expected and bool((box == 5.0 + (rank + 1) % world).all())


@pytest.mark.parametrize("early", ["isend", "irecv"])
def test_users_messages_on_the_same_group_are_left_alone(ranks, early):
    for strategy in ({"strategy": "ring"}, {"strategy": "two_level", "ranks_per_node": 2}):
        assert all(ranks.run(4, beside_users_messages, strategy=strategy, early=early))


def known_groups():
    return len(dist.distributed_c10d._world.pg_map)


def made_and_freed(group):
    """Groups that a user's new group and a loss over it add to torch's, over time."""
    before, counts = known_groups(), []
    users = dist.new_group(range(6), timeout=timedelta(seconds=77))
    loss = FusedAlphaCLLoss(process_group=users)
    counts.append(known_groups() - before)
    for _ in range(2):
        loss(*pair(3, 4))
        FusedAlphaCLLoss(process_group=users, strategy="ring")(*pair(3, 4))
    counts.append(known_groups() - before)
    own = process_groups.own_group(users)
    timeout = own.handle._get_backend(torch.device("cpu")).options._timeout
    FusedAlphaCLLoss(process_group=users, strategy="two_level", ranks_per_node=2)(*pair(3, 4))
    counts.append(known_groups() - before)
    del own
    dist.destroy_process_group(users)
    del users
    gc.collect()
    counts.append(known_groups() - before)
    return counts, timeout, raised(loss, *pair(3, 4))


def test_own_group_is_made_once_and_freed_with_the_users(ranks):
    for counts, timeout, message in ranks.run(6, made_and_freed):
        assert counts == [1, 2, 3, 0]
        assert timeout == timedelta(seconds=77)
        assert message == (
            "ValueError: process_group must be a living group, "
            "got one that destroy_process_group has ended"
        )


def in_overlapping_groups(group):
    """Rank 1 is in both sub-groups; afterwards all ranks make a group together."""
    rank, found = dist.get_rank(), []
    groups = [dist.new_group([0, 1]), dist.new_group([1, 2])]
    for users, members in zip(groups, ([0, 1], [1, 2]), strict=True):
        if rank in members:
            mine = slice(3 * members.index(rank), 3 * members.index(rank) + 3)
            views = (z[mine] for z in pair(6, 4))
            found.append(float(alpha_cl_loss(*views, process_group=users, strategy="ring")))
    everyone = dist.new_group(range(6))
    found.append(float(alpha_cl_loss(*pair(3, 4), process_group=everyone)))
    return found


def test_groups_that_overlap(ranks):
    answers = ranks.run(6, in_overlapping_groups)
    whole = float(alpha_cl_loss(*pair(6, 4)))
    assert [len(found) for found in answers] == [2, 3, 2, 1, 1, 1]
    for found in answers:
        assert found[:-1] == pytest.approx([whole] * (len(found) - 1), rel=1e-12)
        assert found[-1] == answers[0][-1]


# --- what a process group may be ---


def over_meshes(group):
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("data", "tensor"))
    flat = DeviceMesh.from_group(group, "cpu")
    views = pair(3, 4)
    values = [float(alpha_cl_loss(*views, process_group=over)) for over in (flat, group)]
    values += [
        float(alpha_cl_loss(*views, process_group=over))
        for over in (mesh["data"], mesh["data"].get_group())
    ]
    return values, raised(alpha_cl_loss, *views, process_group=mesh)


def test_a_mesh_of_one_dimension_is_a_group(ranks):
    for (flat, group, data, of_data), message in ranks.run(6, over_meshes):
        assert flat == group
        assert data == of_data != flat
        assert message == (
            "ValueError: process_group must be a DeviceMesh of 1 dimension, got one of shape "
            "(3, 2); choose a dimension, as in mesh['data']"
        )


@pytest.mark.parametrize("given", ["all", 3, object()], ids=["text", "number", "object"])
def test_other_things_are_no_group(given):
    with pytest.raises(TypeError, match=r"ProcessGroup or a 1-dimensional DeviceMesh, got"):
        FusedAlphaCLLoss(process_group=given)


def pickled(group):
    return raised(pickle.dumps, FusedAlphaCLLoss(process_group=group))


def test_a_loss_of_a_group_cannot_be_pickled(ranks):
    (message,) = ranks.run(1, pickled)
    assert message.startswith("TypeError: process_group must be 'world' for a loss that is pickled")


# --- nodes ---

BAD_NODES = [
    (
        {"strategy": "two_level", "ranks_per_node": 4},
        "",
        "must divide the number of ranks, 6, got 4",
    ),
    ({"strategy": "two_level"}, "", "must be given with strategy='two_level', unless the environ"),
    ({"strategy": "two_level"}, "4", r"\(from LOCAL_WORLD_SIZE\) must divide the number of ranks"),
    ({"ranks_per_node": 12}, "", "must divide the number of ranks, 6, got 12"),
    ({"strategy": "ring", "ranks_per_node": 2}, "", "must be None with strategy='ring', got 2"),
    ({"strategy": "two_level", "ranks_per_node": 0}, "", "must be at least 1, got 0"),
    ({"strategy": "two_level", "ranks_per_node": 2.0}, "", "None or an integer, got 2.0"),
]


def with_nodes(group, options, local):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", local)
        return raised(alpha_cl_loss, *pair(3, 4), process_group=group, **options)


def test_nodes_that_do_not_fit(ranks):
    for options, local, message in BAD_NODES:
        for answer in ranks.run(6, with_nodes, options=options, local=local):
            assert re.match(rf"\w+Error: .*ranks_per_node .*{message}", answer), answer
    # the members of the group of 4, 1 to 4, are the second half of a node and the first of another
    for answer in ranks.run(4, with_nodes, options={"strategy": "two_level"}, local="2"):
        assert "neighbouring ranks of process_group are not on one node" in answer


def nodes_that_differ(group, options, per_node):
    options = {**options, "ranks_per_node": per_node[dist.get_rank(group)]}
    return raised(alpha_cl_loss, *pair(3, 4), process_group=group, **options)


def test_ranks_must_have_the_same_nodes(ranks):
    for answer in ranks.run(
        4, nodes_that_differ, options={"strategy": "two_level"}, per_node=(2, 2, 1, 2)
    ):
        assert "every rank must pass the same call, got infonce" in answer


def test_nodes_need_a_group():
    with pytest.raises(ValueError, match="ranks_per_node must be None without a process_group"):
        alpha_cl_loss(*pair(3, 4), ranks_per_node=2)


# --- the agreement ---

FUNCTIONS = {
    "psi": lambda k: PairLoss(None, lambda gap: torch.exp(k * gap)),
    "phi": lambda k: PairLoss(lambda xi: torch.log1p(xi) * k, torch.exp),
    "weight": lambda k: PairWeight(lambda d: torch.exp(-k * d.square())),
    "h": lambda k: MinPlayer(lambda x: torch.relu(k * x).square()),
    "partial": lambda k: PairLoss(
        None, functools.partial(torch.pow, torch.tensor(1.0 + k).double())
    ),
}


def with_constants(group, name, constants):
    """What a loss of a user's function says, whose constant differs from rank to rank."""
    constant = constants[dist.get_rank(group)]
    objective = FUNCTIONS[name](constant)
    here = raised(alpha_cl_loss, *pair(3, 4), objective, process_group=group)
    z, other = pair(3, 4)
    positives = (z * other).sum(1)
    against = ""
    if name == "psi":
        against = raised(loss_against, z, None, positives, objective=objective, process_group=group)
    return here, against


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_compared_by_value(ranks, name):
    for here, against in ranks.run(3, with_constants, name=name, constants=(1.0, 1.0, 1.001)):
        if name == "partial":  # its text has the constant
            assert "every rank must pass the same" in here
        else:
            assert re.match(
                rf"ValueError: every rank must pass the same function {name}, got", here
            )
            assert " on rank 0 and " in here
            assert here.endswith("on rank 2")
        assert not against or "the same function psi" in against
    for here, against in ranks.run(3, with_constants, name=name, constants=(1.0, 1.0, 1.0)):
        assert isinstance(here, float)
        assert not against or isinstance(against, float)


def on_devices(group, devices):
    """An agreement on embeddings whose devices differ."""
    z1, z2 = (z.to(devices[dist.get_rank(group)]) for z in pair(3, 4))
    call = make_call("infonce", {}, similarity="cosine", negatives="two_view", reduction="mean",
                     backend="blocked", precision=None).bind("blocked", (0.5,))  # fmt: skip
    mine = process_groups.ProcessGroup(group, "ring")
    try:
        with pytest.MonkeyPatch.context() as patch:
            backends = {"cpu": "gloo", "meta": "gloo"}
            patch.setattr(process_groups.own_group(group), "backends", backends)
            distributed.agree(mine, z1, z2, torch.tensor(0.5), call, None)
        return "agreed"
    except ValueError as error:
        return str(error)


def test_devices_are_compared(ranks):
    devices = ["meta", "cpu", "meta"]
    for answer in ranks.run(3, on_devices, devices=devices):
        assert answer == (
            "every rank must pass the same device type, got meta on rank 0 and cpu on rank 1"
        )
    assert ranks.run(3, on_devices, devices=["cpu"] * 3) == ["agreed"] * 3


def without_a_backend(group):
    with pytest.MonkeyPatch.context() as patch:
        own = process_groups.own_group(group)
        if own.rank == 1:
            patch.setattr(own, "backends", {"cuda": "nccl", "xpu": "xccl"})
            patch.setattr(own, "message_device", lambda device: torch.device("cpu"))
        return raised(alpha_cl_loss, *pair(3, 4), process_group=group)


def test_a_device_without_a_backend_is_an_error_on_every_rank(ranks):
    for answer in ranks.run(3, without_a_backend):
        assert answer.startswith(
            "ValueError: rank 1: process_group must have a backend for tensors on cpu, got "
            "cuda:nccl, xpu:xccl"
        )


def test_statements_travel_on_the_device_of_the_embeddings():
    message_device = process_groups.OwnGroup.message_device
    third = torch.device("cuda", 3)
    nccl, both = ({"cuda": "nccl"}, {"cpu": "gloo", "cuda": "nccl"})
    assert message_device(SimpleNamespace(backends=nccl), third) == third
    assert message_device(SimpleNamespace(backends=both), third) == torch.device("cpu")


def test_longest_statement_fits():
    text = process_groups.described("é" * 4000)
    values = (("name of a function", bytes(4 * len(process_groups._PROBES))),) * 2
    longest = process_groups.Statement(
        None, text, 2**40, torch.float64, "privateuseone", process_groups.Need(True, True, True),
        (0.1, 0.2), 2**40, values,
    )  # fmt: skip
    assert len(pickle.dumps(longest)) + 16 <= process_groups.STATEMENT_BYTES


def alone(group):
    """Rank 0 of two makes a call that the other one never makes."""
    users = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    if dist.get_rank() > 1:
        return ""
    process_groups.own_group(users).node(1)
    if dist.get_rank() == 1:
        return ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_groups, "GRACE", 0.2)
        return raised(alpha_cl_loss, *pair(3, 4), "triplet", process_group=users)


def test_a_timeout_names_the_call_and_the_ranks(ranks):
    message, *_ = ranks.run(6, alone)
    assert re.match(
        r"RuntimeError: triplet\(margin=1\.0\).* on rank 0 of 2 waited in its all-gather for "
        r"ranks \[1\], which did not make the same call",
        message,
    )


# --- another default device ---


def under_default_device(group, name):
    """Losses and gradients with and without another default device; and a check of the group."""
    z1, z2 = (z.requires_grad_() for z in pair(4, 3))
    labels, tau = torch.tensor([0, 1, 0, 1]), torch.tensor(0.4, dtype=z1.dtype)
    objectives = ("infonce", "alpha_square", PairLoss(None, torch.exp))
    strategies = [{"strategy": name} for name in ("gather", "ring")]
    strategies.append({"strategy": "two_level", "ranks_per_node": 2})

    def values():
        for objective in objectives:
            for options in strategies:
                given = {"temperature": tau, "process_group": group, **options}
                yield alpha_cl_loss(z1, z2, objective, **given)
        yield supcon_loss(z1, labels, process_group=group)
        yield siglip_loss(z1, z2, process_group=group)

    def all_of_it():
        return [x for loss in values() for x in (loss, *torch.autograd.grad(loss, z1))]

    expected = all_of_it()
    torch.set_default_device(name)
    try:
        found = all_of_it()
        rows = verify_distributed(
            group, objectives=("infonce",), dtype=torch.float32, large_message=0, print=None
        )
    finally:
        torch.set_default_device(None)
    return len(rows), all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["meta", "cuda"])
def test_another_default_device_changes_nothing(ranks, name):
    """Also one that the machine lacks, as long as no tensor is made there."""
    for rows, same in ranks.run(2, under_default_device, name=name):
        assert rows > 0
        assert same


# --- torch.func ---


def through_func(group, objective, reduction):
    """Relative difference of `torch.func.grad`'s gradient from autograd's."""
    z1, z2 = (z + dist.get_rank(group) for z in pair(4, 3))
    ids = {} if objective == "uniform" else {"ids": torch.arange(4) // 2}

    def loss(z):
        options = {"reduction": reduction, "process_group": group, **ids}
        return alpha_cl_loss(z, z2, objective, **options).square().sum()

    leaf = z1.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    try:
        found = torch.func.grad(loss)(z1)
    except RuntimeError as error:
        return str(error)
    return float((found - expected).norm() / expected.norm())


def test_func_grad_over_ranks(ranks):
    for objective in ("infonce", "alpha_square", "uniform"):
        for reduction in ("mean", "none"):
            answers = ranks.run(3, through_func, objective=objective, reduction=reduction)
            if (objective, reduction) == ("uniform", "none"):
                assert all("torch.func cannot differentiate uniform()" in x for x in answers)
            else:
                assert max(answers) < 1e-12
