"""Blocks of rows of equal ids in C++ (csrc/cpu/same_id.h): the forms of supervised losses."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..bundles import Dtype
from . import cpu

_POINTERS = (
    *("t", "first", "last", "own", "log_sums", "origin", "weight"),
    *("loss", "of_log_sums", "of_tau"),
)


class _SameIdBlock(ctypes.Structure):
    """`struct SameIdBlock` of csrc/cpu/kernels.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [("rows", ctypes.c_int64), ("cols", ctypes.c_int64), ("tau", ctypes.c_double)]
        + [
            (name, ctypes.c_int32)
            for name in ("form", "bounded", "dtype", "threads", "instruction_set")
        ]
    )


SIZE = ctypes.sizeof(_SameIdBlock)
#: Pairs that justify waking a thread.
_PAIRS_PER_THREAD = 16_384


def differentiate(form: int, bounded: bool, tau: float, **tensors: Tensor | None) -> None:
    """One form of a supervised loss for a block of similarities, which their derivatives replace.

    Args:
        form: a number, the place of the form in `supcon.FORMS`.
        bounded: no exponential of a similarity, relative to the origin, overflows.
        tau: τ.
        **tensors: contiguous tensors with the names of the fields of ``SameIdBlock``: t (b, c),
            indices (b,) in int64 and vectors (b,) in the dtype of t. ``weight`` and ``own`` may be
            None.
    """
    t = tensors["t"]
    rows, cols = t.shape
    block = _SameIdBlock(
        rows=rows, cols=cols, tau=tau, form=form, bounded=bounded, dtype=Dtype.of(t.dtype),
        threads=max(1, min(torch.get_num_threads(), rows * cols // _PAIRS_PER_THREAD)),
        instruction_set=cpu.INSTRUCTION_SETS.index(cpu.instruction_set()),
        **{name: x.data_ptr() for name, x in tensors.items() if x is not None},
    )  # fmt: skip
    status = cpu._library().alphacl_cpu_same_id(ctypes.byref(block))
    if status:
        cpu.fail(status, rows, cols, t.dtype)
