"""The built CUDA library, without a GPU: what the compiler made of it, what it needs and
refuses.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alphacl_fast.backend import cuda, gpu
from alphacl_fast.bundles import Dtype, Form, PairFunction, Pairing, Rows, RowScalars, Term
from alphacl_fast.objectives import KINDS
from tools import build_cuda as build

ROOT = Path(__file__).parent.parent


def why_not():
    """Why there is no library, or None."""
    if not cuda.LIBRARY.exists():
        return (
            cuda.FAILURE.read_text().strip()
            if cuda.FAILURE.exists()
            else "no library beside the package"
        )
    return None


built = pytest.mark.skipif(why_not() is not None, reason=f"no compiled CUDA backend: {why_not()}")


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_there_is_a_library_where_there_is_nvcc():
    """Or the tests below would be skipped for a library that does not compile."""
    if not shutil.which("nvcc") or os.environ.get("ALPHACL_CUDA") == "0":
        pytest.skip("no nvcc")
    assert why_not() is None


@built
def test_compiled_from_these_sources():
    """A library of other sources would be tested in vain.

    `python setup.py build_cuda` compiles again.
    """
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
        undefined = subprocess.run(
            ["nm", "-u", str(file)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert "exit" not in undefined, name
        assert "__cudaLaunchKernel" in undefined, name


@built
def test_shared_memory(surveyed):
    """Kernels for GPUs with 99 KB of shared memory a block, and all others of sm_80, find room."""
    for row in surveyed:
        large = any(part in row["kernel"] for part in ("<256, ", "double", "Tf32<128>"))
        if row["architecture"] == "sm_80":
            assert row["shared"] <= (cuda.SHARED_MEMORY if large else cuda.SMALL_SHARED_MEMORY), (
                row["kernel"]
            )


LOAD = """
from alphacl_fast.backend import cuda
library, reason = cuda._library("cuda")
assert library, reason
said = library.alphacl_cuda_sweep(cuda._SweepStruct(), None).decode()
print(library.alphacl_cuda_has_hopper(), said)
print(library.alphacl_cuda_why_not().decode())
"""


@built
def test_loads_without_a_gpu():
    run = run_python(LOAD, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    refusal, why_not = run.stdout.splitlines()
    assert refusal.startswith("0 n_rows must lie in [1, ")
    assert re.fullmatch(
        r"cannot run on this device: .+ \(compiled with CUDA \d+\.\d+, the driver serves .+\)",
        why_not,
    )


@built
def test_needs_the_system_alone():
    """No CUDA runtime, which is linked in; no libpython; nothing of torch."""
    readelf = shutil.which("readelf")
    if not readelf:
        pytest.skip("no readelf")

    def read(*options):
        return subprocess.run(
            [readelf, *options, str(cuda.LIBRARY)], capture_output=True, text=True, check=True
        ).stdout

    text = read("-d")
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", text))
    system = {
        "libc",
        "libm",
        "libdl",
        "librt",
        "libpthread",
        "libstdc++",
        "libgcc_s",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert needed <= system
    assert "RUNPATH" not in text
    assert "RPATH" not in text
    symbols = read("--dyn-syms", "-W").splitlines()
    ours = {
        line.split()[-1] for line in symbols if " GLOBAL DEFAULT " in line and " UND " not in line
    }
    assert {name for name in ours if not name.startswith("alphacl_cuda_")} == set()


# --- the build ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("8.0;9.0a", "arch=compute_80,code=sm_80 arch=compute_90a,code=sm_90a"),
        ("7.5 8.6+PTX", "arch=compute_86,code=[sm_86,compute_86]"),
        ("9.0", "arch=compute_90a,code=sm_90a"),
        (
            "9.0+PTX 10.0",
            "arch=compute_90a,code=sm_90a arch=compute_90,code=compute_90 "
            "arch=compute_100,code=sm_100",
        ),
        ("9.0;9.0a", "arch=compute_90a,code=sm_90a"),
        ("", "arch=compute_80,code=[sm_80,compute_80] arch=compute_90a,code=sm_90a"),
    ],
)
def test_architectures(text, flags, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    found = [flag for a in build.architectures() for flag in build.gencode(a)]
    assert " ".join(flag for flag in found if flag != "-gencode") == flags


@pytest.mark.parametrize(
    ("text", "message"),
    [("Ampere", "capabilities such as 8.0.*got 'Ampere'"), ("7.0;7.5", "a capability from 8.0 on")],
)
def test_architectures_that_are_none(text, message, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(RuntimeError, match=message):
        build.architectures()


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    """By the name of the thing: the toolkit that CUDA_HOME or the PATH lacks."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no nvcc in CUDA_HOME \("):
        build.nvcc()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no nvcc on the PATH"):
        build.nvcc()


