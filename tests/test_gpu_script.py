"""`make gpu` on a machine without a GPU: what goes wrong is acted out, and tiny sizes are computed,
so that the first minutes on a GPU are not spent on typos.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import WATCHDOG, wait_until
from pools import patient_pool, start

from alphacl_fast import accuracy, journal, objectives, ops
from alphacl_fast import subprocess_pool as pool
from alphacl_fast.accuracy import Case
from alphacl_fast.backend import blocked
from alphacl_fast.benchmarks import loss
from tools.gpu import __main__ as script
from tools.gpu import (
    ahead,
    calls,
    checks,
    engines,
    sanitizer,
    schedule,
    summary,
    sweeps,
    timings,
)

ROOT = Path(__file__).parent.parent
#: One worker starts the servers that several tests use.
one_worker = pytest.mark.xdist_group("children")
#: How the package chooses a tile, which the tests' own fixture replaces.
TILE = getattr(ops.SWEEP_BACKENDS.get("triton"), "tile", None)
FEW = loss.Effort((2, 2), gemm_side=16, sample=1e-4, own_gate=0.25)


# --- a world of its own clock ---------------------------------------------------------------------


class World:
    """Children that do what their item says, on a clock that only waiting moves.

    An item is {"name": …, "does": …} with what the child does after a second each: a row by its
    status, "dies" (with the exit status -6 of an abort), "hangs", or "broken" for a device that an
    illegal access has broken. A child whose first act is "stuck" or "unstarted" hangs or dies
    before it begins. It takes ``start_s`` seconds to start a child.
    """

    def __init__(self):
        self.now, self.start_s, self.started, self.killed = 0.0, 0.0, [], []

    def clock(self):
        return self.now

    def start(self, task, log, preload):
        self.now += self.start_s
        child = Actor(self, task)
        self.started.append(task)
        return child

    def wait(self, children, timeout):
        """The pool hands back connections, which here are the children."""
        assert timeout >= 0
        end = self.now + timeout
        self.now = min([end, *(child.next_at() for child in children)])
        return [child for child in children if child.next_at() <= self.now]


class Actor:
    def __init__(self, world, task):
        self.world, self.connection, self.script = world, self, deque()
        first = task.items[0]["does"][0]
        if first == "unstarted":
            self.script.append((world.now, "dies"))
        elif first != "stuck":
            self.script.append((world.now, pool.BEGUN))
            self.send(task)

    def send(self, task):
        at = self.world.now
        for act in task.items[0]["does"]:
            at += 1
            if act == "hangs":
                return
            if act in ("dies", "broken"):
                self.script.append((at, act))
                return
            self.script.append((at, task.row(status=act)))
        self.script.append((at, pool.NEXT))

    def next_at(self):
        return self.script[0][0] if self.script else float("inf")

    def receive(self):
        _, message = self.script.popleft()
        if message == "dies":
            raise EOFError
        return message

    def kill(self):
        self.world.killed.append(self)

    def end(self):
        return "the process ended with -6"


@pytest.fixture
def world():
    return World()


def item(name, *does):
    return {"name": name, "does": does or ("ok",)}


def acted(world, lanes, until=1000.0, rows=None):
    """The rows as (name, status), and what was not run as (name, reason)."""
    rows = [] if rows is None else rows
    cast = pool.Pool("log", None, world.clock, world.wait, world.start)
    left = cast.run(lanes, until, rows.append)
    assert len(world.killed) == len(world.started)  # no child outlives the run
    names = [(task.items[0]["name"], why) for task, why in left]
    return [(row["name"], row["status"]) for row in rows], names


def lane(*items, size=1, **given):
    """One task of several items."""
    return pool.Lane(deque([pool.Task("no:thing", items, **given)]), size)


def test_a_hang_costs_its_own_item(world):
    rows, left = acted(world, [lane(item("a"), item("b", "hangs"), item("c"), limit=15)])
    assert rows == [("a", "ok"), ("b", "timeout"), ("c", "ok")]
    assert left == []
    assert len(world.started) == 2
    assert 15 <= world.now < 20


def test_the_watchdog_counts_from_the_last_row(world):
    slow = item("a", *["ok"] * 40)
    rows, _ = acted(world, [lane(slow, limit=2)])
    assert rows == [("a", "ok")] * 40


def test_an_illegal_access_costs_its_own_item(world):
    acts = item("a", "ok", "error", "broken"), item("b", "dies"), item("c"), item("d", "ok", "dies")
    rows, _ = acted(world, [lane(*acts)])
    wanted = "a ok, a error, b crashed, c ok, d ok, d crashed"
    assert ", ".join(map(" ".join, rows)) == wanted
    assert len(world.started) == 3


def test_what_does_not_fit_is_not_run(world):
    """A task is begun only if its first item fits; at the end of the time the rest is dropped."""
    tasks = [
        pool.Task("no:thing", (item("long"),), startup=1, predicted=30),
        pool.Task("no:thing", (item("a", "ok", "ok", "ok"), item("b")), predicted=1),
        pool.Task("no:thing", (item("later"),), predicted=1),
    ]
    rows, left = acted(world, [pool.Lane(deque(tasks), 1)], until=2.5)
    assert rows == [("a", "ok"), ("a", "ok"), ("a", "unfinished")]
    assert [name for name, _ in left] == ["long", "b", "later"]
    assert left[0][1] == "needs about 31.0 s of the 2.5 s left"
    assert world.now == 2.5


def test_starting_children_takes_of_the_time(world):
    world.start_s = 3.0
    for until, end in ((4.5, 4.5), (2.5, 3.0)):
        world.now = 0.0
        rows, _ = acted(world, [lane(item("a", "stuck"))], until)
        assert (rows, world.now) == ([("a", "unfinished")], end)


def test_a_child_that_does_not_begin(world):
    """Its message tells that, and not how long an item may take."""
    rows = []
    told, _ = acted(world, [lane(item("a", "stuck"), item("b", "unstarted"), item("c"))], rows=rows)
    assert told == [("a", "timeout"), ("b", "crashed"), ("c", "ok")]
    assert rows[0]["error"] == "the process did not begin within 60 s"
    assert rows[1]["error"] == "the process ended with -6 before it began"
    assert 60 <= world.now < 70


def test_lanes_run_side_by_side(world):
    lanes = [lane(item("a", "ok", "ok")), pool.Lane(deque(), 2)]
    lanes[1].tasks += [pool.Task("no:thing", (item(name),)) for name in "xyz"]
    rows, _ = acted(world, lanes)
    assert sorted(rows) == [("a", "ok")] * 2 + [(name, "ok") for name in "xyz"]
    assert world.now == 2  # x and y in the first second, z in the second


def test_a_process_that_cannot_start(world):
    """No memory for a process, say: the item is lost, the next is tried."""
    start, attempts = world.start, iter([OSError(errno.ENOMEM, "no memory"), EOFError()])

    def refuse(task, log, preload):
        problem = next(attempts, None)
        if problem:
            raise problem
        return start(task, log, preload)

    world.start = refuse
    rows, _ = acted(world, [lane(item("a"), item("b"), item("c"))])
    assert rows == [("a", "crashed"), ("b", "crashed"), ("c", "ok")]


def test_a_child_is_used_again(world):
    """It goes on with the lane's next task, unless that is to be skipped when its turn comes."""

    def skip(task):
        return task.items[0]["name"] in "bd" and len(world.started) == 2

    names = item("a"), item("b", "dies"), item("c"), item("d")
    tasks = deque(pool.Task("no:thing", (x,)) for x in names)
    rows, left = acted(world, [pool.Lane(tasks, reuse=True, skip=skip)])
    assert rows == [("a", "ok"), ("b", "crashed"), ("c", "ok"), ("d", "left out")]
    assert (left, len(world.started)) == ([], 2)


