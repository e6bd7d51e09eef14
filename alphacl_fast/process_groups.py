"""The processes that share a batch: their group, the messages between them, and their agreement.

**An own group.** The messages of a loss travel in a group of their own, which is made once for each
group that a user passes. So a message that the user's program has under way in its group, such as
an `isend` whose receiver comes later, neither meets a message of the loss nor holds one up. The
group is freed with the user's group.

**Agreement.** Each call begins with one small all-gather of `Statement`s: either all ranks go on
with the same call, or all raise the same error.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import re
import struct
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .call import Need
from .graph import on_cpu
from .objectives import Objective
from .plan import STATEMENT_BYTES

STRATEGIES = ("auto", "gather", "ring", "two_level")
#: Seconds in which the ranks that fail to meet the others tell each other so.
GRACE = 3.0


# --- the user's group -----------------------------------------------------------------------------


class ProcessGroup:
    """The ranks that share a loss's batch, and how they exchange rows.

    Args:
        process_group: a torch ProcessGroup, a DeviceMesh of one dimension, or "world".
        strategy: a member of `STRATEGIES`.
        ranks_per_node: how many neighbouring ranks of the group share a node; None: the environment
            variable LOCAL_WORLD_SIZE, which torchrun sets.
    """

    def __init__(
        self, process_group: Any, strategy: str, ranks_per_node: int | None = None
    ) -> None:
        if not dist.is_available():
            raise ValueError(
                "process_group must be None: this build of torch has no torch.distributed"
            )
        self.strategy, self.ranks_per_node = strategy, _checked_per_node(ranks_per_node, strategy)
        self._name, self._given = "world", None
        if isinstance(process_group, str) and process_group == "world":
            return
        group = _group_of_mesh(process_group)
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be None, 'world', a torch.distributed ProcessGroup or a "
                f"1-dimensional DeviceMesh, got {process_group!r}"
            )
        # torch holds a living group; a loss that held it too would keep a destroyed one
        self._name, self._given = f"<{group.size()} processes>", weakref.ref(group)

    def __repr__(self) -> str:
        name = repr(self._name) if self._given is None else self._name
        per_node = self.ranks_per_node
        shown = "" if per_node is None else f", ranks_per_node={per_node}"
        return f"{name}, strategy={self.strategy!r}{shown}"

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessGroup:
        return self  # a copy of a loss shares its batch with the same processes

    def __reduce__(self) -> tuple[Any, ...]:
        if self._given is not None:
            raise TypeError(
                "process_group must be 'world' for a loss that is pickled: a torch ProcessGroup "
                "belongs to its process"
            )
        return ProcessGroup, ("world", self.strategy, self.ranks_per_node)

    def handle(self) -> dist.ProcessGroup:
        """The user's group.

        Raises:
            ValueError: it does not exist yet or any more, or does not contain this process.
        """
        if not dist.is_initialized():
            raise ValueError(
                "process_group needs torch.distributed to be initialised, got a call before "
                "init_process_group"
            )
        handle = dist.group.WORLD if self._given is None else self._given()
        if handle is None or not _is_registered(handle):
            raise ValueError(
                "process_group must be a living group, got one that destroy_process_group has ended"
            )
        if dist.get_rank(handle) < 0:
            raise ValueError(
                f"process_group must contain this process, got one without rank {dist.get_rank()} "
                "of the world"
            )
        return handle

    def own(self) -> OwnGroup:
        """The loss's own group of the same ranks; the first call makes it."""
        return own_group(self.handle())

    def per_node(self, own: OwnGroup) -> int | None:
        """Ranks of a node; None where no strategy uses it.

        Raises:
            ValueError: strategy="two_level", and the group does not consist of whole nodes.
        """
        if self.strategy not in ("auto", "two_level"):
            return None
        demanded = self.strategy == "two_level" or self.ranks_per_node is not None
        per_node, name = self.ranks_per_node, "ranks_per_node"
        if per_node is None:
            name = "ranks_per_node (from LOCAL_WORLD_SIZE)"
            text = os.environ.get("LOCAL_WORLD_SIZE", "")
            per_node = int(text) if text.isdigit() else 0
        why = ""
        if per_node < 1:
            why = (
                "ranks_per_node must be given with strategy='two_level', unless the environment "
                "variable LOCAL_WORLD_SIZE says it"
            )
        elif own.world % per_node:
            why = f"{name} must divide the number of ranks, {own.world}, got {per_node}"
        elif self.ranks_per_node is None and not own.consists_of_nodes(per_node):
            why = (
                "ranks_per_node must be given: neighbouring ranks of process_group are not on one "
                f"node of LOCAL_WORLD_SIZE={per_node}"
            )
        if why and demanded:
            raise ValueError(why)
        return None if why else per_node


