"""Measure peak memory on top of the inputs; on a CPU each measurement runs in its own process."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import alphacl_fast

from . import loss

#: The folder in which a child process finds the package, installed or not.
FOLDER = Path(alphacl_fast.__file__).parents[1]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def supported(device: torch.device) -> bool:
    """Whether peaks can be read: on any GPU, and on a CPU where /proc has them (Linux)."""
    return device.type == "cuda" or (STATUS.exists() and RESET.exists())


def process_bytes(field: str) -> int:
    """Read a size such as "VmRSS" (resident set) or "VmHWM" (its peak) of this process."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_extra_bytes(setting: loss.Setting, name: str, device: torch.device) -> int:
    """Measure loss and gradient in this process: peak bytes, including gradients, not inputs."""
    function = setting.loss(name)
    loss.gradient(function, *replace(setting, n=64).views(device))  # does the first call's loading
    step = loss.timed("loss+gradient", function, *setting.views(device))
    if device.type == "cuda":
        return loss.peak_extra_bytes(step, device)
    with contextlib.suppress(OSError, AttributeError):
        # Return memory freed by the first call to the system: reusing it would not be counted.
        ctypes.CDLL(None).malloc_trim(0)
    before = process_bytes("VmRSS")
    RESET.write_text("5")  # resets the peak to the current resident set
    step()
    return max(0, process_bytes("VmHWM") - before)


def measure(
    setting: loss.Setting, name: str, device: torch.device, timeout: float = 600.0
) -> dict[str, Any]:
    """Measure one implementation.

    Args:
        setting: the problem.
        name: a baseline, or a backend of this package.
        device: where to run.
        timeout: seconds after which a child process is killed.

    Returns:
        One row; if the implementation fails, ``peak_extra_bytes`` is None and ``error`` says why.
    """
    row = loss.heading("memory", name, setting, device)
    peak = error = None
    if device.type == "cuda":
        try:
            peak = peak_extra_bytes(setting, name, device)
        except torch.OutOfMemoryError as problem:
            error = str(problem)[:200]
    else:
        call = f"memory.peak_extra_bytes(loss.{setting!r}, {name!r}, torch.{device!r})"
        code = f"import torch\nfrom {__package__} import loss, memory\n"
        code += f"torch.set_num_threads({torch.get_num_threads()})\nprint({call})"
        command, pipes = [sys.executable, "-c", code], {"capture_output": True, "text": True}
        try:
            child = subprocess.run(command, **pipes, timeout=timeout, cwd=FOLDER)
            if child.returncode == 0:
                peak = int(child.stdout.splitlines()[-1])
            else:  # killed for lack of memory, or an exception
                last = (child.stderr.strip().splitlines() or [""])[-1]
                error = f"exit status {child.returncode}: {last[:200]}"
        except subprocess.TimeoutExpired:
            error = f"more than {timeout:g} s"
    return {**row, "peak_extra_bytes": peak, "error": error, **loss.provenance(device)}