def phase(name, until, *lanes, **more):
    return schedule.Phase(name, until, lambda: list(lanes), **more)


def test_phases_keep_their_times(world):
    rows, after = [], []
    many = [item(f"m{k}") for k in range(100)]
    many_waiting = pool.Lane(deque(pool.Task("no:thing", (x,), startup=50) for x in many), 1)

    def broken():
        raise RuntimeError("out of order")

    phases = [
        phase("one", 10, lane(item("a", "hangs"), limit=60), after=lambda: after.append("one")),
        schedule.Phase("two", 20, broken),
        phase("three", 30, many_waiting),
        phase("four", 40, lane(item("z"))),
    ]
    cast = pool.Pool("log", None, world.clock, world.wait, world.start)
    schedule.perform(phases, cast, 0.0, rows.append)
    told = [(row["phase"], row.get("name"), row["status"]) for row in rows]
    assert told[:2] == [("one", "a", "unfinished"), ("two", None, "error")]
    waited = [row for row in rows if row["phase"] == "three"]
    assert {row["status"] for row in waited} == {"not run"}
    assert len(waited) == schedule.MOST_NOT_RUN
    assert sum(row["count"] for row in waited) == 100
    assert told[-1] == ("four", "z", "ok")  # phases that end early leave their time
    assert after == ["one"]
    assert world.now == 11


# --- the plan -------------------------------------------------------------------------------------


def session(tmp_path, device="cuda", **known):
    found = calls.Session(
        tmp_path, tmp_path / "cache", device, 14, [], lambda what, write: write() or True
    )
    script.assume_all(found)
    for name, value in known.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize("call", calls.CALLS)
def test_a_call_ends_in_time(call, tmp_path):
    found = session(tmp_path)
    phases = calls.CALLS[call](found)
    ends = [phase.until for phase in phases]
    assert ends == sorted(set(ends))
    assert ends[-1] <= calls.SECONDS[call] - 5  # for the summary and the archive
    begin = 0.0
    for p in phases:
        lanes = p.plan()
        for lane in lanes:
            for task in lane.tasks:
                assert task.items
                module, _, function = task.function.partition(":")
                assert callable(getattr(sys.modules[module], function))
        seconds = max((lane.seconds for lane in lanes), default=0.0)
        if p.name in ("device", "ahead", "correct", "forms"):
            assert begin + seconds <= p.until, p.name
        begin = min(p.until, begin + seconds)


def test_identification_has_time_on_a_cold_machine(tmp_path):
    """Nothing else runs without it, and the phases after it come with less time."""
    for plan in calls.CALLS.values():
        first, second, *_ = plan(session(tmp_path))
        (lane,) = first.plan()
        assert lane.seconds < first.until / 3
        assert lane.tasks[0].limit < first.until < second.until


def test_workers(monkeypatch):
    for here, workers in ((1, 1), (2, 1), (4, 2), (16, 14), (224, 14)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, n=here: set(range(n)))
        assert calls.default_workers() == workers


def test_modules_import_modules_listed_above_them():
    import tools.gpu

    listed = re.findall(r"^    (\w+) ", tools.gpu.__doc__.partition("modules above it:")[2], re.M)
    files = {file.stem: file for file in Path(tools.gpu.__file__).parent.glob("*.py")}
    assert {*listed} == files.keys() - {"__init__", "__main__"}
    for k, name in enumerate(listed):
        lines = re.findall(
            r"^from \. import (.*)|^from \.(\w+) import", files[name].read_text(), re.M
        )
        words = {word for line in lines for word in re.findall(r"\w+", line[0] or line[1])}
        assert words & {*listed} <= {*listed[:k]}, name


def test_what_call_1_has_first(tmp_path):
    found = session(tmp_path)
    tasks = {p.name: [t for line in p.plan() for t in line.tasks] for p in calls.first(found)}
    checked = [i for t in tasks["correct"] for i in t.items if isinstance(i, sweeps.Sweep)]
    shapes = {(i.n, i.layout, i.splits, i.nan) for i in checked}
    assert {n for n, *_ in shapes} == {2, 130, 1000, 4130}
    assert {layout for _, layout, *_ in shapes} == {*sweeps.LAYOUTS}
    assert {splits for *_, splits, _ in shapes} == {0, 1, 2, 3}
    assert {nan for *_, nan in shapes} == {False, True}
    assert tasks["correct"][0].items[0].engine == "cuda_hopper"
    assert tasks["correct"][0].limit == 15
    cases = [i for t in tasks["forms"] for i in t.items if isinstance(i, Case)]
    forms = itertools.product(
        dict(accuracy.REPRESENTATIVES), accuracy.ARITHMETIC, ("triton", "cuda")
    )
    assert {(c.objective, c.dtype, c.backend) for c in cases} == {*forms}
    timed = [t.items[0] for t in tasks["headline"]]
    assert [(t.n, t.dim) for t in timed[::4]] == [(65536, 128), (16384, 128), (32768, 512)]
    assert {t.contestant for t in timed} == {"triton", "triton_64", "cuda", "eager"}


