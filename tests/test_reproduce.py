"""The paper's comparison as one table: runs, records, resuming, budget, published figures."""

import dataclasses
import json
import os
import re
import shutil
import signal

import pytest
import torch

from alphacl_fast import FusedAlphaCLLoss
from alphacl_fast.cli import main
from alphacl_fast.train import (
    Config,
    RunError,
    checkpoint,
    evaluate,
    loop,
    process_context,
    recipe,
    reproduce,
    storage,
)
from alphacl_fast.train.reproduce import PUBLISHED, ROWS
from alphacl_fast.train.rows import Row

# One worker makes what its tests share.
pytestmark = [
    pytest.mark.xdist_group("reproduce"),
    pytest.mark.usefixtures("one_thread", "quick_plots"),  # the finished table's are drawn
]

TINY = {"dataset": "digits", "width": 4, "batch_size": 64, "subset": 128, "epochs": 2, "workers": 0}
ROWS_SEEDS = {"rows": ("infonce", "alpha_direct"), "seeds": 2}
NAMES = ["infonce-seed1", "alpha_direct-seed1", "infonce-seed2", "alpha_direct-seed2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished table of two rows and two seeds; copy it before changing anything."""
    out = tmp_path_factory.mktemp("tables") / "finished"
    progress = reproduce.table(out, **ROWS_SEEDS, **TINY)
    assert progress == reproduce.Progress(out, done=4, total=4)
    return out


def state(out):
    return json.loads((out / "table.json").read_text())


def accuracies(out):
    return {
        name: {key: run[key] for key in ("probe", "probe_best", "knn")}
        for name, run in state(out)["runs"].items()
    }


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def epochs(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "epoch"]


def never(*_, **__):
    raise AssertionError("must not be called")


# The rows


def test_rows_are_losses_and_the_paper_s_seven_are_the_default():
    assert reproduce.DEFAULT_ROWS == (
        "uniform",
        "infonce",
        "alpha_entropy",
        "alpha_square",
        "alpha_inverse",
        "backprop",
        "alpha_direct",
    )
    z = torch.nn.functional.normalize(torch.randn(2, 32, 8, dtype=torch.float64), dim=2)
    gradients = {}
    for name, row in ROWS.items():
        leaf = z.clone().requires_grad_()
        FusedAlphaCLLoss(row.objective, temperature=0.5, **row.option)(*leaf).backward()
        gradients[name] = leaf.grad / leaf.grad.norm()
    for name, gradient in gradients.items():  # no row trains what another one trains
        same = [other for other in gradients if (gradients[other] - gradient).norm() < 1e-3]
        assert same == (
            ["uniform", "alpha_gamma"] if name in ("uniform", "alpha_gamma") else [name]
        )


def test_a_figure_is_shown_for_its_own_setting_only():
    found = {
        key: figure
        for key in PUBLISHED
        if (
            figure := reproduce.published(
                Config.create(dataset=key[0], encoder=key[1], epochs=key[2]), key[3]
            )
        )
    }
    assert found == PUBLISHED
    assert {key for key, figure in PUBLISHED.items() if figure.checked} == {
        (dataset, "resnet50", number, "alpha_direct_raw")
        for dataset in ("cifar10", "cifar100", "stl10")
        for number in (100, 300, 500)
    }
    setting = {"dataset": "cifar10", "encoder": "resnet18", "epochs": 100}
    assert (
        str(reproduce.published(Config.create(**setting), "infonce")) == "84.06 ± 0.30 [recalled]"
    )
    assert str(reproduce.published(Config.create(**setting), "uniform")) == "63.60 [recalled]"
    faster = {
        "amp": "bf16",
        "augment": "device",
        "deterministic": False,
        "eval_every": 5,
        "probe_every": 5,
    }
    assert reproduce.published(Config.create(**setting, **faster), "infonce")
    for other in (
        {"epochs": 99},
        {"width": 16},
        {"batch_size": 256},
        {"lr": 0.02},
        {"subset": 5000},
        {"temperature": 0.1},
        {"dataset": "cifar100"},
        {"dataset": "imagefolder"},
        {"encoder": "resnet50"},
        {"optimizer": "sgd"},
        {"norm": "group"},
        {"image_size": 40},
        {"weight_decay": 1e-4},
        {"warmup_epochs": 3},
        {"negatives": "one_view"},
        {"micro_batch": 64},
        {"clip": 1.0},
        {"ema": 0.99},
        {"temperature_schedule": "cosine"},
        {"validation": 500},
    ):
        assert reproduce.published(Config.create(**{**setting, **other}), "infonce") is None, other
    assert reproduce.published(Config.create(**setting), "backprop") is None


def test_the_table_shows_figures_with_their_origin():
    config = Config.create(dataset="cifar10", epochs=100, probe_every=10)
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in reproduce.OF_A_ROW
    }
    runs = {
        f"infonce-seed{seed}": {
            "status": "finished",
            "probe": probe,
            "probe_best": 0.5,
            "knn": None,
        }
        for seed, probe in ((1, 0.4), (2, 0.42))
    }
    runs["backprop-seed1"] = {"status": "failed", "reason": "the loss became NaN"}
    runs["backprop-seed2"] = {"status": "stopped"}
    table = {"settings": settings, "rows": ["infonce", "backprop"], "seeds": 3, "runs": runs}
    text = reproduce.render(table)
    lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert lines[2] == [
        "infonce",
        "2 of 3",
        "41.0 ± 1.4",
        "50.0 ± 0.0",
        "–",
        "84.06 ± 0.30 [recalled]",
    ]
    assert lines[3] == ["backprop", "0 of 3", "–", "–", "–", "–"]
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1
    assert "3 of 6 runs are over" in text
    assert "backprop-seed1 failed: the loss became NaN" in text
    assert "not checked against the paper" in text
    assert "(every 10 epochs and the last)" in text
    assert "author's published log" not in text
    table["settings"]["width"] = 16
    assert "recalled" not in reproduce.render(table)


