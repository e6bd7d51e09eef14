"""Callbacks are told what metrics.jsonl holds; TensorBoard's writes it as scalars."""

import json
import sys
import types

import pytest
from training_runs import state_of

from alphacl_fast.train import Callback, Config, RunError, train

pytestmark = pytest.mark.usefixtures("one_thread", "quick_plots")

SETTINGS = {
    "dataset": "digits",
    "width": 4,
    "batch_size": 32,
    "subset": 64,
    "epochs": 2,
    "workers": 0,
    "log_every": 1,
    "eval_every": 2,
}


class Heard(Callback):
    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def on_begin(self, config, step):
        self.calls.append(("begin", step, config["dataset"]))

    def on_step(self, step, values):
        self.calls.append(("step", step, values))
        if step == self.fails_at:
            raise RuntimeError("of the callback")

    def on_evaluation(self, step, values):
        self.calls.append(("evaluation", step, values))

    def on_epoch(self, step, values):
        self.calls.append(("epoch", step, values))

    def on_end(self):
        self.calls.append(("end", None, None))


def test_callbacks_hear_what_is_logged(tmp_path):
    heard = Heard()
    train(Config.create(**SETTINGS), tmp_path / "run", callbacks=[heard, Callback()])
    kinds = [kind for kind, _, _ in heard.calls]
    assert kinds == [
        *("begin", "step", "step", "epoch", "step", "step", "evaluation", "epoch", "end")
    ]
    assert heard.calls[0] == ("begin", 0, "digits")
    lines = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")
        if line
    ]
    told = [
        {"kind": kind, "step": step, **values}
        for kind, step, values in heard.calls
        if kind in ("step", "epoch")
    ]
    assert told == lines
    [(step, values)] = [
        (step, values) for kind, step, values in heard.calls if kind == "evaluation"
    ]
    assert (step, values) == (4, {"epoch": 2, "knn": lines[-1]["knn"]})


def test_a_callback_that_fails_ends_the_run_which_can_go_on(tmp_path):
    heard, config = Heard(fails_at=3), Config.create(**SETTINGS)
    with pytest.raises(RuntimeError, match="of the callback"):
        train(config, tmp_path / "run", callbacks=[heard])
    assert heard.calls[-1][0] == "end"
    again = Heard()
    assert train(config, tmp_path / "run", resume=True, callbacks=[again]).epochs == 2
    assert again.calls[0] == ("begin", 2, "digits")
    assert [step for kind, step, _ in again.calls if kind == "step"] == [3, 4]


class Writer:
    """Stands in for torch.utils.tensorboard's, whose package may be missing."""

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, {}, False

    def add_text(self, name, text, step):
        self.text = text

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def close(self):
        self.closed = True


def test_tensorboard_gets_every_scalar_and_hides_what_is_void(tmp_path, monkeypatch):
    made = []

    def make(folder, purge_step=None):
        made.append(Writer(folder, purge_step))
        return made[-1]

    module = types.SimpleNamespace(SummaryWriter=make)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = Config.create(**SETTINGS, tensorboard=True)
    with pytest.raises(RuntimeError):
        train(config, tmp_path / "run", callbacks=[Heard(fails_at=3)])
    train(config, tmp_path / "run", resume=True)
    first, second = made
    assert first.folder == str(tmp_path / "run" / "tensorboard")
    assert (first.purge_step, second.purge_step) == (None, 3)
    assert "| dataset | digits |" in first.text
    assert first.closed
    assert second.closed
    assert {("step/loss", 1), ("step/lr", 2), ("epoch/loss", 2)} <= {*first.scalars}
    assert ("evaluation/knn", 4) in second.scalars
    assert all(isinstance(x, (int, float)) for x in {**first.scalars, **second.scalars}.values())


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match=r"^--tensorboard needs tensorboard \(.*\): pip install ten"):
        train(Config.create(**SETTINGS, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_events_of_the_real_package(tmp_path):
    pytest.importorskip("tensorboard")
    train(Config.create(**SETTINGS, tensorboard=True), tmp_path / "run")
    [events] = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"evaluation/knn" in events.read_bytes()
    assert state_of(tmp_path / "run")["step"] == 4
