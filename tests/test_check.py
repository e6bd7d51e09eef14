"""``alphacl check``: what it covers, and what it says of backends that are wrong, hang or crash."""

import argparse
import importlib
import json
import os
import re
import select
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import WATCHDOG, wait_until
from pools import InlinePool, patient_pool, start

from alphacl_fast import accuracy, device_check, journal, objectives, ops, subprocess_pool
from alphacl_fast.cli import main
from alphacl_fast.flags import add_check_flags
from alphacl_fast.functional import NEGATIVES
from alphacl_fast.subprocess_pool import Pool

#: One worker starts the server that forks children.
one_worker = pytest.mark.xdist_group("children")

#: Backends that are `blocked` but for one thing each, and the tasks of a child that has them.
FAKES = """
import itertools, os, signal, time, types
from pathlib import Path
from alphacl_fast import ops
from alphacl_fast.accuracy import check, serving
from alphacl_fast.backend import blocked

def fake(**other):
    own = {name: getattr(blocked, name) for name in (
        "OPTIONAL_OPERANDS", "unsupported", "row_sums", "pair_grad")}
    return types.SimpleNamespace(**own | other)

def wrong_hinge(*operands):
    df, *others = blocked.pair_grad(*operands)
    if operands[2].kind == "hinge":
        df[-1] *= 1.5
    return df, *others

def drifting(*operands, calls=itertools.count()):
    df, *others = blocked.pair_grad(*operands)
    return df * (1 + 1e-15 * next(calls)), *others

def forgets_nan(sweep):
    def swept(*operands):
        rows, *others = operands
        return sweep(rows._replace(f=rows.f.nan_to_num()), *others)
    return swept

def raises(*operands):
    raise ValueError("a launch failed")

def hangs(*operands):
    Path(__file__).with_name("hangs").write_text(str(os.getpid()))
    time.sleep(3600)

ops.SWEEP_BACKENDS.update(
    wrong=fake(pair_grad=wrong_hinge),
    drifting=fake(pair_grad=drifting),
    forgetful=fake(
        row_sums=forgets_nan(blocked.row_sums), pair_grad=forgets_nan(blocked.pair_grad)
    ),
    raising=fake(pair_grad=raises),
    hanging=fake(pair_grad=hangs),
    dying=fake(pair_grad=lambda *operands: os.kill(os.getpid(), signal.SIGSEGV)),
    interrupting=fake(pair_grad=lambda *operands: os.kill(os.getpid(), signal.SIGINT)),
    absent=fake(unsupported=lambda *call: "there is no such device"),
    unopenable=fake(unsupported=lambda *call: os.kill(os.getpid(), signal.SIGILL)),
)
ops.BACKEND_NAMES = ("auto", "reference", *ops.SWEEP_BACKENDS)
"""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few pairs, and child processes in which GPU backends are not usable."""
    monkeypatch.setattr(device_check, "SMALL_PAIRS", (9, 7, 12))
    monkeypatch.setattr(device_check, "SMALL_DIMS", (6, 5, 7))
    monkeypatch.setattr(device_check, "LARGE_PAIRS", {"cpu": 40, "cuda": 40})
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("ALPHACL_CUDA_EMULATED", "")


@pytest.fixture
def one_mode(monkeypatch):
    """Each objective is checked in one mode."""
    monkeypatch.setattr(device_check, "MODES", [("two_view", True)])


@pytest.fixture
def check_fakes(tmp_path, monkeypatch):
    """Runs the command on fake backends in a pool of children: its exit status and rows."""
    (tmp_path / "fakes_of_the_check_test.py").write_text(FAKES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ops, "SWEEP_BACKENDS", dict(ops.SWEEP_BACKENDS))
    monkeypatch.setattr(ops, "BACKEND_NAMES", ops.BACKEND_NAMES)
    sys.modules.pop("fakes_of_the_check_test", None)
    importlib.import_module("fakes_of_the_check_test")

    def run(backends, *more, pool=InlinePool, file=tmp_path / "rows"):
        monkeypatch.setattr(device_check, "Pool", pool)
        parser = argparse.ArgumentParser()
        add_check_flags(parser)
        flags = ["--backends", backends, "--device", "cpu", "--quick", "--json", str(file)]
        given = parser.parse_args([*flags, *more])
        status = device_check.run(given, pytest.fail, "fakes_of_the_check_test")
        return status, rows_of(file)

    return run


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def kind(row):
    return "NaN" if row["nan"] else "large" if row["large"] else "small"


def cases_of(rows, status):
    return [row for row in rows if row["status"] == status and row["benchmark"] != "serving"]


def test_the_backends_of_a_cpu_pass(tmp_path, capsys, one_mode, monkeypatch):
    # children are new interpreters, because a server of children may have another environment
    monkeypatch.setattr(device_check, "Pool", lambda log, preload: Pool(log))
    monkeypatch.setattr(subprocess_pool, "STARTUP", WATCHDOG)
    two = accuracy.REPRESENTATIVES[:2]
    few = [*two, ("alpha_direct", accuracy.THROUGH), ("custom_weight", {})]
    monkeypatch.setattr(device_check, "REPRESENTATIVES", two)
    monkeypatch.setattr(device_check, "members", lambda quick: few)
    here = [name for name in ("cpu", "blocked") if ops.backends()[name] is None]
    file = tmp_path / "rows"
    flags = ["--device", "cpu", "--json", str(file), "--limit", str(WATCHDOG)]
    assert main(["check", *flags]) == 0
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines() if line.startswith("cpu ")]
    dtypes = ("bfloat16", "float16", "float32", "float64")
    rows = [line[1:3] for line in table if line[-1] == "ok"]
    assert sorted(rows) == sorted([name, dtype] for name in here for dtype in dtypes)
    assert "triton on cpu is not usable: runs on GPUs, not cpu" in out
    assert "blocked on cpu does not serve bf16x3: " in out
    done = cases_of(rows_of(file), "ok")
    assert out.endswith(f"no failure in {len(done)} cases\n")
    assert {kind(row) for row in done} == {"small", "NaN", "large"}
    assert {row["repeatable"] for row in done if not row["nan"]} == {True}


def test_every_objective_mode_and_dtype_is_covered():
    places = [device_check.Place("cpu", "blocked", dtype) for dtype in accuracy.ARITHMETIC]
    cases = [case for _, case in device_check.cases(places, quick=False)]
    for nan in (False, True):
        found = {
            (case.objective, case.negatives, case.dtype)
            for case in cases
            if not case.large and case.nan == nan
        }
        every = {
            (objective, negatives, dtype)
            for objective in objectives.names()
            for negatives in NEGATIVES
            for dtype in accuracy.ARITHMETIC
        }
        assert every <= found
    assert {case.dtype for case in cases if case.large} == {*accuracy.ARITHMETIC}
    settings = {(c.similarity, c.reduction, c.learn_tau, c.dim) for c in cases}
    for values, expected in zip(
        zip(*settings, strict=True), (3, 2, 2, len(device_check.SMALL_DIMS) + 1), strict=True
    ):
        assert len({*values}) == expected


def test_a_wrong_gradient_fails_and_is_named(check_fakes, capsys, monkeypatch):
    monkeypatch.setattr(device_check, "REPRESENTATIVES", [("infonce", {}), ("triplet", {})])
    status, rows = check_fakes("wrong,blocked")
    assert status == 1
    failed = cases_of(rows, "failed")
    assert {(row["backend"], row["objective"]) for row in failed} == {("wrong", "triplet")}
    assert {row["negatives"] for row in failed} == {*NEGATIVES}
    out = capsys.readouterr().out
    assert "wrong on cpu, float64: triplet (two_view, " in out
    assert "failed: dz2 " in out or "worst row of dz2 " in out
    assert f"\n{len(failed)} failures in " in out
    verdicts = {line.split()[1]: line for line in out.splitlines() if line.startswith("cpu ")}
    assert verdicts["blocked"].endswith(" ok")
    assert verdicts["wrong"].endswith(" failed")


def test_other_bits_and_a_lost_nan_fail(check_fakes, one_mode, monkeypatch):
    monkeypatch.setattr(device_check, "REPRESENTATIVES", [("infonce", {}), ("triplet", {})])
    status, rows = check_fakes("drifting,forgetful")
    assert status == 1
    errors = {"drifting": set(), "forgetful": set()}
    for row in cases_of(rows, "failed"):
        errors[row["backend"]].add((kind(row), row["error"].partition(":")[0]))
    assert ("small", "1 of 1 further runs gave other bits") in errors["drifting"]
    assert {found for found, _ in errors["forgetful"]} == {"NaN"}


@one_worker
def test_crashes_and_hangs_cost_their_rows(check_fakes, one_mode, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(device_check, "MOST_LOST", 1)
    backends = "raising,dying,unopenable,hanging,absent,blocked"
    status, rows = check_fakes(backends, pool=patient_pool(tmp_path / "hangs"))
    assert status == 1
    out = capsys.readouterr().out
    by_status = {
        s: {(row["backend"], row["error"]) for row in rows if row["status"] == s}
        for s in ("crashed", "timeout")
    }
    assert by_status == {
        "crashed": {
            ("unopenable", "the process was killed by SIGILL"),
            ("dying", "the process was killed by SIGSEGV"),
        },
        "timeout": {("hanging", "no row within 60 s")},
    }
    errors = cases_of(rows, "error")
    assert {row["backend"] for row in errors} == {"raising"}
    assert all("a launch failed" in row["error"] for row in errors)
    assert {row["backend"] for row in cases_of(rows, "left out")} == {"dying", "hanging"}
    assert "unopenable on cpu: crashed: the process was killed by SIGILL" in out
    assert "absent on cpu is not usable: there is no such device" in out
    assert "dying on cpu, bfloat16: infonce (two_view, " in out
    assert " 1 timed out" in out
    assert "timed out: no row within 60 s" in out
    assert " cases were not run\n" in out
    others = {row["status"] for row in rows if row["backend"] == "blocked"}
    assert others == {"served", "refused", "ok"}


def test_a_backend_that_keeps_crashing_is_left_out():
    run = device_check.Run(argparse.Namespace(seconds=1.0, limit=1.0, json=None), None, "")
    place = device_check.Place("cpu", "blocked", "float32")
    task = run.task("check", device_check.large_case(place, 0), "cpu", "check")
    for lost in range(device_check.MOST_LOST):
        assert not run.keeps_failing(task), lost
        run.add(task.row(status=("crashed", "timeout")[lost % 2], error="no"))
    assert run.keeps_failing(task)


def test_a_backend_that_is_not_usable_is_no_failure(check_fakes, one_mode, capsys):
    status, _ = check_fakes("absent,blocked")
    assert status == 0
    assert "absent on cpu is not usable: there is no such device" in capsys.readouterr().out
    status, rows = check_fakes("absent")
    assert status == 1  # because nothing was checked
    assert capsys.readouterr().out.endswith("no case was run\n")
    assert {row["status"] for row in rows} == {"refused"}


def test_rows_that_could_not_be_written_fail(check_fakes, one_mode, capsys, tmp_path):
    status, _ = check_fakes("blocked", file=Path("/dev/full"))
    out = capsys.readouterr().out
    lost = out.count("full could not be written: No space left on device")
    assert lost > 0
    assert f"\n{lost} rows could not be written to /dev/full\nno failure in " in out
    assert status == 1
    null = tmp_path / "null"
    null.symlink_to("/dev/null")  # which cannot be synced
    status, _ = check_fakes("blocked", file=null)
    assert status == 0
    assert not Path(f"{null}.log").exists()


def test_an_interrupted_check_says_how_far_it_came(check_fakes, capsys):
    before = signal.getsignal(signal.SIGINT)
    status, rows = check_fakes("blocked,interrupting")
    assert status == 130
    out, err = capsys.readouterr()
    done = len(cases_of(rows, "ok"))
    assert err.startswith(f"alphacl: interrupted after {done} cases, rows in ")
    assert "cpu      blocked  " in out
    assert signal.getsignal(signal.SIGINT) is before


def test_a_backend_alone_is_no_truth_for_itself(check_fakes, monkeypatch, capsys):
    """At the large size another backend's float64 is the truth; without one the case is skipped."""
    place = device_check.Place("cpu", "blocked", "float64")
    case = device_check.large_case(place, 0)
    device = torch.device("cpu")
    assert accuracy.float64_oracle(case, device) not in (None, "blocked")
    monkeypatch.setattr(ops, "SWEEP_BACKENDS", {"blocked": ops.SWEEP_BACKENDS["blocked"]})
    assert accuracy.float64_oracle(case, device) is None
    (row,) = accuracy.check(case, "cpu")
    assert row["status"] == "skipped"
    run = device_check.Run(argparse.Namespace(seconds=1.0, limit=1.0, json=None), None, "")
    run.add(row)
    run.report()
    line = "blocked on cpu, float64: the large size is skipped: no other backend has float64 here"
    assert line in capsys.readouterr().out


