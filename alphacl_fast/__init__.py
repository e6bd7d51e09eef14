"""Fused contrastive losses of the α-CL family (arXiv:2201.12680): exact, in O(N·D) memory.

A name is imported when it is first used. Importing the package alone therefore does not import
torch, which takes seconds that the help and the error messages of ``alphacl`` do not need.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from . import functional, objectives, theory
    from .explicit_negatives import loss_against, supcon_loss
    from .loss import FusedAlphaCLLoss
    from .matryoshka import MatryoshkaLoss
    from .metrics import BatchMetrics, alignment, batch_metrics, uniformity
    from .objectives import MinPlayer, PairLoss, PairWeight
    from .ops import backends
    from .pair_weights import AlphaSummary, alpha, alpha_summary
    from .siglip import SigLipLoss, siglip_loss
    from .verify import verify_distributed

#: Public name → the module that defines it, or its own name for a module.
_HOMES = {
    "AlphaSummary": "pair_weights",
    "BatchMetrics": "metrics",
    "FusedAlphaCLLoss": "loss",
    "MatryoshkaLoss": "matryoshka",
    "MinPlayer": "objectives",
    "PairLoss": "objectives",
    "PairWeight": "objectives",
    "SigLipLoss": "siglip",
    "alignment": "metrics",
    "alpha": "pair_weights",
    "alpha_summary": "pair_weights",
    "backends": "ops",
    "batch_metrics": "metrics",
    "functional": "functional",
    "loss_against": "explicit_negatives",
    "objectives": "objectives",
    "siglip_loss": "siglip",
    "supcon_loss": "explicit_negatives",
    "theory": "theory",
    "uniformity": "metrics",
    "verify_distributed": "verify",
}

__all__ = [
    "AlphaSummary",
    "BatchMetrics",
    "FusedAlphaCLLoss",
    "MatryoshkaLoss",
    "MinPlayer",
    "PairLoss",
    "PairWeight",
    "SigLipLoss",
    "__version__",
    "alignment",
    "alpha",
    "alpha_summary",
    "backends",
    "batch_metrics",
    "functional",
    "loss_against",
    "objectives",
    "siglip_loss",
    "supcon_loss",
    "theory",
    "uniformity",
    "verify_distributed",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOMES[name]}", __name__)
    value = module if _HOMES[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