def _checked_per_node(ranks_per_node: int | None, strategy: str) -> int | None:
    if ranks_per_node is None:
        return None
    if isinstance(ranks_per_node, bool) or not isinstance(ranks_per_node, int):
        raise TypeError(f"ranks_per_node must be None or an integer, got {ranks_per_node!r}")
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node must be at least 1, got {ranks_per_node}")
    if strategy not in ("auto", "two_level"):
        raise ValueError(
            f"ranks_per_node must be None with strategy={strategy!r}, got {ranks_per_node}"
        )
    return ranks_per_node


def _group_of_mesh(process_group: Any) -> Any:
    """The group of a DeviceMesh of one dimension; anything else unchanged."""
    if not hasattr(process_group, "mesh_dim_names"):
        return process_group
    if process_group.ndim != 1:
        raise ValueError(
            "process_group must be a DeviceMesh of 1 dimension, got one of shape "
            f"{tuple(process_group.mesh.shape)}; choose a dimension, as in mesh['data']"
        )
    return process_group.get_group()


# --- the loss's own group -------------------------------------------------------------------------


class OwnGroup:
    """A group of a loss's own with the ranks of a user's group.

    Attributes:
        handle: the torch group.
        rank: this process's rank in it.
        world: the number of its ranks.
        backends: the backend of each device type.
        calls: counts the calls that the ranks have begun to agree on.
    """

    def __init__(self, users: dist.ProcessGroup) -> None:
        self.members = dist.get_process_group_ranks(users)
        self.rank, self.world = dist.get_rank(users), len(self.members)
        config = str(dist.get_backend_config(users))
        self.backends = dict(part.split(":") for part in config.split(","))
        _MADE[users.group_name] += 1
        self._name = f"{users.group_name}:alphacl_fast:{_MADE[users.group_name]}"
        self._config, self._timeout = config, _timeout(users, self.backends)
        self.handle = self._new(self.members, self._name)
        self.nodes: dict[int, dist.ProcessGroup] = {}
        self.calls = itertools.count()

    def node(self, per_node: int) -> dist.ProcessGroup:
        """The group of this process's node; all its ranks must call it."""
        if per_node not in self.nodes:
            first = self.rank - self.rank % per_node
            members = self.members[first : first + per_node]
            self.nodes[per_node] = self._new(members, f"{self._name}:{per_node}:{first}")
        return self.nodes[per_node]

    def consists_of_nodes(self, per_node: int) -> bool:
        """Whether every ``per_node`` neighbouring ranks are all processes of one node."""
        firsts = self.members[::per_node]
        expected = [first + k for first in firsts for k in range(per_node)]
        return self.members == expected and all(first % per_node == 0 for first in firsts)

    def _new(self, members: list[int], name: str) -> dist.ProcessGroup:
        with _named(name):
            return dist.new_group(
                members, self._timeout, self._config, use_local_synchronization=True
            )

    def message_device(self, device: torch.device | None) -> torch.device:
        """Where the statements of an agreement are: on the CPU if the group has a backend for it,
        else on the given device.
        """
        if "cpu" in self.backends:
            return torch.device("cpu")
        if device is not None and device.type in self.backends:
            return device
        kind = next(iter(self.backends))  # this rank has nothing but an error to state
        return torch.device(kind, getattr(torch, kind).current_device())

    def free(self) -> None:
        """Destroys the groups that torch still has."""
        for group in (self.handle, *self.nodes.values()):
            if dist.is_initialized() and _is_registered(group):
                dist.destroy_process_group(group)


_OWN: weakref.WeakKeyDictionary[dist.ProcessGroup, OwnGroup] = weakref.WeakKeyDictionary()
_MADE: Counter[str] = Counter()


