"""The rate of the loss on a device, which `plan` needs."""

import time

import torch

from .functional import alpha_cl_loss


def measured_rate(
    dim: int, dtype: torch.dtype, device: torch.device, pairs: int = 4096, seconds: float = 2.0
) -> float:
    """The rate of loss and gradient on this device, in FLOP/s at 8·D per pair of rows.

    The batch is large enough to keep the device busy.
    """
    z1, z2 = (
        torch.randn(2, pairs, dim, device=device, dtype=torch.float32)
        .to(dtype)
        .requires_grad_()
        .unbind()
    )

    def step() -> None:
        torch.autograd.grad(alpha_cl_loss(z1, z2), (z1, z2))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step()
        done += 1
    return done * 16 * dim * pairs**2 / (time.perf_counter() - start)
