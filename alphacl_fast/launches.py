"""Plans: what a step launches, written down once and started again for equal calls.

A step of a GPU backend consists of kernels, of PyTorch operators, and of the Python that decides
about them: checks, tiles, splits, grids, workspaces. The decisions depend on shapes, dtypes,
devices and settings alone. `record` runs a step under a dispatch mode that writes down every
kernel, every operator, and where each operand lies; the `Plan` that it returns does no more than
allocate, fill in addresses and launch.

An operand lies in a *register*: an input, the workspace, a tensor of its own that is returned, or
the result of an operator. All buffers that a step allocates for itself are places in one workspace;
two share bytes if one is last used before the other is first used. A plan holds sizes, offsets and
kernels, but no tensor.

What a plan cannot repeat is refused when it is recorded (`NotRecorded`): a number that the host
reads from a tensor that depends on the inputs, or a tensor of unknown origin.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

#: Every buffer of a workspace begins at a multiple of so many bytes: more than any kernel asks for.
ALIGNMENT = 256
#: How often something changed on which kernels are chosen; a part of the key of every plan.
epoch = 0

_thread = threading.local()


def forget() -> None:
    """Lets no plan serve another call: to be called when other kernels are to be chosen."""
    global epoch
    epoch += 1


def recorder() -> Recorder | None:
    """The recorder that watches this thread, if any."""
    return getattr(_thread, "recorder", None)


def as_one(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``, a new tensor, which a plan calls again as it is.

    It is for functions that set more than their result, such as the precision of products.
    """
    watch = recorder()
    if watch is None:
        return function(*arguments)
    with _disable_current_modes():
        found = function(*arguments)
    watch.one(function, arguments, found)
    return found


class NotRecorded(Exception):
    """A step cannot be repeated without the host; the message says why."""


# --- what a plan consists of ----------------------------------------------------------------------


class View(NamedTuple):
    """A tensor made of a register's tensor; without a size it is that tensor itself."""

    register: int
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    start: int = 0  # elements from the register's first


class Kernel(NamedTuple):
    """A launch through a handle's own launcher: ``call(*values)``."""

    call: Callable[..., Any]
    values: list[Any]
    pointers: tuple[tuple[int, int, int], ...]  # (position, register, bytes)
    nests: tuple[tuple[int, int, int, Callable[..., Any]], ...]  # (position, begin, end, maker)
    length: int  # number of values that the launcher takes; values of nested tuples follow them
    stream: int  # position of the stream
    owner: Any  # the compiled kernel, so that its code stays loaded


class Native(NamedTuple):
    """A launch through a C interface: ``call(*before, &struct, stream)`` returns an error text."""

    call: Callable[..., Any]
    before: tuple[Any, ...]
    layout: type[ctypes.Structure]
    content: bytes  # of the struct, without addresses
    pointers: tuple[tuple[int, int, int], ...]  # (byte, register, bytes)


class Operator(NamedTuple):
    """A call with tensors: an operator of PyTorch, or a launch that has no handle."""

    call: Callable[..., Any]
    values: list[Any]
    views: tuple[tuple[int, View], ...]
    nests: tuple[tuple[int, int, int, Callable[..., Any]], ...]
    length: int
    options: dict[str, Any]
    results: tuple[int, ...]  # registers of the tensors that it returns


class Plan(NamedTuple):
    """A recorded step. `replay` runs it."""

    device: torch.device
    registers: int
    bytes: int  # of the workspace
    workspaces: tuple[tuple[int, torch.dtype], ...]  # registers that see the workspace so
    own: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]  # (register, shape, dtype)
    #: each with the registers that no later one reads
    instructions: tuple[tuple[Kernel | Native | Operator, tuple[int, ...]], ...]
    outputs: tuple[View | None, ...]
    #: Triton's settings and its two hooks, which launches through handles do not call
    hooks: tuple[Any, Any, Any] | None
    about: Any  # data of the caller, which `replay` passes on to the backward


_pack = struct.Struct("=Q").pack_into
_WORKSPACE = 8  # a step has at most eight inputs, whose registers come first


