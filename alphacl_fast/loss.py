"""`FusedAlphaCLLoss`: the drop-in module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional, guided, ops, steps
from .objectives import Objective
from .pair_weights import SETTINGS, AlphaSummary, alpha_summary


class FusedAlphaCLLoss(nn.Module):
    """Contrastive loss of the α-CL family that never stores the N×N matrix.

    Call it as ``loss(z1, z2)``.

    Args:
        objective: a name listed by `alphacl_fast.objectives.names`, or an `Objective`.
        temperature: τ as a float, a tensor or an ``nn.Parameter``. A parameter is
            learned, if the objective depends on it; a tensor becomes a buffer.
        similarity: "cosine", "dot" or "euclidean"; see `alphacl_fast.functional.alpha_cl_loss`.
        negatives: "two_view", "one_view" or "cross_view"; see `alpha_cl_loss`.
        symmetric: whether "cross_view" averages both directions.
        reduction: "mean", "sum" or "none".
        backend: "auto" or the name of a backend.
        precision: arithmetic of float32 matrix products; None follows torch.
        process_group: None, "world", a `torch.distributed.ProcessGroup` or a 1-dimensional
            DeviceMesh, whose ranks share one batch.
        strategy: how those ranks exchange rows: "auto", "gather", "ring" or "two_level".
        ranks_per_node: how many neighbouring ranks share a node, for "two_level"; None: the
            environment variable LOCAL_WORLD_SIZE.
        guide_margin: the margin of a guide that a call passes; see `alpha_cl_loss`.
        max_gap: negatives more similar than the positive by more than this do not count; see
            `alpha_cl_loss`.
        workspace: bytes in which the CPU kernels may keep tiles; see `alpha_cl_loss`.
        temperature_range: (low, high) to which a learnable temperature is clamped in place before
            each use, as CLIP clamps its scale. None: it is not clamped.
        **options: options of the objective, by its own names.

    Shape:
        * z1, z2: (N, D), float32, float64, bfloat16 or float16.
        * guide: None or two tensors (N, G) of any float dtype.
        * ids: None or (N,) integers; samples with equal ids are not negatives of each other.
        * output: () or, with ``reduction="none"``, one value per anchor, in float32 (float64 for
          float64 input).

    Raises:
        TypeError, ValueError: the constructor raises on bad options, the call on bad embeddings or
            ids (with a process group: on every rank). The message gives the name, the expected and
            the received value.

    Source: Y. Tian, "Understanding Deep Contrastive Learning via Coordinate-wise Optimization",
    NeurIPS 2022, arXiv:2201.12680.
    """

    def __init__(
        self,
        objective: str | Objective = "infonce",
        *,
        temperature: float | Tensor = 0.5,
        similarity: str = "cosine",
        negatives: str = "two_view",
        symmetric: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        precision: str | None = None,
        process_group: Any = None,
        strategy: str = "auto",
        ranks_per_node: int | None = None,
        max_gap: float | None = None,
        guide_margin: float = 0.0,
        workspace: int | None = None,
        temperature_range: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._call = functional.make_call(
            objective,
            options,
            similarity=similarity,
            negatives=negatives,
            symmetric=symmetric,
            reduction=reduction,
            backend=backend,
            precision=precision,
            process_group=functional.make_group(process_group, strategy, ranks_per_node),
            max_gap=max_gap,
            workspace=workspace,
        )
        functional.check_temperature(temperature, self._call.objective)
        if isinstance(temperature, Tensor) and not temperature.is_leaf:
            raise ValueError(
                "temperature must be a leaf tensor or an nn.Parameter, got the result of an "
                "operation"
            )
        if temperature_range is not None and not isinstance(temperature, Tensor):
            raise ValueError(
                "temperature_range must be None with a fixed temperature, got "
                f"{temperature_range!r}"
            )
        self.temperature_range = _checked_range(temperature_range)
        functional.check_guide_margin(guide_margin)
        self.guide_margin = float(guide_margin)
        if (
            isinstance(temperature, Tensor)
            and not isinstance(temperature, nn.Parameter)
            and not temperature.requires_grad
        ):
            self.register_buffer("temperature", temperature.clone())
        else:
            self.temperature = temperature
        self._served: list[str] | None = None

    @property
    def precision(self) -> str | None:
        """The precision of float32 products that was asked for."""
        return self._call.precision

    @property
    def objective(self) -> Objective:
        """The objective in force."""
        return self._call.objective

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        ids: Tensor | None = None,
        guide: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The loss of a batch of positive pairs.

        Args:
            z1: (N, D) embeddings of the first view.
            z2: (N, D) embeddings of the second view, on the same device.
            ids: (N,) integers; pairs with equal ids are not negatives of each other.
            guide: (g1, g2), another model's embeddings (N, G) of both views, which says which
                negatives are false; see `alphacl_fast.functional.alpha_cl_loss`.

        Returns:
            () for reduction "mean" or "sum", (anchors,) for "none", in float32 or float64.

        Raises:
            TypeError, ValueError: bad embeddings or ids.
        """
        temperature = self.temperature
        if isinstance(temperature, Tensor) and self.temperature_range is not None:
            temperature.data.clamp_(*self.temperature_range)
        if guide is not None:
            return guided.loss(z1, z2, temperature, self._call, ids, guide, self.guide_margin)
        key = None
        if not torch.compiler.is_dynamo_compiling():
            found, key = steps.again(z1, z2, temperature, self._call, ids)
            if found is not None:
                self.__dict__["_served"] = [*found[1:]]  # a Module's own way takes three calls
                return found[0]
        loss, *served = functional.evaluate(z1, z2, temperature, self._call, ids, key)
        # while compiling, in a checkpoint, it would be a side effect
        if not torch.compiler.is_compiling() and served != self._served:
            self._served = served
        return loss

    def alpha_summary(self, z1: Tensor, z2: Tensor, *, k: int = 8, bins: int = 40) -> AlphaSummary:
        """Statistics of α on these embeddings (`alphacl_fast.alpha_summary`).

        With a process group they only cover this rank's pairs.

        Args:
            z1: (N, D) embeddings of the first view.
            z2: (N, D) embeddings of the second view.
            k: nearest negatives to keep per anchor.
            bins: bins of the histogram of d².
        """
        call = self._call
        return alpha_summary(
            z1, z2, call.objective, k=k, bins=bins, temperature=self.temperature,
            **{name: getattr(call, name) for name in SETTINGS},
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Every setting, and the backend with the reason for its choice."""
        call = self._call
        tau = self.temperature
        shown = (
            f"{tau.item():.6g} (tensor)"
            if isinstance(tau, Tensor) and tau.device.type == "cpu"
            else tau
        )
        parts = [str(call.objective), f"temperature={shown}", f"similarity={call.similarity!r}"]
        parts += [f"negatives={call.negatives!r}"]
        if call.negatives == "cross_view":
            parts += [f"symmetric={call.symmetric}"]
        parts += [f"reduction={call.reduction!r}"]
        if call.process_group is not None:
            parts += [f"process_group={call.process_group!r}"]
        if call.precision is not None:
            parts += [f"precision={call.precision!r}"]
        if call.max_gap is not None:
            parts += [f"max_gap={call.max_gap:g}"]
        if self.guide_margin:
            parts += [f"guide_margin={self.guide_margin:g}"]
        if call.workspace is not None:
            parts += [f"workspace={call.workspace}"]
        if self._served:
            chosen = "last call: " + ", ".join(self._served)
        else:
            try:
                name, why = ops.choose(
                    call.backend,
                    torch.device("cpu"),
                    torch.float32,
                    call.precision,
                    call.objective.kind,
                    ("max_gap",) if call.max_gap is not None else (),
                )
                chosen = f"on a CPU: {name}, {why}"
            except ValueError as error:
                chosen = str(error)
        return ", ".join(parts) + f", backend={call.backend!r} ({chosen})"


def _checked_range(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        low, high = (float(v) for v in value)
    except (TypeError, ValueError):
        raise TypeError(
            f"temperature_range must be None or two numbers (low, high), got {value!r}"
        ) from None
    if not 0 < low <= high:
        raise ValueError(f"temperature_range must satisfy 0 < low ≤ high, got {value!r}")
    return low, high