def test_out_of_time(check_fakes, capsys):
    status, rows = check_fakes("blocked", "--seconds", "1e-9")
    assert status == 1
    assert capsys.readouterr().out == "no case was run\n"
    assert not cases_of(rows, "ok")


def checks(folder, *flags):
    """The command, which the next test ends."""
    importlib.import_module("fakes_of_the_check_test")
    parser = argparse.ArgumentParser()
    add_check_flags(parser)
    given = parser.parse_args([*flags, "--json", str(folder / "rows")])
    return device_check.run(given, pytest.fail, "fakes_of_the_check_test")


def ignored(pid):
    """The signals that a process ignores."""
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return {number for number in signal.Signals if int(mask, 16) >> (number - 1) & 1}


@one_worker
def test_a_termination_keeps_the_rows_and_leaves_no_child(tmp_path):
    """It comes while a child hangs."""
    (tmp_path / "fakes_of_the_check_test.py").write_text(FAKES)
    file, hangs = tmp_path / "rows", tmp_path / "hangs"
    flags = ["--backends", "blocked,hanging", "--device", "cpu", "--quick"]
    flags += ["--limit", str(WATCHDOG)]
    process = start(checks, tmp_path, *flags)
    wait_until(process, lambda: hangs.exists() and hangs.read_text())
    child = int(hangs.read_text())
    assert signal.SIGINT in ignored(child)  # a terminal sends Ctrl-C to children too
    end = os.pidfd_open(child)
    process.terminate()
    assert process.wait() == 143, (tmp_path / "stderr").read_text()
    assert select.select([end], [], [], WATCHDOG)[0]
    os.close(end)
    done = cases_of(rows_of(file), "ok")
    assert done
    told = (tmp_path / "stderr").read_text()
    assert told == f"alphacl: interrupted after {len(done)} cases, rows in {file}\n"
    assert "cpu      blocked  " in (tmp_path / "stdout").read_text()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--backends", "cpu,abacus"], "--backends must be of cpu, triton, cuda, blocked, got abacus"),
    (["--device", "abacus"], "--device must be cpu, cuda or cuda:N, got abacus"),
    (["--device", "cuda:x"], "--device must be cpu, cuda or cuda:N, got cuda:x"),
    (["--device", "cuda:99"], "--device cuda:99 needs a CUDA device that torch can use, found "),
    (["--seconds", "0"], "argument --seconds: expected a positive number, got '0'"),
    (["--limit", "long"], "argument --limit: expected a positive number, got 'long'"),
    (["--json", "nowhere/rows"], "cannot write to nowhere/rows: No such file or directory"),
    (["--fast"], "unrecognized arguments: --fast"),
])  # fmt: skip
def test_problems_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["check", *arguments])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"alphacl: error: {message}")


