"""Peak memory of one contestant beyond what was there before its call; on a CPU each in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import alphacl_fast

from .contestants import make
from .loss import Setting, gradient, kernels, provenance, synchronize, version

#: A child process finds the package here, installed or not.
FOLDER = Path(alphacl_fast.__file__).parents[1]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def supported(device: torch.device) -> bool:
    """Whether peaks can be read: of any GPU, and of a process where /proc has them (Linux)."""
    return device.type == "cuda" or (STATUS.exists() and RESET.exists())


def _bytes(field: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))


def _trim() -> None:
    """Gives the system back what the first calls have freed, for what is resident already would not count."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_of_device(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes of a GPU that a call needs beyond what was allocated before it, its result included."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_extra_bytes(setting: Setting, contestant: str, device: torch.device) -> int:
    """Of loss + gradient in this process, the gradient included, the inputs not."""
    loss = make(contestant, setting.objective, setting.negatives, setting.tau)
    gradient(loss, *replace(setting, n=64).views(device))  # loads what the first call loads
    views = setting.views(device)
    if device.type == "cuda":
        return peak_of_device(lambda: gradient(loss, *views), device)
    _trim()
    before = _bytes("VmRSS")
    RESET.write_text("5")  # the peak becomes what is resident now
    gradient(loss, *views)
    return max(0, _bytes("VmHWM") - before)


def measure(setting: Setting, contestant: str, device: torch.device, timeout: float = 600.0) -> dict[str, Any]:
    """One row; ``peak_extra_bytes`` is None, and ``error`` says why, where the contestant did not get through."""
    row = {
        "benchmark": "memory", "contestant": contestant, "version": version(contestant), "objective": setting.objective,
        "negatives": setting.negatives, "kernels": kernels(contestant, setting, device), "n": setting.n, "dim": setting.dim,
        "dtype": setting.dtype,
    }  # fmt: skip
    peak = error = None
    if device.type == "cuda":
        try:
            peak = peak_extra_bytes(setting, contestant, device)
        except torch.OutOfMemoryError as problem:
            error = str(problem)[:200]
    else:
        threads = str(torch.get_num_threads())
        command = [sys.executable, "-m", __name__, json.dumps(asdict(setting)), contestant, str(device), threads]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=FOLDER)
            peak = int(child.stdout.splitlines()[-1]) if child.returncode == 0 else None
            if peak is None:  # killed for want of memory, or an exception
                error = f"exit status {child.returncode}: {(child.stderr.strip().splitlines() or [''])[-1][:200]}"
        except subprocess.TimeoutExpired:
            error = f"more than {timeout:g} s"
    return {**row, "peak_extra_bytes": peak, "error": error, **provenance(device)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("setting", type=json.loads, help='such as {"n": 4096, "dim": 128}')
    parser.add_argument("contestant")
    parser.add_argument("device")
    parser.add_argument("threads", type=int)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    print(peak_extra_bytes(Setting(**given.setting), given.contestant, torch.device(given.device)))


if __name__ == "__main__":
    main()
