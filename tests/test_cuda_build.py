"""The CUDA library as it is built, without a GPU: what the compiler made of it, what it needs, what its operators refuse."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphacl_fast.backend import cuda
from tools import build_cuda as build

ROOT = Path(__file__).parent.parent


def why_not():
    """Why there is no library, or None."""
    if not cuda.LIBRARY.exists():
        return cuda.FAILURE.read_text().strip() if cuda.FAILURE.exists() else "no library beside the package"
    return None


built = pytest.mark.skipif(why_not() is not None, reason=f"no compiled CUDA backend: {why_not()}")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_there_is_a_library_where_there_is_nvcc():
    """Or the tests below would be skipped for a library that does not compile."""
    if not shutil.which("nvcc") or os.environ.get("ALPHACL_CUDA") == "0":
        pytest.skip("no nvcc")
    assert why_not() is None


@built
def test_compiled_from_these_sources():
    """A library of other sources would be tested in vain: `make` or `python setup.py build_cuda` compiles again."""
    library = ctypes.CDLL(str(cuda.LIBRARY))
    library.alphacl_cuda_sources.restype = library.alphacl_cuda_build.restype = ctypes.c_char_p
    assert library.alphacl_cuda_sources().decode() == build.fingerprint()
    assert "arch=compute_" in library.alphacl_cuda_build().decode()


@pytest.fixture(scope="module")
def surveyed():
    """A row for each kernel and architecture."""
    from tools import cuda_resources

    try:
        return cuda_resources.survey()
    except RuntimeError as error:
        pytest.skip(str(error))  # a wheel of somebody else's


@built
def test_kernels_compile_cleanly(surveyed):
    """No spills, no serialised wgmma, matrix instructions."""
    assert len(surveyed) > 100
    assert not [row for row in surveyed if row["problems"]]


@built
def test_no_kernel_is_called_from_the_host():
    """nvcc makes a call of a device function from the host an exit(), without a word."""
    try:
        objects = build.objects()
    except RuntimeError as error:
        pytest.skip(str(error))
    for name, file in objects.items():
        undefined = subprocess.run(["nm", "-u", str(file)], capture_output=True, text=True, check=True).stdout.split()
        assert "exit" not in undefined, name
        assert "__cudaLaunchKernel" in undefined, name


@built
def test_shared_memory(surveyed):
    """Kernels that GPUs with 99 KB of shared memory a block are given, and all others of sm_80, find room."""
    for row in surveyed:
        large = any(part in row["kernel"] for part in ("<256, ", "double", "Tf32<128>"))
        if row["architecture"] == "sm_80":
            assert row["shared"] <= (cuda.SHARED_MEMORY if large else cuda.SMALL_SHARED_MEMORY), row["kernel"]


LOAD = f"""
import torch
torch.ops.load_library({str(cuda.LIBRARY)!r})
operators = torch.ops.alphacl_fast_cuda
print(operators.sweep.default._schema)
print(operators.rows.default._schema)
try:
    operators.rows(True, None, None, torch.zeros(2, 3), torch.zeros(2), None, None, None)
except NotImplementedError as error:
    print(str(error).splitlines()[0])
