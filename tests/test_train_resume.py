"""A stopped or killed run, resumed, ends with the weights and metrics of an uninterrupted run."""

import os
import random
import signal
import sys
import time

import pytest
import torch
from conftest import wait_until
from training_runs import Fork, rows, state_of

from alphacl_fast.cli import main
from alphacl_fast.train import Config, RunError, evaluate, loop, train

pytestmark = [
    pytest.mark.xdist_group("train_resume"),  # one worker makes what its tests share
    pytest.mark.usefixtures("quick_plots"),  # the reference, which is made before, has real ones
]

SETTINGS = {
    "dataset": "digits",
    "objective": "alpha_direct",
    "width": 4,
    "subset": 320,
    "batch_size": 32,
    "epochs": 4,
    "log_every": 1,
    "save_every": 7,
    "eval_every": 2,
}
STEPS = 40


def final(out):
    """Read the checkpoint, and the metrics without measured times."""
    clock = ("images_per_s", "step_ms", "loss_ms")
    lines = rows(out)
    state = state_of(out)
    return state, [
        {key: value for key, value in line.items() if key not in clock} for line in lines
    ]


def assert_same_end(out, reference):
    (state, lines), (expected, expected_lines) = final(out), reference
    assert lines == expected_lines
    for part in ("model", "loss"):
        for name, value in expected[part].items():
            assert torch.equal(state[part][name], value), name
    for number, moments in expected["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(state["optimizer"]["state"][number][name], value), (number, name)
    assert (out / "curves.png").exists()
    assert (out / "embedding.png").exists()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(Config.create(**SETTINGS, workers=0), out)
    state, lines = final(out)
    assert state["step"] == STEPS
    assert len(lines) == STEPS + 4
    for name in loop.PLOTS:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    return state, lines


def start(out, workers, hold):
    """Run `alphacl train` in a fork of this process.

    It waits before step 30 until the file ``hold`` is gone: until its signal has been sent, however
    busy the machine is.
    """
    settings = {**SETTINGS, "workers": workers}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    one_step = loop._Run.one_step

    def held(self, *views):
        while self.step == 30 and hold.exists():
            time.sleep(0.01)
        return one_step(self, *views)

    def command():
        loop._Run.one_step = held
        return main(["train", f"--out={out}", *flags])

    hold.touch()
    return Fork(command)


def wait_for_step(process, out, step):
    """Wait until metrics.jsonl contains ``step``."""
    file = out / "metrics.jsonl"
    wait_until(process, lambda: file.exists() and file.read_bytes().count(b'"step", ') >= step)


@pytest.mark.skipif(sys.platform != "linux", reason="forks this process")
@pytest.mark.parametrize(
    ("number", "workers", "code"),
    [
        (signal.SIGINT, 2, 130),
        (signal.SIGTERM, 0, 143),
        (signal.SIGKILL, 2, -9),
    ],
)
def test_interrupted_and_resumed(tmp_path, capsys, reference, number, workers, code):
    out, step = tmp_path / "run", random.SystemRandom().randint(1, 22)
    process = start(out, workers, hold := tmp_path / "hold")
    try:
        wait_for_step(process, out, step)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: the loader's processes get it too
        else:
            os.kill(process.pid, number)
        hold.unlink()
        message = process.ended()
    finally:
        process.kill()
    assert process.poll() == code, message
    stopped = state_of(out)["step"]
    assert stopped < STEPS
    if number == signal.SIGKILL:
        assert stopped <= len(final(out)[1])
    else:
        assert stopped >= step
        assert message.startswith("alphacl: stopped after ")
        assert message.endswith(f"go on with: alphacl train --resume {out}\n")
        assert message.count("\n") == 1
    # Go on with the other number of loader processes, which must not matter.
    assert main(["train", "--resume", str(out), "--workers", str(2 - workers)]) == 0
    assert "finished: 4 epochs" in capsys.readouterr().out
    assert_same_end(out, reference)


@pytest.mark.parametrize(
    "when", ["at the end of an epoch", "in the evaluation", "before the first checkpoint"]
)
def test_awkward_moments(tmp_path, monkeypatch, reference, when):
    config, out = Config.create(**SETTINGS, workers=0), tmp_path / "run"

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    if when == "at the end of an epoch":
        one_step = loop._Run.one_step

        def stop(self, *views):
            result = one_step(self, *views)
            if self.step == STEPS // 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        monkeypatch.setattr(loop._Run, "one_step", stop)
        outcome = train(config, out)
        assert (outcome.epochs, outcome.signal) == (1, signal.SIGTERM)
    else:
        owner, name = (loop, "figures") if when == "in the evaluation" else (loop._Run, "save")
        monkeypatch.setattr(owner, name, die)
        with pytest.raises(Killed):
            train(config, out)
        if when == "before the first checkpoint":
            assert not (out / "checkpoint.pt").exists()
            with pytest.raises(RunError, match="has no checkpoint yet"):
                evaluate(out)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(config, out, resume=True).epochs == 4
    assert_same_end(out, reference)


def test_the_second_signal_acts_at_once():
    with loop.stop_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def hangup():
    """SIGHUP is not ignored, as it is where the suite runs under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_scheduler_s_repeated_signal_is_one_signal(hangup):
    with loop.stop_signals() as caught:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.raise_signal(number)
    assert caught == [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with loop.stop_signals(launched=True) as caught:  # torchrun repeats Ctrl-C too
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert caught == [signal.SIGINT] * 2


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    """Runs under nohup outlive their terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop.stop_signals() as caught:
            signal.raise_signal(signal.SIGHUP)
        assert caught == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("part", [0, 1, 3, 5])
def test_a_run_stops_between_micro_batches(tmp_path, monkeypatch, part):
    """A signal within a step takes the step back: statistics, generators and gradients."""
    settings = {**SETTINGS, "subset": 64, "epochs": 2, "micro_batch": 12, "save_every": 0}
    config = Config.create(**{**settings, "eval_every": 0}, workers=0)
    train(config, tmp_path / "whole")
    embed, calls = loop._Run.embed, []

    def interrupted(self, views):
        calls.append(self.step)
        if len(calls) == 6 + part:  # in the second step, which embeds its three parts twice
            torch.rand(3)  # as dropout would
            signal.raise_signal(signal.SIGUSR1)
        return embed(self, views)

    monkeypatch.setattr(loop._Run, "embed", interrupted)
    outcome = train(config, tmp_path / "run")
    assert (outcome.signal, outcome.epochs) == (signal.SIGUSR1, 0)
    assert calls == [0] * 6 + [1] * part
    assert state_of(tmp_path / "run")["step"] == 1
    monkeypatch.undo()
    assert train(config, tmp_path / "run", resume=True).epochs == 2
    assert_same_end(tmp_path / "run", final(tmp_path / "whole"))
