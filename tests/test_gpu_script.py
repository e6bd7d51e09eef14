"""`make gpu` on a machine without a GPU: tiny sizes and stand-ins, so that the first minute on a
GPU is not spent on typos.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import WATCHDOG

from alphacl_fast import accuracy, objectives, ops, subprocess_pool
from alphacl_fast.backend import blocked
from alphacl_fast.benchmarks import loss
from tools import gpu, gpu_tasks

ROOT = Path(__file__).parent.parent
FEW = loss.Effort((2, 2), gemm_side=16, sample=1e-4, own_gate=0.25)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the script in this process, on the CPU backends, with a few cases.

    Returns its exit status and its rows.
    """
    here = {
        name: module for name, module in ops.SWEEP_BACKENDS.items() if name in ("cpu", "blocked")
    }
    monkeypatch.setattr(ops, "SWEEP_BACKENDS", here)
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function)
    some = [
        case
        for k, case in enumerate(gpu_tasks.cases(["cpu", "blocked"], (16, 24), (20, 33)))
        if k % 97 == 0 or k < 4
    ]
    monkeypatch.setattr(gpu, "cases", lambda *args: iter(some[:30]))

    def run(phases, *more):
        arguments = [
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
            "--tiny",
            "--workers",
            "0",
            "--phases",
            phases,
        ]
        status = gpu.main([*arguments, "--minutes", "90", *more])
        return status, [
            json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()
        ]

    return run


