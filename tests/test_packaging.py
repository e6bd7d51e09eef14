"""What gets installed, in which ways, and which module may import which."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from preloaded import Preloaded

from alphacl_fast.backend import cpu
from tools import build_cpu

pytestmark = pytest.mark.xdist_group("packaging")  # one worker makes what its tests share

ROOT = Path(__file__).parent.parent
#: The folders of a checkout and the packages that their modules belong to.
FOLDERS = {
    "alphacl_fast": "alphacl_fast",
    "kernels": "alphacl_fast.kernels",
    "benchmarks": "alphacl_fast.benchmarks",
    "tools": "tools",
}


def isolated(folder=None):
    """The environment of a process that finds the packages here, but no editable install."""
    path = [str(folder)] * bool(folder) + [sysconfig.get_path("purelib")]
    kept = {name: x for name, x in os.environ.items() if not name.startswith("ALPHACL_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(path)}


@pytest.fixture(scope="module")
def run_isolated(tmp_path_factory):
    """Runs code with the packages of this environment, but without its editable installs.

    It finds torch imported, and nothing of this project.
    """
    empty = tmp_path_factory.mktemp("empty")
    with Preloaded(
        empty, "torch", folder=empty, options=["-S"], environment=isolated()
    ) as preloaded:

        def run(code, folder):
            found = f"import sys\nsys.path.insert(1, {str(folder)!r})\n{code}"
            done = preloaded.run(found, folder=folder, environment=isolated(folder))
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        yield run


def pip(*arguments, **environment):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


# --- what gets installed ---


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A fresh checkout."""
    folder = tmp_path_factory.mktemp("a folder with spaces") / "src"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (file,) = out.iterdir()
    return file


def test_wheel_without_a_compiler(sdist, tmp_path, run_isolated):
    """With an empty PATH the build finds no compiler and no nvcc: the wheel is made, holds the two
    reasons in place of the libraries, and serves a loss.
    """
    pip(
        *("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist),
        PATH="", CXX="c++", CUDA_HOME="",
    )  # fmt: skip
    (file,) = tmp_path.iterdir()
    with zipfile.ZipFile(file) as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".so")]
        for backend, words in (("cpu", "c++"), ("cuda", "no nvcc on the PATH")):
            assert words in wheel.read(f"alphacl_fast/_{backend}_not_built.txt").decode()
        wheel.extractall(tmp_path)
    code = """
import alphacl_fast, torch
print(alphacl_fast.FusedAlphaCLLoss()(torch.eye(3), torch.eye(3)).item() > 0)
print(alphacl_fast.backends()["cpu"])
"""
    served, reason = run_isolated(code, tmp_path)
    assert served == "True"
    assert "reinstall with a C++ compiler" in reason


#: Knows no instruction set but the portable one: the others are no other files.
COMPILER = """#!/bin/sh
case "$*" in *-mavx*) exit 1;; esac
{instead}
exec c++ "$@"
"""
#: Only reads the kernels, and instead of a link copies a library that has them.
COPIES = """
for last in "$@"; do :; done
case "$*" in
*csrc/cpu/kernels.cpp*) c++ "$@" -fsyntax-only && touch "$last"; exit;;
*-shared*_cpu.abi3.*) cp {library} "$last"; exit;;
esac
"""


