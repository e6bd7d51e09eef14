"""torchrun: several ranks train like one, a killed rank ends the job, another number resumes it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import WATCHDOG, wait_until

from alphacl_fast.train import Config, train

pytestmark = pytest.mark.xdist_group("train_ranks")  # one worker makes what its tests share

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
        ours, theirs = (
            torch.load(folder / "checkpoint.pt", weights_only=True)[part]
            for folder in (out, reference)
        )
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
