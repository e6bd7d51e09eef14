"""The speedrun: counted operations, its one command, and when the target was reached."""

import json

import pytest

from alphacl_fast.cli import main
from alphacl_fast.train import Config, RunError, loop, speedrun

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"dataset": "digits", "encoder": "small", "augment": "workers", "compile": False}
SMALL |= {"width": 4, "batch_size": 32, "subset": 64, "epochs": 2, "eval_every": 1, "workers": 0}


def test_operations_are_those_of_the_convolutions():
    """The small network on digits, counted by hand: 3 × forward, without the images' gradient."""
    config = Config.create(dataset="digits", width=4)
    layers = [(1, 4, 8), (4, 8, 8), (8, 16, 4), (16, 32, 2)]
    macs = [9 * inside * outside * side**2 for inside, outside, side in layers]
    macs += [4 * 32 * 512, 512 * 128]
    assert speedrun.flops_per_image(config) == 2 * 2 * (3 * sum(macs) - macs[0])


def row(epoch, knn=None, step_ms=100.0):
    return {"kind": "epoch", "epoch": epoch, "step_ms": step_ms, **({"knn": knn} if knn else {})}


def test_time_to_the_target_is_training_time():
    config = Config.create(**speedrun.SETTINGS)
    lines = [
        row(1),
        row(2, 0.8),
        {"kind": "step"},
        row(3, step_ms=None),
        row(4, 0.91),
        row(5, 0.93),
    ]
    first, best = speedrun.reached(lines, config)
    assert first == {"epoch": 4, "knn": 0.91, "seconds": pytest.approx(4 * 97 * 0.1)}
    assert best["epoch"] == 5
    assert "kNN 91.0 % after epoch 4, 0 h 01 min" in speedrun.report(lines, config)
    assert "did not reach 90 %: the best was 80.0 %" in speedrun.report(lines[:3], config)
    assert "there was no evaluation" in speedrun.report(lines[:1], config)


def test_one_command_trains_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop.report, "curves", lambda *_: None)
    monkeypatch.setattr(speedrun, "SETTINGS", {**speedrun.SETTINGS, **SMALL})
    out = tmp_path / "run"
    for _ in range(2):
        assert main(["reproduce", "speedrun", "--out", str(out)]) == 0
        text = capsys.readouterr().out
        assert "predicted times (not measured)" in text
        assert "published: 1 h 39 min on one A100" in text
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["optimizer"], config["lr"], config["weight_decay"]) == ("sgd", 0.06, 5e-4)
    with pytest.raises(SystemExit):
        main(["reproduce", "speedrun", "--out", str(out), "--lr", "0.5"])
    assert "--lr: 0.06 in the run, 0.5 given" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "REHEARSED_STEPS", 2)
    assert main(["reproduce", "speedrun", "--dry-run", "--width", "2"]) == 0
    text = capsys.readouterr().out
    assert "A100: " in text
    assert "dry run: steps of 4 random images take" in text
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("arguments", "message"), [
    (["speedrun", "--seeds", "3"], "--seeds belongs to table, not to speedrun"),
    (["table", "--dry-run"], "--dry-run belongs to speedrun and evidence, not to table"),
    (["speedrun", "--eval-every", "0"], "--eval-every must be at least 1 in a speedrun, got 0"),
])  # fmt: skip
def test_misuse_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(["reproduce", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"alphacl: error: {message}\n"


def test_a_speedrun_is_simclr(tmp_path):
    with pytest.raises(RunError, match="--recipe must be simclr in a speedrun, got moco"):
        speedrun.speedrun(tmp_path / "run", recipe="moco")
