"""Time every call on its own under pytest-benchmark, to compare two versions or two machines.

    python -m pytest tools/test_calls.py --benchmark-autosave          # and after a change:
    python -m pytest tools/test_calls.py --benchmark-compare --benchmark-group-by=name

ALPHACL_BENCH_N (default "1024,4096") and ALPHACL_BENCH_DIM (128) choose the sizes. Implementations
are not interleaved: use `alphacl bench` for ratios between them. An implementation whose gradient
is wrong fails; an absent one is skipped with the reason.
"""

import dataclasses
import os

import pytest
import torch

from alphacl_fast import objectives
from alphacl_fast.benchmarks import loss
from alphacl_fast.benchmarks.baselines import serves
from alphacl_fast.benchmarks.bench import default_contestants, why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [int(n) for n in os.environ.get("ALPHACL_BENCH_N", "1024,4096").split(",")]
DIM = int(os.environ.get("ALPHACL_BENCH_DIM", "128"))
# keops and compiled take minutes to compile.
FAST = [name for name in default_contestants(DEVICE) if name not in ("keops", "compiled")]


def bench(benchmark, setting, name, measure):
    why = why_not(name, setting, DEVICE)
    if why:
        pytest.skip(f"{name}: {why}")
    function = setting.loss(name)
    error = loss.gradient_error(function, setting, DEVICE)
    assert error <= setting.gate
    call = loss.timed(measure, function, *setting.views(DEVICE))

    def run():
        call()
        loss.synchronize(DEVICE)

    benchmark.group = f"{setting.objective} {setting.negatives} n={setting.n} {measure}"
    benchmark.extra_info.update(dataclasses.asdict(setting), gradient_error=error)
    benchmark.extra_info.update(loss.provenance(DEVICE))
    benchmark(run)


@pytest.mark.parametrize("measure", loss.MEASURES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    ("negatives", "name"),
    [
        (mode, name)
        for mode in ("two_view", "cross_view")
        for name in FAST
        if serves(name, "infonce", mode)
    ],
)
def test_infonce(benchmark, negatives, name, n, measure):
    bench(benchmark, loss.Setting(n, DIM, negatives=negatives), name, measure)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("objective", objectives.names())
def test_objectives(benchmark, objective, n):
    bench(benchmark, loss.Setting(n, DIM, objective=objective), FAST[0], "loss+gradient")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("n", SIZES)
def test_dtypes(benchmark, dtype, n):
    bench(benchmark, loss.Setting(n, DIM, dtype), FAST[0], "loss+gradient")