def own_group(users: dist.ProcessGroup) -> OwnGroup:
    """The own group of a user's group, made once; all ranks of the group must call it."""
    own = _OWN.get(users)
    if own is None or not _is_registered(own.handle):
        for other in [other for other in _OWN if not _is_registered(other)]:
            _OWN.pop(other).free()
        own = _OWN[users] = OwnGroup(users)
        weakref.finalize(users, own.free).atexit = False
    return own


def _is_registered(group: dist.ProcessGroup) -> bool:
    """Whether torch knows the group: it has not been destroyed."""
    try:
        dist.get_rank(group)
    except ValueError:
        return False
    return True


def _timeout(group: dist.ProcessGroup, backends: dict[str, str]) -> Any:
    """The group's time limit, None where its backends do not say it."""
    for device in ("cpu", *backends):
        if device in backends:
            options = getattr(group._get_backend(torch.device(device)), "options", None)
            if (timeout := getattr(options, "_timeout", None)) is not None:
                return timeout
    return None


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Groups made inside have this name, and communicators of their own.

    torch names a group that its members alone make after the number of groups that each of them is
    in, and waits for ever where these numbers differ; and it splits a bound device's communicator
    together with ranks that do not take part.
    """
    torchs = dist.distributed_c10d
    changed: dict[str, Callable[..., Any]] = {
        "_process_group_name": lambda ranks, use_hashed_name: name,
        "_get_split_source": lambda group: None,
    }
    changed = {key: function for key, function in changed.items() if hasattr(torchs, key)}
    originals = {key: getattr(torchs, key) for key in changed}
    try:
        for key, function in changed.items():
            setattr(torchs, key, function)
        yield
    finally:
        for key, function in originals.items():
            setattr(torchs, key, function)


# --- messages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peers:
    """The ranks of a group and the messages between them.

    Attributes:
        handle: the torch group.
        rank: this process's rank in it.
        world: the number of its ranks.
        call: the call that the messages belong to, for errors.
        number: of the call in the group.
        messages: counts the messages of the call; all ranks have the same.
    """

    handle: dist.ProcessGroup
    rank: int
    world: int
    call: str = field(default="a loss", kw_only=True)
    number: int = field(default=0, kw_only=True)
    messages: Iterator[int] = field(
        default_factory=itertools.count, kw_only=True, repr=False, compare=False
    )

    def all_reduce(self, x: Tensor, op: Any = None) -> Tensor:
        """Σ (or another reduction) over the processes, the same bits on all of them."""
        x = x.clone(memory_format=torch.contiguous_format)
        with self.waiting("all-reduce"):
            dist.all_reduce(x, op or dist.ReduceOp.SUM, group=self.handle)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """(k,) → (P, k)."""
        out = x.new_empty(self.world * x.numel())
        with self.waiting("all-gather"):
            dist.all_gather_into_tensor(out, x, group=self.handle)
        return out.view(self.world, -1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """(P, k) → (k,), the sum of everyone's row for this process."""
        if self.has_reduce_scatter(x.device):
            out = x.new_empty(x.shape[1])
            with self.waiting("reduce-scatter"):
                dist.reduce_scatter_tensor(out, x.view(-1), group=self.handle)
            return out
        out = x[self.rank].clone()
        for step in range(1, self.world):
            to, source = (self.rank + step) % self.world, (self.rank - step) % self.world
            out += self.exchange(x[to], to, x.shape[1], source, 2).wait()
        return out

    def has_reduce_scatter(self, device: torch.device) -> bool:
        """gloo sends twice the bytes that it must, and copies its input."""
        config = str(dist.get_backend_config(self.handle))
        return f"{device.type}:gloo" not in config.split(",")

    def exchange(self, outgoing: Tensor, to: int, size: int, source: int, tag: int) -> Arrival:
        """Starts to send a flat tensor to one rank and to receive one of ``size`` elements from
        another.

        No message is left out: an empty one travels as one element, since all ranks must take part
        in the first batch of messages of a communicator of NCCL.
        """
        to, source = to % self.world, source % self.world
        outgoing = outgoing if outgoing.numel() else outgoing.new_zeros(1)
        incoming = outgoing.new_empty(max(size, 1))
        with self.waiting("exchange", [to, source]):
            works = dist.batch_isend_irecv([
                dist.P2POp(function, tensor, dist.get_global_rank(self.handle, peer),
                           self.handle, tag)
                for function, tensor, peer in (
                    (dist.isend, outgoing, to),
                    (dist.irecv, incoming, source),
                )
            ])  # fmt: skip
        return Arrival(self, incoming, outgoing, size, works, [to, source])

    @contextmanager
    def waiting(self, what: str, ranks: list[int] | None = None) -> Iterator[None]:
        """Says of an error inside which message of which call failed, and who did not come.

        Args:
            ranks: the ranks that the message waits for; None: all of them.
        """
        key = f"{self.number}/{next(self.messages)}"
        try:
            yield
        except RuntimeError as error:
            late = f"ranks {ranks}" if ranks else self._missing(key)
            raise RuntimeError(
                f"{self.call} on rank {self.rank} of {self.world} waited in its {what} for {late}, "
                f"which did not make the same call in time or failed: {error}"
            ) from error

    def _missing(self, key: str) -> str:
        """The ranks that do not say within `GRACE` seconds that they failed to meet the others."""
        others = {r: f"alphacl_fast/{key}/{r}" for r in range(self.world) if r != self.rank}
        try:
            store = dist.distributed_c10d._get_process_group_store(self.handle)
            store.set(f"alphacl_fast/{key}/{self.rank}", "waits")
            end = time.monotonic() + GRACE
            while others and time.monotonic() < end:
                others = {r: mark for r, mark in others.items() if not store.check([mark])}
                time.sleep(0.05)
        except RuntimeError:  # the store has gone with the process that held it
            return f"some of the ranks {[*others]}"
        return f"ranks {[*others]}" if others else "each other"


