"""At which precision torch multiplies float32 matrices; used by every backend that follows it."""

from __future__ import annotations

import torch


def float32_precision(device: torch.device) -> str:
    """The precision at which torch multiplies float32 matrices on a device now: ieee, tf32 or
    bf16.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)  # torch >= 2.9
    if setting in (None, "none"):
        try:
            setting = {"highest": "ieee", "high": "tf32", "medium": "bf16"}[
                torch.get_float32_matmul_precision()
            ]
        # the old setting cannot be read once the new one has been used; unset means ieee
        except RuntimeError:
            setting = "ieee"
    return "ieee" if setting == "tf32" and device.type == "cpu" else setting
