"""Formulas printed as C++, compiled and compared with PyTorch; the headers are current."""

import ctypes
import itertools
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_rows import ROW_STEPS, error, row_vectors
from test_trace import OPTIONS, TABLE

from alphacl_fast import objectives
from alphacl_fast.cpp_printer import CpuPrinter, CudaPrinter, statements
from alphacl_fast.graph import UnsupportedFunction
from alphacl_fast.objectives import BatchNumbers, PairLoss
from tools import generate_headers as headers

#: One process compiles the formulas.
pytestmark = pytest.mark.xdist_group("cpp-printer")

ROOT = Path(__file__).parent.parent
DTYPES = {torch.float32: "float", torch.float64: "double"}
#: C++ has no such function, or vectors of one width have no place for the result.
REFUSED = {"double": "a conversion to float64", "erfinv": "erfinv"}

FUNCTION = """
template <class T> void {name}(const T* v, const T* s, T* out, int64_t n) {{
  const T s0 = s[0], s1 = s[1], s2 = s[2];
  for (int64_t i = 0; i < n; i += LANES<T>) {{
    const auto put = [&](int k, Vec<T> y) {{ std::memcpy(out + k * n + i, &y, sizeof(y)); }};
    {vectors}
    {body}
    (void)s0, (void)s1, (void)s2;
  }}
}}
"""


def test_committed_headers_are_current(tmp_path, monkeypatch):
    assert headers.stale() == []
    monkeypatch.setattr(headers, "FOLDER", tmp_path)
    headers.main()
    assert headers.stale() == []
    (tmp_path / "codes.h").write_text("")
    assert headers.stale() == ["codes.h"]


def printed(name, function, count, outputs):
    """C++ of a function of ``count`` vectors and three numbers."""
    vectors = [f"x{k}" for k in range(count)]
    result = " ".join(f"put({k}, {{}});" for k in range(outputs))
    loads = " ".join(
        f"const Vec<T> {x} = load_unaligned(v + {k} * n + i);" for k, x in enumerate(vectors)
    )
    body = "\n    ".join(
        statements(CpuPrinter, name, function, (vectors, ["s0", "s1", "s2"]), result)
    )
    return FUNCTION.format(name=name, vectors=loads, body=body)


def row_steps():
    """(name in C++, row step, params, count of vectors)."""
    for step, cases in ROW_STEPS.items():
        for k, (params, count) in enumerate(cases):
            yield f"{step}_{k}", objectives.ROW_STEPS[step], params, count


def call(step, params, count):
    return lambda *arguments: step(arguments[:count], BatchNumbers(*arguments[count:]), params)


def psi(name, piece):
    kind = objectives.kind(PSIS[name].kind).bind(())
    return lambda x, tau, *others: [getattr(kind, piece)(x, tau)]


def cpp_name(name, piece):
    return f"psi_{name.replace('-', 'minus_').replace('.', '_')}_{piece}"