"""


@built
def test_loads_without_a_gpu():
    run = run_python(LOAD, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    sweep, rows, refusal = run.stdout.splitlines()
    assert sweep.startswith("alphacl_fast_cuda::sweep(Tensor f, ")
    assert rows.startswith("alphacl_fast_cuda::rows(bool finish, ")
    assert "'CPU' backend" in refusal


@built
def test_needs_torch_and_the_system_alone():
    """No CUDA runtime, which is linked in; no libpython; of torch what the stable ABI is in."""
    readelf = shutil.which("readelf")
    if not readelf:
        pytest.skip("no readelf")

    def read(*options):
        return subprocess.run([readelf, *options, str(cuda.LIBRARY)], capture_output=True, text=True, check=True).stdout

    text = read("-d")
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", text))
    system = {"libc", "libm", "libdl", "librt", "libpthread", "libstdc++", "libgcc_s", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert needed - system == {"libtorch_cuda", "libtorch_cpu"}
    assert "RUNPATH" not in text
    assert "RPATH" not in text
    symbols = read("--dyn-syms", "-W").splitlines()
    ours = {line.split()[-1] for line in symbols if " GLOBAL DEFAULT " in line and " UND " not in line}
    assert {name for name in ours if not name.startswith("alphacl_cuda_")} == set()


# --- the build --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("8.0;9.0a", "arch=compute_80,code=sm_80 arch=compute_90a,code=sm_90a"),
        ("7.5 8.6+PTX", "arch=compute_86,code=[sm_86,compute_86]"),
        ("", "arch=compute_80,code=[sm_80,compute_80] arch=compute_90a,code=sm_90a"),
    ],
)
def test_architectures(text, flags, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert " ".join(build.gencode(a)[1] for a in build.architectures()) == flags


@pytest.mark.parametrize(
    ("text", "message"), [("Ampere", "capabilities such as 8.0.*got 'Ampere'"), ("7.0;7.5", "a capability from 8.0 on")]
)
def test_architectures_that_are_none(text, message, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(RuntimeError, match=message):
        build.architectures()


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    """By the name of the thing: the toolkit, torch, a torch that is too old, a torch without CUDA."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no nvcc in CUDA_HOME \("):
        build.nvcc()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no nvcc on the PATH"):
        build.nvcc()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"torch is needed to build \(pip install --no-build-isolation\)"):
        build.torch_folders(cuda=True)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    for version, message in (("2.9.1", r"torch 2.10 is needed to build, found 2.9.1"), ("2.10.0+cpu", r"built without CUDA")):
        (tmp_path / "version.py").write_text(f"__version__ = {version!r}\ncuda = None\n")
        with pytest.raises(RuntimeError, match=message):
            build.torch_folders(cuda=True)


def test_without_nvcc_it_installs(tmp_path):
    """It keeps the reason for `alphacl info`, and fails only where the kernels were demanded."""
    source = tmp_path / "src"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [sys.executable, "setup.py", "-q", "build_cuda"]
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "ALPHACL_CUDA": "auto"}
    run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=True)
    reason = f"no nvcc in CUDA_HOME ({tmp_path})"
    assert run.stderr == f"alphacl_fast: no compiled CUDA kernels: {reason}\n"
    assert (source / "alphacl_fast" / "_cuda_not_built.txt").read_text() == reason + "\n"
    demanded = subprocess.run(command, cwd=source, env={**environment, "ALPHACL_CUDA": "1"}, capture_output=True, text=True)
    assert demanded.returncode != 0
    assert f"the CUDA kernels could not be built: {reason}" in demanded.stderr


def test_objects_are_compiled_again_when_what_they_include_changes(tmp_path, monkeypatch):
    shutil.copytree(ROOT / build.SOURCES, tmp_path / build.SOURCES)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    kernels = build.Object("FLOAT64", ("c++", "-O2"), "kernels.cu")
    host = build.Object("host", ("c++", "-O2", "-DALPHACL_EMULATED"), "kernels.cu")

    def changes(name):
        before = build.key(kernels), build.key(host)
        with (tmp_path / build.SOURCES / name).open("a") as file:
            file.write("\n")
        return [a != b for a, b in zip(before, (build.key(kernels), build.key(host)), strict=True)]

    assert changes("pairs.h") == [True, True]
    assert changes("device_gpu.h") == [True, False]
    assert changes("device_host.h") == [False, True]
    assert changes("binding.cpp") == [False, False]
    assert build.key(kernels) != build.key(kernels._replace(command=("c++", "-O3")))


# --- what the operators refuse ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def operators():
    path = os.environ["ALPHACL_CUDA_EMULATED"]  # tests/conftest.py compiles it
    if not path:
        pytest.skip("no C++ compiler")
    torch.ops.load_library(path)
    return torch.ops.alphacl_fast_cuda_emulated


N, D = 96, 24
NAMES = (
    "gradient", "dtype", "row_blocks", "n_rows", "n_cols", "row_start", "col_start", "half", "anchors", "n", "n_out", "lo",
    "first_block", "begin", "end", "col_slot", "parts", "kind", "form", "weight", "gradient_mode", "flags", "terms",
)  # fmt: skip
BOTH, ROWS_PAIRED, ROWS_ANCHOR, COLS_ANCHOR, IN_CHUNKS = 4, 8, 32, 64, 128
VECTORS = ("scale", "bias", "center", "gain", "shift", "offset", "level")
OUTPUTS = ("out", "df", "w_sums", "sums", "w")


