"""An objective as a program: the sweeps and row steps that lead from similarities to row scalars.

`record` runs `Objective.solve` once on places instead of vectors and writes down every sum and
every row step that it asks for. A backend that computes a whole step of a loss in one call executes
the program; no formula is written again for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .bundles import RowScalars, Term, Weight
from .objectives import (
    Objective,
    RowSolution,
    RowStep,
    means_of_sums,
    newton,
    pair_dtau_rows,
)

#: The places of the vectors that exist before the first instruction: zeros, and t⁺.
ZEROS, POSITIVES = 0, 1


class Sweep(NamedTuple):
    """Sums over the negatives of every anchor; with a weight also the gradient in the rows."""

    terms: tuple[Term, ...]
    outputs: tuple[int, ...]  #: the place of each term's vector
    scalars: RowScalars  #: of places, `ZEROS` where a vector is missing
    weight: Weight | None = None
    most: int = 0  #: repeated with the next row step, at most so often, until …
    done: int = ZEROS  #: … this place's vector is nonzero for every anchor


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

    n_neg = None  # in `BatchNumbers` only
    most_neg = "most"

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
        return self._step(step, vectors, outputs, params)

    def _step(
        self,
        step: RowStep,
        vectors: tuple[int, ...],
        outputs: tuple[int, ...],
        params: Mapping[str, float | str],
    ) -> dict[str, int]:
        values = tuple(params[name] for name in step.parameters)
        self.instructions.append(Step(step, vectors, outputs, values))
        return dict(zip(step.outputs, outputs, strict=True))

    def apply(self, function: Any, vector: int) -> tuple[int, ...]:
        outputs = self._new(2)
        self.instructions.append(Apply(function.key, vector, outputs))
        return outputs

    def newton(
        self,
        terms: tuple[Term, ...],
        origin: int,
        start: tuple[int, int, int],
        most: int,
        powers: Mapping[str, float],
    ) -> tuple[int, tuple[int, ...]]:
        low, high, y = start
        sums = self.sums(terms, shift=origin, argument_offset=y, moment_origin=origin)
        (done,) = self._new(1)
        self.instructions[-1] = self.instructions[-1]._replace(most=most, done=done)
        # in place: where all anchors are done, the next y is this one
        self._step(newton, (*sums[:2], y, low, high), (low, high, y, done), powers)
        return y, sums

    def mean_negative(self) -> int:
        return self.moments()[0]

    def moments(self) -> tuple[int, ...]:
        """From sums that the sweep for the largest t takes along."""
        sums, terms = self._new(3), (Term.F, Term.F_MOMENT, Term.DF_MOMENT)
        (at,) = (k for k, x in enumerate(self.instructions) if isinstance(x, Sweep))
        first = self.instructions[at]
        outputs = (*first.outputs, *sums)
        self.instructions[at] = first._replace(terms=(*first.terms, *terms), outputs=outputs)
        return tuple(self.step(means_of_sums, self.pos, *sums).values())


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