@pytest.mark.parametrize("call", calls.CALLS)
def test_dry_run(call, tmp_path, capsys):
    assert script.main(["--dry-run", "--call", str(call), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for p in calls.CALLS[call](session(tmp_path)):
        assert f"-{p.until:.0f} s  {p.name}: about" in out
    assert f"-{calls.SECONDS[call]} s  summary and archive" in out
    assert "layout=rectangle" in out or call == 2
    assert not [file for file in tmp_path.iterdir() if file.name != "cache"]


def test_without_a_device_nothing_is_planned(tmp_path):
    found = session(tmp_path, refused=None)
    with pytest.raises(RuntimeError, match="was not identified"):
        calls.first(found)[2].plan()


def test_engines_that_do_not_serve_are_left_out(tmp_path):
    refused = {"triton": None, "blocked": None, "cuda": "not compiled", "cuda_hopper": "no"}
    found = session(tmp_path, refused=refused)
    assert found.engines == ["triton", "blocked"]
    assert found.among("cuda", "triton") == ["triton"]
    tasks = [pool.Task.row(task) for task in calls.correct(found)]
    assert {row.get("engine", row.get("backend")) for row in tasks} == {"triton"}
    assert next(iter(calls.sanitize(found))).items[0]["backend"] == "triton"


def test_what_failed_is_checked_again(tmp_path):
    """Rows of a check that ran, and rows that the pool made of an item, in JSON."""
    case = Case("triton", "infonce", (("epsilon", 0.3),), pairs=20, dim=16, nan=True)
    sweep = sweeps.Sweep("cuda_mma", 130, splits=2)
    fine, timing = replace(sweep, splits=3), timings.Timing("triton", 2048)
    made = [
        pool.Task("", (timing,), about={"benchmark": "synchronization"}).row(status="unfinished"),
        {**asdict(case), "benchmark": "check", "status": "not run"},
        {**asdict(sweep), "benchmark": "sweep", "status": "ok"},
        pool.Task("", (fine,), about={"benchmark": "sweep"}).row(status="timeout"),
        pool.Task("", (sweep,), about={"benchmark": "sweep"}).row(status="timeout"),
        pool.Task("", (case,), about={"benchmark": "check"}).row(status="crashed"),
        {**asdict(fine), "benchmark": "sweep", "status": "ok"},  # the newest row counts
        {"benchmark": "phase", "status": "error"},
    ]
    found = session(tmp_path, earlier=json.loads(json.dumps(made)), refused={"blocked": None})
    tasks = list(calls.again(found))
    assert [(task.items, task.function) for task in tasks[:3]] == [
        ((case,), "alphacl_fast.accuracy:check"),
        ((sweep,), "tools.gpu.sweeps:check"),
        ((timing,), "tools.gpu.timings:no_synchronization"),
    ]
    # no row tells that anything of call 1 was done
    left = [*calls.correct(found), *calls.forms(found)]
    assert [task.items for task in tasks[3:]] == [task.items for task in left]


def test_only_what_call_1_has_left_is_run(tmp_path):
    """It was ended in a task's middle, and a row that counts others was written."""
    planned = session(tmp_path, refused={"blocked": None})
    ran, cut, *others = [*calls.correct(planned), *calls.forms(planned)]
    done = [*ran.items, *cut.items[:3]]
    rows = [pool.Task("", (x,), about={"benchmark": "sweep"}).row(status="ok") for x in done]
    planned.earlier = json.loads(json.dumps(rows))
    wanted = [cut.items[3:], *(task.items for task in others)]
    assert [task.items for task in calls.again(planned)] == wanted


# --- rows on disk ---------------------------------------------------------------------------------


def test_rows_are_whole_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"k": 1}\n{"k": 2, "lo')  # an earlier run was killed within a line
    book = journal.Journal(file, print)
    assert book.earlier == [{"k": 1}]
    book.add({"k": 3})
    assert journal.read(file) == [{"k": 1}, {"k": 3}]
    assert not book.lost


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    file, said, write = tmp_path / "rows.jsonl", [], os.write
    book = journal.Journal(file, said.append)
    book.add({"k": 1})

    def full(descriptor, data):
        if len(data) < 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:5])

    monkeypatch.setattr(journal.os, "write", full)
    book.add({"k": 2})
    assert file.read_text() == '{"k": 1}\n'
    assert said == ["rows.jsonl could not be written: No space left on device", '{"k": 2}']
    monkeypatch.undo()
    book.add({"k": 3})  # there may be space again
    assert journal.read(file) == [{"k": 1}, {"k": 3}]
    assert [row["k"] for row in book.rows] == [1, 2, 3]
    assert len(book.lost) == 1


def test_pipes_and_devices_are_not_synced(tmp_path):
    journal.append(Path("/dev/null"), {"k": 1})
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    journal.append(pipe, {"k": 2})
    assert os.read(reader, 100) == b'{"k": 2}\n'
    os.close(reader)


def test_a_signal_waits_for_the_end_of_a_line(tmp_path, monkeypatch):
    write = os.write

    def interrupted(descriptor, data):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(descriptor, data[:3])

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    monkeypatch.setattr(journal.os, "write", interrupted)
    try:
        with pytest.raises(SystemExit):
            journal.append(tmp_path / "rows", {"k": 1})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "rows").read_text() == '{"k": 1}\n'


# --- whole runs, with real children ---------------------------------------------------------------

