"""Computes once what every child would compute again; the server that forks children imports it.

Triton hashes its own files, and the source of each kernel, before it looks into its cache.
"""

from __future__ import annotations

import importlib.util

from . import ahead  # noqa: F401  # it imports nearly everything that a child does


def hash_kernels() -> int:
    """Compute the hashes that Triton keeps in memory; return the number of kernels."""
    from triton.runtime.cache import triton_key
    from triton.runtime.jit import JITFunction

    from alphacl_fast.kernels import rows, sweeps

    triton_key()
    functions = [x for module in (rows, sweeps) for x in vars(module).values()]
    return sum(bool(x.cache_key) for x in functions if isinstance(x, JITFunction))


#: The number of kernels whose hashes are known.
HASHED = hash_kernels() if importlib.util.find_spec("triton") else 0