def call(operators, *, f=None, tau=None, unit=None, rows=(0, -1, -1, -1, -1), constants=(0.0,) * 4, drop=0, **changes):
    """A sweep over all pairs of N rows, with changes: vectors and outputs by name, numbers by name."""
    given = {name: changes.pop(name, None) for name in (*VECTORS, *OUTPUTS)}
    numbers = {
        **dict.fromkeys(NAMES, 0), "dtype": 3, "row_blocks": 2, "n_rows": N, "n_cols": N, "half": N // 2, "anchors": N, "n": N,
        "n_out": N, "end": 2, "parts": 1, "form": 2, "flags": ROWS_ANCHOR | COLS_ANCHOR, "terms": 1, **changes,
    }  # fmt: skip
    numbers = [*numbers.values(), *rows]
    f, tau = torch.randn(N, D) if f is None else f, torch.ones(()) if tau is None else tau
    operators.sweep(
        f, *(given[name] for name in VECTORS), tau, unit, *(given[name] for name in OUTPUTS),
        numbers[: len(numbers) - drop], list(constants),
    )  # fmt: skip


def sums(**changes):
    return {"out": torch.empty(1, 1, N), **changes}


def product(**changes):
    return {"gradient": 1, "gradient_mode": 1, "df": torch.empty(1, N, D), "terms": 0, "rows": (-1,) * 5, **changes}


def weights(**changes):
    flags = ROWS_ANCHOR | COLS_ANCHOR | IN_CHUNKS
    given = {"f": torch.randn(N, 80), "flags": flags, "gradient_mode": 2, "df": None, "w": torch.empty(2 * 64, N)}
    return product(**{**given, **changes})


def test_calls_that_are_served(operators):
    gain = torch.ones(N)
    for given in (sums(), sums(f=torch.randn(N, 2 * D)[:, 3 : D + 3]), product(gain=gain), weights(gain=gain)):
        call(operators, **given)