ACTORS = """
import os, signal, time
from pathlib import Path
def act(item):
    if item["does"] == "hangs":
        Path(__file__).with_name("hangs").touch()
        time.sleep(3600)
    if item["does"] == "aborts":
        os.abort()
    if item["does"] == "exits":
        os._exit(3)
    if item["does"] == "raises":
        raise ValueError("no")
    yield {"benchmark": "act", **item, "status": "ok"}
    if item["does"] == "breaks":
        import torch
        torch.cuda.is_initialized = lambda: True
        def synchronize(device):
            raise RuntimeError("an illegal memory access was encountered")
        torch.cuda.synchronize = synchronize
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs calls whose phases are given; the exit status and the rows."""
    (tmp_path / "actors_of_the_gpu_test.py").write_text(ACTORS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(pool, "STARTUP", WATCHDOG)

    def run(plan, *more):
        monkeypatch.setattr(script, "CALLS", {1: plan, 2: plan})
        given = ["--device", "cpu", "--out", str(tmp_path / "out"), "--workers", "1", *more]
        status = script.main(given)
        file = tmp_path / "out" / "rows.jsonl"
        return status, journal.read(file) if file.is_file() else []

    return run


def acting(*items, limit=WATCHDOG):
    about = {"benchmark": "act"}
    return pool.Task("actors_of_the_gpu_test:act", items, about=about, limit=limit)


def plan_of(*tasks):
    """A call with one phase that has time enough."""
    return lambda s: [schedule.Phase("acts", 1e6, lambda: [pool.Lane(deque(tasks), 1)])]


def does(*acts):
    return tuple({"does": act} for act in acts)


@one_worker
def test_what_children_do(run, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "Pool", patient_pool(tmp_path / "hangs"))
    tasks = (
        acting(*does("nothing", "raises", "exits", "aborts", "breaks", "nothing")),
        acting(*does("hangs", "nothing"), limit=15.0),
    )
    status, rows = run(plan_of(*tasks))
    assert status == 1
    told = [(row["does"], row["status"]) for row in rows]
    assert told == [
        ("nothing", "ok"), ("raises", "error"), ("exits", "crashed"), ("aborts", "crashed"),
        ("breaks", "ok"), ("breaks", "error"), ("nothing", "ok"), ("hangs", "timeout"),
        ("nothing", "ok"),
    ]  # fmt: skip
    assert all({"call", "at_s", "phase"} <= row.keys() for row in rows)
    errors = [row["error"] for row in rows if "error" in row]
    assert "ValueError: no" in errors[0]
    assert "ended with 3" in errors[1]
    assert "killed by SIGABRT" in errors[2]
    assert "broken after the last row: an illegal memory access" in errors[3]
    assert errors[4] == "no row within 15 s"
    assert "5 FAILURES" in (tmp_path / "out" / "summary.txt").read_text()


@one_worker
def test_a_disk_that_is_full_from_the_start(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("rows.jsonl", "summary.txt", "children.log"):
        (out / name).symlink_to("/dev/full")
    status, _ = run(plan_of(acting(*does("nothing", "nothing"))))
    assert status == 1
    told = capsys.readouterr().out
    assert told.count('"does": "nothing"') == 2  # rows are printed instead
    assert "rows.jsonl could not be written: No space left on device" in told
    assert "summary.txt could not be written: No space left on device" in told
    assert "2 ok" in told  # of the summary, which is printed too


def few(tasks, items=2):
    """The first task of each kind, cut short."""
    found = {}
    for task in tasks:
        kind = task.function, getattr(task.items[0], "contestant", None)
        found.setdefault(kind, replace(task, items=task.items[:items], limit=WATCHDOG))
    return list(found.values())


@one_worker
def test_tiny_calls(run, tmp_path, capsys):
    """Checks, timings and rivals on the CPU."""

    def plan(s):
        def phase(name, tasks):
            return schedule.Phase(name, 1e6, lambda: calls.side_by_side(few(tasks(s)), 1))

        rival = s.timing("inf_cl", 4096, negatives="cross_view")

        return [
            replace(calls.identification(s), until=1e6),
            phase("correct", calls.correct),
            phase("forms", calls.forms),
            phase("headline", functools.partial(calls.headline, points=calls.HEADLINE)),
            phase("rivals", lambda s: [calls.measurement(s, rival)]),
        ]

    status, rows = run(plan)
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert status == 0, text
    kinds = {}
    for row in rows:
        kinds.setdefault(row["benchmark"], []).append(row)
    assert {row["status"] for row in kinds["sweep"]} == {"ok"}
    assert {row["status"] for row in kinds["check"]} <= {"ok", "refused"}
    assert all(row["repeatable"] for row in kinds["sweep"])
    assert {"graph", "synchronization", "graph replay", "kernels"} <= kinds.keys()
    timed = {row["contestant"]: row for row in kinds["loss+gradient"]}
    assert timed.keys() == {"cpu", "blocked", "eager", "inf_cl"}
    assert timed["cpu"]["fraction_of_gemm_rate"] > 0
    assert timed["cpu"]["median_ms"] is None  # only from a GPU
    assert timed["inf_cl"]["status"] == "skipped"  # a rival that is not installed
    assert kinds["kernels"][0]["launches"] > 0
    assert "no failures" in text
    assert "x eager" in text
    assert "SKIPPED No module named 'inf_cl'" in text
    assert "goal n = 65,536: fraction_of_gemm_rate >= 0.6: not measured" in text
    out = capsys.readouterr().out
    assert out.index("no failures") < out.index("goal ")
    assert script.main(["--plots", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "plots.png").stat().st_size > 10_000


def endless(folder):
    """A call of many items, which the next test ends."""
    items = tuple({"does": "nothing", "k": k} for k in range(10_000))
    script.CALLS = {1: plan_of(acting(*items))}
    script.main(["--device", "cpu", "--out", str(folder / "out"), "--workers", "1"])


@one_worker
def test_sigterm_at_a_row(tmp_path):
    (tmp_path / "actors_of_the_gpu_test.py").write_text(ACTORS)
    out, rows = tmp_path / "out", random.randint(1, 300)
    file = out / "rows.jsonl"
    process = start(endless, tmp_path)
    try:
        wait_until(process, lambda: file.exists() and file.read_bytes().count(b"\n") >= rows)
        process.terminate()
        assert process.wait() == 143
    finally:
        process.kill()
    lines = file.read_text().splitlines()
    assert len(lines) >= rows
    assert [json.loads(line)["k"] for line in lines] == list(range(len(lines)))
    assert f"{len(lines)} ok" in (out / "summary.txt").read_text()


class Ended(BaseException):
    """Stands for the end of the process, after which nothing runs."""


@pytest.mark.parametrize("status", [0, 1, 143])
def test_the_end_runs_no_destructors(monkeypatch, capsys, status):
    """One that meets a broken CUDA context may hang."""

    def main(arguments, begin):
        print("a summary", end="")
        return status if status < 2 else sys.exit(status)

    monkeypatch.setattr(script, "main", main)
    monkeypatch.setattr(script.os, "_exit", mock.Mock(side_effect=Ended))
    flushed = mock.Mock(side_effect=sys.stdout.flush)
    monkeypatch.setattr(sys.stdout, "flush", flushed)
    with pytest.raises(Ended):
        script.command()
    script.os._exit.assert_called_once_with(status)
    flushed.assert_called()


# --- compiling ahead ------------------------------------------------------------------------------

KEYS = """
import dataclasses, json, sys, torch
from pathlib import Path
from alphacl_fast import tune
from alphacl_fast.kernels.config import Tile
from tools.gpu import ahead, calls, warm

machine, asked, shrunk = ahead.Machine(), set(), ahead.shrunk
ahead.name_gpu(machine, 1000, lambda name, key, compiler: asked.add((name, key)))

def keys(item, as_it_is=False):
    '''What an item's launches ask for; as_it_is: with its own number of rows.'''
    asked.clear()
    ahead.shrunk = (lambda n: n) if as_it_is else shrunk
    ahead.launch(item)
    return set(asked)

s = calls.Session(Path("."), Path("."), "cuda", 1, [], None, refused=dict.fromkeys(calls.ORDER))
items = [item for item in calls.items_of_call_1(s) if calls.triton_serves(item)]
small = [item for item in items if ahead.rows_of(item) <= 4130]
listed = ahead.distinct(small, machine)
compiled = set().union(*map(keys, listed))
launched = set().union(*(keys(item, as_it_is=True) for item in small))
assert compiled == launched, sorted(name for name, _ in compiled ^ launched)
candidate = tune.Candidate("pair_grad", "bf16", 64, 1024, Tile(64, 64, 64, 4, 2))
other = dataclasses.replace(candidate, tile=Tile(32, 64, 64, 4, 2))
assert keys(candidate, as_it_is=True) == keys(dataclasses.replace(candidate, rows=65536))
assert {name for name, _ in keys(candidate) ^ keys(other)} == {"pair_grad"}
print(len(small), len(listed), len(compiled), warm.HASHED)
"""


FORKING = """
import json, os, sys, traceback
import torch

def no_device(*given):
    raise AssertionError("a server that has asked for devices cannot be forked")

torch._C._cuda_getDeviceCount = torch._C._cuda_init = no_device
import alphacl_fast.tune, tools.gpu.warm

for line in sys.stdin:
    code, arguments, environment, out = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
        os.environ.update(environment)
        sys.argv[1:] = arguments
        status = 1
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


@pytest.fixture(scope="module")
def forking(tmp_path_factory):
    """A process without Triton's interpreter, whose forks need not import anything again.

    It also shows that what the server of children imports asks for no device.
    """
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("forking") / "out"

    def run(code, *arguments, **environment):
        """Runs code in a fork; what it prints."""
        request = code, [*map(str, arguments)], environment, str(out)
        print(json.dumps(request), file=process.stdin, flush=True)
        status = process.stdout.readline()
        assert status == "0\n", out.read_text() if status else "the process has ended"
        return out.read_text()

    yield run
    process.stdin.close()
    process.wait(WATCHDOG)
    process.stdout.close()


@one_worker
def test_what_is_compiled_ahead_is_what_is_launched(forking):
    """All small items, at their own sizes, ask for the kernels of those that stand for them."""
    items, listed, kernels, hashed = map(int, forking(KEYS).split())
    assert items > 2 * listed
    assert kernels > listed
    assert hashed > 10  # by the server of children


CARRIED = """
import dataclasses, os, sys
from pathlib import Path
from tools.gpu import ahead, engines, sweeps
folder = Path(sys.argv[1])
(folder / "claims").mkdir(parents=True)
if len(sys.argv) > 2:
    print(ahead.unpack(Path(sys.argv[2]), folder))
item = sweeps.Sweep("triton", 130, 16)
with engines.heard(missed := []):
    (row,) = ahead.compile_item(item, ahead.Machine(), str(folder / "claims"))
    (again,) = ahead.compile_item(item, ahead.Machine(), str(folder / "claims"))
print(row["status"], row["compiled"], missed, again["compiled"])
if len(sys.argv) == 2:
    ahead.pack(folder, folder.parent / "cache.tar.gz")
"""


@one_worker
def test_compiled_kernels_are_carried(forking, tmp_path):
    """Another folder takes the archive, and nothing is compiled again there."""
    here, there = tmp_path / "here", tmp_path / "there"
    given = {"TRITON_STORE_BINARY_ONLY": "1"}
    made = forking(CARRIED, here, TRITON_CACHE_DIR=str(here), **given)
    names = ["row_sums", "reduce_splits_kernel", "scaled_weights_kernel", "pair_grad"]
    assert made.strip() == f"ok {names} {names} []"
    shutil.rmtree(here)
    archive = tmp_path / "cache.tar.gz"
    taken = forking(CARRIED, there, archive, TRITON_CACHE_DIR=str(there), **given)
    assert taken.split("\n")[:2] == ["4", f"ok {names} [] []"]


REFUSED = """
import errno, sys
from pathlib import Path
from tools.gpu import ahead, sweeps
import triton
compiler = triton.compiler.compile
def failing(src, target, options):
    if src.name == "row_sums":
        raise ValueError("ptxas says no")
    if src.name == "pair_grad":
        raise OSError(errno.ENOSPC, "No space left on device")
    return compiler(src, target=target, options=options)
triton.compiler.compile = failing
Path(sys.argv[1]).mkdir()
(row,) = ahead.compile_item(sweeps.Sweep("triton", 130, 16), ahead.Machine(), sys.argv[1])
print(row["status"], row["compiled"], row["error"], sep="|")
"""


@one_worker
def test_a_compile_that_fails_costs_its_own_kernel(forking, tmp_path):
    told = forking(REFUSED, tmp_path / "claims", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    status, compiled, error = told.strip().split("|")
    assert status == "failed"
    assert compiled == "['reduce_splits_kernel', 'scaled_weights_kernel']"
    assert "row_sums: ValueError: ptxas says no" in error
    assert "pair_grad: OSError: [Errno 28] No space left on device" in error


def test_an_archive_that_does_not_fit_on_the_disk(tmp_path, monkeypatch, capsys):
    cache, archive = tmp_path / "cache" / "key", tmp_path / "cache.tar.gz"
    cache.mkdir(parents=True)
    (cache / "kernel.cubin").write_bytes(b"code")
    archive.write_bytes(b"earlier")
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(ahead.tarfile.TarFile, "add", full)
    book = journal.Journal(tmp_path / "rows", print)
    assert not book.attempt("cache.tar.gz", lambda: ahead.pack(tmp_path / "cache", archive))
    assert archive.read_bytes() == b"earlier"
    assert "No space left" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "cache.tar.gz"]


@one_worker
def test_archives_that_are_refused(tmp_path, run, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "cache.tar.gz").write_bytes(b"no archive")
    status, _ = run(plan_of(acting(*does("nothing"))))
    assert status == 0
    assert "cache.tar.gz cannot be used" in capsys.readouterr().out
    bad = tmp_path / "bad.tar.gz"
    with ahead.tarfile.open(bad, "w:gz") as file:
        file.add(ROOT / "Makefile", "../Makefile")
    with pytest.raises(ValueError, match=r"must hold plain files, got \.\./Makefile"):
        ahead.unpack(bad, tmp_path / "cache")


# --- the sanitizer --------------------------------------------------------------------------------


RACES = "RACECHECK SUMMARY: {} displayed ({})"


@pytest.mark.parametrize(
    ("says", "code", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "ok"),
        ("========= ERROR SUMMARY: 3 errors", 1, "failed"),
        (RACES.format("0 hazards", "0 errors, 0 warnings"), 0, "ok"),
        (RACES.format("1 hazard", "0 errors, 1 warning"), 0, "failed"),
        (RACES.format("12 hazards", "10 errors, 2 warnings"), 1, "failed"),
        ("========= Error: Device not supported.\n========= ERROR SUMMARY: 1 error", 1, "refused"),
        ("========= Internal Sanitizer Error: no", 1, "refused"),
        ("RuntimeError: CUDA error 999: unknown error", 1, "refused"),
        ("unable to launch, not supported\n========= ERROR SUMMARY: 2 errors", 1, "failed"),
        ("nothing of the kind", 0, "refused"),
    ],
)
def test_what_the_sanitizer_says(tmp_path, monkeypatch, says, code, status):
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{says}\nEOF\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(tool))
    given = {"backend": "triton", "checker": "memcheck"}
    (row,) = sanitizer.watch(given, "cuda", float(WATCHDOG), str(tmp_path / "log"))
    assert row["status"] == status
    assert summary.failure(row) == (status == "failed")
    assert says.splitlines()[0] in (tmp_path / "log").read_text()


@pytest.mark.parametrize("checker", ["memcheck", "racecheck"])
def test_a_sanitizer_that_hangs_is_killed_with_its_children(tmp_path, monkeypatch, checker):
    """`timeout` does that, which outlives the task; only memcheck knows --report-api-errors."""
    tool, child = tmp_path / "tool", tmp_path / "child"
    tool.write_text(f"#!/bin/sh\necho $@\nsleep 3600 &\necho $! > {child}\nwait\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(tool))
    log = tmp_path / "log"
    given = {"backend": "triton", "checker": checker}
    (row,) = sanitizer.watch(given, "cuda", 0.5, str(log))  # returns when no child holds its output
    assert row["status"] == "unfinished"
    assert log.read_text().startswith("$ timeout --signal=KILL 0.5 ")
    assert f"--tool {checker} " in log.read_text()
    assert ("--report-api-errors" in log.read_text()) == (checker == "memcheck")


def test_a_sanitizer_that_is_absent(monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    (row,) = sanitizer.watch({"backend": "triton", "checker": "memcheck"}, "cuda", 1.0, "log")
    assert row["status"] == "absent"
    assert not summary.failure(row)


def test_what_the_sanitizer_watches(monkeypatch):
    assert sanitizer.small_shapes("blocked", "cpu", "0") == 1
    ticks = itertools.count()  # a second each time the clock is read
    monkeypatch.setattr(sanitizer.time, "monotonic", lambda: float(next(ticks)))
    assert sanitizer.small_shapes("blocked", "cpu", "2") == 3


# --- checks ---------------------------------------------------------------------------------------


def test_wrong_gradient_is_a_failure_and_not_timed(monkeypatch):
    right = blocked.pair_grad

    def wrong(*args):
        df, *others = right(*args)
        df[-1] *= 1.1  # one row of many
        return df, *others

    monkeypatch.setattr(blocked, "pair_grad", wrong)
    (row,) = accuracy.check(Case("blocked", pairs=1200, dim=16), "cpu")
    assert row["status"] == "failed"
    assert "worst row of dz2" in row["error"]
    # the norm over all rows does not see it
    assert "dz2 " not in row["error"].replace("of dz2", "")
    (row,) = accuracy.check(Case("blocked", dtype="float32", pairs=40, dim=16), "cpu")
    assert "dz2 " in row["error"].replace("of dz2", "")
    (row,) = timings.measure(timings.Timing("blocked", 16, 8), "cpu", FEW)
    assert row["status"] == "wrong"
    assert "median_in_gemms" not in row
    assert summary.failure(row)
    assert "1 FAILURES" in summary.text([], [row], [])


@pytest.mark.parametrize("layout", sweeps.LAYOUTS)
def test_wrong_sweeps_are_failures(layout, monkeypatch):
    """In each of the results, and where only the place of a NaN is wrong."""
    sweep = sweeps.Sweep("cpu", 24, 16, layout=layout, runs=2)
    (row,) = sweeps.check(sweep, "cpu")
    assert row["status"] == "ok", row
    (row,) = sweeps.check(replace(sweep, nan=True), "cpu")
    assert row["status"] == "ok", row
    right, cpu = sweeps.compute, ops.SWEEP_BACKENDS["cpu"]

    def wrong(place, factor):
        def compute(backend, *rest):
            found = right(backend, *rest)
            if backend is cpu:
                found[place][3] *= factor
            return found

        return compute

    for place, factor, nan in ((0, 1.001, False), (1, 1.5, False), (0, float("nan"), True)):
        monkeypatch.setattr(sweeps, "compute", wrong(place, factor))
        (row,) = sweeps.check(replace(sweep, nan=False), "cpu")
        assert row["status"] == "failed", (place, factor)
        assert ("are NaN" in row["error"]) == nan


def test_a_nan_that_gets_lost_is_a_failure(monkeypatch):
    case = Case("blocked", dtype="float32", pairs=20, dim=16, nan=True)
    (row,) = accuracy.check(case, "cpu")
    assert row["status"] == "ok", row
    right = accuracy.evaluate

    def lost(case, z1, z2, backend, precision):
        found = right(case, z1, z2, backend, precision)
        if backend == "blocked":
            found["dz2"][5] = 0  # one row of many
        return found

    monkeypatch.setattr(accuracy, "evaluate", lost)
    (row,) = accuracy.check(case, "cpu")
    assert row["status"] == "failed"
    assert row["error"] == "dz2: 16 of 320 NaN became numbers"


def test_unrepeatable_bits_are_a_failure(monkeypatch):
    right, count = blocked.row_sums, iter(range(1000))

    def drifting(*args):
        return right(*args) * (1 + 1e-15 * next(count))

    monkeypatch.setattr(blocked, "row_sums", drifting)
    case = Case("blocked", dtype="float64", pairs=20, dim=16, runs=3)
    (row,) = accuracy.check(case, "cpu")
    assert row["status"] == "failed"
    assert "other bits" in row["error"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_same_bits_are_the_same_bytes():
    nan = torch.tensor(float("nan"))
    other = (nan.view(torch.int32) + 1).view(torch.float32)  # with another payload
    zero = torch.tensor(0.0)
    column = torch.arange(6.0).view(2, 3).T
    assert accuracy.same_bits([nan, zero, column], [nan.clone(), zero.clone(), column.contiguous()])
    for x, y in ((zero, nan), (zero, -zero), (nan, other), (zero, zero.double())):
        assert not accuracy.same_bits([x], [y]), (x, y)


def test_a_dense_loss_that_overflows_is_no_excuse():
    """Twice an infinite error would accept anything."""
    case = Case("blocked", dtype="float16", pairs=4, dim=2)
    truth = {"loss": torch.ones(()).double(), "dz1": torch.ones(4, 2).double()}
    for bad in (float("inf"), float("nan")):
        eager = {name: torch.full_like(x, bad) for name, x in truth.items()}
        assert not accuracy.too_large(accuracy.compared(case, truth, truth, eager))
        wrong = accuracy.too_large(accuracy.compared(case, eager, truth, eager))
        assert [text.partition(" ")[0] for text in wrong] == ["loss", "dz1", "worst"]


def unusable(name):
    module = ops.SWEEP_BACKENDS.get(name)
    return (
        "absent"
        if module is None
        else module.unsupported(torch.device("cpu"), torch.bfloat16, None, "exp")
    )


@pytest.mark.skipif(unusable("triton") is not None, reason=str(unusable("triton")))
def test_interpreted_triton(monkeypatch):
    (row,) = accuracy.check(Case("triton", pairs=20, dim=16, runs=2), "cpu")
    assert (row["status"], row["repeatable"]) == ("ok", True)
    rows = list(timings.measure(timings.Timing("triton", 16, 16), "cpu", FEW))
    assert [(row["benchmark"], row["status"]) for row in rows] == [
        ("loss+gradient", "ok"), ("graph replay", "ok"), ("kernels", "ok"),
    ]  # fmt: skip
    monkeypatch.setattr(ops.SWEEP_BACKENDS["triton"], "tile", TILE)
    for engine, splits in (("triton", 3), ("triton_64", 0)):
        sweep = sweeps.Sweep(engine, 200, 16, layout="rectangle", splits=splits, runs=1)
        (row,) = sweeps.check(sweep, "cpu")
        assert row["status"] == "ok", row


@pytest.mark.skipif(unusable("cuda") is not None, reason=str(unusable("cuda")))
def test_emulated_cuda():
    """Both kinds of kernels, each with splits that are not the package's choice."""
    for engine, splits in (("cuda_hopper", 2), ("cuda_mma", 2)):
        with engines.splits(splits):
            assert engines.filling.splits_of(1, 3, 6, 3) == splits
            assert engines.filling.splits_of(1, 1, 6, 1) == 1
        sweep = sweeps.Sweep(engine, 260, 24, layout="rectangle", splits=splits, runs=2)
        (row,) = sweeps.check(sweep, "cpu")
        assert row["status"] == "ok", row


def test_the_table_of_checks():
    """Every objective, mode, similarity, dtype and reduction is in it, once, and the headline
    case comes first.
    """
    table = list(checks.cases(["triton", "blocked"]))
    first = table[0]
    told = first.backend, first.objective, first.dtype, first.dim
    assert told == ("triton", "infonce", "bfloat16", 128)
    assert len(set(table)) == len(table)
    assert {case.objective for case in table} == {*objectives.names(), *accuracy.CUSTOM}
    assert {case.dim for case in table} == set(checks.DIMS)
    assert all(1000 <= case.pairs <= 1537 for case in table)
    early = table[:400]
    for field, values in (
        ("dtype", set(accuracy.ARITHMETIC)),
        ("similarity", {"cosine", "dot", "euclidean"}),
        ("reduction", {"mean", "none"}),
        ("negatives", {"two_view", "one_view", "cross_view"}),
        ("learn_tau", {True, False}),
        ("dim", set(checks.DIMS)),
        ("runs", {1, 2}),
    ):
        assert {getattr(case, field) for case in early} == values


# --- the summary -----------------------------------------------------------------------


def test_failures_come_first_and_baselines_do_not_count():
    common = {"benchmark": "loss+gradient", "objective": "infonce", "negatives": "two_view"}
    common |= {"dtype": "bfloat16", "n": 16384, "dim": 128, "call": 1, "phase": "headline"}
    good = {"status": "ok", "fraction_of_gemm_rate": 0.55}
    rows = [
        {**common, **good, "contestant": "triton", "median_in_gemms": 1.0},
        {**common, "contestant": "eager", "status": "ok", "median_in_gemms": 12.0},
        {**common, "contestant": "inf_cl", "status": "error", "error": "no"},
        {**common, "contestant": "cuda", "status": "timeout", "error": "no row within 15 s"},
        {"benchmark": "tune", "engine": "triton", "status": "crashed", "call": 2, "phase": "tune"},
        {"benchmark": "sweep", "engine": "cuda", "status": "not run", "error": "late", "count": 7},
    ]
    assert [summary.failure(row) for row in rows] == [False, False, False, True, False, False]
    assert not summary.failure({**rows[1], "status": "out of memory"})
    assert summary.failure({**rows[0], "status": "out of memory"})
    kernels = {"pair_grad": (300.0, 1.0), "row_sums": (200.0, 1.0), "copy": (1.0, 2.0)}
    about = {**common, "contestant": "triton", "status": "ok"}
    rows.append({**about, "benchmark": "kernels", "launches": 4.0, "kernels_us": kernels})
    rows.append({**about, "benchmark": "graph replay", "graph_over_launched": 0.9})
    text = summary.text(rows[4:6], rows[:4] + rows[6:], ["a note"])
    (line,) = (line for line in text.splitlines() if line.startswith("triton "))
    assert "0.90 of a launched step" in line
    assert line.endswith(" 4.0 launches [pair_grad 300 µs, row_sums 200 µs]")
    assert text.index("1 FAILURES") < text.index("TIMEOUT") < text.index("1 headline")
    assert "goal n = 16,384: fraction_of_gemm_rate >= 0.5: 0.55 reached" in text
    assert "goal over eager: speedup_over_eager >= 10: 12 reached" in text
    assert "7 not run (the first: late)" in text
    assert text.endswith("a note")


def test_a_gpu_on_which_nothing_is_right_is_a_failure(tmp_path, monkeypatch):
    """Only compiling, and results of other backends, do not count."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    others = [
        {"benchmark": "compile", "engine": "triton", "status": "ok"},
        {"benchmark": "check", "backend": "blocked", "status": "ok"},
        {"benchmark": "check", "backend": "cuda", "status": "refused"},
    ]
    good = {"benchmark": "sweep", "engine": "cuda_mma", "status": "ok"}
    assert not summary.right_on_gpu(others)
    assert summary.right_on_gpu([*others, good])

    def made(rows, out, *more):
        """Runs a call without phases that finds these rows."""
        monkeypatch.setattr(schedule, "perform", lambda *given: [given[-1](row) for row in rows])
        return script.main(["--out", str(tmp_path / out), *more])

    assert made(others, "wrong") == 1
    told = (tmp_path / "wrong" / "summary.txt").read_text()
    assert "device: FAILED neither triton nor cuda has a right result" in told
    assert made([*others, good], "right") == 0
    assert made(others, "compiled", "--compile") == 0


def test_plots_without_matplotlib_or_timings(tmp_path, monkeypatch):
    assert summary.draw(tmp_path) == "plots skipped: no timings"
    monkeypatch.setattr(summary.importlib.util, "find_spec", lambda name: None)
    assert "matplotlib is not there" in summary.draw(tmp_path)


# --- what only a GPU executes, with stand-ins that check the calls --------------------------------

CUDA = torch.device("cuda")


class Event:
    clock = 0.0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = Event.clock

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda without a device; functions keep their signatures."""
    calls = []

    def stand_in(name, result=None):
        spec = mock.create_autospec(
            getattr(torch.cuda, name),
            side_effect=lambda *args: calls.append((name, *args)) or result,
        )
        monkeypatch.setattr(torch.cuda, name, spec)

    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=227 << 10
    )
    for name, result in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 1000),
        ("max_memory_allocated", 1500),
        ("set_sync_debug_mode", None),
        ("get_device_name", "NVIDIA H200"),
        ("get_device_capability", (9, 0)),
        ("get_device_properties", properties),
        ("current_stream", mock.Mock()),
    ):
        stand_in(name, result)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock())
    return calls