def test_smoke(start, tmp_path, monkeypatch, capsys):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\nwhile [ "$1" != "-m" ]; do shift; done\nshift; echo "$@"; echo "ERROR '
        'SUMMARY: 0 errors"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    status, rows = start("check,headline,rivals,sanitize,profile,plots")
    assert status == 0, capsys.readouterr().out
    by_kind = {}
    for row in rows:
        by_kind.setdefault(row["benchmark"], []).append(row)
        assert {"device", "torch", "triton", "commit", "capability", "at_s", "status"} <= row.keys()
    assert {row["status"] for row in by_kind["check"]} <= {"ok", "refused"}
    for row in by_kind["check"]:
        assert {
            "backend",
            "objective",
            "dtype",
            "negatives",
            "similarity",
            "n",
            "dim",
            "tau",
        } <= row.keys()
        if row["status"] == "ok":
            assert all(mine <= bound for mine, _, bound in row["errors"].values())
    assert {
        "synchronization",
        "graph",
        "launches",
        "graph replay",
        "sanitize",
        "profile",
    } <= by_kind.keys()
    timed = [row for row in by_kind["loss+gradient"] if row["status"] == "ok"]
    assert {"cpu", "blocked", "eager", "compiled"} <= {row["contestant"] for row in timed}
    for row in timed:
        assert row["fraction_of_gemm_rate"] > 0
        assert row["p20_in_gemms"] <= row["median_in_gemms"] <= row["p80_in_gemms"]
        assert row["median_ms"] is None  # only from a GPU
        assert {
            "kernels",
            "peak_extra_bytes",
            "gradient_error",
            "speedup_over_eager",
            "speedup_over_compiled",
        } <= row.keys()
    assert any(row["speedup_over_compiled"] for row in timed)
    assert by_kind["sanitize"][0]["errors_found"] == 0
    assert "µs/step" in (tmp_path / "profile.txt").read_text()
    assert (tmp_path / "plots.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert out.rstrip().endswith((tmp_path / "summary.txt").read_text().rstrip())
    assert "no failures" in out
    assert "goal n = 65,536: fraction_of_gemm_rate >= 0.6: not measured" in out
    assert len(out[out.index("===") :]) < 12_000
    (tmp_path / "plots.png").unlink()
    assert gpu.main(["--plots", str(tmp_path)]) == 0
    assert (tmp_path / "plots.png").exists()


def test_wrong_gradient_is_a_failure_and_not_timed(start, monkeypatch, capsys):
    right = blocked.pair_grad

    def wrong(*args):
        df, *others = right(*args)
        df[-1] *= 1.1  # one row of many
        return df, *others

    monkeypatch.setattr(blocked, "pair_grad", wrong)
    case = accuracy.Case("blocked", pairs=1200, dim=16)
    (row,) = accuracy.check(case, "cpu")
    assert row["status"] == "failed"
    assert "worst row of dz2" in row["error"]
    # the norm over all rows does not see it
    assert "dz2 " not in row["error"].replace("of dz2", "")
    (row,) = accuracy.check(accuracy.Case("blocked", dtype="float32", pairs=40, dim=16), "cpu")
    assert "dz2 " in row["error"].replace("of dz2", "")
    monkeypatch.setattr(ops.SWEEP_BACKENDS["cpu"], "unsupported", lambda *args: "left out")
    status, rows = start("headline")
    assert status == 1
    mine = [
        row
        for row in rows
        if row.get("contestant") == "blocked" and row["n"] == 16 and row["objective"] == "infonce"
    ]
    assert mine
    for row in mine:
        assert row["status"] == "wrong"
        assert "median_in_gemms" not in row
    out = capsys.readouterr().out
    assert out.index("FAILURES") < out.index("goal ")


def test_unrepeatable_bits_are_a_failure(monkeypatch):
    right, calls = blocked.row_sums, iter(range(1000))

    def drifting(*args):
        return right(*args) * (1 + 1e-15 * next(calls))

    monkeypatch.setattr(blocked, "row_sums", drifting)
    (row,) = accuracy.check(
        accuracy.Case("blocked", dtype="float64", pairs=20, dim=16, deterministic=True), "cpu"
    )
    assert row["status"] == "failed"
    assert "other bits" in row["error"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_time_everything_is_skipped(start):
    status, rows = start("check,headline,plots", "--minutes", "0")
    assert status == 0
    assert [(row["benchmark"], row["status"]) for row in rows] == [("phase", "skipped")] * 3


def test_time_runs_out_within_a_phase(start, monkeypatch, tmp_path):
    monkeypatch.setitem(gpu.SECONDS, "check", 0.001)
    _, rows = start("check,profile")
    assert sum(row["benchmark"] == "check" for row in rows) < 4
    assert any(row["benchmark"] == "profile" for row in rows)
    assert "cases of the table not run" in (tmp_path / "summary.txt").read_text()


def test_a_phase_that_raises_does_not_stop_the_next(start, monkeypatch, tmp_path):
    def broken(run):
        raise RuntimeError("out of order")

    monkeypatch.setitem(gpu.PHASES, "headline", broken)
    status, rows = start("headline,profile")
    assert status == 1
    assert (rows[0]["status"], rows[0]["error"]) == ("error", "RuntimeError: out of order")
    assert rows[-1]["benchmark"] == "profile"

    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.PHASES, "headline", interrupted)
    (tmp_path / "summary.txt").unlink()
    with pytest.raises(KeyboardInterrupt):
        start("profile,headline")
    assert "profile" in (tmp_path / "summary.txt").read_text()


def test_tuned_tables_are_measured(start, monkeypatch, tmp_path):
    seen = []

    def tuner(command, limit, log, **options):
        Path(command[command.index("--out") + 1]).write_text("[]")
        seen.append(command)
        return "ok", None

    monkeypatch.setattr(gpu, "logged", tuner)
    status, rows = start("tune")
    assert status == 0
    assert seen[0][1:4] == ["-m", "alphacl_fast.cli", "tune"]
    assert float(seen[0][-1]) > 0
    timed = [row for row in rows if row["benchmark"] == "loss+gradient"]
    assert timed
    assert all(row["tuned"] and row["contestant"] == "cpu" for row in timed)
    assert "ALPHACL_TUNED" not in gpu.os.environ


def test_without_matplotlib_or_a_sanitizer(start, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    status, _ = start("sanitize,plots,profile")
    assert status == 0
    assert "plots skipped" in capsys.readouterr().out
    assert "sanitize skipped" in (tmp_path / "summary.txt").read_text()


def test_a_sanitizer_that_finds_something(start, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/bin/echo")
    status, rows = start("sanitize")  # echo prints no summary
    assert (status, rows[0]["error"]) == (1, "no summary")
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 3 errors'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(tool))
    _, rows = start("sanitize")
    assert (rows[-1]["status"], rows[-1]["errors_found"]) == ("failed", 3)


def test_what_the_sanitizer_watches():
    assert gpu_tasks.small_shapes("blocked", "cpu", "0") == 1
    assert gpu_tasks.small_shapes("blocked", "cpu", "0.5") > 1


def test_logged_commands(tmp_path):
    log = tmp_path / "log"
    assert gpu.logged([sys.executable, "-c", "print(7)"], WATCHDOG, log) == ("ok", None)
    assert gpu.logged([sys.executable, "-c", "raise SystemExit(4)"], WATCHDOG, log)[0] == "error"
    assert gpu.logged(["sleep", str(WATCHDOG)], 0.1, log)[0] == "timeout"
    assert "7" in log.read_text()


def test_a_rival_is_measured_beside_the_backends(start, monkeypatch):
    monkeypatch.setattr(gpu, "PACKAGES", ("eager",))
    status, rows = start("rivals")
    assert status == 0
    ratios = [row for row in rows if row["benchmark"] == "rival"]
    assert [(row["rival"], row["backend"]) for row in ratios] == [("eager", "cpu")]
    assert ratios[0]["speedup_over_rival"] > 0


def unusable(name):
    module = ops.SWEEP_BACKENDS.get(name)
    return (
        "absent"
        if module is None
        else module.unsupported(torch.device("cpu"), torch.bfloat16, None, "exp")
    )


@pytest.mark.skipif(unusable("triton") is not None, reason=str(unusable("triton")))
def test_interpreted_triton():
    (row,) = accuracy.check(accuracy.Case("triton", pairs=20, dim=16, deterministic=True), "cpu")
    assert (row["status"], row["repeatable"]) == ("ok", True)
    rows = list(
        gpu_tasks.measure(loss.Setting(16, 16, "bfloat16"), ["triton"], "cpu", FEW, graph=True)
    )
    assert [(row["benchmark"], row["status"]) for row in rows] == [
        ("loss+gradient", "ok"),
        ("graph replay", "ok"),
    ]


def test_the_table_of_checks():
    """Every objective, mode, similarity, dtype and reduction is in it, once, and the headline
    case comes first.
    """
    table = list(gpu_tasks.cases(["triton", "blocked"]))
    assert (table[0].backend, table[0].objective, table[0].dtype, table[0].dim) == (
        "triton",
        "infonce",
        "bfloat16",
        128,
    )
    assert len(set(table)) == len(table)
    assert {case.objective for case in table} == {*objectives.names(), *accuracy.CUSTOM}
    assert {case.dim for case in table} == set(gpu_tasks.DIMS)
    assert all(1000 <= case.pairs <= 1537 for case in table)
    early = table[:400]
    for field, values in (
        ("dtype", set(accuracy.ARITHMETIC)),
        ("similarity", {"cosine", "dot", "euclidean"}),
        ("reduction", {"mean", "none"}),
        ("negatives", {"two_view", "one_view", "cross_view"}),
        ("learn_tau", {True, False}),
        ("dim", set(gpu_tasks.DIMS)),
    ):
        assert {getattr(case, field) for case in early} == values


# --- child processes ------------------------------------------------------------------------------

CHILD = """
import os, time
def works(k):
    yield {"k": k}
    yield {"k": k + 1}
def raises():
    yield {"k": 0}
    raise ValueError("no")
def hangs():
    time.sleep(3600)
    yield {}
def dies():
    os._exit(3)
    yield {}
"""


def test_pool_survives_what_its_children_do(tmp_path, monkeypatch):
    (tmp_path / "child_of_the_pool_test.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))

    def task(name, limit=WATCHDOG, **arguments):
        function = f"child_of_the_pool_test:{name}"
        return subprocess_pool.Task(function, arguments, {"name": name}, limit)

    rows = []
    children = subprocess_pool.Pool(1, str(tmp_path / "log"))
    try:
        tasks = [
            task("works", k=5),
            task("raises"),
            task("hangs", 0.3),
            task("dies"),
            task("works", k=8),
        ]
        assert children.run(tasks, time.monotonic() + WATCHDOG, rows.append)
        assert [row.get("k") for row in rows] == [5, 6, 0, None, None, None, 8, 9]
        assert [row["status"] for row in rows if "status" in row] == ["error", "timeout", "crashed"]
        assert "ValueError: no" in rows[3]["error"]
        assert "ended with 3" in rows[5]["error"]
        rows.clear()
        children.startup = 0.0
        assert not children.run(
            [task("hangs"), task("works", k=1)], time.monotonic() + 1, rows.append
        )
        assert rows == [{"name": "hangs", "status": "unfinished"}]
    finally:
        children.close()
    assert not children.workers


def test_a_broken_device_ends_the_child(monkeypatch):
    """An illegal address stays with its process, so the next task must get a new one."""
    assert not subprocess_pool.device_is_broken()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "synchronize", mock.Mock(side_effect=RuntimeError("an illegal memory access"))
    )
    assert subprocess_pool.device_is_broken()
    sent = []
    connection = SimpleNamespace(
        recv=lambda: subprocess_pool.Task("tools.nothing:at_all"), send=sent.append
    )
    monkeypatch.setattr(subprocess_pool.os, "dup2", lambda *args: None)
    subprocess_pool.serve(connection, "/dev/null")
    assert [type(message) for message in sent] == [type(None), dict, bool]
    assert sent[-1] is False


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

    for name, result in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 1000),
        ("max_memory_allocated", 1500),
        ("set_sync_debug_mode", None),
        ("get_device_name", "a GPU"),
        ("get_device_capability", (9, 0)),
        ("current_stream", mock.Mock()),
    ):
        stand_in(name, result)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock())
    return calls


