"""An objective as a program: the sweeps and row steps that lead from similarities to row scalars.

`record` runs `Objective.solve` once on places instead of vectors and writes down every sum and
every row step that it asks for. A backend that computes a whole step of a loss in one call executes
the program; no formula is written again for it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

from .bundles import RowScalars, Term, Weight
from .objectives import Objective, RowSolution, RowStep, pair_dtau_rows

#: The places of the vectors that exist before the first instruction: zeros, and t⁺.
ZEROS, POSITIVES = 0, 1


class Sweep(NamedTuple):
    """Sums over the negatives of every anchor; with a weight also the gradient in the rows."""

    terms: tuple[Term, ...]
    outputs: tuple[int, ...]  #: the place of each term's vector
    scalars: RowScalars  #: of places, `ZEROS` where a vector is missing
    weight: Weight | None = None


class Step(NamedTuple):
    """A row step."""

    step: RowStep
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: tuple[float | str, ...]  #: a name stands for a number that follows from the temperature


class Apply(NamedTuple):
    """A user's function of a vector."""

    function: str  #: its key
    input: int
    outputs: tuple[int, int]  #: its values and derivatives


class Program(NamedTuple):
    """What to compute, in order, and where the results are."""

    instructions: tuple[Sweep | Step | Apply, ...]
    places: int
    mass: int
    loss: int
    dtau: tuple[int, ...]  #: for each number that is learnt


class _Recorder:
    """The `Pairs` of a program that is being written: a vector is the number of its place."""

    pos = POSITIVES

    def __init__(self, numbers: tuple[str, ...]) -> None:
        self.tau = numbers
        self.instructions: list[Sweep | Step | Apply] = []
        self.places = POSITIVES + 1

    def _new(self, count: int) -> tuple[int, ...]:
        self.places += count
        return tuple(range(self.places - count, self.places))

    def zeros(self) -> int:
        return ZEROS

    def stack(self, *vectors: int) -> tuple[int, ...]:
        return vectors

    def sums(self, terms: tuple[Term, ...], **scalars: int | None) -> tuple[int, ...]:
        if scalars.get("moment_origin") is None:
            scalars["moment_origin"] = self.pos
        return self.sweep(terms, scalars, None)

    def sweep(
        self, terms: tuple[Term, ...], scalars: dict[str, int | None], weight: Weight | None
    ) -> tuple[int, ...]:
        places = RowScalars(*(scalars.get(name) or ZEROS for name in RowScalars._fields))
        self.instructions.append(Sweep(terms, self._new(len(terms)), places, weight))
        return self.instructions[-1].outputs

    def step(self, step: RowStep, *vectors: int, **params: float) -> dict[str, int]:
        outputs = self._new(len(step.outputs))
        values = tuple(params[name] for name in step.parameters)
        self.instructions.append(Step(step, vectors, outputs, values))
        return dict(zip(step.outputs, outputs, strict=True))

    def apply(self, function: Any, vector: int) -> tuple[int, ...]:
        outputs = self._new(2)
        self.instructions.append(Apply(function.key, vector, outputs))
        return outputs


@functools.lru_cache(maxsize=256)
def record(objective: Objective, gradient: bool, learn_tau: bool) -> Program:
    """The program of a recordable objective, with the gradient in the rows or in τ or without."""
    p = _Recorder(objective.numbers)
    from_pairs = learn_tau and objective.tau_gradient == "pairs"
    if objective.one_sweep:
        rows, terms = objective.start(p), objective.terms_of(learn_tau)
        if not gradient and not from_pairs:
            sums = p.sums(terms, shift=rows.shift, moment_origin=rows.moment_origin)
            return _program(p, objective.finish(p, rows, sums), learn_tau)
    else:
        rows, terms = objective.solve(p, learn_tau and objective.tau_gradient == "rows"), ()
        if not gradient and not from_pairs:
            return _program(p, rows, learn_tau)
    terms = (*terms, Term.DTAU) if from_pairs else terms
    scalars = {name: getattr(rows, name) for name in RowScalars._fields}
    if scalars["moment_origin"] is None:
        scalars["moment_origin"] = p.pos
    sums = p.sweep(terms, scalars, _weight(objective, rows))
    if objective.one_sweep:
        rows = objective.finish(p, rows, sums)
    if from_pairs:
        rows = replace(rows, **p.step(pair_dtau_rows, rows.row_weight, sums[-1]))
    return _program(p, rows, learn_tau)


def _program(p: _Recorder, rows: RowSolution, learn_tau: bool) -> Program:
    dtau = ()
    if learn_tau:
        dtau = rows.dtau if isinstance(rows.dtau, tuple) else (rows.dtau,)
    return Program(tuple(p.instructions), p.places, rows.mass, rows.loss, dtau)


def _weight(objective: Objective, rows: RowSolution) -> Weight:
    """By what a pair is weighed."""
    if objective.derivative:
        return Weight.DF
    return Weight.F if rows.baseline is None else Weight.F_PLUS_DF