def test_cuda_calls(fake_cuda):
    steps = iter((1.0, 3.0))
    assert loss.seconds(
        lambda: setattr(Event, "clock", Event.clock + next(steps)), CUDA, calls=2
    ) == pytest.approx(2.0)
    assert loss.peak_extra_bytes(lambda: None, CUDA) == 500
    with timings.synchronization_forbidden(CUDA):
        assert fake_cuda[-1] == ("set_sync_debug_mode", "error")
    assert fake_cuda[-1] == ("set_sync_debug_mode", "default")
    step = mock.Mock(side_effect=lambda a, b: (a * b,))
    replay = timings.captured(step, (torch.ones(3), torch.ones(3)), CUDA)
    assert step.call_count == 4  # three to warm up, one in the graph
    replay(torch.full((3,), 2.0), torch.full((3,), 3.0))
    replay()
    assert step.call_count == 4
    assert (step.call_args.args[0] == 2).all()  # new inputs lie where the graph reads them
    assert torch.cuda.CUDAGraph.return_value.replay.call_count == 2
    row = loss.statistics_of(loss.Setting(64, 16), [2.0, 3.0], [1.0, 1.0], 8192)
    assert (row["median_ms"], row["gemm_ms"]) == (2500.0, 1000.0)


def test_the_device_is_identified(fake_cuda, monkeypatch, tmp_path):
    monkeypatch.setattr(timings, "driver_version", lambda: "580.1")
    monkeypatch.setattr(timings.cuda, "_has_hopper", lambda device: False)
    monkeypatch.setattr(timings.cuda, "_why_not", lambda device: None)
    # not the cached function, which other tests call
    monkeypatch.setattr(timings.config, "device_name", timings.config.device_name.__wrapped__)
    (row,) = timings.identify({}, "cuda")
    told = row["device"], row["capability"], row["driver"], row["table"], row["multiprocessors"]
    assert told == ("NVIDIA H200", "9.0", "580.1", "nvidia_h200", 132)
    assert "not cuda" in row["refused"]["cpu"]
    assert row["refused"]["blocked"] is None
    assert row["refused"]["cuda_hopper"]
    found = session(tmp_path, refused=None)
    found.identified(row)
    assert found.machine == ahead.Machine(90, 132, "nvidia_h200")
    assert "blocked" in found.engines
    assert "cuda_hopper" not in found.engines


