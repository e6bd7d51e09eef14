"""Run tests with the oldest and the newest supported versions of Python, PyTorch and Triton.

    python -m tools.versions                  # `make versions`
    python -m tools.versions --only newest

Each pair gets an environment of its own in build/versions, which stays for the next run, with the
package installed from this checkout. A row of each run is appended to
benchmarks/results/versions.jsonl.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "versions"
RESULTS = ROOT / "benchmarks" / "results" / "versions.jsonl"


class Versions(NamedTuple):
    """What one environment has, and the tests that cannot run there."""

    python: str
    requirements: tuple[str, ...]
    left_out: tuple[str, ...] = ()


#: torch 2.4 brings Triton 3.0, which is older than the oldest that the Triton backend serves.
SUPPORTED = {
    "oldest": Versions(
        "python3.10", ("torch==2.4.0", "torchvision==0.19.0", "numpy==1.26.4"), ("test_triton",)
    ),
    "newest": Versions(
        "python3.13", ("torch==2.14.1", "torchvision", "triton==3.8.0", "numpy<2.4")
    ),
}
#: What they run: losses, gradients, compiled graphs, the native step, interpreted Triton kernels
#: where there is a Triton that serves, the command line.
TESTS = (
    "test_loss", "test_backends", "test_ids", "test_max_gap", "test_cpu", "test_cpu_step",
    "test_compile", "test_loss_against", "test_supcon", "test_siglip", "test_zoo", "test_triton",
    "test_cli",
)  # fmt: skip


def environment(name: str, versions: Versions) -> Path:
    """Make or update an environment; return its Python.

    Raises:
        RuntimeError: the Python is not there, or the packages cannot be installed.
    """
    folder = FOLDER / name
    if shutil.which(versions.python) is None:
        raise RuntimeError(f"{versions.python} is not on the PATH")
    inside = folder / "bin" / "python"
    if not inside.exists():
        _run([versions.python, "-m", "venv", folder])
    install = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    tools = ["pytest<9.2", "pytest-xdist", "hypothesis", "setuptools>=77", "wheel"]
    training = ["scikit-learn", "matplotlib", "tqdm", "pillow"]  # of the command line's tests
    _run([*install, *versions.requirements, *tools, *training])
    # in the environment, not in the checkout, whose library may be of other sources
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    _run(["git", "clone", "--quiet", ROOT, source])
    _run([*install, "--no-deps", "-e", source], cwd=source, ALPHACL_CPU="1", ALPHACL_CUDA="0")
    return inside


def _run(command: list[Any], cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": "", **environment},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def attempt(name: str, versions: Versions) -> dict[str, Any]:
    """Run the tests in an environment; return the row."""
    python = environment(name, versions)
    shown = "import platform, torch; print(platform.python_version(), torch.__version__)"
    found = "from importlib.metadata import version; print(version('triton'))"
    python_version, torch = _run([python, "-c", shown]).split()
    source = FOLDER / name / "source"
    files = [f"tests/{test}.py" for test in TESTS if test not in versions.left_out]
    done = subprocess.run(
        [str(python), "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider",
         *files],
        cwd=source, text=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    print(done.stdout)
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)
    }
    try:
        triton = _run([python, "-c", found]).strip()
    except RuntimeError:
        triton = None
    commit = _run(["git", "rev-parse", "--short", "HEAD"]).strip()
    return {
        "versions": name, "python": python_version, "torch": torch, "triton": triton,
        "commit": commit, "status": done.returncode, **counts,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.versions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", choices=[*SUPPORTED], help="one of the environments")
    args = parser.parse_args(arguments)
    from alphacl_fast import journal

    status = 0
    for name in [args.only] if args.only else SUPPORTED:
        try:
            row = attempt(name, SUPPORTED[name])
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
            continue
        journal.append(RESULTS, row)
        print(", ".join(f"{key} {value}" for key, value in row.items()))
        status = status or row["status"]
    return status


if __name__ == "__main__":
    sys.exit(main())
