"""Every production configuration of the Triton kernels, compiled for sm_80, 90, 100 and 120."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from family import FULL

ROOT = Path(__file__).parent.parent
#: One process runs both tests' scripts.
pytestmark = pytest.mark.xdist_group("triton-compile")

RESOURCES = """
import sys
from tools import triton_resources

print("status", triton_resources.main(sys.argv[1:]), flush=True)  # its own processes compile
"""
BIND = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Hopper:  # what a launch asks of a device before it runs a kernel
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

driver.set_active(Hopper())
from alphacl_fast.backend import gpu
from alphacl_fast.functional import alpha_cl_loss

run = triton.runtime.jit.JITFunction.run

def compile_only(self, *arguments, grid, warmup, **options):
    compiled[self.__name__] = self
    return run(self, *arguments, grid=grid, warmup=True, **options)

triton.runtime.jit.JITFunction.run = compile_only
gpu.pretend_gpu(multiprocessors=132)
compiled = {}
for n in (512, 500, 333, 17):
    z1, z2 = (torch.randn(n, 64).bfloat16().requires_grad_() for _ in range(2))
    alpha_cl_loss(z1, z2, backend="triton")
variants = {name: len(kernel.device_caches[0][0]) for name, kernel in compiled.items()}
assert variants == dict.fromkeys((
    "unit_rows_kernel", "row_sums", "reduce_splits_kernel", "row_step_kernel",
    "scaled_weights_kernel", "pair_grad", "finish_rows_kernel",
), 1), variants
"""


@pytest.fixture(scope="module")
def found():
    """What a process prints in which Triton is not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", RESOURCES + BIND, *([] if FULL else ["--in-turn"])]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


def test_kernels_compile_cleanly(found):
    """No spills, no serialised wgmma, shared memory within limits, matrix instructions."""
    assert "\nstatus 0\n" in found.stdout, found.stdout + found.stderr
    assert int(re.search(r"(\d+) kernels compiled, 0 with problems", found.stdout)[1]) > (
        100 if FULL else 30
    )


def test_launches_bind_and_compile_once_for_all_batch_sizes(found):
    """Through Triton's own launcher, up to the point where a GPU would be needed."""
    assert found.returncode == 0, found.stderr