def test_recipes_are_the_defaults(capsys):
    assert main(["reproduce", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "# cifar10, resnet18 of width 64, 500 epochs of all training images, batch 128, lr 0.01, "
        "temperature 0.5"
    )
    assert lines[-1] == (
        "alphacl reproduce table --dataset stl10 --encoder resnet50 --seeds 5 --download --rows "
        "uniform,infonce,alpha_entropy,alpha_square,alpha_inverse,backprop,alpha_direct,alpha_direct_raw"
    )
    assert len(lines) == 12


# A table


def test_what_a_table_leaves(finished):
    files = {"table.json", "table-1.json", "table.md", ".lock"}
    assert {path.name for path in finished.iterdir()} == files | {*NAMES}
    saved = state(finished)
    assert [*saved["runs"]] == NAMES  # seed by seed over all rows
    assert (saved["rows"], saved["seeds"], saved["budget"], saved["plan"]) == (
        ["infonce", "alpha_direct"],
        2,
        None,
        None,
    )
    assert {"alphacl_fast", "commit", "torch", "device"} <= {*saved["environment"]}
    assert not {"objective", "option", "seed"} & {*saved["settings"]}
    for name, run in saved["runs"].items():
        config, lines = checkpoint.saved_config(finished / name), epochs(finished / name)
        assert name == f"{config.objective}-seed{config.seed}" == f"{run['row']}-seed{run['seed']}"
        assert config.option == ({"exponent": 4} if config.objective == "alpha_direct" else {})
        assert {key: config.__getattribute__(key) for key in TINY} == TINY
        assert config.probe_every == config.eval_every == 1
        assert (run["status"], run["probe"], run["knn"]) == (
            "finished",
            lines[-1]["probe"],
            lines[-1]["knn"],
        )
        assert run["probe_best"] == max(line["probe_best"] for line in lines) >= run["probe"] > 0.5
        assert run["seconds"] > 0
    values = 100 * torch.tensor([saved["runs"][f"infonce-seed{seed}"]["probe"] for seed in (1, 2)])
    assert f"| {values.mean():.1f} ± {values.std():.1f} " in (finished / "table.md").read_text()
    assert evaluate(finished / NAMES[0], draws=1)["epochs"] == 2
    (finished / NAMES[0] / "eval.json").unlink()


def test_the_best_epoch_need_not_be_the_last(finished, tmp_path, monkeypatch):
    out = tmp_path / "table"
    shutil.copytree(finished, out)
    run = out / NAMES[0]
    lines = epochs(run)
    lines[0]["probe_best"] = 0.99
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record, late = reproduce._one(run, checkpoint.saved_config(run), {})
    assert (record["probe_best"], record["probe"], late) == (0.99, lines[1]["probe"], None)


def test_a_finished_table_is_left_alone(finished, monkeypatch):
    before = contents(finished)
    monkeypatch.setattr(reproduce, "train", never)
    assert reproduce.table(finished, **ROWS_SEEDS, **{**TINY, "workers": 1}).done == 4
    assert contents(finished) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle(finished, tmp_path, monkeypatch, capsys, number):
    out, one_step, calls = tmp_path / "table", loop._Run.one_step, []

    def stop(self, *parts):
        calls.append(1)
        if len(calls) == 7:  # the third step of four in the second run
            os.kill(os.getpid(), number)
        return one_step(self, *parts)

    command = [
        "reproduce",
        "table",
        "--out",
        str(out),
        "--rows",
        "infonce,alpha_direct",
        "--seeds=2",
    ]
    command += [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    monkeypatch.setattr(loop._Run, "one_step", stop)
    assert main(command) == 128 + number
    monkeypatch.undo()
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(
        "alphacl: stopped in alpha_direct-seed1 with 1 of 4 runs over, state saved; go on with: "
        f"alphacl reproduce table --out {out} --rows infonce,alpha_direct "
    )
    assert {name: run["status"] for name, run in state(out)["runs"].items()} == {
        NAMES[0]: "finished",
        NAMES[1]: "stopped",
    }
    assert checkpoint.read(out / NAMES[1])["step"] == 3
    assert "1 of 4 runs are over" in (out / "table.md").read_text()
    earlier = contents(out / NAMES[0])
    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"{NAMES[0]}, run 1" not in text
    assert all(f"{name}, run {index} of 4" in text for index, name in enumerate(NAMES[1:], 2))
    assert f"{out} finished: 4 runs" in text
    assert contents(out / NAMES[0]) == earlier
    assert accuracies(out) == accuracies(finished)
    for name in NAMES:
        mine, theirs = (
            torch.load(folder / name / "checkpoint.pt", weights_only=True)["model"]
            for folder in (out, finished)
        )
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_killed_between_a_run_and_its_record(finished, tmp_path):
    out = tmp_path / "table"
    shutil.copytree(finished, out)
    saved = state(out)
    del saved["runs"][NAMES[3]], saved["digest"]
    (out / "table.json").write_text(json.dumps(saved))
    before = contents(out / NAMES[3])
    assert reproduce.table(out, **ROWS_SEEDS, **TINY).done == 4
    assert accuracies(out) == accuracies(finished)
    assert contents(out / NAMES[3]) == before


def test_a_signal_in_the_last_evaluation_starts_no_other_run(tmp_path, monkeypatch):
    figures, calls = loop.figures, []

    def stop(*given, **which):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return figures(*given, **which)

    monkeypatch.setattr(loop, "figures", stop)
    progress = reproduce.table(tmp_path / "table", **ROWS_SEEDS, **TINY)
    assert (progress.done, progress.run, progress.signal) == (1, None, signal.SIGTERM)
    assert [run["status"] for run in state(tmp_path / "table")["runs"].values()] == ["finished"]
    assert (tmp_path / "table" / NAMES[0] / "embedding.png").exists()


def test_a_removed_run_is_trained_anew(finished, tmp_path):
    out = tmp_path / "table"
    shutil.copytree(finished, out)
    shutil.rmtree(out / NAMES[2])
    assert reproduce.table(out, **ROWS_SEEDS, **TINY).done == 4
    assert (out / NAMES[2] / "checkpoint.pt").exists()
    assert accuracies(out) == accuracies(finished)


def test_other_settings_are_refused_and_named(finished):
    before = contents(finished)
    for change, message in (
        (
            {"lr": 0.1, "seeds": 3},
            "--lr: 0.003 in the run, 0.1 given; --seeds: 2 in the table, 3 given",
        ),
        ({"rows": ("infonce",)}, "--rows: infonce,alpha_direct in the table, infonce given"),
        ({"probe_every": 2}, "--probe-every: 1 in the run, 2 given"),
    ):
        with pytest.raises(
            RunError,
            match=re.escape(f"{finished} was started with other settings: {message}; nothing"),
        ):
            reproduce.table(finished, **{**ROWS_SEEDS, **TINY, **change})
    without = {name: value for name, value in TINY.items() if name != "epochs"}
    with pytest.raises(
        RunError, match="settings: --budget: none in the table, 45m given; nothing was changed"
    ):
        reproduce.table(finished, **ROWS_SEEDS, **without, budget=2700)
    assert contents(finished) == before


def test_foreign_and_damaged_folders(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(
        RunError, match=r"is not an empty folder and holds no table\.json: choose another --out"
    ):
        reproduce.table(tmp_path, **ROWS_SEEDS, **TINY)
    for text, message in (
        ("{", r"table\.json is damaged: it is no JSON object: remove it, and the same command"),
        ("[]", r"table\.json is damaged"),
        ('{"runs": {}}', r"cannot read .*table\.json: it is not a table"),
    ):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(RunError, match=message):
            reproduce.table(tmp_path, **ROWS_SEEDS, **TINY)
    assert len(contents(tmp_path)) == 2


def test_a_damaged_table_is_restored(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "table"
    shutil.copytree(finished, out)
    with storage.locked(out), pytest.raises(RunError, match="is in use by process"):
        reproduce.table(out, **ROWS_SEEDS, **TINY)
    for name, message in (
        ("table.json", r"table\.json is damaged.*; using table-1\.json"),
        ("table-1.json", None),
    ):
        (out / name).write_text((out / name).read_text().replace("infonce", "infonze", 1))
        storage.warn.cache_clear()
        if message:
            assert reproduce.table(out, **ROWS_SEEDS, **TINY).done == 4
            assert re.search(message, capsys.readouterr().err)
    (out / "table.json").write_text("{")
    with pytest.raises(RunError, match="remove it, and the same command takes over the runs"):
        reproduce.table(out, **ROWS_SEEDS, **TINY)
    for name in ("table.json", "table-1.json"):
        (out / name).unlink()
    assert reproduce.table(out, **ROWS_SEEDS, **TINY).done == 4
    assert accuracies(out) == accuracies(finished)


def test_a_run_that_lost_its_figures_has_failed(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished / NAMES[0], out)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    lost = [line for line in lines if json.loads(line).get("epoch") != 1]
    (out / "metrics.jsonl").write_text("".join(lost))
    record, _ = reproduce._one(out, checkpoint.saved_config(out), {})
    assert record["status"] == "failed"
    assert f"has lost accuracies; remove {out} to train it again" in record["reason"]


def test_a_row_that_diverges_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    class Breaks(recipe.FusedAlphaCLLoss):
        def forward(self, z1, z2):
            broken = (
                self.training
                and "alpha_direct" in repr(self)
                and len(z1) == 64
                and torch.is_grad_enabled()
            )
            self.calls = getattr(self, "calls", 0) + 1
            # 1: the trial
            return super().forward(z1, z2) * (float("nan") if broken and self.calls == 4 else 1)

    monkeypatch.setattr(recipe, "FusedAlphaCLLoss", Breaks)
    out = tmp_path / "table"
    assert reproduce.table(out, **ROWS_SEEDS, **TINY).done == 4
    runs = state(out)["runs"]
    assert [run["status"] for run in runs.values()] == ["finished", "failed"] * 2
    assert runs[NAMES[1]]["reason"].startswith("the loss became NaN in epoch 2, by step ")
    text = (out / "table.md").read_text()
    assert re.search(r"\| alpha_direct \| 0 of 2 \| – ", text)
    assert "alpha_direct-seed2 failed: the loss became NaN" in text
    monkeypatch.setattr(reproduce, "train", never)  # a failure is a result, not to be repeated
    assert reproduce.table(out, **ROWS_SEEDS, **TINY).done == 4


def test_an_unusable_row_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(ROWS, "broken", Row("alpha_direct", {"exponent": -1}))
    with pytest.raises(RunError, match="--option: alpha_direct: exponent must be"):
        reproduce.table(tmp_path / "table", rows=("infonce", "broken"), seeds=1, **TINY)
    assert not [*tmp_path.iterdir()]


# The budget

PACE = {"step": 0.5, "start": 10.0, "per_epoch": 20, "evaluation": 30.0, "end": 5.0}


def planned(monkeypatch, budget, seeds=2, spent=7.0, given=None):
    """Plan two rows whose parts take PACE's times; every rehearsal takes ``spent`` seconds."""
    clock = [0.0]

    def rehearse(_config, *, judged):
        clock[0] += spent
        return {
            name: value
            for name, value in PACE.items()
            if judged or name not in ("evaluation", "end")
        }

    monkeypatch.setattr(reproduce, "rehearse", rehearse)
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: clock[0])
    given = {"dataset": "digits", **(given or {})}
    configs = {row: Config.create(**given) for row in ("infonce", "uniform")}
    return reproduce.plan(configs, seeds, budget, given)


def test_the_plan_is_the_most_that_fits(monkeypatch):
    # A run of e epochs takes 10 s to start, 10·e s of steps, 30 s per evaluation and 5 s to end;
    # there are four runs and 14 s of rehearsal. From 20 epochs on only every other epoch is
    # evaluated: 20 epochs take 515 s, as long as 12.5 epochs that are all evaluated.
    for epochs, seconds, fewer in ((1, 55, None), (3, 135, 2), (20, 515, 12), (60, 915, 55)):
        exactly = (4 * seconds + 14) / 0.9
        found = planned(monkeypatch, exactly + 1e-6)
        assert (found["epochs"], found["seconds"]) == (epochs, pytest.approx(4 * seconds))
        if fewer:
            assert planned(monkeypatch, exactly - 1e-6)["epochs"] == fewer
    assert planned(monkeypatch, 1e9)["epochs"] == 60  # the recipe's
    rare = planned(monkeypatch, (4 * 75 + 14) / 0.9 + 1e-6, given={"eval_every": 100})
    assert (rare["epochs"], rare["step_seconds"]) == (3, {"infonce": 0.5, "uniform": 0.5})


@pytest.mark.parametrize(("again", "expected"), [(0.6, 0.6), (9.0, 2.0)])
def test_a_row_that_seems_slow_is_rehearsed_again(monkeypatch, again, expected):
    steps = {"uniform": [0.5], "infonce": [0.7], "alpha_square": [2.0, again]}
    monkeypatch.setattr(
        reproduce,
        "rehearse",
        lambda config, judged: {**PACE, "step": steps[config.objective].pop(0)},
    )
    configs = {row: Config.create(objective=row) for row in steps}
    found = reproduce.plan(configs, 1, 1800, {"dataset": "digits", "eval_every": 100})
    assert found["step_seconds"] == {"uniform": 0.5, "infonce": 0.7, "alpha_square": expected}
    assert steps == {"uniform": [], "infonce": [], "alpha_square": []}
    once = found["epochs"] * 20 * (1.2 + expected)
    assert found["seconds"] == pytest.approx(once + 3 * (10 + 30 + 5))


def test_too_small_a_budget_names_what_would_do(monkeypatch):
    message = (
        r"--budget 4m does not hold 1 epoch of 4 runs, which takes about 5m; fewer --rows or "
        "--seeds, a --subset or a "
        "smaller --width take less"
    )
    with pytest.raises(RunError, match=message):
        planned(monkeypatch, 240)
    assert planned(monkeypatch, 300)["epochs"] == 1
    with pytest.raises(RunError, match="does not hold 3 epochs of 4 runs, which takes about 11m"):
        planned(monkeypatch, 300, given={"warmup_epochs": 3})


def test_a_budget_s_plan_is_kept(tmp_path, monkeypatch, capsys):
    settings = {name: value for name, value in TINY.items() if name != "epochs"}
    out, plans = tmp_path / "table", []
    monkeypatch.setattr(
        reproduce,
        "plan",
        lambda *_: (
            plans.append(1)
            or {
                "epochs": 1,
                "seconds": 50.0,
                "evaluation_seconds": 0.3,
                "step_seconds": {"infonce": 0.1},
            }
        ),
    )
    monkeypatch.setattr(loop._Run, "one_step", never)
    with pytest.raises(AssertionError, match="must not be called"):
        reproduce.table(out, rows=("infonce",), seeds=1, budget=60, **settings)
    text = capsys.readouterr().out
    assert text.startswith(
        "plan: 1 epochs for each of 1 runs, about 50s of 1m; a step takes 100 to 100 ms here, "
        "kNN and pr"
    )
    assert state(out)["plan"]["epochs"] == 1
    monkeypatch.undo()
    monkeypatch.setattr(reproduce, "plan", never)
    assert reproduce.table(out, rows=("infonce",), seeds=1, budget=60, **settings).done == 1
    assert len(plans) == 1
    assert [line["epoch"] for line in epochs(out / "infonce-seed1")] == [1]
    with pytest.raises(
        RunError, match="settings: --budget: 1m in the table, 2m given; nothing was changed"
    ):
        reproduce.table(out, rows=("infonce",), seeds=1, budget=120, **settings)
    with pytest.raises(
        RunError, match="settings: --budget: 1m in the table, none given; nothing was changed"
    ):
        reproduce.table(out, rows=("infonce",), seeds=1, **settings)


def test_a_rehearsal_measures_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config.create(**TINY, objective="alpha_square")
    found = loop.rehearse(config, judged=True)
    assert {*found} == {"step", "start", "per_epoch", "evaluation", "end"}
    assert found["per_epoch"] == 2
    assert all(value > 0 for name, value in found.items() if name != "start")
    assert {*loop.rehearse(config, judged=False)} == {"step", "start", "per_epoch"}
    assert not [*tmp_path.iterdir()]


def test_durations():
    assert [reproduce.seconds(text) for text in ("90s", "45m", "1.5h")] == [90, 2700, 5400]
    assert [reproduce.duration(value) for value in (59.6, 61, 2700, 7200, 5400, 1234)] == [
        "60s",
        "61s",
        "45m",
        "2h",
        "90m",
        "21m",
    ]


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: what"),
        (["chart"], "argument what: invalid choice: 'chart'"),
        (["recipes", "--seeds", "3"], "recipes takes no flags, got --seeds"),
        (["table", "--rows", "infonce,infonse"], "--rows must be some of uniform, infonce, "),
        (["table", "--rows", ""], "--rows must be some of uniform, infonce, "),
        (
            ["table", "--rows", "infonce,infonce"],
            "--rows must not name a row twice, got infonce,infonce",
        ),
        (["table", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (
            ["table", "--budget", "soon"],
            "--budget must be a time such as 600s, 45m or 2h, got 'soon'",
        ),
        (["table", "--budget", "0m"], "--budget must be a time such as 600s, 45m or 2h, got '0m'"),
        (["table", "--budget", "9m", "--epochs", "3"], "--budget and --epochs exclude each other"),
        (["table", "--probe-every", "0"], "--probe-every must be at least 1 in a table, got 0"),
        (["table", "--probe-every", "-1"], "--probe-every must be at least 0, got -1"),
        (["table", "--objective", "infonce"], "unrecognized arguments: --objective infonce"),
        (["table", "--seed", "3"], "unrecognized arguments: --seed 3"),
        (["table", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (
            ["table", "--dataset", "cifar10", "--data-root", "nowhere"],
            "cannot open cifar10 in nowhere (--download fetches",
        ),
        (["table", "--device", "abacus"], "--device abacus cannot be used: "),
    ],
)
def test_problems_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["reproduce", *arguments])
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"alphacl: error: {message}")
    assert not [*tmp_path.iterdir()]


def test_settings_of_a_row_and_several_processes_are_refused(tmp_path, monkeypatch):
    with pytest.raises(
        RunError, match="--option is not a setting of a table: its rows and seeds say it"
    ):
        reproduce.table(tmp_path / "table", option={"exponent": 2}, **TINY)
    for name, value in zip(process_context.VARIABLES, ("0", "2", "here", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="alphacl reproduce runs in one process, not under torchrun"):
        reproduce.table(tmp_path / "table", **TINY)


def test_a_second_ctrl_c_names_the_way_on(monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "table", interrupted)
    assert main(["reproduce", "table", "--seeds", "1"]) == 130
    assert (
        capsys.readouterr().err
        == "alphacl: interrupted; go on with: alphacl reproduce table --seeds 1\n"
    )


def test_help_lists_rows_and_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["reproduce", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("--budget", "--probe-every", "--augment", "alpha_gamma", "recipes")
    )
    assert "--objective" not in out
