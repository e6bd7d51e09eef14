"""Runs Gluon kernels for Hopper on a CPU, as asynchronously as the hardware is allowed to be.

``Emulated(kernel, seed)[grid](*args)`` takes the place of ``kernel[grid](*args)``. The functions run as they are written, as
Python; only the names they look up (the Gluon language, barriers, TMA, warpgroup products) are replaced.

* Partitions of `warp_specialize` are threads of which one runs at a time. At every operation on a barrier, a copy or a product
  the turn passes to a partition, or to a copy on its way, chosen at random with weights that differ from seed to seed. A seed
  gives the same schedule again, and where nobody can go on that is a deadlock, found at once.
* A TMA copy fills its destination with NaN when it is asked for; the data and the barrier's bytes come at some later turn.
* An asynchronous product reads its operands in shared memory at some time between its issue and the wait that covers it, in
  order; before that wait its result is NaN.
* Barriers count arrivals and bytes and have phases. One that no fence has made known to the asynchronous proxy is an error.
* Loads and stores outside a tensor, copies or products left in flight at the end, and more arrivals than expected are errors.

Not emulated: layouts, registers, the warps within a partition, integers of 32 bits, the rounding of tensor cores.
"""

import itertools
import random
import threading
from types import FunctionType, SimpleNamespace

import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

_here = threading.local()  # .program, .partition


class EmulationError(AssertionError):
    """The kernel does what would hang, or what hardware leaves undefined."""


class _Aborted(BaseException):
    """Ends a partition after another has failed."""


# --- time ---------------------------------------------------------------------------------------------------------------


class Program:
    """One program of a grid: its partitions and the copies on their way."""

    def __init__(self, ids, grid, rng):
        self.ids, self.grid, self.rng = ids, grid, rng
        self.partitions, self.copies, self.barriers = [], [], []
        self.failure = None
        self.copy_weight = rng.choice((0.05, 1.0, 20.0))

    def turn(self):
        """The partition that goes on, or None; copies that come first are carried out."""
        while not all(p.done for p in self.partitions):
            able = [p for p in self.partitions if not p.done and p.ready()]
            if not able and not self.copies:
                raise EmulationError("deadlock: every partition waits for a barrier")
            weights = [p.weight for p in able] + [self.copy_weight] * len(self.copies)
            chosen = self.rng.choices(able + self.copies, weights)[0]
            if isinstance(chosen, Partition):
                return chosen
            self.copies.remove(chosen)
            chosen.deliver()

    def fail(self, error):
        self.failure = self.failure or error
        for p in self.partitions:
            p.go.release()

    def specialize(self, functions_and_args):
        self.partitions = [Partition(self, function, args) for function, args in functions_and_args]
        for p in self.partitions:
            p.thread.start()
        self.turn().go.release()
        for p in self.partitions:
            p.thread.join()
        if self.failure:
            raise self.failure
        self.partitions = []


class Partition:
    def __init__(self, program, function, args):
        self.program, self.function, self.args = program, function, args
        self.weight = program.rng.choice((0.1, 1.0, 10.0))
        self.haste = program.rng.choice((0.0, 0.5, 1.0))  # how soon products read their operands
        self.products = []
        self.done, self.ready = False, lambda: True
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        _here.program, _here.partition = self.program, self
        self.go.acquire()
        try:
            if self.program.failure:
                return
            self.function(*self.args)
            if self.products:
                raise EmulationError(f"a partition ended with {len(self.products)} products in flight")
            self.done = True
            self.pass_on()
        except _Aborted:
            pass
        except BaseException as error:
            self.program.fail(error)

    def pass_on(self):
        chosen = self.program.turn()
        if chosen is not None:
            chosen.go.release()

    def pause(self, ready=lambda: True):
        """Lets others run, and goes on at a time when ``ready()``."""
        if self.products and self.program.rng.random() < self.haste:
            self.finish(self.program.rng.randrange(len(self.products)))
        self.ready = ready
        self.pass_on()
        self.go.acquire()
        if self.program.failure:
            raise _Aborted

    def finish(self, left):
        """Carries out the oldest products until so many are left."""
        while len(self.products) > left:
            self.products.pop(0).compute()


def _pause(*ready):
    if _here.partition is not None:
        _here.partition.pause(*ready)


# --- memory -------------------------------------------------------------------------------------------------------------


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, data):
        self.data, self.shape, self.dtype = data, tuple(data.shape), data.dtype

    def index(self, i):
        if not 0 <= i < self.shape[0]:
            raise EmulationError(f"index must be below {self.shape[0]}, got {i}")
        return Shared(self.data[i])

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        _pause()
        return self.data.clone()


class Barriers:
    """An array of mbarriers, or one of them."""

    def __init__(self, program, shape, members=None):
        self.members = members or [Barrier(program) for _ in range(shape[0])]

    def index(self, i):
        return Barriers(None, None, [self.members[i]])

    @property
    def one(self):
        (barrier,) = self.members
        return barrier


