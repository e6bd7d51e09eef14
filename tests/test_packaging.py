"""What gets installed, and that importing it needs torch alone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("packaging")  # one worker makes what its tests share

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("a folder with spaces") / "src"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    kept = {**os.environ, "ALPHACL_CUDA_CACHE": str(ROOT / "build" / "cuda")}  # its CUDA kernels are the working tree's
    subprocess.run(command, check=True, capture_output=True, env=kept)
    (file,) = out.glob("*.whl")
    return file


def test_wheel_has_one_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"alphacl_fast"}
    assert "alphacl_fast/kernels/README.md" in names
    assert "alphacl_fast/kernels/sweeps.py" in names
    assert "alphacl_fast/backend/blocked.py" in names
    assert "alphacl_fast/benchmarks/bench.py" in names
    assert "alphacl_fast/train/loop.py" in names
    assert "alphacl_fast/py.typed" in names
    assert "-cp310-abi3-" in wheel.name
    for backend in ("cpu", "cuda"):  # the library, or the reason
        assert sum(f"alphacl_fast/_{backend}{end}" in names for end in (".abi3.so", "_not_built.txt")) == 1


def test_wheel_works_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import alphacl_fast, alphacl_fast.kernels, alphacl_fast.benchmarks.bench, torch; print(alphacl_fast.__file__); "
        "print(list(alphacl_fast.kernels.__path__)[0]); print(alphacl_fast.FusedAlphaCLLoss()(torch.eye(3), torch.eye(3)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": ""}, check=True,
        capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert Path(out[0]).parent == tmp_path / "alphacl_fast"
    assert Path(out[1]) == tmp_path / "alphacl_fast" / "kernels"


def test_import_needs_torch_alone():
    """No triton, no torchvision, no numpy, no sklearn; no device is touched and no compiler looked for."""
    code = """
import sys
for name in ("triton", "numpy", "torchvision", "sklearn", "matplotlib", "tqdm", "PIL"):
    sys.modules[name] = None
import torch
torch.cuda.is_available = torch.cuda.device_count = None
import alphacl_fast
print(alphacl_fast.FusedAlphaCLLoss("alpha_square")(torch.eye(4), torch.eye(4)).item())
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert abs(float(out.stdout) + 1) < 1e-6


def test_imports_go_one_way():
    """loss → functional → distributed → autograd → ops → backend, objectives below; train and benchmarks from public names."""
    import ast

    allowed = {
        "objectives": set(),
        "backend.ranges": {"objectives"},
        "backend.precision": set(),
        "backend.blocked": {"objectives", "ranges", "precision"},
        "backend.groups": set(),
        "backend.triton": {"objectives", "ranges", "precision", "groups"},
        "backend.cuda": {"objectives", "ranges", "precision", "groups"},
        "backend.cpu": {"objectives", "ranges"},
        "backend.reference": {"objectives"},
        "ops": {"backend", "objectives"},
        "autograd": {"ops", "objectives"},
        "distributed": {"autograd", "objectives"},
        "traced": {"autograd", "objectives"},
        "functional": {"ops", "autograd", "traced", "distributed", "backend", "objectives"},
        "players": {"functional", "autograd", "backend", "blocked", "objectives"},
        "theory": {"functional", "players", "objectives"},
        "claims": {"functional", "players", "theory"},
        "against": {"functional", "autograd", "objectives"},
        "compat.lightly": {"against", "autograd", "functional"},
        "compat.open_clip": {"functional"},
        "compat.pytorch_metric_learning": {"against", "functional"},
        "compat.sentence_transformers": {"against", "autograd", "functional"},
        "loss": {"functional", "players", "ops", "objectives"},
        "verify": {"distributed", "functional", "objectives"},
        "plan": {"autograd", "distributed", "functional", "objectives"},
    }
    for module, expected in allowed.items():
        tree = ast.parse((ROOT / "alphacl_fast" / (module.replace(".", "/") + ".py")).read_text())
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                imported |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        assert imported <= expected, module
    for file in (ROOT / "alphacl_fast" / "train").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("alphacl_fast"):
                public = node.module == "alphacl_fast" or node.module.startswith("alphacl_fast.train")
                assert public or (file.name, node.module) == ("__main__.py", "alphacl_fast.cli"), file


def test_imports_of_train_go_one_way():
    """As its docstring lists them: a module imports those of its own group and of the groups before."""
    import ast
    import re

    folder = ROOT / "alphacl_fast" / "train"
    listed = re.search(r"Modules import one way: (.*?)\.\n", (folder / "__init__.py").read_text(), re.DOTALL)[1]
    level = {name: group for group, names in enumerate(listed.split(";")) for name in re.findall(r"\w+", names)}
    assert {*level} == {file.stem for file in folder.glob("*.py")} - {"__init__", "__main__"}
    for name in level:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                imported = {node.module} if node.module else {alias.name for alias in node.names}
                assert all(level[other] <= level[name] for other in imported), (name, imported)


def test_without_a_compiler_one_line_says_so(tmp_path):
    """It installs, keeps the reason for `alphacl info`, and fails only where the kernels were demanded."""
    source = tmp_path / "src"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "CXX": "no-such-compiler", "ALPHACL_CUDA": "0"}
    run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=True)
    line, cuda = [line for line in run.stderr.splitlines() if line.startswith("alphacl_fast:")]
    assert "no compiled CPU kernels" in line
    assert cuda == "alphacl_fast: no compiled CUDA kernels: left out (ALPHACL_CUDA=0)"
    assert "no-such-compiler" in (source / "alphacl_fast" / "_cpu_not_built.txt").read_text()
    demanded = subprocess.run(command, cwd=source, env={**environment, "ALPHACL_CPU": "1"}, capture_output=True, text=True)
    assert demanded.returncode != 0
    assert "the CPU kernels could not be built" in demanded.stderr
