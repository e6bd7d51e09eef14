"""The order of all messages, for 1 to 17 ranks, under the rules of NCCL.

Every rank's operations are recorded while the project's own code runs with a group that sends
nothing. Then they are replayed: each rank has one stream, and an operation ends before the next one
begins; a batch of sends and receives ends when each has met its counterpart; between two ranks,
sends and receives meet in order, whatever their tags; a collective needs all ranks of its
communicator. The real streams overlap more, so that what ends here ends there.
"""

import itertools
from dataclasses import dataclass, field, replace

import pytest
import torch
from family import MODES, is_due

from alphacl_fast import distributed, functional, process_groups
from alphacl_fast.call import Need


@dataclass(frozen=True)
class Silent(process_groups.Peers):
    """Peers that record what they would send: ("send" | "recv" | collective, …)."""

    log: list = field(kw_only=True)
    members: range = field(kw_only=True)  # ranks of the whole group

    def collective(self, kind, elements):
        self.log.append((self.members, kind, elements))

    def all_reduce(self, x, op=None):
        self.collective("all_reduce", x.numel())
        # a min player's iterations end when all ranks are done
        return torch.ones_like(x) if op == process_groups.dist.ReduceOp.MIN else x.clone()

    def all_gather(self, x):
        self.collective("all_gather", x.nbytes)
        return x.new_zeros(self.world, x.numel())

    def reduce_scatter(self, x):
        self.collective("reduce_scatter", x.numel())
        return x.new_zeros(x.shape[1])


class Works:
    """A batch of sends and receives that is never waited for."""

    def __init__(self):
        self.batch = None

    def __call__(self, operations):
        self.batch = operations
        return []


@dataclass(frozen=True)
class SilentRanks(Silent, distributed.Ranks):
    """Ranks that record what they would send."""

    def node(self):
        first = self.rank - self.rank % self.per_node
        members = range(first, first + self.per_node)
        return Silent(None, self.rank - first, self.per_node, log=self.log, members=members)

    def exchange(self, outgoing, to, size, source, tag):
        works = Works()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process_groups.dist, "batch_isend_irecv", works)
            patch.setattr(process_groups.dist, "get_global_rank", lambda handle, peer: peer)
            patch.setattr(process_groups.dist, "P2POp", lambda *arguments: arguments)
            arrival = super().exchange(outgoing, to, size, source, tag)
        batch = [
            ("send" if function is process_groups.dist.isend else "recv", peer, x.nbytes, tag)
            for function, x, peer, _, tag in works.batch
        ]
        self.log.append((self.members, "batch", batch))
        arrival._state[1].zero_()
        return arrival


def recorded(rank, sizes, mode, strategy, per_node, objective):
    """The operations of one rank in a step."""
    log = []
    ranks = SilentRanks(
        None, rank, len(sizes), sizes, Need(True, True, False), strategy,
        per_node=per_node, log=log, members=range(len(sizes)),
    )  # fmt: skip
    z1, z2 = (torch.randn(sizes[rank], 2, requires_grad=True) for _ in range(2))
    call = functional.make_call(
        objective, {}, similarity="cosine", negatives=mode[0], symmetric=mode[1],
        reduction="mean", backend="blocked", precision=None,
        process_group=process_groups.ProcessGroup("world", "auto"),
    )  # fmt: skip
    tau, bound, _ = functional.bind(z1, z2, 0.5, call)
    distributed.global_loss(z1, z2, tau, replace(bound, ranks=ranks)).backward()
    return log


