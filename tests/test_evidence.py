"""The searched comparison over seeds: its queue, its choices, its statistics and its tables."""

import json
import math
import statistics

import pytest
from scipy import stats

from alphacl_fast import FusedAlphaCLLoss, journal, objectives
from alphacl_fast.cli import main
from alphacl_fast.train import Config, Outcome, RunError, evidence, evidence_report
from alphacl_fast.train import evidence_table as settings
from alphacl_fast.train.config import Diverged
from alphacl_fast.train.data import load
from alphacl_fast.train.evaluation import raw_pixels
from alphacl_fast.train.evidence_table import PARTS, Part

pytestmark = [pytest.mark.xdist_group("evidence"), pytest.mark.usefixtures("one_thread")]

SMALL = {"dataset": "digits", "width": 2, "batch_size": 64, "subset": 200, "epochs": 1}
SMALL |= {"threads": 1, "workers": 0, "eval_every": 0, "probe_every": 0}
SCORES = {"status": "finished", "knn": 0.5, "probe": 0.5, "cpu_seconds": 1.0}


def never(*_, **__):
    raise AssertionError("must not be called")


def rows_in(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def small(monkeypatch, quick_plots):
    """A part of two contestants, two runs of a search each and two seeds."""
    part = Part(
        SMALL, names=("infonce", "uniform"), seeds=2, measures=("knn_few", "probe"), held_out=5
    )
    monkeypatch.setitem(PARTS, "small", part)
    for module in (evidence, settings):
        monkeypatch.setattr(module, "LEARNING_RATES", (0.01,))
        monkeypatch.setattr(module, "RATES_ALONE", (0.001, 0.01))
        monkeypatch.setattr(module, "SCALES", {"temperature": (0.1, 0.5)})
    monkeypatch.setattr(evidence, "DRAWS", 2)


def work_off(out):
    return main(["reproduce", "evidence", "--part", "small", "--out", str(out)])


# The queue


def test_a_part_is_worked_off_once(small, tmp_path, monkeypatch, capsys):
    """Search, choice and seeds; a row that was lost is run again, and nothing else."""
    assert work_off(tmp_path) == 0
    file = tmp_path / "small.jsonl"
    rows = rows_in(file)
    phases = [(row["phase"], row["name"], row["seed"]) for row in rows]
    of_one = ["search"] * 2 + ["seed"] * 2
    assert [phase for phase, _, _ in phases] == ["baseline"] * 2 + of_one * 2
    assert [seed for _, _, seed in phases] == [1, 1, *[1001, 1001, 1, 2] * 2]
    for name in ("infonce", "uniform"):
        search, seeds = (
            [row for row in rows if (row["name"], row["phase"]) == (name, phase)]
            for phase in ("search", "seed")
        )
        best = max(search, key=lambda row: row["probe"])
        for row in seeds:
            assert (row["lr"], row.get("temperature")) == (best["lr"], best.get("temperature"))
    assert all(0 < row[name] <= 1 for row in rows for name in ("knn", "probe_few", "knn_few"))
    assert all(row["cpu_seconds"] > 0 and row["torch"] and row["capability"] for row in rows)
    assert not (tmp_path / "unfinished" / "small").exists()
    shown = capsys.readouterr().out
    assert "10 of 10 runs are over" in shown
    assert "| `uniform` | 2 of 2 | lr 0.0" in shown

    trained = []
    train = evidence.train
    monkeypatch.setattr(evidence, "train", lambda *a, **k: trained.append(a) or train(*a, **k))
    kept = [row for row in rows if (row["phase"], row["name"], row["seed"]) != phases[-1]]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"part": "sm')
    assert work_off(tmp_path) == 0
    assert len(trained) == 1
    again = journal.read(file)[-1]
    assert {**again, **dict.fromkeys(("wall_seconds", "cpu_seconds", "commit"))} == {
        **rows[-1],
        **dict.fromkeys(("wall_seconds", "cpu_seconds", "commit")),
    }
    monkeypatch.setattr(evidence, "train", never)
    assert work_off(tmp_path) == 0
    assert (
        main(["reproduce", "evidence", "--part", "small", "--out", str(tmp_path), "--dry-run"]) == 0
    )


def test_a_stopped_run_goes_on_in_its_folder(small, tmp_path, monkeypatch, capsys):
    """A signal leaves the run's folder and no row; the same command resumes that run."""
    train, calls = evidence.train, []

    def stops_first(config, folder, resume):
        calls.append(resume)
        if len(calls) > 1:
            raise KeyboardInterrupt
        train(config, folder, resume=resume)
        return Outcome(folder, 0, signal=15)

    monkeypatch.setattr(evidence, "train", stops_first)
    assert work_off(tmp_path) == 128 + 15
    assert "stopped; 2 of 10 runs have their row" in capsys.readouterr().err
    assert (tmp_path / "unfinished" / "small" / "config.json").exists()
    assert work_off(tmp_path) == 130
    assert calls == [False, True]


def test_a_trained_run_waits_for_its_row(small, tmp_path, monkeypatch, capsys):
    """Killed, or on a full disk, before its row is written, it is not trained again."""
    train, append, outcomes = evidence.train, journal.append, []

    def full(file, row):
        if row["phase"] == "search":
            raise OSError(28, "No space left on device")
        append(file, row)

    def noted(config, folder, resume):
        outcomes.append(train(config, folder, resume=resume))
        return outcomes[-1] if len(outcomes) < 3 else Outcome(folder, 1, signal=15)

    monkeypatch.setattr(evidence, "train", noted)
    monkeypatch.setattr(journal, "append", full)
    with pytest.raises(SystemExit):
        work_off(tmp_path)
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(journal, "append", append)
    assert work_off(tmp_path) == 128 + 15
    assert [outcome.already for outcome in outcomes] == [False, True, False]
    assert [row["phase"] for row in rows_in(tmp_path / "small.jsonl")] == [
        *["baseline"] * 2,
        "search",
    ]


def test_a_late_signal_ends_the_queue_after_the_row(small, tmp_path, monkeypatch):
    monkeypatch.setattr(
        evidence, "train", lambda config, folder, resume: Outcome(folder, 1, late=15)
    )
    monkeypatch.setattr(evidence, "_judged", lambda *_: dict(SCORES))
    assert work_off(tmp_path) == 128 + 15
    assert len(rows_in(tmp_path / "small.jsonl")) == 3


def test_a_run_that_diverges_has_a_row(small, tmp_path, monkeypatch, capsys):
    """Where all runs of a search diverge there is nothing to choose, and no seed is run."""

    def diverges(config, folder, resume):
        raise Diverged("the loss became NaN")

    monkeypatch.setattr(evidence, "train", diverges)
    assert work_off(tmp_path) == 0
    rows = rows_in(tmp_path / "small.jsonl")[2:]
    assert [(row["phase"], row["status"]) for row in rows] == [("search", "failed")] * 4
    assert rows[0]["reason"] == "the loss became NaN"
    assert "6 of 10 runs are over, none of them one that is compared" in capsys.readouterr().out


def test_images_that_judge_a_search_are_not_fitted_on():
    data = load(Config.create(**SMALL))
    split = evidence._held_out(raw_pixels, data, 5)
    assert (len(split.train), len(split.test)) == (150, 50)
    assert split.labels.bincount().tolist() == [5] * 10
    both = [row.tobytes() for part in (split.train, split.test) for row in part.numpy()]
    whole = [
        row.tobytes() for row in evidence.extract(data.train, {"": raw_pixels}, data)[0][""].numpy()
    ]
    assert sorted(both) == sorted(whole)


def test_a_data_set_of_other_classes_is_refused(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PARTS, "small", PARTS["small"]._replace(classes=100))
    with pytest.raises(SystemExit):
        work_off(tmp_path)
    assert "--part small needs a data set of 100 classes, got 10 in" in capsys.readouterr().err


def test_the_choice_is_the_best_finished_run():
    search = evidence.searched("digits", PARTS["digits"].setting, "infonce")
    rows = [
        run.row({"status": "finished", "probe": x}, {})
        for run, x in zip(search, "abcab", strict=False)
    ]
    for row, value in zip(rows, (0.2, 0.9, 0.4, 0.9, 0.1), strict=True):
        row["probe"] = value
    assert evidence.choice(search, rows, "probe") is None  # the sixth is not over
    rows.append(search[5].row({"status": "failed", "reason": "NaN"}, {}))
    assert evidence.choice(search, rows, "probe") == search[1].given


# Settings


def test_every_objective_gets_a_search_of_six():
    """On digits it is the whole family, and every run's settings make a config and a loss."""
    contestants = settings.CONTESTANTS
    assert PARTS["digits"].names == tuple(contestants)
    assert {entry.objective for entry in contestants.values()} == {*objectives.names()}
    for name, (objective, _, scale) in contestants.items():
        assert (scale == "temperature") == objectives.make(objective).uses_temperature
        search = evidence.searched("digits", PARTS["digits"].setting, name)
        assert len(search) == len({json.dumps(run.given) for run in search}) == 6
        for run in search:
            config = Config.create(**run.given)
            assert config.seed == settings.SEARCH_SEED > PARTS["digits"].seeds
            FusedAlphaCLLoss(objective, temperature=config.temperature, **config.option)
    for part, shape in PARTS.items():
        for row in (shape.candidates or {"": {"width": 8, "epochs": 4}}).values():
            Config.create(**{**shape.setting, **row})
        assert shape.candidates or {*shape.names} <= {*contestants}, part


def setting_rows(accuracies, raw=0.3):
    """Rows of the part "setting": the kNN accuracies of every candidate's seeds."""
    fixed = PARTS["setting"].setting
    rows = [evidence._baselines("setting", fixed)[0].row({**SCORES, "knn": raw}, {})]
    for name, values in accuracies.items():
        runs = evidence._candidate("setting", name)
        rows += [run.row({**SCORES, "knn": x}, {}) for run, x in zip(runs, values, strict=False)]
    return rows


@pytest.fixture
def candidates(monkeypatch):
    """Names of three candidates of the part "setting"."""
    three = {f"{n} epochs": {"width": 8, "epochs": n} for n in (2, 3, 4)}
    monkeypatch.setitem(PARTS, "setting", PARTS["setting"]._replace(candidates=three))
    return [*three]


def test_the_first_setting_with_margin_and_small_deviation_is_chosen(tmp_path, candidates):
    """One that misses the margin gets no more seeds; after one that passes, none is tried."""
    first, second, third = candidates
    accuracies = {
        first: (0.41, 0.399),  # below the margin with seed 2
        second: (0.41, 0.42, 0.43, 0.42, 0.40),  # deviates by 1.1 points
        third: (0.411, 0.412, 0.413, 0.412, 0.41),
    }
    rows = setting_rows(accuracies)
    queue = [run.name for run in evidence.runs("setting", rows, tmp_path)]
    assert queue == [*evidence.BASELINES, *[first] * 2, *[second] * 5, *[third] * 5]
    file = tmp_path / "setting.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(RunError, match="10 points above raw pixels: run --part setting first"):
        evidence._setting(tmp_path)
    journal.append(file, rows[-1])
    assert evidence._setting(tmp_path) == PARTS["setting"].candidates[third]
    assert next(evidence.runs("cifar10", [], tmp_path)).given["width"] == 8


def test_without_a_small_deviation_the_smallest_is_chosen(tmp_path, candidates):
    """Of the candidates with the margin, once all were tried."""
    accuracies = dict.fromkeys(candidates, (0.3,))  # no margin
    accuracies[candidates[1]] = (0.41, 0.43, 0.45, 0.43, 0.41)
    accuracies[candidates[2]] = (0.41, 0.43, 0.44, 0.43, 0.41)
    rows = setting_rows(accuracies)
    file = tmp_path / "setting.jsonl"
    for row in rows:
        journal.append(file, row)
    untrained = evidence._baselines("setting", PARTS["setting"].setting)[1]
    with pytest.raises(RunError, match="run --part setting first"):
        evidence._setting(tmp_path)
    journal.append(file, untrained.row(SCORES, {}))
    assert evidence._setting(tmp_path) == PARTS["setting"].candidates[candidates[2]]
    rows = [*setting_rows(dict.fromkeys(candidates, (0.3,))), untrained.row(SCORES, {})]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match="all candidates were tried"):
        evidence._setting(tmp_path)