def test_device_events_of_a_trace(fake_cuda, monkeypatch):
    trace = {
        "traceEvents": [
            {"ph": "X", "cat": "kernel", "name": "sweep", "dur": 12},
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "dur": 3},
            {"ph": "X", "cat": "gpu_memset", "name": "Memset", "dur": 1.5},
            {"ph": "M", "name": "process_name"},
        ]
    }

    @contextlib.contextmanager
    def profile(activities):
        assert len(activities) == 2
        yield SimpleNamespace(
            export_chrome_trace=lambda path: Path(path).write_text(json.dumps(trace))
        )

    monkeypatch.setattr(torch.profiler, "profile", profile)
    assert timings.device_events(lambda: None, CUDA, 2) == [("sweep", 12.0), ("Memset", 1.5)]


def test_a_broken_device_is_seen(fake_cuda, monkeypatch):
    """The task's own device is asked, or the current one."""
    assert pool.broken_device("cuda:1") is None
    assert fake_cuda == []  # nothing has opened a GPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for device in ("cuda:1", "cpu", ""):
        assert pool.broken_device(device) is None
    assert fake_cuda == [("synchronize", "cuda:1"), ("synchronize", None), ("synchronize", None)]
    problem = RuntimeError("an illegal access\nmore")
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock(side_effect=problem))
    assert pool.broken_device("cuda:1") == "an illegal access"


