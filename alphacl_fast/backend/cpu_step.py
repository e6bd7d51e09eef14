"""A whole step of a loss in one native call (csrc/cpu/step.h): rows, sums, row steps, gradient.

A `Plan` holds everything that follows from the shapes and settings of a call; running it needs only
pointers, which are taken from the tensors of each call.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..bundles import (
    MOST_PARAMETERS,
    Dtype,
    Form,
    PairFunction,
    Pairing,
    RowScalars,
    Term,
    accumulation_dtype,
    rows_of_terms,
)
from ..objectives import KINDS, custom, row_codes
from ..program import ZEROS, Apply, Program, Step, Sweep
from ..reads import Reading, all_unchanged, look
from . import cpu, cpu_functions, forms

#: The default of ``workspace``: bytes in which a step may keep tiles from one sweep to the next.
DEFAULT_WORKSPACE = 64 << 20

_MOST_INSTRUCTIONS, _MOST_VECTORS, _MOST_STEP_PARAMETERS, _MOST_SLOPES = 12, 8, 4, 2


class _Instruction(ctypes.Structure):
    """`struct Instruction` of csrc/cpu/sweep.h."""

    _fields_ = (
        [(name, ctypes.c_int32) for name in ("row_step", "form", "gradient", "weight")]
        + [("terms", ctypes.c_int32 * len(Term))]
        + [("scalars", ctypes.c_int32 * len(RowScalars._fields))]
        + [(name, ctypes.c_int32 * _MOST_VECTORS) for name in ("inputs", "outputs")]
        + [(name, ctypes.c_int32) for name in ("output_count", "most", "done")]
        + [("constant_shift", ctypes.c_double)]
        + [("params", ctypes.c_double * _MOST_STEP_PARAMETERS)]
        + [(name, ctypes.c_void_p) for name in ("values", "constants")]
    )


class _Step(ctypes.Structure):
    """`struct Step` of csrc/cpu/sweep.h."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in (
                *("z1", "z2", "pos", "bias", "dpos", "dbias"),
                *("ids", "n_neg_of", "empty", "guide", "largest_guide"),
                *("incoming", "loss", "dz", "dtau"),
                *cpu._HOOKS,
                *("values", "constants"),
            )
        ]
        + [
            (name, ctypes.c_int64)
            for name in (
                *("n_pairs", "dim", "stride1", "stride2", "rows", "split", "partner", "anchors"),
                *("lo", "hi", "block", "guide_dim", "workspace"),
            )
        ]
        + [(name, ctypes.c_double) for name in ("tau", "n_neg", "divisor", "max_gap", "factor")]
        + [("params", ctypes.c_double * MOST_PARAMETERS)]
        + [
            (name, ctypes.c_int32)
            for name in (
                *("dtype", "kind", "each", "limited", "threads", "instruction_set", "similarity"),
                *("instructions", "places", "mass", "losses", "slopes"),
            )
        ]
        + [("dtau_of", ctypes.c_int32 * _MOST_SLOPES)]
        + [("program", _Instruction * _MOST_INSTRUCTIONS)]
    )


SIZE = ctypes.sizeof(_Step)
#: `enum Similarity` of csrc/cpu/sweep.h.
_SIMILARITIES = ("cosine", "dot", "euclidean")

#: τ, or a scale and a bias.
Temperature = float | tuple[float, float]


class Batch(NamedTuple):
    """What a step computes, but for its objective and its tensors."""

    n_pairs: int  #: of two views; 0: the rows are anchors whose positives are given, and others
    dim: int
    dtype: torch.dtype
    rows: int  #: of the stacked views, that the sweeps see
    pairing: Pairing
    n_neg: int
    divisor: int
    wanted: tuple[int, int]  #: rows whose gradient is wanted
    each: bool  #: one loss per anchor instead of one number
    needs_negatives: bool  #: an anchor without negatives has loss 0
    similarity: str
    workspace: int
    max_gap: float | None = None