def test_batch_sizes_use_the_choice_of_cifar10(tmp_path):
    first = next(iter(PARTS["setting"].candidates))
    for row in setting_rows({first: (0.5,) * 5}):
        journal.append(tmp_path / "setting.jsonl", row)
    fixed = {**PARTS["cifar10"].setting, **PARTS["setting"].candidates[first]}
    with pytest.raises(RunError, match="run --part cifar10 first"):
        [*evidence.runs("batch_size", [], tmp_path)]
    for name in PARTS["batch_size"].names:
        for k, run in enumerate(evidence.searched("cifar10", fixed, name)):
            journal.append(tmp_path / "cifar10.jsonl", run.row({**SCORES, "probe": k / 10}, {}))
    runs = [run for run in evidence.runs("batch_size", [], tmp_path) if run.phase == "seed"]
    assert len(runs) + 2 == evidence.total("batch_size")
    assert {(run.given["batch_size"], round(run.given["lr"], 6)) for run in runs} == {
        (64, 0.007071), (128, 0.01), (256, 0.014142), (512, 0.02), (1024, 0.028284)
    }  # fmt: skip
    assert {run.given["temperature"] for run in runs} == {0.5}


# Statistics


def test_paired_differences_by_hand():
    """d = 1, 2, 3, 6: mean 3, s = √(14/3), t = 3 / (s/2) with 3 degrees of freedom."""
    base = {1: 50.0, 2: 60.0, 3: 55.0, 4: 40.0, 9: 1.0}
    values = {4: 46.0, 1: 51.0, 2: 62.0, 3: 58.0, 7: 99.0}
    found = evidence_report.paired(values, base)
    error = math.sqrt(14 / 3) / 2
    assert found[:3] == (4, pytest.approx(3), pytest.approx(error))
    assert found.t == pytest.approx(2 * stats.t.sf(3 / error, 3))
    assert found.wilcoxon == pytest.approx(2 ** (1 - 4))  # all of one sign: the smallest there is
    assert evidence_report.paired({1: 2.0}, {2: 2.0}) is None
    one = evidence_report.paired({1: 2.0}, {1: 1.0})
    assert (one.n, one.mean, one.t, one.wilcoxon) == (1, 1.0, None, None)
    same = evidence_report.paired({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0})
    assert (same.error, same.t) == (0, None)


