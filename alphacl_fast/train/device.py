"""The device of a run, and its reproducibility settings."""

import os
from contextlib import contextmanager

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


@contextmanager
def settings(config: Config):
    """Apply the config's thread count and deterministic algorithms; restore both on exit."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # warn if a layer has none
        torch.utils.deterministic.fill_uninitialized_memory = False  # only finds bugs, costs time
    try:
        with threads(config.threads):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