def test_out_of_memory_is_a_row(monkeypatch):
    def exhausted(z1, z2):
        raise torch.OutOfMemoryError("CUDA out of memory")

    real = loss.make
    monkeypatch.setattr(
        loss, "make", lambda name, *args: exhausted if name == "eager" else real(name, *args)
    )
    setting = loss.Setting(32, 8)
    rows = list(loss.run(setting, ["blocked", "eager"], torch.device("cpu"), FEW))
    assert [(row["contestant"], row["status"]) for row in rows] == [
        ("eager", "out of memory"),
        ("blocked", "ok"),
    ]

    def larger(run, device):  # the check's inputs were smaller
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loss, "peak_extra_bytes", larger)
    (row,) = timings.measure(timings.Timing("blocked", 32, 8), "cpu", FEW)
    assert row["status"] == "out of memory"


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main(["--out", "nowhere"])
    assert "--device must be" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--workers", "0"])
    assert "--workers must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_target(tmp_path):
    """Both calls run, also after failures, and the exit status says that one failed."""
    python = tmp_path / "py"
    python.write_text('#!/bin/sh\necho "$@"\n[ "$4" = 2 ]\n')
    python.chmod(0o755)
    command = ["make", "-s", "gpu", "OUT=some where", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    wanted = "-m tools.gpu --call {} --out some where"
    assert done.stdout.splitlines() == [wanted.format(call) for call in (1, 2)]
    assert done.returncode != 0
    done = subprocess.run([*command, "CALL=2"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [wanted.format(2)]
    assert done.returncode == 0