def test_rounding_errors_break_no_tie():
    """Accuracies are counts over the number of images; here of 360, as on the digits."""

    def compare(pairs):
        values, base = (
            {k: 100 * (x / 360) for k, x in enumerate(xs)} for xs in zip(*pairs, strict=True)
        )
        return evidence_report.paired(values, base)

    equal = [(300 + k, 297 + k) for k in range(6)]
    assert (compare(equal).error, compare(equal).t, compare(equal).wilcoxon) == (0, None, None)
    counts = [3, -3, 5, 5, 3, 7, -1, 1, 9]
    found = compare([(300 + 2 * k + d, 300 + 2 * k) for k, d in enumerate(counts)])
    assert found.t == pytest.approx(stats.ttest_1samp(counts, 0).pvalue)
    assert found.wilcoxon == stats.wilcoxon(counts).pvalue


def test_holm_by_hand():
    """0.01·3; then 0.02·2, which may not be below it; then 0.04."""
    assert evidence_report.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert evidence_report.holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_table_says_what_the_rows_say():
    accuracies = {"infonce": (0.40, 0.42, 0.44), "alpha_direct_p4": (0.43, 0.44, 0.45)}
    rows = [
        {
            **SCORES, "phase": "seed", "name": name, "seed": seed, "batch_size": 128, "lr": 0.003,
            "temperature": 0.2, "option": {}, "knn": x, "device_name": "x", "capability": "AVX512",
            "cpu_seconds": None if seed == 2 else 100.0 * seed,
        }
        for name, values in accuracies.items()
        for seed, x in enumerate(values, 1)
    ]  # fmt: skip
    rows.append({**rows[-1], "seed": 4, "status": "failed"})
    text = evidence_report.table("cifar10", rows, 112)
    error = statistics.stdev((40, 42, 44)) / math.sqrt(3)
    assert "7 of 112 runs are over." in text
    assert (
        f"| `infonce` | 3 of 5 | temperature 0.2, lr 0.003 | 42.00 ± {error:.2f} | 50.00 ± 0.00 |"
        in text
    )
    assert "| `alpha_direct_p4` | 4 of 5, 1 diverged |" in text
    p = stats.ttest_rel((43, 44, 45), (40, 42, 44)).pvalue
    assert f"| `alpha_direct_p4` | kNN | 3 | +2.00 ± 0.58 | {p:.2g} | {p:.2g} | 0.25 |" in text
    alone = evidence_report.table("cifar10", [row for row in rows if row["seed"] == 1], 112)
    assert "| `alpha_direct_p4` | kNN | 1 | +3.00 | – | – | – |" in alone
    assert evidence_report.table("cifar10", [], 112) == "No run is over yet.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "digit"], "--part must be one of digits, setting, cifar10"),
        ([], "evidence needs --part, one of digits, setting"),
        (["--part", "digits", "--lr", "0.1"], "evidence does not take --lr: it takes --part,"),
        (["--part", "cifar10"], "runs/evidence/setting.jsonl has no setting of InfoNCE that is"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", "evidence", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"alphacl: error: {message}")
    assert error.count("\n") == 1
