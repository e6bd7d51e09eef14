"""Where a run computes and how repeatably."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

from .config import Config, RunError


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device called ``name``; "auto" is CUDA where there is one. Raises RunError for one that is not there.

    ``local_rank``: which of a machine's processes this is; each takes the CUDA device of its number.
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
def one_thread():
    """One CPU thread inside: for operations so short that threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def settings(config: Config):
    """The threads of ``config`` and, if it wants them, order-fixed algorithms inside; as before afterwards."""
    threads = torch.get_num_threads()
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
              torch.utils.deterministic.fill_uninitialized_memory)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # a layer without such an algorithm warns
        torch.utils.deterministic.fill_uninitialized_memory = False  # it guards against bugs, not against disorder
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
