"""The device of a run, and its reproducibility settings."""

import ctypes
import os
import sys
from contextlib import contextmanager, nullcontext

import torch

from .config import Config, RunError


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """Resolve a device name.

    Args:
        name: "auto" (CUDA if available, else CPU), or any name that torch.device accepts.
        local_rank: index of this process on its machine, which selects its CUDA device; None for
            a single process.

    Raises:
        RunError: the device cannot be used, or several processes would share it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda"):
        if ":" in name:
            raise RunError(f"--device must not name one device for several processes, got {name}")
        name = f"cuda:{local_rank}"
        if local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def usual_default_device():
    """Make tensors on the CPU where no device is named, whatever ``set_default_device`` says."""
    try:
        usual = torch.get_default_device().type == "cpu"
    except (RuntimeError, AssertionError):  # a default device that this machine lacks
        usual = False
    with nullcontext() if usual else torch.device("cpu"):  # which would slow every operation
        yield


#: What the embeddings have under ``--amp``.
DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Return the context in which the network runs under ``--amp``."""
    dtype = torch.bfloat16 if config.amp == "none" else DTYPES[config.amp]
    return torch.autocast(device.type, dtype, enabled=config.amp != "none")


@contextmanager
def threads(count: int):
    """Run with ``count`` CPU threads (0: as before) inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


#: Parameters of glibc's ``mallopt`` (malloc.h), their values in :func:`memory_kept`, and glibc's.
_MALLOPT = {"M_MMAP_MAX": (-4, 0, 65536), "M_TRIM_THRESHOLD": (-1, -1, 128 * 1024)}


@contextmanager
def memory_kept():
    """Keep freed memory in the process inside, with glibc; it goes back to the system on exit.

    A step frees its activations, and the next one allocates them again. glibc returns blocks of
    this size at once, and the kernel clears every page of a block that it hands out anew. Numbers
    do not change.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    for number, kept, _ in _MALLOPT.values():
        libc.mallopt(number, kept)
    try:
        yield
    finally:
        for number, _, usual in _MALLOPT.values():
            libc.mallopt(number, usual)
        libc.malloc_trim(0)


@contextmanager
def settings(config: Config):
    """Apply what the config says of threads and deterministic algorithms; restore it on exit.

    Inside, freed memory stays in the process.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # warn if a layer has none
        torch.utils.deterministic.fill_uninitialized_memory = False  # only finds bugs, costs time
    try:
        with threads(config.threads), memory_kept():
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
