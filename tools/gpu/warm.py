"""What every child would do again, done once: the server that forks them imports this module.

Triton hashes its own files, and the source of each kernel, before it looks into its cache.
"""

from __future__ import annotations

import contextlib

from . import ahead, sweeps, timings, tuning  # noqa: F401

with contextlib.suppress(ImportError):
    from triton.runtime.cache import triton_key
    from triton.runtime.jit import JITFunction

    from alphacl_fast.kernels import rows, sweeps

    triton_key()
    for module in (rows, sweeps):
        for found in vars(module).values():
            if isinstance(found, JITFunction):
                _ = found.cache_key