def test_without_nvcc_it_installs(tmp_path):
    """It keeps the reason for `alphacl info`, and fails only where the kernels were demanded."""
    source = tmp_path / "src"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [sys.executable, "setup.py", "-q", "build_cuda"]
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "ALPHACL_CUDA": "auto"}
    run = subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, check=True
    )
    reason = f"no nvcc in CUDA_HOME ({tmp_path})"
    assert run.stderr == f"alphacl_fast: no compiled CUDA kernels: {reason}\n"
    assert (source / "alphacl_fast" / "_cuda_not_built.txt").read_text() == reason + "\n"
    demanded = subprocess.run(
        command,
        cwd=source,
        env={**environment, "ALPHACL_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert demanded.returncode != 0
    assert f"the CUDA kernels could not be built: {reason}" in demanded.stderr


def test_objects_are_compiled_again_when_what_they_include_changes(tmp_path, monkeypatch):
    emulator = Path("tests") / "emulator"
    for folder in (build.SOURCES, emulator):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    kernels = build.Object("FLOAT64", ("c++", "-O2"), "kernels.cu")
    host = build.Object("host", ("c++", "-O2", "-DALPHACL_EMULATED"), "kernels.cu")

    def changes(name, folder=build.SOURCES):
        before = build.key(kernels), build.key(host)
        with (tmp_path / folder / name).open("a") as file:
            file.write("\n")
        return [a != b for a, b in zip(before, (build.key(kernels), build.key(host)), strict=True)]

    assert changes("pairs.h") == [True, True]
    assert changes("device_gpu.h") == [True, False]
    assert changes("device_host.h", emulator) == [False, True]
    assert changes("driver.cpp") == [False, False]
    assert build.key(kernels) != build.key(kernels._replace(command=("c++", "-O3")))


def test_tiles_have_the_size_that_python_plans_with():
    engine, hopper = (
        (ROOT / build.SOURCES / f"{name}.h").read_text() for name in ("engine", "hopper")
    )

    def constant(name, text):
        return int(re.search(rf"constexpr int .*\b{name} = (\d+)", text)[1])

    assert constant("SIDE", engine) == cuda.SIDE
    assert constant("CONSUMERS", hopper) * constant("GROUP_ROWS", hopper) == cuda.HOPPER_SIDE


@pytest.mark.parametrize(
    ("program", "folder"),
    [
        ("test_kernels", "cpu"),
        ("test_driver", "cpu"),
        ("test_device", "cuda"),
        ("test_sweeps", "cuda"),
    ],
)
def test_cpp_tests_are_compiled_again_when_what_they_include_changes(program, folder):
    """tests/cpp/run.py hashes every header that a test includes, directly or not."""
    runner = cpp_runner()
    source = ROOT / "tests" / "cpp" / f"{program}.cpp"
    included = {*build.closure(source, "device_gpu")} - {source}
    assert included
    assert included <= {*runner.headers(Path("csrc") / folder)}


@pytest.mark.parametrize(
    ("has", "runs"),
    [
        ("sse4_2 fma avx f16c avx2", 2),
        ("fma avx f16c avx2 avx512f avx512dq avx512bw avx512vl avx512_vnni", 3),
        ("fma avx f16c avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16", 5),
        ("fma f16c avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16 amx_bf16 amx_tile", 6),
    ],
)
def test_cpp_tests_are_compiled_for_what_the_processor_runs(has, runs):
    """With the names of Linux, which are not those of the compilers' flags."""
    sets = build.build_cpu.INSTRUCTION_SETS
    order = ("portable", "avx2", "avx512", "avx512_bf16", "amx_emulated", "amx")
    found = {name for name in sets if cpp_runner().runs_on(f"flags\t: {has}\n", sets[name])}
    assert found == {*order[:runs]}


def cpp_runner():
    spec = importlib.util.spec_from_file_location("run_cpp", ROOT / "tests" / "cpp" / "run.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    return runner


# --- what the library refuses ---------------------------------------------------------------------

N, D = 96, 24


@pytest.fixture(scope="module")
def library():
    if not os.environ["ALPHACL_CUDA_EMULATED"]:  # tests/conftest.py compiles it
        pytest.skip("no C++ compiler")
    found, reason = cuda._library("cpu")
    assert found, reason
    return found


def held(x):
    """Elements from a tensor's first one to the end of its memory."""
    return x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()


def call(library, *, f=None, rows=(0, -1, -1, -1, -1), **changes):
    """What the library says of a sweep over all pairs of N rows.

    Changes are buffers and numbers.
    """
    buffers = {"f": torch.randn(N, D) if f is None else f, "tau": torch.ones(())}
    buffers |= {name: changes.pop(name) for name in cuda._INPUTS + cuda._OUTPUTS if name in changes}
    buffers = {name: x for name, x in buffers.items() if x is not None}
    struct = cuda._SweepStruct(
        **{name: x.data_ptr() for name, x in buffers.items()},
        elements=tuple(
            held(buffers[x]) if x in buffers else 0 for x in cuda._INPUTS + cuda._OUTPUTS
        ),
        row_of_term=rows,
        **{
            "stride": buffers["f"].stride(0),
            "dim": D,
            "dtype": Dtype.FLOAT32,
            "side": 64,
            "row_blocks": 2,
            "splits": 1,
            "n": N,
            "n_rows": N,
            "n_cols": N,
            "half": N // 2,
            "anchors": N,
            "n_out": N,
            "end": 2,
            "form": Form.PLAIN,
            "rows_anchor": 1,
            "cols_anchor": 1,
            "terms": 1,
            **changes,
        },
    )
    error = library.alphacl_cuda_sweep(struct, None)
    return None if error is None else error.decode()


def sums(**changes):
    return {"sums": torch.empty(1, 1, N), **changes}


def product(**changes):
    none = {"pair_grad": 1, "gradient": gpu.Gradient.PRODUCT, "terms": 0, "rows": (-1,) * 5}
    return {**none, "df": torch.empty(1, N, D), "row_weight": torch.ones(N), **changes}


def weights(**changes):
    given = {
        "f": torch.randn(N, 80),
        "dim": 80,
        "in_chunks": 1,
        "gradient": gpu.Gradient.WEIGHTS,
        "df": None,
    }
    return product(
        **{**given, "weights": torch.empty(2 * 64, 128), "weight_columns": 128, **changes}
    )


def test_calls_that_are_served(library):
    for given in (sums(), sums(f=torch.randn(N, 2 * D)[:, :D]), product(), weights()):
        assert call(library, **given) is None


REFUSED = {
    "short f": (sums(f=torch.empty(1), stride=D), f"f must have {N * D} elements or more, got 1"),
    "f's stride": (sums(stride=D + 1), f"f must have {(N - 1) * (D + 1) + D} elements or more"),
    "rows": (sums(n_rows=N + 1), f"rows must lie within the {N} rows of f, got {N + 1} from 0"),
    "first row": (sums(row_start=1), f"rows must lie within the {N} rows of f, got {N} from 1"),
    "columns": (sums(col_start=1), f"columns must lie within the {N} rows of f, got {N} from 1"),
    "far away": (sums(row_start=2**62, n_rows=2**62), "rows must lie within"),
    "pairs": (sums(rows_paired=1, half=N), f"paired rows must be 2·half in number, got {N} with"),
    "no rows": (sums(n_rows=0), "n_rows must lie in [1, "),
    "no splits": (sums(splits=0), "splits must lie in [1, "),
    "negative": (sums(row_start=-1), "starts and sizes must lie in [0, "),
    "term": (sums(rows=(1, -1, -1, -1, -1)), "row_of_term must lie in [-1, 0], got 1"),
    "range": (sums(begin=2, end=1), "end must lie in [2, "),
    "dtype": (sums(dtype=5), "unknown dtype"),
    "kind": (sums(kind=len(KINDS)), f"kind must lie in [0, {len(KINDS) - 1}]"),
    "weight": (product(weight=3), "weight must lie in [0, 2], got 3"),
    "form": (sums(form=4), "form must lie in [0, 3], got 4"),
    "gradient": (product(gradient=3), "gradient must lie in [0, 2], got 3"),
    "stride": (sums(stride=-1), "starts and sizes must lie in [0, "),
    "f beyond 2^63": (sums(stride=2**62, n=2**40), f"f must have {2**63 - 1} elements or more"),
    "vector": (
        sums(moment_origin=torch.zeros(N - 1)),
        f"moment_origin must have {N} elements or more",
    ),
    "limits": (sums(largest_t=torch.zeros(N - 1)), f"largest_t must have {N} elements or more"),
    "ids": (sums(ids=torch.zeros(N - 1).int()), f"ids must have {N} elements or more, got {N - 1}"),
    "no tau": (sums(tau=None), "tau is missing"),
    "no sums": (sums(sums=None), "sums is missing"),
    "few sums": (sums(splits=2), f"sums must have {2 * N} elements or more, got {N}"),
    "shifts": (sums(form=Form.ONLINE), f"sums must have {2 * N} elements or more, got {N}"),
    "slices": (sums(symmetric=1, column_slice=1), f"sums must have {3 * N} elements or more"),
    "anchors": (
        sums(anchors=N - 1),
        f"sums hold results for rows 0 to {N - 1} of f, but the launch",
    ),
    "no df": (product(df=None), "df is missing"),
    "df": (product(splits=2), f"df must have {2 * N * D} elements or more, got {N * D}"),
    "df's rows": (product(lo=1), f"df hold results for rows 1 to {N + 1} of f"),
    "no weights": (weights(weights=None), "weights is missing"),
    "weights": (weights(row_blocks=3), f"weights must have {3 * 64 * 128} elements or more"),
    "weight columns": (weights(weight_columns=N), "weight_columns must lie in [128, 128], got 96"),
    "weight sums": (
        product(weight_sums=torch.empty(N), splits=2, df=torch.empty(2, N, D)),
        f"weight_sums must have {2 * N} elements",
    ),
    "no sums of terms": (product(terms=1, rows=(0, -1, -1, -1, -1)), "sums is missing"),
    "sums of terms": (
        product(terms=2, rows=(0, 1, -1, -1, -1), sums=torch.empty(N)),
        f"sums must have {2 * N} elements or more",
    ),
    "symmetric": (product(symmetric=1), "pair_grad has no symmetric tiles"),
    "online": (
        sums(symmetric=1, form=Form.ONLINE, sums=torch.empty(2, 2, N)),
        "the online form has no symmetric tiles",
    ),
    "long rows": (sums(f=torch.randn(N, 80), dim=80), "rows of this length come in chunks"),
    "the kernel's own": (
        weights(gradient=gpu.Gradient.PRODUCT, df=torch.empty(1, N, 80)),
        "rows of this length take the other gradient",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_sweeps_that_would_leave_memory(given, message, library):
    assert message in call(library, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scale": torch.ones(N).double()},
            "scale must be torch.float32 on cpu, got torch.float64",
        ),
        (
            {"bias": torch.ones(N, device="meta")},
            "bias must be torch.float32 on cpu, got .* on meta",
        ),
        ({"f": torch.randn(N, D).double()}, "tau must be torch.float64 for rows of torch.float64"),
    ],
)
def test_operands_of_another_kind(changes, message, library):
    """The library cannot see a dtype or a device, so Python refuses them."""
    with pytest.raises(ValueError, match=message):
        sums_of(**changes)


def test_a_short_operand(library):
    """The library refuses a buffer that is too short, here through the backend."""
    with pytest.raises(RuntimeError, match=f"scale must have {N} elements or more, got {N - 1}"):
        sums_of(scale=torch.ones(N - 1))


def sums_of(**changes):
    rows = Rows(**{"f": torch.randn(N, D), **changes})
    function = PairFunction("exp", (), torch.ones(()))
    scalars = RowScalars(torch.ones(N))
    return cuda.row_sums(rows, Pairing(0, 0, N), function, scalars, (Term.SHIFT, Term.F), "")


def call_rows(library, finish, *, n_pairs=5, dim=7, **changes):
    """What the library answers to a pass over N pairs; changes are buffers and numbers."""
    names = ("f", "inv_norm", "d", "q") if finish else ("z1", "z2", "f", "inv_norm", "pos")
    shapes = {"z1": (5, 7), "z2": (5, 7), "f": (10, 7), "d": (10, 7), "q": (5,)}
    buffers = {name: torch.zeros(shapes.get(name, (10,))) for name in names}
    buffers |= {name: changes.pop(name) for name in cuda._ROW_BUFFERS if name in changes}
    buffers = {name: x for name, x in buffers.items() if x is not None}
    numbers = {
        "stride1": 7,
        "stride2": 7,
        "stride": 7,
        "anchors": 1,
        "dtype": Dtype.FLOAT32,
        **changes,
    }
    struct = cuda._PairRows(
        **{name: x.data_ptr() for name, x in buffers.items()},
        elements=tuple(held(buffers[x]) if x in buffers else 0 for x in cuda._ROW_BUFFERS),
        n_pairs=n_pairs,
        dim=dim,
        **numbers,
    )
    error = library.alphacl_cuda_rows(finish, struct, None)
    return None if error is None else error.decode()


ROUNDED_REFUSED = {
    "no rows": ({"n": 0}, "n must lie in [1, "),
    "no features": ({"dim": 0}, "dim must lie in [1, "),
    "negative stride": ({"stride": -1}, "stride must lie in [0, "),
    "rows over each other": ({"rounded_stride": 6}, "rounded_stride must lie in [7, "),
    "no f": ({"f": None}, "f is missing"),
    "f": ({"f": torch.zeros(4, 7)}, "f must have 35 elements or more, got 28"),
    "f's stride": ({"stride": 8}, "f must have 39 elements or more, got 35"),
    "rounded": ({"rounded": torch.zeros(4, 8)}, "rounded must have 39 elements or more, got 32"),
    "no rounded": ({"rounded": None}, "rounded is missing"),
}


@pytest.mark.parametrize(("changes", "message"), ROUNDED_REFUSED.values(), ids=[*ROUNDED_REFUSED])
def test_rounding_that_would_leave_its_buffers_is_refused(changes, message, library):
    numbers = {"n": 5, "dim": 7, "stride": 7, "rounded_stride": 8}

    def answer(**changes):
        buffers = {"f": torch.zeros(5, 7), "rounded": torch.zeros(5, 8)}
        buffers |= {name: changes.pop(name) for name in buffers if name in changes}
        struct = cuda._RoundedRows(
            **{name: x.data_ptr() for name, x in buffers.items() if x is not None},
            elements=tuple(0 if x is None else held(x) for x in buffers.values()),
            **{**numbers, **changes},
        )
        error = library.alphacl_cuda_rounded_rows(struct, None)
        return None if error is None else error.decode()

    assert answer() is None
    assert message in answer(**changes)


ROWS_REFUSED = {
    "no pairs": (False, {"n_pairs": 0}, "n_pairs must lie in [1, "),
    "no features": (True, {"dim": 0}, "dim must lie in [1, "),
    "negative stride": (False, {"stride1": -1}, "strides must lie in [0, "),
    "anchors": (True, {"anchors": 3}, "anchors must lie in [1, 2], got 3"),
    "dtype": (True, {"dtype": 5}, "unknown dtype"),
    "no z2": (False, {"z2": None}, "z2 is missing"),
    "z1": (False, {"z1": torch.zeros(4, 7)}, "z1 must have 35 elements or more, got 28"),
    "z2's stride": (False, {"stride2": 8}, "z2 must have 39 elements or more, got 35"),
    "f's stride": (False, {"stride": 8}, "f must have 79 elements or more, got 70"),
    "no scale": (False, {"dtype": Dtype.BFLOAT16}, "scale is missing"),
    "f": (False, {"f": torch.zeros(9, 7)}, "f must have 70 elements or more, got 63"),
    "inv_norm": (True, {"inv_norm": torch.zeros(9)}, "inv_norm must have 10 elements or more"),
    "pos": (False, {"pos": torch.zeros(9)}, "pos must have 10 elements or more, got 9"),
    "no d": (True, {"d": None}, "d is missing"),
    "d": (True, {"d": torch.zeros(9, 7)}, "d must have 70 elements or more, got 63"),
    "q": (True, {"anchors": 2}, "q must have 10 elements or more, got 5"),
}


@pytest.mark.parametrize(
    ("finish", "given", "message"), ROWS_REFUSED.values(), ids=ROWS_REFUSED.keys()
)
def test_rows_that_would_leave_memory(finish, given, message, library):
    assert call_rows(library, finish) is None
    assert message in call_rows(library, finish, **given)


def test_rows_of_another_kind(library):
    z = torch.randn(5, 7)
    f, _, inv_norm, _ = cuda.unit_rows(z, z)
    for d, q, message in (
        (torch.zeros(10, 7).double(), torch.zeros(5), "d must be torch.float32 on cpu"),
        (torch.zeros(7, 10).t(), torch.zeros(5), "d must be contiguous"),
        (
            torch.zeros(9, 7),
            torch.zeros(5),
            r"d and f must be \(2N, D\), got \(9, 7\) and \(10, 7\)",
        ),
        (torch.zeros(10, 7), torch.zeros(4), r"q must have 5 or 10 elements, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda.finish_rows(d, f, None, inv_norm, q)
    with pytest.raises(ValueError, match=r"inv_norm must be torch.float32 on cpu"):
        cuda.finish_rows(torch.zeros(10, 7), f, None, inv_norm.double(), torch.zeros(5))
    with pytest.raises(ValueError, match=r"d and f must be \(2N, D\)"):
        cuda.finish_rows(torch.zeros(9, 7), f[:9], None, inv_norm[:9], torch.zeros(4))
    with pytest.raises(ValueError, match=r"z2 must have the shape \(5, 7\), got \(4, 7\)"):
        cuda.unit_rows(z, z[:4])
    with pytest.raises(ValueError, match=r"z2 must be torch.float32 on cpu, got torch.float64"):
        cuda.unit_rows(z, z.double())
    assert [x.shape[0] for x in cuda.unit_rows(z[:0], z[:0])] == [0, 0, 0, 0]
