"""Every production configuration of the Triton kernels, compiled ahead of time for sm_80, sm_90 and sm_100."""

import os
import subprocess
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).parent.parent


def test_kernels_compile_cleanly(tmp_path):
    """No spills, no serialised wgmma, shared memory within limits, matrix instructions; docs/kernels.md is what came out."""
    page = tmp_path / "kernels.md"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.resources", "--check", "--write", str(page)], cwd=ROOT, capture_output=True,
        text=True, env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    recorded = (ROOT / "docs/kernels.md").read_text()
    if f"triton {triton.__version__};" in recorded:  # the table is that of one version of the compiler
        assert page.read_text() == recorded, "write docs/kernels.md again (its first lines say how)"