class Arrival:
    """A message under way.

    It keeps the outgoing tensor alive until `wait` returns, and no tensor afterwards.
    """

    def __init__(
        self,
        peers: Peers,
        incoming: Tensor,
        outgoing: Tensor,
        size: int,
        works: list[Any],
        ranks: list[int],
    ) -> None:
        self._state = peers, incoming, outgoing, size, works, ranks

    def wait(self) -> Tensor:
        (peers, incoming, _, size, works, ranks), self._state = self._state, None
        if works:
            with peers.waiting("exchange", ranks):
                for work in works:
                    work.wait()
        return incoming[:size]


# --- agreeing on a call ---------------------------------------------------------------------------

_COUNTS = struct.Struct("<2q")  # a message begins with the rank's numbers of rows or pairs
_ERRORS: tuple[type[Exception], ...] = (TypeError, ValueError, RuntimeError)
#: Where users' functions are compared: similarities, distances, and sums of them.
_PROBES = (-1.9, -1.1, -0.6, -0.23, -0.05, 0.07, 0.31, 0.74, 1.3, 1.9, 3.2, 10.5, 97.0)


class Statement(NamedTuple):
    """A rank's statement of its arguments; most ranks make the same one."""

    error: type[Exception] | None
    text: str  #: of the error, or of the call
    dim: int = 0
    dtype: torch.dtype | None = None
    device: str = ""  #: the type of the embeddings' device
    wanted: Need = Need(False, False, False)
    temperature: tuple[float, ...] = ()  #: or scale and bias; NaN: not known on the host
    per_node: int | None = None
    functions: tuple[tuple[str, bytes], ...] = ()  #: users' functions at the probes, in float32


class Agreed(NamedTuple):
    """What `exchange` returns."""

    own: OwnGroup
    number: int  #: of the call in the group
    counts: list[tuple[int, int]]
    statements: list[Statement]


def values_of(objective: Objective) -> tuple[tuple[str, bytes], ...]:
    """The values of the user's functions at a few points, which tell functions of one name apart.

    The points are evaluated at every call, since a function may depend on what its program changes.
    """
    if not objective.functions:
        return ()
    # A function may create tensors, which must be on the device of the probes.
    with torch.no_grad(), outside_transforms(), on_cpu():
        probes = torch.tensor(_PROBES, dtype=torch.float64)
        values = ((each.name, each(probes.clone())) for each in objective.functions)
        return tuple((name, x.float().numpy().tobytes()) for name, x in values)


