"""torchrun: several ranks train like one, a killed rank ends the job, another number resumes it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import WATCHDOG, wait_until
from training_runs import state_of

from alphacl_fast.train import Config, RunError, process_context, train

pytestmark = [
    pytest.mark.xdist_group("train_ranks"),  # one worker makes what its tests share
    pytest.mark.usefixtures("quick_plots"),  # for what goes on here; torchrun's processes draw
]

SETTINGS = {
    "dataset": "digits",
    "width": 4,
    "norm": "group",
    "optimizer": "sgd",
    "lr": 0.02,
    "subset": 320,
    "batch_size": 64,
    "micro_batch": 20,
    "epochs": 4,
    "log_every": 1,
    "save_every": 2,
    "eval_every": 4,
    "workers": 0,
    "learn_temperature": True,
}
ROOT = Path(__file__).parent.parent


def start(processes, out, *flags):
    for name, value in SETTINGS.items():
        flags += (
            (f"--{name.replace('_', '-')}",)
            if value is True
            else (f"--{name.replace('_', '-')}", str(value))
        )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "alphacl_fast.train",
        "--out",
        str(out),
        *flags,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children(pid):
    """Find the ranks that a process started: rank → process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = dict(
                x.split("=", 1) for x in (folder / "environ").read_text().split("\0") if "=" in x
            )
        except (OSError, ValueError):
            continue
        if parent == pid and "RANK" in environment:
            found[int(environment["RANK"])] = int(folder.name)
    return found


def steps(out):
    try:
        return [
            row
            for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
            if row["kind"] == "step"
        ]
    except FileNotFoundError:
        return []


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    train(Config.create(**SETTINGS), out)
    return out


def assert_same_run(out, reference):
    losses, expected = ([row["loss"] for row in steps(folder)] for folder in (out, reference))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 20
    assert expected[0] - expected[-1] > 1e-3
    for part in ("model", "loss"):
        ours, theirs = (state_of(folder)[part] for folder in (out, reference))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-4)
    assert (out / "embedding.png").exists()


def test_two_processes_train_as_one_does(tmp_path, reference):
    out = tmp_path / "run"
    process = start(2, out)
    try:
        printed, message = process.communicate(timeout=WATCHDOG)
    finally:
        process.kill()
    assert process.returncode == 0, message
    assert printed.count("finished: 4 epochs") == 1
    assert_same_run(out, reference)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_process_ends_the_job_and_another_number_goes_on(tmp_path, reference):
    out = tmp_path / "run"
    process = start(2, out)
    try:
        wait_until(process, lambda: len(steps(out)) >= 3)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        _, message = process.communicate(timeout=WATCHDOG)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "alphacl: error: another process of this job has ended, or does not answer" in message
    assert "exitcode  : -9" in message or "Signal 9 (SIGKILL)" in message
    assert len(steps(out)) < 20
    train(Config.create(**SETTINGS), out, resume=True)
    assert_same_run(out, reference)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_to_the_whole_job_is_one_signal(tmp_path, reference):
    """A scheduler signals torchrun and its processes, and torchrun passes its signal on to them."""
    out = tmp_path / "run"
    process = start(2, out)
    try:
        wait_until(process, lambda: len(steps(out)) >= 3)
        job = [*children(process.pid).values(), process.pid]
        for member in job:
            os.kill(member, signal.SIGTERM)
        _, message = process.communicate(timeout=WATCHDOG)
    finally:
        process.kill()
    saved = state_of(out)["step"]
    assert message.count(f"alphacl: stopped after {saved // 5} of 4 epochs, state saved") == 1
    assert 3 <= saved == len(steps(out)) < 20
    train(Config.create(**SETTINGS), out, resume=True)
    assert_same_run(out, reference)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks of this process")
def test_a_process_group_that_exists_is_used(tmp_path, one_thread):
    """Processes that Slurm or torch.multiprocessing started initialise the group themselves."""
    out, pipes = tmp_path / "run", []
    for rank in range(2):
        reader, writer = os.pipe()
        pipes.append(reader)
        if not os.fork():
            try:
                for name in process_context.VARIABLES:
                    os.environ.pop(name, None)
                store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
                torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
                outcome = train(Config.create(**{**SETTINGS, "epochs": 1, "eval_every": 0}), out)
                os.write(writer, f"{outcome.leads} {outcome.epochs}".encode())
            finally:
                os._exit(0)
        os.close(writer)
    assert [os.read(reader, 99) for reader in pipes] == [b"True 1", b"False 1"]
    for _ in pipes:
        os.wait()
    assert len(steps(out)) == 5


@pytest.mark.parametrize(("environment", "message"), [
    ({"WORLD_SIZE": "2"}, "(WORLD_SIZE=2) but lacks RANK, MASTER_ADDR, MASTER_PORT: start the"),
    ({"RANK": "1"}, "(RANK=1) but lacks WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start the"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"},
     "must be numbers with RANK below WORLD_SIZE, got RANK=2, WORLD_SIZE=2, MASTER_ADDR=here"),
    ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"},
     "RANK, WORLD_SIZE and MASTER_PORT must be numbers"),
])  # fmt: skip
def test_half_an_environment_is_named(monkeypatch, environment, message):
    for name in process_context.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=re.escape(message)), process_context.joined():
        raise AssertionError("joined")


def test_a_process_alone_needs_no_environment(monkeypatch):
    for name in process_context.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for environment in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with process_context.joined() as context:
            assert (context.rank, context.size) == (0, 1)


def test_waiting_for_others_is_announced(monkeypatch):
    """The announcement ends the wait of this test, which nobody else would."""
    said, gone = threading.Event(), threading.Event()

    def wait(*_, **__):
        assert gone.wait(WATCHDOG)
        raise RuntimeError("nobody\ncame")

    class Announced:
        def write(self, text):
            said.set()
            gone.set()
            return sys.__stderr__.write(text)

        def flush(self):
            pass

    monkeypatch.setattr(torch.distributed, "init_process_group", wait)
    monkeypatch.setattr(process_context, "ANNOUNCED_AFTER", 0)
    monkeypatch.setattr(sys, "stderr", Announced())
    for name, value in zip(process_context.VARIABLES, ("0", "2", "here", "1"), strict=True):
        monkeypatch.setenv(name, value)
    expected = "process 0 of 2 did not reach the other processes at here:1: nobody came"
    with pytest.raises(RunError, match=expected), process_context.joined():
        raise AssertionError("joined")
    assert said.is_set()
