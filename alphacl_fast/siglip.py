"""`siglip_loss` and `SigLipLoss`: the sigmoid loss of all pairs of two views.

Every pair of a row of z1 and a row of z2 is a binary classification on its own, so one gradient
sweep over the pairs (`objectives.SigLip`) gives the loss and all of its derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import distributed, functional
from .call import Call
from .objectives import SIGLIP
from .process_groups import ProcessGroup

SIMILARITIES = ("cosine", "dot")


def siglip_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    ids: Tensor | None = None,
    similarity: str = "cosine",
    reduction: str = "mean",
    backend: str = "auto",
    precision: str | None = None,
    process_group: Any = None,
) -> Tensor:
    """Sigmoid loss of image-text pairs (SigLIP).

    (1/N) Σ_i Σ_j log(1 + exp(−y_ij·(scale·s_ij + bias))) over all N² pairs of a row of z1 and a row
    of z2, with the similarity s_ij and the label y_ij = 1 for j = i, else −1. Gradients flow to z1,
    z2 and tensors scale and bias.

    Args:
        z1: (N, D) embeddings of the first view, N ≥ 1, in float32, float64, bfloat16 or float16.
            Any strides are accepted.
        z2: (N, D) embeddings of the second view, with the dtype and device of z1; rows i of both
            are a positive pair.
        scale: the factor of the similarities, e^{t′} in the paper: a float or a one-element tensor,
            of either sign and at most 1e15 in magnitude. The host never reads a tensor
            on an accelerator, so its value is not checked.
        bias: a float or a tensor with one element; see ``scale``.
        ids: (N,) integers, moved to z1's device if necessary. A pair j ≠ i of samples with equal
            ids is left out of the sum; positive pairs stay. With a process group the ids of all
            ranks are compared. None: all pairs count.
        similarity: "cosine" (rows are normalised here; an all-zero row has gradient 0) or "dot"
            (rows as given).
        reduction: "mean" (over the rows of z1, the paper's form), "sum", or "none": (N,) sums over
            j.
        backend: "auto", "cpu", "triton", "cuda", "blocked" or "reference"; see
            `alphacl_fast.functional.alpha_cl_loss`.
        precision: arithmetic of float32 matrix products; see `alpha_cl_loss`.
        process_group: a `torch.distributed.ProcessGroup` or "world", whose ranks share one batch.
            Each rank passes its own pairs (any number) and receives the loss of the whole batch or,
            with reduction="none", the losses of its own rows of z1. Gradients follow the
            convention of `alphacl_fast.functional.alpha_cl_loss`, where scale and bias behave like
            the temperature.
            None: this process alone.

    Returns:
        () or, with reduction="none", (N,); float32, or float64 for float64 input.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names the argument, what was
            expected and what was received.
        ValueError: an argument has a bad value or shape, or no backend can serve the call. With a
            process group every rank raises, and the message names the ranks at fault.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023,
    arXiv:2303.15343.
    """
    group = functional.make_group(process_group, "auto")
    try:
        settings = similarity, reduction, backend, precision
        if group is None:
            call = functional.like_before(
                ("siglip", *settings), lambda: _make_call(*settings, None)
            )
        else:
            call = _make_call(*settings, group)
    except (TypeError, ValueError) as error:
        if group is not None:
            distributed.agree(group, None, None, None, None, error)  # raises
        raise
    return functional.loss_of(z1, z2, (scale, bias), call, ids)


class SigLipLoss(nn.Module):
    """The sigmoid loss of image-text pairs (SigLIP) that never stores the N×N matrix.

    Call it as ``loss(z1, z2)``; see `siglip_loss`.

    Args:
        scale: the factor of the similarities, a float, a tensor or an ``nn.Parameter``.
        bias: the number added to the scaled similarities, a float, a tensor or an ``nn.Parameter``.
        learnable: whether floats and tensors become parameters. Otherwise floats stay floats and
            tensors become buffers; an ``nn.Parameter`` always stays a parameter. The parameters are
            scale and bias themselves. The paper learns log(scale): for this, call `siglip_loss`
            with ``scale=log_scale.exp()``.
        similarity: "cosine" or "dot".
        reduction: "mean", "sum" or "none".
        backend: "auto" or the name of a backend.
        precision: arithmetic of float32 matrix products; None follows torch.
        process_group: None, "world" or a `torch.distributed.ProcessGroup` whose ranks share one
            batch.

    Shape:
        * z1, z2: (N, D), float32, float64, bfloat16 or float16.
        * ids: None or (N,) integers; a pair j ≠ i of samples with equal ids is left out.
        * output: () or, with ``reduction="none"``, (N,), in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: the constructor raises on bad options, the call on bad embeddings or
            ids (with a process group: on every rank). The message gives the name, the expected and
            the received value.

    Source: arXiv:2303.15343.
    """

    def __init__(
        self,
        scale: float | Tensor = 10.0,
        bias: float | Tensor = -10.0,
        learnable: bool = True,
        *,
        similarity: str = "cosine",
        reduction: str = "mean",
        backend: str = "auto",
        precision: str | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(learnable, bool):
            raise TypeError(f"learnable must be True or False, got {learnable!r}")
        group = functional.make_group(process_group, "auto")
        self._call = _make_call(similarity, reduction, backend, precision, group)
        functional.check_scale_and_bias(scale, bias)
        self._keep("scale", scale, learnable)
        self._keep("bias", bias, learnable)

    def _keep(self, name: str, given: float | Tensor, learnable: bool) -> None:
        """Makes a number an attribute, a parameter or a buffer."""
        graph = isinstance(given, Tensor) and (not given.is_leaf or given.requires_grad)
        if graph and not isinstance(given, nn.Parameter):
            raise ValueError(
                f"{name} must be a float, an nn.Parameter or a tensor that requires no gradient, "
                "got a tensor with a gradient (pass it to siglip_loss, or wrap it in nn.Parameter)"
            )
        if isinstance(given, nn.Parameter):
            setattr(self, name, given)
        elif learnable:
            value = given.detach() if isinstance(given, Tensor) else torch.tensor(float(given))
            setattr(self, name, nn.Parameter(value.clone()))
        elif isinstance(given, Tensor):
            self.register_buffer(name, given.detach().clone())
        else:
            setattr(self, name, float(given))

    def forward(self, z1: Tensor, z2: Tensor, ids: Tensor | None = None) -> Tensor:
        """The loss of a batch of positive pairs.

        Args:
            z1: (N, D) embeddings of the first view.
            z2: (N, D) embeddings of the second view, same dtype and device.
            ids: (N,) integers; pairs j ≠ i with equal ids are left out.

        Returns:
            () for reduction "mean" or "sum", (N,) for "none", in float32 or float64.

        Raises:
            TypeError, ValueError: bad embeddings or ids.
        """
        return functional.loss_of(z1, z2, (self.scale, self.bias), self._call, ids)

    def extra_repr(self) -> str:
        """Every setting. Tensor values are shown on a CPU only: reading others would wait."""
        call = self._call
        parts = [f"{name}={functional.shown(getattr(self, name))}" for name in ("scale", "bias")]
        parts += [f"similarity={call.similarity!r}", f"reduction={call.reduction!r}"]
        if call.process_group is not None:
            parts += [f"process_group={call.process_group!r}"]
        if call.precision is not None:
            parts += [f"precision={call.precision!r}"]
        return ", ".join([*parts, f"backend={call.backend!r}"])


def _make_call(
    similarity: str,
    reduction: str,
    backend: str,
    precision: str | None,
    group: ProcessGroup | None,
) -> Call:
    """Checks every argument but the tensors."""
    if similarity not in SIMILARITIES:
        raise ValueError(
            "similarity must be 'cosine' or 'dot' (a logit is scale times an inner product plus "
            f"bias), got {similarity!r}"
        )
    return functional.make_call(
        SIGLIP,
        {},
        similarity=similarity,
        negatives="cross_view",
        symmetric=False,
        reduction=reduction,
        backend=backend,
        precision=precision,
        process_group=group,
    )