PSIS = {name: PairLoss(None, TABLE[name]) for name in TABLE}
PIECES = [
    (name, piece) for name, piece in itertools.product(TABLE, ("f", "df")) if name not in REFUSED
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """All row steps and functions of the table in one library."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]}")
    folder = tmp_path_factory.mktemp("printed")
    codes, names = [], []
    for name, step, params, count in row_steps():
        codes.append(printed(name, call(step, params, count), count, len(step.outputs)))
        names.append(name)
    for name, piece in PIECES:
        names.append(cpp_name(name, piece))
        codes.append(printed(names[-1], psi(name, piece), 1, 1))
    logistic = objectives.KINDS["logistic"]
    names.append("logistic")
    codes.append(printed("logistic", lambda x, tau, *others: [logistic.f(x, tau)], 1, 1))
    entries = [
        f'extern "C" void {name}_{t}(const {t}* v, const {t}* s, {t}* out, int64_t n) '
        f"{{ {name}<{t}>(v, s, out, n); }}"
        for name, t in itertools.product(names, DTYPES.values())
    ]  # fmt: skip
    source = folder / "printed.cpp"
    source.write_text("\n".join([f'#include "{ROOT}/csrc/cpu/pairs.h"', *codes, *entries]))
    command = [
        *compiler,
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        str(source),
        "-o",
        str(folder / "printed.so"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:5000]
    return ctypes.CDLL(str(folder / "printed.so"))


def run(library, name, vectors, numbers, outputs):
    vectors, n = torch.stack(vectors).contiguous(), vectors[0].shape[0]
    numbers = torch.tensor(numbers, dtype=vectors.dtype)
    out = torch.full((outputs, n), torch.nan, dtype=vectors.dtype)
    function = getattr(library, f"{name}_{DTYPES[vectors.dtype]}")
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (vectors, numbers, out))
    function(*pointers, ctypes.c_int64(n))
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "step", "params", "count"),
    [*row_steps()],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_row_step(library, name, step, params, count, dtype):
    torch.manual_seed(0)
    vectors = row_vectors(step.name, count, 48, dtype)
    ours = run(library, name, vectors, (0.3, 30, 7), len(step.outputs))
    exact, eager = (
        step(
            [v.to(d) for v in vectors],
            BatchNumbers(torch.tensor(0.3, dtype=dtype).to(d), 30, 7),
            params,
        )
        for d in (torch.float64, dtype)
    )
    for output, a, truth, theirs in zip(step.outputs, ours, exact, eager, strict=True):
        if output == "done":
            assert torch.equal(a, theirs.to(dtype))
            continue
        assert error(a, truth) <= 2 * error(theirs, truth) + 8 * torch.finfo(dtype).eps, output


@pytest.mark.parametrize(("name", "piece"), PIECES)
def test_operation(library, name, piece):
    """As PyTorch in both dtypes, at points that no jump of the table's functions is near."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        tolerance = max(tolerance, OPTIONS.get(name, {}).get("rtol", 0))
        points = torch.linspace(-2.9713, 2.9357, 48, dtype=dtype)
        (expected,) = psi(name, piece)(points, torch.tensor(0.3, dtype=dtype))
        (ours,) = run(library, cpp_name(name, piece), [points], (0.3, 1, 1), 1)
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log1p_keeps_the_digits_of_a_small_argument(library, dtype):
    """The function of the table is log(1 + x²/1000): here of 1e-21 to 1e3, and of the ends."""
    points = torch.logspace(-9, 3, 48, dtype=dtype)
    (ours,) = run(library, cpp_name("log1p", "f"), [points], (0.3, 1, 1), 1)
    truth = TABLE["log1p"](points.double())
    torch.testing.assert_close(ours.double(), truth, rtol=8 * torch.finfo(dtype).eps, atol=0)
    ends = torch.tensor([0.0, torch.inf, torch.nan], dtype=dtype).repeat(16)
    (ours,) = run(library, cpp_name("log1p", "f"), [ends], (0.3, 1, 1), 1)
    torch.testing.assert_close(ours, ends, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log1p_of_a_probability_keeps_its_digits(library, dtype):
    """log(1 + eˣ), x ≤ 0, has its own polynomial: two units for it, two for the exponential."""
    points = torch.cat([torch.linspace(-60, 0, 1008), torch.linspace(-1, 0, 1008)]).to(dtype)
    (ours,) = run(library, "logistic", [points], (0.3, 1, 1), 1)
    truth = torch.log1p(points.double().exp())
    torch.testing.assert_close(ours.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=0)
    ends = torch.tensor([-torch.inf, torch.inf, torch.nan], dtype=dtype).repeat(16)
    (ours,) = run(library, "logistic", [ends], (0.3, 1, 1), 1)
    torch.testing.assert_close(ours, ends.clamp(min=0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    with pytest.raises(
        UnsupportedFunction, match=f"psi_{name} uses {REFUSED[name]}: not in C\\+\\+"
    ):
        printed(f"psi_{name}", psi(name, "f"), 1, 1)


def test_cuda_refuses_by_name():
    with pytest.raises(UnsupportedFunction, match="psi uses tanh: not in CUDA"):
        statements(CudaPrinter, "psi", psi("tanh", "f"), (["x"], ["tau"]))