def compiled_from(source):
    """Whether this installation's CPU library is compiled from the sources of a checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_cpu, "ROOT", source)
        sources = build_cpu.fingerprint()
    return not cpu.load_error() and cpu._library().alphacl_cpu_sources().decode() == sources


@pytest.fixture(scope="module")
def wheel(source, sdist, tmp_path_factory):
    """Built from the sdist in pip's isolated environment, which has setuptools alone.

    The CPU kernels are not compiled again where this installation has them.
    """
    out = tmp_path_factory.mktemp("wheel")
    compiler = out.parent / f"{out.name}-c++"
    copies = COPIES.format(library=shlex.quote(str(cpu.LIBRARY)))
    compiler.write_text(COMPILER.format(instead=copies if compiled_from(source) else ""))
    compiler.chmod(0o755)
    quick = {"CXX": str(compiler), "CXXFLAGS": "-O0"}
    quick["ALPHACL_CUDA_CACHE"] = str(ROOT / "build" / "cuda")
    pip("wheel", "-q", "--no-deps", "-w", out, sdist, **quick)
    (file,) = out.iterdir()
    return file


def test_sdist_has_every_file(source, sdist):
    """It builds, and tests itself: every file of the checkout, and nothing but those and metadata.

    `git ls-files` runs in the checkout that the sdist was made of: elsewhere files may be staged
    that it has not.
    """
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=source, check=True, capture_output=True, text=True).stdout
    tracked = {*listed.splitlines()}
    with tarfile.open(sdist) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    assert tracked - names == {".ci/run", ".gitignore"}
    metadata = {name for name in names - tracked if ".egg-info/" not in name}
    assert metadata == {"PKG-INFO", "setup.cfg"}


def test_wheel_has_two_top_level_names(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "alphacl = alphacl_cli:main" in file.read(scripts).decode().splitlines()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        links = re.findall(r"\]\(([^)]+)\)", file.read(metadata).decode())
        assert len(links) > 10
        assert all(link.startswith(("https://", "#")) for link in links)
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"alphacl_fast", "alphacl_cli.py"}
    assert {"alphacl_fast/kernels/README.md", "alphacl_fast/py.typed"} <= {*names}
    assert "-cp310-abi3-" in wheel.name
    for backend in ("cpu", "cuda"):  # the library, or the reason
        ends = (".abi3.so", "_not_built.txt")
        assert sum(f"alphacl_fast/_{backend}{end}" in names for end in ends) == 1


def test_every_module_of_the_wheel_is_imported(wheel, tmp_path, run_isolated):
    """The wheel has every module of the folders that it is made of, and imports its own."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
        files = [name[:-3].replace("/", ".") for name in file.namelist() if name.endswith(".py")]
    shipped = {name.removesuffix(".__init__") for name in files}
    assert shipped == {name for name in MODULES if not name.startswith("tools")}
    shipped = {name for name in shipped if not name.endswith("__main__")}
    if importlib.util.find_spec("triton") is None:
        shipped = {name for name in shipped if not name.startswith("alphacl_fast.kernels.")}
    code = f"""
import importlib, torch
for name in {sorted(shipped)}:
    print(importlib.import_module(name).__file__)
import alphacl_fast
print(alphacl_fast.FusedAlphaCLLoss()(torch.eye(3), torch.eye(3)).item() > 0)
"""
    *imported_files, served = run_isolated(code, tmp_path)
    assert served == "True"
    assert all(Path(file).is_relative_to(tmp_path) for file in imported_files)


def test_check_runs_from_a_wheel(wheel, tmp_path, run_isolated):
    """In processes of its own, which import the wheel too: `alphacl check` needs no checkout."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    flags = ["check", "--quick", "--backends", "blocked", "--device", "cpu", "--limit", "600"]
    *_, verdict = run_isolated(f"from alphacl_cli import main\nmain({flags})", tmp_path)
    assert re.fullmatch(r"no failure in \d{2,} cases", verdict)


@pytest.mark.parametrize("mode", ["default", "compat", "strict"])
def test_editable(source, tmp_path, mode, run_isolated):
    """Every way of an editable install has the stubs' modules, and not what else is at the top."""
    chosen = [] if mode == "default" else ["--config-settings", f"editable_mode={mode}"]
    pip(
        *("install", "-q", "--no-deps", "--no-build-isolation", "--target", tmp_path, *chosen),
        *("-e", source), ALPHACL_CPU="0", ALPHACL_CUDA="0",
    )  # fmt: skip
    code = f"""
import importlib, importlib.util, site, torch
site.addsitedir({str(tmp_path)!r})
for name in ("alphacl_cli", "alphacl_fast.kernels.config", "alphacl_fast.benchmarks.bench"):
    print(importlib.import_module(name).__file__)
names = ["alphacl_fast." + name for name in ("setup", "tests", "tools", "csrc")]
print([name for name in names if importlib.util.find_spec(name)])
import alphacl_fast
print(alphacl_fast.backends()["cpu"])
"""
    *files, others, reason = run_isolated(code, tmp_path)
    assert all(Path(file).is_relative_to(source) for file in files)
    assert others == "[]"
    assert "left out (ALPHACL_CPU=0)" in reason


@pytest.mark.parametrize("name", ["setup", "tests", "tools", "csrc"])
def test_the_top_of_a_checkout_is_not_in_the_package(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"alphacl_fast.{name}")


