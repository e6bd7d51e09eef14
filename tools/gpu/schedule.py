"""Phases of a call, which run one after the other, each within its time.

A phase begins when the one before has ended, and ends at its own time at the latest. So the call
ends in time. What does not fit is recorded as "not run", with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from alphacl_fast.journal import Row
from alphacl_fast.subprocess_pool import Lane, Pool, Task

#: The most rows "not run" of a phase; the last of them counts the rest.
MOST_NOT_RUN = 40


@dataclass(frozen=True)
class Phase:
    """A part of a call.

    Attributes:
        name: names the phase in rows and tables.
        until: its end, in seconds after the call's begin.
        plan: makes the lanes of tasks when the phase begins.
        follow: is called with every row of the phase.
        after: is called at the end of the phase.
    """

    name: str
    until: float
    plan: Callable[[], list[Lane]]
    follow: Callable[[Row], None] = lambda row: None
    after: Callable[[], None] = lambda: None


def perform(phases: list[Phase], pool: Pool, begin: float, emit: Callable[[Row], None]) -> None:
    """Run the phases; an error in one does not stop the next.

    Args:
        phases: the phases in their order.
        pool: runs their tasks, and has the clock.
        begin: the begin of the call, on that clock.
        emit: gets every row, with the name of its phase.
    """
    for phase in phases:
        until = begin + phase.until

        def told(row: Row, phase: Phase = phase) -> None:
            emit({**row, "phase": phase.name})
            phase.follow(row)

        try:
            not_run(pool.run(phase.plan(), until, told), told)
            phase.after()
        except Exception as error:
            pool.close()
            text = f"{type(error).__name__}: {str(error)[:400]}"
            told({"benchmark": "phase", "status": "error", "error": text})


def not_run(left: list[tuple[Task, str]], emit: Callable[[Row], None]) -> None:
    """Emit a row for each item that was not run; the last row counts those beyond a few."""
    items = [
        (Task(task.function, task.items[k:], about=task.about), why)
        for task, why in left
        for k in range(len(task.items))
    ]
    for k, (task, why) in enumerate(items[:MOST_NOT_RUN], 1):
        count = len(items) - k + 1 if k == MOST_NOT_RUN else 1
        emit(task.row(status="not run", error=why, count=count))


def lines(name: str, lanes: list[Lane], begin: float, until: float) -> list[str]:
    """Describe the plan of a phase: its times, and its tasks with their predicted seconds."""
    seconds = max((lane.seconds for lane in lanes), default=0.0)
    told = [f"{begin:5.0f}-{until:.0f} s  {name}: about {seconds:.0f} s"]
    for lane in lanes:
        items = sum(len(task.items) for task in lane.tasks)
        told.append(f"    {len(lane.tasks)} tasks, {items} items, {lane.size} side by side")
        for task in lane.tasks:
            facts = " ".join(f"{k}={v}" for k, v in task.row().items() if v not in ("", None))
            more = f" and {len(task.items) - 1} more" if len(task.items) > 1 else ""
            predicted = task.startup + task.predicted * len(task.items)
            told.append(f"      {predicted:5.1f} s  {facts}{more}")
    return told