def replayed(logs):
    """None if all ranks come to the end, or why not."""
    logs = [list(reversed(log)) for log in logs]
    open_batches = [None] * len(logs)
    used = set()  # communicators that have had an operation
    while any(logs):
        moved = False
        for rank, log in enumerate(logs):
            if not log:
                continue
            members, kind, what = log[-1]
            heads = [logs[r][-1] if logs[r] else None for r in members]
            if kind == "batch":
                if members not in used:  # NCCL makes a communicator when all ranks of it come
                    if not all(head and head[:2] == (members, "batch") for head in heads):
                        continue
                    used.add(members)
                if open_batches[rank] is None:
                    open_batches[rank], moved = list(what), True
            elif all(head == (members, kind, what) for head in heads):
                used.add(members)
                for r in members:
                    logs[r].pop()
                moved = True
            elif all(head and head[0] == members for head in heads) and not any(
                head[1] == "batch" for head in heads
            ):
                return f"collectives differ: {heads}"
        for rank, batch in enumerate(open_batches):
            for send in [each for each in batch or () if each[0] == "send"]:
                first = next(each for each in batch if each[:2] == send[:2])
                theirs = open_batches[send[1]] or []
                mate = next((each for each in theirs if each[:2] == ("recv", rank)), None)
                if mate is None or first is not send:
                    continue
                if mate[2:] != send[2:]:
                    return f"rank {rank} sends {send}, rank {send[1]} waits for {mate}"
                batch.remove(send)
                theirs.remove(mate)
                moved = True
        for rank, batch in enumerate(open_batches):
            if batch == []:
                open_batches[rank] = None
                logs[rank].pop()
                moved = True
        if not moved:
            return f"ranks wait for ever: {[log[-1] if log else None for log in logs]}"
    return None


def strategies(world):
    yield "gather", 1
    yield "ring", 1
    for per_node in range(1, world + 1):
        if world % per_node == 0:
            yield "two_level", per_node


def splits(world):
    """Even parts, all pairs at one rank, and uneven parts of which some are empty."""
    yield (2,) * world
    yield (4, *[0] * (world - 1))
    yield tuple((3 * r + world) % 4 for r in range(world - 1)) + (2,)


@pytest.mark.parametrize("world", range(1, 18))
def test_all_schedules_come_to_an_end(world, monkeypatch):
    """More than 5 ranks: each split by each strategy in one mode, which changes; `make test-all`
    takes all modes.
    """
    monkeypatch.setattr(distributed._Sweep, "add", lambda *arguments: None)  # no pairs
    cases = itertools.product(strategies(world), splits(world), enumerate(MODES))
    for turn, ((strategy, per_node), sizes, (k, mode)) in enumerate(cases):
        if world > 5 and not is_due(turn // len(MODES) + k, len(MODES)):
            continue
        logs = [recorded(rank, sizes, mode, strategy, per_node, "infonce") for rank in range(world)]
        assert replayed(logs) is None, (strategy, per_node, sizes, mode)
        if strategy != "gather" and world // per_node > 1:
            assert any(kind == "batch" for _, kind, _ in logs[0])


def test_ranks_without_rows_take_part_in_the_first_batch():
    logs = [recorded(rank, (4, 0, 0), MODES[0], "ring", 1, "infonce") for rank in range(3)]
    assert [log[0][1] for log in logs] == ["batch"] * 3


@pytest.mark.parametrize("objective", ["alpha_square", "uniform", "triplet"])
def test_schedules_of_other_objectives(objective):
    for (strategy, per_node), mode in zip(itertools.cycle(strategies(4)), MODES, strict=False):
        logs = [
            recorded(rank, (3, 0, 1, 2), mode, strategy, per_node, objective) for rank in range(4)
        ]
        assert replayed(logs) is None, (strategy, per_node, mode)


def test_the_replay_finds_faults():
    both = range(2)

    def batch(*operations):
        return both, "batch", [*operations]

    send, recv = ("send", 1, 8, 0), ("recv", 0, 8, 0)
    assert replayed([[batch(send)], [batch(recv)]]) is None
    assert "for ever" in replayed([[batch(send)], []])
    assert "waits for" in replayed([[batch(send)], [batch(("recv", 0, 4, 0))]])
    reduce, gather = (both, "all_reduce", 1), (both, "all_gather", 1)
    assert "collectives differ" in replayed([[reduce, gather], [gather, reduce]])
    assert "for ever" in replayed([[batch(send), reduce], [reduce, batch(recv)]])
    crossed = [[batch(("recv", 1, 8, 0)), batch(send)], [batch(recv), batch(("send", 0, 8, 0))]]
    assert "for ever" in replayed(crossed)