class Barrier:
    def __init__(self, program):
        self.count = None
        program.barriers.append(self)

    def init(self, count):
        self.count = self.pending = count
        self.bytes, self.phase, self.known = 0, 0, False

    def arrive(self, count):
        if count > self.pending:
            raise EmulationError(f"{count} arrivals at a barrier that expects {self.pending} more")
        self.pending -= count
        self.close()

    def add_bytes(self, number):
        self.bytes += number
        self.close()

    def close(self):
        if not self.pending and not self.bytes:
            self.pending, self.phase = self.count, self.phase + 1

    def passed(self, parity):
        return self.phase % 2 != parity


class Copy:
    def __init__(self, descriptor, coordinates, barrier, destination):
        self.source, self.at = descriptor.base, coordinates
        self.barrier, self.destination = barrier, destination
        if min(coordinates) < 0:
            raise EmulationError(f"coordinates of a copy must not be negative here, got {coordinates}")
        if destination.shape != descriptor.block_type.shape:
            raise EmulationError(f"a copy of {descriptor.block_type.shape} needs as much room, got {destination.shape}")
        destination.data.fill_(float("nan"))

    def deliver(self):
        data = torch.zeros(self.destination.shape, dtype=self.destination.dtype)
        box = self.source[tuple(slice(at, at + size) for at, size in zip(self.at, data.shape, strict=True))]
        data[tuple(map(slice, box.shape))] = box  # the rest is beyond the tensor
        self.destination.data.copy_(data)
        self.barrier.add_bytes(-data.nbytes)


class Descriptor:
    def __init__(self, host):
        if list(host.shape) != list(host.base.shape) or list(host.strides) != list(host.base.stride()):
            raise EmulationError(f"a descriptor of {host.shape} by {host.strides} of another tensor")
        shape = tuple(host.block_shape)
        self.base, self.layout, self.dtype = host.base, host.layout, host.base.dtype
        self.block_type = SimpleNamespace(shape=shape, nbytes=torch.empty(shape, dtype=self.dtype).nbytes)


class Pointer:
    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)

    def selected(self, mask):
        offset = torch.as_tensor(self.offset)
        mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.expand(offset.shape)
        chosen = offset[mask]
        if chosen.numel() and not 0 <= chosen.min() <= chosen.max() < self.data.numel():
            raise EmulationError(f"access to elements {chosen.min()} to {chosen.max()} of {self.data.numel()}")
        return offset, mask, chosen.long()


# --- products -----------------------------------------------------------------------------------------------------------


class Product:
    """An accumulator: of a product in flight, or of none yet."""

    def __init__(self, a, b, acc, use_acc):
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.shape, self.value = (a.shape[0], b.shape[1]), None
        if a.shape[1] != b.shape[0] or tuple(acc.shape) != self.shape:
            raise EmulationError(f"product of {tuple(a.shape)} and {tuple(b.shape)} into {tuple(acc.shape)}")

    def compute(self):
        a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
        self.value = a.float() @ b.float()
        if self.use_acc:
            self.value = self.value + (self.acc.value if isinstance(self.acc, Product) else self.acc)


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    _here.partition.pause()
    product = Product(a, b, acc, use_acc)
    _here.partition.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_init(value):
    product = Product(value, torch.zeros(value.shape[1], value.shape[1]), value, True)
    product.value = value
    return product


def warpgroup_mma_wait(num_outstanding=0, deps=()):
    _here.partition.pause()
    _here.partition.finish(num_outstanding)
    values = [
        dep if not isinstance(dep, Product) else torch.full(dep.shape, float("nan")) if dep.value is None else dep.value
        for dep in deps
    ]
    return values[0] if len(values) == 1 else tuple(values)


def fence_async_shared(cluster=False):
    for barrier in _here.program.barriers:
        barrier.known = barrier.count is not None


class mbarrier:
    MBarrierLayout = type("MBarrierLayout", (), {})

    @staticmethod
    def init(barrier, count):
        barrier.one.init(count)

    @staticmethod
    def expect(barrier, number):
        _pause()
        barrier.one.add_bytes(number)
        barrier.one.arrive(1)

    @staticmethod
    def arrive(barrier, *, count=1):
        _pause()
        barrier.one.arrive(count)

    @staticmethod
    def wait(barrier, phase):
        _pause(lambda: barrier.one.passed(phase))


class tma:
    @staticmethod
    def async_copy_global_to_shared(descriptor, coordinates, barrier, destination):
        _pause()
        if not barrier.one.known:
            raise EmulationError("a copy signals a barrier that no fence has made known to it")
        storage = destination.data.data_ptr()
        if any(copy.destination.data.data_ptr() == storage for copy in _here.program.copies):
            raise EmulationError("two copies at a time into one buffer")
        _here.program.copies.append(Copy(descriptor, coordinates, barrier.one, destination))


# --- language -----------------------------------------------------------------------------------------------------------


def _layout(*args, **kwargs):
    return None