REFUSED = {
    "numbers": (sums(drop=1), "numbers must be 28, got 27"),
    "constants": (sums(constants=(0.0,) * 3), "constants must be 4, got 3"),
    "f's dimensions": (sums(f=torch.randn(N)), "f must be 2-D, got 1 dimensions"),
    "f's columns": (sums(f=torch.randn(D, N).t()), f"columns of f must have stride 1, got {N}"),
    "f's type": (sums(f=torch.randn(N, D).half()), "f must be Float, got Half"),
    "rows": (sums(n_rows=N + 1), f"rows must lie within the {N} rows of f, got {N + 1} from 0"),
    "first row": (sums(row_start=1), f"rows must lie within the {N} rows of f, got {N} from 1"),
    "columns": (sums(col_start=1), f"columns must lie within the {N} rows of f, got {N} from 1"),
    "far away": (sums(row_start=2**62, n_rows=2**62), "rows must lie within"),
    "pairs": (sums(flags=ROWS_PAIRED | ROWS_ANCHOR, half=N), f"paired rows must be 2·half in number, got {N} with half = {N}"),
    "no parts": (sums(parts=0), r"parts must lie in \[1, "),
    "term": (sums(rows=(1, -1, -1, -1, -1)), r"row_of_term must lie in \[-1, 0\], got 1"),
    "range": (sums(begin=2, end=1), r"end must lie in \[2, "),
    "flag": (sums(flags=256), r"flags must lie in \[0, 255\], got 256"),
    "number too large": (sums(parts=2**31), r"parts must lie in \[1, 2147483647\], got 2147483648"),
    "vector": (sums(center=torch.zeros(N - 1)), f"center must have {N} elements or more, got {N - 1}"),
    "vector's type": (sums(scale=torch.zeros(N).double()), "scale must be Float, got Double"),
    "vector's strides": (sums(scale=torch.zeros(2 * N)[::2]), "scale must be contiguous"),
    "tau": (sums(tau=torch.ones((), dtype=torch.float64)), "tau must be Float, got Double"),
    "unit": (sums(unit=torch.ones(0)), "unit must have 1 elements or more, got 0"),
    "no out": (sums(out=None), "out is missing"),
    "out": (sums(parts=2), f"out must have {2 * N} elements or more, got {N}"),
    "out's bases": (sums(form=1), f"out must have {2 * N} elements or more, got {N}"),
    "slots of columns": (sums(flags=BOTH | 96, end=2, col_slot=1), f"out must have {3 * N} elements or more, got {N}"),
    "anchors": (sums(anchors=N - 1), f"out hold results for rows 0 to {N - 1} of f, but the launch has some for others"),
    "no df": (product(df=None), "df is missing"),
    "df": (product(parts=2), f"df must have {2 * N * D} elements or more, got {N * D}"),
    "df's rows": (product(lo=1), f"df hold results for rows 1 to {N + 1} of f"),
    "df's type": (product(df=torch.empty(1, N, D).bfloat16()), "df must be Float, got BFloat16"),
    "no w": (weights(w=None), "w is missing"),
    "w": (weights(row_blocks=3), f"w must have {3 * 64 * N} elements or more, got {2 * 64 * N}"),
    "w's type": (weights(w=torch.empty(128, N).bfloat16()), "w must be Float, got BFloat16"),
    "w_sums": (product(w_sums=torch.empty(N), parts=2, df=torch.empty(2, N, D)), f"w_sums must have {2 * N} elements"),
    "w_sums' rows": (product(w_sums=torch.empty(N), n=N - 1), f"w_sums hold results for rows 0 to {N - 1} of f"),
    "no sums": (product(terms=1, rows=(0, -1, -1, -1, -1)), "sums is missing"),
    "sums": (product(terms=2, rows=(0, 1, -1, -1, -1), sums=torch.empty(N)), f"sums must have {2 * N} elements or more"),
    "long rows": (sums(f=torch.randn(N, 80)), "rows of this length come in chunks of features"),
    "the kernel's own": (weights(gradient_mode=1, df=torch.empty(1, N, 80)), "rows of this length take the other gradient"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_sweeps_that_would_leave_memory(given, message, operators):
    with pytest.raises(RuntimeError, match=message):
        call(operators, **given)


def test_rows_that_would_leave_memory(operators):
    z, f = torch.randn(5, 7), torch.empty(10, 7)
    inv_norm, pos, q = torch.empty(10), torch.empty(10), torch.zeros(5)
    operators.rows(False, z, z, f, inv_norm, pos, None, None)
    for of_anchors in (q, torch.zeros(10)):
        operators.rows(True, None, None, f, inv_norm, None, torch.zeros(10, 7), of_anchors)
    for arguments, message in (
        ((False, z, z, f[:9], inv_norm, pos, None, None), "f must have an even number of rows, got 9"),
        ((False, z, z, f.int(), inv_norm, pos, None, None), "f must be BFloat16, Half, Float or Double, got Int"),
        ((False, z, z, torch.empty(7, 10).t(), inv_norm, pos, None, None), "columns of f must have stride 1"),
        ((False, z, z, torch.empty(10, 9)[:, :7], inv_norm, pos, None, None), "f must be contiguous"),
        ((False, z, None, f, inv_norm, pos, None, None), "z2 is missing"),
        ((False, z, z[:4], f, inv_norm, pos, None, None), r"z2 must be \(5, 7\), got \(4, 7\)"),
        ((False, z, z.double(), f, inv_norm, pos, None, None), "z2 must be Float, got Double"),
        ((False, z, z, f, inv_norm[:9], pos, None, None), "inv_norm must have 10 elements or more, got 9"),
        ((False, z, z, f, inv_norm, pos[:9], None, None), "pos must have 10 elements or more, got 9"),
        ((True, None, None, f, inv_norm, None, None, q), "d is missing"),
        ((True, None, None, f, inv_norm, None, torch.zeros(9, 7), q), "d must have 70 elements or more, got 63"),
        ((True, None, None, f, inv_norm, None, torch.zeros(10, 7), q[:4]), "q must have 5 elements or more, got 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operators.rows(*arguments)