def replay(ctx: Any, plan: Plan, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The ``forward`` of an autograd function: runs a plan on the current stream of its device,
    which is the current device. All outputs but the first are saved for the backward.

    It is one function, because a call of Python costs as much as a launch; so it sets what
    `save_for_backward` and `set_materialize_grads` set.
    """
    device, on_gpu = plan.device, plan.device.type == "cuda"
    stream = torch._C._cuda_getCurrentRawStream(device.index) if on_gpu else 0
    tensors: list[Tensor | None] = [None] * plan.registers
    address = [0] * plan.registers
    for register, x in enumerate(inputs):
        if x is not None:
            tensors[register], address[register] = x, x.data_ptr()
    if plan.bytes:
        workspace = torch.empty(plan.bytes, dtype=torch.uint8, device=device)
        tensors[_WORKSPACE], address[_WORKSPACE] = workspace, workspace.data_ptr()
        for register, dtype in plan.workspaces:
            tensors[register] = workspace.view(dtype)
    for register, shape, dtype in plan.own:
        tensors[register] = x = torch.empty(shape, dtype=dtype, device=device)
        address[register] = x.data_ptr()
    for instruction, freed in plan.instructions:
        kind = type(instruction)
        if kind is Kernel:
            values = instruction.values.copy()
            for position, register, start in instruction.pointers:
                values[position] = address[register] + start
            for position, begin, end, maker in instruction.nests:
                values[position] = maker(values[begin:end])
            values[instruction.stream] = stream
            instruction.call(*values[: instruction.length])
        elif kind is Native:
            content = bytearray(instruction.content)
            for byte, register, start in instruction.pointers:
                _pack(content, byte, address[register] + start)
            error = instruction.call(
                *instruction.before, instruction.layout.from_buffer(content), stream
            )
            if error:
                name = instruction.call.__name__
                raise RuntimeError(f"alphacl_fast: {name}: {error.decode()}")
        else:
            values = instruction.values.copy()
            for position, view in instruction.views:
                x = tensors[view.register]
                if view.size is not None:
                    x = x.as_strided(view.size, view.stride, x.storage_offset() + view.start)
                values[position] = x
            for position, begin, end, maker in instruction.nests:
                values[position] = maker(values[begin:end])
            found = instruction.call(*values[: instruction.length], **instruction.options)
            if len(instruction.results) == 1:
                found = (found,)
            for number, register in enumerate(instruction.results):
                tensors[register], address[register] = found[number], found[number].data_ptr()
        for register in freed:
            tensors[register] = None
    outputs: list[Tensor | None] = []
    for view in plan.outputs:
        x = None if view is None else tensors[view.register]
        if view is not None and view.size is not None:
            x = x.as_strided(view.size, view.stride, x.storage_offset() + view.start)
        outputs.append(x)
    ctx.about, ctx.to_save, ctx.materialize_grads = plan.about, tuple(outputs[1:]), False
    return tuple(outputs)


# --- recording ------------------------------------------------------------------------------------


class _Buffer:
    """Memory that operands lie in."""

    def __init__(self, kind: str, x: Tensor, made: int) -> None:
        self.kind = kind  # input, empty (allocated by the step) or result (by an operator)
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.base = x.data_ptr()
        self.bytes = x.untyped_storage().nbytes()
        self.contiguous = x.is_contiguous()
        # while it exists, no other storage gets the address by which this one is known
        self.storage = StorageWeakRef(x.untyped_storage())
        self.made, self.last = made, made  # instructions before it, and the last that uses it
        self.of_inputs = kind == "input"  # its content depends on them
        self.register = -1
        self.offset = 0  # bytes in the workspace


class _Place(NamedTuple):
    """Where a tensor lay when the step was recorded."""

    buffer: _Buffer
    start: int  # bytes
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Address(NamedTuple):
    """A pointer that a kernel receives."""

    buffer: _Buffer
    start: int  # bytes


_EMPTY = {f"aten::{name}" for name in ("empty", "new_empty", "empty_strided", "new_empty_strided")}


class Recorder(TorchDispatchMode):
    """Writes down what a step does.

    Args:
        inputs: the tensors that other calls have in their place.
        implementations: name → function of the operators that the recorder is to look into.
    """

    def __init__(
        self, inputs: Sequence[Tensor | None], implementations: Mapping[str, Callable[..., Any]]
    ) -> None:
        super().__init__()
        self.implementations = implementations
        self.instructions: list[Any] = []
        self.inputs = [None if x is None else _Buffer("input", x, 0) for x in inputs]
        self.input_storages: dict[int, list[tuple[_Buffer, int]]] = {}
        for x, buffer in zip(inputs, self.inputs, strict=True):
            if x is not None:
                there = self.input_storages.setdefault(x.untyped_storage()._cdata, [])
                there.append((buffer, buffer.base + extent(x)))
        self.storages: dict[int, _Buffer] = {}
        self.buffers: list[_Buffer] = []
        self.hooks: Any = None
        self.depth = 0

    def __enter__(self) -> Recorder:
        _thread.recorder, self.depth = self, self.depth + 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1  # it is entered again inside of its operators
        _thread.recorder = self if self.depth else None
        super().__exit__(*error)

    # what happens

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "alphacl_fast":
            with self:
                return self.implementations[func._schema.name](*args, **kwargs)
        given = [*_tensors((*args, *kwargs.values()))]
        storages = {x.untyped_storage()._cdata for x in given}
        found = func(*args, **kwargs)
        several = () if found is None else found
        results = several if isinstance(several, (tuple, list)) else (found,)
        if not all(isinstance(x, Tensor) for x in results):
            if any(map(self._of_inputs, given)):
                raise NotRecorded(f"the host reads the result of {func._schema.name}")
            return found
        if _has_shape_of_content(func, args) and any(map(self._of_inputs, given)):
            raise NotRecorded(f"the shape of the result of {func._schema.name} is not known")
        fresh = [x.untyped_storage()._cdata not in storages for x in results]
        if func._schema.name in _EMPTY:
            self._new("empty", found)
        elif any(fresh):
            if not all(fresh) or func._schema.is_mutable:
                name = func._schema.name
                raise NotRecorded(f"{name} returns something new and changes or returns an operand")
            self._record(func, args, kwargs, results)
        elif func._schema.is_mutable:
            self._record(func, args, kwargs, ())
        return found

    def kernel(
        self, call: Callable[..., Any], values: Sequence[Any], stream: int, hooks: Any, owner: Any
    ) -> None:
        """A launch through a handle; tensors among the values stand for their addresses."""
        self.hooks = hooks
        flat, nests, length = _flat(values, named=False)
        pointers = tuple(self._addresses(flat).items())
        numbers = [0 if isinstance(x, Tensor) else x for x in flat]
        self.instructions.append(Kernel(call, numbers, pointers, nests, length, stream, owner))

    def native(
        self,
        call: Callable[..., Any],
        before: tuple[Any, ...],
        content: ctypes.Structure,
        pointers: Mapping[str, Tensor | None],
    ) -> None:
        """A launch through a C interface; ``pointers``: field of the struct → tensor."""
        layout = type(content)
        pointed = {getattr(layout, name).offset: x for name, x in pointers.items()}
        addresses = self._addresses(pointed)
        blank = bytearray(content)
        for byte in addresses:
            _pack(blank, byte, 0)
        self.instructions.append(
            Native(call, before, layout, bytes(blank), tuple(addresses.items()))
        )

    def launch(self, call: Callable[..., Any], values: Sequence[Any], options: dict[str, Any]):
        """A launch that has no handle and takes tensors."""
        self._record(call, tuple(values), options, (), named=True)

    def one(self, function: Callable[..., Tensor], arguments: Sequence[Any], found: Tensor) -> None:
        """A function that a plan calls as it is."""
        self._record(function, tuple(arguments), {}, (found,))

    # where operands lie

    def _new(self, kind: str, x: Tensor) -> _Buffer:
        buffer = _Buffer(kind, x, len(self.instructions))
        self.buffers.append(buffer)
        self.storages[x.untyped_storage()._cdata] = buffer
        return buffer

    def _of_inputs(self, x: Tensor) -> bool:
        buffer = self.storages.get(x.untyped_storage()._cdata)
        return buffer is None or buffer.of_inputs

    def _buffer(self, x: Tensor) -> _Buffer:
        storage, address = x.untyped_storage()._cdata, x.data_ptr()
        if storage in self.storages:
            return self.storages[storage]
        near = [b for b, end in self.input_storages.get(storage, ()) if b.base <= address < end]
        # the rows of two inputs may lie between each other, but begin apart
        found = [b for b in near if b.base == address] or near
        if len(found) != 1:
            raise NotRecorded(f"a tensor {tuple(x.shape)} comes from outside of the step")
        return found[0]

    def _is_number(self, x: Tensor) -> bool:
        """Whether a tensor is a number of Python that PyTorch has wrapped for an operator.

        Such a tensor does not take part in type promotion, by which it is known.
        """
        if x.dim() or not x.is_cpu or x.untyped_storage()._cdata in self.storages:
            return False
        narrow = {torch.float64: torch.float32, torch.int64: torch.int32}.get(x.dtype)
        return narrow is not None and torch.result_type(x, torch.empty((), dtype=narrow)) == narrow

    def _place(self, x: Tensor) -> _Place:
        buffer = self._buffer(x)
        buffer.last = len(self.instructions)
        start = x.data_ptr() - buffer.base if x.numel() else 0
        return _Place(buffer, start, tuple(x.shape), x.stride(), x.dtype)

    def _addresses(self, values: Any) -> dict[int, _Address]:
        """Position → address of every tensor that has memory; all of them depend on the inputs."""
        items = values.items() if isinstance(values, dict) else enumerate(values)
        places = {k: self._place(x) for k, x in items if isinstance(x, Tensor)}
        for place in places.values():
            place.buffer.of_inputs = True
        # an empty tensor's address is 0
        return {k: _Address(p.buffer, p.start) for k, p in places.items() if p.buffer.bytes}

    def _record(
        self,
        call: Any,
        args: tuple[Any, ...],
        options: dict[str, Any],
        results: Sequence[Tensor],
        named: bool = False,
    ) -> None:
        flat, nests, length = _flat(args, named)
        seen = {k: x for k, x in enumerate(flat) if isinstance(x, Tensor)}
        seen = {k: x for k, x in seen.items() if not self._is_number(x)}
        views = tuple((k, self._place(x)) for k, x in seen.items())
        if _have_tensors(options.values()):
            raise NotRecorded(f"{call} has a tensor as an option")
        values = [None if k in seen else x for k, x in enumerate(flat)]
        of_inputs = any(place.buffer.of_inputs for _, place in views)
        made = [self._new("result", x) for x in results]
        for buffer in (*made, *(place.buffer for _, place in views)):
            buffer.of_inputs = buffer.of_inputs or of_inputs
        call = getattr(call, "_op", call)  # of an operator: what its Python wrapper calls
        self.instructions.append(Operator(call, values, views, nests, length, options, made))


def _has_shape_of_content(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape of an operator's result depends on the content of a tensor."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    by_mask = any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1:]))
    return by_mask or func._schema.name != "aten::index"


def extent(x: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if not x.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.itemsize


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _have_tensors(values: Iterable[Any]) -> bool:
    return any(True for _ in _tensors(values))


def _flat(values: Sequence[Any], named: bool) -> tuple[list[Any], tuple[Any, ...], int]:
    """Values with the members of tuples that hold tensors behind them, how to nest these again,
    and the number of values. ``named``: a named tuple is to become one again.
    """
    flat, nests = list(values), []
    for position, value in enumerate(values):
        members = value if isinstance(value, (tuple, list)) else ()
        if _have_tensors(x for x in members if not isinstance(x, Tensor)):
            raise NotRecorded("tensors in tuples of tuples")
        if _have_tensors(members):
            maker = list if isinstance(value, list) else tuple
            nests.append((position, len(flat), len(flat) + len(value),
                          getattr(value, "_make", maker) if named else maker))  # fmt: skip
            flat += value
            flat[position] = None
    return flat, tuple(nests), len(values)


# --- from the record to the plan ------------------------------------------------------------------


def record(
    function: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    implementations: Mapping[str, Callable[..., Any]],
    about: Any = None,
) -> Plan:
    """The plan of ``function(*inputs)``, whose results are tensors or None. It runs once.

    Raises:
        NotRecorded: it cannot be repeated without the host.
    """
    if len(inputs) > _WORKSPACE:
        raise ValueError(f"a step must have at most {_WORKSPACE} inputs, got {len(inputs)}")
    given = [None if x is None else x.detach() for x in inputs]
    present = [x for x in given if x is not None]
    if any(_overlap(x, y) for x, y in itertools.combinations(present, 2)):
        raise NotRecorded("two inputs share memory")
    watch = Recorder(given, implementations)
    device = present[0].device
    with torch.no_grad(), watch:
        outputs = function(*given)
        places = [None if x is None else watch._place(x) for x in outputs]
    return _Writer(watch, device, places).plan(about)


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors may share memory. Rows of one between rows of the other do not."""
    begin, other = x.data_ptr(), y.data_ptr()
    if other + extent(y) <= begin or begin + extent(x) <= other:
        return False
    alike = x.dim() == y.dim() == 2 and (x.stride(), x.dtype) == (y.stride(), y.dtype)
    if not (alike and x.stride(1) == 1):
        return True
    apart = abs(begin - other) // x.itemsize % max(1, x.stride(0))
    width = max(x.shape[1], y.shape[1])
    return not width <= apart <= x.stride(0) - width


class _Writer:
    """Gives every buffer a register, and writes the plan."""

    def __init__(self, watch: Recorder, device: torch.device, outputs: list[_Place | None]) -> None:
        self.watch, self.device, self.outputs = watch, device, outputs
        self.registers = _WORKSPACE + 1
        returned = {id(place.buffer) for place in outputs if place is not None}
        for number, buffer in enumerate(watch.inputs):
            if buffer is not None:
                buffer.register = number
        used = [b for b in watch.buffers if b.kind == "result" or b.last > b.made or b.bytes]
        self.own = [b for b in used if b.kind == "empty" and id(b) in returned]
        for buffer in used:
            if buffer.kind == "result" or id(buffer) in returned:
                buffer.register = self._register()
        shared = [b for b in used if b.kind == "empty" and id(b) not in returned]
        self.shared = {id(b) for b in shared}
        self.bytes = layout(shared)
        self.typed: dict[torch.dtype, int] = {}
        self.results = [b for b in used if b.kind == "result" and id(b) not in returned]

    def _register(self) -> int:
        self.registers += 1
        return self.registers - 1

    def plan(self, about: Any) -> Plan:
        allocated = [b for b in self.watch.buffers if b.kind == "empty" and b.bytes]
        if any(b.device != self.device for b in allocated):
            raise NotRecorded(f"a buffer is not on {self.device}")
        instructions, freed = [], []
        for number, instruction in enumerate(self.watch.instructions):
            freed += [b.register for b in self.results if b.last == number]
            made = instruction.results if isinstance(instruction, Operator) else ()
            if made and all(b.last == number for b in made):
                continue  # its results are not used
            instructions.append((self._written(instruction), tuple(freed)))
            freed = []
        outputs = tuple(None if place is None else self._view(place) for place in self.outputs)
        own = tuple((b.register, self._shape(b), b.dtype) for b in self.own)
        typed = tuple((register, dtype) for dtype, register in self.typed.items())
        return Plan(
            self.device, self.registers, self.bytes, typed, own, tuple(instructions), outputs,
            self.watch.hooks, about,
        )  # fmt: skip

    def _written(self, instruction: Any) -> Kernel | Native | Operator:
        if isinstance(instruction, Operator):
            views = tuple((k, self._view(place)) for k, place in instruction.views)
            results = tuple(buffer.register for buffer in instruction.results)
            return instruction._replace(views=views, results=results)
        pointers = tuple((at, *self._pointer(address)) for at, address in instruction.pointers)
        return instruction._replace(pointers=pointers)

    def _pointer(self, address: _Address) -> tuple[int, int]:
        buffer, start = address
        if id(buffer) in self.shared:
            return _WORKSPACE, buffer.offset + start
        return buffer.register, start

    def _shape(self, buffer: _Buffer) -> tuple[int, ...]:
        if buffer.contiguous and buffer.shape.numel() * buffer.dtype.itemsize == buffer.bytes:
            return tuple(buffer.shape)
        return (buffer.bytes // buffer.dtype.itemsize,)

    def _view(self, place: _Place) -> View:
        buffer, start, size, stride, dtype = place
        if id(buffer) in self.shared:
            if dtype not in self.typed:
                self.typed[dtype] = self._register()
            return View(self.typed[dtype], size, stride, (buffer.offset + start) // dtype.itemsize)
        if dtype != buffer.dtype:
            raise NotRecorded(f"a buffer of {buffer.dtype} is seen as {dtype}")
        whole = self._shape(buffer) if buffer in self.own else tuple(buffer.shape)
        if start == 0 and size == whole and stride == _strides(buffer, whole):
            return View(buffer.register)
        return View(buffer.register, size, stride, start // dtype.itemsize)


def _strides(buffer: _Buffer, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a register's tensor where they are known: those of a contiguous one."""
    if not buffer.contiguous:
        return None
    return torch.empty(shape, device="meta").stride()


def layout(buffers: Sequence[_Buffer]) -> int:
    """Places buffers in a workspace; returns its bytes.

    The largest come first, each at the lowest offset at which nothing lies that is in use at the
    same time.
    """
    placed: list[_Buffer] = []
    end = 0
    for buffer in sorted(buffers, key=operator.attrgetter("bytes"), reverse=True):
        size = -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
        offset = 0
        for other in sorted(placed, key=operator.attrgetter("offset")):
            apart = other.last < buffer.made or buffer.last < other.made
            if not apart and offset + size > other.offset:
                offset = max(offset, other.offset + -(-other.bytes // ALIGNMENT) * ALIGNMENT)
        buffer.offset = offset
        placed.append(buffer)
        end = max(end, offset + size)
    return end