class language:
    """What stands for ``gl`` and ``tl``: operations on torch tensors and Python numbers."""

    float32, float64, bfloat16, int32, int64 = torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64
    SliceLayout = NVMMADistributedLayout = DotOperandLayout = staticmethod(_layout)
    static_range, PropagateNan = range, tl.PropagateNan
    exp2, log, log2, div_rn = (staticmethod(f) for f in (torch.exp2, torch.log, torch.log2, torch.div))
    permute, reshape = staticmethod(torch.permute), staticmethod(torch.reshape)

    @staticmethod
    def program_id(axis):
        return _here.program.ids[axis]

    @staticmethod
    def num_programs(axis):
        return _here.program.grid[axis]

    @staticmethod
    def cdiv(a, b):
        return -(-a // b)

    @staticmethod
    def cast(x, dtype):
        return x.to(dtype) if isinstance(x, torch.Tensor) else x

    @staticmethod
    def where(condition, a, b):
        return torch.where(condition, a, b) if isinstance(condition, torch.Tensor) else (a if condition else b)

    @staticmethod
    def maximum(a, b, propagate_nan=None):
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return torch.maximum(*(torch.as_tensor(x, dtype=torch.float32) for x in (a, b)))
        return max(a, b)

    @staticmethod
    def sum(x, axis):
        return x.sum(axis)

    @staticmethod
    def split(x):
        return x[..., 0], x[..., 1]

    @staticmethod
    def convert_layout(x, layout, assert_trivial=False):
        return x

    @staticmethod
    def arange(start, end, layout=None):
        return torch.arange(start, end, dtype=torch.int32)

    @staticmethod
    def full(shape, value, dtype, layout=None):
        return torch.full(tuple(shape), value, dtype=dtype)

    @staticmethod
    def zeros(shape, dtype, layout=None):
        return torch.zeros(tuple(shape), dtype=dtype)

    @staticmethod
    def load(pointer, mask=None, other=0.0):
        offset, mask, chosen = pointer.selected(mask)
        out = torch.full(offset.shape, other, dtype=pointer.data.dtype)
        out[mask] = pointer.data[chosen]
        return out

    @staticmethod
    def store(pointer, value, mask=None):
        _, mask, chosen = pointer.selected(mask)
        pointer.data[chosen] = value[mask]

    @staticmethod
    def allocate_shared_memory(dtype, shape, layout):
        if isinstance(layout, mbarrier.MBarrierLayout):
            return Barriers(_here.program, shape)
        return Shared(torch.full(shape, float("nan"), dtype=dtype))

    @staticmethod
    def warp_specialize(functions_and_args, worker_num_warps, worker_num_regs):
        if not len(functions_and_args) - 1 == len(worker_num_warps) == len(worker_num_regs):
            raise EmulationError("warps and registers of every worker partition must be given")
        _here.program.specialize(functions_and_args)


_MODULES = {
    "triton.experimental.gluon.language": language,
    "triton.language": language,
    hopper.mbarrier.__name__: mbarrier,
    hopper.tma.__name__: tma,
}
_FUNCTIONS = {
    hopper.warpgroup_mma: warpgroup_mma,
    hopper.warpgroup_mma_init: warpgroup_mma_init,
    hopper.warpgroup_mma_wait: warpgroup_mma_wait,
    hopper.fence_async_shared: fence_async_shared,
}


def _translated(value, known):
    """What a name of a kernel's stands for here."""
    if isinstance(value, gl.constexpr):
        return value.value
    if isinstance(value, FunctionType):
        return _FUNCTIONS.get(value, value)
    if getattr(value, "__name__", None) in _MODULES:
        return _MODULES[value.__name__]
    python = getattr(value, "fn", None)  # of a jitted function, interpreted or not
    if not isinstance(python, FunctionType):
        return value
    if value not in known:
        names = dict(python.__globals__)
        known[value] = FunctionType(python.__code__, names, python.__name__, python.__defaults__, python.__closure__)
        for name in python.__code__.co_names:
            if name in names:
                names[name] = _translated(names[name], known)
    return known[value]


class Emulated:
    """Takes the place of a Gluon kernel, to be launched on CPU tensors; the seed chooses the schedules."""

    def __init__(self, kernel, seed=0):
        self.kernel, self.seed, self.known = kernel, seed, {}

    def __getitem__(self, grid):
        return lambda *args, num_warps=4, **kwargs: self.launch((*grid, 1, 1)[:3], args, kwargs)

    def launch(self, grid, args, kwargs):
        function = _translated(self.kernel, self.known)
        args, kwargs = [self.argument(x) for x in args], {name: self.argument(x) for name, x in kwargs.items()}
        rng = random.Random(self.seed)
        for ids in itertools.product(*map(range, grid)):
            _here.program, _here.partition = Program(ids, grid, rng), None
            function(*args, **kwargs)
            if _here.program.copies:
                raise EmulationError(f"a program ended with {len(_here.program.copies)} copies in flight")

    def argument(self, x):
        if isinstance(x, torch.Tensor):
            return Pointer(x.view(-1))
        return Descriptor(x) if hasattr(x, "block_shape") else _translated(x, self.known)