def test_cuda_calls(fake_cuda, monkeypatch):
    steps = iter((1.0, 3.0))
    assert loss.seconds(
        lambda: setattr(Event, "clock", Event.clock + next(steps)), CUDA, calls=2
    ) == pytest.approx(2.0)
    assert loss.peak_extra_bytes(lambda: None, CUDA) == 500
    with gpu_tasks.synchronization_forbidden(CUDA):
        assert fake_cuda[-1] == ("set_sync_debug_mode", "error")
    assert fake_cuda[-1] == ("set_sync_debug_mode", "default")
    step = mock.Mock(side_effect=lambda a, b: (a * b,))
    replay = gpu_tasks.captured(step, (torch.ones(3), torch.ones(3)), CUDA)
    assert step.call_count == 4  # three to warm up, one in the graph
    replay(torch.full((3,), 2.0), torch.full((3,), 3.0))
    replay()
    assert step.call_count == 4
    assert (step.call_args.args[0] == 2).all()  # new inputs lie where the graph reads them
    assert torch.cuda.CUDAGraph.return_value.replay.call_count == 2
    found = SimpleNamespace(stdout="580.1\n")
    monkeypatch.setattr(gpu_tasks.subprocess, "run", lambda *args, **options: found)
    monkeypatch.setattr(loss.subprocess, "run", lambda *args, **options: found)
    row = gpu_tasks.provenance(CUDA)
    assert (row["device"], row["capability"], row["driver"]) == ("a GPU", "9.0", "580.1")
    row = loss.statistics_of(loss.Setting(64, 16), [2.0, 3.0], [1.0, 1.0], 8192)
    assert (row["median_ms"], row["gemm_ms"]) == (2500.0, 1000.0)


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
    assert gpu_tasks.device_events(lambda: None, CUDA) == [("sweep", 12.0), ("Memset", 1.5)]


def test_out_of_memory_is_a_row(monkeypatch):
    def exhausted(z1, z2):
        raise torch.OutOfMemoryError("CUDA out of memory")

    real = loss.make
    monkeypatch.setattr(
        loss, "make", lambda name, *args: exhausted if name == "eager" else real(name, *args)
    )
    setting = loss.Setting(32, 8)
    rows = list(gpu_tasks.measure(setting, ["blocked", "eager"], "cpu", FEW))
    assert [(row["contestant"], row["status"]) for row in rows] == [
        ("eager", "out of memory"),
        ("blocked", "ok"),
    ]


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", "nowhere"])
    assert "--device must be" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--phases", "check,rest"])
    assert "got rest" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_target():
    done = subprocess.run(
        ["make", "-n", "gpu", "OUT=somewhere", "PYTHON=py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert '"py" -m tools.gpu --out "somewhere"' in done.stdout
    assert ".venv" not in done.stdout