def exchange(
    group: ProcessGroup,
    counts: tuple[int, int],
    state: Callable[[OwnGroup], Statement],
    failure: Exception | None,
    device: torch.device | None,
) -> Agreed:
    """The group, and the counts and statements of all ranks, by one small all-gather.

    Args:
        state: makes this rank's statement; not called if there is a failure.
        failure: the error of this rank's arguments.
        device: of the embeddings; None if it is not known.

    Raises:
        TypeError, ValueError, RuntimeError: on every rank, if one of them has a failure or if they
            do not have the same devices or functions.
    """
    if failure is not None and not dist.is_initialized():
        raise failure
    own = group.own()
    statement = None
    if failure is None:
        try:
            _check_device(own, device)
            statement = state(own)
        except _ERRORS as error:  # the other ranks wait for this one
            failure = error
    if failure is not None:
        kind = next(k for k in _ERRORS if isinstance(failure, k) or k is RuntimeError)
        statement = Statement(kind, cut(str(failure) or type(failure).__name__))
    peers = Peers(own.handle, own.rank, own.world, call=brief(statement), number=next(own.calls))
    message = _COUNTS.pack(*counts) + pickle.dumps(statement)
    data = bytearray(message.ljust(STATEMENT_BYTES, b"\0"))
    with outside_transforms():
        sent = torch.frombuffer(data, dtype=torch.uint8).to(own.message_device(device))
        received = peers.all_gather(sent).cpu()  # without gloo the host waits for the device here
        messages = [x.numpy().tobytes() for x in received.unbind()]
    different = {message[_COUNTS.size :] for message in messages}  # only a few, even of 1,024 ranks
    known = {message: pickle.loads(message) for message in different}
    statements = [known[message[_COUNTS.size :]] for message in messages]
    if failed := [r for r, statement in enumerate(statements) if statement.error]:
        reasons = "; ".join(f"rank {r}: {statements[r].text}" for r in failed)
        raise statements[failed[0]].error(reasons) from failure
    for r, other in enumerate(statements):
        if other is not statements[0]:
            require_same("device type", statements[0].device, other.device, r)
            _require_same_functions(statements[0], other, r)
    counted = [_COUNTS.unpack_from(message) for message in messages]
    return Agreed(own, peers.number, counted, statements)


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Messages inside are no part of a torch.func transform, which would wrap their tensors."""
    if not torch._C._are_functorch_transforms_active():
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def brief(statement: Statement) -> str:
    """The beginning of a statement's text, as a name of its call."""
    return statement.text if len(statement.text) <= 80 else f"{statement.text[:80]}…"


def require_same(what: str, here: Any, there: Any, rank: int) -> None:
    """Raises unless rank 0 and another rank have the same."""
    if here != there:
        raise ValueError(
            f"every rank must pass the same {what}, got {here} on rank 0 and {there} on rank {rank}"
        )


def _check_device(own: OwnGroup, device: torch.device | None) -> None:
    """Raises unless the group can send tensors of the device."""
    if device is not None and device.type not in own.backends:
        has = ", ".join(f"{kind}:{backend}" for kind, backend in own.backends.items())
        raise ValueError(
            f"process_group must have a backend for tensors on {device.type}, got {has} "
            "(init_process_group('cpu:gloo,cuda:nccl') has one for both)"
        )


def _require_same_functions(first: Statement, other: Statement, rank: int) -> None:
    """Raises where the functions of two ranks differ by more than rounding."""
    require_same(
        "functions", [name for name, _ in first.functions], [name for name, _ in other.functions],
        rank,
    )  # fmt: skip
    for (name, here), (_, there) in zip(first.functions, other.functions, strict=True):
        values = zip(
            _PROBES, *(struct.unpack(f"<{len(_PROBES)}f", x) for x in (here, there)), strict=True
        )
        for x, a, b in values:
            same = a == b or (math.isnan(a) and math.isnan(b))
            if not same and not abs(a - b) <= 1e-6 * max(abs(a), abs(b), 1e-6):
                raise ValueError(
                    f"every rank must pass the same function {name}, "
                    f"got {name}({x:g}) = {a:.7g} on rank 0 and {b:.7g} on rank {rank}"
                )


def described(text: str) -> str:
    """A call's description without addresses, which differ, of a length that fits."""
    return cut(re.sub(r" at 0x[0-9a-f]+", "", text))


def cut(text: str) -> str:
    """The text shortened to fit into a statement; a hash tells long texts apart."""
    data, most = text.encode(), STATEMENT_BYTES - 512
    if len(data) <= most:
        return text
    return f"{data[:most].decode(errors='ignore')}… (crc {zlib.crc32(data):08x})"
