"""Runs launches and keeps what they did: hazards, instructions met, time."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from .faults import Fault
from .floats import NAN
from .machine import AT_ONCE, Machine
from .parse import Kernel, parse

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Machines that are kept, the last ones that ran: one of a general kernel takes 100 MB.
MOST_MACHINES = 16


@dataclass
class Record:
    kernel: str
    blocks: int
    steps: int  # instructions of warps
    seconds: float
    hazards: dict[str, int]


@dataclass
class Runner:
    """Decodes a kernel at its first launch.

    ``rewrite`` changes the PTX of a kernel, given its name, before it is parsed.
    """

    rewrite: Callable[[str, str], str] = lambda name, ptx: ptx
    records: list[Record] = field(default_factory=list)
    machines: dict[tuple, Machine] = field(default_factory=dict)
    kernels: dict[tuple, Kernel] = field(default_factory=dict)
    #: what machines that are gone have executed
    retired: list[tuple[Kernel, np.ndarray]] = field(default_factory=list)
    seed: int = 0

    def machine(self, ptx: str, name: str, shared: int, grid: tuple[int, int]) -> Machine:
        """A machine for the kernel, with room for the blocks of a grid or for some of them."""
        text = self.rewrite(name, ptx)
        if (name, text) not in self.kernels:
            self.kernels[name, text] = parse(text, name)
        kernel = self.kernels[name, text]
        most = max(1, AT_ONCE // kernel.threads)
        blocks = min(1 << (grid[0] * grid[1] - 1).bit_length(), most)
        key = name, text, shared, blocks
        machine = self.machines.pop(key, None)
        if machine is None:
            if len(self.machines) == MOST_MACHINES:
                self._retire(next(iter(self.machines)))
            machine = Machine(kernel, shared, blocks)
        self.machines[key] = machine
        return machine

    def _retire(self, key: tuple) -> None:
        """Frees what a machine takes at once: its parts refer to it."""
        machine = self.machines.pop(key)
        self.retired.append((machine.kernel, machine.coverage()))
        vars(machine).clear()

    def retire(self) -> None:
        """Frees all machines."""
        for key in [*self.machines]:
            self._retire(key)

    def executed(self) -> list[tuple[Kernel, np.ndarray]]:
        """Kernels, each with the instructions that one of its machines has executed."""
        return self.retired + [(m.kernel, m.coverage()) for m in self.machines.values()]

    def run(self, machine: Machine, parameters: bytes, grid: tuple[int, int]) -> None:
        """Runs all blocks; the caller has given the machine its ranges of global memory.

        Raises:
            Fault: what a kernel did wrong, the name of the kernel before it.
        """
        machine.parameters[:] = np.frombuffer(parameters, np.uint8)
        machine.hazards.clear()
        begin, steps = time.process_time(), machine.steps
        name = machine.kernel.name
        try:
            blocks = [(x, y) for y in range(grid[1]) for x in range(grid[0])]
            for k in range(0, len(blocks), machine.blocks):
                some = blocks[k : k + machine.blocks]
                machine.async_state.seeds[: len(some)] = [self.seed + 1000 * y + x for x, y in some]
                machine.run(some, grid)
        except Fault as fault:
            raise Fault(f"{name}: {fault}") from fault
        finally:
            seconds = time.process_time() - begin
            record = Record(
                name, grid[0] * grid[1], machine.steps - steps, seconds, dict(machine.hazards)
            )
            self.records.append(record)

    def hazards(self) -> list[str]:
        return [f"{r.kernel}: {hazard}" for r in self.records for hazard in r.hazards]


def fill_with_nan(x: torch.Tensor) -> None:
    """Writes the GPU's NaN to every element."""
    size = x.element_size()
    x.view(_INTEGER[size]).fill_(NAN[size])


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Within the context garbage is looked for after many more objects: instructions are kept."""
    before = gc.get_threshold()
    gc.set_threshold(200 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the context `new_empty` tensors are full of the GPU's NaN."""
    original = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        made = original(self, *shape, **options)
        if made.is_floating_point() and made.numel():
            fill_with_nan(made)
        return made

    torch.Tensor.new_empty = new_empty
    try:
        yield
    finally:
        torch.Tensor.new_empty = original
