"""Benchmark commands check gradients and write rows with provenance; documents match the rows."""

import functools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from training_runs import Fork

from alphacl_fast import cli, journal
from alphacl_fast.benchmarks import baselines, bench, loss, memory, report, step
from tools import training

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def small_gemm(monkeypatch):
    monkeypatch.setattr(loss, "GEMM", 64)


def run(out, *flags):
    return cli.main(
        [
            "bench",
            "--n",
            "64",
            "--dim",
            "8",
            "--device",
            "cpu",
            "--budget",
            "0.05",
            "--repeats",
            "2,3",
            "--out",
            str(out),
            *flags,
        ]
    )


def rows_of(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("negatives", ["two_view", "cross_view"])
def test_rows(tmp_path, negatives, small_gemm, capsys):
    names = ["cpu", "blocked", "eager"]
    flags = ["--negatives", negatives, "--measure", "loss,backward,loss+gradient"]
    assert run(tmp_path, *flags, "--contestants", ",".join(names)) == 0
    rows = rows_of(tmp_path)
    assert [(row["benchmark"], row["contestant"]) for row in rows] == [
        (m, name) for m in loss.MEASURES for name in names
    ]
    for row in rows:
        assert row["median_in_gemms"] > 0
        assert (row["fraction_of_gemm_rate"] is None) == (row["benchmark"] != "loss+gradient")
        assert row["median_ms"] is None  # absolute times are kept on GPUs only
        assert (row["torch"], row["negatives"]) == (torch.__version__, negatives)
        assert 0 < row["gradient_error"] < 1e-5
        assert row["device"]
        assert row["commit"]
    shown = capsys.readouterr()
    assert "**Backward alone**: infonce" in shown.out
    assert "x eager" in shown.err
    assert (tmp_path / "tables.md").read_text() in shown.out


def test_a_second_run_adds_rows_and_draws_the_growth(tmp_path, small_gemm):
    assert run(tmp_path, "--contestants", "cpu", "--measure", "loss+gradient") == 0
    assert not (tmp_path / "growth.png").exists()  # one size has no growth
    flags = ["--contestants", "cpu,cpu/triplet", "--measure", "loss+gradient"]
    assert run(tmp_path, *flags, "--n", "4096,2048") == 0
    assert len(rows_of(tmp_path)) == 5
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert "triplet, `two_view`" in (tmp_path / "tables.md").read_text()


@pytest.mark.skipif(not memory.supported(CPU), reason="peaks of a process can be read on Linux")
def test_memory_is_that_of_the_loss(tmp_path):
    """Dense losses hold n×n matrices; the kernels do not."""
    assert run(tmp_path, "--contestants", "cpu,eager", "--measure", "memory", "--n", "2048") == 0
    peaks = {row["contestant"]: row["peak_extra_bytes"] for row in rows_of(tmp_path)}
    assert peaks["eager"] > 2 * 4 * 2048**2
    assert peaks["cpu"] < 4 * 2048**2


def test_an_implementation_that_fails_leaves_a_row(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    row = memory.measure(loss.Setting(64, 8), "cpu", CPU)
    assert row["peak_extra_bytes"] is None
    assert "exit status 1" in row["error"]
    assert "exit status 1" in report.one_line(row)
    assert "did not run" in report.tables([row])


@pytest.mark.parametrize(
    "name", [name for name in baselines.PACKAGES if not baselines.BASELINES[name].gpu_only]
)
def test_baselines_compute_the_same_loss(name):
    """Every installed baseline has our value and gradient; others are skipped with the reason."""
    if baselines.missing(name):
        pytest.skip(baselines.missing(name))
    if name == "keops":
        pytest.skip("compiles for a minute")
    for negatives in baselines.BASELINES[name].modes["infonce"]:
        setting = loss.Setting(96, 16, negatives=negatives, tau=0.2)
        function = baselines.make(name, "infonce", negatives, 0.2)
        assert loss.gradient_error(function, setting, CPU) < 1e-5
        views = setting.views(CPU)
        ours = baselines.make("cpu", "infonce", negatives, 0.2)
        torch.testing.assert_close(loss.value(function, *views), loss.value(ours, *views))


def test_the_strongest_baselines_of_a_cpu_are_there():
    """The packages of the test extra are measured, not skipped."""
    for name in (
        "lightly",
        "pytorch_metric_learning",
        "open_clip",
        "info_nce",
        "sentence_transformers",
        "sentence_transformers_cached",
    ):
        assert baselines.missing(name) is None
        assert loss.version(name)
    assert {"eager", "compiled", "lightly", "keops"} <= set(bench.default_contestants(CPU))


def test_the_compiled_baseline_is_compiled_at_every_size(monkeypatch):
    """torch falls back to eager after a number of sizes."""
    # Inductor, the default compiler, would take half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    for n in (16, 24):
        compiled = baselines.make("compiled", "infonce", "cross_view", 0.5)
        views = loss.Setting(n, 8).views(CPU)
        loss.value(compiled, *views)
        loss.timed("backward", compiled, *views)()


@pytest.mark.skipif(
    " " in torch.__file__, reason="torch's inductor does not quote the path of its headers"
)
@pytest.mark.xdist_group("compile")  # one worker imports torch's inductor
def test_the_compiled_baselines_backward_runs_again():
    """By default it frees the buffers of the graph, and runs only once."""
    compiled = baselines.make("compiled", "infonce", "cross_view", 0.5)
    backward = loss.timed("backward", compiled, *loss.Setting(16, 8).views(CPU))
    for one, other in zip(backward(), backward(), strict=True):
        assert torch.equal(one, other)


def test_wrong_gradient_is_not_timed(monkeypatch, capsys, tmp_path):
    def make(name, *args):
        return (lambda z1, z2: (z1 * z2).sum()) if name == "eager" else baselines.make(name, *args)

    monkeypatch.setattr(loss, "make", make)
    with pytest.raises(SystemExit):
        run(tmp_path, "--contestants", "eager", "--measure", "loss+gradient")
    said = capsys.readouterr().err
    assert "eager skipped: gradient error" in said
    assert "nothing was measured" in said


def test_absent_and_too_large_baselines_are_named(monkeypatch):
    monkeypatch.setattr(bench, "available_bytes", lambda device: 10**9)
    monkeypatch.setattr(
        bench, "missing", lambda name: "No module named 'lightly'" if name == "lightly" else None
    )
    said = []
    settings = [loss.Setting(64, 8), loss.Setting(1 << 17, 8)]
    assert (
        list(
            bench.rows(
                settings, ["lightly", "eager", "open_clip"], [], CPU, loss.Effort(), said.append
            )
        )
        == []
    )
    assert said == [
        "lightly skipped: not installed: No module named 'lightly'",
        "eager skipped: its n×n matrices may take 550 GB of 1 GB that are free",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--n", "63"), "--n must be even, it counts both views; got 63"),
        (("--n", "2"), "--n must be at least 4"),
        (("--contestants", "eagr"), "--contestants must be of"),
        (("--contestants", "cpu/infonse"), "'infonse' is no objective"),
        (("--dtype", "int8"), "'int8' is none of float32"),
        (("--budget", "0"), "--budget must be a positive number"),
        (("--tau", "nan"), "--tau must be a positive number"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--objective", "triplet", "--contestants", "eager"), "nothing was measured"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch, small_gemm, capsys):
    measure = loss.run

    def interrupted(setting, *others):
        if setting.n == 128:
            signal.raise_signal(signal.SIGINT)
        return measure(setting, *others)

    monkeypatch.setattr(loss, "run", interrupted)
    flags = ["--n", "64,128", "--measure", "loss+gradient", "--contestants", "cpu"]
    assert run(tmp_path, *flags) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [row["n"] for row in rows_of(tmp_path)] == [64]


def test_eager_refuses_what_it_is_not():
    with pytest.raises(ValueError, match="eager must be asked for infonce"):
        baselines.make("eager", "triplet", "two_view", 0.5)
    with pytest.raises(ValueError, match="open_clip must be asked for infonce in cross_view"):
        baselines.make("open_clip", "infonce", "two_view", 0.5)


def test_calls_under_pytest_benchmark(tmp_path):
    """The suite of single calls runs at a tiny size."""
    out = tmp_path / "calls.json"
    command = [
        "tools/test_calls.py",
        "-n",
        "0",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-min-rounds=1",
        "--benchmark-max-time=0.001",
        "--benchmark-warmup=off",
        "-k",
        "cpu or eager or triplet or float64",
        f"--benchmark-json={out}",
    ]

    def calls():
        os.chdir(ROOT)
        os.dup2(2, 1)
        os.environ.update({"ALPHACL_BENCH_N": "64", "ALPHACL_BENCH_DIM": "8"})
        os.environ.pop("PYTEST_XDIST_WORKER", None)
        return pytest.main(command)

    process = Fork(calls)
    said = process.ended()
    assert process.poll() == 0, said[-2000:]
    found = json.loads(out.read_text())["benchmarks"]
    assert {"infonce two_view n=64 loss+gradient", "infonce cross_view n=64 backward"} <= {
        b["group"] for b in found
    }
    assert all(0 < b["extra_info"]["gradient_error"] < 1e-5 for b in found)


def test_training_step_by_backend(tmp_path):
    out = tmp_path / "rows.jsonl"
    flags = ["--micro-batch", "8", "--backends", "reference", "auto", "--repeats", "1"]
    training.main(["--batches", "16", *flags, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["contestant"] for row in rows] == ["reference", "auto"]
    assert rows[0]["speedup_over_reference"] == 1
    assert all(0 < row["loss_share"] < 1 for row in rows)
    assert "| 16 | 32 | `auto` |" in report.training(rows)


# --- the documents --------------------------------------------------------------------------------


def row(contestant, n, gemms, **other):
    return {
        "benchmark": "loss+gradient",
        "contestant": contestant,
        "objective": "infonce",
        "negatives": "two_view",
        "n": n,
        "dim": 128,
        "dtype": "float32",
        "threads": 2,
        "device": "here",
        "torch": "2",
        "python": "3",
        "commit": "c",
        "kernels": None,
        "median_in_gemms": gemms,
        "fraction_of_gemm_rate": 1.0,
        "peak_extra_bytes": None,
        **other,
    }


def test_rows_of_steps(tmp_path, capsys, monkeypatch):
    out = tmp_path / "step.jsonl"
    for name, value in (("PRODUCT", 64), ("RATES", ((8, "float32", (16,)),))):
        monkeypatch.setattr(step, name, value)
    seconds = step.seconds
    monkeypatch.setattr(step, "seconds", lambda *call: seconds(*call[:2], min(call[2], 2)))
    step.main(["--sizes=16", "--rounds=1", "--no-compile", f"--out={out}"])
    rows = journal.read(out)
    losses = ["infonce", "infonce", "siglip", "variants"]
    assert [row["loss"] for row in rows][:4] == losses
    assert [row["loss"] for row in rows][-2:] == ["rate", "rate"]
    assert len(rows) == 9
    found = [x for row in rows for x in (row.get("over_ours") or row["fractions"]).values()]
    assert all(ratio > 0 for ratio in found)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    table = report.small_batches(rows)
    assert table.count("| 16 |") == 7
    assert "own function (×)" in table
    assert "| cross_view, D = 8, float32, 1 thread | all tiles | " in table


def test_a_fraction_of_the_rate_counts_operations(monkeypatch):
    """A loss that takes as long as a product of as many operations has the product's rate."""
    monkeypatch.setattr(step, "PRODUCT", 32)
    clock = iter(range(10_000))
    monkeypatch.setattr(step.time, "perf_counter", lambda: float(next(clock)))
    for negatives, operations in (("two_view", 16), ("cross_view", 8)):
        found = step.rate(negatives, 8, "float32", 16, rounds=1)["fractions"]
        assert found == dict.fromkeys(found, operations * 16**2 * 8 / (2 * 32**3))


def test_parts_of_the_steps_are_named(capsys):
    with pytest.raises(SystemExit):
        step.main(["--parts=infonce,rates"])
    assert "--parts must be some of infonce, siglip, variants, supcon, rate" in (
        capsys.readouterr().err
    )


def test_rows_over_an_earlier_version():
    about = {"device": "a CPU", "threads": 1, "torch": "2", "before": "old"}
    about |= {"loss": "infonce", "negatives": "two_view", "dtype": "float32"}
    rows = [
        {**about, "kernels": kernels, "capability": widest, "commit": commit, "pairs": n}
        | {"over_before": n / 100 + (widest == "AVX2")}
        for widest, kernels, commit in (
            ("AVX512", "avx2", "first"), ("AVX512", "avx512", "first"), ("AVX2", "avx2", "second"),
        )
        for n in (16, 32)
    ]  # fmt: skip
    replaced = {**rows[0], "over_before": 9.0, "commit": "zeroth"}
    text = report.over_before([replaced, *rows])
    assert text.startswith(
        "Measured on a CPU (AVX512) and a CPU (AVX2), 1 thread, torch 2, commits first, "
        "second, compared with commit old."
    )
    assert "| AVX512 | `avx2` | infonce two_view, float32 | 0.16 | 0.32 |" in text
    assert "| AVX2 | `avx2` | infonce two_view, float32 | 1.16 | 1.32 |" in text


def test_rows_of_adapters():
    about = {"device": "a CPU", "capability": "AVX2", "threads": 1, "torch": "2", "commit": "abc"}
    rows = [
        {**about, "contestant": name, "n": n, "ours_over_theirs": ratio}
        for name, n, ratio in (
            ("old", 256, 9.0), ("old", 256, 0.5), ("old", 1024, None), ("new", 256, 0.0123),
        )
    ]  # fmt: skip
    text = report.adapters(rows)
    assert "| `old` | 0.50 | no memory |" in text
    assert "| `new` | 0.012 |  |" in text


def test_growth_is_fitted():
    assert report.fitted_power({2048: 3.0, 4096: 12.0, 8192: 48.0}) == pytest.approx(2)
    assert report.fitted_power({256: 1.0, 2048: 3.0}) is None  # one size of those that count


def test_headline_compares_with_the_best_of_each_kind():
    rows = [
        row("cpu", 4096, 1.0),
        row("blocked", 4096, 2.0),
        row("eager", 4096, 5.0),
        row("slow", 4096, 9.0),
        row("quick", 4096, 4.0),
        row("cpu", 4096, None, benchmark="memory", peak_extra_bytes=2e6),
        row("blocked", 4096, None, benchmark="memory", peak_extra_bytes=1e6),
        row("quick", 4096, None, benchmark="memory", peak_extra_bytes=7e6),
    ]
    line = report.headline(rows).splitlines()[2]
    assert line == "| two_view | 4,096 | 1.00 | 5.0 |  | 4.0 (quick) | 2.0 | 7.0 (quick) |"


def test_the_headline_leaves_small_batches_to_the_document():
    rows = [row("cpu", n, 1.0) for n in (128, 256)]
    assert [line.split(" | ")[1] for line in report.headline(rows).splitlines()[2:]] == ["256"]
    assert "n = 128 | n = 256" in report.tables(rows)


def test_small_batches_are_the_newest_rows_of_each_loss():
    about = {"device": "a CPU", "capability": "AVX2", "threads": 1, "torch": "2", "commit": "abc"}
    rows = [
        {"loss": "infonce", "negatives": "two_view", "pairs": 32, "over_ours": {"eager": 9.0}},
        {"loss": "infonce", "negatives": "two_view", "pairs": 32, "over_ours": {"eager": 2.0}},
        {"loss": "siglip", "pairs": 1024, "over_ours": {"InfoNCE": 1.05}},
    ]
    text = report.small_batches([row | about for row in rows])
    assert "| infonce two_view | 32 | 2.00 |" in text
    assert "9.00" not in text
    assert "| loss | N | InfoNCE (×) |" in text
    assert "| siglip | 1,024 | 1.05 |" in text


def test_objectives_stand_beside_infonce():
    """Objectives without a baseline share one table with InfoNCE; otherwise each has its own."""
    rows = [row("cpu", 64, 2.0), row("cpu", 64, 1.0, objective="triplet"), row("eager", 64, 3.0)]
    shown = report.tables(rows)
    assert "| `triplet` | 1 |" in shown.split("**Objectives**")[1]
    assert "| `infonce` | 2 |" in shown.split("**Objectives**")[1]
    assert "triplet" not in shown.split("**Objectives**")[0]
    assert "**Objectives**" not in report.tables(rows[1:])
    assert "gradient**: triplet" in report.tables(rows[1:])


def test_the_newest_row_counts(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = row("cpu", 64, 1.0), row("cpu", 128, 3.0), row("cpu", 64, 2.0)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert {r["n"]: r["median_in_gemms"] for r in report.read(file)} == {64: 2.0, 128: 3.0}


def test_documents_show_the_rows():
    for file, parts in report.sections(report.read(report.RESULTS)).items():
        text = file.read_text()
        assert text == report.filled(text, parts), (
            f"{file.name}: python -m benchmarks.report --write"
        )
    with pytest.raises(ValueError, match="2 marks are expected, found 0"):
        report.filled("nothing", ["a", "b"])
    with pytest.raises(ValueError, match="not closed"):
        report.filled(f"{report.BEGIN} x", ["a"])


@pytest.mark.parametrize("task", [*baselines.TASKS])
def test_every_implementation_of_a_task_has_the_same_gradient(task):
    """And value; torch.compile's implementations are the eager ones."""
    for negatives in baselines.TASKS[task].modes:
        setting = loss.Setting(n=96, dim=16, objective=task, negatives=negatives, tau=0.3)
        views = setting.views(CPU)
        truth = setting.loss("blocked")(*[z.double() for z in views]).item()
        names = [n for n in ("cpu", *baselines.BASELINES) if n != "compiled"]
        able = [n for n in names if baselines.serves(n, task, negatives)]
        here = [n for n in able if not baselines.missing(n)]
        assert "eager" in here
        for name in here:
            assert loss.checked(name, setting, CPU, loss.Effort())[1]["status"] == "ok", name
            assert setting.loss(name)(*views).item() == pytest.approx(truth, rel=1e-5)


def test_a_task_is_refused_in_another_mode():
    with pytest.raises(ValueError, match="cpu must be asked for siglip in cross_view, got siglip"):
        baselines.make("cpu", "siglip", "two_view", 0.5)
    with pytest.raises(ValueError, match="lightly must be asked for infonce in two_view; dcl in"):
        baselines.make("lightly", "siglip", "cross_view", 0.5)