class Numbers(NamedTuple):
    """What follows from the value of a temperature, or of a scale and a bias."""

    tau: float  #: that the pair kind sees
    log_range: tuple[float, float] | None  #: the bounds of log f, if it has them
    factor: float  #: by which the rows of the first view are multiplied
    values: dict[str, float]  #: of the program's row steps


class Placed(NamedTuple):
    """Users' functions of a plan, as they were when they were last compiled."""

    readings: list[Reading | None]  #: what they read
    functions: list[cpu_functions.Function]
    numbers: dict[str, float]  #: `Numbers.values`, which may follow from the functions


class Plan:
    """A step for all calls with the same shapes and settings, at one temperature."""

    def __init__(
        self,
        batch: Batch,
        program: Program,
        kind: str,
        params: tuple[float, ...],
        numbers_at: Callable[[Temperature], Numbers],
    ) -> None:
        """``numbers_at`` says what follows from a temperature; `at` comes before `run`."""
        self.batch, self.wide = batch, accumulation_dtype(batch.dtype)
        self.program, self.numbers_at = program, numbers_at
        self.like = torch.empty(0, dtype=self.wide, device="cpu")
        self.function = PairFunction(kind, params, self.like)
        self.alone: Plan | None = None
        self.temperature: Temperature | None = None
        isa = cpu.INSTRUCTION_SETS.index(cpu.instruction_set())
        # euclidean rows are centred, in the accumulation dtype
        of_rows = self.wide if batch.similarity == "euclidean" else batch.dtype
        _, self.block_sizes = cpu._kernels(isa, Dtype.of(of_rows))
        low, high = batch.wanted
        self.gradient = high > low
        pairing, slopes = batch.pairing, len(program.dtau)
        # shapes without memory: `empty_like` takes half the time of `new_empty`
        one = self.like.new_empty(())
        self.like_loss = one.expand(pairing.anchors) if batch.each else one
        self.like_dz = one.expand(high - low, batch.dim)
        self.like_dtau = (one if slopes == 1 else one.expand(slopes)) if slopes else None
        self.step = _Step(
            n_pairs=batch.n_pairs, dim=batch.dim, stride1=batch.dim, stride2=batch.dim,
            rows=batch.rows, split=pairing.split, partner=pairing.partner,
            anchors=pairing.anchors, lo=low, hi=high,
            workspace=batch.workspace, n_neg=batch.n_neg, divisor=batch.divisor,
            params=self.function.padded(), dtype=Dtype.of(batch.dtype),
            kind=KINDS[kind].code if kind in KINDS else -1, each=batch.each,
            limited=batch.max_gap is not None, max_gap=batch.max_gap or 0.0, instruction_set=isa,
            similarity=_SIMILARITIES.index(batch.similarity),
            instructions=len(program.instructions), places=program.places, mass=program.mass,
            losses=program.loss, slopes=slopes, **cpu._HOOKS,
        )  # fmt: skip
        self.step.dtau_of[: len(program.dtau)] = program.dtau
        #: by instructions: sweeps, and parameters that are numbers of the temperature
        self.sweeps: list[tuple[int, Sweep]] = []
        self.named: list[tuple[int, int, str]] = []
        self.applied: list[tuple[int, Apply]] = []
        for k, instruction in enumerate(program.instructions):
            if isinstance(instruction, Apply):
                self.applied.append((k, instruction))
                self.step.program[k].inputs[0] = instruction.input
                self.step.program[k].outputs[:2] = instruction.outputs
                self.step.program[k].output_count = 2
                continue
            if isinstance(instruction, Sweep):
                self.sweeps.append((k, instruction))
                _write_sweep(self.step.program[k], instruction)
                continue
            _write_row_step(self.step.program[k], instruction)
            names = enumerate(instruction.params)
            self.named += [(k, at, name) for at, name in names if isinstance(name, str)]
        self.of_users = kind not in KINDS or bool(self.applied)
        self.placed = Placed([None], [], {})
        self._choose_forms()

    @property
    def forward(self) -> Plan:
        """The plan that a forward executes: `alone`, without gradients, if it differs."""
        return self.alone or self

    def at(self, temperature: Temperature) -> Plan:
        """This plan at a temperature: the forms of its sweeps follow from it."""
        if temperature == self.temperature:
            return self
        plan = copy.copy(self)
        plan.temperature, plan.step = temperature, _Step.from_buffer_copy(self.step)
        plan.alone = self.alone and self.alone.at(temperature)
        numbers = self.numbers_at(temperature)
        plan.step.tau, plan.step.factor = numbers.tau, numbers.factor
        for k, at, name in self.named:
            plan.step.program[k].params[at] = numbers.values[name]
        if self.named:
            plan.placed = Placed([None], [], {})
        if numbers.log_range != self.function.log_range:
            plan.function = self.function._replace(log_range=numbers.log_range)
            plan._choose_forms()
        return plan

    def _choose_forms(self) -> None:
        for k, sweep in self.sweeps:
            target = self.step.program[k]
            target.form, target.constant_shift = _form(sweep, self.function)

    def _place_functions(self, step: _Step) -> list[cpu_functions.Function]:
        """Writes users' functions into a step; returns what must live as long as it.

        They may have changed since the last step.
        """
        of_pairs = [(self.function.kind, self.function.params)] if step.kind < 0 else []
        functions = of_pairs + [(apply.function, ()) for _, apply in self.applied]
        placed = self.placed
        if not all_unchanged(placed.readings):
            readings = [look(custom(key).fn) for key, _ in functions]
            found = [cpu.compiled(key, params, self.wide) for key, params in functions]
            numbers = self.numbers_at(self.temperature).values if self.named else {}
            placed = self.placed = Placed(readings, found, numbers)
        targets = [step] * len(of_pairs) + [step.program[k] for k, _ in self.applied]
        for target, function in zip(targets, placed.functions, strict=True):
            target.values = function.address
            target.constants = ctypes.addressof(function.constants)
        for k, at, name in self.named:
            step.program[k].params[at] = placed.numbers[name]
        return placed.functions

    def run(
        self,
        z1: Tensor,
        z2: Tensor,
        same_id: tuple[Tensor, Tensor, Tensor] | None = None,
        incoming: Tensor | None = None,
        guide: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, the gradient in the wanted rows, the gradient in τ; None where not wanted.

        ``incoming`` (anchors,) is the gradient of every anchor's loss; the losses themselves are
        then not returned. ``guide``: the contiguous tensors of a `call.Guide`.
        """
        step = _Step.from_buffer_copy(self.step)
        if not z1.is_contiguous():
            z1, step.stride1 = _with_stride(z1)
        if not z2.is_contiguous():
            z2, step.stride2 = _with_stride(z2)
        step.z1, step.z2 = z1.data_ptr(), z2.data_ptr()
        return self._execute(step, same_id, incoming, guide)

    def run_given(
        self,
        z: Tensor,
        others: Tensor | None,
        pos: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool],
        same_id: tuple[Tensor, Tensor, Tensor] | None = None,
        incoming: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """As `run`, for anchors z whose positives' similarities are ``pos`` (anchors,).

        They meet the rows ``others`` or, without these, one another. ``bias`` is added to what each
        of the rows met meets. Beside what `run` returns come the gradients in ``pos`` and
        ``bias``; ``needs`` says which of the two are wanted.
        """
        step = _Step.from_buffer_copy(self.step)
        pos, (z, step.stride1) = pos.contiguous(), _with_stride(z)
        step.z1, step.pos = z.data_ptr(), pos.data_ptr()
        if others is not None:
            others, step.stride2 = _with_stride(others)
            step.z2 = others.data_ptr()
        dpos = dbias = None
        if needs[0]:
            dpos = torch.empty_like(pos)
            step.dpos = dpos.data_ptr()
        if bias is not None:
            bias = bias.contiguous()
            step.bias = bias.data_ptr()
            if needs[1]:
                dbias = torch.empty_like(bias)
                step.dbias = dbias.data_ptr()
        return *self._execute(step, same_id, incoming), dpos, dbias

    def _execute(
        self,
        step: _Step,
        same_id: tuple[Tensor, Tensor, Tensor] | None,
        incoming: Tensor | None,
        guide: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Runs a step whose inputs are written; returns what `run` does."""
        batch, loss, dz, dtau = self.batch, None, None, None
        alive = self._place_functions(step) if self.of_users else None
        if incoming is None:
            loss = torch.empty_like(self.like_loss)
            step.loss = loss.data_ptr()
        else:
            incoming = incoming.contiguous()
            step.incoming = incoming.data_ptr()
        if self.gradient:
            dz = torch.empty_like(self.like_dz)
            step.dz = dz.data_ptr()
        if self.like_dtau is not None:
            dtau = torch.empty_like(self.like_dtau)
            step.dtau = dtau.data_ptr()
        if same_id is not None:
            step.ids, step.n_neg_of, empty = (x.data_ptr() for x in same_id)
            step.empty = empty if batch.needs_negatives else None
        if guide is not None:
            step.guide, step.largest_guide = (x.data_ptr() for x in guide)
            step.guide_dim = guide[0].shape[1]
        if threading.get_ident() != threading.main_thread().ident:
            step.check_signals = None  # signals are the main thread's
        step.block = cpu.block_rows(batch.rows, self.block_sizes)
        step.threads = cpu._threads(
            batch.rows, batch.dim, batch.pairing.split, self.gradient, step.guide_dim
        )
        status = cpu._library().alphacl_cpu_step(ctypes.byref(step))
        del alive
        if status != cpu._OK:
            cpu.fail(status, batch.rows, batch.dim, batch.dtype)
        return loss, dz, dtau


def _with_stride(z: Tensor) -> tuple[Tensor, int]:
    """Rows whose features are neighbours in memory, and the stride of the rows."""
    if z.stride(1) != 1 and z.shape[1] > 1:
        z = z.contiguous()
    return z, z.stride(0)


def _write_sweep(target: _Instruction, sweep: Sweep) -> None:
    places = rows_of_terms(sweep.terms)
    target.row_step = -1
    target.terms = tuple(-1 if row < 0 else sweep.outputs[row] for row in places)
    target.scalars, target.most, target.done = tuple(sweep.scalars), sweep.most, sweep.done
    if sweep.weight is not None:
        target.gradient, target.weight = 1, sweep.weight


def _form(sweep: Sweep, function: PairFunction) -> tuple[Form, float]:
    """The form of a sweep, and its constant shift."""
    if sweep.weight is None:
        return forms.of_row_sums(function, sweep.terms)
    given = RowScalars(*(None if place == ZEROS else place for place in sweep.scalars))
    return forms.of_pair_grad(function, given, sweep.weight, sweep.terms)


def _write_row_step(target: _Instruction, step: Step) -> None:
    target.row_step = row_codes()[step.step.name, len(step.inputs)]
    target.inputs = step.inputs + (ZEROS,) * (_MOST_VECTORS - len(step.inputs))
    target.outputs = step.outputs + (ZEROS,) * (_MOST_VECTORS - len(step.outputs))
    target.output_count = len(step.outputs)
    known = [0.0 if isinstance(x, str) else x for x in step.params]
    target.params = (*known, *[0.0] * (_MOST_STEP_PARAMETERS - len(known)))


@functools.cache
def default_workspace() -> int:
    """The bytes for kept tiles, from ALPHACL_CPU_WORKSPACE if it is set."""
    given = os.environ.get("ALPHACL_CPU_WORKSPACE")
    if not given:
        return DEFAULT_WORKSPACE
    if not given.isdecimal():
        raise ValueError(f"ALPHACL_CPU_WORKSPACE must be a number of bytes ≥ 0, got {given!r}")
    return int(given)
