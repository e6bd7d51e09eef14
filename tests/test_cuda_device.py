"""The layer that CUDA kernels are written against: the host's emulation does what it says, and
PTX passes the assembler.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "cpp"


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}"


def test_emulation(tmp_path):
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(compiler[0]):
        pytest.skip(f"no compiler: {compiler[0]}")
    program = tmp_path / "test_device"
    run(
        *compiler,
        "-std=c++17",
        "-O1",
        "-DALPHACL_EMULATED",
        SOURCES / "test_device.cpp",
        "-o",
        program,
    )
    run(program)


@pytest.mark.parametrize(
    "options", [["-arch=sm_80"], ["-arch=sm_90a", "-DWITH_HOPPER"]], ids=["sm_80", "sm_90a"]
)
def test_primitives_are_instructions(tmp_path, options):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    run(
        "nvcc",
        *options,
        "-std=c++17",
        "-cubin",
        SOURCES / "all_primitives.cu",
        "-o",
        tmp_path / "all_primitives.cubin",
    )