def test_rows_are_strict_json():
    assert journal.strict({"errors": {"loss": (float("nan"), 1.0)}, "k": [float("inf")]}) == {
        "errors": {"loss": ["nan", 1.0]},
        "k": ["inf"],
    }


def test_a_nan_is_the_worst_error():
    outcome = device_check.Outcome()
    about = {"status": "failed"}
    outcome.add({**about, "errors": {"dz1": (float("nan"), 0.0, 1.0)}})
    outcome.add({**about, "errors": {"dz1": (0.5, 0.0, 1.0), "loss": (0.5, 0.0, 1.0)}})
    outcome.add({**about, "errors": {"loss": (0.4, 0.0, 0.5)}})
    assert outcome.gradient[0] != outcome.gradient[0]
    assert outcome.loss == (0.4, 0.5)


EMULATED = os.environ.get("ALPHACL_CUDA_EMULATED", "")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_pass_where_they_are_emulated(backend, one_mode, monkeypatch, capsys):
    """The interpreter, and the library compiled for the host, run the cases that a GPU runs."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("ALPHACL_CUDA_EMULATED", EMULATED)
    monkeypatch.setattr(device_check, "Pool", InlinePool)
    reason = ops.SWEEP_BACKENDS[backend].unsupported(torch.device("cpu"), torch.float32, None, "")
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(device_check, "REPRESENTATIVES", [("infonce", {})])
    status = main(["check", "--quick", "--backends", backend, "--device", "cpu"])
    out = capsys.readouterr().out
    assert status == 0, out
    served = {line.split()[2] for line in out.splitlines() if line.endswith(" ok")}
    assert served >= {"bfloat16", "float16", "float32", "tf32", "float64"}