def test_import_needs_torch_alone():
    """No triton, no torchvision, no numpy, no sklearn; no device is touched, no compiler run."""
    code = """
import sys
for name in ("triton", "numpy", "torchvision", "sklearn", "matplotlib", "tqdm", "PIL"):
    sys.modules[name] = None
import torch
torch.cuda.is_available = torch.cuda.device_count = None
import alphacl_fast
print(alphacl_fast.FusedAlphaCLLoss("alpha_square")(torch.eye(4), torch.eye(4)).item())
"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert abs(float(out.stdout) + 1) < 1e-6


# --- which module may import which ---

#: A module imports modules of the lines above its own, and none of its own line.
LAYERS = """
_version bundles journal graph launches reads suggestions tracing backend.filling backend.precision
flags kernels.config kernels.start objectives subprocess_pool
cpp_printer program backend.forms backend.reference kernels.trace
backend.cpu_functions
backend.blocked backend.cpu backend.gpu kernels.rows
call kernels.sweeps
backend.cpu_groups backend.cpu_step backend.cuda backend.triton
ops
native
autograd plan
process_groups eager
distributed compiled_op steps
functional same_id shared_rows given_positives
one_operator
explicit_negatives matryoshka metrics micro_batch rate tune verify accuracy
pair_weights supcon guided
loss siglip zoo theory compat.entry compat.pairs
checks device_check compat.info_nce compat.lightly compat.open_clip compat.pytorch_metric_learning
compat.ranking compat.supcontrast
compat.embedding
compat.sentence_transformers
"""
#: Folders whose modules import each other, alphacl_fast itself and these.
WINGS = {
    "alphacl_fast.train": {"journal", "suggestions"},
    "alphacl_fast.benchmarks": {
        "accuracy",
        "backend.cpu",
        "functional",
        "journal",
        "native",
        "objectives",
        "ops",
        "train",
    },
    "tools": {
        "accuracy",
        "journal",
        "subprocess_pool",
        "bundles",
        "cpp_printer",
        "call",
        "distributed",
        "functional",
        "objectives",
        "ops",
        "plan",
        "process_groups",
        "backend.blocked",
        "backend.cuda",
        "backend.filling",
        "backend.gpu",
        "backend.triton",
        "benchmarks",
        "kernels",
        "train",
        "tune",
    },
}
#: What a build runs imports the standard library alone.
BUILDERS = ("tools.build_cpu", "tools.build_cuda")


def modules():
    """The file of every module."""
    found = {"alphacl_cli": ROOT / "alphacl_cli.py"}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imported(name):
    """The project's modules that a module imports, in functions too, and all others."""
    ours, others = set(), set()
    file = MODULES[name]
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            full = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in full]
        ours |= {name for name in names if name in MODULES}
        others |= {name for name in names if name not in MODULES}
    return ours, others


def test_imports_go_one_way():
    """loss → functional → distributed → autograd → ops → backend → objectives."""
    lines = LAYERS.strip().splitlines()
    level = {f"alphacl_fast.{name}": k for k, line in enumerate(lines) for name in line.split()}
    assert {*level} <= {*MODULES}
    roofs = {"alphacl_fast", "alphacl_cli", "alphacl_fast.cli", "alphacl_fast.train.__main__"}
    for name, file in MODULES.items():
        ours, _ = imported(name)
        wing = next((wing for wing in WINGS if f"{name}.".startswith(f"{wing}.")), None)
        if name in roofs:
            assert not any(other.startswith("tools") for other in ours), name
        elif wing:
            given = {wing, *(f"alphacl_fast.{other}" for other in WINGS[wing])}
            inside = tuple(f"{other}." for other in given)
            assert all(f"{other}.".startswith(inside) for other in ours - {"alphacl_fast"}), name
        elif name in level:
            assert all(level.get(other, len(lines)) < level[name] for other in ours), (name, ours)
        else:
            assert file.name == "__init__.py", f"{name} has no place in LAYERS"
            assert not ours, name


@pytest.mark.parametrize("name", BUILDERS)
def test_a_build_needs_the_standard_library_alone(name):
    ours, others = imported(name)
    assert not ours
    assert {other.split(".")[0] for other in others} <= sys.stdlib_module_names


def test_imports_of_train_go_one_way():
    """A module imports modules of its own group in the package's docstring, and of earlier ones."""
    folder = ROOT / "alphacl_fast" / "train"
    listed = re.search(
        r"Modules import one way: (.*?)\.\n", (folder / "__init__.py").read_text(), re.DOTALL
    )[1]
    level = {
        name: group
        for group, names in enumerate(listed.split(";"))
        for name in re.findall(r"\w+", names)
    }
    assert {*level} == {file.stem for file in folder.glob("*.py")} - {"__init__", "__main__"}
    for name in level:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                imported = {node.module} if node.module else {alias.name for alias in node.names}
                assert all(level[other] <= level[name] for other in imported), (name, imported)


def test_without_a_compiler_one_line_says_so(source):
    """It installs, keeps the reason for `alphacl info`, and fails only if ALPHACL_CPU=1."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "CXX": "no-such-compiler", "ALPHACL_CUDA": "0"}
    run = subprocess.run(
        command, cwd=source, env=environment, capture_output=True, text=True, check=True
    )
    line, cuda = [line for line in run.stderr.splitlines() if line.startswith("alphacl_fast:")]
    assert "no compiled CPU kernels" in line
    assert cuda == "alphacl_fast: no compiled CUDA kernels: left out (ALPHACL_CUDA=0)"
    assert "no-such-compiler" in (source / "alphacl_fast" / "_cpu_not_built.txt").read_text()
    environment["ALPHACL_CPU"] = "1"
    demanded = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert demanded.returncode != 0
    assert "the CPU kernels could not be built" in demanded.stderr
